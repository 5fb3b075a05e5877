//! The tables beside those of records and their expiry: whose file it is, its time, its journal's epoch.

use std::path::Path;

use redb::{
    Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition, TableError, WriteTransaction,
};

use super::{
    batch::{EXPIRY, RECORDS},
    clock::Stamp,
    engine::unreadable,
    error::{FileStoreError, FileStoreErrorKind},
    layout::OURS,
};
use crate::error::StoreErrorKind;

/// What the file says of itself.
const ABOUT: TableDefinition<&str, &[u8]> = TableDefinition::new("store");
const FORMAT: &str = "format";
const TIME: &str = "time";
/// Which epoch of the journal comes after what is in the tables.
const EPOCH: &str = "epoch";

/// The version of the tables, which stands behind [`OURS`] in [`FORMAT`]. Records have versions of their own.
const VERSION: u8 = 1;

/// Makes the tables of a store in an empty database.
pub(super) fn initialise(database: &Database, first: &Stamp) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.open_table(RECORDS)?;
    transaction.open_table(EXPIRY)?;
    let format = [&OURS[..], &[VERSION]].concat();
    transaction.open_table(ABOUT)?.insert(FORMAT, &format[..])?;
    write_time(&transaction, &first.encode())?;
    // So that even a crash from now on is recovered from without a look at all pages.
    transaction.set_quick_repair(true);
    transaction.commit()?;
    Ok(())
}

pub(super) fn write_time(transaction: &WriteTransaction, stamp: &[u8]) -> Result<(), redb::Error> {
    transaction.open_table(ABOUT)?.insert(TIME, stamp)?;
    Ok(())
}

/// 0 before the first checkpoint.
pub(super) fn epoch(transaction: &WriteTransaction) -> Result<u64, redb::Error> {
    let about = transaction.open_table(ABOUT)?;
    let Some(epoch) = about.get(EPOCH)? else { return Ok(0) };
    let cut = || redb::Error::Corrupted("its journal's epoch is cut".to_owned());
    Ok(u64::from_le_bytes(*epoch.value().first_chunk().ok_or_else(cut)?))
}

pub(super) fn write_epoch(transaction: &WriteTransaction, epoch: u64) -> Result<(), redb::Error> {
    transaction.open_table(ABOUT)?.insert(EPOCH, &epoch.to_le_bytes()[..])?;
    Ok(())
}

/// How many records there are; the tree knows.
pub(super) fn records(transaction: &WriteTransaction) -> Result<u64, redb::Error> {
    Ok(transaction.open_table(RECORDS)?.len()?)
}

/// Whether these are the tables of a store. Nothing was changed before this.
pub(super) fn check_format(database: &Database, path: &Path) -> Result<(), FileStoreError> {
    let failed = |source| unreadable(path, source);
    let transaction = database.begin_read().map_err(|source| failed(source.into()))?;
    let about = match transaction.open_table(ABOUT) {
        Ok(about) => about,
        Err(TableError::Storage(source)) => return Err(failed(source.into())),
        Err(source) => return Err(FileStoreError::new(FileStoreErrorKind::NotAStore, path, source)),
    };
    let format = about.get(FORMAT).map_err(|source| failed(source.into()))?;
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
    match missing {
        Some(source) => Err(failed(source.into())),
        None => Ok(()),
    }
}

/// What the last run left.
pub(super) fn read_stamp(database: &Database, path: &Path) -> Result<Stamp, FileStoreError> {
    let read = || -> Result<_, redb::Error> { Ok(database.begin_read()?.open_table(ABOUT)?.get(TIME)?) };
    let Some(stamp) = read().map_err(|source| unreadable(path, source))? else {
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
