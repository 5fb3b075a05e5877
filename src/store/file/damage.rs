//! Records that a damaged page keeps from being read. Who asks for one again is told so, and nothing is read for it:
//! redb would take no more work, and whoever comes at that moment would suffer for it.

use std::{
    collections::HashMap,
    error::Error,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use super::pages::ChangedPage;
use crate::{
    error::{StoreError, StoreErrorKind},
    record::RecordId,
};

/// The most records that are remembered. A disk that has damaged more is asked again each time.
const MAX_RECORDS: usize = 4096;

#[derive(Default)]
pub(super) struct Damage {
    found: AtomicBool,
    records: Mutex<HashMap<RecordId, ChangedPage>>,
}

impl Damage {
    /// No method leaves it half changed.
    fn records(&self) -> MutexGuard<'_, HashMap<RecordId, ChangedPage>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is any: nothing is purged any more then, or every purge would meet it.
    pub(super) fn is_found(&self) -> bool {
        self.found.load(SeqCst)
    }

    pub(super) fn found(&self) {
        self.found.store(true, SeqCst);
    }

    /// If that is what kept the record from being read.
    pub(super) fn note(&self, id: &RecordId, error: &redb::Error) {
        let redb::Error::Io(error) = error else { return };
        let Some(page) = ChangedPage::of(error) else { return };
        self.found();
        let mut records = self.records();
        if records.len() < MAX_RECORDS {
            records.insert(*id, page);
        }
    }

    /// What is to be said of the record, if it is one of them: that it cannot be read, and not that the store is away,
    /// for which a request might be tried again, or run without it.
    pub(super) fn of(&self, id: &RecordId, file: &Arc<str>) -> Option<StoreError> {
        let page = self.is_found().then(|| self.records().get(id).copied()).flatten()?;
        let file = Arc::clone(file);
        let unreadable = Unreadable { file, page };
        Some(StoreError::with_source(StoreErrorKind::Corrupt, unreadable))
    }
}

#[derive(Debug)]
struct Unreadable {
    file: Arc<str>,
    page: ChangedPage,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = &self.file;
        write!(f, "{file} is damaged where it has this record")
    }
}

impl Error for Unreadable {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.page)
    }
}
