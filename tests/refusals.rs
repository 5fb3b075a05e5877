//! Refusals are problem documents (RFC 9457), and every part of them is a setting.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use support::app::{call, keyed, open, pay};
use tower::ServiceExt;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Rejection, RejectionKind};

fn layer() -> IdempotencyLayer {
    IdempotencyLayer::new(MemoryStore::new()).require_key()
}

fn without_key() -> Request<Body> {
    Request::post("/pay").body(Body::empty()).unwrap()
}

#[tokio::test]
async fn a_refusal_is_a_problem_document_with_a_link_to_its_documentation() {
    let answer = call(&pay(&open(), layer()), without_key()).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    let problem = answer.json();
    let kind = problem["type"].as_str().unwrap();
    let uri: http::Uri = kind.split('#').next().unwrap().parse().unwrap();
    assert_eq!(uri.scheme_str(), Some("https"), "the type is absolute");
    assert!(kind.ends_with("#idempotency-key-missing"));
    assert_eq!(problem["title"], "Idempotency key is missing");
    assert_eq!(problem["status"], 400);
    assert_eq!(
        problem["detail"],
        "this operation requires the header `idempotency-key`"
    );
    let link = format!("<{kind}>; rel=\"describedby\"; type=\"text/html\"");
    assert_eq!(answer.header("link"), Some(&*link));
}

#[test]
fn the_documentation_describes_every_kind_under_its_slug_and_status() {
    let documentation = include_str!("../src/problems.rs");
    let mut slugs = std::collections::HashSet::new();
    for kind in RejectionKind::ALL {
        assert!(slugs.insert(kind.slug()));
        let (_, section) = documentation
            .split_once(&format!("//! ## {}\n", kind.slug()))
            .unwrap_or_else(|| panic!("{} is not described", kind.slug()));
        let status = format!("//! **{}.**", kind.default_status().as_u16());
        assert!(section.starts_with(&status), "{} does not say {status}", kind.slug());
        assert!(!kind.default_title().is_empty());
    }
    assert_eq!(
        documentation.matches("//! ## ").count(),
        RejectionKind::ALL.len(),
        "and describes nothing else"
    );
}

#[tokio::test]
async fn the_reason_of_a_refusal_is_in_the_extensions_of_its_answer() {
    let app = pay(&open(), layer());
    let response = app.oneshot(without_key()).await.unwrap();
    let rejection = response.extensions().get::<Rejection>().unwrap();
    assert_eq!(rejection.kind(), RejectionKind::KeyMissing);
    assert_eq!(
        rejection.to_string(),
        format!("{}: {}", rejection.title(), rejection.detail().unwrap())
    );
    assert!(rejection.type_uri().ends_with(rejection.kind().slug()));
    assert_eq!(rejection.retry_after(), None);
}

#[tokio::test]
async fn statuses_titles_types_and_retry_after_are_settings() {
    let store = MemoryStore::builder().max_records(0).build();
    let layer = IdempotencyLayer::new(store)
        .require_key()
        .rejection_status(RejectionKind::KeyMissing, StatusCode::PRECONDITION_REQUIRED)
        .rejection_title(RejectionKind::KeyMissing, "Send a \"key\"")
        .problem_types("https://errors.example.com/")
        .retry_after(Duration::from_secs(30));
    let app = pay(&open(), layer);
    let answer = call(&app, without_key()).await;
    assert_eq!(answer.status, StatusCode::PRECONDITION_REQUIRED);
    let problem = answer.json();
    assert_eq!(
        problem["status"], 428,
        "the status in the document is the status of the answer"
    );
    assert_eq!(problem["title"], "Send a \"key\"");
    assert_eq!(problem["type"], "https://errors.example.com/idempotency-key-missing");
    let full = call(&app, keyed("k", "a")).await;
    assert_eq!(
        full.json()["title"],
        "The idempotency store is full",
        "other kinds keep theirs"
    );
    let seconds: u64 = full.header("retry-after").unwrap().parse().unwrap();
    assert!((30..=60).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn a_hook_gives_refusals_the_form_of_the_api() {
    let layer = layer().rejections(|rejection, request| {
        let body = format!("{} at {}", rejection.kind().slug(), request.uri.path());
        Response::builder()
            .status(rejection.status())
            .header("x-form", "own")
            .body(Bytes::from(body))
            .unwrap()
    });
    let app = pay(&open(), layer);
    let answer = call(&app, without_key()).await;
    assert_eq!(
        (answer.status, answer.header("x-form")),
        (StatusCode::BAD_REQUEST, Some("own"))
    );
    assert_eq!(answer.body, "idempotency-key-missing at /pay");
    call(&app, keyed("k", "a")).await;
    let reused = call(&app, keyed("k", "b")).await;
    assert_eq!(reused.body, "idempotency-key-reused at /pay");
    let response = app.oneshot(without_key()).await.unwrap();
    assert!(
        response.extensions().get::<Rejection>().is_some(),
        "the reason is there in any form"
    );
}
