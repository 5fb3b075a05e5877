//! Every store passes the contract, and a store that breaks a sentence of it does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::Notify,
    task::yield_now,
    time::{Instant, advance, sleep},
};
use tower_idempotency::{
    AnyStore, Begin, Claim, Fingerprint, Lease, MemoryStore, Owner, RecordId, Retention, Store, StoreError,
    StoreErrorKind, StoredResponse,
    testing::{self, Subject},
};

/// A store made anew for each check, on paused time.
struct Paused<F>(F);

impl<S: Store, F: Fn() -> S + Sync> Subject for Paused<F> {
    type Store = S;

    async fn store(&self) -> S {
        (self.0)()
    }

    async fn pass(&self, time: Duration) {
        advance(time).await;
    }
}

/// The same, with all checks at once: time passes when all of them wait for it.
struct Waiting<F>(F);

impl<S: Store, F: Fn() -> S + Sync> Subject for Waiting<F> {
    type Store = S;

    async fn store(&self) -> S {
        (self.0)()
    }

    async fn pass(&self, time: Duration) {
        sleep(time).await;
    }

    fn waits(&self) -> bool {
        true
    }
}

#[tokio::test(start_paused = true)]
async fn the_memory_store_keeps_the_contract() {
    let report = testing::check(&Paused(MemoryStore::new)).await;
    report.assert();
    assert!(report.checks() >= 35, "only {} sentences were checked", report.checks());
}

#[tokio::test(start_paused = true)]
async fn the_memory_store_keeps_the_contract_behind_pointers() {
    testing::check(&Paused(|| Arc::new(MemoryStore::new()))).await.assert();
    testing::check(&Paused(|| AnyStore::new(MemoryStore::new())))
        .await
        .assert();
    testing::check(&Paused(|| Arc::new(AnyStore::new(Arc::new(MemoryStore::new())))))
        .await
        .assert();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_memory_store_keeps_the_contract_among_threads() {
    for _ in 0..20 {
        testing::check_races(&Paused(MemoryStore::new)).await.assert();
    }
}

#[tokio::test(start_paused = true)]
async fn a_plain_store_without_flaws_keeps_the_contract() {
    testing::check(&Paused(|| Plain::with(Flaw::None))).await.assert();
}

#[tokio::test(start_paused = true)]
async fn checks_that_wait_are_the_same_and_take_ten_ticks() {
    let one_by_one = testing::check(&Paused(MemoryStore::new)).await;
    let start = Instant::now();
    let at_once = testing::check(&Waiting(MemoryStore::new)).await;
    assert!(start.elapsed() < Duration::from_secs(13), "{:?}", start.elapsed());
    at_once.assert();
    assert_eq!(at_once.checks(), one_by_one.checks());
}

/// As on a machine that stands still for a while.
#[tokio::test(start_paused = true)]
async fn a_check_that_waits_is_made_again_before_it_counts() {
    let start = Instant::now();
    let first_ones_forget = move || match Instant::now() == start {
        true => Plain::with(Flaw::ForgetsWhatIsForEver),
        false => Plain::with(Flaw::None),
    };
    testing::check(&Waiting(first_ones_forget)).await.assert();
}

#[tokio::test(start_paused = true)]
async fn a_store_that_looks_up_and_then_inserts_breaks_the_contract() {
    assert_broken(Flaw::LooksUpThenInserts, 1).await;
}

#[tokio::test(start_paused = true)]
async fn every_flaw_is_found_under_the_sentence_that_it_breaks() {
    for (flaw, rule) in [
        (Flaw::RefusesItsOwnOwner, 2),
        (Flaw::StartsAtAnotherFence, 2),
        (Flaw::TakesOverAnyLease, 3),
        (Flaw::TakesOverByFenceAlone, 3),
        (Flaw::TakesOverWhatRuns, 3),
        (Flaw::KeepsTheFenceInATakeover, 3),
        (Flaw::KeepsTheOldFingerprint, 3),
        (Flaw::ReleasesForAnyone, 4),
        (Flaw::CompletesForAnyone, 4),
        (Flaw::ComparesFencesInsteadOfOwners, 4),
        (Flaw::ComparesFences, 4),
        (Flaw::RefusesALateCompletion, 4),
        (Flaw::CompletesTwice, 4),
        (Flaw::AbandonsLater, 4),
        (Flaw::RevivesByARepeatedClaim, 2),
        (Flaw::RevivesByARenewal, 4),
        (Flaw::LeasesTooShort, 5),
        (Flaw::ForgetsTheRenewal, 5),
        (Flaw::ForgetsWhatWasAbandoned, 6),
        (Flaw::ForgetsALeaseTooEarly, 6),
        (Flaw::CountsRetentionFromTheBeginning, 6),
        (Flaw::ForgetsWhatIsForEver, 6),
        (Flaw::NeverForgets, 6),
        (Flaw::ChangesTheAnswer, 10),
        (Flaw::WakesNobody, 11),
        (Flaw::WakesWhenItRegistersAndNeverAgain, 11),
        (Flaw::PromisesTooMuch, 12),
    ] {
        assert_broken(flaw, rule).await;
    }
}

async fn assert_broken(flaw: Flaw, rule: u8) {
    assert_found(flaw, rule, testing::check(&Paused(move || Plain::with(flaw))).await);
    assert_found(flaw, rule, testing::check(&Waiting(move || Plain::with(flaw))).await);
}

fn assert_found(flaw: Flaw, rule: u8, report: testing::Report) {
    let rules: Vec<_> = report.violations().iter().map(|violation| violation.rule).collect();
    assert!(
        rules.contains(&rule),
        "{flaw:?} was found under {rules:?}, not under rule {rule}:\n{report}"
    );
}

/// The contract in its plainest form, one map behind one lock, with a flaw to be found.
struct Plain {
    flaw: Flaw,
    records: Mutex<HashMap<RecordId, Record>>,
    changed: Notify,
    heard: Mutex<HashSet<RecordId>>,
}

#[derive(Clone)]
struct Record {
    fingerprint: Fingerprint,
    owner: Owner,
    fence: u64,
    begun: Instant,
    lease_until: Instant,
    keep: Retention,
    given_up: bool,
    completed: Option<(StoredResponse, Retention, Instant)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Flaw {
    None,
    LooksUpThenInserts,
    RefusesItsOwnOwner,
    StartsAtAnotherFence,
    TakesOverAnyLease,
    TakesOverByFenceAlone,
    TakesOverWhatRuns,
    KeepsTheFenceInATakeover,
    KeepsTheOldFingerprint,
    ReleasesForAnyone,
    CompletesForAnyone,
    ComparesFencesInsteadOfOwners,
    ComparesFences,
    RefusesALateCompletion,
    CompletesTwice,
    AbandonsLater,
    RevivesByARepeatedClaim,
    RevivesByARenewal,
    LeasesTooShort,
    ForgetsTheRenewal,
    ForgetsWhatWasAbandoned,
    ForgetsALeaseTooEarly,
    CountsRetentionFromTheBeginning,
    ForgetsWhatIsForEver,
    NeverForgets,
    ChangesTheAnswer,
    WakesNobody,
    WakesWhenItRegistersAndNeverAgain,
    PromisesTooMuch,
}

/// Far enough away to be for ever, near enough for a clock to count.
const EVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

fn after(now: Instant, duration: Duration) -> Instant {
    now + duration.min(EVER)
}

impl Record {
    fn vacant_at(&self, flaw: Flaw) -> Instant {
        let (from, keep) = match &self.completed {
            Some((_, retention, _)) if flaw == Flaw::CountsRetentionFromTheBeginning => (self.begun, *retention),
            Some((_, retention, at)) => (*at, *retention),
            None if flaw == Flaw::ForgetsWhatWasAbandoned => return self.lease_until,
            None if flaw == Flaw::ForgetsALeaseTooEarly => (self.begun, self.keep),
            None => (self.lease_until, self.keep),
        };
        match keep {
            _ if flaw == Flaw::NeverForgets => after(from, EVER),
            Retention::For(duration) => after(from, duration),
            Retention::Forever if flaw == Flaw::ForgetsWhatIsForEver => from + Duration::from_secs(6),
            Retention::Forever => after(from, EVER),
        }
    }
}

impl Plain {
    fn with(flaw: Flaw) -> Self {
        Self {
            flaw,
            records: Mutex::default(),
            changed: Notify::new(),
            heard: Mutex::default(),
        }
    }

    fn lookup(&self, id: &RecordId) -> Option<Record> {
        let mut records = self.records.lock().unwrap();
        if records
            .get(id)
            .is_some_and(|record| record.vacant_at(self.flaw) <= Instant::now())
        {
            records.remove(id);
        }
        records.get(id).cloned()
    }

    fn decide(&self, id: &RecordId, claim: &Claim, found: Option<Record>) -> Begin {
        let now = Instant::now();
        let acquire = |fence, fingerprint| {
            let length = if self.flaw == Flaw::LeasesTooShort {
                claim.lease / 2
            } else {
                claim.lease
            };
            let record = Record {
                fingerprint,
                owner: claim.owner,
                fence,
                begun: now,
                lease_until: after(now, length),
                keep: claim.retention,
                given_up: false,
                completed: None,
            };
            self.records.lock().unwrap().insert(*id, record);
            Begin::Acquired(Lease::new(*id, claim.owner, fence))
        };
        let Some(record) = found else {
            let fence = if self.flaw == Flaw::StartsAtAnotherFence { 0 } else { 1 };
            return acquire(fence, claim.fingerprint);
        };
        let fingerprint = record.fingerprint;
        if let Some((response, ..)) = record.completed.clone() {
            let remaining = match record.vacant_at(self.flaw) {
                at if at - now > EVER / 2 => Retention::Forever,
                at => Retention::For(at - now),
            };
            let remaining = match self.flaw {
                Flaw::PromisesTooMuch => Retention::For(EVER / 4),
                _ => remaining,
            };
            return Begin::Completed {
                fingerprint,
                response,
                remaining: Some(remaining),
            };
        }
        let given_up = record.given_up && self.flaw != Flaw::RevivesByARepeatedClaim;
        if record.owner == claim.owner && !given_up && self.flaw != Flaw::RefusesItsOwnOwner {
            return acquire(record.fence, fingerprint);
        }
        let lost = Lease::new(*id, record.owner, record.fence);
        let named = match (self.flaw, claim.takeover) {
            (Flaw::TakesOverAnyLease, named) => named.is_some(),
            (Flaw::TakesOverByFenceAlone, named) => named.is_some_and(|named| named.fence == lost.fence),
            (_, named) => named == Some(lost),
        };
        if record.lease_until > now && !(named && self.flaw == Flaw::TakesOverWhatRuns) {
            return Begin::InProgress {
                fingerprint,
                remaining: record.lease_until - now,
            };
        }
        if !named {
            return Begin::Abandoned { fingerprint, lost };
        }
        let fence = if self.flaw == Flaw::KeepsTheFenceInATakeover {
            record.fence
        } else {
            record.fence + 1
        };
        let kept = if self.flaw == Flaw::KeepsTheOldFingerprint {
            fingerprint
        } else {
            claim.fingerprint
        };
        acquire(fence, kept)
    }

    fn change(&self, lease: &Lease, anyone: bool, change: impl FnOnce(&mut Record)) -> Result<(), StoreError> {
        let fenced = Err(StoreErrorKind::Fenced.into());
        let Some(mut record) = self.lookup(&lease.id) else {
            return fenced;
        };
        let owns = match self.flaw {
            Flaw::ComparesFencesInsteadOfOwners => record.fence == lease.fence,
            Flaw::ComparesFences => record.owner == lease.owner && record.fence == lease.fence,
            _ => record.owner == lease.owner,
        };
        let open = record.completed.is_none() || self.flaw == Flaw::CompletesTwice;
        if !(owns || anyone) || !open {
            return fenced;
        }
        change(&mut record);
        self.records.lock().unwrap().insert(lease.id, record);
        if ![Flaw::WakesNobody, Flaw::WakesWhenItRegistersAndNeverAgain].contains(&self.flaw) {
            self.changed.notify_waiters();
        }
        Ok(())
    }
}

impl Store for Plain {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let found = self.lookup(id);
        if self.flaw == Flaw::LooksUpThenInserts {
            // As a remote store would: the answer to the look-up is on its way while others ask.
            yield_now().await;
        }
        Ok(self.decide(id, claim, found))
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        let now = Instant::now();
        let late = self.lookup(&lease.id).is_some_and(|record| record.lease_until <= now);
        if late && self.flaw == Flaw::RefusesALateCompletion {
            return Err(StoreErrorKind::Fenced.into());
        }
        let response = match self.flaw {
            Flaw::ChangesTheAnswer => StoredResponse::not_kept(response.status()),
            _ => response.clone(),
        };
        self.change(lease, self.flaw == Flaw::CompletesForAnyone, |record| {
            record.completed = Some((response, retention, now));
        })
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        let until = after(Instant::now(), length);
        let given_up = self.lookup(&lease.id).is_some_and(|record| record.given_up);
        if given_up && self.flaw != Flaw::RevivesByARenewal {
            return Err(StoreErrorKind::Fenced.into());
        }
        self.change(lease, false, |record| {
            if self.flaw != Flaw::ForgetsTheRenewal {
                record.lease_until = until;
            }
        })
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.change(lease, self.flaw == Flaw::ReleasesForAnyone, |_| ())?;
        self.records.lock().unwrap().remove(&lease.id);
        Ok(())
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        let now = Instant::now();
        self.change(lease, false, |record| {
            if self.flaw != Flaw::AbandonsLater {
                record.given_up = true;
                record.lease_until = now;
            }
        })
    }

    async fn changed(&self, id: &RecordId) {
        let is_first = self.heard.lock().unwrap().insert(*id);
        if is_first && self.flaw == Flaw::WakesWhenItRegistersAndNeverAgain {
            return yield_now().await;
        }
        self.changed.notified().await;
    }
}
