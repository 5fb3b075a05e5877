//! What the number of keys costs. Each size has a process of its own: in one process each store would be measured with
//! the caches and the allocator's free memory that the other sizes left behind.

use std::{
    env::{current_exe, var},
    process::Command,
    time::Duration,
};

use axum::Router;
use bytes::Bytes;
use cpu_time::ThreadTime;
use http::StatusCode;
use tokio::{runtime::Runtime, time::advance};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

use super::{
    OPERATIONS, ROUNDS, large, median,
    service::{request, router, send},
    svg,
};

const SIZES: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];
/// How often each size is measured, by turns.
const TURNS: usize = 5;
/// Operations that are timed together: reading the clock for each would be a part of what is measured.
const BLOCK: u64 = 50;
const RETENTION: Duration = Duration::from_secs(1_000_000);

/// The argument by which a process is told its size.
pub const ONE_SIZE: &str = "--keys=";

/// What a process prints, in this order, all in nanoseconds.
#[derive(Debug)]
struct Measured {
    first: f64,
    replay: f64,
    under_expiry: Tail,
    growing: Tail,
}

/// Of requests by themselves: the longest but one in a thousand, and the longest.
#[derive(Debug)]
struct Tail {
    p999: f64,
    longest: f64,
}

impl Tail {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        Self {
            p999: times[times.len() - 1 - times.len() / 1000],
            longest: times[times.len() - 1],
        }
    }
}

struct Store {
    store: MemoryStore,
    app: Router,
    keys: u64,
    resident: u64,
    state: u64,
}

impl Store {
    /// Filled evenly over a retention, and from then on one key expires for each that comes. With the time that each
    /// request took.
    async fn filled(resident: u64, body: &Bytes) -> (Self, Vec<f64>) {
        let store = large();
        let layer = IdempotencyLayer::new(store.clone()).retention(RETENTION);
        let mut filled = Self {
            app: router().layer(layer),
            store,
            keys: 0,
            resident,
            state: 1,
        };
        let mut growth = Vec::new();
        for _ in 0..resident {
            growth.push(filled.first(body).await);
        }
        (filled, growth)
    }

    /// One new key by itself, and the time until the next one; how many nanoseconds it took.
    async fn first(&mut self, body: &Bytes) -> f64 {
        let request = request(self.keys, body);
        self.keys += 1;
        let start = ThreadTime::now();
        send(&mut self.app, request, StatusCode::OK).await;
        let time = start.elapsed().as_nanos() as f64;
        self.time_passes(1).await;
        time
    }

    /// How many nanoseconds each of many new keys took, building their requests included, while as many expire.
    async fn firsts(&mut self, body: &Bytes) -> f64 {
        let mut all = 0.0;
        for _ in 0..OPERATIONS / BLOCK {
            let block: Vec<_> = (self.keys..self.keys + BLOCK).collect();
            self.keys += BLOCK;
            all += self.block(&block, body).await;
            self.time_passes(BLOCK).await;
        }
        all / OPERATIONS as f64
    }

    /// Likewise, replays of the younger half, while nothing expires.
    async fn replays(&mut self, body: &Bytes) -> f64 {
        let mut all = 0.0;
        for _ in 0..OPERATIONS / BLOCK {
            let block: Vec<_> = (0..BLOCK).map(|_| self.younger()).collect();
            all += self.block(&block, body).await;
        }
        all / OPERATIONS as f64
    }

    fn younger(&mut self) -> u64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.keys - 1 - (self.state >> 20) % (self.resident / 2)
    }

    async fn block(&mut self, keys: &[u64], body: &Bytes) -> f64 {
        let start = ThreadTime::now();
        for key in keys {
            send(&mut self.app, request(*key, body), StatusCode::OK).await;
        }
        start.elapsed().as_nanos() as f64
    }

    /// Until so many keys have expired.
    async fn time_passes(&self, keys: u64) {
        advance(RETENTION / self.resident as u32 * keys as u32).await;
    }
}

/// Measures one size and prints it.
pub fn one_size(runtime: &Runtime, size: u64, body: &Bytes) {
    let measured = runtime.block_on(async {
        let (mut store, growth) = Store::filled(size, body).await;
        let (mut firsts, mut replays, mut alone) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let (first, replay) = (store.firsts(body).await, store.replays(body).await);
            // The first round warms up.
            if round > 0 {
                firsts.push(first);
                replays.push(replay);
            }
        }
        for _ in 0..OPERATIONS * ROUNDS as u64 {
            alone.push(store.first(body).await);
        }
        let (held, most) = (store.store.len(), size + 64 * 4);
        assert!(held <= most, "{held} records are held where {most} are alive");
        Measured {
            first: median(firsts),
            replay: median(replays),
            under_expiry: Tail::of(alone),
            growing: Tail::of(growth),
        }
    });
    let Measured {
        first,
        replay,
        under_expiry,
        growing,
    } = measured;
    let Tail { p999, longest } = under_expiry;
    println!("{first} {replay} {p999} {longest} {} {}", growing.p999, growing.longest);
}

/// The same, in a process of its own.
fn measure(size: u64) -> Measured {
    let output = Command::new(current_exe().unwrap())
        .arg(format!("{ONE_SIZE}{size}"))
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let numbers: Vec<f64> = printed
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    assert!(
        output.status.success(),
        "the process of {size} keys: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let [first, replay, expiry_p999, expiry_longest, growth_p999, growth_longest] =
        numbers.try_into().expect("six numbers");
    Measured {
        first,
        replay,
        under_expiry: Tail {
            p999: expiry_p999,
            longest: expiry_longest,
        },
        growing: Tail {
            p999: growth_p999,
            longest: growth_longest,
        },
    }
}

pub fn by_keys() {
    let turns: Vec<[Measured; SIZES.len()]> = (0..TURNS).map(|_| SIZES.map(measure)).collect();
    println!("cost by resident keys, beside 1,000; each first request expires another key");
    println!("  {:>10} {:>8} {:>8}", "keys", "first", "replay");
    let over_turns = |value: &dyn Fn(&[Measured; SIZES.len()]) -> f64| median(turns.iter().map(value).collect());
    let mut groups = Vec::new();
    for (index, size) in SIZES.iter().enumerate() {
        let first = over_turns(&|turn| turn[index].first / turn[0].first);
        let replay = over_turns(&|turn| turn[index].replay / turn[0].replay);
        println!("  {size:>10} {first:>8.2} {replay:>8.2}");
        groups.push((format!("{size} keys"), vec![first, replay]));
    }
    println!();
    let print_tail = |when: &str, tail: &dyn Fn(&Measured) -> &Tail| {
        let p999 = over_turns(&|turn| tail(&turn[SIZES.len() - 1]).p999 / 1e3);
        let longest = over_turns(&|turn| tail(&turn[SIZES.len() - 1]).longest / 1e3);
        println!("first requests {when}: p99.9 {p999:.0} µs, longest {longest:.0} µs");
    };
    print_tail("under steady expiry, 1,000,000 keys", &|measured| {
        &measured.under_expiry
    });
    print_tail("while the map grows to 1,000,000", &|measured| &measured.growing);
    if let Ok(path) = var("CHART") {
        let title = "Cost of a request by resident keys, 1,000 keys = 1";
        svg::bars(&path, title, &["first", "replay"], &groups);
    }
}
