//! Stripe's API v1.

use http::StatusCode;
use serde_json::json;
use tower_idempotency::{Keep, MemoryStore, Profile};

use crate::{
    bench::{Bench, by_header, hours, post},
    support::app::open,
};

fn stripe() -> Bench {
    Bench::new(Profile::stripe(), by_header)
}

#[tokio::test]
async fn every_post_with_a_key_is_protected_and_the_key_is_optional() {
    stripe().assert_covers(&["POST"]).await;
    stripe().assert_key_is_optional(|| post(&[], "1")).await;
}

#[tokio::test]
async fn a_key_has_at_most_255_characters() {
    stripe().assert_longest_key(255).await;
}

#[tokio::test(start_paused = true)]
async fn keys_are_kept_for_24_hours() {
    stripe().assert_kept_for(hours(24)).await;
}

#[tokio::test]
async fn everything_that_began_to_execute_is_kept_a_500_included_and_validation_failures_are_not() {
    let kept = [200, 201, 302, 402, 424, 500, 501, 502, 504];
    let freed = [400, 401, 403, 404, 409, 422, 429, 503];
    stripe().assert_keeps(&kept, &freed).await;
}

#[tokio::test]
async fn a_handler_that_began_and_answers_like_a_validation_failure_can_say_so() {
    let bench = stripe();
    bench.says(409, Some(Keep::Answer));
    bench.assert_replayed("k").await;
}

#[tokio::test]
async fn a_replay_is_the_first_answer_with_the_marker_of_stripe() {
    let bench = stripe();
    assert_eq!(bench.pay("k", "1").await.header("idempotent-replayed"), None);
    let replay = bench.pay("k", "1").await;
    assert_eq!(replay.header("idempotent-replayed"), Some("true"));
    bench.assert_replayed("k").await;
}

#[tokio::test]
async fn another_body_is_a_400_idempotency_error() {
    let answer = stripe().with_another_body().await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let expected = json!({"error": {
        "type": "idempotency_error",
        "code": "idempotency-key-reused",
        "message": "Idempotency key was used for a different request",
    }});
    assert_eq!(answer.json(), expected);
}

#[tokio::test]
async fn a_request_that_is_still_running_is_a_409() {
    let answer = Bench::gated(Profile::stripe(), by_header).while_running("k").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert!(answer.header("retry-after").is_some());
    let error = &answer.json()["error"];
    assert_eq!(
        (&error["type"], &error["code"]),
        (&"idempotency_error".into(), &"idempotency_key_in_use".into())
    );
}

#[tokio::test]
async fn an_unusable_key_is_an_invalid_request_and_a_store_without_room_an_api_error() {
    let invalid = stripe().pay("a b", "1").await;
    assert_eq!(invalid.status, StatusCode::BAD_REQUEST);
    assert_eq!(invalid.json()["error"]["type"], "invalid_request_error");
    let full = MemoryStore::builder().max_records(0).build();
    let layer = tower_idempotency::IdempotencyLayer::new(full).profile(Profile::stripe());
    let app = crate::support::app::anywhere(&open(), layer);
    let answer = crate::support::app::call(&app, by_header("k", "1")).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.json()["error"]["type"], "api_error");
}

#[tokio::test]
async fn keys_belong_to_an_authorization_and_a_route() {
    stripe().assert_apart_by_authorization_and_route().await;
}

#[test]
fn presets_are_called_what_their_apis_are_called() {
    let names = [
        (Profile::stripe(), "Stripe"),
        (Profile::adyen(), "Adyen"),
        (Profile::paypal(), "PayPal"),
        (Profile::square(), "Square"),
        (Profile::gocardless(), "GoCardless"),
        (Profile::oasis_repeatable_requests(), "OASIS Repeatable Requests"),
        (Profile::aip_155(), "AIP-155"),
        (Profile::svix(), "svix"),
    ];
    for (profile, name) in names {
        assert_eq!(profile.name(), name);
    }
}
