//! A provider of one's own: `cargo run --example provider`.
//!
//! Quayside, which nobody runs, moves money between accounts. A transfer has a name in its body, and so has each of its
//! legs; credentials are signed anew for every attempt; errors have a form of their own.

use std::time::Duration;

use axum::{
    Json, Router,
    body::Body,
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use serde::{Deserialize, Serialize};
use tower_idempotency::{
    Attempt, Fingerprinter, IdempotencyLayer, Keep, KeySource, MemoryStore, Profile, RejectionFormat, RejectionKind,
};

/// The form of Quayside's errors.
fn quayside_errors() -> RejectionFormat {
    RejectionFormat::json(r#"{"fault":{"code":{code},"text":{detail},"ref":{debug_id}}}"#)
}

/// Quayside: `/transfer_id` names a transfer and each `/legs/*/leg_id` a leg of it, for one account. Transfers are kept
/// for 24 hours and reversals for 30 days.
fn quayside() -> Profile {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    Profile::new("Quayside", |layer| {
        layer
            // Which requests, and under which key.
            .methods([Method::POST])
            .key(KeySource::body("/transfer_id"))
            .max_key_length(40)
            .require_key()
            // Whom it belongs to: `Authorization: QS-HMAC account="a1",nonce="…",signature="…"`.
            .scope_authorization("QS-HMAC", ["account"])
            // What makes a second request the same: the JSON value, however it is written.
            .fingerprint(Fingerprinter::canonical_json())
            // How long.
            .retention(DAY)
            // What a refused request is told.
            .rejection_format(quayside_errors())
            .rejection_status(RejectionKind::KeyReused, StatusCode::CONFLICT)
            .rejection_code(RejectionKind::KeyReused, "ID_TAKEN")
            .rejection_code(RejectionKind::KeyRepeated, "LEG_TWICE")
            .rejection_code(RejectionKind::InProgress, "TRY_LATER")
            // Where routes differ.
            .route("/v1/transfers", |transfers| {
                transfers.key(KeySource::body("/transfer_id").and_each("/legs/*/leg_id"))
            })
            .route("/v1/reversals", |reversals| reversals.retention(30 * DAY))
    })
}

#[derive(Deserialize)]
struct Transfer {
    transfer_id: String,
    #[serde(default)]
    legs: Vec<Leg>,
}

#[derive(Deserialize)]
struct Leg {
    cents: u64,
}

#[derive(Serialize)]
struct Moved {
    transfer_id: String,
    cents: u64,
    /// The operation's own name, for the services that the handler calls.
    booking: String,
}

async fn transfer(attempt: Attempt, Json(transfer): Json<Transfer>) -> Response {
    let mut legs = transfer.legs.iter();
    let Some(cents) = legs.try_fold(0, |sum: u64, leg| sum.checked_add(leg.cents)) else {
        let fault = quayside_errors().error(StatusCode::BAD_REQUEST, "TOO_MUCH", "nobody has that much");
        return fault.map(Body::from).into_response();
    };
    if cents > 100_000 {
        // Nothing moved: the same names may be tried again, once there is money.
        let fault = quayside_errors().error(
            StatusCode::PAYMENT_REQUIRED,
            "NO_FUNDS",
            "the account does not hold that",
        );
        return (Keep::Nothing, fault.map(Body::from)).into_response();
    }
    let booking = attempt.id().to_hex();
    let transfer_id = transfer.transfer_id;
    let moved = Moved {
        transfer_id,
        cents,
        booking,
    };
    (StatusCode::CREATED, Json(moved)).into_response()
}

async fn reverse() -> &'static str {
    "reversed\n"
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let idempotency = IdempotencyLayer::new(MemoryStore::new()).profile(quayside());
    let app = Router::new()
        .route("/v1/transfers", post(transfer))
        .route("/v1/reversals", post(reverse))
        .layer(idempotency);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    axum::serve(listener, app).await
}
