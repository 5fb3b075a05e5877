//! Two nodes of the demo on one Redis server, under everything that ends a node or the server.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use support::{
    app::{gated, keyed, pay, spawn},
    demo::Demo,
    nodes::{BODY, PATH, Progress, assert_once_each, body, load, load_through},
    ports::free_port,
    redis::Redis,
    redis_cluster::Cluster,
    redis_sentinel::Watched,
    redis_tls::Authority,
    serve::assert_replay,
};
use tower_idempotency::{Concurrent, IdempotencyLayer, RedisStore};

fn node(server: &Redis) -> Demo {
    Demo::start(&["--store", &server.url()])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_duplicated_requests_to_two_nodes_have_one_effect_each() {
    let server = Redis::start(&["--appendfsync", "everysec"]);
    let nodes = [node(&server), node(&server)];
    let answers = load(&nodes, 1000, 10, &Arc::default()).await;
    assert_eq!(answers.len(), 1000);
    assert_eq!(assert_once_each(&nodes, &answers).await, 1000);
    let all: usize = answers
        .values()
        .flatten()
        .filter(|answer| answer.status == StatusCode::CREATED)
        .count();
    assert!(all > 1000, "none was a duplicate");
}

#[tokio::test]
async fn a_node_that_is_killed_in_mid_handler_leaves_an_unknown_outcome_to_the_other() {
    let server = Redis::start(&[]);
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
    // As if the rest of the lease had passed on the server: what is left is the retention of a day.
    let keys: Vec<String> = server.ask(&["KEYS", "*"]).await;
    assert_eq!(keys.len(), 1);
    server
        .say(&["PEXPIRE", &keys[0], &(24 * 60 * 60 * 1000 - 1).to_string()])
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
    let server = Redis::start(&[]);
    let (first, second) = (node(&server), node(&server));
    let header = [("idempotency-key", "k")];
    let answer = first.post(PATH, &header, BODY).await;
    assert_eq!(answer.status, StatusCode::CREATED);
    assert_replay(&answer, &second.post(PATH, &header, BODY).await);
    first.kill();
    assert_replay(&answer, &second.post(PATH, &header, BODY).await);
    assert!(second.effects().await.is_empty());
}

#[tokio::test]
async fn a_duplicate_on_another_node_waits_for_the_answer_and_gets_it() {
    let server = Redis::start(&[]);
    let control = gated();
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let store = RedisStore::connect(&server.url()).await.unwrap();
        let patient = Concurrent::Wait(Duration::from_secs(3600));
        nodes.push(pay(&control, IdempotencyLayer::new(store).on_concurrent(patient)));
    }
    let first = spawn(&nodes[0], keyed("k", "a"));
    control.entered().await;
    let waiting: Vec<_> = (0..8).map(|_| spawn(&nodes[1], keyed("k", "a"))).collect();
    // The record's, and the one of all.
    while server.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await.len() < 2 {
        tokio::task::yield_now().await;
    }
    control.let_go();
    let first = first.await.unwrap();
    for waiting in waiting {
        let answer = waiting.await.unwrap();
        assert!(answer.is_replay());
        assert_eq!(answer.body, first.body);
    }
    assert_eq!(control.runs(), 1);
}

/// Two nodes, each of which replays what the other answered.
async fn assert_shared(url: &str, certificates: Option<&Authority>) {
    let start = || {
        let mut command = Demo::command();
        command.args(["--store", url]);
        if let Some(authority) = certificates {
            // What the system trusts.
            command.env("SSL_CERT_FILE", authority.path("authority.crt"));
        }
        Demo::run(command)
    };
    let (first, second) = (start(), start());
    for (number, node, other) in [(1, &first, &second), (2, &second, &first)] {
        let key = format!("key-{number}");
        let header = [("idempotency-key", key.as_str())];
        let answer = node.post(PATH, &header, &body(&key)).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{url}");
        assert_replay(&answer, &other.post(PATH, &header, &body(&key)).await);
    }
}

#[tokio::test]
async fn nodes_share_a_cluster() {
    let cluster = Cluster::start(3, &[]).await;
    assert_shared(&cluster.url(), None).await;
}

#[tokio::test]
async fn nodes_share_what_sentinels_watch_over() {
    let watched = Watched::start(&[]).await;
    assert_shared(&watched.url(), None).await;
}

#[cfg(feature = "redis-tls")]
#[tokio::test]
async fn nodes_share_a_server_in_secret() {
    let (authority, port) = (Authority::new(), free_port());
    let options = authority.options(port, false);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let _server = Redis::start(&options);
    assert_shared(&format!("rediss://localhost:{port}"), Some(&authority)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_under_load_costs_no_effect_twice() {
    let server = Redis::start(&[]);
    let nodes = [node(&server), node(&server)];
    let hang = |server: &mut Redis, progress: &Progress| {
        server.pause();
        progress.wait();
        server.resume();
    };
    load_through(server, nodes, hang, async |_| ()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_restarted_under_load_costs_no_effect_twice() {
    let server = Redis::start(&[]);
    let nodes = [node(&server), node(&server)];
    let kill = |server: &mut Redis, progress: &Progress| {
        server.kill();
        progress.wait();
        server.restart("Ready to accept connections");
    };
    load_through(server, nodes, kill, async |_| ()).await;
}
