//! Records that are durable in the journal, while the tables that readers see do not have them yet.

use std::{
    collections::HashMap,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use crate::record::RecordId;

/// What became of a record: its bytes, or `None` if it was removed.
pub(super) type Latest = Option<Bytes>;

/// Between two checkpoints the tables change in one transaction, of which nobody but the writer sees anything. The journal
/// has no more than fits into it, so neither has this.
#[derive(Default)]
pub(super) struct Ahead {
    latest: Mutex<HashMap<RecordId, Latest>>,
}

impl Ahead {
    /// No method leaves it half changed.
    fn lock(&self) -> MutexGuard<'_, HashMap<RecordId, Latest>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Once they are durable, and before anybody is told.
    pub(super) fn put(&self, changes: Vec<(RecordId, Latest)>) {
        self.lock().extend(changes);
    }

    /// Once a snapshot of the tables has all of them.
    pub(super) fn clear(&self) {
        let latest = mem::take(&mut *self.lock());
        // Thousands of answers, while nobody waits for the lock.
        drop(latest);
    }

    /// What each of them is here, and `None` where the tables say. Only a snapshot that is taken after this has what is
    /// not here any more.
    pub(super) fn find<'a>(&self, ids: impl Iterator<Item = &'a RecordId>) -> Vec<Option<Latest>> {
        let latest = self.lock();
        ids.map(|id| latest.get(id).cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> RecordId {
        RecordId::from_bytes([number; 32])
    }

    #[test]
    fn the_latest_of_each_record_is_found_a_removal_among_them_until_the_tables_have_it() {
        let ahead = Ahead::default();
        let (first, second) = (Some(Bytes::from_static(b"first")), Some(Bytes::from_static(b"second")));
        ahead.put(vec![
            (id(1), first.clone()),
            (id(2), first.clone()),
            (id(1), second.clone()),
        ]);
        ahead.put(vec![(id(2), None), (id(3), first.clone())]);
        let all = [id(1), id(2), id(3), id(4)];
        assert_eq!(ahead.find(all.iter()), [Some(second), Some(None), Some(first), None]);
        ahead.clear();
        assert_eq!(ahead.find(all.iter()), [None, None, None, None]);
    }
}
