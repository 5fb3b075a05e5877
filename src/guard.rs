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
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    policy::Policy,
    random,
    record::{Lease, Retention},
    shared::Shared,
    sync::{Handle, Instant, Mutex, PoisonError, sleep},
};

/// How an attempt ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It is done, and this is its answer, to be kept for this long.
    Completed(StoredResponse, Retention),
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
    /// Whether its claim was made twice, so that the first one may still arrive.
    repeated: bool,
    /// Of the keys that the operation claims beside its own, with the same.
    others: Mutex<Vec<(Lease, bool)>>,
    /// When the store was last asked for the lease of the operation's own, and how long after that it is to be asked again.
    /// From a store that granted it at once, it was when anything had to wait first: before that no time has passed, and
    /// most attempts never look at a clock.
    asked: Mutex<Option<(Instant, Duration)>>,
    settled: bool,
}

/// The first pause before a call to the store is tried again, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl Guard {
    /// `asked` is when the store was asked for the lease; `None` if it granted it at once.
    pub(crate) fn new(shared: Arc<Shared>, lease: Lease, repeated: bool, asked: Option<Instant>) -> Self {
        let asked = asked.map(|at| (at, shared.policy.lease / 3));
        Self {
            shared,
            lease,
            repeated,
            others: Mutex::default(),
            asked: Mutex::new(asked),
            settled: false,
        }
    }

    /// The handler is about to run.
    pub(crate) fn count_run(&self) {
        self.shared.tally.executed.add();
        if self.lease.fence > 1 {
            self.shared.tally.taken_over.add();
            tracing::warn!(record = %self.lease.id, fence = self.lease.fence, "a lost attempt is taken over");
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
            sleep(self.due_in().min(others_due_in)).await;
            others_due_in = length / 3;
            let others = self.others();
            for other in iter::once(None).chain(others.iter().map(Some)) {
                // It is the operation's own record that keeps others from running it. So it comes first, and again
                // whenever it is due: many calls may take longer than a lease.
                if self.due_in().is_zero() {
                    // The lease may be counted from now on, and the answer may be late.
                    let now = Instant::now();
                    match self.renew(&self.lease).await {
                        Ok(()) => self.ask_again(now, length / 3),
                        Err(error) if error.kind() == StoreErrorKind::Fenced => {
                            let Lease { id, fence, .. } = self.lease;
                            tracing::warn!(record = %id, fence, "the lease was lost while the handler ran");
                            return;
                        }
                        Err(_) => self.ask_again(Instant::now(), soon),
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

    /// How long the operation's own record can wait. What was held before this counts, too.
    fn due_in(&self) -> Duration {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, pause) = asked.get_or_insert_with(|| (Instant::now(), self.shared.policy.lease / 3));
        pause.saturating_sub(at.elapsed())
    }

    fn ask_again(&self, at: Instant, pause: Duration) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Some((at, pause));
    }

    /// The operation's own record, at once; the next time is counted from now on.
    pub(crate) async fn renew_own(&self) -> Result<(), StoreError> {
        self.ask_again(Instant::now(), self.shared.policy.lease / 3);
        self.renew(&self.lease).await
    }

    async fn renew(&self, lease: &Lease) -> Result<(), StoreError> {
        let store = &self.shared.store;
        self.shared.call(store.renew(lease, self.shared.policy.lease)).await
    }

    /// Tells the store how the attempt ended. Where the store does not answer, a task goes on trying.
    pub(crate) async fn settle(&mut self, mut outcome: Outcome) {
        // The operation's own record last: whoever finds it ended finds the others ended, too.
        if self.last_other().is_some() {
            // Many calls may take longer than a lease.
            self.hold(Box::pin(self.settle_others(&outcome))).await;
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
            settle_later(&self.shared, self.lease, outcome);
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
                settle_later(&self.shared, other, outcome);
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

impl Outcome {
    /// Of an operation whose earlier attempt was lost, a later one can say for itself alone that it did not execute.
    fn become_that_of_attempt(&mut self, lease: &Lease) {
        if matches!(self, Self::NotExecuted) && lease.fence > 1 {
            *self = Self::Unknown;
        }
    }

    /// The same for a key that was claimed beside the operation's own: the fact, without the answer.
    fn beside(&self, other: &Lease) -> Self {
        match self {
            Self::Completed(response, retention) => {
                Self::Completed(StoredResponse::not_kept(response.status()), *retention)
            }
            Self::NotExecuted if other.fence > 1 => Self::Unknown,
            Self::NotExecuted => Self::NotExecuted,
            Self::Unknown => Self::Unknown,
        }
    }
}

/// Whether the store answered; if not, it has to be told later.
async fn settle_one(shared: &Shared, lease: &Lease, outcome: &Outcome) -> bool {
    match apply(shared, lease, outcome).await {
        Ok(()) => true,
        Err(error) if error.is_retryable() => false,
        Err(error) => {
            report(shared, lease, &error);
            true
        }
    }
}

/// One try. An answer that the store has no room for is replaced by the fact that there was one.
async fn apply(shared: &Shared, lease: &Lease, outcome: &Outcome) -> Result<(), StoreError> {
    let store = &shared.store;
    match outcome {
        Outcome::Completed(response, retention) => {
            let retention = *retention;
            #[cfg(seeded_bug)]
            let retention = match crate::seeded::is("forgets what completed") {
                true => Retention::For(Duration::ZERO),
                false => retention,
            };
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

/// In place of the fence of a claim that was not answered with a lease.
pub(crate) const NEVER_GRANTED: u64 = 0;

/// Goes on telling the store for as long as a lease lasts, with growing pauses, until it answers. After that the lease is
/// over, and the record says by itself that the outcome is unknown.
pub(crate) fn settle_later(shared: &Arc<Shared>, lease: Lease, outcome: Outcome) {
    #[cfg(seeded_bug)]
    if crate::seeded::is("gives up at once") {
        return;
    }
    let Ok(runtime) = Handle::try_current() else { return };
    let was_granted = lease.fence != NEVER_GRANTED;
    let places = match was_granted {
        true => &shared.settling,
        false => &shared.giving_up,
    };
    // While the store is away every request may leave such a task behind: their number has a limit.
    let Ok(permit) = Arc::clone(places).try_acquire_owned() else {
        if was_granted {
            tracing::error!(record = %lease.id, "too many outcomes wait for the store; this one is given up");
        } else {
            tracing::warn!(record = %lease.id, "too many claims are to be ended; this one is left, and may hold its key for a lease");
        }
        return;
    };
    let shared = Arc::clone(shared);
    let tasks = Arc::clone(&shared.tasks);
    tasks.spawn(&runtime, async move {
        let _permit = permit;
        // None: a lease that no clock can count is never over.
        let give_up = Instant::now().checked_add(shared.policy.lease);
        let mut pause = FIRST_PAUSE;
        // A claim that was given up may arrive at the store behind the word that ends it, and would be in progress with
        // nobody at it. So that word is said twice.
        let mut answers = if was_granted { 1 } else { 2 };
        loop {
            sleep(pause + Duration::from_millis(random::below(pause.as_millis() as u64))).await;
            let result = apply(&shared, &lease, &outcome).await;
            if !result.as_ref().is_err_and(StoreError::is_retryable) {
                answers -= 1;
                // The store is there: the next word need not wait long.
                pause = FIRST_PAUSE;
            }
            match result {
                Ok(()) if answers == 0 => return,
                Ok(()) => {}
                Err(error) if error.is_retryable() && give_up.is_none_or(|give_up| Instant::now() < give_up) => {}
                // The earlier try was applied after all, or the attempt was taken over; it is over either way.
                Err(error) if error.kind() == StoreErrorKind::Fenced => {
                    tracing::debug!(record = %lease.id, "an attempt that was to be ended has ended already");
                    if answers == 0 {
                        return;
                    }
                }
                Err(error) => return report(&shared, &lease, &error),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    });
}

/// Of a claim that was made twice the first one may arrive when its record is free again, and would be in progress with
/// nobody at it. Where the record stays it finds that.
fn give_up_first_try(shared: &Arc<Shared>, lease: &Lease, outcome: &Outcome) {
    let is_over = |retention: &Retention| *retention == Retention::For(Duration::ZERO);
    if matches!(outcome, Outcome::NotExecuted) || matches!(outcome, Outcome::Completed(_, kept) if is_over(kept)) {
        let Lease { id, owner, .. } = *lease;
        settle_later(shared, Lease::new(id, owner, NEVER_GRANTED), Outcome::NotExecuted);
    }
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
