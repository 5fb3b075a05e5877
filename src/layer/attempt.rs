//! Settings: how a request runs.

use std::time::Duration;

use super::IdempotencyLayer;
use crate::policy::{Concurrent, Guarantee};

impl IdempotencyLayer {
    /// What happens to an operation whose attempt was lost. Default: [`Guarantee::AtMostOnce`].
    ///
    /// Under [`Guarantee::AtLeastOnce`] a key is not free for another request once an attempt was lost, even if the
    /// next attempt says that it did not execute: the lost one may have had its effect. The same request runs again.
    ///
    /// # Panics
    /// If it is [`Guarantee::Transactional`] and the store has no transactions. It would be another guarantee, silently.
    /// That is so for a `PostgresStore`, too, if another store or an `Arc` stands in front of it: clone the store instead.
    #[must_use]
    pub fn guarantee(self, guarantee: Guarantee) -> Self {
        assert!(
            guarantee != Guarantee::Transactional || self.shared.has_transactions(),
            "Guarantee::Transactional needs a store that has transactions: a PostgresStore with no other store in front of it"
        );
        self.set(|policy| policy.guarantee = guarantee)
    }

    /// What a duplicate gets while the first request runs. Default: [`Concurrent::Refuse`], a conflict (409).
    #[must_use]
    pub fn on_concurrent(self, concurrent: Concurrent) -> Self {
        self.set(|policy| policy.concurrent = concurrent)
    }

    /// How many requests may wait for one key in this process; one more is refused (409). Default: 128.
    #[must_use]
    pub fn max_waiters(self, requests: usize) -> Self {
        self.set(|policy| policy.max_waiters = requests)
    }

    /// How long an attempt may go without a sign of life before it counts as lost. While the handler runs it is renewed
    /// three times as often, so this is not a limit for handlers. Let it be several times
    /// [`store_timeout`](Self::store_timeout): an attempt that hears of its lease when half of that is over asks again
    /// before its handler runs, and one that hears too late does not run. Default: 60 seconds.
    ///
    /// # Panics
    /// If `lease` is zero.
    #[must_use]
    pub fn lease(self, lease: Duration) -> Self {
        assert!(!lease.is_zero(), "a lease of no time is lost when it is granted");
        self.set(|policy| policy.lease = lease)
    }

    /// How long one call to the store may take; a claim is tried twice. Default: 3 seconds.
    ///
    /// # Panics
    /// If `limit` is zero.
    #[must_use]
    pub fn store_timeout(self, limit: Duration) -> Self {
        assert!(!limit.is_zero(), "no store answers in no time");
        self.set(|policy| policy.store_timeout = limit)
    }

    /// **Dangerous.** Runs requests without protection while the store cannot be reached: duplicates run too. They are
    /// counted in [`Counters::unprotected`](crate::Counters::unprotected). Not under [`Guarantee::Transactional`], where
    /// there is nothing to write to without the store. Default: such requests are refused (503) and do not run.
    #[must_use]
    pub fn dangerously_run_without_store(self) -> Self {
        self.set(|policy| policy.run_without_store = true)
    }

    /// The most bytes of a request body; larger ones are refused (413), by their `Content-Length` before a byte is
    /// read. Those are buffered and limited that have a key or may turn out to have one: where it may be in the body, or
    /// is [derived](crate::WithoutKey::DeriveAndReplay), every request of the protected methods. Default: 1 MiB.
    ///
    /// axum's extractors have a limit of their own, 2 MB (`DefaultBodyLimit`).
    #[must_use]
    pub fn max_request_body(self, bytes: usize) -> Self {
        self.set(|policy| policy.max_request_body = bytes)
    }
}
