//! "Strategies for Implementing Idempotency key"

use std::time::Duration;

use tokio::time::{advance, sleep};
use tower_idempotency::{MemoryStore, StoreErrorKind};

use crate::{
    KEY, PAY, PAYOUT, REFUND, app, assert_created, assert_refused, keyed, of_amount, of_merchant, pay,
    support::{
        app::{gated, open},
        demo::Demo,
        faulty::{Fault, FaultyStore, Op},
        http::{Answer, post},
        serve::{ask, assert_replay},
    },
};

const MINUTE: Duration = Duration::from_secs(60);
const MOMENT: Duration = Duration::from_millis(1);

// ---- Using a composite key

/// "Max length: 64 characters"
#[tokio::test]
async fn the_max_length_of_a_key_is_64_characters_quoted_or_bare() {
    let demo = Demo::start(&[]);
    let composite = format!("customer-123_1712345678900_{KEY}");
    assert_eq!(composite.len(), 63, "the guide's own generator stays below the limit");
    let lengths = [1, 64].map(|length| "k".repeat(length));
    for (number, key) in [composite].into_iter().chain(lengths).enumerate() {
        let first = pay(&demo, &key, PAYOUT).await;
        assert_created(&first);
        assert_replay(&first, &pay(&demo, &format!("\"{key}\""), PAYOUT).await);
        assert_replay(&first, &pay(&demo, &key, PAYOUT).await);
        assert_eq!(demo.effects().await.len(), number + 1, "{} characters", key.len());
    }
    for length in [0, 65, 255, 256] {
        let key = "k".repeat(length);
        for unusable in [&key, &format!("\"{key}\"")] {
            assert_refused(&pay(&demo, unusable, PAYOUT).await, 400, "idempotency-key-invalid");
        }
    }
    assert_eq!(demo.effects().await.len(), 3, "an unusable key is not the same as none");
}

/// "Prevents collisions between transactions"
#[tokio::test]
async fn the_same_key_of_different_merchants_does_not_collide() {
    let demo = Demo::start(&[]);
    let mut ids = Vec::new();
    // A number is not the text of its digits, and no merchant is none.
    for merchant in ["\"202333\"", "\"202334\"", "202333", "null"] {
        let body = of_merchant(merchant);
        let first = pay(&demo, KEY, &body).await;
        assert_created(&first);
        assert_replay(&first, &pay(&demo, KEY, &body).await);
        ids.push(first.json()["id"].clone());
    }
    let effects: Vec<_> = demo.effects().await.iter().map(|effect| effect["id"].clone()).collect();
    ids.reverse();
    assert_eq!(effects, ids);
}

/// A merchant's number is no secret: who sends another's gets another's answers only with its credentials.
#[tokio::test]
async fn the_same_key_and_merchant_under_another_authorization_does_not_collide() {
    let demo = Demo::start(&[]);
    for (number, credentials) in ["alice", "mallory"].into_iter().enumerate() {
        let headers = [&keyed(KEY)[..], &[("authorization", credentials)]].concat();
        let first = demo.post(PAY, &headers, PAYOUT).await;
        assert_created(&first);
        assert_replay(&first, &demo.post(PAY, &headers, PAYOUT).await);
        assert_eq!(demo.effects().await.len(), number + 1);
    }
}

// ---- Centralizing key storage with expiration

/// "stored if it does not exist"
#[tokio::test]
async fn if_the_key_exists_the_transaction_is_already_in_progress_and_the_duplicate_is_rejected() {
    let demo = Demo::start(&[]);
    demo.occupy(PAY, &keyed(KEY), PAYOUT).await;
    let duplicate = pay(&demo, KEY, PAYOUT).await;
    assert_refused(&duplicate, 409, "request-in-progress");
    assert!(duplicate.header("retry-after").is_some());
    let other = pay(&demo, KEY, &of_amount("\"501\"")).await;
    assert_refused(&other, 422, "idempotency-key-reused");
    assert_eq!(demo.effects().await.len(), 0);
    assert_created(&demo.post(REFUND, &keyed(KEY), PAYOUT).await);
    assert_eq!(demo.effects().await.len(), 1);
}

/// "a 5-minute expiration period"; the checklist: "5min (payments)"
#[tokio::test(start_paused = true)]
async fn a_payment_is_kept_for_5_minutes() {
    kept_for(PAY, 5 * MINUTE).await;
}

/// The checklist: "72h (refunds)"
#[tokio::test(start_paused = true)]
async fn a_refund_is_kept_for_72_hours() {
    kept_for(REFUND, 72 * 60 * MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_neither_a_payment_nor_a_refund_is_kept_for_72_hours() {
    kept_for("/v3/payouts/cancel", 72 * 60 * MINUTE).await;
}

async fn kept_for(route: &str, retention: Duration) {
    let control = open();
    let app = app(&control, MemoryStore::new());
    let first = ask(&app, post(route, &keyed(KEY), PAYOUT)).await;
    assert_created(&first);
    advance(retention - MOMENT).await;
    assert_replay(&first, &ask(&app, post(route, &keyed(KEY), PAYOUT)).await);
    let other = ask(&app, post(route, &keyed(KEY), of_amount("\"501\""))).await;
    assert_refused(&other, 422, "idempotency-key-reused");
    advance(MOMENT).await;
    // The key is free, for another request too.
    let next = ask(&app, post(route, &keyed(KEY), of_amount("\"501\""))).await;
    assert_created(&next);
    assert_eq!((&next.body[..], control.runs()), (&b"run 2 attempt 1"[..], 2));
}

#[tokio::test]
async fn after_its_expiration_a_key_has_a_new_effect() {
    let demo = Demo::start(&["--retention", "1ms"]);
    for (number, route) in [PAY, REFUND].into_iter().enumerate() {
        let first = demo.post(route, &keyed(KEY), PAYOUT).await;
        let expired = |next: &Answer| !next.is_replay();
        let next = demo.until(route, &keyed(KEY), PAYOUT, expired).await;
        assert_created(&next);
        assert_ne!(next.json()["id"], first.json()["id"]);
        assert_eq!(demo.effects().await.len(), 2 * (number + 1));
    }
}

/// "an ongoing customer transaction is not overwritten": the guide's own storage forgets it after five minutes.
#[tokio::test(start_paused = true)]
async fn an_ongoing_transaction_is_not_overwritten_however_long_it_takes() {
    let control = gated();
    let app = app(&control, MemoryStore::new());
    let ongoing = tokio::spawn({
        let app = app.clone();
        async move { ask(&app, post(PAY, &keyed(KEY), PAYOUT)).await }
    });
    control.entered().await;
    sleep(60 * MINUTE).await;
    let duplicate = ask(&app, post(PAY, &keyed(KEY), PAYOUT)).await;
    assert_refused(&duplicate, 409, "request-in-progress");
    control.let_go();
    let first = ongoing.await.unwrap();
    assert_created(&first);
    advance(5 * MINUTE - MOMENT).await;
    assert_replay(&first, &ask(&app, post(PAY, &keyed(KEY), PAYOUT)).await);
    assert_eq!(control.runs(), 1);
}

/// "prevents indefinite locks"
#[tokio::test(start_paused = true)]
async fn a_transaction_that_shows_no_sign_of_life_does_not_lock_its_key_indefinitely() {
    let control = gated();
    let store = FaultyStore::default();
    store.fail(Op::Renew, [Fault::Error(StoreErrorKind::Fenced)]);
    let app = app(&control, store);
    let dead = tokio::spawn({
        let app = app.clone();
        async move { ask(&app, post(PAY, &keyed(KEY), PAYOUT)).await }
    });
    control.entered().await;
    advance(MINUTE - MOMENT).await;
    let early = ask(&app, post(PAY, &keyed(KEY), PAYOUT)).await;
    assert_refused(&early, 409, "request-in-progress");
    advance(MOMENT).await;
    control.let_go();
    control.let_go();
    let next = ask(&app, post(PAY, &keyed(KEY), PAYOUT)).await;
    assert_created(&next);
    assert!(next.body.ends_with(b"attempt 2"), "{next:?}");
    dead.await.unwrap();
    // Nor does what it said too late take the place of what was answered.
    assert_replay(&next, &ask(&app, post(PAY, &keyed(KEY), PAYOUT)).await);
}

// ---- Applying a lock before processing

/// "two simultaneous processes"
#[tokio::test]
async fn two_simultaneous_requests_do_not_execute_the_same_transaction() {
    let control = gated();
    let app = app(&control, MemoryStore::new());
    let (first, second) = (
        ask(&app, post(PAY, &keyed(KEY), PAYOUT)),
        ask(&app, post(PAY, &keyed(KEY), PAYOUT)),
    );
    let (first, second) = tokio::join!(first, async {
        let second = second.await;
        control.let_go();
        second
    });
    assert_created(&first);
    assert_refused(&second, 409, "request-in-progress");
    assert_eq!(control.runs(), 1);
}
