//! What a batch makes of one record.

use std::time::Duration;

use redb::{Database, ReadableTable, backends::InMemoryBackend};

use super::super::{
    batch::{Batch, EXPIRY, decode},
    damage::Damage,
    frame::Time,
    queue::{BeginJob, Change, ChangeJob},
};
use crate::{
    codec::StoredResponse,
    error::StoreErrorKind,
    fingerprint::Fingerprint,
    record::{Begin, Claim, Lease, Owner, RecordId, Retention},
};

fn id() -> RecordId {
    RecordId::from_bytes([1; 32])
}

fn owner() -> Owner {
    Owner::from_bytes([7; 16])
}

/// What is done to one record, in nanoseconds, and nothing is committed. When the purge looks at it afterwards.
fn in_a_batch(steps: impl FnOnce(Batch<'_>)) -> Vec<Time> {
    let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
    let (transaction, damage) = (database.begin_write().unwrap(), Damage::default());
    steps(Batch::new(&transaction, &damage, 1, None).unwrap());
    let places = transaction.open_table(EXPIRY).unwrap();
    let times = places.iter().unwrap().map(|place| {
        let place = place.unwrap().0.value().to_owned();
        Time::from_be_bytes(*place.first_chunk().unwrap())
    });
    times.collect()
}

/// Somebody else's, if that is not the owner's.
fn begin(batch: &mut Batch<'_>, by: Owner, lease: Time, keep: Time, now: Time) -> &'static str {
    let keep = Retention::For(Duration::from_nanos(keep));
    let claim = Claim::new(Fingerprint::new(1, [1; 32]), by, Duration::from_nanos(lease), keep);
    let job = BeginJob {
        id: id(),
        claim,
        asked: now,
        answer: None,
    };
    match batch.begin(&job, now).unwrap().unwrap() {
        Begin::Acquired(_) => "acquired",
        Begin::InProgress { .. } => "in progress",
        Begin::Abandoned { .. } => "abandoned",
        Begin::Completed { .. } => "completed",
    }
}

fn change(batch: &mut Batch<'_>, change: Change, now: Time) -> Result<(), StoreErrorKind> {
    let (answer, _) = tokio::sync::oneshot::channel();
    let job = ChangeJob {
        lease: Lease::new(id(), owner(), 1),
        change,
        asked: now,
        answer,
    };
    let changed = batch.change(&job, now).unwrap();
    changed.map(drop).map_err(|error| error.kind())
}

#[test]
fn what_is_looked_at_too_early_is_put_off_to_its_own_time_and_removed_then() {
    in_a_batch(|mut batch| {
        let batch = &mut batch;
        assert_eq!(begin(batch, owner(), 10, 5, 0), "acquired");
        change(batch, Change::Renew(100), 5).unwrap();
        for (now, left) in [(14, 1), (20, 1), (109, 1), (110, 0)] {
            batch.purge(now, 10).unwrap();
            assert_eq!(batch.records().unwrap(), left, "at {now}");
        }
    });
}

#[test]
fn an_attempt_that_was_abandoned_is_remembered_for_its_retention_from_then_on() {
    let other = Owner::from_bytes([8; 16]);
    in_a_batch(|mut batch| {
        let batch = &mut batch;
        assert_eq!(begin(batch, owner(), 100, 50, 0), "acquired");
        assert_eq!(begin(batch, other, 100, 50, 9), "in progress");
        change(batch, Change::Abandon, 10).unwrap();
        assert_eq!(begin(batch, other, 100, 50, 59), "abandoned");
        assert_eq!(begin(batch, other, 100, 50, 60), "acquired");
    });
}

#[test]
fn a_lease_of_no_time_is_over_and_not_given_up() {
    in_a_batch(|mut batch| {
        let batch = &mut batch;
        assert_eq!(begin(batch, owner(), 0, 50, 0), "acquired");
        change(batch, Change::Renew(5), 0).unwrap();
        change(batch, Change::Abandon, 1).unwrap();
        assert_eq!(change(batch, Change::Renew(5), 1), Err(StoreErrorKind::Fenced));
    });
}

#[test]
fn a_record_that_is_kept_for_longer_keeps_its_place_and_one_that_is_gone_leaves_none() {
    let places = in_a_batch(|mut batch| {
        begin(&mut batch, owner(), 10, 5, 0);
        change(&mut batch, Change::Renew(100), 5).unwrap();
    });
    assert_eq!(places, [15], "it is put off when it is looked at");
    let places = in_a_batch(|mut batch| {
        begin(&mut batch, owner(), 10, 5, 0);
        change(&mut batch, Change::Release, 5).unwrap();
    });
    assert!(places.is_empty(), "{places:?}");
}

#[test]
fn a_completion_is_of_its_own_time_and_its_owner_has_until_the_record_is_vacant() {
    in_a_batch(|mut batch| {
        let complete = || Change::Complete(StoredResponse::not_kept(http::StatusCode::OK), 7);
        begin(&mut batch, owner(), 10, 5, 0);
        assert_eq!(change(&mut batch, complete(), 15), Err(StoreErrorKind::Fenced));
        change(&mut batch, complete(), 14).unwrap();
        let (_, latest) = batch.into_effects();
        let (_, bytes) = latest.into_iter().next_back().unwrap();
        let bytes = bytes.unwrap();
        let record = decode(&id(), &bytes).unwrap();
        assert_eq!((record.since, record.vacant_at), (14, 21));
    });
}
