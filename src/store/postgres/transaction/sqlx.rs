//! Transactions on connections of an sqlx pool, for handlers that work with sqlx.
//!
//! sqlx sends one statement and awaits its answer. What is to go in one flight is sent as one text, with its values
//! written into it: they are numbers, and bytes as hexadecimal digits.

use std::{
    fmt::{self, Write},
    ops::{Deref, DerefMut},
    sync::Arc,
};

use http::Extensions;
use sqlx::{
    Error, Executor, PgPool, Postgres, Row,
    postgres::{PgDatabaseError, PgRow, PgSeverity},
};

use super::{
    Connection, Looked, Source,
    client::{self, no_row},
    say::{Failure, Say, Value},
    statements::SAVEPOINT,
};
use crate::{
    error::{StoreError, StoreErrorKind},
    store::postgres::{failure, record},
    transactional::{Lent, Missing, MissingTransaction, Slot},
};

type Open = sqlx::Transaction<'static, Postgres>;

/// A pool of the user's.
#[derive(Clone, Debug)]
pub(in super::super) struct SqlxSource {
    pub(in super::super) pool: PgPool,
}

impl Source for SqlxSource {
    type Connection = Open;

    /// In two flights: sqlx gives no rows of what begins a transaction.
    async fn begin(&self, claims: Vec<Say>, looks: Vec<Say>, _: &[&Arc<str>]) -> Result<(Open, Vec<Looked>), Failure> {
        let mut open = self.pool.begin().await?;
        let answered = looks.len();
        let flight = claims.into_iter().chain(looks).chain([Say::Plain(SAVEPOINT)]);
        let rows = open.fetch_all(&*text(flight)).await?;
        let looked = rows[rows.len().saturating_sub(answered)..].iter();
        let looked = looked.map(Looked::read_sqlx).collect::<Result<_, _>>()?;
        Ok((open, looked))
    }

    async fn wait_and_look(&self, wait: Say, look: Say) -> Result<Looked, Failure> {
        let mut open = self.pool.begin().await?;
        let rows = open.fetch_all(&*text([wait, look])).await?;
        open.rollback().await?;
        Ok(Looked::read_sqlx(rows.get(1).ok_or_else(no_row)?)?)
    }
}

impl Connection for Open {
    async fn ask(&mut self, flight: Vec<Say>) -> Result<Vec<bool>, Failure> {
        let asked = flight.iter().filter(|say| matches!(say, Say::Ask(..))).count();
        let rows = (**self).fetch_all(&*text(flight)).await?;
        // One row at most for each; whose is missing is of no interest.
        Ok(vec![rows.len() == asked; asked])
    }

    async fn commit(mut self, mut flight: Vec<Say>) -> Result<(), Failure> {
        // sqlx ends a transaction with a statement of its own, which would be one more flight. So the next one begins at
        // once, empty, and that is what it rolls back when the connection returns to its pool.
        flight.push(Say::Plain("COMMIT AND CHAIN"));
        match (*self).execute(&*text(flight)).await {
            Ok(_) => Ok(()),
            Err(error) => {
                // Before anybody is told that it failed: the next attempt may come at once.
                let _ = self.rollback().await;
                Err(error.into())
            }
        }
    }

    async fn roll_back(mut self, check: Option<Say>) -> Result<(), Failure> {
        let checked = match check {
            Some(check) => (*self).execute(&*text([check])).await.map(drop),
            None => Ok(()),
        };
        let rolled_back = self.rollback().await;
        checked.and(rolled_back).map_err(Failure::from)
    }

    fn lend(slot: &Slot<Self>, extensions: &mut Extensions) {
        extensions.insert(SqlxSlot(slot.clone()));
    }
}

/// One text of all of it.
fn text(flight: impl IntoIterator<Item = Say>) -> String {
    let mut text = String::new();
    for say in flight {
        match say {
            Say::Plain(sql) => text.push_str(sql),
            Say::Ask(sql, values) => write_with_values(&mut text, &sql, &values),
        }
        text.push(';');
    }
    text
}

/// The statement with its values in the places of `$1` and so on; not within quotes, where a table's name stands.
fn write_with_values(text: &mut String, sql: &str, values: &[Value]) {
    let mut quoted = None;
    let mut rest = sql.chars().peekable();
    while let Some(character) = rest.next() {
        match (quoted, character) {
            (None, '$') => {
                let mut number = 0;
                while let Some(digit) = rest.peek().and_then(|digit| digit.to_digit(10)) {
                    number = number * 10 + digit as usize;
                    rest.next();
                }
                if let Some(value) = values.get(number.wrapping_sub(1)) {
                    write_value(text, value);
                }
                continue;
            }
            (None, '"' | '\'') => quoted = Some(character),
            (Some(quote), _) if quote == character => quoted = None,
            _ => {}
        }
        text.push(character);
    }
}

fn write_value(text: &mut String, value: &Value) {
    // Writing to a string does not fail.
    let _ = match value {
        Value::Bytes(bytes) => {
            write_bytes(text, bytes);
            Ok(())
        }
        Value::BytesList(list) => {
            text.push_str("ARRAY[");
            for (index, bytes) in list.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write_bytes(text, bytes);
            }
            text.push(']');
            Ok(())
        }
        // In parentheses: a cast binds closer than a minus.
        Value::Small(number) => write!(text, "({number})"),
        Value::Int(number) => write!(text, "({number})"),
        Value::Long(number) => write!(text, "({number})"),
        Value::IntList(list) => write!(text, "ARRAY{list:?}"),
        Value::Text(words) => write!(text, "E'{}'", words.replace('\\', "\\\\").replace('\'', "\\'")),
    };
}

fn write_bytes(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    text.reserve(2 * bytes.len() + 20);
    text.push_str("'\\x");
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text.push_str("'::bytea");
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let server = match &error {
            Error::Database(server) => server.try_downcast_ref::<PgDatabaseError>(),
            _ => None,
        };
        let code = server.map(|server| server.code().to_owned());
        let fatal = server.is_some_and(|server| server.severity() != PgSeverity::Error);
        let kind = match (&code, &error) {
            (Some(code), _) => failure::kind_of(code),
            // Settings, and answers that are none.
            (None, Error::Configuration(_) | Error::PoolClosed | Error::ColumnDecode { .. }) => StoreErrorKind::Other,
            (None, _) => StoreErrorKind::Unavailable,
        };
        Self {
            code,
            fatal,
            error: StoreError::with_source(kind, error),
        }
    }
}

impl Looked {
    fn read_sqlx(row: &PgRow) -> Result<Self, StoreError> {
        let read = || {
            let fence: Option<i64> = row.try_get("fence")?;
            Ok::<_, Error>(Self {
                held: row.try_get("held")?,
                claimed: row.try_get::<Option<bool>, _>("claimed")?.unwrap_or(false),
                row: match fence {
                    None => None,
                    Some(fence) => Some(record::Row {
                        owner: row.try_get("owner")?,
                        fence,
                        state: row.try_get("state")?,
                        algorithm: row.try_get("algorithm")?,
                        fingerprint: row.try_get("fingerprint")?,
                        answer: row.try_get("answer")?,
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

// ---- what handlers see

/// The open transaction among the extensions of its request.
#[derive(Clone)]
struct SqlxSlot(Slot<Open>);

/// The transaction of a request under [`Guarantee::Transactional`](crate::Guarantee::Transactional), as sqlx's own, and
/// an extractor for axum handlers; for a store with an [sqlx pool](crate::PostgresStore::with_sqlx).
///
/// What is written through it is committed together with the answer, or not at all. The layer does that when the handler
/// has answered, so a handler neither commits nor rolls back; what it begins within is a savepoint, as always with sqlx.
/// One at a time has it, and by then it has to be given back, by being dropped.
///
/// ```
/// # use axum::http::StatusCode;
/// # use tower_idempotency::SqlxTransaction;
/// async fn pay(mut transaction: SqlxTransaction) -> Result<StatusCode, StatusCode> {
///     sqlx::query("UPDATE accounts SET balance = balance - $1 WHERE id = $2")
///         .bind(100_i64)
///         .bind(7_i64)
///         .execute(&mut **transaction)
///         .await
///         .map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
///     Ok(StatusCode::CREATED)
/// }
/// ```
pub struct SqlxTransaction(Lent<Open, Open>);

impl SqlxTransaction {
    /// For handlers that are not axum's: from the extensions of their request.
    ///
    /// # Errors
    /// If the request runs in no transaction, somebody else has it, or it is over.
    pub fn from_extensions(extensions: &Extensions) -> Result<Self, MissingTransaction> {
        match extensions.get::<SqlxSlot>() {
            Some(slot) => slot.0.lend(|open| Some(open)).map(Self),
            None if client::is_in(extensions) => Err(MissingTransaction(Missing::Other("PostgresTransaction"))),
            None => Err(MissingTransaction(Missing::None)),
        }
    }
}

pub(super) fn is_in(extensions: &Extensions) -> bool {
    extensions.get::<SqlxSlot>().is_some()
}

impl Deref for SqlxTransaction {
    type Target = Open;

    fn deref(&self) -> &Open {
        &self.0
    }
}

impl DerefMut for SqlxTransaction {
    fn deref_mut(&mut self) -> &mut Open {
        &mut self.0
    }
}

impl fmt::Debug for SqlxTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SqlxTransaction(..)")
    }
}

#[cfg(feature = "axum")]
super::extractor!(SqlxTransaction);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_where_the_statement_has_their_numbers_and_nowhere_else() {
        let values = [
            Value::from(&[0, 171]),
            Value::from(-7_i64),
            Value::from("it's".to_owned()),
        ];
        let sql = r#"SELECT $2::bigint, $1::bytea, '$1', $3::text FROM "a$1"."b""$2""#;
        let expected = r#"SELECT (-7)::bigint, '\x00ab'::bytea::bytea, '$1', E'it\'s'::text FROM "a$1"."b""$2";"#;
        assert_eq!(text([Say::ask(&sql.into(), values)]), expected);
    }
}
