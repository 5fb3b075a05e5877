//! Pockyt's guide "Idempotency Key", sentence by sentence, against the demo server and its preset.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

#[path = "pockyt/checklist.rs"]
mod checklist;
#[path = "pockyt/keyless.rs"]
mod keyless;
#[path = "pockyt/strategies.rs"]
mod strategies;

use axum::{Router, body::Bytes, routing};
use http::StatusCode;
use serde_json::Value;
use support::{
    app::{Control, open},
    demo::Demo,
    http::{Answer, post},
    serve::{ask, assert_replay},
};
use tower_idempotency::{Attempt, IdempotencyLayer, MemoryStore, Profile, Store};

const PAY: &str = "/v3/payouts/pay";
const REFUND: &str = "/v3/payouts/refund";

// The guide's request.
const KEY: &str = "123e4567-e89b-12d3-a456-426614174000";
const KEYLESS: [(&str, &str); 2] = [("accept", "application/json"), ("content-type", "application/json")];
const PAYOUT: &str = r#"
{
  "merchantNo": "202333",
  "storeNo": "301854",
  "verifySign": "8b11e8f0d7f2a412f020f266110b57ba",
  "customerNo": "2000305228292319592008",
  "accountToken": "2010305228303182765718",
  "invoiceId": "9aae4c685d824c5da746f97620c59eb5",
  "amount": "500",
  "currency": "USD",
  "ipnUrl": "https://example.com/webhooks",
  "processingChannel": "STANDARD_ACH",
  "memo": "thank you",
  "note": "Cold drink",
  "subject": "Payouts"
}
"#;

fn keyed(key: &str) -> [(&str, &str); 3] {
    [("pockyt-request-id", key), KEYLESS[0], KEYLESS[1]]
}

fn with_status<'a>(headers: &[(&'a str, &'a str)], status: &'a str) -> Vec<(&'a str, &'a str)> {
    [headers, &[("x-demo-status", status)]].concat()
}

fn of_merchant(merchant: &str) -> String {
    PAYOUT.replace("\"202333\"", merchant)
}

fn of_amount(amount: &str) -> String {
    PAYOUT.replace("\"500\"", amount)
}

/// The same JSON value, its first member last.
fn reordered() -> String {
    let body = PAYOUT.replace("\n  \"merchantNo\": \"202333\",", "");
    let body = body.replace("\"Payouts\"", "\"Payouts\",\n  \"merchantNo\": \"202333\"");
    let value = |body: &str| serde_json::from_str::<Value>(body).unwrap();
    assert_eq!(value(&body), value(PAYOUT));
    assert_ne!(body, PAYOUT);
    body
}

async fn pay(demo: &Demo, key: &str, body: &str) -> Answer {
    demo.post(PAY, &keyed(key), body).await
}

#[track_caller]
fn assert_created(answer: &Answer) {
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    assert!(!answer.is_replay(), "{answer:?}");
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, problem: &str) {
    assert_eq!((answer.status.as_u16(), &*answer.problem()), (status, problem));
}

/// The preset in this process, where time can be made to pass. It answers with the number of the run and the attempt.
fn app(control: &Control, store: impl Store) -> Router {
    let operation = || {
        let control = control.clone();
        routing::post(async move |attempt: Attempt, _: Bytes| {
            let run = control.pass().await;
            (StatusCode::CREATED, format!("run {run} attempt {}", attempt.number()))
        })
    };
    Router::new()
        .route(PAY, operation())
        .route(REFUND, operation())
        .route("/v3/payouts/cancel", operation())
        .layer(IdempotencyLayer::new(store).profile(Profile::pockyt()))
}

// ---- 1. What is an idempotency key

/// "from being processed more than once"
#[tokio::test]
async fn the_same_operation_is_not_processed_more_than_once() {
    let demo = Demo::start(&[]);
    let first = demo.crowd(PAY, &keyed(KEY), PAYOUT).await;
    assert_replay(&first, &pay(&demo, KEY, PAYOUT).await);
    let effects = demo.effects().await;
    assert_eq!(effects.len(), 1);
    assert_eq!(effects[0]["id"], first.json()["id"]);
}

/// "network failures or delayed responses"
#[tokio::test]
async fn network_failures_and_delayed_responses_generate_no_duplicate_transactions() {
    let demo = Demo::start(&[]);
    demo.leave(PAY, &keyed(KEY), PAYOUT).await;
    let retry = demo.settled(PAY, &keyed(KEY), PAYOUT).await;
    assert_eq!((retry.status, retry.is_replay()), (StatusCode::CREATED, true));
    let effects = demo.effects().await;
    assert_eq!(effects.len(), 1);
    assert_eq!(effects[0]["id"], retry.json()["id"]);
}

// ---- 2. Why implement it

/// "exactly as first processed"
#[tokio::test]
async fn a_retry_receives_the_original_response_exactly_as_first_processed() {
    let demo = Demo::start(&[]);
    let padded = [&keyed(KEY)[..], &[("x-demo-response-bytes", "5000")]].concat();
    let first = demo.post(PAY, &padded, PAYOUT).await;
    assert_created(&first);
    assert!(first.body.len() >= 5000);
    for _ in 0..3 {
        assert_replay(&first, &pay(&demo, KEY, PAYOUT).await);
    }
    assert_eq!(demo.effects().await.len(), 1);
}

/// "the same response without error response"
#[tokio::test]
async fn a_transaction_that_has_been_completed_returns_the_same_response_without_error() {
    let demo = Demo::start(&[]);
    for status in ["200", "201", "202", "204", "299"] {
        let first = demo.post(PAY, &with_status(&keyed(status), status), PAYOUT).await;
        assert_eq!(first.status.as_str(), status);
        assert_replay(&first, &pay(&demo, status, PAYOUT).await);
    }
    assert_eq!(demo.effects().await.len(), 0, "none but the first was executed");
}

/// "allow it to be executed normally"
#[tokio::test]
async fn a_transaction_that_has_not_been_completed_is_executed_normally() {
    let demo = Demo::start(&[]);
    for route in [PAY, REFUND] {
        for status in ["400", "402", "409", "422", "429", "500", "502", "503"] {
            let failed = demo.post(route, &with_status(&keyed(KEY), status), PAYOUT).await;
            assert_eq!((failed.status.as_str(), failed.is_replay()), (status, false));
        }
    }
    assert_eq!(demo.effects().await.len(), 0);
    for (number, route) in [PAY, REFUND].into_iter().enumerate() {
        let executed = demo.post(route, &keyed(KEY), PAYOUT).await;
        assert_created(&executed);
        assert_eq!(executed.json()["attempt"], 1, "the failed ones do not count");
        assert_replay(&executed, &demo.post(route, &keyed(KEY), PAYOUT).await);
        assert_eq!(demo.effects().await.len(), number + 1);
    }
}

/// "has not been completed": nobody knows whether a lost one was.
#[tokio::test]
async fn a_transaction_that_was_lost_is_executed_again_as_another_attempt() {
    let demo = Demo::start(&[]);
    demo.lose(PAY, &keyed(KEY), PAYOUT).await;
    let other = pay(&demo, KEY, &of_amount("\"501\"")).await;
    assert_refused(&other, 422, "idempotency-key-reused");
    let failed = demo.post(PAY, &with_status(&keyed(KEY), "402"), PAYOUT).await;
    assert_eq!((failed.status.as_u16(), failed.is_replay()), (402, false));
    let third = pay(&demo, KEY, PAYOUT).await;
    assert_created(&third);
    assert_eq!(third.json()["attempt"], 3);
    assert_replay(&third, &pay(&demo, KEY, PAYOUT).await);
    demo.lose(PAY, &keyed("another"), PAYOUT).await;
    let second = pay(&demo, "another", PAYOUT).await;
    assert_created(&second);
    assert_eq!(second.json()["attempt"], 2);
    assert_eq!(demo.effects().await.len(), 2);
}

// ---- 3. How to use it

/// "Example of a Valid Request"
#[tokio::test]
async fn the_example_request_is_paid_once_and_its_effect_is_in_the_ledger_as_sent() {
    let demo = Demo::start(&[]);
    let first = pay(&demo, KEY, PAYOUT).await;
    assert_created(&first);
    assert_replay(&first, &pay(&demo, KEY, PAYOUT).await);
    let effects = demo.effects().await;
    assert_eq!(effects.len(), 1);
    assert_eq!(effects[0]["id"], first.json()["id"]);
    assert_eq!(effects[0]["route"], PAY);
    assert_eq!(effects[0]["request"], serde_json::from_str::<Value>(PAYOUT).unwrap());
}

/// "a header with the key Pockyt-Request-ID"
#[tokio::test]
async fn the_key_is_in_the_header_pockyt_request_id_at_every_endpoint_and_in_no_other_header() {
    let demo = Demo::start(&[]);
    for (number, route) in [PAY, REFUND].into_iter().enumerate() {
        let first = demo.post(route, &[("Pockyt-Request-ID", KEY)], PAYOUT).await;
        assert_created(&first);
        assert_replay(&first, &demo.post(route, &keyed(KEY), PAYOUT).await);
        assert_eq!(demo.effects().await.len(), number + 1);
    }
    let other = |name| [(name, KEY), KEYLESS[0], KEYLESS[1]];
    assert_created(&demo.post(PAY, &other("idempotency-key"), PAYOUT).await);
    let keyless = demo.post(PAY, &other("x-request-id"), PAYOUT).await;
    assert_refused(&keyless, 409, "duplicate-request");
    assert_eq!(demo.effects().await.len(), 3);
}

/// "operations on money", whatever the route: the preset knows two and treats the others as refunds.
#[tokio::test]
async fn an_endpoint_that_the_guide_does_not_name_is_protected_too() {
    let control = open();
    let app = app(&control, MemoryStore::new());
    let request = || post("/v3/payouts/cancel", &keyed(KEY), PAYOUT);
    let first = ask(&app, request()).await;
    assert_replay(&first, &ask(&app, request()).await);
    assert_eq!(control.runs(), 1);
}
