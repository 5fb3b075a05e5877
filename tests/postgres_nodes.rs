//! Two nodes of the demo on one PostgreSQL server, under everything that ends a node or the server.
#![cfg(feature = "postgres")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use support::{
    app::{gated, keyed, pay, spawn},
    demo::Demo,
    nodes::{BODY, PATH, Progress, assert_once_each, load, load_through},
    postgres::Postgres,
    serve::assert_replay,
};
use tower_idempotency::{Concurrent, IdempotencyLayer, PostgresStore};

fn node(server: &Postgres) -> Demo {
    Demo::start(&["--store", &server.url()])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_thousand_duplicated_requests_to_two_nodes_have_one_effect_each() {
    let server = Postgres::start(&[]);
    let nodes = [node(&server), node(&server)];
    let answers = load(&nodes, 300, 10, &Arc::default()).await;
    assert_eq!(answers.len(), 300);
    assert_eq!(assert_once_each(&nodes, &answers).await, 300);
    let all: usize = answers
        .values()
        .flatten()
        .filter(|answer| answer.status == StatusCode::CREATED)
        .count();
    assert!(all > 300, "none was a duplicate");
}

#[tokio::test]
async fn a_node_that_is_killed_in_mid_handler_leaves_an_unknown_outcome_to_the_other() {
    let server = Postgres::start(&[]);
    let (first, second) = (node(&server), node(&server));
    let header = [("idempotency-key", "k")];
    first.occupy(PATH, &header, BODY).await;
    let duplicate = second.post(PATH, &header, BODY).await;
    assert_eq!(
        (duplicate.status, duplicate.problem()),
        (StatusCode::CONFLICT, "request-in-progress".to_owned())
    );
    first.kill();
    let duplicate = second.post(PATH, &header, BODY).await;
    assert_eq!(duplicate.problem(), "request-in-progress", "its lease is not over");
    // As if the rest of the lease had passed on the server.
    assert_eq!(server.ask::<i64>("SELECT count(*) FROM idempotency_records").await, 1);
    server
        .say("UPDATE idempotency_records SET lease_until = clock_timestamp()")
        .await;
    for _ in 0..3 {
        let retry = second.post(PATH, &header, BODY).await;
        assert_eq!(
            (retry.status, retry.problem()),
            (StatusCode::CONFLICT, "outcome-unknown".to_owned())
        );
    }
    assert!(second.effects().await.is_empty());
}

#[tokio::test]
async fn what_one_node_answered_the_other_replays() {
    let server = Postgres::start(&[]);
    let (first, second) = (node(&server), node(&server));
    let header = [("idempotency-key", "k")];
    let answer = first.post(PATH, &header, BODY).await;
    assert_eq!(answer.status, StatusCode::CREATED);
    assert_replay(&answer, &second.post(PATH, &header, BODY).await);
    first.kill();
    assert_replay(&answer, &second.post(PATH, &header, BODY).await);
    // Of its own, that is; a ledger in the database shows the first one's.
    assert!(
        second
            .effects()
            .await
            .iter()
            .all(|effect| effect["id"] == answer.json()["id"])
    );
}

#[tokio::test]
async fn a_duplicate_on_another_node_waits_for_the_answer_and_gets_it() {
    let server = Postgres::start(&[]);
    let control = gated();
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let store = PostgresStore::builder().create_table(true);
        let store = store.connect(&server.url()).await.unwrap();
        let patient = Concurrent::Wait(Duration::from_secs(3600));
        nodes.push(pay(&control, IdempotencyLayer::new(store).on_concurrent(patient)));
    }
    let first = spawn(&nodes[0], keyed("k", "a"));
    control.entered().await;
    let waiting: Vec<_> = (0..8).map(|_| spawn(&nodes[1], keyed("k", "a"))).collect();
    let asked =
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%ANY ($1::bytea[])%' AND pid <> pg_backend_pid()";
    while server.ask::<i64>(asked).await == 0 {}
    control.let_go();
    let first = first.await.unwrap();
    for waiting in waiting {
        let answer = waiting.await.unwrap();
        assert!(answer.is_replay());
        assert_eq!(answer.body, first.body);
    }
    assert_eq!(control.runs(), 1);
}

/// As if the rest of all leases had passed on the server.
async fn end_leases(server: &Postgres) {
    server
        .say("UPDATE idempotency_records SET lease_until = clock_timestamp() WHERE state = 'p'")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_under_load_costs_no_effect_twice() {
    let server = Postgres::start(&[]);
    let nodes = [node(&server), node(&server)];
    let hang = |server: &mut Postgres, progress: &Progress| {
        server.pause();
        progress.wait();
        server.resume();
    };
    load_through(server, nodes, hang, end_leases).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_restarted_under_load_costs_no_effect_twice() {
    let server = Postgres::start(&[]);
    let nodes = [node(&server), node(&server)];
    let kill = |server: &mut Postgres, progress: &Progress| {
        server.kill();
        progress.wait();
        server.restart();
    };
    load_through(server, nodes, kill, end_leases).await;
}
