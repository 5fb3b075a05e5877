//! Over HTTP on loopback: the same server without the layer and with it, by turns, under `wrk` (which has to be installed).
//!
//! `cargo bench --bench http`. Requests per second and the 99th percentile, each as a ratio to the server without the layer
//! in the same round. The clients take their part of the same processors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../overhead/service.rs"]
mod service;

use std::{fs, process::Command};

use axum::Router;
use tokio::runtime::Runtime;
use tower_idempotency::{IdempotencyLayer, MemoryStore};

use self::service::router;

const ROUNDS: usize = 5;

/// `KEY` is what a request's key is made of.
const SCRIPT: &str = r#"
local thread = 0
function setup(one) one:set("id", thread) thread = thread + 1 end
function init(args) n = 0 run = args[1] end
function request()
  n = n + 1
  return wrk.format("POST", "/payments", {
    ["content-type"] = "application/octet-stream", ["authorization"] = "Basic YWNjb3VudDpzZWNyZXQ=",
    ["idempotency-key"] = KEY }, string.rep("i", 1024))
end
function done(summary, latency, requests)
  local failed = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout
  io.write(string.format("result %f %f %d\n", summary.requests / summary.duration * 1e6, latency:percentile(99), failed))
end
"#;

fn serve(runtime: &Runtime, app: Router) -> String {
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move { axum::serve(listener, app).await });
    format!("http://{address}/payments")
}

/// Requests per second, and the 99th percentile in microseconds.
fn wrk(url: &str, script: &std::path::Path, run: usize) -> (f64, f64) {
    let output = Command::new("wrk")
        .args(["--threads=1", "--connections=16", "--duration=2s", "--script"])
        .arg(script)
        .args([url, "--", &run.to_string()])
        .output()
        .expect("`wrk` is installed (apt-get install wrk)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let result = text.lines().find_map(|line| line.strip_prefix("result "));
    let numbers: Vec<f64> = result
        .unwrap_or_else(|| panic!("{text}"))
        .split(' ')
        .map(|n| n.parse().unwrap())
        .collect();
    assert_eq!(numbers[2], 0.0, "requests failed");
    (numbers[0], numbers[1])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let script = |name: &str, key: &str| {
        let path = directory.path().join(name);
        fs::write(&path, SCRIPT.replace("KEY", key)).unwrap();
        path
    };
    let fresh = script("fresh.lua", r#"run .. "-" .. id .. "-" .. n"#);
    let same = script("same.lua", r#""always-the-same-key-0000000000000000""#);
    let bare = serve(&runtime, router());
    let layer = IdempotencyLayer::new(MemoryStore::builder().max_bytes(u64::MAX).build());
    let protected = serve(&runtime, router().layer(layer));
    let (mut first, mut replay) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let floor = wrk(&bare, &fresh, round);
        for (times, script) in [(&mut first, &fresh), (&mut replay, &same)] {
            let (rate, p99) = wrk(&protected, script, round);
            times.push((rate / floor.0, p99 / floor.1));
        }
    }
    println!("over HTTP beside the same server without the layer, {ROUNDS} rounds, medians");
    println!("  {:<8} {:>12} {:>6}", "", "requests/s", "p99");
    for (name, times) in [("first", first), ("replay", replay)] {
        let (rates, p99s): (Vec<f64>, Vec<f64>) = times.into_iter().unzip();
        println!("  {name:<8} {:>12.2} {:>6.2}", median(rates), median(p99s));
    }
}
