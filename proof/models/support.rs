//! How often each model is run, and what models share.
#![allow(dead_code, reason = "each file uses its own part")]

use std::{sync::Arc, time::Duration};

use tower_idempotency::{Begin, Claim, Fingerprint, Lease, MemoryStore, Owner, RecordId, Retention, Store, sync};

pub const SECOND: Duration = Duration::from_secs(1);

/// `SCHEDULES` of each model, in place of the CI's share.
pub fn explore(model: impl Fn() + Send + Sync + 'static) {
    let schedules = std::env::var("SCHEDULES").map_or(62_500, |schedules| schedules.parse().expect("a number"));
    let model = Arc::new(move || {
        sync::begin_model();
        model();
    });
    // Half of them choose at random, the others change their mind seldom, which finds what takes few changes at the
    // right places.
    let random = Arc::clone(&model);
    shuttle::check_random(move || random(), schedules / 2);
    shuttle::check_pct(move || model(), schedules / 2, 3);
}

/// Of the record that every model is about.
pub fn id() -> RecordId {
    RecordId::from_bytes([7; 32])
}

pub fn claim(owner: u8) -> Claim {
    let fingerprint = Fingerprint::new(1, [0; 32]);
    Claim::new(
        fingerprint,
        Owner::from_bytes([owner; 16]),
        10 * SECOND,
        Retention::For(100 * SECOND),
    )
}

pub fn lease(owner: u8, fence: u64) -> Lease {
    Lease::new(id(), Owner::from_bytes([owner; 16]), fence)
}

/// Calls of a memory store never wait.
pub fn now<T>(future: impl Future<Output = T>) -> T {
    shuttle::future::block_on(future)
}

pub fn begin(store: &MemoryStore, claim: &Claim) -> Begin {
    now(store.begin(&id(), claim)).expect("there is room")
}
