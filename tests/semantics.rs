//! One request, in order: a sentence for each situation of the contract.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use axum::{body::Body, response::IntoResponse};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode};
use http_body_util::BodyExt;
use support::app::{answering, call, gated, keyed, open, pay, spawn};
use tokio::time::advance;
use tower::ServiceExt;
use tower_idempotency::{
    Concurrent, Fingerprinter, IdempotencyLayer, KeyFormat, KeySource, MemoryStore, Retention, Scope,
};

fn layer() -> (MemoryStore, IdempotencyLayer) {
    let store = MemoryStore::new();
    (store.clone(), IdempotencyLayer::new(store))
}

fn request(method: &str, path: &str, headers: &[(&'static str, &'static str)], body: &'static str) -> Request<Body> {
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .body(Body::from(body))
        .unwrap();
    for (name, value) in headers {
        request.headers_mut().append(*name, HeaderValue::from_static(value));
    }
    request
}

// ---- row 1

#[tokio::test]
async fn a_request_without_a_key_passes_when_the_key_is_optional() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer);
    for run in 1..=2 {
        let answer = call(&app, request("POST", "/pay", &[], "a")).await;
        assert_eq!(answer.body, format!("run {run} attempt 0: a"));
    }
    assert!(store.is_empty());
}

#[tokio::test]
async fn a_method_that_is_not_covered_passes_with_its_key() {
    let (store, layer) = layer();
    let control = open();
    let handler = {
        let control = control.clone();
        async move || control.pass().await.to_string()
    };
    let app = axum::Router::new()
        .route("/pay", axum::routing::any(handler))
        .layer(layer);
    for (method, runs) in [("GET", 2), ("PUT", 2), ("DELETE", 2), ("POST", 1), ("PATCH", 1)] {
        let before = control.runs();
        for _ in 0..2 {
            call(&app, request(method, "/pay", &[("idempotency-key", method)], "")).await;
        }
        assert_eq!(control.runs() - before, runs, "{method}");
    }
    assert_eq!(store.len(), 2);
}

#[tokio::test]
async fn the_covered_methods_are_a_setting() {
    let (_, layer) = layer();
    let control = open();
    let app = pay(&control, layer.methods([Method::PUT]));
    for _ in 0..2 {
        call(&app, keyed("k", "a")).await;
    }
    assert_eq!(control.runs(), 2, "POST is not covered any more");
}

// ---- rows 2 and 3

#[tokio::test]
async fn a_missing_key_is_refused_where_it_is_required() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer.require_key());
    let answer = call(&app, request("POST", "/pay", &[], "a")).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.problem(), "idempotency-key-missing");
    assert!(answer.json()["detail"].as_str().unwrap().contains("idempotency-key"));
    assert_eq!((control.runs(), store.len()), (0, 0));
}

#[tokio::test]
async fn an_unusable_key_is_refused_before_anything_runs_or_is_stored() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer);
    let (long, huge) = ("k".repeat(256), "k".repeat(500_000));
    let values: &[&[u8]] = &[
        b"",
        b"\"\"",
        long.as_bytes(),
        huge.as_bytes(),
        b"\xff\xfe",
        "schl\u{fc}ssel".as_bytes(),
        b"a, b",
        b"a b",
        b"\"unclosed",
        b"\"a\";x=1",
        b"a\tb",
    ];
    for value in values {
        let mut request = keyed("k", "a");
        request
            .headers_mut()
            .insert("idempotency-key", HeaderValue::from_bytes(value).unwrap());
        let answer = call(&app, request).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert_eq!(answer.problem(), "idempotency-key-invalid");
        assert!(answer.json()["detail"].is_string(), "it says which rule was broken");
    }
    let twice = request(
        "POST",
        "/pay",
        &[("idempotency-key", "a"), ("idempotency-key", "a")],
        "a",
    );
    assert_eq!(call(&app, twice).await.problem(), "idempotency-key-invalid");
    assert_eq!((control.runs(), store.len()), (0, 0));
}

#[tokio::test]
async fn a_problem_never_contains_the_key() {
    let (_, layer) = layer();
    let app = pay(&open(), layer);
    let answer = call(&app, keyed("secret of a customer", "a")).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(!String::from_utf8_lossy(&answer.body).contains("secret"));
}

#[tokio::test]
async fn keys_of_every_allowed_length_are_taken() {
    for (limit, length, status) in [
        (255, 1, 201),
        (255, 255, 201),
        (255, 256, 400),
        (64, 64, 201),
        (64, 65, 400),
    ] {
        let (_, layer) = layer();
        let app = pay(&open(), layer.max_key_length(limit));
        let answer = call(&app, keyed(&"k".repeat(length), "a")).await;
        assert_eq!(answer.status.as_u16(), status, "{length} of {limit}");
    }
}

#[tokio::test]
async fn a_quoted_key_and_a_bare_one_are_the_same_key_unless_only_quoted_ones_are_taken() {
    let (_, layer) = layer();
    let control = open();
    let app = pay(&control, layer.clone());
    call(&app, keyed("8e03", "a")).await;
    assert!(call(&app, keyed("\"8e03\"", "a")).await.is_replay());
    let strict = pay(&control, layer.key_format(KeyFormat::Strict));
    assert_eq!(
        call(&strict, keyed("8e03", "a")).await.problem(),
        "idempotency-key-invalid"
    );
    assert!(call(&strict, keyed("\"8e03\"", "a")).await.is_replay());
    assert_eq!(control.runs(), 1);
}

#[tokio::test]
async fn the_key_may_come_from_several_headers_or_from_the_parts() {
    let (_, layer) = layer();
    let control = open();
    let app = pay(
        &control,
        layer.clone().key(KeySource::headers(["x-request-id", "request-id"])),
    );
    call(&app, request("POST", "/pay", &[("request-id", "k")], "a")).await;
    assert!(
        call(&app, request("POST", "/pay", &[("x-request-id", "k")], "a"))
            .await
            .is_replay()
    );
    let from_query = KeySource::parts(|parts| parts.uri.query().map(str::to_owned));
    let app = pay(
        &control,
        layer.key(from_query).fingerprint(Fingerprinter::whole_request()),
    );
    call(&app, request("POST", "/pay?q", &[], "a")).await;
    assert!(call(&app, request("POST", "/pay?q", &[], "a")).await.is_replay());
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn a_key_rule_of_ones_own_replaces_the_characters_that_are_taken() {
    let (_, layer) = layer();
    let rule = |key: &str| {
        if key.len() == 4 {
            Ok(())
        } else {
            Err("a key has four characters here")
        }
    };
    let app = pay(&open(), layer.key_rule(rule));
    assert_eq!(call(&app, keyed("abcd", "a")).await.status, StatusCode::CREATED);
    let refused = call(&app, keyed("abc", "a")).await;
    assert_eq!(refused.json()["detail"], "a key has four characters here");
}

// ---- rows 6 and 7

#[tokio::test]
async fn the_first_request_runs_and_its_duplicates_get_its_answer() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer.clone());
    let first = call(&app, keyed("k", "a")).await;
    assert_eq!(first.status, StatusCode::CREATED);
    assert_eq!(first.body, "run 1 attempt 1: a");
    assert!(!first.is_replay());
    for _ in 0..3 {
        let replay = call(&app, keyed("k", "a")).await;
        assert!(replay.is_replay());
        assert_eq!((replay.status, &replay.body), (first.status, &first.body));
        let mut headers = replay.headers.clone();
        headers.remove("idempotent-replayed");
        assert_eq!(headers, first.headers);
    }
    assert_eq!((control.runs(), store.len()), (1, 1));
    let counters = layer.counters();
    assert_eq!((counters.executed, counters.replayed, counters.refused), (1, 3, 0));
}

#[tokio::test]
async fn the_replay_marker_is_a_setting() {
    let (_, layer) = layer();
    let marker = (HeaderName::from_static("x-replay"), HeaderValue::from_static("yes"));
    let app = pay(&open(), layer.clone().replay_marker(Some(marker)));
    call(&app, keyed("k", "a")).await;
    let replay = call(&app, keyed("k", "a")).await;
    assert_eq!(replay.header("x-replay"), Some("yes"));
    assert_eq!(replay.header("idempotent-replayed"), None);
    let unmarked = pay(&open(), layer.replay_marker(None));
    let replay = call(&unmarked, keyed("k", "a")).await;
    assert_eq!(replay.header("idempotent-replayed"), None);
    assert_eq!(replay.body, "run 1 attempt 1: a");
}

#[tokio::test]
async fn a_replay_may_be_kept_out_of_shared_caches() {
    let (_, layer) = layer();
    let answer = |_, _, _| ([("cache-control", "public, max-age=60")], "paid").into_response();
    let app = answering(&open(), layer.clone(), answer);
    call(&app, keyed("k", "a")).await;
    assert_eq!(
        call(&app, keyed("k", "a")).await.header("cache-control"),
        Some("public, max-age=60")
    );
    let app = answering(&open(), layer.replay_no_store(), answer);
    assert_eq!(
        call(&app, keyed("k", "a")).await.header("cache-control"),
        Some("no-store")
    );
}

#[tokio::test]
async fn which_fields_are_dropped_from_what_is_stored_is_a_setting() {
    let (_, layer) = layer();
    let answer = |_, _, _| ([("set-cookie", "a=b"), ("x-token", "secret")], "paid").into_response();
    let app = answering(
        &open(),
        layer
            .drop_header(HeaderName::from_static("x-token"))
            .keep_header(&http::header::SET_COOKIE),
        answer,
    );
    let first = call(&app, keyed("k", "a")).await;
    assert_eq!(first.header("x-token"), Some("secret"));
    let replay = call(&app, keyed("k", "a")).await;
    assert_eq!(
        (replay.header("set-cookie"), replay.header("x-token")),
        (Some("a=b"), None)
    );
}

// ---- row 8

#[tokio::test]
async fn a_key_that_was_used_for_another_request_is_refused_in_flight_and_completed() {
    let (store, layer) = layer();
    let control = gated();
    let app = pay(&control, layer);
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    assert_others_are_refused(&app).await;
    control.let_go();
    first.await.unwrap();
    assert_others_are_refused(&app).await;
    assert!(call(&app, keyed("k", "a")).await.is_replay(), "the record is unchanged");
    assert_eq!((control.runs(), store.len()), (1, 1));
}

/// The same key with another body, query or method.
async fn assert_others_are_refused(app: &axum::Router) {
    for other in [
        keyed("k", "b"),
        request("POST", "/pay?x=1", &[("idempotency-key", "k")], "a"),
        request("PATCH", "/pay", &[("idempotency-key", "k")], "a"),
    ] {
        let answer = call(app, other).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
        assert_eq!(answer.problem(), "idempotency-key-reused");
    }
}

#[tokio::test]
async fn headers_do_not_make_another_request() {
    let (_, layer) = layer();
    let control = open();
    let app = pay(&control, layer.scope(|_| Scope::tenant("t")));
    call(
        &app,
        request("POST", "/pay", &[("idempotency-key", "k"), ("x-signature", "1")], "a"),
    )
    .await;
    let later = request("POST", "/pay", &[("idempotency-key", "k"), ("x-signature", "2")], "a");
    assert!(call(&app, later).await.is_replay());
}

#[tokio::test]
async fn without_a_fingerprint_the_key_alone_counts() {
    let (_, layer) = layer();
    let control = open();
    let app = pay(&control, layer.fingerprint(Fingerprinter::none()));
    call(&app, keyed("k", "a")).await;
    assert!(call(&app, keyed("k", "b")).await.is_replay());
    assert_eq!(control.runs(), 1);
}

// ---- row 9

#[tokio::test]
async fn a_duplicate_in_flight_is_refused_with_retry_after() {
    let (_, layer) = layer();
    let control = gated();
    let app = pay(&control, layer);
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let answer = call(&app, keyed("k", "a")).await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(answer.problem(), "request-in-progress");
    let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!(
        (1..=2).contains(&seconds),
        "one second and up to another of jitter, not {seconds}"
    );
    control.let_go();
    assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    assert_eq!(control.runs(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_64_duplicates_at_once_one_runs() {
    for concurrent in [Concurrent::Refuse, Concurrent::Wait(Duration::from_secs(30))] {
        let (_, layer) = layer();
        let control = open();
        let app = pay(&control, layer.on_concurrent(concurrent));
        let clients: Vec<_> = (0..64).map(|_| spawn(&app, keyed("k", "a"))).collect();
        let mut first_answers = 0;
        for client in clients {
            let answer = client.await.unwrap();
            if answer.status == StatusCode::CREATED {
                assert_eq!(answer.body, "run 1 attempt 1: a");
                first_answers += usize::from(!answer.is_replay());
            } else {
                assert_eq!(
                    (answer.problem(), concurrent),
                    ("request-in-progress".to_owned(), Concurrent::Refuse)
                );
            }
        }
        assert_eq!((control.runs(), first_answers), (1, 1), "{concurrent:?}");
    }
}

// ---- row 10

#[tokio::test]
async fn a_status_that_says_not_executed_frees_the_key() {
    for status in [401, 403, 408, 425, 429, 503] {
        let (store, layer) = layer();
        let control = open();
        let status = StatusCode::from_u16(status).unwrap();
        let app = answering(&control, layer.clone(), move |run, _, _| {
            if run == 1 {
                status.into_response()
            } else {
                "done".into_response()
            }
        });
        assert_eq!(call(&app, keyed("k", "a")).await.status, status);
        assert!(store.is_empty(), "{status} leaves nothing behind");
        let second = call(&app, keyed("k", "b")).await;
        assert_eq!(
            (second.status, second.is_replay()),
            (StatusCode::OK, false),
            "another request may use the key"
        );
        assert_eq!(layer.counters().released, 1);
    }
}

#[tokio::test]
async fn every_other_status_is_kept() {
    for status in [
        200, 201, 202, 204, 302, 400, 404, 409, 410, 418, 422, 500, 501, 502, 504,
    ] {
        let (_, layer) = layer();
        let control = open();
        let status = StatusCode::from_u16(status).unwrap();
        let app = answering(&control, layer, move |_, _, _| status.into_response());
        call(&app, keyed("k", "a")).await;
        let second = call(&app, keyed("k", "a")).await;
        assert_eq!((second.status, second.is_replay(), control.runs()), (status, true, 1));
    }
}

#[tokio::test]
async fn which_statuses_are_kept_is_a_setting() {
    let (_, layer) = layer();
    let control = open();
    let app = answering(&control, layer.store_when(|status| status.is_success()), |run, _, _| {
        if run == 1 {
            StatusCode::BAD_REQUEST
        } else {
            StatusCode::OK
        }
        .into_response()
    });
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::BAD_REQUEST);
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::OK);
    assert!(call(&app, keyed("k", "a")).await.is_replay());
}

// ---- retention

#[tokio::test(start_paused = true)]
async fn an_answer_is_kept_for_its_retention_from_completion() {
    let hour = Duration::from_secs(3600);
    let (store, layer) = layer();
    let control = gated();
    let app = pay(&control, layer.retention(hour));
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    // The handler takes longer than the retention, which counts from its end.
    for _ in 0..70 {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    control.let_go();
    first.await.unwrap();
    advance(hour - Duration::from_millis(1)).await;
    assert!(call(&app, keyed("k", "a")).await.is_replay());
    advance(Duration::from_millis(1)).await;
    control.let_go();
    assert!(
        !call(&app, keyed("k", "a")).await.is_replay(),
        "it expired: this is a new operation"
    );
    assert_eq!((control.runs(), store.len()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_replay_that_is_under_way_when_its_record_expires_is_sent_whole() {
    let hour = Duration::from_secs(3600);
    let (store, layer) = layer();
    let control = open();
    let app = answering(&control, layer.retention(hour), |run, _, _| {
        vec![run as u8; 100_000].into_response()
    });
    let first = call(&app, keyed("k", "a")).await;
    advance(hour - Duration::from_millis(1)).await;
    // Its head is there, and its body is not yet asked for.
    let replay = app.clone().oneshot(keyed("k", "a")).await.unwrap();
    advance(Duration::from_secs(1)).await;
    let again = call(&app, keyed("k", "a")).await;
    assert_eq!(
        (again.body[0], control.runs(), store.len()),
        (2, 2, 1),
        "the record is another one"
    );
    let body = replay.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, first.body);
}

#[tokio::test(start_paused = true)]
async fn the_default_retention_is_a_day_and_it_may_be_for_ever() {
    let day = Duration::from_secs(24 * 3600);
    for (retention, after, replay) in [
        (None, day - Duration::from_secs(1), true),
        (None, day, false),
        (Some(Retention::Forever), day * 365 * 50, true),
    ] {
        let (_, mut layer) = layer();
        if let Some(retention) = retention {
            layer = layer.retention(retention);
        }
        let app = pay(&open(), layer);
        call(&app, keyed("k", "a")).await;
        advance(after).await;
        assert_eq!(
            call(&app, keyed("k", "a")).await.is_replay(),
            replay,
            "{retention:?} after {after:?}"
        );
    }
}

// ---- tenants

#[tokio::test]
async fn one_tenant_never_sees_the_answer_of_another() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer);
    let of = |tenant| {
        request(
            "POST",
            "/pay",
            &[("idempotency-key", "k"), ("authorization", tenant)],
            "a",
        )
    };
    let alice = call(&app, of("Basic alice")).await;
    let bob = call(&app, of("Basic bob")).await;
    let nobody = call(&app, keyed("k", "a")).await;
    assert_eq!(alice.body, "run 1 attempt 1: a");
    assert_eq!(bob.body, "run 2 attempt 1: a");
    assert_eq!(nobody.body, "run 3 attempt 1: a");
    assert_eq!(call(&app, of("Basic alice")).await.body, alice.body);
    assert_eq!(store.len(), 3);
}

#[tokio::test]
async fn a_scope_of_ones_own_survives_a_refreshed_token_and_one_that_finds_nobody_refuses() {
    let (store, layer) = layer();
    let control = open();
    let scope = |parts: &http::request::Parts| {
        let account = parts.headers.get("x-account")?;
        Some(Scope::tenant(account))
    };
    let app = pay(&control, layer.scope(scope));
    let with = |token| {
        request(
            "POST",
            "/pay",
            &[("idempotency-key", "k"), ("x-account", "42"), ("authorization", token)],
            "a",
        )
    };
    call(&app, with("Bearer old")).await;
    assert!(call(&app, with("Bearer new")).await.is_replay());
    let refused = call(&app, keyed("k", "a")).await;
    assert_eq!(refused.problem(), "idempotency-scope-missing");
    assert_eq!((control.runs(), store.len()), (1, 1));
}

#[tokio::test]
async fn a_key_names_one_operation_on_each_route() {
    let (_, layer) = layer();
    let control = open();
    let handler = {
        let control = control.clone();
        async move || control.pass().await.to_string()
    };
    let app = axum::Router::new()
        .route("/orders/{id}", axum::routing::post(handler.clone()))
        .route("/refunds", axum::routing::post(handler))
        .layer(layer);
    let to = |path| request("POST", path, &[("idempotency-key", "k")], "");
    assert_eq!(call(&app, to("/orders/1")).await.body, "1");
    assert_eq!(
        call(&app, to("/refunds")).await.body,
        "2",
        "another route is another operation"
    );
    let other_order = call(&app, to("/orders/2")).await;
    assert_eq!(
        other_order.problem(),
        "idempotency-key-reused",
        "the same route with another path is not"
    );
}

#[tokio::test]
async fn a_key_that_is_required_is_not_asked_of_methods_that_are_not_covered() {
    let (store, layer) = layer();
    let app = axum::Router::new()
        .route("/pay", axum::routing::any(async || "passed"))
        .layer(layer.require_key());
    assert_eq!(call(&app, request("GET", "/pay", &[], "")).await.body, "passed");
    assert_eq!(
        call(&app, request("POST", "/pay", &[], "")).await.status,
        StatusCode::BAD_REQUEST
    );
    assert!(store.is_empty());
}

#[tokio::test]
async fn every_authorization_header_counts_for_the_default_scope() {
    let (_, layer) = layer();
    let app = pay(&open(), layer);
    let with = |second| {
        let headers = [
            ("idempotency-key", "k"),
            ("authorization", "one"),
            ("authorization", second),
        ];
        request("POST", "/pay", &headers, "a")
    };
    assert!(!call(&app, with("two")).await.is_replay());
    assert!(!call(&app, with("three")).await.is_replay());
    assert!(call(&app, with("two")).await.is_replay());
}

#[tokio::test]
async fn a_request_and_an_answer_of_a_mebibyte_are_taken_and_not_a_byte_more() {
    const MEBIBYTE: usize = 1 << 20;
    let (_, layer) = layer();
    let app = answering(&open(), layer, |_, _, body| {
        let length = std::str::from_utf8(&body).unwrap().trim().parse().unwrap();
        vec![b'x'; length].into_response()
    });
    let sized = |key: &str, length: usize, answer: usize| {
        let mut body = answer.to_string();
        body.extend(std::iter::repeat_n(' ', length - body.len()));
        keyed(key, "").map(|_| Body::from(body))
    };
    assert_eq!(call(&app, sized("a", MEBIBYTE, 1)).await.status, StatusCode::OK);
    assert_eq!(
        call(&app, sized("b", MEBIBYTE + 1, 1)).await.status,
        StatusCode::PAYLOAD_TOO_LARGE
    );
    for (key, answer, kept) in [("c", MEBIBYTE, true), ("d", MEBIBYTE + 1, false)] {
        assert_eq!(call(&app, sized(key, 100, answer)).await.body.len(), answer);
        assert_eq!(call(&app, sized(key, 100, answer)).await.is_replay(), kept);
    }
}
