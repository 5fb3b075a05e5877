//! Bugs that are planted to see that the tests find them. Compiled with `cfg(seeded_bug)` alone, which only
//! `proof/seeded` sets.

use std::sync::{Mutex, PoisonError};

static PLANTED: Mutex<Option<&str>> = Mutex::new(None);

/// Every bug that there is, by what it does.
pub const BUGS: [&str; 16] = [
    "claims after it looked",
    "ends with its client",
    "forgets fingerprints",
    "forgets scopes",
    "forgets what completed",
    "frees what it cannot record",
    "frees what panicked",
    "gives up at once",
    "keeps what did not execute",
    "never renews",
    "replays half a body",
    "replays without a marker",
    "replies before it records",
    "runs again what is unknown",
    "runs without its store",
    "takes over a living lease",
];

/// From now on this bug is there, and no other.
pub fn plant(bug: Option<&'static str>) {
    *PLANTED.lock().unwrap_or_else(PoisonError::into_inner) = bug;
}

pub(crate) fn is(bug: &str) -> bool {
    debug_assert!(BUGS.contains(&bug), "{bug} is not listed");
    *PLANTED.lock().unwrap_or_else(PoisonError::into_inner) == Some(bug)
}
