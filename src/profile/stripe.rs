//! Stripe.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};

use super::Profile;
use crate::{
    key::KeySource,
    rejection::{RejectionFormat, RejectionKind},
    statuses::Statuses,
};

impl Profile {
    /// Stripe's API v1: `Idempotency-Key` on every POST, optional, at most 255 characters, kept for 24 hours. Every
    /// answer of a request that began to execute is kept, a 500 included; validation failures are not. Another body is
    /// a 400 `idempotency_error`, a request that is still running a 409. Replays have `Idempotent-Replayed: true`.
    ///
    /// Source: Stripe's API reference, "Idempotent requests" and "Errors". What it leaves open, and how it is closed
    /// here:
    /// - *Which statuses are validation failures*: 400, 404, 409 and 422, besides the crate's own
    ///   [list](Statuses::default). A handler that began and then answers with one of these says so by
    ///   [`Keep::Answer`](crate::Keep::Answer).
    /// - *Whose keys they are*: each `Authorization` header's, for each route.
    pub fn stripe() -> Self {
        const IDEMPOTENCY: &str = r#"{"error":{"type":"idempotency_error","code":{code},"message":{detail}}}"#;
        const REQUEST: &str = r#"{"error":{"type":"invalid_request_error","code":{code},"message":{detail}}}"#;
        const API: &str = r#"{"error":{"type":"api_error","code":{code},"message":{detail}}}"#;
        let not_begun = [
            StatusCode::BAD_REQUEST,
            StatusCode::NOT_FOUND,
            StatusCode::CONFLICT,
            StatusCode::UNPROCESSABLE_ENTITY,
        ];
        Self::new("Stripe", move |layer| {
            let layer = layer
                .methods([Method::POST])
                .key(KeySource::header("idempotency-key"))
                .max_key_length(255)
                .optional_key()
                .retention(Duration::from_secs(24 * 60 * 60))
                .store_statuses(Statuses::default().without(not_begun))
                .replay_marker(Some((
                    HeaderName::from_static("idempotent-replayed"),
                    HeaderValue::from_static("true"),
                )))
                .rejection_format(RejectionFormat::json(API))
                .rejection_status(RejectionKind::KeyReused, StatusCode::BAD_REQUEST)
                .rejection_code(RejectionKind::InProgress, "idempotency_key_in_use");
            let of_idempotency = [RejectionKind::KeyReused, RejectionKind::InProgress];
            let layer = of_idempotency.into_iter().fold(layer, |layer, kind| {
                layer.rejection_format_of(kind, RejectionFormat::json(IDEMPOTENCY))
            });
            let of_the_request = [
                RejectionKind::KeyInvalid,
                RejectionKind::KeyMissing,
                RejectionKind::ScopeMissing,
                RejectionKind::BodyTooLarge,
                RejectionKind::BodyIncomplete,
                RejectionKind::BodyUnreadable,
            ];
            of_the_request.into_iter().fold(layer, |layer, kind| {
                layer.rejection_format_of(kind, RejectionFormat::json(REQUEST))
            })
        })
    }
}
