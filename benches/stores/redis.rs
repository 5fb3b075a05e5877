//! The store on a Redis server, beside the plain commands on a connection of the same kind: a replay beside `GET`, a claim
//! beside `SET`, a cycle beside two `SET`s, of the same sizes. `REDIS_SERVER` names another server, such as `valkey-server`.

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use redis::{AsyncConnectionConfig, Cmd, Value, aio::MultiplexedConnection};
use tower_idempotency::{Begin, RedisStore, Store};

use crate::{
    Options,
    beside::Beside,
    work::{NEXT, claim, cycle, id, replay},
};

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
        let program = std::env::var_os("REDIS_SERVER").unwrap_or_else(|| "redis-server".into());
        let mut process = Command::new(program)
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

async fn server_cpu(connection: &mut MultiplexedConnection) -> f64 {
    let info: String = redis::cmd("INFO").arg("cpu").query_async(connection).await.unwrap();
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().parse::<f64>().unwrap()
    };
    field("used_cpu_sys:") + field("used_cpu_user:")
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
    Beside::<fn() -> std::future::Ready<f64>>::heading();
    let server = Server::start();
    let client = redis::Client::open(server.url.as_str()).unwrap();
    // Neither is to give up where the machine is busy with something else.
    let patient = RedisStore::builder().timeout(Duration::from_secs(30));
    let store = patient.connect(&server.url).await.unwrap();
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    let connection = || async {
        let connection = client.get_multiplexed_async_connection_with_config(&config).await;
        connection.unwrap()
    };
    let floor = connection().await;
    let asked = connection().await;
    let bench = Beside {
        server_cpu: async || server_cpu(&mut asked.clone()).await,
        time: options.time,
    };
    let done = cycle(&store, DAY).await;
    say(&floor, set(&key(u64::MAX), COMPLETED)).await;
    for at_once in [1, 16, 64, 256] {
        let (plain, own) = (floor.clone(), store.clone());
        let kept = key(u64::MAX);
        let get = move || {
            let (plain, get) = (plain.clone(), redis::cmd("GET").arg(&kept).clone());
            async move { say(&plain, get).await }
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
        bench.beside("claim / SET", at_once, once.clone(), begin).await;
        // What every record costs that ends.
        let plain = floor.clone();
        let ending = move || {
            let plain = plain.clone();
            async move {
                let mut set = set(&key(next()), PENDING);
                set.arg("PX").arg(DAY.as_millis() as u64);
                say(&plain, set).await;
            }
        };
        bench.beside("SET PX / SET", at_once, once.clone(), ending).await;
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
        say(&floor, set(&key(u64::MAX), COMPLETED)).await;
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
