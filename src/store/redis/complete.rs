//! How an answer gets into its record.
//!
//! Nearly always the record is still as this node's claim set it. Then it is compared with that and replaced: by
//! `SET … IFEQ` where the server has it, and elsewhere by a script that the completions of one moment share. Where the
//! comparison fails nothing was changed, and the script for one completion decides.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::join_all;
use redis::{RedisError, RedisResult, Value};
use tokio::{
    runtime::{Handle, Id},
    sync::oneshot,
    task::yield_now,
    time::{Instant, timeout, timeout_at},
};

use super::{
    Inner,
    connection::late,
    failure::{classify, is_of_several_places, is_refused, is_said_by_the_server},
    flight::{Flight, Kind},
    record::{self, HEAD},
    safe,
};
use crate::{
    codec::StoredResponse,
    error::StoreError,
    record::{Lease, Retention},
};

/// Completions that one script makes at most, and of records up to this length; a longer one has a script of its own. So
/// one holds up the server for some tenths of a millisecond at most.
const TOGETHER: usize = 16;
const SHORT: usize = 4 * 1024;
/// Whoever was not sent by then goes alone. The task that sends may be behind another one that blocks its thread.
const PATIENCE: Duration = Duration::from_millis(20);

struct Completion {
    key: String,
    /// The record as this node's claim set it, if that is known.
    granted: Option<[u8; HEAD]>,
    completed: Vec<u8>,
    /// Milliseconds, or nothing for ever.
    time_to_live: String,
}

/// Completions that are about to be sent together: those of each runtime, since one that stands still must not hold up
/// another's.
#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<HashMap<Id, Vec<Waiting>>>,
    /// Behind the server are several, and one step may not concern the records of two.
    is_closed: AtomicBool,
}

struct Waiting {
    completion: Arc<Completion>,
    told: oneshot::Sender<RedisResult<Told>>,
}

/// What became of one of them.
#[derive(Clone, Copy)]
struct Told {
    is_done: bool,
    is_safe: bool,
}

impl Inner {
    pub(super) async fn complete(
        self: &Arc<Self>,
        lease: &Lease,
        response: &StoredResponse,
        retention: Retention,
    ) -> Result<(), StoreError> {
        let deadline = self.connection.deadline();
        let granted = self.granted.get(lease);
        let completion = Arc::new(Completion {
            key: self.keys.key(&lease.id),
            granted,
            completed: record::completed(&granted.unwrap_or([0; HEAD]), response, retention),
            time_to_live: record::completed_millis(retention).map_or_else(String::new, |millis| millis.to_string()),
        });
        if response.is_kept() && self.replace(&completion, deadline).await? {
            return Ok(());
        }
        let step = match response.is_kept() {
            true => &self.scripts.complete,
            // There is always room for the fact.
            false => &self.scripts.complete_without_answer,
        };
        let Completion {
            key,
            completed,
            time_to_live,
            ..
        } = &*completion;
        let arguments: [&[u8]; 3] = [lease.owner.as_bytes(), &completed[HEAD..], time_to_live.as_bytes()];
        self.change_until(step, key, &arguments, deadline).await
    }

    /// Replaces the record if it is as its claim set it. Says whether it was.
    async fn replace(self: &Arc<Self>, completion: &Arc<Completion>, deadline: Instant) -> Result<bool, StoreError> {
        let Some(granted) = &completion.granted else {
            return Ok(false);
        };
        let way = self.connection.way();
        if way.is_foreign() {
            // Nobody knows what leads through it, and where to.
            Ok(false)
        } else if self.connection.compares() && !completion.time_to_live.is_empty() {
            // With a time to live replicas and the file get the outcome. Without one they get the comparison, and an older
            // server skips what it does not know.
            self.set_if_equal(completion, granted, deadline).await
        } else if !way.is_cluster() && !self.queue.is_closed.load(Relaxed) && completion.completed.len() <= SHORT {
            self.join_others(completion, deadline).await
        } else {
            Ok(false)
        }
    }

    async fn set_if_equal(
        self: &Arc<Self>,
        completion: &Completion,
        granted: &[u8; HEAD],
        deadline: Instant,
    ) -> Result<bool, StoreError> {
        let Completion { key, completed, .. } = completion;
        let mut set = redis::Cmd::with_capacity(7, key.len() + completed.len() + HEAD + 128);
        set.arg("SET").arg(key).arg(&completed[..]);
        set.arg("IFEQ").arg(&granted[..]);
        set.arg("PX").arg(&completion.time_to_live);
        let (count, publish) = match self.connection.way().is_cluster() {
            true => ("SHARDNUMSUB", "SPUBLISH"),
            false => ("NUMSUB", "PUBLISH"),
        };
        // Asked afterwards: whoever comes later finds the record completed.
        let mut listeners = redis::cmd("PUBSUB");
        listeners.arg(count).arg(key);
        let flight = Flight {
            key: key.as_bytes(),
            before: None,
            step: set,
            after: Some(listeners),
            kind: Kind::Change,
        };
        let landed = self.connection.send(flight, deadline).await;
        match landed.answer {
            Ok(Value::Okay) => {}
            Ok(_) => return Ok(false),
            // A server of a cluster that is older than those that were asked.
            Err(error) if is_refused(&error) => return Ok(false),
            Err(error) => return Err(classify(error)),
        }
        if listened(landed.after) {
            let mut wake = redis::cmd(publish);
            wake.arg(key).arg("");
            let (inner, key) = (Arc::clone(self), key.clone());
            // Nobody waits for it: it is completed. Where it fails, those who listen look again by themselves.
            tokio::spawn(async move {
                let flight = Flight {
                    key: key.as_bytes(),
                    before: None,
                    step: wake,
                    after: None,
                    kind: Kind::Read,
                };
                inner.connection.send(flight, deadline).await;
            });
        }
        safe(true, landed.is_safe)
    }

    /// With the other completions that tasks of this runtime make before it has run through all that can go on. A task of
    /// its own sends them: none of them may depend on whether somebody polls another.
    async fn join_others(
        self: &Arc<Self>,
        completion: &Arc<Completion>,
        deadline: Instant,
    ) -> Result<bool, StoreError> {
        let runtime = Handle::current();
        let (told, mut said) = oneshot::channel();
        let waiting = Waiting {
            completion: Arc::clone(completion),
            told,
        };
        if self.queue.join(runtime.id(), waiting) {
            let turn = Turn {
                inner: Some(Arc::clone(self)),
                of: runtime.id(),
            };
            runtime.spawn(async move {
                yield_now().await;
                turn.send().await;
            });
        }
        let patience = PATIENCE.min(deadline.saturating_duration_since(Instant::now()));
        let said = match timeout(patience, &mut said).await {
            Ok(said) => Ok(said),
            Err(_) if self.queue.leave(runtime.id(), completion) => return Ok(false),
            Err(_) => timeout_at(deadline, said).await,
        };
        match said {
            Ok(Ok(Ok(Told { is_done, is_safe }))) => safe(is_done, is_safe || !is_done),
            // It may be about another one of them.
            Ok(Ok(Err(error))) if is_said_by_the_server(&error) => {
                self.queue.is_closed.fetch_or(is_of_several_places(&error), Relaxed);
                Ok(false)
            }
            Ok(Ok(Err(error))) => Err(classify(error)),
            // The runtime of the task is gone.
            Ok(Err(_)) => Ok(false),
            Err(elapsed) => Err(classify(late(elapsed))),
        }
    }

    async fn send_together(&self, waiting: Vec<Waiting>) {
        let deadline = self.connection.deadline();
        let keys: Vec<_> = waiting.iter().map(|one| one.completion.key.as_bytes()).collect();
        let mut arguments: Vec<&[u8]> = Vec::with_capacity(3 * waiting.len());
        for Waiting { completion, .. } in &waiting {
            let granted = completion.granted.as_ref().map_or(&[][..], |granted| granted);
            arguments.extend([granted, &completion.completed, completion.time_to_live.as_bytes()]);
        }
        let step = &self.scripts.complete_many;
        let landed = self.connection.run(step, &keys, &arguments, deadline).await;
        let is_safe = landed.is_safe;
        let mut done = match landed.answer {
            Ok(Value::Array(done)) => Ok(done.into_iter()),
            Ok(_) => Ok(Vec::new().into_iter()),
            Err(error) => Err(error),
        };
        for Waiting { told, .. } in waiting {
            let what = match &mut done {
                Ok(done) => Ok(Told {
                    is_done: done.next() == Some(Value::Int(1)),
                    is_safe,
                }),
                Err(error) => Err(RedisError::clone(error)),
            };
            // Who does not wait any more has left meanwhile.
            let _ = told.send(what);
        }
    }
}

impl Queue {
    /// Whether it is the first, and has to see to it that all are sent.
    fn join(&self, of: Id, waiting: Waiting) -> bool {
        let mut queues = self.queues();
        let queue = queues.entry(of).or_default();
        queue.push(waiting);
        queue.len() == 1
    }

    fn take(&self, of: Id) -> Vec<Waiting> {
        self.queues().remove(&of).unwrap_or_default()
    }

    /// Whether it was there still, and so is not sent.
    fn leave(&self, of: Id, completion: &Arc<Completion>) -> bool {
        let mut queues = self.queues();
        let Some(queue) = queues.get_mut(&of) else {
            return false;
        };
        let before = queue.len();
        queue.retain(|waiting| !Arc::ptr_eq(&waiting.completion, completion));
        queue.len() < before
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<Id, Vec<Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The duty to empty a queue.
struct Turn {
    /// Until it was done.
    inner: Option<Arc<Inner>>,
    of: Id,
}

impl Turn {
    async fn send(mut self) {
        let Some(inner) = self.inner.take() else { return };
        // Whoever comes from now on is the first again.
        let mut waiting = inner.queue.take(self.of);
        waiting.retain(|waiting| !waiting.told.is_closed());
        let mut sent = Vec::new();
        while !waiting.is_empty() {
            let rest = waiting.split_off(waiting.len().min(TOGETHER));
            sent.push(inner.send_together(waiting));
            waiting = rest;
        }
        join_all(sent).await;
    }
}

impl Drop for Turn {
    /// Its runtime is gone before it was its turn: nobody waits for what nobody sends.
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            drop(inner.queue.take(self.of));
        }
    }
}

fn listened(counted: Option<Value>) -> bool {
    match counted {
        Some(Value::Array(counted)) => matches!(counted[..], [_, Value::Int(1..)]),
        _ => false,
    }
}
