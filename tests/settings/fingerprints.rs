//! What makes two requests with one key the same.

use axum::Router;
use http::StatusCode;
use sha2::{Digest, Sha256};
use tower_idempotency::{Fingerprinter, IdempotencyLayer, MemoryStore};

use crate::{
    layer,
    support::{
        app::{anywhere, call, open, request, to_pay},
        http::Answer,
    },
};

async fn send(app: &Router, key: &str, body: &str) -> Answer {
    call(app, to_pay(&[("idempotency-key", key)], body.to_owned())).await
}

fn app(fingerprinter: Fingerprinter) -> (MemoryStore, Router) {
    let (store, layer) = layer();
    (store, anywhere(&open(), layer.fingerprint(fingerprinter)))
}

#[tokio::test]
async fn the_same_json_value_is_the_same_request_whatever_its_form() {
    let (_, app) = app(Fingerprinter::canonical_json());
    let first = r#"{"amount":500,"items":[{"no":1.5,"name":"x"},null],"big":12345678901234567890}"#;
    send(&app, "k", first).await;
    for again in [
        r#"{"items":[{"name":"x","no":1.5},null],"big":12345678901234567890,"amount":500}"#,
        concat!(
            "{\n  \"amount\" : 5e2,\t\"items\": [ {\"no\":1.50, \"name\":\"\\u0078\"}, null ],\r\n",
            "\"big\":12345678901234567890.0}"
        ),
        r#"{"amount":500.00,"items":[{"no":15e-1,"name":"x"},null],"big":1.2345678901234567890e19}"#,
    ] {
        let replay = send(&app, "k", again).await;
        assert!(replay.is_replay(), "{again}: {replay:?}");
        assert_eq!(replay.body, format!("run 1 attempt 1: {first}"));
    }
}

#[tokio::test]
async fn another_json_value_is_another_request_however_small_the_difference() {
    let (_, app) = app(Fingerprinter::canonical_json());
    for (at, (one, other)) in [
        (r#"{"a":[1,2]}"#, r#"{"a":[2,1]}"#),
        (r#"{"a":1}"#, r#"{"a":"1"}"#),
        (r#"{"a":null}"#, "{}"),
        (r#"{"a":{}}"#, r#"{"a":[]}"#),
        (r#"{"a":9007199254740993}"#, r#"{"a":9007199254740992}"#),
        (r#"{"a":0.1}"#, r#"{"a":0.10000000000000001}"#),
        (r#"{"a":1e-400}"#, r#"{"a":0}"#),
        (r#"{"a":"x"}"#, r#"{"a":"X"}"#),
        ("{\"a\":\"\u{e9}\"}", "{\"a\":\"e\u{301}\"}"),
        (r#"{"a":""}"#, r#"{"A":""}"#),
        ("null", ""),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("k{at}");
        assert_eq!(send(&app, &key, one).await.status, StatusCode::CREATED);
        let refused = send(&app, &key, other).await;
        assert_eq!(refused.problem(), "idempotency-key-reused", "{one} and {other}");
        assert!(send(&app, &key, one).await.is_replay());
    }
}

#[tokio::test]
async fn the_same_json_at_another_path_or_by_another_method_is_another_request() {
    for fingerprinter in [Fingerprinter::canonical_json(), Fingerprinter::json_members(["/a"])] {
        let (_, layer) = layer();
        let app = anywhere(&open(), layer.fingerprint(fingerprinter).operation("one"));
        let key = [("idempotency-key", "k")];
        call(&app, request("POST", "/pay", &key, r#"{"a":1}"#)).await;
        for (method, path) in [("PATCH", "/pay"), ("POST", "/refund"), ("POST", "/pay?a=1")] {
            let answer = call(&app, request(method, path, &key, r#"{"a":1}"#)).await;
            assert_eq!(answer.problem(), "idempotency-key-reused", "{method} {path}");
        }
    }
}

#[tokio::test]
async fn a_body_that_is_no_json_or_names_a_member_twice_is_refused_where_json_is_compared() {
    for fingerprinter in [Fingerprinter::canonical_json(), Fingerprinter::json_members(["/a"])] {
        let (store, app) = app(fingerprinter);
        for body in [
            "a=1",
            r#"{"a":1"#,
            r#"{"a":1,"a":1}"#,
            r#"{"a":{"b":1,"\u0062":2}}"#,
            "1e999",
        ] {
            let answer = send(&app, "k", body).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST);
            assert_eq!(answer.problem(), "request-body-unreadable", "{body}");
        }
        assert!(store.is_empty());
        assert_eq!(
            send(&app, "k", "").await.status,
            StatusCode::CREATED,
            "no body is a value"
        );
    }
}

#[tokio::test]
async fn only_the_chosen_members_make_another_request() {
    let (_, app) = app(Fingerprinter::json_members([
        "/order/no",
        "/order/amount",
        "/items/*/id",
    ]));
    let first = r#"{"order":{"no":"i-1","amount":500},"items":[{"id":1},{"id":2}],"note":"a"}"#;
    send(&app, "k", first).await;
    for again in [
        r#"{"order":{"no":"i-1","amount":500},"items":[{"id":1},{"id":2}],"note":"b"}"#,
        r#"{"items":[{"id":1,"x":1},{"id":2.0}],"order":{"amount":5e2,"no":"i-1","at":"now"}}"#,
    ] {
        assert!(send(&app, "k", again).await.is_replay(), "{again}");
    }
    for other in [
        r#"{"order":{"no":"i-2","amount":500},"items":[{"id":1},{"id":2}]}"#,
        r#"{"order":{"no":"i-1","amount":501},"items":[{"id":1},{"id":2}]}"#,
        r#"{"order":{"no":"i-1"},"items":[{"id":1},{"id":2}]}"#,
        r#"{"order":{"no":"i-1","amount":null},"items":[{"id":1},{"id":2}]}"#,
        r#"{"order":{"no":"i-1","amount":"500"},"items":[{"id":1},{"id":2}]}"#,
        r#"{"order":{"no":"i-1","amount":500},"items":[{"id":2},{"id":1}]}"#,
        r#"{"order":{"no":"i-1","amount":500},"items":[{"id":1}]}"#,
        "",
    ] {
        assert_eq!(
            send(&app, "k", other).await.problem(),
            "idempotency-key-reused",
            "{other}"
        );
    }
}

#[tokio::test]
async fn without_a_fingerprint_the_key_alone_counts() {
    let (_, app) = app(Fingerprinter::none());
    send(&app, "k", "a").await;
    let replay = send(&app, "k", "b").await;
    assert!(replay.is_replay());
    assert_eq!(replay.body, "run 1 attempt 1: a");
}

#[tokio::test]
async fn a_closure_may_make_the_fingerprint() {
    let lower = |_: &http::request::Parts, body: &bytes::Bytes| Sha256::digest(body.to_ascii_lowercase()).into();
    let (_, app) = app(Fingerprinter::custom(Fingerprinter::FIRST_CUSTOM_ALGORITHM, lower));
    send(&app, "k", "a").await;
    assert!(send(&app, "k", "A").await.is_replay());
    assert_eq!(send(&app, "k", "b").await.problem(), "idempotency-key-reused");
}

/// A layer with another fingerprint over the same records.
fn later(store: &MemoryStore, fingerprinter: Fingerprinter) -> Router {
    anywhere(&open(), IdempotencyLayer::new(store.clone()).fingerprint(fingerprinter))
}

#[tokio::test]
async fn records_from_before_the_fingerprint_was_changed_are_compared_as_they_were_made() {
    let (store, whole) = app(Fingerprinter::whole_request());
    send(&whole, "whole", r#"{"a":1}"#).await;
    let canonical = later(&store, Fingerprinter::canonical_json());
    send(&canonical, "canonical", r#"{"a":1}"#).await;
    let none = later(&store, Fingerprinter::none());
    send(&none, "none", r#"{"a":1}"#).await;
    for app in [whole, canonical, none] {
        assert!(send(&app, "whole", r#"{"a":1}"#).await.is_replay());
        assert_eq!(
            send(&app, "whole", r#"{"a": 1}"#).await.problem(),
            "idempotency-key-reused"
        );
        assert!(send(&app, "canonical", r#"{"a": 1.0}"#).await.is_replay());
        assert_eq!(
            send(&app, "canonical", r#"{"a":2}"#).await.problem(),
            "idempotency-key-reused"
        );
        assert!(send(&app, "none", r#"{"b":2}"#).await.is_replay());
    }
}

#[tokio::test]
async fn a_record_whose_chosen_members_nobody_knows_any_more_is_never_run_again() {
    let (store, chosen) = app(Fingerprinter::json_members(["/a"]));
    send(&chosen, "k", r#"{"a":1}"#).await;
    for (fingerprinter, status) in [
        (Fingerprinter::whole_request(), StatusCode::SERVICE_UNAVAILABLE),
        (Fingerprinter::json_members(["/b"]), StatusCode::UNPROCESSABLE_ENTITY),
    ] {
        let answer = send(&later(&store, fingerprinter), "k", r#"{"a":1}"#).await;
        assert_eq!(answer.status, status);
    }
    assert!(send(&chosen, "k", r#"{"a":1,"b":2}"#).await.is_replay());
}
