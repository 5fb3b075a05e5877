//! A store and its connection on runtimes that come and go.
#![cfg(all(feature = "redis", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use support::{
    redis::Redis,
    redis_cluster::Cluster,
    steps::{MINUTE, acquire, claim, complete, id, is_replay, listening, until_back},
};
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};
use tower_idempotency::{RedisStore, Store};

fn several_threads() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// Runs only while somebody blocks on it.
fn one_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Whose steps fail by what they meet, and not because the machine is busy with something else.
async fn patient(url: &str) -> RedisStore {
    RedisStore::builder().timeout(MINUTE).connect(url).await.unwrap()
}

/// All that a store does, with one connection for steps and one for what is published. The first step may meet what is
/// left of another runtime; it is not met twice.
async fn works(store: &RedisStore, number: u32) {
    let _ = store.begin(&id(0), &claim()).await;
    store.begin(&id(0), &claim()).await.unwrap();
    let lease = acquire(store, number).await;
    let heard = listening(store, number).await;
    complete(store, &lease, 10).await;
    timeout(MINUTE, heard).await.expect("it was woken");
    assert!(is_replay(&until_back(store, number).await, 10));
}

#[test]
fn a_store_outlives_the_runtime_that_it_was_made_on() {
    let server = Redis::start(&[]);
    let first = several_threads();
    let store = first.block_on(patient(&server.url()));
    first.block_on(works(&store, 1));
    drop(first);
    let second = one_thread();
    second.block_on(works(&store, 2));
    drop(second);
    several_threads().block_on(works(&store, 3));
}

#[test]
fn a_store_in_a_cluster_outlives_the_runtime_that_it_was_made_on() {
    let first = several_threads();
    let cluster = first.block_on(Cluster::start(3, &[]));
    let store = first.block_on(patient(&cluster.url()));
    first.block_on(works(&store, 1));
    drop(first);
    one_thread().block_on(works(&store, 2));
}

#[test]
fn a_store_does_not_depend_on_a_runtime_that_stands_still() {
    let server = Redis::start(&[]);
    let still = one_thread();
    let builder = RedisStore::builder().timeout(Duration::from_millis(200));
    let store = still.block_on(builder.connect(&server.url())).unwrap();
    still.block_on(until_back(&store, 1));
    several_threads().block_on(async {
        until_back(&store, 0).await;
        acquire(&store, 2).await;
    });
    drop(still);
}

#[test]
fn a_connection_that_is_being_made_on_a_runtime_that_stands_still_is_made_anew() {
    let mut server = Redis::start(&[]);
    let still = one_thread();
    let builder = RedisStore::builder().timeout(Duration::from_millis(200));
    let store = still.block_on(builder.connect(&server.url())).unwrap();
    server.kill();
    // It is given up there, and the next one is begun.
    still.block_on(async {
        for _ in 0..5 {
            let _ = store.begin(&id(1), &claim()).await;
        }
        let (first, own) = (id(1), claim());
        let mut begun = Box::pin(store.begin(&first, &own));
        std::future::poll_fn(|cx| std::task::Poll::Ready(begun.as_mut().poll(cx).is_ready())).await;
    });
    server.restart("Ready to accept connections");
    several_threads().block_on(async {
        until_back(&store, 0).await;
        acquire(&store, 2).await;
    });
    drop(still);
}
