//! A store without its type: what a layer holds.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use super::Store;
use crate::{
    codec::StoredResponse,
    error::StoreError,
    record::{Begin, Claim, Lease, RecordId, Retention},
};

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// [`Store`] in a form that can stand behind a pointer; every store has it.
pub(crate) trait DynStore: Send + Sync {
    fn begin<'a>(&'a self, id: &'a RecordId, claim: &'a Claim) -> Boxed<'a, Result<Begin, StoreError>>;
    fn complete<'a>(
        &'a self,
        lease: &'a Lease,
        response: &'a StoredResponse,
        retention: Retention,
    ) -> Boxed<'a, Result<(), StoreError>>;
    fn renew<'a>(&'a self, lease: &'a Lease, length: Duration) -> Boxed<'a, Result<(), StoreError>>;
    fn release<'a>(&'a self, lease: &'a Lease) -> Boxed<'a, Result<(), StoreError>>;
    fn abandon<'a>(&'a self, lease: &'a Lease) -> Boxed<'a, Result<(), StoreError>>;
    fn changed<'a>(&'a self, id: &'a RecordId) -> Boxed<'a, ()>;
}

impl<S: Store> DynStore for S {
    fn begin<'a>(&'a self, id: &'a RecordId, claim: &'a Claim) -> Boxed<'a, Result<Begin, StoreError>> {
        Box::pin(Store::begin(self, id, claim))
    }

    fn complete<'a>(
        &'a self,
        lease: &'a Lease,
        response: &'a StoredResponse,
        retention: Retention,
    ) -> Boxed<'a, Result<(), StoreError>> {
        Box::pin(Store::complete(self, lease, response, retention))
    }

    fn renew<'a>(&'a self, lease: &'a Lease, length: Duration) -> Boxed<'a, Result<(), StoreError>> {
        Box::pin(Store::renew(self, lease, length))
    }

    fn release<'a>(&'a self, lease: &'a Lease) -> Boxed<'a, Result<(), StoreError>> {
        Box::pin(Store::release(self, lease))
    }

    fn abandon<'a>(&'a self, lease: &'a Lease) -> Boxed<'a, Result<(), StoreError>> {
        Box::pin(Store::abandon(self, lease))
    }

    fn changed<'a>(&'a self, id: &'a RecordId) -> Boxed<'a, ()> {
        Box::pin(Store::changed(self, id))
    }
}

/// Any store, chosen while the program runs. Clones share it.
///
/// ```
/// use tower_idempotency::{AnyStore, IdempotencyLayer, MemoryStore};
///
/// # fn choose(_: &str) -> AnyStore {
/// let store = AnyStore::new(MemoryStore::new());
/// # store }
/// let payments = IdempotencyLayer::new(choose("memory"));
/// ```
#[derive(Clone)]
pub struct AnyStore(Arc<dyn DynStore>);

impl AnyStore {
    /// Forgets the type of a store.
    pub fn new(store: impl Store) -> Self {
        Self(Arc::new(store))
    }

    pub(crate) fn into_inner(self) -> Arc<dyn DynStore> {
        self.0
    }
}

impl fmt::Debug for AnyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyStore(..)")
    }
}

impl Store for AnyStore {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        self.0.begin(id, claim).await
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.0.complete(lease, response, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.0.renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.0.release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.0.abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.0.changed(id).await;
    }
}
