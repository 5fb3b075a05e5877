//! What a layer was told to do: the settings, without behaviour.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header, request, response};

use crate::{
    fingerprint::Fingerprinter,
    first_sent::FirstSent,
    key::{IdempotencyKey, KeyRules, KeySource},
    record::Retention,
    rejection::Problems,
    scope::ScopeRules,
    statuses::Statuses,
};

/// What happens to an operation whose attempt was lost: the handler panicked, the process died, the lease ran out.
///
/// Nobody can know whether such an attempt had its effect. Running it again may charge a customer twice; not running it
/// may not charge at all. Which is worse depends on the operation, so it is chosen per route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Guarantee {
    /// It is not run again while its record is kept: its duplicates are told that the outcome is unknown. Once the
    /// record has [expired](crate::IdempotencyLayer::retention), the same key is a new operation.
    #[default]
    AtMostOnce,
    /// The next duplicate runs it again, with [`Attempt::number`](crate::Attempt::number) one higher. For handlers that
    /// are safe to repeat, for instance because they pass the key on to a service that is idempotent itself.
    AtLeastOnce,
    /// Exactly once: the handler writes in a transaction of the layer's, in which its answer is kept, too, so that both
    /// are committed or neither. A lost attempt was rolled back, and the next duplicate runs it. Only with a store that
    /// has transactions (`PostgresStore`), and only for what the handler writes in this transaction: a call to another
    /// service is not undone.
    Transactional,
}

/// What a duplicate gets while the first request is still running.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Concurrent {
    /// A conflict at once, with `Retry-After`.
    #[default]
    Refuse,
    /// The first one's answer as soon as it is there, or a conflict after this long.
    Wait(Duration),
}

/// What happens to a request that carries no key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WithoutKey {
    /// It passes, unprotected.
    #[default]
    Pass,
    /// It is refused (400).
    Refuse,
    /// Its fingerprint takes the place of a key: an equal request of the same scope within the retention is a duplicate
    /// and gets the first one's answer. **Two equal operations that are both meant cannot be told apart then.**
    ///
    /// Under [`Fingerprinter::none`], which makes all requests equal, [`Fingerprinter::whole_request`] is taken. With
    /// another [`fingerprint`](crate::IdempotencyLayer::fingerprint) the same request has another key: what was begun
    /// before a deploy that changes it is not found by its retry, which **runs again**.
    DeriveAndReplay,
    /// As [`DeriveAndReplay`](Self::DeriveAndReplay), but a duplicate is told that it is one
    /// ([`DuplicateRequest`](crate::RejectionKind::DuplicateRequest), 409) in place of the first one's answer.
    DeriveAndRefuse,
}

impl WithoutKey {
    pub(crate) fn derives(self) -> bool {
        matches!(self, Self::DeriveAndReplay | Self::DeriveAndRefuse)
    }
}

/// What is sent in place of a stored answer.
type Rewrite = dyn Fn(Response<Bytes>, &request::Parts) -> Response<Bytes> + Send + Sync;

/// What a replay looks like.
#[derive(Clone, Default)]
pub(crate) enum Replay {
    #[default]
    AsFirst,
    WithStatus(StatusCode),
    Rewritten(Arc<Rewrite>),
}

impl Replay {
    /// The status and body to send; the headers are changed in place.
    pub(crate) fn rewrite(
        &self,
        status: StatusCode,
        headers: &mut HeaderMap,
        body: Bytes,
        duplicate: &request::Parts,
    ) -> (StatusCode, Bytes) {
        let length = body.len();
        let (status, body) = match self {
            Self::AsFirst => return (status, body),
            Self::WithStatus(status) => (*status, body),
            Self::Rewritten(rewrite) => {
                let mut first = Response::new(body);
                *first.status_mut() = status;
                *first.headers_mut() = std::mem::take(headers);
                let (parts, body) = rewrite(first, duplicate).into_parts();
                *headers = parts.headers;
                (parts.status, body)
            }
        };
        // What the first answer announced is not the length of another body, nor of one that it left out and this one
        // may not.
        let may_leave_it_out = duplicate.method == Method::HEAD || status == StatusCode::NOT_MODIFIED;
        let announced = headers.get(header::CONTENT_LENGTH);
        if (length != body.len() || !may_leave_it_out)
            && announced.is_some_and(|announced| *announced != body.len().to_string())
        {
            headers.remove(header::CONTENT_LENGTH);
        }
        (status, body)
    }
}

type KeepStatus = dyn Fn(StatusCode) -> bool + Send + Sync;
pub(crate) type IsStream = dyn Fn(&response::Parts) -> bool + Send + Sync;

/// The statuses by which a service says that it executed the request.
#[derive(Clone)]
pub(crate) enum StoreWhen {
    In(Statuses),
    Says(Arc<KeepStatus>),
}

impl StoreWhen {
    pub(crate) fn holds(&self, status: StatusCode) -> bool {
        match self {
            Self::In(statuses) => statuses.contains(status),
            Self::Says(executed) => executed(status),
        }
    }
}

/// Cloned whenever a setter is called on a layer that has clones.
#[derive(Clone)]
pub(crate) struct Policy {
    pub(crate) methods: Arc<[Method]>,
    pub(crate) key: KeySource,
    pub(crate) key_rules: KeyRules,
    pub(crate) without_key: WithoutKey,
    pub(crate) first_sent: Option<FirstSent>,
    pub(crate) scope: ScopeRules,
    pub(crate) fingerprinter: Fingerprinter,
    pub(crate) guarantee: Guarantee,
    pub(crate) concurrent: Concurrent,
    pub(crate) max_waiters: usize,
    pub(crate) retention: Retention,
    pub(crate) lease: Duration,
    pub(crate) store_timeout: Duration,
    pub(crate) run_without_store: bool,
    pub(crate) max_request_body: usize,
    pub(crate) max_response_body: usize,
    pub(crate) store_when: StoreWhen,
    /// Those with which the writes of a transaction are committed, of those that are kept.
    pub(crate) commit_statuses: Statuses,
    pub(crate) stream_when: Arc<IsStream>,
    pub(crate) dropped_headers: Vec<HeaderName>,
    pub(crate) replay: Replay,
    /// Fields of every answer of an executed operation, the first and the replays.
    pub(crate) answer_headers: Vec<(HeaderName, HeaderValue)>,
    /// The field of those answers that has the key.
    pub(crate) echo_key: Option<HeaderName>,
    pub(crate) replay_marker: Option<(HeaderName, HeaderValue)>,
    pub(crate) replay_no_store: bool,
    pub(crate) problems: Problems,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            methods: Arc::new([Method::POST, Method::PATCH]),
            key: KeySource::default(),
            key_rules: KeyRules::default(),
            without_key: WithoutKey::default(),
            first_sent: None,
            scope: ScopeRules::default(),
            fingerprinter: Fingerprinter::default(),
            guarantee: Guarantee::default(),
            concurrent: Concurrent::default(),
            max_waiters: 128,
            retention: Retention::For(Duration::from_secs(24 * 60 * 60)),
            lease: Duration::from_secs(60),
            store_timeout: Duration::from_secs(3),
            run_without_store: false,
            max_request_body: 1 << 20,
            max_response_body: 1 << 20,
            store_when: StoreWhen::In(Statuses::default()),
            commit_statuses: Statuses::all().without_class(4).without_class(5),
            stream_when: Arc::new(is_stream),
            dropped_headers: vec![header::SET_COOKIE, header::WWW_AUTHENTICATE, header::PROXY_AUTHENTICATE],
            replay: Replay::default(),
            answer_headers: Vec::new(),
            echo_key: None,
            replay_marker: Some((
                HeaderName::from_static("idempotent-replayed"),
                HeaderValue::from_static("true"),
            )),
            replay_no_store: false,
            problems: Problems::default(),
        }
    }
}

/// Values are left out of `Debug`: nobody knows what is in them.
fn names(fields: &[(HeaderName, HeaderValue)]) -> Vec<&HeaderName> {
    fields.iter().map(|(name, _)| name).collect()
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("methods", &self.methods)
            .field("key", &self.key)
            .field("key_rules", &self.key_rules)
            .field("without_key", &self.without_key)
            .field("first_sent", &self.first_sent)
            .field("scope", &self.scope)
            .field("fingerprinter", &self.fingerprinter)
            .field("guarantee", &self.guarantee)
            .field("concurrent", &self.concurrent)
            .field("max_waiters", &self.max_waiters)
            .field("retention", &self.retention)
            .field("lease", &self.lease)
            .field("store_timeout", &self.store_timeout)
            .field("run_without_store", &self.run_without_store)
            .field("max_request_body", &self.max_request_body)
            .field("max_response_body", &self.max_response_body)
            .field("store_when", &self.store_when)
            .field("commit_statuses", &self.commit_statuses)
            .field("dropped_headers", &self.dropped_headers)
            .field("replay", &self.replay)
            .field("answer_headers", &names(&self.answer_headers))
            .field("echo_key", &self.echo_key)
            .field("replay_marker", &self.replay_marker.as_ref().map(|(name, _)| name))
            .field("replay_no_store", &self.replay_no_store)
            .field("problems", &self.problems)
            .finish_non_exhaustive()
    }
}

/// Upgrades, event streams and multipart streams that replace their parts: bodies that have no end to wait for.
fn is_stream(response: &response::Parts) -> bool {
    let content_type = response.headers.get(header::CONTENT_TYPE);
    let is = |name: &str| {
        content_type.is_some_and(|value| {
            let value = value.as_bytes();
            value.len() >= name.len() && value[..name.len()].eq_ignore_ascii_case(name.as_bytes())
        })
    };
    response.status == StatusCode::SWITCHING_PROTOCOLS || is("text/event-stream") || is("multipart/x-mixed-replace")
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AsFirst => f.write_str("AsFirst"),
            Self::WithStatus(status) => write!(f, "WithStatus({})", status.as_u16()),
            Self::Rewritten(_) => f.write_str("Rewritten(..)"),
        }
    }
}

impl fmt::Debug for StoreWhen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In(statuses) => statuses.fmt(f),
            Self::Says(_) => f.write_str("(..)"),
        }
    }
}

impl Policy {
    /// How long a completed operation is remembered, unless its handler says otherwise.
    pub(crate) fn kept_for(&self) -> Retention {
        match &self.first_sent {
            None => self.retention,
            Some(first_sent) => first_sent.retention(self.retention),
        }
    }

    /// Whether [`mark`](Self::mark) does anything.
    pub(crate) fn marks_answers(&self) -> bool {
        !self.answer_headers.is_empty() || self.echo_key.is_some()
    }

    /// Puts the fields on an answer that every answer of an executed operation has.
    pub(crate) fn mark(&self, key: &IdempotencyKey, headers: &mut HeaderMap) {
        for (name, value) in &self.answer_headers {
            headers.insert(name, value.clone());
        }
        if let Some(name) = &self.echo_key {
            // A key of a body may have characters that no header can have.
            if let Ok(value) = HeaderValue::from_str(key.as_str()) {
                headers.insert(name, value);
            }
        }
    }

    /// Whether a field of an answer may be stored. `connection` are the answer's `Connection` values.
    pub(crate) fn keeps_header(&self, name: &HeaderName, connection: &[HeaderName]) -> bool {
        let is_of_the_connection = matches!(
            *name,
            header::CONNECTION
                | header::TE
                | header::TRAILER
                | header::TRANSFER_ENCODING
                | header::UPGRADE
                | header::DATE
        ) || name == "keep-alive"
            || name.as_str().starts_with("proxy-");
        !is_of_the_connection && !connection.contains(name) && !self.dropped_headers.contains(name)
    }
}

/// The fields that `Connection` names: they are of this connection only.
pub(crate) fn named_by_connection(headers: &http::HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(header::CONNECTION).iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect()
}
