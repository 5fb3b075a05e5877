//! Transactions on connections of an sqlx pool, for handlers that work with sqlx.
//!
//! sqlx sends one statement and awaits its answer, and prepares it once for each connection. What belongs together is sent
//! as one text with its values written into it where nothing may be prepared, and for a claim, which is then made by the
//! names of statements that the session was told of.

use std::{
    fmt,
    future::Future,
    ops::{Deref, DerefMut},
    sync::Arc,
};

use http::Extensions;
use sqlx::{
    Connection as _, Database, Error, Executor, PgPool, Postgres, Row, Transaction, TransactionManager,
    postgres::{PgDatabaseError, PgRow, PgSeverity},
    query, query_scalar,
};

use super::{
    BEGIN_TO_LOOK, Connection, Looked, NAMES, NOT_PREPARED, Source,
    client::{self, no_row},
    say::{Failure, Say, Statement, Value},
    statements::{SAVEPOINT, UNDO},
    text::{text, text_of_names, text_to_prepare},
};
use crate::{
    error::{StoreError, StoreErrorKind},
    store::postgres::failure,
    transactional::{Lent, Missing, MissingTransaction, Slot},
};

/// A pool of the user's.
#[derive(Clone, Debug)]
pub(in super::super) struct SqlxSource {
    pub(in super::super) pool: PgPool,
    /// Whether statements may be prepared.
    pub(in super::super) prepared: bool,
}

type Manager = <Postgres as Database>::TransactionManager;

/// A connection in a transaction, which is rolled back when it is dropped.
pub(in super::super) struct Open {
    transaction: Transaction<'static, Postgres>,
    prepared: bool,
}

impl Drop for Open {
    /// What is within it; sqlx ends one, which is then the transaction itself.
    fn drop(&mut self) {
        self.undo_within();
    }
}

impl Source for SqlxSource {
    type Connection = Open;

    async fn begin(
        &self,
        mut flight: Vec<Say>,
        named: &[&Arc<Statement>],
        _: &[&Arc<Statement>],
    ) -> Result<(Open, Vec<Looked>), Failure> {
        flight.push(Say::Plain(SAVEPOINT));
        let open = self.open("BEGIN").await?;
        if !self.prepared {
            return read(open.fetch_or_roll_back(&text(&flight)).await);
        }
        match open.fetch_or_roll_back(&text_of_names(&flight)).await {
            Err((open, failure)) if failure.code.as_deref() == Some(NOT_PREPARED) => {
                let said = open.begin_again().await?.fetch_or_roll_back(&text(&flight)).await;
                let (open, looked) = read(said)?;
                Ok((open.prepare(named).await?, looked))
            }
            said => read(said),
        }
    }

    async fn lock_and_look(&self, lock: Say, look: Say) -> Result<(bool, Looked), Failure> {
        let open = self.open(BEGIN_TO_LOOK).await?;
        let (mut open, rows) = open.say_or_roll_back(vec![lock, look]).await?;
        open.undo().await?;
        let [locked, looked] = &*rows else { return Err(no_row()) };
        Ok((locked.try_get("got")?, Looked::read_sqlx(looked)?))
    }
}

/// Or of what was undone: why.
type Said = Result<(Open, Vec<PgRow>), (Open, Failure)>;

fn read(said: Said) -> Result<(Open, Vec<Looked>), Failure> {
    let (open, rows) = said.map_err(|(_, failure)| failure)?;
    Ok((open, Looked::read_all_sqlx(&rows)?))
}

impl SqlxSource {
    async fn open(&self, begin: &'static str) -> Result<Open, Failure> {
        let pool = self.pool.clone();
        let opens_one = pool.num_idle() == 0 && pool.size() < pool.options().get_max_connections();
        let connection = match opens_one {
            // Not cut: one that is slow to open is there for the next request.
            true => uncut(async move { pool.acquire().await }).await?,
            // Who gives up leaves the queue for a connection.
            false => pool.acquire().await?,
        };
        let transaction = uncut(Transaction::begin(connection, Some(begin.into()))).await?;
        Ok(Open {
            transaction,
            prepared: self.prepared,
        })
    }
}

/// In a task of its own, which nobody cuts: cut while it begins, sqlx would give the connection back to its pool with a
/// transaction that it does not know of. For the same reason it begins with one statement and no other.
async fn uncut<T: Send + 'static>(
    begin: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::spawn(begin).await {
        Ok(begun) => Ok(begun?),
        Err(error) => Err(StoreError::with_source(StoreErrorKind::Unavailable, error).into()),
    }
}

impl Open {
    /// How many transactions of sqlx's are open, one within the other.
    fn depth(&self) -> usize {
        Manager::get_transaction_depth(&self.transaction)
    }

    /// The innermost. Not by the transaction's own method: that tells of a commit that failed before the server has undone
    /// it, and is gone. From a commit that succeeds the connection knows that nothing is open, and so does its end.
    async fn commit_one(&mut self) -> Result<(), Failure> {
        if let Err(error) = Manager::commit(&mut self.transaction).await {
            let _ = self.undo().await;
            return Err(error.into());
        }
        Ok(())
    }

    /// What the handler began within and leaked: sqlx would end one of those in place of the transaction. It is sent with
    /// what follows.
    fn undo_within(&mut self) {
        while self.depth() > 1 {
            Manager::start_rollback(&mut self.transaction);
        }
    }

    /// All of it.
    async fn undo(&mut self) -> Result<(), Error> {
        let mut failures = self.depth();
        self.undo_within();
        loop {
            match Manager::rollback(&mut self.transaction).await {
                // Of what was to be sent before it, and it was not sent then: the handler ended that by a statement.
                Err(Error::Database(_)) if failures > 1 => failures -= 1,
                result => return result,
            }
        }
    }

    /// On the same connection, after all was undone.
    async fn begin_again(mut self) -> Result<Self, Failure> {
        uncut(async move {
            Manager::begin(&mut self.transaction, None).await?;
            Ok(self)
        })
        .await
    }

    /// In one flight. Nobody is told of a failure before it is rolled back: the next attempt may come at once.
    async fn fetch_or_roll_back(mut self, text: &str) -> Said {
        match self.transaction.fetch_all(text).await {
            Ok(rows) => Ok((self, rows)),
            Err(error) => {
                let _ = self.undo().await;
                Err((self, error.into()))
            }
        }
    }

    /// By their names, for whoever has this session next. Behind a claim: then the table is locked, and nothing here waits.
    async fn prepare(mut self, named: &[&Arc<Statement>]) -> Result<Self, Failure> {
        let names = query_scalar(NAMES);
        let prepared = match names.fetch_all(&mut *self.transaction).await {
            Ok(there) => (*self.transaction)
                .execute(&*text_to_prepare(named, there))
                .await
                .map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = prepared {
            let _ = self.undo().await;
            return Err(error.into());
        }
        Ok(self)
    }

    /// Nobody is told of a failure before it is rolled back: the next attempt may come at once.
    async fn say_or_roll_back(mut self, flight: Vec<Say>) -> Result<(Self, Vec<PgRow>), Failure> {
        match self.say_behind_handler(flight).await {
            Ok(rows) => Ok((self, rows)),
            Err(error) => {
                let _ = self.undo().await;
                Err(error.into())
            }
        }
    }

    /// A statement that the handler left, as by a timeout, and that fails then, would be told of in place of what is sent
    /// next, which sqlx would not send. So what is still to come is read first; where nothing is, that costs nothing.
    async fn say_behind_handler(&mut self, flight: Vec<Say>) -> Result<Vec<PgRow>, Error> {
        while let Err(error) = self.transaction.flush().await {
            // Each is told of once; a connection that ended with one says so next.
            if !matches!(error, Error::Database(_)) {
                return Err(error);
            }
        }
        self.say(flight).await
    }

    /// The rows of what was asked, one at most for each.
    async fn say(&mut self, flight: Vec<Say>) -> Result<Vec<PgRow>, Error> {
        let connection = &mut *self.transaction;
        if !self.prepared {
            return connection.fetch_all(&*text(&flight)).await;
        }
        let mut rows = Vec::new();
        for say in flight {
            match say {
                Say::Plain(sql) => {
                    connection.execute(sql).await?;
                }
                Say::Ask(statement, values) => {
                    let asked = values
                        .into_iter()
                        .fold(query(&statement.sql), |query, value| match value {
                            Value::Bytes(bytes) => query.bind(bytes.to_vec()),
                            Value::BytesList(list) => query.bind(list),
                            Value::Small(number) => query.bind(number),
                            Value::Int(number) => query.bind(number),
                            Value::IntList(list) => query.bind(list),
                            Value::Long(number) => query.bind(number),
                            Value::Text(words) => query.bind(words),
                        });
                    rows.extend(connection.fetch_optional(asked).await?);
                }
            }
        }
        Ok(rows)
    }
}

impl Connection for Open {
    async fn look(&mut self, flight: Vec<Say>) -> Result<Vec<Looked>, Failure> {
        Ok(Looked::read_all_sqlx(&self.say(flight).await?)?)
    }

    async fn commit(mut self, flight: Vec<Say>) -> Result<(), Failure> {
        let undoes = matches!(flight.first(), Some(Say::Plain(UNDO)));
        if undoes {
            self.undo_within();
        }
        while self.depth() > 1 {
            self.commit_one().await?;
        }
        let (mut open, _) = self.say_or_roll_back(flight).await?;
        open.commit_one().await.map_err(|failure| Failure {
            by_commit: true,
            ..failure
        })
    }

    async fn roll_back(mut self, check: Option<Say>) -> Result<(), Failure> {
        let checked = self.say_behind_handler(check.into_iter().collect()).await;
        let rolled_back = self.undo().await;
        checked.map(drop).and(rolled_back).map_err(Failure::from)
    }

    fn lend(slot: &Slot<Self>, extensions: &mut Extensions) {
        extensions.insert(SqlxSlot(slot.clone()));
    }
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
            by_commit: false,
            error: StoreError::with_source(kind, error),
        }
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
/// A `begin` within it must not be cut, as by a timeout around it alone: sqlx 0.8 then rolls back the whole transaction,
/// the claim with it, and what the handler writes afterwards is committed statement by statement. It is answered with 500
/// `transaction-misused`.
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
pub struct SqlxTransaction(Lent<Open, Transaction<'static, Postgres>>);

impl SqlxTransaction {
    /// For handlers that are not axum's: from the extensions of their request.
    ///
    /// # Errors
    /// If the request runs in no transaction, somebody else has it, or it is over.
    pub fn from_extensions(extensions: &Extensions) -> Result<Self, MissingTransaction> {
        match extensions.get::<SqlxSlot>() {
            Some(slot) => slot.0.lend(|open| Some(&mut open.transaction)).map(Self),
            None if client::is_in(extensions) => Err(MissingTransaction(Missing::Other("PostgresTransaction"))),
            None => Err(MissingTransaction(Missing::None)),
        }
    }
}

pub(super) fn is_in(extensions: &Extensions) -> bool {
    extensions.get::<SqlxSlot>().is_some()
}

impl Deref for SqlxTransaction {
    type Target = Transaction<'static, Postgres>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for SqlxTransaction {
    fn deref_mut(&mut self) -> &mut Self::Target {
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
