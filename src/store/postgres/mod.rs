//! Records in a table of a PostgreSQL server.

mod failure;
mod record;
mod statements;
mod table;
mod transaction;
pub use self::table::PostgresTable;
pub use self::transaction::PostgresTransaction;
#[cfg(feature = "sqlx")]
pub use self::transaction::SqlxTransaction;
use crate::transactional::Transactions;
use crate::{Begin, Claim, Lease, RecordId, Retention, Store, StoreError, StoreErrorKind, StoredResponse};
use std::sync::Arc;
#[derive(Clone)]
pub struct PostgresStore {
    transactions: Arc<dyn Transactions>,
    table: PostgresTable,
    statements: statements::Statements,
}
impl PostgresStore {
    pub fn of(pool: deadpool_postgres::Pool) -> Self {
        let table = PostgresTable::default();
        let statements = statements::Statements::new(&table);
        let source = transaction::ClientSource { pool, prepared: true };
        let transactions = transaction::transactions(source, &table, &statements, std::time::Duration::from_secs(1));
        Self {
            transactions,
            table,
            statements,
        }
    }
    #[cfg(feature = "sqlx")]
    pub fn with_sqlx(mut self, pool: sqlx::PgPool) -> Self {
        let source = transaction::SqlxSource { pool };
        self.transactions =
            transaction::transactions(source, &self.table, &self.statements, std::time::Duration::from_secs(1));
        self
    }
    pub(crate) fn transactions(&self) -> Arc<dyn Transactions> {
        Arc::clone(&self.transactions)
    }
}
impl Store for PostgresStore {
    async fn begin(&self, _: &RecordId, _: &Claim) -> Result<Begin, StoreError> {
        Err(StoreErrorKind::Other.into())
    }
    async fn complete(&self, _: &Lease, _: &StoredResponse, _: Retention) -> Result<(), StoreError> {
        Err(StoreErrorKind::Other.into())
    }
    async fn renew(&self, _: &Lease, _: std::time::Duration) -> Result<(), StoreError> {
        Err(StoreErrorKind::Other.into())
    }
    async fn release(&self, _: &Lease) -> Result<(), StoreError> {
        Err(StoreErrorKind::Other.into())
    }
    async fn abandon(&self, _: &Lease) -> Result<(), StoreError> {
        Err(StoreErrorKind::Other.into())
    }
    async fn changed(&self, _: &RecordId) {
        std::future::pending().await
    }
}
