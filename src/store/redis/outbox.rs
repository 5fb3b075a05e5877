//! Steps of one moment are written at once.
//!
//! By themselves they would be written one by one: on a runtime of several threads the task that drives a connection is woken
//! by the first of them, and runs before the next. Each write costs this process and the server more than what is written.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use futures_util::future::join_all;
use redis::{Cmd, ErrorKind, RedisError, ServerErrorKind};
use tokio::{sync::oneshot, time::Instant};

use super::{
    connection::{Connection, late},
    flight::{Flight, Kind, Landed},
    scripts::Step,
    together::{Asked, Together, Unanswered, wanted},
};

/// With fewer others under way a step goes at once.
const OTHERS: usize = 2;
/// A longer step goes by itself, and one whose answer is known to be longer.
pub(super) const SHORT: usize = 16 * 1024;
/// Steps that go in one piece at most: its answers are heard when the last one is there, and a claim may get a long one.
const PIECE: usize = 16;

pub(super) struct Outbox {
    connection: Arc<Connection>,
    together: Arc<Together<Parcel, Landed>>,
    under_way: AtomicUsize,
}

struct Parcel {
    flight: Flight<'static>,
    deadline: Instant,
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
    pub(super) async fn send(&self, flight: Flight<'_>, deadline: Instant) -> Landed {
        let way = UnderWay::count(&self.under_way);
        if !self.shares(&flight, way.others) {
            return self.connection.send(flight, deadline).await;
        }
        let Flight {
            key: _,
            before,
            step,
            after,
            kind,
        } = flight;
        let flight = Flight {
            key: &[],
            before,
            step,
            after,
            kind,
        };
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
    pub(super) fn shares(&self, flight: &Flight<'_>, others: usize) -> bool {
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
            async move {
                let flight = Flight {
                    key: keys.first().copied().unwrap_or_default(),
                    before: None,
                    step: command,
                    after: None,
                    kind: Kind::Change,
                };
                self.send(flight, deadline).await
            }
        };
        let landed = run("EVALSHA", &step.hash).await;
        match &landed.answer {
            // It was never told, or was restarted: it is sent in full, and known from then on.
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => run("EVAL", &step.code).await,
            _ => landed,
        }
    }
}

/// In pieces. Whoever makes a step waits for all that are in one piece with it.
async fn send_all(connection: Arc<Connection>, mut parcels: Vec<Asked<Parcel, Landed>>) {
    let mut sent = Vec::new();
    while !parcels.is_empty() {
        let rest = parcels.split_off(parcels.len().min(PIECE));
        sent.push(send_piece(&connection, parcels));
        parcels = rest;
    }
    join_all(sent).await;
}

async fn send_piece(connection: &Connection, parcels: Vec<Asked<Parcel, Landed>>) {
    // Each has its own deadline besides, at which it is not waited for any more.
    let Some(deadline) = parcels.iter().map(|asked| asked.step.deadline).max() else {
        return;
    };
    let link = connection.link(deadline).await;
    // As if whoever left meanwhile had sent it.
    let (flights, mut told): (Vec<_>, Vec<_>) = wanted(parcels)
        .into_iter()
        .map(|asked| (asked.step.flight, asked.told))
        .unzip();
    if flights.is_empty() {
        return;
    }
    let landed = match link {
        Ok(link) => tokio::select! {
            biased;
            landed = connection.send_all(link, flights, deadline) => landed,
            // What was not written yet is not.
            () = all_left(&mut told) => return,
        },
        Err(error) => Err(error),
    };
    // Who does not wait any more has left meanwhile.
    let tell = |(told, landed): (oneshot::Sender<Landed>, Landed)| drop(told.send(landed));
    match landed {
        Ok(landed) => told.into_iter().zip(landed).for_each(tell),
        Err(error) => told
            .into_iter()
            .map(|told| (told, Landed::failed(error.clone())))
            .for_each(tell),
    }
}

async fn all_left(told: &mut [oneshot::Sender<Landed>]) {
    for told in told {
        told.closed().await;
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
