//! PostgreSQL servers that are away, full, replicas or strangers, networks that lose answers, and poolers.
#![cfg(all(feature = "postgres", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{error::Error, time::Duration};

use deadpool_postgres::PoolError;
use http::StatusCode;
use support::{
    app::{call, keyed, open, pay},
    postgres::{Bouncer, Postgres, url},
    proxy::{Proxy, Weather},
};
use tokio_postgres::Client;
use tower_idempotency::{
    Begin, Claim, Fingerprint, IdempotencyLayer, Lease, Owner, PostgresStore, PostgresStoreBuilder, RecordId, Store,
    StoreError, StoreErrorKind, StoredResponse,
    testing::{self, Subject},
};

const MINUTE: Duration = Duration::from_secs(60);
/// Of the record with the number 1.
const ONE: &str = "id = decode(repeat('01', 32), 'hex')";

fn claim() -> Claim {
    let fingerprint = Fingerprint::new(1, [1; 32]);
    Claim::new(fingerprint, Owner::random().unwrap(), MINUTE, MINUTE.into())
}

fn id(number: u8) -> RecordId {
    RecordId::from_bytes([number; 32])
}

fn answer() -> StoredResponse {
    StoredResponse::not_kept(StatusCode::CREATED)
}

async fn acquire(store: &PostgresStore, number: u8) -> Lease {
    match store.begin(&id(number), &claim()).await {
        Ok(Begin::Acquired(lease)) => lease,
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

/// One connection, so that a test knows which.
fn builder() -> PostgresStoreBuilder {
    PostgresStore::builder()
        .create_table(true)
        .purge_every(None)
        .max_connections(1)
}

async fn connect(url: &str) -> PostgresStore {
    builder().connect(url).await.unwrap()
}

/// Where only the server's answer can end a step.
async fn connect_patiently(url: &str) -> PostgresStore {
    builder().timeout(MINUTE).connect(url).await.unwrap()
}

fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.unwrap_err().kind()
}

/// What the server said, and what that is to a layer.
fn said<T: std::fmt::Debug>(result: Result<T, StoreError>) -> (String, StoreErrorKind) {
    let error = result.unwrap_err();
    let source = error.source().expect("a source");
    let server = match source.downcast_ref::<PoolError>() {
        Some(PoolError::Backend(error)) => error,
        _ => source
            .downcast_ref::<tokio_postgres::Error>()
            .expect("the client's error"),
    };
    (
        server.code().expect("the server said it").code().to_owned(),
        error.kind(),
    )
}

fn reason<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Other, "{error:?}");
    error.source().expect("a reason").to_string()
}

/// Asks until the store is there again.
async fn until_back(store: &PostgresStore, number: u8) -> Begin {
    loop {
        match store.begin(&id(number), &claim()).await {
            Ok(begin) => return begin,
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}"),
        }
    }
}

/// Until the store's session waits for a lock.
async fn until_it_waits(server: &Postgres) {
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tower-idempotency' \
                   AND wait_event_type = 'Lock'";
    while server.ask::<i64>(waiting).await == 0 {}
}

/// Ends the store's sessions, as an operator or a failover does.
async fn terminate(client: &Client) {
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tower-idempotency'";
    client.query(sql, &[]).await.unwrap();
}

// ---- what the server says

#[tokio::test]
async fn a_session_that_is_terminated_in_mid_step_is_unavailable_and_the_step_may_be_repeated() {
    let server = Postgres::start(&[]);
    let store = connect_patiently(&server.url()).await;
    let lease = acquire(&store, 1).await;
    let mut client = server.client().await;
    let lock = client.transaction().await.unwrap();
    lock.execute(&format!("SELECT FROM idempotency_records WHERE {ONE} FOR UPDATE"), &[])
        .await
        .unwrap();
    let completing = tokio::spawn({
        let store = store.clone();
        async move { store.complete(&lease, &answer(), MINUTE.into()).await }
    });
    until_it_waits(&server).await;
    terminate(&server.client().await).await;
    assert_eq!(
        said(completing.await.unwrap()),
        ("57P01".to_owned(), StoreErrorKind::Unavailable)
    );
    lock.rollback().await.unwrap();
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
}

#[tokio::test]
async fn sessions_that_were_terminated_between_two_steps_cost_nothing() {
    let server = Postgres::start(&[]);
    let (store, client) = (connect(&server.url()).await, server.client().await);
    for number in 0..10 {
        let lease = acquire(&store, number).await;
        terminate(&client).await;
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tower-idempotency'";
        while client.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0) > 0 {}
        // The end of the session may be heard of only now.
        while store.complete(&lease, &answer(), MINUTE.into()).await.is_err() {}
    }
}

#[tokio::test]
async fn a_serialization_failure_is_made_again() {
    let server = Postgres::start(&["default_transaction_isolation=serializable"]);
    let store = connect_patiently(&server.url()).await;
    let lease = acquire(&store, 1).await;
    let mut client = server.client().await;
    let other = client.transaction().await.unwrap();
    let touch = format!("UPDATE idempotency_records SET purge_at = purge_at WHERE {ONE}");
    other.execute(&touch, &[]).await.unwrap();
    let completing = tokio::spawn({
        let store = store.clone();
        async move { store.complete(&lease, &answer(), MINUTE.into()).await }
    });
    until_it_waits(&server).await;
    // The server answers 40001 to the other one now.
    other.commit().await.unwrap();
    completing.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_victim_of_a_deadlock_is_made_again() {
    // The store's session looks for a deadlock once, and the other one has to wait by then.
    let server = Postgres::start(&["deadlock_timeout=4s"]);
    let store = connect_patiently(&server.url()).await;
    let lease = acquire(&store, 1).await;
    // A trigger of the user's that locks something else, in the other order.
    server
        .say(
            "CREATE FUNCTION lock() RETURNS trigger LANGUAGE plpgsql AS \
             $$BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END$$; \
             CREATE TRIGGER lock BEFORE UPDATE ON idempotency_records FOR EACH ROW EXECUTE FUNCTION lock()",
        )
        .await;
    let mut client = server.client().await;
    client.batch_execute("SET deadlock_timeout = '1min'").await.unwrap();
    let other = client.transaction().await.unwrap();
    other.execute("SELECT pg_advisory_xact_lock(7)", &[]).await.unwrap();
    let completing = tokio::spawn({
        let store = store.clone();
        async move { store.complete(&lease, &answer(), MINUTE.into()).await }
    });
    until_it_waits(&server).await;
    // Waits for the store's row lock, while the store waits for the other lock: only 40P01 for the store ends it.
    let touch = format!("SELECT FROM idempotency_records WHERE {ONE} FOR UPDATE");
    other.execute(&touch, &[]).await.unwrap();
    other.commit().await.unwrap();
    completing.await.unwrap().unwrap();
    // More than one, if the store was back before the other one took the lock that it had waited for.
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = 'postgres'";
    while server.ask::<i64>(deadlocks).await < 1 {}
}

#[tokio::test]
async fn a_server_without_a_free_connection_is_unavailable_until_it_has_one() {
    let server = Postgres::start(&[
        "max_connections=5",
        "superuser_reserved_connections=0",
        "max_wal_senders=0",
    ]);
    let store = connect(&server.url()).await;
    acquire(&store, 1).await;
    let mut clients = vec![server.client().await];
    terminate(&clients[0]).await;
    let refused = loop {
        match tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await {
            Ok((client, connection)) => {
                tokio::spawn(connection);
                clients.push(client);
            }
            Err(error) => break error,
        }
    };
    assert_eq!(refused.code().expect("it said so").code(), "53300");
    assert_eq!(
        said(store.begin(&id(2), &claim()).await),
        ("53300".to_owned(), StoreErrorKind::Unavailable)
    );
    drop(clients);
    assert!(matches!(until_back(&store, 1).await, Begin::InProgress { .. }));
}

#[tokio::test]
async fn a_full_pool_is_unavailable_within_the_deadline_and_then_goes_on() {
    let server = Postgres::start(&[]);
    let pool = server.pool(1);
    let builder = builder().timeout(Duration::from_millis(300));
    let store = builder.connect_pool(pool.clone()).await.unwrap();
    let held = pool.get().await.unwrap();
    let lease = Lease::new(id(1), Owner::random().unwrap(), 1);
    assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    assert_eq!(
        kind(store.complete(&lease, &answer(), MINUTE.into()).await),
        StoreErrorKind::Unavailable
    );
    drop(held);
    assert!(matches!(until_back(&store, 1).await, Begin::Acquired(_)));
    pool.close();
    assert_eq!(kind(store.begin(&id(2), &claim()).await), StoreErrorKind::Other);
}

#[tokio::test]
async fn a_server_without_room_refuses_new_keys_and_replays_old_ones() {
    let server = Postgres::start(&[]);
    let store = connect_patiently(&server.url()).await;
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    // As it says when a disk is full.
    server
        .say(
            "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS \
             $$BEGIN RAISE EXCEPTION USING ERRCODE = '53100'; END$$; \
             CREATE TRIGGER no_room BEFORE INSERT ON idempotency_records FOR EACH ROW EXECUTE FUNCTION no_room()",
        )
        .await;
    assert_eq!(
        said(store.begin(&id(2), &claim()).await),
        ("53100".to_owned(), StoreErrorKind::Full)
    );
    assert!(matches!(
        store.begin(&id(1), &claim()).await,
        Ok(Begin::Completed { .. })
    ));
    // Nor does another node, which expects nothing, have to insert.
    let other = connect_patiently(&server.url()).await;
    assert!(matches!(
        other.begin(&id(1), &claim()).await,
        Ok(Begin::Completed { .. })
    ));
}

#[tokio::test]
async fn a_connection_failure_that_the_server_reports_is_unavailable_and_the_step_may_be_repeated() {
    let server = Postgres::start(&[]);
    let store = connect_patiently(&server.url()).await;
    let lease = acquire(&store, 1).await;
    // As a server says it whose own connection broke, such as to a shard or behind a proxy.
    server
        .say(
            "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS \
             $$BEGIN RAISE EXCEPTION USING ERRCODE = '08006'; END$$; \
             CREATE TRIGGER cut BEFORE INSERT OR UPDATE ON idempotency_records FOR EACH ROW EXECUTE FUNCTION cut()",
        )
        .await;
    let (own, unavailable) = (claim(), ("08006".to_owned(), StoreErrorKind::Unavailable));
    assert_eq!(said(store.begin(&id(2), &own).await), unavailable);
    assert_eq!(
        said(store.complete(&lease, &answer(), MINUTE.into()).await),
        unavailable
    );
    server.say("DROP TRIGGER cut ON idempotency_records").await;
    assert!(matches!(store.begin(&id(2), &own).await, Ok(Begin::Acquired(_))));
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
}

#[tokio::test]
async fn a_table_that_is_altered_meanwhile_is_read_anew() {
    let server = Postgres::start(&[]);
    let store = connect_patiently(&server.url()).await;
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    assert!(matches!(
        store.begin(&id(1), &claim()).await,
        Ok(Begin::Completed { .. })
    ));
    server
        .say("ALTER TABLE idempotency_records ALTER COLUMN checksum TYPE numeric")
        .await;
    // A plan for the columns of before fails, and then the value is none that is known.
    while kind(store.begin(&id(1), &claim()).await) != StoreErrorKind::Corrupt {}
    server
        .say("ALTER TABLE idempotency_records ALTER COLUMN checksum TYPE integer")
        .await;
    assert!(matches!(until_back(&store, 1).await, Begin::Completed { .. }));
}

// ---- what is refused at the start

#[tokio::test]
async fn a_server_that_may_forget_is_refused_where_that_is_asked_for() {
    let strict = || builder().refuse_forgetful_server(true);
    let server = Postgres::start(&["fsync=on"]);
    strict().connect(&server.url()).await.unwrap();
    for (setting, word) in [
        ("synchronous_commit=off", "synchronous_commit"),
        ("fsync=off", "fsync"),
        ("full_page_writes=off", "full_page_writes"),
    ] {
        let server = Postgres::start(&["fsync=on", setting]);
        assert!(reason(strict().connect(&server.url()).await).contains(word));
        connect(&server.url()).await;
    }
}

#[tokio::test]
async fn a_table_that_is_missing_newer_or_not_to_be_written_to_is_refused_in_words() {
    let server = Postgres::start(&[]);
    let plain = async || PostgresStore::connect(&server.url()).await;
    assert!(reason(plain().await).contains("there is no table"));
    connect(&server.url()).await;
    drop(plain().await.unwrap());
    server
        .say("CREATE ROLE app LOGIN; GRANT SELECT, INSERT ON idempotency_records TO app")
        .await;
    let as_app = server.url().replace("postgres@", "app@");
    assert!(reason(PostgresStore::connect(&as_app).await).contains("the role needs"));
    server.say("GRANT UPDATE, DELETE ON idempotency_records TO app").await;
    let store = PostgresStore::connect(&as_app).await.unwrap();
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    store.purge().await.unwrap();
    server
        .say("COMMENT ON TABLE idempotency_records IS 'tower-idempotency records, version 2'")
        .await;
    assert!(reason(plain().await).contains("is of version 2"));
    assert!(reason(PostgresStore::connect("postgres//nonsense").await).contains("invalid"));
    assert_eq!(kind(PostgresStore::connect(&url(1)).await), StoreErrorKind::Unavailable);
}

// ---- replicas

#[tokio::test]
async fn a_replica_is_refused_and_a_primary_that_was_replaced_is_left_for_the_new_one() {
    let mut primary = Postgres::start(&["wal_keep_size=64MB"]);
    let standby = Postgres::standby_of(&primary, &[]);
    let store = connect(&primary.url()).await;
    let lease = acquire(&store, 1).await;
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    let there = "SELECT count(*) FROM pg_tables WHERE tablename = 'idempotency_records'";
    while standby.ask::<i64>(there).await == 0 {}
    let refused = PostgresStore::builder().connect(&standby.url()).await;
    assert!(reason(refused).contains("replica"));
    let both = format!(
        "postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres?target_session_attrs=read-write",
        standby.port(),
        primary.port()
    );
    let store = PostgresStore::builder()
        .max_connections(2)
        .connect(&both)
        .await
        .unwrap();
    while standby
        .ask::<i64>("SELECT count(answer) FROM idempotency_records")
        .await
        == 0
    {}
    primary.kill();
    assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    standby.ask::<bool>("SELECT pg_promote()").await;
    assert!(matches!(until_back(&store, 1).await, Begin::Completed { .. }));
    acquire(&store, 2).await;
}

#[tokio::test]
async fn a_server_that_became_read_only_answers_nothing_and_is_left() {
    let server = Postgres::start(&[]);
    let store = connect_patiently(&server.url()).await;
    acquire(&store, 1).await;
    server.say("ALTER SYSTEM SET default_transaction_read_only = on").await;
    server.say("SELECT pg_reload_conf()").await;
    // A session may hear of it a moment later; what is begun until then is begun.
    let refused = loop {
        match store.begin(&id(1), &claim()).await {
            Ok(begin) => assert!(matches!(begin, Begin::InProgress { .. })),
            refused => break refused,
        }
    };
    assert_eq!(said(refused), ("25006".to_owned(), StoreErrorKind::Unavailable));
    let client = server.client().await;
    // What stands leads to a server that may never write again; the next connection may find another one.
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tower-idempotency'";
    let gone = async { while client.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0) > 0 {} };
    tokio::time::timeout(MINUTE, gone).await.expect("none is left");
    for sql in [
        "SET default_transaction_read_only = off",
        "ALTER SYSTEM RESET default_transaction_read_only",
        "SELECT pg_reload_conf()",
    ] {
        client.batch_execute(sql).await.unwrap();
    }
    assert!(matches!(until_back(&store, 1).await, Begin::InProgress { .. }));
}

/// Not a promise, but what the page says: an asynchronous primary answers first and replicates afterwards. A
/// synchronous one does not answer.
#[tokio::test]
async fn a_failover_may_lose_a_claim_unless_the_standby_is_synchronous() {
    for synchronous in [false, true] {
        let mut primary = Postgres::start(&["wal_keep_size=64MB"]);
        let between = Proxy::before(primary.port()).await;
        let through = format!("primary_conninfo=host=127.0.0.1 port={} user=postgres", between.port());
        let standby = Postgres::standby_of(&primary, &[&through]);
        let before = connect(&primary.url()).await;
        acquire(&before, 1).await;
        let there = "SELECT count(*) FROM pg_tables WHERE tablename = 'idempotency_records'";
        while standby.ask::<i64>(there).await == 0 {}
        while standby.ask::<i64>("SELECT count(*) FROM idempotency_records").await == 0 {}
        if synchronous {
            primary.say("ALTER SYSTEM SET synchronous_standby_names = '*'").await;
            primary.say("SELECT pg_reload_conf()").await;
            while primary
                .ask::<i64>("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'")
                .await
                == 0
            {}
        }
        between.black_hole();
        let granted = before.begin(&id(2), &claim()).await;
        assert_eq!(granted.is_ok(), !synchronous, "{granted:?}");
        primary.kill();
        standby.ask::<bool>("SELECT pg_promote()").await;
        let after = connect(&standby.url()).await;
        assert!(matches!(
            after.begin(&id(1), &claim()).await,
            Ok(Begin::InProgress { .. })
        ));
        // Granted a second time, if it was granted before.
        acquire(&after, 2).await;
    }
}

// ---- a server that goes and comes

#[tokio::test]
async fn a_server_that_hangs_fails_every_step_until_it_goes_on() {
    let server = Postgres::start(&[]);
    let store = connect(&server.url()).await;
    let lease = acquire(&store, 1).await;
    server.pause();
    let own = claim();
    assert_eq!(kind(store.begin(&id(2), &own).await), StoreErrorKind::Unavailable);
    assert_eq!(kind(store.renew(&lease, MINUTE).await), StoreErrorKind::Unavailable);
    server.resume();
    // Late, but applied perhaps: it is the owner's own then.
    let again = loop {
        match store.begin(&id(2), &own).await {
            Ok(begin) => break begin,
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Unavailable),
        }
    };
    assert!(matches!(again, Begin::Acquired(lease) if lease.fence == 1), "{again:?}");
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_killed_and_restarted_has_its_records_and_is_found_again() {
    let mut server = Postgres::start(&[]);
    let store = connect(&server.url()).await;
    let (done, running) = (acquire(&store, 1).await, acquire(&store, 2).await);
    store.complete(&done, &answer(), MINUTE.into()).await.unwrap();
    server.kill();
    assert_eq!(kind(store.begin(&id(3), &claim()).await), StoreErrorKind::Unavailable);
    server.restart();
    assert!(matches!(until_back(&store, 1).await, Begin::Completed { .. }));
    store.complete(&running, &answer(), MINUTE.into()).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_away_refuses_requests_and_no_handler_runs() {
    let mut server = Postgres::start(&[]);
    let control = open();
    let app = pay(&control, IdempotencyLayer::new(connect(&server.url()).await));
    server.kill();
    let refused = call(&app, keyed("k", "a")).await;
    assert_eq!(
        (refused.status, refused.problem()),
        (StatusCode::SERVICE_UNAVAILABLE, "store-unavailable".to_owned())
    );
    assert!(refused.header("retry-after").is_some());
    assert_eq!(control.runs(), 0);
}

// ---- the network

/// A store whose statements its only connection knows, so that the next answer is that of a step.
async fn warm(proxy: &Proxy) -> PostgresStore {
    let store = connect(&url(proxy.port())).await;
    let lease = acquire(&store, 100).await;
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    store
}

#[tokio::test]
async fn a_claim_whose_answer_was_lost_is_its_owners_when_it_is_repeated() {
    let server = Postgres::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let store = warm(&proxy).await;
    let own = claim();
    proxy.make(Weather::LoseAnswer);
    assert_eq!(kind(store.begin(&id(1), &own).await), StoreErrorKind::Unavailable);
    assert_eq!(proxy.weather(), Weather::Clear, "the answer was lost");
    assert_eq!(
        server.ask::<i64>("SELECT count(*) FROM idempotency_records").await,
        2,
        "it was applied"
    );
    let begin = store.begin(&id(1), &own).await.unwrap();
    assert!(matches!(begin, Begin::Acquired(lease) if lease == Lease::new(id(1), own.owner, 1)));
    assert!(matches!(
        store.begin(&id(1), &claim()).await,
        Ok(Begin::InProgress { .. })
    ));
}

#[tokio::test]
async fn a_completion_whose_answer_was_lost_is_kept_and_may_be_repeated() {
    let server = Postgres::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let store = warm(&proxy).await;
    let lease = acquire(&store, 1).await;
    proxy.make(Weather::LoseAnswer);
    assert_eq!(
        kind(store.complete(&lease, &answer(), MINUTE.into()).await),
        StoreErrorKind::Unavailable
    );
    assert_eq!(proxy.weather(), Weather::Clear, "the answer was lost");
    assert!(matches!(until_back(&store, 1).await, Begin::Completed { .. }));
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
}

#[tokio::test]
async fn a_lost_answer_to_the_claim_runs_the_handler_once() {
    let server = Postgres::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let control = open();
    let app = pay(&control, IdempotencyLayer::new(warm(&proxy).await));
    proxy.make(Weather::LoseAnswer);
    let first = call(&app, keyed("k", "a")).await;
    assert_eq!(first.status, StatusCode::CREATED);
    assert_eq!(proxy.weather(), Weather::Clear, "the answer was lost");
    let retry = call(&app, keyed("k", "a")).await;
    assert!(retry.is_replay());
    assert_eq!((retry.body, control.runs()), (first.body, 1));
}

#[tokio::test]
async fn a_connection_that_is_cut_without_a_word_is_given_up_at_its_first_deadline() {
    let server = Postgres::start(&[]);
    let proxy = Proxy::before(server.port()).await;
    let store = warm(&proxy).await;
    proxy.black_hole();
    assert_eq!(kind(store.begin(&id(100), &claim()).await), StoreErrorKind::Unavailable);
    assert!(matches!(
        store.begin(&id(100), &claim()).await,
        Ok(Begin::Completed { .. })
    ));
}

#[tokio::test]
async fn a_step_that_is_left_keeps_nobody_from_the_next() {
    let server = Postgres::start(&[]);
    let store = connect_patiently(&server.url()).await;
    let lease = acquire(&store, 1).await;
    let mut client = server.client().await;
    let lock = client.transaction().await.unwrap();
    lock.execute(&format!("SELECT FROM idempotency_records WHERE {ONE} FOR UPDATE"), &[])
        .await
        .unwrap();
    let completing = tokio::spawn({
        let store = store.clone();
        async move { store.complete(&lease, &answer(), MINUTE.into()).await }
    });
    until_it_waits(&server).await;
    completing.abort();
    assert!(completing.await.unwrap_err().is_cancelled());
    // The only connection would be waiting still.
    acquire(&store, 2).await;
    lock.rollback().await.unwrap();
}

#[tokio::test]
async fn steps_that_were_given_up_behind_an_open_transaction_leave_no_session_behind() {
    let server = Postgres::start(&[]);
    let builder = builder().max_connections(2).timeout(Duration::from_secs(1));
    let store = builder.connect(&server.url()).await.unwrap();
    let mut client = server.client().await;
    let open = client.transaction().await.unwrap();
    let manual = "INSERT INTO idempotency_records SELECT 1, later, later, later, 0, NULL, 1, 'p', decode(repeat('01', 32), 'hex'), \
                  decode(repeat('07', 16), 'hex'), sha256(''), NULL FROM (SELECT now() + interval '1 hour') AS one (later)";
    open.execute(manual, &[]).await.unwrap();
    let first = tokio::spawn({
        let store = store.clone();
        async move { store.begin(&id(1), &claim()).await }
    });
    until_it_waits(&server).await;
    assert_eq!(kind(first.await.unwrap()), StoreErrorKind::Unavailable);
    for _ in 0..3 {
        assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    }
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tower-idempotency' \
                   AND wait_event_type = 'Lock'";
    let gone = async { while server.ask::<i64>(waiting).await > 0 {} };
    tokio::time::timeout(MINUTE, gone).await.expect("none is left");
    // That one is open still.
    open.commit().await.unwrap();
    assert!(matches!(until_back(&store, 1).await, Begin::InProgress { .. }));
}

// ---- a pooler

struct Pooled {
    bouncer: Bouncer,
    server: Postgres,
}

impl Subject for Pooled {
    type Store = PostgresStore;

    async fn store(&self) -> PostgresStore {
        let builder = builder().prepared_statements(false).max_connections(8).timeout(MINUTE);
        builder.connect(&self.bouncer.url()).await.unwrap()
    }

    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    fn waits(&self) -> bool {
        true
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_keeps_the_contract_behind_a_pooler_in_transaction_mode() {
    let server = Postgres::start(&[]);
    let bouncer = Bouncer::before(&server, 3);
    let pooled = Pooled { bouncer, server };
    testing::check_races(&pooled).await.assert();
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tower-idempotency'";
    let sessions: i64 = pooled.server.ask(sessions).await;
    assert!((1..=3).contains(&sessions), "{sessions} sessions of the server");
}

#[tokio::test]
async fn a_waiter_behind_a_pooler_hears_of_what_another_node_completed() {
    let server = Postgres::start(&[]);
    let bouncer = Bouncer::before(&server, 1);
    let pooled = Pooled { bouncer, server };
    let (store, other) = (pooled.store().await, pooled.store().await);
    let lease = acquire(&store, 1).await;
    let record = id(1);
    let mut waiting = Box::pin(other.changed(&record));
    assert!(futures_util::poll!(&mut waiting).is_pending());
    store.complete(&lease, &answer(), MINUTE.into()).await.unwrap();
    waiting.await;
}
