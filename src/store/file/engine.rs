//! redb on a medium: made, opened, and asked how it failed.

use std::{
    error::Error,
    fmt, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTableMetadata, StorageError, TableDefinition, TableError,
    WriteTransaction,
};

use super::{
    batch::{EXPIRY, RECORDS},
    clock::Stamp,
    error::{FileStoreError, FileStoreErrorKind},
    medium::{Medium, Spare, is_full},
};
use crate::error::{StoreError, StoreErrorKind};

/// What the file says of itself.
const ABOUT: TableDefinition<&str, &[u8]> = TableDefinition::new("store");
const FORMAT: &str = "format";
const TIME: &str = "time";

/// The value of [`FORMAT`]: whose file it is, and the version of its tables. Records have versions of their own.
const OURS: &[u8] = b"tower-idempotency";
const VERSION: u8 = 1;

/// A medium for redb, with the spare between them, and the first thing that went wrong.
#[derive(Clone, Debug)]
pub(super) struct Backend {
    medium: Arc<dyn Medium>,
    pub(super) spare: Arc<Spare>,
    failed: Arc<Mutex<Option<Failed>>>,
}

/// How the medium failed redb, which takes no more work from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// Only for want of room: opening the file again is enough.
    Full,
    /// Nobody knows what is on the medium.
    Unknown,
}

impl Backend {
    pub(super) fn new(medium: Arc<dyn Medium>) -> Self {
        Self {
            spare: Arc::new(Spare::new(Arc::clone(&medium))),
            medium,
            failed: Arc::default(),
        }
    }

    /// How it failed since this was last asked.
    pub(super) fn take_failure(&self) -> Option<Failed> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn note<T>(&self, result: io::Result<T>, full_is_harmless: bool) -> io::Result<T> {
        result.inspect_err(|error| {
            let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
            // An unknown state stays unknown, whatever fails after it.
            if *failed != Some(Failed::Unknown) {
                let harmless = full_is_harmless && is_full(error);
                *failed = Some(if harmless { Failed::Full } else { Failed::Unknown });
            }
        })
    }

    /// Once more with the spare, if it was for want of room.
    fn with_spare(&self, write: impl Fn() -> io::Result<()>) -> io::Result<()> {
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

impl redb::StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.note(self.medium.len(), false)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.note(self.medium.read(offset, out), false)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with_spare(|| self.medium.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        // Whatever it says: after a failed sync the system may have dropped what was to be written.
        self.note(self.medium.sync(), false)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with_spare(|| self.medium.write(offset, data))
    }
}

/// Why a store that was open takes no more work.
#[derive(Clone, Debug)]
pub(super) struct Broken {
    pub(super) file: Arc<str>,
    pub(super) cause: Option<Arc<redb::Error>>,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} failed and takes no more work until it is opened again",
            self.file
        )
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
    pub(super) quick_recovery: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cache_bytes: 128 << 20,
            verify: false,
            quick_recovery: false,
        }
    }
}

/// Opens what is on the medium, or begins anew on an empty one. Recovers what a crash left, which reads all of it.
pub(super) fn start(backend: &Backend, settings: &Settings) -> Result<Database, DatabaseError> {
    let mut builder = Database::builder();
    builder.set_cache_size(settings.cache_bytes);
    builder.set_check_integrity_on_open(settings.verify);
    // A file that something else has changed may lead its reader anywhere.
    catch_unwind(AssertUnwindSafe(|| builder.create_with_backend(backend.clone())))
        .unwrap_or_else(|_| Err(StorageError::Corrupted("its pages do not fit together".to_owned()).into()))
}

/// Makes the tables of a store in an empty database.
pub(super) fn initialise(database: &Database, first: &Stamp) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    transaction.open_table(RECORDS)?;
    transaction.open_table(EXPIRY)?;
    let format = [OURS, &[VERSION]].concat();
    transaction.open_table(ABOUT)?.insert(FORMAT, &format[..])?;
    write_stamp(&transaction, first)?;
    transaction.commit()?;
    Ok(())
}

pub(super) fn write_stamp(transaction: &WriteTransaction, stamp: &Stamp) -> Result<(), redb::Error> {
    transaction.open_table(ABOUT)?.insert(TIME, &stamp.encode()[..])?;
    Ok(())
}

/// How many records there are; the tree knows.
pub(super) fn records(transaction: &WriteTransaction) -> Result<u64, redb::Error> {
    Ok(transaction.open_table(RECORDS)?.len()?)
}

/// What the last run left, after a look at whose file it is.
pub(super) fn read_stamp(database: &Database, path: &Path) -> Result<Stamp, FileStoreError> {
    let failed = |source| unreadable(path, source);
    let transaction = database.begin_read().map_err(|source| failed(source.into()))?;
    let about = match transaction.open_table(ABOUT) {
        Ok(about) => about,
        Err(TableError::Storage(source)) => return Err(failed(source.into())),
        Err(source) => return Err(FileStoreError::new(FileStoreErrorKind::NotAStore, path, source)),
    };
    let value = |key| about.get(key).map_err(|source| failed(source.into()));
    let format = value(FORMAT)?;
    let version = format.as_ref().and_then(|format| format.value().strip_prefix(OURS));
    match version {
        Some([VERSION]) => {}
        Some([newer, ..]) if *newer > VERSION => {
            let what = format!("version {newer} of its tables");
            return Err(FileStoreError::new(FileStoreErrorKind::NewerVersion, path, what));
        }
        _ => {
            return Err(FileStoreError::new(
                FileStoreErrorKind::NotAStore,
                path,
                "it is not marked as one",
            ));
        }
    }
    let missing = transaction
        .open_table(RECORDS)
        .err()
        .or(transaction.open_table(EXPIRY).err());
    if let Some(source) = missing {
        return Err(failed(source.into()));
    }
    let Some(stamp) = value(TIME)? else {
        return Err(FileStoreError::new(
            FileStoreErrorKind::Damaged,
            path,
            "its time is missing",
        ));
    };
    Stamp::decode(stamp.value()).map_err(|source| {
        let kind = match source.kind() {
            StoreErrorKind::NewerVersion => FileStoreErrorKind::NewerVersion,
            _ => FileStoreErrorKind::Damaged,
        };
        FileStoreError::new(kind, path, source)
    })
}

/// Why a file that is open cannot be used, in the words of a store.
pub(super) fn unreadable(path: &Path, error: redb::Error) -> FileStoreError {
    match error {
        redb::Error::Io(error) => FileStoreError::io(path, error),
        redb::Error::Corrupted(_) | redb::Error::TableDoesNotExist(_) => {
            FileStoreError::new(FileStoreErrorKind::Damaged, path, error)
        }
        error => FileStoreError::new(FileStoreErrorKind::Failed, path, error),
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
