//! "Idempotency Security Checklist": what it says of a server's behaviour.

use std::time::Duration;

use serde_json::Value;
use tokio::time::advance;
use tower_idempotency::MemoryStore;

use crate::{
    KEY, KEYLESS, PAY, PAYOUT, REFUND, app, assert_created, assert_refused, keyed, of_amount, of_merchant, pay,
    reordered,
    support::{
        app::open,
        demo::Demo,
        http::post,
        serve::{ask, assert_replay},
    },
    with_status,
};

/// "Test collision handling"
#[tokio::test]
async fn a_key_that_collides_with_another_request_of_its_merchant_is_refused_and_changes_nothing() {
    let demo = Demo::start(&[]);
    let first = pay(&demo, KEY, PAYOUT).await;
    for other in [
        of_amount("\"501\""),
        of_amount("500"),
        PAYOUT.replace("2000305228292319592008", "2000305228292319592009"),
        PAYOUT.trim().to_owned(),
        reordered(),
    ] {
        assert_refused(&pay(&demo, KEY, &other).await, 422, "idempotency-key-reused");
    }
    assert_replay(&first, &pay(&demo, KEY, PAYOUT).await);
    assert_eq!(demo.effects().await.len(), 1);
}

/// "Test collision handling"
#[tokio::test]
async fn a_key_does_not_collide_with_itself_at_another_endpoint() {
    let demo = Demo::start(&[]);
    for (number, route) in [PAY, REFUND].into_iter().enumerate() {
        let first = demo.post(route, &keyed(KEY), PAYOUT).await;
        assert_created(&first);
        assert_replay(&first, &demo.post(route, &keyed(KEY), PAYOUT).await);
        let effects = demo.effects().await;
        assert_eq!((effects.len(), &effects[0]["route"]), (number + 1, &route.into()));
    }
}

/// "Avoid infinite key retention"
#[tokio::test(start_paused = true)]
async fn no_key_is_retained_for_ever() {
    let control = open();
    let store = MemoryStore::builder().max_records(3).build();
    let app = app(&control, store);
    for route in [PAY, REFUND, "/v3/payouts/cancel"] {
        assert_created(&ask(&app, post(route, &keyed(KEY), PAYOUT)).await);
    }
    let another = |key| ask(&app, post(PAY, &keyed(key), PAYOUT));
    assert_refused(&another("a").await, 503, "store-full");
    advance(Duration::from_secs(72 * 60 * 60)).await;
    for key in ["a", "b", "c"] {
        assert_created(&another(key).await);
    }
    assert_refused(&another("d").await, 503, "store-full");
}

/// "Avoid keys in logs", "never expose raw customer IDs", "audit logs for duplicates"
#[tokio::test]
async fn the_log_tells_of_duplicates_and_holds_neither_keys_nor_credentials_nor_members_of_bodies() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let demo = Demo::start_with_log("trace", log.reopen().unwrap());
    let payout = &of_merchant("\"merchant-202333\"");
    let credentials = ("authorization", "Bearer b8a3c1d6e2");
    let with_credentials = |key| [&keyed(key)[..], &[credentials]].concat();
    let keys = [
        KEY.to_owned(),
        "customer-123_1712345678900".to_owned(),
        "in-flight-8e03978e".to_owned(),
        "lost-52e1f4a7".to_owned(),
        "unusable 9b2d 3c41".to_owned(),
        "long-enough-to-be-refused".repeat(3),
    ];
    let [key, failing, in_flight, lost, spaced, long] = &keys;

    demo.occupy(PAY, &with_credentials(in_flight), payout).await;
    assert_refused(
        &demo.post(PAY, &with_credentials(in_flight), payout).await,
        409,
        "request-in-progress",
    );
    let first = demo.post(PAY, &with_credentials(key), payout).await;
    assert_replay(&first, &demo.post(PAY, &with_credentials(key), payout).await);
    let reused = demo
        .post(PAY, &with_credentials(key), &payout.replace("500", "501"))
        .await;
    assert_refused(&reused, 422, "idempotency-key-reused");
    demo.post(PAY, &with_status(&keyed(failing), "500"), payout).await;
    demo.lose(PAY, &keyed(lost), payout).await;
    assert_created(&pay(&demo, lost, payout).await);
    for unusable in [spaced, long] {
        assert_refused(&pay(&demo, unusable, payout).await, 400, "idempotency-key-invalid");
    }
    assert_created(&demo.post(REFUND, &KEYLESS, payout).await);
    let duplicate = demo.post(REFUND, &KEYLESS, payout).await;
    assert_refused(&duplicate, 409, "duplicate-request");
    let unreadable = payout.replace("\"Payouts\"", "");
    assert_refused(&pay(&demo, key, &unreadable).await, 400, "request-body-unreadable");
    demo.kill();

    let log = std::fs::read_to_string(log.path()).unwrap();
    for told in [
        "a stored answer is replayed",
        "a lost attempt is taken over",
        "request-in-progress",
        "idempotency-key-reused",
        "idempotency-key-invalid",
        "duplicate-request",
        "request-body-unreadable",
    ] {
        assert!(log.contains(told), "{told:?} is not in\n{log}");
    }
    let body: Value = serde_json::from_str(payout).unwrap();
    let members = body.as_object().unwrap().iter();
    let members = members.flat_map(|(name, value)| [name.as_str(), value.as_str().unwrap()]);
    // Shorter ones are in a time, a record's digits or a sentence by chance.
    let members = members.filter(|text| text.len() >= 8);
    let secrets = keys.iter().map(String::as_str).chain(["customer-123", "b8a3c1d6e2"]);
    for secret in secrets.chain(members) {
        assert!(!log.contains(secret), "{secret:?} is in\n{log}");
    }
}
