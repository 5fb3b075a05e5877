//! Refusals: what a client is told when its request does not run.

mod format;
mod kind;

use std::{borrow::Cow, collections::HashMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header, request::Parts};
use serde_json::Value;

pub use self::{format::RejectionFormat, kind::RejectionKind};
use crate::{grpc, hex, random};

/// Why a request was refused. Found in the extensions of every refusal, and handed to
/// [`rejections`](crate::IdempotencyLayer::rejections).
#[derive(Clone, Debug)]
pub struct Rejection {
    kind: RejectionKind,
    status: StatusCode,
    title: Cow<'static, str>,
    type_uri: Box<str>,
    detail: Option<Box<str>>,
    retry_after: Option<Duration>,
    original_status: Option<StatusCode>,
    code: Option<Cow<'static, str>>,
    debug_id: Box<str>,
}

impl Rejection {
    pub(crate) fn new(kind: RejectionKind) -> Self {
        Self {
            kind,
            status: kind.default_status(),
            title: Cow::Borrowed(kind.default_title()),
            type_uri: Box::default(),
            detail: None,
            retry_after: None,
            original_status: None,
            code: None,
            debug_id: Box::default(),
        }
    }

    pub(crate) fn with_detail(mut self, detail: String) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// In words, too: not every API's form of an error has a place for it.
    pub(crate) fn with_original_status(mut self, status: StatusCode) -> Self {
        self.original_status = Some(status);
        self.with_detail(format!(
            "the request was processed and answered with the status {}, but its response was not kept",
            status.as_u16()
        ))
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

    /// The API's name for what is wrong, as set by [`rejection_code`](crate::IdempotencyLayer::rejection_code), or else
    /// [`RejectionKind::slug`].
    pub fn code(&self) -> &str {
        self.code.as_deref().unwrap_or(self.kind.slug())
    }

    /// 32 hexadecimal digits that no other refusal has, and that stand in the log beside the reason. Empty if the
    /// operating system has no randomness to give.
    pub fn debug_id(&self) -> &str {
        &self.debug_id
    }

    fn draw_debug_id(&mut self) {
        self.debug_id = random::bytes().map_or_else(|_| Box::default(), |bytes: [u8; 16]| hex::of(&bytes).into());
    }

    fn announce_retry(&self, headers: &mut HeaderMap) {
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs()));
        }
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

pub(crate) type Hook = dyn Fn(&Rejection, &Parts) -> Response<Bytes> + Send + Sync;

/// How refusals look: every part of them is a setting.
#[derive(Clone)]
pub(crate) struct Problems {
    pub(crate) base: Cow<'static, str>,
    pub(crate) statuses: HashMap<RejectionKind, StatusCode>,
    pub(crate) titles: HashMap<RejectionKind, Cow<'static, str>>,
    pub(crate) retry_after: Duration,
    pub(crate) codes: HashMap<RejectionKind, Cow<'static, str>>,
    /// Of one kind, or of every other.
    pub(crate) formats: HashMap<Option<RejectionKind>, RejectionFormat>,
    pub(crate) headers: Vec<(RejectionKind, HeaderName, HeaderValue)>,
    pub(crate) hook: Option<Arc<Hook>>,
}

impl Default for Problems {
    fn default() -> Self {
        Self {
            base: Cow::Borrowed("https://docs.rs/tower-idempotency/latest/tower_idempotency/problems/index.html#"),
            statuses: HashMap::new(),
            titles: HashMap::new(),
            retry_after: Duration::from_secs(1),
            codes: HashMap::new(),
            formats: HashMap::new(),
            headers: Vec::new(),
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
        rejection.type_uri = format!("{}{}", self.base, kind.slug()).into();
        if kind.passes_with_time() {
            rejection.retry_after = Some(with_jitter(self.retry_after));
        }
        rejection.code = self.codes.get(&kind).cloned();
        rejection.draw_debug_id();
        let format = self.formats.get(&Some(kind)).or_else(|| self.formats.get(&None));
        let mut response = match (&self.hook, format) {
            (Some(hook), _) => hook(&rejection, parts),
            (None, _) if grpc::is_grpc(&parts.headers) => grpc::refusal(&rejection, &parts.headers),
            (None, Some(format)) => format.response(&rejection),
            (None, None) => problem_response(&rejection),
        };
        for (_, name, value) in self.headers.iter().filter(|(of, ..)| *of == kind) {
            response.headers_mut().insert(name, value.clone());
        }
        response.extensions_mut().insert(rejection);
        response
    }
}

impl fmt::Debug for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let statuses: Vec<_> = RejectionKind::ALL
            .iter()
            .filter_map(|kind| Some((kind, self.statuses.get(kind)?.as_u16())))
            .collect();
        f.debug_struct("Problems")
            .field("base", &self.base)
            .field("statuses", &statuses)
            .field("retry_after", &self.retry_after)
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
    rejection.announce_retry(headers);
    response
}

/// Between once and twice the base, in whole seconds, so that refused clients do not come back all at once.
fn with_jitter(base: Duration) -> Duration {
    let seconds = base.as_secs().max(1);
    Duration::from_secs(seconds.saturating_add(random::below(seconds.saturating_add(1))))
}
