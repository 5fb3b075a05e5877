//! What rows show: those of tokio-postgres, those that come as texts, and sqlx's, which come in either format.

use std::str::FromStr;

use tokio_postgres::{Error, Row, SimpleQueryRow};

use super::{Looked, Place};
use crate::{
    error::{StoreError, StoreErrorKind},
    store::postgres::{failure, record},
};

impl Looked {
    pub(super) fn read_all(rows: &[Option<Row>]) -> Result<Vec<Self>, StoreError> {
        rows.iter().flatten().map(Self::read).collect()
    }

    pub(super) fn read(row: &Row) -> Result<Self, StoreError> {
        if let Some(place) = row.try_get("place").map_err(failure::classify)? {
            return Ok(Self::claimed(Place(place)));
        }
        let read = || {
            let fence: Option<i64> = row.try_get("fence")?;
            Ok::<_, Error>((row.try_get("held")?, fence.is_some()))
        };
        let (held, is_there) = read().map_err(failure::classify)?;
        Ok(Self {
            held,
            claimed: None,
            row: is_there.then(|| record::Row::read(row)).transpose()?,
        })
    }

    pub(super) fn read_text(row: &SimpleQueryRow) -> Result<Self, StoreError> {
        let cell = |column: &str| row.try_get(column).map_err(failure::classify);
        if let Some(place) = cell("place")? {
            return Ok(Self::claimed(Place(place.to_owned())));
        }
        Ok(Self {
            held: parsed(cell("held")?)?.ok_or_else(no_such_text)?,
            claimed: None,
            row: match parsed(cell("fence")?)? {
                None => None,
                Some(fence) => Some(record::Row {
                    owner: decoded(cell("owner")?)?,
                    fence,
                    state: cell("state")?.and_then(letter),
                    algorithm: parsed(cell("algorithm")?)?,
                    fingerprint: decoded(cell("fingerprint")?)?,
                    answer: decoded(cell("answer")?)?,
                    checksum: parsed(cell("checksum")?)?,
                    expired: flag(cell("expired")?)?,
                    time_left: parsed(cell("time_left")?)?,
                }),
            },
        })
    }
}

fn parsed<T: FromStr>(text: Option<&str>) -> Result<Option<T>, StoreError> {
    let parse = |text: &str| text.parse().map_err(|_| no_such_text());
    text.map(parse).transpose()
}

fn flag(text: Option<&str>) -> Result<Option<bool>, StoreError> {
    match text {
        None => Ok(None),
        Some("t") => Ok(Some(true)),
        Some("f") => Ok(Some(false)),
        Some(_) => Err(no_such_text()),
    }
}

/// Of the type `"char"`, which is one byte.
fn letter(text: &str) -> Option<i8> {
    text.bytes().next().map(u8::cast_signed)
}

fn decoded(text: Option<&str>) -> Result<Option<Vec<u8>>, StoreError> {
    let decode = |text: &str| bytes_of(text.as_bytes()).ok_or_else(no_such_text);
    text.map(decode).transpose()
}

fn no_such_text() -> StoreError {
    StoreError::with_source(
        StoreErrorKind::Corrupt,
        "a value that is not written as one of its type",
    )
}

#[cfg(feature = "sqlx")]
mod of_sqlx {
    use sqlx::{
        Error, Row, ValueRef,
        postgres::{PgRow, PgValueFormat},
    };

    use super::{Looked, Place, bytes_of};
    use crate::{
        error::{StoreError, StoreErrorKind},
        store::postgres::record,
    };

    impl Looked {
        pub(in super::super) fn read_all_sqlx(rows: &[PgRow]) -> Result<Vec<Self>, StoreError> {
            rows.iter().map(Self::read_sqlx).collect()
        }

        pub(in super::super) fn read_sqlx(row: &PgRow) -> Result<Self, StoreError> {
            let read = || {
                if let Some(place) = row.try_get("place")? {
                    return Ok(Self::claimed(Place(place)));
                }
                let fence: Option<i64> = row.try_get("fence")?;
                Ok::<_, Error>(Self {
                    held: row.try_get("held")?,
                    claimed: None,
                    row: match fence {
                        None => None,
                        Some(fence) => Some(record::Row {
                            owner: bytes(row, "owner")?,
                            fence,
                            state: row.try_get("state")?,
                            algorithm: row.try_get("algorithm")?,
                            fingerprint: bytes(row, "fingerprint")?,
                            answer: bytes(row, "answer")?,
                            checksum: row.try_get("checksum")?,
                            expired: row.try_get("expired")?,
                            time_left: row.try_get("time_left")?,
                        }),
                    },
                })
            };
            read().map_err(|error| StoreError::with_source(StoreErrorKind::Corrupt, error))
        }
    }

    /// sqlx reads no text but of one setting.
    fn bytes(row: &PgRow, column: &str) -> Result<Option<Vec<u8>>, Error> {
        let value = row.try_get_raw(column)?;
        if value.is_null() {
            return Ok(None);
        }
        let bytes = value.as_bytes().map_err(Error::Decode)?;
        match value.format() {
            PgValueFormat::Binary => Ok(Some(bytes.to_vec())),
            PgValueFormat::Text => match bytes_of(bytes) {
                Some(bytes) => Ok(Some(bytes)),
                None => Err(Error::Decode("bytes that are not written as such".into())),
            },
        }
    }
}

/// Bytes as the server writes them in a text, by either of its settings (`bytea_output`). `None` if it is no such text.
fn bytes_of(text: &[u8]) -> Option<Vec<u8>> {
    if let Some(digits) = text.strip_prefix(b"\\x") {
        let digit = |digit: u8| char::from(digit).to_digit(16).map(|digit| digit as u8);
        let pairs = digits.chunks(2).map(|pair| match *pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        });
        return pairs.collect();
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, after @ ..] = rest {
        let (byte, after) = match (first, after) {
            (b'\\', [b'\\', after @ ..]) => (b'\\', after),
            (b'\\', [high @ b'0'..=b'3', middle @ b'0'..=b'7', low @ b'0'..=b'7', after @ ..]) => {
                ((high - b'0') << 6 | (middle - b'0') << 3 | (low - b'0'), after)
            }
            (b'\\', _) => return None,
            _ => (*first, after),
        };
        bytes.push(byte);
        rest = after;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_as_the_server_writes_them_by_either_setting() {
        let some = |bytes: &[u8]| Some(bytes.to_vec());
        assert_eq!(bytes_of(b"\\x00abFF"), some(&[0, 0xab, 0xff]));
        assert_eq!(bytes_of(b"\\x"), some(&[]));
        assert_eq!(bytes_of(b""), some(&[]));
        assert_eq!(bytes_of(br"a\\\000\377z"), some(&[b'a', b'\\', 0, 255, b'z']));
        for none in [&b"\\x0"[..], b"\\x0g", b"\\", b"\\0", b"\\400", b"\\08a"] {
            assert_eq!(bytes_of(none), None, "{}", none.escape_ascii());
        }
    }
}
