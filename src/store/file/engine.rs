//! redb on a medium: made, opened, and asked how it failed.

use std::{
    error::Error,
    fmt, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use redb::{Database, DatabaseError, StorageError};

use super::{
    error::{FileStoreError, FileStoreErrorKind},
    layout::{Layout, Region, Unknown},
    medium::{Medium, Spare, is_full},
    pages::{self, ChangedPage, Pages},
};
use crate::error::{StoreError, StoreErrorKind};

/// A medium for redb, with the spare between them, and the first thing that went wrong.
#[derive(Clone, Debug)]
pub(super) struct Backend {
    medium: Arc<dyn Medium>,
    layout: Layout,
    /// `None` in a file that has no checksums under its pages.
    pages: Option<Arc<Pages>>,
    pub(super) spare: Arc<Spare>,
    failed: Arc<Mutex<Option<Failed>>>,
}

/// How the medium failed redb, which takes no more work from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// Only for want of room: opening the file again is enough.
    Full,
    /// A page is not what was written. Nothing was changed on its account: opening the file again is enough for the others.
    Changed(ChangedPage),
    /// Nobody knows what is on the medium.
    Unknown,
}

impl Backend {
    pub(super) fn new(medium: Arc<dyn Medium>, layout: Layout) -> Self {
        Self {
            spare: Arc::new(Spare::new(Arc::clone(&medium))),
            medium,
            layout,
            pages: layout.checked.then(Arc::default),
            failed: Arc::default(),
        }
    }

    /// Where the journal is, if there is one.
    pub(super) fn journal(&self) -> Option<Region> {
        self.layout.journal
    }

    /// Whether a damaged page was met since a failure was last taken.
    pub(super) fn met_damage(&self) -> bool {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(*failed, Some(Failed::Changed(_)))
    }

    /// How it failed since this was last asked. An unknown state stays one: see [`usable`](Self::usable).
    pub(super) fn take_failure(&self) -> Option<Failed> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match *failed {
            Some(Failed::Unknown) => Some(Failed::Unknown),
            _ => failed.take(),
        }
    }

    fn note<T>(&self, result: io::Result<T>, full_is_harmless: bool) -> io::Result<T> {
        result.inspect_err(|error| {
            let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
            // An unknown state stays unknown, whatever fails after it.
            if *failed != Some(Failed::Unknown) {
                *failed = Some(match ChangedPage::of(error) {
                    Some(page) => Failed::Changed(page),
                    None if full_is_harmless && is_full(error) => Failed::Full,
                    None => Failed::Unknown,
                });
            }
        })
    }

    /// Once more with the spare, if it was for want of room.
    fn with_spare(&self, write: impl Fn() -> io::Result<()>) -> io::Result<()> {
        self.usable()?;
        let result = write().or_else(|error| {
            if is_full(&error) && self.spare.give_back() {
                tracing::warn!("the disk is full: the idempotency store uses its spare and refuses new keys");
                return write();
            }
            Err(error)
        });
        self.note(result, true)
    }
}

/// Anywhere in the file: the journal.
impl Backend {
    pub(super) fn read_raw(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        self.note(self.medium.read(at, out), false)
    }

    pub(super) fn write_raw(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.with_spare(|| self.medium.write(at, data))
    }

    pub(super) fn sync_raw(&self) -> io::Result<()> {
        self.usable()?;
        // Whatever it says: after a failed sync the system may have dropped what was to be written.
        self.note(self.medium.sync(), false)
    }

    /// Nothing is written any more.
    pub(super) fn give_up(&self) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Failed::Unknown);
    }

    /// Nothing is written any more once nobody knows what is on the medium.
    fn usable(&self) -> io::Result<()> {
        match *self.failed.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(Failed::Unknown) => Err(io::Error::other("the medium failed before")),
            _ => Ok(()),
        }
    }
}

/// The tables alone, which come after the journal.
impl redb::StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        let len = self.note(self.medium.len(), false)?;
        let len = len.saturating_sub(self.layout.tables);
        Ok(match self.pages {
            Some(_) => pages::without_checksums(len),
            None => len,
        })
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match &self.pages {
            Some(pages) => self.note(pages.read(self, self.layout.tables, offset, out), false),
            None => self.read_raw(self.layout.tables + offset, out),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let raw = match self.pages {
            Some(_) => pages::with_checksums(len),
            None => len,
        };
        self.with_spare(|| self.medium.set_len(self.layout.tables + raw))?;
        if let Some(pages) = &self.pages {
            pages.set_len(len);
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        if let Some(pages) = &self.pages {
            pages.flush(self, self.layout.tables)?;
        }
        self.sync_raw()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match &self.pages {
            Some(pages) => pages.write(self, self.layout.tables, offset, data),
            None => self.write_raw(self.layout.tables + offset, data),
        }
    }
}

/// Why a call failed: all of them, if the store takes no more work.
#[derive(Clone, Debug)]
pub(super) struct Broken {
    pub(super) file: Arc<str>,
    /// Whether the file is only opened again, and the store goes on.
    pub(super) goes_on: bool,
    pub(super) cause: Option<Arc<redb::Error>>,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = &self.file;
        match self.goes_on {
            true => write!(f, "{file} failed with this call, and is opened again"),
            false => write!(f, "{file} failed and takes no more work until it is opened again"),
        }
    }
}

impl Error for Broken {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

impl From<Broken> for StoreError {
    fn from(broken: Broken) -> Self {
        Self::with_source(StoreErrorKind::Unavailable, broken)
    }
}

/// Set once, for good.
pub(super) type BrokenCell = OnceLock<Broken>;

/// How redb is used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) cache_bytes: usize,
    pub(super) verify: bool,
    /// Of a new file.
    pub(super) journal_bytes: u64,
    /// Whether a new file has checksums under its pages.
    pub(super) page_checksums: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cache_bytes: 128 << 20,
            verify: false,
            journal_bytes: 4 << 20,
            page_checksums: true,
        }
    }
}

/// Opens the tables on the medium, or begins anew where there are none.
pub(super) fn start(backend: &Backend, settings: &Settings) -> Result<Database, DatabaseError> {
    let mut builder = Database::builder();
    builder.set_cache_size(settings.cache_bytes);
    builder.set_check_integrity_on_open(settings.verify);
    // A file that something else has changed may lead its reader anywhere.
    catch_unwind(AssertUnwindSafe(|| builder.create_with_backend(backend.clone())))
        .unwrap_or_else(|_| Err(StorageError::Corrupted("its pages do not fit together".to_owned()).into()))
}

/// Why a file that is open cannot be used, in the words of a store.
pub(super) fn unreadable(path: &Path, error: redb::Error) -> FileStoreError {
    match error {
        redb::Error::Io(error) => FileStoreError::io(path, error),
        redb::Error::Corrupted(_) | redb::Error::TableDoesNotExist(_) => {
            FileStoreError::new(FileStoreErrorKind::Damaged, path, error)
        }
        redb::Error::UpgradeRequired(newer) => {
            let what = format!("version {newer} of its journal");
            FileStoreError::new(FileStoreErrorKind::NewerVersion, path, what)
        }
        error => FileStoreError::new(FileStoreErrorKind::Failed, path, error),
    }
}

/// Why a file has no layout, in the words of a store.
pub(super) fn not_laid_out(path: &Path, error: Unknown) -> FileStoreError {
    match error {
        Unknown::NotOurs => FileStoreError::new(FileStoreErrorKind::NotAStore, path, "it is not marked as one"),
        Unknown::Newer(newer) => {
            let what = format!("version {newer} of its format");
            FileStoreError::new(FileStoreErrorKind::NewerVersion, path, what)
        }
        Unknown::Damaged => FileStoreError::new(FileStoreErrorKind::Damaged, path, "its head was changed or cut off"),
        Unknown::Io(error) => FileStoreError::io(path, error),
    }
}

/// Why a database did not open, in the words of a store.
pub(super) fn not_opened(path: &Path, error: DatabaseError) -> FileStoreError {
    match error {
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
            FileStoreError::new(FileStoreErrorKind::NotAStore, path, error)
        }
        // Where a page should be there is no more file.
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            FileStoreError::new(FileStoreErrorKind::Damaged, path, error)
        }
        DatabaseError::Storage(StorageError::Io(error)) => FileStoreError::io(path, error),
        DatabaseError::DatabaseAlreadyOpen => FileStoreError::new(FileStoreErrorKind::InUse, path, error),
        DatabaseError::UpgradeRequired(_) => FileStoreError::new(FileStoreErrorKind::NotAStore, path, error),
        error => FileStoreError::new(FileStoreErrorKind::Damaged, path, error),
    }
}
