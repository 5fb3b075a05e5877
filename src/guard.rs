//! One attempt at an operation: keeps its lease while the handler runs, and sees to it that it ends, however it ends.

use std::{
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};

use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    policy::Policy,
    random,
    record::Lease,
    shared::Shared,
};

/// How an attempt ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It is done, and this is its answer.
    Completed(StoredResponse),
    /// It did not execute: the key is free.
    NotExecuted,
    /// Nobody knows.
    Unknown,
}

/// Holds the lease of an attempt. Made before anything that may fail, and dropped without an outcome only by a panic
/// or by a runtime that shuts down: then the outcome is unknown.
pub(crate) struct Guard {
    shared: Arc<Shared>,
    lease: Lease,
    settled: bool,
}

/// The first pause before a call to the store is tried again, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl Guard {
    pub(crate) fn new(shared: Arc<Shared>, lease: Lease) -> Self {
        shared.tally.executed.add();
        if lease.fence > 1 {
            shared.tally.taken_over.add();
            tracing::warn!(record = %lease.id, fence = lease.fence, "a lost attempt is taken over");
        }
        Self {
            shared,
            lease,
            settled: false,
        }
    }

    /// Whether no attempt at the operation was lost before this one.
    pub(crate) fn is_first(&self) -> bool {
        self.lease.fence == 1
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.shared.policy
    }

    /// Runs `work` to its end and renews the lease meanwhile. Work that is ready at once costs no timer.
    pub(crate) async fn hold<F: Future + Unpin>(&self, mut work: F) -> F::Output {
        let mut renewals: Option<Pin<Box<dyn Future<Output = ()> + Send + '_>>> = None;
        let mut renewing = true;
        poll_fn(|cx| {
            if let Poll::Ready(output) = Pin::new(&mut work).poll(cx) {
                return Poll::Ready(output);
            }
            if renewing {
                let renewals = renewals.get_or_insert_with(|| Box::pin(self.renew_while_held()));
                // A store that panics must not cut the handler. Its lease is over soon, and the record says the rest.
                let renewal = catch_unwind(AssertUnwindSafe(|| renewals.as_mut().poll(cx)));
                renewing = matches!(renewal, Ok(Poll::Pending));
            }
            Poll::Pending
        })
        .await
    }

    /// Returns only when the lease is lost.
    async fn renew_while_held(&self) {
        let length = self.shared.policy.lease;
        let mut pause = length / 3;
        loop {
            sleep(pause).await;
            let renewal = self.shared.store.renew(&self.lease, length);
            pause = match self.shared.call(renewal).await {
                Ok(()) => length / 3,
                Err(error) if error.kind() == StoreErrorKind::Fenced => {
                    let Lease { id, fence, .. } = self.lease;
                    tracing::warn!(record = %id, fence, "the lease was lost while the handler ran");
                    return;
                }
                Err(_) => (length / 12).max(Duration::from_millis(1)),
            };
        }
    }

    /// Tells the store how the attempt ended. Where the store does not answer, a task goes on trying.
    pub(crate) async fn settle(mut self, outcome: Outcome) {
        self.count(&outcome);
        let result = apply(&self.shared, &self.lease, &outcome).await;
        self.settled = true;
        match result {
            Ok(()) => {}
            Err(error) if error.is_retryable() => settle_later(&self.shared, self.lease, outcome),
            Err(error) => report(&self.shared, &self.lease, &error),
        }
    }

    fn count(&self, outcome: &Outcome) {
        match outcome {
            Outcome::Completed(_) => {}
            Outcome::NotExecuted => self.shared.tally.released.add(),
            Outcome::Unknown => {
                self.shared.tally.abandoned.add();
                let Lease { id, fence, .. } = self.lease;
                tracing::warn!(record = %id, fence, "an attempt ended with an unknown outcome");
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        self.count(&Outcome::Unknown);
        let (shared, lease) = (Arc::clone(&self.shared), self.lease);
        // Without a runtime nobody can tell the store; then the lease runs out, which says the same later.
        if let Ok(runtime) = Handle::try_current() {
            self.shared.tasks.spawn(&runtime, async move {
                if let Err(error) = apply(&shared, &lease, &Outcome::Unknown).await {
                    report(&shared, &lease, &error);
                }
            });
        }
    }
}

/// One try. An answer that the store has no room for is replaced by the fact that there was one.
async fn apply(shared: &Shared, lease: &Lease, outcome: &Outcome) -> Result<(), StoreError> {
    let store = &shared.store;
    match outcome {
        Outcome::Completed(response) => {
            let retention = shared.policy.retention;
            match shared.call(store.complete(lease, response, retention)).await {
                Err(error) if error.kind() == StoreErrorKind::Full && response.is_kept() => {
                    tracing::warn!(record = %lease.id, "the store has no room for the answer, which is not kept");
                    let not_kept = StoredResponse::not_kept(response.status());
                    shared.call(store.complete(lease, &not_kept, retention)).await
                }
                result => result,
            }
        }
        Outcome::NotExecuted => shared.call(store.release(lease)).await,
        Outcome::Unknown => shared.call(store.abandon(lease)).await,
    }
}

/// Goes on telling the store for as long as a lease lasts, with growing pauses. After that the lease is over, and the
/// record says by itself that the outcome is unknown.
pub(crate) fn settle_later(shared: &Arc<Shared>, lease: Lease, outcome: Outcome) {
    let Ok(runtime) = Handle::try_current() else { return };
    // While the store is away every request may leave such a task behind: their number has a limit.
    let Ok(permit) = Arc::clone(&shared.settling).try_acquire_owned() else {
        tracing::error!(record = %lease.id, "too many outcomes wait for the store; this one is given up");
        return;
    };
    let shared = Arc::clone(shared);
    let tasks = Arc::clone(&shared.tasks);
    tasks.spawn(&runtime, async move {
        let _permit = permit;
        // None: a lease that no clock can count is never over.
        let give_up = Instant::now().checked_add(shared.policy.lease);
        let mut pause = FIRST_PAUSE;
        loop {
            sleep(pause + Duration::from_millis(random::below(pause.as_millis() as u64))).await;
            match apply(&shared, &lease, &outcome).await {
                Ok(()) => return,
                Err(error) if error.is_retryable() && give_up.is_none_or(|give_up| Instant::now() < give_up) => {}
                // The earlier try was applied after all, or the attempt was taken over; it is over either way.
                Err(error) if error.kind() == StoreErrorKind::Fenced => {
                    tracing::debug!(record = %lease.id, "an attempt that was to be ended has ended already");
                    return;
                }
                Err(error) => return report(&shared, &lease, &error),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    });
}

fn report(shared: &Shared, lease: &Lease, error: &StoreError) {
    if error.kind() == StoreErrorKind::Fenced {
        shared.tally.fenced.add();
        tracing::warn!(record = %lease.id, fence = lease.fence, "an attempt ended after its lease was lost");
    } else {
        let source = std::error::Error::source(error).map(tracing::field::display);
        let Lease { id, fence, .. } = lease;
        tracing::error!(record = %id, fence, %error, source, "the outcome of an attempt could not be stored");
    }
}
