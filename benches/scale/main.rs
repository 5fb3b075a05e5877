//! What the number of keys, of threads and of duplicates costs: over the memory store, CPU time throughout, so that what
//! other processes take is not in it.
//!
//! `cargo bench --bench scale`. With `CHART=file.svg` it draws the first table.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../overhead/service.rs"]
mod service;
#[path = "../overhead/svg.rs"]
mod svg;

use std::{sync::Barrier, thread, time::Duration};

use axum::{Router, routing::post};
use bytes::Bytes;
use cpu_time::{ProcessTime, ThreadTime};
use futures_util::future::join_all;
use http::StatusCode;
use tokio::{runtime::Runtime, time::advance};
use tower_idempotency::{Concurrent, IdempotencyLayer, MemoryStore};

use self::service::{body, request, router, send};

const SIZES: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];
const OPERATIONS: u64 = 2_000;
const ROUNDS: usize = 21;
const RETENTION: Duration = Duration::from_secs(1_000_000);

fn runtime(paused: bool) -> Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(paused).build().unwrap()
}

fn protected(store: &MemoryStore) -> Router {
    router().layer(IdempotencyLayer::new(store.clone()).retention(RETENTION))
}

fn large() -> MemoryStore {
    MemoryStore::builder().max_bytes(u64::MAX).max_records(u64::MAX).build()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Of these times, in microseconds, the longest but one in a thousand, and the longest.
fn tail(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    let at = times.len() - 1 - times.len() / 1000;
    (times[at] / 1e3, times[times.len() - 1] / 1e3)
}

struct Store {
    store: MemoryStore,
    app: Router,
    keys: u64,
    resident: u64,
    state: u64,
}

impl Store {
    /// Filled evenly over a retention, and from then on one key expires for each that comes.
    fn filled(runtime: &Runtime, resident: u64, body: &Bytes, growth: &mut Vec<f64>) -> Self {
        let store = large();
        let mut filled = Self {
            app: protected(&store),
            store,
            keys: 0,
            resident,
            state: 1,
        };
        runtime.block_on(async {
            for _ in 0..resident {
                growth.push(filled.first(body).await);
            }
        });
        filled
    }

    /// One new key, and the time until the next one; how many nanoseconds it took.
    async fn first(&mut self, body: &Bytes) -> f64 {
        let request = request(self.keys, body);
        self.keys += 1;
        let start = ThreadTime::now();
        send(&mut self.app, request, StatusCode::OK).await;
        let time = start.elapsed().as_nanos() as f64;
        advance(RETENTION / self.resident as u32).await;
        time
    }

    /// A replay of one of the younger half.
    async fn replay(&mut self, body: &Bytes) -> f64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let key = self.keys - 1 - (self.state >> 20) % (self.resident / 2);
        let request = request(key, body);
        let start = ThreadTime::now();
        send(&mut self.app, request, StatusCode::OK).await;
        start.elapsed().as_nanos() as f64
    }
}

fn by_keys(body: &Bytes) {
    let runtime = runtime(true);
    let mut growth = Vec::new();
    let mut stores: Vec<_> = SIZES
        .iter()
        .map(|size| {
            growth.clear();
            Store::filled(&runtime, *size, body, &mut growth)
        })
        .collect();
    let mut firsts = vec![Vec::new(); SIZES.len()];
    let mut replays = vec![Vec::new(); SIZES.len()];
    let mut every = Vec::new();
    for _ in 0..ROUNDS {
        for (index, store) in stores.iter_mut().enumerate() {
            let (mut first, mut replay) = (Vec::new(), Vec::new());
            runtime.block_on(async {
                for _ in 0..OPERATIONS {
                    first.push(store.first(body).await);
                    replay.push(store.replay(body).await);
                }
            });
            firsts[index].push(first.iter().sum::<f64>() / first.len() as f64);
            replays[index].push(replay.iter().sum::<f64>() / replay.len() as f64);
            if index == SIZES.len() - 1 {
                every.extend(first);
            }
        }
    }
    println!("cost by resident keys, beside 1,000; each first request expires another key");
    println!("  {:>10} {:>8} {:>8}", "keys", "first", "replay");
    let ratio = |times: &[Vec<f64>], index: usize| {
        let ratios = times[index].iter().zip(&times[0]).map(|(time, least)| time / least);
        median(ratios.collect())
    };
    let mut groups = Vec::new();
    for (index, size) in SIZES.iter().enumerate() {
        let (first, replay) = (ratio(&firsts, index), ratio(&replays, index));
        println!("  {size:>10} {first:>8.2} {replay:>8.2}");
        groups.push((format!("{size} keys"), vec![first, replay]));
        let (held, most) = (stores[index].store.len(), size + 64 * 4);
        assert!(held <= most, "{held} records are held where {most} are alive");
    }
    let (p999, longest) = tail(every);
    println!("\nfirst requests under steady expiry, 1,000,000 keys: p99.9 {p999:.0} µs, longest {longest:.0} µs");
    let (p999, longest) = tail(growth);
    println!("first requests while the map grows to 1,000,000: p99.9 {p999:.0} µs, longest {longest:.0} µs");
    if let Ok(path) = std::env::var("CHART") {
        svg::bars(
            &path,
            "Cost of a request by resident keys, 1,000 keys = 1",
            &["first", "replay"],
            &groups,
        );
    }
}

/// CPU time of one operation on each of so many threads at once, which is what contention adds to.
fn threads(count: u64, body: &Bytes) -> f64 {
    let store = large();
    let start = Barrier::new(count as usize);
    let times: Vec<f64> = thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|number| {
                let (store, start) = (&store, &start);
                scope.spawn(move || {
                    let mut app = protected(store);
                    runtime(false).block_on(async {
                        start.wait();
                        let begin = ThreadTime::now();
                        for key in 0..OPERATIONS * 10 {
                            send(&mut app, request(number << 40 | key, body), StatusCode::OK).await;
                        }
                        begin.elapsed().as_nanos() as f64 / (OPERATIONS * 10) as f64
                    })
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    times.iter().sum::<f64>() / count as f64
}

fn by_threads(body: &Bytes) {
    let ratios = (0..ROUNDS / 2).map(|_| 2.0 * threads(1, body) / threads(2, body));
    let scale = median(ratios.collect());
    println!("\ntwo threads on keys of their own do {scale:.2} times the work of one (CPU time; target 1.8)");
}

/// Ten thousand duplicates of one request at once: first while it runs, then of its answer.
fn hot_key(body: &Bytes) {
    const DUPLICATES: usize = 10_000;
    let runtime = runtime(false);
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .on_concurrent(Concurrent::Wait(Duration::from_secs(60)))
        .max_waiters(DUPLICATES);
    let slow = async |_: Bytes| {
        tokio::time::sleep(Duration::from_millis(50)).await;
        vec![b'o'; 1024]
    };
    let app = Router::new().route("/payments", post(slow)).layer(layer.clone());
    for what in ["duplicates that wait for the first", "replays in flight"] {
        let start = ProcessTime::now();
        runtime.block_on(async {
            let all = (0..DUPLICATES).map(|_| {
                let (mut app, request) = (app.clone(), request(1, body));
                tokio::spawn(async move { send(&mut app, request, StatusCode::OK).await })
            });
            for length in join_all(all).await {
                assert_eq!(length.unwrap(), 1024);
            }
        });
        let each = start.elapsed().as_nanos() as f64 / DUPLICATES as f64 / 1e3;
        println!(
            "{DUPLICATES} {what}: {each:.1} µs each, handler runs {}",
            layer.counters().executed
        );
    }
}

fn main() {
    let body = body();
    by_keys(&body);
    by_threads(&body);
    hot_key(&body);
}
