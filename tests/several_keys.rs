//! One operation that claims several keys: all of them or none, and none is left behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, body::Body, response::IntoResponse, routing::post};
use bytes::Bytes;
use http::{Request, StatusCode};
use serde_json::{Value, json};
use support::{
    app::{Control, call, gated, open, pay, spawn},
    dice::Dice,
    faulty::{Fault, FaultyStore, Op},
    http::Answer,
};
use tokio::time::{sleep, timeout};
use tower_idempotency::{Guarantee, IdempotencyLayer, KeySource, MemoryStore, Store, StoreErrorKind};

const DOWN: Fault = Fault::Error(StoreErrorKind::Unavailable);

fn layer(store: &(impl Store + Clone)) -> IdempotencyLayer {
    IdempotencyLayer::new(store.clone())
        .key(KeySource::body("/id").and_each("/units/*/id"))
        .require_key()
        .store_when(|status| status.is_success())
}

fn app() -> (FaultyStore, IdempotencyLayer, Control, Router) {
    let store = FaultyStore::default();
    let layer = layer(&store);
    let control = open();
    let app = pay(&control, layer.clone());
    (store, layer, control, app)
}

fn order(id: &str, units: &[&str]) -> Request<Body> {
    let units: Vec<_> = units.iter().map(|unit| json!({ "id": unit })).collect();
    let body = json!({ "id": id, "units": units }).to_string();
    Request::post("/pay").body(Body::from(body)).expect("a request")
}

async fn send(app: &Router, id: &str, units: &[&str]) -> Answer {
    // A request that should have been refused and waits in its handler fails its test.
    let answer = timeout(Duration::from_secs(1000), call(app, order(id, units))).await;
    answer.expect("an answer")
}

#[track_caller]
fn ran(answer: &Answer) {
    assert_eq!(
        (answer.status, answer.is_replay()),
        (StatusCode::CREATED, false),
        "{answer:?}"
    );
}

#[track_caller]
fn refused(answer: &Answer, kind: &str) {
    assert_eq!(answer.problem(), kind, "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn a_key_that_another_operation_holds_refuses_the_whole_and_takes_nothing() {
    let (_, _, control, app) = app();
    ran(&send(&app, "a", &["u2"]).await);
    refused(&send(&app, "b", &["u1", "u2", "u3"]).await, "idempotency-key-reused");
    assert_eq!(control.runs(), 1);
    ran(&send(&app, "c", &["u1"]).await);
    ran(&send(&app, "d", &["u3"]).await);
    ran(&send(&app, "b", &["u4"]).await);
}

#[tokio::test(start_paused = true)]
async fn the_same_holds_where_the_store_answers_at_once() {
    let control = open();
    let app = pay(&control, layer(&MemoryStore::new()));
    let first = send(&app, "a", &["u1", "u2"]).await;
    ran(&first);
    refused(&send(&app, "b", &["u3", "u2"]).await, "idempotency-key-reused");
    assert_eq!(control.runs(), 1);
    ran(&send(&app, "b", &["u3"]).await);
    let retry = send(&app, "a", &["u1", "u2"]).await;
    assert_eq!((retry.is_replay(), &retry.body), (true, &first.body));
}

#[tokio::test(start_paused = true)]
async fn a_retry_is_answered_by_the_operations_own_record() {
    let (store, _, control, app) = app();
    let first = send(&app, "a", &["u1", "u2"]).await;
    ran(&first);
    let claims = store.calls(Op::Begin);
    let retry = send(&app, "a", &["u1", "u2"]).await;
    assert_eq!((retry.is_replay(), &retry.body), (true, &first.body));
    assert_eq!(store.calls(Op::Begin), claims + 1, "one look");
    refused(&send(&app, "a", &["u1"]).await, "idempotency-key-reused");
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_a_running_operation_holds_refuses_the_whole() {
    let store = FaultyStore::default();
    let control = gated();
    let app = pay(&control, layer(&store));
    let first = spawn(&app, order("a", &["u1"]));
    control.entered().await;
    refused(&send(&app, "b", &["u1"]).await, "idempotency-key-reused");
    refused(&send(&app, "a", &["u1"]).await, "request-in-progress");
    control.let_go();
    ran(&first.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn all_leases_are_renewed_while_the_handler_runs() {
    let store = FaultyStore::default();
    let control = gated();
    // So that a lease that runs out is soon forgotten.
    let short = Duration::from_secs(1);
    let app = pay(&control, layer(&store).lease(Duration::from_secs(60)).retention(short));
    let first = spawn(&app, order("a", &["u1", "u2"]));
    control.entered().await;
    sleep(Duration::from_secs(600)).await;
    for unit in ["u1", "u2"] {
        refused(&send(&app, "b", &[unit]).await, "idempotency-key-reused");
    }
    control.let_go();
    ran(&first.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_slow_store_keeps_the_operations_own_lease_however_many_keys_stand_beside() {
    for guarantee in [Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
        let store = FaultyStore::default();
        let control = gated();
        let layer = layer(&store).guarantee(guarantee).lease(Duration::from_secs(3));
        let app = pay(&control, layer.max_keys(100));
        // A round of renewals takes four seconds, and so does the end.
        let slow = Fault::Slow(Duration::from_millis(40));
        store.fail(Op::Renew, vec![slow; 1000]);
        store.fail(Op::Complete, vec![slow; 101]);
        let units: Vec<_> = (0..100).map(|number| format!("u{number}")).collect();
        let units: Vec<_> = units.iter().map(String::as_str).collect();
        let first = spawn(&app, order("a", &units));
        control.entered().await;
        for second in 0..14 {
            if second == 10 {
                control.let_go();
            }
            refused(&send(&app, "a", &units).await, "request-in-progress");
            sleep(Duration::from_secs(1)).await;
        }
        ran(&first.await.unwrap());
        assert_eq!(control.runs(), 1, "{guarantee:?}");
    }
}

/// Under a lease of three seconds, with a handler of so many milliseconds, while duplicates come ten times a second.
async fn assert_runs_once(store: &FaultyStore, handler: u64) {
    let control = gated();
    let layer = layer(store)
        .guarantee(Guarantee::AtLeastOnce)
        .lease(Duration::from_secs(3));
    let app = pay(&control, layer);
    let units = ["u1", "u2", "u3", "u4"];
    let first = spawn(&app, order("a", &units));
    control.entered().await;
    sleep(Duration::from_millis(handler)).await;
    control.let_go();
    while !first.is_finished() {
        let duplicate = spawn(&app, order("a", &units));
        sleep(Duration::from_millis(100)).await;
        assert_eq!(control.runs(), 1);
        duplicate.abort();
    }
    // Whoever took it over would have begun by then.
    sleep(Duration::from_secs(2)).await;
    assert_eq!(control.runs(), 1);
    ran(&first.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn an_operations_own_lease_lasts_from_its_last_renewal_into_a_slow_end() {
    let store = FaultyStore::default();
    let slow = Fault::Slow(Duration::from_millis(300));
    store.fail(Op::Renew, [slow; 100]);
    store.fail(Op::Complete, [slow; 5]);
    // It ends in the middle of a round of renewals.
    assert_runs_once(&store, 3450).await;
}

#[tokio::test(start_paused = true)]
async fn claims_a_handler_and_an_end_that_each_last_less_than_a_renewal_are_no_longer_than_a_lease_together() {
    // Also where all renewals fail just before one of them is over.
    for (claim, fails, handler) in [(225, 0, 950), (260, 9, 1010)] {
        let store = FaultyStore::default();
        let slow = Fault::Slow(Duration::from_millis(300));
        store.fail(Op::Begin, [Fault::Pass]);
        store.fail(Op::Begin, [Fault::Slow(Duration::from_millis(claim)); 4]);
        store.fail(Op::Renew, vec![DOWN; fails]);
        store.fail(Op::Renew, [slow; 100]);
        store.fail(Op::Complete, [slow; 5]);
        assert_runs_once(&store, handler).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_beside_that_somebody_removed_does_not_hasten_the_renewals() {
    let store = FaultyStore::default();
    let control = gated();
    let app = pay(&control, layer(&store).lease(Duration::from_secs(60)));
    let first = spawn(&app, order("a", &["u1", "u2"]));
    control.entered().await;
    let of_one_round = [Fault::Pass, Fault::Error(StoreErrorKind::Fenced), Fault::Pass];
    store.fail(Op::Renew, [of_one_round; 10].concat());
    sleep(Duration::from_secs(210)).await;
    assert_eq!(store.calls(Op::Renew), 30, "three keys, every twenty seconds");
    control.let_go();
    ran(&first.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn what_did_not_execute_frees_all_of_its_keys() {
    let store = FaultyStore::default();
    let fails = Arc::new(AtomicUsize::new(1));
    let handler = {
        let fails = Arc::clone(&fails);
        async move || match fails.swap(0, SeqCst) {
            1 => StatusCode::PAYMENT_REQUIRED,
            _ => StatusCode::CREATED,
        }
    };
    let app = Router::new().route("/pay", post(handler)).layer(layer(&store));
    assert_eq!(
        send(&app, "a", &["u1", "u2"]).await.status,
        StatusCode::PAYMENT_REQUIRED
    );
    ran(&send(&app, "b", &["u1"]).await);
    ran(&send(&app, "c", &["u2"]).await);
    ran(&send(&app, "a", &["u3"]).await);
}

fn panicking(store: &FaultyStore, guarantee: Guarantee) -> Router {
    let first = Arc::new(AtomicUsize::new(0));
    let handler = async move |attempt: tower_idempotency::Attempt| {
        assert!(first.fetch_add(1, SeqCst) > 0, "the first run panics");
        (StatusCode::CREATED, format!("attempt {}", attempt.number()))
    };
    Router::new()
        .route("/pay", post(handler))
        .layer(layer(store).guarantee(guarantee))
}

#[tokio::test(start_paused = true)]
async fn an_unknown_outcome_keeps_all_keys() {
    let store = FaultyStore::default();
    let app = panicking(&store, Guarantee::AtMostOnce);
    assert!(spawn(&app, order("a", &["u1"])).await.unwrap_err().is_panic());
    refused(&send(&app, "a", &["u1"]).await, "outcome-unknown");
    refused(&send(&app, "b", &["u1"]).await, "idempotency-key-reused");
}

#[tokio::test(start_paused = true)]
async fn the_operation_that_lost_an_attempt_takes_all_of_its_keys_over_and_no_other_does() {
    let store = FaultyStore::default();
    let app = panicking(&store, Guarantee::AtLeastOnce);
    assert!(spawn(&app, order("a", &["u1", "u2"])).await.unwrap_err().is_panic());
    refused(&send(&app, "b", &["u1"]).await, "idempotency-key-reused");
    let again = send(&app, "a", &["u1", "u2"]).await;
    ran(&again);
    assert_eq!(again.body, "attempt 2");
    refused(&send(&app, "b", &["u2"]).await, "idempotency-key-reused");
    assert!(send(&app, "a", &["u1", "u2"]).await.is_replay());
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_was_taken_over_ends_nothing_of_its_successors() {
    let store = FaultyStore::default();
    let control = gated();
    let layer = layer(&store)
        .guarantee(Guarantee::AtLeastOnce)
        .lease(Duration::from_secs(9));
    let app = pay(&control, layer.clone());
    let first = spawn(&app, order("a", &["u1"]));
    control.entered().await;
    // The node of the first attempt cannot reach the store for longer than its lease.
    store.fail(Op::Renew, [DOWN; 60]);
    sleep(Duration::from_secs(20)).await;
    let second = spawn(&app, order("a", &["u1"]));
    control.entered().await;
    control.let_go();
    control.let_go();
    let answers = [first.await.unwrap(), second.await.unwrap()];
    layer.drain().finished().await;
    let retry = send(&app, "a", &["u1"]).await;
    assert_eq!((retry.is_replay(), &retry.body), (true, &answers[1].body));
    refused(&send(&app, "b", &["u1"]).await, "idempotency-key-reused");
}

#[tokio::test(start_paused = true)]
async fn after_slow_claims_nothing_runs_unless_the_operations_own_record_is_still_held() {
    for (renewals, problem) in [
        (Fault::Error(StoreErrorKind::Fenced), "request-in-progress"),
        (Fault::Error(StoreErrorKind::Unavailable), "store-unavailable"),
    ] {
        let store = FaultyStore::default();
        let control = open();
        let app = pay(&control, layer(&store).lease(Duration::from_secs(4)));
        store.fail(Op::Renew, [renewals; 100]);
        store.fail(Op::Begin, [Fault::Pass, Fault::BlackHole]);
        refused(&send(&app, "a", &["u1"]).await, problem);
        assert_eq!(control.runs(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_a_lost_attempt_still_holds_is_waited_for_by_its_successor() {
    let store = FaultyStore::default();
    let control = gated();
    let app = pay(&control, layer(&store).guarantee(Guarantee::AtLeastOnce));
    let first = spawn(&app, order("a", &["u1"]));
    control.entered().await;
    // The operation's own record is not renewed, the other one is.
    store.fail(Op::Renew, [DOWN, Fault::Pass].repeat(100));
    sleep(Duration::from_secs(61)).await;
    refused(&send(&app, "a", &["u1"]).await, "request-in-progress");
    control.let_go();
    ran(&first.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_was_lost_between_two_claims_does_not_run() {
    // The node learns of its loss by its own renewals, or only when it asks.
    for renewals in [30, 1000] {
        let store = FaultyStore::default();
        let layer = layer(&store)
            .guarantee(Guarantee::AtLeastOnce)
            .lease(Duration::from_secs(2));
        let control = open();
        let app = pay(&control, layer.clone());
        store.fail(Op::Renew, vec![DOWN; renewals]);
        store.fail(Op::Begin, [Fault::Pass, Fault::Pass, Fault::BlackHole]);
        let first = spawn(&app, order("a", &["u1", "u2"]));
        sleep(Duration::from_millis(2300)).await;
        ran(&send(&app, "a", &["u1", "u2"]).await);
        refused_or_unavailable(&first.await.unwrap());
        layer.drain().finished().await;
        assert_eq!(control.runs(), 1);
        assert!(send(&app, "a", &["u1", "u2"]).await.is_replay());
    }
}

#[track_caller]
fn refused_or_unavailable(answer: &Answer) {
    assert!(
        ["request-in-progress", "store-unavailable"].contains(&&*answer.problem()),
        "{answer:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_store_that_panics_leaves_every_key_to_the_next_attempt() {
    for calls in 0..3 {
        let store = FaultyStore::default();
        let layer = layer(&store).guarantee(Guarantee::AtLeastOnce);
        let control = open();
        let app = pay(&control, layer.clone());
        store.fail(Op::Complete, vec![Fault::Pass; calls]);
        store.fail(Op::Complete, [Fault::Panic]);
        assert!(spawn(&app, order("a", &["u1", "u2"])).await.unwrap_err().is_panic());
        layer.drain().finished().await;
        ran(&send(&app, "a", &["u1", "u2"]).await);
        assert_eq!(control.runs(), 2);
        refused(&send(&app, "b", &["u1"]).await, "idempotency-key-reused");
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_between_two_claims_leaves_no_key_behind() {
    let lasting = [DOWN, Fault::AnswerLost, Fault::BlackHole, Fault::AppliedBlackHole];
    for (fault, number) in lasting
        .iter()
        .flat_map(|fault| (0..4).map(move |number| (*fault, number)))
    {
        let (store, layer, control, app) = app();
        store.fail(Op::Begin, vec![Fault::Pass; number]);
        // A claim is tried twice.
        store.fail(Op::Begin, [fault, fault]);
        let answer = send(&app, "a", &["u1", "u2", "u3"]).await;
        refused(&answer, "store-unavailable");
        assert_eq!(control.runs(), 0, "{fault:?} at claim {number}");
        layer.drain().finished().await;
        for (id, unit) in [("b", "u1"), ("c", "u2"), ("d", "u3")] {
            ran(&send(&app, id, &[unit]).await);
        }
        ran(&send(&app, "a", &["u4"]).await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_store_refuses_the_whole_and_leaves_no_key_behind() {
    let (store, layer, _, app) = app();
    store.fail(
        Op::Begin,
        [Fault::Pass, Fault::Pass, Fault::Error(StoreErrorKind::Full)],
    );
    refused(&send(&app, "a", &["u1", "u2"]).await, "store-full");
    layer.drain().finished().await;
    ran(&send(&app, "a", &["u1", "u2"]).await);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_between_two_claims_leaves_no_key_behind() {
    let (store, layer, control, app) = app();
    store.fail(Op::Begin, [Fault::Pass, Fault::Pass, Fault::AppliedBlackHole]);
    let client = spawn(&app, order("a", &["u1", "u2"]));
    sleep(Duration::from_secs(1)).await;
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    layer.drain().finished().await;
    assert_eq!(control.ends(), 1, "it runs to its end");
    assert!(send(&app, "a", &["u1", "u2"]).await.is_replay());
    refused(&send(&app, "b", &["u2"]).await, "idempotency-key-reused");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_at_the_end_hears_of_every_key_later() {
    let (store, layer, _, app) = app();
    store.fail(Op::Complete, [DOWN; 5]);
    ran(&send(&app, "a", &["u1", "u2"]).await);
    layer.drain().finished().await;
    assert!(send(&app, "a", &["u1", "u2"]).await.is_replay());
    // Completed, not merely under a lease that ends.
    sleep(Duration::from_secs(600)).await;
    for unit in ["u1", "u2"] {
        refused(&send(&app, "b", &[unit]).await, "idempotency-key-reused");
    }
}

#[tokio::test(start_paused = true)]
async fn all_keys_of_an_operation_expire_together() {
    let (_, _, control, app) = app();
    ran(&send(&app, "a", &["u1"]).await);
    sleep(Duration::from_secs(24 * 60 * 60 - 1)).await;
    refused(&send(&app, "b", &["u1"]).await, "idempotency-key-reused");
    sleep(Duration::from_secs(2)).await;
    ran(&send(&app, "b", &["u1"]).await);
    ran(&send(&app, "a", &["u2"]).await);
    assert_eq!(control.runs(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_request_claims_so_many_keys_and_no_more() {
    let store = FaultyStore::default();
    let control = open();
    let app = pay(&control, layer(&store).max_keys(3));
    refused(&send(&app, "a", &["1", "2", "3", "4"]).await, "idempotency-key-invalid");
    assert_eq!(store.calls(Op::Begin), 0);
    ran(&send(&app, "a", &["1", "2", "3"]).await);
}

// ---- whatever happens

fn fault(dice: &mut Dice) -> Fault {
    match dice.below(6) {
        0 => DOWN,
        1 => Fault::AnswerLost,
        2 => Fault::BlackHole,
        3 => Fault::AppliedBlackHole,
        _ => Fault::Pass,
    }
}

/// The operations that had an effect or may have had one, by the units that they named.
type Effects = Arc<Mutex<HashMap<String, Vec<String>>>>;

async fn round(seed: u64, guarantee: Guarantee) {
    let mut dice = Dice::of(seed);
    let store = FaultyStore::default();
    let layer = layer(&store).guarantee(guarantee);
    for op in [Op::Begin, Op::Complete, Op::Release, Op::Abandon, Op::Renew] {
        let faults: Vec<_> = (0..dice.below(6)).map(|_| fault(&mut dice)).collect();
        store.fail(op, faults);
    }
    let effects = Effects::default();
    let plan: Vec<_> = (0..64)
        .map(|_| (dice.below(4), dice.below(3) * dice.below(30_000)))
        .collect();
    let number = Arc::new(AtomicUsize::new(0));
    let handler = {
        let effects = Arc::clone(&effects);
        async move |body: Bytes| {
            let (outcome, takes) = plan[number.fetch_add(1, SeqCst) % plan.len()];
            sleep(Duration::from_millis(takes)).await;
            if outcome == 0 {
                return StatusCode::PAYMENT_REQUIRED.into_response();
            }
            let body: Value = serde_json::from_slice(&body).unwrap();
            let id = body["id"].as_str().unwrap();
            for unit in body["units"].as_array().unwrap() {
                let mut effects = effects.lock().unwrap();
                let holders = effects.entry(unit["id"].as_str().unwrap().to_owned()).or_default();
                if guarantee == Guarantee::AtMostOnce || !holders.iter().any(|holder| holder == id) {
                    holders.push(id.to_owned());
                }
            }
            assert!(outcome != 1, "a run panics after its effect");
            StatusCode::CREATED.into_response()
        }
    };
    let app = Router::new().route("/pay", post(handler)).layer(layer.clone());
    let mut clients = Vec::new();
    for _ in 0..12 {
        let id = format!("o{}", dice.below(5));
        // Each order's units are always the same ones, and orders share them.
        let units = match &*id {
            "o0" => &["u1", "u2"][..],
            "o1" => &["u2", "u3"],
            "o2" => &["u3", "u1"],
            "o3" => &["u1", "u2", "u3", "u4"],
            _ => &["u4"],
        };
        let request = order(&id, units);
        let (app, comes, stays) = (app.clone(), dice.below(3) * dice.below(40_000), 1 + dice.below(30_000));
        let patient = dice.below(2) == 0;
        clients.push(tokio::spawn(async move {
            sleep(Duration::from_millis(comes)).await;
            match patient {
                true => drop(call(&app, request).await),
                false => drop(timeout(Duration::from_millis(stays), call(&app, request)).await),
            }
        }));
    }
    for client in clients {
        let _ = client.await;
    }
    layer.drain().finished().await;
    // Whatever was left in progress is over by now.
    sleep(Duration::from_secs(300)).await;
    let told = format!("seed {seed}, {guarantee:?}: {:?}", effects.lock().unwrap());
    for unit in ["u1", "u2", "u3", "u4"] {
        let holders = effects.lock().unwrap().get(unit).cloned().unwrap_or_default();
        assert!(holders.len() <= 1, "{unit} was used twice; {told}");
        // Faults may be left over: another probe has to meet none at last.
        let mut status = StatusCode::SERVICE_UNAVAILABLE;
        for probe in 0..20 {
            let answer = spawn(&app, order(&format!("probe-{unit}-{probe}"), &[unit])).await;
            layer.drain().finished().await;
            match answer {
                Ok(answer) if answer.status == StatusCode::SERVICE_UNAVAILABLE => {}
                Ok(answer) => {
                    status = answer.status;
                    break;
                }
                // The probe's own run panicked: the unit was free.
                Err(_) => {
                    status = StatusCode::CREATED;
                    break;
                }
            }
        }
        match holders.is_empty() {
            true => assert!(
                matches!(status, StatusCode::CREATED | StatusCode::PAYMENT_REQUIRED),
                "{unit} was never used and is not free: {status}; {told}"
            ),
            false => assert_eq!(
                status,
                StatusCode::UNPROCESSABLE_ENTITY,
                "{unit} was used and is free; {told}"
            ),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_no_key_is_used_twice_and_none_that_was_not_used_stays_taken() {
    std::panic::set_hook(Box::new(|_| ()));
    let rounds = std::env::var("ROUNDS").map_or(400, |rounds| rounds.parse().unwrap());
    for seed in 0..rounds {
        let guarantee = [Guarantee::AtMostOnce, Guarantee::AtLeastOnce][seed as usize % 2];
        if let Err(error) = tokio::spawn(round(seed, guarantee)).await {
            let panic = error.into_panic();
            let _ = std::panic::take_hook();
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            panic!("seed {seed}: {text}");
        }
    }
}
