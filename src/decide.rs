//! The decision in the middle: a pure function of what the store found and what the layer was told.

use std::time::Duration;

use crate::{
    codec::StoredResponse,
    fingerprint::Comparison,
    policy::{Concurrent, Guarantee},
    record::{Begin, Lease},
    rejection::{Rejection, RejectionKind},
};

/// What [`decide`] says.
#[derive(Debug)]
pub(crate) enum Decision {
    Run(Lease),
    /// Claim the record once more, in place of the attempt that lost this lease.
    TakeOver(Lease),
    Replay(StoredResponse),
    /// For at most this long.
    Wait(Duration),
    Refuse(Rejection),
}

/// What to do about a record. Knows no store, no clock and no request.
///
/// `duplicates` is how the duplicate of a completed operation is refused, if it is not to get the answer.
pub(crate) fn decide(
    begin: Begin,
    comparison: Comparison,
    guarantee: Guarantee,
    concurrent: Concurrent,
    duplicates: Option<RejectionKind>,
) -> Decision {
    let refuse = |kind| Decision::Refuse(Rejection::new(kind));
    match (begin, comparison) {
        (Begin::Acquired(lease), _) => Decision::Run(lease),
        (_, Comparison::Different) => refuse(RejectionKind::KeyReused),
        (_, Comparison::Unknown) => refuse(RejectionKind::RecordFromNewerVersion),
        (Begin::Completed { response, .. }, Comparison::Same) => {
            if let Some(kind) = duplicates {
                refuse(kind)
            } else if response.is_kept() {
                Decision::Replay(response)
            } else {
                let rejection = Rejection::new(RejectionKind::ResponseNotKept);
                Decision::Refuse(rejection.with_original_status(response.status()))
            }
        }
        (Begin::InProgress { remaining, .. }, Comparison::Same) => match concurrent {
            Concurrent::Refuse => refuse(RejectionKind::InProgress),
            Concurrent::Wait(_) => Decision::Wait(remaining),
        },
        (Begin::Abandoned { lost, .. }, Comparison::Same) => match guarantee {
            #[cfg(seeded_bug)]
            Guarantee::AtMostOnce if crate::seeded::is("runs again what is unknown") => Decision::TakeOver(lost),
            // A transaction that is lost leaves no record. This one was left by a handler that committed by itself, or
            // by an attempt under another guarantee.
            Guarantee::AtMostOnce | Guarantee::Transactional => refuse(RejectionKind::OutcomeUnknown),
            Guarantee::AtLeastOnce => Decision::TakeOver(lost),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use http::{HeaderMap, StatusCode};

    use super::*;
    use crate::{
        fingerprint::Fingerprint,
        record::{Owner, RecordId},
    };

    fn lease(fence: u64) -> Lease {
        Lease::new(RecordId::from_bytes([0; 32]), Owner::from_bytes([1; 16]), fence)
    }

    /// The states that a store can find, by name.
    fn find(state: &str) -> Begin {
        let fingerprint = Fingerprint::new(1, [0; 32]);
        match state {
            "acquired" => Begin::Acquired(lease(1)),
            "in progress" => Begin::InProgress {
                fingerprint,
                remaining: Duration::from_secs(7),
            },
            "abandoned" => Begin::Abandoned {
                fingerprint,
                lost: lease(3),
            },
            "kept" => {
                let response = StoredResponse::encode(StatusCode::OK, &HeaderMap::new(), |_| true, b"", None);
                Begin::Completed {
                    fingerprint,
                    response,
                    remaining: None,
                }
            }
            "not kept" => {
                let response = StoredResponse::not_kept(StatusCode::ACCEPTED);
                Begin::Completed {
                    fingerprint,
                    response,
                    remaining: None,
                }
            }
            other => unreachable!("{other}"),
        }
    }

    fn name(decision: Decision) -> String {
        match decision {
            Decision::Run(_) => "run".to_owned(),
            Decision::TakeOver(lost) => format!("take over {}", lost.fence),
            Decision::Replay(_) => "replay".to_owned(),
            Decision::Wait(longest) => format!("wait {}", longest.as_secs()),
            Decision::Refuse(rejection) => rejection.kind().slug().to_owned(),
        }
    }

    #[test]
    fn every_situation_has_one_decision() {
        use Comparison::{Different, Same, Unknown};
        use Guarantee::{AtLeastOnce, AtMostOnce, Transactional};
        let wait = Concurrent::Wait(Duration::from_secs(1));
        let no = Concurrent::Refuse;
        for (state, comparison, guarantee, concurrent, expected) in [
            ("acquired", Same, AtMostOnce, no, "run"),
            ("acquired", Same, AtLeastOnce, wait, "run"),
            ("kept", Same, AtMostOnce, no, "replay"),
            ("kept", Same, AtLeastOnce, wait, "replay"),
            ("kept", Different, AtMostOnce, no, "idempotency-key-reused"),
            ("kept", Unknown, AtMostOnce, no, "record-from-newer-version"),
            ("not kept", Same, AtMostOnce, no, "response-not-kept"),
            ("not kept", Same, AtLeastOnce, wait, "response-not-kept"),
            ("not kept", Different, AtLeastOnce, no, "idempotency-key-reused"),
            ("in progress", Same, AtMostOnce, no, "request-in-progress"),
            ("in progress", Same, AtLeastOnce, no, "request-in-progress"),
            ("in progress", Same, AtMostOnce, wait, "wait 7"),
            ("in progress", Different, AtMostOnce, wait, "idempotency-key-reused"),
            ("in progress", Unknown, AtLeastOnce, wait, "record-from-newer-version"),
            ("abandoned", Same, AtMostOnce, no, "outcome-unknown"),
            ("abandoned", Same, AtMostOnce, wait, "outcome-unknown"),
            ("abandoned", Same, AtLeastOnce, no, "take over 3"),
            ("abandoned", Same, AtLeastOnce, wait, "take over 3"),
            ("abandoned", Different, AtLeastOnce, no, "idempotency-key-reused"),
            ("abandoned", Different, AtMostOnce, no, "idempotency-key-reused"),
            ("abandoned", Unknown, AtLeastOnce, no, "record-from-newer-version"),
            ("acquired", Same, Transactional, no, "run"),
            ("kept", Same, Transactional, no, "replay"),
            ("kept", Different, Transactional, no, "idempotency-key-reused"),
            ("not kept", Same, Transactional, no, "response-not-kept"),
            ("in progress", Same, Transactional, no, "request-in-progress"),
            ("in progress", Same, Transactional, wait, "wait 7"),
            ("in progress", Different, Transactional, wait, "idempotency-key-reused"),
            ("abandoned", Same, Transactional, no, "outcome-unknown"),
            ("abandoned", Same, Transactional, wait, "outcome-unknown"),
            ("abandoned", Different, Transactional, no, "idempotency-key-reused"),
        ] {
            let decision = name(decide(find(state), comparison, guarantee, concurrent, None));
            assert_eq!(
                decision, expected,
                "{state}, {comparison:?}, {guarantee:?}, {concurrent:?}"
            );
        }
    }

    #[test]
    fn a_duplicate_that_is_to_be_told_so_gets_no_answer() {
        use Comparison::{Different, Same};
        for (state, comparison, expected) in [
            ("acquired", Same, "run"),
            ("kept", Same, "duplicate-request"),
            ("not kept", Same, "duplicate-request"),
            ("kept", Different, "idempotency-key-reused"),
            // It may yet turn out that nothing was executed.
            ("in progress", Same, "request-in-progress"),
            ("abandoned", Same, "outcome-unknown"),
        ] {
            let (guarantee, duplicates) = (Guarantee::AtMostOnce, Some(RejectionKind::DuplicateRequest));
            let decision = decide(find(state), comparison, guarantee, Concurrent::Refuse, duplicates);
            assert_eq!(name(decision), expected, "{state}");
        }
    }

    #[test]
    fn a_refusal_of_what_was_not_kept_names_the_first_status() {
        let decision = decide(
            find("not kept"),
            Comparison::Same,
            Guarantee::AtMostOnce,
            Concurrent::Refuse,
            None,
        );
        let Decision::Refuse(rejection) = decision else {
            unreachable!("it is refused")
        };
        assert_eq!(rejection.original_status(), Some(StatusCode::ACCEPTED));
    }
}
