//! Attempts, leases and fences: what happens to an operation whose attempt was lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{convert::Infallible, time::Duration};

use axum::{body::Body, response::IntoResponse};
use http::{Request, Response, StatusCode};
use support::{
    app::{answering, call, gated, keyed, open, pay, spawn},
    faulty::{Fault, FaultyStore, Op},
};
use tokio::time::{advance, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_idempotency::{
    Attempt, Begin, Guarantee, IdempotencyKey, IdempotencyLayer, MemoryStore, Store, StoreErrorKind,
};

const MINUTE: Duration = Duration::from_secs(60);

/// A handler that panics in its first run.
fn panics_once(layer: IdempotencyLayer) -> (support::app::Control, axum::Router) {
    let control = open();
    let app = answering(&control, layer, |run, attempt, _| {
        assert!(run > 1, "the first run panics");
        format!("run {run} attempt {attempt}").into_response()
    });
    (control, app)
}

#[tokio::test]
async fn at_most_once_a_lost_attempt_is_never_run_again() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let (control, app) = panics_once(layer.clone());
    let first = spawn(&app, keyed("k", "a"));
    assert!(first.await.unwrap_err().is_panic(), "the panic goes on as it was");
    for _ in 0..3 {
        let answer = call(&app, keyed("k", "a")).await;
        assert_eq!(
            (answer.status, answer.problem()),
            (StatusCode::CONFLICT, "outcome-unknown".to_owned())
        );
        assert_eq!(answer.header("retry-after"), None, "trying again does not help");
    }
    assert_eq!(call(&app, keyed("k", "b")).await.problem(), "idempotency-key-reused");
    assert_eq!((control.runs(), layer.counters().abandoned), (1, 1));
}

#[tokio::test]
async fn at_least_once_the_next_request_runs_it_again_with_the_next_attempt() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).guarantee(Guarantee::AtLeastOnce);
    let (control, app) = panics_once(layer.clone());
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    assert_eq!(layer.counters().taken_over, 0);
    let reused = call(&app, keyed("k", "b")).await;
    assert_eq!(
        reused.problem(),
        "idempotency-key-reused",
        "another request takes nothing over"
    );
    assert_eq!(call(&app, keyed("k", "a")).await.body, "run 2 attempt 2");
    let replay = call(&app, keyed("k", "a")).await;
    assert_eq!((replay.is_replay(), &replay.body[..]), (true, &b"run 2 attempt 2"[..]));
    assert_eq!((control.runs(), layer.counters().taken_over), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn an_unknown_outcome_is_remembered_for_the_retention_and_then_forgotten() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).retention(10 * MINUTE);
    let (control, app) = panics_once(layer);
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    advance(10 * MINUTE - Duration::from_millis(1)).await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
    advance(Duration::from_millis(1)).await;
    assert_eq!(call(&app, keyed("k", "a")).await.body, "run 2 attempt 1");
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn an_error_of_the_inner_service_goes_on_as_it_was_and_the_outcome_is_unknown() {
    let service = service_fn(|_: Request<Body>| async { Err::<Response<Body>, _>("the inner service failed") });
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(service);
    let error = service.clone().oneshot(keyed("k", "a")).await.unwrap_err();
    assert_eq!(error, "the inner service failed");
    let answer = service.oneshot(keyed("k", "a")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::CONFLICT);
}

#[tokio::test]
async fn a_service_that_panics_before_it_has_a_future_leaves_no_stuck_key() {
    let service = service_fn(
        |_: Request<Body>| -> std::future::Ready<Result<Response<Body>, Infallible>> {
            panic!("the service panics when it is called")
        },
    );
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(service);
    assert!(
        tokio::spawn(service.clone().oneshot(keyed("k", "a")))
            .await
            .unwrap_err()
            .is_panic()
    );
    let answer = call(&service, keyed("k", "a")).await;
    assert_eq!(answer.problem(), "outcome-unknown");
}

#[tokio::test]
async fn a_setting_that_panics_after_the_claim_leaves_no_stuck_key() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).store_when(|_| panic!("the setting panics"));
    let app = pay(&open(), layer.clone());
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    layer.drain().finished().await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
}

#[tokio::test(start_paused = true)]
async fn the_lease_is_renewed_for_as_long_as_the_handler_runs() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone()).guarantee(Guarantee::AtLeastOnce);
    let control = gated();
    let app = pay(&control, layer.clone());
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    for _ in 0..60 {
        sleep(MINUTE).await;
        assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    }
    let renewals = store.calls(Op::Renew);
    // A timer counts whole milliseconds, so the last one may be still to come.
    assert!(
        (175..=180).contains(&renewals),
        "three times in each lease, not {renewals} times in sixty"
    );
    control.let_go();
    assert_eq!(first.await.unwrap().body, "run 1 attempt 1: a");
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_is_tried_again_before_the_lease_is_over() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone()).guarantee(Guarantee::AtLeastOnce);
    let control = gated();
    let app = pay(&control, layer);
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    // 20 s until the first renewal; then 3 s for each timeout and 5 s between them are less than the 40 s that are
    // left.
    store.fail(
        Op::Renew,
        [
            Fault::Error(StoreErrorKind::Unavailable),
            Fault::BlackHole,
            Fault::BlackHole,
        ],
    );
    for _ in 0..120 {
        sleep(Duration::from_secs(1)).await;
        assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    }
    control.let_go();
    first.await.unwrap();
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_lost_its_lease_answers_its_own_client_and_changes_nothing() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone()).guarantee(Guarantee::AtLeastOnce);
    let control = gated();
    let app = pay(&control, layer.clone());
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    // The store does not hear of it any more, and its lease runs out.
    store.fail(Op::Renew, [Fault::BlackHole; 20]);
    sleep(2 * MINUTE).await;
    let second = spawn(&app, keyed("k", "a"));
    control.entered().await;
    control.let_go();
    // Both wait at the gate; the first in the queue is the first attempt.
    assert_eq!(first.await.unwrap().body, "run 1 attempt 1: a");
    assert_eq!(layer.counters().fenced, 1);
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    control.let_go();
    assert_eq!(second.await.unwrap().body, "run 2 attempt 2: a");
    assert_eq!(call(&app, keyed("k", "a")).await.body, "run 2 attempt 2: a");
}

#[tokio::test(start_paused = true)]
async fn at_most_once_a_lease_that_ran_out_may_still_be_completed_by_its_owner() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone());
    let control = gated();
    let app = pay(&control, layer);
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    store.fail(Op::Renew, [Fault::BlackHole; 20]);
    sleep(2 * MINUTE).await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
    control.let_go();
    assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    assert!(
        call(&app, keyed("k", "a")).await.is_replay(),
        "nobody took it over, so its answer stands"
    );
    assert_eq!(control.runs(), 1);
}

#[tokio::test]
async fn a_handler_learns_its_key_and_its_attempt() {
    async fn handler(attempt: Attempt, key: IdempotencyKey) -> String {
        assert_eq!(attempt.key(), &key);
        assert_eq!(format!("{key:?}"), "IdempotencyKey(..)");
        assert_eq!(attempt.number(), attempt.fence());
        format!("{} {}", key.as_str(), attempt.number())
    }
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let app = axum::Router::new()
        .route("/pay", axum::routing::post(handler))
        .layer(layer);
    assert_eq!(call(&app, keyed("\"k\"", "a")).await.body, "k 1");
}

#[tokio::test]
async fn the_number_of_an_attempt_is_its_fence() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).guarantee(Guarantee::AtLeastOnce);
    let handler = async |attempt: Attempt| {
        assert!(attempt.number() > 2, "attempts one and two are lost");
        format!("{} {}", attempt.number(), attempt.fence())
    };
    let app = axum::Router::new()
        .route("/pay", axum::routing::post(handler))
        .layer(layer);
    for _ in 0..2 {
        assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    }
    assert_eq!(call(&app, keyed("k", "a")).await.body, "3 3");
}

#[tokio::test]
async fn an_extractor_without_a_key_says_what_is_missing_and_an_option_says_nothing() {
    async fn required(_: Attempt) {}
    async fn optional(attempt: Option<Attempt>, key: Option<IdempotencyKey>) -> String {
        format!("{} {}", attempt.is_some(), key.is_some())
    }
    let app = axum::Router::new()
        .route("/required", axum::routing::post(required))
        .route("/optional", axum::routing::post(optional));
    let post = |path| Request::post(path).body(Body::empty()).unwrap();
    assert_eq!(
        call(&app, post("/required")).await.status,
        StatusCode::INTERNAL_SERVER_ERROR
    );
    let said = call(&app, post("/required")).await.body;
    assert!(said.starts_with(b"no idempotency attempt: "), "{said:?}");
    assert_eq!(call(&app, post("/optional")).await.body, "false false");
    let protected = app.layer(IdempotencyLayer::new(MemoryStore::new()));
    let keyed = Request::post("/optional").header("idempotency-key", "k");
    assert_eq!(
        call(&protected, keyed.body(Body::empty()).unwrap()).await.body,
        "true true"
    );
}

#[tokio::test]
async fn the_settings_of_a_clone_change_that_clone_alone() {
    let store = MemoryStore::new();
    let layer = IdempotencyLayer::new(store.clone());
    let changed = layer.clone().require_key();
    let control = open();
    let without_key = || Request::post("/pay").body(Body::empty()).unwrap();
    assert_eq!(
        call(&pay(&control, layer.clone()), without_key()).await.status,
        StatusCode::CREATED
    );
    assert_eq!(
        call(&pay(&control, changed.clone()), without_key()).await.status,
        StatusCode::BAD_REQUEST
    );
    call(&pay(&control, layer), keyed("k", "a")).await;
    assert!(
        call(&pay(&control, changed), keyed("k", "a")).await.is_replay(),
        "the store is shared"
    );
}

#[tokio::test]
async fn readiness_is_the_inner_services_and_is_used_by_the_request_that_was_told() {
    let (service, mut handle) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
    let mut service = IdempotencyLayer::new(MemoryStore::new()).layer(service);
    handle.allow(0);
    let pending = futures_util::poll!(std::pin::pin!(std::future::poll_fn(|cx| {
        Service::<Request<Body>>::poll_ready(&mut service, cx)
    })));
    assert!(pending.is_pending(), "the layer is not ready before the service is");
    handle.allow(1);
    let ready: &mut _ = service.ready().await.unwrap();
    let answer = tokio::spawn(ready.call(keyed("k", "a")));
    let (request, respond) = handle.next_request().await.unwrap();
    assert!(request.extensions().get::<Attempt>().is_some());
    respond.send_response(Response::new(Body::from("mocked")));
    assert_eq!(answer.await.unwrap().unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn the_record_of_a_request_in_flight_is_there_before_its_handler_runs() {
    let store = MemoryStore::new();
    let control = gated();
    let app = pay(&control, IdempotencyLayer::new(store.clone()));
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    assert_eq!(store.len(), 1);
    control.let_go();
    first.await.unwrap();
}

/// The types of a store's answers are public, so that a store can be written and tested outside.
#[tokio::test]
async fn a_store_is_usable_by_itself() {
    use tower_idempotency::{Claim, Fingerprint, Owner, RecordId, Retention};
    let store = MemoryStore::new();
    let id = RecordId::from_bytes([7; 32]);
    let claim = Claim::new(
        Fingerprint::new(1, [0; 32]),
        Owner::random().unwrap(),
        MINUTE,
        Retention::Forever,
    );
    let Begin::Acquired(lease) = store.begin(&id, &claim).await.unwrap() else {
        panic!("it was vacant")
    };
    store.release(&lease).await.unwrap();
    assert_eq!(store.release(&lease).await.unwrap_err().kind(), StoreErrorKind::Fenced);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_lost_is_not_renewed_any_more() {
    let store = FaultyStore::default();
    let control = gated();
    let app = pay(&control, IdempotencyLayer::new(store.clone()));
    store.fail(Op::Renew, [Fault::Error(StoreErrorKind::Fenced)]);
    let client = spawn(&app, keyed("k", "a"));
    control.entered().await;
    sleep(10 * MINUTE).await;
    assert_eq!(store.calls(Op::Renew), 1);
    control.let_go();
    assert_eq!(client.await.unwrap().status, StatusCode::CREATED);
}

#[tokio::test(start_paused = true)]
async fn a_handler_goes_on_although_its_lease_was_lost() {
    let store = FaultyStore::default();
    store.fail(Op::Renew, [Fault::Error(StoreErrorKind::Fenced)]);
    let steps = service_fn(|_: Request<Body>| async {
        for _ in 0..10 {
            sleep(MINUTE).await;
        }
        Ok::<_, Infallible>(Response::new(Body::from("done")))
    });
    let service = IdempotencyLayer::new(store.clone()).layer(steps);
    let answer = call(&service, keyed("k", "a")).await;
    assert_eq!((&answer.body[..], store.calls(Op::Renew)), (&b"done"[..], 1));
}

#[tokio::test]
async fn a_panic_goes_on_to_the_caller_as_it_was() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let app = answering(&open(), layer, |_, _, _| std::panic::panic_any(42_u8));
    let panic = spawn(&app, keyed("k", "a")).await.unwrap_err().into_panic();
    assert_eq!(panic.downcast_ref::<u8>(), Some(&42));
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_a_minute_unless_it_is_set() {
    let store = FaultyStore::default();
    let control = gated();
    let app = pay(&control, IdempotencyLayer::new(store.clone()));
    store.fail(Op::Renew, [Fault::Error(StoreErrorKind::Fenced)]);
    let _client = spawn(&app, keyed("k", "a"));
    control.entered().await;
    advance(MINUTE - Duration::from_millis(1)).await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    advance(Duration::from_millis(1)).await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
}

#[tokio::test]
async fn the_service_that_was_polled_ready_is_the_one_that_is_called() {
    let inner = service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(Body::empty())));
    let mut service = tower::ServiceBuilder::new()
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .concurrency_limit(1)
        .service(inner);
    let call = service.ready().await.unwrap().call(keyed("k", "a"));
    // The only place below is the one that was reserved for this call, and the service stays.
    let mut call = std::pin::pin!(call);
    assert!(futures_util::poll!(&mut call).is_ready());
    assert!(futures_util::poll!(service.ready()).is_ready());
}
