//! What is shared between threads, and time: the standard library's and tokio's, or, where schedules are explored
//! (`proof/models`), twins of a scheduler's making.

#[cfg(not(shuttle))]
mod real {
    pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError, atomic};

    pub(crate) use tokio::{
        runtime::Handle,
        sync::Notify,
        time::{Instant, sleep, timeout},
    };
}

#[cfg(not(shuttle))]
pub(crate) use self::real::*;

#[cfg(shuttle)]
#[path = "../proof/models/sync.rs"]
mod modelled;
#[cfg(shuttle)]
pub use self::modelled::*;
