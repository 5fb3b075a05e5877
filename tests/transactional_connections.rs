//! What becomes of a connection that was cut off in its transaction, or leads to a server that may not write.
#![cfg(feature = "sqlx")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, routing::post};
use http::StatusCode;
use sqlx::{
    Executor, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use support::{
    app::{call, keyed, open},
    bank::{self, ACCOUNTS, BALANCE, BOTH, Bank, Library, PATIENCE, order},
    commit_proxy::{CommitProxy, Cut},
    postgres::{self, Postgres},
    proxy::{Proxy, Weather},
    serve::assert_replay,
};
use tokio::time::timeout;
use tower_idempotency::{Guarantee, IdempotencyLayer, PostgresStore, PostgresTransaction};

const MONEY: i64 = ACCOUNTS * BALANCE;

/// So that one whose client is gone without a word, with its machine, is not in the way for hours.
#[tokio::test]
async fn a_session_in_a_transaction_asks_its_client_every_few_seconds_whether_it_is_there() {
    async fn settings(transaction: PostgresTransaction) -> String {
        let sql = "SELECT concat_ws(' ', current_setting('tcp_keepalives_idle'), \
                   current_setting('tcp_keepalives_interval'), current_setting('tcp_keepalives_count'))";
        transaction.query_one(sql, &[]).await.unwrap().get(0)
    }
    for (server, expected) in [
        (Postgres::start(&[]), "10 5 3"),
        (Postgres::start(&["tcp_keepalives_idle=70"]), "70 5 3"),
    ] {
        let builder = PostgresStore::builder().create_table(true).purge_every(None);
        let store = builder.timeout(PATIENCE).connect(&server.url()).await.unwrap();
        let layer = IdempotencyLayer::new(store).guarantee(Guarantee::Transactional);
        let app = Router::new().route("/pay", post(settings)).layer(layer);
        assert_eq!(call(&app, keyed("k", "a")).await.body, expected);
    }
}

/// What is streamed, and not read when the handler answers, holds back what the server says of the commit; and the commit
/// itself, where it is more than what lies between them takes.
#[tokio::test]
async fn what_became_of_a_commit_behind_a_stream_that_nobody_reads_is_found_out() {
    for (rows, committed) in [(10, true), (100_000, false)] {
        let server = Postgres::start(&[]);
        server.say("CREATE TABLE done (key text PRIMARY KEY)").await;
        let builder = PostgresStore::builder().create_table(true).purge_every(None);
        let store = builder.timeout(PATIENCE).connect(&server.url()).await.unwrap();
        let layer = IdempotencyLayer::new(store).guarantee(Guarantee::Transactional);
        let unread = Arc::new(Mutex::new(None));
        let kept = Arc::clone(&unread);
        let handler = post(async move |transaction: PostgresTransaction| {
            transaction.execute("INSERT INTO done VALUES ('k')", &[]).await.unwrap();
            let sql = format!("SELECT repeat('x', 1000) FROM generate_series(1, {rows})");
            let nothing: [&str; 0] = [];
            let stream = transaction.query_raw(&sql, nothing).await.unwrap();
            *kept.lock().unwrap() = Some(Box::pin(stream));
            (StatusCode::CREATED, "done")
        });
        let app = Router::new()
            .route("/pay", handler)
            .layer(layer.store_timeout(Duration::from_secs(1)));
        let first = call(&app, keyed("k", "a")).await;
        let count = "SELECT count(*) FROM done";
        assert_eq!(server.ask::<i64>(count).await, i64::from(committed));
        if committed {
            assert_eq!(first.status, StatusCode::CREATED);
        } else {
            assert_eq!(first.problem(), "transaction-rolled-back");
        }
        // Letting it go changes nothing.
        unread.lock().unwrap().take();
        let second = call(&app, keyed("k", "a")).await;
        assert_eq!(server.ask::<i64>(count).await, i64::from(committed));
        if committed {
            assert_replay(&first, &second);
        } else {
            assert_eq!(second.problem(), "transaction-rolled-back");
        }
    }
}

/// The only connection of a node, and of whoever else uses its pool.
enum Only {
    TokioPostgres(deadpool_postgres::Pool),
    Sqlx(PgPool),
}

impl Only {
    fn to(library: Library, url: &str) -> Self {
        match library {
            Library::TokioPostgres => Self::TokioPostgres(postgres::pool(url, 1)),
            Library::Sqlx => {
                // So that a transaction begins with the first thing that is said.
                let pool = PgPoolOptions::new().max_connections(1).test_before_acquire(false);
                Self::Sqlx(pool.connect_lazy(url).unwrap())
            }
        }
    }

    async fn store(&self, url: &str) -> PostgresStore {
        let builder = PostgresStore::builder().timeout(PATIENCE).purge_every(None);
        match self {
            Self::TokioPostgres(pool) => builder.connect_pool(pool.clone()).await.unwrap(),
            Self::Sqlx(pool) => {
                let store = builder.connect_pool(postgres::pool(url, 1)).await.unwrap();
                store.with_sqlx(pool.clone())
            }
        }
    }

    /// Until it is back in its pool, which sqlx sees to afterwards, with a question to the server.
    async fn until_idle(&self) {
        if let Self::Sqlx(pool) = self {
            while pool.num_idle() < 1 {
                tokio::task::yield_now().await;
            }
        }
    }

    /// That are open.
    fn connections(&self) -> usize {
        match self {
            Self::TokioPostgres(pool) => pool.status().size,
            Self::Sqlx(pool) => pool.size() as usize,
        }
    }

    async fn say(&self, sql: &str) {
        match self {
            Self::TokioPostgres(pool) => pool.get().await.unwrap().batch_execute(sql).await.unwrap(),
            Self::Sqlx(pool) => drop(pool.execute(sql).await.unwrap()),
        }
    }
}

/// A node of the bank's whose only connection goes through a proxy, and has made a transfer already.
async fn node_behind(bank: &Bank, library: Library, limit: Duration) -> (axum::Router, Only, Proxy) {
    let proxy = Proxy::before(bank.port()).await;
    let url = bank
        .url()
        .replace(&format!(":{}/", bank.port()), &format!(":{}/", proxy.port()));
    let only = Only::to(library, &url);
    let layer = IdempotencyLayer::new(only.store(&url).await).guarantee(Guarantee::Transactional);
    let node = bank::app(&bank.control, layer.store_timeout(limit));
    while call(&node, order("first", 5, "")).await.status != StatusCode::CREATED {}
    only.until_idle().await;
    (node, only, proxy)
}

#[tokio::test]
async fn a_connection_whose_begin_was_given_up_is_handed_on_without_its_transaction() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let (node, only, proxy) = node_behind(&bank, library, Duration::from_millis(250)).await;
        let flights = proxy.flights();
        proxy.make(Weather::Slow(Duration::from_secs(1)));
        let refused = call(&node, order("k", 5, "")).await;
        assert_eq!(refused.problem(), "store-unavailable", "{library:?}");
        assert!(proxy.flights() > flights, "{library:?}: it had begun");
        proxy.make(Weather::Clear);
        only.say("INSERT INTO transfers (reference, amount) VALUES ('somebody else', 1)")
            .await;
        let done = "SELECT count(*) FROM transfers WHERE reference = 'somebody else'";
        assert_eq!(bank.look::<i64>(done).await, 1, "{library:?}: nobody would commit it");
        while call(&node, order("k", 5, "")).await.status != StatusCode::CREATED {}
        assert_eq!(bank.books().await, (3, MONEY), "{library:?}");
    }
}

#[tokio::test]
async fn a_replay_costs_a_node_that_has_seen_it_completed_the_fewest_flights() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let (node, only, proxy) = node_behind(&bank, library, 2 * PATIENCE).await;
        let url = bank
            .url()
            .replace(&format!(":{}/", bank.port()), &format!(":{}/", proxy.port()));
        let layer = IdempotencyLayer::new(only.store(&url).await).guarantee(Guarantee::Transactional);
        let elsewhere = bank::app(&bank.control, layer);
        let flights = async |node| {
            only.until_idle().await;
            let before = proxy.flights();
            let replay = call(node, order("first", 5, "")).await;
            assert!(replay.is_replay(), "{library:?} {replay:?}");
            only.until_idle().await;
            proxy.flights() - before
        };
        // Until all is prepared.
        flights(&node).await;
        let few = flights(&node).await;
        let more = flights(&elsewhere).await;
        assert!(
            more > few,
            "{library:?}: {more} for what is not known, {few} for what is"
        );
        assert_eq!(flights(&elsewhere).await, few, "{library:?}");
    }
}

#[tokio::test]
async fn however_the_server_writes_bytes_and_reads_backslashes_a_request_runs_and_is_replayed() {
    let settings = [("bytea_output", "escape"), ("standard_conforming_strings", "off")];
    for (library, prepared) in BOTH.into_iter().flat_map(|library| [(library, true), (library, false)]) {
        let bank = Bank::of(library).await;
        let options: PgConnectOptions = bank.url().parse().unwrap();
        let pool = PgPoolOptions::new().connect_lazy_with(options.options(settings));
        let options = settings
            .map(|(name, value)| format!("-c%20{name}%3D{value}"))
            .join("%20");
        let url = format!("{}?options={options}", bank.url());
        let node = async || {
            let builder = PostgresStore::builder().timeout(PATIENCE).prepared_statements(prepared);
            let store = builder.connect_pool(postgres::pool(&url, 1)).await.unwrap();
            let store = match library {
                Library::TokioPostgres => store,
                Library::Sqlx => store.with_sqlx(pool.clone()),
            };
            let layer = IdempotencyLayer::new(store);
            bank::app(&bank.control, layer.guarantee(Guarantee::Transactional))
        };
        let (node, elsewhere) = (node().await, node().await);
        // Ids of many bytes, some of which are letters.
        for number in 0..20 {
            let key = format!("k{number}");
            let first = call(&node, order(&key, 5, "")).await;
            assert_eq!(
                first.status,
                StatusCode::CREATED,
                "{library:?} {prepared} {key} {first:?}"
            );
            for node in [&node, &elsewhere, &elsewhere] {
                assert_replay(&first, &call(node, order(&key, 5, "")).await);
            }
        }
        assert_eq!((bank.books().await, bank.control.runs()), ((20, MONEY), 20));
    }
}

#[tokio::test]
async fn a_session_that_has_forgotten_what_it_was_told_is_told_again_and_the_request_runs() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let (node, only, proxy) = node_behind(&bank, library, 2 * PATIENCE).await;
        let flights = async |key: &str| {
            only.until_idle().await;
            let before = proxy.flights();
            assert_eq!(call(&node, order(key, 5, "")).await.status, StatusCode::CREATED);
            only.until_idle().await;
            proxy.flights() - before
        };
        flights("before").await;
        let few = flights("told").await;
        let forget = "DO $$ DECLARE one text; BEGIN \
                      FOR one IN SELECT name FROM pg_prepared_statements WHERE name LIKE 'tower_idempotency%' \
                      LOOP EXECUTE 'DEALLOCATE ' || one; END LOOP; END $$";
        only.say(forget).await;
        let more = flights("forgotten").await;
        assert!(
            more > few,
            "{library:?}: {more} where it has to be told, {few} where it was"
        );
        assert_eq!(flights("again").await, few, "{library:?}");
        assert_eq!(bank.books().await, (5, MONEY));
    }
}

#[tokio::test]
async fn a_connection_whose_begin_was_not_answered_is_given_up_and_the_request_runs_once_on_another() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let (node, _only, proxy) = node_behind(&bank, library, 2 * PATIENCE).await;
        proxy.make(Weather::LoseAnswer);
        let answer = call(&node, order("k", 5, "")).await;
        assert_eq!(proxy.weather(), Weather::Clear, "{library:?}: the answer was lost");
        assert_eq!(answer.status, StatusCode::CREATED, "{library:?} {answer:?}");
        assert_replay(&answer, &call(&node, order("k", 5, "")).await);
        assert_eq!(
            (bank.books().await, bank.control.runs()),
            ((2, MONEY), 2),
            "{library:?}"
        );
    }
}

#[tokio::test]
async fn a_commit_that_the_server_refuses_costs_no_connection() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let (node, only, _proxy) = node_behind(&bank, library, 2 * PATIENCE).await;
        let refused = call(&node, order("k", 5, "INSERT INTO deferred VALUES (1), (1)")).await;
        assert_eq!(refused.problem(), "transaction-failed", "{library:?}");
        assert_eq!(only.connections(), 1, "{library:?}");
        only.say("INSERT INTO transfers (reference, amount) VALUES ('somebody else', 1)")
            .await;
        assert_eq!(bank.books().await, (2, MONEY), "{library:?}: it is in no transaction");
    }
}

/// It may not have heard of the commit, and would say that nothing was committed.
#[tokio::test]
async fn a_replica_is_not_asked_what_became_of_a_commit() {
    for library in BOTH {
        let server = Arc::new(Postgres::start(&["wal_keep_size=64MB"]));
        let bank = Bank::on(&server, library, open(), |layer| layer).await;
        let proxy = CommitProxy::before(bank.port()).await;
        let url = bank
            .url()
            .replace(&format!(":{}/", bank.port()), &format!(":{}/", proxy.port()));
        let only = Only::to(library, &url);
        let layer = IdempotencyLayer::new(only.store(&url).await).guarantee(Guarantee::Transactional);
        let node = bank::app(&bank.control, layer.store_timeout(Duration::from_secs(2)));
        while call(&node, order("first", 5, "")).await.status != StatusCode::CREATED {}
        only.until_idle().await;
        let standby = Postgres::standby_of(&server, &[]);
        standby.say("SELECT pg_wal_replay_pause()").await;
        // From the cut on, as a name does that leads to whichever server is up.
        proxy.lead_to(standby.port());
        proxy.cut_once(Cut::After);
        let first = call(&node, order("k", 5, "")).await;
        assert_eq!(proxy.cuts(), 1, "{library:?}");
        assert_eq!(first.problem(), "store-unavailable", "{library:?} {first:?}");
        assert!(first.json()["detail"].as_str().unwrap().contains("not known"));
        proxy.lead_to(bank.port());
        // An sqlx pool would keep what leads to the replica.
        proxy.sever();
        let again = loop {
            let again = call(&node, order("k", 5, "")).await;
            if again.status == StatusCode::CREATED {
                break again;
            }
            assert_eq!(again.problem(), "store-unavailable", "{library:?}");
        };
        assert!(again.is_replay(), "{library:?} {again:?}");
        assert_eq!(
            (bank.books().await, bank.control.runs()),
            ((2, MONEY), 2),
            "{library:?}"
        );
    }
}

#[tokio::test]
async fn a_server_that_may_not_write_any_more_runs_nothing_replays_nothing_and_is_left() {
    for library in BOTH {
        let server = Arc::new(Postgres::start(&[]));
        let quick = |layer: IdempotencyLayer| layer.store_timeout(Duration::from_secs(5));
        let bank = Bank::on(&server, library, open(), quick).await;
        let first = bank.ask(order("first", 5, "")).await;
        for sql in [
            "ALTER SYSTEM SET default_transaction_read_only = on",
            "SELECT pg_reload_conf()",
        ] {
            bank.say(sql).await;
        }
        // A session may hear of it a moment later.
        let mut number = 0;
        let refused = loop {
            number += 1;
            let answer = bank.ask(order(&format!("k-{number}"), 5, "")).await;
            if answer.status != StatusCode::CREATED {
                break answer;
            }
        };
        let runs = bank.control.runs();
        for refused in [refused, bank.ask(order("first", 5, "")).await] {
            assert_eq!(refused.problem(), "store-unavailable", "{library:?}");
        }
        assert_eq!(bank.control.runs(), runs, "{library:?}");
        if library == Library::TokioPostgres {
            // The next connection may lead to the new primary; those that stand never will.
            let sessions = "SELECT count(*) FROM pg_stat_activity \
                            WHERE datname = current_database() AND pid <> pg_backend_pid()";
            let gone = async { while bank.look::<i64>(sessions).await > 0 {} };
            timeout(Duration::from_secs(60), gone).await.expect("none is left");
        }
        let client = bank.client().await;
        for sql in [
            "SET default_transaction_read_only = off",
            "ALTER SYSTEM RESET default_transaction_read_only",
            "SELECT pg_reload_conf()",
        ] {
            client.batch_execute(sql).await.unwrap();
        }
        let again = loop {
            let again = bank.ask(order("first", 5, "")).await;
            if again.status == StatusCode::CREATED {
                break again;
            }
            assert_eq!(again.problem(), "store-unavailable", "{library:?}");
        };
        assert_replay(&first, &again);
    }
}
