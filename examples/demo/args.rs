//! The command line.

use std::{
    ffi::OsString,
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
    time::Duration,
};

use lexopt::prelude::*;

pub const HELP: &str = "\
A payments API that is safe to retry.

Usage: demo [OPTIONS]

Options:
  --listen ADDRESS      where to listen [default: 127.0.0.1:3000]; port 0 takes a free one
  --store STORE         where records are kept: file:PATH, memory, or Redis or Valkey
                        (with the feature redis): redis://HOST, redis+cluster://HOST,HOST,
                        redis+sentinel://HOST,HOST/SERVICE; rediss encrypts (redis-tls); or a
                        table of a database such as postgres://app@127.0.0.1/shop (with the
                        feature postgres), which then holds the ledger, too
                        [default: a file in your data directory]
  --retention DURATION  how long answers are kept on every route, such as 10s, 5m or 72h
                        [default: each route's own]
  --ledger FILE         append each effect to FILE as a JSON line before it is answered (not transfers,
                        which are not done before they are committed)
  -h, --help            print this help

Routes: POST /payments and those of four providers; GET / (a page to play with), /ledger, /metrics.
With a database: POST /transfers of {\"from\":1,\"to\":2,\"amount\":5} between ten accounts, exactly once; GET /accounts.

Faults on demand, by request header:
  x-demo-delay-ms: N        wait N milliseconds before the effect
  x-demo-status: N          answer with status N and have no effect
  x-demo-panic: 1           panic before the effect
  x-demo-response-bytes: N  make the answer at least N bytes long
";

const STORES: &str =
    "memory, file:PATH, redis://... (with the feature redis), postgres://... (with the feature postgres)";

pub struct Args {
    /// One of them.
    pub listen: Vec<SocketAddr>,
    pub store: Store,
    pub retention: Option<Duration>,
    pub ledger: Option<PathBuf>,
}

pub enum Store {
    /// A file in the platform's data directory.
    Default,
    File(PathBuf),
    Memory,
    /// By its URL.
    #[cfg(feature = "redis")]
    Redis(String),
    /// By its URL.
    #[cfg(feature = "postgres")]
    Postgres(String),
}

impl Args {
    /// `None` if help was asked for.
    pub fn from_env() -> Result<Option<Self>, lexopt::Error> {
        let mut args = Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 3000))],
            store: Store::Default,
            retention: None,
            ledger: None,
        };
        let mut parser = lexopt::Parser::from_env();
        while let Some(option) = parser.next()? {
            match option {
                Long("listen") => args.listen = parser.value()?.parse_with(listen)?,
                Long("store") => args.store = store(parser.value()?)?,
                Long("retention") => args.retention = Some(parser.value()?.parse_with(retention)?),
                Long("ledger") => args.ledger = Some(parser.value()?.into()),
                Short('h') | Long("help") => return Ok(None),
                other => return Err(other.unexpected()),
            }
        }
        Ok(Some(args))
    }
}

/// Of a name, such as `localhost:3000`, all that it stands for.
fn listen(address: &str) -> Result<Vec<SocketAddr>, String> {
    let addresses = address.to_socket_addrs().map_err(|error| error.to_string())?;
    Ok(addresses.collect())
}

fn retention(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("answers have to be kept for some time".to_owned()),
        parsed => parsed.map_err(|error| error.to_string()),
    }
}

#[cfg(feature = "redis")]
fn is_redis(url: &str) -> bool {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    let base = scheme.split_once('+').map_or(scheme, |(base, _)| base);
    matches!(base, "redis" | "rediss" | "valkey" | "valkeys")
}

/// Its errors do not show all of it, which may hold a password.
fn store(name: OsString) -> Result<Store, String> {
    let Some(name) = name.to_str() else {
        return Err("--store is not Unicode".to_owned());
    };
    match name {
        "memory" => Ok(Store::Memory),
        #[cfg(feature = "redis")]
        url if is_redis(url) => Ok(Store::Redis(url.to_owned())),
        #[cfg(feature = "postgres")]
        url if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
            Ok(Store::Postgres(url.to_owned()))
        }
        other => match other.strip_prefix("file:") {
            Some("") => Err("file: wants a path, such as file:store.redb".to_owned()),
            Some(path) => Ok(Store::File(path.into())),
            None => {
                let kind = other.split_once(':').map_or(other, |(kind, _)| kind);
                Err(format!("there is no store {kind:?}; this version has: {STORES}"))
            }
        },
    }
}
