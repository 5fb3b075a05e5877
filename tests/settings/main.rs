//! Every general setting, alone on a layer that has no profile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/mod.rs"]
mod support;

mod answers;
mod body_keys;
mod fingerprints;
mod first_sent;
mod keep;
mod kept_statuses;
mod refusals;
mod routes;
mod scope;
mod several_keys;
mod shown;
mod without_key;

use tower_idempotency::{IdempotencyLayer, MemoryStore};

fn layer() -> (MemoryStore, IdempotencyLayer) {
    let store = MemoryStore::new();
    (store.clone(), IdempotencyLayer::new(store))
}
