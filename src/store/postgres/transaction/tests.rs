//! What a claim or a look comes to, without a server.

#![allow(clippy::unwrap_used)]

use super::{
    super::{PostgresTable, statements::Statements},
    *,
};
use crate::record::Owner;

#[test]
fn a_lock_is_waited_for_in_milliseconds_never_for_ever_and_never_longer_than_the_server_counts() {
    for (time, said) in [
        (Duration::from_micros(900), "1ms"),
        (Duration::from_millis(1500), "1500ms"),
        (Duration::MAX, "2147483647ms"),
    ] {
        assert_eq!(lock_timeout(time), said);
    }
}

fn id() -> RecordId {
    RecordId::from_bytes([1; 32])
}

fn place() -> Place {
    Place("(0,1)".to_owned())
}

fn row(state: i8) -> Row {
    Row {
        owner: Some(vec![7; 16]),
        fence: 1,
        state: Some(state),
        algorithm: Some(1),
        fingerprint: Some(vec![1; 32]),
        expired: Some(false),
        time_left: Some(5),
        ..Row::default()
    }
}

#[test]
fn a_transaction_was_committed_if_the_record_is_completed_and_by_its_owner() {
    let lease = |owner| Lease::new(id(), Owner::from_bytes([owner; 16]), 1);
    assert!(is_completed_by(&row(record::COMPLETED), &lease(7)));
    assert!(!is_completed_by(&row(record::COMPLETED), &lease(8)));
    assert!(!is_completed_by(&row(b'p' as i8), &lease(7)));
    assert!(!is_completed_by(&row(b'a' as i8), &lease(8)));
}

#[test]
fn a_claim_finds_what_is_committed_before_who_is_at_work() {
    let fingerprint = Fingerprint::new(1, [1; 32]);
    let claim = |owner| {
        let (lease, retention) = (Duration::from_secs(1), crate::record::Retention::Forever);
        Claim::new(fingerprint, Owner::from_bytes([owner; 16]), lease, retention)
    };
    let found = |held, claimed, row: Option<Row>, owner| {
        let looked = Looked { held, claimed, row };
        match looked.found(&id(), &claim(owner)) {
            Ok(Some(Looking::Claimed(_))) => "claimed",
            Ok(Some(Looking::Found(Found::Acquired))) => "acquired",
            Ok(Some(Looking::Found(Found::InFlight(Whose::Same)))) => "same",
            Ok(Some(Looking::Found(Found::InFlight(Whose::Another)))) => "another",
            Ok(Some(Looking::Found(Found::InFlight(Whose::Unclear)))) => "unclear",
            Ok(Some(Looking::Found(Found::Kept(_)))) => "kept",
            Ok(Some(Looking::Expired)) => "expired",
            Ok(None) => "nothing",
            Err(_) => "an error",
        }
    };
    let (in_progress, expired) = (b'p' as i8, |row| Row {
        expired: Some(true),
        ..row
    });
    for (held, nothing, over) in [
        (held::NONE, "nothing", "expired"),
        (held::FIRST, "same", "same"),
        (held::SECOND, "unclear", "unclear"),
    ] {
        assert_eq!(found(held, Some(place()), None, 8), "claimed");
        assert_eq!(found(held, None, None, 8), nothing);
        assert_eq!(found(held, None, Some(expired(row(in_progress))), 8), over);
        assert_eq!(found(held, None, Some(row(in_progress)), 8), "kept");
        assert_eq!(
            found(held, None, Some(row(in_progress)), 7),
            "nothing",
            "it was never committed"
        );
        assert_eq!(found(held, None, Some(row(b'x' as i8)), 8), "an error");
    }
}

/// What a claim shows, and then a look behind the first lock.
struct Shows {
    claim: fn() -> Looked,
    look: fn() -> (bool, Looked),
}

struct Nowhere(fn() -> Looked);

fn nobody(held: i32) -> Looked {
    Looked {
        held,
        claimed: None,
        row: None,
    }
}

fn somebody(held: i32) -> Looked {
    Looked {
        row: Some(row(b'p' as i8)),
        ..nobody(held)
    }
}

impl Source for Shows {
    type Connection = Nowhere;

    async fn begin(
        &self,
        _: Vec<Say>,
        _: &[&Arc<Statement>],
        _: &[&Arc<Statement>],
    ) -> Result<(Nowhere, Vec<Looked>), Failure> {
        Ok((Nowhere(self.claim), vec![]))
    }

    async fn lock_and_look(&self, _: Say, _: Say) -> Result<(bool, Looked), Failure> {
        Ok((self.look)())
    }
}

impl Connection for Nowhere {
    async fn look(&mut self, _: Vec<Say>) -> Result<Vec<Looked>, Failure> {
        Ok(vec![(self.0)()])
    }

    async fn commit(self, _: Vec<Say>) -> Result<(), Failure> {
        Ok(())
    }

    async fn roll_back(self, _: Option<Say>) -> Result<(), Failure> {
        Ok(())
    }

    fn lend(_: &Slot<Self>, _: &mut Extensions) {}
}

#[tokio::test]
async fn who_holds_the_second_lock_is_found_out_behind_the_first_and_what_is_committed_says_more() {
    let found = async |look: fn() -> (bool, Looked)| {
        let table = PostgresTable::default();
        let transactions = TableTransactions {
            source: Shows {
                claim: || nobody(held::SECOND),
                look,
            },
            table: table.quoted(),
            statements: Arc::new(TransactionStatements::new(&table, &Statements::new(&table))),
            lock_timeout: Duration::from_secs(1),
            ends: Arc::default(),
            hints: Arc::new(Hints::new()),
        };
        let (lease, retention) = (Duration::from_secs(1), crate::record::Retention::Forever);
        let claim = Claim::new(
            Fingerprint::new(1, [1; 32]),
            Owner::from_bytes([8; 16]),
            lease,
            retention,
        );
        let opened = transactions.begin(&id(), &claim, &[]).await.unwrap();
        assert!(opened.transaction.is_none());
        match opened.own {
            Found::InFlight(whose) => format!("{whose:?}"),
            Found::Kept(_) => "kept".to_owned(),
            Found::Acquired => "acquired".to_owned(),
        }
    };
    assert_eq!(found(|| (false, nobody(held::NONE))).await, "Same");
    assert_eq!(found(|| (true, nobody(held::SECOND))).await, "Another");
    assert_eq!(found(|| (true, nobody(held::NONE))).await, "Unclear");
    // It was committed while it was looked for.
    assert_eq!(found(|| (true, somebody(held::NONE))).await, "kept");
    assert_eq!(found(|| (false, somebody(held::SECOND))).await, "kept");
}
