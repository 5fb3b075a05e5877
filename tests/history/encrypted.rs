//! The store in memory, encrypted, while the keys of its answers are rotated under the work.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use tower_idempotency::{
    AnyStore, Begin, Claim, Encrypted, KeyRing, Lease, MemoryStore, RecordId, Retention, SecretKey, Store, StoreError,
    StoredResponse,
};

use super::{
    event::History,
    runner::{Arena, operations, run},
    store::Witness,
    support::dice::Dice,
};

const CAP: u64 = 64 << 20;

#[derive(Default)]
struct Sealed {
    memory: MemoryStore,
    step: u8,
}

fn key(number: u8) -> SecretKey {
    SecretKey::from_bytes([number; 32])
}

/// Seals with one key and opens with all up to `newest`.
fn ring(sealing: u8, newest: u8) -> KeyRing {
    let others = (0..=newest).filter(|number| *number != sealing);
    others.fold(KeyRing::sealing(sealing.into(), &key(sealing)), |ring, number| {
        ring.opening(number.into(), &key(number))
    })
}

impl Sealed {
    async fn node(&self, ring: KeyRing) -> Encrypted<MemoryStore> {
        let opened = Encrypted::open(self.memory.clone(), &key(255), ring).await;
        opened.expect("it is the secret of all")
    }

    /// One that has been told of the next key, and one that seals with it already.
    async fn nodes(&self) -> AnyStore {
        let next = self.step + 1;
        AnyStore::new(InTurns {
            nodes: [
                self.node(ring(self.step, next)).await,
                self.node(ring(next, next)).await,
            ],
            calls: AtomicUsize::new(0),
        })
    }
}

impl Arena for Sealed {
    const NAME: &'static str = "encrypted";
    const FAULTS: &'static [&'static str] = &[];

    async fn open(&mut self) -> AnyStore {
        let memory = MemoryStore::builder().max_bytes(CAP).build();
        *self = Self { memory, step: 0 };
        self.nodes().await
    }

    async fn strike(&mut self, _: &mut Dice, witness: &Witness, _: &History) {
        self.step += 1;
        witness.replace(Some(self.nodes().await));
        witness.struck.add("key rotated");
    }

    async fn stock(&mut self) -> (u64, u64, u64) {
        // The mark of the look-up secret is nobody's.
        (self.memory.len() - 1, self.memory.bytes(), CAP)
    }
}

/// Nodes on one store that take calls by turns.
struct InTurns {
    nodes: [Encrypted<MemoryStore>; 2],
    calls: AtomicUsize,
}

impl InTurns {
    fn node(&self) -> &Encrypted<MemoryStore> {
        &self.nodes[self.calls.fetch_add(1, Relaxed) % 2]
    }
}

impl Store for InTurns {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        self.node().begin(id, claim).await
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.node().complete(lease, response, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.node().renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.node().release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.node().abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.node().changed(id).await;
    }
}

/// An eighth of the others' share: the store below has its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_keys_are_rotated_every_key_is_a_register_that_is_written_once() {
    let summary = run(Sealed::default(), operations() / 8).await;
    let rotated = summary.faults.get("key rotated").copied().unwrap_or(0);
    assert!(rotated > summary.rounds, "only {rotated} rotations");
    let happened = |name| summary.census.get(name).copied().unwrap_or(0);
    assert!(happened("replayed") > 0 && happened("in progress") > 0);
}
