#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashSet;

use http::StatusCode;

use super::*;
use crate::{fingerprint::Fingerprint, record::Owner};

/// The part of the store that holds a record.
fn part(store: &MemoryStore, id: &RecordId) -> *const Shard {
    std::ptr::from_ref(&*store.shard(id))
}

#[test]
fn ids_are_spread_over_all_shards_wherever_they_differ() {
    let mut store = MemoryStore::new();
    // Odd, and otherwise as good as any.
    Arc::get_mut(&mut store.inner).unwrap().hasher.secret = 0x9e37_79b9_7f4a_7c15;
    for differing_at in 0..7 {
        let shards = (0..4096_u16).map(|number| {
            let mut id = [0; 32];
            id[differing_at..differing_at + 2].copy_from_slice(&number.to_le_bytes());
            part(&store, &RecordId::from_bytes(id))
        });
        assert_eq!(shards.collect::<HashSet<_>>().len(), SHARDS, "at byte {differing_at}");
    }
}

#[test]
fn no_bit_of_an_id_is_lost_in_its_hash() {
    let even = (0..64)
        .filter(|_| IdHasherBuilder::random().secret.is_multiple_of(2))
        .count();
    assert_eq!(even, 0);
}

const MINUTE: Duration = Duration::from_secs(60);

fn id(number: u64) -> RecordId {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&number.to_le_bytes());
    RecordId::from_bytes(id)
}

fn begin(store: &MemoryStore, id: &RecordId) -> Result<Begin, StoreErrorKind> {
    let fingerprint = Fingerprint::new(1, [0; 32]);
    let claim = Claim::new(fingerprint, Owner::random().unwrap(), MINUTE, Retention::For(MINUTE));
    store.begin_now(id, &claim).map_err(|error| error.kind())
}

/// A store of so many records, which is full of completed ones for a minute. There are none in the part of the store
/// where the id 0 belongs.
fn full(records: u64) -> MemoryStore {
    let store = MemoryStore::builder().max_records(records).build();
    let elsewhere = |id: &RecordId| part(&store, id) != part(&store, &self::id(0));
    for id in (1..).map(id).filter(elsewhere).take(records as usize) {
        let Ok(Begin::Acquired(lease)) = begin(&store, &id) else {
            panic!("there was to be room")
        };
        let answer = StoredResponse::not_kept(StatusCode::OK);
        store.complete_now(&lease, &answer, Retention::For(MINUTE)).unwrap();
    }
    store
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_finds_no_room_removes_a_few_of_those_that_expired_and_not_all() {
    let store = full(20_000);
    assert_eq!(begin(&store, &id(0)).unwrap_err(), StoreErrorKind::Full);
    tokio::time::advance(MINUTE).await;
    assert!(matches!(begin(&store, &id(0)), Ok(Begin::Acquired(_))));
    let removed = 20_000 + 1 - store.len();
    assert!((1..=100).contains(&removed), "{removed} were removed");
}
