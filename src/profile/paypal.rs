//! PayPal.

use std::time::Duration;

use http::{Method, StatusCode};

use super::{Profile, codes_in_capitals};
use crate::{
    key::KeySource,
    rejection::{RejectionFormat, RejectionKind},
};

impl Profile {
    /// PayPal: `PayPal-Request-Id` on POST, optional, at most 108 characters, kept for 72 hours. Another body is a
    /// `DUPLICATE_REQUEST_ID`, a request that is still running a `PREVIOUS_REQUEST_IN_PROGRESS`.
    ///
    /// Source: PayPal's REST reference, "Idempotency" and the error messages of its orders. What it leaves open, and
    /// how it is closed here:
    /// - *"The latest status"*: PayPal answers a duplicate with the resource as it is now. Here every duplicate gets
    ///   the first answer's bytes, which is this crate's promise; the latest status is at the resource's own address.
    /// - *The status of `DUPLICATE_REQUEST_ID`*: 422; of `PREVIOUS_REQUEST_IN_PROGRESS`: 409.
    /// - *Whose ids they are*: each `Authorization` header's. PayPal's access tokens are refreshed: set
    ///   [`scope`](crate::IdempotencyLayer::scope) to the merchant's id.
    /// - *Retention differs from 72 hours for some of its operations*: set it by
    ///   [`route`](crate::IdempotencyLayer::route).
    pub fn paypal() -> Self {
        Self::new("PayPal", |layer| {
            codes_in_capitals(layer)
                .methods([Method::POST])
                .key(KeySource::header("paypal-request-id"))
                .max_key_length(108)
                .optional_key()
                .retention(Duration::from_secs(72 * 60 * 60))
                .rejection_format(errors("INVALID_REQUEST"))
                .rejection_status(RejectionKind::KeyReused, StatusCode::UNPROCESSABLE_ENTITY)
                .rejection_format_of(RejectionKind::KeyReused, errors("UNPROCESSABLE_ENTITY"))
                .rejection_code(RejectionKind::KeyReused, "DUPLICATE_REQUEST_ID")
                .rejection_status(RejectionKind::InProgress, StatusCode::CONFLICT)
                .rejection_format_of(RejectionKind::InProgress, errors("RESOURCE_CONFLICT"))
                .rejection_code(RejectionKind::InProgress, "PREVIOUS_REQUEST_IN_PROGRESS")
                .rejection_format_of(RejectionKind::OutcomeUnknown, errors("RESOURCE_CONFLICT"))
                .rejection_format_of(RejectionKind::ResponseNotKept, errors("RESOURCE_CONFLICT"))
                .rejection_format_of(RejectionKind::StoreUnavailable, errors("SERVICE_UNAVAILABLE"))
                .rejection_format_of(RejectionKind::StoreFull, errors("SERVICE_UNAVAILABLE"))
                .rejection_format_of(RejectionKind::RecordFromNewerVersion, errors("SERVICE_UNAVAILABLE"))
                .rejection_format_of(RejectionKind::RecordUnreadable, errors("INTERNAL_SERVER_ERROR"))
                .rejection_format_of(RejectionKind::TransactionRolledBack, errors("SERVICE_UNAVAILABLE"))
                .rejection_format_of(RejectionKind::TransactionFailed, errors("INTERNAL_SERVER_ERROR"))
                .rejection_format_of(RejectionKind::TransactionMisused, errors("INTERNAL_SERVER_ERROR"))
        })
    }
}

fn errors(name: &str) -> RejectionFormat {
    let rest = r#""message":{title},"debug_id":{debug_id},"details":[{"issue":{code},"description":{detail}}]"#;
    RejectionFormat::json(&format!(r#"{{"name":"{name}",{rest}}}"#))
}
