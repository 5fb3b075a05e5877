//! Duplicates of a request that runs in a transaction: they wait without a connection, and nobody waits for ever.
#![cfg(feature = "sqlx")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use http::StatusCode;
use support::{
    app::{call, gated, open, spawn},
    bank::{self, ACCOUNTS, BALANCE, BOTH, Bank, Library, PATIENCE, app, order},
};
use tower_idempotency::{Concurrent, Guarantee, IdempotencyLayer, PostgresStore};

const MONEY: i64 = ACCOUNTS * BALANCE;
const SHORT: Duration = Duration::from_millis(500);

fn waiting(layer: IdempotencyLayer) -> IdempotencyLayer {
    layer.on_concurrent(Concurrent::Wait(Duration::from_secs(60)))
}

/// Until this many requests have begun to wait.
async fn waited(layer: &IdempotencyLayer, requests: u64) {
    while layer.counters().waited < requests {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn many_more_duplicates_wait_than_there_are_connections_and_all_get_the_answer() {
    for library in BOTH {
        let bank = Bank::with(library, gated(), waiting).await;
        let first = spawn(&bank.app, order("k", 5, ""));
        bank.control.entered().await;
        let others: Vec<_> = (0..20).map(|_| spawn(&bank.app, order("k", 5, ""))).collect();
        waited(&bank.layer, 20).await;
        // Others are served meanwhile, although there are four connections alone.
        let another = spawn(&bank.app, bank::counting("other"));
        bank.control.entered().await;
        bank.control.let_go();
        bank.control.let_go();
        assert_eq!(another.await.unwrap().status, StatusCode::CREATED, "{library:?}");
        let first = first.await.unwrap();
        assert_eq!(first.status, StatusCode::CREATED);
        for other in others {
            let other = other.await.unwrap();
            assert!(other.is_replay() && other.body == first.body, "{library:?} {other:?}");
        }
        assert_eq!(bank.books().await, (2, MONEY));
    }
}

#[tokio::test]
async fn of_those_who_wait_for_a_request_that_is_rolled_back_one_runs() {
    for library in BOTH {
        let bank = Bank::with(library, gated(), waiting).await;
        let first = spawn(&bank.app, order("k", 5, "503"));
        bank.control.entered().await;
        let others: Vec<_> = (0..5).map(|_| spawn(&bank.app, order("k", 5, "503"))).collect();
        waited(&bank.layer, 5).await;
        bank.control.let_go();
        assert_eq!(first.await.unwrap().status.as_u16(), 503, "{library:?}");
        for runs in 2..=6 {
            bank.control.entered().await;
            assert_eq!(
                (bank.books().await, bank.control.runs()),
                ((0, MONEY), runs),
                "one at a time"
            );
            bank.control.let_go();
        }
        for other in others {
            assert_eq!(other.await.unwrap().status.as_u16(), 503);
        }
        assert_eq!(bank.control.runs(), 6);
    }
}

#[tokio::test]
async fn a_waiter_that_runs_in_a_transaction_waits_no_more_and_its_place_is_free() {
    for library in BOTH {
        let one = |layer| waiting(layer).max_waiters(1);
        let bank = Bank::with(library, gated(), one).await;
        let first = spawn(&bank.app, order("k", 5, "503"));
        bank.control.entered().await;
        let other = spawn(&bank.app, order("k", 5, "503"));
        waited(&bank.layer, 1).await;
        bank.control.let_go();
        first.await.unwrap();
        bank.control.entered().await;
        let more = spawn(&bank.app, order("k", 5, "503"));
        while bank.layer.counters().waited < 2 {
            assert!(!more.is_finished(), "{library:?} {:?}", more.await);
            tokio::task::yield_now().await;
        }
        bank.control.let_go();
        bank.control.let_go();
        for waiter in [other, more] {
            assert_eq!(waiter.await.unwrap().status.as_u16(), 503);
        }
        assert_eq!(bank.control.runs(), 3);
    }
}

#[tokio::test]
async fn a_wait_ends_when_its_time_is_over() {
    for library in BOTH {
        let wait = |layer: IdempotencyLayer| layer.on_concurrent(Concurrent::Wait(Duration::from_millis(300)));
        let bank = Bank::with(library, gated(), wait).await;
        let first = spawn(&bank.app, order("k", 5, ""));
        bank.control.entered().await;
        let other = bank.ask(order("k", 5, "")).await;
        assert_eq!(other.problem(), "request-in-progress", "{library:?}");
        bank.control.let_go();
        assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    }
}

#[tokio::test]
async fn a_waiter_of_another_node_gets_the_answer_too() {
    let bank = Bank::with(Library::TokioPostgres, gated(), waiting).await;
    // With a store of its own nothing is heard here of what happens there.
    let store = support::bank::store(Library::Sqlx, &bank.url(), support::postgres::pool(&bank.url(), 2)).await;
    let layer = waiting(IdempotencyLayer::new(store).guarantee(Guarantee::Transactional));
    let node = app(&open(), layer.clone());
    let first = spawn(&bank.app, order("k", 5, ""));
    bank.control.entered().await;
    let other = spawn(&node, order("k", 5, ""));
    waited(&layer, 1).await;
    bank.control.let_go();
    let (first, other) = (first.await.unwrap(), other.await.unwrap());
    assert!(other.is_replay() && other.body == first.body, "{other:?}");
    assert_eq!(bank.books().await, (1, MONEY));
}

#[tokio::test]
async fn a_claim_of_another_guarantee_meets_a_transaction_in_bounded_time_and_never_runs_beside_it() {
    for library in BOTH {
        let bank = Bank::with(library, gated(), |layer| layer).await;
        // As an older node would, in the middle of a deployment.
        let plain = IdempotencyLayer::new(bank.store.clone()).store_timeout(Duration::from_millis(500));
        let control = open();
        let node = support::bank::plain(&control, plain);
        let first = spawn(&bank.app, order("k", 5, ""));
        bank.control.entered().await;
        let refused = call(&node, order("k", 5, "")).await;
        assert_eq!(refused.problem(), "store-unavailable", "{library:?}");
        assert_eq!(control.runs(), 0);
        bank.control.let_go();
        let first = first.await.unwrap();
        assert_eq!(first.status, StatusCode::CREATED);
        // Afterwards it has the answer, and so it is the other way round.
        let replay = call(&node, order("k", 5, "")).await;
        assert!(
            replay.is_replay() && replay.body == first.body,
            "{library:?} {replay:?}"
        );
        assert_eq!(call(&node, order("plain", 5, "")).await.status, StatusCode::OK);
        assert!(bank.ask(order("plain", 5, "")).await.is_replay());
        assert_eq!((control.runs(), bank.control.runs()), (1, 1));
    }
}

#[tokio::test]
async fn a_store_that_waits_for_ever_waits_for_as_long_as_the_server_can() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let node = app(&bank.control, another_layer(&bank, library, Duration::MAX).await);
        let answer = call(&node, order("k", 5, "")).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{library:?} {answer:?}");
    }
}

#[tokio::test]
async fn a_claim_waits_no_longer_for_a_locked_table_than_the_store_does_and_the_handler_is_not_bound_by_that() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let layer = another_layer(&bank, library, SHORT).await;
        let node = app(&bank.control, layer.store_timeout(Duration::from_secs(60)));
        let fresh = app(
            &bank.control,
            another_layer(&bank, library, SHORT)
                .await
                .store_timeout(Duration::from_secs(60)),
        );
        assert_eq!(call(&node, order("warm", 5, "")).await.status, StatusCode::CREATED);
        let migration = bank.client().await;
        migration
            .batch_execute("BEGIN; LOCK TABLE idempotency_records")
            .await
            .unwrap();
        // Twice: once more with a connection that was told of all that is said then. And by a node that has none yet.
        for node in [&node, &node, &fresh, &fresh] {
            let refused = call(node, order("k", 5, "")).await;
            assert_eq!(refused.problem(), "store-unavailable", "{library:?}");
        }
        let waits =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        while bank.look::<i64>(waits).await > 0 {}
        migration.batch_execute("ROLLBACK").await.unwrap();
        let then = "INSERT INTO transfers (reference, amount) VALUES (current_setting('lock_timeout'), 1)";
        assert_eq!(
            call(&node, order("k", 5, then)).await.status,
            StatusCode::CREATED,
            "{library:?}"
        );
        let timeout: String = bank.look("SELECT reference FROM transfers WHERE amount = 1").await;
        assert_eq!(timeout, "0", "{library:?}");
        // Also where the first try to claim finds something: a record that has expired.
        bank.say("UPDATE idempotency_records SET expires_at = clock_timestamp()")
            .await;
        let then = "INSERT INTO transfers (reference, amount) VALUES (current_setting('lock_timeout'), 2)";
        let elsewhere = app(&bank.control, another_layer(&bank, library, SHORT).await);
        assert_eq!(
            call(&elsewhere, order("k", 5, then)).await.status,
            StatusCode::CREATED,
            "{library:?}"
        );
        let timeout: String = bank.look("SELECT reference FROM transfers WHERE amount = 2").await;
        assert_eq!(timeout, "0", "{library:?}");
    }
}

#[tokio::test]
async fn a_claim_that_met_a_locked_table_goes_on_when_that_is_let_go_and_the_handler_is_not_bound_by_that() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let layer = another_layer(&bank, library, PATIENCE).await;
        let node = app(&bank.control, layer.store_timeout(PATIENCE));
        assert_eq!(call(&node, order("warm", 5, "")).await.status, StatusCode::CREATED);
        let migration = bank.client().await;
        let lock = "BEGIN; LOCK TABLE idempotency_records IN SHARE MODE";
        migration.batch_execute(lock).await.unwrap();
        let then = "INSERT INTO transfers (reference, amount) VALUES (current_setting('lock_timeout'), 1)";
        let waiting = spawn(&node, order("k", 5, then));
        let waits =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        while bank.look::<i64>(waits).await == 0 {
            assert!(!waiting.is_finished(), "{library:?}: it did not wait");
        }
        migration.batch_execute("ROLLBACK").await.unwrap();
        assert_eq!(waiting.await.unwrap().status, StatusCode::CREATED, "{library:?}");
        let timeout: String = bank.look("SELECT reference FROM transfers WHERE amount = 1").await;
        assert_eq!(timeout, "0", "{library:?}");
    }
}

/// Of a node that has not seen anything yet, whose store waits for so long.
async fn another_layer(bank: &Bank, library: Library, timeout: Duration) -> IdempotencyLayer {
    let pool = support::postgres::pool(&bank.url(), 2);
    let store = PostgresStore::builder()
        .timeout(timeout)
        .connect_pool(pool)
        .await
        .unwrap();
    let store = match library {
        Library::TokioPostgres => store,
        Library::Sqlx => store.with_sqlx(support::bank::sqlx_pool(&bank.url(), 2)),
    };
    IdempotencyLayer::new(store).guarantee(Guarantee::Transactional)
}

#[tokio::test]
async fn a_replay_waits_for_nobody_who_works_on_its_row() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let first = bank.ask(order("k", 5, "")).await;
        let maintenance = bank.client().await;
        maintenance
            .batch_execute("BEGIN; UPDATE idempotency_records SET retention = retention")
            .await
            .unwrap();
        let node = app(&bank.control, another_layer(&bank, library, SHORT).await);
        let replay = call(&node, order("k", 5, "")).await;
        assert!(replay.is_replay(), "{library:?} {replay:?}");
        assert_eq!(replay.body, first.body);
        maintenance.batch_execute("ROLLBACK").await.unwrap();
    }
}
