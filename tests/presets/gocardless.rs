//! GoCardless.

use axum::response::IntoResponse;
use http::StatusCode;
use serde_json::{Value, json};
use tower_idempotency::{IdempotencyLayer, Keep, MemoryStore, Profile, Statuses};

use crate::{
    bench::{Bench, by_header, hours, post},
    support::app::{anywhere_answering, call, open},
};

fn gocardless() -> Bench {
    Bench::new(Profile::gocardless(), by_header)
}

#[tokio::test]
async fn every_post_with_a_key_is_protected_and_the_key_is_optional() {
    gocardless().assert_covers(&["POST"]).await;
    gocardless().assert_key_is_optional(|| post(&[], "1")).await;
}

#[tokio::test]
async fn a_key_has_at_most_255_characters() {
    gocardless().assert_longest_key(255).await;
}

#[tokio::test(start_paused = true)]
async fn keys_are_kept_for_30_days() {
    gocardless().assert_kept_for(hours(30 * 24)).await;
}

#[tokio::test]
async fn what_created_a_resource_is_kept_and_a_failed_create_frees_its_key() {
    gocardless()
        .assert_keeps(&[200, 201], &[400, 404, 409, 422, 429, 500, 503])
        .await;
}

#[tokio::test]
async fn a_duplicate_is_a_conflict_with_a_link_to_the_resource() {
    let bench = gocardless();
    let first = bench.pay("k", "1").await;
    assert_eq!(
        (first.status, first.json()),
        (StatusCode::CREATED, json!({"payments": {"id": "PM1"}}))
    );
    for _ in 0..2 {
        let conflict = bench.pay("k", "1").await;
        assert_eq!(conflict.status, StatusCode::CONFLICT);
        assert_eq!(conflict.header("content-type"), Some("application/json"));
        let message = "A resource has already been created with this idempotency key";
        let expected = json!({"error": {
            "code": 409,
            "type": "invalid_state",
            "message": message,
            "errors": [{
                "reason": "idempotent_creation_conflict",
                "message": message,
                "links": {"conflicting_resource_id": "PM1"},
            }],
        }});
        assert_eq!(conflict.json(), expected);
    }
    assert_eq!(bench.control.runs(), 1);
}

#[tokio::test]
async fn a_kept_failure_created_no_resource_and_is_answered_as_it_was() {
    let by_the_handler = gocardless();
    by_the_handler.says(402, Some(Keep::Answer));
    let keeps_all = |layer: IdempotencyLayer| layer.store_statuses(Statuses::default());
    let by_the_layer = Bench::with(open(), Profile::gocardless(), keeps_all, by_header);
    by_the_layer.says(422, None);
    for bench in [by_the_handler, by_the_layer] {
        let first = bench.pay("k", "1").await;
        assert!(first.status.is_client_error());
        let again = bench.pay("k", "1").await;
        assert_eq!((again.status, &again.body), (first.status, &first.body));
        assert!(again.is_replay());
        assert_eq!(bench.control.runs(), 1);
    }
}

#[tokio::test]
async fn the_id_is_in_the_answers_only_resource_or_in_the_answer_itself() {
    for (answer, id) in [
        (r#"{"id":"PM1"}"#, json!("PM1")),
        (r#"{"id":"PM1","customer":{"id":"CU1"}}"#, json!("PM1")),
        (r#"{"mandates":{"id":"MD1","links":{"id":"CU1"}}}"#, json!("MD1")),
        (r#"{"payments":{"amount":1}}"#, Value::Null),
        ("created", Value::Null),
        ("", Value::Null),
        ("[]", Value::Null),
    ] {
        let layer = IdempotencyLayer::new(MemoryStore::new()).profile(Profile::gocardless());
        let app = anywhere_answering(&open(), layer, move |_, _, _| answer.into_response());
        call(&app, by_header("k", "1")).await;
        let conflict = call(&app, by_header("k", "1")).await;
        assert_eq!(conflict.status, StatusCode::CONFLICT);
        let links = &conflict.json()["error"]["errors"][0]["links"];
        assert_eq!(links, &json!({"conflicting_resource_id": id}), "{answer}");
    }
}

#[tokio::test]
async fn another_body_is_refused_in_the_same_form_and_without_a_link() {
    let answer = gocardless().with_another_body().await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
    let error = &answer.json()["error"];
    assert_eq!((&error["code"], &error["type"]), (&422.into(), &"invalid_state".into()));
    assert_eq!(error["errors"][0]["reason"], "idempotency-key-reused");
    assert!(error["errors"][0].get("links").is_none());
    assert_eq!(error["request_id"].as_str().unwrap().len(), 32);
}

#[tokio::test]
async fn a_request_that_is_still_running_is_a_conflict_without_a_link() {
    let answer = Bench::gated(Profile::gocardless(), by_header).while_running("k").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    let error = &answer.json()["error"]["errors"][0];
    assert_eq!(error["reason"], "request-in-progress");
    assert!(error.get("links").is_none());
}

#[tokio::test]
async fn keys_belong_to_an_authorization_and_a_route() {
    gocardless().assert_apart_by_authorization_and_route().await;
}
