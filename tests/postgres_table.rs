//! The table of PostgreSQL's records: created once, under any name, and refused where it is another one.
#![cfg(feature = "postgres")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{error::Error, time::Duration};

use support::{
    postgres::{Postgres, table_in_parts},
    steps::{MINUTE, acquire, claim, complete, id, is_replay, kept},
};
use tower_idempotency::{Begin, PostgresStore, PostgresTable, Store, StoreError, StoreErrorKind};

/// The lock under which tables are created.
const CREATION: i64 = 0x1de3_9073_0c7a_b1e5;

fn reason(result: Result<(), StoreError>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Other);
    error.source().expect("a reason").to_string()
}

#[tokio::test]
async fn nodes_that_start_together_create_the_table_once() {
    create_together(&Postgres::start(&[])).await;
    create_together(&Postgres::start(&["default_transaction_isolation=serializable"])).await;
}

async fn create_together(server: &Postgres) {
    let table = PostgresTable::new("payments", "keys");
    // Who waits for its turn has seen by then that there was none.
    let mut first = server.client().await;
    let first = first.transaction().await.unwrap();
    let lock = format!("SELECT pg_advisory_xact_lock({CREATION})");
    first.batch_execute(&lock).await.unwrap();
    let creating = (0..8).map(|_| {
        let (pool, table) = (server.pool(1), table.clone());
        tokio::spawn(async move { table.create(&pool).await })
    });
    let creating: Vec<_> = creating.collect();
    let waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    while server.ask::<i64>(waiting).await < 8 {
        assert!(!creating.iter().any(tokio::task::JoinHandle::is_finished));
    }
    first.rollback().await.unwrap();
    for created in creating {
        created.await.unwrap().unwrap();
    }
    server
        .say("INSERT INTO payments.keys VALUES (1, now(), now(), now(), 0, 0, 0, 'p', '', '', '', '')")
        .await;
    table.create(&server.pool(1)).await.unwrap();
    assert_eq!(server.ask::<i64>("SELECT count(*) FROM payments.keys").await, 1);
}

#[tokio::test]
async fn any_name_is_a_table_and_none_is_anything_else() {
    let server = Postgres::start(&[]);
    let pool = server.pool(1);
    for (schema, name) in [
        ("public", "idempotency_records"),
        ("public", "Idempotency Records"),
        ("a \"quoted\" one", "x'); DROP TABLE y; --"),
        ("back\\slash", "ünïcode.table"),
        ("select", "table"),
        ("public", &"x".repeat(63)),
    ] {
        let table = PostgresTable::new(schema, name);
        table.create(&pool).await.unwrap();
        table.create(&pool).await.unwrap();
        let found: i64 = server
            .client()
            .await
            .query_one(
                "SELECT count(*) FROM pg_tables WHERE schemaname = $1 AND tablename = $2",
                &[&schema, &name],
            )
            .await
            .unwrap()
            .get(0);
        assert_eq!(found, 1, "{table}");
    }
}

#[tokio::test]
async fn the_printed_schema_is_the_one_that_is_created() {
    let server = Postgres::start(&[]);
    let (printed, created) = (PostgresTable::new("printed", "t"), PostgresTable::new("created", "t"));
    // As a migration tool does, in one transaction.
    server.say(&format!("BEGIN; {} COMMIT;", printed.sql())).await;
    printed.create(&server.pool(1)).await.unwrap();
    created.create(&server.pool(1)).await.unwrap();
    let shape = async |schema: &str| {
        let sql = format!(
            "SELECT string_agg(concat_ws(' ', attname, format_type(atttypid, atttypmod), attnotnull, attstorage), ', ' \
             ORDER BY attnum) || (SELECT string_agg(replace(indexdef, schemaname, ''), ', ' ORDER BY indexname) \
             FROM pg_indexes WHERE schemaname = '{schema}') || (SELECT reloptions::text FROM pg_class \
             WHERE oid = '{schema}.t'::regclass) FROM pg_attribute WHERE attrelid = '{schema}.t'::regclass AND attnum > 0"
        );
        server.ask::<String>(&sql).await
    };
    let shape_of_printed = shape("printed").await;
    assert_eq!(shape_of_printed, shape("created").await);
    for part in [
        "answer bytea f e",
        "id bytea t",
        "(purge_at)",
        "fillfactor=70",
        "vacuum_truncate=off",
    ] {
        assert!(shape_of_printed.contains(part), "{part}: {shape_of_printed}");
    }
}

#[tokio::test]
async fn a_newer_table_and_one_of_another_kind_are_refused_in_words() {
    let server = Postgres::start(&[]);
    let (table, pool) = (PostgresTable::default(), server.pool(1));
    server.say("CREATE TABLE idempotency_records (id int)").await;
    assert!(reason(table.create(&pool).await).contains("it is another table"));
    server
        .say("COMMENT ON TABLE idempotency_records IS 'tower-idempotency records, version 2'")
        .await;
    assert!(reason(table.create(&pool).await).contains("is of version 2, and this software knows 1"));
    server
        .say("COMMENT ON TABLE idempotency_records IS 'tower-idempotency records, version 0'")
        .await;
    assert!(reason(table.create(&pool).await).contains("migrate it"));
}

#[tokio::test]
async fn a_table_in_which_a_key_may_be_there_twice_is_refused_in_words() {
    let server = Postgres::start(&[]);
    PostgresTable::default().create(&server.pool(1)).await.unwrap();
    let connect = async || PostgresStore::connect(&server.url()).await.map(drop);
    connect().await.unwrap();
    for (made, by) in [
        ("", "no index"),
        (
            "CREATE INDEX own ON idempotency_records (id)",
            "an index that is not unique",
        ),
        (
            "CREATE UNIQUE INDEX own ON idempotency_records (id, owner)",
            "one over more than the id",
        ),
        (
            "CREATE UNIQUE INDEX own ON idempotency_records (id) WHERE state = 'c'",
            "one over some records",
        ),
        (
            "CREATE UNIQUE INDEX own ON idempotency_records (fence)",
            "one over another column",
        ),
    ] {
        let change = "ALTER TABLE idempotency_records DROP CONSTRAINT IF EXISTS idempotency_records_pkey; \
                      DROP INDEX IF EXISTS own";
        server.say(&format!("{change}; {made}")).await;
        assert!(reason(connect().await).contains("has no valid unique index"), "{by}");
    }
    server
        .say("DROP INDEX own; CREATE UNIQUE INDEX ON idempotency_records (id)")
        .await;
    connect().await.unwrap();
}

#[tokio::test]
async fn a_table_that_a_crash_empties_is_refused_where_a_forgetful_server_is() {
    let server = Postgres::start(&["fsync=on"]);
    PostgresTable::default().create(&server.pool(1)).await.unwrap();
    let connect = async || {
        let builder = PostgresStore::builder().refuse_forgetful_server(true);
        builder.connect(&server.url()).await.map(drop)
    };
    connect().await.unwrap();
    server.say("ALTER TABLE idempotency_records SET UNLOGGED").await;
    assert!(reason(connect().await).contains("is not logged"));
    PostgresStore::connect(&server.url()).await.unwrap();
}

#[tokio::test]
async fn in_a_table_of_several_parts_a_purge_removes_what_has_expired_and_nothing_else() {
    let server = Postgres::start(&[]);
    server.say(&table_in_parts()).await;
    let store = PostgresStore::builder().purge_every(None).timeout(MINUTE);
    let store = store.connect(&server.url()).await.unwrap();
    for number in 0..100 {
        let lease = acquire(&store, number).await;
        let kept_for = if number % 2 == 0 {
            Duration::from_micros(1)
        } else {
            MINUTE
        };
        store.complete(&lease, &kept(10), kept_for.into()).await.unwrap();
    }
    assert_eq!(store.purge().await.unwrap(), 50);
    for number in (0..100).filter(|number| number % 2 == 1) {
        let found = store.begin(&id(number), &claim()).await.unwrap();
        assert!(is_replay(&found, 10), "{number}");
    }
}

#[tokio::test]
async fn a_role_that_may_not_create_schemas_creates_its_table_in_one_that_is_there() {
    let server = Postgres::start(&[]);
    server
        .say("CREATE ROLE app LOGIN; CREATE SCHEMA own AUTHORIZATION app")
        .await;
    let url = server.url().replace("postgres@", "app@");
    let pool = support::postgres::pool(&url, 1);
    PostgresTable::new("own", "records").create(&pool).await.unwrap();
    let refused = reason(PostgresTable::new("other", "records").create(&pool).await);
    assert!(
        refused.contains("permission denied") || refused.contains("db error"),
        "{refused}"
    );
}

/// As where a migration was made one that may be run again.
#[tokio::test]
async fn what_makes_room_in_the_table_removes_no_record() {
    let server = Postgres::start(&[]);
    server
        .say("CREATE FUNCTION sha256(text) RETURNS text LANGUAGE sql AS 'SELECT $1'")
        .await;
    let table = PostgresTable::default();
    table.create(&server.pool(1)).await.unwrap();
    let pool = server.pool(1);
    let store = PostgresStore::builder().connect_pool(pool).await.unwrap();
    let lease = acquire(&store, 1).await;
    complete(&store, &acquire(&store, 2).await, 10).await;
    let sql = table.sql();
    let (from, to) = (sql.find("INSERT INTO").unwrap(), sql.find("COMMENT").unwrap());
    server.say(&sql[from..to]).await;
    assert_eq!(server.ask::<i64>("SELECT count(*) FROM idempotency_records").await, 2);
    complete(&store, &lease, 10).await;
}

/// The server plans by how large it believes a table to be, and each session keeps its plans until it is told otherwise.
#[tokio::test]
async fn a_table_that_was_empty_when_the_server_looked_at_it_is_read_by_its_indexes_all_the_same() {
    let server = Postgres::start(&["autovacuum=off"]);
    PostgresTable::default().create(&server.pool(1)).await.unwrap();
    server.say("VACUUM ANALYZE idempotency_records").await;
    let count = async |what: &str| {
        let sql = format!("SELECT {what} FROM pg_stat_user_tables WHERE relname = 'idempotency_records'");
        server.ask::<i64>(&sql).await
    };
    let (scans, rows) = (count("seq_scan").await, count("n_tup_ins").await);
    let pool = server.pool(1);
    let store = PostgresStore::builder().connect_pool(pool.clone()).await.unwrap();
    // A plan that is kept comes after five that are not.
    for number in 0..20 {
        let lease = acquire(&store, number).await;
        store.renew(&lease, MINUTE).await.unwrap();
        complete(&store, &lease, 10).await;
        assert!(is_replay(&store.begin(&id(number), &claim()).await.unwrap(), 10));
        let elsewhere = PostgresStore::builder().connect_pool(pool.clone()).await.unwrap();
        assert!(is_replay(&elsewhere.begin(&id(number), &claim()).await.unwrap(), 10));
        let lease = acquire(&store, 100 + number).await;
        store.abandon(&lease).await.unwrap();
        let lost = claim().taking_over(lease);
        let Ok(Begin::Acquired(lease)) = store.begin(&id(100 + number), &lost).await else {
            panic!("it was lost");
        };
        store.release(&lease).await.unwrap();
    }
    drop(store);
    // What a session has done it tells at its end at the latest.
    pool.close();
    while count("n_tup_ins").await < rows + 40 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(count("seq_scan").await, scans);
}

#[test]
fn a_name_that_no_table_can_have_is_a_mistake() {
    for name in [String::new(), "x".repeat(64), "nul\0".to_owned()] {
        assert!(std::panic::catch_unwind(|| PostgresTable::new("public", name)).is_err());
    }
}
