//! OASIS Repeatable Requests.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};

use super::Profile;
use crate::{
    key::{KeySource, uuid},
    rejection::RejectionKind,
    statuses::Statuses,
};

const RESULT: HeaderName = HeaderName::from_static("repeatability-result");
const REJECTED: HeaderValue = HeaderValue::from_static("rejected");
const ACCEPTED: HeaderValue = HeaderValue::from_static("accepted");

impl Profile {
    /// OASIS Repeatable Requests 1.0, as Microsoft's services use it: `Repeatability-Request-ID`, a UUID, together with
    /// `Repeatability-First-Sent`, an HTTP date. Answers have `Repeatability-Result: accepted`; a request that cannot
    /// be made repeatable is refused with `rejected`: 400 for another body or unusable fields, 412 if it was sent first
    /// longer ago than records are kept. All answers but 5xx are kept.
    ///
    /// Source: OASIS "Repeatable Requests Version 1.0", and Microsoft's description for its communication services.
    /// What they leave open, and how it is closed here:
    /// - *How long*: at least 5 minutes; 24 hours here. *A clock that is ahead*: by at most 5 minutes.
    /// - *A request that is still running*: 409, `accepted`.
    /// - *Only one of the two fields*: refused, 400. *Neither*: the request passes, unprotected.
    /// - *A 5xx*: it has no result, and its id is free. **A handler must not answer so after an effect.**
    pub fn oasis_repeatable_requests() -> Self {
        Self::new("OASIS Repeatable Requests", |layer| {
            let layer = layer
                .methods([Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
                .key(KeySource::header("repeatability-request-id"))
                .key_rule(uuid)
                .max_key_length(36)
                .optional_key()
                .first_sent(
                    HeaderName::from_static("repeatability-first-sent"),
                    Duration::from_secs(5 * 60),
                )
                .retention(Duration::from_secs(24 * 60 * 60))
                .store_statuses(Statuses::all().without_class(5))
                .answer_header(RESULT, ACCEPTED)
                .replay_marker(None)
                .rejection_status(RejectionKind::KeyReused, StatusCode::BAD_REQUEST)
                .rejection_header(RejectionKind::InProgress, RESULT, ACCEPTED);
            let rejected = [
                RejectionKind::KeyMissing,
                RejectionKind::KeyInvalid,
                RejectionKind::KeyReused,
                RejectionKind::ScopeMissing,
                RejectionKind::BodyTooLarge,
                RejectionKind::BodyIncomplete,
                RejectionKind::FirstSentInvalid,
                RejectionKind::FirstSentTooOld,
            ];
            rejected
                .into_iter()
                .fold(layer, |layer, kind| layer.rejection_header(kind, RESULT, REJECTED))
        })
    }
}
