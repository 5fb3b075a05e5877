//! Removing what has expired, a batch at a time.

use std::{
    sync::{
        Weak,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tokio_postgres::types::Type;

use super::{Inner, failure::may_be_too_much};
use crate::{error::StoreError, random};

/// Records in one transaction at most: short enough to be in nobody's way.
const BATCH: i64 = 1000;

/// After one that failed there are smaller ones, down to this.
const SMALLEST: i64 = 1;

/// How many records a batch has now. Answers of a megabyte take so long to remove that a whole batch of them would never
/// be done within the time of a step: after one that failed the next is half as large, and those that follow grow a
/// little with each that is full and does not fail.
pub(super) struct Batch(AtomicI64);

impl Default for Batch {
    fn default() -> Self {
        Self(AtomicI64::new(BATCH))
    }
}

impl Batch {
    fn size(&self) -> i64 {
        self.0.load(Relaxed)
    }

    /// Others may have done one meanwhile; then the size is one of those that are next to be tried.
    fn failed(&self, size: i64) {
        self.0.store((size / 2).max(SMALLEST), Relaxed);
    }

    fn was_full(&self, size: i64) {
        self.0.store((size + size / 8 + 1).min(BATCH), Relaxed);
    }
}

pub(super) struct Purged {
    pub(super) removed: u64,
    is_all: bool,
}

impl Inner {
    /// Removes at most one batch.
    pub(super) async fn purge(&self) -> Result<Purged, StoreError> {
        let size = self.batch.size();
        let purged = self.purge_one(size).await;
        match &purged {
            // Of a pool without a connection, or a server that is not there, its size is not the reason.
            Err(error) if may_be_too_much(error) => self.batch.failed(size),
            Ok(purged) if !purged.is_all => self.batch.was_full(size),
            Err(_) | Ok(_) => {}
        }
        purged
    }

    async fn purge_one(&self, size: i64) -> Result<Purged, StoreError> {
        let most = [(&size as _, Type::INT8)];
        // Those that were renewed or are kept for longer than was claimed, which would be in the way each time.
        let deadline = self.connections.deadline();
        let put_off = self
            .connections
            .execute(&self.statements.put_off, &most, deadline)
            .await?;
        let deadline = self.connections.deadline();
        let removed = self
            .connections
            .execute(&self.statements.purge, &most, deadline)
            .await?;
        Ok(Purged {
            removed,
            is_all: removed.max(put_off) < size.unsigned_abs(),
        })
    }
}

/// Purges in the background until the store is gone.
pub(super) async fn repeat(store: Weak<Inner>, every: Duration) {
    loop {
        // Nodes that started together do not purge together.
        sleep(every / 2 + every.mul_f64(random::below(1000) as f64 / 1000.0)).await;
        loop {
            let Some(store) = store.upgrade() else { return };
            let (start, size) = (Instant::now(), store.batch.size());
            let purged = store.purge().await;
            drop(store);
            match purged {
                Ok(Purged { is_all: true, .. }) => break,
                // There is more. Half of the time is left to others.
                Ok(_) => sleep(start.elapsed()).await,
                Err(error) if size > SMALLEST && may_be_too_much(&error) => sleep(start.elapsed()).await,
                // Of an outage whoever has a request meanwhile hears, too, but not of a table that grows without end.
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "expired records are not removed"
                    );
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_fails_is_halved_down_to_one_record_and_grows_again() {
        let batch = Batch::default();
        let sizes = |times: usize, how: fn(&Batch, i64)| {
            let after = (0..times).map(|_| {
                how(&batch, batch.size());
                batch.size()
            });
            after.collect::<Vec<_>>()
        };
        assert_eq!(sizes(3, Batch::failed), [500, 250, 125]);
        assert_eq!(sizes(3, Batch::was_full), [141, 159, 179]);
        assert_eq!(sizes(9, Batch::failed)[6..], [1, 1, 1]);
        assert_eq!(sizes(3, Batch::was_full), [2, 3, 4]);
        assert_eq!(sizes(100, Batch::was_full)[98..], [1000, 1000]);
    }
}
