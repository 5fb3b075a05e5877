//! Those of this process who wait for a transaction to be over.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::record::RecordId;

type Listened = HashMap<RecordId, (Arc<Notify>, usize)>;

#[derive(Debug, Default)]
pub(crate) struct Ends {
    /// With the number of listeners; the entry goes with the last one.
    listened: Mutex<Listened>,
}

impl Ends {
    fn lock(&self) -> MutexGuard<'_, Listened> {
        self.listened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until a transaction that claimed this record is over, from the first poll on.
    pub(super) async fn over(&self, id: RecordId) {
        let notify = {
            let mut listened = self.lock();
            let (notify, count) = listened.entry(id).or_default();
            *count += 1;
            Arc::clone(notify)
        };
        let _listening = Listening { ends: self, id };
        notify.notified().await;
    }
}

struct Listening<'a> {
    ends: &'a Ends,
    id: RecordId,
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        let mut listened = self.ends.lock();
        if let Some((_, count)) = listened.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                listened.remove(&self.id);
            }
        }
    }
}

/// Wakes those who wait for a transaction that has claimed, when it is dropped.
#[derive(Debug)]
pub(super) struct Waking {
    ends: Arc<Ends>,
    id: RecordId,
    claimed: bool,
    committed: bool,
}

impl Waking {
    pub(super) fn of(ends: &Arc<Ends>, id: RecordId) -> Self {
        Self {
            ends: Arc::clone(ends),
            id,
            claimed: false,
            committed: false,
        }
    }

    /// Before, its end is of no interest to anybody.
    pub(super) fn claimed(&mut self) {
        self.claimed = true;
    }

    pub(super) fn committed(&mut self) {
        self.committed = true;
    }
}

impl Drop for Waking {
    fn drop(&mut self) {
        // A waiter that only looked would wake another one, or itself.
        if !self.claimed {
            return;
        }
        let notify = self.ends.lock().get(&self.id).map(|(notify, _)| Arc::clone(notify));
        match notify {
            None => {}
            Some(notify) if self.committed => notify.notify_waiters(),
            // The first of them claims the record, and the others would only find it claimed.
            Some(notify) => notify.notify_one(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::pin, task::Context};

    use super::*;

    #[test]
    fn a_transaction_that_only_looked_wakes_nobody_and_one_that_had_claimed_wakes_one() {
        let ends = Arc::<Ends>::default();
        let id = RecordId::from_bytes([1; 32]);
        let (mut first, mut second) = (pin!(ends.over(id)), pin!(ends.over(id)));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(first.as_mut().poll(&mut cx).is_pending() && second.as_mut().poll(&mut cx).is_pending());
        drop(Waking::of(&ends, id));
        assert!(first.as_mut().poll(&mut cx).is_pending() && second.as_mut().poll(&mut cx).is_pending());
        let mut waking = Waking::of(&ends, id);
        waking.claimed();
        drop(waking);
        assert!(first.as_mut().poll(&mut cx).is_ready() && second.as_mut().poll(&mut cx).is_pending());
    }

    #[test]
    fn a_transaction_that_was_committed_wakes_all_who_wait_for_it_and_nobody_else() {
        let ends = Arc::<Ends>::default();
        let (id, another) = (RecordId::from_bytes([1; 32]), RecordId::from_bytes([2; 32]));
        let (mut first, mut second) = (Box::pin(ends.over(id)), Box::pin(ends.over(id)));
        let mut else_where = pin!(ends.over(another));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(first.as_mut().poll(&mut cx).is_pending() && second.as_mut().poll(&mut cx).is_pending());
        assert!(else_where.as_mut().poll(&mut cx).is_pending());
        assert_eq!(ends.lock().get(&id).map(|(_, count)| *count), Some(2));
        let mut waking = Waking::of(&ends, id);
        waking.claimed();
        waking.committed();
        drop(waking);
        assert!(first.as_mut().poll(&mut cx).is_ready() && second.as_mut().poll(&mut cx).is_ready());
        assert!(else_where.as_mut().poll(&mut cx).is_pending());
        drop((first, second));
        let listened: Vec<_> = ends.lock().keys().copied().collect();
        assert_eq!(listened, [another], "nothing is left of those who have heard");
    }

    #[test]
    fn who_leaves_takes_no_other_listener_along() {
        let ends = Arc::<Ends>::default();
        let id = RecordId::from_bytes([1; 32]);
        let (mut leaves, mut stays) = (Box::pin(ends.over(id)), pin!(ends.over(id)));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(leaves.as_mut().poll(&mut cx).is_pending() && stays.as_mut().poll(&mut cx).is_pending());
        drop(leaves);
        let mut waking = Waking::of(&ends, id);
        waking.claimed();
        drop(waking);
        assert!(stays.as_mut().poll(&mut cx).is_ready());
    }
}
