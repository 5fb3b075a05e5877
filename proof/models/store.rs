//! Threads at one record of a memory store, in every order that matters.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use shuttle::thread::{self, JoinHandle};
use support::{SECOND, begin, claim, explore, id, lease, now};
use tower_idempotency::{Begin, Lease, MemoryStore, Retention, Store, StoreErrorKind, StoredResponse, sync};

/// An answer that names who gave it: by its status, since nothing else of one can be made without a layer.
fn answer(owner: u8) -> StoredResponse {
    StoredResponse::not_kept(StatusCode::from_u16(200 + u16::from(owner)).unwrap())
}

fn answered_by(begin: &Begin) -> Option<u8> {
    match begin {
        Begin::Completed { response, .. } => Some((response.status().as_u16() - 200) as u8),
        _ => None,
    }
}

fn complete(store: &MemoryStore, lease: &Lease, owner: u8) -> bool {
    let keep = Retention::Forever;
    match now(store.complete(lease, &answer(owner), keep)) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.kind(), StoreErrorKind::Fenced);
            false
        }
    }
}

fn acquired(begin: &Begin) -> Option<Lease> {
    match begin {
        Begin::Acquired(lease) => Some(*lease),
        _ => None,
    }
}

fn spawn<T: Send + 'static>(
    store: &Arc<MemoryStore>,
    work: impl FnOnce(&MemoryStore) -> T + Send + 'static,
) -> JoinHandle<T> {
    let store = Arc::clone(store);
    thread::spawn(move || work(&store))
}

fn store() -> Arc<MemoryStore> {
    Arc::new(MemoryStore::new())
}

/// A store whose record was claimed by owner 1 and lost.
fn lost() -> Arc<MemoryStore> {
    let store = store();
    assert!(acquired(&begin(&store, &claim(1))).is_some());
    sync::pass(11 * SECOND);
    store
}

#[test]
fn of_many_who_claim_a_vacant_record_one_gets_it() {
    explore(|| {
        let store = store();
        let claims: Vec<_> = (1..=3)
            .map(|owner| spawn(&store, move |store| acquired(&begin(store, &claim(owner))).is_some()))
            .collect();
        let won = claims.into_iter().map(|claim| claim.join().unwrap());
        assert_eq!(won.filter(|won| *won).count(), 1);
        assert_eq!(store.len(), 1);
    });
}

#[test]
fn an_owner_of_a_record_that_was_made_anew_is_not_its_owner() {
    explore(|| {
        // The record expires, and its fence comes round to 1 again.
        let store = lost();
        sync::pass(200 * SECOND);
        let anew = spawn(&store, |store| {
            let lease = acquired(&begin(store, &claim(2))).expect("it is vacant");
            assert_eq!(lease.fence, 1);
            complete(store, &lease, 2)
        });
        let late = spawn(&store, |store| complete(store, &lease(1, 1), 1));
        let released = spawn(&store, |store| now(store.release(&lease(1, 1))).is_ok());
        assert!(anew.join().unwrap());
        assert!(!late.join().unwrap() && !released.join().unwrap());
        assert_eq!(answered_by(&begin(&store, &claim(3))), Some(2));
    });
}

#[test]
fn a_late_release_leaves_who_took_over_alone() {
    explore(|| {
        let store = lost();
        let takeover = spawn(&store, |store| begin(store, &claim(2).taking_over(lease(1, 1))));
        let release = spawn(&store, |store| now(store.release(&lease(1, 1))).is_ok());
        let took = acquired(&takeover.join().unwrap());
        let released = release.join().unwrap();
        // Before the takeover the release frees the record, which is then claimed as a vacant one.
        let lease = took.expect("vacant or lost, it is to be had");
        assert_eq!(lease.fence, if released { 1 } else { 2 });
        assert!(matches!(begin(&store, &claim(3)), Begin::InProgress { .. }));
        assert!(complete(&store, &lease, 2));
    });
}

#[test]
fn a_completion_and_a_takeover_exclude_each_other() {
    explore(|| {
        let store = lost();
        let takeover = spawn(&store, |store| begin(store, &claim(2).taking_over(lease(1, 1))));
        let completion = spawn(&store, |store| complete(store, &lease(1, 1), 1));
        let (begun, completed) = (takeover.join().unwrap(), completion.join().unwrap());
        assert_ne!(acquired(&begun).is_some(), completed);
        let expected = if completed { Some(1) } else { None };
        assert_eq!(answered_by(&begun), expected);
        assert_eq!(answered_by(&begin(&store, &claim(3))), expected);
    });
}

#[test]
fn a_completion_races_the_end_of_its_record_and_is_stored_or_fenced() {
    explore(|| {
        let store = lost();
        let time = thread::spawn(|| sync::pass(200 * SECOND));
        let anew = spawn(&store, |store| acquired(&begin(store, &claim(2))));
        let completed = spawn(&store, |store| complete(store, &lease(1, 1), 1)).join().unwrap();
        let (anew, ()) = (anew.join().unwrap(), time.join().unwrap());
        match (anew, completed) {
            (None, true) => assert_eq!(answered_by(&begin(&store, &claim(3))), Some(1)),
            // It may have ended, too.
            (Some(_) | None, false) => {}
            (Some(_), true) => panic!("two owners"),
        }
    });
}

#[test]
fn a_renewal_and_a_takeover_exclude_each_other() {
    explore(|| {
        let store = lost();
        let renewal = spawn(&store, |store| now(store.renew(&lease(1, 1), 10 * SECOND)).is_ok());
        let takeover = spawn(&store, |store| begin(store, &claim(2).taking_over(lease(1, 1))));
        let (renewed, begun) = (renewal.join().unwrap(), takeover.join().unwrap());
        assert_ne!(renewed, acquired(&begun).is_some());
        assert_eq!(complete(&store, &lease(1, 1), 1), renewed);
    });
}

#[test]
fn sweepers_and_a_claim_on_an_expired_record_have_one_winner() {
    explore(|| {
        let store = Arc::new(MemoryStore::builder().max_records(1).build());
        assert!(acquired(&begin(&store, &claim(1))).is_some());
        sync::pass(200 * SECOND);
        // Others find no room and sweep; the budget holds one record.
        let others: Vec<_> = (2..=3)
            .map(|number| {
                spawn(&store, move |store| {
                    let other = tower_idempotency::RecordId::from_bytes([number; 32]);
                    now(store.begin(&other, &claim(number))).is_ok()
                })
            })
            .collect();
        let same = spawn(&store, |store| {
            now(store.begin(&id(), &claim(4))).is_ok_and(|begin| acquired(&begin).is_some())
        });
        let mut won = usize::from(same.join().unwrap());
        won += others
            .into_iter()
            .map(|other| usize::from(other.join().unwrap()))
            .sum::<usize>();
        assert_eq!(won, 1, "room for one");
        assert_eq!(store.len(), 1);
    });
}

#[test]
fn a_listener_that_looks_after_it_registered_misses_no_change() {
    explore(|| {
        let store = store();
        let lease = acquired(&begin(&store, &claim(1))).unwrap();
        let ending = spawn(&store, move |store| complete(store, &lease, 1));
        let waiting = spawn(&store, |store| {
            let id = id();
            shuttle::future::block_on(async {
                let mut changed = std::pin::pin!(store.changed(&id));
                let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                // Registered by the first poll.
                if changed.as_mut().poll(&mut context).is_ready() {
                    return;
                }
                if answered_by(&store.begin(&id, &claim(2)).await.unwrap()).is_none() {
                    // Without a call this would be for ever.
                    changed.await;
                }
            });
            answered_by(&begin(store, &claim(2)))
        });
        assert!(ending.join().unwrap());
        assert_eq!(waiting.join().unwrap(), Some(1));
    });
}

#[test]
fn a_listener_that_leaves_takes_no_others_call() {
    explore(|| {
        let store = store();
        let lease = acquired(&begin(&store, &claim(1))).unwrap();
        let staying = spawn(&store, |store| {
            let id = id();
            shuttle::future::block_on(async {
                loop {
                    let mut changed = std::pin::pin!(store.changed(&id));
                    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                    let heard = changed.as_mut().poll(&mut context).is_ready();
                    if acquired(&store.begin(&id, &claim(2)).await.unwrap()).is_some() {
                        return;
                    }
                    if !heard {
                        changed.await;
                    }
                }
            });
        });
        let leaving = spawn(&store, |store| {
            let id = id();
            let mut changed = Box::pin(store.changed(&id));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            let _ = changed.as_mut().poll(&mut context);
            thread::yield_now();
        });
        now(store.release(&lease)).unwrap();
        leaving.join().unwrap();
        staying.join().unwrap();
    });
}

#[test]
fn the_budget_never_grants_the_last_place_twice() {
    explore(|| {
        let store = Arc::new(MemoryStore::builder().max_records(2).build());
        let claims: Vec<_> = (1..=3)
            .map(|number| {
                spawn(&store, move |store| {
                    let own = tower_idempotency::RecordId::from_bytes([number; 32]);
                    now(store.begin(&own, &claim(number))).is_ok()
                })
            })
            .collect();
        let granted = claims
            .into_iter()
            .filter_map(|claim| claim.join().unwrap().then_some(()))
            .count();
        assert!(granted <= 2 && store.len() == granted as u64);
    });
}

/// A body of its own size, so that the store's bytes can be told.
#[test]
fn what_the_budget_counts_is_what_the_store_holds() {
    explore(|| {
        let store = store();
        let lease = acquired(&begin(&store, &claim(1))).unwrap();
        let ends: Vec<_> = [0, 1]
            .into_iter()
            .map(|end| {
                spawn(&store, move |store| match end {
                    0 => complete(store, &lease, 1),
                    _ => now(store.release(&lease)).is_ok(),
                })
            })
            .collect();
        let ended: Vec<bool> = ends.into_iter().map(|end| end.join().unwrap()).collect();
        assert_eq!(ended.iter().filter(|ended| **ended).count(), 1, "one of them decides");
        let fact = StoredResponse::from_bytes(Bytes::clone(answer(1).as_bytes())).unwrap();
        let records = u64::from(ended[0]);
        assert_eq!(store.len(), records);
        assert!(store.bytes() >= records * fact.len() as u64);
        assert_eq!(store.bytes() == 0, records == 0);
    });
}
