//! Transactions on connections of the store's pool, for handlers that work with tokio-postgres or deadpool.

use std::{
    fmt,
    future::{Future, poll_fn},
    ops::Deref,
    pin::Pin,
    sync::Arc,
    task::Poll,
};

use deadpool_postgres::{Client, Object, Pool};
use http::Extensions;
use tokio_postgres::{
    Error, Row, SimpleQueryMessage,
    error::{DbError, Severity},
    types::ToSql,
};

use super::{
    BEGIN_TO_LOOK, Connection, Looked, NAMES, NOT_PREPARED, Source,
    say::{Failure, Say, Statement},
    statements::SAVEPOINT,
    text::{text, text_of_names, text_to_prepare},
};
use crate::{
    error::{StoreError, StoreErrorKind},
    store::postgres::failure,
    transactional::{Lent, Missing, MissingTransaction, Slot},
};

/// A pool, and how its connections are spoken to.
pub(in super::super) struct ClientSource {
    pub(in super::super) pool: Pool,
    /// Whether statements may be prepared.
    pub(in super::super) prepared: bool,
}

/// A connection in a transaction. It goes back to its pool only when the transaction is known to be over; dropped
/// before, it is closed, and the server rolls back.
pub(in super::super) struct Open {
    client: Option<Object>,
    prepared: bool,
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
            drop(Object::take(client));
        }
    }
}

impl Source for ClientSource {
    type Connection = Open;

    async fn begin(
        &self,
        flight: Vec<Say>,
        named: &[&Arc<Statement>],
        later: &[&Arc<Statement>],
    ) -> Result<(Open, Vec<Looked>), Failure> {
        let open = self.open().await?;
        let flight: Vec<_> = [Say::Plain("BEGIN")]
            .into_iter()
            .chain(flight)
            .chain([Say::Plain(SAVEPOINT)])
            .collect();
        if self.prepared && open.may_know_names() {
            match open.look_by_text(&text_of_names(&flight)).await {
                Err(failure) if failure.code.as_deref() == Some(NOT_PREPARED) => {
                    open.say(&[Say::Plain("ROLLBACK")]).await?;
                }
                looked => {
                    let (open, looked) = open.begun(looked).await?;
                    return open.ready(looked, &[], later).await;
                }
            }
        }
        let looked = open.look_by_text(&text(&flight)).await;
        let (open, looked) = open.begun(looked).await?;
        match self.prepared {
            true => open.ready(looked, named, later).await,
            false => Ok((open, looked)),
        }
    }

    async fn lock_and_look(&self, lock: Say, look: Say) -> Result<(bool, Looked), Failure> {
        let open = self.open().await?;
        let flight = [Say::Plain(BEGIN_TO_LOOK), lock, look, Say::Plain("ROLLBACK")];
        let rows = open.say(&flight).await?;
        open.give_back();
        let mut rows = rows.iter().flatten();
        let (Some(locked), Some(looked)) = (rows.next(), rows.next()) else {
            return Err(no_row());
        };
        let got = locked.try_get("got").map_err(failure::classify)?;
        Ok((got, Looked::read(looked)?))
    }
}

impl ClientSource {
    async fn open(&self) -> Result<Open, Failure> {
        let client = self.pool.get().await.map_err(failure::of_pool)?;
        Ok(Open {
            client: Some(client),
            prepared: self.prepared,
        })
    }
}

impl Connection for Open {
    async fn look(&mut self, flight: Vec<Say>) -> Result<Vec<Looked>, Failure> {
        Ok(Looked::read_all(&self.say(&flight).await?)?)
    }

    async fn commit(self, mut flight: Vec<Say>) -> Result<(), Failure> {
        flight.push(Say::Plain("COMMIT"));
        let answers = self.end(&flight).await?;
        let completed = answers.iter().rev().skip(1).all(Result::is_ok);
        first_failure(answers).map(drop).map_err(|failure| Failure {
            by_commit: completed,
            ..failure
        })
    }

    async fn roll_back(self, check: Option<Say>) -> Result<(), Failure> {
        let flight: Vec<_> = check.into_iter().chain([Say::Plain("ROLLBACK")]).collect();
        first_failure(self.end(&flight).await?).map(drop)
    }

    fn lend(slot: &Slot<Self>, extensions: &mut Extensions) {
        extensions.insert(ClientSlot(slot.clone()));
    }
}

impl Open {
    /// Says what ends the transaction, and gives the connection back if it is over.
    async fn end(self, flight: &[Say]) -> Result<Vec<Answer>, Failure> {
        let answers = self.answers(flight).await?;
        let is_over = match answers.last() {
            // Whatever failed before: when the last statement was answered there is no transaction any more.
            Some(Ok(_)) => true,
            // The server says so before it has undone it. Nobody is told until it has: the next attempt may come at once.
            Some(Err(error)) if is_of_a_statement(error) => self.say(&[Say::Plain("ROLLBACK")]).await.is_ok(),
            _ => false,
        };
        if is_over {
            self.give_back();
        }
        Ok(answers)
    }

    fn give_back(mut self) {
        drop(self.client.take());
    }

    fn client(&self) -> Result<&Object, Failure> {
        self.client
            .as_ref()
            .ok_or_else(|| StoreError::new(StoreErrorKind::Unavailable).into())
    }

    /// The transaction has begun, or something failed: then it is undone before anybody is told, since the next attempt may
    /// come at once, and the connection is given back if it is well, and its statements are prepared. After other failures
    /// it is closed: it may lead to a replica, or have plans that do not fit any more.
    async fn begun<T>(self, said: Result<T, Failure>) -> Result<(Self, T), Failure> {
        match said {
            Ok(said) => Ok((self, said)),
            Err(failure) => {
                let is_well = |code: &String| code.starts_with("40") || code == "55P03";
                match &failure.code {
                    Some(_) if failure.fatal => {}
                    Some(code) if is_well(code) => drop(self.end(&[Say::Plain("ROLLBACK")]).await),
                    Some(_) => drop(self.say(&[Say::Plain("ROLLBACK")]).await),
                    None => {}
                }
                Err(failure)
            }
        }
    }

    /// A session that was opened just now was told of none.
    fn may_know_names(&self) -> bool {
        let recycled = |client| Object::metrics(client).recycle_count > 0;
        self.client.as_ref().is_some_and(recycled)
    }

    /// One message, which the server answers with one: each that it answers costs it a twentieth of a short transaction.
    async fn look_by_text(&self, text: &str) -> Result<Vec<Looked>, Failure> {
        let said = self.client()?.simple_query(text).await?;
        let rows = said.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(Looked::read_text(row)),
            _ => None,
        });
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Tells the session what it does not know yet. Before the handler has it: in a transaction that has failed nothing can
    /// be prepared any more. And behind the claim: then the table is locked, and nothing here waits.
    async fn ready(
        self,
        looked: Vec<Looked>,
        named: &[&Arc<Statement>],
        later: &[&Arc<Statement>],
    ) -> Result<(Self, Vec<Looked>), Failure> {
        let told = self.tell(named, later).await;
        self.begun(told.map(|()| looked)).await
    }

    async fn tell(&self, named: &[&Arc<Statement>], later: &[&Arc<Statement>]) -> Result<(), Failure> {
        for statement in later {
            self.client()?.prepare_cached(&statement.sql).await?;
        }
        match named.is_empty() {
            true => Ok(()),
            false => self.tell_names(named).await,
        }
    }

    /// For whoever has this session next.
    async fn tell_names(&self, named: &[&Arc<Statement>]) -> Result<(), Failure> {
        let client = self.client()?;
        let there = client
            .simple_query(NAMES)
            .await?
            .into_iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(name) => name.try_get(0).ok()?.map(str::to_owned),
                _ => None,
            });
        Ok(client.batch_execute(&text_to_prepare(named, there.collect())).await?)
    }

    /// Sends all of it, then awaits all the answers: the rows, or the first failure.
    async fn say(&self, flight: &[Say]) -> Result<Vec<Option<Row>>, Failure> {
        first_failure(self.answers(flight).await?)
    }

    /// Fails only before anything was sent.
    async fn answers(&self, flight: &[Say]) -> Result<Vec<Answer>, Failure> {
        let client = self.client()?;
        let mut calls: Vec<Answering<'_>> = Vec::with_capacity(flight.len());
        for say in flight {
            match say {
                Say::Plain(sql) => calls.push(Box::pin(async { client.batch_execute(sql).await.map(|()| None) })),
                Say::Ask(statement, values) if self.prepared => {
                    let statement = client.prepare_cached(&statement.sql).await?;
                    let values: Vec<_> = values.iter().map(|value| value as &(dyn ToSql + Sync)).collect();
                    calls.push(Box::pin(async move { client.query_opt(&statement, &values).await }));
                }
                Say::Ask(statement, values) => {
                    let values: Vec<_> = values
                        .iter()
                        .map(|value| (value as &(dyn ToSql + Sync), value.kind()))
                        .collect();
                    calls.push(Box::pin(async move {
                        client.query_typed_opt(&statement.sql, &values).await
                    }));
                }
            }
        }
        Ok(in_one_flight(calls).await)
    }
}

/// The server said it, and the connection stands.
fn is_of_a_statement(error: &Error) -> bool {
    let severity = error.as_db_error().and_then(DbError::parsed_severity);
    severity == Some(Severity::Error)
}

type Answer = Result<Option<Row>, Error>;
type Answering<'a> = Pin<Box<dyn Future<Output = Answer> + Send + 'a>>;

fn first_failure(answers: Vec<Answer>) -> Result<Vec<Option<Row>>, Failure> {
    Ok(answers.into_iter().collect::<Result<_, _>>()?)
}

/// Each call is sent when it is first polled: in this order, and before any answer is awaited.
async fn in_one_flight(mut calls: Vec<Answering<'_>>) -> Vec<Answer> {
    let mut answers: Vec<_> = calls.iter().map(|_| None).collect();
    poll_fn(|cx| {
        let mut all = true;
        for (call, answer) in calls.iter_mut().zip(&mut answers) {
            if answer.is_none() {
                match call.as_mut().poll(cx) {
                    Poll::Ready(ready) => *answer = Some(ready),
                    Poll::Pending => all = false,
                }
            }
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    answers.into_iter().flatten().collect()
}

pub(super) fn no_row() -> Failure {
    StoreError::new(StoreErrorKind::Other).into()
}

// ---- what handlers see

/// The open transaction among the extensions of its request.
#[derive(Clone)]
struct ClientSlot(Slot<Open>);

/// The transaction of a request under [`Guarantee::Transactional`](crate::Guarantee::Transactional): a client of
/// tokio-postgres, with deadpool's `prepare_cached`, and an extractor for axum handlers.
///
/// What is written through it is committed together with the answer, or not at all. The layer does that when the handler
/// has answered, so a handler neither commits nor rolls back; nested `SAVEPOINT`s are its own affair. One at a time has
/// it, and by then it has to be given back, by being dropped. What it streams (`query_raw`, `copy_out`) has to be read to
/// its end by then, and a `copy_in` to be finished: otherwise the commit is not answered, and all is rolled back
/// or the client hears late that it is not.
///
/// ```
/// # use axum::http::StatusCode;
/// # use tower_idempotency::PostgresTransaction;
/// async fn pay(transaction: PostgresTransaction) -> Result<StatusCode, StatusCode> {
///     transaction
///         .execute("UPDATE accounts SET balance = balance - 100 WHERE id = 7", &[])
///         .await
///         .map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
///     Ok(StatusCode::CREATED)
/// }
/// ```
pub struct PostgresTransaction(Lent<Open, Object>);

impl PostgresTransaction {
    /// For handlers that are not axum's: from the extensions of their request.
    ///
    /// # Errors
    /// If the request runs in no transaction, somebody else has it, or it is over.
    pub fn from_extensions(extensions: &Extensions) -> Result<Self, MissingTransaction> {
        match extensions.get::<ClientSlot>() {
            Some(slot) => slot.0.lend(|open| open.client.as_mut()).map(Self),
            #[cfg(feature = "sqlx")]
            None if super::sqlx::is_in(extensions) => Err(MissingTransaction(Missing::Other("SqlxTransaction"))),
            None => Err(MissingTransaction(Missing::None)),
        }
    }
}

#[cfg(feature = "sqlx")]
pub(super) fn is_in(extensions: &Extensions) -> bool {
    extensions.get::<ClientSlot>().is_some()
}

impl Deref for PostgresTransaction {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.0
    }
}

impl fmt::Debug for PostgresTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PostgresTransaction(..)")
    }
}

#[cfg(feature = "axum")]
super::extractor!(PostgresTransaction);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_that_asks_for_the_transaction_of_another_library_is_told_which_it_is() {
        let mut extensions = Extensions::new();
        let open = Open {
            client: None,
            prepared: true,
        };
        Open::lend(&Slot::of(open), &mut extensions);
        let missing = |error: MissingTransaction| error.0;
        let own = PostgresTransaction::from_extensions(&extensions).err();
        assert_eq!(own.map(missing), Some(Missing::Over), "it has no connection any more");
        #[cfg(feature = "sqlx")]
        {
            let other = super::super::SqlxTransaction::from_extensions(&extensions).err();
            assert_eq!(other.map(missing), Some(Missing::Other("PostgresTransaction")));
        }
    }
}
