//! What the layer costs beside the bare router: CPU time and allocations of one request, 1 KiB in and 1 KiB out.
//!
//! `cargo bench --bench overhead`. Figures are ratios to the bare router in the same run: rounds alternate between the
//! contestants, each ratio is taken within its round, and the median over all rounds is shown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::hint::black_box;

use axum::{Router, body::Body, http::Request, routing::post};
use bytes::Bytes;
use cpu_time::ThreadTime;
use http::{HeaderValue, Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use tower::{Layer, Service, layer::util::Identity};
use tower_idempotency::{Idempotency, IdempotencyLayer, MemoryStore};

const OPERATIONS: u64 = 2_000;
const ROUNDS: usize = 61;
const RESIDENT: u64 = 100_000;

async fn handler(body: Bytes) -> ([(header::HeaderName, HeaderValue); 1], Vec<u8>) {
    black_box(&body);
    let content_type = HeaderValue::from_static("application/octet-stream");
    ([(header::CONTENT_TYPE, content_type)], vec![b'o'; 1024])
}

fn router() -> Router {
    Router::new().route("/payments", post(handler))
}

fn protected(store: &MemoryStore) -> Router {
    router().layer(IdempotencyLayer::new(store.clone()))
}

/// The layer around the whole router: nothing is routed before it, and its answers are not boxed once more.
fn outside(store: &MemoryStore) -> Idempotency<Router> {
    IdempotencyLayer::new(store.clone()).layer(router())
}

/// Built anew for every operation and every contestant, so that what it costs is in both parts of a ratio.
fn request(key: u64, body: &Bytes) -> Request<Body> {
    Request::builder()
        .method(Method::POST)
        .uri("/payments")
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::AUTHORIZATION, "Basic YWNjb3VudDpzZWNyZXQ=")
        .header(
            "idempotency-key",
            HeaderValue::try_from(format!("key-of-the-operation-{key:016}")).unwrap(),
        )
        .body(Body::from(body.clone()))
        .unwrap()
}

fn without_key(body: &Bytes) -> Request<Body> {
    Request::builder()
        .method(Method::POST)
        .uri("/payments")
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::AUTHORIZATION, "Basic YWNjb3VudDpzZWNyZXQ=")
        .header(
            "x-other-key",
            HeaderValue::try_from(format!("key-of-the-operation-{:016}", 0)).unwrap(),
        )
        .body(Body::from(body.clone()))
        .unwrap()
}

async fn send<S, B>(service: &mut S, request: Request<Body>) -> usize
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: std::fmt::Debug,
    B: http_body::Body + Unpin,
    B::Error: std::fmt::Debug,
{
    std::future::poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
    let response = service.call(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let mut body = response.into_body();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        length += frame.unwrap().data_ref().map_or(0, bytes::Buf::remaining);
    }
    length
}

type Round = dyn FnMut(&tokio::runtime::Runtime, &Bytes) -> f64;

struct Contestant {
    name: &'static str,
    /// One round: how long its operations took, in nanoseconds each.
    round: Box<Round>,
    target: Option<f64>,
}

fn timed(runtime: &tokio::runtime::Runtime, work: impl Future<Output = ()>) -> f64 {
    runtime.block_on(async {
        let start = ThreadTime::now();
        work.await;
        start.elapsed().as_nanos() as f64 / OPERATIONS as f64
    })
}

fn contestant<S, B>(
    name: &'static str,
    target: Option<f64>,
    service: S,
    make: fn(u64, &Bytes) -> Request<Body>,
) -> Contestant
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + 'static,
    S::Error: std::fmt::Debug,
    B: http_body::Body + Unpin + 'static,
    B::Error: std::fmt::Debug,
{
    let mut service = service;
    let round = move |runtime: &tokio::runtime::Runtime, body: &Bytes| {
        timed(runtime, async {
            for key in 0..OPERATIONS {
                black_box(send(&mut service, make(key, body)).await);
            }
        })
    };
    Contestant {
        name,
        round: Box::new(round),
        target,
    }
}

/// A new key for every operation, over a store that holds `resident` records already.
fn first<S, B>(
    name: &'static str,
    target: Option<f64>,
    resident: MemoryStore,
    protect: fn(&MemoryStore) -> S,
) -> Contestant
where
    S: Service<Request<Body>, Response = Response<B>> + 'static,
    S::Error: std::fmt::Debug,
    B: http_body::Body + Unpin + 'static,
    B::Error: std::fmt::Debug,
{
    let mut next = 1 << 40;
    let fresh = resident.is_empty();
    let mut service = protect(&resident);
    let mut before = Vec::new();
    let round = move |runtime: &tokio::runtime::Runtime, body: &Bytes| {
        if fresh {
            // Two stores old ones are dropped, so that their memory is used again as in a server that has been running
            // for a while, and not fetched from the system anew.
            before.push(std::mem::replace(&mut service, protect(&MemoryStore::new())));
            if before.len() > 2 {
                drop(before.remove(0));
            }
        }
        timed(runtime, async {
            for _ in 0..OPERATIONS {
                next += 1;
                black_box(send(&mut service, request(next, body)).await);
            }
        })
    };
    Contestant {
        name,
        round: Box::new(round),
        target,
    }
}

/// Replays of records all over the store, in an order that no cache foresees.
fn replay_over_many(name: &'static str, resident: MemoryStore) -> Contestant {
    let mut service = protected(&resident);
    let mut state = 1u64;
    let round = move |runtime: &tokio::runtime::Runtime, body: &Bytes| {
        timed(runtime, async {
            for _ in 0..OPERATIONS {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                black_box(send(&mut service, request((state >> 33) % RESIDENT, body)).await);
            }
        })
    };
    Contestant {
        name,
        round: Box::new(round),
        target: None,
    }
}

fn fill(runtime: &tokio::runtime::Runtime, store: &MemoryStore, body: &Bytes, records: u64) {
    let mut service = protected(store);
    runtime.block_on(async {
        for key in 0..records {
            send(&mut service, request(key, body)).await;
        }
    });
    assert_eq!(store.len(), records);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn allocations(runtime: &tokio::runtime::Runtime, body: &Bytes) {
    println!("\nallocations of one request (count, bytes), the request's own included");
    let show = |name: &str, service: &mut Router, make: &dyn Fn() -> Request<Body>| {
        // Once without counting: what is made once for all requests is not a request's.
        runtime.block_on(send(service, make()));
        let counted = allocation_counter::measure(|| {
            runtime.block_on(send(service, make()));
        });
        println!("  {name:<34} {:>4} {:>7}", counted.count_total, counted.bytes_total);
    };
    let store = MemoryStore::new();
    let next = std::cell::Cell::new(1 << 50);
    let fresh = || {
        next.set(next.get() + 1);
        request(next.get(), body)
    };
    show("bare router", &mut router(), &|| request(0, body));
    show(
        "router with a layer of nothing",
        &mut router().layer(Identity::new()),
        &|| request(0, body),
    );
    show("not keyed", &mut protected(&store), &|| without_key(body));
    show("first", &mut protected(&store), &fresh);
    show("replay", &mut protected(&store), &|| request(0, body));
}

fn memory(runtime: &tokio::runtime::Runtime, body: &Bytes) {
    println!("\nlive heap of one completed key, 1,024 bytes of answer (target 1450)");
    for records in [1_000, 10_000, RESIDENT] {
        let store = MemoryStore::new();
        let counted = allocation_counter::measure(|| fill(runtime, &store, body, records));
        println!(
            "  {records:>7} keys {:>6.0} bytes",
            counted.bytes_current as f64 / records as f64
        );
    }
    // A replay shares the answer, which may cost once for each record.
    let store = MemoryStore::new();
    let counted = allocation_counter::measure(|| {
        fill(runtime, &store, body, RESIDENT);
        fill(runtime, &store, body, RESIDENT);
    });
    println!(
        "  {RESIDENT:>7} keys {:>6.0} bytes, each replayed once",
        counted.bytes_current as f64 / RESIDENT as f64
    );
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let body = Bytes::from(vec![b'i'; 1024]);
    // For a profiler: one contestant alone, and how many rounds of it.
    let arguments: Vec<_> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let small = MemoryStore::new();
    fill(&runtime, &small, &body, OPERATIONS);
    let large = MemoryStore::new();
    if arguments.first().is_none_or(|name| name.contains("100 k")) {
        fill(&runtime, &large, &body, RESIDENT);
    }

    let mut contestants = vec![
        contestant("bare router", None, router(), request),
        contestant(
            "router with a layer of nothing",
            None,
            router().layer(Identity::new()),
            request,
        ),
        contestant(
            "not keyed, around the router",
            Some(1.05),
            outside(&small),
            |_, body| without_key(body),
        ),
        contestant("not keyed, Router::layer", None, protected(&small), |_, body| {
            without_key(body)
        }),
        first("first", Some(2.4), MemoryStore::new(), protected),
        first("first, around the router", None, MemoryStore::new(), outside),
        first("first over 100 k keys", None, large.clone(), protected),
        contestant("hot replay", Some(1.6), protected(&small), |_, body| request(7, body)),
        contestant("hot replay, around the router", None, outside(&small), |_, body| {
            request(7, body)
        }),
        replay_over_many("replay over 100 k keys", large.clone()),
    ];
    if let Some(name) = arguments.first() {
        let rounds = arguments.get(1).map_or(ROUNDS * 5, |rounds| rounds.parse().unwrap());
        let contestant = contestants.iter_mut().find(|contestant| contestant.name == name);
        let contestant = contestant.unwrap_or_else(|| panic!("there is no contestant {name:?}"));
        let times = (0..rounds).map(|_| (contestant.round)(&runtime, &body)).collect();
        println!("{name}: {:.0} ns", median(times));
        return;
    }
    let mut rounds: Vec<Vec<f64>> = vec![Vec::new(); contestants.len()];
    for round in 0..=ROUNDS {
        for (contestant, times) in contestants.iter_mut().zip(&mut rounds) {
            let time = (contestant.round)(&runtime, &body);
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
        println!(
            "  {:<34} {:>8.0} {ratio:>7.2} {target:>7}",
            contestant.name,
            median(times.clone())
        );
    }
    allocations(&runtime, &body);
    memory(&runtime, &body);
}
