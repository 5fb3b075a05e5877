//! What a layer was told to do: the settings, without behaviour.

use std::{fmt, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, Method, StatusCode, header, response};

use crate::{
    fingerprint::Fingerprinter,
    key::{KeyRules, KeySource},
    record::Retention,
    rejection::Problems,
    scope::ScopeSource,
};

/// What happens to an operation whose attempt was lost: the handler panicked, the process died, the lease ran out.
///
/// Nobody can know whether such an attempt had its effect. Running it again may charge a customer twice; not running it
/// may not charge at all. Which is worse depends on the operation, so it is chosen per route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Guarantee {
    /// It is never run again. Its duplicates are told that the outcome is unknown until the record expires.
    #[default]
    AtMostOnce,
    /// The next duplicate runs it again, with [`Attempt::number`](crate::Attempt::number) one higher. For handlers that
    /// are safe to repeat, for instance because they pass the key on to a service that is idempotent itself.
    AtLeastOnce,
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

type KeepStatus = dyn Fn(StatusCode) -> bool + Send + Sync;
type IsStream = dyn Fn(&response::Parts) -> bool + Send + Sync;

/// Cloned whenever a setter is called on a layer that has clones.
#[derive(Clone)]
pub(crate) struct Policy {
    pub(crate) methods: Arc<[Method]>,
    pub(crate) key: KeySource,
    pub(crate) key_rules: KeyRules,
    pub(crate) require_key: bool,
    pub(crate) scope: ScopeSource,
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
    pub(crate) store_when: Arc<KeepStatus>,
    pub(crate) stream_when: Arc<IsStream>,
    pub(crate) dropped_headers: Vec<HeaderName>,
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
            require_key: false,
            scope: ScopeSource::default(),
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
            store_when: Arc::new(executed),
            stream_when: Arc::new(is_stream),
            dropped_headers: vec![header::SET_COOKIE, header::WWW_AUTHENTICATE, header::PROXY_AUTHENTICATE],
            replay_marker: Some((
                HeaderName::from_static("idempotent-replayed"),
                HeaderValue::from_static("true"),
            )),
            replay_no_store: false,
            problems: Problems::default(),
        }
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("methods", &self.methods)
            .field("key", &self.key)
            .field("require_key", &self.require_key)
            .field("fingerprinter", &self.fingerprinter)
            .field("guarantee", &self.guarantee)
            .field("concurrent", &self.concurrent)
            .field("retention", &self.retention)
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}

/// The statuses by which a service says that it did not execute the request.
fn executed(status: StatusCode) -> bool {
    !matches!(
        status,
        StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::REQUEST_TIMEOUT
            | StatusCode::TOO_EARLY
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::SERVICE_UNAVAILABLE
    )
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

impl Policy {
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
