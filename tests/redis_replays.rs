//! What a node expects to be completed decides what it asks Redis first, and never what it answers.
#![cfg(all(feature = "redis", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use support::{
    redis::Redis,
    steps::{MINUTE, acquire, claim, complete, id, is_replay, key, kind},
};
use tower_idempotency::{Begin, RedisStore, Store, StoreErrorKind};

async fn connected(server: &Redis) -> RedisStore {
    RedisStore::connect(&server.url()).await.unwrap()
}

async fn look(store: &RedisStore, number: u32) -> Begin {
    store.begin(&id(number), &claim()).await.unwrap()
}

/// How often records were read, and set or tried to.
async fn calls(server: &Redis) -> (u64, u64) {
    (server.calls("getex").await, server.calls("set").await)
}

#[tokio::test]
async fn a_replay_that_is_expected_is_a_plain_read_and_any_other_one_is_a_claim() {
    let server = Redis::start(&[]);
    let (store, other) = (connected(&server).await, connected(&server).await);
    let lease = acquire(&store, 1).await;
    complete(&store, &lease, 10).await;
    let (read, set) = calls(&server).await;
    // Who completed it expects it; who has found it once does from then on.
    assert!(is_replay(&look(&store, 1).await, 10));
    assert_eq!(calls(&server).await, (read + 1, set));
    assert!(is_replay(&look(&other, 1).await, 10));
    assert_eq!(calls(&server).await, (read + 1, set + 1));
    assert!(is_replay(&look(&other, 1).await, 10));
    assert_eq!(calls(&server).await, (read + 2, set + 1));
}

#[tokio::test]
async fn a_server_that_may_not_write_any_more_replays_nothing_that_may_have_been_lost_elsewhere() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let lease = acquire(&store, 1).await;
    complete(&store, &lease, 10).await;
    assert!(is_replay(&look(&store, 1).await, 10));
    let before: (Vec<u8>, i64) = (
        server.ask(&["DUMP", &key(1)]).await,
        server.ask(&["PEXPIRETIME", &key(1)]).await,
    );
    // Nobody listens there: it goes on with what it has.
    server.say(&["REPLICAOF", "127.0.0.1", "1"]).await;
    assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    server.say(&["REPLICAOF", "NO", "ONE"]).await;
    assert!(is_replay(&look(&store, 1).await, 10));
    let after = (
        server.ask(&["DUMP", &key(1)]).await,
        server.ask(&["PEXPIRETIME", &key(1)]).await,
    );
    assert_eq!(before, after, "it was read and not changed");
}

#[tokio::test]
async fn what_was_expected_and_is_gone_is_claimed_as_if_it_had_never_been() {
    let server = Redis::start(&[]);
    let (store, other) = (connected(&server).await, connected(&server).await);
    for number in 1..=4 {
        let lease = acquire(&store, number).await;
        complete(&store, &lease, 10).await;
        assert!(is_replay(&look(&store, number).await, 10));
        // As when its retention is over, or a failover lost it.
        server.say(&["DEL", &key(number)]).await;
    }
    // Vacant: acquired, and once only.
    let own = claim();
    let Begin::Acquired(lease) = store.begin(&id(1), &own).await.unwrap() else {
        panic!("it is vacant");
    };
    assert_eq!(lease.fence, 1);
    assert!(matches!(look(&other, 1).await, Begin::InProgress { .. }));
    assert!(matches!(look(&store, 1).await, Begin::InProgress { .. }));
    // Its answer was lost: it is the owner's still.
    assert!(matches!(store.begin(&id(1), &own).await.unwrap(), Begin::Acquired(again) if again == lease));
    // Somebody else's, in progress.
    let running = acquire(&other, 2).await;
    assert!(matches!(look(&store, 2).await, Begin::InProgress { .. }));
    complete(&other, &running, 20).await;
    assert!(is_replay(&look(&store, 2).await, 20), "never what it was before");
    // Somebody else's, abandoned: found to be, and taken over under its name.
    let lost = acquire(&other, 3).await;
    other.abandon(&lost).await.unwrap();
    assert!(matches!(look(&store, 3).await, Begin::Abandoned { lost: found, .. } if found == lost));
    let taken = store.begin(&id(3), &claim().taking_over(lost)).await.unwrap();
    assert!(matches!(taken, Begin::Acquired(lease) if lease.fence == 2));
    // No record at all.
    server.say(&["SET", &key(4), "\u{0}"]).await;
    assert_eq!(kind(store.begin(&id(4), &claim()).await), StoreErrorKind::Corrupt);
    assert_eq!(server.ask::<String>(&["GET", &key(4)]).await, "\u{0}");
    server.say(&["DEL", &key(4)]).await;
    server.say(&["LPUSH", &key(4), "x"]).await;
    assert_eq!(kind(store.begin(&id(4), &claim()).await), StoreErrorKind::Corrupt);
}

#[tokio::test]
async fn an_expected_replay_waits_for_no_replica() {
    let server = Redis::start(&[]);
    let lease = acquire(&connected(&server).await, 1).await;
    complete(&connected(&server).await, &lease, 10).await;
    let store = RedisStore::builder()
        .wait_for_replicas(1, Duration::from_millis(20))
        .connect(&server.url())
        .await
        .unwrap();
    assert!(is_replay(&look(&store, 1).await, 10));
    let waited = server.calls("wait").await;
    assert!(is_replay(&look(&store, 1).await, 10));
    assert_eq!(server.calls("wait").await, waited);
    // A claim is waited for, whatever was expected.
    server.say(&["DEL", &key(1)]).await;
    assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    assert_eq!(server.calls("wait").await, waited + 1);
}

#[tokio::test]
async fn an_expected_replay_is_given_no_longer_than_its_record_is_kept() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let lease = acquire(&store, 1).await;
    complete(&store, &lease, 10).await;
    let asking = claim().asking_for_remaining();
    let left: i64 = server.ask(&["PTTL", &key(1)]).await;
    let Begin::Completed { remaining, .. } = store.begin(&id(1), &asking).await.unwrap() else {
        panic!("it is completed");
    };
    let most = Duration::from_millis(left.cast_unsigned());
    assert!(
        matches!(remaining, Some(tower_idempotency::Retention::For(left)) if left <= most && left > most - MINUTE / 2)
    );
}
