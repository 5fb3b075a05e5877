//! Two nodes as one store.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use tower_idempotency::{Begin, Claim, Lease, RecordId, Retention, Store, StoreError, StoredResponse};

/// Nodes on one store that take calls by turns.
pub struct InTurns<S> {
    nodes: [S; 2],
    calls: AtomicUsize,
}

impl<S: Store> InTurns<S> {
    pub fn of(nodes: [S; 2]) -> Self {
        let calls = AtomicUsize::new(0);
        Self { nodes, calls }
    }

    fn node(&self) -> &S {
        &self.nodes[self.calls.fetch_add(1, Relaxed) % 2]
    }
}

impl<S: Store> Store for InTurns<S> {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        self.node().begin(id, claim).await
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.node().complete(lease, response, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.node().renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.node().release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.node().abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.node().changed(id).await;
    }
}
