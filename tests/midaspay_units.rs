//! MidasPay's purchase units: an order claims its own `reference_id` and that of each unit, all of them or none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use axum::{Router, body::Body, routing::post};
use futures_util::future::join_all;
use http::{Request, StatusCode};
use support::{
    app::{call, open},
    demo::ENDLESS,
    http::Answer,
    midaspay::{
        MidasPay, ORDERS, assert_created, assert_duplicate, assert_invalid, assert_replay, body, error, order,
        signed_by,
    },
};
use tokio::task::yield_now;
use tower_idempotency::{
    Begin, Claim, IdempotencyLayer, Lease, MemoryStore, Profile, RecordId, Retention, Store, StoreError, StoredResponse,
};

/// A body of an order whose unit has this in place of its reference.
fn with_unit(reference: &str, unit: &str) -> String {
    order(reference, &["good", "bad"]).replace(r#""reference_id": "bad""#, unit)
}

// ---- "DUPLICATE_SUB_REFERENCE_ID: within a single request, two purchase_units[].reference_id values were identical"

#[tokio::test]
async fn using_the_same_reference_id_inside_purchase_units_twice_gets_400_duplicate_sub_reference_id() {
    let midas = MidasPay::start();
    for units in [&["u", "u"][..], &["u", "v", "u"], &["v", "u", r"\u0075"]] {
        let refused = midas.order(&order("a", units)).await;
        assert_eq!(
            error(&refused),
            (400, "DUPLICATE_SUB_REFERENCE_ID".to_owned()),
            "{units:?}"
        );
    }
    assert_eq!(midas.count().await, 0);
}

#[tokio::test]
async fn making_each_units_reference_id_unique_is_the_fix_since_nothing_was_consumed() {
    let midas = MidasPay::start();
    let refused = midas.order(&order("a", &["u", "v", "u"])).await;
    assert_eq!(error(&refused), (400, "DUPLICATE_SUB_REFERENCE_ID".to_owned()));
    assert_created(&midas.order(&order("a", &["v", "w"])).await);
    assert_created(&midas.order(&order("b", &["u"])).await);
    assert_eq!(midas.count().await, 2);
}

#[tokio::test]
async fn only_a_single_request_is_looked_at_so_units_that_differ_in_case_or_space_are_unique() {
    let midas = MidasPay::start();
    assert_created(&midas.order(&order("a", &["u", "U", "u ", " u", "ü", "u\u{308}"])).await);
}

// ---- "reference_id (top-level) + per-unit purchase_units[].reference_id"

#[tokio::test]
async fn a_unit_reference_that_another_order_holds_is_a_duplicate() {
    let midas = MidasPay::start();
    let first = midas.order(&order("a", &["u1", "u2"])).await;
    assert_created(&first);
    for units in [&["u1"][..], &["u2"], &["u2", "u1"], &["new", "u1"]] {
        assert_duplicate(&midas.order(&order("b", units)).await);
    }
    assert_replay(&midas.order(&order("a", &["u1", "u2"])).await, &first);
    midas.demo.assert_one_effect(&first).await;
}

#[tokio::test]
async fn an_order_that_is_refused_for_one_unit_consumes_none_of_its_references() {
    let midas = MidasPay::start();
    assert_created(&midas.order(&order("a", &["taken"])).await);
    // The order in which units are claimed is not the order in which they are sent: one is before the taken one.
    let units: Vec<_> = (0..16).map(|unit| format!("u{unit}")).collect();
    let mut all: Vec<_> = units.iter().map(String::as_str).collect();
    all.insert(8, "taken");
    assert_duplicate(&midas.order(&order("b", &all)).await);
    for (number, unit) in units.iter().enumerate() {
        assert_created(&midas.order(&order(&format!("of {number}"), &[unit])).await);
    }
    assert_created(&midas.order(&order("b", &["other"])).await);
    assert_eq!(midas.count().await, 18);
}

#[tokio::test]
async fn a_unit_reference_may_equal_the_top_level_reference() {
    let midas = MidasPay::start();
    let first = midas.order(&order("same", &["same"])).await;
    assert_created(&first);
    assert_replay(&midas.order(&order("same", &["same"])).await, &first);
    assert_duplicate(&midas.order(&order("other", &["same"])).await);
    assert_created(&midas.order(&order("other", &["other"])).await);
}

#[tokio::test]
async fn units_of_two_merchants_do_not_meet() {
    let midas = MidasPay::start();
    assert_created(&midas.order_as(&signed_by("m1"), &order("a", &["u"])).await);
    assert_created(&midas.order_as(&signed_by("m2"), &order("b", &["u"])).await);
    assert_duplicate(&midas.order_as(&signed_by("m2"), &order("c", &["u"])).await);
}

#[tokio::test]
async fn per_unit_references_are_dedup_fields_of_orders_alone() {
    let midas = MidasPay::start();
    let refunds = "/v1/payment/orders/refund";
    assert_created(&midas.order(&order("a", &["u"])).await);
    assert_created(&midas.post(refunds, &order("a", &["u", "u"])).await);
    assert_created(&midas.post(refunds, &order("b", &["u"])).await);
}

#[tokio::test]
async fn every_unit_needs_a_reference_id_that_is_a_string_of_at_least_one_character() {
    let midas = MidasPay::start();
    let missing = r#""other": 1"#;
    for unit in ["null", "7", r#""""#, "true", r#"["u"]"#, r#"{"u":1}"#] {
        let unit = format!(r#""reference_id": {unit}"#);
        assert_invalid(&midas.order(&with_unit("a", &unit)).await);
    }
    assert_invalid(&midas.order(&with_unit("a", missing)).await);
    for units in ["\"u\"", "7", "{}", "[null]", "[7]", "[\"u\"]", "[[]]"] {
        let body = format!(r#"{{"reference_id":"a","purchase_units":{units}}}"#);
        assert_invalid(&midas.order(&body).await);
    }
    assert_eq!(midas.count().await, 0);
    assert_created(&midas.order(&order("a", &["good", "bad"])).await);
}

#[tokio::test]
async fn an_order_without_units_claims_its_own_reference() {
    let midas = MidasPay::start();
    for (reference, units) in [
        ("a", r#""purchase_units":[]"#),
        ("b", r#""purchase_units":null"#),
        ("c", "\"d\":1"),
    ] {
        let body = format!(r#"{{"reference_id":"{reference}",{units}}}"#);
        let first = midas.order(&body).await;
        assert_created(&first);
        assert_replay(&midas.order(&body).await, &first);
    }
}

#[tokio::test]
async fn an_order_may_have_256_units() {
    let midas = MidasPay::start();
    let units: Vec<_> = (0..257).map(|unit| format!("u{unit}")).collect();
    let units: Vec<_> = units.iter().map(String::as_str).collect();
    assert_invalid(&midas.order(&order("a", &units)).await);
    assert_created(&midas.order(&order("a", &units[..256])).await);
    assert_duplicate(&midas.order(&order("b", &units[255..])).await);
}

// ---- how an order ends, its units end

#[tokio::test]
async fn a_failed_create_frees_its_units_too() {
    let midas = MidasPay::start();
    for status in ["402", "400", "409", "500"] {
        let failed = midas
            .post_with(ORDERS, &[("x-demo-status", status)], &order("a", &["u", "v"]))
            .await;
        assert_eq!(failed.status.as_str(), status);
    }
    assert_created(&midas.order(&order("b", &["v"])).await);
    assert_created(&midas.order(&order("a", &["u"])).await);
    assert_eq!(midas.count().await, 2);
}

#[tokio::test]
async fn the_units_of_an_order_whose_outcome_is_unknown_stay_reserved() {
    let midas = MidasPay::start();
    let lost = order("a", &["u", "v"]);
    let authorization = signed_by("m1");
    let headers = [("authorization", &*authorization), ("x-demo-panic", "1")];
    let request = support::http::post(ORDERS, &headers, lost.clone());
    assert!(support::http::send(midas.demo.address(), request).await.is_err());
    for unit in ["u", "v"] {
        assert_duplicate(&midas.order(&order("b", &[unit])).await);
    }
    for _ in 0..5 {
        assert_eq!(error(&midas.order(&lost).await), (409, "OUTCOME_UNKNOWN".to_owned()));
    }
    assert_created(&midas.order(&order("b", &["w"])).await);
    assert_eq!(midas.demo.effects().await.len(), 1, "the lost order has none");
}

#[tokio::test]
async fn a_unit_of_an_order_that_still_runs_is_a_duplicate_and_the_refused_orders_own_references_are_free() {
    let midas = MidasPay::start();
    let (headers, body) = ([ENDLESS], order("a", &["u"]));
    let running = midas.post_with(ORDERS, &headers, &body);
    let others = async {
        midas.demo.until_executed(1).await;
        assert_duplicate(&midas.order(&order("b", &["v", "u"])).await);
        assert_created(&midas.order(&order("b", &["w"])).await);
        assert_created(&midas.order(&order("c", &["v"])).await);
    };
    tokio::select! {
        answer = running => panic!("it still runs: {answer:?}"),
        () = others => {}
    }
    assert_eq!(midas.count().await, 2);
}

#[tokio::test]
async fn units_expire_with_their_order_where_a_retention_is_set() {
    let midas = MidasPay::start_with(&["--retention", "1ms"]);
    let first = midas.order(&order("a", &["u"])).await;
    assert_created(&first);
    let next = loop {
        let next = midas.order(&order("b", &["u"])).await;
        if next.status == StatusCode::CREATED {
            break next;
        }
        assert_duplicate(&next);
    };
    assert_created(&next);
}

// ---- at once

#[tokio::test]
async fn of_sixteen_different_orders_at_once_that_share_a_unit_one_is_made_and_the_others_consume_nothing() {
    let midas = MidasPay::start();
    let orders: Vec<_> = (0..16)
        .map(|number| {
            order(
                &format!("o{number}"),
                &[&format!("a{number}"), "shared", &format!("z{number}")],
            )
        })
        .collect();
    let delayed = [("x-demo-delay-ms", "20")];
    let answers = join_all(orders.iter().map(|order| midas.post_with(ORDERS, &delayed, order))).await;
    let (made, refused): (Vec<_>, Vec<_>) = (0..16).partition(|number| answers[*number].status == StatusCode::CREATED);
    assert_eq!(made.len(), 1);
    midas.demo.assert_one_effect(&answers[made[0]]).await;
    for number in &refused {
        assert_duplicate(&answers[*number]);
    }
    for number in &refused {
        let (own, first, last) = (format!("o{number}"), format!("a{number}"), format!("z{number}"));
        assert_created(&midas.order(&order(&own, &[&first, &format!("free{number}")])).await);
        assert_created(&midas.order(&order(&format!("p{number}"), &[&last])).await);
    }
    assert_replay(&midas.order(&orders[made[0]]).await, &answers[made[0]]);
    assert_eq!(midas.count().await, 31);
}

#[tokio::test]
async fn two_orders_at_once_that_name_the_same_units_in_opposite_orders_do_not_block_each_other() {
    let midas = MidasPay::start();
    for round in 0..20 {
        let units = ["x", "y", "z"].map(|unit| format!("{unit}{round}"));
        let [x, y, z] = units.each_ref().map(String::as_str);
        let (one, other) = (
            order(&format!("a{round}"), &[x, y, z]),
            order(&format!("b{round}"), &[z, y, x]),
        );
        let (one, other) = tokio::join!(midas.order(&one), midas.order(&other));
        let (made, refused) = match one.status {
            StatusCode::CREATED => (one, other),
            _ => (other, one),
        };
        assert_created(&made);
        assert_duplicate(&refused);
    }
    assert_eq!(midas.count().await, 20);
}

/// More than once: a caller may look twice before it waits.
async fn others_first() {
    for _ in 0..3 {
        yield_now().await;
    }
}

/// A memory store that lets everybody else have a turn before each step.
struct Polite(MemoryStore);

impl Store for Polite {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        others_first().await;
        self.0.begin(id, claim).await
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, kept: Retention) -> Result<(), StoreError> {
        others_first().await;
        self.0.complete(lease, response, kept).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.0.renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        others_first().await;
        self.0.release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.0.abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.0.changed(id).await;
    }
}

async fn place(app: &Router, body: String) -> Answer {
    let request = Request::post(ORDERS).header("authorization", signed_by("m1"));
    call(app, request.body(Body::from(body)).unwrap()).await
}

#[tokio::test]
async fn of_two_orders_whose_claims_alternate_one_is_made_whatever_the_order_of_their_units() {
    let control = open();
    let runs = control.clone();
    let handler = post(async move || (StatusCode::CREATED, runs.pass().await.to_string()));
    let layer = IdempotencyLayer::new(Polite(MemoryStore::new())).profile(Profile::midaspay());
    let app = Router::new().route(ORDERS, handler).layer(layer);
    for round in 0..20 {
        let units = ["x", "y"].map(|unit| format!("{unit}{round}"));
        let [x, y] = units.each_ref().map(String::as_str);
        let (one, other) = (
            order(&format!("a{round}"), &[x, y]),
            order(&format!("b{round}"), &[y, x]),
        );
        let answers = tokio::join!(place(&app, one), place(&app, other));
        let statuses = [answers.0.status.as_u16(), answers.1.status.as_u16()];
        assert!(statuses == [201, 409] || statuses == [409, 201], "{statuses:?}");
        // The refused one let go of all that it had.
        let refused = if statuses[0] == 409 { "a" } else { "b" };
        assert_created(&place(&app, body(&format!("{refused}{round}"))).await);
    }
    assert_eq!(control.runs(), 40);
}
