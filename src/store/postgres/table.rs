//! The table that holds the records: its name, its schema, and the schema's version.

use std::fmt;

use deadpool_postgres::Pool;
use tokio_postgres::IsolationLevel;

use super::{failure, statements::FOREVER};
use crate::error::{StoreError, StoreErrorKind};

/// Of the columns below. It stands in the table's comment, and so goes wherever the table goes.
const VERSION: u32 = 1;
const COMMENT: &str = "tower-idempotency records, version ";

/// The server cuts longer names off, and two of them might become the same.
const LONGEST_NAME: usize = 63;

/// Who creates the table holds this advisory lock meanwhile, so that nodes that start together do not collide.
const CREATION: i64 = 0x1de3_9073_0c7a_b1e5;

/// The table that holds the records of a [`PostgresStore`](super::PostgresStore). Any name will do, in any schema; each
/// is quoted. The default is `idempotency_records` in the schema `public`.
///
/// It has no triggers, rules or row security that would change or hide what the store writes, and its `id` is unique.
///
/// Create it once, by [`create`](Self::create), or by your own migrations with what [`sql`](Self::sql) says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresTable {
    schema: String,
    name: String,
}

impl Default for PostgresTable {
    fn default() -> Self {
        Self::new("public", "idempotency_records")
    }
}

impl PostgresTable {
    /// The table of this name in this schema. Upper and lower case differ.
    ///
    /// # Panics
    /// If a name is empty, longer than 63 bytes, or contains a NUL: no table can be called so.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        let (schema, name) = (schema.into(), name.into());
        for part in [&schema, &name] {
            assert!(!part.is_empty(), "a name is not empty");
            assert!(
                part.len() <= LONGEST_NAME,
                "{part:?} is longer than {LONGEST_NAME} bytes"
            );
            assert!(!part.contains('\0'), "a name has no NUL in it");
        }
        Self { schema, name }
    }

    /// Creates the table where it is missing, and its schema with it, in one transaction. Where it is already there
    /// nothing is done. The role needs the right to create; the store itself only reads and writes rows.
    ///
    /// # Errors
    /// [`Other`](StoreErrorKind::Other) if another table has the name, or a version of this one that is not known here,
    /// or the server refuses; [`Unavailable`](StoreErrorKind::Unavailable) if it cannot be reached.
    pub async fn create(&self, pool: &Pool) -> Result<(), StoreError> {
        let mut client = pool.get().await.map_err(failure::of_pool)?;
        // Dropped before its commit, the transaction is rolled back.
        // What is seen behind the lock is newer than it, whatever the connections have.
        let begin = client
            .build_transaction()
            .isolation_level(IsolationLevel::ReadCommitted);
        let transaction = begin.start().await.map_err(failure::classify)?;
        let lock = format!("SELECT pg_advisory_xact_lock({CREATION})");
        transaction.batch_execute(&lock).await.map_err(failure::classify)?;
        let found = transaction.query_typed_one(&self.version_query(), &[]).await;
        let found = found.map_err(failure::classify)?;
        if found.get::<_, bool>("exists") {
            return self.check_version(found.get("comment"));
        }
        let sql = match found.get("schema_exists") {
            // Even where it exists, its creation wants a right that the role may not have.
            true => self.table_sql(),
            false => self.sql(),
        };
        transaction.batch_execute(&sql).await.map_err(failure::classify)?;
        transaction.commit().await.map_err(failure::classify)
    }

    /// What creates the table, as SQL to be run once, by a migration of your own. Ends without a transaction of its own.
    pub fn sql(&self) -> String {
        format!(
            "CREATE SCHEMA IF NOT EXISTS {};\n{}",
            quoted(&self.schema),
            self.table_sql()
        )
    }

    fn table_sql(&self) -> String {
        format!(
            "\
CREATE TABLE {table} (
    fence bigint NOT NULL,              -- 1 for the first attempt, one more with every takeover
    lease_until timestamptz NOT NULL,   -- of a record in progress
    expires_at timestamptz NOT NULL,    -- from then on it counts as if it were not there
    purge_at timestamptz NOT NULL,      -- when to look whether it has expired
    retention bigint NOT NULL,          -- microseconds after a lease that was lost; {forever} for ever
    checksum integer,                   -- CRC-32 of id and answer
    algorithm smallint NOT NULL,        -- of the fingerprint
    state \"char\" NOT NULL,              -- p in progress, a abandoned, c completed
    id bytea PRIMARY KEY,
    owner bytea NOT NULL,
    fingerprint bytea NOT NULL,
    answer bytea                        -- of a completed record
) WITH (fillfactor = 70, vacuum_truncate = off);
ALTER TABLE {table} ALTER COLUMN answer SET STORAGE EXTERNAL;
CREATE INDEX ON {table} (purge_at);
-- Room that stays, as it is not truncated: a table of a few pages is read from end to end, which sessions would go on
-- doing after it has grown, until the server has looked at it again.
INSERT INTO {table} (fence, lease_until, expires_at, purge_at, retention, algorithm, state, id, owner, fingerprint)
    SELECT 0, now(), now(), now(), 0, 0, 'p', pg_catalog.sha256(number::text::bytea), ''::bytea,
        pg_catalog.sha256(''::bytea)
    FROM generate_series(1, 1000) AS number;
DELETE FROM {table} WHERE fence = 0;
COMMENT ON TABLE {table} IS '{COMMENT}{VERSION}';
",
            table = self.quoted(),
            forever = FOREVER,
        )
    }

    /// Schema and table as they stand in a statement.
    pub(crate) fn quoted(&self) -> String {
        format!("{}.{}", quoted(&self.schema), quoted(&self.name))
    }

    /// Asks for `exists`, `comment` and `usable`, for `is_unique` and `is_logged`, and for `schema_exists`.
    pub(super) fn version_query(&self) -> String {
        format!(
            "SELECT to_regclass({table}) IS NOT NULL AS exists, \
             obj_description(to_regclass({table})::oid, 'pg_class') AS comment, \
             coalesce(has_table_privilege(to_regclass({table})::oid, 'SELECT') \
             AND has_table_privilege(to_regclass({table})::oid, 'INSERT') \
             AND has_table_privilege(to_regclass({table})::oid, 'UPDATE') \
             AND has_table_privilege(to_regclass({table})::oid, 'DELETE'), false) AS usable, \
             EXISTS (SELECT FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0] \
             WHERE indrelid = to_regclass({table}) AND attname = 'id' AND indnkeyatts = 1 AND indpred IS NULL \
             AND indisunique AND indisvalid AND indimmediate) AS is_unique, \
             (SELECT bool_and(relpersistence = 'p') FROM pg_class WHERE oid = to_regclass({table}) \
             OR oid IN (SELECT relid FROM pg_partition_tree(to_regclass({table})))) AS is_logged, \
             to_regnamespace({schema}) IS NOT NULL AS schema_exists",
            table = literal(&self.quoted()),
            schema = literal(&quoted(&self.schema)),
        )
    }

    /// Whether a table with this comment is one that this code knows.
    pub(super) fn check_version(&self, comment: Option<&str>) -> Result<(), StoreError> {
        let version = comment.and_then(|comment| comment.strip_prefix(COMMENT)?.parse::<u32>().ok());
        let wrong = match version {
            Some(VERSION) => return Ok(()),
            Some(newer) if newer > VERSION => {
                format!("the table {self} is of version {newer}, and this software knows {VERSION}: update it")
            }
            Some(older) => format!("the table {self} is of version {older}, and {VERSION} is needed: migrate it"),
            None => format!(
                "the table {self} has no comment \"{COMMENT}{VERSION}\": it is another table, or the comment was lost"
            ),
        };
        Err(StoreError::with_source(StoreErrorKind::Other, wrong))
    }

    pub(super) fn missing(&self) -> StoreError {
        let missing = format!("there is no table {self}: create it, by `PostgresTable::create` or a migration");
        StoreError::with_source(StoreErrorKind::Other, missing)
    }
}

impl fmt::Display for PostgresTable {
    /// Quoted, as in a statement.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.quoted())
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Backslashes mean themselves, whatever `standard_conforming_strings` says.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_written_as_in_a_statement() {
        let table = PostgresTable::new("a \"quoted\" one", "Keys");
        assert_eq!(table.to_string(), r#""a ""quoted"" one"."Keys""#);
    }
}
