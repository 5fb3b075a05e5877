//! A record's bytes in the file: versioned, and checked before anything in them is believed.
//!
//! Version 1, all numbers little-endian, times in nanoseconds of the store's time, all ones meaning never:
//!
//! | bytes | content |
//! |---|---|
//! | 1 | version, 1 |
//! | 1 | state: 1 = in progress, 2 = completed |
//! | 4 | CRC-32 of the record's id and of every other byte |
//! | 8 | from when on the record is vacant |
//! | 8 | where the purge has it in its table |
//! | 8 | since when it is in this state |
//! | 8 | fence |
//! | 1, 32 | fingerprint: algorithm, digest |
//! | | *in progress:* |
//! | 16 | owner |
//! | 8 | when the lease ends |
//! | 8 | how long the record stays after that |
//! | 8 | the run of the store that began or last renewed it |
//! | | *completed:* |
//! | n | the answer, in [its own format](crate::StoredResponse), to the end |
//!
//! The id is in the checksum, so a record that is found under another id is corrupt and not somebody else's answer.

use crate::{
    error::{StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    record::{Owner, RecordId},
};

/// Nanoseconds of the store's time.
pub(super) type Time = u64;

/// A time that never comes.
pub(super) const NEVER: Time = u64::MAX;

/// The end of a lease that its owner gave up. No other lease ends there, since this one is never renewed.
pub(super) const ABANDONED: Time = 0;

const VERSION: u8 = 1;
const IN_PROGRESS: u8 = 1;
const COMPLETED: u8 = 2;
const CHECKSUM_AT: usize = 2;
const CHECKED_AT: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    /// From here on there is no record.
    pub(super) vacant_at: Time,
    /// Its place in the purge's table; it may be earlier than `vacant_at`, and then it is looked at in vain once.
    pub(super) indexed_at: Time,
    pub(super) since: Time,
    pub(super) fence: u64,
    pub(super) fingerprint: Fingerprint,
    pub(super) state: State<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State<'a> {
    InProgress(Progress),
    /// The bytes of the answer.
    Completed(&'a [u8]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) owner: Owner,
    /// When its lease ends, or [`ABANDONED`].
    pub(super) lease_until: Time,
    /// How long the record stays after its lease.
    pub(super) keep: Time,
    /// Which run of the store it belongs to: one of an earlier run has lost its process.
    pub(super) run: u64,
}

impl<'a> Record<'a> {
    pub(super) fn encode(&self, id: &RecordId) -> Vec<u8> {
        let answer = match self.state {
            State::InProgress(_) => 40,
            State::Completed(answer) => answer.len(),
        };
        let mut out = Vec::with_capacity(71 + answer);
        let state = match self.state {
            State::InProgress(_) => IN_PROGRESS,
            State::Completed(_) => COMPLETED,
        };
        out.extend_from_slice(&[VERSION, state, 0, 0, 0, 0]);
        for number in [self.vacant_at, self.indexed_at, self.since, self.fence] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(self.fingerprint.algorithm());
        out.extend_from_slice(self.fingerprint.digest());
        match &self.state {
            State::InProgress(progress) => {
                out.extend_from_slice(progress.owner.as_bytes());
                for number in [progress.lease_until, progress.keep, progress.run] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
            }
            State::Completed(answer) => out.extend_from_slice(answer),
        }
        let checksum = checksum(id, &out);
        out[CHECKSUM_AT..CHECKED_AT].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// # Errors
    /// [`StoreErrorKind::NewerVersion`] and [`StoreErrorKind::Corrupt`].
    pub(super) fn decode(id: &RecordId, bytes: &'a [u8]) -> Result<Self, StoreError> {
        let mut rest = Reader(bytes);
        let [version, state] = rest.take()?;
        if version > VERSION {
            return Err(StoreErrorKind::NewerVersion.into());
        }
        let stored = u32::from_le_bytes(rest.take()?);
        if version != VERSION || stored != checksum(id, bytes) {
            return Err(corrupt("a record's checksum does not match"));
        }
        let vacant_at = rest.number()?;
        let indexed_at = rest.number()?;
        let since = rest.number()?;
        let fence = rest.number()?;
        let [algorithm] = rest.take()?;
        let fingerprint = Fingerprint::new(algorithm, rest.take()?);
        let state = match state {
            IN_PROGRESS => {
                let progress = Progress {
                    owner: Owner::from_bytes(rest.take()?),
                    lease_until: rest.number()?,
                    keep: rest.number()?,
                    run: rest.number()?,
                };
                if !rest.0.is_empty() {
                    return Err(corrupt("a record is longer than it may be"));
                }
                State::InProgress(progress)
            }
            COMPLETED => State::Completed(rest.0),
            _ => return Err(corrupt("a record is in a state that does not exist")),
        };
        Ok(Self {
            vacant_at,
            indexed_at,
            since,
            fence,
            fingerprint,
            state,
        })
    }
}

/// Of the id and of everything but the checksum itself.
fn checksum(id: &RecordId, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(id.as_bytes());
    hasher.update(bytes.get(..CHECKSUM_AT).unwrap_or_default());
    hasher.update(bytes.get(CHECKED_AT..).unwrap_or_default());
    hasher.finalize()
}

pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl Reader<'_> {
    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], StoreError> {
        let (taken, rest) = self
            .0
            .split_first_chunk()
            .ok_or_else(|| corrupt("a record ends early"))?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn number(&mut self) -> Result<u64, StoreError> {
        self.take().map(u64::from_le_bytes)
    }
}

pub(super) fn corrupt(what: &'static str) -> StoreError {
    StoreError::with_source(StoreErrorKind::Corrupt, what)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::codec::StoredResponse;

    fn id() -> RecordId {
        RecordId::from_bytes([7; 32])
    }

    fn running() -> Record<'static> {
        Record {
            vacant_at: NEVER,
            indexed_at: 3,
            since: 2,
            fence: 5,
            fingerprint: Fingerprint::new(1, [0xf0; 32]),
            state: State::InProgress(Progress {
                owner: Owner::from_bytes([0xaa; 16]),
                lease_until: 1_000_000_007,
                keep: 60,
                run: 9,
            }),
        }
    }

    fn completed(answer: &[u8]) -> Record<'_> {
        Record {
            vacant_at: 86_400_000_000_000,
            state: State::Completed(answer),
            ..running()
        }
    }

    /// Version 1 as it was first released, under the id `07…07`. These bytes are on disks: they never change.
    const RUNNING: &[u8] = include_bytes!("golden/v1-in-progress.bin");
    const COMPLETED: &[u8] = include_bytes!("golden/v1-completed.bin");

    #[test]
    fn version_1_is_written_and_read_as_it_was_first_released() {
        let not_kept = StoredResponse::not_kept(http::StatusCode::CREATED);
        assert_eq!(running().encode(&id()), RUNNING);
        assert_eq!(completed(not_kept.as_bytes()).encode(&id()), COMPLETED);
        assert_eq!(Record::decode(&id(), RUNNING).unwrap(), running());
        assert_eq!(
            Record::decode(&id(), COMPLETED).unwrap(),
            completed(not_kept.as_bytes())
        );
    }

    #[test]
    fn every_flipped_bit_is_an_error_and_so_is_another_id() {
        for good in [RUNNING, COMPLETED] {
            for bit in 0..good.len() * 8 {
                let mut bytes = good.to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let kind = Record::decode(&id(), &bytes).unwrap_err().kind();
                // A version that was flipped upwards cannot be told from a newer one.
                let expected = if bytes[0] > VERSION {
                    StoreErrorKind::NewerVersion
                } else {
                    StoreErrorKind::Corrupt
                };
                assert_eq!(kind, expected, "bit {bit}");
            }
            let other = RecordId::from_bytes([8; 32]);
            assert_eq!(
                Record::decode(&other, good).unwrap_err().kind(),
                StoreErrorKind::Corrupt
            );
        }
    }

    #[test]
    fn a_record_that_ends_early_or_late_is_corrupt() {
        for good in [RUNNING, COMPLETED] {
            for end in 0..good.len() {
                assert_eq!(
                    Record::decode(&id(), &good[..end]).unwrap_err().kind(),
                    StoreErrorKind::Corrupt
                );
            }
            let longer = [good, b"x"].concat();
            assert_eq!(
                Record::decode(&id(), &longer).unwrap_err().kind(),
                StoreErrorKind::Corrupt
            );
        }
    }

    #[test]
    fn a_newer_version_is_an_error_of_its_own() {
        let mut bytes = RUNNING.to_vec();
        bytes[0] = 2;
        assert_eq!(
            Record::decode(&id(), &bytes).unwrap_err().kind(),
            StoreErrorKind::NewerVersion
        );
    }

    #[test]
    fn no_bytes_make_the_reader_panic() {
        use proptest::prelude::*;
        proptest!(|(bytes in proptest::collection::vec(any::<u8>(), 0..200))| {
            let _ = Record::decode(&id(), &bytes);
        });
    }
}
