//! Duplicates that wait for the running one and get its answer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use axum::response::IntoResponse;
use http::StatusCode;
use support::{
    app::{Control, answering, call, gated, keyed, pay, spawn},
    faulty::{Fault, FaultyStore, Op},
    http::Answer,
};
use tokio::{task::JoinHandle, time::Instant};
use tower_idempotency::{
    Begin, Claim, Concurrent, Fingerprint, Guarantee, IdempotencyLayer, MemoryStore, Owner, RecordId, Retention, Store,
    StoreErrorKind, StoredResponse,
};

const WAIT: Duration = Duration::from_secs(5);

fn waiting(store: impl Store) -> IdempotencyLayer {
    IdempotencyLayer::new(store).on_concurrent(Concurrent::Wait(WAIT))
}

/// Until this many requests have begun to wait.
async fn waited(layer: &IdempotencyLayer, requests: u64) {
    while layer.counters().waited < requests {
        tokio::task::yield_now().await;
    }
}

/// One request whose handler waits, and some that wait for it.
async fn first_and_waiters(
    layer: &IdempotencyLayer,
    control: &Control,
    waiters: u64,
) -> (axum::Router, JoinHandle<Answer>, Vec<JoinHandle<Answer>>) {
    let app = pay(control, layer.clone());
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let others = (0..waiters).map(|_| spawn(&app, keyed("k", "a"))).collect();
    waited(layer, waiters).await;
    (app, first, others)
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_no_clock_can_count_is_as_long_as_the_handler_takes() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).on_concurrent(Concurrent::Wait(Duration::MAX));
    let control = gated();
    let (_, first, mut others) = first_and_waiters(&layer, &control, 1).await;
    tokio::time::sleep(Duration::from_secs(3 * 3600)).await;
    control.let_go();
    assert!(!first.await.unwrap().is_replay());
    assert!(others.remove(0).await.unwrap().is_replay());
}

#[tokio::test(start_paused = true)]
async fn waiters_get_the_first_ones_answer_as_soon_as_it_is_there() {
    let layer = waiting(MemoryStore::new());
    let control = gated();
    let (_, first, others) = first_and_waiters(&layer, &control, 10).await;
    let start = Instant::now();
    control.let_go();
    assert!(!first.await.unwrap().is_replay());
    for other in others {
        let answer = other.await.unwrap();
        assert_eq!((answer.status, answer.is_replay()), (StatusCode::CREATED, true));
        assert_eq!(answer.body, "run 1 attempt 1: a");
    }
    assert_eq!(start.elapsed(), Duration::ZERO, "nobody waited for a timer");
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_runs_out_is_a_conflict() {
    let layer = waiting(MemoryStore::new());
    let control = gated();
    let (_, first, others) = first_and_waiters(&layer, &control, 1).await;
    let start = Instant::now();
    let answer = others.into_iter().next().unwrap().await.unwrap();
    assert_eq!(
        (answer.status, answer.problem()),
        (StatusCode::CONFLICT, "request-in-progress".to_owned())
    );
    assert!(answer.header("retry-after").is_some());
    // A timer counts whole milliseconds.
    assert!(start.elapsed() >= WAIT && start.elapsed() < WAIT + Duration::from_millis(5));
    control.let_go();
    first.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_waiter_above_the_cap_is_refused_at_once() {
    let layer = waiting(MemoryStore::new()).max_waiters(2);
    let control = gated();
    let (app, first, others) = first_and_waiters(&layer, &control, 2).await;
    let start = Instant::now();
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    assert_eq!(start.elapsed(), Duration::ZERO);
    control.let_go();
    first.await.unwrap();
    for other in others {
        assert!(other.await.unwrap().is_replay());
    }
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_frees_its_place_at_once() {
    let layer = waiting(MemoryStore::new()).max_waiters(1);
    let control = gated();
    let (app, first, others) = first_and_waiters(&layer, &control, 1).await;
    for other in others {
        other.abort();
        assert!(other.await.unwrap_err().is_cancelled());
    }
    let next = spawn(&app, keyed("k", "a"));
    waited(&layer, 2).await;
    control.let_go();
    first.await.unwrap();
    assert!(next.await.unwrap().is_replay());
    assert_eq!(layer.counters().detached, 0, "a waiter has nothing to finish");
}

/// Does not execute the first request.
fn busy_at_first(control: &Control, layer: &IdempotencyLayer) -> axum::Router {
    answering(control, layer.clone(), |run, _, _| {
        let status = if run == 1 {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::OK
        };
        (status, format!("run {run}")).into_response()
    })
}

/// Once the only one who may wait runs: one more waits, instead of being refused, and gets the answer.
async fn assert_one_more_may_wait(app: &axum::Router, layer: &IdempotencyLayer, control: &Control) {
    let more = spawn(app, keyed("k", "a"));
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!more.is_finished(), "{:?}", more.await);
    assert_eq!(layer.counters().waited, 2);
    control.let_go();
    assert!(more.await.unwrap().is_replay());
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_runs_waits_no_more_and_its_place_is_free() {
    let layer = waiting(MemoryStore::new()).max_waiters(1);
    let control = gated();
    let app = busy_at_first(&control, &layer);
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let other = spawn(&app, keyed("k", "a"));
    waited(&layer, 1).await;
    control.let_go();
    first.await.unwrap();
    control.entered().await;
    assert_one_more_may_wait(&app, &layer, &control).await;
    assert_eq!(other.await.unwrap().body, "run 2");
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_runs_without_the_store_waits_no_more_either() {
    let store = FaultyStore::default();
    let layer = waiting(store.clone()).max_waiters(1).dangerously_run_without_store();
    let control = gated();
    let (app, first, others) = first_and_waiters(&layer, &control, 1).await;
    store.down(Fault::Error(StoreErrorKind::Unavailable));
    control.entered().await;
    store.up();
    // The gate is a queue, and the first one is its head.
    assert_one_more_may_wait(&app, &layer, &control).await;
    first.await.unwrap();
    control.let_go();
    assert_eq!(
        others.into_iter().next().unwrap().await.unwrap().status,
        StatusCode::CREATED
    );
}

#[tokio::test(start_paused = true)]
async fn a_different_request_does_not_wait() {
    let layer = waiting(MemoryStore::new());
    let control = gated();
    let (app, first, _) = first_and_waiters(&layer, &control, 0).await;
    let start = Instant::now();
    assert_eq!(call(&app, keyed("k", "b")).await.problem(), "idempotency-key-reused");
    assert_eq!(start.elapsed(), Duration::ZERO);
    control.let_go();
    first.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn when_the_first_did_not_execute_one_waiter_runs_and_the_rest_get_its_answer() {
    let layer = waiting(MemoryStore::new());
    let control = gated();
    let app = busy_at_first(&control, &layer);
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let others: Vec<_> = (0..20).map(|_| spawn(&app, keyed("k", "a"))).collect();
    waited(&layer, 20).await;
    let start = Instant::now();
    control.let_go();
    assert_eq!(first.await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    control.entered().await;
    control.let_go();
    let mut replays = 0;
    for other in others {
        let answer = other.await.unwrap();
        assert_eq!(answer.body, "run 2");
        replays += usize::from(answer.is_replay());
    }
    assert_eq!((control.runs(), replays), (2, 19));
    assert_eq!(start.elapsed(), Duration::ZERO, "nobody waited for a timer");
}

#[tokio::test(start_paused = true)]
async fn a_release_wakes_one_waiter_and_not_the_herd() {
    let store = FaultyStore::default();
    let layer = waiting(store.clone());
    let control = gated();
    let app = answering(&control, layer.clone(), |_, _, _| {
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    });
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let others: Vec<_> = (0..50).map(|_| spawn(&app, keyed("k", "a"))).collect();
    waited(&layer, 50).await;
    let before = store.calls(Op::Begin);
    control.let_go();
    first.await.unwrap();
    control.entered().await;
    assert_eq!(
        store.calls(Op::Begin) - before,
        1,
        "one looked again, and claimed the record"
    );
    for _ in 0..50 {
        control.let_go();
    }
    for other in others {
        assert_eq!(other.await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    }
    assert_eq!(control.runs(), 51, "each in its turn");
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_was_called_and_leaves_passes_the_call_on() {
    let layer = waiting(MemoryStore::new());
    let control = gated();
    let app = busy_at_first(&control, &layer);
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    // Polled by hand, so that it is called and does not run.
    let mut called = Box::pin(call(&app, keyed("k", "a")));
    assert!(futures_util::poll!(called.as_mut()).is_pending());
    assert_eq!(layer.counters().waited, 1, "it is the first in the queue");
    let other = spawn(&app, keyed("k", "a"));
    waited(&layer, 2).await;
    let start = Instant::now();
    control.let_go();
    first.await.unwrap();
    drop(called);
    control.entered().await;
    control.let_go();
    assert_eq!(other.await.unwrap().body, "run 2");
    assert_eq!(start.elapsed(), Duration::ZERO, "the call was not lost");
}

#[tokio::test(start_paused = true)]
async fn when_the_first_is_lost_its_waiters_are_told_at_once() {
    let layer = waiting(MemoryStore::new());
    let control = gated();
    let app = answering(&control, layer.clone(), |_, _, _| panic!("the handler panics"));
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let other = spawn(&app, keyed("k", "a"));
    waited(&layer, 1).await;
    let start = Instant::now();
    control.let_go();
    assert!(first.await.unwrap_err().is_panic());
    assert_eq!(other.await.unwrap().problem(), "outcome-unknown");
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn when_the_first_is_lost_and_may_run_again_one_waiter_takes_it_over() {
    let layer = waiting(MemoryStore::new()).guarantee(Guarantee::AtLeastOnce);
    let control = gated();
    let app = answering(&control, layer.clone(), |run, attempt, _| {
        assert!(run > 1, "the first handler panics");
        format!("attempt {attempt}").into_response()
    });
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let others: Vec<_> = (0..8).map(|_| spawn(&app, keyed("k", "a"))).collect();
    waited(&layer, 8).await;
    control.let_go();
    assert!(first.await.unwrap_err().is_panic());
    control.entered().await;
    control.let_go();
    for other in others {
        assert_eq!(other.await.unwrap().body, "attempt 2");
    }
    assert_eq!(control.runs(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_waiter_finds_the_answer_although_every_hint_is_lost() {
    let store = FaultyStore::default();
    store.deafen();
    let layer = waiting(store);
    let control = gated();
    let (_, first, others) = first_and_waiters(&layer, &control, 3).await;
    let start = Instant::now();
    control.let_go();
    first.await.unwrap();
    for other in others {
        assert!(other.await.unwrap().is_replay());
    }
    assert!(
        start.elapsed() < Duration::from_millis(1100),
        "it looks once in a second"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_duplicate_that_waits_among_threads_gets_the_answer() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).on_concurrent(Concurrent::Wait(Duration::from_secs(600)));
    for round in 0..200 {
        let control = gated();
        let app = pay(&control, layer.clone());
        let key = format!("key-{round}");
        let clients: Vec<_> = (0..8).map(|_| spawn(&app, keyed(&key, "a"))).collect();
        control.let_go();
        for client in clients {
            assert_eq!(client.await.unwrap().body, "run 1 attempt 1: a");
        }
    }
}

/// Below the layer, whose looks from time to time would hide it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_wake_up_is_lost_between_listening_and_looking() {
    let store = MemoryStore::new();
    let claim = || {
        let fingerprint = Fingerprint::new(1, [0; 32]);
        Claim::new(
            fingerprint,
            Owner::random().unwrap(),
            Duration::from_secs(3600),
            Retention::Forever,
        )
    };
    for round in 0..5000u32 {
        let mut id = [0; 32];
        id[..4].copy_from_slice(&round.to_le_bytes());
        let id = RecordId::from_bytes(id);
        let Ok(Begin::Acquired(lease)) = store.begin(&id, &claim()).await else {
            panic!("it is vacant")
        };
        let completing = {
            let store = store.clone();
            tokio::spawn(async move {
                let answer = StoredResponse::not_kept(StatusCode::OK);
                store.complete(&lease, &answer, Retention::Forever).await.unwrap();
            })
        };
        let mut changed = std::pin::pin!(store.changed(&id));
        let heard = futures_util::poll!(changed.as_mut()).is_ready();
        let look = store.begin(&id, &claim()).await.unwrap();
        if !heard && matches!(look, Begin::InProgress { .. }) {
            let woken = tokio::time::timeout(Duration::from_secs(60), changed).await;
            assert!(woken.is_ok(), "round {round}: nobody was told");
        }
        completing.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_when_it_was_to_end_and_not_at_the_next_look() {
    let limit = Duration::from_millis(2500);
    let layer = waiting(MemoryStore::new()).on_concurrent(Concurrent::Wait(limit));
    let control = gated();
    let start = Instant::now();
    let (_, _first, mut others) = first_and_waiters(&layer, &control, 1).await;
    assert_eq!(others.remove(0).await.unwrap().problem(), "request-in-progress");
    assert!(
        (limit..limit + Duration::from_millis(100)).contains(&start.elapsed()),
        "after {:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_waiter_looks_again_when_the_lease_it_saw_is_over() {
    let lease = Duration::from_millis(2500);
    let store = FaultyStore::default();
    let layer = waiting(store.clone()).lease(lease);
    let control = gated();
    store.fail(Op::Renew, [Fault::Error(StoreErrorKind::Fenced)]);
    let start = Instant::now();
    let (_, _first, mut others) = first_and_waiters(&layer, &control, 1).await;
    assert_eq!(others.remove(0).await.unwrap().problem(), "outcome-unknown");
    assert!(
        (lease..lease + Duration::from_millis(100)).contains(&start.elapsed()),
        "after {:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_has_to_wait_again_is_told_at_once_again() {
    let layer = waiting(MemoryStore::new()).guarantee(Guarantee::AtLeastOnce);
    let control = gated();
    let app = answering(&control, layer.clone(), |run, attempt, _| {
        assert!(run > 1, "the first handler panics");
        format!("attempt {attempt}").into_response()
    });
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let others: Vec<_> = (0..8).map(|_| spawn(&app, keyed("k", "a"))).collect();
    waited(&layer, 8).await;
    let start = Instant::now();
    control.let_go();
    assert!(first.await.unwrap_err().is_panic());
    // One runs; the others were called as well, and wait again.
    control.entered().await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    control.let_go();
    for other in others {
        assert_eq!(other.await.unwrap().body, "attempt 2");
    }
    assert_eq!(start.elapsed(), Duration::ZERO, "nobody waited for a timer");
}

#[tokio::test(start_paused = true)]
async fn when_the_first_is_lost_every_waiter_is_told_at_once() {
    let layer = waiting(MemoryStore::new());
    let control = gated();
    let app = answering(&control, layer.clone(), |_, _, _| panic!("the handler panics"));
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let others: Vec<_> = (0..5).map(|_| spawn(&app, keyed("k", "a"))).collect();
    waited(&layer, 5).await;
    let start = Instant::now();
    control.let_go();
    assert!(first.await.unwrap_err().is_panic());
    for other in others {
        assert_eq!(other.await.unwrap().problem(), "outcome-unknown");
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn for_each_key_128_may_wait_unless_it_is_set() {
    let layer = waiting(MemoryStore::new());
    let control = gated();
    let (app, _first, others) = first_and_waiters(&layer, &control, 128).await;
    let start = Instant::now();
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    assert_eq!(start.elapsed(), Duration::ZERO, "one more does not wait");
    control.let_go();
    for other in others {
        assert!(other.await.unwrap().is_replay());
    }
}
