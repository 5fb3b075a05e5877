//! One attempt at an operation: keeps its lease while the handler runs, and sees to it that it ends, however it ends.

use std::{
    future::{Future, poll_fn},
    iter,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use crate::{
    error::{StoreError, StoreErrorKind},
    policy::{Guarantee, Policy},
    record::Lease,
    rejection::RejectionKind,
    settle::{Outcome, apply, give_up_first_try, report, settle_later, settle_one},
    shared::Shared,
    sync::{Handle, Instant, Mutex, PoisonError, sleep},
    term::{Standing, Term},
};

/// Holds the lease of an attempt. Made before anything that may fail, and dropped without an outcome only by a panic
/// or by a runtime that shuts down: then the outcome is unknown.
pub(crate) struct Guard {
    shared: Arc<Shared>,
    lease: Lease,
    /// Whether its claim was made twice, so that the first one may still arrive.
    repeated: bool,
    /// Of the keys that the operation claims beside its own, with the same.
    others: Mutex<Vec<(Lease, bool)>>,
    /// Of the operation's own record.
    term: Term,
    settled: bool,
}

impl Guard {
    /// `asked` is when the store was asked for the lease.
    pub(crate) fn new(shared: Arc<Shared>, lease: Lease, repeated: bool, asked: Instant) -> Self {
        let term = Term::new(shared.policy.lease, asked);
        Self {
            shared,
            lease,
            repeated,
            others: Mutex::default(),
            term,
            settled: false,
        }
    }

    /// Holds this one, too.
    pub(crate) fn add(&self, lease: Lease, repeated: bool) {
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        others.push((lease, repeated));
    }

    fn others(&self) -> Vec<Lease> {
        let others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        others.iter().map(|(lease, _)| *lease).collect()
    }

    /// Of the operation's own record.
    pub(crate) fn lease(&self) -> Lease {
        self.lease
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.shared.policy
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
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

    /// Returns only when the lease of the operation's own record is lost.
    async fn renew_while_held(&self) {
        #[cfg(seeded_bug)]
        if crate::seeded::is("never renews") {
            return;
        }
        let length = self.shared.policy.lease;
        let soon = (length / 12).max(Duration::from_millis(1));
        let mut others_due_in = length / 3;
        loop {
            sleep(self.term.due_in().min(others_due_in)).await;
            others_due_in = length / 3;
            let others = self.others();
            for other in iter::once(None).chain(others.iter().map(Some)) {
                // It is the operation's own record that keeps others from running it. So it comes first, and again
                // whenever it is due: many calls may take longer than a lease.
                if self.term.due_in().is_zero() {
                    // The lease may be counted from now on, and the answer may be late.
                    let now = Instant::now();
                    match self.renew(&self.lease).await {
                        Ok(()) => self.term.renewed(now),
                        Err(error) if error.kind() == StoreErrorKind::Fenced => {
                            self.term.lost();
                            let Lease { id, fence, .. } = self.lease;
                            tracing::warn!(record = %id, fence, "the lease was lost while the handler ran");
                            return;
                        }
                        Err(_) => self.term.ask_again_in(soon),
                    }
                }
                let Some(other) = other else { continue };
                match self.renew(other).await {
                    Ok(()) => {}
                    // It was ended just now, or somebody removed it.
                    Err(error) if error.kind() == StoreErrorKind::Fenced => {}
                    Err(_) => others_due_in = soon,
                }
            }
        }
    }

    /// The operation's own record, at once; the next time is counted from now on.
    pub(crate) async fn renew_own(&self) -> Result<(), StoreError> {
        let asked = Instant::now();
        self.term.ask_again_in(self.shared.policy.lease / 3);
        let renewed = self.renew(&self.lease).await;
        match &renewed {
            Ok(()) => self.term.renewed(asked),
            Err(error) if error.kind() == StoreErrorKind::Fenced => self.term.lost(),
            Err(_) => {}
        }
        renewed
    }

    /// The service is to be called now.
    pub(crate) fn start(&self) -> Result<(), RejectionKind> {
        self.may_start()?;
        self.shared.tally.executed.add();
        if self.lease.fence > 1 {
            self.shared.tally.taken_over.add();
            tracing::warn!(record = %self.lease.id, fence = self.lease.fence, "a lost attempt is taken over");
        }
        Ok(())
    }

    /// Whether the service may be called; if not, why.
    pub(crate) fn may_start(&self) -> Result<(), RejectionKind> {
        match self.term.standing() {
            Standing::Held => Ok(()),
            _ if self.is_at_most_once() => Err(RejectionKind::OutcomeUnknown),
            Standing::Regained => Ok(()),
            Standing::Over => Err(RejectionKind::StoreUnavailable),
            Standing::Lost => Err(RejectionKind::InProgress),
        }
    }

    /// Duplicates may have been told by now that nobody knows what became of this attempt, and that it will not be made
    /// again. Then its key must not become free.
    fn see_whether_given_up(&self, outcome: &mut Outcome) {
        let frees = matches!(outcome, Outcome::NotExecuted);
        if frees && self.is_at_most_once() && self.term.standing() != Standing::Held {
            *outcome = Outcome::Unknown;
        }
    }

    fn is_at_most_once(&self) -> bool {
        self.policy().guarantee == Guarantee::AtMostOnce
    }

    async fn renew(&self, lease: &Lease) -> Result<(), StoreError> {
        let store = &self.shared.store;
        self.shared.call(store.renew(lease, self.shared.policy.lease)).await
    }

    /// Tells the store how the attempt ended. Where the store does not answer, a task goes on trying.
    pub(crate) async fn settle(&mut self, mut outcome: Outcome) {
        self.see_whether_given_up(&mut outcome);
        // The operation's own record last: whoever finds it ended finds the others ended, too.
        if self.last_other().is_some() {
            // Many calls may take longer than a lease.
            self.hold(Box::pin(self.settle_others(&outcome))).await;
            self.see_whether_given_up(&mut outcome);
        }
        outcome.become_that_of_attempt(&self.lease);
        self.count(&outcome);
        let store_answers = settle_one(&self.shared, &self.lease, &outcome).await;
        if self.repeated {
            give_up_first_try(&self.shared, &self.lease, &outcome);
        }
        if !store_answers {
            #[cfg(seeded_bug)]
            if crate::seeded::is("frees what it cannot record") {
                outcome = Outcome::NotExecuted;
            }
            settle_later(&self.shared, self.lease, outcome, self.term.until());
        }
        self.settled = true;
    }

    async fn settle_others(&self, outcome: &Outcome) {
        let mut store_answers = true;
        while let Some((other, repeated)) = self.last_other() {
            let outcome = outcome.beside(&other);
            // Nobody waits for a silent store once for each key.
            store_answers = store_answers && settle_one(&self.shared, &other, &outcome).await;
            if repeated {
                give_up_first_try(&self.shared, &other, &outcome);
            }
            if !store_answers {
                // Whoever finds it is told that another operation has it, and never that an outcome is unknown.
                settle_later(&self.shared, other, outcome, None);
            }
            // Only now: until here a panic of the store leaves it to the guard.
            self.others.lock().unwrap_or_else(PoisonError::into_inner).pop();
        }
    }

    fn last_other(&self) -> Option<(Lease, bool)> {
        let others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        others.last().copied()
    }

    fn count(&self, outcome: &Outcome) {
        match outcome {
            Outcome::Completed(..) => {}
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
        let (shared, lease, others) = (Arc::clone(&self.shared), self.lease, self.others());
        // Without a runtime nobody can tell the store; then the lease runs out, which says the same later.
        if let Ok(runtime) = Handle::try_current() {
            self.shared.tasks.spawn(&runtime, async move {
                for lease in others.into_iter().chain([lease]) {
                    if let Err(error) = apply(&shared, &lease, &Outcome::Unknown).await {
                        report(&shared, &lease, &error);
                    }
                }
            });
        }
    }
}
