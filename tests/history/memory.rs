//! The store in memory.

use std::time::Duration;

use tokio::time::sleep;
use tower_idempotency::{AnyStore, MemoryStore};

use super::{
    event::History,
    runner::{Arena, prove},
    store::{Weather, Witness},
    support::dice::Dice,
};

const CAP: u64 = 64 << 20;

#[derive(Default)]
pub struct Memory(MemoryStore);

impl Arena for Memory {
    const NAME: &'static str = "memory";
    const FAULTS: &'static [&'static str] = &[];

    async fn open(&mut self) -> AnyStore {
        self.0 = MemoryStore::builder().max_bytes(CAP).build();
        AnyStore::new(self.0.clone())
    }

    /// Away for longer than a short lease.
    async fn strike(&mut self, dice: &mut Dice, witness: &Witness, _: &History) {
        witness.make([Weather::Cut, Weather::Paused][dice.below(2) as usize]);
        sleep(Duration::from_millis(dice.below(3) * dice.below(3) * dice.below(200))).await;
    }

    async fn stock(&mut self) -> (u64, u64, u64) {
        (self.0.len(), self.0.bytes(), CAP)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_store_every_key_is_a_register_that_is_written_once() {
    prove(Memory::default()).await;
}
