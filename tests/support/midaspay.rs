//! A merchant of MidasPay's, who signs every request anew, and the demo that serves it.

use std::{
    fs::File,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

use serde_json::Value;

use super::{demo::Demo, http::Answer};

pub const ORDERS: &str = "/v1/payment/orders";

/// The rows of the table of operations, and a second operation of the last one.
pub const OPERATIONS: [&str; 7] = [
    ORDERS,
    "/v1/payment/orders/authorization",
    "/v1/payment/orders/refund",
    "/v1/subscription/create",
    "/v1/mor/session/create",
    "/v1/card/bind",
    "/v1/card/token",
];

/// The example request of the guide, with something in place of its dots.
pub const ORDER: &str = r#"{
"reference_id": "ord_20260428_0001",
"application_context": { "payment_method": { "name": "CREDIT_CARD" }, "locale": "en_US" },
"purchase_units": [
{
"reference_id": "ord_20260428_0001_item1",
"amount": { "currency_code": "USD", "value": "1.00" },
"items": [{ "name": "Gems", "quantity": 1 }, { "name": "Gold", "quantity": 20 }]
}
]
}"#;

/// An order like the example.
pub fn order(reference: &str, units: &[&str]) -> String {
    let amount = r#"{ "currency_code": "USD", "value": "1.00" }"#;
    let unit = |unit: &&str| format!(r#"{{ "reference_id": "{unit}", "amount": {amount} }}"#);
    let units: Vec<_> = units.iter().map(unit).collect();
    format!(
        r#"{{ "reference_id": "{reference}", "purchase_units": [{}] }}"#,
        units.join(", ")
    )
}

/// A body of any operation.
pub fn body(reference: &str) -> String {
    format!(r#"{{"reference_id":"{reference}","reason":"requested"}}"#)
}

/// An `Authorization` as the guide shows it. Nonce, timestamp and signature are others each time.
pub fn signed_by(merchant: &str) -> String {
    static SIGNED: AtomicU64 = AtomicU64::new(0);
    let number = SIGNED.fetch_add(1, SeqCst);
    let (nonce, timestamp) = (format!("{number:032x}"), 1_777_334_400 + number);
    signed_with(merchant, &nonce, timestamp, &format!("MEUCIQ{number:08x}+/aZ=="))
}

pub fn signed_with(merchant: &str, nonce: &str, timestamp: u64, signature: &str) -> String {
    format!(
        "TXGW-SHA256-RSA2048 auth_id=\"{merchant}\",auth_id_type=MERCHANT_ID,nonce_str={nonce},timestamp={timestamp},\
         signature={signature}"
    )
}

/// Status and name of an error, which has to have MidasPay's form and nothing else.
#[track_caller]
pub fn error(answer: &Answer) -> (u16, String) {
    assert_eq!(answer.header("content-type"), Some("application/json"), "{answer:?}");
    assert!(!answer.is_replay());
    let error = answer.json();
    let members: Vec<_> = error.as_object().expect("an object").keys().collect();
    assert_eq!(members, ["debug_id", "message", "name"]);
    for member in members {
        assert!(error[member].as_str().is_some_and(|text| !text.is_empty()), "{error}");
    }
    let name = error["name"].as_str().expect("a string").to_owned();
    (answer.status.as_u16(), name)
}

#[track_caller]
pub fn assert_duplicate(answer: &Answer) {
    assert_eq!(error(answer), (409, "DUPLICATE_REFERENCE_ID".to_owned()), "{answer:?}");
}

#[track_caller]
pub fn assert_invalid(answer: &Answer) {
    assert_eq!(error(answer), (400, "VALIDATION_ERROR".to_owned()), "{answer:?}");
}

/// A first answer: the resource was created now.
#[track_caller]
pub fn assert_created(answer: &Answer) {
    assert_eq!(
        (answer.status.as_u16(), answer.is_replay()),
        (201, false),
        "{:?}",
        answer.body
    );
}

/// The stored resource: status and body of the first answer.
#[track_caller]
pub fn assert_replay(answer: &Answer, first: &Answer) {
    assert!(answer.is_replay(), "{:?}", answer.body);
    assert_eq!((answer.status, &answer.body), (first.status, &first.body));
}

pub struct MidasPay {
    pub demo: Demo,
}

impl MidasPay {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(options: &[&str]) -> Self {
        Self {
            demo: Demo::start(options),
        }
    }

    pub fn start_logged(log: File) -> Self {
        Self {
            demo: Demo::start_with_log("info", log),
        }
    }

    /// An order of the merchant `m1`.
    pub async fn order(&self, body: &str) -> Answer {
        self.post(ORDERS, body).await
    }

    /// Any operation of the merchant `m1`.
    pub async fn post(&self, path: &str, body: &str) -> Answer {
        self.post_with(path, &[], body).await
    }

    pub async fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let authorization = signed_by("m1");
        let headers = [headers, &[("authorization", &*authorization)]].concat();
        self.demo.post(path, &headers, body).await
    }

    /// As an `Authorization` says that may be any.
    pub async fn order_as(&self, authorization: &str, body: &str) -> Answer {
        self.demo.post(ORDERS, &[("authorization", authorization)], body).await
    }

    pub async fn effects(&self) -> Vec<Value> {
        self.demo.effects().await
    }

    pub async fn count(&self) -> usize {
        self.effects().await.len()
    }
}
