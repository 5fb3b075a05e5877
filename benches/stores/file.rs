//! Stores in a file, on a real disk and on one whose sync takes a certain time.

use std::{
    fs::{File, OpenOptions},
    future::Future,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use tower_idempotency::{AnyStore, FileStore, testing::Medium};

use crate::{
    Options,
    work::{NEXT, cycle, cycles, id, replay, replays},
};

type Opening = Pin<Box<dyn Future<Output = AnyStore>>>;

/// Two durable writes, and what makes them in a directory.
type Cycle = Box<dyn FnMut()>;
type Floor = Box<dyn Fn(&Path) -> Cycle>;

/// One store to be measured, and what it stands on. Another store is another of these in [`contestants`].
struct Contestant {
    name: &'static str,
    /// A new, empty store.
    open: Box<dyn Fn(&Path) -> Opening>,
    /// Two durable writes in a row on what the store stands on.
    floor: Option<Floor>,
}

fn contestants() -> Vec<Contestant> {
    vec![
        Contestant {
            name: "file, 1 ms sync",
            open: Box::new(|directory| {
                let medium = Disk::new(directory, Sync::Takes(Duration::from_millis(1)));
                Box::pin(async { AnyStore::new(FileStore::builder("bench").medium(medium).open().await.unwrap()) })
            }),
            floor: Some(Box::new(|directory| {
                floor(Disk::new(directory, Sync::Takes(Duration::from_millis(1))))
            })),
        },
        Contestant {
            name: "file, this disk",
            open: Box::new(|directory| {
                let path = directory.join(format!("store-{}", NEXT.fetch_add(1, Relaxed)));
                Box::pin(async { AnyStore::new(FileStore::open(path).await.unwrap()) })
            }),
            floor: Some(Box::new(|directory| floor(Disk::new(directory, Sync::Real)))),
        },
    ]
}

fn floor(disk: Disk) -> Cycle {
    disk.set_len(1 << 20).unwrap();
    let page = [1; 4096];
    let mut at = 0;
    Box::new(move || {
        for _ in 0..2 {
            at = (at + 4096) % (1 << 20);
            disk.write(at, &page).unwrap();
            disk.sync().unwrap();
        }
    })
}

/// A file whose sync is real, or takes a certain time.
#[derive(Debug)]
struct Disk {
    file: File,
    sync: Sync,
}

#[derive(Clone, Copy, Debug)]
enum Sync {
    Real,
    Takes(Duration),
}

impl Disk {
    fn new(directory: &Path, sync: Sync) -> Self {
        // Another file each time: a store that was dropped may still be closing its own.
        let path = directory.join(format!("medium-{}", NEXT.fetch_add(1, Relaxed)));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path);
        Self {
            file: file.unwrap(),
            sync,
        }
    }
}

impl Medium for Disk {
    fn len(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        match self.sync {
            Sync::Real => self.file.sync_data(),
            Sync::Takes(time) => {
                thread::sleep(time);
                Ok(())
            }
        }
    }

    fn hold(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

pub async fn measure(options: &Options) {
    for contestant in contestants() {
        if options.wants(contestant.name) {
            let directory = tempfile::tempdir_in(&options.directory).unwrap();
            println!("\n== {}", contestant.name);
            beside_its_floor(&contestant, options, directory.path()).await;
        }
    }
    if options.wants("file") {
        let directory = tempfile::tempdir_in(&options.directory).unwrap();
        println!("\n== a file with {} records", options.records);
        full_file(options, directory.path()).await;
    }
}

async fn beside_its_floor(contestant: &Contestant, options: &Options, directory: &Path) {
    let floor = |label| {
        let cycle = contestant.floor.as_ref().map(|floor| {
            let mut cycle = floor(directory);
            let count = 200;
            let start = Instant::now();
            (0..count).for_each(|_| cycle());
            start.elapsed() / count
        });
        if let Some(cycle) = cycle {
            println!("floor {label}: {cycle:.1?} for two writes with a sync each");
        }
        cycle
    };
    let before = floor("before");
    println!("writers   cycles/s   CPU/cycle        p50        p99   p50 / floor");
    for writers in [1, 16, 64, 256] {
        let store = (contestant.open)(directory).await;
        let figures = cycles(&store, writers, options.time).await;
        let ratio = before.map_or(String::new(), |floor| {
            format!("{:.2}", figures.p50.as_secs_f64() / floor.as_secs_f64())
        });
        println!(
            "{writers:7} {:10.0} {:>11} {:>10} {:>10}   {ratio}",
            figures.per_second,
            format!("{:.1?}", figures.cpu),
            format!("{:.1?}", figures.p50),
            format!("{:.1?}", figures.p99),
        );
    }
    floor("after");
    let store = (contestant.open)(directory).await;
    replays(&store, options.time / 2).await;
}

async fn full_file(options: &Options, directory: &Path) {
    let path = directory.join("full.redb");
    let sizes = |store: &str| {
        let length = std::fs::metadata(&path).unwrap().len();
        println!(
            "{store}: {:.1} MiB, {} bytes a record",
            length as f64 / 1048576.0,
            length / options.records
        );
    };
    let store = FileStore::open(&path).await.unwrap();
    let first = NEXT.load(Relaxed);
    let hour = Duration::from_secs(3600);
    fill(&store, options.records, hour).await;
    store.close().await;
    sizes("filled");
    // Without answers in memory: every replay looks into the file.
    let reopen = async |what: &str| {
        let start = Instant::now();
        let store = FileStore::builder(&path).replay_bytes(0).open().await.unwrap();
        println!("opened {what}: {:.1?}", start.elapsed());
        store
    };
    // As a crash leaves it: a copy of the file while it is open, with a journal that is nearly full.
    let crash = async |store: FileStore| {
        fill(&store, 1800, hour).await;
        std::fs::copy(&path, directory.join("crashed.redb")).unwrap();
        store.close().await;
        std::fs::rename(directory.join("crashed.redb"), &path).unwrap();
    };
    let store = reopen("after it was closed").await;
    for what in ["for the first time", "again"] {
        let mut took = Vec::new();
        for number in (first..first + options.records).step_by(options.records.div_ceil(2000) as usize) {
            let start = Instant::now();
            replay(&store, &id(number)).await;
            took.push(start.elapsed());
        }
        took.sort();
        println!("replay, from the file {what}: {:.1?} (median)", took[took.len() / 2]);
    }
    println!("a word to another thread and back: {:.1?} (median)", hop().await);
    crash(store).await;
    let store = reopen("after a crash").await;
    store.close().await;
    purge(options, &directory.join("purged.redb")).await;
    let _ = io::stdout().flush();
}

/// What no look into the file by another thread can be faster than.
async fn hop() -> Duration {
    let (ask, asked) = std::sync::mpsc::channel::<tokio::sync::oneshot::Sender<()>>();
    let thread = thread::spawn(move || asked.into_iter().for_each(|answer| answer.send(()).unwrap()));
    let mut took = Vec::new();
    for _ in 0..2000 {
        let (answer, answered) = tokio::sync::oneshot::channel();
        let start = Instant::now();
        ask.send(answer).unwrap();
        answered.await.unwrap();
        took.push(start.elapsed());
    }
    drop(ask);
    thread.join().unwrap();
    took.sort();
    took[took.len() / 2]
}

async fn fill(store: &FileStore, records: u64, retention: Duration) {
    let left = Arc::new(AtomicU64::new(records));
    let tasks: Vec<_> = (0..256)
        .map(|_| {
            let (store, left) = (store.clone(), Arc::clone(&left));
            tokio::spawn(async move {
                while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
                    cycle(&store, retention).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// Cycles that have as many expired records to remove as they add, beside cycles that have none.
async fn purge(options: &Options, path: &Path) {
    let store = FileStore::open(path).await.unwrap();
    fill(&store, options.records / 2, Duration::from_millis(1)).await;
    let any = AnyStore::new(store.clone());
    for what in ["with a purge", "with nothing to purge"] {
        let figures = cycles(&any, 64, options.time).await;
        println!(
            "64 writers {what}: {:.0} cycles/s, p99 {:.1?}",
            figures.per_second, figures.p99
        );
    }
    store.close().await;
}
