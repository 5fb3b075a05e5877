//! How an answer gets into its record.
//!
//! Nearly always the record is still as this node's claim set it. Then it is compared with that and replaced: by
//! `SET … IFEQ` where the server has it, and elsewhere by a script that the completions of one moment share. Where the
//! comparison fails nothing was changed, and the script for one completion decides.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use futures_util::future::join_all;
use redis::{RedisError, RedisResult, Value};
use tokio::time::Instant;

use super::{
    Inner,
    connection::late,
    failure::{classify, is_of_several_places, is_refused, is_said_by_the_server},
    flight::{Flight, Kind},
    record::{self, HEAD},
    safe,
    together::{Asked, Together, Unanswered},
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

struct Completion {
    deadline: Instant,
    key: String,
    /// The record as this node's claim set it, if that is known.
    granted: Option<[u8; HEAD]>,
    completed: Vec<u8>,
    /// Milliseconds, or nothing for ever.
    time_to_live: String,
}

/// Completions that are about to share scripts.
#[derive(Default)]
pub(super) struct Queue {
    together: Arc<Together<Arc<Completion>, RedisResult<Told>>>,
    /// Behind the server are several, and one step may not concern the records of two.
    is_closed: AtomicBool,
}

type Waiting = Asked<Arc<Completion>, RedisResult<Told>>;

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
            deadline,
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
        let mut flight = Flight::alone(set, 1, Kind::Change);
        flight.after = Some(Box::new(listeners));
        let landed = self.outbox.send(flight, deadline).await;
        match landed.answer {
            Ok(Value::Okay) => {}
            Ok(_) => return Ok(false),
            // A server of a cluster that is older than those that were asked.
            Err(error) if is_refused(&error) => return Ok(false),
            Err(error) => return Err(classify(error)),
        }
        if listened(landed.after.as_deref()) {
            let mut wake = redis::cmd(publish);
            wake.arg(key).arg("");
            let inner = Arc::clone(self);
            // Nobody waits for it: it is completed. Where it fails, those who listen look again by themselves.
            tokio::spawn(async move {
                inner.outbox.send(Flight::alone(wake, 1, Kind::Read), deadline).await;
            });
        }
        safe(true, landed.is_safe)
    }

    /// With the other completions of this moment.
    async fn join_others(
        self: &Arc<Self>,
        completion: &Arc<Completion>,
        deadline: Instant,
    ) -> Result<bool, StoreError> {
        let together = &self.queue.together;
        let said = together
            .join(Arc::clone(completion), TOGETHER, deadline, self, Self::send_in_scripts)
            .await;
        match said {
            Ok(Ok(Told { is_done, is_safe })) => safe(is_done, is_safe || !is_done),
            // It may be about another one of them.
            Ok(Err(error)) if is_said_by_the_server(&error) => {
                self.queue.is_closed.fetch_or(is_of_several_places(&error), Relaxed);
                Ok(false)
            }
            // It was the time of another one of them that was over.
            Ok(Err(error)) if error.is_timeout() && Instant::now() < deadline => Ok(false),
            Ok(Err(error)) => Err(classify(error)),
            Err(Unanswered::Left) => Ok(false),
            Err(Unanswered::Late(elapsed)) => Err(classify(late(elapsed))),
        }
    }

    async fn send_in_scripts(self: Arc<Self>, mut waiting: Vec<Waiting>) {
        let mut sent = Vec::new();
        while !waiting.is_empty() {
            let rest = waiting.split_off(waiting.len().min(TOGETHER));
            sent.push(self.send_together(waiting));
            waiting = rest;
        }
        join_all(sent).await;
    }

    async fn send_together(&self, mut waiting: Vec<Waiting>) {
        // They were begun in one moment, but for those that nobody saw to for long.
        let now = Instant::now();
        waiting.retain(|one| one.step.deadline > now);
        let Some(deadline) = waiting.iter().map(|one| one.step.deadline).min() else {
            return;
        };
        let keys: Vec<_> = waiting.iter().map(|one| one.step.key.as_bytes()).collect();
        let listening = self.keys.listening();
        let mut arguments: Vec<&[u8]> = Vec::with_capacity(3 * waiting.len() + 1);
        for Waiting { step: completion, .. } in &waiting {
            let granted = completion.granted.as_ref().map_or(&[][..], |granted| granted);
            arguments.extend([granted, &completion.completed, completion.time_to_live.as_bytes()]);
        }
        arguments.push(listening.as_bytes());
        let step = &self.scripts.complete_many;
        let landed = self.outbox.run(step, &keys, &arguments, deadline).await;
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

fn listened(counted: Option<&Value>) -> bool {
    match counted {
        Some(Value::Array(counted)) => matches!(counted[..], [_, Value::Int(1..)]),
        _ => false,
    }
}
