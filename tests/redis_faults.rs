//! Redis servers that are away, full, loading, read-only or strangers, and networks that lose answers.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use http::StatusCode;
use support::{
    app::{call, keyed, open, pay},
    proxy::{Proxy, Weather},
    redis::Redis,
    steps::{MINUTE, acquire, claim, complete, id, is_replay, kept, kind, listening, until_back},
};
use tokio::{task::JoinSet, time::timeout};
use tower_idempotency::{Begin, IdempotencyLayer, Lease, Owner, RedisStore, Store, StoreErrorKind, StoredResponse};

async fn connect(url: &str) -> RedisStore {
    RedisStore::connect(url).await.unwrap()
}

// ---- the server's states

#[tokio::test]
async fn a_full_server_refuses_new_keys_replays_old_ones_and_lets_running_ones_end() {
    let server = Redis::start(&["--maxmemory-policy", "noeviction"]);
    let store = connect(&server.url()).await;
    let done = acquire(&store, 0).await;
    store.complete(&done, &kept(10), MINUTE.into()).await.unwrap();
    let mut running = Vec::new();
    for number in 1..=4 {
        running.push(acquire(&store, number).await);
    }
    server.say(&["CONFIG", "SET", "maxmemory", "1"]).await;
    assert_eq!(kind(store.begin(&id(9), &claim()).await), StoreErrorKind::Full);
    assert!(matches!(
        store.begin(&id(0), &claim()).await,
        Ok(Begin::Completed { .. })
    ));
    assert!(matches!(
        store.begin(&id(1), &claim()).await,
        Ok(Begin::InProgress { .. })
    ));
    let full = store.complete(&running[0], &kept(1000), MINUTE.into()).await;
    assert_eq!(kind(full), StoreErrorKind::Full);
    let fact = StoredResponse::not_kept(StatusCode::OK);
    store.complete(&running[0], &fact, MINUTE.into()).await.unwrap();
    store.renew(&running[1], MINUTE).await.unwrap();
    store.release(&running[1]).await.unwrap();
    store.abandon(&running[2]).await.unwrap();
    let takeover = claim().taking_over(running[2]);
    assert!(matches!(store.begin(&id(3), &takeover).await, Ok(Begin::Acquired(lease)) if lease.fence == 2));
    server.say(&["CONFIG", "SET", "maxmemory", "0"]).await;
    acquire(&store, 9).await;
}

#[tokio::test]
async fn a_replica_is_unavailable_until_it_is_the_primary() {
    let server = Redis::start(&["--replicaof", "127.0.0.1", "1"]);
    let store = connect(&server.url()).await;
    assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    let stranger = Lease::new(id(1), Owner::random().unwrap(), 1);
    assert_eq!(kind(store.renew(&stranger, MINUTE).await), StoreErrorKind::Unavailable);
    server.say(&["REPLICAOF", "NO", "ONE"]).await;
    acquire(&store, 1).await;
}

#[tokio::test]
async fn a_server_that_loads_its_file_is_unavailable_until_it_is_ready() {
    let mut server = Redis::start(&["--appendonly", "no", "--enable-debug-command", "yes"]);
    let store = connect(&server.url()).await;
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &kept(10), MINUTE.into()).await.unwrap();
    server.say(&["DEBUG", "POPULATE", "3000"]).await;
    server.say(&["SAVE"]).await;
    server.kill();
    // Each key takes a millisecond, and the server looks up from its file often enough to say that it is loading.
    server.set_options(&[
        "--appendonly",
        "no",
        "--key-load-delay",
        "1000",
        "--loading-process-events-interval-bytes",
        "1024",
    ]);
    server.restart("Loading RDB");
    assert_eq!(kind(store.begin(&id(2), &claim()).await), StoreErrorKind::Unavailable);
    assert!(matches!(until_back(&store, 1).await, Begin::Completed { .. }));
}

#[tokio::test]
async fn a_refused_log_in_is_told_apart_from_a_server_that_is_away() {
    let mut server = Redis::start(&["--requirepass", "secret"]);
    let port = server.port();
    let refused = RedisStore::connect(&server.url()).await;
    assert_eq!(kind(refused), StoreErrorKind::Other);
    let refused = RedisStore::connect(&format!("redis://:wrong@127.0.0.1:{port}")).await;
    assert_eq!(kind(refused), StoreErrorKind::Other);
    let store = connect(&format!("redis://:secret@127.0.0.1:{port}")).await;
    acquire(&store, 1).await;
    assert!(!format!("{store:?}").contains("secret"));
    server.kill();
    assert_eq!(
        kind(RedisStore::connect(&server.url()).await),
        StoreErrorKind::Unavailable
    );
}

#[tokio::test]
async fn a_store_logs_in_again_once_the_server_takes_its_password_again() {
    let mut server = Redis::start(&["--requirepass", "secret"]);
    let port = server.port();
    let builder = RedisStore::builder().timeout(Duration::from_millis(200));
    let url = format!("redis://:secret@127.0.0.1:{port}");
    let store = builder.connect(&url).await.unwrap();
    acquire(&store, 1).await;
    server.kill();
    server.set_options(&["--requirepass", "another"]);
    server.restart("Ready to accept connections");
    while kind(store.begin(&id(1), &claim()).await) != StoreErrorKind::Other {}
    server.kill();
    server.set_options(&["--requirepass", "secret"]);
    server.restart("Ready to accept connections");
    while store.begin(&id(1), &claim()).await.is_err() {}
}

#[tokio::test]
async fn a_server_that_may_forget_is_refused_where_that_is_asked_for() {
    let strict = || RedisStore::builder().refuse_forgetful_server(true);
    let server = Redis::start(&[]);
    strict().connect(&server.url()).await.unwrap();
    for options in [["--appendonly", "no"], ["--maxmemory-policy", "allkeys-lru"]] {
        let server = Redis::start(&options);
        assert_eq!(kind(strict().connect(&server.url()).await), StoreErrorKind::Other);
        connect(&server.url()).await;
    }
}

// ---- a server that goes and comes

#[tokio::test]
async fn a_server_that_hangs_fails_every_step_until_it_goes_on() {
    let server = Redis::start(&[]);
    let store = connect(&server.url()).await;
    let lease = acquire(&store, 1).await;
    server.pause();
    let own = claim();
    assert_eq!(kind(store.begin(&id(2), &own).await), StoreErrorKind::Unavailable);
    assert_eq!(kind(store.renew(&lease, MINUTE).await), StoreErrorKind::Unavailable);
    server.resume();
    // Late, but applied: it is the owner's own by now.
    let again = store.begin(&id(2), &own).await.unwrap();
    assert!(matches!(again, Begin::Acquired(lease) if lease.fence == 1), "{again:?}");
    store.complete(&lease, &kept(10), MINUTE.into()).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_killed_and_restarted_has_its_records_and_is_found_again() {
    let mut server = Redis::start(&[]);
    let store = connect(&server.url()).await;
    let (done, running) = (acquire(&store, 1).await, acquire(&store, 2).await);
    store.complete(&done, &kept(10), MINUTE.into()).await.unwrap();
    server.kill();
    assert_eq!(kind(store.begin(&id(3), &claim()).await), StoreErrorKind::Unavailable);
    server.restart("Ready to accept connections");
    assert!(matches!(until_back(&store, 1).await, Begin::Completed { .. }));
    store.complete(&running, &kept(10), MINUTE.into()).await.unwrap();
}

// ---- the network

#[tokio::test]
async fn a_claim_whose_answer_was_lost_is_its_owners_when_it_is_repeated() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let store = connect(&proxy.url()).await;
    let own = claim();
    proxy.make(Weather::LoseAnswer);
    assert_eq!(kind(store.begin(&id(1), &own).await), StoreErrorKind::Unavailable);
    assert_eq!(proxy.weather(), Weather::Clear, "the answer was lost");
    let begin = store.begin(&id(1), &own).await.unwrap();
    assert!(matches!(begin, Begin::Acquired(lease) if lease == Lease::new(id(1), own.owner, 1)));
    assert!(matches!(
        store.begin(&id(1), &claim()).await,
        Ok(Begin::InProgress { .. })
    ));
}

#[tokio::test]
async fn a_completion_whose_answer_was_lost_is_kept_and_may_be_repeated() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let store = connect(&proxy.url()).await;
    // The script is known to the server; so the answer that is lost is that of the change itself.
    let first = acquire(&store, 1).await;
    store.complete(&first, &kept(10), MINUTE.into()).await.unwrap();
    let lease = acquire(&store, 2).await;
    proxy.make(Weather::LoseAnswer);
    assert_eq!(
        kind(store.complete(&lease, &kept(20), MINUTE.into()).await),
        StoreErrorKind::Unavailable
    );
    assert_eq!(proxy.weather(), Weather::Clear, "the answer was lost");
    let found = until_back(&store, 2).await;
    assert!(matches!(found, Begin::Completed { response, .. } if response == kept(20)));
    store.complete(&lease, &kept(20), MINUTE.into()).await.unwrap();
}

#[tokio::test]
async fn a_lost_answer_to_the_claim_runs_the_handler_once() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let control = open();
    let app = pay(&control, IdempotencyLayer::new(connect(&proxy.url()).await));
    proxy.make(Weather::LoseAnswer);
    let first = call(&app, keyed("k", "a")).await;
    assert_eq!(first.status, StatusCode::CREATED);
    assert_eq!(proxy.weather(), Weather::Clear, "the answer was lost");
    let retry = call(&app, keyed("k", "a")).await;
    assert!(retry.is_replay());
    assert_eq!((retry.body, control.runs()), (first.body, 1));
}

#[tokio::test]
async fn a_connection_that_is_cut_without_a_word_is_given_up_for_a_new_one() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let builder = RedisStore::builder().timeout(Duration::from_millis(200));
    let store = builder.connect(&proxy.url()).await.unwrap();
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &kept(10), MINUTE.into()).await.unwrap();
    proxy.black_hole();
    assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    assert!(matches!(until_back(&store, 1).await, Begin::Completed { .. }));
}

#[tokio::test]
async fn a_silent_connection_is_given_up_by_those_who_never_wait_for_their_deadline() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let store = RedisStore::builder()
        .timeout(Duration::from_secs(1))
        .connect(&proxy.url())
        .await
        .unwrap();
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &kept(10), MINUTE.into()).await.unwrap();
    proxy.black_hole();
    let until_back = async {
        loop {
            let (id, claim) = (id(1), claim());
            if let Ok(Ok(begin)) = timeout(Duration::from_millis(300), store.begin(&id, &claim)).await {
                return begin;
            }
        }
    };
    let begin = timeout(MINUTE, until_back).await.expect("on another connection");
    assert!(matches!(begin, Begin::Completed { .. }));
}

#[tokio::test]
async fn a_subscription_that_is_cut_without_a_word_is_given_up_for_a_new_one() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let builder = RedisStore::builder().timeout(Duration::from_millis(200));
    let (store, other) = (
        connect(&server.url()).await,
        builder.connect(&proxy.url()).await.unwrap(),
    );
    let lease = acquire(&store, 1).await;
    let first = listening(&other, 1).await;
    proxy.black_hole();
    // Whoever listens for another record asks, and hears nothing.
    timeout(MINUTE, other.changed(&id(2)))
        .await
        .expect("asked on another one");
    // Something may have changed meanwhile.
    timeout(MINUTE, first).await.expect("it was subscribed to anew");
    let first = listening(&other, 1).await;
    complete(&store, &lease, 10).await;
    timeout(MINUTE, first).await.expect("it was woken");
}

#[tokio::test]
async fn an_answer_that_is_cut_in_its_middle_is_no_answer() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let store = connect(&proxy.url()).await;
    let lease = acquire(&store, 1).await;
    complete(&store, &lease, 5000).await;
    proxy.make(Weather::CutAnswer);
    assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    assert_eq!(proxy.weather(), Weather::Clear, "it was cut");
    assert!(is_replay(&until_back(&store, 1).await, 5000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_comes_too_late_is_never_taken_for_that_of_another_key() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let builder = RedisStore::builder().timeout(Duration::from_millis(100));
    let store = builder.connect(&proxy.url()).await.unwrap();
    // Before, by one that has time.
    let patient = connect(&server.url()).await;
    for number in 0..100 {
        let lease = acquire(&patient, number).await;
        complete(&patient, &lease, number as usize).await;
    }
    let (mut late, mut heard) = (0, 0);
    for round in 0..6 {
        let slow = Duration::from_millis(60 * (round % 3));
        proxy.make(Weather::Slow(slow));
        let mut looks = JoinSet::new();
        for number in 0..100 {
            let store = store.clone();
            looks.spawn(async move { (number, store.begin(&id(number), &claim()).await) });
        }
        for (number, found) in looks.join_all().await {
            match found {
                Ok(found) => {
                    assert!(is_replay(&found, number as usize), "{number}: {found:?}");
                    heard += 1;
                }
                Err(error) => {
                    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
                    late += 1;
                }
            }
        }
    }
    assert!(late > 0 && heard > 0, "{late} were late and {heard} were not");
}

#[tokio::test]
async fn a_step_that_is_dropped_leaves_the_answers_of_others_theirs() {
    let server = Redis::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let store = connect(&proxy.url()).await;
    for number in 0..20 {
        let lease = acquire(&store, number).await;
        complete(&store, &lease, number as usize).await;
    }
    proxy.make(Weather::Slow(Duration::from_millis(20)));
    for number in 0..20 {
        let (dropped, own) = (id((number + 7) % 20), claim());
        let mut leaving = Box::pin(store.begin(&dropped, &own));
        let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(leaving.as_mut().poll(cx).is_ready())).await;
        assert!(!polled);
        drop(leaving);
        assert!(is_replay(
            &store.begin(&id(number), &claim()).await.unwrap(),
            number as usize
        ));
    }
}

#[tokio::test]
async fn a_server_that_is_away_refuses_requests_and_no_handler_runs() {
    let mut server = Redis::start(&[]);
    let control = open();
    let app = pay(&control, IdempotencyLayer::new(connect(&server.url()).await));
    server.kill();
    let refused = call(&app, keyed("k", "a")).await;
    assert_eq!(
        (refused.status, refused.problem()),
        (StatusCode::SERVICE_UNAVAILABLE, "store-unavailable".to_owned())
    );
    assert!(refused.header("retry-after").is_some());
    assert_eq!(control.runs(), 0);
}

// ---- what no setting prevents

/// Not a promise, but what the page says: Redis answers first and replicates afterwards.
#[tokio::test]
async fn a_failover_may_lose_a_claim_that_the_primary_had_granted() {
    let mut primary = Redis::start(&[]);
    let between = Proxy::before(primary.port()).await;
    let replica = Redis::start(&["--replicaof", "127.0.0.1", &between.port().to_string()]);
    let before = connect(&primary.url()).await;
    acquire(&before, 1).await;
    while replica.ask::<usize>(&["DBSIZE"]).await == 0 {
        tokio::task::yield_now().await;
    }
    between.black_hole();
    acquire(&before, 2).await;
    primary.kill();
    replica.say(&["REPLICAOF", "NO", "ONE"]).await;
    let after = connect(&replica.url()).await;
    assert!(matches!(
        after.begin(&id(1), &claim()).await,
        Ok(Begin::InProgress { .. })
    ));
    // Granted a second time.
    acquire(&after, 2).await;
}
