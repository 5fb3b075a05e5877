//! Whether servers keep what they are given: asked on each new connection, before the first record.

use std::collections::BTreeSet;

use redis::{ErrorKind, RedisResult, Value, from_redis_value};

use super::{address::wrong, way::Link};

/// What a server says about itself, as far as records depend on it.
#[derive(Debug, PartialEq, Eq)]
struct Facts<'a> {
    version: Option<(u32, u32)>,
    eviction: Option<&'a str>,
    append_only: Option<bool>,
    is_in_a_cluster: bool,
}

/// Warns of servers that may forget records, or refuses them.
pub(super) async fn check(link: &mut Link, is_cluster: bool, refuse: bool) -> RedisResult<()> {
    let mut command = redis::cmd("INFO");
    command.arg("server").arg("memory").arg("persistence").arg("cluster");
    let said = match link.ask_each(&command).await {
        Ok(said) => said,
        // A hosted server may keep this to itself.
        Err(error) if error.code() == Some("NOPERM") => vec![Value::SimpleString(String::new())],
        Err(error) => return Err(error),
    };
    let mut known = BTreeSet::new();
    for info in said {
        let info: String = from_redis_value(info)?;
        let facts = Facts::read(&info);
        // Redis; Valkey goes on from there, and tells a version that its clients of then know.
        if facts.version.is_some_and(|version| version < (7, 0)) {
            return Err(wrong("the server is older than Redis 7.0"));
        }
        if facts.is_in_a_cluster && !is_cluster {
            return Err(wrong(
                "the server is part of a cluster: its URL begins with redis+cluster://",
            ));
        }
        known.extend(facts.dangers());
    }
    // The servers of a cluster are mostly alike.
    for danger in &known {
        tracing::warn!("{danger}");
    }
    match known.pop_first() {
        Some(danger) if refuse => Err((ErrorKind::InvalidClientConfig, "a forgetful server", danger).into()),
        _ => Ok(()),
    }
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
            is_in_a_cluster: field("cluster_enabled") == Some("1"),
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
        assert!(Facts::read("cluster_enabled:1\r\n").is_in_a_cluster);
    }
}
