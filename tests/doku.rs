//! DOKU's guide "Handling Idempotency", sentence by sentence: against the demo, and in process where the demo has no
//! such route or the clock has to be turned.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{collections::HashSet, time::Duration};

use axum::{Router, body::Body, routing::any};
use futures_util::future::join_all;
use http::{Method, Request, StatusCode};
use serde_json::json;
use support::{
    app::{Control, call, open},
    demo::{Demo, ENDLESS},
    http::{Answer, post, send},
};
use tokio::time::advance;
use tower_idempotency::{Fingerprinter, IdempotencyLayer, MemoryStore, Profile};

const PAYMENT: &str = "/checkout/v1/payment";

/// As in DOKU's guides to its checkout.
const BODY: &str =
    r#"{"order":{"invoice_number":"INV-20210124-0001","amount":80000},"payment":{"payment_due_date":60}}"#;

/// What a client sends with each request, the id apart. Time and signature are others on a retry.
fn headers<'h>(client: &'h str, id: &'h str, time: &'h str) -> [(&'h str, &'h str); 4] {
    [
        ("client-id", client),
        ("request-id", id),
        ("request-timestamp", time),
        ("signature", time),
    ]
}

async fn pay(demo: &Demo, id: &str, body: &str) -> Answer {
    pay_with(demo, &[], id, body).await
}

async fn pay_with(demo: &Demo, more: &[(&str, &str)], id: &str, body: &str) -> Answer {
    let headers = [&headers("MCH-0001", id, "2020-10-21T03:38:28Z"), more].concat();
    demo.post(PAYMENT, &headers, body).await
}

#[track_caller]
fn assert_created(answer: &Answer) {
    assert_eq!(
        (answer.status, answer.is_replay()),
        (StatusCode::CREATED, false),
        "{answer:?}"
    );
}

/// The same body, and by the status and the marker an old one.
#[track_caller]
fn assert_replay(answer: &Answer, first: &Answer) {
    assert_eq!(
        (answer.status, answer.is_replay()),
        (StatusCode::CONFLICT, true),
        "{answer:?}"
    );
    assert_eq!(answer.body, first.body);
    assert_eq!(answer.header("content-type"), first.header("content-type"));
}

/// A refusal, told from every replay.
#[track_caller]
fn assert_refused(answer: &Answer, status: u16, problem: &str) {
    assert_eq!((answer.status.as_u16(), &*answer.problem()), (status, problem));
    assert!(!answer.is_replay());
}

// ---- "a request can be send multiple times with the same result as the first request"

#[tokio::test]
async fn a_request_can_be_sent_multiple_times_with_the_same_result_as_the_first_request() {
    let demo = Demo::start(&[]);
    let first = pay(&demo, "r1", BODY).await;
    assert_created(&first);
    for _ in 0..10 {
        assert_replay(&pay(&demo, "r1", BODY).await, &first);
    }
    demo.assert_one_effect(&first).await;
}

#[tokio::test]
async fn the_system_only_performs_one_process_for_identical_requests_that_come_at_once() {
    let demo = Demo::start(&[]);
    let delayed = [("x-demo-delay-ms", "50")];
    let answers = join_all((0..32).map(|_| pay_with(&demo, &delayed, "r1", BODY))).await;
    let (first, others): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == StatusCode::CREATED);
    assert_eq!(first.len(), 1);
    for answer in others {
        match answer.is_replay() {
            true => assert_replay(answer, first[0]),
            false => assert_refused(answer, 409, "request-in-progress"),
        }
    }
    demo.assert_one_effect(first[0]).await;
}

#[tokio::test]
async fn while_the_first_request_runs_the_409_is_a_problem_without_the_marker_of_a_replay() {
    let demo = Demo::start(&[]);
    let endless = [ENDLESS];
    let running = pay_with(&demo, &endless, "r1", BODY);
    let others = async {
        demo.until_executed(1).await;
        let retry = pay(&demo, "r1", BODY).await;
        assert_refused(&retry, 409, "request-in-progress");
        assert!(retry.header("retry-after").is_some());
        assert_refused(&pay(&demo, "r1", "{}").await, 422, "idempotency-key-reused");
    };
    tokio::select! {
        answer = running => panic!("it still runs: {answer:?}"),
        () = others => {}
    }
    assert_eq!(demo.effects().await.len(), 0);
}

// ---- "A request is identical if it is sent with the same request-id"

#[tokio::test]
async fn a_request_is_identical_if_it_is_sent_with_the_same_request_id_whatever_its_time_and_signature() {
    let demo = Demo::start(&[]);
    let first = pay(&demo, "r1", BODY).await;
    assert_created(&first);
    let later = headers("MCH-0001", "r1", "2020-10-21T03:38:29Z");
    assert_replay(&demo.post(PAYMENT, &later, BODY).await, &first);
    demo.assert_one_effect(&first).await;
}

#[tokio::test]
async fn the_idempotency_key_is_the_request_id_by_either_of_its_names_and_no_other_header() {
    let demo = Demo::start(&[]);
    let client = ("client-id", "MCH-0001");
    let by = async |headers: &[(&str, &str)]| demo.post(PAYMENT, &[&[client], headers].concat(), BODY).await;
    let first = by(&[("x-request-id", "r1")]).await;
    assert_created(&first);
    assert_replay(&by(&[("X-REQUEST-ID", "r1")]).await, &first);
    assert_replay(&by(&[("Request-Id", "r1")]).await, &first);
    assert_replay(&by(&[("x-request-id", "r1"), ("request-id", "r2")]).await, &first);
    assert_created(&by(&[("request-id", "r2"), ("idempotency-key", "r1")]).await);
    assert_refused(&by(&[("idempotency-key", "r1")]).await, 400, "idempotency-key-missing");
    let twice = by(&[("request-id", "r1"), ("request-id", "r1")]).await;
    assert_refused(&twice, 400, "idempotency-key-invalid");
    assert_eq!(demo.effects().await.len(), 2);
}

#[tokio::test]
async fn every_api_request_must_send_a_unique_request_id() {
    let demo = Demo::start(&[]);
    let missing = demo.post(PAYMENT, &[("client-id", "MCH-0001")], BODY).await;
    assert_refused(&missing, 400, "idempotency-key-missing");
    let long = "r".repeat(256);
    for unusable in ["", "a b", &long] {
        assert_refused(&pay(&demo, unusable, BODY).await, 400, "idempotency-key-invalid");
    }
    assert_eq!(demo.effects().await.len(), 0);
    let mut ids = HashSet::new();
    for request_id in ["r1", "r2", "R1", &long[1..]] {
        let created = pay(&demo, request_id, BODY).await;
        assert_created(&created);
        ids.insert(created.json()["id"].to_string());
    }
    assert_eq!((ids.len(), demo.effects().await.len()), (4, 4));
}

#[tokio::test]
async fn every_api_request_of_whatever_method_must_send_a_request_id() {
    let (control, app) = serve(doku());
    let every = [
        Method::GET,
        Method::HEAD,
        Method::OPTIONS,
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
    ];
    for method in every {
        let without = Request::builder().method(&method).uri("/orders/v1/status/INV-1");
        let missing = call(&app, without.body(Body::empty()).unwrap()).await;
        let request = || {
            let request = Request::builder().method(&method).uri(format!("/orders/{method}"));
            request.header("request-id", "r1").body(Body::empty()).unwrap()
        };
        let (first, again) = (call(&app, request()).await, call(&app, request()).await);
        if method == Method::HEAD {
            // It has no body that could say more.
            let statuses = [&missing, &first, &again].map(|answer| answer.status.as_u16());
            assert_eq!((statuses, again.is_replay()), ([400, 201, 409], true));
            continue;
        }
        assert_refused(&missing, 400, "idempotency-key-missing");
        assert_created(&first);
        assert_replay(&again, &first);
    }
    assert_eq!(control.runs(), 7);
}

// ---- "if something happen in merchant side and merchant can't get response"

#[tokio::test]
async fn a_merchant_that_cannot_get_the_response_sends_again_and_gets_the_same_body_with_409_conflict() {
    let demo = Demo::start(&[]);
    let headers = headers("MCH-0001", "r1", "2020-10-21T03:38:28Z");
    demo.leave(PAYMENT, &headers, BODY).await;
    let answer = loop {
        let answer = pay(&demo, "r1", BODY).await;
        assert_eq!(answer.status, StatusCode::CONFLICT);
        if answer.is_replay() {
            break answer;
        }
        assert_refused(&answer, 409, "request-in-progress");
    };
    demo.assert_one_effect(&answer).await;
}

#[tokio::test]
async fn the_same_request_id_with_another_body_is_refused_and_told_from_a_replay() {
    let demo = Demo::start(&[]);
    let first = pay(&demo, "r1", BODY).await;
    assert_created(&first);
    let another_amount = BODY.replace("80000", "80001");
    let reformatted = BODY.replace(',', ", ");
    for other in [&*another_amount, &reformatted, "{}", "", "nonsense"] {
        assert_refused(&pay(&demo, "r1", other).await, 422, "idempotency-key-reused");
    }
    assert_replay(&pay(&demo, "r1", BODY).await, &first);
    demo.assert_one_effect(&first).await;
}

#[tokio::test]
async fn every_response_is_sent_again_with_the_same_body_and_409_conflict() {
    let demo = Demo::start(&[]);
    for status in ["400", "401", "404", "408", "409", "422", "429", "500", "502", "503"] {
        let first = pay_with(&demo, &[("x-demo-status", status)], status, BODY).await;
        assert_eq!((first.status.as_str(), first.is_replay()), (status, false));
        // It would create now.
        assert_replay(&pay(&demo, status, BODY).await, &first);
    }
    let invalid = pay(&demo, "invalid", "[]").await;
    assert_eq!(invalid.status, StatusCode::BAD_REQUEST);
    assert_replay(&pay(&demo, "invalid", "[]").await, &invalid);
    assert_eq!(demo.effects().await.len(), 0);
}

#[tokio::test]
async fn a_request_whose_outcome_is_unknown_is_not_processed_again() {
    let demo = Demo::start(&[]);
    let headers = [&headers("MCH-0001", "r1", "now")[..], &[("x-demo-panic", "1")]].concat();
    assert!(send(demo.address(), post(PAYMENT, &headers, BODY)).await.is_err());
    for _ in 0..5 {
        assert_refused(&pay(&demo, "r1", BODY).await, 409, "outcome-unknown");
    }
    assert_eq!(demo.effects().await.len(), 0);
}

// ---- whose request ids they are, and for how long

#[tokio::test]
async fn the_request_ids_of_two_clients_do_not_meet() {
    let demo = Demo::start(&[]);
    let of = async |client, more: &[(&str, &str)]| {
        let headers = [&headers(client, "r1", "now")[..], more].concat();
        demo.post(PAYMENT, &headers, BODY).await
    };
    let one = of("MCH-0001", &[]).await;
    let other = of("MCH-0002", &[]).await;
    assert_created(&one);
    assert_created(&other);
    assert_ne!(one.body, other.body);
    assert_created(&of("MCH-0001", &[("authorization", "Basic b3RoZXI=")]).await);
    assert_replay(&of("MCH-0001", &[]).await, &one);
    assert_replay(&of("MCH-0002", &[]).await, &other);
    assert_eq!(demo.effects().await.len(), 3);
}

fn doku() -> IdempotencyLayer {
    IdempotencyLayer::new(MemoryStore::new()).profile(Profile::doku())
}

/// Every method and path, with a handler that answers by the number of its run.
fn serve(layer: IdempotencyLayer) -> (Control, Router) {
    let control = open();
    let runs = control.clone();
    let handler = async move || (StatusCode::CREATED, runs.pass().await.to_string());
    (control, Router::new().fallback(any(handler)).layer(layer))
}

async fn place(app: &Router, path: &str, body: &str) -> Answer {
    let request = Request::post(path)
        .header("client-id", "MCH-0001")
        .header("request-id", "r1");
    call(app, request.body(Body::from(body.to_owned())).unwrap()).await
}

#[tokio::test(start_paused = true)]
async fn a_request_id_is_kept_for_24_hours() {
    let (control, app) = serve(doku());
    let first = place(&app, PAYMENT, BODY).await;
    advance(Duration::from_secs(24 * 60 * 60 - 1)).await;
    assert_replay(&place(&app, PAYMENT, BODY).await, &first);
    advance(Duration::from_secs(1)).await;
    let next = place(&app, PAYMENT, BODY).await;
    assert_created(&next);
    assert_ne!(next.body, first.body);
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn the_time_for_which_it_is_kept_is_a_setting() {
    let demo = Demo::start(&["--retention", "1ms"]);
    let first = pay(&demo, "r1", BODY).await;
    let next = loop {
        let next = pay(&demo, "r1", BODY).await;
        if !next.is_replay() {
            break next;
        }
        assert_replay(&next, &first);
    };
    assert_created(&next);
    assert_ne!(next.body, first.body);
}

#[tokio::test]
async fn a_request_id_counts_for_each_endpoint() {
    let (control, app) = serve(doku());
    for path in ["/checkout/v1/payment", "/orders/v1/cancel"] {
        let first = place(&app, path, BODY).await;
        assert_created(&first);
        assert_replay(&place(&app, path, BODY).await, &first);
    }
    assert_eq!(control.runs(), 2);
}

// ---- "additional parameters such as order-no, amount may be required to decide a request is identical or not"

#[tokio::test]
async fn additional_parameters_such_as_order_no_and_amount_may_decide_whether_a_request_is_identical() {
    let chosen = Fingerprinter::json_members(["/order/invoice_number", "/order/amount"]);
    let (control, app) = serve(doku().fingerprint(chosen));
    let first = place(&app, PAYMENT, BODY).await;
    assert_created(&first);
    let mut same = serde_json::from_str::<serde_json::Value>(BODY).unwrap();
    same["payment"]["payment_due_date"] = json!(61);
    same["note"] = json!("sent again");
    assert_replay(&place(&app, PAYMENT, &same.to_string()).await, &first);
    assert_replay(&place(&app, PAYMENT, &BODY.replace("80000", "80000.00")).await, &first);
    for (from, to) in [
        ("80000", "80001"),
        ("0001", "0002"),
        ("80000", "\"80000\""),
        ("amount", "total"),
    ] {
        let other = place(&app, PAYMENT, &BODY.replace(from, to)).await;
        assert_refused(&other, 422, "idempotency-key-reused");
    }
    assert_refused(&place(&app, PAYMENT, "nonsense").await, 400, "request-body-unreadable");
    assert_eq!(control.runs(), 1);
}
