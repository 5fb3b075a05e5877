//! Requests that carry no key.

use std::{convert::Infallible, time::Duration};

use axum::{Router, body::Body, response::IntoResponse};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderName, StatusCode};
use tokio::time::{advance, timeout};
use tower_idempotency::{Concurrent, Fingerprinter, KeySource, RejectionKind, Scope, WithoutKey};

use crate::{
    layer,
    support::app::{answering, call, gated, keyed, open, pay, request, spawn, to_pay},
};

#[tokio::test]
async fn by_default_it_passes_and_leaves_nothing() {
    let (store, layer) = layer();
    let control = open();
    for layer in [
        layer.clone(),
        layer.clone().without_key(WithoutKey::Pass),
        layer.require_key().optional_key(),
    ] {
        let app = pay(&control, layer);
        for _ in 0..2 {
            let answer = call(&app, to_pay(&[], "a")).await;
            assert_eq!(answer.body, format!("run {} attempt 0: a", control.runs()));
        }
    }
    assert_eq!((control.runs(), store.len()), (6, 0));
}

#[tokio::test]
async fn it_may_be_refused() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer.without_key(WithoutKey::Refuse));
    let answer = call(&app, to_pay(&[], "a")).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.problem(), "idempotency-key-missing");
    assert_eq!((control.runs(), store.len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_equal_request_within_the_retention_may_get_the_first_ones_answer() {
    let (_, layer) = layer();
    let control = open();
    let layer = layer
        .without_key(WithoutKey::DeriveAndReplay)
        .retention(Duration::from_secs(300));
    let app = pay(&control, layer);
    let first = call(&app, to_pay(&[], "a")).await;
    assert_eq!(first.body, "run 1 attempt 1: a");
    advance(Duration::from_secs(299)).await;
    let replay = call(&app, to_pay(&[("date", "later"), ("x-signature", "other")], "a")).await;
    assert!(replay.is_replay());
    assert_eq!(replay.body, first.body);
    for other in [to_pay(&[], "b"), request("POST", "/pay?x=1", &[], "a")] {
        assert!(
            !call(&app, other).await.is_replay(),
            "another request is another operation"
        );
    }
    advance(Duration::from_secs(1)).await;
    assert!(!call(&app, to_pay(&[], "a")).await.is_replay(), "the retention is over");
    assert_eq!(control.runs(), 4);
}

#[tokio::test(start_paused = true)]
async fn an_equal_request_within_the_retention_may_be_told_that_it_is_a_duplicate() {
    let (store, layer) = layer();
    let control = open();
    let layer = layer
        .without_key(WithoutKey::DeriveAndRefuse)
        .rejection_title(RejectionKind::DuplicateRequest, "Duplicate request error")
        .retention(Duration::from_secs(300));
    let app = pay(&control, layer.clone());
    assert_eq!(call(&app, to_pay(&[], "a")).await.status, StatusCode::CREATED);
    advance(Duration::from_secs(299)).await;
    for _ in 0..2 {
        let duplicate = call(&app, to_pay(&[], "a")).await;
        assert_eq!(duplicate.status, StatusCode::CONFLICT);
        assert_eq!(duplicate.problem(), "duplicate-request");
        assert_eq!(duplicate.json()["title"], "Duplicate request error");
        assert_eq!(duplicate.header("retry-after"), None, "sending it again does not help");
    }
    assert_eq!((control.runs(), store.len()), (1, 1));
    assert_eq!(call(&app, to_pay(&[], "b")).await.status, StatusCode::CREATED);
    advance(Duration::from_secs(1)).await;
    assert_eq!(call(&app, to_pay(&[], "a")).await.body, "run 3 attempt 1: a");
    assert_eq!((layer.counters().executed, layer.counters().refused), (3, 2));
}

#[tokio::test]
async fn a_request_with_a_key_is_replayed_where_those_without_are_refused() {
    let (store, layer) = layer();
    let control = open();
    let app = pay(&control, layer.without_key(WithoutKey::DeriveAndRefuse));
    call(&app, to_pay(&[], "a")).await;
    assert_eq!(call(&app, keyed("k", "a")).await.status, StatusCode::CREATED);
    assert!(call(&app, keyed("k", "a")).await.is_replay());
    assert_eq!(call(&app, to_pay(&[], "a")).await.problem(), "duplicate-request");
    assert_eq!((control.runs(), store.len()), (2, 2), "two names, two operations");
}

#[tokio::test]
async fn while_the_first_request_runs_an_equal_one_is_in_progress() {
    for without_key in [WithoutKey::DeriveAndReplay, WithoutKey::DeriveAndRefuse] {
        let (_, layer) = layer();
        let control = gated();
        let app = pay(&control, layer.without_key(without_key));
        let first = spawn(&app, to_pay(&[], "a"));
        control.entered().await;
        assert_eq!(call(&app, to_pay(&[], "a")).await.problem(), "request-in-progress");
        control.let_go();
        assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    }
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_that_waited_is_told_that_it_is_one_too() {
    let (_, layer) = layer();
    let control = gated();
    let wait = Concurrent::Wait(Duration::from_secs(5));
    let app = pay(
        &control,
        layer.without_key(WithoutKey::DeriveAndRefuse).on_concurrent(wait),
    );
    let first = spawn(&app, to_pay(&[], "a"));
    control.entered().await;
    let second = spawn(&app, to_pay(&[], "a"));
    advance(Duration::from_secs(1)).await;
    assert!(!second.is_finished(), "nobody knows yet whether the first one executes");
    control.let_go();
    assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    assert_eq!(second.await.unwrap().problem(), "duplicate-request");
}

#[tokio::test]
async fn a_request_that_did_not_execute_may_be_sent_again_without_a_key() {
    for without_key in [WithoutKey::DeriveAndReplay, WithoutKey::DeriveAndRefuse] {
        let (_, layer) = layer();
        let control = open();
        let app = answering(&control, layer.without_key(without_key), |run, _, _| match run {
            1 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
            _ => StatusCode::CREATED.into_response(),
        });
        assert_eq!(
            call(&app, to_pay(&[], "a")).await.status,
            StatusCode::SERVICE_UNAVAILABLE
        );
        assert_eq!(call(&app, to_pay(&[], "a")).await.status, StatusCode::CREATED);
    }
}

#[tokio::test]
async fn equal_requests_of_two_tenants_are_two_operations() {
    let (_, layer) = layer();
    let control = open();
    let layer = layer.without_key(WithoutKey::DeriveAndReplay).scope(|parts| {
        let tenant = parts.headers.get("x-tenant")?;
        Some(Scope::tenant(tenant.as_bytes()))
    });
    let app = pay(&control, layer);
    for tenant in ["a", "b"] {
        assert!(!call(&app, to_pay(&[("x-tenant", tenant)], "a")).await.is_replay());
        assert!(call(&app, to_pay(&[("x-tenant", tenant)], "a")).await.is_replay());
    }
    assert_eq!(
        call(&app, to_pay(&[], "a")).await.problem(),
        "idempotency-scope-missing"
    );
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn the_name_is_made_of_the_whole_request_where_every_request_counts_as_the_same() {
    let (_, layer) = layer();
    let control = open();
    let layer = layer
        .fingerprint(Fingerprinter::none())
        .without_key(WithoutKey::DeriveAndReplay);
    let app = pay(&control, layer);
    call(&app, to_pay(&[], "a")).await;
    let other = call(&app, to_pay(&[], "b")).await;
    assert_eq!(other.body, "run 2 attempt 1: b", "another request is not swallowed");
    assert!(call(&app, to_pay(&[], "a")).await.is_replay());
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn the_name_is_made_of_the_fingerprint_that_is_set() {
    let (_, layer) = layer();
    let control = open();
    let layer = layer.without_key(WithoutKey::DeriveAndRefuse);
    let app = pay(&control, layer.fingerprint(Fingerprinter::json_members(["/no"])));
    call(&app, to_pay(&[], r#"{"no":1,"note":"a"}"#)).await;
    let again = call(&app, to_pay(&[], r#"{"note":"b","no":1.0}"#)).await;
    assert_eq!(again.problem(), "duplicate-request");
    assert_eq!(call(&app, to_pay(&[], r#"{"no":2}"#)).await.status, StatusCode::CREATED);
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn a_name_that_was_derived_is_met_by_no_key_that_a_client_sends() {
    let (store, layer) = layer();
    let control = open();
    let layer = layer
        .without_key(WithoutKey::DeriveAndReplay)
        .echo_key(HeaderName::from_static("x-key"));
    let app = pay(&control, layer);
    let first = call(&app, to_pay(&[], "a")).await;
    let derived = first.header("x-key").unwrap();
    assert_eq!(derived.len(), 64, "the digits of the fingerprint");
    let guessed = call(&app, to_pay(&[("idempotency-key", derived)], "a")).await;
    assert!(!guessed.is_replay());
    assert_eq!(guessed.body, "run 2 attempt 1: a");
    assert_eq!(store.len(), 2);
}

#[tokio::test]
async fn a_key_that_is_missing_in_the_body_may_be_derived_too() {
    let (_, layer) = layer();
    let control = open();
    let app = pay(
        &control,
        layer
            .key(KeySource::body("/id"))
            .without_key(WithoutKey::DeriveAndRefuse),
    );
    for body in [r#"{"amount":1}"#, ""] {
        assert_eq!(call(&app, to_pay(&[], body)).await.status, StatusCode::CREATED);
        assert_eq!(call(&app, to_pay(&[], body)).await.problem(), "duplicate-request");
    }
    assert_eq!(control.runs(), 2);
}

#[tokio::test(start_paused = true)]
async fn where_a_closure_finds_no_key_a_request_passes_before_its_body_is_there() {
    let (store, layer) = layer();
    let layer = layer.key(KeySource::parts(|_| None));
    let first_sent = HeaderName::from_static("x-first-sent");
    for layer in [layer.clone(), layer.first_sent(first_sent, Duration::ZERO)] {
        let app = Router::new().fallback(async || "passed").layer(layer);
        let endless = Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
        let answer = timeout(Duration::from_secs(60), call(&app, to_pay(&[], endless))).await;
        assert_eq!(answer.expect("an answer").body, "passed");
    }
    assert_eq!(store.len(), 0);
}

#[tokio::test]
async fn an_unusable_key_is_refused_and_never_taken_for_none() {
    for without_key in [
        WithoutKey::Pass,
        WithoutKey::DeriveAndReplay,
        WithoutKey::DeriveAndRefuse,
    ] {
        let (store, layer) = layer();
        let control = open();
        let app = pay(&control, layer.without_key(without_key));
        for key in ["", "a b", "\"open"] {
            assert_eq!(
                call(&app, keyed(key, "a")).await.problem(),
                "idempotency-key-invalid",
                "{key:?}"
            );
        }
        assert_eq!((control.runs(), store.len()), (0, 0));
    }
}
