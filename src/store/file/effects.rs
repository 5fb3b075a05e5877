//! What a batch did to the tables, as bytes for the journal, and done again from them.
//!
//! Version 1: the version (1), then one after the other: what it is (1) and its content. Numbers are little-endian.
//!
//! | | |
//! |---|---|
//! | 1 | a record is put: id (32), length (4), the record in [its own format](super::frame) |
//! | 2 | a record is removed: id (32) |
//! | 3 | a place is put into the purge's table: when (8, big-endian), id (32) |
//! | 4 | a place is removed from it: as above |
//! | 5 | the store's time: length (4), the stamp in [its own format](super::clock) |
//!
//! Whoever does all of them again, in their order, ends where the batch ended, and does no harm if some were done.

use redb::{StorageError, WriteTransaction};

use super::{
    batch::{EXPIRY, RECORDS},
    frame::Reader,
    tables::write_time,
};
use crate::error::StoreError;

const VERSION: u8 = 1;
const PUT: u8 = 1;
const REMOVE: u8 = 2;
const PLACE: u8 = 3;
const UNPLACE: u8 = 4;
const TIME: u8 = 5;

#[derive(Debug)]
pub(super) struct Effects {
    bytes: Vec<u8>,
    /// Of records.
    changes: usize,
}

impl Effects {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![VERSION],
            changes: 0,
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many changes to records there are.
    pub(super) fn changes(&self) -> usize {
        self.changes
    }

    fn add(&mut self, what: u8, content: &[u8]) {
        self.bytes.push(what);
        self.bytes.extend_from_slice(content);
    }

    fn add_bytes(&mut self, bytes: &[u8]) {
        // No record is that long: an answer has a limit far below.
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn put(&mut self, id: &[u8; 32], record: &[u8]) {
        self.changes += 1;
        self.add(PUT, id);
        self.add_bytes(record);
    }

    pub(super) fn remove(&mut self, id: &[u8; 32]) {
        self.changes += 1;
        self.add(REMOVE, id);
    }

    pub(super) fn place(&mut self, key: &[u8; 40]) {
        self.add(PLACE, key);
    }

    pub(super) fn unplace(&mut self, key: &[u8; 40]) {
        self.add(UNPLACE, key);
    }

    pub(super) fn time(&mut self, stamp: &[u8]) {
        self.add(TIME, &[]);
        self.add_bytes(stamp);
    }
}

/// Does them again.
pub(super) fn apply(transaction: &WriteTransaction, effects: &[u8]) -> Result<(), redb::Error> {
    let mut records = transaction.open_table(RECORDS)?;
    let mut expiry = transaction.open_table(EXPIRY)?;
    let mut rest = Reader(effects);
    let [version] = rest.take().map_err(unreadable)?;
    if version != VERSION {
        return Err(redb::Error::UpgradeRequired(version));
    }
    while !rest.0.is_empty() {
        let [what] = rest.take().map_err(unreadable)?;
        match what {
            PUT => {
                let id = rest.take().map_err(unreadable)?;
                records.insert(&id, bytes(&mut rest)?)?;
            }
            REMOVE => drop(records.remove(&rest.take().map_err(unreadable)?)?),
            PLACE => drop(expiry.insert(&rest.take().map_err(unreadable)?, ())?),
            UNPLACE => drop(expiry.remove(&rest.take().map_err(unreadable)?)?),
            TIME => write_time(transaction, bytes(&mut rest)?)?,
            _ => return Err(StorageError::Corrupted("an unknown entry in its journal".to_owned()).into()),
        }
    }
    Ok(())
}

fn bytes<'a>(rest: &mut Reader<'a>) -> Result<&'a [u8], redb::Error> {
    let length = u32::from_le_bytes(rest.take().map_err(unreadable)?) as usize;
    let (bytes, left) = rest
        .0
        .split_at_checked(length)
        .ok_or_else(|| StorageError::Corrupted("an entry in its journal ends early".to_owned()))?;
    rest.0 = left;
    Ok(bytes)
}

fn unreadable(_: StoreError) -> redb::Error {
    StorageError::Corrupted("an entry in its journal ends early".to_owned()).into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, backends::InMemoryBackend};

    use super::*;

    /// Version 1 as it was first released. These bytes are on disks: they never change.
    const GOLDEN: &[u8] = include_bytes!("golden/v1-effects.bin");

    fn golden() -> Effects {
        let mut effects = Effects::new();
        effects.put(&[1; 32], b"first");
        effects.place(&[2; 40]);
        effects.put(&[3; 32], b"second");
        effects.remove(&[1; 32]);
        effects.place(&[4; 40]);
        effects.unplace(&[2; 40]);
        effects.time(b"now");
        effects
    }

    #[test]
    fn effects_are_written_as_they_were_first_released_and_done_again_any_number_of_times() {
        assert_eq!(golden().as_bytes(), GOLDEN);
        assert_eq!(golden().changes(), 3);
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        for _ in 0..2 {
            let transaction = database.begin_write().unwrap();
            apply(&transaction, GOLDEN).unwrap();
            transaction.commit().unwrap();
            let snapshot = database.begin_read().unwrap();
            let records = snapshot.open_table(RECORDS).unwrap();
            let expiry = snapshot.open_table(EXPIRY).unwrap();
            assert_eq!(records.get(&[3; 32]).unwrap().unwrap().value(), b"second");
            assert_eq!(expiry.first().unwrap().unwrap().0.value(), &[4; 40]);
            assert_eq!((records.len().unwrap(), expiry.len().unwrap()), (1, 1));
        }
    }

    #[test]
    fn effects_that_end_early_or_are_newer_are_an_error_and_nothing_panics() {
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let transaction = database.begin_write().unwrap();
        let ends = [1, 43, 84, 127, 160, 201, 242];
        for end in 0..GOLDEN.len() {
            let result = apply(&transaction, &GOLDEN[..end]);
            assert_eq!(result.is_ok(), ends.contains(&end), "{end}: {result:?}");
        }
        let newer = apply(&transaction, &[2, 1]);
        assert!(matches!(newer, Err(redb::Error::UpgradeRequired(2))), "{newer:?}");
        assert!(apply(&transaction, &[1, 9]).is_err());
    }
}
