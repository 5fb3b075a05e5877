//! Those of this process who wait for a record, and the one subscription that wakes them.
//!
//! The first listener of a record subscribes to its channel; the server publishes there only while somebody does. When
//! the server confirms, the listeners so far are woken for nothing: what changed before then they see by looking again.
//! A channel is kept for a while after its last listener, since who waits looks and listens by turns.

use std::{
    collections::{HashMap, HashSet, VecDeque, hash_map::Entry},
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll},
    time::Duration,
};

use futures_core::Stream;
use redis::{
    Client, RedisResult,
    aio::{PubSub, PubSubSink},
};
use tokio::{
    runtime::Handle,
    sync::{
        Notify,
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    },
    time::{Instant, sleep, sleep_until, timeout},
};

use super::keys::Keys;
use crate::{random, record::RecordId};

/// A channel without listeners is kept this long: longer than a waiter's pause between two looks.
const LINGER: Duration = Duration::from_secs(5);
/// The first pause before another try to connect, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

pub(super) struct Waiters {
    client: Client,
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
    pub(super) fn new(client: Client, keys: Keys, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            client,
            keys,
            timeout,
            state: Mutex::default(),
        })
    }

    /// Resolves when the record may have changed.
    pub(super) async fn changed(self: &Arc<Self>, id: &RecordId) {
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

    /// Whether the record is forgotten now, because nobody listens.
    fn forget(&self, id: &RecordId) -> bool {
        let mut state = self.state();
        let unheard = state.records.get(id).is_some_and(|listeners| listeners.count == 0);
        if unheard {
            state.records.remove(id);
        }
        unheard
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

/// Runs until the store is gone. Keeps no connection while nobody has listened since the last one broke.
async fn hold_subscription(waiters: Weak<Waiters>, mut orders: UnboundedReceiver<Order>) {
    let mut pause = FIRST_PAUSE;
    loop {
        // Whatever was ordered before now is in the list of records.
        while orders.try_recv().is_ok() {}
        let Some(strong) = waiters.upgrade() else { return };
        if strong.heard().is_empty() {
            drop(strong);
            if orders.recv().await.is_none() {
                return;
            }
            continue;
        }
        let connected = timeout(strong.timeout, strong.client.get_async_pubsub()).await;
        drop(strong);
        if let Ok(Ok(connection)) = connected {
            let mut subscription = Subscription::new(waiters.clone(), connection);
            if subscription.serve(&mut orders).await == Ended::Abandoned {
                return;
            }
            if subscription.confirmed {
                pause = FIRST_PAUSE;
            }
        }
        sleep(pause + Duration::from_millis(random::below(pause.as_millis() as u64))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[derive(PartialEq, Eq)]
enum Ended {
    /// The connection broke.
    Broken,
    /// The store is gone.
    Abandoned,
}

type Reply = Pin<Box<dyn Future<Output = RedisResult<()>> + Send>>;

struct Subscription {
    waiters: Weak<Waiters>,
    sink: PubSubSink,
    messages: redis::aio::PubSubStream,
    subscribed: HashSet<RecordId>,
    /// Requests that the server has not answered, oldest first; it answers in order. With the record to be confirmed.
    unanswered: VecDeque<(Reply, Option<RecordId>, Instant)>,
    /// When channels were left, oldest first.
    left: VecDeque<(Instant, RecordId)>,
    confirmed: bool,
}

/// What happens next to a subscription.
enum Event {
    Order(Option<Order>),
    Message(Option<redis::Msg>),
    Answer(Option<RedisResult<()>>),
    Lingered,
}

impl Subscription {
    fn new(waiters: Weak<Waiters>, connection: PubSub) -> Self {
        let (sink, messages) = connection.split();
        Self {
            waiters,
            sink,
            messages,
            subscribed: HashSet::new(),
            unanswered: VecDeque::new(),
            left: VecDeque::new(),
            confirmed: false,
        }
    }

    async fn serve(&mut self, orders: &mut UnboundedReceiver<Order>) -> Ended {
        let Some(waiters) = self.waiters.upgrade() else {
            return Ended::Abandoned;
        };
        for id in waiters.heard() {
            self.subscribe(&waiters, id).await;
        }
        drop(waiters);
        loop {
            let event = self.next(orders).await;
            let Some(waiters) = self.waiters.upgrade() else {
                return Ended::Abandoned;
            };
            match event {
                Event::Order(None) => return Ended::Abandoned,
                Event::Order(Some(Order::Subscribe(id))) => self.subscribe(&waiters, id).await,
                Event::Order(Some(Order::Left(id))) => self.left.push_back((Instant::now() + LINGER, id)),
                Event::Lingered => self.unsubscribe_lingered(&waiters).await,
                Event::Message(Some(message)) => {
                    if let Some(id) = waiters.keys.id_of_channel(message.get_channel_name()) {
                        waiters.wake(&id);
                    }
                }
                Event::Answer(Some(Ok(()))) => {
                    self.confirmed = true;
                    if let Some((_, Some(id), _)) = self.unanswered.pop_front() {
                        waiters.wake(&id);
                    }
                }
                Event::Message(None) | Event::Answer(_) => return Ended::Broken,
            }
        }
    }

    async fn next(&mut self, orders: &mut UnboundedReceiver<Order>) -> Event {
        let (oldest, lingering) = (self.unanswered.front_mut(), self.left.front());
        let messages = &mut self.messages;
        tokio::select! {
            order = orders.recv() => Event::Order(order),
            message = poll_fn(|cx| Pin::new(&mut *messages).poll_next(cx)) => Event::Message(message),
            answer = answer(oldest) => Event::Answer(answer),
            () = until(lingering.map(|(until, _)| *until)) => Event::Lingered,
        }
    }

    async fn subscribe(&mut self, waiters: &Waiters, id: RecordId) {
        if self.subscribed.insert(id) {
            let (mut sink, channel) = (self.sink.clone(), waiters.keys.channel(&id));
            let reply = Box::pin(async move { sink.subscribe(channel).await });
            self.send(reply, Some(id), waiters.timeout).await;
        }
    }

    async fn unsubscribe_lingered(&mut self, waiters: &Waiters) {
        let now = Instant::now();
        while self.left.front().is_some_and(|(until, _)| *until <= now) {
            let Some((_, id)) = self.left.pop_front() else { return };
            // Somebody may have come back; and whoever comes now subscribes anew.
            if waiters.forget(&id) && self.subscribed.remove(&id) {
                let (mut sink, channel) = (self.sink.clone(), waiters.keys.channel(&id));
                let reply = Box::pin(async move { sink.unsubscribe(channel).await });
                self.send(reply, None, waiters.timeout).await;
            }
        }
    }

    /// Polled once, a request is on its way; its answer comes in order.
    async fn send(&mut self, mut reply: Reply, id: Option<RecordId>, timeout: Duration) {
        let now = Instant::now();
        let first = poll_fn(|cx| Poll::Ready(reply.as_mut().poll(cx))).await;
        let reply: Reply = match first {
            Poll::Pending => reply,
            Poll::Ready(result) => Box::pin(std::future::ready(result)),
        };
        let deadline = now.checked_add(timeout).unwrap_or(now + LINGER);
        self.unanswered.push_back((reply, id, deadline));
    }
}

/// `None` if it did not come in time.
async fn answer(oldest: Option<&mut (Reply, Option<RecordId>, Instant)>) -> Option<RedisResult<()>> {
    let Some((reply, _, deadline)) = oldest else {
        return std::future::pending().await;
    };
    let mut late = pin!(sleep_until(*deadline));
    poll_fn(|cx: &mut Context<'_>| match reply.as_mut().poll(cx) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        Poll::Pending => late.as_mut().poll(cx).map(|()| None),
    })
    .await
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
