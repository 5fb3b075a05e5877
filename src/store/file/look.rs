//! What a claim finds: a pure function of the record and the time, for the writer, which acts on it, and for readers,
//! which answer whatever changes nothing.

use std::time::Duration;

use super::frame::{ABANDONED, NEVER, Progress, Record, State, Time};
use crate::{
    fingerprint::Fingerprint,
    record::{Claim, Lease, RecordId, Retention},
};

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    /// To be acquired with fence 1.
    Vacant,
    /// The claim's own lease, to be renewed.
    Own(Progress),
    /// The lease that the claim may take over, with this fence.
    TakenOver {
        fence: u64,
    },
    InProgress {
        fingerprint: Fingerprint,
        remaining: Duration,
    },
    Abandoned {
        fingerprint: Fingerprint,
        lost: Lease,
    },
    Completed {
        fingerprint: Fingerprint,
        answer: &'a [u8],
        remaining: Retention,
    },
}

impl Progress {
    /// When its lease ends. A lease of an earlier run is over: its process is gone.
    fn lease_end(&self, run: u64) -> Time {
        if self.run == run { self.lease_until } else { 0 }
    }
}

pub(super) fn look<'a>(id: &RecordId, record: Option<&Record<'a>>, claim: &Claim, run: u64, now: Time) -> Found<'a> {
    let Some(record) = record.filter(|record| record.vacant_at > now) else {
        return Found::Vacant;
    };
    let fingerprint = record.fingerprint;
    let progress = match record.state {
        State::Completed(answer) => {
            return Found::Completed {
                fingerprint,
                answer,
                remaining: remaining(record.vacant_at, now),
            };
        }
        State::InProgress(progress) => progress,
    };
    if progress.owner == claim.owner && progress.lease_until != ABANDONED {
        return Found::Own(progress);
    }
    let end = progress.lease_end(run);
    if end > now {
        let remaining = Duration::from_nanos(end - now);
        return Found::InProgress { fingerprint, remaining };
    }
    let lost = Lease::new(*id, progress.owner, record.fence);
    if claim.takeover == Some(lost) {
        let fence = record.fence.saturating_add(1);
        return Found::TakenOver { fence };
    }
    Found::Abandoned { fingerprint, lost }
}

/// How long a record is still kept.
pub(super) fn remaining(vacant_at: Time, now: Time) -> Retention {
    match vacant_at {
        NEVER => Retention::Forever,
        at => Retention::For(Duration::from_nanos(at.saturating_sub(now))),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::frame::NEVER, *};
    use crate::record::{Owner, Retention};

    fn id() -> RecordId {
        RecordId::from_bytes([1; 32])
    }

    fn owner(number: u8) -> Owner {
        Owner::from_bytes([number; 16])
    }

    fn claim(by: u8) -> Claim {
        let fingerprint = Fingerprint::new(1, [by; 32]);
        Claim::new(fingerprint, owner(by), Duration::from_secs(1), Retention::Forever)
    }

    fn running(lease_until: Time, vacant_at: Time, run: u64) -> Record<'static> {
        Record {
            vacant_at,
            indexed_at: vacant_at,
            since: 1,
            fence: 4,
            fingerprint: Fingerprint::new(1, [1; 32]),
            state: State::InProgress(Progress {
                owner: owner(1),
                lease_until,
                keep: 10,
                run,
            }),
        }
    }

    #[test]
    fn what_a_claim_finds_depends_on_the_record_the_time_the_owner_and_the_run() {
        let fingerprint = Fingerprint::new(1, [1; 32]);
        let lost = Lease::new(id(), owner(1), 4);
        let record = running(100, 110, 7);
        let State::InProgress(own) = record.state else { return };
        let abandoned = || Found::Abandoned { fingerprint, lost };
        let remaining = Duration::from_nanos(1);
        let completed = Record {
            state: State::Completed(b"x"),
            ..record
        };
        let answer = b"x";
        for (found, record, claim, run, now) in [
            (Found::Vacant, None, claim(2), 7, 0),
            (
                Found::InProgress { fingerprint, remaining },
                Some(record),
                claim(2),
                7,
                99,
            ),
            (abandoned(), Some(record), claim(2), 7, 100),
            (abandoned(), Some(record), claim(2), 7, 109),
            (Found::Vacant, Some(record), claim(2), 7, 110),
            (abandoned(), Some(record), claim(2), 8, 1),
            (abandoned(), Some(running(NEVER, NEVER, 7)), claim(2), 8, 1),
            (Found::Own(own), Some(record), claim(1), 7, 99),
            (Found::Own(own), Some(record), claim(1), 8, 109),
            (Found::Vacant, Some(record), claim(1), 7, 110),
            // Given up, it is not its owner's again.
            (abandoned(), Some(running(ABANDONED, 110, 7)), claim(1), 7, 99),
            (
                Found::TakenOver { fence: 5 },
                Some(record),
                claim(2).taking_over(lost),
                7,
                100,
            ),
            (
                Found::TakenOver { fence: 5 },
                Some(record),
                claim(2).taking_over(lost),
                8,
                1,
            ),
            (
                Found::InProgress { fingerprint, remaining },
                Some(record),
                claim(2).taking_over(lost),
                7,
                99,
            ),
            (
                Found::Completed {
                    fingerprint,
                    answer,
                    remaining: Retention::For(Duration::from_nanos(1)),
                },
                Some(completed),
                claim(1),
                7,
                109,
            ),
            (
                Found::Completed {
                    fingerprint,
                    answer,
                    remaining: Retention::For(Duration::from_nanos(1)),
                },
                Some(completed),
                claim(2).taking_over(lost),
                8,
                109,
            ),
            (Found::Vacant, Some(completed), claim(2), 7, 110),
        ] {
            assert_eq!(
                look(&id(), record.as_ref(), &claim, run, now),
                found,
                "{record:?} at {now} in run {run}"
            );
        }
    }
}
