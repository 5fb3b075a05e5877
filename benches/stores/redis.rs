//! The store on a Redis server, beside the plain commands on a connection of the same kind: a replay beside `GET`, a claim
//! beside `SET`, a cycle beside two `SET`s, of the same sizes.
//!
//! Each figure is the median of ratios, each within one round of floor and store by turns: neighbours on the machine
//! disturb both. CPU is the server's own, and this process's.

use std::{
    future::Future,
    io::{BufRead, BufReader},
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cpu_time::ProcessTime;
use redis::{Cmd, Value, aio::MultiplexedConnection};
use tower_idempotency::{Begin, RedisStore, Store};

use crate::{
    Options,
    work::{NEXT, claim, cycle, id, replay},
};

/// Of floor and store by turns.
const ROUNDS: u32 = 12;
const DAY: Duration = Duration::from_secs(24 * 3600);

struct Server {
    process: Child,
    url: String,
}

impl Server {
    fn start() -> Self {
        let port = TcpListener::bind(("127.0.0.1", 0))
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let mut process = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", ""])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the package redis-server is installed");
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("Ready to accept connections")));
        Self {
            process,
            url: format!("redis://127.0.0.1:{port}"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[derive(Clone, Copy)]
struct Figures {
    rate: f64,
    latency: f64,
    server_cpu: f64,
    client_cpu: f64,
}

async fn server_cpu(connection: &mut MultiplexedConnection) -> f64 {
    let info: String = redis::cmd("INFO").arg("cpu").query_async(connection).await.unwrap();
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().parse::<f64>().unwrap()
    };
    field("used_cpu_sys:") + field("used_cpu_user:")
}

/// So many at once, for this long.
async fn measure_one<F: Future<Output = ()> + Send>(
    connection: &mut MultiplexedConnection,
    at_once: usize,
    time: Duration,
    step: impl Fn() -> F + Clone + Send + 'static,
) -> Figures {
    let server = server_cpu(connection).await;
    let (start, client) = (Instant::now(), ProcessTime::now());
    let tasks: Vec<_> = (0..at_once)
        .map(|_| {
            let step = step.clone();
            tokio::spawn(async move {
                let mut took = Vec::new();
                while start.elapsed() < time {
                    let start = Instant::now();
                    step().await;
                    took.push(start.elapsed());
                }
                took
            })
        })
        .collect();
    let mut took = Vec::new();
    for task in tasks {
        took.extend(task.await.unwrap());
    }
    let (elapsed, client) = (start.elapsed(), client.elapsed());
    let server = server_cpu(connection).await - server;
    took.sort();
    let count = took.len() as f64;
    Figures {
        rate: count / elapsed.as_secs_f64(),
        latency: took[took.len() / 2].as_secs_f64(),
        server_cpu: server / count,
        client_cpu: client.as_secs_f64() / count,
    }
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

struct Bench {
    connection: MultiplexedConnection,
    time: Duration,
}

impl Bench {
    /// A store's step beside its floor.
    async fn beside<F, S>(
        &mut self,
        name: &str,
        at_once: usize,
        floor: impl Fn() -> F + Clone + Send + 'static,
        step: impl Fn() -> S + Clone + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
        S: Future<Output = ()> + Send + 'static,
    {
        let slice = self.time / ROUNDS;
        let mut rounds = Vec::new();
        for round in 0..ROUNDS {
            // Who comes first takes turns, too.
            let connection = &mut self.connection;
            rounds.push(if round % 2 == 0 {
                let floor = measure_one(connection, at_once, slice, floor.clone()).await;
                (floor, measure_one(connection, at_once, slice, step.clone()).await)
            } else {
                let step = measure_one(connection, at_once, slice, step.clone()).await;
                (measure_one(connection, at_once, slice, floor.clone()).await, step)
            });
        }
        let ratio = |of: fn(&Figures) -> f64| median(rounds.iter().map(|(floor, step)| of(step) / of(floor)).collect());
        let rate = median(rounds.iter().map(|(_, step)| step.rate).collect());
        let latency = median(rounds.iter().map(|(_, step)| step.latency).collect());
        println!(
            "{name:28} {at_once:4} {rate:9.0} {:>10} {:8.2} {:8.2} {:8.2} {:8.2}",
            format!("{:.1?}", Duration::from_secs_f64(latency)),
            ratio(|figures| figures.rate),
            ratio(|figures| figures.latency),
            ratio(|figures| figures.server_cpu),
            ratio(|figures| figures.client_cpu),
        );
    }
}

/// As long as a record's.
fn key(number: u64) -> String {
    format!("idempotency:{}", id(number).to_hex())
}

async fn say(connection: &MultiplexedConnection, command: Cmd) {
    let mut connection = connection.clone();
    let answer = connection.send_packed_command(&command).await.unwrap();
    assert!(!matches!(answer, Value::ServerError(_)), "{answer:?}");
}

fn set(key: &str, length: usize) -> Cmd {
    redis::cmd("SET").arg(key).arg(vec![b'x'; length]).clone()
}

/// What a claim and a completed record of 1 KiB are long.
const PENDING: usize = 71;
const COMPLETED: usize = 1155;

pub async fn measure(options: &Options) {
    if !options.wants("redis") {
        return;
    }
    println!("\n== redis: ratios of the store to the commands alone");
    println!("step                      at once    steps/s        p50     rate  latency  srv CPU  own CPU");
    let server = Server::start();
    let client = redis::Client::open(server.url.as_str()).unwrap();
    let store = RedisStore::connect(&server.url).await.unwrap();
    let connection = || async { client.get_multiplexed_async_connection().await.unwrap() };
    let floor = connection().await;
    let mut bench = Bench {
        connection: connection().await,
        time: options.time,
    };
    let done = cycle(&store, DAY).await;
    say(&floor, set("done", COMPLETED)).await;
    for at_once in [1, 16, 64, 256] {
        let (plain, own) = (floor.clone(), store.clone());
        let get = move || {
            let plain = plain.clone();
            async move { say(&plain, redis::cmd("GET").arg("done").clone()).await }
        };
        let look = move || {
            let own = own.clone();
            async move { replay(&own, &done).await }
        };
        bench.beside("replay / GET", at_once, get.clone(), look).await;
        let own = store.clone();
        let look = move || {
            let own = own.clone();
            async move {
                let found = own.begin(&done, &claim().asking_for_remaining()).await.unwrap();
                assert!(matches!(found, Begin::Completed { remaining: Some(_), .. }));
            }
        };
        bench.beside("replay with its end / GET", at_once, get, look).await;
        let (plain, own) = (floor.clone(), store.clone());
        let once = move || {
            let plain = plain.clone();
            async move { say(&plain, set(&key(next()), PENDING)).await }
        };
        let begin = move || {
            let own = own.clone();
            async move {
                let found = own.begin(&id(next()), &claim()).await.unwrap();
                assert!(matches!(found, Begin::Acquired(_)));
            }
        };
        bench.beside("claim / SET", at_once, once, begin).await;
        let (plain, own) = (floor.clone(), store.clone());
        let twice = move || {
            let plain = plain.clone();
            async move {
                let key = key(next());
                say(&plain, set(&key, PENDING)).await;
                say(&plain, set(&key, COMPLETED)).await;
            }
        };
        let cycle = move || {
            let own = own.clone();
            async move {
                cycle(&own, DAY).await;
            }
        };
        bench
            .beside("claim and completion / 2 SET", at_once, twice, cycle)
            .await;
        say(&floor, redis::cmd("FLUSHALL")).await;
        say(&floor, set("done", COMPLETED)).await;
        replay_again(&store, &done).await;
    }
}

fn next() -> u64 {
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// The record of the replays, after all were removed.
async fn replay_again(store: &RedisStore, done: &tower_idempotency::RecordId) {
    let Begin::Acquired(lease) = store.begin(done, &claim()).await.unwrap() else {
        panic!("it was removed");
    };
    let answer = crate::work::answer();
    store.complete(&lease, &answer, DAY.into()).await.unwrap();
}
