//! What a layer has done, in numbers.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// How often each thing happened since the layer was made, over all its clones.
///
/// Worth an alarm: `unprotected` and `fenced` above zero, and `abandoned` or `store_errors` that rise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Requests with a key whose handler ran.
    pub executed: u64,
    /// Requests that were answered with the stored answer of an earlier one.
    pub replayed: u64,
    /// Requests that were refused, for whatever reason, those without a required key included.
    pub refused: u64,
    /// Requests that waited for another one with the same key.
    pub waited: u64,
    /// Operations that ended with "not executed": their keys are free again.
    pub released: u64,
    /// Operations that ended without a known outcome.
    pub abandoned: u64,
    /// Abandoned operations that were run again.
    pub taken_over: u64,
    /// Operations that lost their lease to another attempt while they ran.
    pub fenced: u64,
    /// Operations whose client left before they ended.
    pub detached: u64,
    /// Calls to the store that failed.
    pub store_errors: u64,
    /// Requests that ran without protection because the store was unavailable and the layer was told to run them
    /// all the same.
    pub unprotected: u64,
}

macro_rules! tally {
    ($($name:ident)*) => {
        #[derive(Debug, Default)]
        pub(crate) struct Tally {
            $(pub(crate) $name: Count,)*
        }

        impl Tally {
            pub(crate) fn snapshot(&self) -> Counters {
                Counters { $($name: self.$name.0.load(Relaxed),)* }
            }
        }
    };
}

tally!(executed replayed refused waited released abandoned taken_over fenced detached store_errors unprotected);

/// Orders nothing else, so `Relaxed` is enough.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }
}
