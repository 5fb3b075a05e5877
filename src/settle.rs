//! Telling the store how an attempt ended, at once or for as long as its lease lasts.

use std::{sync::Arc, time::Duration};

use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    policy::Guarantee,
    random,
    record::{Lease, Retention},
    shared::Shared,
    sync::{Handle, Instant, sleep},
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

/// The first pause before a call to the store is tried again, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl Outcome {
    /// Of an operation whose earlier attempt was lost, a later one can say for itself alone that it did not execute.
    pub(crate) fn become_that_of_attempt(&mut self, lease: &Lease) {
        if matches!(self, Self::NotExecuted) && lease.fence > 1 {
            *self = Self::Unknown;
        }
    }

    /// The same for a key that was claimed beside the operation's own: the fact, without the answer.
    pub(crate) fn beside(&self, other: &Lease) -> Self {
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
pub(crate) async fn settle_one(shared: &Shared, lease: &Lease, outcome: &Outcome) -> bool {
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
pub(crate) async fn apply(shared: &Shared, lease: &Lease, outcome: &Outcome) -> Result<(), StoreError> {
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
/// over, and the record says by itself that the outcome is unknown; from `until` on, when it may be over already, duplicates
/// may have been told so.
pub(crate) fn settle_later(shared: &Arc<Shared>, lease: Lease, mut outcome: Outcome, until: Option<Instant>) {
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
            let is_over = until.is_some_and(|until| Instant::now() >= until);
            if is_over && shared.policy.guarantee == Guarantee::AtMostOnce && matches!(outcome, Outcome::NotExecuted) {
                outcome = Outcome::Unknown;
            }
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
pub(crate) fn give_up_first_try(shared: &Arc<Shared>, lease: &Lease, outcome: &Outcome) {
    let is_over = |retention: &Retention| *retention == Retention::For(Duration::ZERO);
    if matches!(outcome, Outcome::NotExecuted) || matches!(outcome, Outcome::Completed(_, kept) if is_over(kept)) {
        let Lease { id, owner, .. } = *lease;
        // Its lease would begin when it arrives.
        let until = Instant::now().checked_add(shared.policy.lease);
        settle_later(
            shared,
            Lease::new(id, owner, NEVER_GRANTED),
            Outcome::NotExecuted,
            until,
        );
    }
}

pub(crate) fn report(shared: &Shared, lease: &Lease, error: &StoreError) {
    if error.kind() == StoreErrorKind::Fenced {
        shared.tally.fenced.add();
        tracing::warn!(record = %lease.id, fence = lease.fence, "an attempt ended after its lease was lost");
    } else {
        let source = std::error::Error::source(error).map(tracing::field::display);
        let Lease { id, fence, .. } = lease;
        tracing::error!(record = %id, fence, %error, source, "the outcome of an attempt could not be stored");
    }
}
