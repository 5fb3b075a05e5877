//! What is sent at once to the server, and what comes back.

use std::time::Duration;

use redis::{Arg, Cmd, ErrorKind, Pipeline, RedisError, RedisResult, Value};

use super::way::Link;

/// How many replicas have to acknowledge a change, and within which time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replicas {
    pub(super) count: usize,
    pub(super) within: Duration,
}

/// A step, and what is asked before and after it.
pub(super) struct Flight {
    /// Asks for a number. Boxed, as what is asked afterwards: few ask, and a flight goes through many hands.
    pub(super) before: Option<Box<Cmd>>,
    pub(super) step: Cmd,
    /// Which argument of the step is its key.
    pub(super) key_at: u8,
    pub(super) after: Option<Box<Cmd>>,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Asks a primary, and no replica is waited for.
    Read,
    /// The same, and the answer is long.
    LongRead,
    Change,
}

#[derive(Debug)]
pub(super) struct Landed {
    /// `None` where it was not asked, or not answered.
    pub(super) before: Option<i64>,
    pub(super) answer: RedisResult<Value>,
    /// `None` where it was not asked; it may be an error. Boxed, as what was asked.
    pub(super) after: Option<Box<Value>>,
    /// Whether as many replicas acknowledged what was written as have to.
    pub(super) is_safe: bool,
}

impl Flight {
    /// Nothing is asked before or after it.
    pub(super) fn alone(step: Cmd, key_at: u8, kind: Kind) -> Self {
        Self {
            before: None,
            step,
            key_at,
            after: None,
            kind,
        }
    }

    fn key(&self) -> &[u8] {
        match self.step.args_iter().nth(self.key_at.into()) {
            Some(Arg::Simple(key)) => key,
            _ => &[],
        }
    }

    /// Bytes, about.
    pub(super) fn length(&self) -> usize {
        let (before, after) = (self.before.as_deref(), self.after.as_deref());
        let commands = before.into_iter().chain([&self.step]).chain(after);
        let arguments = commands.flat_map(Cmd::args_iter);
        arguments
            .map(|argument| match argument {
                Arg::Simple(bytes) => bytes.len(),
                _ => 0,
            })
            .sum()
    }

    /// Goes there and back.
    pub(super) async fn fly(self, link: &mut Link, replicas: Option<Replicas>) -> Landed {
        let replicas = replicas.filter(|_| self.kind == Kind::Change);
        if self.before.is_none() && self.after.is_none() && replicas.is_none() {
            let answer = match self.kind {
                Kind::Read | Kind::LongRead => link.ask_primary(self.key(), &self.step).await,
                Kind::Change => link.send(&self.step).await,
            };
            return Landed {
                before: None,
                answer,
                after: None,
                is_safe: true,
            };
        }
        let (key, mut commands) = (self.key().to_vec(), Pipeline::with_capacity(4));
        let expected = self.board(&mut commands, replicas);
        match link.send_all(&key, commands).await {
            Ok(answers) => expected.read(&mut answers.into_iter()),
            Err(error) => Landed::failed(error),
        }
    }

    /// Adds its commands to others.
    fn board(self, commands: &mut Pipeline, replicas: Option<Replicas>) -> Expected {
        let expected = Expected {
            before: self.before.is_some(),
            after: self.after.is_some(),
            replicas: replicas.map(|replicas| replicas.count),
        };
        let (before, after) = (self.before.map(|before| *before), self.after.map(|after| *after));
        for command in before.into_iter().chain([self.step]).chain(after) {
            commands.add_command(command);
        }
        if let Some(Replicas { count, within }) = replicas {
            // Nothing is for ever there.
            let millis = u64::try_from(within.as_millis()).unwrap_or(u64::MAX).max(1);
            commands.cmd("WAIT").arg(count).arg(millis);
        }
        expected
    }
}

/// Steps of which no replica is waited for, all to one server and back at once.
pub(super) struct Piece {
    commands: Pipeline,
    expected: Vec<Expected>,
}

impl Piece {
    pub(super) fn with_capacity(flights: usize) -> Self {
        Self {
            commands: Pipeline::with_capacity(flights),
            expected: Vec::with_capacity(flights),
        }
    }

    pub(super) fn board(&mut self, flight: Flight) {
        self.expected.push(flight.board(&mut self.commands, None));
    }

    pub(super) async fn fly(self, link: &mut Link) -> RedisResult<Vec<Landed>> {
        let Self { commands, expected } = self;
        let mut answers = link.send_all(&[], commands).await?.into_iter();
        let read = |expected: Expected| expected.read(&mut answers);
        Ok(expected.into_iter().map(read).collect())
    }
}

/// What is to come back.
struct Expected {
    before: bool,
    after: bool,
    replicas: Option<usize>,
}

impl Expected {
    fn read(self, answers: &mut impl Iterator<Item = Value>) -> Landed {
        let number = |answer| match answer {
            Some(Value::Int(number)) => Some(number),
            _ => None,
        };
        let before = if self.before { number(answers.next()) } else { None };
        // Nothing would be what a claim is told that has the record.
        let missing = || Err((ErrorKind::UnexpectedReturnType, "an answer is missing").into());
        let answer = answers.next().map_or_else(missing, Value::extract_error);
        let after = if self.after { answers.next().map(Box::new) } else { None };
        let is_safe = self.replicas.is_none_or(|least| {
            let acknowledged = number(answers.next()).and_then(|count| usize::try_from(count).ok());
            acknowledged.is_some_and(|count| count >= least)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn read(answers: Vec<Value>) -> Landed {
        let expected = Expected {
            before: true,
            after: true,
            replicas: Some(1),
        };
        expected.read(&mut answers.into_iter())
    }

    #[test]
    fn each_answer_is_that_of_its_command() {
        let landed = read(vec![Value::Int(7), Value::Okay, Value::Nil, Value::Int(1)]);
        assert_eq!(landed.before, Some(7));
        assert_eq!(landed.answer.unwrap(), Value::Okay);
        assert_eq!(landed.after.as_deref(), Some(&Value::Nil));
        assert!(landed.is_safe);
    }

    /// Nothing is what a claim is told that acquires the record.
    #[test]
    fn an_answer_that_is_missing_is_an_error_and_not_nothing() {
        let landed = read(vec![Value::Int(7)]);
        assert_eq!(landed.answer.unwrap_err().kind(), ErrorKind::UnexpectedReturnType);
        assert!(!landed.is_safe);
    }
}
