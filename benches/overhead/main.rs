//! What the layer costs beside the bare router: CPU time of one request, 1 KiB in and 1 KiB out.
//!
//! `cargo bench --bench overhead`. Figures are ratios to the bare router in the same run: rounds alternate between the
//! contestants, each ratio is taken within its round, and the median over all rounds is shown. For a profiler: the name of
//! one contestant and how many rounds of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod contestant;
mod floor;
mod hand_rolled;
mod service;

use std::{hint::black_box, pin::Pin, sync::LazyLock, task::Poll, time::Duration};

use axum::{Router, body::Body, routing::post};
use bytes::Bytes;
use http::{Request, StatusCode};
use tokio::runtime::Runtime;
use tower::{Layer, Service, layer::util::Identity};
use tower_idempotency::{Idempotency, IdempotencyLayer, MemoryStore};

use self::{
    contestant::{Contestant, OPERATIONS, first, over_many, same},
    floor::Floor,
    hand_rolled::Records,
    service::{body, request, router, send, without_key},
};

const ROUNDS: usize = 61;
const RESIDENT: u64 = 100_000;

static BODY: LazyLock<Bytes> = LazyLock::new(body);
static OTHER_BODY: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(vec![b'x'; 1024]));

/// As most users write it: axum boxes what a layer changes once more.
fn protected(store: &MemoryStore) -> Router {
    router().layer(IdempotencyLayer::new(store.clone()))
}

/// The layer around the whole router: nothing is routed before it, and its answers are not boxed once more.
fn around(store: &MemoryStore) -> Idempotency<Router> {
    IdempotencyLayer::new(store.clone()).layer(router())
}

fn fill<S>(runtime: &Runtime, mut service: S, records: u64)
where
    S: Service<Request<Body>, Response = axum::response::Response>,
    S::Error: std::fmt::Debug,
{
    runtime.block_on(async {
        for key in 0..records {
            send(&mut service, request(key, &BODY), StatusCode::OK).await;
        }
    });
}

/// A request that is in flight for as long as this is kept.
fn in_flight(runtime: &Runtime, store: &MemoryStore, key: u64) -> impl Sized {
    let layer = IdempotencyLayer::new(store.clone()).lease(Duration::from_secs(24 * 60 * 60));
    let mut service = Router::new()
        .route("/payments", post(async |_: Bytes| std::future::pending::<()>().await))
        .layer(layer);
    let mut future: Pin<Box<_>> = Box::pin(async move { service.call(request(key, &BODY)).await });
    runtime.block_on(std::future::poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    }));
    future
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let arguments: Vec<_> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let wants = |name: &str| arguments.first().is_none_or(|wanted| wanted.contains(name));

    let small = MemoryStore::new();
    fill(&runtime, protected(&small), 16);
    let _held = in_flight(&runtime, &small, 1 << 60);
    let by_hand = Records::default();
    fill(&runtime, hand_rolled::around(router(), &by_hand), 16);
    let large = MemoryStore::new();
    if wants("100 k") {
        fill(&runtime, protected(&large), RESIDENT);
    }

    let ok = StatusCode::OK;
    let replayed = || request(7, &BODY);
    let contestants = [
        same("bare router", None, router(), ok, replayed),
        same(
            "router with a layer of nothing",
            None,
            router().layer(Identity::new()),
            ok,
            replayed,
        ),
        same("not keyed, around the router", Some(1.05), around(&small), ok, || {
            without_key(&BODY)
        }),
        same("not keyed", None, protected(&small), ok, || without_key(&BODY)),
        first("first", Some(2.4), || protected(&MemoryStore::new())),
        first("first, around the router", None, || around(&MemoryStore::new())),
        first("first, by hand", None, || {
            hand_rolled::around(router(), &Records::default())
        }),
        over_many("first over 100 k keys", protected(&large), 1 << 50..1 << 60),
        same("hot replay", Some(1.6), protected(&small), ok, replayed),
        same("hot replay, around the router", None, around(&small), ok, replayed),
        same(
            "hot replay, by hand",
            None,
            hand_rolled::around(router(), &by_hand),
            ok,
            replayed,
        ),
        same("hot replay, the floor", None, Floor::default(), ok, replayed),
        over_many("replay over 100 k keys", protected(&large), 0..RESIDENT),
        same(
            "another body, 422",
            None,
            protected(&small),
            StatusCode::UNPROCESSABLE_ENTITY,
            || request(7, &OTHER_BODY),
        ),
        same("in flight, 409", None, protected(&small), StatusCode::CONFLICT, || {
            request(1 << 60, &BODY)
        }),
    ];
    let mut contestants: Vec<Contestant> = contestants.into();
    if let Some(name) = arguments.first() {
        let rounds = arguments.get(1).map_or(ROUNDS * 5, |rounds| rounds.parse().unwrap());
        let contestant = contestants.iter_mut().find(|contestant| contestant.name == name);
        let contestant = contestant.unwrap_or_else(|| panic!("there is no contestant {name:?}"));
        let times = (0..rounds).map(|_| contestant.round(&runtime)).collect();
        println!("{name}: {:.0} ns", median(times));
        return;
    }
    let mut rounds: Vec<Vec<f64>> = vec![Vec::new(); contestants.len()];
    for round in 0..=ROUNDS {
        for (contestant, times) in contestants.iter_mut().zip(&mut rounds) {
            let time = black_box(contestant.round(&runtime));
            // The first round warms up.
            if round > 0 {
                times.push(time);
            }
        }
    }

    println!("CPU time of one request, {ROUNDS} rounds of {OPERATIONS}, medians");
    println!("  {:<34} {:>8} {:>7} {:>7}", "", "ns", "ratio", "target");
    for (contestant, times) in contestants.iter().zip(&rounds) {
        let ratio = median(times.iter().zip(&rounds[0]).map(|(time, bare)| time / bare).collect());
        let target = contestant.target.map_or(String::new(), |target| format!("{target:.2}"));
        let time = median(times.clone());
        println!("  {:<34} {time:>8.0} {ratio:>7.2} {target:>7}", contestant.name);
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
