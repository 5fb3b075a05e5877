//! Steps that go to the server in one piece, and those who wait for them.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
};

use futures_util::future::join_all;
use redis::RedisError;
use tokio::{
    sync::oneshot::Sender,
    time::{Instant, timeout_at},
};

use super::{
    connection::{Connection, late, left},
    flight::{Flight, Landed, Piece},
    together::{Asked, PATIENCE},
};

/// Steps that go in one piece at most: its answers are heard when the last one is there, and a claim may get a long one.
const MOST: usize = 16;

pub(super) struct Parcel {
    pub(super) flight: Flight,
    pub(super) deadline: Instant,
}

/// In pieces. Whoever makes a step waits for all that are in one piece with it, until its deadline.
pub(super) async fn send_all(connection: Arc<Connection>, mut parcels: Vec<Asked<Parcel, Landed>>) {
    if parcels.len() <= MOST {
        return send(&connection, parcels).await;
    }
    let mut sent = Vec::new();
    while !parcels.is_empty() {
        let rest = parcels.split_off(parcels.len().min(MOST));
        sent.push(send(&connection, parcels));
        parcels = rest;
    }
    join_all(sent).await;
}

async fn send(connection: &Connection, parcels: Vec<Asked<Parcel, Landed>>) {
    let Some(last) = parcels.iter().map(|asked| asked.step.deadline).max() else {
        return;
    };
    let (mut flights, mut waiters) = (
        Vec::with_capacity(parcels.len()),
        Waiters(Vec::with_capacity(parcels.len())),
    );
    for Asked { step, told, .. } in parcels {
        flights.push(step.flight);
        waiters.0.push(Waiter {
            told: Some(told),
            deadline: step.deadline,
        });
    }
    let (link, number) = match connection.present_link() {
        Some(link) => link,
        None => match waiters.wait_for(Box::pin(connection.link(last)).as_mut()).await {
            Ok(Ok(link)) => link,
            Ok(Err(error)) => return waiters.fail(&error),
            Err(NobodyWaits { .. }) => return,
        },
    };
    // As if whoever is late, or left meanwhile, had sent it.
    waiters.tell_late(|| late("it was not sent in time"));
    let mut piece = Piece::with_capacity(flights.len());
    let mut flights = flights.into_iter();
    waiters.0.retain(|waiter| match flights.next() {
        Some(flight) if waiter.waits() => {
            piece.board(flight);
            true
        }
        _ => false,
    });
    let flying = pin!(connection.send_piece(link, number, piece));
    match waiters.wait_for(flying).await {
        Ok(Ok(landed)) => waiters.tell(landed),
        Ok(Err(error)) => waiters.fail(&error),
        // What was not written yet is not.
        Err(NobodyWaits { late }) => connection.note(number, Some(&late.unwrap_or_else(left))),
    }
}

struct Waiter {
    /// Until it was told.
    told: Option<Sender<Landed>>,
    deadline: Instant,
}

impl Waiter {
    fn waits(&self) -> bool {
        self.told.as_ref().is_some_and(|told| !told.is_closed())
    }

    fn tell(&mut self, landed: Landed) {
        if let Some(told) = self.told.take() {
            // Who does not wait any more has left meanwhile.
            let _ = told.send(landed);
        }
    }
}

/// In the order of their steps.
struct Waiters(Vec<Waiter>);

struct NobodyWaits {
    /// If there was no answer within somebody's time.
    late: Option<RedisError>,
}

impl Waiters {
    /// Whoever is late meanwhile is told so. Who left is noticed only now and then: were it woken by that, it would be in the
    /// hands of a thread that may be busy with something else.
    async fn wait_for<T>(&mut self, mut work: Pin<&mut impl Future<Output = T>>) -> Result<T, NobodyWaits> {
        let mut late_error = None;
        while let Some(next) = self.next_look() {
            match timeout_at(next, work.as_mut()).await {
                Ok(done) => return Ok(done),
                Err(elapsed) => {
                    let error = late(elapsed);
                    if self.tell_late(|| error.clone()) {
                        late_error = Some(error);
                    }
                }
            }
        }
        Err(NobodyWaits { late: late_error })
    }

    /// `None` if nobody waits.
    fn next_look(&self) -> Option<Instant> {
        let waiting = self.0.iter().filter(|waiter| waiter.waits());
        let first = waiting.map(|waiter| waiter.deadline).min()?;
        Some(first.min(Instant::now() + PATIENCE))
    }

    /// Whether somebody's time is over; who kept to it by a timer of its own has left, and was late as well.
    fn tell_late(&mut self, error: impl Fn() -> RedisError) -> bool {
        let (now, mut is_anybody) = (Instant::now(), false);
        for waiter in &mut self.0 {
            if waiter.told.is_some() && waiter.deadline <= now {
                waiter.tell(Landed::failed(error()));
                is_anybody = true;
            }
        }
        is_anybody
    }

    fn tell(self, landed: Vec<Landed>) {
        for (mut waiter, landed) in self.0.into_iter().zip(landed) {
            waiter.tell(landed);
        }
    }

    fn fail(self, error: &RedisError) {
        for mut waiter in self.0 {
            waiter.tell(Landed::failed(error.clone()));
        }
    }
}
