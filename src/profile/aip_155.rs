//! Google's API improvement proposal 155.

use http::{Method, StatusCode};

use super::Profile;
use crate::{
    key::{KeySource, uuid},
    rejection::{RejectionFormat, RejectionKind},
    statuses::Statuses,
};

impl Profile {
    /// Google AIP-155: the body's `request_id`, a UUID of 36 characters, optional. Successes are kept.
    ///
    /// Source: AIP-155, "Request identification", and AIP-193 for the form of errors. What they leave open, and how it
    /// is closed here:
    /// - *How long*: 24 hours, the crate's default. *A request that is still running*: 409 `ABORTED`.
    /// - *Another body under the same id*: 400 `INVALID_ARGUMENT`.
    /// - *A failed request*: its id is free. **A handler must not fail after an effect.**
    /// - *A body that is not JSON*, or is over the [limit](crate::IdempotencyLayer::max_request_body): refused, since it
    ///   could not be seen whether it has an id.
    pub fn aip_155() -> Self {
        const ERRORS: &str = r#"{"error":{"code":{status},"message":{detail},"status":{code}}}"#;
        Self::new("AIP-155", |layer| {
            let layer = layer
                .key(KeySource::body("/request_id"))
                .methods([Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
                .max_key_length(36)
                .key_rule(uuid)
                .optional_key()
                .store_statuses(Statuses::success())
                .rejection_format(RejectionFormat::json(ERRORS))
                .rejection_status(RejectionKind::KeyReused, StatusCode::BAD_REQUEST);
            RejectionKind::ALL.iter().fold(layer, |layer, kind| {
                let status = match kind {
                    RejectionKind::InProgress | RejectionKind::TransactionRolledBack => "ABORTED",
                    RejectionKind::OutcomeUnknown | RejectionKind::FirstSentTooOld => "FAILED_PRECONDITION",
                    RejectionKind::ResponseNotKept | RejectionKind::DuplicateRequest => "ALREADY_EXISTS",
                    RejectionKind::StoreUnavailable
                    | RejectionKind::StoreFull
                    | RejectionKind::RecordFromNewerVersion => "UNAVAILABLE",
                    RejectionKind::RecordUnreadable => "DATA_LOSS",
                    RejectionKind::TransactionFailed | RejectionKind::TransactionMisused => "INTERNAL",
                    RejectionKind::BodyTooLarge => "RESOURCE_EXHAUSTED",
                    _ => "INVALID_ARGUMENT",
                };
                layer.rejection_code(*kind, status)
            })
        })
    }
}
