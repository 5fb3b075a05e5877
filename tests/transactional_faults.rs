//! What goes wrong around a transaction: lost commits, lost servers, conflicts, full pools.
#![cfg(feature = "sqlx")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use http::StatusCode;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use support::{
    app::{Control, call, gated, open, spawn},
    bank::{self, ACCOUNTS, BALANCE, BOTH, Bank, Library, PATIENCE, order},
    commit_proxy::{CommitProxy, Cut},
    postgres::{self, Bouncer, Postgres},
    serve::assert_replay,
};
use tower_idempotency::{Guarantee, IdempotencyLayer, PostgresStore};

const MONEY: i64 = ACCOUNTS * BALANCE;

/// A node that reaches the bank's database through a proxy.
async fn node_behind(bank: &Bank, library: Library, control: &Control, limit: Duration) -> (axum::Router, CommitProxy) {
    let proxy = CommitProxy::before(bank.port()).await;
    let url = bank
        .url()
        .replace(&format!(":{}/", bank.port()), &format!(":{}/", proxy.port()));
    let store = bank::store(library, &url, postgres::pool(&url, 2)).await;
    let layer = IdempotencyLayer::new(store)
        .guarantee(Guarantee::Transactional)
        .store_timeout(limit);
    (bank::app(control, layer), proxy)
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_found_out_and_its_client_gets_the_answer() {
    // The last is one that no clock can count.
    for (library, limit) in BOTH
        .into_iter()
        .flat_map(|library| [(library, 2 * PATIENCE), (library, Duration::MAX)])
    {
        let bank = Bank::of(library).await;
        let (node, proxy) = node_behind(&bank, library, &bank.control, limit).await;
        proxy.cut_once(Cut::After);
        let first = call(&node, order("k", 5, "")).await;
        assert_eq!(
            (first.status, proxy.cuts()),
            (StatusCode::CREATED, 1),
            "{library:?} {first:?}"
        );
        assert_replay(&first, &call(&node, order("k", 5, "")).await);
        assert_eq!((bank.books().await, bank.control.runs()), ((1, MONEY), 1));
    }
}

#[tokio::test]
async fn a_commit_that_never_arrived_is_found_out_and_the_client_may_send_it_again() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let (node, proxy) = node_behind(&bank, library, &bank.control, 2 * PATIENCE).await;
        proxy.cut_once(Cut::Before);
        let first = call(&node, order("k", 5, "")).await;
        assert_eq!(
            (first.status.as_u16(), &*first.problem()),
            (503, "transaction-rolled-back"),
            "{library:?}"
        );
        assert!(first.header("retry-after").is_some());
        assert_eq!(bank.books().await, (0, MONEY));
        assert_eq!(call(&node, order("k", 5, "")).await.status, StatusCode::CREATED);
        assert_eq!((bank.books().await, bank.control.runs()), ((1, MONEY), 2));
    }
}

#[tokio::test]
async fn a_commit_that_may_have_arrived_is_not_looked_for_before_it_is_over() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let (node, proxy) = node_behind(&bank, library, &bank.control, 2 * PATIENCE).await;
        for number in 1..=10 {
            proxy.cut_once(Cut::During);
            let key = format!("k{number}");
            let mut answer = call(&node, order(&key, 5, "")).await;
            let mut rolled_back = false;
            while answer.status != StatusCode::CREATED {
                let problem = answer.problem();
                assert!(
                    ["transaction-rolled-back", "store-unavailable"].contains(&&*problem),
                    "{answer:?}"
                );
                rolled_back |= problem == "transaction-rolled-back";
                answer = call(&node, order(&key, 5, "")).await;
            }
            assert!(
                !rolled_back || !answer.is_replay(),
                "{library:?}: what was told to be rolled back was committed"
            );
            assert_eq!(bank.books().await, (number, MONEY), "{library:?}");
        }
        assert_eq!(proxy.cuts(), 10);
    }
}

#[tokio::test]
async fn a_commit_that_is_slow_to_end_is_waited_for() {
    // The answer to the COMMIT is lost while a trigger holds it up: nothing is there to be seen yet. Nor later on by a
    // transaction that sees what there was when it began, as those of the node do.
    for library in BOTH {
        let bank = Bank::of(library).await;
        bank.say(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', \
              current_database()); END $$",
        )
        .await;
        bank.say(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \
              $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$; \
              CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON transfers DEFERRABLE INITIALLY DEFERRED \
              FOR EACH ROW EXECUTE FUNCTION slow()",
        )
        .await;
        let holder = bank.client().await;
        holder.batch_execute("SELECT pg_advisory_lock(1)").await.unwrap();
        let (node, proxy) = node_behind(&bank, library, &bank.control, 2 * PATIENCE).await;
        let first = spawn(&node, order("k", 5, ""));
        let waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        while bank.look::<i64>(waits).await < 1 {}
        proxy.sever();
        // Who looks whether it was committed waits for its lock.
        while !first.is_finished() && bank.look::<i64>(waits).await < 2 {}
        holder.batch_execute("SELECT pg_advisory_unlock(1)").await.unwrap();
        let first = first.await.unwrap();
        assert_eq!(first.status, StatusCode::CREATED, "{library:?} {first:?}");
        assert_eq!((bank.books().await, bank.control.runs()), ((1, MONEY), 1));
    }
}

#[tokio::test]
async fn where_it_cannot_be_found_out_nobody_is_told_that_it_is_done_and_the_next_request_learns_it() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let (node, proxy) = node_behind(&bank, library, &bank.control, Duration::from_secs(2)).await;
        proxy.refuse_after_cut.store(true, SeqCst);
        proxy.cut_once(Cut::After);
        let first = call(&node, order("k", 5, "")).await;
        assert_eq!(
            (first.status.as_u16(), &*first.problem()),
            (503, "store-unavailable"),
            "{library:?}"
        );
        assert!(first.json()["detail"].as_str().unwrap().contains("not known"));
        proxy.mend();
        let again = call(&node, order("k", 5, "")).await;
        assert!(
            again.status == StatusCode::CREATED && again.is_replay(),
            "{library:?} {again:?}"
        );
        assert_eq!((bank.books().await, bank.control.runs()), ((1, MONEY), 1));
    }
}

#[tokio::test]
async fn a_backend_that_is_terminated_takes_the_request_with_it_and_the_next_one_runs() {
    for library in BOTH {
        let bank = Bank::with(library, gated(), |layer| layer).await;
        let first = spawn(&bank.app, order("k", 5, ""));
        bank.control.entered().await;
        bank.say(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE xact_start IS NOT NULL \
                  AND datname = current_database() AND pid <> pg_backend_pid()",
        )
        .await;
        bank.control.let_go();
        assert_eq!(first.await.unwrap().problem(), "transaction-rolled-back", "{library:?}");
        bank.control.let_go();
        assert_eq!(bank.ask(order("k", 5, "")).await.status, StatusCode::CREATED);
        assert_eq!(bank.books().await, (1, MONEY), "{library:?}");
    }
}

#[tokio::test]
async fn a_server_that_crashes_while_a_handler_runs_forgets_it_and_the_next_request_runs() {
    for library in BOTH {
        let quick = |layer: IdempotencyLayer| layer.store_timeout(Duration::from_secs(2));
        let server = Arc::new(Postgres::start(&[]));
        let mut bank = Bank::on(&server, library, gated(), quick).await;
        drop(server);
        bank.control.let_go();
        let before = bank.ask(order("before", 5, "")).await;
        let first = spawn(&bank.app, order("k", 5, ""));
        bank.control.entered().await;
        bank.control.entered().await;
        let server = bank.server_mut();
        server.kill();
        bank.control.let_go();
        let first = first.await.unwrap();
        assert_eq!(first.problem(), "store-unavailable", "{library:?}");
        bank.server_mut().restart();
        assert_replay(&before, &bank.ask(order("before", 5, "")).await);
        bank.control.let_go();
        assert_eq!(bank.ask(order("k", 5, "")).await.status, StatusCode::CREATED);
        assert_eq!(bank.books().await, (2, MONEY), "{library:?}");
    }
}

#[tokio::test]
async fn a_conflict_of_serializable_transactions_is_rolled_back_and_the_client_may_send_it_again() {
    for library in BOTH {
        let server = Arc::new(Postgres::start(&["default_transaction_isolation=serializable"]));
        let bank = Bank::on(&server, library, gated(), |layer| layer).await;
        let counting = |key: &str| bank::counting(key);
        let (one, two) = (spawn(&bank.app, counting("a")), spawn(&bank.app, counting("b")));
        bank.control.entered().await;
        bank.control.entered().await;
        bank.control.let_go();
        bank.control.let_go();
        let mut answers = [one.await.unwrap(), two.await.unwrap()];
        answers.sort_by_key(|answer| answer.status);
        assert_eq!(answers[0].status, StatusCode::CREATED, "{library:?} {answers:?}");
        assert_eq!(answers[1].problem(), "transaction-rolled-back", "{library:?}");
        assert!(answers[1].header("retry-after").is_some());
        bank.control.let_go();
        bank.control.let_go();
        for key in ["a", "b"] {
            assert_eq!(bank.ask(counting(key)).await.status, StatusCode::CREATED);
        }
        assert_eq!(
            bank.look::<i64>("SELECT count(DISTINCT amount) FROM transfers").await,
            2,
            "{library:?}"
        );
    }
}

#[tokio::test]
async fn a_deadlock_within_a_handler_undoes_its_request_and_the_next_one_runs() {
    for library in BOTH {
        let bank = Bank::with(library, gated(), |layer| layer).await;
        let other = bank.client().await;
        // It waits longer before it looks for one, so that it is the handler's transaction that is undone.
        let rows = "SET deadlock_timeout = '1h'; BEGIN; UPDATE accounts SET balance = balance + 7 WHERE id = 3";
        other.batch_execute(rows).await.unwrap();
        let then = "UPDATE accounts SET balance = balance - 7 WHERE id = 3";
        let first = spawn(&bank.app, order("k", 5, then));
        bank.control.entered().await;
        let meanwhile = async {
            let take = "UPDATE accounts SET balance = balance - 7 WHERE id = 1; COMMIT";
            other.batch_execute(take).await.unwrap();
        };
        let undone = async {
            let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                         AND wait_event_type = 'Lock'";
            while bank.look::<i64>(waits).await == 0 {}
            bank.control.let_go();
            first.await.unwrap()
        };
        let ((), first) = tokio::join!(meanwhile, undone);
        assert_eq!(first.status.as_u16(), 503, "{library:?} {first:?}");
        assert_eq!((bank.books().await, bank.records().await), ((0, MONEY), 0));
        bank.control.let_go();
        assert_eq!(bank.ask(order("k", 5, then)).await.status, StatusCode::CREATED);
        assert_eq!(
            (bank.books().await, bank.control.runs()),
            ((1, MONEY - 7), 2),
            "{library:?}"
        );
    }
}

#[tokio::test]
async fn a_conflict_within_a_handler_undoes_its_request_and_the_next_one_runs() {
    let server = Arc::new(Postgres::start(&["default_transaction_isolation=repeatable read"]));
    for library in BOTH {
        let bank = Bank::on(&server, library, gated(), |layer| layer).await;
        let then = "UPDATE accounts SET balance = balance - 7 WHERE id = 3";
        let first = spawn(&bank.app, order("k", 5, then));
        bank.control.entered().await;
        bank.say("UPDATE accounts SET balance = balance + 7 WHERE id = 3").await;
        bank.control.let_go();
        let first = first.await.unwrap();
        assert_eq!(first.status.as_u16(), 503, "{library:?} {first:?}");
        assert_eq!((bank.books().await, bank.records().await), ((0, MONEY + 7), 0));
        bank.control.let_go();
        assert_eq!(bank.ask(order("k", 5, then)).await.status, StatusCode::CREATED);
        assert_eq!(
            (bank.books().await, bank.control.runs()),
            ((1, MONEY), 2),
            "{library:?}"
        );
    }
}

#[tokio::test]
async fn behind_a_pooler_in_transaction_mode_each_transfer_happens_once() {
    let server = Postgres::start(&[]);
    bank::create_tables(&server.pool(1)).await;
    let bouncer = Bouncer::before(&server, 3);
    for (round, library) in BOTH.into_iter().enumerate() {
        let builder = PostgresStore::builder().timeout(PATIENCE).prepared_statements(false);
        let store = builder.connect_pool(postgres::pool(&bouncer.url(), 8)).await.unwrap();
        let store = match library {
            Library::TokioPostgres => store,
            Library::Sqlx => {
                let options: PgConnectOptions = bouncer.url().parse().unwrap();
                // The pooler knows nothing of either.
                let options = options.extra_float_digits(None).statement_cache_capacity(0);
                store.with_sqlx(PgPoolOptions::new().max_connections(8).connect_lazy_with(options))
            }
        };
        let layer = IdempotencyLayer::new(store)
            .guarantee(Guarantee::Transactional)
            .store_timeout(2 * PATIENCE);
        let control = open();
        let node = bank::app(&control, layer);
        let order = |number: u32| {
            order(
                &format!("{library:?}-{number}"),
                5,
                if number.is_multiple_of(3) { "402" } else { "" },
            )
        };
        let asked: Vec<_> = (0..36).map(|number| spawn(&node, order(number % 12))).collect();
        for answer in asked {
            let answer = answer.await.unwrap();
            let status = answer.status.as_u16();
            assert!([201, 402, 409].contains(&status), "{library:?} {answer:?}");
            if status == 409 {
                assert_eq!(answer.problem(), "request-in-progress");
            }
        }
        for number in 0..12 {
            assert!(call(&node, order(number)).await.is_replay(), "{library:?} {number}");
            let other = call(&node, bank::order(&format!("{library:?}-{number}"), 6, "")).await;
            assert_eq!(other.problem(), "idempotency-key-reused", "{library:?}");
        }
        assert_eq!(control.runs(), 12, "{library:?}");
        let transfers: i64 = server.ask("SELECT count(*) FROM transfers").await;
        assert_eq!(transfers, 8 * (round as i64 + 1), "{library:?}");
        let sum: i64 = server.ask("SELECT sum(balance)::bigint FROM accounts").await;
        assert_eq!(sum, MONEY);
    }
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
                    AND pid <> pg_backend_pid()";
    let sessions: i64 = server.ask(sessions).await;
    assert!(sessions <= 3, "{sessions} sessions of the server");
}

#[tokio::test]
async fn a_request_that_gets_no_connection_is_refused_and_nothing_is_left_of_it() {
    for library in BOTH {
        let quick = |layer: IdempotencyLayer| layer.store_timeout(Duration::from_secs(1));
        let bank = Bank::with(library, gated(), quick).await;
        // As many as there are connections.
        let busy: Vec<_> = (0..4)
            .map(|number| spawn(&bank.app, bank::counting(&number.to_string())))
            .collect();
        for _ in 0..4 {
            bank.control.entered().await;
        }
        assert_eq!(
            bank.ask(order("k", 5, "")).await.problem(),
            "store-unavailable",
            "{library:?}"
        );
        for _ in 0..5 {
            bank.control.let_go();
        }
        for answer in busy {
            assert_eq!(answer.await.unwrap().status, StatusCode::CREATED, "{library:?}");
        }
        assert_eq!(bank.ask(order("k", 5, "")).await.status, StatusCode::CREATED);
        assert_eq!(bank.books().await, (5, MONEY));
    }
}

#[tokio::test]
async fn a_server_without_a_connection_to_spare_is_a_refusal() {
    for library in BOTH {
        let server = Arc::new(Postgres::start(&[
            "max_connections=10",
            "superuser_reserved_connections=0",
            "max_wal_senders=0",
        ]));
        let quick = |layer: IdempotencyLayer| layer.store_timeout(Duration::from_secs(1));
        let bank = Bank::on(&server, library, gated(), quick).await;
        let first = spawn(&bank.app, bank::counting("a"));
        bank.control.entered().await;
        // Those of the pools that nobody uses.
        let watcher = bank.client().await;
        let idle = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE state = 'idle'";
        watcher.batch_execute(idle).await.unwrap();
        let mut all = Vec::new();
        while let Ok((client, connection)) = tokio_postgres::connect(&bank.url(), tokio_postgres::NoTls).await {
            tokio::spawn(connection);
            all.push(client);
        }
        assert_eq!(
            bank.ask(bank::counting("b")).await.problem(),
            "store-unavailable",
            "{library:?}"
        );
        bank.control.let_go();
        bank.control.let_go();
        assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
        // Its connection is free again.
        assert_eq!(bank.ask(bank::counting("b")).await.status, StatusCode::CREATED);
    }
}
