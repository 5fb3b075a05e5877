//! The Redis store on a primary and a replica that sentinels watch over, and on replicas that are waited for.
#![cfg(all(feature = "redis", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use http::StatusCode;
use support::{
    app::{call, keyed, open, pay},
    proxy::Proxy,
    redis::Redis,
    redis_sentinel::Watched,
    steps::{MINUTE, acquire, claim, complete, id, is_replay, kept, kind, listening, until_back},
};
use tokio::time::timeout;
use tower_idempotency::{
    Begin, IdempotencyLayer, Lease, RedisStore, Store, StoreErrorKind,
    testing::{self, Subject},
};

struct Real(Watched);

impl Subject for Real {
    type Store = RedisStore;

    async fn store(&self) -> RedisStore {
        connected(&self.0).await
    }

    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    fn waits(&self) -> bool {
        true
    }
}

async fn connected(watched: &Watched) -> RedisStore {
    RedisStore::connect(&watched.url()).await.unwrap()
}

#[tokio::test]
async fn the_store_keeps_the_contract_behind_sentinels() {
    testing::check(&Real(Watched::start(&[]).await)).await.assert();
}

/// Until the replica has all that the primary has.
async fn until_replicated(primary: &Redis) {
    let acknowledged: usize = primary.ask(&["WAIT", "1", "0"]).await;
    assert_eq!(acknowledged, 1);
    let offsets = async || {
        let info: String = primary.ask(&["INFO", "replication"]).await;
        let own = info.lines().find_map(|line| line.strip_prefix("master_repl_offset:"));
        let slave = info.lines().find(|line| line.starts_with("slave0:"));
        let theirs = slave.and_then(|line| line.split(',').find_map(|part| part.strip_prefix("offset=")));
        own.is_some() && own.map(str::trim) == theirs.map(str::trim)
    };
    while !offsets().await {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn when_the_primary_dies_claims_go_on_with_what_its_replica_has() {
    let mut watched = Watched::start(&[]).await;
    let (store, other) = (connected(&watched).await, connected(&watched).await);
    let (done, running) = (acquire(&store, 1).await, acquire(&store, 2).await);
    complete(&store, &done, 10).await;
    let heard = listening(&other, 2).await;
    until_replicated(&watched.servers[0]).await;
    watched.servers[0].kill();
    assert_eq!(kind(store.begin(&id(3), &claim()).await), StoreErrorKind::Unavailable);
    assert!(is_replay(&until_back(&store, 1).await, 10));
    assert_eq!(watched.primary().await, watched.servers[1].port());
    assert!(matches!(until_back(&other, 2).await, Begin::InProgress { .. }));
    // Woken, for what may have been missed; and from then on by the new primary.
    timeout(MINUTE, heard).await.expect("it listens there");
    let heard = listening(&other, 2).await;
    complete(&store, &running, 20).await;
    timeout(MINUTE, heard).await.expect("it was woken");
    acquire(&store, 4).await;
}

#[tokio::test]
async fn a_primary_that_became_a_replica_is_left_for_the_new_one() {
    let watched = Watched::start(&[]).await;
    let store = connected(&watched).await;
    let lease = acquire(&store, 1).await;
    until_replicated(&watched.servers[0]).await;
    watched.fail_over().await;
    let new = watched.servers[1].port();
    while watched.primary().await != new {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // A write to the new primary alone: its connection leads there now.
    let mut number = 10;
    loop {
        until_back(&store, number).await;
        let is_there: u32 = watched.servers[1].ask(&["EXISTS", &support::steps::key(number)]).await;
        let info: String = watched.servers[1].ask(&["INFO", "replication"]).await;
        if is_there == 1 && info.contains("role:master") {
            break;
        }
        number += 1;
    }
    complete(&store, &lease, 10).await;
}

// ---- replicas that are waited for

async fn pair(options: &[&str]) -> (Redis, Redis) {
    let primary = Redis::start(options);
    let port = primary.port().to_string();
    let replica = Redis::start(&["--replicaof", "127.0.0.1", &port]);
    while primary.ask::<usize>(&["WAIT", "1", "100"]).await == 0 {}
    (primary, replica)
}

/// More than a busy disk takes for what a replica is to acknowledge.
const PATIENCE: Duration = Duration::from_secs(10);

async fn waiting(primary: &Redis, within: Duration) -> RedisStore {
    let builder = RedisStore::builder().timeout(PATIENCE * 2).wait_for_replicas(1, within);
    builder.connect(&primary.url()).await.unwrap()
}

#[tokio::test]
async fn replicas_that_would_be_waited_for_as_long_as_the_server_are_refused() {
    let server = Redis::start(&[]);
    let second = Duration::from_secs(1);
    let builder = RedisStore::builder().timeout(second).wait_for_replicas(1, second);
    let error = builder.connect(&server.url()).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Other);
}

#[tokio::test]
async fn what_a_replica_acknowledged_is_there_when_it_is_promoted() {
    let (mut primary, replica) = pair(&[]).await;
    let store = waiting(&primary, PATIENCE).await;
    for number in 0..20 {
        let lease = acquire(&store, number).await;
        if number % 2 == 0 {
            complete(&store, &lease, 10).await;
        }
    }
    primary.kill();
    replica.say(&["REPLICAOF", "NO", "ONE"]).await;
    let after = RedisStore::connect(&replica.url()).await.unwrap();
    for number in 0..20 {
        let found = after.begin(&id(number), &claim()).await.unwrap();
        match number % 2 {
            0 => assert!(is_replay(&found, 10), "{number}: {found:?}"),
            _ => assert!(matches!(found, Begin::InProgress { .. }), "{number}: {found:?}"),
        }
    }
}

#[tokio::test]
async fn without_enough_replicas_nothing_is_granted_and_nothing_is_done() {
    let (primary, replica) = pair(&[]).await;
    // As long as a busy disk may take; and for what cannot succeed.
    let patient = waiting(&primary, PATIENCE).await;
    let store = waiting(&primary, Duration::from_millis(100)).await;
    let (first, second) = (acquire(&patient, 1).await, acquire(&patient, 2).await);
    complete(&patient, &second, 10).await;
    replica.pause();
    let own = claim();
    assert_eq!(kind(store.begin(&id(3), &own).await), StoreErrorKind::Unavailable);
    for step in [
        store.complete(&first, &kept(10), MINUTE.into()).await,
        // Done already, but no replica knows it; not on a new connection either, which has written nothing.
        store.complete(&first, &kept(10), MINUTE.into()).await,
        waiting(&primary, Duration::from_millis(100))
            .await
            .complete(&first, &kept(10), MINUTE.into())
            .await,
    ] {
        assert_eq!(kind(step), StoreErrorKind::Unavailable);
    }
    // Replays write nothing.
    assert!(is_replay(&store.begin(&id(2), &claim()).await.unwrap(), 10));
    replica.resume();
    let again = loop {
        match store.begin(&id(3), &own).await {
            Ok(Begin::Acquired(lease)) => break lease,
            Ok(other) => panic!("{other:?}"),
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Unavailable),
        }
    };
    assert_eq!(again, Lease::new(id(3), own.owner, 1));
    patient.complete(&first, &kept(10), MINUTE.into()).await.unwrap();
}

#[tokio::test]
async fn no_handler_runs_under_a_claim_that_too_few_replicas_have() {
    let (primary, replica) = pair(&[]).await;
    let control = open();
    let patient = pay(
        &control,
        IdempotencyLayer::new(waiting(&primary, PATIENCE).await).store_timeout(PATIENCE * 2),
    );
    let app = pay(
        &control,
        IdempotencyLayer::new(waiting(&primary, Duration::from_millis(50)).await),
    );
    assert_eq!(call(&patient, keyed("first", "a")).await.status, StatusCode::CREATED);
    replica.pause();
    let refused = call(&app, keyed("second", "a")).await;
    assert_eq!(refused.problem(), "store-unavailable");
    assert_eq!(control.runs(), 1);
}

/// Not a promise, but what the page says: an answer of the primary alone is lost with it. With a replica that is waited
/// for, it is not given.
#[tokio::test]
async fn a_claim_that_a_failover_would_lose_is_granted_only_where_no_replica_is_waited_for() {
    let primary = Redis::start(&[]);
    let between = Proxy::before(primary.port()).await;
    let port = between.port().to_string();
    let replica = Redis::start(&["--replicaof", "127.0.0.1", &port]);
    while primary.ask::<usize>(&["WAIT", "1", "100"]).await == 0 {}
    let careless = RedisStore::connect(&primary.url()).await.unwrap();
    let careful = waiting(&primary, Duration::from_millis(100)).await;
    between.black_hole();
    acquire(&careless, 1).await;
    assert_eq!(kind(careful.begin(&id(2), &claim()).await), StoreErrorKind::Unavailable);
    replica.say(&["REPLICAOF", "NO", "ONE"]).await;
    let after = RedisStore::connect(&replica.url()).await.unwrap();
    // Granted a second time.
    acquire(&after, 1).await;
    // Granted for the first time.
    acquire(&after, 2).await;
}
