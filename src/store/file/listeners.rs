//! Those who wait for a record to change.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::record::RecordId;

#[derive(Default)]
pub(super) struct Listeners {
    /// With the number of listeners; the entry goes with the last one.
    records: Mutex<HashMap<RecordId, (Arc<Notify>, usize)>>,
}

/// Whom a change concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    All,
    /// One is enough: it will claim the record, and the others would only find it claimed.
    One,
}

impl Listeners {
    /// No method leaves the map half changed, so a panic elsewhere is no reason to stop.
    fn lock(&self) -> MutexGuard<'_, HashMap<RecordId, (Arc<Notify>, usize)>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self, id: &RecordId, wake: Wake) {
        let Some(notify) = self.lock().get(id).map(|(notify, _)| Arc::clone(notify)) else {
            return;
        };
        match wake {
            Wake::All => notify.notify_waiters(),
            Wake::One => notify.notify_one(),
        }
    }

    pub(super) async fn changed(&self, id: RecordId) {
        let notify = {
            let mut records = self.lock();
            let (notify, count) = records.entry(id).or_default();
            *count += 1;
            Arc::clone(notify)
        };
        let _listening = Listening { listeners: self, id };
        notify.notified().await;
    }
}

struct Listening<'a> {
    listeners: &'a Listeners,
    id: RecordId,
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        let mut records = self.listeners.lock();
        if let Some((_, count)) = records.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                records.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{
        future::Future,
        task::{Context, Waker},
    };

    use super::*;

    #[test]
    fn a_record_without_listeners_takes_no_room() {
        let listeners = Listeners::default();
        let (one, two) = (RecordId::from_bytes([1; 32]), RecordId::from_bytes([2; 32]));
        let listen = |id| {
            let mut listener = Box::pin(listeners.changed(id));
            let mut context = Context::from_waker(Waker::noop());
            assert!(listener.as_mut().poll(&mut context).is_pending());
            listener
        };
        let (first, second, other) = (listen(one), listen(one), listen(two));
        assert_eq!(listeners.lock().len(), 2);
        drop(first);
        assert_eq!(listeners.lock().get(&one).unwrap().1, 1, "one still listens");
        drop((second, other));
        assert!(listeners.lock().is_empty());
    }
}
