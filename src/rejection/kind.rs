//! The rules that a request can break.

use http::StatusCode;

/// Which rule a refused request met. Each kind is one problem type, described in [`problems`](crate::problems).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RejectionKind {
    /// The operation requires a key and none was sent.
    KeyMissing,
    /// The key that was sent is unusable.
    KeyInvalid,
    /// Nobody can say whom the key belongs to: the scope closure found no tenant, or the credentials do not clearly
    /// name one.
    ScopeMissing,
    /// The request body is over the limit.
    BodyTooLarge,
    /// The request body broke off.
    BodyIncomplete,
    /// The request body cannot be read as JSON, and the key, the scope or the fingerprint is in it.
    BodyUnreadable,
    /// Two of the keys that one request claims at one place of its body are equal.
    KeyRepeated,
    /// The time at which the client says that it sent the request first is missing or unusable.
    FirstSentInvalid,
    /// The request was sent first too long ago: its record may be gone.
    FirstSentTooOld,
    /// The key was used for a different request, or a key beside it belongs to another operation.
    KeyReused,
    /// A request without a key is the same as an earlier one that was executed.
    DuplicateRequest,
    /// The first request with this key is still running.
    InProgress,
    /// The first request ended without a known outcome.
    OutcomeUnknown,
    /// The operation is done, but its answer was not kept: it was too large or a stream, or its handler
    /// [said so](crate::Keep::OnlyTheFact).
    ResponseNotKept,
    /// The store cannot be reached.
    StoreUnavailable,
    /// The store has no room for another key.
    StoreFull,
    /// The stored record cannot be read.
    RecordUnreadable,
    /// The stored record was written by a newer version of the software.
    RecordFromNewerVersion,
    /// The handler's transaction was rolled back, by a conflict with another one or because the connection was lost
    /// ([`Guarantee::Transactional`](crate::Guarantee::Transactional)). Nothing happened.
    TransactionRolledBack,
    /// The handler's transaction cannot be committed: a statement failed in it, or a deferred constraint does not hold.
    /// Nothing happened.
    TransactionFailed,
    /// The handler ended its transaction itself, or kept it beyond its answer.
    TransactionMisused,
}

impl RejectionKind {
    /// Every kind.
    pub const ALL: &[Self] = &[
        Self::KeyMissing,
        Self::KeyInvalid,
        Self::ScopeMissing,
        Self::BodyTooLarge,
        Self::BodyIncomplete,
        Self::BodyUnreadable,
        Self::KeyRepeated,
        Self::FirstSentInvalid,
        Self::FirstSentTooOld,
        Self::KeyReused,
        Self::DuplicateRequest,
        Self::InProgress,
        Self::OutcomeUnknown,
        Self::ResponseNotKept,
        Self::StoreUnavailable,
        Self::StoreFull,
        Self::RecordUnreadable,
        Self::RecordFromNewerVersion,
        Self::TransactionRolledBack,
        Self::TransactionFailed,
        Self::TransactionMisused,
    ];

    /// The last part of the problem's `type` URI.
    pub fn slug(self) -> &'static str {
        self.facts().0
    }

    /// The status that a refusal of this kind has unless the layer says otherwise.
    pub fn default_status(self) -> StatusCode {
        self.facts().1
    }

    /// The problem's `title` unless the layer says otherwise.
    pub fn default_title(self) -> &'static str {
        self.facts().2
    }

    fn facts(self) -> (&'static str, StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::KeyMissing => ("idempotency-key-missing", S::BAD_REQUEST, "Idempotency key is missing"),
            Self::KeyInvalid => ("idempotency-key-invalid", S::BAD_REQUEST, "Idempotency key is invalid"),
            Self::ScopeMissing => (
                "idempotency-scope-missing",
                S::BAD_REQUEST,
                "Owner of the idempotency key is unknown",
            ),
            Self::BodyTooLarge => (
                "request-body-too-large",
                S::PAYLOAD_TOO_LARGE,
                "Request body is too large",
            ),
            Self::BodyIncomplete => ("request-body-incomplete", S::BAD_REQUEST, "Request body is incomplete"),
            Self::BodyUnreadable => (
                "request-body-unreadable",
                S::BAD_REQUEST,
                "Request body is not readable JSON",
            ),
            Self::KeyRepeated => (
                "idempotency-key-repeated",
                S::BAD_REQUEST,
                "Idempotency keys of one request are equal",
            ),
            Self::FirstSentInvalid => (
                "first-sent-invalid",
                S::BAD_REQUEST,
                "Time of the first attempt is missing or invalid",
            ),
            Self::FirstSentTooOld => (
                "first-sent-too-old",
                S::PRECONDITION_FAILED,
                "Request was sent first too long ago",
            ),
            Self::DuplicateRequest => ("duplicate-request", S::CONFLICT, "Duplicate request"),
            Self::KeyReused => (
                "idempotency-key-reused",
                S::UNPROCESSABLE_ENTITY,
                "Idempotency key was used for a different request",
            ),
            Self::InProgress => (
                "request-in-progress",
                S::CONFLICT,
                "A request with this idempotency key is in progress",
            ),
            Self::OutcomeUnknown => (
                "outcome-unknown",
                S::CONFLICT,
                "The outcome of the first request is unknown",
            ),
            Self::ResponseNotKept => (
                "response-not-kept",
                S::CONFLICT,
                "The request was processed, but its response was not kept",
            ),
            Self::StoreUnavailable => (
                "store-unavailable",
                S::SERVICE_UNAVAILABLE,
                "The idempotency store is unavailable",
            ),
            Self::StoreFull => ("store-full", S::SERVICE_UNAVAILABLE, "The idempotency store is full"),
            Self::RecordUnreadable => (
                "record-unreadable",
                S::INTERNAL_SERVER_ERROR,
                "The record of the first request cannot be read",
            ),
            Self::RecordFromNewerVersion => (
                "record-from-newer-version",
                S::SERVICE_UNAVAILABLE,
                "The record of the first request was written by a newer version",
            ),
            Self::TransactionRolledBack => (
                "transaction-rolled-back",
                S::SERVICE_UNAVAILABLE,
                "The request's transaction was rolled back",
            ),
            Self::TransactionFailed => (
                "transaction-failed",
                S::INTERNAL_SERVER_ERROR,
                "The request's transaction could not be committed",
            ),
            Self::TransactionMisused => (
                "transaction-misused",
                S::INTERNAL_SERVER_ERROR,
                "The request's handler did not leave its transaction to the server",
            ),
        }
    }

    /// Whether the same request may succeed when it is sent again a little later.
    pub(super) fn passes_with_time(self) -> bool {
        matches!(
            self,
            Self::InProgress
                | Self::StoreUnavailable
                | Self::StoreFull
                | Self::RecordFromNewerVersion
                | Self::TransactionRolledBack
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::RejectionKind;

    #[test]
    fn every_kind_is_listed_once_and_has_a_name_of_its_own() {
        let slugs: HashSet<_> = RejectionKind::ALL.iter().map(|kind| kind.slug()).collect();
        assert_eq!(slugs.len(), RejectionKind::ALL.len());
        // The last of the enum's kinds; a new one has to be listed, too.
        assert_eq!(RejectionKind::TransactionMisused as usize + 1, RejectionKind::ALL.len());
    }
}
