//! The transitions of the contract, each within the transaction of a batch.

use redb::{AccessGuard, ReadableTable, ReadableTableMetadata, Table, TableDefinition, WriteTransaction};

use super::{
    ahead::Latest,
    cache::Kept,
    damage::Damage,
    effects::Effects,
    frame::{ABANDONED, NEVER, Progress, Record, State, Time},
    look::{Found, look},
    queue::{BeginJob, Change, ChangeJob},
};
use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    record::{Begin, Lease, RecordId},
};

/// Id → record.
pub(super) const RECORDS: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("records");
/// (When to look at it, big-endian, id) → nothing: the purge's order.
pub(super) const EXPIRY: TableDefinition<&[u8; 40], ()> = TableDefinition::new("expiry");

/// How much earlier than it says in the purge's table a record may become vacant: the usual difference between a claim
/// (lease and retention) and its completion (retention). Moving the entry would cost a second page for each completion.
const PURGED_LATE: Time = 120 * 1_000_000_000;

/// What a claim takes of the room, roughly.
const CLAIM_BYTES: u64 = 200;

/// What of a step concerns nobody but the store, or nobody at all.
type Step<T> = Result<Result<T, StoreError>, redb::Error>;

pub(super) struct Batch<'txn> {
    records: Table<'txn, &'static [u8; 32], &'static [u8]>,
    expiry: Table<'txn, &'static [u8; 40], ()>,
    damage: &'txn Damage,
    run: u64,
    /// How many bytes may still be taken; `None` while the disk is not full.
    room: Option<u64>,
    changed: bool,
    effects: Effects,
    latest: Vec<(RecordId, Latest)>,
}

/// What is to be done about one record, once nothing borrows it any more.
enum Plan {
    Acquire { fence: u64 },
    Renew(Progress),
}

impl<'txn> Batch<'txn> {
    pub(super) fn new(
        transaction: &'txn WriteTransaction,
        damage: &'txn Damage,
        run: u64,
        room: Option<u64>,
    ) -> Result<Self, redb::TableError> {
        Ok(Self {
            records: transaction.open_table(RECORDS)?,
            expiry: transaction.open_table(EXPIRY)?,
            damage,
            run,
            room,
            changed: false,
            effects: Effects::new(),
            latest: Vec::new(),
        })
    }

    /// Whether there is anything to commit.
    pub(super) fn changed(&self) -> bool {
        self.changed
    }

    pub(super) fn records(&self) -> Result<u64, redb::Error> {
        Ok(self.records.len()?)
    }

    pub(super) fn room(&self) -> Option<u64> {
        self.room
    }

    /// And what became of each record.
    pub(super) fn into_effects(self) -> (Effects, Vec<(RecordId, Latest)>) {
        (self.effects, self.latest)
    }

    /// The record's bytes. If a damaged page keeps them, that is noted; one that something else needs is no fault of the
    /// record's.
    fn stored(&self, id: &RecordId) -> Result<Option<AccessGuard<'_, &'static [u8]>>, redb::Error> {
        let stored = self.records.get(id.as_bytes()).map_err(redb::Error::from);
        stored.inspect_err(|error| self.damage.note(id, error))
    }

    fn insert_record(&mut self, id: &RecordId, bytes: Vec<u8>) -> Written {
        self.effects.put(id.as_bytes(), &bytes);
        self.records.insert(id.as_bytes(), &bytes[..])?;
        self.latest.push((*id, Some(bytes.into())));
        Ok(())
    }

    /// With the length of what was removed.
    fn remove_record(&mut self, id: &RecordId) -> Result<usize, redb::Error> {
        self.effects.remove(id.as_bytes());
        self.latest.push((*id, None));
        let removed = self.records.remove(id.as_bytes())?;
        Ok(removed.map_or(0, |old| old.value().len()))
    }

    fn insert_place(&mut self, place: &[u8; 40]) -> Written {
        self.effects.place(place);
        self.expiry.insert(place, ())?;
        Ok(())
    }

    fn remove_place(&mut self, place: &[u8; 40]) -> Written {
        self.effects.unplace(place);
        self.expiry.remove(place)?;
        Ok(())
    }

    pub(super) fn begin(&mut self, job: &BeginJob, now: Time) -> Step<Begin> {
        let BeginJob { id, claim, .. } = job;
        let (plan, old) = {
            let stored = self.stored(id)?;
            let record = match stored.as_ref().map(|stored| decode(id, stored.value())).transpose() {
                Ok(record) => record,
                Err(error) => return Ok(Err(error)),
            };
            let plan = match look(id, record.as_ref(), claim, self.run, now) {
                Found::Vacant => Plan::Acquire { fence: 1 },
                Found::TakenOver { fence } => Plan::Acquire { fence },
                Found::Own(progress) => Plan::Renew(progress),
                other => return Ok(answer(other)),
            };
            (
                plan,
                record.map(|record| Record {
                    state: State::Completed(&[]),
                    ..record
                }),
            )
        };
        let lease = super::duration(claim.lease);
        match plan {
            Plan::Renew(progress) => {
                let Some(old) = old else {
                    return Ok(Err(StoreErrorKind::Fenced.into()));
                };
                self.renew(id, &old, progress, lease, now)?;
                Ok(Ok(Begin::Acquired(Lease::new(*id, claim.owner, old.fence))))
            }
            Plan::Acquire { fence } => {
                if !self.take_room(CLAIM_BYTES) {
                    return Ok(Err(StoreErrorKind::Full.into()));
                }
                let lease_until = lease_end(now, lease);
                let keep = super::retention(claim.retention);
                let progress = Progress {
                    owner: claim.owner,
                    lease_until,
                    keep,
                    run: self.run,
                };
                let record = Record {
                    vacant_at: lease_until.saturating_add(keep),
                    indexed_at: NEVER,
                    since: now,
                    fence,
                    fingerprint: claim.fingerprint,
                    state: State::InProgress(progress),
                };
                self.put(id, record, old.map_or(NEVER, |old| old.indexed_at))?;
                Ok(Ok(Begin::Acquired(Lease::new(*id, claim.owner, fence))))
            }
        }
    }

    /// With what was kept, if that is what it does.
    pub(super) fn change(&mut self, job: &ChangeJob, now: Time) -> Step<Option<Kept>> {
        let id = &job.lease.id;
        let (old, progress) = {
            let stored = self.stored(id)?;
            let Some(stored) = stored else {
                return Ok(Err(StoreErrorKind::Fenced.into()));
            };
            let record = match decode(id, stored.value()) {
                Ok(record) => record,
                Err(error) => return Ok(Err(error)),
            };
            match record.state {
                State::InProgress(progress) if progress.owner == job.lease.owner && record.vacant_at > now => (
                    Record {
                        state: State::Completed(&[]),
                        ..record
                    },
                    progress,
                ),
                _ => return Ok(Err(StoreErrorKind::Fenced.into())),
            }
        };
        match &job.change {
            Change::Complete(response, keep) => {
                // That an answer was not kept is never refused: without it the operation would run again.
                if response.is_kept() && !self.take_room(response.len() as u64) {
                    return Ok(Err(StoreErrorKind::Full.into()));
                }
                let record = Record {
                    vacant_at: now.saturating_add(*keep),
                    since: now,
                    state: State::Completed(response.as_bytes()),
                    ..old
                };
                self.put(id, record, old.indexed_at)?;
                return Ok(Ok(Some(Kept {
                    fingerprint: old.fingerprint,
                    response: response.clone(),
                    vacant_at: record.vacant_at,
                })));
            }
            Change::Renew(_) if progress.lease_until == ABANDONED => return Ok(Err(StoreErrorKind::Fenced.into())),
            Change::Renew(length) => self.renew(id, &old, progress, *length, now)?,
            Change::Release => {
                self.changed = true;
                self.remove_record(id)?;
                self.forget(id, old.indexed_at)?;
            }
            Change::Abandon => {
                let progress = Progress {
                    lease_until: ABANDONED,
                    ..progress
                };
                let record = Record {
                    vacant_at: now.saturating_add(progress.keep),
                    state: State::InProgress(progress),
                    ..old
                };
                self.put(id, record, old.indexed_at)?;
            }
        }
        Ok(Ok(None))
    }

    fn renew(&mut self, id: &RecordId, old: &Record<'_>, progress: Progress, length: Time, now: Time) -> Written {
        let lease_until = lease_end(now, length);
        let record = Record {
            vacant_at: lease_until.saturating_add(progress.keep),
            state: State::InProgress(Progress {
                lease_until,
                run: self.run,
                ..progress
            }),
            ..*old
        };
        self.put(id, record, old.indexed_at)
    }

    /// Writes a record, whose last one is at `indexed` in the purge's table.
    fn put(&mut self, id: &RecordId, mut record: Record<'_>, indexed: Time) -> Written {
        self.changed = true;
        if indexed != NEVER && indexed <= record.vacant_at.saturating_add(PURGED_LATE) {
            // Looked at a little late, or too early and then put off: either is cheaper than moving it now.
            record.indexed_at = indexed;
        } else {
            self.forget(id, indexed)?;
            record.indexed_at = record.vacant_at;
            if record.indexed_at != NEVER {
                self.insert_place(&key(record.indexed_at, id))?;
            }
        }
        self.insert_record(id, record.encode(id))
    }

    fn forget(&mut self, id: &RecordId, indexed: Time) -> Written {
        if indexed != NEVER {
            self.remove_place(&key(indexed, id))?;
        }
        Ok(())
    }

    fn take_room(&mut self, bytes: u64) -> bool {
        let Some(room) = &mut self.room else { return true };
        match room.checked_sub(bytes) {
            Some(left) => {
                *room = left;
                true
            }
            None => false,
        }
    }

    /// Removes up to `most` records whose time is over.
    pub(super) fn purge(&mut self, now: Time, most: usize) -> Written {
        let due: Vec<[u8; 40]> = {
            let range = self
                .expiry
                .range::<&[u8; 40]>(..=&key(now, &RecordId::from_bytes([0xff; 32])))?;
            let keys = range.take(most).map(|entry| Ok(*entry?.0.value()));
            keys.collect::<Result<_, redb::StorageError>>()?
        };
        for key in due {
            self.purge_one(&key, now)?;
        }
        Ok(())
    }

    fn purge_one(&mut self, place: &[u8; 40], now: Time) -> Written {
        self.changed = true;
        self.remove_place(place)?;
        let (Some((indexed, _)), Some(id)) = (place.split_first_chunk(), place.last_chunk()) else {
            return Ok(());
        };
        let (indexed, id) = (u64::from_be_bytes(*indexed), RecordId::from_bytes(*id));
        let put_off = {
            let Some(stored) = self.records.get(id.as_bytes())? else {
                return Ok(());
            };
            // What cannot be read is not removed: it would be vacant then.
            let Ok(record) = decode(&id, stored.value()) else {
                return Ok(());
            };
            if record.indexed_at != indexed {
                return Ok(());
            }
            if record.vacant_at > now {
                let indexed_at = record.vacant_at;
                Some((indexed_at, Record { indexed_at, ..record }.encode(&id)))
            } else {
                None
            }
        };
        match put_off {
            Some((at, bytes)) => {
                if at != NEVER {
                    self.insert_place(&key(at, &id))?;
                }
                self.insert_record(&id, bytes)?;
            }
            None => {
                let removed = self.remove_record(&id)?;
                if let Some(room) = &mut self.room {
                    *room += removed as u64;
                }
            }
        }
        Ok(())
    }
}

type Written = Result<(), redb::Error>;

fn lease_end(now: Time, length: Time) -> Time {
    now.saturating_add(length).max(ABANDONED + 1)
}

fn key(at: Time, id: &RecordId) -> [u8; 40] {
    let mut key = [0; 40];
    key[..8].copy_from_slice(&at.to_be_bytes());
    key[8..].copy_from_slice(id.as_bytes());
    key
}

/// A record, or an error that somebody is told of.
pub(super) fn decode<'a>(id: &RecordId, bytes: &'a [u8]) -> Result<Record<'a>, StoreError> {
    Record::decode(id, bytes).inspect_err(|error| {
        let source = std::error::Error::source(error).map(tracing::field::display);
        tracing::error!(record = %id, %error, source, "a record in the idempotency store's file cannot be read");
    })
}

/// What a claim is told that changes nothing; a claim that does is an error here, and never comes.
pub(super) fn answer(found: Found<'_>) -> Result<Begin, StoreError> {
    match found {
        Found::InProgress { fingerprint, remaining } => Ok(Begin::InProgress { fingerprint, remaining }),
        Found::Abandoned { fingerprint, lost } => Ok(Begin::Abandoned { fingerprint, lost }),
        Found::Completed {
            fingerprint,
            answer,
            remaining,
        } => {
            // The only copy of an answer: from the file's page to bytes of its own, which every replay slices.
            let response = StoredResponse::from_bytes(bytes::Bytes::copy_from_slice(answer))?;
            Ok(Begin::Completed {
                fingerprint,
                response,
                remaining: Some(remaining),
            })
        }
        Found::Vacant | Found::Own(_) | Found::TakenOver { .. } => Err(StoreErrorKind::Other.into()),
    }
}
