//! Who is at work on a record, as its locks show it, whatever moment they are looked at.
#![cfg(feature = "sqlx")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{sync::Arc, time::Duration};

use http::{Request, StatusCode};
use support::{
    app::{gated, open, spawn},
    bank::{ACCOUNTS, BALANCE, BOTH, Bank, order},
    postgres::Postgres,
};
use tower_idempotency::{IdempotencyLayer, KeySource};

const MONEY: i64 = ACCOUNTS * BALANCE;

/// The locks over records that somebody holds, each as one number.
const RECORDS: &str = "SELECT array_agg(classid::bigint << 32 | objid::bigint) FROM pg_locks \
     WHERE locktype = 'advisory' AND objsubid = 1 \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

fn quick(layer: IdempotencyLayer) -> IdempotencyLayer {
    layer.store_timeout(Duration::from_secs(3))
}

/// The locks over records of a request, which leaves nothing behind.
async fn record_locks(bank: &Bank, request: Request<axum::body::Body>) -> Vec<i64> {
    let request = spawn(&bank.app, request);
    bank.control.entered().await;
    let locks = bank.look(RECORDS).await;
    bank.control.let_go();
    assert_eq!(request.await.unwrap().status.as_u16(), 503);
    locks
}

#[tokio::test]
async fn a_transaction_that_has_let_go_of_one_lock_and_not_of_the_other_is_never_taken_for_another_request() {
    for library in BOTH {
        let bank = Bank::with(library, gated(), quick).await;
        let [lock] = record_locks(&bank, order("k", 5, "503")).await[..] else {
            panic!("a request has one key");
        };
        // For as long as it likes.
        let ending = bank.client().await;
        ending.execute("SELECT pg_advisory_lock($1)", &[&lock]).await.unwrap();
        let (same, another) = tokio::join!(bank.ask(order("k", 5, "")), bank.ask(order("k", 6, "")));
        for refused in [same, another] {
            assert_eq!(refused.problem(), "request-in-progress", "{library:?}");
            assert!(refused.header("retry-after").is_some());
        }
        assert_eq!(bank.control.runs(), 1);
        drop(ending);
        let again = spawn(&bank.app, order("k", 5, ""));
        bank.control.entered().await;
        bank.control.let_go();
        assert_eq!(again.await.unwrap().status, StatusCode::CREATED, "{library:?}");
        assert_eq!(bank.books().await, (1, MONEY));
    }
}

#[tokio::test]
async fn whose_lock_is_let_go_while_it_is_looked_for_runs() {
    for library in BOTH {
        let bank = Bank::with(library, gated(), |layer| layer).await;
        let [lock] = record_locks(&bank, order("k", 5, "503")).await[..] else {
            panic!("a request has one key");
        };
        let ending = bank.client().await;
        ending.execute("SELECT pg_advisory_lock($1)", &[&lock]).await.unwrap();
        let mut request = spawn(&bank.app, order("k", 5, ""));
        // It has met the lock, or does so just now.
        let meets = RECORDS
            .replace("objsubid = 1", "objsubid = 2")
            .replace("array_agg", "count");
        while ending.query_one(&meets, &[]).await.unwrap().get::<_, i64>(0) == 0 {}
        ending.execute("SELECT pg_advisory_unlock($1)", &[&lock]).await.unwrap();
        tokio::select! {
            () = bank.control.entered() => {}
            answer = &mut request => panic!("{library:?}: it does not run: {answer:?}"),
        }
        bank.control.let_go();
        assert_eq!(request.await.unwrap().status, StatusCode::CREATED, "{library:?}");
        assert_eq!(bank.books().await, (1, MONEY));
    }
}

#[tokio::test]
async fn another_request_that_is_at_work_is_told_by_its_locks_whatever_the_isolation() {
    for isolation in ["read committed", "serializable"] {
        let setting = format!("default_transaction_isolation={isolation}");
        let server = Arc::new(Postgres::start(&[&setting]));
        for library in BOTH {
            let bank = Bank::on(&server, library, gated(), |layer| layer).await;
            let first = spawn(&bank.app, order("k", 5, ""));
            bank.control.entered().await;
            let other = bank.ask(order("k", 6, "")).await;
            assert_eq!(other.problem(), "idempotency-key-reused", "{library:?} {isolation}");
            let duplicate = bank.ask(order("k", 5, "")).await;
            assert_eq!(duplicate.problem(), "request-in-progress", "{library:?} {isolation}");
            bank.control.let_go();
            assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
            assert_eq!(bank.control.runs(), 1);
        }
    }
}

#[tokio::test]
async fn a_key_beside_the_own_is_not_another_operations_because_one_lock_over_it_is_held() {
    let keys = || KeySource::header("idempotency-key").and_each("/units/*");
    let order = |key: &str, units: &[&str], then: &str| {
        let body = serde_json::json!({ "amount": 5, "then": then, "units": units });
        let mut request = order(key, 5, then);
        *request.body_mut() = body.to_string().into();
        request
    };
    for library in BOTH {
        let bank = Bank::with(library, gated(), |layer| quick(layer.key(keys()))).await;
        let own = record_locks(&bank, order("k", &[], "503")).await;
        let mut locks = record_locks(&bank, order("k", &["u"], "503")).await;
        locks.retain(|lock| !own.contains(lock));
        assert_eq!((own.len(), locks.len()), (1, 1));
        let ending = bank.client().await;
        ending
            .execute("SELECT pg_advisory_lock($1)", &[&locks[0]])
            .await
            .unwrap();
        let refused = bank.ask(order("k", &["u"], "")).await;
        assert_eq!(refused.problem(), "request-in-progress", "{library:?}");
        drop(ending);
        // An operation that really has it is another one's, at once and for good.
        let first = spawn(&bank.app, order("k", &["u"], ""));
        bank.control.entered().await;
        for _ in 0..2 {
            let other = bank.ask(order("other", &["u"], "")).await;
            assert_eq!(other.problem(), "idempotency-key-reused", "{library:?}");
            bank.control.let_go();
        }
        assert_eq!(first.await.unwrap().status, StatusCode::CREATED, "{library:?}");
        assert_eq!((bank.books().await, bank.control.runs()), ((1, MONEY), 3));
    }
}

/// What two requests share is claimed by one that waits for a third, and so does not run yet, and never will.
#[tokio::test]
async fn who_claims_some_of_its_keys_and_not_the_rest_refuses_nobody_for_good() {
    let keys = || KeySource::header("idempotency-key").and_each("/units/*");
    let order = |key: &str, amount: i64, units: &[&str]| {
        let body = serde_json::json!({ "amount": amount, "then": "", "units": units });
        let mut request = order(key, amount, "");
        *request.body_mut() = body.to_string().into();
        request
    };
    let beside = "SELECT id FROM idempotency_records WHERE algorithm = 4";
    for library in BOTH {
        let bank = Bank::with(library, open(), |layer| layer.key(keys())).await;
        // Whichever is claimed last is somebody else's, who has not committed yet.
        let mut ids = Vec::new();
        for unit in ["1", "2"] {
            assert_eq!(bank.ask(order(unit, 5, &[unit])).await.status, StatusCode::CREATED);
            ids.push((bank.look::<Vec<u8>>(beside).await, unit));
            bank.say("CREATE TABLE IF NOT EXISTS saved AS SELECT * FROM idempotency_records WHERE false")
                .await;
            bank.say("INSERT INTO saved SELECT * FROM idempotency_records; DELETE FROM idempotency_records")
                .await;
        }
        ids.sort();
        let [(_, shared), (last, taken)] = &ids[..] else {
            panic!("two units")
        };
        let other = bank.client().await;
        other.batch_execute("BEGIN").await.unwrap();
        let again = "INSERT INTO idempotency_records SELECT * FROM saved WHERE id = $1";
        other.execute(again, &[last]).await.unwrap();
        let refused = spawn(&bank.app, order("k", 5, &[shared, taken]));
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                     AND wait_event_type = 'Lock'";
        while bank.look::<i64>(waits).await == 0 {}
        // Nor does its own key refuse another request.
        let meeting = [
            spawn(&bank.app, order("l", 5, &[shared])),
            spawn(&bank.app, order("k", 6, &[])),
        ];
        // They have met it, or do so just now.
        let meets = "SELECT count(DISTINCT virtualtransaction) FROM pg_locks WHERE locktype = 'advisory' \
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        while meeting.iter().all(|request| !request.is_finished()) && bank.look::<i64>(meets).await < 2 {}
        other.batch_execute("COMMIT").await.unwrap();
        let refused = refused.await.unwrap();
        assert_eq!(refused.problem(), "idempotency-key-reused", "{library:?}");
        for request in meeting {
            assert_eq!(request.await.unwrap().status, StatusCode::CREATED, "{library:?}");
        }
        assert_eq!(bank.control.runs(), 4, "{library:?}");
    }
}

#[tokio::test]
async fn a_request_that_will_not_run_claims_nothing_beside_its_own_key() {
    let keys = || KeySource::header("idempotency-key").and_each("/units/*");
    let order = |key: &str, amount: i64, units: &[&str]| {
        let body = serde_json::json!({ "amount": amount, "then": "", "units": units });
        let mut request = order(key, amount, "");
        *request.body_mut() = body.to_string().into();
        request
    };
    for library in BOTH {
        let bank = Bank::with(library, open(), |layer| layer.key(keys())).await;
        assert_eq!(bank.ask(order("k", 5, &["u"])).await.status, StatusCode::CREATED);
        // A sequence counts what is rolled back, too.
        let count = "CREATE SEQUENCE inserts; \
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM nextval('inserts'); RETURN NEW; END $$; \
             CREATE TRIGGER note BEFORE INSERT ON idempotency_records FOR EACH ROW EXECUTE FUNCTION note()";
        bank.say(count).await;
        let inserts = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM inserts";
        let other = bank.ask(order("k", 6, &["v", "w"])).await;
        assert_eq!(other.problem(), "idempotency-key-reused", "{library:?}");
        assert!(bank.ask(order("k", 5, &["u"])).await.is_replay(), "{library:?}");
        assert_eq!(bank.look::<i64>(inserts).await, 0, "{library:?}");
        assert_eq!(bank.ask(order("l", 6, &["v", "w"])).await.status, StatusCode::CREATED);
        assert_eq!(bank.look::<i64>(inserts).await, 3, "{library:?}");
    }
}

/// How often the server's log was synced, by all processes: those of clients have ended, so that they have said it.
async fn count_syncs(bank: &Bank) -> i64 {
    let client = bank.client().await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
               WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    while client.query_one(end, &[]).await.unwrap().get::<_, i64>(0) > 0 {}
    let count = client.query_one("SELECT wal_sync FROM pg_stat_wal", &[]).await;
    count.unwrap().get(0)
}

#[tokio::test]
async fn a_transaction_syncs_the_log_as_often_as_the_handlers_own_would() {
    const TRANSACTIONS: i64 = 30;
    let quiet = [
        "fsync=on",
        "wal_writer_delay=10s",
        "checkpoint_timeout=1h",
        "autovacuum=off",
        "bgwriter_lru_maxpages=0",
    ];
    let server = Arc::new(Postgres::start(&quiet));
    for library in BOTH {
        let bank = Bank::on(&server, library, open(), |layer| layer).await;
        let mut fewest = i64::MAX;
        // The server's own processes may sync once in a while; nobody is that often unlucky.
        for round in 0..4 {
            // No segment of the log ends meanwhile.
            bank.say("SELECT pg_switch_wal()").await;
            let before = count_syncs(&bank).await;
            for number in 0..TRANSACTIONS {
                let answer = bank.ask(order(&format!("{round}-{number}"), 5, "")).await;
                assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
            }
            fewest = fewest.min(count_syncs(&bank).await - before);
        }
        assert_eq!(fewest, TRANSACTIONS, "{library:?}");
        assert_eq!(bank.books().await, (4 * TRANSACTIONS, MONEY));
    }
}
