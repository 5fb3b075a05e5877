//! One connection to the server, which every step of every clone shares, and a deadline on each of them.

#[cfg(test)]
mod tests;

use std::{
    error::Error,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use redis::{RedisError, RedisResult, Value};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    failure::{is_answer, is_over, leads_elsewhere},
    flight::{Flight, Landed, Piece, Replicas},
    server,
    way::{Link, Way},
};
use crate::{
    error::{StoreError, StoreErrorKind},
    random,
};

/// The first pause before another try to connect, and the longest, before half as much again by chance.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Opening takes several questions where sentinels or the nodes of a cluster are asked one after the other.
const QUESTIONS: u32 = 4;

#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) timeout: Duration,
    pub(super) refuse_forgetful_server: bool,
    pub(super) replicas: Option<Replicas>,
}

pub(super) struct Connection {
    way: Arc<Way>,
    settings: Settings,
    state: Mutex<State>,
}

/// A step on its way. Whoever gives it up before its deadline got no answer, either: one who always does would otherwise
/// stay with a silent connection.
struct OnItsWay<'a> {
    connection: &'a Connection,
    /// The link's, until there is an answer.
    number: Option<u64>,
}

impl Drop for OnItsWay<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.connection.note(number, Some(&left()));
        }
    }
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    /// Whether its server compares and sets by one command.
    compares: bool,
    /// Counts links, so that nobody gives up another one than the one that failed.
    number: u64,
    /// Runs as a task: whoever waits for it may leave, and the next one goes on waiting.
    opening: Option<Opening>,
    /// Before the next opening. Grows until the server answers.
    pause: Duration,
    /// The first failure since the server answered.
    failing_since: Option<Instant>,
}

#[derive(Clone)]
struct Opening {
    result: watch::Receiver<Option<RedisResult<Opened>>>,
    /// It has ended by then, unless the runtime that it is a task of does not run.
    until: Instant,
}

#[derive(Clone)]
struct Opened {
    link: Link,
    compares: bool,
}

impl Connection {
    pub(super) fn new(way: Arc<Way>, settings: Settings) -> Self {
        Self {
            way,
            settings,
            state: Mutex::default(),
        }
    }

    /// The first connection: a mistake is told at once.
    pub(super) async fn open(&self) -> RedisResult<()> {
        self.link(after(Instant::now(), most(&self.settings))).await.map(drop)
    }

    pub(super) fn way(&self) -> &Way {
        &self.way
    }

    /// Whether `SET … IFEQ` is known to every server that the present link leads to.
    pub(super) fn compares(&self) -> bool {
        self.state().compares
    }

    pub(super) fn waits_for_replicas(&self) -> bool {
        self.settings.replicas.is_some()
    }

    pub(super) fn deadline(&self) -> Instant {
        after(Instant::now(), self.settings.timeout)
    }

    /// Sends a step. It was written wholly or not at all when this is dropped.
    pub(super) async fn send(&self, flight: Flight, deadline: Instant) -> Landed {
        let (mut link, number) = match self.link(deadline).await {
            Ok(link) => link,
            Err(error) => return Landed::failed(error),
        };
        if Instant::now() >= deadline {
            // It says nothing of the connection.
            return Landed::failed(late("it was not sent in time"));
        }
        let mut step = OnItsWay {
            connection: self,
            number: Some(number),
        };
        let landed = timeout_at(deadline, flight.fly(&mut link, self.settings.replicas)).await;
        let landed = landed.unwrap_or_else(|elapsed| Landed::failed(late(elapsed)));
        step.number = None;
        self.note(number, landed.answer.as_ref().err());
        landed
    }

    /// Sends steps in one piece. Has no deadline: whoever gives it up [notes](Self::note) why.
    pub(super) async fn send_piece(&self, mut link: Link, number: u64, piece: Piece) -> RedisResult<Vec<Landed>> {
        let landed = piece.fly(&mut link).await;
        match &landed {
            Ok(landed) => self.note(number, verdict(landed)),
            Err(error) => self.note(number, Some(error)),
        }
        landed
    }

    pub(super) async fn link(&self, deadline: Instant) -> RedisResult<(Link, u64)> {
        match self.present_link() {
            Some(link) => Ok(link),
            // Boxed: steps are many, and openings few.
            None => Box::pin(self.open_link(deadline)).await,
        }
    }

    pub(super) fn present_link(&self) -> Option<(Link, u64)> {
        self.state().present()
    }

    async fn open_link(&self, deadline: Instant) -> RedisResult<(Link, u64)> {
        loop {
            let mut opening = {
                let mut state = self.state();
                if let Some(link) = state.present() {
                    return Ok(link);
                }
                self.opening(&mut state)
            };
            let opened = match timeout_at(deadline, opening.result.wait_for(Option::is_some)).await {
                Ok(Ok(opened)) => opened.clone(),
                // The runtime that it was opened on is gone.
                Ok(Err(_)) => None,
                Err(elapsed) => return Err(late(elapsed)),
            };
            let mut state = self.state();
            let is_present = state
                .opening
                .as_ref()
                .is_some_and(|present| present.result.same_channel(&opening.result));
            match opened {
                Some(Ok(Opened { link, compares })) if is_present => {
                    state.opening = None;
                    state.link = Some(link);
                    state.compares = compares;
                    state.number += 1;
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    if is_present {
                        state.opening = None;
                        state.wait_longer();
                    }
                    return Err(error);
                }
                None if is_present => state.opening = None,
                None => {}
            }
        }
    }

    /// Joins the present one, or starts one.
    fn opening(&self, state: &mut State) -> Opening {
        let now = Instant::now();
        if let Some(opening) = &state.opening {
            let is_over = match &*opening.result.borrow() {
                Some(Ok(_)) => false,
                // What failed while nobody waited says nothing of now.
                Some(Err(_)) => true,
                None => now >= opening.until,
            };
            if !is_over {
                return opening.clone();
            }
        }
        let (way, settings, pause) = (Arc::clone(&self.way), self.settings.clone(), state.pause);
        let (opened, result) = watch::channel(None);
        let until = after(now, most(&settings).saturating_add(pause * 2));
        tokio::spawn(async move {
            sleep(pause + Duration::from_millis(random::below(pause.as_millis() as u64 / 2 + 1))).await;
            let link = open(&way, &settings).await;
            let _ = opened.send(Some(link));
        });
        let opening = Opening { result, until };
        state.opening = Some(opening.clone());
        opening
    }

    /// A connection that breaks, leads to a server that is no primary any more, or has not got an answer for long is
    /// given up. The next one looks for the server again.
    pub(super) fn note(&self, number: u64, error: Option<&RedisError>) {
        let mut state = self.state();
        if number != state.number || state.link.is_none() {
            return;
        }
        let Some(error) = error.filter(|error| !is_answer(error)) else {
            state.failing_since = None;
            state.pause = Duration::ZERO;
            return;
        };
        let now = Instant::now();
        let since = *state.failing_since.get_or_insert(now);
        let patience = match self.way.mends_itself() {
            true => self.settings.timeout.saturating_mul(QUESTIONS),
            false => self.settings.timeout,
        };
        let is_at_its_end = match self.way.mends_itself() {
            true => is_over(error),
            false => error.is_connection_dropped() || leads_elsewhere(error),
        };
        if is_at_its_end || now.duration_since(since) >= patience {
            state.link = None;
            state.failing_since = None;
            state.wait_longer();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn present(&self) -> Option<(Link, u64)> {
        self.link.clone().map(|link| (link, self.number))
    }

    fn wait_longer(&mut self) {
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    }
}

/// What those that landed together say of their connection: that it leads elsewhere, if one of them was told so; else that it
/// is well, if one of them was answered.
fn verdict(landed: &[Landed]) -> Option<&RedisError> {
    let failures = || landed.iter().filter_map(|landed| landed.answer.as_ref().err());
    let is_answered = landed
        .iter()
        .any(|landed| landed.answer.as_ref().err().is_none_or(is_answer));
    match failures().find(|error| leads_elsewhere(error)) {
        None if is_answered => None,
        None => failures().next(),
        elsewhere => elsewhere,
    }
}

async fn open(way: &Way, settings: &Settings) -> RedisResult<Opened> {
    let opening = async {
        let mut link = way.open(settings.timeout).await?;
        let compares = server::check(&mut link, way.is_cluster(), settings.refuse_forgetful_server).await?;
        Ok(Opened { link, compares })
    };
    timeout(most(settings), opening)
        .await
        .unwrap_or_else(|elapsed| Err(late(elapsed)))
}

/// How long an opening takes at most.
fn most(settings: &Settings) -> Duration {
    settings.timeout.saturating_mul(QUESTIONS)
}

/// Whoever sets a time that no clock can count waits a year.
fn after(now: Instant, time: Duration) -> Instant {
    now.checked_add(time)
        .unwrap_or(now + Duration::from_secs(365 * 24 * 60 * 60))
}

pub(super) fn late(why: impl Into<Box<dyn Error + Send + Sync>>) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::TimedOut, why).into()
}

/// What is said of a connection by those who did not wait for its answer.
pub(super) fn left() -> RedisError {
    late("nobody waits for the answer any more")
}

/// An answer that no version of the server gives.
pub(super) fn unexpected(value: &Value) -> StoreError {
    // Not the value itself: it may hold what a client sent.
    let shape = match value {
        Value::Nil => "nothing",
        Value::Int(_) => "a number",
        Value::BulkString(_) => "a string",
        Value::Array(_) => "a list",
        Value::Okay | Value::SimpleString(_) => "a status",
        _ => "something else",
    };
    // Whatever it did, it may have applied the step.
    StoreError::with_source(StoreErrorKind::Unavailable, format!("the server answered {shape}"))
}
