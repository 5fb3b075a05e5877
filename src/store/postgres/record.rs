//! A record as the server gives it back.

use std::time::Duration;

use bytes::Bytes;
use tokio_postgres::types::{FromSql, Type, accepts};

use super::statements::FOREVER;
use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    record::{Begin, Lease, Owner, RecordId, Retention},
};

/// A *record* as [`Statements`](super::statements::Statements) answer it, whichever client read it.
#[derive(Debug, Default)]
pub(crate) struct Row {
    pub(crate) owner: Option<Vec<u8>>,
    pub(crate) fence: i64,
    pub(crate) state: Option<i8>,
    pub(crate) algorithm: Option<i16>,
    pub(crate) fingerprint: Option<Vec<u8>>,
    pub(crate) answer: Option<Vec<u8>>,
    pub(crate) checksum: Option<i32>,
    pub(crate) expired: Option<bool>,
    /// Microseconds, of the lease of a record in progress, or until any other expires. Past its end it is zero or less.
    pub(crate) time_left: Option<i64>,
}

/// What a claim found.
#[derive(Debug)]
pub(crate) enum Found {
    /// A record that counts as if it were not there.
    Expired,
    /// In progress, and the claim's own.
    Own,
    /// Somebody else's, as [`Begin`] says it; never `Begin::Acquired`.
    Other(Begin),
}

/// The fence of a first attempt.
pub(super) const FIRST: u64 = 1;

const IN_PROGRESS: i8 = b'p' as i8;
const ABANDONED: i8 = b'a' as i8;
pub(crate) const COMPLETED: i8 = b'c' as i8;

/// A time as the server counts it: microseconds since some moment, and the largest number for one that never comes.
struct Moment(i64);

impl<'a> FromSql<'a> for Moment {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        i64::from_sql(&Type::INT8, raw).map(Self)
    }

    accepts!(TIMESTAMPTZ);
}

impl Row {
    /// As a look answers it to tokio-postgres: by place, and with the times as they are.
    pub(super) fn seen(row: &tokio_postgres::Row) -> Result<Self, StoreError> {
        let read = || {
            let state = row.try_get(2)?;
            let [Moment(lease_until), Moment(expires_at), Moment(now)] =
                [row.try_get(7)?, row.try_get(8)?, row.try_get(9)?];
            let end = if state == Some(IN_PROGRESS) {
                lease_until
            } else {
                expires_at
            };
            Ok(Self {
                owner: row.try_get(0)?,
                fence: row.try_get(1)?,
                state,
                algorithm: row.try_get(3)?,
                fingerprint: row.try_get(4)?,
                answer: row.try_get(5)?,
                checksum: row.try_get(6)?,
                expired: Some(expires_at <= now),
                time_left: Some(end.saturating_sub(now).min(FOREVER)),
            })
        };
        read().map_err(|error: tokio_postgres::Error| corrupt(error))
    }

    /// By the names of [`RECORD`](super::statements::RECORD), as tokio-postgres gives it.
    pub(crate) fn read(row: &tokio_postgres::Row) -> Result<Self, StoreError> {
        let read = || {
            Ok(Self {
                owner: row.try_get("owner")?,
                fence: row.try_get("fence")?,
                state: row.try_get("state")?,
                algorithm: row.try_get("algorithm")?,
                fingerprint: row.try_get("fingerprint")?,
                answer: row.try_get("answer")?,
                checksum: row.try_get("checksum")?,
                expired: row.try_get("expired")?,
                time_left: row.try_get("time_left")?,
            })
        };
        // A value that is of another type than its column's.
        read().map_err(|error: tokio_postgres::Error| corrupt(error))
    }

    /// Reads a row that is `asking`'s answer.
    pub(crate) fn found(self, id: &RecordId, asking: Owner) -> Result<Found, StoreError> {
        let fence = u64::try_from(self.fence).map_err(corrupt)?;
        if self.expired.ok_or_else(missing)? {
            return Ok(Found::Expired);
        }
        let owner = Owner::from_bytes(array(self.owner.ok_or_else(missing)?)?);
        let (algorithm, digest) = (
            self.algorithm.ok_or_else(missing)?,
            self.fingerprint.ok_or_else(missing)?,
        );
        let fingerprint = fingerprint(algorithm, digest)?;
        let abandoned = || Begin::Abandoned {
            fingerprint,
            lost: Lease::new(*id, owner, fence),
        };
        Ok(match self.state {
            Some(COMPLETED) => Found::Other(Begin::Completed {
                fingerprint,
                response: answer(id, self.answer, self.checksum)?,
                remaining: self.time_left.map(remaining),
            }),
            Some(ABANDONED) => Found::Other(abandoned()),
            Some(IN_PROGRESS) if owner == asking => Found::Own,
            Some(IN_PROGRESS) => match u64::try_from(self.time_left.ok_or_else(missing)?) {
                Ok(left @ 1..) => Found::Other(Begin::InProgress {
                    fingerprint,
                    remaining: Duration::from_micros(left),
                }),
                _ => Found::Other(abandoned()),
            },
            // A newer version of the table says so in its comment, which is read at the start.
            _ => return Err(corrupt("there is no such state")),
        })
    }
}

/// A row of a replay, by place.
pub(super) fn completed(row: &tokio_postgres::Row, id: &RecordId) -> Result<Begin, StoreError> {
    type Columns = (i16, Vec<u8>, Option<Vec<u8>>, Option<i32>);
    let read = || Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?));
    let (algorithm, digest, bytes, expected): Columns =
        read().map_err(|error: tokio_postgres::Error| corrupt(error))?;
    Ok(Begin::Completed {
        fingerprint: fingerprint(algorithm, digest)?,
        response: answer(id, bytes, expected)?,
        remaining: None,
    })
}

fn fingerprint(algorithm: i16, digest: Vec<u8>) -> Result<Fingerprint, StoreError> {
    Ok(Fingerprint::new(
        u8::try_from(algorithm).map_err(corrupt)?,
        array(digest)?,
    ))
}

/// Of id and answer together, so that an answer under another id is found, too.
pub(crate) fn checksum(id: &RecordId, answer: &[u8]) -> i32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(id.as_bytes());
    hasher.update(answer);
    i32::from_ne_bytes(hasher.finalize().to_ne_bytes())
}

fn answer(id: &RecordId, answer: Option<Vec<u8>>, expected: Option<i32>) -> Result<StoredResponse, StoreError> {
    let (answer, expected) = (answer.ok_or_else(missing)?, expected.ok_or_else(missing)?);
    if checksum(id, &answer) != expected {
        return Err(corrupt("the checksum is another one"));
    }
    StoredResponse::from_bytes(Bytes::from(answer))
}

fn remaining(micros: i64) -> Retention {
    match u64::try_from(micros) {
        Ok(micros) if micros < FOREVER.unsigned_abs() => Retention::For(Duration::from_micros(micros)),
        Ok(_) => Retention::Forever,
        Err(_) => Retention::For(Duration::ZERO),
    }
}

fn array<const N: usize>(bytes: Vec<u8>) -> Result<[u8; N], StoreError> {
    <[u8; N]>::try_from(bytes).map_err(|_| corrupt("a value is of another length"))
}

fn missing() -> StoreError {
    corrupt("a value is missing")
}

fn corrupt(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
    StoreError::with_source(StoreErrorKind::Corrupt, source)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use http::StatusCode;

    use super::*;

    fn id(byte: u8) -> RecordId {
        RecordId::from_bytes([byte; 32])
    }

    fn row(state: i8) -> Row {
        let answer = StoredResponse::not_kept(StatusCode::CREATED).as_bytes().to_vec();
        Row {
            owner: Some(vec![7; 16]),
            fence: 3,
            state: Some(state),
            algorithm: Some(1),
            fingerprint: Some(vec![1; 32]),
            checksum: Some(checksum(&id(1), &answer)),
            answer: Some(answer),
            expired: Some(false),
            time_left: Some(5_000_000),
        }
    }

    /// In a few words, what somebody finds who asks as this owner.
    fn found(row: Row, asking: u8) -> String {
        match row.found(&id(1), Owner::from_bytes([asking; 16])) {
            Ok(Found::Expired) => "expired".to_owned(),
            Ok(Found::Own) => "own".to_owned(),
            Ok(Found::Other(Begin::InProgress { remaining, .. })) => format!("in progress for {remaining:?}"),
            Ok(Found::Other(Begin::Abandoned { lost, .. })) => format!("abandoned {}", lost.fence),
            Ok(Found::Other(Begin::Completed { remaining, .. })) => format!("completed, {:?}", remaining.unwrap()),
            Ok(Found::Other(Begin::Acquired(_))) => "acquired".to_owned(),
            Err(error) => format!("{:?}", error.kind()),
        }
    }

    #[test]
    fn a_row_is_what_it_says_and_of_its_owner() {
        assert_eq!(found(row(IN_PROGRESS), 7), "own");
        assert_eq!(found(row(IN_PROGRESS), 8), "in progress for 5s");
        assert_eq!(found(row(ABANDONED), 7), "abandoned 3");
        assert_eq!(found(row(COMPLETED), 7), "completed, For(5s)");
        assert_eq!(found(row(b'x' as i8), 7), "Corrupt");
        let at_its_end = |left| Row {
            time_left: Some(left),
            ..row(IN_PROGRESS)
        };
        assert_eq!(found(at_its_end(1), 8), "in progress for 1µs");
        assert_eq!(found(at_its_end(0), 8), "abandoned 3");
        assert_eq!(found(at_its_end(-1), 8), "abandoned 3");
        for state in [IN_PROGRESS, ABANDONED, COMPLETED] {
            let expired = Some(true);
            assert_eq!(found(Row { expired, ..row(state) }, 7), "expired");
        }
    }

    #[test]
    fn a_row_with_a_value_that_cannot_be_is_corrupt() {
        let cut = |row: &mut Row| row.owner = Some(vec![7; 15]);
        let changes: [fn(&mut Row); 7] = [
            cut,
            |row| row.fence = -1,
            |row| row.algorithm = Some(256),
            |row| row.fingerprint = None,
            |row| row.expired = None,
            |row| row.answer = Some(b"another".to_vec()),
            |row| row.checksum = row.checksum.map(|sum| sum ^ 1),
        ];
        for (number, change) in changes.iter().enumerate() {
            let mut row = row(COMPLETED);
            change(&mut row);
            assert_eq!(found(row, 7), "Corrupt", "{number}");
        }
        let owner = Owner::from_bytes([7; 16]);
        assert!(row(COMPLETED).found(&id(2), owner).is_err(), "it is of another record");
    }

    /// As first released. These are in tables: they never change.
    #[test]
    fn a_checksum_is_what_it_was_first() {
        assert_eq!(checksum(&id(0x5a), b"paid"), 1255070343);
    }

    #[test]
    fn a_time_that_never_comes_is_kept_for_ever() {
        let seconds = |seconds| Retention::For(Duration::from_secs(seconds));
        assert_eq!(remaining(7_000_000), seconds(7));
        assert_eq!((remaining(0), remaining(-1)), (seconds(0), seconds(0)));
        assert_eq!(
            (remaining(FOREVER), remaining(i64::MAX)),
            (Retention::Forever, Retention::Forever)
        );
        let last = Retention::For(Duration::from_micros(FOREVER.unsigned_abs() - 1));
        assert_eq!(remaining(FOREVER - 1), last);
    }
}
