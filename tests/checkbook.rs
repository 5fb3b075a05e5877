//! Checkbook's guide "Idempotent Requests", sentence by sentence, against the demo server and its preset.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use axum::{Router, body::Body};
use http::{Method, Request, StatusCode};
use serde_json::{Value, json};
use support::{
    demo::Demo,
    http::{Answer, post},
    serve::{Effects, ask, assert_replay},
};
use tower_idempotency::{IdempotencyLayer, MemoryStore, Profile};

const CHECKS: &str = "/v3/check/digital";
const HOUR: Duration = Duration::from_secs(60 * 60);

// The guide's request, but for its key.
const ACCOUNT: (&str, &str) = (
    "authorization",
    "d6aa2703655f4ba2af2a56202961ca86:dXbCgzYBMibj8ZwuQMd2NXr6rtvjZ8",
);
const JSON: (&str, &str) = ("content-type", "application/json");
const KEY: &str = "employee-of-the-month-bonus-payment-id22";
const BONUS: &str = r#"{ "name": "Dwight Schrute", "recipient": "dwight@dundermifflin.com", "amount": 500.00, "description": "Employee of the Month Bonus" }"#;

fn headers(key: &str) -> [(&str, &str); 3] {
    [ACCOUNT, JSON, ("idempotency-key", key)]
}

async fn check(demo: &Demo, key: &str, body: &str) -> Answer {
    demo.post(CHECKS, &headers(key), body).await
}

async fn check_failing(demo: &Demo, key: &str, status: &str) -> Answer {
    let failing = [&headers(key)[..], &[("x-demo-status", status)]].concat();
    demo.post(CHECKS, &failing, BONUS).await
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, problem: &str) {
    assert_eq!((answer.status.as_u16(), &*answer.problem()), (status, problem));
}

#[track_caller]
fn assert_created(answer: &Answer) {
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    assert!(!answer.is_replay(), "{answer:?}");
}

/// The preset in this process, where time can be made to pass. Each route answers how many effects there were, to any
/// method.
fn app() -> (Router, Effects) {
    let effects = Effects::default();
    let operation = || {
        let effects = effects.clone();
        axum::routing::any(async move || (StatusCode::CREATED, effects.happen().to_string()))
    };
    let app = Router::new()
        .route(CHECKS, operation())
        .route("/v3/invoice", operation())
        .layer(IdempotencyLayer::new(MemoryStore::new()).profile(Profile::checkbook()));
    (app, effects)
}

// ---- Example curl Request with an Idempotency-Key

#[tokio::test]
async fn the_example_request_is_paid_once_and_its_effect_is_in_the_ledger_as_sent() {
    let demo = Demo::start(&[]);
    let first = check(&demo, KEY, BONUS).await;
    assert_created(&first);
    assert_replay(&first, &check(&demo, KEY, BONUS).await);
    let effects = demo.effects().await;
    assert_eq!(effects.len(), 1);
    assert_eq!(effects[0]["id"], first.json()["id"]);
    assert_eq!(effects[0]["route"], CHECKS);
    assert_eq!(effects[0]["request"], serde_json::from_str::<Value>(BONUS).unwrap());
}

// ---- What is idempotency

/// "all POST requests"
#[tokio::test]
async fn idempotent_requests_are_supported_for_all_post_requests() {
    let (app, effects) = app();
    let mut expected = 0;
    for route in [CHECKS, "/v3/invoice"] {
        let first = ask(&app, post(route, &headers(KEY), BONUS)).await;
        assert_replay(&first, &ask(&app, post(route, &headers(KEY), BONUS)).await);
        expected += 1;
        assert_eq!(effects.count(), expected, "{route}");
        for method in [Method::PUT, Method::PATCH, Method::DELETE, Method::GET] {
            for _ in 0..2 {
                let request = Request::builder().method(&method).uri(route);
                let request = request.header("idempotency-key", KEY).body(Body::empty()).unwrap();
                assert_created(&ask(&app, request).await);
                expected += 1;
            }
            assert_eq!(effects.count(), expected, "{method} {route}");
        }
    }
}

/// "only the first successful request"
#[tokio::test]
async fn only_the_first_successful_request_has_the_intended_effect() {
    let demo = Demo::start(&[]);
    for status in ["400", "402", "409", "422", "429", "500", "502", "503"] {
        let failed = check_failing(&demo, KEY, status).await;
        assert_eq!((failed.status.as_str(), failed.is_replay()), (status, false));
    }
    assert_eq!(demo.effects().await.len(), 0);
    let first = check(&demo, KEY, BONUS).await;
    assert_created(&first);
    for _ in 0..3 {
        assert_replay(&first, &check(&demo, KEY, BONUS).await);
    }
    assert_eq!(demo.effects().await.len(), 1);
}

/// "the same response as the first"
#[tokio::test]
async fn subsequent_identical_requests_return_the_same_response_as_the_first_successful_one() {
    let demo = Demo::start(&[]);
    for status in ["200", "201", "202", "204", "299"] {
        let first = check_failing(&demo, status, status).await;
        assert_eq!(first.status.as_str(), status);
        assert_replay(&first, &check(&demo, status, BONUS).await);
    }
    let padded = [&headers(KEY)[..], &[("x-demo-response-bytes", "5000")]].concat();
    let first = demo.post(CHECKS, &padded, BONUS).await;
    assert!(first.body.len() >= 5000);
    assert_replay(&first, &check(&demo, KEY, BONUS).await);
    assert_eq!(demo.effects().await.len(), 1);
}

/// "identical requests": the bytes of the body count.
#[tokio::test]
async fn a_request_that_is_not_identical_is_refused_and_changes_nothing() {
    let demo = Demo::start(&[]);
    let first = check(&demo, KEY, BONUS).await;
    let reordered = r#"{ "amount": 500.00, "name": "Dwight Schrute", "recipient": "dwight@dundermifflin.com", "description": "Employee of the Month Bonus" }"#;
    assert_eq!(
        serde_json::from_str::<Value>(reordered).unwrap(),
        serde_json::from_str::<Value>(BONUS).unwrap(),
        "only the order of members differs"
    );
    for other in [
        &BONUS.replace("500.00", "500.01"),
        &BONUS.replace("500.00", "500.0"),
        &BONUS.replace("dwight@", "jim@"),
        &BONUS.replace(' ', ""),
        reordered,
        "",
    ] {
        assert_refused(&check(&demo, KEY, other).await, 422, "idempotency-key-reused");
    }
    let with_query = demo.post("/v3/check/digital?draft=1", &headers(KEY), BONUS).await;
    assert_refused(&with_query, 422, "idempotency-key-reused");
    assert_replay(&first, &check(&demo, KEY, BONUS).await);
    assert_eq!(demo.effects().await.len(), 1);
}

// ---- Why is idempotency important

/// "Duplicate Payments"
#[tokio::test]
async fn a_transaction_is_not_paid_out_multiple_times_by_concurrent_duplicates() {
    let demo = Demo::start(&[]);
    let first = demo.crowd(CHECKS, &headers(KEY), BONUS).await;
    assert_replay(&first, &check(&demo, KEY, BONUS).await);
    let effects = demo.effects().await;
    assert_eq!(effects.len(), 1);
    assert_eq!(effects[0]["id"], first.json()["id"]);
}

/// "network issues, timeouts"
#[tokio::test]
async fn after_a_network_issue_or_a_timeout_the_retry_gets_the_answer_that_was_not_received() {
    let demo = Demo::start(&[]);
    demo.leave(CHECKS, &headers(KEY), BONUS).await;
    let retry = demo.settled(CHECKS, &headers(KEY), BONUS).await;
    assert_eq!((retry.status, retry.is_replay()), (StatusCode::CREATED, true));
    let effects = demo.effects().await;
    assert_eq!(effects.len(), 1);
    assert_eq!(effects[0]["id"], retry.json()["id"]);
}

/// "without creating duplicate resources": while the first one is being created, too.
#[tokio::test]
async fn a_duplicate_of_a_request_that_is_still_running_is_told_so() {
    let demo = Demo::start(&[]);
    demo.occupy(CHECKS, &headers(KEY), BONUS).await;
    let duplicate = check(&demo, KEY, BONUS).await;
    assert_refused(&duplicate, 409, "request-in-progress");
    assert!(duplicate.header("retry-after").is_some());
    let other = check(&demo, KEY, &BONUS.replace("500.00", "501.00")).await;
    assert_refused(&other, 422, "idempotency-key-reused");
    assert_created(&check(&demo, "another-payment", BONUS).await);
    assert_eq!(demo.effects().await.len(), 1);
}

/// "safely retry failed operations"
#[tokio::test]
async fn failed_operations_are_safely_retried() {
    let demo = Demo::start(&[]);
    for (number, status) in ["402", "500"].into_iter().enumerate() {
        let failed = check_failing(&demo, status, status).await;
        assert_eq!((failed.status.as_str(), failed.is_replay()), (status, false));
        let retry = check(&demo, status, BONUS).await;
        assert_created(&retry);
        assert_eq!(retry.json()["attempt"], 1, "the failed one does not count");
        assert_replay(&retry, &check(&demo, status, BONUS).await);
        assert_eq!(demo.effects().await.len(), number + 1);
    }
}

/// "without the risk of these issues": whether a lost one was paid is not known.
#[tokio::test]
async fn an_operation_that_was_lost_is_not_run_again() {
    let demo = Demo::start(&[]);
    demo.lose(CHECKS, &headers(KEY), BONUS).await;
    for _ in 0..2 {
        assert_refused(&check(&demo, KEY, BONUS).await, 409, "outcome-unknown");
    }
    assert_eq!(demo.effects().await.len(), 0);
}

// ---- How to implement

/// "in the Idempotency-Key HTTP header"
#[tokio::test]
async fn the_key_is_in_the_idempotency_key_header_and_in_no_other() {
    let demo = Demo::start(&[]);
    let first = demo
        .post(CHECKS, &[ACCOUNT, JSON, ("Idempotency-Key", KEY)], BONUS)
        .await;
    assert_replay(&first, &check(&demo, KEY, BONUS).await);
    for name in ["x-idempotency-key", "x-request-id", "pockyt-request-id"] {
        for _ in 0..2 {
            assert_created(&demo.post(CHECKS, &[ACCOUNT, JSON, (name, KEY)], BONUS).await);
        }
    }
    assert_eq!(demo.effects().await.len(), 1 + 6);
}

/// "each request that you want to be idempotent"
#[tokio::test]
async fn a_request_without_a_key_is_not_idempotent() {
    let demo = Demo::start(&[]);
    for effects in 1..=2 {
        assert_created(&demo.post(CHECKS, &[ACCOUNT, JSON], BONUS).await);
        assert_eq!(demo.effects().await.len(), effects);
    }
    assert_created(&check(&demo, KEY, BONUS).await);
    assert_eq!(demo.effects().await.len(), 3);
}

/// "valid for 24 hours"
#[tokio::test(start_paused = true)]
async fn the_key_is_valid_for_24_hours_after_that_the_same_key_is_a_new_request() {
    let (app, effects) = app();
    let first = ask(&app, post(CHECKS, &headers(KEY), BONUS)).await;
    tokio::time::advance(24 * HOUR - Duration::from_millis(1)).await;
    assert_replay(&first, &ask(&app, post(CHECKS, &headers(KEY), BONUS)).await);
    assert_refused(
        &ask(&app, post(CHECKS, &headers(KEY), "{}")).await,
        422,
        "idempotency-key-reused",
    );
    tokio::time::advance(Duration::from_millis(1)).await;
    let new = ask(&app, post(CHECKS, &headers(KEY), "{}")).await;
    assert_created(&new);
    assert_eq!((effects.count(), &new.body[..]), (2, &b"2"[..]));
}

/// "a new request"
#[tokio::test]
async fn after_its_expiry_the_same_key_has_a_new_effect() {
    let demo = Demo::start(&["--retention", "1ms"]);
    let first = check(&demo, KEY, BONUS).await;
    let expired = |next: &Answer| !next.is_replay();
    let new = demo.until(CHECKS, &headers(KEY), BONUS, expired).await;
    assert_created(&new);
    assert_ne!(new.json()["id"], first.json()["id"]);
    assert_eq!(demo.effects().await.len(), 2);
}

// ---- Key considerations

/// "unique to the specific operation"
#[tokio::test]
async fn the_same_key_of_another_account_is_another_operation() {
    let demo = Demo::start(&[]);
    let mut answers = Vec::new();
    for account in [&[ACCOUNT][..], &[("authorization", "another:secret")], &[]] {
        let request = [account, &[JSON, ("idempotency-key", KEY)]].concat();
        let first = demo.post(CHECKS, &request, BONUS).await;
        assert_created(&first);
        assert_replay(&first, &demo.post(CHECKS, &request, BONUS).await);
        answers.push(first.json()["id"].clone());
    }
    let effects: Vec<_> = demo.effects().await.iter().map(|effect| effect["id"].clone()).collect();
    answers.reverse();
    assert_eq!(effects, answers);
}

/// "the specific operation"
#[tokio::test]
async fn the_same_key_on_another_endpoint_is_another_operation() {
    let demo = Demo::start(&[]);
    for endpoint in [CHECKS, "/payments"] {
        let first = demo.post(endpoint, &headers(KEY), BONUS).await;
        assert_created(&first);
        assert_replay(&first, &demo.post(endpoint, &headers(KEY), BONUS).await);
    }
    let effects = demo.effects().await;
    let routes: Vec<_> = effects.iter().map(|effect| effect["route"].clone()).collect();
    assert_eq!(routes, ["/payments", CHECKS]);
}

/// "the entire order creation"
#[tokio::test]
async fn one_key_makes_an_entire_order_idempotent_and_a_key_each_its_line_items() {
    let demo = Demo::start(&[]);
    let order = json!({"items": [{"sku": "paper"}, {"sku": "toner"}]}).to_string();
    let first = check(&demo, "order-7", &order).await;
    assert_replay(&first, &check(&demo, "order-7", &order).await);
    assert_eq!(demo.effects().await.len(), 1);
    for (key, item) in [("order-8/1", r#"{"sku":"paper"}"#), ("order-8/2", r#"{"sku":"toner"}"#)] {
        let first = check(&demo, key, item).await;
        assert_created(&first);
        assert_replay(&first, &check(&demo, key, item).await);
    }
    assert_eq!(demo.effects().await.len(), 3);
}

/// "a length limitation of 255"
#[tokio::test]
async fn the_key_is_a_string_of_1_to_255_characters_quoted_or_bare() {
    let demo = Demo::start(&[]);
    let uuid = "123e4567-e89b-12d3-a456-426614174000".to_owned();
    let lengths = [1, 64, 65, 255].map(|length| "k".repeat(length));
    for (number, key) in [uuid].into_iter().chain(lengths).enumerate() {
        let first = check(&demo, &key, BONUS).await;
        assert_created(&first);
        assert_replay(&first, &check(&demo, &format!("\"{key}\""), BONUS).await);
        assert_replay(&first, &check(&demo, &key, BONUS).await);
        assert_eq!(demo.effects().await.len(), number + 1, "{} characters", key.len());
    }
    for length in [0, 256, 10_000] {
        let key = "k".repeat(length);
        for unusable in [&key, &format!("\"{key}\"")] {
            assert_refused(&check(&demo, unusable, BONUS).await, 400, "idempotency-key-invalid");
        }
    }
    assert_eq!(demo.effects().await.len(), 5, "an unusable key is not the same as none");
}
