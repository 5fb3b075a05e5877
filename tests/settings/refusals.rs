//! Refusals in an API's own form.

use std::{collections::HashSet, time::Duration};

use axum::Router;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode};
use serde_json::json;
use tower::ServiceExt;
use tower_idempotency::{IdempotencyLayer, Keep, Rejection, RejectionFormat, RejectionKind};

use crate::{
    layer,
    support::{
        app::{answering, call, keyed, open, pay, to_pay},
        log::Log,
    },
};

const ALL: &str = concat!(
    r#"{"name":{code},"title":{title},"message":{detail},"type":{type},"id":{debug_id},"#,
    r#""status":{status},"original":{original_status},"after":{retry_after}}"#
);

fn layer_in_form() -> IdempotencyLayer {
    layer().1.require_key().rejection_format(RejectionFormat::json(ALL))
}

#[tokio::test]
async fn a_refusal_has_the_form_of_the_api_with_everything_that_is_known() {
    let layer = layer_in_form()
        .rejection_code(RejectionKind::KeyMissing, "NO_KEY")
        .rejection_title(RejectionKind::KeyMissing, "Send a \"key\"")
        .rejection_status(RejectionKind::KeyMissing, StatusCode::PRECONDITION_REQUIRED)
        .problem_types("https://errors.example.com/");
    let answer = call(&pay(&open(), layer), to_pay(&[], "a")).await;
    assert_eq!(answer.status, StatusCode::PRECONDITION_REQUIRED);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let id = answer.json()["id"].clone();
    let expected = json!({
        "name": "NO_KEY",
        "title": "Send a \"key\"",
        "message": "this operation requires the header `idempotency-key`",
        "type": "https://errors.example.com/idempotency-key-missing",
        "id": id,
        "status": 428,
        "original": null,
        "after": null,
    });
    assert_eq!(answer.json(), expected);
}

#[tokio::test]
async fn what_has_no_code_or_detail_is_called_by_its_slug_and_title() {
    let app = pay(&open(), layer_in_form());
    call(&app, keyed("k", "a")).await;
    let answer = call(&app, keyed("k", "b")).await.json();
    assert_eq!(answer["name"], "idempotency-key-reused");
    assert_eq!(answer["message"], answer["title"]);
    assert_eq!(answer["title"], RejectionKind::KeyReused.default_title());
}

#[tokio::test]
async fn the_form_says_when_to_try_again_and_what_the_first_status_was() {
    let full = tower_idempotency::MemoryStore::builder().max_records(0).build();
    let layer = IdempotencyLayer::new(full)
        .rejection_format(RejectionFormat::json(ALL))
        .retry_after(Duration::from_secs(30));
    let answer = call(&pay(&open(), layer), keyed("k", "a")).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    let after = answer.json()["after"].as_u64().unwrap();
    assert!((30..=60).contains(&after));
    assert_eq!(answer.header("retry-after"), Some(&*after.to_string()));
    let app = answering(&open(), layer_in_form(), |_, _, _| {
        axum::response::IntoResponse::into_response((StatusCode::ACCEPTED, Keep::OnlyTheFact, "secret"))
    });
    call(&app, keyed("k", "a")).await;
    assert_eq!(call(&app, keyed("k", "a")).await.json()["original"], 202);
}

#[tokio::test]
async fn one_kind_may_have_a_form_of_its_own_whichever_was_set_first() {
    let own = RejectionFormat::json(r#"{"own":{code}}"#);
    let of_all = RejectionFormat::json(r#"{"all":{code}}"#);
    let kind = RejectionKind::KeyMissing;
    let own_first = layer()
        .1
        .rejection_format_of(kind, own.clone())
        .rejection_format(of_all.clone());
    let own_last = layer()
        .1
        .rejection_format(of_all)
        .rejection_format_of(kind, own.clone());
    for layer in [own_first, own_last] {
        let app = pay(&open(), layer.require_key());
        let missing = call(&app, to_pay(&[], "a")).await;
        assert_eq!(missing.json(), json!({"own": "idempotency-key-missing"}));
        let invalid = call(&app, keyed("", "a")).await;
        assert_eq!(invalid.json(), json!({"all": "idempotency-key-invalid"}));
    }
    let alone = pay(&open(), layer().1.require_key().rejection_format_of(kind, own));
    assert_eq!(call(&alone, keyed("", "a")).await.problem(), "idempotency-key-invalid");
}

#[tokio::test]
async fn one_kind_may_have_fields_of_its_own_in_every_form() {
    let name = HeaderName::from_static("transient-error");
    let (kind, yes) = (RejectionKind::KeyMissing, HeaderValue::from_static("true"));
    let hook = |rejection: &Rejection, _: &http::request::Parts| {
        let mut response = Response::new(Bytes::from("own"));
        *response.status_mut() = rejection.status();
        response
    };
    let (_, problems) = layer();
    for layer in [problems.clone(), layer_in_form(), problems.rejections(hook)] {
        let layer = layer.require_key().rejection_header(kind, name.clone(), yes.clone());
        let app = pay(&open(), layer);
        for content_type in ["application/json", "application/grpc"] {
            let missing = call(&app, to_pay(&[("content-type", content_type)], "a")).await;
            assert_eq!(missing.header("transient-error"), Some("true"));
        }
        assert_eq!(call(&app, keyed("", "a")).await.header("transient-error"), None);
        assert_eq!(call(&app, keyed("k", "a")).await.header("transient-error"), None);
    }
}

#[tokio::test]
async fn a_grpc_client_still_gets_a_grpc_status() {
    let layer = layer_in_form()
        .rejection_format_of(RejectionKind::KeyMissing, RejectionFormat::json("{}"))
        .rejection_status(RejectionKind::KeyMissing, StatusCode::PRECONDITION_REQUIRED);
    let app = pay(&open(), layer);
    let answer = call(&app, to_pay(&[("content-type", "application/grpc+proto")], "a")).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("content-type"), Some("application/grpc+proto"));
    assert_eq!(answer.header("grpc-status"), Some("3"));
    assert!(
        answer
            .header("grpc-message")
            .unwrap()
            .starts_with("Idempotency key is missing")
    );
    assert!(answer.body.is_empty());
}

#[tokio::test]
async fn a_hook_goes_before_every_form() {
    let hook =
        |rejection: &Rejection, _: &http::request::Parts| Response::new(Bytes::from(rejection.code().to_owned()));
    let layer = layer_in_form()
        .rejections(hook)
        .rejection_code(RejectionKind::KeyMissing, "NO_KEY");
    assert_eq!(call(&pay(&open(), layer), to_pay(&[], "a")).await.body, "NO_KEY");
}

// ---- the debug id

async fn assert_in_the_log(app: &Router, log: &Log, ids: &mut HashSet<String>) {
    for (request, reason) in [
        (to_pay(&[], "a"), "idempotency-key-missing"),
        (to_pay(&[], "a"), "idempotency-key-missing"),
        (keyed("k", "b"), "idempotency-key-reused"),
    ] {
        let response = app.clone().oneshot(request).await.unwrap();
        let id = response.extensions().get::<Rejection>().unwrap().debug_id().to_owned();
        assert!(
            id.len() == 32 && id.bytes().all(|digit| digit.is_ascii_hexdigit()),
            "{id}"
        );
        let lines = log.lines(&id);
        assert_eq!(lines.len(), 1, "it is in the log once");
        assert!(lines[0].contains(reason), "{} does not say {reason}", lines[0]);
        assert!(ids.insert(id), "no two refusals have the same");
    }
}

#[tokio::test]
async fn the_debug_id_of_every_refusal_is_its_own_and_is_in_the_log_beside_the_reason() {
    let (log, _guard) = Log::start();
    let mut ids = HashSet::new();
    for layer in [layer_in_form(), layer().1.require_key()] {
        let app = pay(&open(), layer);
        call(&app, keyed("k", "a")).await;
        for _ in 0..3 {
            assert_in_the_log(&app, &log, &mut ids).await;
        }
    }
    let shown = call(&pay(&open(), layer_in_form()), to_pay(&[], "a")).await.json();
    assert_eq!(
        log.lines(shown["id"].as_str().unwrap()).len(),
        1,
        "the client is told the same"
    );
}

#[tokio::test]
async fn an_error_of_a_handlers_own_has_the_same_form_and_is_in_the_log_too() {
    let (log, _guard) = Log::start();
    let format = RejectionFormat::json(r#"{"name":{code},"message":{detail},"debug_id":{debug_id},"status":{status}}"#);
    let mut ids = HashSet::new();
    for _ in 0..2 {
        let error = format.error(StatusCode::CONFLICT, "DUPLICATE_ORDER_ID", "it \"exists\"");
        assert_eq!(error.status(), StatusCode::CONFLICT);
        assert_eq!(error.headers()["content-type"], "application/json");
        let body: serde_json::Value = serde_json::from_slice(error.body()).unwrap();
        let id = body["debug_id"].as_str().unwrap().to_owned();
        let (name, message) = ("DUPLICATE_ORDER_ID", "it \"exists\"");
        assert_eq!(
            body,
            json!({"name": name, "message": message, "debug_id": id, "status": 409})
        );
        assert!(log.lines(&id)[0].contains(name));
        assert!(ids.insert(id));
    }
}

#[test]
fn a_form_that_does_not_make_json_is_refused_when_it_is_given() {
    for template in ["", "{", r#"{"a":"{code}"}"#, r#"{"a":{unknown}}"#, r#"{"a":{code}"#] {
        assert!(
            std::panic::catch_unwind(|| RejectionFormat::json(template)).is_err(),
            "{template}"
        );
    }
}
