//! The PostgreSQL store's contract and own promises, on servers of the tests' own.
#![cfg(all(feature = "postgres", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
    time::Duration,
};

use support::postgres::Postgres;
use tower_idempotency::{
    Begin, Claim, Fingerprint, Lease, Owner, PostgresStore, PostgresStoreBuilder, PostgresTable, RecordId, Retention,
    Store, StoreErrorKind, StoredResponse,
    testing::{self, Subject},
};

const MINUTE: Duration = Duration::from_secs(60);

fn claim() -> Claim {
    let fingerprint = Fingerprint::new(1, [1; 32]);
    Claim::new(fingerprint, Owner::random().unwrap(), MINUTE, MINUTE.into())
}

fn id(number: u8) -> RecordId {
    RecordId::from_bytes([number; 32])
}

/// An answer that is kept, of so many bytes.
fn kept(length: usize) -> StoredResponse {
    let mut bytes = vec![1, 0, 201, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes.extend((length as u64).to_le_bytes());
    bytes.resize(bytes.len() + length, b'x');
    StoredResponse::from_bytes(bytes.into()).unwrap()
}

async fn acquire(store: &PostgresStore, number: u8) -> Lease {
    match store.begin(&id(number), &claim()).await {
        Ok(Begin::Acquired(lease)) => lease,
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

async fn look(store: &PostgresStore, number: u8) -> Begin {
    store.begin(&id(number), &claim()).await.unwrap()
}

/// A store that removes nothing by itself.
fn builder() -> PostgresStoreBuilder {
    PostgresStore::builder()
        .create_table(true)
        .purge_every(None)
        .timeout(MINUTE)
}

async fn connected(server: &Postgres) -> PostgresStore {
    builder().connect(&server.url()).await.unwrap()
}

/// Whether it is ready when it is polled once.
async fn is_ready(future: Pin<&mut impl Future<Output = ()>>) -> bool {
    let mut future = future;
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await
}

struct Real {
    server: Postgres,
    prepared: bool,
}

impl Real {
    fn start(prepared: bool) -> Self {
        let server = Postgres::start(&[]);
        Self { server, prepared }
    }
}

impl Subject for Real {
    type Store = PostgresStore;

    async fn store(&self) -> PostgresStore {
        let builder = builder().prepared_statements(self.prepared).max_connections(4);
        builder.connect(&self.server.url()).await.unwrap()
    }

    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    fn waits(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn the_store_keeps_the_contract() {
    testing::check(&Real::start(true)).await.assert();
}

#[tokio::test]
async fn the_store_keeps_the_contract_without_prepared_statements() {
    testing::check(&Real::start(false)).await.assert();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_keeps_the_contract_under_many_threads() {
    testing::check_races(&Real::start(true)).await.assert();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_keeps_the_contract_whatever_the_isolation_of_transactions() {
    for isolation in ["repeatable read", "serializable"] {
        let setting = format!("default_transaction_isolation={isolation}");
        let server = Postgres::start(&[&setting]);
        let subject = Real { server, prepared: true };
        testing::check_races(&subject).await.assert();
    }
}

// ---- what it costs

/// The end of the server's log, and how many bytes, records and syncs of it there were. PostgreSQL 18 counts syncs
/// elsewhere.
async fn log(server: &Postgres) -> (String, i64, i64, Option<i64>) {
    let sql = "SELECT pg_current_wal_lsn()::text, wal_bytes::bigint, wal_records, \
               (to_jsonb(counted) ->> 'wal_sync')::bigint FROM pg_stat_wal AS counted";
    let row = server.client().await.query_one(sql, &[]).await.unwrap();
    (row.get(0), row.get(1), row.get(2), row.get(3))
}

/// Until no other session is left. A session tells what it did before it is gone.
async fn until_gone(server: &Postgres) {
    let client = server.client().await;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    while client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_replay_writes_nothing_and_syncs_nothing() {
    for prepared in [true, false] {
        // Without the housekeeping that writes on its own account.
        let server = Postgres::start(&[
            "fsync=on",
            "autovacuum=off",
            "wal_level=minimal",
            "max_wal_senders=0",
            "wal_writer_delay=10s",
        ]);
        let builder = builder().prepared_statements(prepared).max_connections(1);
        let store = builder.clone().connect(&server.url()).await.unwrap();
        for (number, length) in [(1, 0), (2, 1000), (3, 100_000)] {
            let lease = acquire(&store, number).await;
            store.complete(&lease, &kept(length), Retention::Forever).await.unwrap();
        }
        acquire(&store, 4).await;
        // Another node, which expects nothing.
        let other = builder.clone().connect(&server.url()).await.unwrap();
        let replay = async |store: &PostgresStore| {
            for number in 1..=3 {
                assert!(matches!(look(store, number).await, Begin::Completed { .. }));
            }
            assert!(matches!(look(store, 4).await, Begin::InProgress { .. }));
        };
        // The first reader of a page notes what was committed and clears away what was replaced.
        for store in [&store, &other, &store, &other] {
            replay(store).await;
        }
        server.say("VACUUM (FREEZE) idempotency_records").await;
        drop((store, other));
        until_gone(&server).await;
        let connect = async || builder.clone().connect(&server.url()).await.unwrap();
        let (store, other) = (connect().await, connect().await);
        let before = log(&server).await;
        for round in 0..100 {
            replay(&store).await;
            replay(&other).await;
            if round % 20 == 0 {
                // One that finds it to be so for the first time.
                replay(&connect().await).await;
            }
        }
        // Their sessions have to end before they tell what they did.
        drop((store, other));
        until_gone(&server).await;
        assert_eq!(log(&server).await, before, "prepared: {prepared}");
        // And that is not because nothing is ever counted.
        let store = builder.connect(&server.url()).await.unwrap();
        acquire(&store, 5).await;
        drop(store);
        until_gone(&server).await;
        let after = log(&server).await;
        assert!(
            after.0 != before.0 && after.1 > before.1 && after.2 > before.2 && after.3 > before.3,
            "{after:?}"
        );
    }
}

#[tokio::test]
async fn a_completion_touches_no_index() {
    let server = Postgres::start(&["autovacuum=off"]);
    let store = builder().max_connections(1).connect(&server.url()).await.unwrap();
    for number in 0..100 {
        let lease = acquire(&store, number).await;
        store.renew(&lease, MINUTE).await.unwrap();
        store.complete(&lease, &kept(1000), MINUTE.into()).await.unwrap();
    }
    drop(store);
    let counted = async || {
        let client = server.client().await;
        let sql = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables";
        let row = client.query_one(sql, &[]).await.unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    while counted().await.0 < 200 {
        tokio::task::yield_now().await;
    }
    let (all, hot) = counted().await;
    assert!(hot >= all * 95 / 100, "{hot} of {all} updates touched no index");
}

// ---- who owns what

#[tokio::test]
async fn a_renewal_that_lands_after_an_abandon_revives_nothing() {
    let server = Postgres::start(&[]);
    let store = connected(&server).await;
    let own = claim();
    let Begin::Acquired(lease) = store.begin(&id(1), &own).await.unwrap() else {
        panic!("it was vacant");
    };
    store.abandon(&lease).await.unwrap();
    let late = store.renew(&lease, MINUTE).await.unwrap_err();
    assert_eq!(late.kind(), StoreErrorKind::Fenced);
    // Neither does its claim, if that was late.
    for claim in [own, claim()] {
        let found = store.begin(&id(1), &claim).await.unwrap();
        assert!(
            matches!(found, Begin::Abandoned { lost, .. } if lost == lease),
            "{found:?}"
        );
    }
}

#[tokio::test]
async fn a_repeated_completion_succeeds_and_changes_nothing() {
    let server = Postgres::start(&[]);
    let store = connected(&server).await;
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &kept(10), MINUTE.into()).await.unwrap();
    let row = "SELECT idempotency_records::text FROM idempotency_records";
    let before: String = server.ask(row).await;
    store.complete(&lease, &kept(20), Retention::Forever).await.unwrap();
    assert_eq!(server.ask::<String>(row).await, before);
    let stranger = Lease::new(id(1), Owner::random().unwrap(), 1);
    let refused = store.complete(&stranger, &kept(20), Retention::Forever).await;
    assert_eq!(refused.unwrap_err().kind(), StoreErrorKind::Fenced);
    assert_eq!(server.ask::<String>(row).await, before);
    // Once its time is over it counts as if it were not there, whether or not it was removed.
    server
        .say("UPDATE idempotency_records SET expires_at = clock_timestamp()")
        .await;
    let late = store.complete(&lease, &kept(20), Retention::Forever).await;
    assert_eq!(late.unwrap_err().kind(), StoreErrorKind::Fenced);
}

#[tokio::test]
async fn of_many_that_take_over_a_lost_lease_one_gets_it() {
    let server = Postgres::start(&[]);
    let store = connected(&server).await;
    let lease = acquire(&store, 1).await;
    // As if its minute had passed.
    server
        .say("UPDATE idempotency_records SET lease_until = clock_timestamp()")
        .await;
    let taking = (0..16).map(|_| {
        let (store, claim) = (store.clone(), claim().taking_over(lease));
        tokio::spawn(async move { store.begin(&id(1), &claim).await.unwrap() })
    });
    let mut acquired = 0;
    for taking in taking.collect::<Vec<_>>() {
        match taking.await.unwrap() {
            Begin::Acquired(next) => {
                assert_eq!(next.fence, 2);
                acquired += 1;
            }
            other => assert!(matches!(other, Begin::InProgress { .. }), "{other:?}"),
        }
    }
    assert_eq!(acquired, 1);
    let late = store.complete(&lease, &kept(1), MINUTE.into()).await.unwrap_err();
    assert_eq!(late.kind(), StoreErrorKind::Fenced);
}

#[tokio::test]
async fn services_with_different_tables_know_nothing_of_each_other() {
    let server = Postgres::start(&[]);
    let other = builder().table(PostgresTable::new("Other \"service\"", "keys; --"));
    let other = other.connect(&server.url()).await.unwrap();
    acquire(&connected(&server).await, 1).await;
    let lease = acquire(&other, 1).await;
    other.complete(&lease, &kept(1), MINUTE.into()).await.unwrap();
    assert!(matches!(look(&other, 1).await, Begin::Completed { .. }));
    assert_eq!(other.purge().await.unwrap(), 0);
}

// ---- what cannot be read

#[tokio::test]
async fn a_record_that_cannot_be_read_is_an_error_and_stays() {
    let server = Postgres::start(&[]);
    let store = connected(&server).await;
    for (number, damage) in [
        (1, "answer = set_byte(answer, 3, 1)"),
        (2, "answer = NULL"),
        (3, "checksum = NULL"),
        (4, "fingerprint = '\\x00'"),
        (5, "owner = '\\x00'"),
        (6, "algorithm = 300"),
        (7, "state = 'x'"),
        (8, "fence = -1"),
    ] {
        let lease = acquire(&store, number).await;
        store.complete(&lease, &kept(10), MINUTE.into()).await.unwrap();
        let row = format!("id = decode(repeat('{number:02x}', 32), 'hex')");
        server
            .say(&format!("UPDATE idempotency_records SET {damage} WHERE {row}"))
            .await;
        let text = format!("SELECT idempotency_records::text FROM idempotency_records WHERE {row}");
        let before: String = server.ask(&text).await;
        let refused = store
            .begin(&id(number), &claim().asking_for_remaining())
            .await
            .unwrap_err();
        assert_eq!(refused.kind(), StoreErrorKind::Corrupt, "{damage}");
        // Whose it was is of no interest to a replay, and not read.
        let replay = store.begin(&id(number), &claim()).await;
        let is_whole = damage.starts_with("owner") || damage.starts_with("fence");
        assert_eq!(matches!(replay, Ok(Begin::Completed { .. })), is_whole, "{damage}");
        assert_eq!(
            replay.err().map(|error| error.kind()),
            (!is_whole).then_some(StoreErrorKind::Corrupt),
            "{damage}"
        );
        assert_eq!(server.ask::<String>(&text).await, before, "{damage}");
    }
    // An answer that came under another id.
    let lease = acquire(&store, 9).await;
    store.complete(&lease, &kept(10), MINUTE.into()).await.unwrap();
    server.say("UPDATE idempotency_records SET id = decode(repeat('0a', 32), 'hex') WHERE id = decode(repeat('09', 32), 'hex')").await;
    let refused = store.begin(&id(10), &claim()).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Corrupt);
}

// ---- the purge

#[tokio::test]
async fn a_purge_removes_what_has_expired_in_batches_and_nothing_else() {
    let server = Postgres::start(&[]);
    let store = connected(&server).await;
    for number in 0..4 {
        let lease = acquire(&store, number).await;
        if number < 2 {
            store.complete(&lease, &kept(10), MINUTE.into()).await.unwrap();
        }
    }
    server
        .say(
            "INSERT INTO idempotency_records SELECT 1, now(), now() - interval '1 second', now(), 0, 0, 0, 'c', \
             sha256(int4send(i)), '', '', '' FROM generate_series(1, 2500) i; \
             -- Completed, and lost without a word.
             UPDATE idempotency_records SET expires_at = now(), purge_at = now() \
             WHERE id IN (decode(repeat('00', 32), 'hex'), decode(repeat('02', 32), 'hex')); \
             -- Looked at too early.
             UPDATE idempotency_records SET purge_at = now() \
             WHERE id IN (decode(repeat('01', 32), 'hex'), decode(repeat('03', 32), 'hex'))",
        )
        .await;
    let mut removed = Vec::new();
    for _ in 0..4 {
        removed.push(store.purge().await.unwrap());
    }
    assert_eq!(removed, [1000, 1000, 502, 0]);
    assert!(matches!(look(&store, 1).await, Begin::Completed { .. }));
    assert!(matches!(look(&store, 3).await, Begin::InProgress { .. }));
    let put_off = "SELECT count(*) FROM idempotency_records WHERE purge_at > now()";
    assert_eq!(server.ask::<i64>(put_off).await, 2);
}

#[tokio::test]
async fn a_purge_leaves_alone_what_somebody_works_on_and_does_not_wait_for_it() {
    let server = Postgres::start(&[]);
    let store = connected(&server).await;
    for number in 1..=2 {
        acquire(&store, number).await;
    }
    server
        .say("UPDATE idempotency_records SET expires_at = now(), purge_at = now()")
        .await;
    let mut client = server.client().await;
    let working = client.transaction().await.unwrap();
    let lock = "SELECT FROM idempotency_records WHERE id = decode(repeat('01', 32), 'hex') FOR UPDATE";
    working.execute(lock, &[]).await.unwrap();
    assert_eq!(store.purge().await.unwrap(), 1);
    working.rollback().await.unwrap();
    assert_eq!(store.purge().await.unwrap(), 1);
}

#[tokio::test]
async fn records_that_take_longer_to_remove_than_a_step_may_last_are_removed_in_smaller_batches() {
    let server = Postgres::start(&[]);
    let store = builder().timeout(Duration::from_millis(500));
    let store = store.connect(&server.url()).await.unwrap();
    server
        .say(
            "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN PERFORM pg_sleep(0.002); RETURN OLD; END'; \
             CREATE TRIGGER slowly BEFORE DELETE ON idempotency_records FOR EACH ROW EXECUTE FUNCTION slowly(); \
             INSERT INTO idempotency_records SELECT 1, now(), now(), now(), 0, 0, 0, 'c', sha256(int4send(i)), '', '', '' \
             FROM generate_series(1, 1000) i",
        )
        .await;
    assert_eq!(store.purge().await.unwrap_err().kind(), StoreErrorKind::Unavailable);
    let removing = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'DELETE%'";
    for _ in 0..30 {
        // What a try that was given up has locked is skipped.
        while server.ask::<i64>(removing).await > 0 {}
        let _ = store.purge().await;
    }
    let count = "SELECT count(*) FROM idempotency_records";
    assert_eq!(server.ask::<i64>(count).await, 0);
}

#[tokio::test]
async fn a_purge_that_had_no_connection_is_as_large_the_next_time() {
    let server = Postgres::start(&[]);
    let pool = server.pool(1);
    let store = builder().timeout(Duration::from_secs(1));
    let store = store.connect_pool(pool.clone()).await.unwrap();
    let insert = "INSERT INTO idempotency_records SELECT 1, now(), now(), now(), 0, 0, 0, 'c', sha256(int4send(i)), '', \
                  '', '' FROM generate_series(1, 1000) i";
    server.say(insert).await;
    let taken = pool.get().await.unwrap();
    for _ in 0..2 {
        let error = store.purge().await.unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(source, "there was no connection within the time of a step");
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    }
    drop(taken);
    assert_eq!(store.purge().await.unwrap(), 1000);
}

#[tokio::test]
async fn records_that_expired_are_removed_in_the_background_until_the_store_is_gone() {
    let server = Postgres::start(&[]);
    let store = builder().purge_every(Some(Duration::from_millis(5)));
    let store = store.connect(&server.url()).await.unwrap();
    let insert = "INSERT INTO idempotency_records SELECT 1, now(), now(), now(), 0, 0, 0, 'c', sha256(int4send(i)), '', \
                  '', '' FROM generate_series(1, 2500) i";
    let count = "SELECT count(*) FROM idempotency_records";
    server.say(insert).await;
    while server.ask::<i64>(count).await > 0 {}
    drop(store);
    until_gone(&server).await;
    server.say(insert).await;
    assert_eq!(server.ask::<i64>(count).await, 2500);
}

#[tokio::test]
async fn an_expired_record_that_was_not_removed_yet_is_vacant() {
    let server = Postgres::start(&[]);
    let store = connected(&server).await;
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &kept(10), MINUTE.into()).await.unwrap();
    assert!(matches!(look(&store, 1).await, Begin::Completed { .. }));
    let second = acquire(&store, 2).await;
    server
        .say("UPDATE idempotency_records SET expires_at = clock_timestamp()")
        .await;
    for number in 1..=2 {
        let next = acquire(&store, number).await;
        assert_eq!(next.fence, 1);
        assert!(matches!(look(&store, number).await, Begin::InProgress { .. }));
    }
    let late = store.complete(&second, &kept(1), MINUTE.into()).await.unwrap_err();
    assert_eq!(late.kind(), StoreErrorKind::Fenced);
    assert_eq!(
        server.ask::<i64>("SELECT count(answer) FROM idempotency_records").await,
        0
    );
}

// ---- waiting

#[tokio::test]
async fn a_waiter_hears_of_every_end_on_its_own_node_and_on_another() {
    let server = Postgres::start(&[]);
    let (store, other) = (connected(&server).await, connected(&server).await);
    for number in 0..3 {
        let lease = acquire(&store, number).await;
        let record = id(number);
        let mut waiters: Vec<_> = (0..8).map(|_| Box::pin(other.changed(&record))).collect();
        waiters.push(Box::pin(store.changed(&record)));
        for waiter in &mut waiters {
            assert!(!is_ready(waiter.as_mut()).await);
        }
        match number {
            0 => store.complete(&lease, &kept(1), MINUTE.into()).await.unwrap(),
            1 => store.release(&lease).await.unwrap(),
            _ => store.abandon(&lease).await.unwrap(),
        }
        for waiter in waiters {
            waiter.await;
        }
    }
}

#[tokio::test]
async fn a_release_wakes_one_waiter_and_the_next_if_that_one_leaves_and_a_completion_wakes_all() {
    let server = Postgres::start(&[]);
    // With one connection no question to the server is in between a release and its end.
    let store = builder().max_connections(1).connect(&server.url()).await.unwrap();
    let record = id(1);
    let mut lease = acquire(&store, 1).await;
    let mut waiters: Vec<_> = (0..5).map(|_| Box::pin(store.changed(&record))).collect();
    for waiter in &mut waiters {
        assert!(!is_ready(waiter.as_mut()).await);
    }
    store.release(&lease).await.unwrap();
    // Woken, and left before it heard of it.
    drop(waiters.remove(0));
    let mut ready = Vec::new();
    for waiter in &mut waiters {
        ready.push(is_ready(waiter.as_mut()).await);
    }
    assert_eq!(ready, [true, false, false, false]);
    // It heard of it, and left without a claim: the record is still vacant, which is found out.
    drop(waiters.remove(0));
    waiters.remove(0).await;
    for waiter in &mut waiters {
        assert!(!is_ready(waiter.as_mut()).await, "one at a time");
    }
    lease = match store.begin(&record, &claim()).await.unwrap() {
        Begin::Acquired(lease) => lease,
        other => panic!("{other:?}"),
    };
    let mut waiters: Vec<_> = (0..5).map(|_| Box::pin(store.changed(&record))).collect();
    for waiter in &mut waiters {
        while is_ready(waiter.as_mut()).await {
            *waiter = Box::pin(store.changed(&record));
        }
    }
    store.complete(&lease, &kept(1), MINUTE.into()).await.unwrap();
    for waiter in &mut waiters {
        assert!(is_ready(waiter.as_mut()).await);
    }
}

#[tokio::test]
async fn waiters_hold_no_connection() {
    let server = Postgres::start(&[]);
    let store = builder().max_connections(1).connect(&server.url()).await.unwrap();
    let leases = [acquire(&store, 1).await, acquire(&store, 2).await];
    let ids = [id(1), id(2)];
    let mut waiters: Vec<_> = (0..200).map(|at| Box::pin(store.changed(&ids[at % 2]))).collect();
    for waiter in &mut waiters {
        assert!(!is_ready(waiter.as_mut()).await);
    }
    // The only connection there is goes on to serve others.
    for number in 10..60 {
        acquire(&store, number).await;
    }
    for lease in leases {
        store.complete(&lease, &kept(1), MINUTE.into()).await.unwrap();
    }
    for waiter in waiters {
        waiter.await;
    }
}
