//! What tasks and the store's threads share.

use std::sync::{
    Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
};

use redb::Database;
use tokio::sync::watch;

use super::{
    ahead::Ahead,
    cache::Cache,
    clock::StoreTime,
    damage::Damage,
    engine::{Broken, BrokenCell, Settings},
    listeners::Listeners,
    queue::{BeginJob, Queue, Refused, WriteJob},
};
use crate::error::{StoreError, StoreErrorKind};

pub(super) struct Shared {
    pub(super) file: Arc<str>,
    pub(super) time: StoreTime,
    pub(super) settings: Settings,
    /// `None` while it cannot be opened for want of room, and once it is closed. Locked by the store's threads only.
    pub(super) database: RwLock<Option<Database>>,
    pub(super) reads: Queue<BeginJob>,
    pub(super) writes: Queue<WriteJob>,
    /// How many threads may still hand a claim on to the writer.
    pub(super) readers: AtomicUsize,
    pub(super) cache: Cache,
    /// Looked at before the tables are.
    pub(super) ahead: Ahead,
    /// How many there were after the last commit.
    pub(super) records: AtomicU64,
    pub(super) listeners: Listeners,
    pub(super) broken: BrokenCell,
    pub(super) damage: Damage,
    /// When it was closed: nothing new is begun, and answers in memory are not given any more either. 0 while it is open.
    pub(super) closed_at: AtomicU64,
    pub(super) closed: watch::Sender<bool>,
}

impl Shared {
    /// Nothing that panics holds it, and whatever is in it is whole.
    pub(super) fn database(&self) -> RwLockReadGuard<'_, Option<Database>> {
        self.database.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn database_mut(&self) -> RwLockWriteGuard<'_, Option<Database>> {
        self.database.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store takes no more work. The first reason is the one that everybody is told.
    pub(super) fn fail(&self, cause: Option<Arc<redb::Error>>) -> Broken {
        let broken = self.broken.get_or_init(|| {
            let file = Arc::clone(&self.file);
            let said = cause.as_ref().map(tracing::field::display);
            tracing::error!(%file, cause = said, "the idempotency store failed; open it again");
            Broken {
                file,
                goes_on: false,
                cause,
            }
        });
        broken.clone()
    }

    /// Nothing new is taken in; what waits is still answered.
    pub(super) fn close(&self) {
        self.closed_at.fetch_max(self.time.now(), SeqCst);
        self.reads.close();
    }

    /// Whether calls may still be answered without a look into the queues.
    pub(super) fn is_open(&self) -> bool {
        self.closed_at.load(SeqCst) == 0 && self.broken.get().is_none()
    }

    pub(super) fn reader_ended(&self) {
        if self.readers.fetch_sub(1, SeqCst) == 1 {
            self.writes.close();
        }
    }

    pub(super) fn close_database(&self) {
        let database = self.database_mut().take();
        if let Some(Err(error)) = database.map(Database::close) {
            let file = &self.file;
            tracing::warn!(%file, %error, "the idempotency store was not closed cleanly and opens more slowly");
        }
    }

    pub(super) fn refusal(&self, why: Refused) -> StoreError {
        let why = match why {
            Refused::Closed => "the store is closed",
            Refused::TooMany | Refused::Busy => "too many calls wait for the store",
        };
        StoreError::with_source(StoreErrorKind::Unavailable, why)
    }

    /// The thread that had the job is gone, or dropped it in a panic.
    pub(super) fn unanswered(&self) -> StoreError {
        match self.broken.get() {
            Some(broken) => broken.clone().into(),
            None => StoreErrorKind::Unavailable.into(),
        }
    }
}
