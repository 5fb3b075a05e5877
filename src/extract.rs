//! What a handler can know about its own request.

use std::fmt;

use crate::{key::IdempotencyKey, record::RecordId};

/// The attempt that a handler is running, in the extensions of every request that runs under a lease, and an extractor
/// for axum handlers.
///
/// `Option<Attempt>` is for routes where the key is optional; without one, `Attempt` alone fails with a 500.
///
/// To the services that the handler calls, pass [`id`](Self::id) on, so that they can tell a repeated attempt from a
/// new operation, with a label if there is more than one call. Not the client's key: two tenants may use the same one.
///
/// ```
/// # use tower_idempotency::Attempt;
/// async fn pay(attempt: Attempt) -> String {
///     let charge_key = format!("{}-charge", attempt.id().to_hex());
///     format!("attempt {} charges under {charge_key}", attempt.number())
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Attempt {
    id: RecordId,
    key: IdempotencyKey,
    fence: u64,
}

impl Attempt {
    pub(crate) fn new(id: RecordId, key: IdempotencyKey, fence: u64) -> Self {
        Self { id, key, fence }
    }

    /// The operation, told from every other one: a hash over tenant, operation and key.
    pub fn id(&self) -> RecordId {
        self.id
    }

    /// The key that the client sent.
    pub fn key(&self) -> &IdempotencyKey {
        &self.key
    }

    /// 1 for the first attempt, and one more each time that a lost one is taken over
    /// ([`AtLeastOnce`](crate::Guarantee::AtLeastOnce)).
    pub fn number(&self) -> u64 {
        self.fence
    }

    /// A token that rises with every attempt at this operation, for as long as its record is kept: a resource that
    /// remembers the highest one it saw can turn away an attempt that was thought to be dead. Equal to the
    /// [number](Self::number).
    pub fn fence(&self) -> u64 {
        self.fence
    }
}

/// A handler asked for an [`Attempt`] or an [`IdempotencyKey`] and there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingAttempt(());

impl fmt::Display for MissingAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "no idempotency attempt: the route is outside of every `IdempotencyLayer`, or the request had no key. Use \
             `.require_key()`, or extract an `Option`",
        )
    }
}

impl std::error::Error for MissingAttempt {}

#[cfg(feature = "axum")]
mod axum_extractors {
    use std::convert::Infallible;

    use axum::{
        extract::{FromRequestParts, OptionalFromRequestParts},
        http::{StatusCode, request::Parts},
        response::{IntoResponse, Response},
    };

    use super::{Attempt, IdempotencyKey, MissingAttempt};

    impl IntoResponse for MissingAttempt {
        /// A 500: the server was put together wrong, by leaving out the layer or `.require_key()`.
        fn into_response(self) -> Response {
            tracing::error!("{self}");
            (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
        }
    }

    impl<S: Send + Sync> FromRequestParts<S> for Attempt {
        type Rejection = MissingAttempt;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, MissingAttempt> {
            parts.extensions.get().cloned().ok_or(MissingAttempt(()))
        }
    }

    impl<S: Send + Sync> OptionalFromRequestParts<S> for Attempt {
        type Rejection = Infallible;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Infallible> {
            Ok(parts.extensions.get().cloned())
        }
    }

    impl<S: Send + Sync> FromRequestParts<S> for IdempotencyKey {
        type Rejection = MissingAttempt;

        async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, MissingAttempt> {
            let attempt = <Attempt as FromRequestParts<S>>::from_request_parts(parts, state).await?;
            Ok(attempt.key)
        }
    }

    impl<S: Send + Sync> OptionalFromRequestParts<S> for IdempotencyKey {
        type Rejection = Infallible;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Infallible> {
            Ok(parts.extensions.get().map(|attempt: &Attempt| attempt.key.clone()))
        }
    }
}
