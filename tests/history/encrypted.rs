//! The store in memory, encrypted, while the keys of its answers are rotated under the work.

use tower_idempotency::{AnyStore, Encrypted, KeyRing, MemoryStore, SecretKey};

use super::{
    event::History,
    runner::{Arena, run_in_front},
    store::Witness,
    support::dice::Dice,
    turns::InTurns,
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
        AnyStore::new(InTurns::of([
            self.node(ring(self.step, next)).await,
            self.node(ring(next, next)).await,
        ]))
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_keys_are_rotated_every_key_is_a_register_that_is_written_once() {
    run_in_front(Sealed::default(), "key rotated").await;
}
