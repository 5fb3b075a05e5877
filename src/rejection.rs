//! Refusals: what a client is told when its request does not run.

use std::{borrow::Cow, collections::HashMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header, request::Parts};
use serde_json::Value;

use crate::{grpc, random};

/// Which rule a refused request met. Each kind is one problem type, described in [`problems`](crate::problems).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RejectionKind {
    /// The operation requires a key and none was sent.
    KeyMissing,
    /// The key that was sent is unusable.
    KeyInvalid,
    /// The scope closure did not find the tenant that the key belongs to.
    ScopeMissing,
    /// The request body is over the limit.
    BodyTooLarge,
    /// The request body broke off.
    BodyIncomplete,
    /// The key was used for a different request.
    KeyReused,
    /// The first request with this key is still running.
    InProgress,
    /// The first request ended without a known outcome.
    OutcomeUnknown,
    /// The operation is done, but its answer was too large to keep or a stream.
    ResponseNotKept,
    /// The store cannot be reached.
    StoreUnavailable,
    /// The store has no room for another key.
    StoreFull,
    /// The stored record cannot be read.
    RecordUnreadable,
    /// The stored record was written by a newer version of the software.
    RecordFromNewerVersion,
}

impl RejectionKind {
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
        }
    }

    /// Whether the same request may succeed when it is sent again a little later.
    fn passes_with_time(self) -> bool {
        matches!(
            self,
            Self::InProgress | Self::StoreUnavailable | Self::StoreFull | Self::RecordFromNewerVersion
        )
    }
}

/// Why a request was refused. Found in the extensions of every refusal, and handed to
/// [`rejections`](crate::IdempotencyLayer::rejections).
#[derive(Clone, Debug)]
pub struct Rejection {
    kind: RejectionKind,
    status: StatusCode,
    title: Cow<'static, str>,
    type_uri: String,
    detail: Option<String>,
    retry_after: Option<Duration>,
    original_status: Option<StatusCode>,
}

impl Rejection {
    pub(crate) fn new(kind: RejectionKind) -> Self {
        Self {
            kind,
            status: kind.default_status(),
            title: Cow::Borrowed(kind.default_title()),
            type_uri: String::new(),
            detail: None,
            retry_after: None,
            original_status: None,
        }
    }

    pub(crate) fn with_detail(mut self, detail: String) -> Self {
        self.detail = Some(detail);
        self
    }

    pub(crate) fn with_original_status(mut self, status: StatusCode) -> Self {
        self.original_status = Some(status);
        self
    }

    /// Which rule refused the request.
    pub fn kind(&self) -> RejectionKind {
        self.kind
    }

    /// The status of the answer.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The problem's `title`: the same for every refusal of its kind.
    pub fn title(&self) -> &str {
        &self.title
    }

    /// The problem's absolute `type` URI, which leads to documentation.
    pub fn type_uri(&self) -> &str {
        &self.type_uri
    }

    /// What was wrong with this request in particular. Never contains the key.
    pub fn detail(&self) -> Option<&str> {
        self.detail.as_deref()
    }

    /// When to try again, in whole seconds, where trying again can help.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// For [`RejectionKind::ResponseNotKept`]: the status that the first request was answered with.
    pub fn original_status(&self) -> Option<StatusCode> {
        self.original_status
    }

    /// The refusal as `application/problem+json` (RFC 9457).
    pub fn problem_document(&self) -> Bytes {
        let text = |text: &str| Value::from(text).to_string();
        let mut problem = format!(
            r#"{{"type":{},"title":{},"status":{}"#,
            text(&self.type_uri),
            text(&self.title),
            self.status.as_u16()
        );
        if let Some(detail) = &self.detail {
            problem += &format!(r#","detail":{}"#, text(detail));
        }
        if let Some(status) = self.original_status {
            problem += &format!(r#","original_status":{}"#, status.as_u16());
        }
        problem.push('}');
        Bytes::from(problem)
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.title)?;
        match &self.detail {
            Some(detail) => write!(f, ": {detail}"),
            None => Ok(()),
        }
    }
}

type Hook = dyn Fn(&Rejection, &Parts) -> Response<Bytes> + Send + Sync;

/// How refusals look: every part of them is a setting.
#[derive(Clone)]
pub(crate) struct Problems {
    pub(crate) base: Cow<'static, str>,
    pub(crate) statuses: HashMap<RejectionKind, StatusCode>,
    pub(crate) titles: HashMap<RejectionKind, Cow<'static, str>>,
    pub(crate) retry_after: Duration,
    pub(crate) hook: Option<Arc<Hook>>,
}

impl Default for Problems {
    fn default() -> Self {
        Self {
            base: Cow::Borrowed("https://docs.rs/tower-idempotency/latest/tower_idempotency/problems/index.html#"),
            statuses: HashMap::new(),
            titles: HashMap::new(),
            retry_after: Duration::from_secs(1),
            hook: None,
        }
    }
}

impl Problems {
    /// The answer to a refused request; the reason stays with it as an extension.
    pub(crate) fn respond(&self, mut rejection: Rejection, parts: &Parts) -> Response<Bytes> {
        let kind = rejection.kind;
        if let Some(status) = self.statuses.get(&kind) {
            rejection.status = *status;
        }
        if let Some(title) = self.titles.get(&kind) {
            rejection.title = title.clone();
        }
        rejection.type_uri = format!("{}{}", self.base, kind.slug());
        if kind.passes_with_time() {
            rejection.retry_after = Some(with_jitter(self.retry_after));
        }
        let mut response = match &self.hook {
            Some(hook) => hook(&rejection, parts),
            None if grpc::is_grpc(&parts.headers) => grpc::refusal(&rejection, &parts.headers),
            None => problem_response(&rejection),
        };
        response.extensions_mut().insert(rejection);
        response
    }
}

impl fmt::Debug for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Problems")
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

fn problem_response(rejection: &Rejection) -> Response<Bytes> {
    let mut response = Response::new(rejection.problem_document());
    *response.status_mut() = rejection.status;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/problem+json"),
    );
    let link = format!("<{}>; rel=\"describedby\"; type=\"text/html\"", rejection.type_uri);
    // A base that cannot stand in a header is the only way to fail; the document itself still names the type.
    if let Ok(link) = HeaderValue::try_from(link) {
        headers.insert(header::LINK, link);
    }
    if let Some(after) = rejection.retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs()));
    }
    response
}

/// Between once and twice the base, in whole seconds, so that refused clients do not come back all at once.
fn with_jitter(base: Duration) -> Duration {
    let seconds = base.as_secs().max(1);
    Duration::from_secs(seconds.saturating_add(random::below(seconds.saturating_add(1))))
}
