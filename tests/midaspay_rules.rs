//! MidasPay's guide "Idempotency", sentence by sentence: which references count, how long, and what errors look like.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{collections::HashSet, fs::File, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    routing::post,
};
use http::{Request, StatusCode};
use support::{
    app::{Control, call, open},
    http::Answer,
    midaspay::{
        MidasPay, OPERATIONS, ORDER, ORDERS, assert_created, assert_duplicate, assert_invalid, assert_replay, body,
        error, order, signed_by,
    },
};
use tokio::time::advance;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Profile, Statuses};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const TEN_YEARS: Duration = DAY.saturating_mul(3653);

// ---- "required and validated with min_len=1"

#[tokio::test]
async fn the_field_is_required_and_validated_with_min_len_1_on_every_mutating_endpoint() {
    let midas = MidasPay::start();
    let values = ["null", r#""""#, "7", "true", r#"["r"]"#, r#"{"r":"r"}"#];
    for path in OPERATIONS {
        for value in values {
            let body = format!(r#"{{"reference_id":{value},"reason":"requested"}}"#);
            assert_invalid(&midas.post(path, &body).await);
        }
        for body in [
            r#"{"reason":"requested"}"#,
            "{}",
            "",
            "[]",
            "7",
            r#"[{"reference_id":"r"}]"#,
        ] {
            assert_invalid(&midas.post(path, body).await);
        }
    }
    assert_eq!(midas.count().await, 0);
}

#[tokio::test]
async fn without_reference_id_the_request_is_rejected_before_it_reaches_business_logic() {
    let midas = MidasPay::start();
    // The handler would panic, and the connection would break.
    let panicking = [("x-demo-panic", "1")];
    assert_invalid(&midas.post_with(ORDERS, &panicking, r#"{"purchase_units":[]}"#).await);
    // A member elsewhere is none.
    let elsewhere = r#"{"order":{"reference_id":"r"},"Reference_id":"r"}"#;
    assert_invalid(&midas.post_with(ORDERS, &panicking, elsewhere).await);
}

#[tokio::test]
async fn a_body_that_is_not_clearly_json_is_a_validation_error() {
    let midas = MidasPay::start();
    let cut = &ORDER[..ORDER.len() - 1];
    let form = "reference_id=r&amount=1";
    let twice = r#"{"reference_id":"a","reference_id":"b"}"#;
    let twice_escaped = r#"{"reference_id":"a","reference\u005fid":"a"}"#;
    let twice_deeper = ORDER.replace(r#""value": "1.00""#, r#""value": "1.00", "value": "2.00""#);
    let two = format!("{ORDER}{ORDER}");
    for body in [
        cut,
        form,
        twice,
        twice_escaped,
        &twice_deeper,
        &two,
        "nonsense",
        "{'reference_id':'r'}",
    ] {
        assert_invalid(&midas.order(body).await);
    }
    assert_eq!(midas.count().await, 0);
    assert_created(&midas.order(ORDER).await);
}

// ---- "No specific character set is enforced beyond a non-empty requirement"

#[tokio::test]
async fn no_specific_character_set_or_length_is_enforced_beyond_a_non_empty_requirement() {
    let midas = MidasPay::start();
    let lengths = [1, 2, 63, 64, 65, 255, 256, 10_000].map(|length| "r".repeat(length));
    let texts = [
        "ord_20260428_0001",
        "refund_42",
        "sub_42",
        "A-Z.a_z-0.9",
        " ",
        "a b",
        "a/b",
        "schl\u{fc}ssel",
        "\u{8a02}\u{55ae}\u{1f4e6}",
        r"\n",
        r"\u0000",
        r#"\""#,
    ];
    let references: Vec<_> = lengths.iter().map(String::as_str).chain(texts).collect();
    for reference in &references {
        let first = midas.order(&body(reference)).await;
        assert_created(&first);
        assert_replay(&midas.order(&body(reference)).await, &first);
    }
    assert_eq!(midas.count().await, references.len());
    assert_invalid(&midas.order(&body("")).await);
}

#[tokio::test]
async fn references_are_compared_verbatim() {
    let midas = MidasPay::start();
    let references = ["r", "R", "r ", " r", "\u{e9}", "e\u{301}"];
    for reference in references {
        assert_created(&midas.order(&body(reference)).await);
    }
    let quoted = midas.order(&body(r#"\"r\""#)).await;
    assert_created(&quoted);
    assert_eq!(midas.count().await, references.len() + 1);
}

// ---- "A failed create may free the reference_id or may not, depending on the channel"

#[tokio::test]
async fn a_failed_create_frees_the_reference_id() {
    let midas = MidasPay::start();
    for status in ["402", "400", "403", "404", "409", "422", "429", "500", "504"] {
        let reference = format!("r{status}");
        let failing = [("x-demo-status", status)];
        let failed = midas.post_with(ORDERS, &failing, &body(&reference)).await;
        assert_eq!((failed.status.as_str(), failed.is_replay()), (status, false));
        // Free, for a changed order, too.
        assert_created(&midas.order(&order(&reference, &[])).await);
    }
    assert_eq!(midas.count().await, 9);
}

#[tokio::test]
async fn a_validation_error_of_the_handlers_own_has_the_same_form_and_frees_the_reference_id() {
    let midas = MidasPay::start();
    let with_amount = |amount| format!(r#"{{"reference_id":"r","amount":{amount}}}"#);
    assert_invalid(&midas.order(&with_amount(0)).await);
    assert_created(&midas.order(&with_amount(5)).await);
}

#[tokio::test]
async fn retries_after_a_definitive_failure_with_a_fresh_reference_id_run() {
    let midas = MidasPay::start();
    midas.post_with(ORDERS, &[("x-demo-status", "402")], ORDER).await;
    let fresh = midas.order(&ORDER.replace("_0001", "_0002")).await;
    assert_created(&fresh);
    midas.demo.assert_one_effect(&fresh).await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_create_may_keep_the_reference_id_where_the_channel_decides_so() {
    let declining = |layer: IdempotencyLayer| {
        let control = open();
        let app = serve(&control, layer, |run| match run {
            1 => (StatusCode::PAYMENT_REQUIRED, r#"{"name":"DECLINED"}"#.to_owned()),
            _ => (StatusCode::CREATED, run.to_string()),
        });
        (control, app)
    };
    let (control, app) = declining(midaspay().store_statuses(Statuses::all()));
    let declined = place(&app, ORDERS, ORDER).await;
    assert_eq!(declined.status, StatusCode::PAYMENT_REQUIRED);
    assert_replay(&place(&app, ORDERS, ORDER).await, &declined);
    assert_duplicate(&place(&app, ORDERS, &ORDER.replace("USD", "EUR")).await);
    assert_duplicate(&place(&app, ORDERS, &order("another", &["ord_20260428_0001_item1"])).await);
    assert_eq!(control.runs(), 1);

    let (control, app) = declining(midaspay());
    assert_eq!(place(&app, ORDERS, ORDER).await, declined);
    assert_created(&place(&app, ORDERS, ORDER).await);
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn a_create_whose_outcome_is_unknown_never_runs_a_second_time() {
    let midas = MidasPay::start();
    let authorization = signed_by("m1");
    let headers = [("authorization", &*authorization), ("x-demo-panic", "1")];
    let request = support::http::post(ORDERS, &headers, ORDER);
    let broken = support::http::send(midas.demo.address(), request).await;
    assert!(broken.is_err(), "the connection breaks");
    for _ in 0..10 {
        assert_eq!(error(&midas.order(ORDER).await), (409, "OUTCOME_UNKNOWN".to_owned()));
    }
    assert_duplicate(&midas.order(&ORDER.replace("USD", "EUR")).await);
    assert_eq!(midas.count().await, 0);
}

// ---- "How long is a reference_id remembered? For the lifetime of the resource it created"

fn midaspay() -> IdempotencyLayer {
    IdempotencyLayer::new(MemoryStore::new()).profile(Profile::midaspay())
}

/// Every path, with a handler that answers by the number of its run.
fn serve(
    control: &Control,
    layer: IdempotencyLayer,
    answer: impl Fn(usize) -> (StatusCode, String) + Clone + Send + Sync + 'static,
) -> Router {
    let control = control.clone();
    let handler = post(async move || answer(control.pass().await));
    Router::new().fallback(handler).layer(layer)
}

async fn place(app: &Router, path: &str, body: &str) -> Answer {
    let request = Request::post(path).header("authorization", signed_by("m1"));
    call(app, request.body(Body::from(body.to_owned())).unwrap()).await
}

#[tokio::test(start_paused = true)]
async fn a_successful_create_keeps_its_reference_id_reserved_indefinitely() {
    let control = open();
    let app = serve(&control, midaspay(), |run| (StatusCode::CREATED, run.to_string()));
    let mut created = Vec::new();
    for path in &OPERATIONS[..6] {
        created.push((path, place(&app, path, ORDER).await));
    }
    for later in [Duration::from_secs(25 * 3600), TEN_YEARS] {
        advance(later).await;
        // What expired would go as these come.
        for number in 0..1000 {
            assert_created(&place(&app, ORDERS, &body(&format!("{later:?} {number}"))).await);
        }
        for (path, first) in &created {
            assert_replay(&place(&app, path, ORDER).await, first);
            assert_duplicate(&place(&app, path, &ORDER.replace("USD", "EUR")).await);
        }
        let with_its_unit = order("later", &["ord_20260428_0001_item1"]);
        assert_duplicate(&place(&app, ORDERS, &with_its_unit).await);
    }
    assert_eq!(control.runs(), 2006);
}

#[tokio::test(start_paused = true)]
async fn what_was_lost_is_not_run_years_later() {
    let control = open();
    let app = serve(&control, midaspay(), |_| panic!("lost"));
    let lost = tokio::spawn({
        let app = app.clone();
        async move { place(&app, ORDERS, ORDER).await }
    });
    assert!(lost.await.is_err());
    advance(TEN_YEARS).await;
    let retry = place(&app, ORDERS, ORDER).await;
    assert_eq!(error(&retry), (409, "OUTCOME_UNKNOWN".to_owned()));
    assert_eq!(control.runs(), 1);
}

#[tokio::test]
async fn the_card_operations_are_one_resource_type_where_each_has_a_route_of_its_own_too() {
    let control = open();
    let app = serve(&control, midaspay(), |run| (StatusCode::CREATED, run.to_string()));
    assert_created(&place(&app, "/v1/card/bind", &body("c")).await);
    assert_duplicate(&place(&app, "/v1/card/token", &body("c")).await);
    assert_eq!(control.runs(), 1);
}

#[tokio::test]
async fn a_retention_may_be_set_and_then_a_reference_id_expires() {
    let midas = MidasPay::start_with(&["--retention", "1ms"]);
    for path in OPERATIONS {
        let first = midas.post(path, &body(path)).await;
        assert_created(&first);
        let next = loop {
            let next = midas.post(path, &body(path)).await;
            if !next.is_replay() {
                break next;
            }
            assert_eq!(next.body, first.body);
        };
        assert_created(&next);
        assert_ne!(next.json()["id"], first.json()["id"]);
    }
}

// ---- "debug_id"

#[tokio::test]
async fn every_debug_id_is_its_own_and_leads_to_the_reason_in_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let midas = MidasPay::start_logged(File::create(&path).unwrap());
    assert_created(&midas.order(ORDER).await);
    let mut reasons = Vec::new();
    for number in 0..100 {
        let (body, reason) = match number % 4 {
            0 => (ORDER.replace("USD", &number.to_string()), "idempotency-key-reused"),
            1 => ("{}".to_owned(), "idempotency-key-missing"),
            2 => (order("a", &["u", "u"]), "idempotency-key-repeated"),
            // The handler's own.
            _ => (r#"{"reference_id":"b","amount":0}"#.to_owned(), "VALIDATION_ERROR"),
        };
        let refused = midas.order(&body).await;
        error(&refused);
        reasons.push((refused.json()["debug_id"].as_str().unwrap().to_owned(), reason));
    }
    let ids: HashSet<_> = reasons.iter().map(|(id, _)| id).collect();
    assert_eq!(ids.len(), 100);
    let log = std::fs::read_to_string(&path).unwrap();
    for (id, reason) in &reasons {
        let lines: Vec<_> = log.lines().filter(|line| line.contains(id.as_str())).collect();
        assert!(
            lines.len() == 1 && lines[0].contains(reason),
            "{id} {reason}: {lines:?}"
        );
    }
    assert!(!log.contains("ord_20260428"), "references are not logged");
}

#[tokio::test]
async fn what_the_guide_does_not_name_is_refused_in_the_same_form() {
    let midas = MidasPay::start();
    let too_large = body(&"r".repeat(1 << 20));
    let refused = midas.order(&too_large).await;
    assert_eq!(error(&refused), (413, "REQUEST_BODY_TOO_LARGE".to_owned()));
    let padded = [("x-demo-response-bytes", "2000000")];
    assert_created(&midas.post_with(ORDERS, &padded, ORDER).await);
    let retry = midas.order(ORDER).await;
    assert_eq!(error(&retry), (409, "RESPONSE_NOT_KEPT".to_owned()));
    assert_eq!(midas.count().await, 1);
}

// ---- "DUPLICATE_ORDER_ID: an internal order-id collision occurred"

#[tokio::test(start_paused = true)]
async fn duplicate_order_id_is_the_handlers_to_return_and_a_fresh_reference_id_or_the_same_one_runs() {
    let control = open();
    let runs = control.clone();
    let handler = async move || {
        let collides = runs.pass().await == 1;
        let response = match collides {
            true => Profile::midaspay_errors().error(
                StatusCode::CONFLICT,
                "DUPLICATE_ORDER_ID",
                "an internal order-id collision occurred",
            ),
            false => http::Response::builder().status(201).body(Bytes::from("{}")).unwrap(),
        };
        response.map(Body::from)
    };
    let app = Router::new().route(ORDERS, post(handler)).layer(midaspay());
    let collided = place(&app, ORDERS, ORDER).await;
    assert_eq!(error(&collided), (409, "DUPLICATE_ORDER_ID".to_owned()));
    assert_eq!(collided.json()["message"], "an internal order-id collision occurred");
    assert_created(&place(&app, ORDERS, &ORDER.replace("_0001", "_0002")).await);
    assert_created(&place(&app, ORDERS, ORDER).await);
    assert_eq!(control.runs(), 3);
}
