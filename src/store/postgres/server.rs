//! Whether a server keeps what it was given, and whether the table is there: asked once, before the first record.

use tokio_postgres::types::Type;

use super::{PostgresTable, connection::Connections};
use crate::error::{StoreError, StoreErrorKind};

/// 13.0, as the server says it.
const OLDEST: i32 = 130_000;

const FACTS: &str = "SELECT current_setting('server_version_num')::int AS version, \
     pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on' AS read_only, \
     current_setting('synchronous_commit') AS synchronous_commit, current_setting('fsync') AS fsync, \
     current_setting('full_page_writes') AS full_page_writes";

/// What a server says about itself, as far as records depend on it.
struct Facts {
    synchronous_commit: String,
    fsync: String,
    full_page_writes: String,
}

/// Refuses what cannot work, and warns of a server that may forget records, or refuses it, too.
pub(super) async fn check(
    connections: &Connections,
    table: &PostgresTable,
    look: &str,
    refuse_forgetful: bool,
) -> Result<(), StoreError> {
    let deadline = connections.deadline();
    let rows = connections.query(FACTS, &[], deadline).await?;
    let row = rows.first().ok_or(StoreErrorKind::Unavailable)?;
    if is_too_old(row.get("version")) {
        return Err(refused("the server is older than PostgreSQL 13"));
    }
    // A claim there would fail, and what it holds may be old.
    if row.get("read_only") {
        return Err(refused("the server is a replica or read-only: connect to the primary"));
    }
    let facts = Facts {
        synchronous_commit: row.get("synchronous_commit"),
        fsync: row.get("fsync"),
        full_page_writes: row.get("full_page_writes"),
    };
    beware(&facts.dangers(), refuse_forgetful)?;
    let rows = connections.query(&table.version_query(), &[], deadline).await?;
    let row = rows.first().ok_or(StoreErrorKind::Unavailable)?;
    if !row.get::<_, bool>("exists") {
        return Err(table.missing());
    }
    table.check_version(row.get("comment"))?;
    if !row.get::<_, bool>("usable") {
        return Err(refused(&format!(
            "the role needs SELECT, INSERT, UPDATE and DELETE on the table {table}"
        )));
    }
    // As while a dump is restored, which makes the keys last: each duplicate would be granted its claim.
    if !row.get::<_, bool>("is_unique") {
        return Err(refused(&format!(
            "the column id of the table {table} has no valid unique index: was its primary key restored?"
        )));
    }
    if !row.get::<_, bool>("is_logged") {
        let danger = format!("a crash of the PostgreSQL server empties the table {table}, which is not logged");
        beware(&[danger], refuse_forgetful)?;
    }
    // Its columns are those that are asked for.
    let nobody: &[u8] = &[];
    let values = [(&nobody as _, Type::BYTEA)];
    connections.query(look, &values, deadline).await.map(drop)
}

fn beware(dangers: &[String], refuse: bool) -> Result<(), StoreError> {
    for danger in dangers {
        tracing::warn!("{danger}");
    }
    match dangers.first() {
        Some(danger) if refuse => Err(refused(danger)),
        _ => Ok(()),
    }
}

fn is_too_old(version: i32) -> bool {
    version < OLDEST
}

fn refused(reason: &str) -> StoreError {
    StoreError::with_source(StoreErrorKind::Other, reason)
}

impl Facts {
    fn dangers(&self) -> Vec<String> {
        let mut dangers = Vec::new();
        if self.synchronous_commit == "off" {
            dangers.push(
                "the PostgreSQL server answers before its log is on disk (synchronous_commit is off): a crash forgets \
                 the records of the last moments, and their operations run again"
                    .to_owned(),
            );
        }
        for (name, value) in [("fsync", &self.fsync), ("full_page_writes", &self.full_page_writes)] {
            if value == "off" {
                dangers.push(format!(
                    "the PostgreSQL server does not survive a loss of power ({name} is off): records may be lost or \
                     damaged, and their operations run again"
                ));
            }
        }
        dangers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_server_is_the_first_of_its_version() {
        assert_eq!(
            [120_022, 129_999, 130_000, 170_002].map(is_too_old),
            [true, true, false, false]
        );
    }

    #[test]
    fn a_server_that_answers_before_it_wrote_is_dangerous() {
        let dangers = |synchronous_commit: &str, fsync: &str, full_page_writes: &str| {
            let facts = Facts {
                synchronous_commit: synchronous_commit.to_owned(),
                fsync: fsync.to_owned(),
                full_page_writes: full_page_writes.to_owned(),
            };
            facts.dangers().len()
        };
        assert_eq!(dangers("on", "on", "on"), 0);
        assert_eq!(dangers("remote_apply", "on", "on"), 0);
        assert_eq!(dangers("local", "on", "on"), 0);
        assert_eq!(dangers("off", "on", "on"), 1);
        assert_eq!(dangers("off", "off", "off"), 3);
    }
}
