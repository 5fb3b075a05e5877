//! What the tests of served applications share.
#![allow(dead_code, reason = "each test uses its own part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod app;
#[cfg(feature = "sqlx")]
pub mod bank;
pub mod browser;
#[cfg(feature = "sqlx")]
pub mod commit_proxy;
pub mod demo;
pub mod dice;
pub mod faulty;
pub mod http;
pub mod log;
#[cfg(all(feature = "file", feature = "testing"))]
pub mod medium;
pub mod midaspay;
#[cfg(any(feature = "redis", feature = "postgres"))]
pub mod nodes;
#[cfg(any(feature = "redis", feature = "postgres"))]
pub mod ports;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(any(feature = "redis", feature = "postgres"))]
pub mod proxy;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "redis")]
pub mod redis_cluster;
#[cfg(feature = "redis")]
pub mod redis_sentinel;
#[cfg(feature = "redis")]
pub mod redis_tls;
pub mod serve;
pub mod steps;
