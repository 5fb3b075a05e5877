//! Keys from a member of the JSON body.

use axum::{Router, body::Body, routing::post};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use http_body_util::BodyExt;
use tower_idempotency::{BufferedBody, IdempotencyLayer, KeySource, WithoutKey};

use crate::{
    layer,
    support::app::{call, open, pay, request, to_pay},
};

/// Answers say which key they belong to.
fn keyed_by(pointer: &str) -> IdempotencyLayer {
    let key = HeaderName::from_static("x-key");
    layer().1.key(KeySource::body(pointer)).echo_key(key)
}

#[tokio::test]
async fn a_member_of_the_body_is_the_key() {
    let control = open();
    let app = pay(&control, keyed_by("/id"));
    let first = call(&app, to_pay(&[], r#"{"id":"k","amount":5}"#)).await;
    assert_eq!(first.header("x-key"), Some("k"));
    assert_eq!(first.body, r#"run 1 attempt 1: {"id":"k","amount":5}"#);
    assert!(call(&app, to_pay(&[], r#"{"id":"k","amount":5}"#)).await.is_replay());
    let reused = call(&app, to_pay(&[], r#"{"id":"k","amount":6}"#)).await;
    assert_eq!(reused.problem(), "idempotency-key-reused");
    call(&app, to_pay(&[], r#"{"id":"l","amount":5}"#)).await;
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn the_key_may_be_deep_in_the_body_and_have_any_name() {
    for (pointer, body) in [
        ("/order/meta/id", r#"{"order":{"meta":{"id":"k"}}}"#),
        ("/orders/1/id", r#"{"orders":[{"id":"other"},{"id":"k"}]}"#),
        ("/a~1b/~0", r#"{"a/b":{"~":"k"}}"#),
        ("/", r#"{"":"k"}"#),
        ("/0", r#"{"0":"k"}"#),
    ] {
        let answer = call(&pay(&open(), keyed_by(pointer)), to_pay(&[], body)).await;
        assert_eq!(answer.header("x-key"), Some("k"), "{pointer}");
    }
}

#[tokio::test]
async fn a_key_is_what_a_string_says_and_not_how_it_is_written() {
    let control = open();
    let app = pay(&control, keyed_by("/id"));
    call(&app, to_pay(&[], r#"{"id":"k"}"#)).await;
    let other_form = call(&app, to_pay(&[], "{\"id\":\"\\u006b\"}")).await;
    assert_eq!(other_form.problem(), "idempotency-key-reused", "one key, other bytes");
    assert_eq!(control.runs(), 1);
}

#[tokio::test]
async fn a_key_in_a_header_counts_for_nothing_where_the_key_is_in_the_body() {
    let control = open();
    let app = pay(&control, keyed_by("/id"));
    let body = r#"{"id":"k"}"#;
    call(&app, to_pay(&[("idempotency-key", "a")], body)).await;
    assert!(call(&app, to_pay(&[("idempotency-key", "b")], body)).await.is_replay());
    call(&app, to_pay(&[("idempotency-key", "a")], r#"{"id":"l"}"#)).await;
    assert_eq!(control.runs(), 2);
}

const WITHOUT: [&str; 6] = [
    r#"{"amount":5}"#,
    r#"{"id":null}"#,
    r#"{"ID":"k"}"#,
    r#"["id","k"]"#,
    r#""id""#,
    "",
];

#[tokio::test]
async fn a_body_without_the_member_is_refused_where_the_key_is_required() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer.key(KeySource::body("/id")).require_key());
    for body in WITHOUT {
        let answer = call(&app, to_pay(&[], body)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(answer.problem(), "idempotency-key-missing", "{body}");
        assert!(answer.json()["detail"].as_str().unwrap().contains("`/id`"));
    }
    assert_eq!((control.runs(), store.len()), (0, 0));
}

#[tokio::test]
async fn a_body_without_the_member_reaches_the_handler_as_it_was_where_the_key_is_optional() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer.key(KeySource::body("/id")));
    for (run, body) in (1..).zip(WITHOUT) {
        let answer = call(&app, to_pay(&[], body)).await;
        assert_eq!(answer.body, format!("run {run} attempt 0: {body}"));
    }
    assert_eq!((control.runs(), store.len()), (WITHOUT.len(), 0));
}

/// Answers with the body that it got, and with the value of one of its trailers.
fn reflecting(layer: IdempotencyLayer) -> Router {
    let handler = async |request: Request<Body>| {
        let collected = request.into_body().collect().await.unwrap();
        let trailer = collected.trailers().map(|trailers| trailers["x-sum"].clone());
        (trailer.map(|sum| [("x-sum", sum)]), collected.to_bytes())
    };
    Router::new().route("/pay", post(handler)).layer(layer)
}

#[tokio::test]
async fn frames_and_trailers_of_a_body_that_was_read_for_a_key_reach_the_handler() {
    let (store, layer) = layer();
    let app = reflecting(layer.key(KeySource::body("/id")));
    let trailers = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from_static("7"))]);
    for text in [r#"{"amount":5}"#, r#"{"id":"k"}"#, ""] {
        let body = BufferedBody::new(Bytes::from(text), Some(trailers.clone()));
        let answer = call(&app, to_pay(&[], Body::new(body))).await;
        assert_eq!(answer.body, text);
        assert_eq!(answer.header("x-sum"), Some("7"), "{text:?}");
    }
    let frames = ["{\"am", "ount", "\":5}"].map(Ok::<_, std::convert::Infallible>);
    let chunked = Body::from_stream(futures_util::stream::iter(frames));
    assert_eq!(call(&app, to_pay(&[], chunked)).await.body, r#"{"amount":5}"#);
    assert_eq!(store.len(), 1, "only what had a key is kept");
}

#[tokio::test]
async fn a_body_that_is_not_json_in_one_way_only_is_refused_whether_the_key_is_required_or_not() {
    for without_key in [WithoutKey::Pass, WithoutKey::Refuse, WithoutKey::DeriveAndReplay] {
        let (store, layer) = layer();
        let control = open();
        let app = pay(&control, layer.key(KeySource::body("/id")).without_key(without_key));
        let bodies: [&[u8]; 6] = [
            b"id=k",
            br#"{"id":"k""#,
            br#"{"id":"k"} {}"#,
            br#"{"id":"k","id":"l"}"#,
            br#"{"id":"k","other":{"a":1,"a":1}}"#,
            b"{\"id\":\"\xff\"}",
        ];
        for body in bodies {
            let answer = call(&app, to_pay(&[], body)).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST);
            assert_eq!(answer.problem(), "request-body-unreadable", "{body:?}");
        }
        assert_eq!((control.runs(), store.len()), (0, 0), "{without_key:?}");
    }
}

#[tokio::test]
async fn a_member_that_is_not_a_usable_string_is_refused_and_never_taken_for_none() {
    let (store, layer) = layer();
    let control = open();
    let layer = layer.key(KeySource::body("/id")).max_key_length(4).optional_key();
    let app = pay(&control, layer);
    for value in [
        "7",
        "true",
        "false",
        "{}",
        "[]",
        r#"["k"]"#,
        r#""""#,
        r#""12345""#,
        r#""a b""#,
        r#""\u00e4""#,
    ] {
        let answer = call(&app, to_pay(&[], format!(r#"{{"id":{value}}}"#))).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{value}");
        assert_eq!(answer.problem(), "idempotency-key-invalid", "{value}");
    }
    assert_eq!((control.runs(), store.len()), (0, 0));
    assert_eq!(
        call(&app, to_pay(&[], r#"{"id":"1234"}"#)).await.status,
        StatusCode::CREATED
    );
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_since_it_is_read_for_a_key() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer.key(KeySource::body("/id")).max_request_body(16));
    let whole = r#"{"amount":"12345"}"#;
    let chunked = || Body::from_stream(futures_util::stream::iter([Ok::<_, std::convert::Infallible>(whole)]));
    for body in [Body::from(whole), chunked()] {
        let answer = call(&app, to_pay(&[], body)).await;
        assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(answer.problem(), "request-body-too-large");
    }
    assert_eq!((control.runs(), store.len()), (0, 0));
    let fits = call(&app, to_pay(&[], r#"{"amount":"123"}"#)).await;
    assert_eq!(fits.body, r#"run 1 attempt 0: {"amount":"123"}"#);
}

#[tokio::test]
async fn the_body_of_a_method_that_is_not_covered_is_not_looked_at() {
    let control = open();
    let app = crate::support::app::anywhere(&control, keyed_by("/id").max_request_body(4));
    let answer = call(&app, request("PUT", "/pay", &[], "not JSON")).await;
    assert_eq!(answer.body, "run 1 attempt 0: not JSON");
}

#[test]
fn what_is_not_a_pointer_to_one_member_is_refused_when_the_source_is_made() {
    for pointer in ["", "id", "/units/*/id", "/a~2"] {
        assert!(
            std::panic::catch_unwind(|| KeySource::body(pointer)).is_err(),
            "{pointer:?}"
        );
    }
}
