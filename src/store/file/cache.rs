//! Answers that were given lately, in memory: retries come soon, and these cost neither a thread nor the file.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::frame::Time;
use crate::{codec::StoredResponse, fingerprint::Fingerprint, record::RecordId};

/// A copy of what is durable in the file. A completed record never changes until it expires, and each look at the cache
/// compares the time, so a copy is never wrong.
#[derive(Clone)]
pub(super) struct Kept {
    pub(super) fingerprint: Fingerprint,
    pub(super) response: StoredResponse,
    pub(super) vacant_at: Time,
}

pub(super) struct Cache {
    shards: Box<[Mutex<Shard>]>,
    /// The most bytes of a shard.
    max_bytes: usize,
}

#[derive(Default)]
struct Shard {
    kept: HashMap<RecordId, Kept>,
    /// Oldest first. Every id of `kept` is in it once.
    order: VecDeque<RecordId>,
    bytes: usize,
}

const SHARDS: usize = 16;

/// What an answer takes beside its bytes.
const ENTRY: usize = 200;

impl Cache {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            max_bytes: max_bytes / SHARDS,
        }
    }

    fn shard(&self, id: &RecordId) -> MutexGuard<'_, Shard> {
        let index = usize::from(id.as_bytes()[31]) % SHARDS;
        // No method leaves a shard half changed.
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, id: &RecordId, now: Time) -> Option<Kept> {
        self.shard(id).kept.get(id).filter(|kept| kept.vacant_at > now).cloned()
    }

    pub(super) fn put(&self, id: RecordId, kept: Kept) {
        let size = kept.response.len() + ENTRY;
        if size > self.max_bytes {
            return;
        }
        let mut shard = self.shard(&id);
        shard.bytes += size;
        match shard.kept.insert(id, kept) {
            Some(old) => shard.bytes -= old.response.len() + ENTRY,
            None => shard.order.push_back(id),
        }
        while shard.bytes > self.max_bytes {
            let Some(oldest) = shard.order.pop_front() else { break };
            if let Some(old) = shard.kept.remove(&oldest) {
                shard.bytes -= old.response.len() + ENTRY;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u16) -> RecordId {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&number.to_le_bytes());
        RecordId::from_bytes(bytes)
    }

    fn kept(vacant_at: Time) -> Kept {
        Kept {
            fingerprint: Fingerprint::new(1, [1; 32]),
            response: StoredResponse::not_kept(http::StatusCode::OK),
            vacant_at,
        }
    }

    #[test]
    fn an_answer_is_given_until_it_expires() {
        let cache = Cache::new(1 << 20);
        cache.put(id(1), kept(100));
        assert!(cache.get(&id(1), 99).is_some());
        assert!(cache.get(&id(1), 100).is_none());
        assert!(cache.get(&id(2), 0).is_none());
    }

    #[test]
    fn an_answer_that_fills_its_part_of_the_cache_is_kept_and_a_longer_one_is_not() {
        let size = ENTRY + kept(1).response.len();
        for (room, is_kept) in [(size - 1, false), (size, true), (size + 1, true)] {
            let cache = Cache::new(room * SHARDS);
            cache.put(id(1), kept(10));
            assert_eq!(cache.get(&id(1), 1).is_some(), is_kept, "{room} bytes for {size}");
        }
    }

    #[test]
    fn the_oldest_make_room_and_the_bytes_are_counted() {
        let size = ENTRY + kept(1).response.len();
        let cache = Cache::new(size * 10 * SHARDS);
        for number in 0..1000 {
            cache.put(id(number), kept(10));
            cache.put(id(number), kept(11));
        }
        let live: Vec<_> = (0..1000)
            .filter(|number| cache.get(&id(*number), 10).is_some())
            .collect();
        assert_eq!(live, (990..1000).collect::<Vec<_>>());
        let shard = cache.shard(&id(0));
        assert_eq!((shard.bytes, shard.order.len(), shard.kept.len()), (size * 10, 10, 10));
    }
}
