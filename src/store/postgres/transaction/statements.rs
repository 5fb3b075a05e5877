//! What is said to the server within a transaction that a handler works in.
//!
//! The claim's row is written in that transaction, not only locked: a handler that commits by itself commits the claim,
//! too, and leaves it behind as a record whose outcome is unknown. Nobody renews its lease, so that has ended when it
//! begins.
//!
//! Nothing here waits for another request. Two advisory [locks](Locks), held to the end of the transaction, say who is at
//! work: the first over record and fingerprint, the second over the record. Whoever does not get the first meets the same
//! request. Whoever gets the first and not the second meets another one, or the same one while it lets go of its locks,
//! which it does one after the other; the server's list of locks tells. What is committed already is answered without a
//! lock.
//!
//! A request with several keys may get some of them and not the rest; then it does not run, and lets go. So it has a lock
//! that says so from before its first claim on, and another one once it has all: to whoever meets its keys in between it
//! is nobody yet.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::{
    super::{
        PostgresTable,
        statements::{FOREVER, RECORD, Statements, after},
    },
    say::{Statement, Value},
};
use crate::{fingerprint::Fingerprint, record::RecordId};

/// Around what the handler does.
pub(super) const SAVEPOINT: &str = "SAVEPOINT tower_idempotency";
pub(super) const RELEASE: &str = "RELEASE SAVEPOINT tower_idempotency";
pub(super) const UNDO: &str = "ROLLBACK TO SAVEPOINT tower_idempotency";

/// Of the locks of those with several keys, which all of them share. Letters of a name: no lock over a record is likely to
/// be the same.
const SEVERAL_KEYS: i32 = i32::from_be_bytes(*b"keys");
/// This transaction will claim several. No row.
pub(super) const SEVERAL: &str = "SELECT 1 WHERE pg_try_advisory_xact_lock_shared(1801812339, 0) IS NULL";

/// The statements for one table. As elsewhere, the text says the parameters' types.
#[derive(Clone, Debug)]
pub(crate) struct TransactionStatements {
    /// The claim's own lock of the table, which fails where it would wait, as for a migration. No row. To
    /// [bound](Self::bound) each claim would cost more: the server goes through all of its settings for one that is set
    /// for a transaction.
    pub(super) lock_table: Arc<Statement>,
    /// The same, and it waits.
    pub(super) await_table: Arc<Statement>,
    /// `$1` how long to wait for those who hold none of the locks, until that is undone. No row.
    pub(super) bound: Arc<Statement>,
    /// Undoes it. No row.
    pub(super) unbound: Arc<Statement>,
    /// As [`claim`](Self::claim), of a record that was never there and that nobody is at work on, which is by far the most
    /// frequent: one row, its [place](PLACE), if it is claimed now, else none, and then nothing is known. Costs two thirds.
    /// It looks first: who only looks holds no lock that others would take for work, and an insert would wait for whoever
    /// changes the row. In a `CASE`, which has an order. Behind a lock of the table: then it waits only for a claim of
    /// another guarantee while that is committed, and for whoever has locked an index alone. Times are the statement's: of
    /// a time that is another each time the server would make a subquery, which costs more than the rest of the row.
    pub(super) claim_new: Arc<Statement>,
    /// `$1` id, `$2` owner, `$3` algorithm and `$4` digest of the fingerprint, `$5` retention, `$6` to `$8` the locks.
    /// Claims what is vacant. One row: which lock is [held](held) by somebody else, the [place](PLACE) of the record if it
    /// is claimed now, and the *record* that was there before, if there was one. None of all that: somebody had it who let it go, or
    /// who committed since the statement began. Waiting is as it was before the bound.
    ///
    /// If the first claim of a transaction is not to be had, the following ones do [nothing](held::NOT_ASKED): a request
    /// that will not run must not be met by others under keys that it would have claimed beside its own.
    pub(super) claim: Arc<Statement>,
    /// `$1` and `$2` the first lock, `$3` how long to wait for those who hold none. Whether it was `got`.
    pub(super) try_first: Arc<Statement>,
    /// `$1` id, `$2` to `$4` the locks. One row: as of a claim, but nothing is claimed, and the second lock is `held` if
    /// whoever holds it has a first lock of the same record for another fingerprint, and all that it wants to claim.
    pub(super) look: Arc<Statement>,
    /// `$1` id, `$2` owner, `$3` answer, `$4` checksum, `$5` retention, `$6` the [place](PLACE). No row. Fails with a division
    /// by zero if this transaction has not claimed the record, so that nothing of it is committed. To look twice where the
    /// row is costs less than to search the index for it once and to count what was changed.
    pub(super) complete: Arc<Statement>,
    /// `$1` ids, `$2` owner, `$3` answer, `$4` checksums, `$5` retention. The same for several records.
    pub(super) complete_others: Arc<Statement>,
    /// `$1` id, `$2` owner. Fails as the completion does.
    pub(super) check: Arc<Statement>,
    /// `$1` ids, `$2` owner. Lets others see that this transaction has claimed all of them, if it has. No row.
    pub(super) has_all: Arc<Statement>,
    /// As for a plain claim, and where the record is: its [place](PLACE).
    pub(super) claim_expired: Arc<Statement>,
    /// `$1` the second lock, `$2` how long to wait. Waits until the transaction that holds it is over, and has `got` it.
    pub(super) wait: Arc<Statement>,
}

/// What became of the first claim of a transaction: a setting of that transaction.
const FIRST_CLAIM: &str = "tower_idempotency.first_claim";

/// Where the row is that was written: nobody else changes or moves it before this transaction is over.
const PLACE: &str = "ctid::text AS place";

/// Which lock somebody else holds.
pub(super) mod held {
    pub(in super::super) const NONE: i32 = 0;
    /// The first: the same request is at work.
    pub(in super::super) const FIRST: i32 = 1;
    pub(in super::super) const SECOND: i32 = 2;
    pub(in super::super) const NOT_ASKED: i32 = 3;
}

impl TransactionStatements {
    pub(in super::super) fn new(table: &PostgresTable, statements: &Statements) -> Self {
        let (record, not_asked) = (RECORD, held::NOT_ASKED);
        let table = table.quoted();
        let completed_until = after("$5::bigint");
        let expires_at = completed_until.replace("clock_timestamp", "statement_timestamp");
        let ours = "owner = $2::bytea AND xmin = pg_current_xact_id_if_assigned()::xid";
        let completed = format!(
            "state = 'c', answer = $3::bytea, expires_at = {completed_until}, \
             purge_at = CASE WHEN $5::bigint < retention OR $5::bigint < {FOREVER} AND purge_at = 'infinity' \
             THEN {completed_until} ELSE purge_at END"
        );
        // For what follows in this transaction until a look. What is to be restored is what was there before the first.
        let bounded = |time: &str| {
            format!(
                "set_config('tower_idempotency.lock_timeout', coalesce(nullif(\
                 current_setting('tower_idempotency.lock_timeout', true), ''), current_setting('lock_timeout')), true), \
                 set_config('lock_timeout', {time}::text, true)"
            )
        };
        let unbound = "set_config('lock_timeout', current_setting('tower_idempotency.lock_timeout'), true)";
        let lock_table = format!("LOCK TABLE {table} IN ROW EXCLUSIVE MODE");
        let insert = format!(
            "INSERT INTO {table} (id, owner, fence, state, algorithm, fingerprint, lease_until, expires_at, purge_at, \
             retention) SELECT $1::bytea, $2::bytea, 1, 'p', $3::smallint, $4::bytea, statement_timestamp(), {expires_at}, \
             {expires_at}, $5::bigint"
        );
        Self {
            lock_table: Statement::of(format!("{lock_table} NOWAIT")),
            await_table: Statement::of(lock_table),
            bound: Statement::of(format!("SELECT 1 WHERE concat({}) IS NULL", bounded("$1"))),
            unbound: Statement::of(format!("SELECT 1 WHERE {unbound} IS NULL")),
            claim_new: Statement::of(format!(
                "{insert} WHERE CASE WHEN EXISTS (SELECT FROM {table} WHERE id = $1::bytea) THEN false \
                 WHEN pg_try_advisory_xact_lock($6::integer, $7::integer) THEN pg_try_advisory_xact_lock($8::bigint) \
                 ELSE false END ON CONFLICT DO NOTHING RETURNING {PLACE}"
            )),
            claim: Statement::of(format!(
                "WITH seen AS MATERIALIZED (SELECT {record}, expires_at > clock_timestamp() AS is_kept FROM {table} \
                 WHERE id = $1::bytea), \
                 asked AS MATERIALIZED (SELECT CASE WHEN current_setting('{FIRST_CLAIM}', true) = 'refused' THEN {not_asked} \
                 WHEN EXISTS (SELECT FROM seen WHERE is_kept) THEN 0 \
                 WHEN NOT pg_try_advisory_xact_lock($6::integer, $7::integer) THEN 1 \
                 WHEN NOT pg_try_advisory_xact_lock($8::bigint) THEN 2 ELSE 0 END AS held), \
                 made AS ({insert} FROM asked WHERE held = 0 AND NOT EXISTS (SELECT FROM seen) \
                 ON CONFLICT DO NOTHING RETURNING {PLACE}) \
                 SELECT {unbound}, set_config('{FIRST_CLAIM}', coalesce(nullif(current_setting('{FIRST_CLAIM}', true), ''), \
                 CASE WHEN held = 0 AND is_kept IS NOT TRUE THEN 'had' ELSE 'refused' END), true), \
                 held, place, seen.* \
                 FROM asked LEFT JOIN made ON true LEFT JOIN seen ON true"
            )),
            try_first: Statement::of(format!(
                "SELECT {bounded}, pg_try_advisory_xact_lock($1::integer, $2::integer) AS got",
                bounded = bounded("$3")
            )),
            // One look at the list: it is locked as a whole for that, and a second look would be at another moment.
            look: Statement::of(format!(
                "WITH locks AS MATERIALIZED (SELECT virtualtransaction, classid, objid, objsubid FROM pg_locks \
                 WHERE locktype = 'advisory' AND granted \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) \
                 SELECT CASE WHEN EXISTS (SELECT FROM locks AS second JOIN locks AS first USING (virtualtransaction) \
                 WHERE second.objsubid = 1 AND second.classid::bigint << 32 | second.objid::bigint = $4::bigint \
                 AND first.objsubid = 2 AND first.classid = $2::integer::oid AND first.objid <> $3::integer::oid \
                 AND first.objid::bigint >> {REQUEST_BITS} = $3::integer::oid::bigint >> {REQUEST_BITS} \
                 AND (SELECT coalesce(max(keys.objid::bigint), 1) FROM locks AS keys \
                 WHERE keys.virtualtransaction = second.virtualtransaction \
                 AND keys.objsubid = 2 AND keys.classid = {SEVERAL_KEYS}::integer::oid) = 1) \
                 THEN 2 ELSE 0 END AS held, NULL AS place, found.* \
                 FROM (SELECT) AS one LEFT JOIN (SELECT {record} FROM {table} WHERE id = $1::bytea) AS found ON true"
            )),
            complete: Statement::of(format!(
                "UPDATE {table} SET {completed}, checksum = $4::integer \
                 WHERE ctid = $6::text::tid AND id = $1::bytea AND 1 / (EXISTS \
                 (SELECT FROM {table} WHERE ctid = $6::text::tid AND id = $1::bytea AND {ours}))::integer = 1"
            )),
            complete_others: Statement::of(format!(
                "WITH done AS (UPDATE {table} SET {completed}, checksum = other.checksum \
                 FROM unnest($1::bytea[], $4::integer[]) AS other (other_id, checksum) \
                 WHERE id = other_id AND {ours} RETURNING 1) \
                 SELECT 1 / (count(*) = cardinality($1::bytea[]))::integer AS done FROM done"
            )),
            check: Statement::of(format!(
                "SELECT 1 / count(*) AS done FROM {table} WHERE id = $1::bytea AND {ours}"
            )),
            has_all: Statement::of(format!(
                "SELECT 1 WHERE CASE WHEN (SELECT count(*) FROM {table} WHERE id = ANY ($1::bytea[]) AND {ours}) \
                 = cardinality($1::bytea[]) THEN pg_try_advisory_xact_lock_shared({SEVERAL_KEYS}, 1) ELSE false END IS NULL"
            )),
            claim_expired: Statement::of(format!("{}, {PLACE}", statements.claim_expired)),
            wait: Statement::of(format!(
                "SELECT {bounded}, pg_advisory_xact_lock($1::bigint)::text, true AS got",
                bounded = bounded("$2")
            )),
        }
    }
}

impl TransactionStatements {
    /// Those with values by which transactions begin.
    pub(super) fn to_begin(&self) -> [&Arc<Statement>; 4] {
        [&self.bound, &self.claim_new, &self.claim, &self.has_all]
    }
}

/// Of the hash in the second half of a first lock.
const REQUEST_BITS: u32 = 24;

/// The locks of one record. Advisory locks are the database's, so the table's name is in them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Locks {
    /// Over the record and the fingerprint, as the server shows it: a hash of the record; and the fingerprint's algorithm,
    /// before a hash of both. Two requests that share it are each other's duplicates while they run, and told apart by
    /// the record. Two of different algorithms cannot be told apart while they run.
    pub(super) first: (i32, i32),
    /// Over the record.
    pub(super) second: i64,
}

impl Locks {
    pub(super) fn of(table: &str, id: &RecordId, fingerprint: &Fingerprint) -> Self {
        let hash = |parts: &[&[u8]]| -> u64 {
            let mut hash = Sha256::new_with_prefix(b"tower-idempotency lock");
            hash.update(id.as_bytes());
            parts.iter().for_each(|part| hash.update(part));
            hash.update(table.as_bytes());
            let hash: [u8; 32] = hash.finalize().into();
            let mut first = [0; 8];
            first.copy_from_slice(&hash[..8]);
            u64::from_be_bytes(first)
        };
        let (record, request) = (hash(&[]), hash(&[&[fingerprint.algorithm()], fingerprint.digest()]));
        let algorithm = u64::from(fingerprint.algorithm()) << REQUEST_BITS;
        let request = low(algorithm | request & ((1 << REQUEST_BITS) - 1));
        Self {
            first: (low(record), request),
            second: record.cast_signed(),
        }
    }

    /// In the order of the statements' parameters.
    pub(super) fn values(self) -> [Value; 3] {
        [self.first.0.into(), self.first.1.into(), self.second.into()]
    }
}

fn low(hash: u64) -> i32 {
    (hash as u32).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As first released. Nodes of every version meet at these: they never change.
    #[test]
    fn the_locks_of_a_record_are_what_they_were_first() {
        let (id, request) = (RecordId::from_bytes([0x5a; 32]), Fingerprint::new(3, [7; 32]));
        let locks = Locks::of("\"public\".\"records\"", &id, &request);
        assert_eq!(
            (locks.first, locks.second),
            ((700032591, 0x3807a9c), 3533555335551362639)
        );
        let [Value::Int(class), Value::Int(key), Value::Long(second)] = locks.values() else {
            unreachable!("two numbers and a long one")
        };
        assert_eq!(((class, key), second), (locks.first, locks.second));
    }

    #[test]
    fn requests_share_the_lock_over_their_record_and_no_other() {
        let (id, another) = (RecordId::from_bytes([1; 32]), RecordId::from_bytes([2; 32]));
        let request = |digest| Fingerprint::new(1, [digest; 32]);
        let (one, two) = (Locks::of("t", &id, &request(1)), Locks::of("t", &id, &request(2)));
        assert_eq!((one.second, one.first.0), (two.second, two.first.0));
        assert_ne!(one.first.1, two.first.1);
        assert_ne!(one.second, Locks::of("t", &another, &request(1)).second);
        assert_ne!(one.second, Locks::of("u", &id, &request(1)).second);
    }
}
