//! Removing what has expired, a batch at a time.

use std::{sync::Weak, time::Duration};

use tokio::time::{Instant, sleep};
use tokio_postgres::types::Type;

use super::Inner;
use crate::{error::StoreError, random};

/// Records in one transaction: short enough to be in nobody's way.
const BATCH: i64 = 1000;

impl Inner {
    /// Removes at most one batch; how many records that were.
    pub(super) async fn purge(&self) -> Result<u64, StoreError> {
        let most = [(&BATCH as _, Type::INT8)];
        // Those that were renewed or are kept for longer than was claimed, which would be in the way each time.
        let deadline = self.connections.deadline();
        self.connections
            .execute(&self.statements.put_off, &most, deadline)
            .await?;
        let deadline = self.connections.deadline();
        self.connections.execute(&self.statements.purge, &most, deadline).await
    }
}

/// Purges in the background until the store is gone.
pub(super) async fn repeat(store: Weak<Inner>, every: Duration) {
    loop {
        // Nodes that started together do not purge together.
        sleep(every / 2 + every.mul_f64(random::below(1000) as f64 / 1000.0)).await;
        loop {
            let Some(store) = store.upgrade() else { return };
            let start = Instant::now();
            let removed = store.purge().await;
            drop(store);
            match removed {
                // There is more. Half of the time is left to others.
                Ok(removed) if removed >= BATCH.unsigned_abs() => sleep(start.elapsed()).await,
                Ok(_) => break,
                // Whoever has a request meanwhile hears the same.
                Err(error) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "expired records are not removed"
                    );
                    break;
                }
            }
        }
    }
}
