//! Ports for servers that are started, stopped and started again.

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
    net::TcpListener,
    sync::{Mutex, PoisonError},
};

/// Below the ports that a system gives to clients and to whoever asks for any port (from 32,768 on Linux): those are
/// taken while a server starts, and while it is down.
const FIRST: u16 = 10_000;
const LAST: u16 = 30_000;

/// A port of the loopback interface that nobody listens on, and that this process has not been given before.
pub fn free_port() -> u16 {
    static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let given = given.get_or_insert_default();
    for _ in 0..10_000 {
        let drawn = RandomState::new().hash_one(()) % u64::from(LAST - FIRST);
        let port = FIRST + u16::try_from(drawn).expect("it is below 30,000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && given.insert(port) {
            return port;
        }
    }
    panic!("no port from {FIRST} to {LAST} is free");
}
