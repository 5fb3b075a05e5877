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
    /// Claim the record once more, and with it the abandoned attempt that has this fence.
    TakeOver(u64),
    Replay(StoredResponse),
    /// For at most this long.
    Wait(Duration),
    Refuse(Rejection),
}

/// What to do about a record. Knows no store, no clock and no request.
pub(crate) fn decide(begin: Begin, comparison: Comparison, guarantee: Guarantee, concurrent: Concurrent) -> Decision {
    let refuse = |kind| Decision::Refuse(Rejection::new(kind));
    match (begin, comparison) {
        (Begin::Acquired(lease), _) => Decision::Run(lease),
        (_, Comparison::Different) => refuse(RejectionKind::KeyReused),
        (_, Comparison::Unknown) => refuse(RejectionKind::RecordFromNewerVersion),
        (Begin::Completed { response, .. }, Comparison::Same) => {
            if response.is_kept() {
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
        (Begin::Abandoned { fence, .. }, Comparison::Same) => match guarantee {
            Guarantee::AtMostOnce => refuse(RejectionKind::OutcomeUnknown),
            Guarantee::AtLeastOnce => Decision::TakeOver(fence),
        },
    }
}
