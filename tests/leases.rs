//! An attempt whose lease ran out, or may have, before its handler could run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use axum::{Router, body::Body, routing::post};
use http::{Request, Response, StatusCode};
use serde_json::json;
use support::{
    app::{call, gated, keyed, open, pay, spawn},
    faulty::{Fault, FaultyStore, Op},
    http::Answer,
    serve::{Effects, channel, whole},
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};
use tower::{Layer, Service, ServiceExt};
use tower_idempotency::{Fingerprinter, Guarantee, IdempotencyLayer, KeySource, MemoryStore, StoreErrorKind};

const DOWN: Fault = Fault::Error(StoreErrorKind::Unavailable);
const LEASE: Duration = Duration::from_secs(4);

/// With a key of its own, and one of each unit.
fn order(id: &str, units: &[&str]) -> Request<Body> {
    let units: Vec<_> = units.iter().map(|unit| json!({ "id": unit })).collect();
    let body = json!({ "id": id, "units": units }).to_string();
    Request::post("/pay").body(Body::from(body)).unwrap()
}

fn of_units(store: &FaultyStore) -> IdempotencyLayer {
    IdempotencyLayer::new(store.clone())
        .key(KeySource::body("/id").and_each("/units/*/id"))
        .require_key()
}

#[tokio::test(start_paused = true)]
async fn an_attempt_whose_claims_took_longer_than_its_lease_runs_only_if_it_was_not_taken_over() {
    let store = FaultyStore::default();
    let layer = of_units(&store)
        .guarantee(Guarantee::AtLeastOnce)
        .fingerprint(Fingerprinter::none())
        .lease(Duration::from_secs(2));
    let control = open();
    let app = pay(&control, layer.clone());
    store.fail(Op::Renew, [DOWN; 30]);
    store.fail(Op::Begin, [Fault::Pass, Fault::BlackHole]);
    let first = spawn(&app, order("a", &["u0"]));
    sleep(Duration::from_millis(2300)).await;
    let second = call(&app, order("a", &[])).await;
    assert_eq!(second.status, StatusCode::CREATED);
    let first = first.await.unwrap();
    layer.drain().finished().await;
    assert_eq!(control.runs(), 1, "{first:?}");
    let retry = call(&app, order("a", &[])).await;
    assert_eq!((retry.is_replay(), retry.body), (true, second.body));
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_renewed_a_third_of_it_after_its_claim_was_asked_for_however_late_that_was_answered() {
    let (lease, third) = (Duration::from_secs(30), Duration::from_secs(10));
    for answered_after in [1, 9, 11, 29].map(Duration::from_secs) {
        let store = FaultyStore::default();
        let layer = IdempotencyLayer::new(store.clone())
            .lease(lease)
            .store_timeout(2 * lease);
        let control = gated();
        let app = pay(&control, layer);
        store.fail(Op::Begin, [Fault::SlowAnswer(answered_after)]);
        let asked = Instant::now();
        let _first = spawn(&app, keyed("k", "a"));
        control.entered().await;
        while store.calls(Op::Renew) == 0 {
            sleep(Duration::from_millis(100)).await;
        }
        let due = third.max(answered_after);
        assert!(
            (due..due + Duration::from_millis(300)).contains(&asked.elapsed()),
            "renewed after {:?}, answered after {answered_after:?}",
            asked.elapsed()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_answers_late_whatever_it_is_asked_keeps_a_running_attempt_from_being_taken_over() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone())
        .guarantee(Guarantee::AtLeastOnce)
        .lease(Duration::from_secs(4));
    let control = gated();
    let app = pay(&control, layer);
    let late = Fault::SlowAnswer(Duration::from_millis(2900));
    store.fail(Op::Begin, [late]);
    store.fail(Op::Renew, [late; 20]);
    let first = spawn(&app, keyed("k", "a"));
    while control.runs() == 0 {
        assert!(!first.is_finished(), "{:?}", first.await);
        sleep(Duration::from_millis(100)).await;
    }
    for _ in 0..200 {
        let duplicate = spawn(&app, keyed("k", "a"));
        sleep(Duration::from_millis(100)).await;
        assert_eq!(control.runs(), 1, "both run");
        assert_eq!(duplicate.await.unwrap().problem(), "request-in-progress");
    }
    control.let_go();
    assert_eq!(first.await.unwrap().body, "run 1 attempt 1: a");
}

/// Under a lease of 4 seconds, which a second attempt takes over after this many seconds.
async fn is_taken_over(store: &FaultyStore, after: u64) -> Answer {
    let lease = Duration::from_secs(4);
    let layer = IdempotencyLayer::new(store.clone())
        .guarantee(Guarantee::AtLeastOnce)
        .lease(lease)
        .store_timeout(3 * lease);
    let control = gated();
    let app = pay(&control, layer);
    let first = spawn(&app, keyed("k", "a"));
    sleep(Duration::from_secs(after)).await;
    let second = spawn(&app, keyed("k", "a"));
    control.entered().await;
    sleep(2 * lease).await;
    assert!(first.is_finished(), "both run");
    assert_eq!(control.runs(), 1);
    control.let_go();
    assert_eq!(second.await.unwrap().body, "run 1 attempt 2: a");
    first.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_attempt_whose_lease_was_over_and_another_ones_when_it_heard_of_it_does_not_run() {
    let store = FaultyStore::default();
    store.fail(Op::Begin, [Fault::SlowAnswer(Duration::from_secs(8))]);
    assert_eq!(is_taken_over(&store, 6).await.problem(), "request-in-progress");
    // In time for the lease, but not to be certain of it; then it is asked, and hears of that when the lease is over.
    let store = FaultyStore::default();
    store.fail(Op::Begin, [Fault::SlowAnswer(Duration::from_secs(3))]);
    store.fail(Op::Renew, [Fault::SlowAnswer(Duration::from_secs(8)); 3]);
    assert_eq!(is_taken_over(&store, 9).await.problem(), "request-in-progress");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_hears_of_its_lease_when_others_were_told_that_its_outcome_is_unknown_does_not_run() {
    let store = FaultyStore::default();
    let lease = Duration::from_secs(4);
    let layer = IdempotencyLayer::new(store.clone())
        .lease(lease)
        .store_timeout(3 * lease);
    let control = open();
    let app = pay(&control, layer);
    store.fail(Op::Begin, [Fault::SlowAnswer(2 * lease)]);
    let first = spawn(&app, keyed("k", "a"));
    sleep(lease + lease / 2).await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
    assert_eq!(first.await.unwrap().problem(), "outcome-unknown");
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
    assert_eq!(control.runs(), 0);
}

/// For what the store does before the handler could run, to an order with one unit. A duplicate has been told that the
/// outcome is unknown by then.
async fn is_never_run(store: FaultyStore) {
    let layer = of_units(&store)
        .fingerprint(Fingerprinter::none())
        .lease(Duration::from_secs(2));
    let control = open();
    let app = pay(&control, layer.clone());
    let first = spawn(&app, order("a", &["u0"]));
    sleep(Duration::from_millis(2300)).await;
    assert_eq!(call(&app, order("a", &[])).await.problem(), "outcome-unknown");
    let first = first.await.unwrap();
    assert!(
        first.status.is_client_error() || first.status.is_server_error(),
        "{first:?}"
    );
    layer.drain().finished().await;
    assert_eq!(call(&app, order("a", &[])).await.problem(), "outcome-unknown");
    assert_eq!(control.runs(), 0, "{first:?}");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_others_may_take_for_lost_does_not_start_and_does_not_free_its_key() {
    let silent_for_a_unit = [Fault::Pass, Fault::BlackHole];
    // Its lease is renewed at last, when it was over for half a second.
    let store = FaultyStore::default();
    store.fail(Op::Begin, silent_for_a_unit);
    store.fail(Op::Renew, [DOWN; 12]);
    is_never_run(store).await;
    // It is not renewed any more.
    let store = FaultyStore::default();
    store.fail(Op::Begin, silent_for_a_unit);
    store.fail(Op::Renew, [DOWN; 40]);
    is_never_run(store).await;
    // The unit is not to be had.
    let store = FaultyStore::default();
    store.fail(Op::Begin, [Fault::Pass, Fault::BlackHole, Fault::Pass, DOWN]);
    store.fail(Op::Renew, [DOWN; 12]);
    is_never_run(store).await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_was_never_granted_is_not_freed_once_its_outcome_may_have_been_called_unknown() {
    for (lease, early, late) in [
        (Duration::from_millis(1500), "outcome-unknown", StatusCode::CONFLICT),
        (Duration::from_secs(60), "request-in-progress", StatusCode::CREATED),
    ] {
        let store = FaultyStore::default();
        let layer = IdempotencyLayer::new(store.clone()).lease(lease);
        let control = open();
        let app = pay(&control, layer.clone());
        // Both of its claims are applied. It is to be ended by tries of which four take 750 to 1500 ms together, and five
        // more than 1500.
        store.fail(Op::Begin, [Fault::AnswerLost; 2]);
        store.fail(Op::Release, [DOWN; 4]);
        assert_eq!(call(&app, keyed("k", "a")).await.problem(), "store-unavailable");
        sleep(Duration::from_millis(1510)).await;
        assert_eq!(call(&app, keyed("k", "a")).await.problem(), early);
        layer.drain().finished().await;
        assert_eq!(call(&app, keyed("k", "a")).await.status, late);
    }
}

// ---- a service that takes its time

/// A service that is busy from when the test says so until it says otherwise.
#[derive(Clone, Default)]
struct Busy {
    is_busy: Arc<Mutex<(bool, Vec<Waker>)>>,
    effects: Effects,
}

impl Busy {
    fn set(&self, is_busy: bool) {
        let mut state = self.is_busy.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = is_busy;
        state.1.drain(..).for_each(Waker::wake);
    }
}

impl Service<Request<Body>> for Busy {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        let mut state = self.is_busy.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0 {
            state.1.push(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        ready(Ok(Response::new(Body::from(format!("run {}", self.effects.happen())))))
    }
}

/// A claim of the key `k` is granted while the service below is busy.
async fn waits_for_its_turn(layer: &IdempotencyLayer, store: &FaultyStore, below: &Busy) -> JoinHandle<Answer> {
    // Its body comes when the layer has given its place back.
    let (sender, body) = channel();
    let service = layer.clone().layer(below.clone());
    let first = tokio::spawn(async move {
        let request = keyed("k", "").map(|_| body);
        whole(service.oneshot(request).await.unwrap()).await.unwrap()
    });
    sleep(Duration::from_millis(10)).await;
    below.set(true);
    sender.send("a").unwrap();
    drop(sender);
    while store.calls(Op::Begin) == 0 {
        assert!(!first.is_finished());
        sleep(Duration::from_millis(10)).await;
    }
    first
}

/// The other node, whose service is free.
async fn elsewhere(layer: &IdempotencyLayer, free: &Busy) -> Answer {
    let answer = layer.clone().layer(free.clone()).oneshot(keyed("k", "a"));
    whole(answer.await.unwrap()).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_attempt_whose_service_was_busy_until_its_lease_was_over_does_not_start() {
    for regained in [false, true] {
        let (store, busy, free) = (FaultyStore::default(), Busy::default(), Busy::default());
        let layer = IdempotencyLayer::new(store.clone()).lease(LEASE);
        store.fail(Op::Renew, [DOWN; 200].into_iter().take(if regained { 12 } else { 200 }));
        let first = waits_for_its_turn(&layer, &store, &busy).await;
        sleep(LEASE + LEASE / 20).await;
        assert_eq!(elsewhere(&layer, &free).await.problem(), "outcome-unknown");
        sleep(2 * LEASE).await;
        busy.set(false);
        assert_eq!(first.await.unwrap().problem(), "outcome-unknown");
        layer.drain().finished().await;
        assert_eq!(elsewhere(&layer, &free).await.problem(), "outcome-unknown");
        assert_eq!(
            (busy.effects.count(), free.effects.count()),
            (0, 0),
            "regained: {regained}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_was_taken_over_while_its_service_was_busy_does_not_start() {
    let (store, busy, free) = (FaultyStore::default(), Busy::default(), Busy::default());
    let layer = IdempotencyLayer::new(store.clone())
        .lease(LEASE)
        .guarantee(Guarantee::AtLeastOnce);
    store.fail(Op::Renew, [DOWN; 12]);
    let first = waits_for_its_turn(&layer, &store, &busy).await;
    sleep(LEASE + LEASE / 20).await;
    let second = elsewhere(&layer, &free).await;
    sleep(LEASE).await;
    busy.set(false);
    assert_eq!(first.await.unwrap().problem(), "request-in-progress");
    layer.drain().finished().await;
    assert_eq!((busy.effects.count(), free.effects.count()), (0, 1));
    assert_eq!(elsewhere(&layer, &free).await.body, second.body);
    // Nobody took it over, but nobody can say so.
    let (store, busy, free) = (FaultyStore::default(), Busy::default(), Busy::default());
    let layer = IdempotencyLayer::new(store.clone())
        .lease(LEASE)
        .guarantee(Guarantee::AtLeastOnce);
    store.fail(Op::Renew, [DOWN; 200]);
    let first = waits_for_its_turn(&layer, &store, &busy).await;
    sleep(2 * LEASE).await;
    busy.set(false);
    assert_eq!(first.await.unwrap().problem(), "store-unavailable");
    assert_eq!(elsewhere(&layer, &free).await.body, "run 1");
    assert_eq!(busy.effects.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_whose_service_was_busy_for_long_runs_under_a_lease_that_was_renewed() {
    let (store, busy) = (FaultyStore::default(), Busy::default());
    let layer = IdempotencyLayer::new(store.clone()).lease(LEASE);
    let first = waits_for_its_turn(&layer, &store, &busy).await;
    sleep(10 * LEASE).await;
    busy.set(false);
    assert_eq!(first.await.unwrap().body, "run 1");
}

/// Without a wait, as code does that computes or blocks.
fn keep_the_thread_for(time: Duration) {
    let mut passing = pin!(tokio::time::advance(time));
    let _ = passing.as_mut().poll(&mut Context::from_waker(Waker::noop()));
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_keeps_its_thread_at_first_is_not_taken_for_lost_while_it_waits() {
    for guarantee in [Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
        let handler = async || {
            keep_the_thread_for(LEASE / 4 * 3);
            sleep(LEASE).await;
            StatusCode::CREATED
        };
        let layer = IdempotencyLayer::new(MemoryStore::new())
            .lease(LEASE)
            .guarantee(guarantee);
        let app = Router::new().route("/pay", post(handler)).layer(layer.clone());
        let first = spawn(&app, keyed("k", "a"));
        while layer.counters().executed == 0 {
            tokio::task::yield_now().await;
        }
        for _ in 0..7 {
            sleep(LEASE / 8).await;
            let other = call(&app, keyed("k", "a")).await;
            assert_eq!(other.problem(), "request-in-progress", "{guarantee:?}");
        }
        assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    }
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_kept_its_thread_until_its_lease_was_over_does_not_free_its_key() {
    let handler = async || {
        keep_the_thread_for(LEASE);
        StatusCode::SERVICE_UNAVAILABLE
    };
    let layer = IdempotencyLayer::new(MemoryStore::new()).lease(LEASE);
    let app = Router::new().route("/pay", post(handler)).layer(layer.clone());
    assert_eq!(
        call(&app, keyed("k", "a")).await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
    let retry = call(&app, keyed("k", "a")).await;
    assert_eq!(retry.problem(), "outcome-unknown");
    assert_eq!(layer.counters().executed, 1);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_whose_other_keys_took_longer_than_its_lease_to_free_does_not_free_its_own() {
    let store = FaultyStore::default();
    let layer = of_units(&store).fingerprint(Fingerprinter::none()).lease(LEASE);
    let handler = async || StatusCode::SERVICE_UNAVAILABLE;
    let app = Router::new().route("/pay", post(handler)).layer(layer.clone());
    store.fail(Op::Renew, [DOWN; 40]);
    store.fail(Op::Release, [Fault::SlowAnswer(Duration::from_millis(2900)); 2]);
    let first = spawn(&app, order("a", &["u0", "u1"]));
    sleep(Duration::from_millis(4500)).await;
    assert_eq!(call(&app, order("a", &[])).await.problem(), "outcome-unknown");
    assert_eq!(first.await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(call(&app, order("a", &[])).await.problem(), "outcome-unknown");
    assert_eq!(layer.counters().executed, 1);
    // The others are nobody's any more.
    assert_eq!(
        call(&app, order("b", &["u0", "u1"])).await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
}
