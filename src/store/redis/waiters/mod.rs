//! Those of this process who wait for a record, and the one subscription that wakes them.
//!
//! The first listener of a record subscribes to its channel; the server publishes there only while somebody does. When
//! the server confirms, the listeners so far are woken for nothing: what changed before then they see by looking again.
//! A channel is kept for a while after its last listener, since who waits looks and listens by turns. Beside them there is
//! a channel of all, from before the first one until after the last: a script that ends many operations asks for that.

mod ears;
mod subscription;

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{
        Notify,
        mpsc::{UnboundedSender, unbounded_channel},
    },
    time::sleep,
};

pub(super) use self::ears::Ears;
use self::subscription::hold_subscription;
use super::{keys::Keys, way::Way};
use crate::record::RecordId;

/// Where nothing is heard, waiters look again after this time.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

pub(super) struct Waiters {
    way: Arc<Way>,
    keys: Keys,
    timeout: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    records: HashMap<RecordId, Listeners>,
    /// To the task that holds the subscription, once somebody listened.
    orders: Option<UnboundedSender<Order>>,
}

struct Listeners {
    notify: Arc<Notify>,
    count: usize,
}

#[derive(Clone, Copy)]
enum Order {
    /// A record has its first listener.
    Subscribe(RecordId),
    /// A record lost its last listener.
    Left(RecordId),
}

/// A place among the listeners, free again when it is dropped.
struct Place<'a> {
    waiters: &'a Waiters,
    id: RecordId,
}

impl Waiters {
    pub(super) fn new(way: Arc<Way>, keys: Keys, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            way,
            keys,
            timeout,
            state: Mutex::default(),
        })
    }

    /// Resolves when the record may have changed.
    pub(super) async fn changed(self: &Arc<Self>, id: &RecordId) {
        if !self.way.has_ears() {
            // Woken for nothing, they look again.
            return sleep(LOOK_AGAIN).await;
        }
        let notify = self.enter(*id);
        let _place = Place { waiters: self, id: *id };
        notify.notified().await;
    }

    fn enter(self: &Arc<Self>, id: RecordId) -> Arc<Notify> {
        let mut state = self.state();
        // The task ends with its runtime, which a store may outlive.
        let held = state.orders.as_ref().is_some_and(|orders| !orders.is_closed());
        let notify = match state.records.entry(id) {
            Entry::Occupied(mut listeners) => {
                listeners.get_mut().count += 1;
                let notify = Arc::clone(&listeners.get().notify);
                if held {
                    return notify;
                }
                notify
            }
            Entry::Vacant(vacant) => {
                let notify = Arc::new(Notify::new());
                vacant.insert(Listeners {
                    notify: Arc::clone(&notify),
                    count: 1,
                });
                notify
            }
        };
        let order = Order::Subscribe(id);
        let sent = state.orders.as_ref().is_some_and(|orders| orders.send(order).is_ok());
        // Without any runtime, who waits still looks by itself.
        if let (false, Ok(runtime)) = (sent, Handle::try_current()) {
            let (orders, received) = unbounded_channel();
            let _ = orders.send(order);
            state.orders = Some(orders);
            runtime.spawn(hold_subscription(Arc::downgrade(self), received));
        }
        notify
    }

    fn leave(&self, id: &RecordId) {
        let mut state = self.state();
        let Some(listeners) = state.records.get_mut(id) else {
            return;
        };
        listeners.count -= 1;
        if listeners.count > 0 {
            return;
        }
        let order = Order::Left(*id);
        if state.orders.as_ref().is_none_or(|orders| orders.send(order).is_err()) {
            state.records.remove(id);
        }
    }

    fn wake(&self, id: &RecordId) {
        if let Some(listeners) = self.state().records.get(id) {
            listeners.notify.notify_waiters();
        }
    }

    /// Whether nobody listens to the record, which is forgotten then.
    fn forget(&self, id: &RecordId) -> bool {
        let mut state = self.state();
        let unheard = state.records.get(id).is_none_or(|listeners| listeners.count == 0);
        if unheard {
            state.records.remove(id);
        }
        unheard
    }

    fn is_heard(&self, id: &RecordId) -> bool {
        self.state()
            .records
            .get(id)
            .is_some_and(|listeners| listeners.count > 0)
    }

    /// The records that somebody listens for; the others are forgotten.
    fn heard(&self) -> Vec<RecordId> {
        let mut state = self.state();
        state.records.retain(|_, listeners| listeners.count > 0);
        state.records.keys().copied().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiters.leave(&self.id);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{super::address, *};

    fn waiters() -> Arc<Waiters> {
        let way = address::way("redis://localhost", &Default::default()).unwrap();
        Waiters::new(Arc::new(way), Keys::new("test:".to_owned()), Duration::from_secs(1))
    }

    #[test]
    fn a_record_is_forgotten_when_its_last_listener_has_left() {
        let waiters = waiters();
        let (one, two) = (RecordId::from_bytes([1; 32]), RecordId::from_bytes([2; 32]));
        assert!(!waiters.is_heard(&one));
        assert!(waiters.forget(&one), "it left while the connection was opened");
        // Who gets the orders does nothing with them here.
        let (orders, _received) = unbounded_channel();
        waiters.state().orders = Some(orders);
        for id in [one, one, two] {
            waiters.enter(id);
        }
        waiters.leave(&one);
        assert!(waiters.is_heard(&one) && !waiters.forget(&one), "one still listens");
        waiters.leave(&one);
        assert!(!waiters.is_heard(&one));
        assert_eq!(waiters.state().records.len(), 2, "its channel is kept for a while");
        assert!(waiters.forget(&one));
        assert_eq!(waiters.heard(), [two]);
        waiters.leave(&two);
        assert!(waiters.heard().is_empty() && waiters.state().records.is_empty());
    }

    #[test]
    fn a_channel_is_subscribed_to_for_its_first_listener_and_left_with_its_last() {
        let waiters = waiters();
        let id = RecordId::from_bytes([1; 32]);
        let (orders, mut received) = unbounded_channel();
        waiters.state().orders = Some(orders);
        let mut ordered = || match received.try_recv() {
            Ok(Order::Subscribe(of)) => Some(("subscribe", of)),
            Ok(Order::Left(of)) => Some(("left", of)),
            Err(_) => None,
        };
        waiters.enter(id);
        assert_eq!(ordered(), Some(("subscribe", id)));
        waiters.enter(id);
        waiters.leave(&id);
        assert_eq!(ordered(), None, "one listens all the time");
        waiters.leave(&id);
        assert_eq!(ordered(), Some(("left", id)));
    }

    #[test]
    fn without_a_subscription_nothing_is_left_of_who_left() {
        let waiters = waiters();
        let id = RecordId::from_bytes([1; 32]);
        waiters.enter(id);
        waiters.leave(&id);
        assert!(waiters.state().records.is_empty());
    }
}
