//! Pockyt.

use std::time::Duration;

use super::Profile;
use crate::{
    key::KeySource,
    policy::{Guarantee, WithoutKey},
    rejection::RejectionKind,
    statuses::Statuses,
};

const PAYMENTS: Duration = Duration::from_secs(5 * 60);
const REFUNDS: Duration = Duration::from_secs(72 * 60 * 60);

impl Profile {
    /// Pockyt: `Pockyt-Request-ID` of 1 to 64 characters. A completed transaction is answered as it was first; one that
    /// was not completed runs. Without a key, an identical request is refused as a duplicate (409). Kept for 5 minutes
    /// on `/v3/payouts/pay` and for 72 hours on `/v3/payouts/refund`.
    ///
    /// Source: Pockyt's guide "Idempotency Key". What it leaves open, and how it is closed here:
    /// - *Whose keys they are*: each merchant's, by the body's `/merchantNo`, together with the `Authorization` header
    ///   if there is one, for each endpoint. So the body of every POST and PATCH, with a key or without, has to be JSON or
    ///   empty, without an object that names a member twice, and is refused otherwise (400 `request-body-unreadable`).
    /// - *Another body under the same key*: refused, 422. *A request that is still running*: 409.
    /// - *Which transactions completed*: those that were answered with success. A failed one may run again, and so may
    ///   one whose outcome nobody knows ([`Guarantee::AtLeastOnce`]): **handlers have to be safe to repeat**.
    /// - *Other routes*: as refunds, since keeping a record for longer charges nobody twice.
    /// - *A key that a client sends for the first time with a request that it sent before without one*: a new
    ///   operation.
    /// - *The other way round*, a request without a key that equals one sent with a key: a new operation, too.
    /// - *An identical request without a key while the first one runs*: 409, in progress; it may yet turn out that
    ///   nothing was executed.
    /// - *Methods*: POST and PATCH. A query that is sent by POST twice would be a duplicate: put the layer on the
    ///   operations that move money alone.
    pub fn pockyt() -> Self {
        Self::new("Pockyt", |layer| {
            layer
                .key(KeySource::header("pockyt-request-id"))
                .max_key_length(64)
                .without_key(WithoutKey::DeriveAndRefuse)
                .rejection_title(RejectionKind::DuplicateRequest, "Duplicate request error")
                .scope_member("/merchantNo")
                .guarantee(Guarantee::AtLeastOnce)
                .store_statuses(Statuses::success())
                .retention(REFUNDS)
                .route("/v3/payouts/pay", |payments| payments.retention(PAYMENTS))
                .route("/v3/payouts/refund", |refunds| refunds.retention(REFUNDS))
        })
    }
}
