//! What exactly once costs: a business transaction (two updates and an insert) in a handler of its own, and the same
//! handler in the layer's transaction, by turns; with tokio-postgres and with sqlx.
//!
//! `cargo bench --bench transactions --features sqlx`. `--seconds N` for each figure [6].
//!
//! Each figure is the median of ratios, each within one round: neighbours on the machine disturb both, and CPU time the
//! least. The server runs
//! without fsync, where all is CPU; with it, as the disk is; and with one that takes a millisecond, by a library that is
//! loaded before the system's. How often a transaction syncs is counted apart, over a fixed number of them one after the
//! other: the server's processes tell their counts late, but for those that end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/support/ports.rs"]
mod ports;
#[path = "../tests/support/postgres.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod postgres;

use std::{
    process::Command,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::State, http::Request, routing::post};
use deadpool_postgres::{GenericClient, Pool};
use sqlx::PgPool;
use tokio_postgres::Error;
use tower::ServiceExt;
use tower_idempotency::{
    Guarantee, IdempotencyLayer, PostgresStore, PostgresTable, PostgresTransaction, SqlxTransaction,
};

use crate::postgres::Postgres;

const ROUNDS: u32 = 12;
const ACCOUNTS: u64 = 10_000;
const ADD: &str = "UPDATE accounts SET balance = balance + $2 WHERE id = $1";
const BOOK: &str = "INSERT INTO transfers (source, target) VALUES ($1, $2)";
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Two accounts that hardly anybody else has at the same time.
fn accounts() -> (i64, i64) {
    let number = NEXT.fetch_add(1, Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    let (low, high) = (number % ACCOUNTS, (number / ACCOUNTS) % ACCOUNTS);
    (low.min(high).cast_signed(), low.max(high).cast_signed() + 1)
}

/// What the answer is like: 1 KiB.
fn answer() -> String {
    "x".repeat(1024)
}

async fn business(client: &impl GenericClient) -> Result<(), Error> {
    let (from, to) = accounts();
    let add = client.prepare_cached(ADD).await?;
    client.execute(&add, &[&from, &-5_i64]).await?;
    client.execute(&add, &[&to, &5_i64]).await?;
    let book = client.prepare_cached(BOOK).await?;
    client.execute(&book, &[&from, &to]).await?;
    Ok(())
}

async fn alone(State(pool): State<Pool>) -> String {
    let mut client = pool.get().await.unwrap();
    let transaction = client.transaction().await.unwrap();
    business(&transaction).await.unwrap();
    transaction.commit().await.unwrap();
    answer()
}

async fn in_ours(transaction: PostgresTransaction) -> String {
    business(&*transaction).await.unwrap();
    answer()
}

async fn business_sqlx(connection: &mut sqlx::PgConnection) {
    let (from, to) = accounts();
    for (account, amount) in [(from, -5_i64), (to, 5)] {
        let add = sqlx::query(ADD).bind(account).bind(amount);
        add.execute(&mut *connection).await.unwrap();
    }
    sqlx::query(BOOK)
        .bind(from)
        .bind(to)
        .execute(&mut *connection)
        .await
        .unwrap();
}

async fn alone_sqlx(State(pool): State<PgPool>) -> String {
    let mut transaction = pool.begin().await.unwrap();
    business_sqlx(&mut transaction).await;
    transaction.commit().await.unwrap();
    answer()
}

async fn in_ours_sqlx(mut transaction: SqlxTransaction) -> String {
    business_sqlx(&mut transaction).await;
    answer()
}

#[derive(Clone, Copy)]
struct Figures {
    rate: f64,
    latency: f64,
    /// Of this process and of the server's, for each transaction.
    cpu: f64,
}

/// Ticks, of which there are a hundred in a second.
fn cpu(server: &Postgres) -> u64 {
    let of = |process: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ').skip(11).take(2);
        fields.filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>()
    };
    of(std::process::id()) + server.processes().into_iter().map(of).sum::<u64>()
}

/// So many at once, for this long.
async fn measure(app: &Router, server: &Postgres, at_once: usize, time: Duration) -> Figures {
    let ticks = cpu(server);
    let start = Instant::now();
    let tasks: Vec<_> = (0..at_once)
        .map(|_| {
            let app = app.clone();
            tokio::spawn(async move {
                let mut took = Vec::new();
                while start.elapsed() < time {
                    let start = Instant::now();
                    ask(&app).await;
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
    let elapsed = start.elapsed();
    took.sort();
    let count = took.len() as f64;
    Figures {
        rate: count / elapsed.as_secs_f64(),
        latency: took[took.len() / 2].as_secs_f64() * 1e6,
        cpu: (cpu(server) - ticks) as f64 * 1e4 / count,
    }
}

async fn ask(app: &Router) {
    let key = NEXT.fetch_add(1, Relaxed).to_string();
    let request = Request::post("/").header("idempotency-key", key);
    let request = request.body(Body::from("{}")).unwrap();
    let response = app.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), 200);
}

const COUNTED: u32 = 300;

/// How often the log is synced for one transaction.
async fn syncs(app: &Router, server: &Postgres) -> f64 {
    server.say("SELECT pg_switch_wal()").await;
    let before = count_syncs(server).await;
    for _ in 0..COUNTED {
        ask(app).await;
    }
    (count_syncs(server).await - before) as f64 / f64::from(COUNTED)
}

async fn count_syncs(server: &Postgres) -> i64 {
    let client = server.client().await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
               WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    while client.query_one(end, &[]).await.unwrap().get::<_, i64>(0) > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let count = client.query_one("SELECT wal_sync FROM pg_stat_wal", &[]).await.unwrap();
    count.get(0)
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

async fn beside(name: &str, server: &Postgres, floor: &Router, ours: &Router, time: Duration) {
    for at_once in [1, 16] {
        // Connections and plans are there.
        measure(floor, server, at_once, time / ROUNDS).await;
        measure(ours, server, at_once, time / ROUNDS).await;
        let mut rounds = Vec::new();
        for round in 0..ROUNDS {
            // Who comes first takes turns, too.
            let (first, second) = if round % 2 == 0 { (floor, ours) } else { (ours, floor) };
            let first = measure(first, server, at_once, time / ROUNDS).await;
            let second = measure(second, server, at_once, time / ROUNDS).await;
            rounds.push(if round % 2 == 0 {
                (first, second)
            } else {
                (second, first)
            });
        }
        let of = |figure: &dyn Fn(&(Figures, Figures)) -> f64| median(rounds.iter().map(figure).collect());
        println!(
            "{name:34} {at_once:2} at once: {:7.0} µs, ours {:7.0} µs ({:4.2} x); {:6.0}/s, ours {:6.0}/s ({:4.2} x); \
             CPU {:6.0} µs, ours {:6.0} µs ({:4.2} x)",
            of(&|(floor, _)| floor.latency),
            of(&|(_, ours)| ours.latency),
            of(&|(floor, ours)| ours.latency / floor.latency),
            of(&|(floor, _)| floor.rate),
            of(&|(_, ours)| ours.rate),
            of(&|(floor, ours)| floor.rate / ours.rate),
            of(&|(floor, _)| floor.cpu),
            of(&|(_, ours)| ours.cpu),
            of(&|(floor, ours)| ours.cpu / floor.cpu),
        );
    }
    let (floor, ours) = (syncs(floor, server).await, syncs(ours, server).await);
    println!("{name:34} syncs for each: {floor:5.3}, ours {ours:5.3}");
}

async fn run(name: &str, fsync: &str, time: Duration) {
    let quiet = [
        "autovacuum=off",
        "checkpoint_timeout=1h",
        "max_wal_size=8GB",
        "wal_writer_delay=10s",
    ];
    let settings: Vec<_> = [fsync, "shared_buffers=128MB"].into_iter().chain(quiet).collect();
    let server = Postgres::start(&settings);
    let pool = server.pool(20);
    let tables = format!(
        "CREATE TABLE accounts (id bigint PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 70);
         INSERT INTO accounts SELECT id, 0 FROM generate_series(0, {ACCOUNTS}) AS id;
         CREATE TABLE transfers (id bigserial PRIMARY KEY, source bigint NOT NULL, target bigint NOT NULL)"
    );
    server.say(&tables).await;
    PostgresTable::default().create(&pool).await.unwrap();
    let sqlx_pool = sqlx::postgres::PgPoolOptions::new()
        .max_connections(20)
        .connect(&server.url())
        .await
        .unwrap();
    let store = PostgresStore::builder()
        .purge_every(None)
        .connect_pool(pool.clone())
        .await
        .unwrap();
    let layer = |store| {
        IdempotencyLayer::new(store)
            .guarantee(Guarantee::Transactional)
            .require_key()
    };
    let floor = Router::new().route("/", post(alone)).with_state(pool);
    let ours = Router::new().route("/", post(in_ours)).layer(layer(store.clone()));
    beside(&format!("{name}, tokio-postgres"), &server, &floor, &ours, time).await;
    let floor = Router::new().route("/", post(alone_sqlx)).with_state(sqlx_pool.clone());
    let ours = Router::new()
        .route("/", post(in_ours_sqlx))
        .layer(layer(store.with_sqlx(sqlx_pool)));
    beside(&format!("{name}, sqlx"), &server, &floor, &ours, time).await;
}

const SLOW: &str =
    "#include <unistd.h>\nint fdatasync(int f) { usleep(1000); return 0; }\nint fsync(int f) { return 0; }\n";

fn main() {
    let mut seconds = 6.0;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--seconds" {
            seconds = arguments.next().unwrap().parse().unwrap();
        }
    }
    let time = Duration::from_secs_f64(seconds);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if std::env::var_os("LD_PRELOAD").is_some() {
        runtime.block_on(run("fsync of 1 ms", "fsync=on", time));
        return;
    }
    runtime.block_on(run("no fsync", "fsync=off", time));
    runtime.block_on(run("fsync as it is", "fsync=on", time));
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("slow.c"), folder.path().join("slow.so"));
    std::fs::write(&source, SLOW).unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status();
    assert!(compiled.unwrap().success(), "a C compiler");
    // The server may be another user's.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).unwrap();
    let again = Command::new(std::env::current_exe().unwrap())
        .args(["--seconds", &seconds.to_string()])
        .env("LD_PRELOAD", &library)
        .status();
    assert!(again.unwrap().success());
}
