//! MidasPay.

use http::{Method, StatusCode};

use super::{Profile, codes_in_capitals};
use crate::{
    fingerprint::Fingerprinter,
    key::{KeySource, any_text},
    record::Retention,
    rejection::{RejectionFormat, RejectionKind},
    statuses::Statuses,
};

/// The resource types of its table of endpoints, beside orders, which have units.
const RESOURCES: [(&str, &str); 5] = [
    ("/v1/payment/orders/authorization", "authorization"),
    ("/v1/payment/orders/refund", "refund"),
    ("/v1/subscription/create", "subscription"),
    ("/v1/mor/session/create", "checkout session"),
    ("/v1/card/{*operation}", "card"),
];

impl Profile {
    /// MidasPay: the body's `/reference_id`, and on orders each `/purchase_units/*/reference_id`, is claimed for
    /// `(merchant, resource type)`, for ever. The same JSON value again is answered with the stored resource; another
    /// one is a 409 `DUPLICATE_REFERENCE_ID`. An `Idempotency-Key` header is ignored.
    ///
    /// Source: MidasPay's guide "Idempotency". What it leaves open, and how it is closed here:
    /// - *Same business intent*: the same JSON value, whatever the order of members and the white space
    ///   ([`Fingerprinter::canonical_json`]), at the same path.
    /// - *The merchant*: `auth_id` of `Authorization: TXGW-SHA256-RSA2048 …`; `auth_id_type`, nonce, timestamp and
    ///   signature count for nothing. Another scheme counts as a whole, and its absence as such. Where two merchants can
    ///   have the same `auth_id` under different types, set
    ///   [`scope_authorization`](crate::IdempotencyLayer::scope_authorization) to both.
    /// - *Whether a failed create frees its reference* ("depending on the channel"): it does. To keep every answer, add
    ///   [`store_statuses`](crate::IdempotencyLayer::store_statuses). **A handler must not fail after an effect** as
    ///   long as failures free the reference.
    /// - *Units that one order shares with another*: 409 `DUPLICATE_REFERENCE_ID`. *A unit without a reference*: a
    ///   validation error, as for the order itself.
    /// - *A request that is still running*: 409 `REQUEST_IN_PROGRESS`. *The name of validation errors*:
    ///   `VALIDATION_ERROR`.
    /// - *The length of a reference*: at most 64 characters are advised, and none are refused for it.
    /// - *`DUPLICATE_ORDER_ID`* is the handler's to return:
    ///   [`midaspay_errors`](Self::midaspay_errors) makes it.
    /// - *A create whose outcome is unknown* (a panic, a lost process): 409 `OUTCOME_UNKNOWN` for ever, and its
    ///   units' references stay taken, since nothing is forgotten. Where handlers are safe to repeat, set the
    ///   [`guarantee`](crate::IdempotencyLayer::guarantee) to [`AtLeastOnce`](crate::Guarantee::AtLeastOnce).
    /// - *Other routes*: protected likewise, each as a resource type of its own.
    pub fn midaspay() -> Self {
        Self::new("MidasPay", |layer| {
            let layer = codes_in_capitals(layer)
                .methods([Method::POST])
                .key(KeySource::body("/reference_id"))
                .key_rule(any_text)
                .max_key_length(usize::MAX)
                .require_key()
                .scope_authorization("TXGW-SHA256-RSA2048", ["auth_id"])
                .fingerprint(Fingerprinter::canonical_json())
                .retention(Retention::Forever)
                .store_statuses(Statuses::success())
                .rejection_format(Self::midaspay_errors())
                .rejection_status(RejectionKind::KeyReused, StatusCode::CONFLICT)
                .rejection_code(RejectionKind::KeyReused, "DUPLICATE_REFERENCE_ID")
                .rejection_title(RejectionKind::KeyReused, "duplicate reference id")
                .rejection_code(RejectionKind::KeyRepeated, "DUPLICATE_SUB_REFERENCE_ID")
                .rejection_title(RejectionKind::KeyRepeated, "duplicate sub reference id")
                .rejection_code(RejectionKind::KeyMissing, "VALIDATION_ERROR")
                .rejection_code(RejectionKind::KeyInvalid, "VALIDATION_ERROR")
                .rejection_code(RejectionKind::BodyUnreadable, "VALIDATION_ERROR");
            let layer = RESOURCES.iter().fold(layer, |layer, (route, resource)| {
                layer.route(route, |layer| layer.operation(*resource))
            });
            layer.route("/v1/payment/orders", |orders| {
                let units = "/purchase_units/*/reference_id";
                orders
                    .operation("order")
                    .key(KeySource::body("/reference_id").and_each(units))
            })
        })
    }

    /// The form of MidasPay's errors: `{"name","message","debug_id"}`. Its
    /// [`error`](RejectionFormat::error) makes those that a handler returns.
    pub fn midaspay_errors() -> RejectionFormat {
        RejectionFormat::json(r#"{"name":{code},"message":{detail},"debug_id":{debug_id}}"#)
    }
}
