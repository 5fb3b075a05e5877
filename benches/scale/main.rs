//! What the number of keys, of threads and of duplicates costs: over the memory store, CPU time throughout, so that what
//! other processes take is not in it.
//!
//! `cargo bench --bench scale`. With `CHART=file.svg` it draws the first table. For a profiler: `--keys=` and a number of
//! them measures that size alone, and prints nanoseconds.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod keys;
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
use tokio::runtime::Runtime;
use tower_idempotency::{Concurrent, IdempotencyLayer, MemoryStore};

use self::{
    keys::{ONE_SIZE, by_keys, one_size},
    service::{body, request, router, send},
};

const OPERATIONS: u64 = 2_000;
const ROUNDS: usize = 21;

fn runtime(paused: bool) -> Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(paused).build().unwrap()
}

fn protected(store: &MemoryStore) -> Router {
    router().layer(IdempotencyLayer::new(store.clone()))
}

fn large() -> MemoryStore {
    MemoryStore::builder().max_bytes(u64::MAX).max_records(u64::MAX).build()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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
    if let Some(size) = std::env::args().find_map(|argument| argument.strip_prefix(ONE_SIZE)?.parse().ok()) {
        return one_size(&runtime(true), size, &body);
    }
    by_keys();
    by_threads(&body);
    hot_key(&body);
}
