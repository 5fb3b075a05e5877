//! What durable stores cost beside the floor of their medium: cycles (claim and completion, 1 KiB answers) of 1, 16, 64
//! and 256 writers, replays, the size of a record, the purge, and the opening of a full file.
//!
//! `cargo bench --bench stores --features testing`, with `redis` or `postgres` for the stores on servers. Options, behind `--`:
//! `--only NAME` one contestant, `--seconds N` for each figure [2], `--records N` in the full file [100000], `--dir
//! PATH` the disk to measure [the temporary directory].
//!
//! Each kind of store has a file of its own; `main` runs them in turn.
//!
//! The floor is what no store on the medium can beat with one writer: two syncs for each cycle. It is measured in the
//! same run, before and after; figures of different runs say little about each other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(any(feature = "postgres", feature = "redis"))]
mod beside;
mod file;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
mod work;

use std::{path::PathBuf, time::Duration};

struct Options {
    only: Option<String>,
    time: Duration,
    records: u64,
    directory: PathBuf,
}

impl Options {
    fn from_env() -> Self {
        use lexopt::prelude::*;
        let mut options = Self {
            only: None,
            time: Duration::from_secs(2),
            records: 100_000,
            directory: std::env::temp_dir(),
        };
        let mut parser = lexopt::Parser::from_env();
        while let Some(option) = parser.next().unwrap() {
            match option {
                Long("only") => options.only = Some(parser.value().unwrap().string().unwrap()),
                Long("seconds") => options.time = Duration::from_secs_f64(parser.value().unwrap().parse().unwrap()),
                Long("records") => options.records = parser.value().unwrap().parse().unwrap(),
                Long("dir") => options.directory = parser.value().unwrap().into(),
                // What cargo passes to every benchmark.
                Long("bench") => {}
                other => panic!("{}", other.unexpected()),
            }
        }
        options
    }

    /// Whether this one is to be measured.
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(&**only))
    }
}

fn main() {
    let options = Options::from_env();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(file::measure(&options));
    #[cfg(feature = "redis")]
    runtime.block_on(redis::measure(&options));
    #[cfg(feature = "postgres")]
    runtime.block_on(postgres::measure(&options));
}
