//! What the tests of served applications share.
#![allow(dead_code, reason = "each test uses its own part")]

pub mod demo;
pub mod http;
pub mod serve;
