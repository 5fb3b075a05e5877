//! Begins a transaction, and says what follows from what its claim found.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Found, Opened, Transaction, Transactions, Whose, run::end};
use crate::{
    error::StoreError,
    fingerprint::Fingerprint,
    identity::Identity,
    random,
    record::{Begin, Claim},
    rejection::{Rejection, RejectionKind},
    shared::Shared,
    store::Call,
};

/// How soon a duplicate looks again for a transaction on another node. On this one it hears of its end.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

pub(super) async fn begin(
    shared: &Shared,
    identity: &Identity,
    claim: &Claim,
    transactions: &dyn Transactions,
) -> Result<Opened, StoreError> {
    let begin = || shared.call(Call::Pending(transactions.begin(&identity.id, claim, &identity.others)));
    match begin().await {
        // A connection that had broken unseen, perhaps. What was begun on it is rolled back.
        Err(error) if error.is_retryable() => begin().await,
        result => result,
    }
}

/// What follows from what a transaction found.
pub(super) enum Claimed {
    /// The operation's own record, and all others.
    All(Box<dyn Transaction>),
    Found(Begin),
    Refused(Rejection),
    /// Somebody is at work, and it is not to be seen who.
    Unclear,
}

/// How often and how long it is looked again who is at work: a transaction that ends lets go of its locks one after the
/// other, which takes no time unless its process is held up.
pub(super) struct Unclear {
    /// `None`: in a time that no clock can count.
    give_up: Option<Instant>,
    pause: Duration,
}

const SHORTEST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

impl Unclear {
    pub(super) fn new(shared: &Shared) -> Self {
        Self {
            give_up: Instant::now().checked_add(shared.policy.store_timeout),
            pause: SHORTEST_PAUSE,
        }
    }

    /// `false` when the time is over.
    pub(super) async fn look_again(&mut self) -> bool {
        if self
            .give_up
            .is_some_and(|give_up| Instant::now() + self.pause > give_up)
        {
            return false;
        }
        sleep(self.pause).await;
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
        true
    }
}

/// As if a record that cannot be seen yet were to be seen already.
pub(super) fn in_progress(claim: &Claim) -> Begin {
    Begin::InProgress {
        fingerprint: claim.fingerprint,
        remaining: LOOK_AGAIN + Duration::from_millis(random::below(LOOK_AGAIN.as_millis() as u64)),
    }
}

/// All of it was claimed, or the transaction is over and its connection given back.
pub(super) async fn claimed(shared: &Shared, identity: &Identity, claim: &Claim, opened: Opened) -> Claimed {
    let Opened {
        own,
        others,
        mut transaction,
    } = opened;
    let claimed = match own {
        Found::Acquired => {
            let beside = Fingerprint::beside(&identity.id);
            // Who has the operation's own record to itself meets of the same operation only what is ending.
            let is_ending = |found: &Found| matches!(found, Found::InFlight(Whose::Same | Whose::Unclear));
            let (ending, others): (Vec<_>, Vec<_>) = others.into_iter().partition(is_ending);
            match others.into_iter().find_map(|other| not_to_be_had(other, &beside)) {
                Some(rejection) => Claimed::Refused(rejection),
                None if !ending.is_empty() => Claimed::Unclear,
                None => match transaction.take() {
                    Some(transaction) => return Claimed::All(transaction),
                    None => Claimed::Unclear,
                },
            }
        }
        Found::InFlight(Whose::Another) => Claimed::Refused(Rejection::new(RejectionKind::KeyReused)),
        Found::InFlight(Whose::Same) => Claimed::Found(in_progress(claim)),
        Found::InFlight(Whose::Unclear) => Claimed::Unclear,
        Found::Kept(begin) => Claimed::Found(begin),
    };
    if let Some(transaction) = transaction {
        let _ = end(shared, transaction, None).await;
    }
    claimed
}

/// Why a key beside the operation's own cannot be claimed; see [`claims`](crate::claims).
fn not_to_be_had(other: Found, beside: &Fingerprint) -> Option<Rejection> {
    let kind = match other {
        Found::Acquired => return None,
        // By an earlier attempt at this operation.
        Found::Kept(Begin::Completed { fingerprint, .. }) if fingerprint == *beside => return None,
        Found::Kept(Begin::InProgress { fingerprint, .. }) if fingerprint == *beside => RejectionKind::InProgress,
        // A transaction leaves none; one that committed by itself, or another guarantee, did.
        Found::Kept(Begin::Abandoned { fingerprint, .. }) if fingerprint == *beside => RejectionKind::OutcomeUnknown,
        Found::Kept(_) | Found::InFlight(_) => {
            let detail = "one of the keys in the request's body belongs to another operation".to_owned();
            return Some(Rejection::new(RejectionKind::KeyReused).with_detail(detail));
        }
    };
    Some(Rejection::new(kind))
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;
    use crate::{
        codec::StoredResponse,
        record::{Lease, Owner, RecordId, Retention},
    };

    fn id(byte: u8) -> RecordId {
        RecordId::from_bytes([byte; 32])
    }

    #[test]
    fn a_key_beside_is_had_if_it_is_vacant_or_was_used_by_the_same_operation() {
        let (own, another) = (Fingerprint::beside(&id(1)), Fingerprint::beside(&id(2)));
        let completed = |fingerprint| Begin::Completed {
            fingerprint,
            response: StoredResponse::not_kept(StatusCode::OK),
            remaining: None,
        };
        let in_progress = |fingerprint| Begin::InProgress {
            fingerprint,
            remaining: Duration::ZERO,
        };
        let abandoned = |fingerprint| Begin::Abandoned {
            fingerprint,
            lost: Lease::new(id(3), Owner::from_bytes([1; 16]), 1),
        };
        let reused = Some(RejectionKind::KeyReused);
        for (found, expected) in [
            (Found::Acquired, None),
            (Found::Kept(completed(own)), None),
            (Found::Kept(in_progress(own)), Some(RejectionKind::InProgress)),
            (Found::Kept(abandoned(own)), Some(RejectionKind::OutcomeUnknown)),
            (Found::Kept(completed(another)), reused),
            (Found::Kept(in_progress(another)), reused),
            (Found::Kept(abandoned(another)), reused),
            (Found::InFlight(Whose::Another), reused),
        ] {
            let said = format!("{found:?}");
            let kind = not_to_be_had(found, &own).map(|rejection| rejection.kind());
            assert_eq!(kind, expected, "{said}");
        }
    }

    #[test]
    fn a_duplicate_looks_again_after_a_quarter_of_a_second_or_twice_that() {
        let owner = Owner::from_bytes([1; 16]);
        let claim = Claim::new(Fingerprint::beside(&id(1)), owner, LOOK_AGAIN, Retention::Forever);
        for _ in 0..100 {
            let Begin::InProgress { remaining, .. } = in_progress(&claim) else {
                unreachable!("it is in progress")
            };
            assert!((LOOK_AGAIN..2 * LOOK_AGAIN).contains(&remaining), "{remaining:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_unclear_is_looked_at_with_growing_pauses_until_its_time_is_over() {
        let start = Instant::now();
        for (give_up, looks) in [(5, 1), (6, 2), (13, 2), (14, 3)] {
            let mut unclear = Unclear {
                give_up: Some(Instant::now() + Duration::from_millis(give_up)),
                pause: SHORTEST_PAUSE,
            };
            let mut looked = 0;
            while unclear.look_again().await {
                looked += 1;
            }
            assert_eq!(looked, looks, "within {give_up} ms");
        }
        assert_eq!(start.elapsed(), Duration::from_millis(2 + 6 + 6 + 14));
    }
}
