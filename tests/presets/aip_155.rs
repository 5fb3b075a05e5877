//! Google AIP-155.

use axum::body::Body;
use http::{Request, StatusCode};
use serde_json::json;
use tower_idempotency::{IdempotencyLayer, Keep, MemoryStore, Profile, StoreErrorKind};

use crate::{
    bench::{Bench, hours, post},
    support::{
        app::{anywhere, call, open, spawn},
        faulty::{Fault, FaultyStore, Op},
    },
};

const ID: &str = "0a4c5de0-0000-4000-8000-00000000000a";

fn by_member(id: &str, amount: &str) -> Request<Body> {
    post(&[], format!(r#"{{"request_id":"{id}","amount":{amount}}}"#))
}

fn aip() -> Bench {
    Bench::new(Profile::aip_155(), by_member)
}

#[tokio::test]
async fn every_method_with_an_effect_is_protected_by_an_optional_member_of_its_body() {
    aip().assert_covers(&["POST", "PUT", "PATCH", "DELETE"]).await;
    aip().assert_replayed(ID).await;
    for body in [r#"{"amount":1}"#, r#"{"request_id":null}"#, ""] {
        aip().assert_key_is_optional(|| post(&[], body)).await;
    }
}

#[tokio::test]
async fn a_request_id_is_a_uuid_of_36_characters() {
    let bench = aip();
    let long = format!("{ID}0");
    for id in ["", "k", "0a4c5de000004000800000000000000a", &long] {
        let answer = bench.pay(id, "1").await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{id}");
        assert_eq!(answer.json()["error"]["status"], "INVALID_ARGUMENT");
    }
    assert_eq!(
        bench.send(post(&[], r#"{"request_id":7}"#)).await.status,
        StatusCode::BAD_REQUEST
    );
    assert_eq!(bench.control.runs(), 0);
}

#[tokio::test]
async fn a_body_that_is_not_json_is_refused_since_it_may_have_an_id() {
    let bench = aip();
    let answer = bench.send(post(&[], "request_id=k")).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.json()["error"]["status"], "INVALID_ARGUMENT");
    assert_eq!(bench.control.runs(), 0);
}

#[tokio::test(start_paused = true)]
async fn request_ids_are_kept_for_24_hours() {
    aip().assert_kept_for(hours(24)).await;
}

#[tokio::test]
async fn successes_are_kept_and_a_failed_request_frees_its_id() {
    aip()
        .assert_keeps(&[200, 201, 204], &[400, 404, 409, 422, 429, 500, 503])
        .await;
}

#[tokio::test]
async fn another_body_is_an_invalid_argument() {
    let answer = aip().with_another_body().await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let expected = json!({"error": {
        "code": 400,
        "message": "Idempotency key was used for a different request",
        "status": "INVALID_ARGUMENT",
    }});
    assert_eq!(answer.json(), expected);
}

#[tokio::test]
async fn a_request_that_is_still_running_is_aborted() {
    let answer = Bench::gated(Profile::aip_155(), by_member).while_running(ID).await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    let error = &answer.json()["error"];
    assert_eq!((&error["code"], &error["status"]), (&409.into(), &"ABORTED".into()));
}

#[tokio::test]
async fn what_cannot_be_answered_any_more_has_codes_of_its_own() {
    let not_kept = aip();
    not_kept.says(201, Some(Keep::OnlyTheFact));
    assert_eq!(not_kept.pay(ID, "1").await.status, StatusCode::CREATED);
    assert_eq!(not_kept.pay(ID, "1").await.json()["error"]["status"], "ALREADY_EXISTS");
    let store = FaultyStore::default();
    let app = anywhere(
        &open(),
        IdempotencyLayer::new(store.clone()).profile(Profile::aip_155()),
    );
    store.fail(Op::Begin, [Fault::Error(StoreErrorKind::Corrupt)]);
    let unreadable = call(&app, by_member(ID, "1")).await;
    assert_eq!(unreadable.json()["error"]["status"], "DATA_LOSS");
    store.fail(Op::Complete, [Fault::Panic]);
    assert!(spawn(&app, by_member(ID, "1")).await.unwrap_err().is_panic());
    tokio::task::yield_now().await;
    let unknown = call(&app, by_member(ID, "1")).await;
    assert_eq!(unknown.json()["error"]["status"], "FAILED_PRECONDITION");
    assert_eq!(format!("{:?}", Profile::aip_155()), r#"Profile("AIP-155")"#);
}

#[tokio::test]
async fn a_store_without_room_and_a_body_that_is_too_large_have_codes_of_their_own() {
    let full = MemoryStore::builder().max_records(0).build();
    let app = anywhere(&open(), IdempotencyLayer::new(full).profile(Profile::aip_155()));
    let answer = call(&app, by_member(ID, "1")).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.json()["error"]["status"], "UNAVAILABLE");
    let small = |layer: IdempotencyLayer| layer.max_request_body(4);
    let answer = Bench::with(open(), Profile::aip_155(), small, by_member)
        .pay(ID, "1")
        .await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(answer.json()["error"]["status"], "RESOURCE_EXHAUSTED");
}

#[tokio::test]
async fn request_ids_belong_to_an_authorization_and_a_route() {
    aip().assert_apart_by_authorization_and_route().await;
}
