//! svix.

use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;
use tower_idempotency::Profile;

use crate::{
    bench::{Bench, by_header, hours, post},
    support::app::spawn,
};

fn svix() -> Bench {
    Bench::new(Profile::svix(), by_header)
}

#[tokio::test]
async fn every_post_with_a_key_is_protected_and_the_key_is_optional() {
    svix().assert_covers(&["POST"]).await;
    svix().assert_key_is_optional(|| post(&[], "1")).await;
}

#[tokio::test]
async fn a_key_has_at_most_255_characters() {
    svix().assert_longest_key(255).await;
}

#[tokio::test(start_paused = true)]
async fn keys_are_kept_for_12_hours() {
    svix().assert_kept_for(hours(12)).await;
}

#[tokio::test]
async fn successes_are_kept_and_a_failed_request_frees_its_key() {
    svix().assert_replayed("k").await;
    svix()
        .assert_keeps(&[200, 201, 202, 204], &[302, 400, 404, 409, 422, 429, 500, 503])
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_waits_for_the_first_request() {
    let bench = Bench::gated(Profile::svix(), by_header);
    let first = spawn(&bench.app, by_header("k", "1"));
    bench.control.entered().await;
    let second = spawn(&bench.app, by_header("k", "1"));
    tokio::time::advance(Duration::from_millis(4_900)).await;
    assert!(!second.is_finished());
    bench.control.let_go();
    let (first, second) = (first.await.unwrap(), second.await.unwrap());
    assert_eq!((second.status, second.body), (first.status, first.body));
    assert_eq!(bench.control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_wait_of_5_seconds_that_runs_out_is_a_409() {
    let bench = Bench::gated(Profile::svix(), by_header);
    let started = Instant::now();
    // The clock goes on by itself when everybody waits.
    let answer = bench.while_running("k").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(answer.problem(), "request-in-progress");
    assert_eq!(started.elapsed().as_secs(), 5);
}

#[tokio::test]
async fn another_body_is_refused_with_a_problem_document() {
    let answer = svix().with_another_body().await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(answer.problem(), "idempotency-key-reused");
}

#[tokio::test]
async fn keys_belong_to_an_authorization_and_a_route() {
    svix().assert_apart_by_authorization_and_route().await;
}
