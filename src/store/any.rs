//! A store without its type: what a layer holds.

use std::{
    any::Any,
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use super::{MemoryStore, Store};
#[cfg(feature = "postgres")]
use crate::transactional::Transactions;
use crate::{
    codec::StoredResponse,
    error::StoreError,
    record::{Begin, Claim, Lease, RecordId, Retention},
};

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A call to a store: its result where it was there at once, so that a store in memory costs no box.
pub(crate) enum Call<'a, T> {
    Answered(Option<Result<T, StoreError>>),
    Pending(Boxed<'a, Result<T, StoreError>>),
}

impl<'a, T> Call<'a, T> {
    fn answered(result: Result<T, StoreError>) -> Self {
        Self::Answered(Some(result))
    }

    fn pending(call: impl Future<Output = Result<T, StoreError>> + Send + 'a) -> Self {
        Self::Pending(Box::pin(call))
    }
}

impl<T: Unpin> Future for Call<'_, T> {
    type Output = Result<T, StoreError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Answered(result) => result.take().map_or(Poll::Pending, Poll::Ready),
            Self::Pending(call) => call.as_mut().poll(cx),
        }
    }
}

/// [`Store`] in a form that can stand behind a pointer.
pub(crate) trait DynStore: Send + Sync {
    fn begin<'a>(&'a self, id: &'a RecordId, claim: &'a Claim) -> Call<'a, Begin>;
    /// `None` if the store has to be waited for; then nothing was begun.
    fn begin_at_once(&self, id: &RecordId, claim: &Claim) -> Option<Result<Begin, StoreError>>;
    fn complete<'a>(&'a self, lease: &'a Lease, response: &'a StoredResponse, retention: Retention) -> Call<'a, ()>;
    fn renew<'a>(&'a self, lease: &'a Lease, length: Duration) -> Call<'a, ()>;
    fn release<'a>(&'a self, lease: &'a Lease) -> Call<'a, ()>;
    fn abandon<'a>(&'a self, lease: &'a Lease) -> Call<'a, ()>;
    fn changed<'a>(&'a self, id: &'a RecordId) -> Boxed<'a, ()>;
    /// Those that handlers can run in, if it has any.
    #[cfg(feature = "postgres")]
    fn transactions(&self) -> Option<Arc<dyn Transactions>> {
        None
    }
}

/// Any store, its futures boxed; but not what it says at once.
struct Erased<S> {
    store: S,
    #[cfg(feature = "postgres")]
    transactions: Option<Arc<dyn Transactions>>,
}

impl<S: Store> DynStore for Erased<S> {
    fn begin<'a>(&'a self, id: &'a RecordId, claim: &'a Claim) -> Call<'a, Begin> {
        match self.store.begin_at_once(id, claim) {
            Some(result) => Call::answered(result),
            None => Call::pending(self.store.begin(id, claim)),
        }
    }

    fn begin_at_once(&self, id: &RecordId, claim: &Claim) -> Option<Result<Begin, StoreError>> {
        self.store.begin_at_once(id, claim)
    }

    fn complete<'a>(&'a self, lease: &'a Lease, response: &'a StoredResponse, retention: Retention) -> Call<'a, ()> {
        Call::pending(self.store.complete(lease, response, retention))
    }

    fn renew<'a>(&'a self, lease: &'a Lease, length: Duration) -> Call<'a, ()> {
        Call::pending(self.store.renew(lease, length))
    }

    fn release<'a>(&'a self, lease: &'a Lease) -> Call<'a, ()> {
        Call::pending(self.store.release(lease))
    }

    fn abandon<'a>(&'a self, lease: &'a Lease) -> Call<'a, ()> {
        Call::pending(self.store.abandon(lease))
    }

    fn changed<'a>(&'a self, id: &'a RecordId) -> Boxed<'a, ()> {
        Box::pin(self.store.changed(id))
    }

    #[cfg(feature = "postgres")]
    fn transactions(&self) -> Option<Arc<dyn Transactions>> {
        self.transactions.clone()
    }
}

impl DynStore for MemoryStore {
    fn begin<'a>(&'a self, id: &'a RecordId, claim: &'a Claim) -> Call<'a, Begin> {
        Call::answered(self.begin_now(id, claim))
    }

    fn begin_at_once(&self, id: &RecordId, claim: &Claim) -> Option<Result<Begin, StoreError>> {
        Some(self.begin_now(id, claim))
    }

    fn complete<'a>(&'a self, lease: &'a Lease, response: &'a StoredResponse, retention: Retention) -> Call<'a, ()> {
        Call::answered(self.complete_now(lease, response, retention))
    }

    fn renew<'a>(&'a self, lease: &'a Lease, length: Duration) -> Call<'a, ()> {
        Call::answered(self.renew_now(lease, length))
    }

    fn release<'a>(&'a self, lease: &'a Lease) -> Call<'a, ()> {
        Call::answered(self.release_now(lease))
    }

    fn abandon<'a>(&'a self, lease: &'a Lease) -> Call<'a, ()> {
        Call::answered(self.abandon_now(lease))
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
    pub fn new<S: Store>(store: S) -> Self {
        let any: &dyn Any = &store;
        if let Some(memory) = any.downcast_ref::<MemoryStore>() {
            return Self(Arc::new(memory.clone()));
        }
        if let Some(already) = any.downcast_ref::<Self>() {
            return already.clone();
        }
        #[cfg(feature = "postgres")]
        let transactions = any.downcast_ref().map(super::PostgresStore::transactions);
        Self(Arc::new(Erased {
            store,
            #[cfg(feature = "postgres")]
            transactions,
        }))
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

    fn begin_at_once(&self, id: &RecordId, claim: &Claim) -> Option<Result<Begin, StoreError>> {
        self.0.begin_at_once(id, claim)
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
