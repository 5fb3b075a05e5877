//! What is said to the server within a transaction that a handler works in.
//!
//! The claim's row is written in that transaction, not only locked: a handler that commits by itself commits the claim,
//! too, and leaves it behind as a record whose outcome is unknown. Nobody renews its lease, so that has ended when it
//! begins.
//!
//! Nothing here waits for another request. Two advisory locks, held to the end of the transaction, say who is at work:
//! the first over record and fingerprint, the second over the record. Whoever does not get the first meets the same
//! request, whoever does not get the second another one. What is committed already is answered without a lock.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::super::{
    PostgresTable,
    statements::{FOREVER, RECORD, Statements, after},
};
use crate::{fingerprint::Fingerprint, record::RecordId};

/// Around what the handler does.
pub(super) const SAVEPOINT: &str = "SAVEPOINT tower_idempotency";
pub(super) const RELEASE: &str = "RELEASE SAVEPOINT tower_idempotency";
pub(super) const UNDO: &str = "ROLLBACK TO SAVEPOINT tower_idempotency";

/// The statements for one table. As elsewhere, the text says the parameters' types.
#[derive(Clone, Debug)]
pub(crate) struct TransactionStatements {
    /// `$1` how long to wait for those who hold none of the locks, in what follows until a look. One row, of no use. Apart
    /// from the claim, which waits for a locked table before it does anything.
    pub(super) bound: Arc<str>,
    /// `$1` id, `$2` owner, `$3` algorithm and `$4` digest of the fingerprint, `$5` retention, `$6` and `$7` the locks.
    /// Claims what is vacant, and answers nothing.
    pub(super) claim: Arc<str>,
    /// `$1` id, `$2` owner, `$3` and `$4` the locks. One row: which lock is [held](held) by somebody else, whether the
    /// record is `claimed` by this transaction, and the *record*, if there is one. Waiting is as it was before the claim.
    pub(super) look: Arc<str>,
    /// `$1` id, `$2` owner, `$3` answer, `$4` checksum, `$5` retention. Fails with a division by zero if this transaction
    /// has not claimed the record, so that nothing of it is committed.
    pub(super) complete: Arc<str>,
    /// `$1` ids, `$2` owner, `$3` answer, `$4` checksums, `$5` retention. The same for several records.
    pub(super) complete_others: Arc<str>,
    /// `$1` id, `$2` owner. Fails as the completion does.
    pub(super) check: Arc<str>,
    /// As for a plain claim.
    pub(super) claim_expired: Arc<str>,
    /// `$1` the second lock, `$2` how long to wait. Waits until the transaction that holds it is over.
    pub(super) wait: Arc<str>,
}

/// Which lock somebody else holds.
pub(super) mod held {
    pub(in super::super) const NONE: i32 = 0;
    /// The first: the same request is at work.
    pub(in super::super) const SAME: i32 = 1;
}

impl TransactionStatements {
    pub(in super::super) fn new(table: &PostgresTable, statements: &Statements) -> Self {
        let record = RECORD;
        let table = table.quoted();
        let held = |first: &str, second: &str| {
            format!(
                "CASE WHEN NOT pg_try_advisory_xact_lock({first}::bigint) THEN 1 \
                 WHEN NOT pg_try_advisory_xact_lock({second}::bigint) THEN 2 ELSE 0 END"
            )
        };
        let (expires_at, completed_until) = (after("$5::bigint"), after("$5::bigint"));
        let ours = "owner = $2::bytea AND xmin = pg_current_xact_id_if_assigned()::xid";
        let completed = format!(
            "state = 'c', answer = $3::bytea, expires_at = {completed_until}, \
             purge_at = CASE WHEN $5::bigint < retention OR $5::bigint < {FOREVER} AND purge_at = 'infinity' \
             THEN {completed_until} ELSE purge_at END"
        );
        // For what follows in this transaction until a look.
        let bounded = |time: &str| {
            format!(
                "set_config('tower_idempotency.lock_timeout', current_setting('lock_timeout'), true), \
                 set_config('lock_timeout', {time}::text, true)"
            )
        };
        let (lock, look_lock) = (held("$6", "$7"), held("$3", "$4"));
        Self {
            bound: format!("SELECT {}", bounded("$1")).into(),
            claim: format!(
                "WITH asked AS MATERIALIZED (SELECT \
                 CASE WHEN EXISTS (SELECT FROM {table} WHERE id = $1::bytea AND expires_at > clock_timestamp()) \
                 THEN -1 ELSE {lock} END AS held) \
                 INSERT INTO {table} (id, owner, fence, state, algorithm, fingerprint, lease_until, expires_at, \
                 purge_at, retention) SELECT $1::bytea, $2::bytea, 1, 'p', $3::smallint, $4::bytea, clock_timestamp(), \
                 {expires_at}, {expires_at}, $5::bigint FROM asked WHERE held = 0 ON CONFLICT DO NOTHING"
            )
            .into(),
            look: format!(
                "SELECT set_config('lock_timeout', current_setting('tower_idempotency.lock_timeout'), true), \
                 CASE WHEN found.fence IS NOT NULL AND NOT found.expired THEN 0 ELSE {look_lock} END AS held, found.* \
                 FROM (SELECT) AS one LEFT JOIN (SELECT coalesce({ours}, false) AS claimed, {record} FROM {table} \
                 WHERE id = $1::bytea) AS found ON true"
            )
            .into(),
            complete: format!(
                "WITH done AS (UPDATE {table} SET {completed}, checksum = $4::integer \
                 WHERE id = $1::bytea AND {ours} RETURNING 1) SELECT 1 / count(*) AS done FROM done"
            )
            .into(),
            complete_others: format!(
                "WITH done AS (UPDATE {table} SET {completed}, checksum = other.checksum \
                 FROM unnest($1::bytea[], $4::integer[]) AS other (other_id, checksum) \
                 WHERE id = other_id AND {ours} RETURNING 1) \
                 SELECT 1 / (count(*) = cardinality($1::bytea[]))::integer AS done FROM done"
            )
            .into(),
            check: format!("SELECT 1 / count(*) AS done FROM {table} WHERE id = $1::bytea AND {ours}").into(),
            claim_expired: statements.claim_expired.as_str().into(),
            wait: format!(
                "SELECT {bounded}, pg_advisory_xact_lock($1::bigint)::text AS over",
                bounded = bounded("$2")
            )
            .into(),
        }
    }
}

/// The locks of one record: over it and the fingerprint, and over it. Advisory locks are the database's, so the table's
/// name is in them.
pub(super) fn locks(table: &str, id: &RecordId, fingerprint: &Fingerprint) -> [i64; 2] {
    let of = |parts: &[&[u8]]| {
        let mut hash = Sha256::new_with_prefix(b"tower-idempotency lock");
        hash.update(id.as_bytes());
        parts.iter().for_each(|part| hash.update(part));
        hash.update(table.as_bytes());
        let hash: [u8; 32] = hash.finalize().into();
        let mut first = [0; 8];
        first.copy_from_slice(&hash[..8]);
        i64::from_be_bytes(first)
    };
    [of(&[&[fingerprint.algorithm()], fingerprint.digest()]), of(&[])]
}
