//! Random numbers from the operating system, fetched in batches: a system call per request would cost more than the
//! look-up.

use std::cell::RefCell;

const BATCH: usize = 4096;

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { bytes: [0; BATCH], used: BATCH }) };
}

struct Pool {
    bytes: [u8; BATCH],
    used: usize,
}

/// `N` random bytes that were never handed out before.
///
/// # Errors
/// If the operating system has no randomness to give.
pub(crate) fn bytes<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    const { assert!(N <= BATCH) };
    POOL.with_borrow_mut(|pool| {
        if pool.used + N > BATCH {
            // Marked as used up first: a failed fill must not leave old bytes to be handed out again.
            pool.used = BATCH;
            getrandom::fill(&mut pool.bytes)?;
            pool.used = 0;
        }
        let mut out = [0; N];
        let fresh = &mut pool.bytes[pool.used..pool.used + N];
        out.copy_from_slice(fresh);
        fresh.fill(0);
        pool.used += N;
        Ok(out)
    })
}

/// A number from `0` up to `limit`, exclusive, good enough to spread retries; `0` where there is no randomness.
pub(crate) fn below(limit: u64) -> u64 {
    bytes::<8>().map_or(0, |bytes| u64::from_le_bytes(bytes) % limit.max(1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;

    #[test]
    fn no_token_is_handed_out_twice() {
        let threads: Vec<_> = (0..4)
            .map(|_| std::thread::spawn(|| (0..1000).map(|_| super::bytes::<16>().unwrap()).collect::<Vec<_>>()))
            .collect();
        let tokens: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), 4000);
    }

    #[test]
    fn below_stays_below() {
        assert!((0..100).all(|_| super::below(3) < 3));
        assert_eq!(super::below(0), 0);
    }
}
