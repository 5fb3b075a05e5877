//! Records in this process's memory.

mod budget;
mod expiry;
mod shard;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
    time::Duration,
};

use self::{
    budget::Budget,
    shard::{NoRoom, Shard},
};
use super::Store;
use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    record::{Begin, Claim, Lease, RecordId, Retention},
    sync::{Instant, Mutex, MutexGuard, Notify, PoisonError},
};

/// Keeps records in memory: for one process, for tests, and wherever losing them at a restart is acceptable.
///
/// Clones share the records. Each operation takes one lock of many for a moment and costs the same whatever the
/// number of records. Records that expired are removed a few at a time by later operations. There is no sweep of all of
/// them: where the store is full, a new key or an answer removes as many more, wherever they are, as it needs room.
///
/// Time is [`tokio::time`], which a test may pause.
///
/// # Limits
/// 1 GiB and 10 million records unless [built](Self::builder) otherwise. When they are reached, new keys are refused
/// ([`Full`](StoreErrorKind::Full)); a record that is in progress or has not expired is never removed to make room.
#[derive(Clone)]
pub struct MemoryStore {
    inner: Arc<Inner>,
}

struct Inner {
    shards: Box<[Mutex<Shard>]>,
    budget: Budget,
    /// Spreads ids over shards and buckets. Keyed, so that nobody can choose ids that meet in one place.
    hasher: IdHasherBuilder,
    start: Instant,
}

/// Nanoseconds since the store was made.
type Time = u64;

/// A time that never comes.
const NEVER: Time = u64::MAX;

/// Many more than cores: locks are rarely contended, and a map that grows moves only its own few records.
const SHARDS: usize = 64;

/// Expired records that are removed at most before a step that found no room is tried again. Several: whoever comes next
/// finds room at once.
const REMOVED_FOR_ROOM: usize = 32;

/// Sets the limits of a [`MemoryStore`].
#[derive(Clone, Debug)]
#[must_use]
pub struct MemoryStoreBuilder {
    max_bytes: u64,
    max_records: u64,
}

impl MemoryStoreBuilder {
    /// The most memory that records may take, in bytes: what the answers hold plus a fixed sum for each record.
    /// Default: 1 GiB.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// The most records. Default: 10 million.
    pub fn max_records(mut self, records: u64) -> Self {
        self.max_records = records;
        self
    }

    /// The store, empty.
    pub fn build(self) -> MemoryStore {
        let hasher = IdHasherBuilder::random();
        MemoryStore {
            inner: Arc::new(Inner {
                shards: (0..SHARDS).map(|_| Mutex::new(Shard::new(hasher))).collect(),
                budget: Budget::new(self.max_bytes, self.max_records),
                hasher,
                start: Instant::now(),
            }),
        }
    }
}

impl MemoryStore {
    /// A store with the default limits.
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// A store with other limits.
    pub fn builder() -> MemoryStoreBuilder {
        MemoryStoreBuilder {
            max_bytes: 1 << 30,
            max_records: 10_000_000,
        }
    }

    /// How many records are held, those included that expired but were not removed yet.
    pub fn len(&self) -> u64 {
        self.inner.budget.records()
    }

    /// Whether no record is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes of the budget the records take.
    pub fn bytes(&self) -> u64 {
        self.inner.budget.bytes()
    }

    fn now(&self) -> Time {
        nanos(self.inner.start.elapsed())
    }

    fn shard(&self, id: &RecordId) -> MutexGuard<'_, Shard> {
        // Bits that choose neither a bucket (the low ones) nor a bucket's tag (the top ones).
        let index = (self.inner.hasher.hash_one(id) >> 40) as usize % SHARDS;
        lock(&self.inner.shards[index])
    }

    /// For a step that found no room: removes what has expired, wherever it is, and tries the step again after every few
    /// records. The rest is left to those who come later: all at once would keep a thread for seconds.
    fn make_room<T>(&self, now: Time, step: impl Fn() -> Result<T, NoRoom>) -> Result<T, NoRoom> {
        for shard in &self.inner.shards {
            // The guard ends with the condition: the step takes a lock, too.
            while lock(shard).remove_expired(now, REMOVED_FOR_ROOM, &self.inner.budget) > 0 {
                if let Ok(done) = step() {
                    return Ok(done);
                }
            }
        }
        // Others may have removed what this one did not find.
        step()
    }
}

/// No method of a shard leaves it half changed, so a panic elsewhere while it was locked is no reason to stop.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nanos(duration: Duration) -> Time {
    u64::try_from(duration.as_nanos()).unwrap_or(NEVER)
}

fn retention_nanos(retention: Retention) -> Time {
    match retention {
        Retention::For(duration) => nanos(duration),
        Retention::Forever => NEVER,
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore")
            .field("records", &self.len())
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

/// Every step is done when it returns: nothing is awaited.
impl MemoryStore {
    pub(crate) fn begin_now(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let now = self.now();
        let budget = &self.inner.budget;
        #[cfg(seeded_bug)]
        if crate::seeded::is("claims after it looked") && self.shard(id).is_vacant(id) {
            std::thread::sleep(Duration::from_millis(1));
            self.shard(id).forget(id, budget);
        }
        let begin = || self.shard(id).begin(id, claim, now, budget);
        let begun = begin().or_else(|NoRoom| self.make_room(now, begin));
        begun.map_err(|NoRoom| StoreErrorKind::Full.into())
    }

    pub(crate) fn complete_now(
        &self,
        lease: &Lease,
        response: &StoredResponse,
        retention: Retention,
    ) -> Result<(), StoreError> {
        let now = self.now();
        let keep = retention_nanos(retention);
        let budget = &self.inner.budget;
        let complete = || match self.shard(&lease.id).complete(lease, response, keep, now, budget) {
            Err(error) if error.kind() == StoreErrorKind::Full => Err(NoRoom),
            result => Ok(result),
        };
        let completed = complete().or_else(|NoRoom| self.make_room(now, complete));
        let listeners = completed.unwrap_or_else(|NoRoom| Err(StoreErrorKind::Full.into()))?;
        if let Some(listeners) = listeners {
            listeners.notify_waiters();
        }
        Ok(())
    }

    pub(crate) fn renew_now(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        let now = self.now();
        self.shard(&lease.id).renew(lease, nanos(length), now)
    }

    pub(crate) fn release_now(&self, lease: &Lease) -> Result<(), StoreError> {
        let now = self.now();
        let listeners = self.shard(&lease.id).release(lease, now, &self.inner.budget)?;
        if let Some(listeners) = listeners {
            // One is enough: it will claim the record, and the others would only find it claimed.
            listeners.notify_one();
        }
        Ok(())
    }

    pub(crate) fn abandon_now(&self, lease: &Lease) -> Result<(), StoreError> {
        let now = self.now();
        let listeners = self.shard(&lease.id).abandon(lease, now)?;
        if let Some(listeners) = listeners {
            listeners.notify_waiters();
        }
        Ok(())
    }
}

impl Store for MemoryStore {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        self.begin_now(id, claim)
    }

    fn begin_at_once(&self, id: &RecordId, claim: &Claim) -> Option<Result<Begin, StoreError>> {
        Some(self.begin_now(id, claim))
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.complete_now(lease, response, retention)
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.renew_now(lease, length)
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.release_now(lease)
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.abandon_now(lease)
    }

    async fn changed(&self, id: &RecordId) {
        let listeners = self.shard(id).listen(*id);
        let _listening = Listening { store: self, id: *id };
        listeners.notified().await;
    }
}

/// One listener's place; the list of a record goes with its last listener.
struct Listening<'a> {
    store: &'a MemoryStore,
    id: RecordId,
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.store.shard(&self.id).unlisten(&self.id);
    }
}

/// Those who wait for one record.
type Listeners = Arc<Notify>;

/// Ids are hashes already: a multiplication with a secret number is enough to make their places unpredictable.
#[derive(Clone, Copy, Debug)]
struct IdHasherBuilder {
    secret: u64,
}

impl IdHasherBuilder {
    fn random() -> Self {
        Self {
            // Odd, so that no bit of the id is lost.
            secret: RandomState::new().hash_one("shards") | 1,
        }
    }
}

impl BuildHasher for IdHasherBuilder {
    type Hasher = IdHasher;

    fn build_hasher(&self) -> IdHasher {
        IdHasher {
            secret: self.secret,
            hash: 0,
        }
    }
}

struct IdHasher {
    secret: u64,
    hash: u64,
}

impl Hasher for IdHasher {
    fn write(&mut self, id: &[u8]) {
        let Some((first, _)) = id.split_first_chunk() else {
            return;
        };
        let product = u128::from(u64::from_le_bytes(*first)) * u128::from(self.secret);
        self.hash = (product >> 64) as u64 ^ product as u64;
    }

    /// The length of the id, which is always the same.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.hash
    }
}
