//! What is said to the server, for a table. Each statement is one atomic step, in whatever transaction it runs.
//!
//! Time is the server's `clock_timestamp()`, since `now()` stands still within a transaction. Durations are numbers of
//! microseconds, [`micros`]. Owners and ids are bytes, so that no collation compares them.
//!
//! A record whose `expires_at` has passed is vacant, whether or not it was removed. One in progress (`p`) whose lease is
//! over is abandoned, as is one that was abandoned explicitly (`a`), which nothing revives but a completion.

use std::time::Duration;

use super::PostgresTable;
use crate::record::Retention;

/// 285 years, beyond which sums are not exact; for the server that is for ever.
pub(super) const FOREVER: i64 = 1 << 53;

/// Whole microseconds, which end no earlier than `duration`.
pub(crate) fn micros(duration: Duration) -> i64 {
    let micros = duration.as_nanos().div_ceil(1000);
    i64::try_from(micros).unwrap_or(FOREVER).min(FOREVER)
}

pub(crate) fn retention_micros(retention: Retention) -> i64 {
    match retention {
        Retention::For(duration) => micros(duration),
        Retention::Forever => FOREVER,
    }
}

/// The statements for one table. Parameters are typed by the text, so any client can send them.
///
/// Those that answer a *record* answer no row or one.
#[derive(Clone, Debug)]
pub(crate) struct Statements {
    /// `$1` id, `$2` owner, `$3` algorithm and `$4` digest of the fingerprint, `$5` lease, `$6` retention. Acquires the
    /// record as its first attempt if there is none, expired or not; else it writes nothing.
    pub(crate) claim: String,
    /// `$1` id. Of a completed record, read only: what [`completed`](super::record::completed) reads. Few columns: each costs
    /// the server as much as a fortieth of the rest.
    pub(crate) replay: String,
    /// `$1` id. The *record*, read only, as [`Row::seen`](super::record::Row::seen) reads it.
    pub(crate) look: String,
    /// `$1` to `$6` as for a claim. Acquires a record that has expired; the new `fence`, or no row.
    pub(crate) claim_expired: String,
    /// `$1` to `$6` as for a claim, `$7` owner and `$8` fence of the lease that was lost. The new `fence`, or no row.
    pub(crate) take_over: String,
    /// `$1` id, `$2` owner, `$3` answer, `$4` checksum, `$5` retention. No indexed column changes unless the retention
    /// is shorter than the claim's, so that neither index is touched (a HOT update).
    pub(crate) complete: String,
    /// `$1` id, `$2` owner, `$3` lease. The `fence`, or no row.
    pub(crate) renew: String,
    /// `$1` id, `$2` owner.
    pub(crate) release: String,
    /// `$1` id, `$2` owner.
    pub(crate) abandon: String,
    /// `$1` ids. The `id` of each record that is there, and whether it is in progress still.
    pub(crate) there: String,
    /// `$1` how many at most. Removes records that have expired, and leaves alone what others work on.
    pub(crate) purge: String,
    /// `$1` how many at most. Those that were to be looked at by now, but have not expired, are put off.
    pub(crate) put_off: String,
}

/// The time so many microseconds from now.
pub(super) fn after(micros: &str) -> String {
    format!(
        "CASE WHEN {micros} < {FOREVER} THEN clock_timestamp() + {micros} * interval '1 microsecond' ELSE 'infinity' END"
    )
}

/// The columns of a *record* with its times as they are, and the server's. Sums are the client's: the server would reckon
/// with decimal numbers and calendars.
const SEEN: &str = "owner, fence, state, algorithm, fingerprint, answer, checksum, lease_until, expires_at, \
     clock_timestamp()";

/// The columns of a *record*, by name and for any client. Of what never ends a thousand years are left.
pub(super) const RECORD: &str = "owner, fence, state, algorithm, fingerprint, answer, checksum, \
     expires_at <= clock_timestamp() AS expired, \
     (extract(epoch FROM least(CASE state WHEN 'p' THEN lease_until ELSE expires_at END, \
     clock_timestamp() + interval '1000 years') - clock_timestamp()) * 1000000)::bigint AS time_left";

impl Statements {
    pub(crate) fn new(table: &PostgresTable) -> Self {
        let table = table.quoted();
        let (lease_until, expires_at) = (after("$5::bigint"), after("($5::bigint + $6::bigint)"));
        let claimed = format!(
            "owner = $2::bytea, state = 'p', algorithm = $3::smallint, fingerprint = $4::bytea, \
             lease_until = {lease_until}, expires_at = {expires_at}, purge_at = {expires_at}, retention = $6::bigint, \
             answer = NULL, checksum = NULL"
        );
        let completed_until = after("$5::bigint");
        let (renewed_until, renewed_expiry) = (after("$3::bigint"), after("(retention + $3::bigint)"));
        let abandoned_expiry = after("retention");
        let own = "id = $1::bytea AND owner = $2::bytea AND expires_at > clock_timestamp()";
        // The condition twice: in a table of several parts each of them has a row at the same place.
        let due = |condition: &str| {
            format!(
                "ctid = ANY (ARRAY(SELECT ctid FROM {table} WHERE purge_at <= (SELECT clock_timestamp()) \
                 AND {condition} ORDER BY purge_at LIMIT $1::bigint FOR UPDATE SKIP LOCKED)) AND {condition}"
            )
        };
        Self {
            claim: format!(
                "INSERT INTO {table} (id, owner, fence, state, algorithm, fingerprint, lease_until, expires_at, \
                 purge_at, retention) VALUES ($1::bytea, $2::bytea, 1, 'p', $3::smallint, $4::bytea, {lease_until}, \
                 {expires_at}, {expires_at}, $6::bigint) ON CONFLICT DO NOTHING"
            ),
            replay: format!(
                "SELECT algorithm, fingerprint, answer, checksum FROM {table} \
                 WHERE id = $1::bytea AND state = 'c' AND expires_at > clock_timestamp()"
            ),
            look: format!("SELECT {SEEN} FROM {table} WHERE id = $1::bytea"),
            claim_expired: format!(
                "UPDATE {table} SET {claimed}, fence = 1 WHERE id = $1::bytea AND expires_at <= clock_timestamp() \
                 RETURNING fence"
            ),
            take_over: format!(
                "UPDATE {table} SET {claimed}, fence = fence + 1 WHERE id = $1::bytea AND owner = $7::bytea \
                 AND fence = $8::bigint AND (state = 'a' OR state = 'p' AND lease_until <= clock_timestamp()) \
                 AND expires_at > clock_timestamp() RETURNING fence"
            ),
            complete: format!(
                "UPDATE {table} SET state = 'c', answer = $3::bytea, checksum = $4::integer, \
                 expires_at = {completed_until}, purge_at = CASE WHEN $5::bigint < retention \
                 OR $5::bigint < {FOREVER} AND purge_at = 'infinity' THEN {completed_until} ELSE purge_at END \
                 WHERE {own} AND state IN ('p', 'a')"
            ),
            renew: format!(
                "UPDATE {table} SET lease_until = {renewed_until}, expires_at = {renewed_expiry} \
                 WHERE {own} AND state = 'p' RETURNING fence"
            ),
            release: format!("DELETE FROM {table} WHERE {own} AND state IN ('p', 'a')"),
            abandon: format!(
                "UPDATE {table} SET state = 'a', lease_until = clock_timestamp(), expires_at = {abandoned_expiry} \
                 WHERE {own} AND state = 'p'"
            ),
            there: format!(
                "SELECT id, state = 'p' AND lease_until > clock_timestamp() FROM {table} \
                 WHERE id = ANY ($1::bytea[]) AND expires_at > clock_timestamp()"
            ),
            purge: format!("DELETE FROM {table} WHERE {}", due("expires_at <= clock_timestamp()")),
            put_off: format!(
                "UPDATE {table} SET purge_at = expires_at WHERE {}",
                due("expires_at > clock_timestamp()")
            ),
        }
    }
}
