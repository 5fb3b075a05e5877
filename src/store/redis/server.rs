//! Whether a server keeps what it was given: asked once, before the first record.

use redis::{Value, from_redis_value};

use super::{connection::Connection, failure::classify};
use crate::error::{StoreError, StoreErrorKind};

/// What a server says about itself, as far as records depend on it.
#[derive(Debug, PartialEq, Eq)]
struct Facts<'a> {
    version: Option<(u32, u32)>,
    eviction: Option<&'a str>,
    append_only: Option<bool>,
}

/// Warns of a server that may forget records, or refuses it.
pub(super) async fn check(connection: &Connection, refuse: bool) -> Result<(), StoreError> {
    let mut command = redis::cmd("INFO");
    command.arg("server").arg("memory").arg("persistence");
    let deadline = connection.deadline();
    let info = match connection.send(&command, deadline).await {
        Ok(info) => text(info)?,
        // A hosted server may keep this to itself.
        Err(error) if error.code() == Some("NOPERM") => String::new(),
        Err(error) => return Err(classify(error)),
    };
    let facts = Facts::read(&info);
    // Redis; Valkey goes on from there, and tells a version that its clients of then know.
    if facts.version.is_some_and(|version| version < (7, 0)) {
        return Err(StoreError::with_source(
            StoreErrorKind::Other,
            "the server is older than Redis 7.0",
        ));
    }
    let dangers = facts.dangers();
    for danger in &dangers {
        tracing::warn!("{danger}");
    }
    match dangers.first() {
        Some(danger) if refuse => Err(StoreError::with_source(StoreErrorKind::Other, danger.as_str())),
        _ => Ok(()),
    }
}

fn text(value: Value) -> Result<String, StoreError> {
    from_redis_value(value).map_err(|error| classify(error.into()))
}

impl<'a> Facts<'a> {
    fn read(info: &'a str) -> Self {
        let field = |name: &str| {
            let mut fields = info.lines().filter_map(|line| line.split_once(':'));
            fields.find(|(found, _)| *found == name).map(|(_, value)| value.trim())
        };
        let version = field("redis_version").and_then(|version| {
            let mut numbers = version.split('.');
            Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
        });
        Self {
            version,
            eviction: field("maxmemory_policy"),
            append_only: field("aof_enabled").map(|enabled| enabled == "1"),
        }
    }

    fn dangers(&self) -> Vec<String> {
        let mut dangers = Vec::new();
        match self.eviction {
            Some("noeviction") => {}
            Some(policy) => dangers.push(format!(
                "the Redis server evicts records when its memory is full (maxmemory-policy is {policy}): an operation \
                 whose record is evicted runs again; set it to noeviction"
            )),
            None => {
                dangers.push("the Redis server does not say whether it evicts records (maxmemory-policy)".to_owned())
            }
        }
        match self.append_only {
            Some(true) => {}
            Some(false) => dangers.push(
                "the Redis server has no append-only file: a restart forgets records, and their operations run again; \
                 set appendonly to yes"
                    .to_owned(),
            ),
            None => dangers.push("the Redis server does not say whether it has an append-only file".to_owned()),
        }
        dangers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_evicts_or_forgets_is_dangerous_and_so_is_one_that_does_not_say() {
        let dangers = |info| Facts::read(info).dangers().len();
        assert_eq!(dangers("maxmemory_policy:noeviction\r\naof_enabled:1\r\n"), 0);
        assert_eq!(dangers("maxmemory_policy:allkeys-lru\r\naof_enabled:1\r\n"), 1);
        assert_eq!(dangers("maxmemory_policy:volatile-ttl\r\naof_enabled:0\r\n"), 2);
        assert_eq!(dangers(""), 2);
        assert_eq!(Facts::read("redis_version:6.2.14\r\n").version, Some((6, 2)));
    }
}
