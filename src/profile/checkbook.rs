//! Checkbook.

use std::time::Duration;

use http::Method;

use super::Profile;
use crate::{key::KeySource, statuses::Statuses};

impl Profile {
    /// Checkbook: `Idempotency-Key` on every POST, optional, 1 to 255 characters; the first successful answer is kept
    /// for 24 hours and returned to subsequent identical requests.
    ///
    /// Source: Checkbook's guide "Idempotent Requests". What it leaves open, and how it is closed here:
    /// - *Whose keys they are*: each account's, by its `Authorization` header, for each endpoint.
    /// - *Another body under the same key*: refused, 422. *A request that is still running*: 409.
    /// - *A failed request*: only successes are kept, so that a failed one may be sent again with the same key.
    ///   **A handler must therefore not fail after an effect**: it would run again.
    /// - *Characters*: visible ASCII.
    pub fn checkbook() -> Self {
        Self::new("Checkbook", |layer| {
            layer
                .methods([Method::POST])
                .key(KeySource::header("idempotency-key"))
                .max_key_length(255)
                .optional_key()
                .retention(Duration::from_secs(24 * 60 * 60))
                .store_statuses(Statuses::success())
        })
    }
}
