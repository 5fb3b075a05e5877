//! Parts of the store by themselves: how its medium fails it, its batches (`batches`), its tables.
#![allow(clippy::unwrap_used)]

mod batches;

use std::{
    io::{self, ErrorKind},
    path::Path,
    sync::{Arc, Mutex},
};

use redb::{Database, StorageBackend, TableDefinition, backends::InMemoryBackend};

use super::{
    damage::Damage,
    engine::{Backend, Failed, not_opened},
    error::{FileStoreError, FileStoreErrorKind},
    layout::{BLOCK, Layout, OURS},
    medium::{Medium, Spare, missing_is_fine},
    pages::ChangedPage,
    reader::is_for_the_writer,
    tables::check_format,
};
use crate::record::RecordId;

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// How writes fail.
    fails: Option<ErrorKind>,
    writes: usize,
    syncs: usize,
    /// What was asked to be held.
    held: Vec<u64>,
    /// How that fails.
    not_held: Option<ErrorKind>,
}

/// A medium in memory that fails as it is told to.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<State>>);

impl Told {
    fn fails(&self, how: Option<ErrorKind>) {
        self.0.lock().unwrap().fails = how;
    }

    fn calls(&self) -> (usize, usize) {
        let state = self.0.lock().unwrap();
        (state.writes, state.syncs)
    }
}

impl Medium for Told {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.0.lock().unwrap();
        let from = state.bytes.get(offset as usize..).unwrap_or_default();
        let found = from.get(..out.len()).ok_or(ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        if let Some(how) = state.fails {
            return Err(how.into());
        }
        let (from, to) = (offset as usize, offset as usize + data.len());
        let len = state.bytes.len().max(to);
        state.bytes.resize(len, 0);
        state.bytes[from..to].copy_from_slice(data);
        state.writes += 1;
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().bytes.resize(len as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.lock().unwrap().syncs += 1;
        Ok(())
    }

    fn hold(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.held.push(bytes);
        state.not_held.map_or(Ok(()), |how| Err(how.into()))
    }
}

/// With checksums under its pages, of which there is room for ten.
fn backend() -> (Told, Backend) {
    let told = Told::default();
    let medium: Arc<dyn Medium> = Arc::new(told.clone());
    let layout = Layout::make(&medium, 1, true).unwrap();
    let backend = Backend::new(medium, layout);
    backend.set_len(10 * BLOCK).unwrap();
    (told, backend)
}

const PAGE: usize = BLOCK as usize;

// ---- how its medium fails it

#[test]
fn once_nobody_knows_what_is_on_the_medium_nothing_is_written_any_more() {
    for given_up in [true, false] {
        let (told, backend) = backend();
        match given_up {
            true => backend.give_up(),
            false => {
                told.fails(Some(ErrorKind::Other));
                assert!(backend.write(BLOCK, &[1; PAGE]).is_err());
                told.fails(None);
            }
        }
        let before = told.calls();
        assert!(backend.write_raw(0, b"more").is_err() && backend.sync_raw().is_err());
        assert!(backend.write(BLOCK, &[1; PAGE]).is_err() && backend.sync_data().is_err());
        assert_eq!(told.calls(), before);
        // Whoever asks hears of it, and so does the next one.
        let asked = [(); 2].map(|()| backend.take_failure());
        assert_eq!(asked, [Some(Failed::Unknown); 2]);
    }
}

#[test]
fn a_disk_that_was_full_is_forgotten_once_it_was_asked_for() {
    let (told, backend) = backend();
    told.fails(Some(ErrorKind::StorageFull));
    assert!(backend.write(BLOCK, &[1; PAGE]).is_err());
    told.fails(None);
    assert!(!backend.met_damage());
    assert_eq!(backend.take_failure(), Some(Failed::Full));
    assert_eq!(backend.take_failure(), None);
    backend.write(BLOCK, &[1; PAGE]).unwrap();
}

#[test]
fn checksums_that_could_not_be_written_are_written_with_the_next_sync() {
    let (told, backend) = backend();
    backend.write(BLOCK, &[7; PAGE]).unwrap();
    told.fails(Some(ErrorKind::StorageFull));
    assert!(backend.sync_data().is_err());
    told.fails(None);
    backend.take_failure();
    backend.sync_data().unwrap();
    // Whoever opens the file next has nothing but what is on the medium.
    let medium: Arc<dyn Medium> = Arc::new(told);
    let again = Backend::new(Arc::clone(&medium), Layout::read(&medium).unwrap());
    let mut page = [0; PAGE];
    again.read(BLOCK, &mut page).unwrap();
    assert_eq!(page, [7; PAGE]);
}

/// A page and the head that something has changed: where they are in the file, and what is said.
fn changed_pages() -> [(u64, io::Error); 2] {
    let (told, backend) = backend();
    backend.write(0, &[5; 100]).unwrap();
    backend.write(2 * BLOCK, &[7; PAGE]).unwrap();
    backend.sync_data().unwrap();
    // The head of the file, a block of journal, one of checksums; then the pages.
    let places = [3, 5].map(|block| block * BLOCK);
    for place in places {
        told.0.lock().unwrap().bytes[place as usize] ^= 1;
    }
    let (mut head, mut page) = ([0; 100], [0; PAGE]);
    let errors = [backend.read(0, &mut head), backend.read(2 * BLOCK, &mut page)];
    assert!(backend.met_damage());
    let [first, second] = errors.map(Result::unwrap_err);
    [(places[0], first), (places[1], second)]
}

#[test]
fn a_page_that_was_changed_is_told_by_its_place_in_the_file() {
    for (place, error) in changed_pages() {
        let said = format!("its page at {place} was changed since it was written");
        assert_eq!(error.to_string(), said);
        assert_eq!(ChangedPage::of(&error).unwrap().to_string(), said);
        let error = FileStoreError::io(Path::new("store"), error);
        assert_eq!(error.kind(), FileStoreErrorKind::Damaged);
    }
}

#[test]
fn a_reader_leaves_to_the_writer_what_the_writer_can_do_something_about() {
    let [(_, changed), _] = changed_pages();
    assert!(is_for_the_writer(&redb::Error::Io(changed)));
    assert!(is_for_the_writer(&redb::Error::PreviousIo));
    assert!(!is_for_the_writer(&redb::Error::Io(ErrorKind::Other.into())));
    assert!(!is_for_the_writer(&redb::Error::Corrupted("a leaf".to_owned())));
}

#[test]
fn no_more_records_are_remembered_as_damaged_than_there_is_room_for() {
    let damage = Damage::default();
    let id = |number: u16| {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&number.to_le_bytes());
        RecordId::from_bytes(bytes)
    };
    for number in 0..4097 {
        let [(_, changed), _] = changed_pages_once();
        damage.note(&id(number), &redb::Error::Io(changed));
    }
    let file: Arc<str> = "store".into();
    assert!(damage.of(&id(4095), &file).is_some() && damage.of(&id(4096), &file).is_none());
}

/// The same each time, and cheaper.
fn changed_pages_once() -> [(u64, io::Error); 2] {
    thread_local! {
        static PAGES: [(u64, ChangedPage); 2] = changed_pages().map(|(at, error)| (at, ChangedPage::of(&error).unwrap()));
    }
    PAGES.with(|pages| pages.map(|(at, page)| (at, io::Error::other(page))))
}

#[test]
fn why_a_database_did_not_open_is_said_in_the_words_of_a_store() {
    use redb::{DatabaseError, StorageError};
    let io = |kind: ErrorKind| DatabaseError::Storage(StorageError::Io(kind.into()));
    for (error, kind) in [
        (io(ErrorKind::InvalidData), FileStoreErrorKind::NotAStore),
        (io(ErrorKind::UnexpectedEof), FileStoreErrorKind::Damaged),
        (io(ErrorKind::StorageFull), FileStoreErrorKind::Full),
        (io(ErrorKind::PermissionDenied), FileStoreErrorKind::NotAccessible),
        (io(ErrorKind::Other), FileStoreErrorKind::Failed),
        (DatabaseError::DatabaseAlreadyOpen, FileStoreErrorKind::InUse),
        (DatabaseError::UpgradeRequired(9), FileStoreErrorKind::NotAStore),
        (DatabaseError::RepairAborted, FileStoreErrorKind::Damaged),
    ] {
        let said = format!("{error:?}");
        assert_eq!(not_opened(Path::new("store"), error).kind(), kind, "{said}");
    }
}

#[test]
fn what_is_to_be_removed_and_is_not_there_is_no_failure_and_what_stays_is() {
    assert!(missing_is_fine(ErrorKind::NotFound.into()).is_ok());
    assert!(missing_is_fine(ErrorKind::PermissionDenied.into()).is_err());
}

#[test]
fn room_that_was_set_aside_is_given_back_once_and_at_the_latest_with_the_store() {
    let told = Told::default();
    let held = || told.0.lock().unwrap().held.clone();
    let spare = Spare::new(Arc::new(told.clone()));
    assert!(!spare.give_back() && held().is_empty(), "there is nothing to give back");
    assert!(spare.hold() && !spare.is_short());
    assert!(spare.give_back() && spare.is_short());
    assert!(!spare.give_back());
    let bytes = 16 << 20;
    assert_eq!(held(), [bytes, 0]);
    spare.hold();
    drop(spare);
    assert_eq!(held(), [bytes, 0, bytes, 0]);
    // Where there is no room it is short of it, and where something else is in the way it does without.
    for (how, is_short) in [(ErrorKind::StorageFull, true), (ErrorKind::PermissionDenied, false)] {
        told.0.lock().unwrap().not_held = Some(how);
        let spare = Spare::new(Arc::new(told.clone()));
        assert_eq!((spare.hold(), spare.is_short()), (!is_short, is_short), "{how:?}");
        assert!(!spare.give_back());
    }
}

// ---- its tables

#[test]
fn tables_of_a_newer_version_are_told_apart_from_something_else() {
    let kind_of = |format: Option<&[u8]>| {
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let transaction = database.begin_write().unwrap();
        if let Some(format) = format {
            let about: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("store");
            transaction.open_table(about).unwrap().insert("format", format).unwrap();
        }
        transaction.commit().unwrap();
        check_format(&database, Path::new("store")).unwrap_err().kind()
    };
    let version = |version: &[u8]| [&OURS[..], version].concat();
    for (format, kind) in [
        (Some(version(&[2])), FileStoreErrorKind::NewerVersion),
        (Some(version(&[9, 1])), FileStoreErrorKind::NewerVersion),
        (Some(version(&[0])), FileStoreErrorKind::NotAStore),
        (Some(version(&[1, 1])), FileStoreErrorKind::NotAStore),
        (Some(version(&[])), FileStoreErrorKind::NotAStore),
        (Some(b"tower".to_vec()), FileStoreErrorKind::NotAStore),
        (None, FileStoreErrorKind::NotAStore),
        // Of this version, but its other tables are missing.
        (Some(version(&[1])), FileStoreErrorKind::Damaged),
    ] {
        assert_eq!(kind_of(format.as_deref()), kind, "{format:?}");
    }
}
