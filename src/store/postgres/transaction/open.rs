//! A transaction that has claimed, and its end.

use std::sync::Arc;

use http::Extensions;

use super::{
    Connection, Looked, Place,
    ends::Waking,
    named,
    say::{Failure, Say, Value},
    statements::{RELEASE, SAVEPOINT, TransactionStatements, UNDO},
};
use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    record::{Claim, Lease, RecordId, Retention},
    store::{
        hints::Hints,
        postgres::{record, statements::retention_micros},
    },
    transactional::{Answer, Boxed, Ended, Slot, Transaction},
};

/// An open transaction that has claimed.
pub(super) struct Open<C: Connection> {
    slot: Slot<C>,
    /// To a handler, which may have ended it.
    lent: bool,
    lease: Lease,
    /// Of the operation's own record.
    place: Option<Place>,
    /// Those that it claimed beside its own.
    pub(super) others: Vec<RecordId>,
    statements: Arc<TransactionStatements>,
    waking: Waking,
    hints: Arc<Hints>,
}

const KEPT: &str = "the handler kept its transaction beyond its answer: it is rolled back when it is let go";
const ENDED: &str = "the handler ended its transaction itself: what it wrote may be committed";

impl<C: Connection> Open<C> {
    pub(super) fn new(
        connection: C,
        lease: Lease,
        statements: &Arc<TransactionStatements>,
        waking: Waking,
        hints: &Arc<Hints>,
    ) -> Self {
        Self {
            slot: Slot::of(connection),
            lent: false,
            lease,
            place: None,
            others: Vec::new(),
            statements: Arc::clone(statements),
            waking,
            hints: Arc::clone(hints),
        }
    }

    /// Its locks are had.
    pub(super) fn has_claimed(&mut self) {
        self.waking.claimed();
    }

    pub(super) fn has_row(&mut self, id: &RecordId, place: Place) {
        if *id == self.lease.id {
            self.place = Some(place);
        }
    }

    pub(super) async fn give_up<T>(self) -> Result<Option<T>, StoreError> {
        if let Some(connection) = self.slot.take_back() {
            connection.roll_back(None).await?;
        }
        Ok(None)
    }

    /// Claims, again or what has expired, before a handler has the connection. Outside of the savepoint: a claim stays when
    /// what the handler wrote is undone.
    pub(super) async fn look(&mut self, mut claims: Vec<Say>) -> Result<Option<Vec<Looked>>, StoreError> {
        claims.insert(0, Say::Plain(RELEASE));
        claims.push(Say::Plain(SAVEPOINT));
        let Some(mut connection) = self.slot.take_back() else {
            return Ok(None);
        };
        match connection.look(claims).await {
            Ok(looked) => {
                self.slot = Slot::of(connection);
                Ok(Some(looked))
            }
            Err(failure) => {
                // Before anybody is told: the next attempt may come at once.
                let _ = connection.roll_back(None).await;
                Err(failure.into())
            }
        }
    }

    pub(super) async fn claim_expired(
        &mut self,
        claim: &Claim,
        expired: Vec<(&RecordId, &Fingerprint)>,
        has_all: Option<Say>,
    ) -> Result<bool, StoreError> {
        let mut flight = Vec::new();
        for (id, fingerprint) in &expired {
            let mut values = named(id, claim, fingerprint);
            values.extend([Value::from(0_i64), retention_micros(claim.retention).into()]);
            flight.push(Say::ask(&self.statements.claim_expired, values));
        }
        flight.extend(has_all);
        let Some(claimed) = self
            .look(flight)
            .await?
            .filter(|claimed| claimed.len() == expired.len())
        else {
            return Ok(false);
        };
        for ((id, _), looked) in expired.into_iter().zip(claimed) {
            if let Some(place) = looked.claimed {
                self.has_row(id, place);
            }
        }
        Ok(true)
    }

    fn completion(&self, place: Place, answer: &Answer) -> Vec<Say> {
        let Answer {
            response, retention, ..
        } = answer;
        let owner = || Value::from(self.lease.owner.as_bytes());
        let kept = |response: &StoredResponse, retention: Retention| {
            (Value::Bytes(response.as_bytes().clone()), retention_micros(retention))
        };
        let (bytes, micros) = kept(response, *retention);
        let checksum = record::checksum(&self.lease.id, response.as_bytes());
        let own = [
            self.lease.id.as_bytes().into(),
            owner(),
            bytes,
            checksum.into(),
            micros.into(),
            place.0.into(),
        ];
        let mut flight = vec![Say::ask(&self.statements.complete, own)];
        if !self.others.is_empty() {
            // The fact alone; the answer is with the operation.
            let (bytes, micros) = kept(&StoredResponse::not_kept(response.status()), *retention);
            let fact = StoredResponse::not_kept(response.status());
            let sums = self
                .others
                .iter()
                .map(|id| record::checksum(id, fact.as_bytes()))
                .collect();
            let ids = self.others.iter().map(|id| id.as_bytes().to_vec()).collect();
            let others = [
                Value::BytesList(ids),
                owner(),
                bytes,
                Value::IntList(sums),
                micros.into(),
            ];
            flight.push(Say::ask(&self.statements.complete_others, others));
        }
        flight
    }
}

impl<C: Connection> Transaction for Open<C> {
    fn lend(&mut self, extensions: &mut Extensions) {
        self.lent = true;
        C::lend(&self.slot, extensions);
    }

    fn commit(mut self: Box<Self>, answer: Answer) -> Boxed<'static, Ended> {
        Box::pin(async move {
            let Some(connection) = self.slot.take_back() else {
                return Ended::Misused(KEPT);
            };
            let Some(place) = self.place.take() else {
                return Ended::Failed(StoreErrorKind::Other.into());
            };
            let mut flight = self.completion(place, &answer);
            if !answer.with_writes {
                flight.insert(0, Say::Plain(UNDO));
            }
            match connection.commit(flight).await {
                Ok(()) => {
                    self.waking.committed();
                    self.hints.add(&self.lease.id);
                    Ended::AsAsked
                }
                Err(failure) => failure.into_end(),
            }
        })
    }

    fn roll_back(self: Box<Self>) -> Boxed<'static, Ended> {
        Box::pin(async move {
            let Some(connection) = self.slot.take_back() else {
                return Ended::Misused(KEPT);
            };
            let (id, owner) = (self.lease.id.as_bytes(), self.lease.owner.as_bytes());
            let check = Say::ask(&self.statements.check, [Value::from(id), owner.into()]);
            match connection.roll_back(self.lent.then_some(check)).await {
                Ok(()) => Ended::AsAsked,
                Err(failure) => failure.into_end(),
            }
        })
    }
}

impl Failure {
    /// A transaction that fails is undone, unless the connection was lost with it.
    fn into_end(self) -> Ended {
        let Self {
            code,
            fatal,
            by_commit,
            error,
        } = self;
        match code.as_deref() {
            None => Ended::Unknown(error),
            // Of the connection, perhaps after the commit.
            Some(_) if fatal => Ended::Unknown(error),
            // No row, no transaction, no such savepoint. A commit that is refused may say the same of what it checks.
            Some("22012" | "25P01" | "3B001") if !by_commit => Ended::Misused(ENDED),
            Some(_) => match error.kind() {
                StoreErrorKind::Unavailable | StoreErrorKind::Full => Ended::RolledBack(error),
                _ => Ended::Failed(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_that_fails_is_undone_unless_its_connection_was_lost_with_it() {
        use StoreErrorKind::{Corrupt, Full, Other, Unavailable};
        for (code, fatal, kind, ended) in [
            (None, false, Unavailable, "Unknown"),
            (Some("57P01"), true, Unavailable, "Unknown"),
            (Some("22012"), true, Other, "Unknown"),
            (Some("22012"), false, Other, "Misused"),
            (Some("25P01"), false, Other, "Misused"),
            (Some("3B001"), false, Other, "Misused"),
            (Some("40001"), false, Unavailable, "RolledBack"),
            (Some("53100"), false, Full, "RolledBack"),
            (Some("23505"), false, Other, "Failed"),
            (Some("XX001"), false, Corrupt, "Failed"),
        ] {
            let failure = Failure {
                code: code.map(str::to_owned),
                fatal,
                by_commit: false,
                error: kind.into(),
            };
            let found = format!("{:?}", failure.into_end());
            assert!(found.starts_with(ended), "{code:?} {fatal} {found}");
        }
        let of_a_deferred_trigger = Failure {
            code: Some("22012".to_owned()),
            fatal: false,
            by_commit: true,
            error: Other.into(),
        };
        assert!(matches!(of_a_deferred_trigger.into_end(), Ended::Failed(_)));
    }
}
