//! Requests that wait for another one with the same key.

use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use crate::{
    flow::Exchange,
    policy::Concurrent,
    record::RecordId,
    shared::Shared,
    sync::{Instant, Mutex, PoisonError, sleep},
};

/// How many requests of this process wait for each key. Keys without waiters take no room.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    counts: Mutex<HashMap<RecordId, usize>>,
}

/// One waiter's place, free again when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    waiting: Arc<Waiting>,
    id: RecordId,
}

impl Waiting {
    /// A place in the queue for `id`, unless `most` have one.
    pub(crate) fn enter(self: &Arc<Self>, id: RecordId, most: usize) -> Option<Place> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.get(&id).copied().unwrap_or(0);
        if count >= most {
            return None;
        }
        counts.insert(id, count + 1);
        Some(Place {
            waiting: Arc::clone(self),
            id,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.waiting.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.id);
            }
        }
    }
}

type Changed = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A request that waits for another one with the same key.
pub(crate) struct Wait {
    _place: Place,
    until: Instant,
    /// The longest time to the next look, whatever is heard before.
    look_again_in: Duration,
    changed: Changed,
}

/// Whether a request can wait.
pub(crate) enum Prepared {
    LookAgain,
    Wait,
    NoPlaceOrTime,
}

/// A waiter looks at the record this often although it heard of no change: hints may be lost between nodes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// And no more often than this where the store's hints come for nothing.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

impl<S: Clone> Exchange<S> {
    /// Takes a place and listens, before the record is read once more; then waits with that.
    pub(crate) fn prepare_to_wait(&mut self, longest: Duration) -> Prepared {
        let now = Instant::now();
        if let Some(wait) = &mut self.wait {
            wait.look_again_in = longest.min(LOOK_AGAIN).min(wait.until.saturating_duration_since(now));
            return if now < wait.until {
                Prepared::Wait
            } else {
                Prepared::NoPlaceOrTime
            };
        }
        let policy = &self.shared.policy;
        let Concurrent::Wait(limit) = policy.concurrent else {
            return Prepared::NoPlaceOrTime;
        };
        let Some(place) = self.shared.waiting.enter(self.identity.id, policy.max_waiters) else {
            return Prepared::NoPlaceOrTime;
        };
        self.shared.tally.waited.add();
        // Others may run meanwhile in the place below that it reserved; it asks for one when it runs itself.
        self.service = self.service.clone();
        self.wait = Some(Box::new(Wait {
            _place: place,
            // A wait that no clock can count has no end of its own; the lease's looks go on.
            until: now
                .checked_add(limit)
                .unwrap_or(now + Duration::from_secs(365 * 24 * 60 * 60)),
            look_again_in: Duration::ZERO,
            changed: listen(&self.shared, self.identity.id),
        }));
        Prepared::LookAgain
    }
}

impl<S> Exchange<S> {
    /// It is to run. Its place and its listener are for others from here on: what is left in the box of an exchange
    /// stays there until the handler has ended.
    pub(crate) fn stop_waiting(&mut self) {
        self.wait = None;
    }

    /// Until the record may have changed. May be dropped: the place is free then.
    pub(crate) async fn wait(mut self: Box<Self>) -> Box<Self> {
        if let Some(wait) = &mut self.wait {
            let mut pause = pin!(sleep(wait.look_again_in));
            poll_fn(|cx| match wait.changed.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(()),
                Poll::Pending => pause.as_mut().poll(cx),
            })
            .await;
        }
        // Registered before the record is read again, so that no change falls between.
        let changed = listen(&self.shared, self.identity.id);
        if let Some(wait) = &mut self.wait {
            wait.changed = changed;
        }
        self
    }
}

/// Whatever tells of a change.
fn hint(shared: &Shared, id: RecordId) -> Changed {
    // The store does not see what has not been committed.
    #[cfg(feature = "postgres")]
    if let Some(transactions) = shared.transactions() {
        return Box::pin(async move { transactions.over(&id).await });
    }
    let store = Arc::clone(&shared.store);
    Box::pin(async move { store.changed(&id).await })
}

/// Listens for changes of the record, from now on.
fn listen(shared: &Shared, id: RecordId) -> Changed {
    let mut changed = hint(shared, id);
    // The first poll registers; whoever waits polls again with a waker of its own.
    match changed.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Pending => changed,
        // What changed before now is seen by the look that follows.
        Poll::Ready(()) => Box::pin(sleep(SHORTEST_PAUSE)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn there_are_as_many_places_as_allowed_and_each_is_free_again() {
        let waiting = Arc::new(Waiting::default());
        let (one, two) = (RecordId::from_bytes([1; 32]), RecordId::from_bytes([2; 32]));
        let first = waiting.enter(one, 2).unwrap();
        let _second = waiting.enter(one, 2).unwrap();
        assert!(waiting.enter(one, 2).is_none());
        assert!(waiting.enter(two, 2).is_some(), "another key has places of its own");
        drop(first);
        assert!(waiting.enter(one, 2).is_some());
        assert_eq!(
            waiting.counts.lock().unwrap().len(),
            1,
            "a key without waiters takes no room"
        );
    }

    #[test]
    fn with_no_place_allowed_nobody_waits() {
        assert!(
            Arc::new(Waiting::default())
                .enter(RecordId::from_bytes([1; 32]), 0)
                .is_none()
        );
    }
}
