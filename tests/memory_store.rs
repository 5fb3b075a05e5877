//! The memory store's own promises, beside the contract: a budget, and no work that grows with the number of keys.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use axum::response::IntoResponse;
use http::StatusCode;
use sha2::{Digest, Sha256};
use support::app::{answering, call, gated, keyed, open, pay, spawn};
use tokio::time::advance;
use tower_idempotency::{
    Begin, Claim, Fingerprint, IdempotencyLayer, Lease, MemoryStore, Owner, RecordId, Retention, Store, StoreErrorKind,
    StoredResponse,
};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// As real ids are: hashes.
fn id(number: u64) -> RecordId {
    RecordId::from_bytes(Sha256::digest(number.to_le_bytes()).into())
}

fn claim(lease: Duration, retention: Duration) -> Claim {
    let fingerprint = Fingerprint::new(1, [0; 32]);
    Claim::new(fingerprint, Owner::random().unwrap(), lease, Retention::For(retention))
}

async fn begin(store: &MemoryStore, number: u64) -> Result<Begin, StoreErrorKind> {
    let begin = store.begin(&id(number), &claim(MINUTE, HOUR)).await;
    begin.map_err(|error| error.kind())
}

async fn acquire(store: &MemoryStore, number: u64) -> Lease {
    match begin(store, number).await {
        Ok(Begin::Acquired(lease)) => lease,
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

async fn complete(store: &MemoryStore, number: u64, retention: Duration) {
    let lease = acquire(store, number).await;
    let answer = StoredResponse::not_kept(StatusCode::OK);
    store
        .complete(&lease, &answer, Retention::For(retention))
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_full_store_refuses_new_keys_and_evicts_nothing() {
    let store = MemoryStore::builder().max_records(2).build();
    let control = gated();
    let app = pay(&control, IdempotencyLayer::new(store.clone()));
    let running = spawn(&app, keyed("running", "a"));
    control.entered().await;
    control.let_go();
    running.await.unwrap();
    let in_flight = spawn(&app, keyed("in flight".replace(' ', "-").as_str(), "a"));
    control.entered().await;
    let refused = call(&app, keyed("one-more", "a")).await;
    assert_eq!(
        (refused.status, refused.problem()),
        (StatusCode::SERVICE_UNAVAILABLE, "store-full".to_owned())
    );
    assert!(refused.header("retry-after").is_some());
    assert!(
        call(&app, keyed("running", "a")).await.is_replay(),
        "what is completed is still there"
    );
    assert_eq!(
        call(&app, keyed("in-flight", "a")).await.problem(),
        "request-in-progress"
    );
    control.let_go();
    in_flight.await.unwrap();
    assert_eq!(control.runs(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_full_store_has_room_again_once_something_expired_wherever_it_was() {
    let store = MemoryStore::builder().max_records(100).build();
    for number in 0..100 {
        complete(&store, number, HOUR).await;
    }
    assert_eq!(begin(&store, 100).await.unwrap_err(), StoreErrorKind::Full);
    advance(HOUR).await;
    for number in 100..200 {
        acquire(&store, number).await;
    }
    assert_eq!(begin(&store, 200).await.unwrap_err(), StoreErrorKind::Full);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_finds_no_room_removes_what_expired_until_there_is_as_much_as_it_takes() {
    let each = bytes_of_a_record().await;
    let store = MemoryStore::builder().max_bytes(5000 * each).build();
    for number in 0.. {
        // Each is completed with a few bytes more than it had, which find room wherever it is.
        let Ok(Begin::Acquired(lease)) = begin(&store, number).await else {
            break;
        };
        let answer = StoredResponse::not_kept(StatusCode::OK);
        store.complete(&lease, &answer, Retention::For(HOUR)).await.unwrap();
    }
    let filled = store.len();
    advance(HOUR).await;
    let as_much_as_500 = vec![b'x'; 500 * each as usize];
    let app = answering(&open(), IdempotencyLayer::new(store.clone()), move |_, _, _| {
        as_much_as_500.clone().into_response()
    });
    call(&app, keyed("k", "a")).await;
    assert!(call(&app, keyed("k", "a")).await.is_replay());
    let removed = filled - store.len();
    assert!((450..1000).contains(&removed), "{removed} of {filled} were removed");
}

#[tokio::test(start_paused = true)]
async fn as_many_new_keys_as_records_expired_have_room_in_a_full_store_and_no_more() {
    let store = MemoryStore::builder().max_records(1000).build();
    for number in 0..1000 {
        // Here and there among the others, in whatever part of the store.
        complete(&store, number, if number % 100 == 0 { HOUR } else { 2 * HOUR }).await;
    }
    advance(HOUR).await;
    for number in 1000..1010 {
        acquire(&store, number).await;
    }
    assert_eq!(begin(&store, 1010).await.unwrap_err(), StoreErrorKind::Full);
    for number in (0..1000).filter(|number| number % 100 != 0) {
        let found = begin(&store, number).await;
        assert!(matches!(found, Ok(Begin::Completed { .. })), "{number}: {found:?}");
    }
}

#[tokio::test]
async fn the_budget_in_bytes_counts_answers_and_what_records_take_beside_them() {
    let store = MemoryStore::builder().max_bytes(10_000).build();
    let app = pay(&open(), IdempotencyLayer::new(store.clone()));
    let kilobyte: &'static str = Box::leak("x".repeat(1024).into_boxed_str());
    let mut kept = 0;
    let refused = loop {
        let answer = call(&app, keyed(&format!("key-{kept}"), kilobyte)).await;
        if answer.status != StatusCode::CREATED {
            break answer;
        }
        kept += 1;
    };
    assert_eq!(refused.problem(), "store-full");
    // The last answer found no room and was not kept, so a few records came after the answers' room was used up.
    assert!((7..=16).contains(&kept), "{kept} records in 10,000 bytes");
    assert!(store.bytes() <= 10_000, "{} bytes", store.bytes());
}

#[tokio::test]
async fn an_answer_without_room_is_not_kept_and_its_operation_does_not_run_again() {
    let store = MemoryStore::builder().max_bytes(1000).build();
    let control = open();
    let app = pay(&control, IdempotencyLayer::new(store));
    let kilobyte: &'static str = Box::leak("x".repeat(1024).into_boxed_str());
    assert_eq!(call(&app, keyed("k", kilobyte)).await.status, StatusCode::CREATED);
    assert_eq!(call(&app, keyed("k", kilobyte)).await.problem(), "response-not-kept");
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_expired_is_removed_by_what_comes_after_it() {
    let store = MemoryStore::new();
    for number in 0..1000 {
        complete(&store, number, HOUR).await;
    }
    assert_eq!(store.len(), 1000);
    advance(HOUR).await;
    for number in 1000..2000 {
        complete(&store, number, HOUR).await;
    }
    assert!(
        store.len() <= 1100,
        "{} records: the old thousand went as the new one came",
        store.len()
    );
    let bytes_of_a_new_store = {
        let other = MemoryStore::new();
        for number in 0..store.len() {
            complete(&other, number, HOUR).await;
        }
        other.bytes()
    };
    assert_eq!(store.bytes(), bytes_of_a_new_store, "and their bytes with them");
}

#[tokio::test(start_paused = true)]
async fn a_steady_load_keeps_a_steady_size_over_days() {
    let store = MemoryStore::new();
    let mut largest_after_a_day = 0;
    for minute in 0..(7 * 24 * 60u64) {
        for number in 0..5 {
            let number = minute * 5 + number;
            match number % 5 {
                // Completed, with retentions of their own.
                0 | 1 => complete(&store, number, HOUR).await,
                2 => complete(&store, number, 24 * HOUR).await,
                // Not executed.
                3 => {
                    let lease = acquire(&store, number).await;
                    store.release(&lease).await.unwrap();
                }
                // Lost without a word.
                _ => drop(acquire(&store, number).await),
            }
        }
        advance(Duration::from_secs(60)).await;
        if minute >= 25 * 60 {
            largest_after_a_day = largest_after_a_day.max(store.len());
        }
    }
    // A day of one in each minute, an hour of two, an hour and a lease of one more.
    let expected = 24 * 60 + 2 * 60 + 61;
    assert!(
        largest_after_a_day <= expected + 100,
        "{largest_after_a_day} records instead of {expected}"
    );
    advance(48 * HOUR).await;
    // Enough steps to reach every part of the store.
    for number in 0..2000 {
        let lease = acquire(&store, u64::MAX - number).await;
        store.release(&lease).await.unwrap();
    }
    assert_eq!((store.len(), store.bytes()), (0, 0));
}

#[tokio::test]
async fn clones_share_their_records() {
    let store = MemoryStore::new();
    let clone = store.clone();
    assert!(clone.is_empty());
    acquire(&store, 1).await;
    assert!(!clone.is_empty());
    assert!(matches!(begin(&clone, 1).await, Ok(Begin::InProgress { .. })));
    assert!(format!("{clone:?}").contains("records: 1"));
}

#[tokio::test]
async fn every_claim_is_answered_at_once() {
    let store = MemoryStore::new();
    let found = store.begin_at_once(&id(1), &claim(MINUTE, HOUR));
    assert!(matches!(found, Some(Ok(Begin::Acquired(_)))), "{found:?}");
    let found = store.begin_at_once(&id(1), &claim(MINUTE, HOUR));
    assert!(matches!(found, Some(Ok(Begin::InProgress { .. }))), "{found:?}");
}

/// The store's time begins with it, and here it stands still.
#[tokio::test(start_paused = true)]
async fn a_lease_of_no_time_is_over_but_was_not_given_up() {
    let store = MemoryStore::new();
    let claim = claim(Duration::ZERO, HOUR);
    for _ in 0..2 {
        let found = store.begin(&id(1), &claim).await;
        assert!(matches!(found, Ok(Begin::Acquired(_))), "its own again: {found:?}");
    }
    let lease = Lease::new(id(1), claim.owner, 1);
    store.renew(&lease, MINUTE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_record_that_does_not_outlive_its_lease_is_removed_with_it() {
    let store = MemoryStore::new();
    store.begin(&id(1), &claim(MINUTE, Duration::ZERO)).await.unwrap();
    advance(MINUTE).await;
    // Enough steps to reach every part of the store.
    for number in 1000..2000 {
        let lease = acquire(&store, number).await;
        store.release(&lease).await.unwrap();
    }
    assert_eq!((store.len(), store.bytes()), (0, 0));
}

/// Many tasks on few records, with every transition: in the end the counts agree with what is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn under_contention_every_record_is_accounted_for() {
    let store = MemoryStore::new();
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for step in 0..5000u64 {
                    let number = (step * 7 + task) % 64;
                    let Ok(Begin::Acquired(lease)) = begin(&store, number).await else {
                        continue;
                    };
                    if step % 64 == 63 {
                        store.abandon(&lease).await.unwrap();
                    } else {
                        store.release(&lease).await.unwrap();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let mut left = 0;
    for number in 0..64 {
        match begin(&store, number).await.unwrap() {
            Begin::Acquired(lease) => store.release(&lease).await.unwrap(),
            Begin::Abandoned { .. } => left += 1,
            other => panic!("{number} is {other:?}"),
        }
    }
    assert_eq!(store.len(), left);
}

#[tokio::test]
async fn a_full_store_is_counted_as_a_fault_of_the_store() {
    let layer = IdempotencyLayer::new(MemoryStore::builder().max_records(0).build());
    let app = pay(&open(), layer.clone());
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "store-full");
    assert!(layer.counters().store_errors > 0);
}

/// What one record takes while it is in progress.
async fn bytes_of_a_record() -> u64 {
    let store = MemoryStore::new();
    acquire(&store, 0).await;
    store.bytes()
}

#[tokio::test]
async fn a_budget_in_bytes_is_used_to_the_last_one_and_a_refusal_takes_nothing() {
    let store = MemoryStore::builder().max_bytes(3 * bytes_of_a_record().await).build();
    for number in 0..3 {
        acquire(&store, number).await;
    }
    let before = (store.len(), store.bytes());
    assert_eq!(begin(&store, 3).await.unwrap_err(), StoreErrorKind::Full);
    assert_eq!((store.len(), store.bytes()), before);
}

#[tokio::test]
async fn that_an_answer_is_not_kept_is_kept_without_room() {
    let store = MemoryStore::builder().max_bytes(bytes_of_a_record().await).build();
    let lease = acquire(&store, 0).await;
    let answer = StoredResponse::not_kept(StatusCode::OK);
    store.complete(&lease, &answer, Retention::For(HOUR)).await.unwrap();
    assert!(matches!(begin(&store, 0).await, Ok(Begin::Completed { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_record_without_an_end_is_kept_for_its_lease_and_then_for_its_retention() {
    let store = MemoryStore::new();
    acquire(&store, 0).await;
    advance(HOUR + Duration::from_secs(59)).await;
    assert!(matches!(begin(&store, 0).await, Ok(Begin::Abandoned { .. })));
    advance(Duration::from_secs(1)).await;
    acquire(&store, 0).await;
}

#[tokio::test(start_paused = true)]
async fn what_was_forgotten_belongs_to_nobody() {
    let store = MemoryStore::new();
    let lease = acquire(&store, 0).await;
    advance(HOUR + Duration::from_secs(60)).await;
    for result in [
        store.renew(&lease, HOUR).await,
        store.abandon(&lease).await,
        store.release(&lease).await,
    ] {
        assert_eq!(result.unwrap_err().kind(), StoreErrorKind::Fenced);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_forgotten_on_time_however_many_expired_before_it() {
    let store = MemoryStore::new();
    for number in 0..2000 {
        complete(&store, number, HOUR).await;
    }
    advance(HOUR).await;
    // The last of each part of the store first: those before it are still there.
    for number in (0..2000).rev() {
        let lease = acquire(&store, number).await;
        store.release(&lease).await.unwrap();
    }
    assert_eq!((store.len(), store.bytes()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn records_among_many_that_were_released_keep_their_own_ends() {
    let store = MemoryStore::new();
    let mut running = Vec::new();
    for number in 0..20_000 {
        let lease = acquire(&store, number).await;
        if number % 5 == 0 {
            running.push(lease);
        } else {
            store.release(&lease).await.unwrap();
        }
    }
    let answer = StoredResponse::not_kept(StatusCode::OK);
    for (lease, hours) in running.iter().zip((1..=2).cycle()) {
        let kept = Retention::For(hours * HOUR);
        store.complete(lease, &answer, kept).await.unwrap();
    }
    let completed = running.len() as u64;
    assert_eq!(store.len(), completed);
    advance(HOUR).await;
    // Enough steps to reach every part of the store.
    for number in 100_000..110_000 {
        let lease = acquire(&store, number).await;
        store.release(&lease).await.unwrap();
    }
    assert_eq!(store.len(), completed / 2);
    advance(HOUR).await;
    for number in 200_000..210_000 {
        let lease = acquire(&store, number).await;
        store.release(&lease).await.unwrap();
    }
    assert_eq!((store.len(), store.bytes()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_answer_after_a_takeover_is_kept_for_its_own_retention() {
    let store = MemoryStore::new();
    let lost = acquire(&store, 0).await;
    store.abandon(&lost).await.unwrap();
    let claim = claim(MINUTE, HOUR).taking_over(lost);
    let Ok(Begin::Acquired(lease)) = store.begin(&id(0), &claim).await else {
        panic!("it was to be taken over");
    };
    let answer = StoredResponse::not_kept(StatusCode::OK);
    store.complete(&lease, &answer, Retention::For(3 * HOUR)).await.unwrap();
    advance(2 * HOUR).await;
    assert!(matches!(begin(&store, 0).await, Ok(Begin::Completed { .. })));
}

#[test]
fn a_listener_that_is_dropped_leaves_nothing_behind() {
    let store = MemoryStore::new();
    let listen = |numbers: std::ops::Range<u64>| {
        for number in numbers {
            let id = id(number);
            let mut changed = std::pin::pin!(store.changed(&id));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(changed.as_mut().poll(&mut context).is_pending());
        }
    };
    // The maps get their first room.
    listen(0..1000);
    let counted = allocation_counter::measure(|| listen(1000..11_000));
    assert!(counted.bytes_current < 1000, "{} bytes are left", counted.bytes_current);
}
