//! Adyen.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};

use super::Profile;
use crate::{
    key::KeySource,
    rejection::{RejectionFormat, RejectionKind},
};

const KEY: &str = "idempotency-key";

impl Profile {
    /// Adyen: `idempotency-key` on every POST, optional, at most 64 characters, kept for 7 days. The first answer is
    /// returned, with the key in a field `idempotency-key`. A request that is still running is an error 704 with
    /// `transient-error: true`.
    ///
    /// Source: Adyen's documentation, "API idempotency". What it leaves open, and how it is closed here:
    /// - *Another body under the same key*: refused, 422. *The status of error 704*: 409.
    /// - *Whose keys they are*: each `Authorization` header's, for each route; where the API key comes in `X-API-Key`,
    ///   set [`scope`](crate::IdempotencyLayer::scope) to the company account.
    /// - *Answers that say that nothing ran*: the crate's [list](crate::Statuses::default).
    pub fn adyen() -> Self {
        const ERRORS: &str = r#"{"status":{status},"errorCode":{code},"message":{detail},"errorType":"validation"}"#;
        Self::new("Adyen", |layer| {
            layer
                .methods([Method::POST])
                .key(KeySource::header(KEY))
                .max_key_length(64)
                .optional_key()
                .retention(Duration::from_secs(7 * 24 * 60 * 60))
                .echo_key(HeaderName::from_static(KEY))
                .replay_marker(None)
                .rejection_format(RejectionFormat::json(ERRORS))
                .rejection_status(RejectionKind::InProgress, StatusCode::CONFLICT)
                .rejection_code(RejectionKind::InProgress, "704")
                .rejection_title(RejectionKind::InProgress, "request already processed or in progress")
                .rejection_header(
                    RejectionKind::InProgress,
                    HeaderName::from_static("transient-error"),
                    HeaderValue::from_static("true"),
                )
        })
    }
}
