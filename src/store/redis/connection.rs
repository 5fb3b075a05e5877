//! One connection to the server, which every step of every clone shares, and a deadline on each of them.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use redis::{Cmd, ErrorKind, Pipeline, RedisError, RedisResult, ServerErrorKind, Value};
use tokio::{
    sync::watch,
    time::{Instant, error::Elapsed, sleep, timeout, timeout_at},
};

use super::{
    failure::{is_answer, is_over, leads_elsewhere},
    scripts::Step,
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

/// How many replicas have to acknowledge a change, and within which time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replicas {
    pub(super) count: usize,
    pub(super) within: Duration,
}

pub(super) struct Connection {
    way: Arc<Way>,
    settings: Settings,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    link: Option<Link>,
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
    result: watch::Receiver<Option<RedisResult<Link>>>,
    /// It has ended by then, unless the runtime that it is a task of does not run.
    until: Instant,
}

/// A step, what is asked before it, and what came back.
pub(super) struct Flight<'a> {
    pub(super) key: &'a [u8],
    /// Asks for a number.
    pub(super) before: Option<Cmd>,
    pub(super) step: &'a Cmd,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Asks a primary, and no replica is waited for.
    Read,
    Change,
}

#[derive(Debug)]
pub(super) struct Landed {
    /// `None` where it was not asked, or not answered.
    pub(super) before: Option<i64>,
    pub(super) answer: RedisResult<Value>,
    /// Whether as many replicas acknowledged what was written as have to.
    pub(super) is_safe: bool,
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

    pub(super) fn is_cluster(&self) -> bool {
        self.way.is_cluster()
    }

    pub(super) fn deadline(&self) -> Instant {
        after(Instant::now(), self.settings.timeout)
    }

    /// Sends a step. It was written wholly or not at all when this is dropped.
    pub(super) async fn send(&self, flight: Flight<'_>, deadline: Instant) -> Landed {
        let failed = |error| Landed {
            before: None,
            answer: Err(error),
            is_safe: false,
        };
        let (mut link, number) = match self.link(deadline).await {
            Ok(link) => link,
            Err(error) => return failed(error),
        };
        let landed = timeout_at(deadline, self.fly(&mut link, flight)).await;
        let landed = landed.unwrap_or_else(|elapsed| failed(late(elapsed)));
        self.note(number, landed.answer.as_ref().err());
        landed
    }

    async fn fly(&self, link: &mut Link, flight: Flight<'_>) -> Landed {
        let Flight {
            key,
            before,
            step,
            kind,
        } = flight;
        let replicas = self.settings.replicas.filter(|_| kind == Kind::Change);
        if before.is_none() && replicas.is_none() {
            return Landed {
                before: None,
                answer: match kind {
                    Kind::Read => link.ask_primary(key, step).await,
                    Kind::Change => link.send(step).await,
                },
                is_safe: true,
            };
        }
        let mut commands = Pipeline::with_capacity(3);
        let asks = before.is_some();
        if let Some(before) = before {
            commands.add_command(before);
        }
        commands.add_command(step.clone());
        if let Some(Replicas { count, within }) = replicas {
            // Nothing is for ever there.
            let millis = u64::try_from(within.as_millis()).unwrap_or(u64::MAX).max(1);
            commands.cmd("WAIT").arg(count).arg(millis);
        }
        let answers = match link.send_all(key, commands).await {
            Ok(answers) => answers,
            Err(error) => {
                return Landed {
                    before: None,
                    answer: Err(error),
                    is_safe: false,
                };
            }
        };
        let mut answers = answers.into_iter();
        let number = |answer| match answer {
            Some(Value::Int(number)) => Some(number),
            _ => None,
        };
        let before = if asks { number(answers.next()) } else { None };
        let answer = answers.next().unwrap_or(Value::Nil).extract_error();
        let is_safe = replicas.is_none_or(|replicas| {
            let acknowledged = number(answers.next()).and_then(|count| usize::try_from(count).ok());
            acknowledged.is_some_and(|count| count >= replicas.count)
        });
        Landed {
            before,
            answer,
            is_safe,
        }
    }

    /// Runs a step on the server.
    pub(super) async fn run(&self, step: &Step, key: &[u8], arguments: &[&[u8]], deadline: Instant) -> Landed {
        let run = |name, script| {
            let command = command(name, script, key, arguments);
            async move {
                let flight = Flight {
                    key,
                    before: None,
                    step: &command,
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

    async fn link(&self, deadline: Instant) -> RedisResult<(Link, u64)> {
        loop {
            let mut opening = {
                let mut state = self.state();
                if let Some(link) = &state.link {
                    return Ok((link.clone(), state.number));
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
                Some(Ok(link)) if is_present => {
                    state.opening = None;
                    state.link = Some(link);
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
    fn note(&self, number: u64, error: Option<&RedisError>) {
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
    fn wait_longer(&mut self) {
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    }
}

async fn open(way: &Way, settings: &Settings) -> RedisResult<Link> {
    let opening = async {
        let mut link = way.open(settings.timeout).await?;
        server::check(&mut link, way.is_cluster(), settings.refuse_forgetful_server).await?;
        Ok(link)
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

fn late(elapsed: Elapsed) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::TimedOut, elapsed).into()
}

fn command(name: &str, script: &str, key: &[u8], arguments: &[&[u8]]) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(script).arg(1).arg(key);
    for argument in arguments {
        command.arg(*argument);
    }
    command
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::error::Error;

    use super::*;

    #[test]
    fn pauses_between_tries_to_connect_double_up_to_the_longest() {
        let mut state = State {
            link: None,
            number: 0,
            opening: None,
            pause: Duration::ZERO,
            failing_since: None,
        };
        let pauses = [(); 7].map(|()| {
            state.wait_longer();
            state.pause.as_millis()
        });
        assert_eq!(pauses, [25, 50, 100, 200, 400, 500, 500]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_time_that_no_clock_can_count_is_a_year() {
        let now = Instant::now();
        assert_eq!(after(now, Duration::from_secs(7)), now + Duration::from_secs(7));
        assert_eq!(after(now, Duration::MAX), now + Duration::from_secs(31_536_000));
    }

    #[test]
    fn of_an_answer_that_nobody_expects_its_shape_is_told_and_not_itself() {
        let secret = || b"secret".to_vec();
        for (value, shape) in [
            (Value::Nil, "nothing"),
            (Value::Int(7), "a number"),
            (Value::BulkString(secret()), "a string"),
            (Value::Array(vec![Value::BulkString(secret())]), "a list"),
            (Value::Okay, "a status"),
            (Value::SimpleString("secret".to_owned()), "a status"),
            (Value::Double(0.5), "something else"),
        ] {
            let error = unexpected(&value);
            assert_eq!(error.kind(), StoreErrorKind::Unavailable);
            let source = error.source().unwrap().to_string();
            assert_eq!(source, format!("the server answered {shape}"));
        }
    }
}
