//! What a handler says about its own answer.

use crate::record::Retention;

/// A handler's word on what is kept of its answer, over the layer's settings. It goes into the extensions of the
/// response; for axum it can stand in front of it:
///
/// ```
/// # use axum::{http::StatusCode, response::IntoResponse};
/// # use tower_idempotency::Keep;
/// async fn pay() -> impl IntoResponse {
///     // Declined, and no money moved: the same key may be tried again.
///     (StatusCode::PAYMENT_REQUIRED, Keep::Nothing, "insufficient funds")
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Keep {
    /// The operation was executed: the answer is kept whatever its status, for as long as the layer says. What is too
    /// large, or a stream by nature, is still not kept.
    Answer,
    /// As [`Answer`](Self::Answer), for this long. A time of zero is none: the key is free at once.
    AnswerFor(Retention),
    /// The operation was executed, but its answer is not for a store (it holds a secret, say): duplicates are told
    /// that it is done (409) and do not run.
    OnlyTheFact,
    /// **Nothing happened**: the key is free and the next request with it runs, whatever the status and the
    /// [`Guarantee`](crate::Guarantee). After an effect this is a double charge. Where an earlier attempt was lost the
    /// key is free for the same request alone: that one may have had its effect.
    Nothing,
}

#[cfg(feature = "axum")]
impl axum::response::IntoResponseParts for Keep {
    type Error = std::convert::Infallible;

    fn into_response_parts(
        self,
        mut response: axum::response::ResponseParts,
    ) -> Result<axum::response::ResponseParts, Self::Error> {
        response.extensions_mut().insert(self);
        Ok(response)
    }
}

#[cfg(feature = "axum")]
impl axum::response::IntoResponse for Keep {
    fn into_response(self) -> axum::response::Response {
        (self, ()).into_response()
    }
}
