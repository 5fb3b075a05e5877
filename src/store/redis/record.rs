//! The bytes of a record in Redis.
//!
//! Version 1, all numbers little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 1 | version, 1 |
//! | 1 | state: 0x0f in progress, 0xf0 abandoned, 0x55 completed |
//! | 16 | owner |
//! | 8 | fence |
//! | 8 | how long the record is kept after its lease, in milliseconds |
//! | 1 | algorithm of the fingerprint |
//! | 32 | digest of the fingerprint |
//! | 4 | CRC-32 of all of the above but the state |
//! | 4 | completed only: CRC-32 of all that follows |
//! | 8 | completed only: how long the record is kept, counted from its completion, in milliseconds |
//! | n | completed only: the [stored answer](crate::codec), to the end |
//!
//! The scripts on the server read the first five fields in place, and change the state alone; so it is not under the
//! checksum, and any two of its values differ in four bits at least.

use std::{ops::Range, time::Duration};

use bytes::{Buf, Bytes};

use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    record::{Begin, Claim, Lease, Owner, RecordId, Retention},
};

const VERSION: u8 = 1;
pub(super) const IN_PROGRESS: u8 = 0x0f;
pub(super) const ABANDONED: u8 = 0xf0;
pub(super) const COMPLETED: u8 = 0x55;
/// Everything before the answer and its checksum.
pub(super) const HEAD: usize = 71;
const CHECKED: usize = HEAD - 4;
/// Owner and fence.
pub(super) const NAME: Range<usize> = 2..26;

/// Time that Redis counts in 35,000 years is time for ever; so sums of two are exact in a script's numbers, and no
/// instant is past the last one that the server knows.
const FOREVER: u64 = 1 << 50;

/// Whole milliseconds, which end no earlier than `duration`.
pub(super) fn millis(duration: Duration) -> u64 {
    let millis = duration.as_nanos().div_ceil(1_000_000);
    u64::try_from(millis).unwrap_or(FOREVER).min(FOREVER)
}

pub(super) fn retention_millis(retention: Retention) -> u64 {
    match retention {
        Retention::For(duration) => millis(duration),
        Retention::Forever => FOREVER,
    }
}

/// The time to live of a completed record; `None` for ever.
pub(super) fn completed_millis(retention: Retention) -> Option<u64> {
    // The server refuses a time to live of nothing.
    Some(retention_millis(retention).max(1)).filter(|millis| *millis < FOREVER)
}

/// The time to live of a record in progress: it outlives its lease.
pub(super) fn in_progress_millis(claim: &Claim) -> u64 {
    (millis(claim.lease) + retention_millis(claim.retention)).max(1)
}

/// A record in progress for the claim.
pub(super) fn in_progress(claim: &Claim, fence: u64) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[0] = VERSION;
    head[1] = IN_PROGRESS;
    head[2..18].copy_from_slice(claim.owner.as_bytes());
    head[18..26].copy_from_slice(&fence.to_le_bytes());
    head[26..34].copy_from_slice(&retention_millis(claim.retention).to_le_bytes());
    head[34] = claim.fingerprint.algorithm();
    head[35..67].copy_from_slice(claim.fingerprint.digest());
    let checksum = head_checksum(&head[..CHECKED]);
    head[CHECKED..].copy_from_slice(&checksum.to_le_bytes());
    head
}

/// The record that was `in_progress` until now, completed.
pub(super) fn completed(in_progress: &[u8; HEAD], response: &StoredResponse, retention: Retention) -> Vec<u8> {
    let answer = response.as_bytes();
    let kept = retention_millis(retention).to_le_bytes();
    let mut record = Vec::with_capacity(HEAD + 12 + answer.len());
    record.extend_from_slice(in_progress);
    record[1] = COMPLETED;
    record.extend_from_slice(&[0; 4]);
    record.extend_from_slice(&kept);
    record.extend_from_slice(answer);
    let checksum = crc32fast::hash(&record[HEAD + 4..]);
    record[HEAD..HEAD + 4].copy_from_slice(&checksum.to_le_bytes());
    record
}

/// Owner and fence as they stand in a record.
pub(super) fn name_of(lease: &Lease) -> [u8; NAME.end - NAME.start] {
    let mut name = [0; NAME.end - NAME.start];
    name[..16].copy_from_slice(lease.owner.as_bytes());
    name[16..].copy_from_slice(&lease.fence.to_le_bytes());
    name
}

/// A record that was read and found whole.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) owner: Owner,
    pub(super) fence: u64,
    /// Milliseconds.
    keep: u64,
    pub(super) fingerprint: Fingerprint,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
    InProgress,
    Abandoned,
    Completed {
        response: StoredResponse,
        /// Milliseconds from its completion on.
        kept: u64,
    },
}

/// Reads whatever somebody may have put under a key.
#[cfg(any(test, fuzzing))]
pub(crate) fn look_at(bytes: &[u8]) {
    let id = RecordId::from_bytes([0; 32]);
    for time_to_live in [-1, 0, 1, i64::MAX] {
        if let Ok(record) = Record::decode(bytes.to_vec()) {
            let _ = record.found(&id, time_to_live);
        }
    }
}

impl Record {
    pub(super) fn decode(bytes: Vec<u8>) -> Result<Self, StoreError> {
        match bytes.first() {
            Some(&VERSION) => {}
            Some(&newer) if newer > VERSION => return Err(StoreErrorKind::NewerVersion.into()),
            _ => return Err(corrupt("there is no such version")),
        }
        let Some((mut head, rest)) = bytes.split_at_checked(HEAD) else {
            return Err(corrupt("a record is longer than that"));
        };
        let expected = head_checksum(&head[..CHECKED]);
        let (state, is_only_head) = (head[1], rest.is_empty());
        head.advance(2);
        let mut owner = [0; 16];
        head.copy_to_slice(&mut owner);
        let (fence, keep, algorithm) = (head.get_u64_le(), head.get_u64_le(), head.get_u8());
        let mut digest = [0; 32];
        head.copy_to_slice(&mut digest);
        if head.get_u32_le() != expected {
            return Err(corrupt("the checksum of the head is another one"));
        }
        let state = match state {
            IN_PROGRESS if is_only_head => State::InProgress,
            ABANDONED if is_only_head => State::Abandoned,
            COMPLETED => {
                // Not split off: that would take an allocation.
                let mut rest = Bytes::from(bytes);
                rest.advance(HEAD);
                decode_completion(rest)?
            }
            _ => return Err(corrupt("there is no such state")),
        };
        Ok(Self {
            owner: Owner::from_bytes(owner),
            fence,
            keep,
            fingerprint: Fingerprint::new(algorithm, digest),
            state,
        })
    }

    pub(super) fn lease(&self, id: &RecordId) -> Lease {
        Lease::new(*id, self.owner, self.fence)
    }

    /// What somebody who is not its owner finds, `time_to_live` milliseconds before the server forgets it: less than
    /// nothing if it never does.
    pub(super) fn found(self, id: &RecordId, time_to_live: i64) -> Result<Begin, StoreError> {
        let fingerprint = self.fingerprint;
        let lost = self.lease(id);
        let abandoned = Begin::Abandoned { fingerprint, lost };
        match self.state {
            State::Completed { response, .. } => Ok(Begin::Completed {
                fingerprint,
                response,
                remaining: Some(remaining(time_to_live, FOREVER)),
            }),
            // Somebody took its time to live away: nobody knows any more when its lease or its retention ends.
            State::Abandoned | State::InProgress if time_to_live < 0 => {
                Err(corrupt("a record that is not completed has no time to live"))
            }
            State::Abandoned => Ok(abandoned),
            // The server cuts off parts of a millisecond: less than nothing is left only when all of it has passed.
            State::InProgress => match (time_to_live as u64).checked_sub(self.keep) {
                Some(remaining) => Ok(Begin::InProgress {
                    fingerprint,
                    remaining: Duration::from_millis(remaining),
                }),
                None => Ok(abandoned),
            },
        }
    }
}

fn decode_completion(mut bytes: Bytes) -> Result<State, StoreError> {
    let expected = bytes.try_get_u32_le().map_err(corrupt)?;
    if crc32fast::hash(&bytes) != expected {
        return Err(corrupt("the checksum of the answer is another one"));
    }
    let kept = bytes.try_get_u64_le().map_err(corrupt)?;
    let response = StoredResponse::from_bytes(bytes)?;
    Ok(State::Completed { response, kept })
}

/// How long a completed record is kept at least, from the moment on at which its key had this time to live, wherever in
/// its life that was: the record may have been completed afterwards, and is kept for `kept` milliseconds from there.
pub(super) fn remaining(time_to_live: i64, kept: u64) -> Retention {
    let left = u64::try_from(time_to_live).unwrap_or(FOREVER).min(kept);
    match left {
        FOREVER.. => Retention::Forever,
        millis => Retention::For(Duration::from_millis(millis)),
    }
}

fn head_checksum(checked: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&checked[..1]);
    hasher.update(&checked[2..]);
    hasher.finalize()
}

fn corrupt(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
    StoreError::with_source(StoreErrorKind::Corrupt, source)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use http::StatusCode;

    use super::*;

    fn claim() -> Claim {
        let fingerprint = Fingerprint::new(3, [4; 32]);
        let (lease, retention) = (Duration::from_secs(60), Duration::from_secs(1));
        Claim::new(fingerprint, Owner::from_bytes([2; 16]), lease, retention.into())
    }

    fn completed() -> Vec<u8> {
        let answer = StoredResponse::not_kept(StatusCode::CREATED);
        super::completed(
            &in_progress(&claim(), 5),
            &answer,
            Retention::For(Duration::from_secs(2)),
        )
    }

    /// Version 1 as it was first released. These bytes are on servers: they never change.
    const GOLDEN: &str = "0155\
        02020202020202020202020202020202\
        0500000000000000e803000000000000\
        030404040404040404040404040404040404040404040404040404040404040404\
        4c9efc5a\
        6d1c1ba0\
        d007000000000000\
        0101c90000000000000000000000000000000000";

    #[test]
    fn version_1_is_written_and_read_as_it_was_first_released() {
        let bytes = completed();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN);
        let record = Record::decode(bytes).unwrap();
        assert_eq!((record.fence, record.keep), (5, 1000));
        let State::Completed { response, kept } = record.state else {
            panic!("it is completed");
        };
        assert_eq!((response.status(), kept), (StatusCode::CREATED, 2000));
    }

    #[test]
    fn a_newer_version_is_told_apart_from_damage() {
        let mut bytes = completed();
        bytes[0] = 2;
        assert_eq!(Record::decode(bytes).unwrap_err().kind(), StoreErrorKind::NewerVersion);
        for bytes in [vec![], vec![0; 100], vec![VERSION; HEAD - 1]] {
            assert_eq!(Record::decode(bytes).unwrap_err().kind(), StoreErrorKind::Corrupt);
        }
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_found() {
        for good in [in_progress(&claim(), 1).to_vec(), completed()] {
            for bit in 0..good.len() * 8 {
                let mut bytes = good.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(Record::decode(bytes).is_err(), "bit {bit}");
            }
            for end in 0..good.len() {
                assert!(Record::decode(good[..end].to_vec()).is_err(), "cut at {end}");
            }
            let longer = [&good[..], b"x"].concat();
            assert_eq!(Record::decode(longer).unwrap_err().kind(), StoreErrorKind::Corrupt);
        }
    }

    #[test]
    fn an_attempt_that_was_abandoned_is_told_of_while_its_record_lives() {
        let mut bytes = in_progress(&claim(), 5).to_vec();
        bytes[1] = ABANDONED;
        let id = RecordId::from_bytes([7; 32]);
        let look = |time_to_live| Record::decode(bytes.clone()).unwrap().found(&id, time_to_live);
        for time_to_live in [0, 1, 90_000] {
            assert!(matches!(look(time_to_live), Ok(Begin::Abandoned { lost, .. }) if lost.fence == 5));
        }
        assert_eq!(look(-1).unwrap_err().kind(), StoreErrorKind::Corrupt);
        let longer = [&bytes[..], b"x"].concat();
        assert_eq!(Record::decode(longer).unwrap_err().kind(), StoreErrorKind::Corrupt);
    }

    #[test]
    fn durations_are_counted_up_to_whole_milliseconds_and_never_overflow() {
        assert_eq!(millis(Duration::ZERO), 0);
        assert_eq!(millis(Duration::from_nanos(1)), 1);
        assert_eq!(millis(Duration::from_micros(1001)), 2);
        assert_eq!(millis(Duration::MAX), FOREVER);
        assert_eq!(completed_millis(Retention::For(Duration::ZERO)), Some(1));
        assert_eq!(completed_millis(Retention::Forever), None);
        assert_eq!(completed_millis(Retention::For(Duration::MAX)), None);
    }

    #[test]
    fn a_completed_record_is_known_to_remain_for_the_less_of_its_time_to_live_and_its_retention() {
        let millis = |millis| Retention::For(Duration::from_millis(millis));
        assert_eq!(remaining(700, 1000), millis(700));
        // It was in progress or vacant when its time to live was asked for, and completed before it was read.
        assert_eq!(remaining(90_000, 1000), millis(1000));
        assert_eq!(remaining(-2, 1000), millis(1000));
        assert_eq!(remaining(90_000, FOREVER), millis(90_000));
        // Somebody made the server keep it for ever.
        assert_eq!(remaining(-1, 1000), millis(1000));
        assert_eq!(remaining(-1, FOREVER), Retention::Forever);
    }

    #[test]
    fn a_lease_is_what_the_time_to_live_leaves_after_the_retention() {
        let id = RecordId::from_bytes([7; 32]);
        let look = |time_to_live| {
            let record = Record::decode(in_progress(&claim(), 1).to_vec()).unwrap();
            record.found(&id, time_to_live)
        };
        let left = |begin| match begin {
            Ok(Begin::InProgress { remaining, .. }) => Some(remaining.as_millis()),
            _ => None,
        };
        assert_eq!(left(look(1500)), Some(500));
        assert_eq!(left(look(1000)), Some(0));
        assert!(matches!(look(0), Ok(Begin::Abandoned { .. })));
        assert!(matches!(look(999), Ok(Begin::Abandoned { lost, .. }) if lost.fence == 1));
        assert_eq!(look(-1).unwrap_err().kind(), StoreErrorKind::Corrupt);
    }
}
