//! svix.

use std::time::Duration;

use http::Method;

use super::Profile;
use crate::{key::KeySource, policy::Concurrent, statuses::Statuses};

impl Profile {
    /// svix: `idempotency-key` on POST, optional; successes are kept for 12 hours. A duplicate waits up to 5 seconds
    /// for the first request.
    ///
    /// Source: svix's documentation, "Idempotency", and its server's source. What they leave open, and how it is closed
    /// here:
    /// - *Another body under the same key*: refused, 422. *A wait that runs out*: 409.
    /// - *The key's length*: 255 characters. *Whose keys they are*: each `Authorization` header's, for each route.
    /// - *A failed request*: its key is free. **A handler must not fail after an effect.**
    pub fn svix() -> Self {
        Self::new("svix", |layer| {
            layer
                .methods([Method::POST])
                .key(KeySource::header("idempotency-key"))
                .optional_key()
                .on_concurrent(Concurrent::Wait(Duration::from_secs(5)))
                .retention(Duration::from_secs(12 * 60 * 60))
                .store_statuses(Statuses::success())
        })
    }
}
