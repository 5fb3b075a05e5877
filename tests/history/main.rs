//! Concurrent clients against a served application with faults drawn anew for each round; what happened is recorded in
//! one order, and every (scope, key) of it is checked as a register that is written once.
//!
//! `HISTORY_OPERATIONS=1000000 cargo test --release --all-features --test history` runs longer, and `HISTORY_SEED=…`
//! draws the same faults once more. Histories that broke a rule are kept in cargo's temporary directory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(
    seeded_bug,
    allow(dead_code, reason = "only the memory store is seen with bugs planted")
)]

#[path = "../support/mod.rs"]
mod support;

mod app;
#[cfg(feature = "cached")]
mod cached;
mod checker;
mod client;
#[cfg(feature = "encrypted")]
mod encrypted;
mod event;
#[cfg(all(feature = "file", feature = "testing"))]
mod file;
mod memory;
#[cfg(not(seeded_bug))]
mod nodes;
#[cfg(seeded_bug)]
mod planted;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
mod rules;
mod runner;
mod store;
#[cfg(any(feature = "cached", feature = "encrypted"))]
mod turns;
