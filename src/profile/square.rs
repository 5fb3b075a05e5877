//! Square.

use http::{Method, StatusCode};

use super::{Profile, codes_in_capitals};
use crate::{
    key::KeySource,
    rejection::{RejectionFormat, RejectionKind},
    statuses::Statuses,
};

impl Profile {
    /// Square: the body's `idempotency_key`, required, at most 45 characters. Successes are kept. Another body is a 400
    /// `IDEMPOTENCY_KEY_REUSED`.
    ///
    /// Source: Square's developer guide, "Idempotency". What it leaves open, and how it is closed here:
    /// - *How long*: 24 hours, the crate's default. *A request that is still running*: 409.
    /// - *A failed request*: its key is free. **A handler must not fail after an effect.**
    /// - *Whose keys they are*: each `Authorization` header's, for each route.
    /// - *The form of the body*: its bytes count; add `.fingerprint(Fingerprinter::canonical_json())` where clients
    ///   write the same JSON in several ways.
    pub fn square() -> Self {
        const ERRORS: &str = concat!(
            r#"{"errors":[{"category":"INVALID_REQUEST_ERROR","code":{code},"detail":{detail},"#,
            r#""field":"idempotency_key"}]}"#,
        );
        const OURS: &str = r#"{"errors":[{"category":"API_ERROR","code":{code},"detail":{detail}}]}"#;
        Self::new("Square", |layer| {
            let layer = codes_in_capitals(layer)
                .methods([Method::POST])
                .key(KeySource::body("/idempotency_key"))
                .max_key_length(45)
                .require_key()
                .store_statuses(Statuses::success())
                .rejection_format(RejectionFormat::json(ERRORS))
                .rejection_status(RejectionKind::KeyReused, StatusCode::BAD_REQUEST)
                .rejection_code(RejectionKind::KeyReused, "IDEMPOTENCY_KEY_REUSED")
                .rejection_code(RejectionKind::KeyMissing, "MISSING_REQUIRED_PARAMETER")
                .rejection_code(RejectionKind::KeyInvalid, "INVALID_VALUE");
            let ours = [
                RejectionKind::StoreUnavailable,
                RejectionKind::StoreFull,
                RejectionKind::RecordUnreadable,
                RejectionKind::RecordFromNewerVersion,
                RejectionKind::TransactionRolledBack,
                RejectionKind::TransactionFailed,
                RejectionKind::TransactionMisused,
            ];
            ours.into_iter().fold(layer, |layer, kind| {
                layer.rejection_format_of(kind, RejectionFormat::json(OURS))
            })
        })
    }
}
