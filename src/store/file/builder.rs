//! How a file is opened: with which settings, in which order, on a thread of its own.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, AtomicUsize},
    },
    thread,
};

use tokio::sync::{oneshot, watch};

use super::{
    FileStore, FileStoreError, FileStoreErrorKind, Handle,
    ahead::Ahead,
    cache::Cache,
    clock::{Clock, Opening, StoreTime, SystemClock},
    commit,
    damage::Damage,
    effects::Effects,
    engine::{self, Backend, BrokenCell, Settings},
    layout::Layout,
    listeners::Listeners,
    medium::Medium,
    open,
    queue::Queue,
    reader,
    shared::Shared,
    tables,
    writer::Writer,
};

/// Opens a [`FileStore`] with other settings.
#[derive(Debug)]
#[must_use]
pub struct FileStoreBuilder {
    pub(super) path: PathBuf,
    pub(super) settings: Settings,
    pub(super) replay_bytes: usize,
    pub(super) clock: Option<Arc<dyn Clock>>,
    pub(super) medium: Option<Arc<dyn Medium>>,
}

impl FileStoreBuilder {
    /// The most memory that pages of the file may take, in bytes. On a disk that is full it may become 128 MiB. Default:
    /// 128 MiB.
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

    /// Whether opening the file reads and checks all of it. What is read is checked in any case; this finds what was
    /// changed elsewhere before it is needed. Default: no.
    pub fn verify(mut self, verify: bool) -> Self {
        self.settings.verify = verify;
        self
    }

    /// How much room the journal of a new file takes, in bytes. Default: 4 MiB.
    #[cfg(feature = "testing")]
    pub fn journal_bytes(mut self, bytes: u64) -> Self {
        self.settings.journal_bytes = bytes;
        self
    }

    /// Whether a new file has checksums under its pages, as from version 3 of the format on. Default: yes.
    #[cfg(feature = "testing")]
    pub fn page_checksums(mut self, page_checksums: bool) -> Self {
        self.settings.page_checksums = page_checksums;
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

    /// Opens the file, or makes it. After a crash this does again what is in the journal; nothing blocks the calling task
    /// meanwhile.
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
            None => Arc::new(open::disk(path, &opening.stamp(), &self.settings)?),
        };
        let fresh = medium.is_empty().map_err(|source| FileStoreError::io(path, source))?;
        let layout = if fresh {
            let made = Layout::make(&medium, self.settings.journal_bytes, self.settings.page_checksums);
            made.map_err(|source| FileStoreError::io(path, source))?
        } else {
            Layout::read(&medium).map_err(|source| engine::not_laid_out(path, source))?
        };
        let backend = Backend::new(medium, layout);
        // Without it the store opens for what is in it, and refuses new keys.
        backend.spare.hold();
        let database = engine::start(&backend, &self.settings).map_err(|source| engine::not_opened(path, source))?;
        let failed = |source| engine::unreadable(path, source);
        if fresh {
            tables::initialise(&database, &opening.stamp()).map_err(failed)?;
        }
        tables::check_format(&database, path)?;
        let (database, mut commits) = commit::recovered(database, &backend, &self.settings).map_err(failed)?;
        let stamp = tables::read_stamp(&database, path)?;
        let time = StoreTime::resume(&stamp, opening);
        // Durable before the first claim: the number of this run is never used again.
        let transaction = commits.begin(&database).map_err(failed)?;
        let records = tables::records(&transaction).map_err(failed)?;
        let stamp = time.stamp(time.began()).encode();
        let mut effects = Effects::new();
        effects.time(&stamp);
        tables::write_time(&transaction, &stamp).map_err(failed)?;
        let ahead = Ahead::default();
        commits
            .commit(transaction, &effects, Vec::new(), &ahead)
            .map_err(failed)?;
        let shared = Arc::new(Shared {
            file: path.display().to_string().into(),
            time,
            settings: self.settings,
            database: RwLock::new(Some(database)),
            reads: Queue::new(),
            writes: Queue::new(),
            readers: AtomicUsize::new(reader::READERS),
            cache: Cache::new(self.replay_bytes),
            ahead,
            records: AtomicU64::new(records),
            listeners: Listeners::default(),
            broken: BrokenCell::new(),
            damage: Damage::default(),
            closed_at: AtomicU64::new(0),
            closed: watch::Sender::new(false),
        });
        let writer = Writer::new(Arc::clone(&shared), backend, commits);
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
