//! What durable stores cost beside the floor of their medium: cycles (claim and completion, 1 KiB answers) of 1, 16, 64
//! and 256 writers, replays, the size of a record, the purge, and the opening of a full file.
//!
//! `cargo bench --bench stores --features testing`. Options, behind `--`:
//! `--only NAME` one contestant, `--seconds N` for each figure [2], `--records N` in the full file [100000], `--dir
//! PATH` the disk to measure [the temporary directory].
//!
//! The floor is what no store on the medium can beat with one writer: two syncs for each cycle. It is measured in the
//! same run, before and after; figures of different runs say little about each other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs::{File, OpenOptions},
    future::Future,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use cpu_time::ProcessTime;
use sha2::{Digest, Sha256};
use tower_idempotency::{
    AnyStore, Begin, Claim, FileStore, Fingerprint, Owner, RecordId, Retention, Store, StoredResponse, testing::Medium,
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
            name: "file, 1 ms sync, quick recovery",
            open: Box::new(|directory| {
                let medium = Disk::new(directory, Sync::Takes(Duration::from_millis(1)));
                let builder = FileStore::builder("bench").medium(medium).quick_recovery(true);
                Box::pin(async { AnyStore::new(builder.open().await.unwrap()) })
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

struct Options {
    only: Option<String>,
    time: Duration,
    records: u64,
    directory: PathBuf,
}

impl Options {
    fn from_env() -> Self {
        use lexopt::prelude::*;
        let mut options = Self {
            only: None,
            time: Duration::from_secs(2),
            records: 100_000,
            directory: std::env::temp_dir(),
        };
        let mut parser = lexopt::Parser::from_env();
        while let Some(option) = parser.next().unwrap() {
            match option {
                Long("only") => options.only = Some(parser.value().unwrap().string().unwrap()),
                Long("seconds") => options.time = Duration::from_secs_f64(parser.value().unwrap().parse().unwrap()),
                Long("records") => options.records = parser.value().unwrap().parse().unwrap(),
                Long("dir") => options.directory = parser.value().unwrap().into(),
                // What cargo passes to every benchmark.
                Long("bench") => {}
                other => panic!("{}", other.unexpected()),
            }
        }
        options
    }
}

fn main() {
    let options = Options::from_env();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for contestant in contestants() {
        if options
            .only
            .as_ref()
            .is_some_and(|only| !contestant.name.contains(&**only))
        {
            continue;
        }
        let directory = tempfile::tempdir_in(&options.directory).unwrap();
        println!("\n== {}", contestant.name);
        runtime.block_on(measure(&contestant, &options, directory.path()));
    }
    let directory = tempfile::tempdir_in(&options.directory).unwrap();
    println!("\n== a file with {} records", options.records);
    runtime.block_on(full_file(&options, directory.path()));
}

async fn measure(contestant: &Contestant, options: &Options, directory: &Path) {
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

struct Figures {
    per_second: f64,
    cpu: Duration,
    p50: Duration,
    p99: Duration,
}

static NEXT: AtomicU64 = AtomicU64::new(0);

fn id(number: u64) -> RecordId {
    RecordId::from_bytes(Sha256::digest(number.to_le_bytes()).into())
}

fn claim() -> Claim {
    let day = Retention::For(Duration::from_secs(24 * 3600));
    Claim::new(
        Fingerprint::new(1, [7; 32]),
        Owner::random().unwrap(),
        Duration::from_secs(60),
        day,
    )
}

/// 1 KiB of body and a header, as bytes: version 1 of a stored answer.
fn answer() -> StoredResponse {
    let mut bytes = vec![1, 0, 201, 0];
    bytes.extend(34u32.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(1024u64.to_le_bytes());
    bytes.extend(12u16.to_le_bytes());
    bytes.extend(16u32.to_le_bytes());
    bytes.extend(b"content-typeapplication/json");
    bytes.extend([b'o'; 1024]);
    StoredResponse::from_bytes(bytes.into()).unwrap()
}

async fn cycle(store: &impl Store, retention: Duration) -> RecordId {
    let id = id(NEXT.fetch_add(1, Relaxed));
    let Begin::Acquired(lease) = store.begin(&id, &claim()).await.unwrap() else {
        panic!("a new id is vacant");
    };
    let response = answer();
    store
        .complete(&lease, &response, Retention::For(retention))
        .await
        .unwrap();
    id
}

async fn cycles(store: &AnyStore, writers: usize, time: Duration) -> Figures {
    let stop = Arc::new(AtomicBool::new(false));
    let run = || {
        let (store, stop) = (store.clone(), Arc::clone(&stop));
        tokio::spawn(async move {
            let mut took = Vec::new();
            while !stop.load(Relaxed) {
                let start = Instant::now();
                cycle(&store, Duration::from_secs(24 * 3600)).await;
                took.push(start.elapsed());
            }
            took
        })
    };
    let (start, cpu) = (Instant::now(), ProcessTime::now());
    let tasks: Vec<_> = (0..writers).map(|_| run()).collect();
    tokio::time::sleep(time).await;
    stop.store(true, Relaxed);
    let mut took = Vec::new();
    for task in tasks {
        took.extend(task.await.unwrap());
    }
    let (elapsed, cpu) = (start.elapsed(), cpu.elapsed());
    took.sort();
    Figures {
        per_second: took.len() as f64 / elapsed.as_secs_f64(),
        cpu: cpu / took.len() as u32,
        p50: took[took.len() / 2],
        p99: took[took.len() * 99 / 100],
    }
}

async fn replay(store: &impl Store, id: &RecordId) {
    let found = store.begin(id, &claim()).await.unwrap();
    assert!(matches!(found, Begin::Completed { .. }), "{found:?}");
}

async fn replays(store: &AnyStore, time: Duration) {
    let id = cycle(store, Duration::from_secs(3600)).await;
    let mut took = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time {
        let start = Instant::now();
        for _ in 0..100 {
            replay(store, &id).await;
        }
        took.push(start.elapsed() / 100);
    }
    took.sort();
    println!("replay, hot: {:.2?} (median)", took[took.len() / 2]);
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
    let reopen = async |what: &str, quick: bool| {
        let start = Instant::now();
        let store = FileStore::builder(&path).quick_recovery(quick).open().await.unwrap();
        println!("opened {what}: {:.1?}", start.elapsed());
        store
    };
    // As a crash leaves it: a copy of the file while it is open.
    let crash = async |store: FileStore| {
        cycle(&store, hour).await;
        std::fs::copy(&path, directory.join("crashed.redb")).unwrap();
        store.close().await;
        std::fs::rename(directory.join("crashed.redb"), &path).unwrap();
    };
    let store = reopen("after it was closed", false).await;
    let mut took = Vec::new();
    for number in (first..first + options.records).step_by(options.records.div_ceil(2000) as usize) {
        let start = Instant::now();
        replay(&store, &id(number)).await;
        took.push(start.elapsed());
    }
    took.sort();
    println!(
        "replay, cold (not in the cache of answers): {:.1?} (median)",
        took[took.len() / 2]
    );
    crash(store).await;
    let store = reopen("after a crash", true).await;
    crash(store).await;
    let store = reopen("after a crash with quick recovery", true).await;
    store.close().await;
    purge(options, &directory.join("purged.redb")).await;
    let _ = io::stdout().flush();
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
