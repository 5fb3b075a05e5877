//! Copies of completed records in this process's memory, in front of a store that is far away.

use std::{fmt, sync::Arc, time::Duration};

use moka::sync::Cache;
use tokio::time::Instant;

use super::Store;
use crate::{
    codec::StoredResponse,
    error::StoreError,
    fingerprint::Fingerprint,
    record::{Begin, Claim, Lease, RecordId, Retention},
};

/// Replays from memory what a store has once told of: a duplicate that comes again to the same process costs no round
/// trip, and no future either. Everything else goes to the store as it would without.
///
/// Only completed records are copied. They never change until they expire, and a copy is given no longer than the store
/// said that its record is kept, counted from before it was asked. That a key is free, and that an attempt is running
/// or lost, is never remembered.
///
/// ```
/// use tower_idempotency::{Cached, IdempotencyLayer, MemoryStore};
///
/// # let remote_store = MemoryStore::new();
/// let layer = IdempotencyLayer::new(Cached::new(remote_store));
/// ```
///
/// A record that is removed in the store before its time, by an operator or by the loss of data, may still be replayed
/// from here for as long as a [copy is kept](CachedBuilder::longest). Clones share the copies.
#[derive(Clone)]
pub struct Cached<S> {
    store: S,
    copies: Cache<RecordId, Arc<Copied>>,
    longest: Duration,
}

struct Copied {
    fingerprint: Fingerprint,
    response: StoredResponse,
    kept_until: Instant,
}

/// What a copy takes beside the bytes of its answer, roughly: its entry, and the cache's own notes on it.
const ENTRY: usize = 300;

/// The settings of a [`Cached`] store, from [`Cached::builder`].
#[derive(Clone, Debug)]
#[must_use = "it is no store until it is built"]
pub struct CachedBuilder<S> {
    store: S,
    max_bytes: u64,
    longest: Duration,
}

impl<S> CachedBuilder<S> {
    /// The most memory that copies may take, in bytes. Which of them stay is decided by how often they are asked for.
    /// Default: 64 MiB.
    pub fn max_bytes(self, max_bytes: u64) -> Self {
        Self { max_bytes, ..self }
    }

    /// How long a copy is kept at most before the store is asked again, however long its record has to live. Default:
    /// five minutes.
    pub fn longest(self, longest: Duration) -> Self {
        Self { longest, ..self }
    }

    /// The store, with no copies yet.
    pub fn build(self) -> Cached<S> {
        let copies = Cache::builder()
            .max_capacity(self.max_bytes)
            .weigher(|_, copied: &Arc<Copied>| u32::try_from(copied.response.len() + ENTRY).unwrap_or(u32::MAX))
            .build();
        Cached {
            store: self.store,
            copies,
            longest: self.longest,
        }
    }
}

impl<S> Cached<S> {
    /// A store with the default settings.
    pub fn new(store: S) -> Self {
        Self::builder(store).build()
    }

    /// The settings of copies in front of `store`.
    pub fn builder(store: S) -> CachedBuilder<S> {
        CachedBuilder {
            store,
            max_bytes: 64 << 20,
            longest: Duration::from_secs(5 * 60),
        }
    }

    /// The store behind the copies.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// How many bytes the copies take, roughly: what they hold plus a fixed sum for each.
    pub fn bytes(&self) -> u64 {
        self.copies.run_pending_tasks();
        self.copies.weighted_size()
    }

    fn replay(&self, id: &RecordId) -> Option<Begin> {
        let copied = self.copies.get(id)?;
        let left = copied.kept_until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // Only this copy: another one may have come in its place.
            self.copies.entry(*id).and_compute_with(|found| match found {
                Some(found) if Arc::ptr_eq(found.value(), &copied) => moka::ops::compute::Op::Remove,
                _ => moka::ops::compute::Op::Nop,
            });
            return None;
        }
        Some(Begin::Completed {
            fingerprint: copied.fingerprint,
            response: copied.response.clone(),
            remaining: Some(Retention::For(left)),
        })
    }

    fn copy(&self, id: &RecordId, found: &Begin, asked: Instant) {
        let Begin::Completed {
            fingerprint,
            response,
            remaining: Some(remaining),
        } = found
        else {
            return;
        };
        let kept = match remaining {
            Retention::For(remaining) => self.longest.min(*remaining),
            Retention::Forever => self.longest,
        };
        // What no clock can count is not copied.
        let Some(kept_until) = asked.checked_add(kept) else {
            return;
        };
        let copied = Copied {
            fingerprint: *fingerprint,
            response: response.clone(),
            kept_until,
        };
        self.copies.insert(*id, Arc::new(copied));
    }
}

impl<S: Store> Store for Cached<S> {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        if let Some(replay) = self.replay(id) {
            return Ok(replay);
        }
        let asked = Instant::now();
        let begin = self.store.begin(id, &claim.clone().asking_for_remaining()).await?;
        self.copy(id, &begin, asked);
        Ok(begin)
    }

    fn begin_at_once(&self, id: &RecordId, claim: &Claim) -> Option<Result<Begin, StoreError>> {
        match self.replay(id) {
            Some(replay) => Some(Ok(replay)),
            None => self.store.begin_at_once(id, claim),
        }
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.store.complete(lease, response, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.store.renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.store.release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.store.abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.store.changed(id).await;
    }
}

impl<S: fmt::Debug> fmt::Debug for Cached<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached")
            .field("store", &self.store)
            .field("longest", &self.longest)
            .finish_non_exhaustive()
    }
}
