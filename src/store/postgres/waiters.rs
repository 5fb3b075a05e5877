//! Those of this process who wait for a record.
//!
//! What ends here wakes them at once. For what ends on another node, one task asks for the records of all of them in one
//! query, ten times a second or so, while there are any. Who waits holds no connection, and who completes pays nothing:
//! a `NOTIFY` takes a lock that lets one commit through at a time, and a `LISTEN` wants a session of its own, which
//! neither a pooler in transaction mode nor somebody else's pool can give.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{runtime::Handle, sync::Notify, task::JoinHandle, time::sleep};
use tokio_postgres::types::Type;

use super::connection::Connections;
use crate::{error::StoreError, random, record::RecordId};

/// Between two questions, before as much again by chance.
const PAUSE: Duration = Duration::from_millis(60);
/// While the server is away.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Records in one question.
const MOST: usize = 1000;

pub(super) struct Waiters {
    connections: Arc<Connections>,
    /// [`Statements::there`](super::statements::Statements::there).
    there: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    records: HashMap<RecordId, Listeners>,
    asking: Option<JoinHandle<()>>,
}

struct Listeners {
    notify: Arc<Notify>,
    count: usize,
}

/// Who is to hear of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// All find their answer.
    All,
    /// The first of them claims what is vacant, and the others would only find it claimed. If that one is gone by then,
    /// the next question wakes another.
    One,
}

/// A place among the listeners, free again when it is dropped.
struct Place<'a> {
    waiters: &'a Waiters,
    id: RecordId,
}

impl Waiters {
    pub(super) fn new(connections: Arc<Connections>, there: String) -> Arc<Self> {
        Arc::new(Self {
            connections,
            there,
            state: Mutex::default(),
        })
    }

    /// Resolves when the record may have changed.
    pub(super) async fn changed(self: &Arc<Self>, id: &RecordId) {
        let notify = self.enter(*id);
        let _place = Place { waiters: self, id: *id };
        notify.notified().await;
    }

    pub(super) fn wake(&self, id: &RecordId, who: Wake) {
        if let Some(listeners) = self.state().records.get(id) {
            match who {
                Wake::All => listeners.notify.notify_waiters(),
                Wake::One => listeners.notify.notify_one(),
            }
        }
    }

    fn enter(self: &Arc<Self>, id: RecordId) -> Arc<Notify> {
        let mut state = self.state();
        let listeners = state.records.entry(id).or_insert_with(|| Listeners {
            notify: Arc::default(),
            count: 0,
        });
        listeners.count += 1;
        let notify = Arc::clone(&listeners.notify);
        // The task ends with its runtime, which a store may outlive. Without any runtime, who waits still looks.
        if state.asking.as_ref().is_none_or(JoinHandle::is_finished) {
            let runtime = Handle::try_current().ok();
            state.asking = runtime.map(|runtime| runtime.spawn(ask(Arc::downgrade(self))));
        }
        notify
    }

    fn leave(&self, id: &RecordId) {
        let mut state = self.state();
        if let Some(listeners) = state.records.get_mut(id) {
            listeners.count -= 1;
            if listeners.count == 0 {
                state.records.remove(id);
            }
        }
    }

    /// `None` if nobody listens: then the task that asks is over, and the next listener starts another.
    pub(super) fn records(&self) -> Option<Vec<RecordId>> {
        let mut state = self.state();
        if state.records.is_empty() {
            state.asking = None;
            return None;
        }
        Some(state.records.keys().copied().collect())
    }

    async fn ask_for(&self, records: &[RecordId]) -> Result<(), StoreError> {
        for some in records.chunks(MOST) {
            let ids: Vec<&[u8]> = some.iter().map(|id| &id.as_bytes()[..]).collect();
            let values = [(&ids as _, Type::BYTEA_ARRAY)];
            let deadline = self.connections.deadline();
            let rows = self.connections.query(&self.there, &values, deadline).await?;
            let there = rows
                .iter()
                .filter_map(|row| Some((row.try_get(0).ok()?, row.try_get(1).ok()?)));
            let there: HashMap<&[u8], bool> = there.collect();
            for id in some {
                match there.get(&id.as_bytes()[..]) {
                    Some(true) => {}
                    Some(false) => self.wake(id, Wake::All),
                    None => self.wake(id, Wake::One),
                }
            }
        }
        Ok(())
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

/// Runs while somebody listens.
async fn ask(waiters: Weak<Waiters>) {
    let mut pause = PAUSE;
    loop {
        sleep(pause + Duration::from_millis(random::below(pause.as_millis() as u64))).await;
        let Some(waiters) = waiters.upgrade() else { return };
        let Some(records) = waiters.records() else { return };
        pause = match waiters.ask_for(&records).await {
            Ok(()) => PAUSE,
            Err(_) => (pause * 2).min(LONGEST_PAUSE),
        };
    }
}
