//! PayPal.

use axum::body::Body;
use http::{Request, StatusCode};
use serde_json::json;
use tower_idempotency::Profile;

use crate::bench::{Bench, hours, post};

fn by_request_id(key: &str, amount: &str) -> Request<Body> {
    post(&[("PayPal-Request-Id", key)], amount)
}

fn paypal() -> Bench {
    Bench::new(Profile::paypal(), by_request_id)
}

#[tokio::test]
async fn every_post_with_a_request_id_is_protected_and_the_id_is_optional() {
    paypal().assert_covers(&["POST"]).await;
    paypal()
        .assert_key_is_optional(|| post(&[("idempotency-key", "k")], "1"))
        .await;
}

#[tokio::test]
async fn a_request_id_has_at_most_108_characters() {
    paypal().assert_longest_key(108).await;
}

#[tokio::test(start_paused = true)]
async fn request_ids_are_kept_for_72_hours() {
    paypal().assert_kept_for(hours(72)).await;
}

#[tokio::test]
async fn a_duplicate_gets_the_first_answer_whatever_it_was() {
    paypal().assert_replayed("k").await;
    let kept = [200, 201, 400, 404, 409, 422, 500];
    paypal().assert_keeps(&kept, &[401, 403, 408, 425, 429, 503]).await;
}

#[tokio::test]
async fn another_body_is_a_duplicate_request_id() {
    let answer = paypal().with_another_body().await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
    let error = answer.json();
    let expected = json!({
        "name": "UNPROCESSABLE_ENTITY",
        "message": "Idempotency key was used for a different request",
        "debug_id": error["debug_id"],
        "details": [{
            "issue": "DUPLICATE_REQUEST_ID",
            "description": "Idempotency key was used for a different request",
        }],
    });
    assert_eq!(error, expected);
    assert_eq!(error["debug_id"].as_str().unwrap().len(), 32);
}

#[tokio::test]
async fn a_request_that_is_still_running_is_a_previous_request_in_progress() {
    let answer = Bench::gated(Profile::paypal(), by_request_id).while_running("k").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    let error = answer.json();
    assert_eq!(error["name"], "RESOURCE_CONFLICT");
    assert_eq!(error["details"][0]["issue"], "PREVIOUS_REQUEST_IN_PROGRESS");
}

#[tokio::test]
async fn an_unusable_request_id_is_an_invalid_request() {
    let answer = paypal().pay(&"k".repeat(109), "1").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let error = answer.json();
    assert_eq!(error["name"], "INVALID_REQUEST");
    assert_eq!(error["details"][0]["issue"], "IDEMPOTENCY_KEY_INVALID");
    assert!(error["details"][0]["description"].as_str().unwrap().contains("108"));
}

#[tokio::test]
async fn request_ids_belong_to_an_authorization_and_a_route() {
    paypal().assert_apart_by_authorization_and_route().await;
}

#[tokio::test(start_paused = true)]
async fn another_retention_for_one_operation_is_set_by_its_route() {
    let settings =
        |layer: tower_idempotency::IdempotencyLayer| layer.route("/payments", |payments| payments.retention(hours(6)));
    let bench = Bench::with(crate::support::app::open(), Profile::paypal(), settings, by_request_id);
    bench.assert_kept_for(hours(6)).await;
}
