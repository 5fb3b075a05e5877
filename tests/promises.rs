//! Where settings, handlers' words and late bodies meet: one effect, one answer, one tenant.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, SystemTime},
};

use axum::{Router, body::Body, response::IntoResponse, routing::post};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, StatusCode, header};
use serde_json::json;
use support::{
    app::{answering, call, gated, keyed, open, pay, spawn},
    faulty::{Fault, FaultyStore, Op},
};
use tokio::time::{Instant, sleep};
use tower_idempotency::{Guarantee, IdempotencyLayer, Keep, KeySource, MemoryStore, Retention, StoreErrorKind};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn order(id: &str, units: &[String]) -> Request<Body> {
    let units: Vec<_> = units.iter().map(|unit| json!({ "id": unit })).collect();
    let body = json!({ "id": id, "units": units }).to_string();
    Request::post("/pay").body(Body::from(body)).unwrap()
}

fn units(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("u{number}")).collect()
}

fn of_units(store: &FaultyStore) -> IdempotencyLayer {
    IdempotencyLayer::new(store.clone())
        .key(KeySource::body("/id").and_each("/units/*/id"))
        .require_key()
}

// ---- several keys

#[tokio::test(start_paused = true)]
async fn an_operation_is_not_lost_while_its_many_keys_are_ended() {
    let store = FaultyStore::default();
    let layer = of_units(&store)
        .guarantee(Guarantee::AtLeastOnce)
        .lease(Duration::from_secs(6));
    let control = open();
    let app = pay(&control, layer.clone());
    // Each takes longer than a third of the lease, and is heard of at its second try.
    store.fail(Op::Complete, [Fault::BlackHole; 4]);
    let first = spawn(&app, order("a", &units(4)));
    control.entered().await;
    sleep(Duration::from_secs(7)).await;
    let duplicate = call(&app, order("a", &units(4))).await;
    let first = first.await.unwrap();
    layer.drain().finished().await;
    assert_eq!(control.runs(), 1, "{duplicate:?}");
    assert_eq!(first.status, StatusCode::CREATED);
    assert_eq!(call(&app, order("a", &units(4))).await.body, first.body);
}

#[tokio::test(start_paused = true)]
async fn an_answer_does_not_wait_for_a_silent_store_once_for_each_of_its_keys() {
    let store = FaultyStore::default();
    let layer = of_units(&store);
    let app = pay(&open(), layer.clone());
    let start = Instant::now();
    store.fail(Op::Complete, [Fault::BlackHole; 33]);
    let answer = call(&app, order("a", &units(32))).await;
    assert_eq!(answer.status, StatusCode::CREATED);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    layer.drain().finished().await;
    assert!(call(&app, order("a", &units(32))).await.is_replay());
    sleep(Duration::from_secs(600)).await;
    let other = call(&app, order("b", &units(32)[31..])).await;
    assert_eq!(other.problem(), "idempotency-key-reused");
}

#[tokio::test(start_paused = true)]
async fn a_key_beside_that_is_lost_does_not_cost_the_operation_its_own() {
    let store = FaultyStore::default();
    let layer = of_units(&store).guarantee(Guarantee::AtLeastOnce);
    let control = gated();
    let app = pay(&control, layer.clone());
    let first = spawn(&app, order("a", &units(1)));
    control.entered().await;
    // Of the operation's own record, then of the other.
    store.fail(Op::Renew, [Fault::Pass, Fault::Error(StoreErrorKind::Fenced)]);
    sleep(Duration::from_secs(300)).await;
    let duplicate = call(&app, order("a", &units(1))).await;
    assert_eq!(duplicate.problem(), "request-in-progress");
    control.let_go();
    assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    assert_eq!(control.runs(), 1);
}

// ---- the time of the first attempt

const FIRST_SENT: HeaderName = HeaderName::from_static("repeatability-first-sent");

/// A layer whose clock starts at noon and goes with that of the store.
fn dated(source: KeySource) -> (IdempotencyLayer, impl Fn() -> HeaderValue) {
    let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let start = Instant::now();
    let now = move || noon + start.elapsed();
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .key(source)
        .retention(Duration::from_secs(3600))
        .first_sent_by(FIRST_SENT, Duration::from_secs(60), now);
    (layer, move || {
        HeaderValue::try_from(httpdate::fmt_http_date(now())).unwrap()
    })
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_body_came_after_its_record_was_gone_does_not_run_again() {
    let control = open();
    let (layer, date) = dated(KeySource::default());
    let app = pay(&control, layer);
    let sent = date();
    let request = |body| {
        let mut request = keyed("k", "");
        request.headers_mut().insert(FIRST_SENT, sent.clone());
        *request.body_mut() = body;
        request
    };
    assert_eq!(call(&app, request(Body::from("a"))).await.status, StatusCode::CREATED);
    sleep(Duration::from_secs(3590)).await;
    let slow = futures_util::stream::once(async {
        sleep(Duration::from_secs(600)).await;
        Ok::<_, Infallible>("a")
    });
    let late = call(&app, request(Body::from_stream(slow))).await;
    assert_eq!(control.runs(), 1);
    assert_eq!(late.problem(), "first-sent-too-old");
}

#[tokio::test(start_paused = true)]
async fn a_date_of_the_first_attempt_needs_a_key_and_a_key_needs_a_date_also_in_a_body() {
    let control = open();
    let (layer, date) = dated(KeySource::body("/id"));
    let app = pay(&control, layer);
    let request = |body: &'static str, sent: Option<HeaderValue>| {
        let mut request = Request::post("/pay").body(Body::from(body)).unwrap();
        if let Some(sent) = sent {
            request.headers_mut().insert(FIRST_SENT, sent);
        }
        request
    };
    let unkeyed = call(&app, request("{}", Some(date()))).await;
    assert_eq!(control.runs(), 0);
    assert_eq!(unkeyed.problem(), "idempotency-key-missing");
    let undated = call(&app, request(r#"{"id":"a"}"#, None)).await;
    assert_eq!(undated.problem(), "first-sent-invalid");
    let neither = call(&app, request("{}", None)).await;
    assert_eq!((neither.status, control.runs()), (StatusCode::CREATED, 1));
    let both = call(&app, request(r#"{"id":"a"}"#, Some(date()))).await;
    assert_eq!((both.status, control.runs()), (StatusCode::CREATED, 2));
}

// ---- a handler's word

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_too_large_is_remembered_for_as_long_as_its_handler_says() {
    for (content_type, length) in [("text/event-stream", 1), ("text/plain", 2000)] {
        let control = open();
        let layer = IdempotencyLayer::new(MemoryStore::new()).max_response_body(1000);
        let app = answering(&control, layer, move |_, _, _| {
            let headers = [(header::CONTENT_TYPE, content_type)];
            (headers, Keep::AnswerFor(Retention::Forever), "x".repeat(length)).into_response()
        });
        assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::OK);
        sleep(DAY * 2).await;
        let retry = call(&app, keyed("k", "a")).await;
        assert_eq!(control.runs(), 1, "{content_type}");
        assert_eq!(retry.problem(), "response-not-kept");
    }
}

#[tokio::test(start_paused = true)]
async fn the_word_of_a_protected_service_is_not_that_of_a_handler_that_passes_its_answer_on() {
    let fraud_check = Router::new()
        .route("/check", post(async || (StatusCode::OK, Keep::Nothing, "fine")))
        .layer(IdempotencyLayer::new(MemoryStore::new()));
    let charges = Arc::new(AtomicUsize::new(0));
    let handler = {
        let charges = Arc::clone(&charges);
        async move || {
            charges.fetch_add(1, SeqCst);
            let check = Request::post("/check")
                .header("idempotency-key", "check")
                .body(Body::empty())
                .unwrap();
            tower::ServiceExt::oneshot(fraud_check, check).await
        }
    };
    let app = Router::new()
        .route("/pay", post(handler))
        .layer(IdempotencyLayer::new(MemoryStore::new()));
    let first = call(&app, keyed("k", "a")).await;
    let retry = call(&app, keyed("k", "a")).await;
    assert_eq!(charges.load(SeqCst), 1);
    assert_eq!((retry.is_replay(), retry.body), (true, first.body));
}

// ---- replays

#[tokio::test(start_paused = true)]
async fn a_replay_that_is_made_anew_does_not_announce_the_length_of_the_first_answer() {
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .replay_as(|first, _| first.map(|_| Bytes::from_static(b"a conflict, which is longer")));
    let app = answering(&open(), layer, |_, _, _| {
        ([(header::CONTENT_LENGTH, "4")], "paid").into_response()
    });
    assert_eq!(call(&app, keyed("k", "a")).await.header("content-length"), Some("4"));
    let replay = call(&app, keyed("k", "a")).await;
    assert_eq!(replay.body, "a conflict, which is longer");
    assert!(
        [None, Some("27")].contains(&replay.header("content-length")),
        "{replay:?}"
    );
}

// ---- scopes

#[tokio::test(start_paused = true)]
async fn credentials_that_are_written_in_another_way_are_of_the_same_caller_or_refused() {
    let control = open();
    let layer = IdempotencyLayer::new(MemoryStore::new()).scope_authorization("Signed", ["id"]);
    let app = pay(&control, layer);
    let nonce = AtomicU64::new(0);
    let mut statuses = Vec::new();
    for lines in [
        &["Signed id=m1,nonce="][..],
        &["Signed\tid=m1,nonce="],
        &["signed  id=\"m1\" , nonce="],
        &["Basic eA==", "Signed id=m1,nonce="],
        &["Signed id=m1,nonce=", "Basic eA=="],
    ] {
        let mut request = keyed("k", "a");
        for line in lines {
            let line = match line.ends_with("nonce=") {
                true => format!("{line}{}", nonce.fetch_add(1, Relaxed)),
                false => (*line).to_owned(),
            };
            let value = HeaderValue::try_from(line).unwrap();
            request.headers_mut().append(header::AUTHORIZATION, value);
        }
        statuses.push(call(&app, request).await.status.as_u16());
    }
    assert_eq!(control.runs(), 1, "a nonce makes no other caller: {statuses:?}");
    assert_eq!(statuses, [201, 201, 201, 400, 400]);
}
