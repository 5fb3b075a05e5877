//! A cache of completed records changes nothing but who is asked.
#![cfg(all(feature = "cached", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use http::StatusCode;
use support::{
    app::{call, keyed, open, pay},
    steps::{assert_tells_of_a_change, complete, is_replay},
};
use tokio::time::{advance, sleep};
use tower_idempotency::{
    AnyStore, Begin, Cached, Claim, Fingerprint, IdempotencyLayer, Lease, MemoryStore, Owner, RecordId, Retention,
    Store, StoreError, StoreErrorKind, StoredResponse,
    testing::{self, Subject},
};

const SECOND: Duration = Duration::from_secs(1);

/// A store that is far away: its answers take their time, each claim is counted, and it may be out of reach.
#[derive(Clone, Default)]
struct Remote {
    records: MemoryStore,
    claims: Arc<AtomicUsize>,
    way_back: Arc<Mutex<Duration>>,
    is_away: Arc<Mutex<bool>>,
    says_nothing: bool,
}

impl Remote {
    fn claims(&self) -> usize {
        self.claims.load(Relaxed)
    }

    fn answer_after(&self, time: Duration) {
        *self.way_back.lock().unwrap() = time;
    }
}

impl Store for Remote {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        self.claims.fetch_add(1, Relaxed);
        if *self.is_away.lock().unwrap() {
            return Err(StoreErrorKind::Unavailable.into());
        }
        let begin = self.records.begin(id, claim).await;
        let way_back = *self.way_back.lock().unwrap();
        sleep(way_back).await;
        match begin? {
            Begin::Completed {
                fingerprint, response, ..
            } if self.says_nothing => Ok(Begin::Completed {
                fingerprint,
                response,
                remaining: None,
            }),
            begin => Ok(begin),
        }
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.records.complete(lease, response, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.records.renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.records.release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.records.abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.records.changed(id).await;
    }
}

fn claim() -> Claim {
    let fingerprint = Fingerprint::new(1, [1; 32]);
    Claim::new(fingerprint, Owner::random().unwrap(), SECOND, SECOND.into())
}

fn id(number: u16) -> RecordId {
    let mut bytes = [0; 32];
    bytes[..2].copy_from_slice(&number.to_le_bytes());
    RecordId::from_bytes(bytes)
}

fn answer() -> StoredResponse {
    StoredResponse::not_kept(StatusCode::CREATED)
}

async fn acquire(store: &impl Store, number: u16) -> Lease {
    match store.begin(&id(number), &claim()).await {
        Ok(Begin::Acquired(lease)) => lease,
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

async fn completed(store: &impl Store, number: u16, retention: impl Into<Retention>) {
    let lease = acquire(store, number).await;
    store.complete(&lease, &answer(), retention.into()).await.unwrap();
}

/// The record's state in a word.
async fn look(store: &impl Store, number: u16) -> &'static str {
    match store.begin(&id(number), &claim()).await {
        Ok(Begin::Acquired(_)) => "vacant",
        Ok(Begin::InProgress { .. }) => "in progress",
        Ok(Begin::Abandoned { .. }) => "abandoned",
        Ok(Begin::Completed { response, .. }) if response == answer() => "completed",
        other => panic!("{other:?}"),
    }
}

// ---- the contract

struct Paused<F>(F);

impl<S: Store, F: Fn() -> S + Sync> Subject for Paused<F> {
    type Store = S;

    async fn store(&self) -> S {
        (self.0)()
    }

    async fn pass(&self, time: Duration) {
        advance(time).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_cached_store_keeps_the_contract() {
    testing::check(&Paused(|| Cached::new(MemoryStore::new())))
        .await
        .assert();
    testing::check(&Paused(|| AnyStore::new(Cached::new(Remote::default()))))
        .await
        .assert();
    // Nodes with copies of their own.
    let shared = MemoryStore::new();
    testing::check(&Paused(|| Cached::new(shared.clone()))).await.assert();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cached_store_keeps_the_contract_among_threads() {
    for _ in 0..10 {
        testing::check_races(&Paused(|| Cached::new(MemoryStore::new())))
            .await
            .assert();
    }
}

// ---- what is copied

#[tokio::test(start_paused = true)]
async fn what_was_replayed_once_is_replayed_without_the_store() {
    let remote = Remote::default();
    let store = Cached::new(remote.clone());
    completed(&store, 1, Duration::from_secs(60)).await;
    assert_eq!((look(&store, 1).await, remote.claims()), ("completed", 2));
    for _ in 0..10 {
        assert_eq!(look(&store, 1).await, "completed");
        assert!(store.begin_at_once(&id(1), &claim()).is_some(), "it needs no future");
    }
    assert_eq!(remote.claims(), 2);
    // Where it is gone, too.
    *remote.is_away.lock().unwrap() = true;
    assert_eq!(look(&store, 1).await, "completed");
}

#[tokio::test(start_paused = true)]
async fn a_replay_through_the_layer_asks_the_store_once() {
    let remote = Remote::default();
    let control = open();
    let app = pay(&control, IdempotencyLayer::new(Cached::new(remote.clone())));
    let first = call(&app, keyed("k", "a")).await;
    for _ in 0..5 {
        let retry = call(&app, keyed("k", "a")).await;
        assert!(retry.is_replay());
        assert_eq!(retry.body, first.body);
    }
    assert_eq!(remote.claims(), 2);
    // Another request under that key is refused from the copy as it is from the record.
    let other = call(&app, keyed("k", "b")).await;
    assert_eq!(other.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!((remote.claims(), control.runs()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn that_a_key_is_free_or_an_attempt_is_running_or_lost_is_never_remembered() {
    let remote = Remote::default();
    let (store, other) = (Cached::new(remote.clone()), Cached::new(remote.clone()));
    let lease = acquire(&store, 1).await;
    for expected in ["in progress", "in progress"] {
        assert_eq!(look(&other, 1).await, expected);
    }
    store.abandon(&lease).await.unwrap();
    for expected in ["abandoned", "abandoned"] {
        assert_eq!(look(&other, 1).await, expected);
    }
    store.release(&lease).await.unwrap();
    assert_eq!(look(&other, 1).await, "vacant");
    assert_eq!(remote.claims(), 6, "each was asked for");
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_given_no_longer_than_its_record_is_kept() {
    let remote = Remote::default();
    let store = Cached::new(remote.clone());
    completed(&store, 1, SECOND * 10).await;
    // What remained when it was asked for is three seconds less when it is heard.
    remote.answer_after(SECOND * 3);
    assert_eq!(look(&store, 1).await, "completed");
    remote.answer_after(Duration::ZERO);
    advance(SECOND * 7 - Duration::from_millis(1)).await;
    assert_eq!((look(&store, 1).await, remote.claims()), ("completed", 2));
    advance(Duration::from_millis(1)).await;
    assert_eq!((look(&store, 1).await, remote.claims()), ("vacant", 3));
}

#[tokio::test(start_paused = true)]
async fn a_copy_whose_time_is_over_gives_its_room_back_when_it_is_asked_for() {
    let cached = Cached::new(Remote::default());
    completed(&cached, 1, SECOND).await;
    completed(&cached, 2, 10 * SECOND).await;
    assert_eq!(
        (look(&cached, 1).await, look(&cached, 2).await),
        ("completed", "completed")
    );
    let both = cached.bytes();
    advance(2 * SECOND).await;
    acquire(&cached, 1).await;
    assert_eq!(cached.bytes(), both / 2);
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_a_copy_lives_no_longer_either() {
    let remote = Remote::default();
    let store = Cached::new(Cached::new(remote.clone()));
    completed(&store, 1, SECOND * 10).await;
    assert_eq!(look(&store, 1).await, "completed");
    advance(SECOND * 10).await;
    assert_eq!(look(&store, 1).await, "vacant");
}

#[tokio::test(start_paused = true)]
async fn a_change_in_the_store_behind_is_told_of() {
    assert_tells_of_a_change(&Cached::new(MemoryStore::new())).await;
    assert_tells_of_a_change(&AnyStore::new(MemoryStore::new())).await;
    assert_tells_of_a_change(&Arc::new(MemoryStore::new())).await;
}

#[tokio::test]
async fn a_store_behind_others_is_still_asked_at_once_where_it_can_be() {
    let is_there = |found| matches!(found, Some(Ok(Begin::Completed { .. })));
    let memory = MemoryStore::new();
    completed(&memory, 1, SECOND * 60).await;
    assert!(is_there(AnyStore::new(memory.clone()).begin_at_once(&id(1), &claim())));
    assert!(is_there(Arc::new(memory.clone()).begin_at_once(&id(1), &claim())));
    assert!(is_there(Cached::new(memory).begin_at_once(&id(1), &claim())));
}

#[test]
fn a_store_around_another_one_shows_which() {
    let cached = format!("{:?}", Cached::builder(MemoryStore::new()).longest(SECOND * 7).build());
    for part in ["Cached", "MemoryStore", "7s"] {
        assert!(cached.contains(part), "{part} is not in {cached}");
    }
    assert!(format!("{:?}", AnyStore::new(MemoryStore::new())).contains("AnyStore"));
}

#[tokio::test(start_paused = true)]
async fn unless_it_is_set_a_copy_is_given_for_five_minutes() {
    let remote = Remote::default();
    let store = Cached::new(remote.clone());
    completed(&store, 1, Retention::Forever).await;
    for (minutes, claims) in [(0, 2), (4, 2), (1, 3)] {
        advance(SECOND * 60 * minutes).await;
        assert_eq!((look(&store, 1).await, remote.claims()), ("completed", claims));
    }
}

#[tokio::test(start_paused = true)]
async fn the_store_is_asked_again_after_the_longest_time_of_a_copy() {
    for retention in [Retention::Forever, (SECOND * 60).into()] {
        let remote = Remote::default();
        let store = Cached::builder(remote.clone()).longest(SECOND * 2).build();
        completed(&store, 1, retention).await;
        for claims in [2, 2, 3, 3] {
            assert_eq!((look(&store, 1).await, remote.claims()), ("completed", claims));
            advance(SECOND).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_whose_end_nobody_knows_is_not_copied() {
    let remote = Remote {
        says_nothing: true,
        ..Remote::default()
    };
    let store = Cached::new(remote.clone());
    completed(&store, 1, SECOND * 60).await;
    for claims in [2, 3] {
        assert_eq!((look(&store, 1).await, remote.claims()), ("completed", claims));
    }
}

#[tokio::test(start_paused = true)]
async fn copies_take_no_more_than_their_bytes() {
    let remote = Remote::default();
    let store = Cached::builder(remote.clone()).max_bytes(20_000).build();
    for number in 0..1000 {
        completed(&store, number, SECOND * 60).await;
        assert_eq!(look(&store, number).await, "completed");
    }
    let one = Cached::new(MemoryStore::new());
    complete(&one, &acquire(&one, 1).await, 10_000).await;
    assert_eq!(one.bytes(), 0, "it was not asked for");
    assert!(is_replay(&one.begin(&id(1), &claim()).await.unwrap(), 10_000));
    assert!((10_000..11_000).contains(&one.bytes()), "{} bytes", one.bytes());
    assert!(store.bytes() <= 20_000, "{} bytes are copied", store.bytes());
    assert!(store.bytes() > 10_000, "only {} bytes are copied", store.bytes());
}
