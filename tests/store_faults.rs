//! A store that fails: nothing runs twice, nothing is stuck, and everybody is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    future::pending,
    mem,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::response::IntoResponse;
use http::StatusCode;
use support::{
    app::{Control, call, gated, keyed, open, pay, spawn},
    faulty::{Fault, FaultyStore, Op},
    log::Log,
};
use tokio::time::{Instant, sleep};
use tower_idempotency::{
    Begin, Claim, Guarantee, IdempotencyLayer, Keep, KeySource, Lease, MemoryStore, RecordId, Retention, Store,
    StoreError, StoreErrorKind, StoredResponse,
};

const DOWN: Fault = Fault::Error(StoreErrorKind::Unavailable);

fn faulty() -> (FaultyStore, IdempotencyLayer, Control, axum::Router) {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone());
    let control = open();
    let app = pay(&control, layer.clone());
    (store, layer, control, app)
}

// ---- at the claim

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_at_the_claim_refuses_the_request() {
    let (store, layer, control, app) = faulty();
    store.down(DOWN);
    let answer = call(&app, keyed("k", "a")).await;
    assert_eq!(
        (answer.status, answer.problem()),
        (StatusCode::SERVICE_UNAVAILABLE, "store-unavailable".to_owned())
    );
    assert!(answer.header("retry-after").is_some());
    assert_eq!(control.runs(), 0);
    store.up();
    layer.drain().finished().await;
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
    assert!(layer.counters().store_errors >= 2);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_never_answers_is_given_up_at_its_deadline() {
    let (store, _, control, app) = faulty();
    store.down(Fault::BlackHole);
    let start = Instant::now();
    let answer = call(&app, keyed("k", "a")).await;
    assert_eq!(answer.problem(), "store-unavailable");
    assert_eq!(start.elapsed().as_secs(), 6, "two tries of three seconds");
    assert_eq!(control.runs(), 0);
}

/// A memory store behind a network that holds back claims until it is told of their end.
#[derive(Clone, Default)]
struct Overtaken {
    memory: MemoryStore,
    claims: Arc<Mutex<Vec<(RecordId, Claim)>>>,
    /// How many more claims it holds back, once so many have passed.
    holds_back: Arc<AtomicUsize>,
    passes: Arc<AtomicUsize>,
    /// How many of those arrive all the same, and only their answer is lost.
    unheard: Arc<AtomicUsize>,
    takeovers_alone: bool,
}

impl Overtaken {
    /// What was held back arrives, once an end was dealt with.
    async fn after<T>(&self, end: impl Future<Output = T>) -> T {
        let answer = end.await;
        let claims = mem::take(&mut *self.claims.lock().unwrap());
        for (id, claim) in claims {
            let _ = self.memory.begin(&id, &claim).await;
        }
        answer
    }
}

impl Store for Overtaken {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let less = |left: usize| left.checked_sub(1);
        let passes = self.takeovers_alone && claim.takeover.is_none();
        let passes = passes || self.passes.fetch_update(SeqCst, SeqCst, less).is_ok();
        if passes || self.holds_back.fetch_update(SeqCst, SeqCst, less).is_err() {
            return self.memory.begin(id, claim).await;
        }
        if self.unheard.fetch_update(SeqCst, SeqCst, less).is_ok() {
            let _ = self.memory.begin(id, claim).await;
        } else {
            self.claims.lock().unwrap().push((*id, claim.clone()));
        }
        pending().await
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.after(self.memory.complete(lease, response, retention)).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.memory.renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.after(self.memory.release(lease)).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.after(self.memory.abandon(lease)).await
    }

    async fn changed(&self, id: &RecordId) {
        self.memory.changed(id).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_arrives_behind_its_release_does_not_stay() {
    let store = Overtaken::default();
    let layer = IdempotencyLayer::new(store.clone());
    let control = open();
    let app = pay(&control, layer.clone());
    store.holds_back.store(2, SeqCst);
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "store-unavailable");
    let start = Instant::now();
    layer.drain().finished().await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(store.memory.len(), 0);
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn of_two_claims_one_of_which_arrives_before_their_release_and_one_behind_it_none_stays() {
    let store = Overtaken::default();
    let layer = IdempotencyLayer::new(store.clone());
    let control = open();
    let app = pay(&control, layer.clone());
    store.holds_back.store(2, SeqCst);
    store.unheard.store(1, SeqCst);
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "store-unavailable");
    assert_eq!(store.memory.len(), 1);
    layer.drain().finished().await;
    assert!(store.claims.lock().unwrap().is_empty());
    assert_eq!((store.memory.len(), control.runs()), (0, 0));
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_arrives_when_its_repetition_has_run_and_was_released_does_not_stay() {
    // Of an operation's own key; of one beside it; where what was kept is gone at once.
    let unit = r#"[{"id":"u"}]"#;
    for (passes, units, is_kept) in [(0, "[]", false), (1, unit, false), (0, "[]", true)] {
        let store = Overtaken::default();
        let layer = IdempotencyLayer::new(store.clone()).key(KeySource::body("/id").and_each("/units/*/id"));
        let control = open();
        let app = support::app::answering(&control, layer.clone(), move |run, _, _| {
            let keep = Keep::AnswerFor(Retention::For(Duration::ZERO));
            match run {
                1 if is_kept => (StatusCode::SERVICE_UNAVAILABLE, keep).into_response(),
                1 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
                _ => StatusCode::CREATED.into_response(),
            }
        });
        let order = || {
            let body = format!(r#"{{"id":"a","units":{units}}}"#);
            http::Request::post("/pay").body(axum::body::Body::from(body)).unwrap()
        };
        store.passes.store(passes, SeqCst);
        store.holds_back.store(1, SeqCst);
        assert_eq!(call(&app, order()).await.status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(store.claims.lock().unwrap().is_empty(), "it has arrived");
        layer.drain().finished().await;
        assert_eq!((store.memory.len(), control.runs()), (0, 1));
        assert_eq!(call(&app, order()).await.status, StatusCode::CREATED);
        assert_eq!(control.runs(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_arrives_when_its_request_was_told_of_another_one_does_not_stay() {
    let store = Overtaken::default();
    let layer = IdempotencyLayer::new(store.clone());
    let control = gated();
    let app = support::app::answering(&control, layer.clone(), |run, _, _| {
        axum::response::IntoResponse::into_response(match run {
            1 => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::CREATED,
        })
    });
    let running = spawn(&app, keyed("k", "a"));
    control.entered().await;
    store.holds_back.store(1, SeqCst);
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    // It frees the key, and behind that comes the other one's first claim.
    control.let_go();
    assert_eq!(running.await.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(store.claims.lock().unwrap().is_empty());
    layer.drain().finished().await;
    assert_eq!(store.memory.len(), 0);
    control.let_go();
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
}

#[tokio::test(start_paused = true)]
async fn no_answer_is_lost_for_the_sake_of_claims_that_failed_while_the_store_was_away() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone());
    let control = gated();
    let app = pay(&control, layer.clone());
    let running = spawn(&app, keyed("k", "a"));
    control.entered().await;
    store.down(DOWN);
    // More than have a place to be ended in.
    for number in 0..1100 {
        let refused = call(&app, keyed(&format!("other-{number}"), "a")).await;
        assert_eq!(refused.problem(), "store-unavailable");
    }
    control.let_go();
    let first = running.await.unwrap();
    store.up();
    layer.drain().finished().await;
    let again = call(&app, keyed("k", "a")).await;
    assert!(again.is_replay() && again.body == first.body, "{again:?}");
}

#[tokio::test(start_paused = true)]
async fn a_takeover_that_arrives_behind_its_end_leaves_what_it_took_over_lost() {
    let store = Overtaken {
        takeovers_alone: true,
        ..Overtaken::default()
    };
    let layer = IdempotencyLayer::new(store.clone()).guarantee(Guarantee::AtLeastOnce);
    let app = support::app::answering(&open(), layer.clone(), |run, attempt, _| {
        assert!(run > 1, "the first run panics");
        axum::response::IntoResponse::into_response(format!("run {run} attempt {attempt}"))
    });
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    store.holds_back.store(2, SeqCst);
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "store-unavailable");
    layer.drain().finished().await;
    assert_eq!(call(&app, keyed("k", "a")).await.body, "run 2 attempt 3");
}

#[tokio::test(start_paused = true)]
async fn the_stores_deadline_is_a_setting() {
    let (store, layer, control, _) = faulty();
    let app = pay(&control, layer.store_timeout(Duration::from_millis(100)));
    store.down(Fault::BlackHole);
    let start = Instant::now();
    call(&app, keyed("k", "a")).await;
    assert_eq!(start.elapsed().as_millis() / 10, 20, "two tries of a tenth of a second");
}

#[tokio::test]
async fn a_claim_that_was_applied_but_whose_answer_was_lost_is_its_owners() {
    let (store, _, control, app) = faulty();
    store.fail(Op::Begin, [Fault::AnswerLost]);
    let answer = call(&app, keyed("k", "a")).await;
    assert_eq!((answer.status, answer.is_replay()), (StatusCode::CREATED, false));
    assert_eq!((control.runs(), store.calls(Op::Begin)), (1, 2));
    assert!(call(&app, keyed("k", "a")).await.is_replay());
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_was_applied_but_never_confirmed_does_not_stay_behind() {
    for lost in [Fault::AnswerLost, Fault::AppliedBlackHole] {
        let (store, layer, control, app) = faulty();
        store.fail(Op::Begin, [lost, lost]);
        assert_eq!(call(&app, keyed("k", "a")).await.problem(), "store-unavailable");
        assert_eq!(store.memory.len(), 1, "it was applied");
        layer.drain().finished().await;
        assert_eq!(store.memory.len(), 0, "and was taken back");
        assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
        assert_eq!(control.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_takeover_that_was_never_confirmed_does_not_free_the_key() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone()).guarantee(Guarantee::AtLeastOnce);
    let control = open();
    let app = support::app::answering(&control, layer.clone(), |run, attempt, _| {
        assert!(run > 1, "the first run panics");
        axum::response::IntoResponse::into_response(format!("attempt {attempt}"))
    });
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    // The look succeeds; the takeover is applied and nobody hears of it.
    store.fail(Op::Begin, [Fault::Pass, Fault::AnswerLost, Fault::AnswerLost]);
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "store-unavailable");
    layer.drain().finished().await;
    assert_eq!(
        call(&app, keyed("k", "b")).await.problem(),
        "idempotency-key-reused",
        "the record is still there"
    );
    assert_eq!(
        call(&app, keyed("k", "a")).await.body,
        "attempt 3",
        "the second had begun, for all that is known"
    );
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn only_what_may_pass_is_tried_again() {
    for (kind, problem, status) in [
        (StoreErrorKind::Full, "store-full", 503),
        (StoreErrorKind::Corrupt, "record-unreadable", 500),
        (StoreErrorKind::NewerVersion, "record-from-newer-version", 503),
        (StoreErrorKind::Other, "store-unavailable", 503),
    ] {
        let (store, _, control, app) = faulty();
        store.fail(Op::Begin, [Fault::Error(kind)]);
        let answer = call(&app, keyed("k", "a")).await;
        assert_eq!((answer.status.as_u16(), &*answer.problem()), (status, problem));
        assert_eq!((control.runs(), store.calls(Op::Begin)), (0, 1), "{kind:?}");
    }
}

#[tokio::test]
async fn a_request_may_run_without_the_store_if_the_layer_is_told_so_and_is_counted() {
    let (store, layer, control, _) = faulty();
    let layer = layer.dangerously_run_without_store();
    let app = pay(&control, layer.clone());
    store.down(DOWN);
    for run in 1..=2 {
        let answer = call(&app, keyed("k", "a")).await;
        assert_eq!(answer.body, format!("run {run} attempt 0: a"));
    }
    assert_eq!(layer.counters().unprotected, 2);
    store.up();
    // Also where that is found out by the second try alone.
    let corrupt = Fault::Error(StoreErrorKind::Corrupt);
    for faults in [vec![corrupt], vec![DOWN, corrupt]] {
        store.fail(Op::Begin, faults);
        let refused = call(&app, keyed("k", "a")).await;
        assert_eq!(refused.problem(), "record-unreadable", "only where the store is away");
    }
    assert_eq!((layer.counters().unprotected, control.runs()), (2, 2));
}

#[tokio::test]
async fn a_store_that_panics_at_the_claim_leaves_the_panic_to_the_caller() {
    let (store, _, control, app) = faulty();
    store.fail(Op::Begin, [Fault::Panic]);
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    assert_eq!(control.runs(), 0);
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
}

// ---- at the end of an attempt

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_at_the_completion_costs_the_client_nothing_and_is_told_later() {
    let (store, layer, control, app) = faulty();
    store.fail(Op::Complete, [DOWN; 4]);
    let first = call(&app, keyed("k", "a")).await;
    assert_eq!((first.status, first.is_replay()), (StatusCode::CREATED, false));
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    layer.drain().finished().await;
    let retry = call(&app, keyed("k", "a")).await;
    assert_eq!((retry.is_replay(), &retry.body), (true, &first.body));
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_completion_whose_answer_was_lost_is_not_undone() {
    let (store, layer, control, app) = faulty();
    store.fail(Op::Complete, [Fault::AnswerLost]);
    let first = call(&app, keyed("k", "a")).await;
    layer.drain().finished().await;
    assert_eq!(call(&app, keyed("k", "a")).await.body, first.body);
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_stays_down_after_the_effect_leaves_the_outcome_unknown() {
    let (store, layer, control, app) = faulty();
    store.fail(Op::Complete, [DOWN; 1000]);
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
    sleep(Duration::from_millis(49)).await;
    assert_eq!(store.calls(Op::Complete), 1, "it is left alone for a moment");
    layer.drain().finished().await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
    assert_eq!(control.runs(), 1);
    let tries = store.calls(Op::Complete);
    assert!(
        (10..=100).contains(&tries),
        "{tries} tries in one lease: neither a flood nor a handful"
    );
}

#[tokio::test(start_paused = true)]
async fn a_release_and_an_abandonment_are_told_later_too() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone());
    let app = support::app::answering(&open(), layer.clone(), |_, _, body| match &body[..] {
        b"panic" => panic!("the handler panics"),
        _ => axum::response::IntoResponse::into_response(StatusCode::SERVICE_UNAVAILABLE),
    });
    store.fail(Op::Release, [DOWN; 2]);
    assert_eq!(
        call(&app, keyed("released", "a")).await.status,
        StatusCode::SERVICE_UNAVAILABLE
    );
    store.fail(Op::Abandon, [DOWN; 2]);
    assert!(spawn(&app, keyed("abandoned", "panic")).await.unwrap_err().is_panic());
    layer.drain().finished().await;
    assert_eq!((store.calls(Op::Release), store.calls(Op::Abandon)), (3, 3));
    assert_eq!(store.memory.len(), 1, "the abandoned one");
    assert_eq!(
        call(&app, keyed("abandoned", "panic")).await.problem(),
        "outcome-unknown"
    );
}

#[tokio::test]
async fn a_store_without_room_for_the_answer_keeps_the_fact_that_there_was_one() {
    let (store, _, control, app) = faulty();
    store.fail(Op::Complete, [Fault::Error(StoreErrorKind::Full)]);
    let first = call(&app, keyed("k", "a")).await;
    assert_eq!(first.status, StatusCode::CREATED);
    let retry = call(&app, keyed("k", "a")).await;
    assert_eq!(retry.problem(), "response-not-kept");
    assert_eq!(retry.json()["original_status"], 201);
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_panics_at_the_completion_leaves_no_key_without_an_end() {
    let (store, layer, control, app) = faulty();
    store.fail(Op::Complete, [Fault::Panic]);
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    layer.drain().finished().await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_breaks_off_while_the_store_is_away_is_said_and_its_lease_says_the_rest() {
    let (log, _guard) = Log::start();
    let (store, layer, control, app) = faulty();
    store.fail(Op::Complete, [Fault::Panic]);
    store.fail(Op::Abandon, [DOWN]);
    assert!(spawn(&app, keyed("k", "a")).await.unwrap_err().is_panic());
    layer.drain().finished().await;
    let said = log.lines("the outcome of an attempt could not be stored");
    assert_eq!((said.len(), layer.counters().store_errors), (1, 1), "{}", log.text());
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    sleep(Duration::from_secs(60)).await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn answers_that_wait_for_the_store_are_bounded_and_what_is_given_up_is_said() {
    let (log, _guard) = Log::start();
    let (store, layer, control, app) = faulty();
    store.fail(Op::Begin, [Fault::Pass; 1026]);
    store.down(DOWN);
    for key in 0..1026 {
        assert_eq!(
            call(&app, keyed(&format!("key-{key}"), "a")).await.status,
            StatusCode::CREATED
        );
        tokio::task::yield_now().await;
    }
    assert_eq!((layer.drain().running(), control.runs()), (1024, 1026));
    assert_eq!(log.lines("this one is given up").len(), 2);
    store.up();
    layer.drain().finished().await;
    assert!(call(&app, keyed("key-1023", "a")).await.is_replay());
    assert_eq!(
        call(&app, keyed("key-1024", "a")).await.problem(),
        "request-in-progress"
    );
    sleep(Duration::from_secs(60)).await;
    assert_eq!(call(&app, keyed("key-1024", "a")).await.problem(), "outcome-unknown");
    assert_eq!(control.runs(), 1026);
}

#[tokio::test(start_paused = true)]
async fn outcomes_that_wait_for_the_store_are_bounded() {
    let (store, layer, _, app) = faulty();
    store.down(DOWN);
    for key in 0..2000 {
        call(&app, keyed(&format!("key-{key}"), "a")).await;
        // Each begins to wait: a place is held until the store was told, not until the task starts.
        tokio::task::yield_now().await;
    }
    assert_eq!(layer.drain().running(), 1024);
    store.up();
    layer.drain().finished().await;
}

// ---- records that cannot be used

#[tokio::test]
async fn a_record_of_an_unknown_fingerprint_is_neither_replayed_nor_run_again() {
    use tower_idempotency::Fingerprinter;
    let store = MemoryStore::new();
    let control = open();
    let custom = Fingerprinter::custom(200, |_, _| [1; 32]);
    let newer = pay(&control, IdempotencyLayer::new(store.clone()).fingerprint(custom));
    call(&newer, keyed("k", "a")).await;
    let older = pay(&control, IdempotencyLayer::new(store.clone()));
    let answer = call(&older, keyed("k", "a")).await;
    assert_eq!(
        (answer.status.as_u16(), &*answer.problem()),
        (503, "record-from-newer-version")
    );
    assert_eq!(control.runs(), 1);
    // The other way round the record is compared by the algorithm that it was made with.
    call(&older, keyed("old", "a")).await;
    assert!(call(&newer, keyed("old", "a")).await.is_replay());
    assert_eq!(
        call(&newer, keyed("old", "b")).await.problem(),
        "idempotency-key-reused"
    );
}

#[test]
fn bytes_of_no_known_form_are_no_stored_answer() {
    use tower_idempotency::StoredResponse;
    let good = StoredResponse::not_kept(StatusCode::OK).as_bytes().to_vec();
    assert!(StoredResponse::from_bytes(good.clone().into()).is_ok());
    for (at, value, kind) in [
        (0, 0, StoreErrorKind::Corrupt),
        (0, 2, StoreErrorKind::NewerVersion),
        (1, 8, StoreErrorKind::Corrupt),
        (1, 128, StoreErrorKind::Corrupt),
    ] {
        let mut bytes = good.clone();
        bytes[at] = value;
        let error = StoredResponse::from_bytes(bytes.into()).unwrap_err();
        assert_eq!(error.kind(), kind, "{value} at {at}");
    }
}

#[tokio::test]
async fn a_request_runs_without_the_store_only_where_the_store_is_away() {
    for (kind, problem) in [
        (StoreErrorKind::Unavailable, None),
        (StoreErrorKind::Other, None),
        (StoreErrorKind::Full, Some("store-full")),
        (StoreErrorKind::Corrupt, Some("record-unreadable")),
        (StoreErrorKind::NewerVersion, Some("record-from-newer-version")),
        (StoreErrorKind::Fenced, Some("store-unavailable")),
    ] {
        let (store, layer, control, _) = faulty();
        let app = pay(&control, layer.dangerously_run_without_store());
        store.down(Fault::Error(kind));
        let answer = call(&app, keyed("k", "a")).await;
        match problem {
            None => assert_eq!(answer.body, "run 1 attempt 0: a", "{kind:?}"),
            Some(problem) => assert_eq!((&*answer.problem(), control.runs()), (problem, 0), "{kind:?}"),
        }
    }
}

#[tokio::test]
async fn a_lost_lease_is_counted_as_such_and_not_as_a_fault_of_the_store() {
    let (store, layer, _, app) = faulty();
    store.fail(Op::Complete, [Fault::Error(StoreErrorKind::Fenced)]);
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
    let counters = layer.counters();
    assert_eq!((counters.fenced, counters.store_errors), (1, 0));
}
