//! What replays look like, and what the answers of executed operations have in common.

use axum::{
    Router,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode};
use tower_idempotency::{IdempotencyLayer, Keep, KeySource, key_rules};

use crate::{
    layer,
    support::app::{answering, anywhere_answering, call, gated, keyed, open, pay, request, spawn, to_pay},
};

fn json(status: StatusCode) -> Response {
    let headers = [("content-type", "application/json"), ("location", "/payments/7")];
    (status, headers, r#"{"id":"7"}"#).into_response()
}

#[tokio::test]
async fn a_replay_may_have_another_status_and_is_otherwise_the_first_answer() {
    let (_, layer) = layer();
    let control = open();
    let layer = layer.replay_status(StatusCode::CONFLICT);
    let app = answering(&control, layer, |_, _, _| json(StatusCode::CREATED));
    let first = call(&app, keyed("k", "a")).await;
    assert_eq!(first.status, StatusCode::CREATED);
    for _ in 0..2 {
        let mut replay = call(&app, keyed("k", "a")).await;
        assert_eq!(replay.status, StatusCode::CONFLICT);
        assert!(replay.is_replay());
        replay.headers.remove("idempotent-replayed");
        assert_eq!((&replay.body, &replay.headers), (&first.body, &first.headers));
    }
    assert_eq!(control.runs(), 1);
}

/// A conflict with a link to what exists.
fn linked(layer: IdempotencyLayer) -> IdempotencyLayer {
    layer.replay_as(|first, duplicate| {
        assert_eq!(first.status(), StatusCode::CREATED);
        let location = first.headers()["location"].clone();
        let path = duplicate.uri.path();
        let about = format!("{path} made {} before", String::from_utf8_lossy(first.body()));
        let mut conflict = http::Response::new(Bytes::from(about));
        *conflict.status_mut() = StatusCode::CONFLICT;
        conflict.headers_mut().insert("link", location);
        conflict
    })
}

#[test]
fn a_status_without_a_body_is_none_for_replays() {
    for status in [100, 204, 205, 304] {
        let status = StatusCode::from_u16(status).unwrap();
        assert!(
            std::panic::catch_unwind(|| layer().1.replay_status(status)).is_err(),
            "{status}"
        );
    }
}

#[tokio::test]
async fn a_replay_may_be_made_out_of_the_first_answer_and_the_duplicate() {
    let (_, layer) = layer();
    let app = answering(&open(), linked(layer), |_, _, _| json(StatusCode::CREATED));
    let first = call(&app, keyed("k", "a")).await;
    assert_eq!(
        (first.status, &first.body[..]),
        (StatusCode::CREATED, &br#"{"id":"7"}"#[..])
    );
    for _ in 0..2 {
        let replay = call(&app, keyed("k", "a")).await;
        assert_eq!(replay.status, StatusCode::CONFLICT);
        assert_eq!(replay.body, r#"/pay made {"id":"7"} before"#);
        assert_eq!(replay.header("link"), Some("/payments/7"));
        assert_eq!(replay.header("content-type"), None, "what it leaves out is gone");
        assert!(replay.is_replay(), "the marker is added");
    }
}

#[tokio::test]
async fn a_replay_without_a_body_announces_the_length_that_the_first_one_did() {
    let (_, layer) = layer();
    let layer = layer.methods([Method::HEAD]).replay_as(|first, _| first);
    let app = anywhere_answering(&open(), layer, |_, _, _| [("content-length", "4")].into_response());
    for is_replay in [false, true] {
        let answer = call(&app, request("HEAD", "/pay", &[("idempotency-key", "k")], "")).await;
        assert_eq!(answer.is_replay(), is_replay);
        assert_eq!(answer.header("content-length"), Some("4"));
    }
}

#[tokio::test]
async fn a_replay_does_not_announce_a_body_that_the_first_answer_left_out() {
    let conflict = |mut first: http::Response<Bytes>| {
        *first.status_mut() = StatusCode::CONFLICT;
        first
    };
    for made in [false, true] {
        let (_, layer) = layer();
        let layer = layer.methods([Method::GET]);
        let layer = match made {
            false => layer.replay_status(StatusCode::CONFLICT),
            true => layer.replay_as(move |first, _| conflict(first)),
        };
        let app = anywhere_answering(&open(), layer, |_, _, _| {
            (StatusCode::NOT_MODIFIED, [("content-length", "5")]).into_response()
        });
        let get = || request("GET", "/pay", &[("idempotency-key", "k")], "");
        assert_eq!(call(&app, get()).await.header("content-length"), Some("5"));
        let replay = call(&app, get()).await;
        assert_eq!((replay.status, &replay.body[..]), (StatusCode::CONFLICT, &b""[..]));
        assert!(
            matches!(replay.header("content-length"), None | Some("0")),
            "{replay:?}"
        );
    }
}

#[tokio::test]
async fn a_replay_of_another_length_does_not_announce_the_first_one() {
    for (made, announced) in [("conflict", None), ("x", None), ("done", Some("4"))] {
        let (_, layer) = layer();
        let layer = layer.replay_as(move |first, _| first.map(|_| Bytes::from_static(made.as_bytes())));
        let app = answering(&open(), layer, |_, _, _| {
            ([("content-length", "4")], "paid").into_response()
        });
        assert_eq!(call(&app, keyed("k", "a")).await.header("content-length"), Some("4"));
        let replay = call(&app, keyed("k", "a")).await;
        assert_eq!(replay.body, made);
        let length = made.len().to_string();
        let said = replay.header("content-length");
        assert!(said.is_none() || said == Some(&length), "{said:?} of {made}");
        assert!(announced.is_none() || said == announced);
    }
}

#[tokio::test]
async fn how_replays_look_does_not_touch_refusals() {
    for layer in [layer().1.replay_status(StatusCode::IM_A_TEAPOT), linked(layer().1)] {
        let app = answering(&open(), layer, |_, _, _| {
            (StatusCode::CREATED, Keep::OnlyTheFact, "secret").into_response()
        });
        call(&app, keyed("k", "a")).await;
        let again = call(&app, keyed("k", "a")).await;
        assert_eq!(
            (again.status, again.problem().as_str()),
            (StatusCode::CONFLICT, "response-not-kept")
        );
        let reused = call(&app, keyed("k", "b")).await;
        assert_eq!(reused.status, StatusCode::UNPROCESSABLE_ENTITY);
    }
}

// ---- fields of every answer of an executed operation

const RESULT: HeaderName = HeaderName::from_static("x-result");

fn marked(layer: IdempotencyLayer) -> IdempotencyLayer {
    let accepted = HeaderValue::from_static("accepted");
    let key = HeaderName::from_static("x-key");
    layer.answer_header(RESULT, accepted).echo_key(key)
}

#[tokio::test]
async fn the_first_answer_and_its_replays_have_the_field_and_the_key() {
    let (_, layer) = layer();
    let app = pay(&open(), marked(layer));
    let quoted = [("idempotency-key", "\"k\"")];
    let first = call(&app, to_pay(&quoted, "a")).await;
    let replay = call(&app, keyed("k", "a")).await;
    assert!(replay.is_replay() && !first.is_replay());
    for answer in [first, replay] {
        assert_eq!(answer.header("x-result"), Some("accepted"));
        assert_eq!(answer.header("x-key"), Some("k"), "as it is, without quotes");
    }
}

#[tokio::test]
async fn a_rewritten_replay_and_an_answer_that_is_too_large_to_keep_have_them_too() {
    let (_, layer) = layer();
    let app = answering(&open(), marked(linked(layer.clone())), |_, _, _| {
        json(StatusCode::CREATED)
    });
    call(&app, keyed("k", "a")).await;
    let rewritten = call(&app, keyed("k", "a")).await;
    let large = call(&pay(&open(), marked(layer.max_response_body(1))), keyed("l", "a")).await;
    for answer in [rewritten, large] {
        assert_eq!(answer.header("x-result"), Some("accepted"));
        assert!(answer.header("x-key").is_some());
    }
}

#[tokio::test]
async fn refusals_and_answers_of_what_was_not_executed_have_neither() {
    let (_, layer) = layer();
    let control = gated();
    let layer = marked(layer.require_key());
    let app = answering(&control, layer, |run, _, _| match run {
        1 => StatusCode::CREATED.into_response(),
        _ => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    });
    let assert_unmarked = |answer: &crate::support::http::Answer| {
        assert_eq!(
            (answer.header("x-result"), answer.header("x-key")),
            (None, None),
            "{answer:?}"
        );
    };
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    for refused in [keyed("k", "a"), keyed("k", "b"), keyed("", "a"), to_pay(&[], "a")] {
        assert_unmarked(&call(&app, refused).await);
    }
    control.let_go();
    first.await.unwrap();
    control.let_go();
    let not_executed = call(&app, keyed("l", "a")).await;
    assert_eq!(not_executed.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_unmarked(&not_executed);
}

#[tokio::test]
async fn the_field_and_the_key_are_not_stored() {
    let (store, layer) = layer();
    call(&pay(&open(), marked(layer)), keyed("k", "a")).await;
    let unmarked = pay(&open(), IdempotencyLayer::new(store));
    let replay = call(&unmarked, keyed("k", "a")).await;
    assert!(replay.is_replay());
    assert_eq!((replay.header("x-result"), replay.header("x-key")), (None, None));
}

#[tokio::test]
async fn the_field_takes_the_place_of_one_that_the_handler_set() {
    let (_, layer) = layer();
    let app = answering(&open(), marked(layer), |_, _, _| {
        ([("x-result", "own")], "paid").into_response()
    });
    for _ in 0..2 {
        let answer = call(&app, keyed("k", "a")).await;
        let values: Vec<_> = answer.headers.get_all(RESULT).iter().collect();
        assert_eq!(values, ["accepted"]);
    }
}

#[tokio::test]
async fn a_key_that_no_header_can_have_is_left_out() {
    let (_, layer) = layer();
    let layer = layer.key(KeySource::body("/id")).key_rule(key_rules::any_text);
    let app: Router = pay(&open(), marked(layer));
    for body in [r#"{"id":"a\nb"}"#, r#"{"id":"a\u0000b"}"#] {
        for _ in 0..2 {
            let answer = call(&app, to_pay(&[], body)).await;
            assert_eq!(answer.status, StatusCode::CREATED);
            assert_eq!(
                (answer.header("x-result"), answer.header("x-key")),
                (Some("accepted"), None)
            );
        }
    }
}
