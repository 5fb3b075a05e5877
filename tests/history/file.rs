//! The file store: closed and opened again in the middle of the work, while the wall clock is set back and forth.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::time::sleep;
use tower_idempotency::{
    AnyStore, FileStore,
    testing::{Clock, MachineStart},
};

use super::{
    event::{Event, History},
    runner::{Arena, prove},
    store::{Weather, Witness},
    support::dice::Dice,
};

/// A machine whose wall clock is set while it runs, and which does not tell when it was started.
#[derive(Clone, Debug)]
struct SetClock {
    start: Instant,
    set_by: Arc<AtomicI64>,
}

impl Clock for SetClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn wall(&self) -> Duration {
        let since_1970 = Duration::from_secs(50 * 365 * 24 * 60 * 60) + self.start.elapsed();
        let set_by = Duration::from_secs(self.set_by.load(SeqCst).unsigned_abs());
        match self.set_by.load(SeqCst) {
            ..0 => since_1970 - set_by,
            0.. => since_1970 + set_by,
        }
    }

    fn machine(&self) -> Option<(MachineStart, Duration)> {
        None
    }
}

struct File {
    folder: TempDir,
    clock: SetClock,
    store: Option<FileStore>,
}

impl File {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            clock: SetClock {
                start: Instant::now(),
                set_by: Arc::default(),
            },
            store: None,
        }
    }

    async fn open_file(&mut self) -> AnyStore {
        let path = self.folder.path().join("store.redb");
        let store = FileStore::builder(path).clock(self.clock.clone()).open().await;
        AnyStore::new(self.store.insert(store.expect("it opens")).clone())
    }

    async fn close_file(&mut self) {
        if let Some(store) = self.store.take() {
            store.close().await;
        }
    }
}

impl Arena for File {
    const NAME: &'static str = "file";
    const FAULTS: &'static [&'static str] = &["store closed and opened", "clock jumps"];

    async fn open(&mut self) -> AnyStore {
        self.close_file().await;
        self.folder = tempfile::tempdir().expect("a folder");
        self.clock.set_by.store(0, SeqCst);
        self.open_file().await
    }

    async fn strike(&mut self, dice: &mut Dice, witness: &Witness, history: &History) {
        if dice.below(3) > 0 {
            let hour = 60 * 60;
            // A longer leap forward is a machine that was switched off for so long.
            let by = [-hour, hour, -24 * hour, 0][dice.below(4) as usize];
            self.clock.set_by.store(by, SeqCst);
            witness.struck.add("clock jumps");
        }
        match dice.below(3) {
            0 => {
                witness.replace(None);
                self.close_file().await;
                // What was under way is abandoned when the file is opened again.
                history.push(Event::Crash);
                sleep(Duration::from_millis(dice.below(50))).await;
                let store = self.open_file().await;
                witness.replace(Some(store));
                witness.struck.add("store closed and opened");
            }
            1 => {
                witness.make(Weather::Paused);
                sleep(Duration::from_millis(dice.below(3) * dice.below(300))).await;
            }
            _ => {}
        }
    }

    async fn stock(&mut self) -> (u64, u64, u64) {
        let records = self.store.as_ref().map_or(0, FileStore::len);
        let path = self.folder.path().join("store.redb");
        let bytes = std::fs::metadata(path).expect("the file is there").len();
        (records, bytes, 256 << 20)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_store_every_key_is_a_register_that_is_written_once() {
    prove(File::new()).await;
}
