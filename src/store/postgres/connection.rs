//! The way to the server: a connection of the pool for each step, and a deadline on all of it.

use std::time::Duration;

use deadpool_postgres::{Client, Object, Pool};
use tokio::time::{Instant, timeout_at};
use tokio_postgres::{
    Error, Row,
    types::{ToSql, Type},
};

use super::failure::{classify, is_rolled_back, no_connection, of_pool};
use crate::error::{StoreError, StoreErrorKind};

/// A value and its type, in the order of `$1`, `$2`, ...
pub(super) type Value<'a> = (&'a (dyn ToSql + Sync), Type);

pub(super) struct Connections {
    pool: Pool,
    prepared: bool,
    timeout: Duration,
}

impl Connections {
    pub(super) fn new(pool: Pool, prepared: bool, timeout: Duration) -> Self {
        Self {
            pool,
            prepared,
            timeout,
        }
    }

    /// Whether statements may be prepared.
    pub(super) fn is_prepared(&self) -> bool {
        self.prepared
    }

    /// How long one step may take.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn deadline(&self) -> Instant {
        let now = Instant::now();
        // Whoever sets a time that no clock can count waits a year.
        now.checked_add(self.timeout)
            .unwrap_or(now + Duration::from_secs(365 * 24 * 60 * 60))
    }

    /// The rows that a statement answers.
    pub(super) async fn query(
        &self,
        sql: &str,
        values: &[Value<'_>],
        deadline: Instant,
    ) -> Result<Vec<Row>, StoreError> {
        let answer = self.say(Wanted::Rows, sql, values, deadline).await?;
        Ok(answer.rows)
    }

    /// How many rows a statement changed.
    pub(super) async fn execute(&self, sql: &str, values: &[Value<'_>], deadline: Instant) -> Result<u64, StoreError> {
        let answer = self.say(Wanted::Count, sql, values, deadline).await?;
        Ok(answer.changed)
    }

    /// A step that the server rolled back for the sake of another one is made again, while there is time.
    async fn say(
        &self,
        wanted: Wanted,
        sql: &str,
        values: &[Value<'_>],
        deadline: Instant,
    ) -> Result<Answer, StoreError> {
        let late = |elapsed| StoreError::with_source(StoreErrorKind::Unavailable, elapsed);
        loop {
            let connection = timeout_at(deadline, self.pool.get())
                .await
                .map_err(|_| no_connection())?;
            let mut taken = Taken::from(connection.map_err(of_pool)?);
            let said = timeout_at(deadline, taken.say(wanted, sql, values, self.prepared));
            let result = said.await.map_err(late)?.map_err(classify);
            if result.as_ref().err().is_none_or(is_rolled_back) {
                taken.give_back();
            }
            match result {
                Err(error) if is_rolled_back(&error) && Instant::now() < deadline => {}
                result => return result,
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Rows,
    Count,
}

#[derive(Default)]
struct Answer {
    rows: Vec<Row>,
    changed: u64,
}

/// A connection that is not given back is closed: it broke, leads to a replica, has plans that do not fit any more; or
/// somebody left it while an answer was outstanding, and the next one would wait for that first.
struct Taken(Option<Client>);

impl From<Client> for Taken {
    fn from(connection: Client) -> Self {
        Self(Some(connection))
    }
}

impl Taken {
    async fn say(&self, wanted: Wanted, sql: &str, values: &[Value<'_>], prepared: bool) -> Result<Answer, Error> {
        let mut answer = Answer::default();
        let Some(connection) = &self.0 else { return Ok(answer) };
        if prepared {
            let statement = connection.prepare_cached(sql).await?;
            let values: Vec<_> = values.iter().map(|(value, _)| *value).collect();
            match wanted {
                Wanted::Rows => answer.rows = connection.query(&statement, &values).await?,
                Wanted::Count => answer.changed = connection.execute(&statement, &values).await?,
            }
        } else {
            match wanted {
                Wanted::Rows => answer.rows = connection.query_typed(sql, values).await?,
                Wanted::Count => answer.changed = connection.execute_typed(sql, values).await?,
            }
        }
        Ok(answer)
    }

    fn give_back(&mut self) {
        self.0 = None;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(Object::take(connection));
        }
    }
}
