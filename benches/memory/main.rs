//! What the layer takes from the allocator: allocations of one request, and the live heap of a completed key.
//!
//! `cargo bench --bench memory`, apart from `overhead` since counting costs time.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../overhead/hand_rolled.rs"]
mod hand_rolled;
#[path = "../overhead/service.rs"]
mod service;

use axum::{Router, body::Body};
use bytes::Bytes;
use http::{Request, StatusCode};
use tokio::runtime::Runtime;
use tower::layer::util::Identity;
use tower_idempotency::{IdempotencyLayer, MemoryStore};

use self::{
    hand_rolled::Records,
    service::{body, request, router, send, without_key},
};

fn protected(store: &MemoryStore) -> Router {
    router().layer(IdempotencyLayer::new(store.clone()))
}

fn allocations(runtime: &Runtime, body: &Bytes) {
    println!("allocations of one request (count, bytes), the request's own included");
    let show = |name: &str, service: &mut Router, make: &mut dyn FnMut() -> Request<Body>| {
        // Once without counting: what is made once for all requests is not a request's.
        runtime.block_on(send(service, make(), StatusCode::OK));
        let counted = allocation_counter::measure(|| {
            runtime.block_on(send(service, make(), StatusCode::OK));
        });
        println!("  {name:<34} {:>4} {:>7}", counted.count_total, counted.bytes_total);
    };
    let (store, records) = (MemoryStore::new(), Records::default());
    let mut next = 1 << 50;
    let mut fresh = || {
        next += 1;
        request(next, body)
    };
    show("bare router", &mut router(), &mut || request(0, body));
    let nothing = &mut router().layer(Identity::new());
    show("router with a layer of nothing", nothing, &mut || request(0, body));
    show("not keyed", &mut protected(&store), &mut || without_key(body));
    show("first", &mut protected(&store), &mut fresh);
    show(
        "first, by hand",
        &mut hand_rolled::around(router(), &records),
        &mut fresh,
    );
    show("hot replay", &mut protected(&store), &mut || request(0, body));
    let by_hand = &mut hand_rolled::around(router(), &records);
    show("hot replay, by hand", by_hand, &mut || request(0, body));
}

fn fill(runtime: &Runtime, mut service: Router, body: &Bytes, records: u64) {
    runtime.block_on(async {
        for key in 0..records {
            send(&mut service, request(key, body), StatusCode::OK).await;
        }
    });
}

fn live_heap(runtime: &Runtime, body: &Bytes) {
    println!("\nlive heap of one completed key, 1,024 bytes of answer (target 1,450)");
    for records in [1_000, 10_000, 100_000, 1_000_000] {
        // A million answers of 1 KiB are more than the default allows.
        let store = MemoryStore::builder().max_bytes(u64::MAX).build();
        let counted = allocation_counter::measure(|| fill(runtime, protected(&store), body, records));
        let each = counted.bytes_current as f64 / records as f64;
        println!("  {:<34} {records:>9} keys {each:>6.0} bytes", "this crate");
        if records == 100_000 {
            // A replay shares the answer, which may cost once for each record.
            let replayed = allocation_counter::measure(|| fill(runtime, protected(&store), body, records));
            let each = each + replayed.bytes_current as f64 / records as f64;
            println!("  {:<34} {records:>9} keys {each:>6.0} bytes", "each replayed once");
        }
    }
    let store = Records::default();
    let records = 1_000_000;
    let counted = allocation_counter::measure(|| fill(runtime, hand_rolled::around(router(), &store), body, records));
    let each = counted.bytes_current as f64 / records as f64;
    println!("  {:<34} {records:>9} keys {each:>6.0} bytes", "by hand");
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    allocations(&runtime, &body());
    live_heap(&runtime, &body());
}
