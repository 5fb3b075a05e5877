//! Several keys in one body, claimed together.

use http::StatusCode;
use tower_idempotency::{IdempotencyLayer, KeySource, MemoryStore};

use crate::{
    layer,
    support::app::{answering, call, gated, open, pay, spawn, to_pay},
};

fn orders() -> (MemoryStore, IdempotencyLayer) {
    let (store, layer) = layer();
    let keys = KeySource::body("/id").and_each("/units/*/id");
    (store, layer.key(keys).require_key())
}

#[tokio::test]
async fn a_unit_that_another_order_holds_is_refused_and_leaves_nothing_behind() {
    let (store, layer) = orders();
    let control = open();
    let app = pay(&control, layer);
    let first = r#"{"id":"a","units":[{"id":"u1"},{"id":"u2"}]}"#;
    call(&app, to_pay(&[], first)).await;
    assert_eq!(store.len(), 3, "the order and its units");
    let other = call(&app, to_pay(&[], r#"{"id":"b","units":[{"id":"u3"},{"id":"u2"}]}"#)).await;
    assert_eq!(other.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(other.problem(), "idempotency-key-reused");
    assert_eq!((control.runs(), store.len()), (1, 3), "neither b nor u3 is taken");
    let free = call(&app, to_pay(&[], r#"{"id":"b","units":[{"id":"u3"}]}"#)).await;
    assert_eq!(free.status, StatusCode::CREATED);
    assert!(call(&app, to_pay(&[], first)).await.is_replay());
}

#[tokio::test]
async fn a_unit_that_a_running_order_holds_is_refused() {
    let (_, layer) = orders();
    let control = gated();
    let app = pay(&control, layer);
    let first = spawn(&app, to_pay(&[], r#"{"id":"a","units":[{"id":"u1"}]}"#));
    control.entered().await;
    let other = call(&app, to_pay(&[], r#"{"id":"b","units":[{"id":"u1"}]}"#)).await;
    assert_eq!(other.problem(), "idempotency-key-reused");
    control.let_go();
    assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
}

#[tokio::test]
async fn the_units_of_an_order_that_did_not_execute_are_free_with_it() {
    let (store, layer) = orders();
    let control = open();
    let app = answering(&control, layer, |run, _, _| match run {
        1 => axum::response::IntoResponse::into_response(StatusCode::SERVICE_UNAVAILABLE),
        _ => axum::response::IntoResponse::into_response("done"),
    });
    call(&app, to_pay(&[], r#"{"id":"a","units":[{"id":"u1"}]}"#)).await;
    assert!(store.is_empty());
    let other = call(&app, to_pay(&[], r#"{"id":"b","units":[{"id":"u1"}]}"#)).await;
    assert_eq!(other.body, "done");
}

#[tokio::test]
async fn two_equal_units_in_one_request_are_an_error_of_their_own_and_take_nothing() {
    let (store, layer) = orders();
    let control = open();
    let app = pay(&control, layer);
    let answer = call(
        &app,
        to_pay(&[], r#"{"id":"a","units":[{"id":"u"},{"id":"v"},{"id":"u"}]}"#),
    )
    .await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.problem(), "idempotency-key-repeated");
    assert_eq!((control.runs(), store.len()), (0, 0));
    let same_name = r#"{"id":"a","units":[{"id":"a"}]}"#;
    assert_eq!(
        call(&app, to_pay(&[], same_name)).await.status,
        StatusCode::CREATED,
        "an order and its unit may have one name"
    );
}

#[tokio::test]
async fn a_unit_without_a_usable_key_is_refused_and_takes_nothing() {
    let (store, layer) = orders();
    let control = open();
    let app = pay(&control, layer.max_keys(2));
    for (units, problem) in [
        (r#"[{"id":"u"},{}]"#, "idempotency-key-missing"),
        (r#"[{"id":null}]"#, "idempotency-key-missing"),
        (r#"["u"]"#, "idempotency-key-missing"),
        (r#"{"id":"u"}"#, "idempotency-key-missing"),
        (r#"[{"id":7}]"#, "idempotency-key-invalid"),
        (r#"[{"id":""}]"#, "idempotency-key-invalid"),
        (r#"[{"id":"u"},{"id":"v"},{"id":"w"}]"#, "idempotency-key-invalid"),
    ] {
        let answer = call(&app, to_pay(&[], format!(r#"{{"id":"a","units":{units}}}"#))).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{units}");
        assert_eq!(answer.problem(), problem, "{units}");
    }
    assert_eq!((control.runs(), store.len()), (0, 0));
    for (id, units) in [("a", "null"), ("b", "[]")] {
        let answer = call(&app, to_pay(&[], format!(r#"{{"id":"{id}","units":{units}}}"#))).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{units}: no units need no keys");
    }
}

#[tokio::test]
async fn the_operations_own_key_may_be_in_a_header_and_the_others_in_the_body() {
    let (store, layer) = layer();
    let control = open();
    let keys = KeySource::default().and_each("/units/*/id");
    let app = pay(&control, layer.key(keys));
    call(&app, to_pay(&[("idempotency-key", "a")], r#"{"units":[{"id":"u"}]}"#)).await;
    assert_eq!(store.len(), 2);
    let other = call(&app, to_pay(&[("idempotency-key", "b")], r#"{"units":[{"id":"u"}]}"#)).await;
    assert_eq!(other.problem(), "idempotency-key-reused");
    assert_eq!((control.runs(), store.len()), (1, 2));
}
