//! One shard's records and every transition that they can make, each under the shard's lock.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use super::{
    IdHasherBuilder, Listeners, NEVER, Time,
    budget::Budget,
    expiry::{Expiry, Ticket},
    nanos, retention_nanos,
};
use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    record::{Begin, Claim, Lease, Owner, RecordId, Retention},
};

pub(super) struct Shard {
    records: Records,
    expiry: Expiry,
    listeners: HashMap<RecordId, (Listeners, usize), IdHasherBuilder>,
}

/// Boxed: a map that grows moves pointers, and its spare room holds pointers.
type Records = HashMap<RecordId, Box<Record>, IdHasherBuilder>;

struct Record {
    fingerprint: Fingerprint,
    /// From here on the record is vacant.
    vacant_at: Time,
    /// Where the queue has it: at the end of its lease while it is in progress, at `vacant_at` from then on.
    ticket: Option<Ticket>,
    state: State,
}

enum State {
    InProgress {
        owner: Owner,
        fence: u64,
        lease_until: Time,
        /// How long the record stays after its lease.
        keep: Time,
    },
    Completed(StoredResponse),
}

/// The budget has no room for what is asked.
#[derive(Debug)]
pub(super) struct NoRoom;

/// The end of a lease that its owner gave up. No other lease ends there, since this one is never renewed.
const ABANDONED: Time = 0;

fn lease_end(now: Time, length: Time) -> Time {
    now.saturating_add(length).max(ABANDONED + 1)
}

fn remaining(vacant_at: Time, now: Time) -> Retention {
    match vacant_at {
        NEVER => Retention::Forever,
        at => Retention::For(Duration::from_nanos(at.saturating_sub(now))),
    }
}

/// Expired records that one operation removes at most: it pays for its own and catches up a little.
const REMOVED_PER_STEP: usize = 4;

impl Record {
    fn answer_bytes(&self) -> u64 {
        match &self.state {
            State::InProgress { .. } => 0,
            State::Completed(response) => response.len() as u64,
        }
    }
}

impl Shard {
    pub(super) fn new(hasher: IdHasherBuilder) -> Self {
        Self {
            records: HashMap::with_hasher(hasher),
            expiry: Expiry::default(),
            listeners: HashMap::with_hasher(hasher),
        }
    }

    pub(super) fn begin(&mut self, id: &RecordId, claim: &Claim, now: Time, budget: &Budget) -> Result<Begin, NoRoom> {
        self.remove_expired(now, REMOVED_PER_STEP, budget);
        match self.records.entry(*id) {
            Entry::Vacant(vacant) => {
                budget.add_record()?;
                let fence = 1;
                let record = vacant.insert(Box::new(Record::in_progress(claim, fence, now)));
                record.ticket = self.expiry.set(*id, now, nanos(claim.lease));
                Ok(Begin::Acquired(Lease::new(*id, claim.owner, fence)))
            }
            Entry::Occupied(mut occupied) => {
                let record = occupied.get_mut();
                let fence = if record.vacant_at <= now {
                    budget.remove_bytes(record.answer_bytes());
                    1
                } else {
                    match &record.state {
                        State::Completed(response) => {
                            return Ok(Begin::Completed {
                                fingerprint: record.fingerprint,
                                response: response.clone(),
                                remaining: Some(remaining(record.vacant_at, now)),
                            });
                        }
                        State::InProgress {
                            owner,
                            fence,
                            lease_until,
                            ..
                        } if *owner == claim.owner && *lease_until != ABANDONED => {
                            let own = Lease::new(*id, *owner, *fence);
                            // It cannot fail: the record was just seen to be its own.
                            let _ = self.renew(&own, nanos(claim.lease), now);
                            return Ok(Begin::Acquired(own));
                        }
                        #[cfg(seeded_bug)]
                        State::InProgress { owner, fence, .. }
                            if crate::seeded::is("takes over a living lease")
                                && claim.takeover != Some(Lease::new(*id, *owner, *fence)) =>
                        {
                            return Ok(Begin::Abandoned {
                                fingerprint: record.fingerprint,
                                lost: Lease::new(*id, *owner, *fence),
                            });
                        }
                        #[cfg(seeded_bug)]
                        State::InProgress { fence, .. } if crate::seeded::is("takes over a living lease") => {
                            fence.saturating_add(1)
                        }
                        State::InProgress { lease_until, .. } if *lease_until > now => {
                            return Ok(Begin::InProgress {
                                fingerprint: record.fingerprint,
                                remaining: Duration::from_nanos(lease_until - now),
                            });
                        }
                        State::InProgress { owner, fence, .. } => {
                            let lost = Lease::new(*id, *owner, *fence);
                            if claim.takeover != Some(lost) {
                                let fingerprint = record.fingerprint;
                                return Ok(Begin::Abandoned { fingerprint, lost });
                            }
                            fence.saturating_add(1)
                        }
                    }
                };
                let old = record.ticket;
                **record = Record::in_progress(claim, fence, now);
                record.ticket = self.expiry.set(*id, now, nanos(claim.lease));
                self.cancel(old);
                Ok(Begin::Acquired(Lease::new(*id, claim.owner, fence)))
            }
        }
    }

    pub(super) fn complete(
        &mut self,
        lease: &Lease,
        response: &StoredResponse,
        keep: Time,
        now: Time,
        budget: &Budget,
    ) -> Result<Option<Listeners>, StoreError> {
        self.remove_expired(now, REMOVED_PER_STEP, budget);
        let record = owned(&mut self.records, lease, now)?;
        let bytes = response.len() as u64;
        if response.is_kept() {
            budget.add_bytes(bytes).map_err(|NoRoom| StoreErrorKind::Full)?;
        } else {
            budget.force_bytes(bytes);
        }
        record.state = State::Completed(response.clone());
        record.vacant_at = now.saturating_add(keep);
        let old = record.ticket;
        record.ticket = self.expiry.set(lease.id, now, keep);
        self.cancel(old);
        Ok(self.listeners(&lease.id))
    }

    pub(super) fn renew(&mut self, lease: &Lease, length: Time, now: Time) -> Result<(), StoreError> {
        let record = owned(&mut self.records, lease, now)?;
        if let State::InProgress { lease_until, keep, .. } = &mut record.state {
            if *lease_until == ABANDONED {
                return Err(StoreErrorKind::Fenced.into());
            }
            *lease_until = lease_end(now, length);
            record.vacant_at = lease_until.saturating_add(*keep);
        }
        let old = record.ticket;
        record.ticket = self.expiry.set(lease.id, now, length);
        self.cancel(old);
        Ok(())
    }

    pub(super) fn release(
        &mut self,
        lease: &Lease,
        now: Time,
        budget: &Budget,
    ) -> Result<Option<Listeners>, StoreError> {
        let old = owned(&mut self.records, lease, now)?.ticket;
        self.cancel(old);
        self.remove(&lease.id, budget);
        Ok(self.listeners(&lease.id))
    }

    pub(super) fn abandon(&mut self, lease: &Lease, now: Time) -> Result<Option<Listeners>, StoreError> {
        let record = owned(&mut self.records, lease, now)?;
        let old = record.ticket;
        if let State::InProgress { lease_until, keep, .. } = &mut record.state {
            *lease_until = ABANDONED;
            record.vacant_at = now.saturating_add(*keep);
            record.ticket = self.expiry.set(lease.id, now, *keep);
        }
        self.cancel(old);
        Ok(self.listeners(&lease.id))
    }

    /// Removes up to `most` records whose time is over, and moves those whose lease has ended to the queue of their
    /// retention. Gives how many there were; fewer than `most` if that was all.
    pub(super) fn remove_expired(&mut self, now: Time, most: usize, budget: &Budget) -> usize {
        for count in 0..most {
            let Some(id) = self.expiry.pop(now) else { return count };
            let record = self.records.get_mut(&id);
            debug_assert!(record.is_some(), "a queued record is gone");
            let Some(record) = record else { continue };
            match &record.state {
                State::InProgress { keep, .. } if record.vacant_at > now => {
                    // Counted from now: if the end of the lease was noticed late, the record stays a little longer.
                    record.ticket = self.expiry.set(id, now, *keep);
                }
                _ => self.remove(&id, budget),
            }
        }
        most
    }

    #[cfg(seeded_bug)]
    pub(super) fn is_vacant(&self, id: &RecordId) -> bool {
        !self.records.contains_key(id)
    }

    /// As if the record had not been there when it was looked for.
    #[cfg(seeded_bug)]
    pub(super) fn forget(&mut self, id: &RecordId, budget: &Budget) {
        let ticket = self.records.get(id).and_then(|record| record.ticket);
        self.cancel(ticket);
        self.remove(id, budget);
    }

    fn remove(&mut self, id: &RecordId, budget: &Budget) {
        if let Some(record) = self.records.remove(id) {
            budget.remove_record(record.answer_bytes());
        }
    }

    fn cancel(&mut self, ticket: Option<Ticket>) {
        let Some(ticket) = ticket else { return };
        self.expiry.cancel(ticket, |id, ticket| {
            if let Some(record) = self.records.get_mut(id) {
                record.ticket = Some(ticket);
            }
        });
    }

    fn listeners(&self, id: &RecordId) -> Option<Listeners> {
        // Nobody waits, nearly always.
        if self.listeners.is_empty() {
            return None;
        }
        self.listeners.get(id).map(|(listeners, _)| Arc::clone(listeners))
    }

    pub(super) fn listen(&mut self, id: RecordId) -> Listeners {
        let (listeners, count) = self.listeners.entry(id).or_default();
        *count += 1;
        Arc::clone(listeners)
    }

    pub(super) fn unlisten(&mut self, id: &RecordId) {
        if let Some((_, count)) = self.listeners.get_mut(id) {
            *count -= 1;
            if *count == 0 {
                self.listeners.remove(id);
            }
        }
    }
}

/// The record, if it is in progress and belongs to the lease's owner.
fn owned<'a>(records: &'a mut Records, lease: &Lease, now: Time) -> Result<&'a mut Record, StoreError> {
    match records.get_mut(&lease.id) {
        Some(record)
            if record.vacant_at > now
                && matches!(&record.state, State::InProgress { owner, .. } if *owner == lease.owner) =>
        {
            Ok(record)
        }
        _ => Err(StoreErrorKind::Fenced.into()),
    }
}

impl Record {
    fn in_progress(claim: &Claim, fence: u64, now: Time) -> Self {
        let lease_until = lease_end(now, nanos(claim.lease));
        let keep = retention_nanos(claim.retention);
        Self {
            fingerprint: claim.fingerprint,
            vacant_at: lease_until.saturating_add(keep),
            ticket: None,
            state: State::InProgress {
                owner: claim.owner,
                fence,
                lease_until,
                keep,
            },
        }
    }
}
