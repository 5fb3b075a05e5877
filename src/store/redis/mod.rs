//! Records on a Redis or Valkey server.

mod address;
mod builder;
mod complete;
mod connection;
mod failure;
mod flight;
mod granted;
mod keys;
mod outbox;
mod piece;
mod record;
mod scripts;
mod server;
#[cfg(test)]
mod tests;
mod tls;
mod together;
mod waiters;
mod way;

use std::{fmt, sync::Arc, time::Duration};

use redis::{Cmd, Value};
use tokio::time::Instant;

pub use self::builder::RedisStoreBuilder;
#[cfg(any(test, fuzzing))]
pub(crate) use self::record::look_at as look_at_redis_record;
use self::{
    complete::Queue,
    connection::{Connection, unexpected},
    failure::classify,
    flight::{Flight, Kind},
    granted::Granted,
    keys::Keys,
    outbox::Outbox,
    record::{Record, State},
    scripts::{Scripts, Step},
    waiters::Waiters,
};
use super::{Store, hints::Hints};
use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    record::{Begin, Claim, Lease, RecordId, Retention},
};

/// Keeps records on a Redis or Valkey server (7.0 or newer) that many nodes share. Clones share a connection.
///
/// ```no_run
/// use tower_idempotency::{IdempotencyLayer, RedisStore};
///
/// # async fn connect() -> Result<(), tower_idempotency::StoreError> {
/// let store = RedisStore::connect("redis://127.0.0.1:6379").await?;
/// let layer = IdempotencyLayer::new(store);
/// # Ok(())
/// # }
/// ```
///
/// The server's clock counts leases and retentions. While the server cannot be reached, requests with a key are refused:
/// 503 with `Retry-After`. The connection is made anew by itself.
///
/// **A failover to a replica may lose claims and answers that the replica had not received**, and then a retry runs its
/// operation a second time. The rest of this page says what else may be lost, and what the store costs.
///
#[doc = include_str!("../../../docs/redis.md")]
#[derive(Clone)]
pub struct RedisStore {
    inner: Arc<Inner>,
}

struct Inner {
    connection: Arc<Connection>,
    outbox: Outbox,
    keys: Keys,
    scripts: Scripts,
    waiters: Arc<Waiters>,
    granted: Granted,
    queue: Queue,
    hints: Hints,
}

impl RedisStore {
    /// Connects to a server by its URL, with default settings.
    ///
    /// # Errors
    /// As [`RedisStoreBuilder::connect`].
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        Self::builder().connect(url).await
    }

    /// The settings of a store.
    pub fn builder() -> RedisStoreBuilder {
        RedisStoreBuilder::default()
    }
}

impl fmt::Debug for RedisStore {
    /// Not the address: it may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore")
            .field("keys", &self.inner.keys)
            .finish_non_exhaustive()
    }
}

impl Store for RedisStore {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let begin = self.inner.begin(id, claim).await?;
        if let Begin::Completed { response, .. } = &begin {
            self.inner.expect_replay(id, response);
        }
        Ok(begin)
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.inner.complete(lease, response, retention).await?;
        self.inner.expect_replay(&lease.id, response);
        Ok(())
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        let length = record::millis(length).to_string();
        let arguments: [&[u8]; 2] = [lease.owner.as_bytes(), length.as_bytes()];
        self.inner.change(&self.inner.scripts.renew, lease, &arguments).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        let step = &self.inner.scripts.release;
        self.inner.change(step, lease, &[lease.owner.as_bytes()]).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        let step = &self.inner.scripts.abandon;
        self.inner.change(step, lease, &[lease.owner.as_bytes()]).await
    }

    async fn changed(&self, id: &RecordId) {
        self.inner.waiters.changed(id).await;
    }
}

impl Inner {
    /// A replay.
    fn expect_replay(&self, id: &RecordId, response: &StoredResponse) {
        match response.len() > outbox::SHORT {
            true => self.hints.add_long(id),
            false => self.hints.add(id),
        }
    }

    /// Nearly always one command, which acquires the record or gives it back. What it cannot tell apart is found out by
    /// a script, which begins from the start: nothing follows from what was seen before. A replay that is expected is
    /// read first.
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let deadline = self.connection.deadline();
        let key = self.keys.of(id);
        // Asked before, so that it says something of the record that is found; and not in a cluster, where two commands
        // in a flight may meet two servers.
        let asks = claim.asks_for_remaining && !self.connection.way().is_cluster();
        let send = async |step: Cmd, kind| {
            let mut flight = Flight::alone(step, 1, kind);
            flight.before = asks.then(|| Box::new(redis::cmd("PTTL").arg(key).take()));
            self.outbox.send(flight, deadline).await
        };
        // An answer that did not come may have been too late for its length, or for that of others in one piece with it. Then it
        // is asked for by itself the next time.
        let mut may_be_long = self.outbox.may_share();
        if self.hints.has(id) && asks == claim.asks_for_remaining {
            // It changes nothing, and is a write to the server: one that may not write, such as a replica, may have an
            // answer that was lost elsewhere, and refuses it as it refuses a claim.
            let mut get = Cmd::with_capacity(2, key.len() + 32);
            get.arg("GETEX").arg(key);
            let kind = match self.hints.has_long(id) {
                true => Kind::LongRead,
                false => Kind::Read,
            };
            let landed = send(get, kind).await;
            // Whatever else it finds is no answer: only a claim can tell.
            if let Value::BulkString(bytes) = landed.answer.map_err(classify)?
                && let Some(replay) = replay(Record::decode(bytes)?, claim, landed.before)
            {
                return Ok(replay);
            }
            self.hints.forget(id);
            may_be_long = false;
        }
        let first = record::in_progress(claim, 1);
        let mut set = Cmd::with_capacity(7, key.len() + record::HEAD + 96);
        set.arg("SET").arg(key).arg(&first[..]);
        set.arg("NX")
            .arg("GET")
            .arg("PX")
            .arg(record::in_progress_millis(claim));
        let landed = send(set, Kind::Change).await;
        match landed.answer {
            Ok(Value::Nil) => {
                self.granted.add(&claim.owner, &first);
                safe(Begin::Acquired(Lease::new(*id, claim.owner, 1)), landed.is_safe)
            }
            Ok(Value::BulkString(bytes)) => match replay(Record::decode(bytes)?, claim, landed.before) {
                Some(replay) => Ok(replay),
                None => self.look_closer(id, claim, true, deadline).await,
            },
            Ok(other) => Err(unexpected(&other)),
            Err(error) => match classify(error) {
                // The server says so without a look at the key, which may be there.
                full if full.kind() == StoreErrorKind::Full => self.look_closer(id, claim, false, deadline).await,
                error => {
                    if may_be_long && error.kind() == StoreErrorKind::Unavailable {
                        self.hints.add_long(id);
                    }
                    Err(error)
                }
            },
        }
    }

    async fn look_closer(
        &self,
        id: &RecordId,
        claim: &Claim,
        has_room: bool,
        deadline: Instant,
    ) -> Result<Begin, StoreError> {
        let first = record::in_progress(claim, 1);
        let takeover = claim.takeover.map(|lost| {
            let fence = lost.fence.saturating_add(1);
            (record::name_of(&lost), record::in_progress(claim, fence), fence)
        });
        let (lost, next) = takeover
            .as_ref()
            .map_or((&[][..], &[][..]), |(lost, next, _)| (&lost[..], &next[..]));
        let time_to_live = record::in_progress_millis(claim).to_string();
        let lease = record::millis(claim.lease).to_string();
        let arguments: [&[u8]; 7] = [
            &first,
            time_to_live.as_bytes(),
            lease.as_bytes(),
            claim.owner.as_bytes(),
            lost,
            next,
            if has_room { b"1" } else { b"0" },
        ];
        let (key, step) = (self.keys.key(id), &self.scripts.begin);
        let landed = self.outbox.run(step, &[key.as_bytes()], &arguments, deadline).await;
        let is_safe = landed.is_safe;
        let acquired = |fence| {
            self.granted.add(&claim.owner, &record::in_progress(claim, fence));
            safe(Begin::Acquired(Lease::new(*id, claim.owner, fence)), is_safe)
        };
        match Said::read(landed.answer.map_err(classify)?)? {
            Said {
                what: scripts::VACANT, ..
            } => Err(StoreErrorKind::Full.into()),
            Said {
                what: scripts::FIRST, ..
            } => acquired(1),
            Said {
                what: scripts::TAKEN_OVER,
                ..
            } => acquired(takeover.map_or(1, |(_, _, fence)| fence)),
            Said {
                what: scripts::OWN,
                value: Some(value),
                ..
            } => acquired(Record::decode(value)?.fence),
            Said {
                what: scripts::FOUND,
                value: Some(value),
                left,
            } => Record::decode(value)?.found(id, left),
            _ => Err(unexpected(&Value::Nil)),
        }
    }

    async fn change(&self, step: &Step, lease: &Lease, arguments: &[&[u8]]) -> Result<(), StoreError> {
        let (key, deadline) = (self.keys.key(&lease.id), self.connection.deadline());
        self.change_until(step, &key, arguments, deadline).await
    }

    async fn change_until(
        &self,
        step: &Step,
        key: &str,
        arguments: &[&[u8]],
        deadline: Instant,
    ) -> Result<(), StoreError> {
        let landed = self.outbox.run(step, &[key.as_bytes()], arguments, deadline).await;
        let is_safe = landed.is_safe;
        match landed.answer.map_err(classify)? {
            Value::Int(scripts::CHANGED) => safe((), is_safe),
            Value::Int(scripts::NOT_OWNED) => Err(StoreErrorKind::Fenced.into()),
            other => Err(unexpected(&other)),
        }
    }
}

/// What a completed record answers, if all that the claim asks for is known. `before` is the time to live that its key had.
fn replay(record: Record, claim: &Claim, before: Option<i64>) -> Option<Begin> {
    match record.state {
        State::Completed { response, kept } if before.is_some() || !claim.asks_for_remaining => {
            Some(Begin::Completed {
                fingerprint: record.fingerprint,
                response,
                remaining: before.map(|left| record::remaining(left, kept)),
            })
        }
        _ => None,
    }
}

/// What was changed, if as many replicas have it as have to.
fn safe<T>(changed: T, is_safe: bool) -> Result<T, StoreError> {
    match is_safe {
        true => Ok(changed),
        false => Err(StoreError::with_source(
            StoreErrorKind::Unavailable,
            "too few replicas acknowledged the change",
        )),
    }
}

/// What the script of a claim answers.
struct Said {
    what: i64,
    value: Option<Vec<u8>>,
    left: i64,
}

impl Said {
    fn read(answer: Value) -> Result<Self, StoreError> {
        let Value::Array(parts) = answer else {
            return Err(unexpected(&answer));
        };
        let mut parts = parts.into_iter();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(Value::Int(what)), None, None) => Ok(Self {
                what,
                value: None,
                left: -1,
            }),
            (Some(Value::Int(what)), Some(Value::BulkString(value)), left) => {
                let left = if let Some(Value::Int(left)) = left { left } else { -1 };
                Ok(Self {
                    what,
                    value: Some(value),
                    left,
                })
            }
            (other, _, _) => Err(unexpected(&other.unwrap_or(Value::Nil))),
        }
    }
}
