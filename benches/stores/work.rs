//! What every store is asked to do, and how long it takes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use cpu_time::ProcessTime;
use sha2::{Digest, Sha256};
use tower_idempotency::{AnyStore, Begin, Claim, Fingerprint, Owner, RecordId, Retention, Store, StoredResponse};

pub struct Figures {
    pub per_second: f64,
    pub cpu: Duration,
    pub p50: Duration,
    pub p99: Duration,
}

pub static NEXT: AtomicU64 = AtomicU64::new(0);

pub fn id(number: u64) -> RecordId {
    RecordId::from_bytes(Sha256::digest(number.to_le_bytes()).into())
}

pub fn claim() -> Claim {
    let day = Retention::For(Duration::from_secs(24 * 3600));
    Claim::new(
        Fingerprint::new(1, [7; 32]),
        Owner::random().unwrap(),
        Duration::from_secs(60),
        day,
    )
}

/// 1 KiB of body and a header, as bytes: version 1 of a stored answer.
pub fn answer() -> StoredResponse {
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

pub async fn cycle(store: &impl Store, retention: Duration) -> RecordId {
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

pub async fn cycles(store: &AnyStore, writers: usize, time: Duration) -> Figures {
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

pub async fn replay(store: &impl Store, id: &RecordId) {
    let found = store.begin(id, &claim()).await.unwrap();
    assert!(matches!(found, Begin::Completed { .. }), "{found:?}");
}

pub async fn replays(store: &AnyStore, time: Duration) {
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
