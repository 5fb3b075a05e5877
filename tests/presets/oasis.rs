//! OASIS Repeatable Requests.

use std::time::{Duration, SystemTime};

use axum::body::Body;
use http::{HeaderName, Request, StatusCode};
use tower_idempotency::{IdempotencyLayer, Profile};

use crate::{
    bench::{Bench, hours, post},
    support::{app::open, http::Answer},
};

const ID: &str = "0a4c5de0-0000-4000-8000-00000000000A";
const MINUTES: Duration = Duration::from_secs(60);

fn sent_at(id: &str, time: SystemTime) -> Request<Body> {
    let date = httpdate::fmt_http_date(time);
    post(
        &[("Repeatability-Request-ID", id), ("Repeatability-First-Sent", &date)],
        "1",
    )
}

fn sent_now(id: &str, amount: &str) -> Request<Body> {
    let date = httpdate::fmt_http_date(SystemTime::now());
    post(
        &[("Repeatability-Request-ID", id), ("Repeatability-First-Sent", &date)],
        amount,
    )
}

fn oasis() -> Bench {
    Bench::new(Profile::oasis_repeatable_requests(), sent_now)
}

fn result(answer: &Answer) -> Option<&str> {
    answer.header("repeatability-result")
}

#[tokio::test]
async fn every_method_with_an_effect_is_protected_and_a_request_with_neither_field_passes() {
    oasis().assert_covers(&["POST", "PUT", "PATCH", "DELETE"]).await;
    oasis().assert_key_is_optional(|| post(&[], "1")).await;
}

#[tokio::test]
async fn a_request_id_is_a_uuid() {
    let bench = oasis();
    for id in [
        "",
        "k",
        "0a4c5de000004000800000000000000a",
        "0a4c5de0-0000-4000-8000-00000000000g",
    ] {
        let answer = bench.pay(id, "1").await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{id}");
        assert_eq!(
            (answer.problem().as_str(), result(&answer)),
            ("idempotency-key-invalid", Some("rejected"))
        );
    }
    assert_eq!(bench.control.runs(), 0);
    bench.assert_replayed(ID).await;
}

#[tokio::test]
async fn answers_are_accepted_the_first_and_its_replays_and_have_no_other_marker() {
    let bench = oasis();
    for _ in 0..2 {
        let answer = bench.pay(ID, "1").await;
        assert_eq!(
            (answer.status, result(&answer)),
            (StatusCode::CREATED, Some("accepted"))
        );
        assert_eq!(answer.header("idempotent-replayed"), None);
    }
    assert_eq!(bench.control.runs(), 1);
    let unprotected = bench.send(post(&[], "1")).await;
    assert_eq!(result(&unprotected), None, "nothing was asked for");
}

#[tokio::test(start_paused = true)]
async fn records_are_kept_for_24_hours_by_what_a_clock_may_be_ahead_and_a_minute() {
    // The server's clock is the system's, which goes on by nothing here.
    oasis().assert_kept_for(hours(24) + 6 * MINUTES).await;
}

#[tokio::test]
async fn all_answers_but_5xx_are_kept() {
    let kept = [200, 201, 400, 401, 403, 404, 408, 409, 422, 425, 429];
    oasis().assert_keeps(&kept, &[500, 501, 502, 503, 504]).await;
}

#[tokio::test]
async fn another_body_is_a_400_and_rejected() {
    let answer = oasis().with_another_body().await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(
        (answer.problem().as_str(), result(&answer)),
        ("idempotency-key-reused", Some("rejected"))
    );
}

#[tokio::test]
async fn a_request_that_is_still_running_is_a_409_and_accepted() {
    let answer = Bench::gated(Profile::oasis_repeatable_requests(), sent_now)
        .while_running(ID)
        .await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(
        (answer.problem().as_str(), result(&answer)),
        ("request-in-progress", Some("accepted"))
    );
}

#[tokio::test]
async fn only_one_of_the_two_fields_is_a_400_and_rejected() {
    let bench = oasis();
    let date = httpdate::fmt_http_date(SystemTime::now());
    for (headers, problem) in [
        ([("repeatability-request-id", ID)], "first-sent-invalid"),
        ([("repeatability-first-sent", &*date)], "idempotency-key-missing"),
    ] {
        let answer = bench.send(post(&headers, "1")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert_eq!(
            (answer.problem().as_str(), result(&answer)),
            (problem, Some("rejected"))
        );
    }
    assert_eq!((bench.control.runs(), bench.store.len()), (0, 0));
}

#[tokio::test]
async fn what_was_sent_first_longer_ago_than_records_are_kept_is_a_412_and_rejected() {
    let bench = oasis();
    let answer = bench.send(sent_at(ID, SystemTime::now() - hours(25))).await;
    assert_eq!(answer.status, StatusCode::PRECONDITION_FAILED);
    assert_eq!(
        (answer.problem().as_str(), result(&answer)),
        ("first-sent-too-old", Some("rejected"))
    );
    assert_eq!(bench.control.runs(), 0);
    assert!(bench.runs(sent_at(ID, SystemTime::now() - hours(23))).await);
}

#[tokio::test]
async fn a_clients_clock_may_be_ahead_by_5_minutes() {
    let clock = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let first_sent = HeaderName::from_static("repeatability-first-sent");
    let stopped = |layer: IdempotencyLayer| layer.first_sent_by(first_sent, 5 * MINUTES, move || clock);
    let profile = Profile::oasis_repeatable_requests();
    let bench = Bench::with(open(), profile, stopped, sent_now);
    let late = bench.send(sent_at(ID, clock + 6 * MINUTES)).await;
    assert_eq!(
        (late.status, result(&late)),
        (StatusCode::BAD_REQUEST, Some("rejected"))
    );
    assert_eq!(late.problem(), "first-sent-invalid");
    assert!(bench.runs(sent_at(ID, clock + 5 * MINUTES)).await);
    let own = oasis();
    assert_eq!(
        own.send(sent_at(ID, SystemTime::now() + 10 * MINUTES)).await.status,
        StatusCode::BAD_REQUEST
    );
    assert!(own.runs(sent_at(ID, SystemTime::now() + 4 * MINUTES)).await);
}

#[tokio::test]
async fn request_ids_belong_to_an_authorization_and_a_route() {
    oasis().assert_apart_by_authorization_and_route().await;
}
