//! Sentences of the contract that no other file tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, body::Body, response::IntoResponse};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use sha2::{Digest, Sha256};
use support::{
    app::{Control, answering, call, gated, keyed, open, pay, spawn, to_pay},
    faulty::{Fault, FaultyStore, Op},
};
use tower_idempotency::{
    Begin, Claim, Concurrent, Fingerprint, Guarantee, IdempotencyLayer, KeySource, Lease, MemoryStore, Owner, RecordId,
    Retention, Store, StoreError, StoreErrorKind, StoredResponse,
};

/// The endings of attempts go on to the store in this field, for stores of a test's making that change only how attempts
/// begin.
macro_rules! pass_on_endings {
    ($field:tt) => {
        async fn complete(&self, lease: &Lease, answer: &StoredResponse, keep: Retention) -> Result<(), StoreError> {
            self.$field.complete(lease, answer, keep).await
        }
        async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
            self.$field.renew(lease, length).await
        }
        async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
            self.$field.release(lease).await
        }
        async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
            self.$field.abandon(lease).await
        }
    };
}

/// As [`pass_on_endings`], and hints of changes.
macro_rules! pass_on_hints {
    ($field:tt) => {
        async fn changed(&self, id: &RecordId) {
            self.$field.changed(id).await;
        }
    };
}

const HOUR: Duration = Duration::from_secs(3600);

// ---- nested routers

fn to(path: &str) -> Request<Body> {
    Request::post(path)
        .header("idempotency-key", "k")
        .body(Body::from("a"))
        .unwrap()
}

/// A router to be nested, protected by itself: `POST /pay` answers with the number of the run.
fn inner(control: &Control) -> Router {
    pay(control, IdempotencyLayer::new(MemoryStore::new()))
}

#[tokio::test]
async fn two_resources_of_a_nested_router_are_two_requests() {
    let control = open();
    let app = Router::new().nest("/accounts/{id}", inner(&control));
    assert_eq!(call(&app, to("/accounts/1/pay")).await.status, StatusCode::CREATED);
    let other = call(&app, to("/accounts/2/pay")).await;
    assert!(!other.is_replay(), "account 2 got the answer of account 1: {other:?}");
    assert_eq!(other.problem(), "idempotency-key-reused");
}

#[tokio::test]
async fn two_nested_services_are_two_operations() {
    let control = open();
    let protected = inner(&control);
    let app = Router::new()
        .nest_service("/checkout", protected.clone())
        .nest_service("/refunds", protected);
    assert_eq!(call(&app, to("/checkout/pay")).await.status, StatusCode::CREATED);
    let refund = call(&app, to("/refunds/pay")).await;
    assert!(
        !refund.is_replay(),
        "the refund got the answer of the checkout: {refund:?}"
    );
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn two_services_without_matched_routes_are_two_operations() {
    let control = open();
    let (run, layer) = (control.clone(), IdempotencyLayer::new(MemoryStore::new()));
    let service = tower::service_fn(move |_: Request<Body>| {
        let run = run.clone();
        async move { Ok::<_, std::convert::Infallible>(run.pass().await.to_string().into_response()) }
    });
    let service = tower::Layer::layer(&layer, service);
    let app = Router::new()
        .nest_service("/checkout", service.clone())
        .nest_service("/refunds", service);
    assert_eq!(call(&app, to("/checkout/pay")).await.status, StatusCode::OK);
    let refund = call(&app, to("/refunds/pay")).await;
    assert!(
        !refund.is_replay(),
        "the refund got the answer of the checkout: {refund:?}"
    );
    assert_eq!(control.runs(), 2);
}

// ---- claims whose answers were lost

#[tokio::test(start_paused = true)]
async fn a_claim_that_was_applied_does_not_stay_behind_whatever_its_repetition_was_told() {
    for kind in [StoreErrorKind::Full, StoreErrorKind::Other, StoreErrorKind::Corrupt] {
        let store = FaultyStore::default();
        let layer = IdempotencyLayer::new(store.clone());
        let control = open();
        let app = pay(&control, layer.clone());
        store.fail(Op::Begin, [Fault::AnswerLost, Fault::Error(kind)]);
        assert!(call(&app, keyed("k", "a")).await.status.is_server_error());
        layer.drain().finished().await;
        let retry = call(&app, keyed("k", "a")).await;
        assert_eq!(retry.status, StatusCode::CREATED, "{kind:?}: {retry:?}");
        assert_eq!(control.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_never_had_a_lease_did_not_lose_one() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone());
    let app = pay(&open(), layer.clone());
    store.fail(Op::Begin, [Fault::Error(StoreErrorKind::Unavailable); 2]);
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "store-unavailable");
    layer.drain().finished().await;
    assert_eq!(layer.counters().executed, 0);
    assert_eq!(
        layer.counters().fenced,
        0,
        "nothing ran, so nothing lost its lease while it ran"
    );
}

#[tokio::test(start_paused = true)]
async fn a_completion_whose_answer_was_lost_is_not_counted_as_a_lost_lease() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone());
    let app = pay(&open(), layer.clone());
    store.fail(Op::Complete, [Fault::AnswerLost]);
    call(&app, keyed("k", "a")).await;
    layer.drain().finished().await;
    assert!(call(&app, keyed("k", "a")).await.is_replay());
    assert_eq!(layer.counters().fenced, 0, "no other attempt took the lease");
}

#[tokio::test(start_paused = true)]
async fn an_outcome_is_told_later_however_long_the_lease_is() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone()).lease(Duration::MAX);
    let control = open();
    let app = pay(&control, layer.clone());
    store.fail(Op::Complete, [Fault::Error(StoreErrorKind::Unavailable)]);
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
    layer.drain().finished().await;
    let retry = call(&app, keyed("k", "a")).await;
    assert!(retry.is_replay(), "{retry:?}");
}

// ---- waiting

/// A store whose hints come all the time, as the contract allows.
#[derive(Clone, Default)]
struct Restless {
    memory: MemoryStore,
    looks: Arc<AtomicUsize>,
}

impl Store for Restless {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let looks = self.looks.fetch_add(1, SeqCst);
        assert!(looks < 10_000, "a waiter spins");
        self.memory.begin(id, claim).await
    }
    pass_on_endings!(memory);
    async fn changed(&self, _: &RecordId) {}
}

#[tokio::test(start_paused = true)]
async fn a_waiter_lets_others_run_although_its_hints_mean_nothing() {
    let store = Restless::default();
    let layer = IdempotencyLayer::new(store.clone()).on_concurrent(Concurrent::Wait(Duration::from_secs(5)));
    let control = gated();
    let app = pay(&control, layer.clone());
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let second = spawn(&app, keyed("k", "a"));
    while layer.counters().waited == 0 {
        tokio::task::yield_now().await;
    }
    control.let_go();
    assert!(!first.await.unwrap().is_replay());
    assert!(second.await.unwrap().is_replay());
    assert_eq!(control.runs(), 1);
}

// ---- takeovers

/// Lets a rival take the record over just before the first takeover that passes through it.
#[derive(Clone, Default)]
struct Overtaken {
    memory: MemoryStore,
    rival: Arc<Mutex<Option<Lease>>>,
}

fn claim(fingerprint: Fingerprint) -> Claim {
    Claim::new(
        fingerprint,
        Owner::random().unwrap(),
        Duration::from_secs(60),
        Retention::For(HOUR),
    )
}

async fn acquire(store: &MemoryStore, id: &RecordId, claim: &Claim) -> Lease {
    match store.begin(id, claim).await.unwrap() {
        Begin::Acquired(lease) => lease,
        other => panic!("{other:?}"),
    }
}

impl Store for Overtaken {
    async fn begin(&self, id: &RecordId, mine: &Claim) -> Result<Begin, StoreError> {
        let absent = self.rival.lock().unwrap().is_none();
        if let (Some(fence), true) = (mine.takeover, absent) {
            let lease = acquire(&self.memory, id, &claim(mine.fingerprint).taking_over(fence)).await;
            *self.rival.lock().unwrap() = Some(lease);
        }
        self.memory.begin(id, mine).await
    }
    pass_on_endings!(memory);
    pass_on_hints!(memory);
}

/// The first run panics, and every other answers as it is told.
fn panics_then(
    layer: IdempotencyLayer,
    then: impl Fn(usize, u64) -> Response<Body> + Clone + Send + Sync + 'static,
) -> (Control, Router) {
    let control = open();
    let app = answering(&control, layer, move |run, attempt, _: Bytes| {
        assert!(run > 1, "the first run panics");
        then(run, attempt)
    });
    (control, app)
}

#[tokio::test(start_paused = true)]
async fn a_takeover_never_runs_under_a_key_that_belongs_to_another_request_by_now() {
    let store = Overtaken::default();
    let layer = IdempotencyLayer::new(store.clone())
        .guarantee(Guarantee::AtLeastOnce)
        .on_concurrent(Concurrent::Wait(Duration::from_secs(5)));
    let (control, app) = panics_then(layer.clone(), |_, _| StatusCode::CREATED.into_response());
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    let waiter = spawn(&app, keyed("k", "a"));
    while layer.counters().waited == 0 {
        tokio::task::yield_now().await;
    }
    let rival = store.rival.lock().unwrap().expect("it took the record over");
    store.release(&rival).await.unwrap();
    // The key is free, another request takes it, and its outcome is unknown.
    let other = Fingerprint::new(1, [7; 32]);
    let lease = acquire(&store.memory, &rival.id, &claim(other)).await;
    store.abandon(&lease).await.unwrap();
    let answer = waiter.await.unwrap();
    assert_eq!(control.runs(), 1, "{answer:?}");
    assert_eq!(answer.problem(), "idempotency-key-reused");
}

#[tokio::test]
async fn the_fence_rises_with_every_attempt_even_if_one_says_that_it_did_not_execute() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).guarantee(Guarantee::AtLeastOnce);
    let (_, app) = panics_then(layer, |run, attempt| match run {
        2 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => attempt.to_string().into_response(),
    });
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    assert_eq!(
        call(&app, keyed("k", "a")).await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
    assert_eq!(call(&app, keyed("k", "a")).await.body, "3");
}

#[tokio::test]
async fn a_lost_attempt_keeps_its_key_from_other_requests_even_if_the_next_did_not_execute() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).guarantee(Guarantee::AtLeastOnce);
    let (control, app) = panics_then(layer, |run, _| match run {
        2 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => StatusCode::CREATED.into_response(),
    });
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    call(&app, keyed("k", "a")).await;
    let other = call(&app, keyed("k", "another")).await;
    assert_eq!(control.runs(), 2, "{other:?}");
    assert_eq!(other.problem(), "idempotency-key-reused");
}

// ---- the memory store

/// As real ids are: hashes.
fn id(number: u64) -> RecordId {
    RecordId::from_bytes(Sha256::digest(number.to_le_bytes()).into())
}

#[tokio::test(start_paused = true)]
async fn an_answer_has_room_as_soon_as_another_one_expired_wherever_it_was() {
    let control = open();
    let store = MemoryStore::builder().max_bytes(40_000).build();
    let layer = IdempotencyLayer::new(store.clone()).retention(HOUR);
    let app = answering(&control, layer, |_, _, _| vec![b'x'; 10_000].into_response());
    for key in ["1", "2", "3"] {
        call(&app, keyed(key, "a")).await;
        assert!(call(&app, keyed(key, "a")).await.is_replay());
    }
    // The three answers expired; nobody came by to remove them.
    tokio::time::advance(2 * HOUR).await;
    call(&app, keyed("4", "a")).await;
    let again = call(&app, keyed("4", "a")).await;
    assert!(again.is_replay(), "{again:?}");
}

#[tokio::test(start_paused = true)]
async fn what_expired_is_removed_however_many_durations_there_are() {
    let store = MemoryStore::builder().max_records(1001).build();
    let unknown = Fingerprint::new(1, [0; 32]);
    for seconds in 1..=40 {
        let claim = Claim::new(
            unknown,
            Owner::random().unwrap(),
            Duration::from_secs(seconds),
            Retention::For(HOUR),
        );
        let lease = acquire(&store, &id(0), &claim).await;
        store.release(&lease).await.unwrap();
    }
    let answer = StoredResponse::not_kept(StatusCode::OK);
    for number in 0..=1000 {
        let lease = acquire(&store, &id(number), &claim(unknown)).await;
        // The first is kept for much longer than any of the forty times.
        let kept = if number == 0 {
            1000 * HOUR
        } else {
            Duration::from_secs(1)
        };
        store.complete(&lease, &answer, Retention::For(kept)).await.unwrap();
    }
    tokio::time::advance(HOUR).await;
    // Beside the one that is kept there is room for a thousand, if all the others can be removed.
    for number in 5001..=6000 {
        acquire(&store, &id(number), &claim(unknown)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_kept_for_a_year_delays_the_removal_of_no_other() {
    // Enough for each of the retentions to be in every part of the store.
    const EACH: u64 = 1000;
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let store = MemoryStore::builder().max_records(34 * EACH).build();
    let days = (0..32).map(|minutes| DAY - Duration::from_secs(60 * minutes));
    // The year is longer than all that there is by then, and the last day comes behind it.
    let retentions = days.chain([365 * DAY, DAY]);
    let answer = StoredResponse::not_kept(StatusCode::OK);
    for (number, kept) in (0..).zip(retentions.flat_map(|kept| std::iter::repeat_n(kept, EACH as usize))) {
        let lease = acquire(&store, &id(number), &claim(Fingerprint::new(1, [0; 32]))).await;
        store.complete(&lease, &answer, Retention::For(kept)).await.unwrap();
    }
    tokio::time::advance(DAY).await;
    // Beside those that are kept for a year there is room for all others anew.
    for number in (34 * EACH..).take(33 * EACH as usize) {
        acquire(&store, &id(number), &claim(Fingerprint::new(1, [0; 32]))).await;
    }
}

// ---- answers

#[tokio::test]
async fn a_body_that_is_longer_than_it_said_is_not_kept_beyond_the_limit() {
    use http_body_util::BodyExt;
    struct Lies(http_body_util::Full<Bytes>);
    impl http_body::Body for Lies {
        type Data = Bytes;
        type Error = std::convert::Infallible;
        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
            std::pin::Pin::new(&mut self.0).poll_frame(cx)
        }
        fn size_hint(&self) -> http_body::SizeHint {
            http_body::SizeHint::with_exact(4)
        }
    }
    let control = open();
    let store = MemoryStore::new();
    let app = answering(
        &control,
        IdempotencyLayer::new(store.clone()).max_response_body(1000),
        |_, _, _| Response::new(Body::new(Lies(http_body_util::Full::from(vec![b'x'; 100_000])).boxed())),
    );
    call(&app, keyed("k", "a")).await;
    assert!(store.bytes() < 10_000, "{} bytes are kept", store.bytes());
}

#[tokio::test]
async fn a_value_that_was_marked_as_sensitive_is_replayed_as_sensitive() {
    let control = open();
    let app = answering(&control, IdempotencyLayer::new(MemoryStore::new()), |_, _, _| {
        let mut value = HeaderValue::from_static("secret");
        value.set_sensitive(true);
        ([("x-card-token", value)], "ok").into_response()
    });
    assert!(call(&app, keyed("k", "a")).await.headers["x-card-token"].is_sensitive());
    assert!(call(&app, keyed("k", "a")).await.headers["x-card-token"].is_sensitive());
}

#[tokio::test]
async fn an_answer_that_is_shorter_than_it_said_broke_off() {
    let control = open();
    let app = answering(&control, IdempotencyLayer::new(MemoryStore::new()), |_, _, _| {
        let frames = futures_util::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"half"))]);
        Response::builder()
            .header("content-length", "8")
            .body(Body::from_stream(frames))
            .unwrap()
    });
    call(&app, keyed("k", "a")).await;
    let retry = call(&app, keyed("k", "a")).await;
    assert!(!retry.is_replay(), "a half answer is replayed for ever: {retry:?}");
    assert_eq!(retry.problem(), "outcome-unknown");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_panics_at_a_renewal_does_not_cut_the_handler() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone());
    let control = gated();
    let app = pay(&control, layer.clone());
    store.fail(Op::Renew, [Fault::Panic]);
    let client = spawn(&app, keyed("k", "a"));
    control.entered().await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    control.let_go();
    let answer = client.await;
    assert_eq!(control.ends(), 1, "the handler was cut");
    assert_eq!(answer.unwrap().status, StatusCode::CREATED);
}

#[tokio::test]
async fn a_refusal_has_the_content_type_of_the_grpc_dialect_that_was_spoken() {
    let app = pay(&open(), IdempotencyLayer::new(MemoryStore::new()).require_key());
    let request = Request::post("/pay")
        .header("content-type", "application/grpc-web+proto")
        .body(Body::empty())
        .unwrap();
    let answer = call(&app, request).await;
    assert_eq!(answer.header("grpc-status"), Some("3"));
    assert_eq!(answer.header("content-type"), Some("application/grpc-web+proto"));
}

/// Between the look and the takeover another attempt says that it did not execute, and another request takes the key.
#[derive(Clone, Default)]
struct Recreated(MemoryStore);

impl Store for Recreated {
    async fn begin(&self, id: &RecordId, mine: &Claim) -> Result<Begin, StoreError> {
        let Self(memory) = self;
        if let Some(lost) = mine.takeover {
            let rival = acquire(memory, id, &claim(mine.fingerprint).taking_over(lost)).await;
            memory.release(&rival).await?;
            let other = acquire(memory, id, &claim(Fingerprint::new(1, [7; 32]))).await;
            memory.abandon(&other).await?;
        }
        memory.begin(id, mine).await
    }
    pass_on_endings!(0);
    pass_on_hints!(0);
}

#[tokio::test]
async fn a_takeover_takes_the_attempt_that_was_seen_and_no_other_of_the_same_fence() {
    let layer = IdempotencyLayer::new(Recreated::default()).guarantee(Guarantee::AtLeastOnce);
    let control = open();
    let app = answering(&control, layer, |run, _, _| {
        assert!(run > 1, "the first run panics");
        StatusCode::CREATED.into_response()
    });
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    let answer = call(&app, keyed("k", "a")).await;
    assert_eq!(control.runs(), 1, "it ran under another request's key: {answer:?}");
    assert_eq!(answer.problem(), "idempotency-key-reused");
}

// ---- stores that go their own way

/// Finds a lost attempt whatever it is asked for.
#[derive(Clone, Default)]
struct Stubborn(Arc<AtomicUsize>);

impl Store for Stubborn {
    async fn begin(&self, id: &RecordId, mine: &Claim) -> Result<Begin, StoreError> {
        assert!(self.0.fetch_add(1, SeqCst) < 10, "it is asked for ever");
        Ok(Begin::Abandoned {
            fingerprint: mine.fingerprint,
            lost: Lease::new(*id, Owner::from_bytes([1; 16]), 1),
        })
    }
    async fn complete(&self, _: &Lease, _: &StoredResponse, _: Retention) -> Result<(), StoreError> {
        Ok(())
    }
    async fn renew(&self, _: &Lease, _: Duration) -> Result<(), StoreError> {
        Ok(())
    }
    async fn release(&self, _: &Lease) -> Result<(), StoreError> {
        Ok(())
    }
    async fn abandon(&self, _: &Lease) -> Result<(), StoreError> {
        Ok(())
    }
    async fn changed(&self, _: &RecordId) {}
}

#[tokio::test]
async fn a_store_that_takes_nothing_over_is_not_asked_for_ever() {
    let control = open();
    let layer = IdempotencyLayer::new(Stubborn::default()).guarantee(Guarantee::AtLeastOnce);
    let answer = call(&pay(&control, layer), keyed("k", "a")).await;
    assert_eq!((&*answer.problem(), control.runs()), ("store-unavailable", 0));
}

/// As above, for every record that is claimed beside the first.
#[derive(Clone, Default)]
struct StubbornBeside {
    memory: MemoryStore,
    beside: Stubborn,
    begun: Arc<AtomicUsize>,
}

impl Store for StubbornBeside {
    async fn begin(&self, id: &RecordId, mine: &Claim) -> Result<Begin, StoreError> {
        match self.begun.fetch_add(1, SeqCst) {
            0 => self.memory.begin(id, mine).await,
            _ => self.beside.begin(id, mine).await,
        }
    }
    async fn complete(&self, lease: &Lease, response: &StoredResponse, keep: Retention) -> Result<(), StoreError> {
        self.memory.complete(lease, response, keep).await
    }
    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.memory.renew(lease, length).await
    }
    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.memory.release(lease).await
    }
    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.memory.abandon(lease).await
    }
    async fn changed(&self, _: &RecordId) {}
}

#[tokio::test]
async fn a_store_that_takes_no_key_beside_over_is_not_asked_for_ever() {
    let control = open();
    let layer = IdempotencyLayer::new(StubbornBeside::default())
        .key(KeySource::body("/id").and_each("/units/*"))
        .guarantee(Guarantee::AtLeastOnce);
    let answer = call(&pay(&control, layer), to_pay(&[], r#"{"id":"a","units":["u"]}"#)).await;
    assert_eq!((&*answer.problem(), control.runs()), ("store-unavailable", 0));
}

/// The attempt that seemed lost shows a sign of life just before the first takeover.
#[derive(Clone, Default)]
struct Revived {
    memory: MemoryStore,
    takeovers: Arc<AtomicUsize>,
}

impl Store for Revived {
    async fn begin(&self, id: &RecordId, mine: &Claim) -> Result<Begin, StoreError> {
        if let Some(lost) = mine.takeover {
            if self.takeovers.fetch_add(1, SeqCst) == 0 {
                self.memory.renew(&lost, Duration::from_secs(2)).await?;
            }
        }
        self.memory.begin(id, mine).await
    }
    async fn complete(&self, lease: &Lease, response: &StoredResponse, keep: Retention) -> Result<(), StoreError> {
        self.memory.complete(lease, response, keep).await
    }
    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.memory.renew(lease, length).await
    }
    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.memory.release(lease).await
    }
    /// Nobody hears of it, so the lease runs out.
    async fn abandon(&self, _: &Lease) -> Result<(), StoreError> {
        Ok(())
    }
    pass_on_hints!(memory);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_came_back_and_is_lost_again_is_taken_over_then() {
    let layer = IdempotencyLayer::new(Revived::default())
        .guarantee(Guarantee::AtLeastOnce)
        .lease(Duration::from_secs(1))
        .on_concurrent(Concurrent::Wait(Duration::from_secs(10)));
    let app = answering(&open(), layer, |run, attempt, _| {
        assert!(run > 1, "the first run panics");
        format!("attempt {attempt}").into_response()
    });
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    assert_eq!(call(&app, keyed("k", "a")).await.body, "attempt 2");
}

#[tokio::test(start_paused = true)]
async fn a_waiter_whose_hints_mean_nothing_looks_a_hundred_times_in_a_second_at_most() {
    let store = Restless::default();
    let layer = IdempotencyLayer::new(store.clone()).on_concurrent(Concurrent::Wait(Duration::from_secs(5)));
    let control = gated();
    let app = pay(&control, layer);
    let _first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    let looks = store.looks.load(SeqCst);
    assert!(looks <= 510, "{looks} looks in five seconds");
}

/// As [`Overtaken`]; and from some moment on, what is begun is begun and nobody hears of it.
#[derive(Clone, Default)]
struct Silenced {
    below: Overtaken,
    silent: Arc<AtomicUsize>,
}

impl Store for Silenced {
    async fn begin(&self, id: &RecordId, mine: &Claim) -> Result<Begin, StoreError> {
        let begin = self.below.begin(id, mine).await;
        if self.silent.load(SeqCst) > 0 {
            return Err(StoreErrorKind::Unavailable.into());
        }
        begin
    }
    pass_on_endings!(below);
    pass_on_hints!(below);
}

#[tokio::test(start_paused = true)]
async fn a_claim_after_a_takeover_by_another_frees_the_key_if_nobody_hears_of_it() {
    let store = Silenced::default();
    let layer = IdempotencyLayer::new(store.clone())
        .guarantee(Guarantee::AtLeastOnce)
        .on_concurrent(Concurrent::Wait(Duration::from_secs(10)));
    let app = answering(&open(), layer.clone(), |run, _, _| -> Response<Body> {
        panic!("run {run} panics")
    });
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    let waiter = spawn(&app, keyed("k", "a"));
    while layer.counters().waited == 0 {
        tokio::task::yield_now().await;
    }
    let rival = store.below.rival.lock().unwrap().take().unwrap();
    store.silent.store(1, SeqCst);
    // The key is free; what the waiter begins now is no takeover.
    store.below.memory.release(&rival).await.unwrap();
    assert_eq!(waiter.await.unwrap().problem(), "store-unavailable");
    layer.drain().finished().await;
    assert_eq!(store.below.memory.len(), 0, "nothing ran, and nothing stayed behind");
}
