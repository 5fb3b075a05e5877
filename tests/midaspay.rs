//! MidasPay's guide "Idempotency", sentence by sentence, against the demo: what is one operation and what is two.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use futures_util::future::join_all;
use support::{
    demo::ENDLESS,
    http::Answer,
    midaspay::{
        MidasPay, OPERATIONS, ORDER, ORDERS, assert_created, assert_duplicate, assert_replay, body, error, order,
        signed_by, signed_with,
    },
};

/// As a client that sends the same bytes until it knows.
async fn retried_until_known(midas: &MidasPay, body: &str) -> Answer {
    loop {
        let answer = midas.order(body).await;
        if answer.is_replay() || error(&answer) != (409, "REQUEST_IN_PROGRESS".to_owned()) {
            return answer;
        }
    }
}

// ---- "MidasPay will only ever create the resource once"

#[tokio::test]
async fn retry_the_same_request_body_as_many_times_as_you_like_and_the_resource_is_only_ever_created_once() {
    let midas = MidasPay::start();
    let first = midas.order(ORDER).await;
    assert_created(&first);
    for _ in 0..20 {
        assert_replay(&midas.order(ORDER).await, &first);
    }
    midas.demo.assert_one_effect(&first).await;
}

#[tokio::test]
async fn if_none_exists_the_request_proceeds_normally_as_it_was_sent() {
    let midas = MidasPay::start();
    assert_created(&midas.order(ORDER).await);
    let effect = &midas.effects().await[0];
    assert_eq!(effect["route"], ORDERS);
    assert_eq!(
        effect["request"],
        serde_json::from_str::<serde_json::Value>(ORDER).unwrap()
    );
}

#[tokio::test]
async fn the_same_business_intent_is_the_same_json_value_whatever_its_form_and_the_stored_resource_is_returned() {
    let midas = MidasPay::start();
    let first = midas.order(ORDER).await;
    let value: serde_json::Value = serde_json::from_str(ORDER).unwrap();
    // serde_json sorts the members by name, which the example does not.
    let reordered = value.to_string();
    assert_ne!(reordered.find("reference_id"), ORDER.find("reference_id"));
    let indented = serde_json::to_string_pretty(&value).unwrap();
    let number = |form| ORDER.replace(r#""quantity": 1 "#, &format!(r#""quantity": {form} "#));
    let escaped = ORDER.replace("Gems", r"\u0047ems").replace("ord_", r"ord\u005f");
    let forms = [reordered, indented, escaped, ORDER.replace('\n', "\r\n\t")];
    for same in forms.into_iter().chain(["1.0", "1.00", "1e0", "100e-2"].map(number)) {
        assert_ne!(same, ORDER);
        assert_replay(&midas.order(&same).await, &first);
    }
    midas.demo.assert_one_effect(&first).await;
}

#[tokio::test]
async fn if_one_exists_with_a_different_body_the_request_is_rejected_with_409_duplicate_reference_id() {
    let midas = MidasPay::start();
    let first = midas.order(ORDER).await;
    let others = [
        // Another amount, currency, items.
        (r#""value": "1.00""#, r#""value": "2.00""#),
        ("USD", "EUR"),
        ("Gems", "Coins"),
        (r#", { "name": "Gold", "quantity": 20 }"#, ""),
        (r#""quantity": 1 "#, r#""quantity": 2 "#),
        ("CREDIT_CARD", "WALLET"),
        ("_item1", "_item2"),
        // Strings are compared as strings, and are no numbers.
        (r#""value": "1.00""#, r#""value": "1.0""#),
        (r#""value": "1.00""#, r#""value": 1.00"#),
        (r#""quantity": 1 "#, r#""quantity": "1" "#),
        // What one double cannot tell apart is not the same.
        (r#""quantity": 1 "#, r#""quantity": 1.00000000000000000001 "#),
        (r#""locale": "en_US""#, r#""locale": "en_US", "note": null"#),
    ];
    for (from, to) in others {
        let other = ORDER.replace(from, to);
        assert_ne!(other, ORDER, "{from}");
        assert_duplicate(&midas.order(&other).await);
    }
    let swapped = ORDER.replace("Gems", "?").replace("Gold", "Gems").replace('?', "Gold");
    assert_duplicate(&midas.order(&swapped).await);
    assert_replay(&midas.order(ORDER).await, &first);
    midas.demo.assert_one_effect(&first).await;
}

#[tokio::test]
async fn the_example_duplicate_reference_id_response_has_name_message_and_debug_id() {
    let midas = MidasPay::start();
    midas.order(ORDER).await;
    let refused = midas.order(&ORDER.replace("USD", "EUR")).await;
    assert_duplicate(&refused);
    assert_eq!(refused.json()["message"], "duplicate reference id");
    assert_eq!(refused.header("link"), None, "nothing of a problem document is left");
}

#[tokio::test]
async fn the_fix_is_to_reuse_the_exact_same_request_body_or_to_choose_a_new_reference_id() {
    let midas = MidasPay::start();
    let first = midas.order(ORDER).await;
    let other = ORDER.replace("USD", "EUR");
    assert_duplicate(&midas.order(&other).await);
    assert_replay(&midas.order(ORDER).await, &first);
    assert_created(&midas.order(&other.replace("_0001", "_0002")).await);
    assert_eq!(midas.count().await, 2);
}

// ---- "Network / 5xx — safe to retry"

#[tokio::test]
async fn a_connection_reset_is_safe_to_retry_since_the_reference_id_guarantees_idempotency() {
    let midas = MidasPay::start();
    let authorization = signed_by("m1");
    midas
        .demo
        .leave(ORDERS, &[("authorization", &authorization)], ORDER)
        .await;
    let answer = retried_until_known(&midas, ORDER).await;
    assert!(answer.is_replay(), "the order that was sent went on without its client");
    midas.demo.assert_one_effect(&answer).await;
}

#[tokio::test]
async fn a_5xx_is_safe_to_retry() {
    let midas = MidasPay::start();
    for status in ["500", "502", "503"] {
        let failed = midas.post_with(ORDERS, &[("x-demo-status", status)], ORDER).await;
        assert_eq!(failed.status.as_str(), status);
    }
    let created = midas.order(ORDER).await;
    assert_created(&created);
    midas.demo.assert_one_effect(&created).await;
}

#[tokio::test]
async fn thirty_two_retries_at_once_create_one_order() {
    let midas = MidasPay::start();
    let delayed = [("x-demo-delay-ms", "50")];
    let answers = join_all((0..32).map(|_| midas.post_with(ORDERS, &delayed, ORDER))).await;
    let resource = midas.order(ORDER).await;
    let mut created = 0;
    for answer in &answers {
        match answer.status.as_u16() {
            201 => {
                created += usize::from(!answer.is_replay());
                assert_eq!(answer.body, resource.body);
            }
            _ => assert_eq!(error(answer), (409, "REQUEST_IN_PROGRESS".to_owned())),
        }
    }
    assert_eq!(created, 1);
    midas.demo.assert_one_effect(&resource).await;
}

#[tokio::test]
async fn while_the_first_request_runs_a_retry_is_told_so_in_the_same_form_and_a_different_body_is_a_duplicate() {
    let midas = MidasPay::start();
    let headers = [ENDLESS];
    let running = midas.post_with(ORDERS, &headers, ORDER);
    let others = async {
        midas.demo.until_executed(1).await;
        for _ in 0..5 {
            let retry = midas.order(ORDER).await;
            assert_eq!(error(&retry), (409, "REQUEST_IN_PROGRESS".to_owned()));
            assert!(retry.header("retry-after").is_some());
        }
        assert_duplicate(&midas.order(&ORDER.replace("USD", "EUR")).await);
    };
    tokio::select! {
        answer = running => panic!("it still runs: {answer:?}"),
        () = others => {}
    }
    assert_eq!(midas.count().await, 0);
}

// ---- "keyed by (merchant_id, resource_type, reference_id)"

#[tokio::test]
async fn every_mutating_endpoint_of_the_table_dedups_by_its_reference_id() {
    let midas = MidasPay::start();
    for path in OPERATIONS {
        let reference = path.replace('/', "_");
        let first = midas.post(path, &body(&reference)).await;
        assert_created(&first);
        assert_replay(&midas.post(path, &body(&reference)).await, &first);
        let other = body(&reference).replace("requested", "fraud");
        assert_duplicate(&midas.post(path, &other).await);
        assert_created(&midas.post(path, &body(&format!("{reference}2"))).await);
    }
    assert_eq!(midas.count().await, 2 * OPERATIONS.len());
}

#[tokio::test]
async fn reusing_the_same_reference_id_for_a_refund_and_a_new_order_is_perfectly_fine() {
    let midas = MidasPay::start();
    let order = midas.order(&body("r")).await;
    let refund = midas.post("/v1/payment/orders/refund", &body("r")).await;
    assert_created(&order);
    assert_created(&refund);
    assert_ne!(order.json()["id"], refund.json()["id"]);
    assert_replay(&midas.order(&body("r")).await, &order);
    assert_replay(&midas.post("/v1/payment/orders/refund", &body("r")).await, &refund);
}

#[tokio::test]
async fn uniqueness_is_enforced_per_resource_type_not_globally_across_the_account() {
    let midas = MidasPay::start();
    let types = &OPERATIONS[..6];
    let mut ids = Vec::new();
    for path in types {
        let created = midas.post(path, &body("r")).await;
        assert_created(&created);
        ids.push(created.json()["id"].to_string());
    }
    ids.sort();
    ids.dedup();
    assert_eq!((ids.len(), midas.count().await), (6, 6));
}

#[tokio::test]
async fn bind_card_and_token_create_are_one_resource_type() {
    let midas = MidasPay::start();
    let bound = midas.post("/v1/card/bind", &body("c")).await;
    assert_duplicate(&midas.post("/v1/card/token", &body("c")).await);
    assert_duplicate(&midas.post("/v1/card/token/create", &body("c")).await);
    assert_replay(&midas.post("/v1/card/bind", &body("c")).await, &bound);
    midas.demo.assert_one_effect(&bound).await;
}

#[tokio::test]
async fn two_different_merchants_can_pick_the_same_string_without_conflicting() {
    let midas = MidasPay::start();
    let one = midas.order_as(&signed_by("m1"), ORDER).await;
    let other = midas.order_as(&signed_by("m2"), ORDER).await;
    assert_created(&one);
    assert_created(&other);
    assert_created(&midas.order_as(&signed_by("m3"), &ORDER.replace("USD", "EUR")).await);
    assert_replay(&midas.order_as(&signed_by("m1"), ORDER).await, &one);
    assert_replay(&midas.order_as(&signed_by("m2"), ORDER).await, &other);
    assert_eq!(midas.count().await, 3);
}

#[tokio::test]
async fn a_merchant_is_its_auth_id_alone() {
    let midas = MidasPay::start();
    let first = midas.order_as(&signed_by("m1"), ORDER).await;
    assert_created(&first);
    for same in [
        signed_by("m1").replace("MERCHANT_ID", "SUB_MERCHANT_ID"),
        signed_by("m1").replace("auth_id_type=MERCHANT_ID,", ""),
        "TXGW-SHA256-RSA2048 auth_id=m1".to_owned(),
    ] {
        assert_replay(&midas.order_as(&same, ORDER).await, &first);
    }
    assert_eq!(midas.count().await, 1);
}

#[tokio::test]
async fn an_order_whose_answer_was_not_kept_is_told_its_status() {
    let midas = MidasPay::start();
    let padded = midas
        .post_with(ORDERS, &[("x-demo-response-bytes", "2000000")], ORDER)
        .await;
    assert_created(&padded);
    let again = midas.order(ORDER).await;
    assert_eq!(
        (again.status, again.json()["name"].as_str()),
        (http::StatusCode::CONFLICT, Some("RESPONSE_NOT_KEPT"))
    );
    let message = again.json()["message"].to_string();
    assert!(message.contains("201"), "{message}");
    assert_eq!(midas.count().await, 1);
}

#[tokio::test]
async fn for_sub_merchants_scoping_is_merchant_wide() {
    let midas = MidasPay::start();
    let of = |sub| body("r").replace("\"reason\"", &format!("\"sub_merchant_id\":\"{sub}\",\"reason\""));
    let first = midas.order(&of("a")).await;
    assert_created(&first);
    assert_duplicate(&midas.order(&of("b")).await);
    midas.demo.assert_one_effect(&first).await;
}

#[tokio::test]
async fn a_request_whose_merchant_cannot_be_read_is_refused_in_the_same_form() {
    let midas = MidasPay::start();
    for unclear in [
        "TXGW-SHA256-RSA2048",
        "TXGW-SHA256-RSA2048 auth_id_type=MERCHANT_ID,nonce_str=1",
        "TXGW-SHA256-RSA2048 auth_id=\"\",auth_id_type=MERCHANT_ID",
        "TXGW-SHA256-RSA2048 auth_id=\"m1\",auth_id=\"m2\",auth_id_type=MERCHANT_ID",
    ] {
        assert_eq!(error(&midas.order_as(unclear, ORDER).await).0, 400, "{unclear}");
    }
    assert_eq!(midas.count().await, 0);
    assert_created(&midas.order(ORDER).await);
}

// ---- "Nonce vs reference_id"

#[tokio::test]
async fn the_nonce_str_does_not_dedupe_business_operations_and_is_not_remembered_across_retries() {
    let midas = MidasPay::start();
    let replayed_signature = signed_with("m1", "one-nonce", 1, "c2ln");
    let first = midas.order_as(&replayed_signature, ORDER).await;
    let second = midas.order_as(&replayed_signature, &order("another", &["u"])).await;
    assert_created(&first);
    assert_created(&second);
    for (nonce, timestamp, signature) in [("other", 1, "c2ln"), ("one-nonce", 2, "c2ln"), ("one-nonce", 1, "b3Ro")] {
        let authorization = signed_with("m1", nonce, timestamp, signature);
        assert_replay(&midas.order_as(&authorization, ORDER).await, &first);
    }
    let reordered = "txgw-sha256-rsa2048 signature=\"x\", nonce_str=\"n,n\", auth_id_type=MERCHANT_ID, auth_id=m1";
    assert_replay(&midas.order_as(reordered, ORDER).await, &first);
    assert_eq!(midas.count().await, 2);
}

#[tokio::test]
async fn only_reference_id_deduplicates_business_intent() {
    let midas = MidasPay::start();
    let same_but_for_the_reference = order("a", &["u1"]).replace("\"a\"", "\"b\"").replace("u1", "u2");
    assert_created(&midas.order(&order("a", &["u1"])).await);
    assert_created(&midas.order(&same_but_for_the_reference).await);
    assert_eq!(midas.count().await, 2);
}

#[tokio::test]
async fn generating_a_new_reference_id_on_every_retry_makes_a_duplicate_order() {
    let midas = MidasPay::start();
    for retry in 0..3 {
        assert_created(&midas.order(&ORDER.replace("_0001", &format!("_{retry}"))).await);
    }
    assert_eq!(midas.count().await, 3);
}

// ---- "Is there an Idempotency-Key header? No."

#[tokio::test]
async fn sending_a_custom_idempotency_key_header_will_be_ignored() {
    let midas = MidasPay::start();
    let key = |key| [("idempotency-key", key)];
    let first = midas.post_with(ORDERS, &key("one"), ORDER).await;
    assert_created(&first);
    assert_replay(&midas.post_with(ORDERS, &key("two"), ORDER).await, &first);
    assert_replay(&midas.order(ORDER).await, &first);
    let second = midas.post_with(ORDERS, &key("one"), &order("another", &["u"])).await;
    assert_created(&second);
    // Not even one that would be refused elsewhere.
    let twice = [("idempotency-key", "\""), ("idempotency-key", "a b")];
    assert_replay(&midas.post_with(ORDERS, &twice, ORDER).await, &first);
    let without_reference = ORDER.replace("\"reference_id\": \"ord_20260428_0001\",", "");
    let missing = midas.post_with(ORDERS, &key("three"), &without_reference).await;
    assert_eq!(error(&missing), (400, "VALIDATION_ERROR".to_owned()));
    assert_eq!(midas.count().await, 2);
}

#[tokio::test]
async fn the_order_itself_is_singular_so_later_actions_operate_on_that_single_order() {
    let midas = MidasPay::start();
    let id = midas.order(ORDER).await.json()["id"].clone();
    let authorize = format!(r#"{{"reference_id":"auth_1","order_id":{id}}}"#);
    let path = "/v1/payment/orders/authorization";
    let first = midas.post(path, &authorize).await;
    assert_created(&first);
    let again = midas.order(ORDER).await.json()["id"].clone();
    assert_replay(
        &midas
            .post(path, &authorize.replace(&*id.to_string(), &again.to_string()))
            .await,
        &first,
    );
    assert_eq!(midas.count().await, 2, "one order and one authorization");
}

#[tokio::test]
async fn other_headers_of_a_retry_count_for_nothing() {
    let midas = MidasPay::start();
    let first = midas.order(ORDER).await;
    let authorization = signed_by("m1");
    let headers = [
        ("authorization", &*authorization),
        ("content-type", "application/json; charset=utf-8"),
        ("user-agent", "another"),
        ("x-request-id", "another"),
    ];
    assert_replay(&midas.demo.post(ORDERS, &headers, ORDER).await, &first);
}
