//! Encrypted connections to servers, clusters and sentinels.
#![cfg(all(feature = "redis-tls", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use support::{
    ports::free_port,
    redis::Redis,
    redis_tls::Authority,
    steps::{MINUTE, acquire, complete, id, is_replay, kind, listening, until_back},
};
use tokio::time::timeout;
use tower_idempotency::{RedisStore, Store, StoreErrorKind};

/// A server that encrypts on the second port.
fn server(authority: &Authority, asks: bool) -> (Redis, u16) {
    let port = free_port();
    let options = authority.options(port, asks);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    (Redis::start(&options), port)
}

#[tokio::test]
async fn a_store_talks_to_a_server_whose_certificate_it_trusts_and_to_no_other() {
    let authority = Authority::new();
    let (_server, port) = server(&authority, false);
    let url = format!("rediss://localhost:{port}");
    // The system does not know that authority.
    assert_eq!(kind(RedisStore::connect(&url).await), StoreErrorKind::Unavailable);
    let stranger = RedisStore::builder().root_certificates(Authority::new().read("authority.crt"));
    assert_eq!(kind(stranger.connect(&url).await), StoreErrorKind::Unavailable);
    let trusting = || RedisStore::builder().root_certificates(authority.read("authority.crt"));
    let (store, other) = (
        trusting().connect(&url).await.unwrap(),
        trusting()
            .connect(&format!("valkeys://127.0.0.1:{port}"))
            .await
            .unwrap(),
    );
    let lease = acquire(&store, 1).await;
    let heard = listening(&other, 1).await;
    complete(&store, &lease, 10).await;
    timeout(MINUTE, heard)
        .await
        .expect("the subscription is encrypted, too");
    assert!(is_replay(&until_back(&other, 1).await, 10));
    // What is not encrypted does not get through.
    let plain = RedisStore::connect(&format!("redis://localhost:{port}")).await;
    assert_eq!(kind(plain), StoreErrorKind::Unavailable);
}

#[tokio::test]
async fn a_server_that_asks_who_comes_is_shown_a_certificate() {
    let authority = Authority::new();
    let (_server, port) = server(&authority, true);
    let url = format!("rediss://localhost:{port}");
    let trusting = || RedisStore::builder().root_certificates(authority.read("authority.crt"));
    trusting().connect(&url).await.unwrap_err();
    let known = trusting().client_certificate(authority.read("client.crt"), authority.read("client.key"));
    let shown = format!("{known:?}");
    assert!(!shown.contains("BEGIN") && !shown.contains("45, 45"), "{shown}");
    let store = known.connect(&url).await.unwrap();
    acquire(&store, 1).await;
}

#[tokio::test]
async fn a_cluster_is_talked_to_in_secret() {
    let authority = Authority::new();
    let port = free_port();
    let mut options = authority.options(port, false);
    options.extend(["--cluster-enabled", "yes", "--tls-cluster", "yes"].map(str::to_owned));
    let bus = free_port().to_string();
    options.extend(["--cluster-port".to_owned(), bus]);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let node = Redis::start(&options);
    node.say(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
    let up = async || {
        node.ask::<String>(&["CLUSTER", "INFO"])
            .await
            .contains("cluster_state:ok")
    };
    while !up().await {
        tokio::task::yield_now().await;
    }
    let trusting = RedisStore::builder().root_certificates(authority.read("authority.crt"));
    let url = format!("rediss+cluster://127.0.0.1:{port}");
    let store = trusting.connect(&url).await.unwrap();
    let lease = acquire(&store, 1).await;
    store.release(&lease).await.unwrap();
    assert_eq!(lease.id, id(1));
}
