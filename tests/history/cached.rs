//! The store in memory behind two nodes with copies of their own, which are started anew under the work.

use tower_idempotency::{AnyStore, Cached, MemoryStore};

use super::{
    event::History,
    runner::{Arena, run_in_front},
    store::Witness,
    support::dice::Dice,
    turns::InTurns,
};

const CAP: u64 = 64 << 20;

#[derive(Default)]
struct Copied(MemoryStore);

impl Copied {
    fn nodes(&self) -> AnyStore {
        AnyStore::new(InTurns::of([Cached::new(self.0.clone()), Cached::new(self.0.clone())]))
    }
}

impl Arena for Copied {
    const NAME: &'static str = "cached";
    const FAULTS: &'static [&'static str] = &[];

    async fn open(&mut self) -> AnyStore {
        self.0 = MemoryStore::builder().max_bytes(CAP).build();
        self.nodes()
    }

    async fn strike(&mut self, _: &mut Dice, witness: &Witness, _: &History) {
        witness.replace(Some(self.nodes()));
        witness.struck.add("copies lost");
    }

    async fn stock(&mut self) -> (u64, u64, u64) {
        (self.0.len(), self.0.bytes(), CAP)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_copies_that_come_and_go_every_key_is_a_register_that_is_written_once() {
    run_in_front(Copied::default(), "copies lost").await;
}
