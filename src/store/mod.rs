//! Where records are kept.

mod any;
#[cfg(feature = "cached")]
mod cached;
#[cfg(feature = "encrypted")]
mod encrypted;
#[cfg(feature = "file")]
mod file;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod hints;
mod memory;
#[cfg(feature = "postgres")]
pub(crate) mod postgres;
#[cfg(feature = "redis")]
mod redis;

use std::{future::Future, sync::Arc, time::Duration};

pub(crate) use self::any::{Call, DynStore};
#[cfg(feature = "cached")]
pub use self::cached::{Cached, CachedBuilder};
#[cfg(feature = "encrypted")]
pub use self::encrypted::{Encrypted, EncryptedError, EncryptedErrorKind, InvalidSecretKey, KeyRing, SecretKey};
#[cfg(all(feature = "file", feature = "testing"))]
pub use self::file::{Clock, MachineStart, Medium};
#[cfg(feature = "file")]
pub use self::file::{FileRecord, FileRecordState, FileStore, FileStoreBuilder, FileStoreError, FileStoreErrorKind};
#[cfg(feature = "sqlx")]
pub use self::postgres::SqlxTransaction;
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresStore, PostgresStoreBuilder, PostgresTable, PostgresTransaction};
#[cfg(all(feature = "redis", any(test, fuzzing)))]
pub(crate) use self::redis::look_at_redis_record;
#[cfg(feature = "redis")]
pub use self::redis::{RedisStore, RedisStoreBuilder};
pub use self::{
    any::AnyStore,
    memory::{MemoryStore, MemoryStoreBuilder},
};
use crate::{
    codec::StoredResponse,
    error::StoreError,
    record::{Begin, Claim, Lease, RecordId, Retention},
};

/// Keeps the records of operations, one for each [`RecordId`].
///
/// # Contract
///
/// A record is *vacant*, *in progress* under a lease, or *completed*. *Abandoned* is not a stored state: it is a
/// record in progress whose lease is over. *Expired* is vacant. `testing::check` (feature `testing`) turns into tests what
/// can be seen from outside: rules 1 to 6, but for a store without room, and 10 to 12. Rules 7 to 9, a full store and dropped
/// futures are the store's own to test.
///
/// 1. **Each method is one atomic step**, whoever else works on the same record, on this node or another. None of
///    them can be built from a look-up that is followed by a write.
/// 2. [`begin`](Self::begin) acquires a vacant record for the claim's owner, with fence 1, and leaves every other
///    record as it is. It answers [`Begin::Acquired`] again, with the same fence and a fresh lease, to the owner that
///    already holds the record, also when its lease is over, and changes nothing else: a claim whose answer was lost can
///    be repeated, and so can one with a takeover. To an owner that [abandoned](Self::abandon) the record it answers what
///    it answers to everybody.
/// 3. `begin` with [`Claim::takeover`] acquires an abandoned record whose owner and fence are those of the lease that
///    it names, and gives it the next fence and the claim's owner, fingerprint and retention. In every other state it
///    does what it does without: it acquires a vacant record, and answers what it found of any other.
/// 4. [`complete`](Self::complete), [`renew`](Self::renew), [`release`](Self::release) and [`abandon`](Self::abandon)
///    change a record only if it is in progress and its owner is the lease's owner. Otherwise they fail with
///    [`Fenced`](crate::StoreErrorKind::Fenced) and change nothing. The owner alone decides. The lease's fence is not
///    compared: whoever was never told of its claim ends it with the fence 0. A lease that is over but
///    was not taken over still belongs to its owner, and may be renewed or completed. One that was abandoned is over for
///    good: its owner may still complete or release the record, but a renewal, however late it lands, is fenced.
///    Repeating a `complete` or an `abandon` whose answer was lost does no harm: it succeeds or is fenced.
/// 5. The store's own clock counts leases and retentions. They end no earlier than asked. Durations that its clock
///    cannot count are for ever.
/// 6. A completed record is kept for its retention, counted from `complete`. A record in progress is kept for its lease
///    and then for the claim's retention. Within that time nothing removes it: without room, `begin` fails with
///    [`Full`](crate::StoreErrorKind::Full). `complete` may fail with `Full` too, but not for an answer that [is not
///    kept](StoredResponse::not_kept).
/// 7. A record that cannot be read is an error, never vacant.
/// 8. A method returns `Ok` only when its change is as durable as the store promises.
/// 9. An error of kind [`Unavailable`](crate::StoreErrorKind::Unavailable) leaves open whether the step was applied;
///    any other kind means that it was not.
/// 10. Fingerprints and answers come back byte for byte. A store never compares them.
/// 11. [`changed`](Self::changed) wakes those who listen for a completion or an abandoned attempt, and at least one of
///     those who listen for a release.
///
/// 12. [`Begin::Completed`] says how long the record is still kept, or that the store does not know, and never more than
///     is true. Where the claim [asks for it](Claim::asking_for_remaining), a store that can know it says it.
///
/// The futures may be dropped at any `await`; a dropped step was applied wholly or not at all.
pub trait Store: Send + Sync + 'static {
    /// Acquires the record, or says who else has it.
    ///
    /// # Errors
    /// `Unavailable`, `Full`, `Corrupt`, `NewerVersion` or `Other`.
    fn begin(&self, id: &RecordId, claim: &Claim) -> impl Future<Output = Result<Begin, StoreError>> + Send;

    /// Does what [`begin`](Self::begin) does, if that needs no waiting: a record that it says is acquired *is* acquired.
    /// `None` if it does need to wait: then nothing was begun, and `begin` is called. It saves a replay from memory its
    /// future, nothing else; a store without memory, or one around another store, need not have it. Default: `None`.
    ///
    /// # Errors
    /// As `begin`.
    fn begin_at_once(&self, id: &RecordId, claim: &Claim) -> Option<Result<Begin, StoreError>> {
        let _ = (id, claim);
        None
    }

    /// Keeps the answer of the operation. The record is immutable from here on until it expires.
    ///
    /// # Errors
    /// `Fenced`, `Full`, `Corrupt`, `Unavailable` or `Other`.
    fn complete(
        &self,
        lease: &Lease,
        response: &StoredResponse,
        retention: Retention,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Lets the lease last for `length` from now.
    ///
    /// # Errors
    /// `Fenced`, `Corrupt`, `Unavailable` or `Other`.
    fn renew(&self, lease: &Lease, length: Duration) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes the record vacant: the operation did not execute.
    ///
    /// # Errors
    /// `Fenced`, `Corrupt`, `Unavailable` or `Other`.
    fn release(&self, lease: &Lease) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Ends the lease now and leaves the record: the operation's outcome is unknown.
    ///
    /// # Errors
    /// `Fenced`, `Corrupt`, `Unavailable` or `Other`.
    fn abandon(&self, lease: &Lease) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Resolves when the record may have changed, for those who wait for it.
    ///
    /// A listener is registered when the future is first polled; a caller reads the record again after that, so that no
    /// change falls between. It is a hint: it may resolve for nothing, and after a [`release`](Self::release) it
    /// need resolve for one listener only. A listener that is dropped leaves nothing behind.
    fn changed(&self, id: &RecordId) -> impl Future<Output = ()> + Send;
}

impl<S: Store> Store for Arc<S> {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        S::begin(self, id, claim).await
    }

    fn begin_at_once(&self, id: &RecordId, claim: &Claim) -> Option<Result<Begin, StoreError>> {
        S::begin_at_once(self, id, claim)
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        S::complete(self, lease, response, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        S::renew(self, lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        S::release(self, lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        S::abandon(self, lease).await
    }

    async fn changed(&self, id: &RecordId) {
        S::changed(self, id).await;
    }
}
