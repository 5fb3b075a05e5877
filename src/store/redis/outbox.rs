//! Steps of one moment are written at once.
//!
//! By themselves they would be written one by one: on a runtime of several threads the task that drives a connection is woken
//! by the first of them, and runs before the next. Each write costs this process and the server more than what is written.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use redis::{Cmd, ErrorKind, RedisError, ServerErrorKind};
use tokio::time::Instant;

use super::{
    connection::{Connection, late},
    flight::{Flight, Kind, Landed},
    piece::{Parcel, send_all},
    scripts::Step,
    together::{Together, Unanswered},
};

/// With fewer others under way a step goes at once.
const OTHERS: usize = 2;
/// A longer step goes by itself, and one whose answer is known to be longer.
pub(super) const SHORT: usize = 16 * 1024;
/// Behind the command, the script and the number of keys.
const KEY_OF_SCRIPT: u8 = 3;

pub(super) struct Outbox {
    connection: Arc<Connection>,
    together: Arc<Together<Parcel, Landed>>,
    under_way: AtomicUsize,
}

impl Outbox {
    pub(super) fn new(connection: Arc<Connection>) -> Self {
        Self {
            connection,
            together: Arc::default(),
            under_way: AtomicUsize::new(0),
        }
    }

    /// Sends a step. It is written wholly or not at all when this is dropped.
    pub(super) async fn send(&self, flight: Flight, deadline: Instant) -> Landed {
        let way = UnderWay::count(&self.under_way);
        if !self.shares(&flight, way.others) {
            return self.connection.send(flight, deadline).await;
        }
        let parcel = Parcel { flight, deadline };
        // The server is to have the one half, while this process has the answers to the other.
        let enough = way.others.div_ceil(2).max(OTHERS);
        match self
            .together
            .join(parcel, enough, deadline, &self.connection, send_all)
            .await
        {
            Ok(landed) => landed,
            Err(Unanswered::Late(elapsed)) => Landed::failed(late(elapsed)),
            Err(Unanswered::Left) => Landed::failed(RedisError::from(std::io::Error::other(
                "the runtime that was to send it is gone",
            ))),
        }
    }

    /// Whether it goes together with others.
    pub(super) fn shares(&self, flight: &Flight, others: usize) -> bool {
        others >= OTHERS && flight.kind != Kind::LongRead && self.may_share() && flight.length() <= SHORT
    }

    /// One step at a time is to be told what replicas have, and a cluster has several places to go to.
    pub(super) fn may_share(&self) -> bool {
        self.connection.way().leads_to_one() && !self.connection.waits_for_replicas()
    }

    /// Runs a step on the server, on keys that are in one place.
    pub(super) async fn run(&self, step: &Step, keys: &[&[u8]], arguments: &[&[u8]], deadline: Instant) -> Landed {
        let run = |name, script| {
            let command = command(name, script, keys, arguments);
            self.send(Flight::alone(command, KEY_OF_SCRIPT, Kind::Change), deadline)
        };
        let landed = run("EVALSHA", &step.hash).await;
        match &landed.answer {
            // It was never told, or was restarted: it is sent in full, and known from then on.
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => run("EVAL", &step.code).await,
            _ => landed,
        }
    }
}

/// A step, until it has landed or nobody waits for it any more.
struct UnderWay<'a> {
    all: &'a AtomicUsize,
    others: usize,
}

impl<'a> UnderWay<'a> {
    fn count(all: &'a AtomicUsize) -> Self {
        Self {
            others: all.fetch_add(1, Relaxed),
            all,
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Relaxed);
    }
}

fn command(name: &str, script: &str, keys: &[&[u8]], arguments: &[&[u8]]) -> Cmd {
    let rest = || keys.iter().chain(arguments);
    let length: usize = rest().map(|argument| argument.len()).sum();
    let mut command = Cmd::with_capacity(3 + rest().count(), name.len() + script.len() + 8 + length);
    command.arg(name).arg(script).arg(keys.len());
    for argument in rest() {
        command.arg(*argument);
    }
    command
}
