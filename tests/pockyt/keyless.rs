//! "inherently prevents duplicate transaction processing even without an idempotency key"

use std::time::Duration;

use tokio::time::advance;
use tower_idempotency::MemoryStore;

use crate::{
    KEY, KEYLESS, PAY, PAYOUT, REFUND, app, assert_created, assert_refused, keyed, of_amount, of_merchant, pay,
    reordered,
    support::{
        app::open,
        demo::Demo,
        http::{Answer, post},
        serve::{ask, assert_replay},
    },
    with_status,
};

/// "returning a 'Duplicate request error'"
#[track_caller]
fn assert_duplicate(answer: &Answer) {
    assert_refused(answer, 409, "duplicate-request");
    assert_eq!(answer.json()["title"], "Duplicate request error");
}

async fn pay_keyless(demo: &Demo, body: &str) -> Answer {
    demo.post(PAY, &KEYLESS, body).await
}

/// "for identical requests"
#[tokio::test]
async fn an_identical_request_without_a_key_gets_the_duplicate_request_error() {
    let demo = Demo::start(&[]);
    for (number, route) in [PAY, REFUND].into_iter().enumerate() {
        assert_created(&demo.post(route, &KEYLESS, PAYOUT).await);
        for _ in 0..3 {
            assert_duplicate(&demo.post(route, &KEYLESS, PAYOUT).await);
        }
        let effects = demo.effects().await;
        assert_eq!(effects.len(), number + 1, "no handler ran for a duplicate");
        assert_eq!(effects[0]["route"], route);
    }
}

/// "identical": the bytes of the body count, the merchant and who asks.
#[tokio::test]
async fn a_request_without_a_key_that_is_not_identical_is_executed() {
    let demo = Demo::start(&[]);
    assert_created(&pay_keyless(&demo, PAYOUT).await);
    let others = [
        of_amount("\"501\""),
        of_amount("500"),
        of_merchant("\"202334\""),
        reordered(),
        PAYOUT.trim().to_owned(),
    ];
    for other in &others {
        assert_created(&pay_keyless(&demo, other).await);
        assert_duplicate(&pay_keyless(&demo, other).await);
    }
    let headers = [&KEYLESS[..], &[("authorization", "another")]].concat();
    assert_created(&demo.post(PAY, &headers, PAYOUT).await);
    assert_duplicate(&demo.post(PAY, &headers, PAYOUT).await);
    assert_eq!(demo.effects().await.len(), 1 + others.len() + 1);
}

/// "rather than an error"
#[tokio::test]
async fn with_a_key_the_original_response_takes_the_place_of_the_error() {
    let demo = Demo::start(&[]);
    let first = pay(&demo, KEY, PAYOUT).await;
    assert_replay(&first, &pay(&demo, KEY, PAYOUT).await);
    // Neither kind of request knows of the other: who sends no key has named no operation.
    assert_created(&pay_keyless(&demo, PAYOUT).await);
    assert_duplicate(&pay_keyless(&demo, PAYOUT).await);
    assert_created(&pay(&demo, "another-key", PAYOUT).await);
    assert_replay(&first, &pay(&demo, KEY, PAYOUT).await);
    assert_eq!(demo.effects().await.len(), 3);
}

#[tokio::test]
async fn an_identical_request_without_a_key_that_is_still_running_is_a_conflict() {
    let demo = Demo::start(&[]);
    demo.occupy(PAY, &KEYLESS, PAYOUT).await;
    let duplicate = pay_keyless(&demo, PAYOUT).await;
    assert_refused(&duplicate, 409, "request-in-progress");
    assert!(duplicate.header("retry-after").is_some());
    assert_eq!(demo.effects().await.len(), 0);
    assert_created(&pay_keyless(&demo, &of_amount("\"501\"")).await);
    assert_eq!(demo.effects().await.len(), 1);
}

#[tokio::test]
async fn of_identical_requests_without_a_key_at_the_same_time_one_is_executed() {
    let demo = Demo::start(&[]);
    let headers = [&KEYLESS[..], &[("x-demo-delay-ms", "200")]].concat();
    let answers = (0..32).map(|_| demo.post(PAY, &headers, PAYOUT));
    let answers = futures_util::future::join_all(answers).await;
    let (created, others): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status.is_success());
    assert_eq!((created.len(), others.len()), (1, 31));
    for other in others {
        assert_eq!(other.status, http::StatusCode::CONFLICT);
        assert!(["request-in-progress", "duplicate-request"].contains(&&*other.problem()));
    }
    assert_duplicate(&pay_keyless(&demo, PAYOUT).await);
    assert_eq!(demo.effects().await.len(), 1);
}

#[tokio::test]
async fn a_request_without_a_key_that_failed_or_was_lost_is_executed_again() {
    let demo = Demo::start(&[]);
    for status in ["402", "500"] {
        let failed = demo.post(PAY, &with_status(&KEYLESS, status), PAYOUT).await;
        assert_eq!(failed.status.as_str(), status);
    }
    let executed = pay_keyless(&demo, PAYOUT).await;
    assert_created(&executed);
    assert_eq!(executed.json()["attempt"], 1);
    demo.lose(REFUND, &KEYLESS, PAYOUT).await;
    let executed = demo.post(REFUND, &KEYLESS, PAYOUT).await;
    assert_created(&executed);
    assert_eq!(executed.json()["attempt"], 2);
    assert_duplicate(&demo.post(REFUND, &KEYLESS, PAYOUT).await);
    assert_eq!(demo.effects().await.len(), 2);
}

/// Nor does its client's leaving make it another one.
#[tokio::test]
async fn a_request_without_a_key_whose_client_left_is_a_duplicate_once_it_is_done() {
    let demo = Demo::start(&[]);
    demo.leave(PAY, &KEYLESS, PAYOUT).await;
    assert_duplicate(&demo.settled(PAY, &KEYLESS, PAYOUT).await);
    assert_eq!(demo.effects().await.len(), 1);
}

#[tokio::test]
async fn after_its_expiration_an_identical_request_without_a_key_has_a_new_effect() {
    let demo = Demo::start(&["--retention", "1ms"]);
    let first = pay_keyless(&demo, PAYOUT).await;
    let expired = |next: &Answer| next.status.is_success();
    let next = demo.until(PAY, &KEYLESS, PAYOUT, expired).await;
    assert_created(&next);
    assert_ne!(next.json()["id"], first.json()["id"]);
    assert_eq!(demo.effects().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn identical_requests_without_a_key_are_duplicates_for_as_long_as_keys_are_kept() {
    const MOMENT: Duration = Duration::from_millis(1);
    for (route, minutes) in [(PAY, 5), (REFUND, 72 * 60)] {
        let control = open();
        let app = app(&control, MemoryStore::new());
        let keyless = || ask(&app, post(route, &KEYLESS, PAYOUT));
        assert_created(&keyless().await);
        advance(Duration::from_secs(60 * minutes) - MOMENT).await;
        assert_duplicate(&keyless().await);
        advance(MOMENT).await;
        assert_created(&keyless().await);
        assert_eq!(control.runs(), 2, "{route}");
    }
}

/// An empty key is not the absence of one.
#[tokio::test]
async fn a_key_that_cannot_be_used_does_not_make_a_request_one_without_a_key() {
    let demo = Demo::start(&[]);
    for unusable in ["", "\"\"", "a b", &"k".repeat(65)] {
        let refused = demo.post(PAY, &keyed(unusable), PAYOUT).await;
        assert_refused(&refused, 400, "idempotency-key-invalid");
    }
    assert_created(&pay_keyless(&demo, PAYOUT).await);
    assert_eq!(demo.effects().await.len(), 1);
}
