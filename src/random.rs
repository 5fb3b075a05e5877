//! Random numbers from the operating system, fetched in batches: a system call per request would cost more than the
//! look-up.

use std::{
    cell::RefCell,
    time::{SystemTime, UNIX_EPOCH},
};

const BATCH: usize = 4096;

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { bytes: [0; BATCH], used: BATCH }) };
}

#[cfg_attr(test, derive(Clone))]
struct Pool {
    bytes: [u8; BATCH],
    used: usize,
}

impl Pool {
    /// Two machines that were copied from one while it ran have the same pool, and would hand out the same owner's token
    /// for the same key: the time at which they do differs.
    fn take<const N: usize>(&mut self, now: u64) -> Result<[u8; N], getrandom::Error> {
        const { assert!(N <= BATCH) };
        if self.used + N > BATCH {
            // Marked as used up first: a failed fill must not leave old bytes to be handed out again.
            self.used = BATCH;
            getrandom::fill(&mut self.bytes)?;
            self.used = 0;
        }
        let mut out = [0; N];
        let fresh = &mut self.bytes[self.used..self.used + N];
        out.copy_from_slice(fresh);
        fresh.fill(0);
        self.used += N;
        for (byte, time) in out.iter_mut().zip(now.to_le_bytes()) {
            *byte ^= time;
        }
        Ok(out)
    }
}

/// `N` random bytes that were never handed out before.
///
/// # Errors
/// If the operating system has no randomness to give.
pub(crate) fn bytes<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    #[cfg(test)]
    if tests::IS_GONE.get() {
        return Err(getrandom::Error::UNSUPPORTED);
    }
    // Its last digits alone matter, so a clock before 1970 does as well.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    POOL.with_borrow_mut(|pool| pool.take(now.as_nanos() as u64))
}

/// A number from `0` up to `limit`, exclusive, good enough to spread retries; `0` where there is no randomness.
pub(crate) fn below(limit: u64) -> u64 {
    bytes::<8>().map_or(0, |bytes| u64::from_le_bytes(bytes) % limit.max(1))
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{cell::Cell, collections::HashSet};

    use super::{BATCH, Pool};

    thread_local! {
        /// Whether this thread's system has no randomness to give.
        pub(crate) static IS_GONE: Cell<bool> = const { Cell::new(false) };
    }

    #[test]
    fn no_token_is_handed_out_twice() {
        let threads: Vec<_> = (0..4)
            .map(|_| std::thread::spawn(|| (0..1000).map(|_| super::bytes::<16>().unwrap()).collect::<Vec<_>>()))
            .collect();
        let tokens: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), 4000);
    }

    #[test]
    fn two_copies_of_a_machine_hand_out_different_tokens_at_different_times() {
        let mut one = Pool {
            bytes: [0; BATCH],
            used: BATCH,
        };
        one.take::<16>(0).unwrap();
        let mut other = one.clone();
        for now in 0..100 {
            let (here, there) = (one.take::<16>(now).unwrap(), other.take::<16>(now + 1).unwrap());
            assert_ne!(here, there);
        }
    }

    /// At one moment there is nothing but the randomness.
    #[test]
    fn what_was_handed_out_is_gone_from_the_pool() {
        let mut pool = Pool {
            bytes: [0; BATCH],
            used: BATCH,
        };
        let tokens: HashSet<_> = (0..1000).map(|_| pool.take::<16>(0).unwrap()).collect();
        assert_eq!(tokens.len(), 1000);
        assert!(!tokens.contains(&[0; 16]));
    }

    #[test]
    fn below_stays_below() {
        assert!((0..100).all(|_| super::below(3) < 3));
        assert!((0..100).any(|_| super::below(1 << 32) > 0), "it spreads");
        assert_eq!(super::below(0), 0);
    }
}
