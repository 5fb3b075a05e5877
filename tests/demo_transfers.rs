//! The demo on a database: money moves between accounts exactly once, whatever becomes of its process.
#![cfg(feature = "postgres")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::Arc;

use futures_util::future::join_all;
use http::StatusCode;
use serde_json::{Value, json};
use support::{
    demo::{Demo, ENDLESS},
    http::{get, post, send},
    postgres::{Postgres, url},
    proxy::{Proxy, Weather},
    serve::assert_replay,
};

async fn accounts(demo: &Demo) -> Value {
    get(demo.address(), "/accounts").await.json()
}

fn order(from: u64, to: u64, amount: u64) -> String {
    json!({ "from": from, "to": to, "amount": amount }).to_string()
}

const KEY: &str = "idempotency-key";

#[tokio::test]
async fn a_transfer_moves_money_once_and_its_effect_is_in_the_ledger() {
    let server = Postgres::start(&[]);
    let demo = Demo::start(&["--store", &server.url()]);
    let sum = accounts(&demo).await["sum"].clone();
    let first = demo.post("/transfers", &[(KEY, "k")], &order(1, 2, 500)).await;
    assert_eq!(first.status, StatusCode::CREATED, "{first:?}");
    assert_replay(&first, &demo.post("/transfers", &[(KEY, "k")], &order(1, 2, 500)).await);
    let after = accounts(&demo).await;
    assert_eq!(
        (&after["accounts"][0]["balance"], &after["accounts"][1]["balance"]),
        (&json!(99_500), &json!(100_500))
    );
    assert_eq!(after["sum"], sum);
    demo.assert_one_effect(&first).await;
    let other = demo.post("/transfers", &[(KEY, "k")], &order(1, 2, 501)).await;
    assert_eq!(other.problem(), "idempotency-key-reused");
    assert_eq!(
        demo.post("/transfers", &[], &order(1, 2, 5)).await.problem(),
        "idempotency-key-missing"
    );
}

#[tokio::test]
async fn a_transfer_that_panics_between_its_halves_moves_nothing_and_runs_again() {
    let server = Postgres::start(&[]);
    let demo = Demo::start(&["--store", &server.url()]);
    let before = accounts(&demo).await;
    demo.lose("/transfers", &[(KEY, "k")], &order(1, 2, 500)).await;
    assert_eq!(accounts(&demo).await, before);
    assert!(demo.effects().await.is_empty());
    let again = demo.post("/transfers", &[(KEY, "k")], &order(1, 2, 500)).await;
    assert_eq!((again.status, again.is_replay()), (StatusCode::CREATED, false));
    demo.assert_one_effect(&again).await;
    // One that is to be answered with a status on demand panics before that, too.
    let asked = [(KEY, "asked"), ("x-demo-status", "402")];
    demo.lose("/transfers", &asked, &order(1, 2, 500)).await;
    // What is no object is no transfer, though its values are in order.
    let listed = demo.post("/transfers", &[(KEY, "listed")], "[1,2,500]").await;
    assert_eq!(listed.status, StatusCode::BAD_REQUEST);
    // What an account does not hold is declined, and stays declined.
    let declined = demo.post("/transfers", &[(KEY, "poor")], &order(1, 2, 1_000_000)).await;
    assert_eq!(declined.status, StatusCode::PAYMENT_REQUIRED);
    assert_replay(
        &declined,
        &demo.post("/transfers", &[(KEY, "poor")], &order(1, 2, 1_000_000)).await,
    );
    assert_eq!(accounts(&demo).await["sum"], before["sum"]);
}

#[tokio::test]
async fn the_other_routes_keep_their_records_and_their_ledger_in_the_database_too() {
    let server = Postgres::start(&[]);
    let start = || Demo::start(&["--store", &server.url()]);
    let (demo, other) = (start(), start());
    let first = demo.post("/payments", &[(KEY, "k")], r#"{"amount":5}"#).await;
    assert_eq!(first.status, StatusCode::CREATED);
    demo.kill();
    // Another process knows the answer, and the effect.
    assert_replay(&first, &other.post("/payments", &[(KEY, "k")], r#"{"amount":5}"#).await);
    other.assert_one_effect(&first).await;
    // One that starts later shows what was done since then.
    let later = start();
    assert!(later.effects().await.is_empty());
    let second = later.post("/transfers", &[(KEY, "k")], &order(1, 2, 5)).await;
    later.assert_one_effect(&second).await;
    let ids: Vec<_> = other
        .effects()
        .await
        .iter()
        .map(|effect| effect["id"].clone())
        .collect();
    assert_eq!(
        ids,
        [&second, &first].map(|answer| answer.json()["id"].clone()),
        "newest first"
    );
}

/// Before the effect: long enough for what is done to the database meanwhile.
const SLOWLY: (&str, &str) = ("x-demo-delay-ms", "2000");

#[tokio::test]
async fn an_effect_whose_database_is_away_is_answered_as_what_it_is_and_is_not_lost() {
    let mut server = Postgres::start(&[]);
    let demo = Demo::start(&["--store", &server.url()]);
    let (answer, ()) = tokio::join!(demo.post("/payments", &[(KEY, "k"), SLOWLY], "{}"), async {
        demo.until_executed(1).await;
        server.kill();
    });
    assert_eq!(
        (answer.status, answer.is_replay()),
        (StatusCode::CREATED, false),
        "{answer:?}"
    );
    server.restart();
    assert_replay(&answer, &demo.settled("/payments", &[(KEY, "k")], "{}").await);
    demo.assert_one_effect(&answer).await;
    assert_eq!(counted(&demo).await, "1");
    assert_eq!(server.ask::<i64>("SELECT count(*) FROM demo_ledger").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_effect_whose_writing_was_not_answered_is_there_once() {
    let server = Postgres::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let demo = Demo::start(&["--store", &url(proxy.port())]);
    // Its statements are prepared with that.
    let before = demo.post("/v3/check/digital", &[(KEY, "before")], "{}").await;
    assert_eq!(before.status, StatusCode::CREATED);
    let headers = [(KEY, "k"), SLOWLY];
    let (answer, ()) = tokio::join!(demo.post("/v3/check/digital", &headers, "{}"), async {
        demo.until_executed(2).await;
        proxy.make(Weather::LoseAnswer);
    });
    assert_eq!(proxy.weather(), Weather::Clear, "an answer was lost");
    assert_eq!(
        (answer.status, answer.is_replay()),
        (StatusCode::CREATED, false),
        "{answer:?}"
    );
    assert_replay(&answer, &demo.settled("/v3/check/digital", &[(KEY, "k")], "{}").await);
    assert_eq!(server.ask::<i64>("SELECT count(*) FROM demo_ledger").await, 2);
    let ids: Vec<_> = demo.effects().await.iter().map(|effect| effect["id"].clone()).collect();
    assert_eq!(ids, [&answer, &before].map(|answer| answer.json()["id"].clone()));
    assert_eq!(counted(&demo).await, "2");
}

#[tokio::test]
async fn who_leaves_while_the_ledger_is_locked_holds_up_nobody_and_its_effect_is_not_lost() {
    let server = Postgres::start(&[]);
    let demo = Demo::start(&["--store", &server.url()]);
    let locker = server.client().await;
    let lock = "BEGIN; LOCK TABLE demo_ledger IN ACCESS EXCLUSIVE MODE";
    locker.batch_execute(lock).await.unwrap();
    // It carries no key, so its handler ends with it.
    let client = tokio::spawn(send(demo.address(), post("/v3/check/digital", &[], "{}")));
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    while server.ask::<i64>(waiting).await == 0 && !client.is_finished() {
        tokio::task::yield_now().await;
    }
    client.abort();
    assert!(client.await.is_err(), "it left");
    assert_eq!(accounts(&demo).await["sum"], json!(1_000_000));
    locker.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(demo.effects().await.len(), 1);
    assert_eq!(counted(&demo).await, "1");
}

/// How many effects the metrics tell of.
async fn counted(demo: &Demo) -> String {
    let metrics = get(demo.address(), "/metrics").await;
    let text = String::from_utf8(metrics.body.to_vec()).unwrap();
    let count = text.lines().find_map(|line| line.strip_prefix("demo_effects_total "));
    count.expect("it is told").to_owned()
}

#[tokio::test]
async fn a_process_that_is_killed_in_the_middle_of_transfers_has_done_each_once_or_not_at_all() {
    let server = Postgres::start(&[]);
    let doomed = Demo::start(&["--store", &server.url()]);
    let other = Demo::start(&["--store", &server.url()]);
    let sum = accounts(&other).await["sum"].clone();
    let (from, orders) = (
        doomed.address(),
        Arc::new(
            (0..60_u64)
                .map(|n| order(1 + n % 7, 1 + (n + 3) % 7, 5 + n))
                .collect::<Vec<_>>(),
        ),
    );
    // One never ends, half done.
    tokio::spawn(send(
        from,
        post("/transfers", &[(KEY, "stuck"), ENDLESS], order(8, 9, 1)),
    ));
    doomed.until_executed(1).await;
    let mut running = Vec::new();
    for number in 0..orders.len() {
        let orders = Arc::clone(&orders);
        running.push(tokio::spawn(async move {
            send(
                from,
                post("/transfers", &[(KEY, &format!("t-{number}"))], orders[number].clone()),
            )
            .await
        }));
    }
    let mut told = Vec::new();
    for (number, request) in running.into_iter().enumerate() {
        if number == 20 {
            break;
        }
        told.push(request.await.unwrap());
    }
    doomed.kill();
    let keys: Vec<_> = (0..orders.len()).map(|number| format!("t-{number}")).collect();
    let settle = keys.iter().zip(orders.iter()).map(|(key, body)| async {
        let headers = [(KEY, key.as_str())];
        other
            .until("/transfers", &headers, body, |answer| {
                answer.status == StatusCode::CREATED
            })
            .await
    });
    let answers = join_all(settle).await;
    for (told, answer) in told.iter().zip(&answers) {
        if let Ok(told) = told {
            assert_eq!(told.body, answer.body, "what was told stays told");
        }
    }
    let effects = other.effects().await;
    let mut ids: Vec<_> = effects
        .iter()
        .map(|effect| effect["id"].as_str().unwrap().to_owned())
        .collect();
    let mut answered: Vec<_> = answers
        .iter()
        .map(|answer| answer.json()["id"].as_str().unwrap().to_owned())
        .collect();
    ids.sort();
    answered.sort();
    assert_eq!(ids, answered, "each once, and nothing else");
    assert_eq!(accounts(&other).await["sum"], sum);
}
