//! One connection to the server, which every step of every clone shares, and a deadline on each of them.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use redis::{
    Client, Cmd, ErrorKind, Pipeline, RedisError, ServerErrorKind, Value,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use tokio::time::{Instant, error::Elapsed, timeout};

use super::{
    failure::{classify, is_answer},
    scripts::Step,
};
use crate::error::{StoreError, StoreErrorKind};

/// The longest pause between two tries to connect, before half as much again by chance.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Tries to connect before those who wait for it are told so. The next one begins anew.
const TRIES: usize = 4;
/// What all pauses between them may take.
const PAUSES: Duration = Duration::from_secs(3);
/// Commands that wait to be written.
const PIPELINE: usize = 1024;

pub(super) struct Connection {
    client: Client,
    timeout: Duration,
    current: Mutex<Current>,
}

struct Current {
    manager: ConnectionManager,
    /// Of the first error since the server answered.
    failing_since: Option<Instant>,
}

impl Connection {
    /// Connects when it is first used. Has to be called within a runtime.
    pub(super) fn new(client: Client, timeout: Duration) -> Result<Self, StoreError> {
        let manager = manager(&client, timeout).map_err(classify)?;
        let current = Current {
            manager,
            failing_since: None,
        };
        Ok(Self {
            client,
            timeout,
            current: Mutex::new(current),
        })
    }

    pub(super) fn deadline(&self) -> Instant {
        let now = Instant::now();
        // Whoever sets a time that no clock can count waits a year.
        now.checked_add(self.timeout)
            .unwrap_or(now + Duration::from_secs(365 * 24 * 60 * 60))
    }

    /// Sends one command. It was written wholly or not at all when this is dropped.
    pub(super) async fn send(&self, command: &Cmd, deadline: Instant) -> Result<Value, RedisError> {
        let mut manager = self.current().manager.clone();
        let left = deadline.saturating_duration_since(Instant::now());
        let result = match timeout(left, manager.send_packed_command(command)).await {
            Ok(result) => result.and_then(Value::extract_error),
            Err(elapsed) => Err(late(elapsed)),
        };
        self.note(&result);
        result
    }

    /// Sends one command and another one before it in the same flight, which asks for a number.
    pub(super) async fn send_after(
        &self,
        before: &Cmd,
        command: &Cmd,
        deadline: Instant,
    ) -> (Option<i64>, Result<Value, RedisError>) {
        let mut manager = self.current().manager.clone();
        let mut both = Pipeline::with_capacity(2);
        both.add_command(before.clone()).add_command(command.clone());
        let left = deadline.saturating_duration_since(Instant::now());
        let answers = match timeout(left, manager.send_packed_commands(&both, 0, 2)).await {
            Ok(answers) => answers,
            Err(elapsed) => Err(late(elapsed)),
        };
        let mut number = None;
        let result = answers.and_then(|mut answers| {
            let answer = answers.pop().unwrap_or(Value::Nil).extract_error();
            if let Some(Value::Int(found)) = answers.pop() {
                number = Some(found);
            }
            answer
        });
        self.note(&result);
        (number, result)
    }

    /// Runs a step on the server.
    pub(super) async fn run(
        &self,
        step: &Step,
        key: &[u8],
        arguments: &[&[u8]],
        deadline: Instant,
    ) -> Result<Value, RedisError> {
        let result = self
            .send(&command("EVALSHA", &step.hash, key, arguments), deadline)
            .await;
        match result {
            // It was never told, or was restarted: it is sent in full, and known from then on.
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                self.send(&command("EVAL", &step.code, key, arguments), deadline).await
            }
            result => result,
        }
    }

    /// A connection that has not got an answer for long is given up for a new one, which looks the server's name up
    /// again: it may be cut without a word, lead to a server that is no primary any more, or have failed to log in.
    fn note(&self, result: &Result<Value, RedisError>) {
        let mut current = self.current();
        let failed = result.as_ref().is_err_and(|error| !is_answer(error));
        if !failed {
            current.failing_since = None;
            return;
        }
        let now = Instant::now();
        let since = *current.failing_since.get_or_insert(now);
        // Long enough for the tries of the present one, which are not to be cut short.
        if now.duration_since(since) < self.timeout.saturating_mul(2).saturating_add(PAUSES) {
            return;
        }
        current.failing_since = None;
        if let Ok(manager) = manager(&self.client, self.timeout) {
            current.manager = manager;
        }
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn late(elapsed: Elapsed) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::TimedOut, elapsed).into()
}

fn manager(client: &Client, timeout: Duration) -> Result<ConnectionManager, RedisError> {
    let config = ConnectionManagerConfig::new()
        .set_connection_timeout(Some(timeout))
        .set_response_timeout(Some(timeout))
        .set_number_of_retries(TRIES)
        .set_max_delay(LONGEST_PAUSE)
        .set_pipeline_buffer_size(PIPELINE);
    ConnectionManager::new_lazy_with_config(client.clone(), config)
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
