//! Records in a table of a PostgreSQL server.

mod builder;
mod connection;
pub(crate) mod failure;
mod purge;
pub(crate) mod record;
mod server;
pub(crate) mod statements;
mod table;
#[cfg(test)]
mod tests;
mod transaction;
mod waiters;

use std::{fmt, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_postgres::types::Type;

#[cfg(feature = "sqlx")]
pub use self::transaction::SqlxTransaction;
pub use self::{builder::PostgresStoreBuilder, table::PostgresTable, transaction::PostgresTransaction};
use self::{
    connection::{Connections, Value},
    record::{COMPLETED, FIRST, Found, Row},
    statements::{Statements, micros, retention_micros},
    waiters::{Waiters, Wake},
};
use super::{Store, hints::Hints};
use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    record::{Begin, Claim, Lease, RecordId, Retention},
    transactional::Transactions,
};

/// Keeps records in a table of a PostgreSQL server (13 or newer) that many nodes share. Clones share the pool.
///
/// ```no_run
/// use tower_idempotency::{IdempotencyLayer, PostgresStore};
///
/// # async fn connect() -> Result<(), tower_idempotency::StoreError> {
/// let store = PostgresStore::builder()
///     .create_table(true)
///     .connect("postgres://app@127.0.0.1/payments")
///     .await?;
/// let layer = IdempotencyLayer::new(store);
/// # Ok(())
/// # }
/// ```
///
/// The server's clock counts leases and retentions. What was answered is as durable as the server's commits are. While
/// the server cannot be reached, requests with a key are refused: 503 with `Retry-After`.
///
#[doc = include_str!("../../../docs/postgres.md")]
#[derive(Clone)]
pub struct PostgresStore {
    inner: Arc<Inner>,
    /// Those that handlers run in.
    transactions: Arc<dyn Transactions>,
}

struct Inner {
    connections: Arc<Connections>,
    table: PostgresTable,
    statements: Statements,
    hints: Arc<Hints>,
    waiters: Arc<Waiters>,
    batch: purge::Batch,
}

impl PostgresStore {
    /// Connects to a server by its URL, with default settings. The table has to be there.
    ///
    /// # Errors
    /// As [`PostgresStoreBuilder::connect`].
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        Self::builder().connect(url).await
    }

    /// The settings of a store.
    pub fn builder() -> PostgresStoreBuilder {
        PostgresStoreBuilder::default()
    }

    /// Removes records that have expired, at most 1,000, fewer after a try that failed, and says how many: 0 if that was
    /// all. Done by itself unless
    /// [`purge_every`](PostgresStoreBuilder::purge_every) is `None`. Records that others work on are left for later.
    ///
    /// # Errors
    /// `Unavailable` or `Other`.
    pub async fn purge(&self) -> Result<u64, StoreError> {
        Ok(self.inner.purge().await?.removed)
    }
}

impl fmt::Debug for PostgresStore {
    /// Not the address: it may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStore")
            .field("table", &self.inner.table)
            .field("connections", &self.inner.connections.pool().status())
            .finish_non_exhaustive()
    }
}

impl Store for PostgresStore {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let begin = self.inner.begin(id, claim).await?;
        // None of what is still going on: a look succeeds on a server that became a replica, where that may be otherwise
        // by now. A claim fails there, and its connection is given up.
        if let Begin::Completed { .. } = begin {
            self.inner.hints.add(id);
        }
        Ok(begin)
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        let answer: &[u8] = response.as_bytes();
        let (checksum, retention) = (record::checksum(&lease.id, answer), retention_micros(retention));
        let values = [
            (&answer as _, Type::BYTEA),
            (&checksum as _, Type::INT4),
            (&retention as _, Type::INT8),
        ];
        let inner = &self.inner;
        let deadline = inner.connections.deadline();
        match inner.end(&inner.statements.complete, lease, &values, deadline).await {
            // The answer of an earlier try was lost.
            Err(error) if error.kind() == StoreErrorKind::Fenced && inner.is_completed_by(lease, deadline).await? => {}
            result => result?,
        }
        inner.hints.add(&lease.id);
        inner.waiters.wake(&lease.id, Wake::All);
        Ok(())
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        let deadline = self.inner.connections.deadline();
        let fence = self
            .inner
            .renew(lease.id, lease.owner.as_bytes(), length, deadline)
            .await?;
        fence.map(drop).ok_or(StoreErrorKind::Fenced.into())
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        let deadline = self.inner.connections.deadline();
        self.inner
            .end(&self.inner.statements.release, lease, &[], deadline)
            .await?;
        self.inner.waiters.wake(&lease.id, Wake::One);
        Ok(())
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        let deadline = self.inner.connections.deadline();
        self.inner
            .end(&self.inner.statements.abandon, lease, &[], deadline)
            .await?;
        self.inner.waiters.wake(&lease.id, Wake::All);
        Ok(())
    }

    async fn changed(&self, id: &RecordId) {
        self.inner.waiters.changed(id).await;
    }
}

impl Inner {
    /// One statement for a new key, and one for a record that this node saw completed. Else two, a claim that finds the
    /// key taken and a look; three where what this node saw completed is gone. What a look finds to be vacant or lost is
    /// claimed by a statement that compares what was seen and does nothing if it is not so any more; then all begins
    /// from the start.
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let deadline = self.connections.deadline();
        let acquired = |fence| Ok(Begin::Acquired(Lease::new(*id, claim.owner, fence)));
        let was_completed = self.hints.has(id);
        if was_completed && !claim.asks_for_remaining {
            if let Some(begin) = self.completed(id, deadline).await? {
                return Ok(begin);
            }
        }
        let mut look_first = was_completed;
        // Each turn somebody else got ahead; the deadline ends it at last.
        loop {
            let refused = match std::mem::take(&mut look_first) {
                true => None,
                false => match self.insert(id, claim, deadline).await {
                    Ok(true) => return acquired(FIRST),
                    Ok(false) => None,
                    // What is there already is answered all the same.
                    Err(error) if error.kind() == StoreErrorKind::Full => Some(error),
                    Err(error) => return Err(error),
                },
            };
            let found = match (self.look(id, deadline).await?, refused) {
                (Some(row), _) => row.found(id, claim.owner)?,
                (None, Some(refused)) => return Err(refused),
                (None, None) => continue,
            };
            let next = match found {
                Found::Own => self.renew(*id, claim.owner.as_bytes(), claim.lease, deadline).await?,
                Found::Expired => {
                    self.update(&self.statements.claim_expired, id, claim, &[], deadline)
                        .await?
                }
                Found::Other(Begin::Abandoned { lost, .. }) if claim.takeover == Some(lost) => {
                    let (owner, number) = (&lost.owner.as_bytes()[..], lost.fence.cast_signed());
                    let lost = [(&owner as _, Type::BYTEA), (&number as _, Type::INT8)];
                    self.update(&self.statements.take_over, id, claim, &lost, deadline)
                        .await?
                }
                Found::Other(begin) => return Ok(begin),
            };
            if let Some(fence) = next {
                return acquired(fence.cast_unsigned());
            }
        }
    }

    /// Whether there was no record.
    async fn insert(&self, id: &RecordId, claim: &Claim, deadline: Instant) -> Result<bool, StoreError> {
        let values = ClaimValues::of(id, claim);
        let inserted = self
            .connections
            .execute(&self.statements.claim, &values.all(), deadline)
            .await?;
        Ok(inserted == 1)
    }

    /// The fence of the claim, if the record was as it was seen.
    async fn update(
        &self,
        sql: &str,
        id: &RecordId,
        claim: &Claim,
        more: &[Value<'_>],
        deadline: Instant,
    ) -> Result<Option<i64>, StoreError> {
        let values = ClaimValues::of(id, claim);
        let values = [&values.all(), more].concat();
        let rows = self.connections.query(sql, &values, deadline).await?;
        fence(rows.first())
    }

    /// A completed record that has not expired.
    async fn completed(&self, id: &RecordId, deadline: Instant) -> Result<Option<Begin>, StoreError> {
        let bytes = &id.as_bytes()[..];
        let rows = self
            .connections
            .query(&self.statements.replay, &[(&bytes, Type::BYTEA)], deadline)
            .await?;
        rows.first().map(|row| record::completed(row, id)).transpose()
    }

    async fn look(&self, id: &RecordId, deadline: Instant) -> Result<Option<Row>, StoreError> {
        let id = &id.as_bytes()[..];
        let rows = self
            .connections
            .query(&self.statements.look, &[(&id, Type::BYTEA)], deadline)
            .await?;
        rows.first().map(Row::seen).transpose()
    }

    /// The fence, if the record is the owner's and in progress.
    async fn renew(
        &self,
        id: RecordId,
        owner: &[u8],
        length: Duration,
        deadline: Instant,
    ) -> Result<Option<i64>, StoreError> {
        let (id, length) = (&id.as_bytes()[..], micros(length));
        let values = [
            (&id as _, Type::BYTEA),
            (&owner as _, Type::BYTEA),
            (&length as _, Type::INT8),
        ];
        let rows = self
            .connections
            .query(&self.statements.renew, &values, deadline)
            .await?;
        fence(rows.first())
    }

    /// Fenced, if there is nothing of the lease's to be ended.
    async fn end(&self, sql: &str, lease: &Lease, more: &[Value<'_>], deadline: Instant) -> Result<(), StoreError> {
        let (id, owner) = (&lease.id.as_bytes()[..], &lease.owner.as_bytes()[..]);
        let mut values: Vec<Value<'_>> = vec![(&id, Type::BYTEA), (&owner, Type::BYTEA)];
        values.extend_from_slice(more);
        if self.connections.execute(sql, &values, deadline).await? == 0 {
            return Err(StoreErrorKind::Fenced.into());
        }
        Ok(())
    }

    async fn is_completed_by(&self, lease: &Lease, deadline: Instant) -> Result<bool, StoreError> {
        let row = self.look(&lease.id, deadline).await?;
        Ok(row.is_some_and(|row| {
            row.state == Some(COMPLETED)
                && row.expired == Some(false)
                && row.owner.as_deref() == Some(&lease.owner.as_bytes()[..])
        }))
    }
}

/// `$1` to `$6` of the statements that claim.
struct ClaimValues<'a> {
    id: &'a [u8],
    owner: &'a [u8],
    algorithm: i16,
    digest: &'a [u8],
    lease: i64,
    retention: i64,
}

impl<'a> ClaimValues<'a> {
    fn of(id: &'a RecordId, claim: &'a Claim) -> Self {
        Self {
            id: id.as_bytes(),
            owner: claim.owner.as_bytes(),
            algorithm: claim.fingerprint.algorithm().into(),
            digest: claim.fingerprint.digest(),
            lease: micros(claim.lease),
            retention: retention_micros(claim.retention),
        }
    }

    fn all(&self) -> [Value<'_>; 6] {
        [
            (&self.id, Type::BYTEA),
            (&self.owner, Type::BYTEA),
            (&self.algorithm, Type::INT2),
            (&self.digest, Type::BYTEA),
            (&self.lease, Type::INT8),
            (&self.retention, Type::INT8),
        ]
    }
}

fn fence(row: Option<&tokio_postgres::Row>) -> Result<Option<i64>, StoreError> {
    row.map(|row| row.try_get("fence").map_err(failure::classify))
        .transpose()
}
