//! Records in one file.
//!
//! While the writer is at work a claim goes to a reader first, which answers from the last durable state whatever
//! changes nothing: replays, conflicts, lost attempts. The others, and every change, go to the one [writer](writer),
//! which takes all that waits, applies it in one transaction, writes what that did to the [journal](journal), syncs, and
//! answers. Neither runs on a task's thread.

mod ahead;
mod batch;
mod builder;
mod cache;
#[cfg_attr(
    not(feature = "testing"),
    allow(unreachable_pub, reason = "a clock of one's own is for tests")
)]
mod clock;
mod commit;
mod damage;
mod effects;
mod engine;
mod error;
mod frame;
mod inspect;
mod journal;
mod layout;
mod listeners;
mod look;
#[cfg_attr(
    not(feature = "testing"),
    allow(unreachable_pub, reason = "a medium of one's own is for tests")
)]
mod medium;
mod open;
mod pages;
mod queue;
mod reader;
mod sector;
mod shared;
mod tables;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    fmt,
    path::Path,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use tokio::sync::oneshot;

pub use self::{
    builder::FileStoreBuilder,
    error::{FileStoreError, FileStoreErrorKind},
    inspect::{FileRecord, FileRecordState},
};
#[cfg(feature = "testing")]
pub use self::{
    clock::{Clock, MachineStart},
    medium::Medium,
};
use self::{
    engine::Settings,
    frame::{NEVER, Time},
    queue::{BeginJob, Change, ChangeJob, WriteJob},
    shared::Shared,
};
use super::Store;
use crate::{
    codec::StoredResponse,
    error::StoreError,
    record::{Begin, Claim, Lease, RecordId, Retention},
};

/// Keeps records in one file of this machine: they survive a crash of the process, of the system, and a power loss.
///
/// Every change is on the medium before it is answered. Changes that are made at the same time share one sync. What was
/// in flight when a process was lost is abandoned as soon as the file is opened again.
///
/// Clones share the file. It is closed when the last of them is dropped, a moment later; [`close`](Self::close) waits
/// for that. A file is open once: another process, or another store of this one, is
/// [refused](FileStoreErrorKind::InUse).
///
/// Leases and retentions are counted by a monotonic clock ([`tokio::time`]), which the wall clock cannot push; a store
/// that was closed learns from the machine's uptime how long that was, or else from the wall clock, less an hour.
///
/// When the disk is full, new keys are refused ([`Full`](crate::StoreErrorKind::Full)), what is in flight ends, and
/// what completed is replayed. After any other failure of the medium every call fails
/// ([`Unavailable`](crate::StoreErrorKind::Unavailable)) until the file is opened again, since nobody knows what is on
/// it.
///
/// ```no_run
/// # async fn serve() -> Result<(), tower_idempotency::FileStoreError> {
/// use tower_idempotency::{FileStore, IdempotencyLayer};
///
/// let store = FileStore::open("/var/lib/shop/idempotency.redb").await?;
/// let payments = IdempotencyLayer::new(store.clone());
/// // … serve, and then:
/// store.close().await;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct FileStore {
    handle: Arc<Handle>,
}

/// Closes the file with the last store that uses it.
struct Handle {
    shared: Arc<Shared>,
}

impl FileStore {
    /// Opens the store in this file, which is made if there is none (its directory is not), with the default settings.
    /// Nothing blocks the calling task meanwhile.
    ///
    /// # Errors
    /// See [`FileStoreErrorKind`]; the error names the file.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, FileStoreError> {
        Self::builder(path).open().await
    }

    /// A store in this file with other settings.
    pub fn builder(path: impl AsRef<Path>) -> FileStoreBuilder {
        FileStoreBuilder {
            path: path.as_ref().to_owned(),
            settings: Settings::default(),
            replay_bytes: 32 << 20,
            clock: None,
            medium: None,
        }
    }

    /// Ends what was begun, closes the file and returns when that is done; every later call to this store or a clone of
    /// it fails. Not needed for the records to be safe: it leaves the next opening an empty journal, and says when the
    /// file may be opened again.
    pub async fn close(&self) {
        let shared = &self.handle.shared;
        shared.close();
        // It fails only if the sender is gone, and that is in `shared`.
        let _ = shared.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// How many records are held, those included that expired but were not removed yet.
    pub fn len(&self) -> u64 {
        self.handle.shared.records.load(SeqCst)
    }

    /// Whether no record is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A replay that needs neither the file nor another thread.
    fn at_once(&self, id: &RecordId) -> Option<Begin> {
        let shared = &self.handle.shared;
        if !shared.is_open() {
            return None;
        }
        let now = shared.time.now();
        let kept = shared.cache.get(id, now)?;
        Some(Begin::Completed {
            fingerprint: kept.fingerprint,
            response: kept.response,
            remaining: Some(look::remaining(kept.vacant_at, now)),
        })
    }

    async fn change(&self, lease: &Lease, change: Change) -> Result<(), StoreError> {
        let shared = &self.handle.shared;
        let (answer, answered) = oneshot::channel();
        let put = shared.writes.put(WriteJob::Change(ChangeJob {
            lease: *lease,
            change,
            asked: shared.time.now(),
            answer,
        }));
        put.map_err(|(why, _)| shared.refusal(why))?;
        answered.await.unwrap_or_else(|_| Err(shared.unanswered()))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // The readers end, then the writer, which closes the file.
        self.shared.close();
    }
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = &self.handle.shared;
        f.debug_struct("FileStore")
            .field("file", &shared.file)
            .field("failed", &shared.broken.get().is_some())
            .finish_non_exhaustive()
    }
}

fn duration(duration: Duration) -> Time {
    clock::nanos(duration)
}

fn retention(retention: Retention) -> Time {
    match retention {
        Retention::For(length) => duration(length),
        Retention::Forever => NEVER,
    }
}

impl Store for FileStore {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        if let Some(replay) = self.at_once(id) {
            return Ok(replay);
        }
        let shared = &self.handle.shared;
        let (answer, answered) = oneshot::channel();
        let job = BeginJob {
            id: *id,
            claim: claim.clone(),
            asked: shared.time.now(),
            answer: Some(answer),
        };
        // A writer that has nothing to do looks as fast as a reader, and saves most claims a thread in between.
        if let Err((_, WriteJob::Begin(job))) = shared.writes.put_if_idle(WriteJob::Begin(job)) {
            shared.reads.put(job).map_err(|(why, _)| shared.refusal(why))?;
        }
        answered.await.unwrap_or_else(|_| Err(shared.unanswered()))
    }

    fn begin_at_once(&self, id: &RecordId, _: &Claim) -> Option<Result<Begin, StoreError>> {
        self.at_once(id).map(Ok)
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        let keep = self::retention(retention);
        self.change(lease, Change::Complete(response.clone(), keep)).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.change(lease, Change::Renew(duration(length))).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.change(lease, Change::Release).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.change(lease, Change::Abandon).await
    }

    async fn changed(&self, id: &RecordId) {
        self.handle.shared.listeners.changed(*id).await;
    }
}
