//! The Redis store's contract and own promises, on servers of the tests' own.
#![cfg(all(feature = "redis", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
    time::Duration,
};

use http::StatusCode;
use support::{
    proxy::Proxy,
    redis::{Redis, program},
};
#[cfg(feature = "cached")]
use tower_idempotency::Cached;
use tower_idempotency::{
    Begin, Claim, Fingerprint, Lease, Owner, RecordId, RedisStore, Retention, Store, StoreErrorKind, StoredResponse,
    testing::{self, Subject},
};

const MINUTE: Duration = Duration::from_secs(60);

fn claim() -> Claim {
    let fingerprint = Fingerprint::new(1, [1; 32]);
    Claim::new(fingerprint, Owner::random().unwrap(), MINUTE, MINUTE.into())
}

fn id(number: u8) -> RecordId {
    RecordId::from_bytes([number; 32])
}

fn key(number: u8) -> String {
    format!("idempotency:{}", id(number).to_hex())
}

fn answer() -> StoredResponse {
    StoredResponse::not_kept(StatusCode::CREATED)
}

async fn acquire(store: &RedisStore, number: u8) -> Lease {
    match store.begin(&id(number), &claim()).await {
        Ok(Begin::Acquired(lease)) => lease,
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

async fn refusal(store: &RedisStore, number: u8) -> StoreErrorKind {
    store.begin(&id(number), &claim()).await.unwrap_err().kind()
}

/// Whether it is ready when it is polled once.
async fn is_ready(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
    let mut future = future;
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await
}

/// A store that is made anew for each check, on a real clock.
struct Made<F>(F);

impl<S: Store, M: Future<Output = S> + Send, F: Fn() -> M + Sync> Subject for Made<F> {
    type Store = S;

    fn store(&self) -> impl Future<Output = S> + Send {
        (self.0)()
    }

    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    fn waits(&self) -> bool {
        true
    }
}

/// Or a run of these tests against Valkey would be one more against Redis.
#[tokio::test]
async fn the_server_is_valkey_where_valkey_is_to_be_tested() {
    let server = Redis::start(&[]);
    let info: String = server.ask(&["INFO", "server"]).await;
    let says = |field: &str| info.lines().any(|line| line.starts_with(field));
    assert!(says("redis_version:"), "{info}");
    if std::env::var_os("EXPECT_VALKEY").is_some() {
        assert!(says("valkey_version:"), "{:?} is none: {info}", program());
    }
}

#[tokio::test]
async fn the_store_keeps_the_contract() {
    let server = Redis::start(&[]);
    testing::check(&Made(|| connected(&server))).await.assert();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_keeps_the_contract_under_many_threads() {
    let server = Redis::start(&[]);
    testing::check_races(&Made(|| connected(&server))).await.assert();
}

/// Each with copies of its own.
#[cfg(feature = "cached")]
#[tokio::test]
async fn the_store_keeps_the_contract_with_copies_in_front_of_it() {
    let server = Redis::start(&[]);
    testing::check(&Made(|| async { Cached::new(connected(&server).await) }))
        .await
        .assert();
}

#[tokio::test]
async fn the_store_keeps_the_contract_over_a_connection_of_ones_own() {
    let server = Redis::start(&[]);
    let connection = server.connection().await;
    let own = || async { RedisStore::builder().connect_with(connection.clone()).await.unwrap() };
    testing::check(&Made(own)).await.assert();
}

#[tokio::test]
async fn the_store_keeps_the_contract_over_the_newer_protocol() {
    let server = Redis::start(&[]);
    let url = format!("{}/?protocol=3", server.url());
    testing::check(&Made(|| async { RedisStore::connect(&url).await.unwrap() }))
        .await
        .assert();
}

async fn look(store: &RedisStore, number: u8) -> Begin {
    store.begin(&id(number), &claim()).await.unwrap()
}

/// The server syncs each change, and the disk may be busy with something else.
async fn connected(server: &Redis) -> RedisStore {
    let patient = RedisStore::builder().timeout(Duration::from_secs(10));
    patient.connect(&server.url()).await.unwrap()
}

// ---- what it costs

#[tokio::test]
async fn a_claim_and_a_replay_are_one_command_each_and_an_end_is_one_script() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let lease = acquire(&store, 1).await;
    assert_eq!((server.calls("set").await, server.calls("evalsha").await), (1, 0));
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    let scripts = server.calls("evalsha").await;
    // The one that completes reads and sets, too.
    let (gets, sets) = (server.calls("get").await, server.calls("set").await);
    assert!(matches!(
        look(&connected(&server).await, 1).await,
        Begin::Completed { .. }
    ));
    assert_eq!((server.calls("get").await, server.calls("set").await), (gets, sets + 1));
    assert_eq!(
        (server.calls("evalsha").await, server.calls("pttl").await),
        (scripts, 0)
    );
    // The script was sent in full once, and is known by its hash from then on.
    let lease = acquire(&store, 2).await;
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    assert_eq!(
        (server.calls("eval").await, server.calls("evalsha").await),
        (1, scripts + 1)
    );
}

#[tokio::test]
async fn what_remains_of_a_completed_record_is_told_in_the_same_flight_to_those_who_ask() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let store = RedisStore::connect(&proxy.url()).await.unwrap();
    for (number, retention) in [(1, MINUTE.into()), (2, Retention::Forever)] {
        let lease = acquire(&store, number).await;
        store.complete(&lease, &answer(), retention).await.unwrap();
    }
    // Whether it is expected or not.
    let other = RedisStore::connect(&proxy.url()).await.unwrap();
    let asked = server.calls("pttl").await;
    let flights = proxy.flights();
    let asking = claim().asking_for_remaining();
    let told = async |store: &RedisStore, number| match store.begin(&id(number), &asking).await.unwrap() {
        Begin::Completed { remaining, .. } => remaining,
        other => panic!("{other:?}"),
    };
    for store in [&store, &other] {
        let Some(Retention::For(left)) = told(store, 1).await else {
            panic!("it is kept for a minute");
        };
        assert!(left <= MINUTE && left > MINUTE / 2, "{left:?}");
        assert_eq!(told(store, 2).await, Some(Retention::Forever));
    }
    assert_eq!(proxy.flights(), flights + 4, "one for each claim");
    assert_eq!(server.calls("pttl").await, asked + 4);
    // Nobody else pays for it.
    assert!(matches!(
        look(&store, 1).await,
        Begin::Completed { remaining: None, .. }
    ));
    assert_eq!(server.calls("pttl").await, asked + 4);
}

#[tokio::test]
async fn a_server_that_forgot_the_scripts_is_told_them_again() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    for number in 0..2 {
        server.say(&["SCRIPT", "FLUSH"]).await;
        let lease = acquire(&store, number).await;
        store.renew(&lease, MINUTE).await.unwrap();
        store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
        assert!(matches!(look(&store, number).await, Begin::Completed { .. }));
    }
}

// ---- who owns what

#[tokio::test]
async fn a_renewal_that_lands_after_an_abandon_revives_nothing() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let own = claim();
    let Begin::Acquired(lease) = store.begin(&id(1), &own).await.unwrap() else {
        panic!("it was vacant");
    };
    store.abandon(&lease).await.unwrap();
    let late = store.renew(&lease, MINUTE).await.unwrap_err();
    assert_eq!(late.kind(), StoreErrorKind::Fenced);
    assert!(matches!(look(&store, 1).await, Begin::Abandoned { lost, .. } if lost == lease));
    // Neither does its claim, if that was late.
    let late = store.begin(&id(1), &own).await.unwrap();
    assert!(
        matches!(late, Begin::Abandoned { lost, .. } if lost == lease),
        "{late:?}"
    );
    store.abandon(&lease).await.unwrap();
}

#[tokio::test]
async fn what_is_abandoned_is_kept_for_its_retention_from_then_on() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let own = Claim::new(
        Fingerprint::new(1, [1; 32]),
        Owner::random().unwrap(),
        MINUTE * 60,
        MINUTE.into(),
    );
    let Begin::Acquired(lease) = store.begin(&id(1), &own).await.unwrap() else {
        panic!("it was vacant");
    };
    let left = async || Duration::from_millis(server.ask(&["PTTL", &key(1)]).await);
    assert!(
        left().await > MINUTE * 60,
        "its lease, and then as long again as it is kept"
    );
    store.abandon(&lease).await.unwrap();
    let left = left().await;
    assert!(left > Duration::ZERO && left <= MINUTE, "{left:?}");
}

#[tokio::test]
async fn a_repeated_completion_succeeds_and_changes_nothing() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    let before: Vec<u8> = server.ask(&["GET", &key(1)]).await;
    let other = StoredResponse::not_kept(StatusCode::ACCEPTED);
    let written = server.calls("setrange").await;
    store.complete(&lease, &other, Retention::Forever).await.unwrap();
    // For replicas that are waited for: a server may count what this connection wrote, and the first try's is gone.
    assert_eq!(server.calls("setrange").await, written + 1);
    assert_eq!(server.ask::<Vec<u8>>(&["GET", &key(1)]).await, before);
    let left: i64 = server.ask(&["PTTL", &key(1)]).await;
    assert!(left > 0, "it still expires");
}

#[tokio::test]
async fn the_servers_clock_alone_ends_a_lease() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let lease = acquire(&store, 1).await;
    // As if the lease's minute had passed there, and no more than the first of the retention's.
    let retention = MINUTE.as_millis().to_string();
    server.say(&["PEXPIRE", &key(1), &retention]).await;
    let taken = claim().taking_over(lease);
    let next = loop {
        match store.begin(&id(1), &taken).await.unwrap() {
            Begin::Acquired(lease) => break lease,
            Begin::InProgress { remaining, .. } => assert!(remaining.is_zero()),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(next.fence, 2);
    assert!(matches!(look(&store, 1).await, Begin::InProgress { .. }));
}

#[tokio::test]
async fn what_is_kept_for_ever_has_no_time_to_live() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &answer(), Retention::Forever).await.unwrap();
    assert_eq!(server.ask::<i64>(&["PTTL", &key(1)]).await, -1);
}

#[tokio::test]
async fn services_with_different_prefixes_know_nothing_of_each_other() {
    let server = Redis::start(&[]);
    let other = RedisStore::builder()
        .prefix("other:")
        .connect(&server.url())
        .await
        .unwrap();
    acquire(&connected(&server).await, 1).await;
    acquire(&other, 1).await;
}

// ---- what cannot be read

#[tokio::test]
async fn a_record_that_cannot_be_read_is_an_error_and_stays() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    for number in 1..=4 {
        let lease = acquire(&store, number).await;
        if number == 2 {
            store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
        }
    }
    // In the fingerprint; the status of the answer, which is one still; the version; the time to live.
    server.say(&["SETRANGE", &key(1), "40", "x"]).await;
    server.say(&["SETRANGE", &key(2), "85", "x"]).await;
    server.say(&["SETRANGE", &key(3), "0", "\u{2}"]).await;
    server.say(&["PERSIST", &key(4)]).await;
    server.say(&["SET", &key(5), ""]).await;
    server.say(&["LPUSH", &key(6), "x"]).await;
    for (number, kind) in [
        (1, StoreErrorKind::Corrupt),
        (2, StoreErrorKind::Corrupt),
        (3, StoreErrorKind::NewerVersion),
        (4, StoreErrorKind::Corrupt),
        (5, StoreErrorKind::Corrupt),
        (6, StoreErrorKind::Corrupt),
    ] {
        let before: Vec<u8> = server.ask(&["DUMP", &key(number)]).await;
        assert_eq!(refusal(&store, number).await, kind, "{number}");
        assert_eq!(server.ask::<Vec<u8>>(&["DUMP", &key(number)]).await, before, "{number}");
    }
}

// ---- waiting

#[tokio::test]
async fn nothing_is_published_while_nobody_waits() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    for number in 0..3 {
        let lease = acquire(&store, number).await;
        match number {
            0 => store.complete(&lease, &answer(), MINUTE.into()).await.unwrap(),
            1 => store.release(&lease).await.unwrap(),
            _ => store.abandon(&lease).await.unwrap(),
        }
    }
    assert_eq!(server.calls("publish").await, 0);
    assert_eq!(server.ask::<String>(&["CLIENT", "LIST", "TYPE", "pubsub"]).await, "");
}

#[tokio::test]
async fn a_waiter_on_another_node_hears_of_every_end_over_one_subscription() {
    let server = Redis::start(&[]);
    let (store, other) = (connected(&server).await, connected(&server).await);
    for number in 0..3 {
        let lease = acquire(&store, number).await;
        // The first to listen is woken once the server has confirmed: it looks again.
        other.changed(&id(number)).await;
        let record = id(number);
        let mut waiters: Vec<_> = (0..8).map(|_| Box::pin(other.changed(&record))).collect();
        for waiter in &mut waiters {
            assert!(!is_ready(waiter.as_mut()).await);
        }
        match number {
            0 => store.complete(&lease, &answer(), MINUTE.into()).await.unwrap(),
            1 => store.release(&lease).await.unwrap(),
            _ => store.abandon(&lease).await.unwrap(),
        }
        for waiter in waiters {
            waiter.await;
        }
    }
    assert_eq!(server.calls("publish").await, 3);
    assert_eq!(
        server.calls("subscribe").await,
        4,
        "one for all and one for each record, not for each waiter"
    );
    let subscribers: String = server.ask(&["CLIENT", "LIST", "TYPE", "pubsub"]).await;
    assert_eq!(subscribers.lines().count(), 1, "{subscribers}");
}

#[tokio::test]
async fn who_listens_again_asks_the_server_for_nothing() {
    let server = Redis::start(&[]);
    let (store, other) = (connected(&server).await, connected(&server).await);
    acquire(&store, 1).await;
    other.changed(&id(1)).await;
    let record = id(1);
    for _ in 0..50 {
        {
            let mut again = pin!(other.changed(&record));
            assert!(!is_ready(again.as_mut()).await);
        }
        // As a waiter does, while nobody listens.
        assert!(matches!(look(&other, 1).await, Begin::InProgress { .. }));
    }
    assert_eq!(server.calls("subscribe").await, 2, "one for all, one for the record");
}

#[tokio::test]
async fn waiters_hear_again_after_their_subscription_broke() {
    let server = Redis::start(&[]);
    let (store, other) = (connected(&server).await, connected(&server).await);
    let lease = acquire(&store, 1).await;
    other.changed(&id(1)).await;
    let record = id(1);
    let mut waiting = pin!(other.changed(&record));
    assert!(!is_ready(waiting.as_mut()).await);
    server.say(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    // Woken by the new subscription: something may have changed meanwhile.
    waiting.await;
    let mut waiting = pin!(other.changed(&record));
    assert!(!is_ready(waiting.as_mut()).await);
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    waiting.await;
}

/// What somebody listens to, in their order.
async fn channels(server: &Redis) -> Vec<String> {
    let mut channels: Vec<String> = server.ask(&["PUBSUB", "CHANNELS"]).await;
    channels.sort();
    channels
}

/// Listened to together with any record.
const LISTENING: &str = "idempotency:listening";

#[tokio::test]
async fn a_channel_that_nobody_listens_to_is_left_and_with_the_last_the_one_of_all() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    acquire(&store, 1).await;
    store.changed(&id(1)).await;
    assert_eq!(channels(&server).await, [key(1), LISTENING.to_owned()]);
    while !channels(&server).await.is_empty() {
        tokio::task::yield_now().await;
    }
    // And both are there again for whoever comes then.
    store.changed(&id(2)).await;
    assert_eq!(channels(&server).await, [key(2), LISTENING.to_owned()]);
    while !channels(&server).await.is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_channel_that_somebody_came_back_to_is_kept() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let ids = [id(1), id(2)];
    for id in &ids {
        // Left in this order.
        store.changed(id).await;
    }
    let mut back = pin!(store.changed(&ids[0]));
    assert!(!is_ready(back.as_mut()).await);
    while channels(&server).await.contains(&key(2)) {
        tokio::task::yield_now().await;
    }
    assert_eq!(channels(&server).await, [key(1), LISTENING.to_owned()]);
}

// ---- what is not as this store left it

/// What is stored, and when it ends: `DUMP` says nothing of the time.
async fn stored(server: &Redis, number: u8) -> (Vec<u8>, i64) {
    let value = server.ask(&["DUMP", &key(number)]).await;
    (value, server.ask(&["PEXPIRETIME", &key(number)]).await)
}

#[tokio::test]
async fn no_step_changes_a_record_of_a_newer_version() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let long = MINUTE * 60;
    for state in 0..3 {
        let lease = acquire(&store, state).await;
        match state {
            1 => store.abandon(&lease).await.unwrap(),
            2 => store.complete(&lease, &answer(), MINUTE.into()).await.unwrap(),
            _ => {}
        }
        server.say(&["SETRANGE", &key(state), "0", "\u{2}"]).await;
        let before = stored(&server, state).await;
        for step in 0..5 {
            let done = match step {
                0 => store.complete(&lease, &answer(), long.into()).await,
                1 => store.complete(&lease, &answer(), Retention::Forever).await,
                2 => store.renew(&lease, long).await,
                3 => store.abandon(&lease).await,
                _ => store.release(&lease).await,
            };
            let kind = done.unwrap_err().kind();
            assert_eq!(kind, StoreErrorKind::Fenced, "step {step} in state {state}");
            assert_eq!(stored(&server, state).await, before, "step {step} in state {state}");
        }
    }
}

#[tokio::test]
async fn what_lost_its_time_to_live_is_neither_taken_over_nor_renewed_by_a_claim() {
    let server = Redis::start(&[]);
    let store = connected(&server).await;
    let own = claim();
    let Begin::Acquired(running) = store.begin(&id(1), &own).await.unwrap() else {
        panic!("it was vacant");
    };
    let lost = acquire(&store, 2).await;
    store.abandon(&lost).await.unwrap();
    for number in 1..=2 {
        server.say(&["PERSIST", &key(number)]).await;
    }
    let before = (stored(&server, 1).await, stored(&server, 2).await);
    for (number, claim) in [
        (1, claim().taking_over(running)),
        (1, own),
        (2, claim().taking_over(lost)),
    ] {
        let error = store.begin(&id(number), &claim).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{number}");
    }
    assert_eq!((stored(&server, 1).await, stored(&server, 2).await), before);
}

/// The server refuses a claim there without a look, so the script is the first to see the record.
#[tokio::test]
async fn on_a_full_server_nothing_vacant_is_acquired_and_nothing_of_a_newer_version_taken_over() {
    let server = Redis::start(&["--maxmemory-policy", "noeviction"]);
    let store = connected(&server).await;
    let lost = acquire(&store, 1).await;
    store.abandon(&lost).await.unwrap();
    let own = claim();
    store.begin(&id(2), &own).await.unwrap();
    for number in 1..=2 {
        server.say(&["SETRANGE", &key(number), "0", "\u{2}"]).await;
    }
    let before = (stored(&server, 1).await, stored(&server, 2).await);
    server.say(&["CONFIG", "SET", "maxmemory", "1"]).await;
    for (number, claim) in [(1, claim().taking_over(lost)), (2, own)] {
        let error = store.begin(&id(number), &claim).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::NewerVersion, "{number}");
    }
    assert_eq!((stored(&server, 1).await, stored(&server, 2).await), before);
    let gone = Lease::new(id(9), Owner::random().unwrap(), 1);
    for claim in [claim(), claim().taking_over(gone)] {
        let error = store.begin(&id(9), &claim).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Full);
    }
    assert_eq!(server.ask::<u64>(&["EXISTS", &key(9)]).await, 0);
}
