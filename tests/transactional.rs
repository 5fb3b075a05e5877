//! Exactly once: what a handler writes and the record of its answer are one transaction, with either client.
#![cfg(feature = "sqlx")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

#[cfg(all(feature = "cached", feature = "encrypted"))]
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use http::StatusCode;
#[cfg(all(feature = "cached", feature = "encrypted"))]
use support::{
    app::call,
    bank::{Library, app, plain},
};
use support::{
    app::{gated, open, spawn},
    bank::{ACCOUNTS, BALANCE, BOTH, Bank, order},
    postgres::{Postgres, table_in_parts},
    serve::assert_replay,
};
#[cfg(all(feature = "cached", feature = "encrypted"))]
use tower_idempotency::{AnyStore, Cached, Encrypted, KeyRing, SecretKey};
use tower_idempotency::{Guarantee, IdempotencyLayer, KeySource, MemoryStore, Profile, Statuses};

const MONEY: i64 = ACCOUNTS * BALANCE;

#[tokio::test]
async fn a_transfer_and_its_answer_are_committed_together_and_replayed() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let first = bank.ask(order("k", 5, "")).await;
        assert_eq!(first.status, StatusCode::CREATED, "{library:?} {first:?}");
        assert_replay(&first, &bank.ask(order("k", 5, "")).await);
        assert_eq!(bank.books().await, (1, MONEY));
        assert_eq!((bank.control.runs(), bank.records().await), (1, 1));
        // Both rows have the same writer.
        let together = "SELECT transfers.xmin IN (idempotency_records.xmin, \
             ((idempotency_records.xmin::text::bigint + 1)::text)::xid) \
             FROM transfers, idempotency_records";
        assert!(bank.look::<bool>(together).await);
    }
}

#[tokio::test]
async fn the_key_of_another_request_is_refused_and_nothing_is_written() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        bank.ask(order("k", 5, "")).await;
        let other = bank.ask(order("k", 6, "")).await;
        assert_eq!(other.problem(), "idempotency-key-reused", "{library:?}");
        assert_eq!((bank.books().await, bank.control.runs()), ((1, MONEY), 1));
    }
}

#[tokio::test]
async fn a_duplicate_in_flight_is_told_so_at_once_and_another_request_that_its_key_is_taken() {
    for library in BOTH {
        let bank = Bank::with(library, gated(), |layer| layer).await;
        let first = spawn(&bank.app, order("k", 5, ""));
        bank.control.entered().await;
        let duplicate = bank.ask(order("k", 5, "")).await;
        assert_eq!(duplicate.problem(), "request-in-progress", "{library:?}");
        assert!(duplicate.header("retry-after").is_some());
        assert_eq!(bank.ask(order("k", 6, "")).await.problem(), "idempotency-key-reused");
        bank.control.let_go();
        let first = first.await.unwrap();
        assert_replay(&first, &bank.ask(order("k", 5, "")).await);
        assert_eq!(bank.books().await, (1, MONEY));
    }
}

#[tokio::test]
async fn what_a_failed_request_wrote_is_undone_but_its_answer_is_kept() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        for (key, then, status) in [("a", "402", 402), ("b", "500", 500)] {
            let first = bank.ask(order(key, 5, then)).await;
            assert_eq!(first.status.as_u16(), status, "{library:?} {first:?}");
            assert_replay(&first, &bank.ask(order(key, 5, then)).await);
        }
        assert_eq!(bank.books().await, (0, MONEY));
        assert_eq!((bank.control.runs(), bank.records().await), (2, 2));
    }
}

#[tokio::test]
async fn a_setting_says_which_statuses_commit_what_was_written() {
    for library in BOTH {
        let committing = Statuses::success().with([StatusCode::PAYMENT_REQUIRED]);
        let bank = Bank::with(library, open(), |layer| layer.commit_statuses(committing)).await;
        assert_eq!(
            bank.ask(order("a", 5, "402")).await.status,
            StatusCode::PAYMENT_REQUIRED
        );
        assert_eq!(bank.books().await, (1, MONEY), "{library:?}");
        assert_eq!(
            bank.ask(order("b", 5, "301")).await.status,
            StatusCode::MOVED_PERMANENTLY
        );
        assert_eq!(bank.books().await, (1, MONEY), "{library:?}");
    }
}

#[tokio::test]
async fn what_was_not_executed_is_undone_and_its_key_is_free() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        assert_eq!(bank.ask(order("a", 5, "503")).await.status.as_u16(), 503);
        assert_eq!(bank.ask(order("b", 5, "nothing")).await.status.as_u16(), 201);
        assert_eq!(
            (bank.books().await, bank.records().await),
            ((0, MONEY), 0),
            "{library:?}"
        );
        assert_eq!(
            bank.ask(order("a", 5, "")).await.status.as_u16(),
            201,
            "the key is free"
        );
        assert_eq!(bank.books().await, (1, MONEY));
    }
}

#[tokio::test]
async fn a_panic_or_a_broken_answer_undoes_everything_and_the_next_request_runs() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let panicked = spawn(&bank.app, order("a", 5, "panic")).await;
        assert!(panicked.unwrap_err().is_panic(), "it goes on as it was");
        let broken = spawn(&bank.app, order("b", 5, "break")).await;
        assert!(broken.unwrap_err().is_panic(), "its body breaks");
        assert_eq!(
            (bank.books().await, bank.records().await),
            ((0, MONEY), 0),
            "{library:?}"
        );
        for (key, then) in [("a", "panic"), ("b", "break")] {
            let again = spawn(&bank.app, order(key, 5, then)).await;
            assert!(again.is_err(), "it runs again");
        }
        assert_eq!(bank.control.runs(), 4);
        assert_eq!(
            bank.ask(order("a", 6, "")).await.status.as_u16(),
            201,
            "and leaves no trace"
        );
        assert_eq!(bank.books().await, (1, MONEY));
    }
}

#[tokio::test]
async fn a_client_that_leaves_does_not_undo_its_request() {
    for library in BOTH {
        let bank = Bank::with(library, gated(), |layer| layer).await;
        let client = spawn(&bank.app, order("k", 5, ""));
        bank.control.entered().await;
        client.abort();
        let _ = client.await;
        bank.control.let_go();
        bank.layer.drain().finished().await;
        assert_eq!(bank.books().await, (1, MONEY), "{library:?}");
        assert!(bank.ask(order("k", 5, "")).await.is_replay());
    }
}

#[tokio::test]
async fn of_a_stream_or_a_large_answer_the_fact_is_committed_before_the_rest_is_sent() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        for (key, then, status) in [("a", "stream", 202), ("b", "large", 201)] {
            assert_eq!(bank.ask(order(key, 5, then)).await.status.as_u16(), status);
            let again = bank.ask(order(key, 5, then)).await;
            assert_eq!(again.problem(), "response-not-kept", "{library:?}");
            assert_eq!(again.json()["original_status"], status);
        }
        assert_eq!(bank.books().await, (2, MONEY));
    }
}

#[tokio::test]
async fn a_savepoint_that_a_handler_leaks_ends_with_its_transaction() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let first = bank.ask(order("k", 5, "nested")).await;
        assert_eq!((first.status.as_u16(), first.is_replay()), (201, false), "{library:?}");
        assert_eq!(bank.books().await, (1, MONEY), "{library:?}");
        assert_replay(&first, &bank.ask(order("k", 5, "nested")).await);
        // What fails is kept without what was written; what did not execute is as if it had not been.
        let failed = bank.ask(order("f", 5, "nested 422")).await;
        assert_eq!(failed.status.as_u16(), 422, "{library:?}");
        assert!(bank.ask(order("f", 5, "nested 422")).await.is_replay());
        for _ in 0..2 {
            let nothing = bank.ask(order("n", 5, "nested nothing")).await;
            assert_eq!(
                (nothing.status.as_u16(), nothing.is_replay()),
                (201, false),
                "{library:?}"
            );
        }
        // A statement that fails in it is undone with it.
        let failed = bank.ask(order("s", 5, "nested fails 422")).await;
        assert_eq!(failed.status.as_u16(), 422, "{library:?}");
        assert!(bank.ask(order("s", 5, "nested fails 422")).await.is_replay());
        assert_eq!(bank.books().await, (1, MONEY), "{library:?}");
        let open = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                    AND state LIKE 'idle in transaction%'";
        assert_eq!(bank.look::<i64>(open).await, 0, "{library:?}");
    }
}

#[tokio::test]
async fn a_handler_that_commits_by_itself_is_told_and_its_request_never_runs_again() {
    for library in BOTH {
        for then in [
            "COMMIT",
            "COMMIT AND CHAIN",
            "COMMIT; BEGIN",
            "RELEASE SAVEPOINT tower_idempotency; COMMIT; BEGIN",
        ] {
            let bank = Bank::of(library).await;
            let answer = bank.ask(order("k", 5, then)).await;
            assert_eq!(
                (answer.status.as_u16(), &*answer.problem()),
                (500, "transaction-misused"),
                "{library:?} {then}"
            );
            assert_eq!(bank.books().await, (1, MONEY), "it did commit");
            for _ in 0..2 {
                assert_eq!(
                    bank.ask(order("k", 5, then)).await.problem(),
                    "outcome-unknown",
                    "{library:?} {then}"
                );
            }
            assert_eq!((bank.books().await, bank.control.runs()), ((1, MONEY), 1));
            // The connection is as good as new for the next one.
            for key in ["x", "y", "z", "u", "v"] {
                assert_eq!(
                    bank.ask(order(key, 5, "")).await.status.as_u16(),
                    201,
                    "{library:?} {then}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_handler_that_rolls_back_by_itself_is_told_and_the_next_request_runs() {
    for library in BOTH {
        for then in ["ROLLBACK", "ROLLBACK; BEGIN", "DELETE FROM idempotency_records"] {
            let bank = Bank::of(library).await;
            for _ in 0..2 {
                let answer = bank.ask(order("k", 5, then)).await;
                assert_eq!(answer.problem(), "transaction-misused", "{library:?} {then}");
            }
            assert_eq!(
                (bank.books().await, bank.records().await),
                ((0, MONEY), 0),
                "{library:?} {then}"
            );
            assert_eq!(bank.control.runs(), 2);
        }
    }
}

/// Each part may have a row at the same place.
#[tokio::test]
async fn in_a_table_of_several_parts_an_answer_is_kept_with_its_own_record_and_no_other() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        bank.say(&format!("DROP TABLE idempotency_records; {}", table_in_parts()))
            .await;
        let key = |number: i32| format!("k{number}");
        let mut answers = Vec::new();
        for number in 0..20 {
            // Some leave a version of a row behind, so that there are records at all places.
            bank.ask(order(&key(100 + number), 5, "503")).await;
            answers.push(bank.ask(order(&key(number), 5, "")).await.body);
        }
        let sums = "SELECT count(DISTINCT checksum) FROM idempotency_records";
        assert_eq!(bank.look::<i64>(sums).await, 20, "{library:?}");
        for (number, first) in (0..).zip(answers) {
            let again = bank.ask(order(&key(number), 5, "")).await;
            assert_eq!((again.is_replay(), again.body), (true, first), "{library:?} {number}");
        }
        assert_eq!(bank.books().await, (20, MONEY));
    }
}

#[tokio::test]
async fn a_handler_that_keeps_its_transaction_is_told_and_it_is_undone() {
    for (library, leak) in BOTH
        .into_iter()
        .flat_map(|library| [(library, "leak"), (library, "nested leak")])
    {
        let bank = Bank::with(library, gated(), |layer| layer).await;
        bank.control.let_go();
        let answer = bank.ask(order("k", 5, leak)).await;
        assert_eq!(answer.problem(), "transaction-misused", "{library:?}");
        // Until it lets go, its claim is there.
        assert_eq!(bank.ask(order("k", 5, leak)).await.problem(), "request-in-progress");
        bank.control.let_go();
        loop {
            let again = spawn(&bank.app, order("k", 5, ""));
            bank.control.let_go();
            let again = again.await.unwrap();
            if again.status == StatusCode::CREATED {
                break;
            }
            // The body is another one, and the claim may not be gone yet.
            assert_eq!(again.problem(), "idempotency-key-reused");
            tokio::task::yield_now().await;
        }
        assert_eq!(bank.books().await, (1, MONEY), "{library:?}");
    }
}

#[tokio::test]
async fn a_stream_that_keeps_the_transaction_is_not_sent() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let answer = bank.ask(order("k", 5, "body")).await;
        assert_eq!(answer.problem(), "transaction-misused", "{library:?}");
        assert_eq!(bank.books().await, (0, MONEY));
    }
}

#[tokio::test]
async fn an_answer_after_a_failed_statement_is_not_given_and_nothing_is_kept() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let then = "INSERT INTO transfers (reference, amount) VALUES ('odd', 13)";
        for runs in 1..3 {
            let answer = bank.ask(order("k", 5, then)).await;
            assert_eq!(
                (answer.status.as_u16(), &*answer.problem()),
                (500, "transaction-failed"),
                "{library:?}"
            );
            assert_eq!(bank.control.runs(), runs, "its key is free");
        }
        assert_eq!((bank.books().await, bank.records().await), ((0, MONEY), 0));
        // A failure's answer is kept all the same: the savepoint is before the statement that failed.
        let odd = bank.ask(order("b", 13, "")).await;
        assert_eq!(odd.status.as_u16(), 500);
        assert_replay(&odd, &bank.ask(order("b", 13, "")).await);
    }
}

#[tokio::test]
async fn a_constraint_that_fails_at_the_commit_undoes_everything() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        let then = "INSERT INTO deferred VALUES (1), (1)";
        let answer = bank.ask(order("k", 5, then)).await;
        assert_eq!(answer.problem(), "transaction-failed", "{library:?}");
        assert_eq!((bank.books().await, bank.records().await), ((0, MONEY), 0));
        assert_eq!(bank.ask(order("k", 5, then)).await.problem(), "transaction-failed");
        // Whatever its trigger says: the same words of the layer's own statements would mean that the handler had ended
        // the transaction.
        bank.say(
            "CREATE FUNCTION ratio() RETURNS trigger LANGUAGE plpgsql AS \
                  $$ BEGIN PERFORM 1 / (NEW.amount - 7); RETURN NULL; END $$; \
                  CREATE CONSTRAINT TRIGGER ratio AFTER INSERT ON transfers DEFERRABLE INITIALLY DEFERRED \
                  FOR EACH ROW EXECUTE FUNCTION ratio()",
        )
        .await;
        let answer = bank.ask(order("k", 7, "")).await;
        assert_eq!(answer.problem(), "transaction-failed", "{library:?}");
        assert_eq!((bank.books().await, bank.records().await), ((0, MONEY), 0));
    }
}

#[tokio::test]
async fn a_record_that_has_expired_is_claimed_anew_also_by_a_request_that_fails() {
    for library in BOTH {
        let bank = Bank::of(library).await;
        for then in ["", "402", ""] {
            let first = bank.ask(order("k", 5, then)).await;
            assert!(!first.is_replay(), "{library:?}");
            assert_replay(&first, &bank.ask(order("k", 5, then)).await);
            bank.say("UPDATE idempotency_records SET expires_at = now()").await;
        }
        assert_eq!(bank.books().await, (2, MONEY), "{library:?}");
        assert_eq!((bank.control.runs(), bank.records().await), (3, 1));
    }
}

#[test]
#[should_panic(expected = "needs a store that has transactions")]
fn a_store_without_transactions_is_refused_when_the_layer_is_made() {
    let _ = IdempotencyLayer::new(MemoryStore::new()).guarantee(Guarantee::Transactional);
}

#[test]
#[should_panic(expected = "needs a store that has transactions")]
fn a_store_without_transactions_is_refused_for_a_route() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let _ = layer.route("/a", |route| route.guarantee(Guarantee::Transactional));
}

#[test]
#[should_panic(expected = "needs a store that has transactions")]
fn a_store_without_transactions_is_refused_for_a_profile() {
    let profile = Profile::new("own", |layer| layer.guarantee(Guarantee::Transactional));
    let _ = IdempotencyLayer::new(MemoryStore::new()).profile(profile);
}

/// What is in front of it has no transactions: it would have to take part in them.
#[cfg(all(feature = "cached", feature = "encrypted"))]
#[tokio::test]
async fn a_store_behind_another_one_is_refused_and_its_answers_are_replayed_through_that_all_the_same() {
    let bank = Bank::of(Library::TokioPostgres).await;
    let secret = SecretKey::from_bytes([7; 32]);
    let encrypted = Encrypted::open(bank.store.clone(), &secret, KeyRing::sealing(1, &secret)).await;
    let behind = [
        AnyStore::new(Cached::new(bank.store.clone())),
        AnyStore::new(Cached::new(AnyStore::new(bank.store.clone()))),
        AnyStore::new(encrypted.unwrap()),
    ];
    for store in behind {
        let make = || drop(IdempotencyLayer::new(store).guarantee(Guarantee::Transactional));
        let panic = catch_unwind(AssertUnwindSafe(make)).unwrap_err();
        let words = panic.downcast_ref::<&str>().expect("words");
        assert!(words.contains("needs a store that has transactions"), "{words}");
    }
    let any = IdempotencyLayer::new(AnyStore::new(bank.store.clone())).guarantee(Guarantee::Transactional);
    let first = call(&app(&bank.control, any), order("k", 5, "")).await;
    // Routes of another guarantee may have copies of the same records.
    let cached = IdempotencyLayer::new(Cached::new(bank.store.clone()));
    let other = open();
    let node = plain(&other, cached);
    for _ in 0..2 {
        assert_replay(&first, &call(&node, order("k", 5, "")).await);
    }
    assert_eq!((other.runs(), bank.books().await), (0, (1, MONEY)));
}

#[tokio::test]
async fn a_replay_writes_nothing() {
    for library in BOTH {
        let server = Arc::new(Postgres::start(&["autovacuum=off"]));
        let bank = Bank::on(&server, library, open(), |layer| layer).await;
        bank.ask(order("k", 5, "")).await;
        // What the first look at new rows leaves in their pages.
        bank.ask(order("k", 5, "")).await;
        bank.say("CHECKPOINT").await;
        let before: String = bank.look("SELECT pg_current_wal_lsn()::text").await;
        for _ in 0..10 {
            assert!(bank.ask(order("k", 5, "")).await.is_replay());
        }
        let after: String = bank.look("SELECT pg_current_wal_lsn()::text").await;
        assert_eq!(before, after, "{library:?}");
    }
}

#[tokio::test]
async fn all_keys_of_a_request_are_claimed_and_completed_in_its_transaction_or_none() {
    for library in BOTH {
        let keys = KeySource::header("idempotency-key").and_each("/units/*");
        let bank = Bank::with(library, open(), |layer| layer.key(keys)).await;
        let order = |key: &str, units: &[&str], then: &str| {
            let body = serde_json::json!({ "amount": 5, "then": then, "units": units });
            let mut request = order(key, 5, then);
            *request.body_mut() = body.to_string().into();
            request
        };
        assert_eq!(bank.ask(order("a", &["1", "2"], "503")).await.status.as_u16(), 503);
        assert_eq!(bank.records().await, 0, "{library:?}: none is left");
        let first = bank.ask(order("a", &["1", "2"], "")).await;
        assert_eq!(first.status, StatusCode::CREATED, "{library:?} {first:?}");
        assert_replay(&first, &bank.ask(order("a", &["1", "2"], "")).await);
        let taken = bank.ask(order("b", &["3", "2"], "")).await;
        assert_eq!(taken.problem(), "idempotency-key-reused", "{library:?}");
        assert_eq!((bank.records().await, bank.control.runs()), (3, 2));
        let completed = "SELECT count(*) FROM idempotency_records WHERE state = 'c'";
        assert_eq!(bank.look::<i64>(completed).await, 3);
        assert_eq!(bank.ask(order("b", &["3", "4"], "402")).await.status.as_u16(), 402);
        assert_eq!(bank.look::<i64>(completed).await, 6, "{library:?}");
        assert_eq!(bank.books().await, (1, MONEY));
    }
}
