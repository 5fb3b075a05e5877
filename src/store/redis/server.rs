//! Whether servers keep what they are given: asked on each new connection, before the first record.

use std::collections::BTreeSet;

use redis::{ErrorKind, RedisResult, Value, from_redis_value};

use super::{address::wrong, way::Link};

/// What a server says about itself, as far as records depend on it.
#[derive(Debug, PartialEq, Eq)]
struct Facts<'a> {
    version: Option<(u32, u32)>,
    compares: bool,
    eviction: Option<&'a str>,
    append_only: Option<bool>,
    is_in_a_cluster: bool,
}

/// Warns of servers that may forget records, or refuses them. Says whether all of them know `SET … IFEQ`.
pub(super) async fn check(link: &mut Link, is_cluster: bool, refuse: bool) -> RedisResult<bool> {
    let mut command = redis::cmd("INFO");
    command.arg("server").arg("memory").arg("persistence").arg("cluster");
    let said = match link.ask_each(&command).await {
        Ok(said) => said,
        // A hosted server may keep this to itself.
        Err(error) if error.code() == Some("NOPERM") => vec![Value::SimpleString(String::new())],
        Err(error) => return Err(error),
    };
    let mut known = BTreeSet::new();
    let mut compares = true;
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
        compares &= facts.compares;
    }
    // The servers of a cluster are mostly alike.
    for danger in &known {
        tracing::warn!("{danger}");
    }
    match known.pop_first() {
        Some(danger) if refuse => Err((ErrorKind::InvalidClientConfig, "a forgetful server", danger).into()),
        _ => Ok(compares),
    }
}

impl<'a> Facts<'a> {
    fn read(info: &'a str) -> Self {
        let field = |name: &str| {
            let mut fields = info.lines().filter_map(|line| line.split_once(':'));
            fields.find(|(found, _)| *found == name).map(|(_, value)| value.trim())
        };
        let version = |name| {
            let mut numbers = field(name)?.split('.');
            Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
        };
        let redis = version("redis_version");
        let compares = match version("valkey_version") {
            // It says it is a Redis, too, and means the one that it began as.
            Some(valkey) => valkey >= (8, 1),
            None => redis.is_some_and(|redis| redis >= (8, 4)),
        };
        Self {
            version: redis,
            compares,
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

    #[test]
    fn a_server_compares_and_sets_from_redis_8_4_and_valkey_8_1_on() {
        for (info, compares) in [
            ("redis_version:7.4.1\r\n", false),
            ("redis_version:8.2.0\r\n", false),
            ("redis_version:8.4.0\r\n", true),
            ("redis_version:10.0.0\r\n", true),
            ("redis_version:7.2.4\r\nvalkey_version:8.0.1\r\n", false),
            ("redis_version:7.2.4\r\nvalkey_version:8.1.1\r\n", true),
            ("redis_version:7.2.4\r\nvalkey_version:9.0.0\r\n", true),
            ("", false),
        ] {
            assert_eq!(Facts::read(info).compares, compares, "{info}");
        }
    }
}
