//! The store on a PostgreSQL server, beside prepared statements on a pool of the same size: a replay beside a `SELECT` by
//! primary key, a claim beside an `INSERT`, a cycle beside two `INSERT`s, of the same sizes, into a table with a primary
//! key and nothing else.
//!
//! With `fsync=off` the server is bound by its CPU. With `commit_delay` each flush of the log, which commits share, takes
//! a millisecond longer, while those that come meanwhile join it: the honest part of a disk whose sync takes that long,
//! and the same for store and floor.

use std::{fs, sync::atomic::Ordering::Relaxed, time::Duration};

use deadpool_postgres::Pool;
use tower_idempotency::{Begin, PostgresStore, Store};

use self::server::Postgres;
use crate::{
    Options,
    beside::Beside,
    work::{NEXT, claim, cycle, id, replay},
};

#[path = "../../tests/support/ports.rs"]
mod ports;
#[path = "../../tests/support/postgres.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod server;

const CONNECTIONS: usize = 16;
const DAY: Duration = Duration::from_secs(24 * 3600);
/// What a claim holds beside its id, and an answer of 1 KiB.
const PENDING: [u8; 100] = [b'x'; 100];
const COMPLETED: [u8; 1082] = [b'x'; 1082];
const TICKS_PER_SECOND: f64 = 100.0;

pub async fn measure(options: &Options) {
    if options.wants("postgres, room") {
        room().await;
    }
    for (name, settings) in [
        ("postgres, no fsync", &["fsync=off"][..]),
        ("postgres, fsync as it is", &["fsync=on"]),
        (
            "postgres, fsync of 1 ms more",
            &["fsync=on", "commit_delay=1000", "commit_siblings=0"],
        ),
    ] {
        if options.wants(name) {
            println!("\n== {name}: ratios of the store to prepared statements alone");
            beside(options, settings).await;
        }
    }
}

/// What a completed record with an answer of 1 KiB takes of the disk, indexes included.
async fn room() {
    const RECORDS: u64 = 20_000;
    let server = Postgres::start(&["autovacuum=off"]);
    let store = PostgresStore::builder().create_table(true).purge_every(None);
    let store = store.connect(&server.url()).await.unwrap();
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..RECORDS / 16 {
                    cycle(&store, DAY).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let size = async |sql: &str| server.ask::<i64>(sql).await as u64 / RECORDS;
    println!(
        "\n== postgres: {} bytes of the table and {} of its indexes for a completed record",
        size("SELECT pg_table_size('idempotency_records')").await,
        size("SELECT pg_indexes_size('idempotency_records')").await,
    );
}

/// Of all processes of the server.
fn server_cpu(server: &Postgres) -> f64 {
    let ticks = server.processes().into_iter().map(|id| {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        // The fields after the name, of which user and system time are the 12th and 13th.
        let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ').skip(11).take(2);
        fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>()
    });
    ticks.sum::<f64>() / TICKS_PER_SECOND
}

async fn insert(pool: &Pool, number: u64, bytes: &[u8]) {
    let connection = pool.get().await.unwrap();
    let sql = "INSERT INTO floor (id, answer) VALUES ($1, $2)";
    let statement = connection.prepare_cached(sql).await.unwrap();
    let id = id(number);
    connection
        .execute(&statement, &[&&id.as_bytes()[..], &bytes])
        .await
        .unwrap();
}

async fn select(pool: &Pool, number: u64) {
    let connection = pool.get().await.unwrap();
    let statement = connection
        .prepare_cached("SELECT answer FROM floor WHERE id = $1")
        .await
        .unwrap();
    let id = id(number);
    let row = connection.query_one(&statement, &[&&id.as_bytes()[..]]).await.unwrap();
    assert_eq!(row.get::<_, &[u8]>(0).len(), COMPLETED.len());
}

fn next() -> u64 {
    NEXT.fetch_add(1, Relaxed)
}

async fn beside(options: &Options, settings: &[&str]) {
    let settings = [
        settings,
        &["shared_buffers=256MB", "max_wal_size=4GB", "autovacuum=off"],
    ]
    .concat();
    let server = Postgres::start(&settings);
    server
        .say("CREATE TABLE floor (id bytea PRIMARY KEY, answer bytea)")
        .await;
    server
        .say("ALTER TABLE floor ALTER COLUMN answer SET STORAGE EXTERNAL")
        .await;
    let store = || PostgresStore::builder().create_table(true).max_connections(CONNECTIONS);
    let store = [
        store().connect(&server.url()).await.unwrap(),
        store().connect(&server.url()).await.unwrap(),
    ];
    let floor = server.pool(CONNECTIONS);
    let bench = Beside {
        server_cpu: async || server_cpu(&server),
        time: options.time,
    };
    Beside::<fn() -> std::future::Ready<f64>>::heading();
    let done = cycle(&store[0], DAY).await;
    let same = next();
    insert(&floor, same, &COMPLETED).await;
    for at_once in [1, 16, 64] {
        let plain = floor.clone();
        let look = move || {
            let plain = plain.clone();
            async move { select(&plain, same).await }
        };
        let own = store[0].clone();
        let again = move || {
            let own = own.clone();
            async move { replay(&own, &done).await }
        };
        bench.beside("replay / SELECT", at_once, look.clone(), again).await;
        // A record that this node hears of for the first time, each time.
        let first = NEXT.fetch_add(2000, Relaxed);
        fill(&server, first, 2000).await;
        let (own, turn) = (
            store[1].clone(),
            std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0)),
        );
        let elsewhere = move || {
            let (own, number) = (own.clone(), first + turn.fetch_add(1, Relaxed) % 2000);
            async move {
                let found = own.begin(&id(number), &claim()).await.unwrap();
                assert!(matches!(found, Begin::InProgress { .. }), "{found:?}");
            }
        };
        bench.beside("unexpected / SELECT", at_once, look, elsewhere).await;
        let (plain, own) = (floor.clone(), store[0].clone());
        let once = move || {
            let plain = plain.clone();
            async move { insert(&plain, next(), &PENDING).await }
        };
        let begin = move || {
            let own = own.clone();
            async move {
                let found = own.begin(&id(next()), &claim()).await.unwrap();
                assert!(matches!(found, Begin::Acquired(_)));
            }
        };
        bench.beside("claim / INSERT", at_once, once, begin).await;
        let (plain, own) = (floor.clone(), store[0].clone());
        let twice = move || {
            let plain = plain.clone();
            async move {
                insert(&plain, next(), &PENDING).await;
                insert(&plain, next(), &COMPLETED).await;
            }
        };
        let both = move || {
            let own = own.clone();
            async move {
                cycle(&own, DAY).await;
            }
        };
        bench
            .beside("claim and completion / 2 INSERT", at_once, twice, both)
            .await;
    }
}

/// Records in progress, which no node expects to be completed.
async fn fill(server: &Postgres, first: u64, count: u64) {
    let client = server.client().await;
    let sql = "INSERT INTO idempotency_records SELECT 1, now() + interval '1 day', now() + interval '1 day', \
               now() + interval '1 day', 0, NULL, 1, 'p', $1, '\\x00112233445566778899aabbccddeeff', sha256('x'), NULL";
    let statement = client.prepare(sql).await.unwrap();
    for number in first..first + count {
        let id = id(number);
        client.execute(&statement, &[&&id.as_bytes()[..]]).await.unwrap();
    }
}
