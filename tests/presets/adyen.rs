//! Adyen.

use http::StatusCode;
use serde_json::json;
use tower_idempotency::{Profile, Scope};

use crate::{
    bench::{Bench, by_header, hours, post},
    support::app::open,
};

fn adyen() -> Bench {
    Bench::new(Profile::adyen(), by_header)
}

#[tokio::test]
async fn every_post_with_a_key_is_protected_and_the_key_is_optional() {
    adyen().assert_covers(&["POST"]).await;
    adyen().assert_key_is_optional(|| post(&[], "1")).await;
}

#[tokio::test]
async fn a_key_has_at_most_64_characters() {
    adyen().assert_longest_key(64).await;
}

#[tokio::test(start_paused = true)]
async fn keys_are_kept_for_7_days() {
    adyen().assert_kept_for(hours(7 * 24)).await;
}

#[tokio::test]
async fn the_first_answer_is_kept_unless_it_says_that_nothing_ran() {
    let kept = [200, 201, 400, 402, 404, 409, 422, 500, 502];
    adyen().assert_keeps(&kept, &[401, 403, 408, 425, 429, 503]).await;
}

#[tokio::test]
async fn the_first_answer_and_its_replay_have_the_key_and_no_other_marker() {
    let bench = adyen();
    let (first, replay) = (bench.pay("k-1", "1").await, bench.pay("k-1", "1").await);
    assert_eq!(bench.control.runs(), 1);
    for answer in [&first, &replay] {
        assert_eq!(answer.header("idempotency-key"), Some("k-1"));
        assert_eq!(answer.header("idempotent-replayed"), None);
    }
    assert_eq!(first, replay);
}

#[tokio::test]
async fn a_request_that_is_still_running_is_a_transient_error_704() {
    let answer = Bench::gated(Profile::adyen(), by_header).while_running("k").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(answer.header("transient-error"), Some("true"));
    let expected = json!({
        "status": 409,
        "errorCode": "704",
        "message": "request already processed or in progress",
        "errorType": "validation",
    });
    assert_eq!(answer.json(), expected);
}

#[tokio::test]
async fn another_body_is_refused_for_good() {
    let answer = adyen().with_another_body().await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(answer.header("transient-error"), None, "sending it again does not help");
    let error = answer.json();
    assert_eq!(
        (&error["status"], &error["errorType"]),
        (&422.into(), &"validation".into())
    );
    assert_eq!(error["errorCode"], "idempotency-key-reused");
}

#[tokio::test]
async fn keys_belong_to_an_authorization_and_a_route_or_to_the_account_that_is_set() {
    adyen().assert_apart_by_authorization_and_route().await;
    let by_account = |layer: tower_idempotency::IdempotencyLayer| {
        layer.scope(|parts| Some(Scope::tenant(parts.headers.get("x-api-key")?.as_bytes())))
    };
    let bench = Bench::with(open(), Profile::adyen(), by_account, by_header);
    for account in ["a", "b"] {
        let request = || post(&[("idempotency-key", "k"), ("x-api-key", account)], "1");
        assert!(bench.runs(request()).await);
        assert!(!bench.runs(request()).await);
    }
}
