//! Square.

use axum::body::Body;
use http::{Request, StatusCode};
use serde_json::json;
use tower_idempotency::{Fingerprinter, IdempotencyLayer, MemoryStore, Profile};

use crate::{
    bench::{Bench, hours, post},
    support::app::{anywhere, call, open},
};

fn by_member(key: &str, amount: &str) -> Request<Body> {
    post(&[], format!(r#"{{"idempotency_key":"{key}","amount":{amount}}}"#))
}

fn square() -> Bench {
    Bench::new(Profile::square(), by_member)
}

#[tokio::test]
async fn every_post_is_protected_by_a_key_in_its_body() {
    square().assert_covers(&["POST"]).await;
    square().assert_replayed("k").await;
}

#[tokio::test]
async fn a_request_without_a_key_is_refused_wherever_else_it_has_one() {
    let bench = square();
    for body in ["{}", r#"{"idempotency_key":null}"#, ""] {
        let answer = bench.send(post(&[("idempotency-key", "k")], body)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        let expected = json!({"errors": [{
            "category": "INVALID_REQUEST_ERROR",
            "code": "MISSING_REQUIRED_PARAMETER",
            "detail": "this operation requires the member `/idempotency_key` of its body",
            "field": "idempotency_key",
        }]});
        assert_eq!(answer.json(), expected);
    }
    assert_eq!(bench.control.runs(), 0);
}

#[tokio::test]
async fn a_key_has_at_most_45_characters_and_is_a_string() {
    square().assert_longest_key(45).await;
    for body in [r#"{"idempotency_key":7}"#, r#"{"idempotency_key":"a b"}"#] {
        let answer = square().send(post(&[], body)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert_eq!(answer.json()["errors"][0]["code"], "INVALID_VALUE");
    }
    let unreadable = square().send(post(&[], "idempotency_key=k")).await;
    assert_eq!(unreadable.status, StatusCode::BAD_REQUEST);
    assert_eq!(unreadable.json()["errors"][0]["category"], "INVALID_REQUEST_ERROR");
}

#[tokio::test(start_paused = true)]
async fn keys_are_kept_for_24_hours() {
    square().assert_kept_for(hours(24)).await;
}

#[tokio::test]
async fn successes_are_kept_and_a_failed_request_frees_its_key() {
    square()
        .assert_keeps(&[200, 201, 202], &[400, 402, 404, 409, 422, 429, 500, 503])
        .await;
}

#[tokio::test]
async fn another_body_is_a_400_idempotency_key_reused() {
    let answer = square().with_another_body().await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let error = &answer.json()["errors"][0];
    assert_eq!(
        (&error["category"], &error["field"]),
        (&"INVALID_REQUEST_ERROR".into(), &"idempotency_key".into())
    );
    assert_eq!(error["code"], "IDEMPOTENCY_KEY_REUSED");
}

#[tokio::test]
async fn a_request_that_is_still_running_is_a_409() {
    let answer = Bench::gated(Profile::square(), by_member).while_running("k").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(answer.json()["errors"][0]["code"], "REQUEST_IN_PROGRESS");
}

#[tokio::test]
async fn a_store_without_room_is_not_the_requests_fault() {
    let full = MemoryStore::builder().max_records(0).build();
    let app = anywhere(&open(), IdempotencyLayer::new(full).profile(Profile::square()));
    let answer = call(&app, by_member("k", "1")).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    let error = &answer.json()["errors"][0];
    assert_eq!(
        (&error["category"], &error["code"]),
        (&"API_ERROR".into(), &"STORE_FULL".into())
    );
    assert!(error.get("field").is_none());
}

#[tokio::test]
async fn keys_belong_to_an_authorization_and_a_route() {
    square().assert_apart_by_authorization_and_route().await;
}

#[tokio::test]
async fn the_bytes_of_the_body_count_unless_its_value_is_to_count() {
    let other_form = || post(&[], "{ \"amount\":1.0, \"idempotency_key\":\"k\" }");
    let bench = square();
    bench.pay("k", "1").await;
    assert_eq!(bench.send(other_form()).await.status, StatusCode::BAD_REQUEST);
    let by_value = |layer: IdempotencyLayer| layer.fingerprint(Fingerprinter::canonical_json());
    let bench = Bench::with(open(), Profile::square(), by_value, by_member);
    bench.pay("k", "1").await;
    assert_eq!(bench.send(other_form()).await.status, StatusCode::CREATED);
    assert_eq!(bench.control.runs(), 1);
}
