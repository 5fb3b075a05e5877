//! Published crates that make a request safe to retry, beside this one: CPU time of a first request and of a replay, 1 KiB
//! in and out, as ratios to the bare router in the same round, and how often the handler runs under 64 duplicates at once.
//! Speed without the second is not speed.
//!
//! What they are, as their sources say, and how they are set up here:
//!
//! - `tower-idempotency`: the default, over its memory store.
//! - `idempotent` 2: its tower layer over its memory store, an actor behind a channel; each keyed request is a task. Without a
//!   scope: tenants are not kept apart, which costs it nothing.
//! - `axum-idempotent` 0.6: answers in the sessions of `ruts`, by the key header alone, so that nothing is hashed. Its README
//!   says that it is best-effort and that duplicates at once may both run. A session has 50 keys here.
//! - `cratestack-axum` 0.8: claims first, as this crate does. It has stores in SQL only; the one here is a `DashMap`, the
//!   fastest that its trait allows.
//! - by hand: see `benches/overhead/hand_rolled.rs`.

#[path = "../../overhead/hand_rolled.rs"]
mod hand_rolled;
mod peers;
#[path = "../../overhead/service.rs"]
mod service;
#[path = "../../overhead/svg.rs"]
mod svg;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, body::Body, routing::post};
use bytes::Bytes;
use cpu_time::ProcessTime;
use futures_util::future::join_all;
use http::{HeaderValue, Request, StatusCode, header};
use tokio::runtime::Runtime;
use tower::{Service, ServiceExt};

use self::service::{body, request, router, send};

const OPERATIONS: u64 = 1_000;
const ROUNDS: usize = 41;

/// Puts one crate around a router.
type Protect = fn(Router) -> Router;

const CONTESTANTS: [(&str, Protect); 6] = [
    ("bare router", |router| router),
    ("tower-idempotency", peers::ours),
    ("by hand", peers::by_hand),
    ("idempotent 2.0", peers::idempotent),
    ("axum-idempotent 0.6", peers::axum_idempotent),
    ("cratestack-axum 0.8", peers::cratestack),
];

/// A session for each 50 keys, for the crate that needs them; all carry its cookie.
async fn sessions(app: &Router, count: u64) -> Vec<HeaderValue> {
    let mut cookies = Vec::new();
    for _ in 0..count.div_ceil(50) {
        let login = Request::get("/login").body(Body::empty()).unwrap();
        let answer = app.clone().oneshot(login).await.unwrap();
        let cookie = answer.headers().get(header::SET_COOKIE).cloned();
        let cookie = cookie.and_then(|cookie| Some(cookie.to_str().ok()?.split(';').next()?.to_owned()));
        let cookie = cookie.unwrap_or_else(|| format!("session={}", "s".repeat(22)));
        cookies.push(HeaderValue::try_from(cookie).unwrap());
    }
    cookies
}

fn with_cookie(mut request: Request<Body>, cookie: &HeaderValue) -> Request<Body> {
    request.headers_mut().insert(header::COOKIE, cookie.clone());
    request
}

/// Nanoseconds of each operation: of the whole process, since some do their work in tasks or threads of their own.
fn timed(runtime: &Runtime, work: impl Future<Output = ()>) -> f64 {
    runtime.block_on(async {
        let start = ProcessTime::now();
        work.await;
        start.elapsed().as_nanos() as f64 / OPERATIONS as f64
    })
}

struct Times {
    first: Vec<f64>,
    replay: Vec<f64>,
}

fn round(runtime: &Runtime, protect: Protect, body: &Bytes, times: &mut Times) {
    // Some stores start a task of their own.
    let mut app = runtime.block_on(async { protect(router()) });
    let cookies = runtime.block_on(sessions(&app, OPERATIONS));
    let cookie = |key: u64| &cookies[(key / 50) as usize];
    let ok = StatusCode::OK;
    times.first.push(timed(runtime, async {
        for key in 0..OPERATIONS {
            send(&mut app, with_cookie(request(key, body), cookie(key)), ok).await;
        }
    }));
    times.replay.push(timed(runtime, async {
        for _ in 0..OPERATIONS {
            send(&mut app, with_cookie(request(7, body), cookie(7)), ok).await;
        }
    }));
}

/// How often the handler runs when 64 clients send the same request at once.
fn runs(runtime: &Runtime, protect: Protect, body: &Bytes) -> usize {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let handler = move |_: Bytes| {
        let counted = Arc::clone(&counted);
        async move {
            counted.fetch_add(1, SeqCst);
            tokio::time::sleep(Duration::from_millis(50)).await;
            "done"
        }
    };
    runtime.block_on(async {
        let app = protect(Router::new().route("/payments", post(handler)));
        let cookie = sessions(&app, 1).await.remove(0);
        let duplicates = (0..64).map(|_| {
            let (mut app, request) = (app.clone(), with_cookie(request(1, body), &cookie));
            tokio::spawn(async move { app.call(request).await.map(|answer| answer.status()) })
        });
        join_all(duplicates).await;
    });
    runs.load(SeqCst)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let many = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let body = body();
    let mut times: Vec<Times> = CONTESTANTS
        .iter()
        .map(|_| Times {
            first: Vec::new(),
            replay: Vec::new(),
        })
        .collect();
    for _ in 0..ROUNDS {
        for ((_, protect), times) in CONTESTANTS.iter().zip(&mut times) {
            round(&runtime, *protect, &body, times);
        }
    }
    println!("CPU time of one request beside the bare router, {ROUNDS} rounds of {OPERATIONS}, medians");
    println!("  {:<22} {:>7} {:>7} {:>5}", "", "first", "replay", "runs");
    let mut groups = Vec::new();
    let (bare_first, bare_replay) = (times[0].first.clone(), times[0].replay.clone());
    for ((name, protect), times) in CONTESTANTS.iter().zip(times) {
        let ratio = |times: &[f64], bare: &[f64]| median(times.iter().zip(bare).map(|(time, bare)| time / bare).collect());
        let (first, replay) = (ratio(&times.first, &bare_first), ratio(&times.replay, &bare_replay));
        println!("  {name:<22} {first:>7.2} {replay:>7.2} {:>5}", runs(&many, *protect, &body));
        groups.push(((*name).to_owned(), vec![first, replay]));
    }
    if let Ok(path) = std::env::var("CHART") {
        svg::bars(&path, "CPU time of a request, bare router = 1", &["first", "replay"], &groups);
    }
}
