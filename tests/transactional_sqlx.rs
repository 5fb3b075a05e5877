//! Transactions on an sqlx pool: what sqlx itself keeps in a queue or behind a statement concerns nobody else.
#![cfg(feature = "sqlx")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, routing::post};
use http::StatusCode;
use sqlx::{Connection, Executor, postgres::PgPoolOptions};
use support::{
    app::{call, spawn},
    bank::{self, Bank, Library, PATIENCE, order},
    http::Answer,
    serve::assert_replay,
};
use tokio::sync::{Notify, Semaphore};
use tower_idempotency::{Guarantee, IdempotencyLayer, SqlxTransaction};

#[tokio::test]
async fn a_request_that_gave_up_waiting_for_a_connection_takes_none_later() {
    let bank = Bank::of(Library::Sqlx).await;
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .before_acquire(move |_, _| {
            count.fetch_add(1, SeqCst);
            Box::pin(async { Ok(true) })
        })
        .connect(&bank.url())
        .await
        .unwrap();
    let layer = IdempotencyLayer::new(bank.store.clone().with_sqlx(pool.clone()))
        .guarantee(Guarantee::Transactional)
        .store_timeout(Duration::from_millis(100));
    let node = bank::app(&bank.control, layer);
    let held = pool.acquire().await.unwrap();
    let asked: Vec<_> = (0..20)
        .map(|number| spawn(&node, order(&format!("k{number}"), 5, "")))
        .collect();
    for answer in asked {
        assert_eq!(answer.await.unwrap().problem(), "store-unavailable");
    }
    taken.store(0, SeqCst);
    drop(held);
    // The queue is fair: this is behind all who still wait.
    drop(pool.acquire().await.unwrap());
    assert_eq!(taken.load(SeqCst), 1, "nobody else had the connection meanwhile");
}

#[tokio::test]
async fn a_connection_that_is_slow_to_open_is_there_for_the_next_request() {
    let bank = Bank::of(Library::Sqlx).await;
    let (opened, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let (count, closed) = (Arc::clone(&opened), Arc::clone(&gate));
    let pool = PgPoolOptions::new()
        .max_connections(4)
        .after_connect(move |_, _| {
            count.fetch_add(1, SeqCst);
            let gate = Arc::clone(&closed);
            Box::pin(async move {
                drop(gate.acquire().await);
                Ok(())
            })
        })
        .connect_lazy(&bank.url())
        .unwrap();
    let layer = |limit| {
        IdempotencyLayer::new(bank.store.clone().with_sqlx(pool.clone()))
            .guarantee(Guarantee::Transactional)
            .store_timeout(limit)
    };
    let hasty = bank::app(&bank.control, layer(Duration::from_millis(300)));
    assert_eq!(call(&hasty, order("k", 5, "")).await.problem(), "store-unavailable");
    // One for each of its two tries.
    const OPENED: usize = 2;
    while opened.load(SeqCst) < OPENED {
        assert!(pool.size() > 0, "they were given up");
        tokio::task::yield_now().await;
    }
    gate.add_permits(10);
    while pool.num_idle() < OPENED {
        assert!(pool.size() > 0, "they were given up");
        tokio::task::yield_now().await;
    }
    let node = bank::app(&bank.control, layer(PATIENCE));
    assert_eq!(call(&node, order("k", 5, "")).await.status, StatusCode::CREATED);
    assert_eq!(opened.load(SeqCst), OPENED);
}

/// The first answer and that of a duplicate, and how often the handler ran, which answers while the server is still at a
/// statement of its own. That fails later on.
async fn answers_before_its_statement_fails(status: StatusCode, within: bool) -> (Answer, Answer, usize) {
    // A row that comes once the lock does.
    const FAILS: &str = "SELECT 1 / (count(*) - 1) FROM pg_advisory_xact_lock(77)";
    let bank = Bank::of(Library::Sqlx).await;
    let (runs, leave) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let handler = {
        let (runs, leave) = (Arc::clone(&runs), Arc::clone(&leave));
        move |mut transaction: SqlxTransaction| async move {
            runs.fetch_add(1, SeqCst);
            if within {
                let mut savepoint = transaction.begin().await.unwrap();
                tokio::select! {
                    _ = savepoint.execute(FAILS) => {}
                    () = leave.notified() => {}
                }
            } else {
                tokio::select! {
                    _ = transaction.execute(FAILS) => {}
                    () = leave.notified() => {}
                }
            }
            status
        }
    };
    let app = Router::new()
        .route("/transfer", post(handler))
        .layer(bank.layer.clone());
    let holder = bank.client().await;
    holder.batch_execute("SELECT pg_advisory_lock(77)").await.unwrap();
    let first = spawn(&app, order("k", 5, ""));
    let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 77 AND NOT granted \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    while bank.look::<i64>(waits).await < 1 {
        assert!(!first.is_finished(), "it waits for the lock");
    }
    leave.notify_one();
    holder.batch_execute("SELECT pg_advisory_unlock(77)").await.unwrap();
    let first = first.await.unwrap();
    let second = call(&app, order("k", 5, "")).await;
    (first, second, runs.load(SeqCst))
}

#[tokio::test]
async fn a_failure_is_kept_although_a_statement_that_its_handler_left_fails_later() {
    let (first, second, runs) = answers_before_its_statement_fails(StatusCode::GATEWAY_TIMEOUT, false).await;
    assert_eq!((first.status, runs), (StatusCode::GATEWAY_TIMEOUT, 1), "{first:?}");
    assert_replay(&first, &second);
}

#[tokio::test]
async fn where_a_statement_that_the_handler_left_fails_the_transaction_has_failed_and_is_not_misused() {
    let (first, second, runs) = answers_before_its_statement_fails(StatusCode::CREATED, false).await;
    assert_eq!((&*first.problem(), runs), ("transaction-failed", 2), "{first:?}");
    assert_eq!(second.problem(), "transaction-failed");
    let (first, second, runs) = answers_before_its_statement_fails(StatusCode::SERVICE_UNAVAILABLE, false).await;
    assert_eq!((first.status, runs), (StatusCode::SERVICE_UNAVAILABLE, 2), "{first:?}");
    assert!(first.body.is_empty() && second.body.is_empty(), "the handler's own");
}

#[tokio::test]
async fn a_savepoint_whose_statement_fails_after_it_was_left_does_not_fail_its_request() {
    let (first, second, runs) = answers_before_its_statement_fails(StatusCode::CREATED, true).await;
    assert_eq!((first.status, runs), (StatusCode::CREATED, 1), "{first:?}");
    assert_replay(&first, &second);
}
