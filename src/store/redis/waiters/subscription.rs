//! The task that holds the subscription of a process.

use std::{
    collections::{HashSet, VecDeque},
    future::poll_fn,
    pin::Pin,
    sync::Weak,
    task::Poll,
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::mpsc::UnboundedReceiver,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use super::{
    Order, Waiters,
    ears::{Ears, Heard, Reply},
};
use crate::{random, record::RecordId};

/// A channel without listeners is kept this long: longer than a waiter's pause between two looks.
const LINGER: Duration = Duration::from_secs(5);
/// The first pause before another try to connect, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Connecting takes several questions where sentinels or the nodes of a cluster are asked one after the other.
const QUESTIONS: u32 = 4;

/// Runs until the store is gone. Keeps no connection while nobody has listened since the last one broke.
pub(super) async fn hold_subscription(waiters: Weak<Waiters>, mut orders: UnboundedReceiver<Order>) {
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
        let listen = strong.way.listen(strong.timeout);
        let connected = timeout(strong.timeout.saturating_mul(QUESTIONS), listen).await;
        drop(strong);
        if let Ok(Ok(Some(ears))) = connected {
            let mut subscription = Subscription::new(waiters.clone(), ears);
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

type Answer = Pin<Box<dyn Future<Output = (Option<RecordId>, bool)> + Send>>;

struct Subscription {
    waiters: Weak<Waiters>,
    ears: Ears,
    subscribed: HashSet<RecordId>,
    /// Requests that were not answered yet, with the record to be confirmed, and whether they were in the end.
    unanswered: FuturesUnordered<Answer>,
    /// When channels were left, oldest first.
    left: VecDeque<(Instant, RecordId)>,
    confirmed: bool,
}

/// What happens next to a subscription.
enum Event {
    Order(Option<Order>),
    Heard(Heard),
    Answer(Option<RecordId>, bool),
    Lingered,
}

impl Subscription {
    fn new(waiters: Weak<Waiters>, ears: Ears) -> Self {
        Self {
            waiters,
            ears,
            subscribed: HashSet::new(),
            unanswered: FuturesUnordered::new(),
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
                Event::Heard(heard) => match heard {
                    Heard::Changed(channel) => {
                        if let Some(id) = waiters.keys.id(&channel) {
                            waiters.wake(&id);
                        }
                    }
                    Heard::Left(channel) => {
                        // Nobody asked for it: the record moved to another node.
                        if let Some(id) = waiters.keys.id(&channel).filter(|id| self.subscribed.remove(id)) {
                            self.subscribe(&waiters, id).await;
                        }
                    }
                    Heard::Nothing => {}
                    Heard::Ended => return Ended::Broken,
                },
                Event::Answer(Some(id), true) => {
                    self.confirmed = true;
                    waiters.wake(&id);
                }
                Event::Answer(None, true) => {}
                Event::Answer(_, false) => return Ended::Broken,
            }
        }
    }

    async fn next(&mut self, orders: &mut UnboundedReceiver<Order>) -> Event {
        let lingering = self.left.front().map(|(until, _)| *until);
        tokio::select! {
            order = orders.recv() => Event::Order(order),
            heard = self.ears.hear() => Event::Heard(heard),
            Some((id, is_answered)) = self.unanswered.next() => Event::Answer(id, is_answered),
            () = until(lingering) => Event::Lingered,
        }
    }

    async fn subscribe(&mut self, waiters: &Waiters, id: RecordId) {
        if self.subscribed.insert(id) {
            // Before the record's own, or a script would not ask for that. In a cluster no script is shared.
            if self.subscribed.len() == 1 && self.ears.is_one() {
                let reply = self.ears.subscribe(&self.waiters, id, waiters.keys.listening());
                self.send(reply, None, waiters.timeout).await;
            }
            let reply = self.ears.subscribe(&self.waiters, id, waiters.keys.key(&id));
            self.send(reply, Some(id), waiters.timeout).await;
        }
    }

    async fn unsubscribe_lingered(&mut self, waiters: &Waiters) {
        let now = Instant::now();
        while self.left.front().is_some_and(|(until, _)| *until <= now) {
            let Some((_, id)) = self.left.pop_front() else { return };
            // Somebody may have come back; and whoever comes now subscribes anew.
            if waiters.forget(&id) && self.subscribed.remove(&id) {
                let reply = self.ears.unsubscribe(waiters.keys.key(&id));
                self.send(reply, None, waiters.timeout).await;
                if self.subscribed.is_empty() && self.ears.is_one() {
                    let reply = self.ears.unsubscribe(waiters.keys.listening());
                    self.send(reply, None, waiters.timeout).await;
                }
            }
        }
    }

    /// Polled once, a request is on its way, in the order in which they are made.
    async fn send(&mut self, mut reply: Reply, id: Option<RecordId>, timeout: Duration) {
        let first = poll_fn(|cx| Poll::Ready(reply.as_mut().poll(cx))).await;
        if let Poll::Ready(result) = first {
            let answer = std::future::ready((id, result.is_ok()));
            return self.unanswered.push(Box::pin(answer));
        }
        let now = Instant::now();
        let deadline = now.checked_add(timeout).filter(|_| self.ears.is_one());
        self.unanswered.push(Box::pin(async move {
            let result = match deadline {
                Some(deadline) => timeout_at(deadline, reply).await.is_ok_and(|result| result.is_ok()),
                None => reply.await.is_ok(),
            };
            (id, result)
        }));
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
