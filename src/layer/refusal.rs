//! Settings: what a client is told when its request does not run.

use std::{borrow::Cow, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, request};

use super::IdempotencyLayer;
use crate::rejection::{Hook, Rejection, RejectionFormat, RejectionKind};

impl IdempotencyLayer {
    /// The status of one kind of refusal. Default: [`RejectionKind::default_status`].
    #[must_use]
    pub fn rejection_status(self, kind: RejectionKind, status: StatusCode) -> Self {
        self.set(|policy| {
            policy.problems.statuses.insert(kind, status);
        })
    }

    /// The title of one kind of refusal. Default: [`RejectionKind::default_title`].
    #[must_use]
    pub fn rejection_title(self, kind: RejectionKind, title: impl Into<Cow<'static, str>>) -> Self {
        let title = title.into();
        self.set(|policy| {
            policy.problems.titles.insert(kind, title.clone());
        })
    }

    /// What the API calls one kind of refusal: [`Rejection::code`]. Default: [`RejectionKind::slug`].
    #[must_use]
    pub fn rejection_code(self, kind: RejectionKind, code: impl Into<Cow<'static, str>>) -> Self {
        let code = code.into();
        self.set(|policy| {
            policy.problems.codes.insert(kind, code.clone());
        })
    }

    /// One more field of the answers to one kind of refusal, whatever their form. Default: none but what belongs to the
    /// form.
    #[must_use]
    pub fn rejection_header(self, kind: RejectionKind, name: HeaderName, value: HeaderValue) -> Self {
        self.set(|policy| policy.problems.headers.push((kind, name.clone(), value.clone())))
    }

    /// The form of every refusal, in place of a problem document. A gRPC client still gets a status, and
    /// [`rejections`](Self::rejections) goes first. Default: problem documents.
    #[must_use]
    pub fn rejection_format(self, format: RejectionFormat) -> Self {
        self.set(|policy| {
            policy.problems.formats.insert(None, format.clone());
        })
    }

    /// The form of one kind of refusal, over that of all. Default: that of all.
    #[must_use]
    pub fn rejection_format_of(self, kind: RejectionKind, format: RejectionFormat) -> Self {
        self.set(|policy| {
            policy.problems.formats.insert(Some(kind), format.clone());
        })
    }

    /// What stands before [`RejectionKind::slug`] in a problem's `type`; it should be absolute and lead to your
    /// documentation. Default: this crate's, see [`problems`](crate::problems).
    #[must_use]
    pub fn problem_types(self, base: impl Into<Cow<'static, str>>) -> Self {
        let base = base.into();
        self.set(|policy| policy.problems.base = base.clone())
    }

    /// What `Retry-After` says where trying again can help, in whole seconds, at least one; up to as much again is
    /// added at random. Default: 1 second.
    #[must_use]
    pub fn retry_after(self, base: Duration) -> Self {
        self.set(|policy| policy.problems.retry_after = base)
    }

    /// Makes the answer to a refused request, in the form that your API's errors have. Default: a problem document
    /// (RFC 9457) with a link to its documentation, and to a gRPC client a status. For JSON,
    /// [`rejection_format`](Self::rejection_format) is shorter.
    ///
    /// ```
    /// # use bytes::Bytes;
    /// # use http::Response;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// IdempotencyLayer::new(MemoryStore::new()).rejections(|rejection, _request| {
    ///     let mut answer = Response::builder()
    ///         .status(rejection.status())
    ///         .header("content-type", "application/json");
    ///     // Only where trying again can help.
    ///     if let Some(after) = rejection.retry_after() {
    ///         answer = answer.header("retry-after", after.as_secs());
    ///     }
    ///     answer
    ///         .body(Bytes::from(format!(r#"{{"error":"{}"}}"#, rejection.kind().slug())))
    ///         .expect("a status and a content type")
    /// });
    /// ```
    #[must_use]
    pub fn rejections(
        self,
        response: impl Fn(&Rejection, &request::Parts) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        let hook: Arc<Hook> = Arc::new(response);
        self.set(|policy| policy.problems.hook = Some(Arc::clone(&hook)))
    }
}
