//! A store that fails as it is told.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tower_idempotency::{
    Begin, Claim, Lease, MemoryStore, RecordId, Retention, Store, StoreError, StoreErrorKind, StoredResponse,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Begin,
    Complete,
    Renew,
    Release,
    Abandon,
}

#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// None, this time.
    Pass,
    /// It is not applied, and says so.
    Error(StoreErrorKind),
    /// It is applied, and its answer is lost.
    AnswerLost,
    /// Nothing is heard of it, ever, and it is not applied.
    BlackHole,
    /// It is applied, and nothing is heard of it, ever.
    AppliedBlackHole,
    /// It is applied and answered after this time.
    Slow(Duration),
    /// It is applied at once and answered after this time.
    SlowAnswer(Duration),
    /// It panics.
    Panic,
}

/// A memory store behind a network of the test's making. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct FaultyStore {
    pub memory: MemoryStore,
    script: Arc<Mutex<HashMap<Op, VecDeque<Fault>>>>,
    down: Arc<Mutex<Option<Fault>>>,
    calls: Arc<Mutex<HashMap<Op, usize>>>,
    deaf: Arc<AtomicUsize>,
}

impl FaultyStore {
    /// The next calls of this operation fail like this, one after the other.
    pub fn fail(&self, op: Op, faults: impl IntoIterator<Item = Fault>) {
        self.script.lock().unwrap().entry(op).or_default().extend(faults);
    }

    /// Every call fails like this until [`up`](Self::up).
    pub fn down(&self, fault: Fault) {
        *self.down.lock().unwrap() = Some(fault);
    }

    pub fn up(&self) {
        *self.down.lock().unwrap() = None;
    }

    /// Hints are lost from now on.
    pub fn deafen(&self) {
        self.deaf.store(1, SeqCst);
    }

    pub fn calls(&self, op: Op) -> usize {
        self.calls.lock().unwrap().get(&op).copied().unwrap_or(0)
    }

    async fn meet<T>(&self, op: Op, apply: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        *self.calls.lock().unwrap().entry(op).or_default() += 1;
        let scripted = self.script.lock().unwrap().get_mut(&op).and_then(VecDeque::pop_front);
        let fault = scripted.or(*self.down.lock().unwrap());
        match fault {
            None | Some(Fault::Pass) => apply.await,
            Some(Fault::Error(kind)) => Err(kind.into()),
            Some(Fault::AnswerLost) => {
                let _ = apply.await;
                Err(StoreErrorKind::Unavailable.into())
            }
            Some(Fault::BlackHole) => std::future::pending().await,
            Some(Fault::AppliedBlackHole) => {
                let _ = apply.await;
                std::future::pending().await
            }
            Some(Fault::Slow(time)) => {
                tokio::time::sleep(time).await;
                apply.await
            }
            Some(Fault::SlowAnswer(time)) => {
                let result = apply.await;
                tokio::time::sleep(time).await;
                result
            }
            Some(Fault::Panic) => panic!("the store panics"),
        }
    }
}

impl Store for FaultyStore {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        self.meet(Op::Begin, self.memory.begin(id, claim)).await
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.meet(Op::Complete, self.memory.complete(lease, response, retention))
            .await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.meet(Op::Renew, self.memory.renew(lease, length)).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.meet(Op::Release, self.memory.release(lease)).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.meet(Op::Abandon, self.memory.abandon(lease)).await
    }

    async fn changed(&self, id: &RecordId) {
        if self.deaf.load(SeqCst) > 0 {
            std::future::pending::<()>().await;
        }
        self.memory.changed(id).await;
    }
}
