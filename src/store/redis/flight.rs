//! What is sent at once to the server, and what comes back.

use std::time::Duration;

use redis::{Cmd, Pipeline, RedisError, RedisResult, Value};

use super::way::Link;

/// How many replicas have to acknowledge a change, and within which time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replicas {
    pub(super) count: usize,
    pub(super) within: Duration,
}

/// A step, and what is asked before and after it.
pub(super) struct Flight<'a> {
    pub(super) key: &'a [u8],
    /// Asks for a number.
    pub(super) before: Option<Cmd>,
    pub(super) step: Cmd,
    pub(super) after: Option<Cmd>,
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
    /// `None` where it was not asked; it may be an error.
    pub(super) after: Option<Value>,
    /// Whether as many replicas acknowledged what was written as have to.
    pub(super) is_safe: bool,
}

impl Flight<'_> {
    /// Goes there and back.
    pub(super) async fn fly(self, link: &mut Link, replicas: Option<Replicas>) -> Landed {
        let Self {
            key,
            before,
            step,
            after,
            kind,
        } = self;
        let replicas = replicas.filter(|_| kind == Kind::Change);
        if before.is_none() && after.is_none() && replicas.is_none() {
            return Landed {
                before: None,
                answer: match kind {
                    Kind::Read => link.ask_primary(key, &step).await,
                    Kind::Change => link.send(&step).await,
                },
                after: None,
                is_safe: true,
            };
        }
        let mut commands = Pipeline::with_capacity(4);
        let asks = (before.is_some(), after.is_some());
        if let Some(before) = before {
            commands.add_command(before);
        }
        commands.add_command(step);
        if let Some(after) = after {
            commands.add_command(after);
        }
        if let Some(Replicas { count, within }) = replicas {
            // Nothing is for ever there.
            let millis = u64::try_from(within.as_millis()).unwrap_or(u64::MAX).max(1);
            commands.cmd("WAIT").arg(count).arg(millis);
        }
        let answers = match link.send_all(key, commands).await {
            Ok(answers) => answers,
            Err(error) => return Landed::failed(error),
        };
        let mut answers = answers.into_iter();
        let number = |answer| match answer {
            Some(Value::Int(number)) => Some(number),
            _ => None,
        };
        let before = if asks.0 { number(answers.next()) } else { None };
        let answer = answers.next().unwrap_or(Value::Nil).extract_error();
        let after = if asks.1 { answers.next() } else { None };
        let is_safe = replicas.is_none_or(|replicas| {
            let acknowledged = number(answers.next()).and_then(|count| usize::try_from(count).ok());
            acknowledged.is_some_and(|count| count >= replicas.count)
        });
        Landed {
            before,
            answer,
            after,
            is_safe,
        }
    }
}

impl Landed {
    pub(super) fn failed(error: RedisError) -> Self {
        Self {
            before: None,
            answer: Err(error),
            after: None,
            is_safe: false,
        }
    }
}
