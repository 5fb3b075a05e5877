//! How much the records of all shards may take together.

use super::shard::NoRoom;
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counted without a lock. The counts order nothing else, so `Relaxed` is enough.
pub(super) struct Budget {
    max_bytes: u64,
    max_records: u64,
    bytes: AtomicU64,
    records: AtomicU64,
}

/// What a record takes beside its answer: the record, its place in a map and its entry in a queue.
const RECORD: u64 = 240;

impl Budget {
    pub(super) fn new(max_bytes: u64, max_records: u64) -> Self {
        Self {
            max_bytes,
            max_records,
            bytes: AtomicU64::new(0),
            records: AtomicU64::new(0),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    pub(super) fn records(&self) -> u64 {
        self.records.load(Relaxed)
    }

    pub(super) fn add_record(&self) -> Result<(), NoRoom> {
        // Added first, then looked at: two claims can never both take the last place.
        if self.records.fetch_add(1, Relaxed) >= self.max_records {
            self.records.fetch_sub(1, Relaxed);
            return Err(NoRoom);
        }
        self.add_bytes(RECORD).inspect_err(|NoRoom| {
            self.records.fetch_sub(1, Relaxed);
        })
    }

    pub(super) fn add_bytes(&self, bytes: u64) -> Result<(), NoRoom> {
        if self.bytes.fetch_add(bytes, Relaxed).saturating_add(bytes) > self.max_bytes {
            self.bytes.fetch_sub(bytes, Relaxed);
            return Err(NoRoom);
        }
        Ok(())
    }

    /// For the few bytes that say that an answer was not kept: they are never refused.
    pub(super) fn force_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn remove_record(&self, answer_bytes: u64) {
        self.records.fetch_sub(1, Relaxed);
        self.remove_bytes(RECORD + answer_bytes);
    }

    pub(super) fn remove_bytes(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Relaxed);
    }
}
