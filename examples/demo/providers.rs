//! The operations of each provider, and how its routes are protected.

use axum::{
    body::{Body, Bytes},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;
use tower_idempotency::{IdempotencyLayer, Profile};

/// Routes that are protected alike.
pub struct Provider {
    pub routes: &'static [&'static str],
    /// What the ids of its resources start with.
    pub prefix: &'static str,
    pub protect: fn(IdempotencyLayer) -> IdempotencyLayer,
    /// An error of its handlers, in the form of its API.
    pub error: fn(StatusCode, &str) -> Response,
}

pub const PROVIDERS: &[Provider] = &[
    // The crate's defaults.
    Provider {
        routes: &["/payments"],
        prefix: "pay",
        protect: IdempotencyLayer::require_key,
        error: problem,
    },
    Provider {
        routes: &["/v3/check/digital"],
        prefix: "check",
        protect: |layer| layer.profile(Profile::checkbook()),
        error: problem,
    },
    Provider {
        routes: &["/v3/payouts/pay", "/v3/payouts/refund"],
        prefix: "payout",
        protect: |layer| layer.profile(Profile::pockyt()),
        error: problem,
    },
    Provider {
        routes: &[
            "/v1/payment/orders",
            "/v1/payment/orders/authorization",
            "/v1/payment/orders/refund",
            "/v1/subscription/create",
            "/v1/mor/session/create",
            "/v1/card/{*rest}",
        ],
        prefix: "midas",
        protect: |layer| layer.profile(Profile::midaspay()),
        error: midaspay_error,
    },
    Provider {
        routes: &["/checkout/v1/payment"],
        prefix: "checkout",
        protect: |layer| layer.profile(Profile::doku()),
        error: problem,
    },
];

pub fn problem(status: StatusCode, detail: &str) -> Response {
    let problem = json!({
        "type": "about:blank",
        "title": status.canonical_reason().unwrap_or("Error"),
        "status": status.as_u16(),
        "detail": detail,
    });
    let content_type = [(header::CONTENT_TYPE, "application/problem+json")];
    (status, content_type, problem.to_string()).into_response()
}

fn midaspay_error(status: StatusCode, message: &str) -> Response {
    let code = match status {
        StatusCode::BAD_REQUEST => "VALIDATION_ERROR",
        _ => "INTERNAL_ERROR",
    };
    let error = Profile::midaspay_errors().error(status, code, message);
    error.map(|body: Bytes| Body::from(body))
}
