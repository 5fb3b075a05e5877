//! Records in one file.
//!
//! While the writer is at work a claim goes to a reader first, which answers from the last durable state whatever
//! changes nothing: replays, conflicts, lost attempts. The others, and every change, go to the one [writer](writer),
//! which takes all that waits, applies it in one transaction, syncs, and answers. Neither runs on a task's thread.

mod batch;
mod cache;
#[cfg_attr(
    not(feature = "testing"),
    allow(unreachable_pub, reason = "a clock of one's own is for tests")
)]
mod clock;
mod engine;
mod error;
mod frame;
mod inspect;
mod listeners;
mod look;
#[cfg_attr(
    not(feature = "testing"),
    allow(unreachable_pub, reason = "a medium of one's own is for tests")
)]
mod medium;
mod open;
mod queue;
mod reader;
mod shared;
mod writer;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use tokio::sync::{oneshot, watch};

use self::{
    cache::Cache,
    clock::{Opening, StoreTime, SystemClock},
    engine::{Backend, BrokenCell, Settings},
    frame::{NEVER, Time},
    listeners::Listeners,
    queue::{BeginJob, Change, ChangeJob, Queue, WriteJob},
    shared::Shared,
    writer::Writer,
};
#[cfg(not(feature = "testing"))]
use self::{clock::Clock, medium::Medium};
#[cfg(feature = "testing")]
pub use self::{
    clock::{Clock, MachineStart},
    medium::Medium,
};
pub use self::{
    error::{FileStoreError, FileStoreErrorKind},
    inspect::{FileRecord, FileRecordState},
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

/// Opens a [`FileStore`] with other settings.
#[derive(Debug)]
#[must_use]
pub struct FileStoreBuilder {
    path: PathBuf,
    settings: Settings,
    replay_bytes: usize,
    clock: Option<Arc<dyn Clock>>,
    medium: Option<Arc<dyn Medium>>,
}

impl FileStoreBuilder {
    /// The most memory that pages of the file may take, in bytes. Default: 128 MiB.
    pub fn cache_bytes(mut self, bytes: usize) -> Self {
        self.settings.cache_bytes = bytes;
        self
    }

    /// The most memory that answers which were given lately may take, in bytes: they are replayed without a look into
    /// the file. Default: 32 MiB.
    pub fn replay_bytes(mut self, bytes: usize) -> Self {
        self.replay_bytes = bytes;
        self
    }

    /// Whether opening the file reads and checks all of it. A record is checked whenever it is read; this also finds bits
    /// that flipped in the pages which lead to records, and which may hide one or stop the process. Default: no.
    pub fn verify(mut self, verify: bool) -> Self {
        self.settings.verify = verify;
        self
    }

    /// Whether a crash may be recovered from without reading all of the file. Each change then takes two syncs instead
    /// of one, and writes more. Default: no.
    pub fn quick_recovery(mut self, quick: bool) -> Self {
        self.settings.quick_recovery = quick;
        self
    }

    /// Another clock than the system's. Default: the system's.
    #[cfg(feature = "testing")]
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.clock = Some(Arc::new(clock));
        self
    }

    /// Another medium than the file, which is neither made nor locked then. Default: the file.
    #[cfg(feature = "testing")]
    pub fn medium(mut self, medium: impl Medium) -> Self {
        self.medium = Some(Arc::new(medium));
        self
    }

    /// Opens the file, or makes it. After a crash this reads all of it; nothing blocks the calling task meanwhile.
    ///
    /// # Errors
    /// See [`FileStoreErrorKind`]; the error names the file.
    pub async fn open(self) -> Result<FileStore, FileStoreError> {
        let path = self.path.clone();
        let clock = self.clock.clone().unwrap_or_else(|| Arc::new(SystemClock::new()));
        let opening = Opening::now(clock);
        let (tell, told) = oneshot::channel();
        let spawned = thread::Builder::new().name("idempotency-write".to_owned()).spawn(|| {
            match self.open_here(opening) {
                Ok((store, writer)) => {
                    // If nobody waits any more, this drops the store, and the writer finds that it is closed.
                    let _ = tell.send(Ok(store));
                    writer.run();
                }
                Err(error) => drop(tell.send(Err(error))),
            }
        });
        let failed = |source: &dyn fmt::Display| {
            FileStoreError::new(
                FileStoreErrorKind::Failed,
                &path,
                format!("its thread did not start: {source}"),
            )
        };
        spawned.map_err(|source| failed(&source))?;
        told.await.unwrap_or_else(|source| Err(failed(&source)))
    }

    fn open_here(self, opening: Opening) -> Result<(FileStore, Writer), FileStoreError> {
        let path = &*self.path;
        let medium = match self.medium {
            Some(medium) => medium,
            None => Arc::new(open::disk(path, &opening.stamp())?),
        };
        let fresh = medium.is_empty().map_err(|source| FileStoreError::io(path, source))?;
        let backend = Backend::new(medium);
        // Without it the store opens for what is in it, and refuses new keys.
        backend.spare.hold();
        let database = engine::start(&backend, &self.settings).map_err(|source| engine::not_opened(path, source))?;
        let failed = |source| engine::unreadable(path, source);
        if fresh {
            engine::initialise(&database, &opening.stamp()).map_err(failed)?;
        }
        let stamp = engine::read_stamp(&database, path)?;
        let time = StoreTime::resume(&stamp, opening);
        // Durable before the first claim: the number of this run is never used again.
        let transaction = database.begin_write().map_err(|source| failed(source.into()))?;
        let records = engine::records(&transaction).map_err(failed)?;
        engine::write_stamp(&transaction, &time.stamp(time.began())).map_err(failed)?;
        transaction.commit().map_err(|source| failed(source.into()))?;
        let shared = Arc::new(Shared {
            file: path.display().to_string().into(),
            time,
            settings: self.settings,
            database: RwLock::new(Some(database)),
            reads: Queue::new(),
            writes: Queue::new(),
            readers: AtomicUsize::new(reader::READERS),
            cache: Cache::new(self.replay_bytes),
            records: AtomicU64::new(records),
            listeners: Listeners::default(),
            broken: BrokenCell::new(),
            closed_at: AtomicU64::new(0),
            closed: watch::Sender::new(false),
        });
        let writer = Writer::new(Arc::clone(&shared), backend);
        let handle = Arc::new(Handle { shared });
        for _ in 0..reader::READERS {
            let shared = Arc::clone(&handle.shared);
            let reader = thread::Builder::new().name("idempotency-read".to_owned());
            let spawned = reader.spawn(move || {
                reader::run(&shared);
                shared.reader_ended();
            });
            // The others end when the handle is dropped.
            spawned.map_err(|source| FileStoreError::io(path, source))?;
        }
        Ok((FileStore { handle }, writer))
    }
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
    /// it fails. Not needed for the records to be safe: it saves the next opening a look at all of them, and says
    /// when the file may be opened again.
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
