//! The operations of each provider, and how its routes are protected.

use std::time::Duration;

use tower_idempotency::{Guarantee, IdempotencyLayer, KeySource};

/// Routes that are protected alike.
pub struct Provider {
    pub routes: &'static [&'static str],
    /// What the ids of its resources start with.
    pub prefix: &'static str,
    pub protect: fn(IdempotencyLayer) -> IdempotencyLayer,
}

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);

pub const PROVIDERS: &[Provider] = &[
    // The crate's defaults.
    Provider {
        routes: &["/payments"],
        prefix: "pay",
        protect: IdempotencyLayer::require_key,
    },
    Provider {
        routes: &["/v3/check/digital"],
        prefix: "check",
        protect: |layer| layer.store_when(|status| status.is_success()),
    },
    Provider {
        routes: &["/v3/payouts/pay"],
        prefix: "payout",
        protect: |layer| pockyt(layer).retention(5 * MINUTE),
    },
    Provider {
        routes: &["/v3/payouts/refund"],
        prefix: "refund",
        protect: |layer| pockyt(layer).retention(72 * HOUR),
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
        protect: |layer| layer,
    },
    Provider {
        routes: &["/checkout/v1/payment"],
        prefix: "checkout",
        protect: |layer| {
            layer
                .key(KeySource::headers(["x-request-id", "request-id"]))
                .require_key()
        },
    },
];

fn pockyt(layer: IdempotencyLayer) -> IdempotencyLayer {
    layer
        .key(KeySource::header("pockyt-request-id"))
        .max_key_length(64)
        .guarantee(Guarantee::AtLeastOnce)
        .store_when(|status| status.is_success())
}
