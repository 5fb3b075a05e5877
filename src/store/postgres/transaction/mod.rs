//! Claims in a transaction that the handler works in, whichever client it works with.

mod client;
mod ends;
mod looked;
mod open;
mod rows;
mod say;
#[cfg(feature = "sqlx")]
mod sqlx;
mod statements;
#[cfg(test)]
mod tests;
mod text;

use std::{future::Future, sync::Arc, time::Duration};

use http::Extensions;

use self::client::ClientSource;
pub use self::client::PostgresTransaction;
#[cfg(feature = "sqlx")]
use self::sqlx::SqlxSource;
#[cfg(feature = "sqlx")]
pub use self::sqlx::SqlxTransaction;
use self::{
    ends::{Ends, Waking},
    looked::{Looked, Looking, Place},
    open::Open,
    say::{Failure, Say, Statement, Value},
    statements::{Locks, SEVERAL, TransactionStatements, held},
};
use super::{
    Inner, PostgresStore,
    record::{self, Row},
    statements::retention_micros,
};
use crate::{
    error::{StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    record::{Begin, Claim, Lease, RecordId},
    store::hints::Hints,
    transactional::{Boxed, Found, Opened, Slot, Transaction, Transactions, Whose},
};

/// An extractor of axum's, and of an `Option` of it.
#[cfg(feature = "axum")]
macro_rules! extractor {
    ($transaction:ident) => {
        impl<S: Send + Sync> axum::extract::FromRequestParts<S> for $transaction {
            type Rejection = MissingTransaction;

            async fn from_request_parts(
                parts: &mut axum::http::request::Parts,
                _: &S,
            ) -> Result<Self, MissingTransaction> {
                Self::from_extensions(&parts.extensions)
            }
        }

        impl<S: Send + Sync> axum::extract::OptionalFromRequestParts<S> for $transaction {
            type Rejection = MissingTransaction;

            /// `None` only where the request runs in no transaction.
            async fn from_request_parts(
                parts: &mut axum::http::request::Parts,
                _: &S,
            ) -> Result<Option<Self>, MissingTransaction> {
                match Self::from_extensions(&parts.extensions) {
                    Ok(transaction) => Ok(Some(transaction)),
                    Err(MissingTransaction(Missing::None)) => Ok(None),
                    Err(missing) => Err(missing),
                }
            }
        }
    };
}
#[cfg(feature = "axum")]
use extractor;

/// Where connections come from.
pub(super) trait Source: Send + Sync + 'static {
    type Connection: Connection;

    /// Begins, says this, and sets the savepoint: what the rows showed, which are those of the claims. What is said with
    /// values is among the `named`, and what is said `later` may be prepared.
    fn begin(
        &self,
        flight: Vec<Say>,
        named: &[&Arc<Statement>],
        later: &[&Arc<Statement>],
    ) -> impl Future<Output = Result<(Self::Connection, Vec<Looked>), Failure>> + Send;

    /// Takes a lock and looks, in a transaction of its own that ends with that: whether the lock was got, and what was
    /// seen since then.
    fn lock_and_look(&self, lock: Say, look: Say) -> impl Future<Output = Result<(bool, Looked), Failure>> + Send;
}

/// A connection in a transaction. Dropped, it rolls back.
pub(super) trait Connection: Send + Sized + 'static {
    /// One flight; what the rows showed.
    fn look(&mut self, flight: Vec<Say>) -> impl Future<Output = Result<Vec<Looked>, Failure>> + Send;

    /// All of this and then commits, or nothing of it.
    fn commit(self, flight: Vec<Say>) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Asks this, if anything, and rolls back.
    fn roll_back(self, check: Option<Say>) -> impl Future<Output = Result<(), Failure>> + Send;

    fn lend(slot: &Slot<Self>, extensions: &mut Extensions);
}

/// There is no statement of that name in this session.
const NOT_PREPARED: &str = "26000";

/// Of the statements that this session was told of.
const NAMES: &str = "SELECT name FROM pg_prepared_statements";

/// READ COMMITTED whatever the connection has: what a look sees must not be older than the lock before it. READ WRITE,
/// which no replica grants: it would have locks of its own, and may not know yet what was committed.
const BEGIN_TO_LOOK: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE";

impl PostgresStore {
    /// With transactions on connections of its own pool.
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        let source = ClientSource {
            pool: inner.connections.pool().clone(),
            prepared: inner.connections.is_prepared(),
        };
        let transactions = transactions(source, &inner);
        Self { inner, transactions }
    }

    /// Takes transactions ([`Guarantee::Transactional`](crate::Guarantee::Transactional)) from this pool, which has to
    /// lead to the same database, with the same rights on the whole table: for handlers that work with sqlx, by
    /// [`SqlxTransaction`]. All else, such as records of
    /// routes under another guarantee, is still done on connections of the store's own. Default: transactions are the
    /// store's own, too, by [`PostgresTransaction`].
    ///
    /// How long a request waits for a connection is the pool's `acquire_timeout`, within the layer's
    /// [`store_timeout`](crate::IdempotencyLayer::store_timeout). A connection that is slow to open is not given up with
    /// the request that asked for it, and holds its place in the pool for up to `acquire_timeout`, which sqlx sets to 30
    /// seconds: a small multiple of `store_timeout` lets a pool recover sooner.
    #[cfg(feature = "sqlx")]
    #[must_use]
    pub fn with_sqlx(self, pool: ::sqlx::PgPool) -> Self {
        let transactions = transactions(
            SqlxSource {
                pool,
                prepared: self.inner.connections.is_prepared(),
            },
            &self.inner,
        );
        Self { transactions, ..self }
    }

    pub(crate) fn transactions(&self) -> Arc<dyn Transactions> {
        Arc::clone(&self.transactions)
    }
}

/// The transactions of one table, on one pool.
struct TableTransactions<S> {
    source: S,
    /// In a statement.
    table: String,
    statements: Arc<TransactionStatements>,
    lock_timeout: Duration,
    ends: Arc<Ends>,
    hints: Arc<Hints>,
}

/// A claim waits as long as the store does for those who hold none of its locks, such as a migration, and so does a look
/// for a transaction to be over.
fn transactions(source: impl Source, store: &Inner) -> Arc<dyn Transactions> {
    Arc::new(TableTransactions {
        source,
        table: store.table.quoted(),
        statements: Arc::new(TransactionStatements::new(&store.table, &store.statements)),
        lock_timeout: store.connections.timeout(),
        ends: Arc::default(),
        hints: Arc::clone(&store.hints),
    })
}

/// Somebody has the table locked.
const LOCK_NOT_AVAILABLE: &str = "55P03";

/// How often a claim that found nothing, and could not be had either, is made again.
const TRIES: usize = 3;

impl<S: Source> Transactions for TableTransactions<S> {
    fn begin<'a>(
        &'a self,
        id: &'a RecordId,
        claim: &'a Claim,
        others: &'a [RecordId],
    ) -> Boxed<'a, Result<Opened, StoreError>> {
        Box::pin(async move {
            for _ in 0..TRIES {
                if let Some(opened) = self.try_begin(id, claim, others).await? {
                    return Ok(opened);
                }
            }
            // Records that come and go under this claim's hands.
            Err(StoreErrorKind::Unavailable.into())
        })
    }

    fn was_committed<'a>(&'a self, lease: &'a Lease) -> Boxed<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            let locks = Locks::of(&self.table, &lease.id, &Fingerprint::beside(&lease.id));
            let wait = Say::ask(&self.statements.wait, [locks.second.into(), self.lock_timeout()]);
            let look = self.look(&lease.id, locks);
            let (_, looked) = self.source.lock_and_look(wait, look).await.map_err(StoreError::from)?;
            Ok(looked.row.is_some_and(|row| is_completed_by(&row, lease)))
        })
    }

    fn over<'a>(&'a self, id: &'a RecordId) -> Boxed<'a, ()> {
        Box::pin(self.ends.over(*id))
    }
}

fn is_completed_by(row: &Row, lease: &Lease) -> bool {
    row.state == Some(record::COMPLETED) && row.owner.as_deref() == Some(lease.owner.as_bytes())
}

impl<S: Source> TableTransactions<S> {
    fn lock_timeout(&self) -> Value {
        lock_timeout(self.lock_timeout).into()
    }

    /// `None` if it has to be made again.
    async fn try_begin(&self, id: &RecordId, claim: &Claim, others: &[RecordId]) -> Result<Option<Opened>, StoreError> {
        let beside = Fingerprint::beside(id);
        let records: Vec<_> = [(*id, claim.fingerprint)]
            .into_iter()
            .chain(others.iter().map(|other| (*other, beside)))
            .collect();
        let claiming = |statement: &Arc<Statement>, (id, fingerprint): &(RecordId, Fingerprint)| {
            let mut values = named(id, claim, fingerprint);
            values.push(retention_micros(claim.retention).into());
            values.extend(Locks::of(&self.table, id, fingerprint).values());
            Say::ask(statement, values)
        };
        let bound = || Say::ask(&self.statements.bound, [self.lock_timeout()]);
        let claiming_all = || {
            let claims = records
                .iter()
                .flat_map(|record| [bound(), claiming(&self.statements.claim, record)]);
            claims.collect::<Vec<_>>()
        };
        let has_all = (!others.is_empty()).then(|| {
            let ids = records.iter().map(|(id, _)| id.as_bytes().to_vec()).collect();
            let owner = claim.owner.as_bytes().into();
            Say::ask(&self.statements.has_all, [Value::BytesList(ids), owner])
        });
        let named = self.statements.to_begin();
        let mut later = vec![&self.statements.complete, &self.statements.check];
        let begun = match others {
            [] if !self.hints.has(id) => {
                let claim = claiming(&self.statements.claim_new, &(*id, claim.fingerprint));
                let lock = Say::ask(&self.statements.lock_table, []);
                match self.source.begin(vec![lock, claim.clone()], &named, &later).await {
                    Err(failure) if failure.code.as_deref() == Some(LOCK_NOT_AVAILABLE) => {
                        let lock = Say::ask(&self.statements.await_table, []);
                        let unbound = Say::ask(&self.statements.unbound, []);
                        self.source
                            .begin(vec![bound(), lock, unbound, claim], &named, &later)
                            .await
                    }
                    begun => begun,
                }
            }
            // The first of several decides whether the others are claimed at all.
            _ => {
                let mut flight = claiming_all();
                if let Some(has_all) = &has_all {
                    flight.insert(0, Say::Plain(SEVERAL));
                    flight.push(has_all.clone());
                    later.push(&self.statements.complete_others);
                }
                self.source.begin(flight, &named, &later).await
            }
        };
        let (connection, mut looked) = begun?;
        let lease = Lease::new(*id, claim.owner, 1);
        let mut open = Open::new(
            connection,
            lease,
            &self.statements,
            Waking::of(&self.ends, *id),
            &self.hints,
        );
        if looked.is_empty() {
            // Somebody has it or had it.
            match open.look(claiming_all()).await? {
                Some(again) => looked = again,
                None => return open.give_up().await,
            }
        }
        let mut found = Vec::with_capacity(records.len());
        let mut expired = Vec::new();
        for ((id, fingerprint), looked) in records.iter().zip(looked) {
            match looked.found(id, claim)? {
                Some(Looking::Claimed(place)) => {
                    open.has_row(id, place);
                    found.push(Found::Acquired);
                }
                Some(Looking::Found(one)) => {
                    if let Found::Kept(Begin::Completed { .. }) = one {
                        self.hints.add(id);
                    }
                    found.push(one);
                }
                Some(Looking::Expired) => {
                    expired.push((id, fingerprint));
                    found.push(Found::Acquired);
                }
                // Somebody without a lock had it and let it go meanwhile.
                None => return open.give_up().await,
            }
            // Then the others were not asked for.
            if !matches!(found.first(), Some(Found::Acquired)) {
                break;
            }
            open.has_claimed();
        }
        if !expired.is_empty() {
            if !open.claim_expired(claim, expired, has_all).await? {
                return open.give_up().await;
            }
        }
        let unclear = |found: &Found| matches!(found, Found::InFlight(Whose::Unclear));
        let transaction = if found.iter().any(unclear) {
            open.give_up::<()>().await?;
            // It can hardly be said of more than one.
            for ((id, fingerprint), found) in records.iter().zip(&mut found).filter(|(_, found)| unclear(found)) {
                *found = self.who_holds(id, fingerprint, claim).await?;
            }
            None
        } else {
            let acquired = others
                .iter()
                .zip(found.iter().skip(1))
                .filter(|(_, found)| matches!(found, Found::Acquired));
            open.others = acquired.map(|(other, _)| *other).collect();
            Some(Box::new(open) as Box<dyn Transaction>)
        };
        let mut found = found.into_iter();
        let own = found.next().unwrap_or(Found::InFlight(Whose::Unclear));
        Ok(Some(Opened {
            own,
            others: found.collect(),
            transaction,
        }))
    }

    /// Who holds the second lock of a record. While the first one is ours nobody else begins with the same request, and
    /// whoever did before has let go of it, and so is over, in all that is seen from then on.
    async fn who_holds(&self, id: &RecordId, fingerprint: &Fingerprint, claim: &Claim) -> Result<Found, StoreError> {
        let locks = Locks::of(&self.table, id, fingerprint);
        let [class, request, _] = locks.values();
        let lock = Say::ask(&self.statements.try_first, [class, request, self.lock_timeout()]);
        let (got, looked) = self.source.lock_and_look(lock, self.look(id, locks)).await?;
        let whose = match (got, looked.held) {
            (false, _) => Whose::Same,
            (true, held::SECOND) => Whose::Another,
            (true, _) => Whose::Unclear,
        };
        Ok(match looked.found(id, claim)? {
            Some(Looking::Found(found @ Found::Kept(_))) => found,
            _ => Found::InFlight(whose),
        })
    }

    fn look(&self, id: &RecordId, locks: Locks) -> Say {
        let values = [Value::from(id.as_bytes())].into_iter().chain(locks.values());
        Say::ask(&self.statements.look, values)
    }
}

fn named(id: &RecordId, claim: &Claim, fingerprint: &Fingerprint) -> Vec<Value> {
    vec![
        id.as_bytes().into(),
        claim.owner.as_bytes().into(),
        i16::from(fingerprint.algorithm()).into(),
        fingerprint.digest().into(),
    ]
}

/// Nothing would be for ever, and the server counts no further.
fn lock_timeout(time: Duration) -> String {
    let millis = time.as_millis().clamp(1, i32::MAX as u128);
    format!("{millis}ms")
}
