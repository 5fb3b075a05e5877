//! The layer and its settings.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, request, response};
use tower_layer::Layer;

use crate::{
    drain::Drain,
    fingerprint::Fingerprinter,
    key::{KeyFormat, KeySource},
    observe::Counters,
    policy::{Concurrent, Guarantee, Policy},
    record::Retention,
    rejection::{Rejection, RejectionKind},
    scope::{Scope, ScopeSource},
    service::Idempotency,
    shared::Shared,
    store::{AnyStore, Store},
};

/// Makes the service below it safe to retry: see the [crate's documentation](crate).
///
/// Every setter says its default, which is right for money. Clones share the store; a setter called on a clone changes
/// that clone alone, so routes can differ. Put one of them on each route: where two cover a request the outer one
/// decides, and the inner one does nothing.
///
/// ```
/// # use std::time::Duration;
/// # use axum::{Router, routing::post};
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Guarantee};
/// let idempotency = IdempotencyLayer::new(MemoryStore::new()).require_key();
/// let app: Router = Router::new()
///     .route("/payments", post(async || "paid").layer(idempotency.clone()))
///     .route("/reports", post(async || "made").layer(
///         idempotency.clone()
///             .guarantee(Guarantee::AtLeastOnce)
///             .retention(Duration::from_secs(5 * 60)),
///     ));
/// ```
#[derive(Clone)]
pub struct IdempotencyLayer {
    shared: Arc<Shared>,
}

impl IdempotencyLayer {
    /// A layer with the default settings over `store`.
    pub fn new(store: impl Store) -> Self {
        Self {
            shared: Arc::new(Shared::new(AnyStore::new(store).into_inner())),
        }
    }

    fn set(mut self, change: impl FnOnce(&mut Policy)) -> Self {
        change(&mut Arc::make_mut(&mut self.shared).policy);
        self
    }

    /// The methods that are protected; requests with any other pass. Default: `POST` and `PATCH`.
    #[must_use]
    pub fn methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        let methods = methods.into_iter().collect();
        self.set(|policy| policy.methods = methods)
    }

    /// Where the key is found. Default: the header `Idempotency-Key`.
    #[must_use]
    pub fn key(self, source: KeySource) -> Self {
        self.set(|policy| policy.key = source)
    }

    /// Refuses a request without a key (400). Default: it passes, unprotected.
    #[must_use]
    pub fn require_key(self) -> Self {
        self.set(|policy| policy.require_key = true)
    }

    /// Lets a request without a key pass, unprotected. This is the default.
    #[must_use]
    pub fn optional_key(self) -> Self {
        self.set(|policy| policy.require_key = false)
    }

    /// How a key header is read. Default: [`KeyFormat::Lenient`], quoted or bare.
    #[must_use]
    pub fn key_format(self, format: KeyFormat) -> Self {
        self.set(|policy| policy.key_rules.format = format)
    }

    /// The most characters of a key. Default: 255.
    ///
    /// # Panics
    /// If `characters` is 0.
    #[must_use]
    pub fn max_key_length(self, characters: usize) -> Self {
        assert!(characters > 0, "no key is that short");
        self.set(|policy| policy.key_rules.max_length = characters)
    }

    /// Which keys are taken: the closure gets the characters and answers with the rule that they break, which the
    /// client is told. Default: visible ASCII characters.
    #[must_use]
    pub fn key_rule(self, rule: impl Fn(&str) -> Result<(), &'static str> + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.key_rules.rule = Arc::new(rule))
    }

    /// Whom a key belongs to; the closure gives a [`Scope`] or an `Option<Scope>`. Where it finds none the request is
    /// refused (400): a key that belongs to nobody would belong to everybody.
    ///
    /// Default: the `Authorization` header and the matched route, or the path where no route was matched (a plain tower
    /// service, tonic, the layer around a whole `Router`). The method is in the fingerprint, not in the scope. That
    /// keeps tenants apart who authenticate by this header, but a retry under a refreshed token is a new operation
    /// then, and callers who send none (they use cookies, or another header) share one scope. Prefer the account's id:
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// # #[derive(Clone)] struct Account { id: String }
    /// IdempotencyLayer::new(MemoryStore::new())
    ///     .scope(|parts| parts.extensions.get::<Account>().map(|account| Scope::tenant(&account.id)));
    /// ```
    #[must_use]
    pub fn scope<R>(self, scope: impl Fn(&request::Parts) -> R + Send + Sync + 'static) -> Self
    where
        R: Into<Option<Scope>>,
    {
        let scope = ScopeSource::Parts(Arc::new(move |parts| scope(parts).into()));
        self.set(|policy| policy.scope = scope)
    }

    /// What makes two requests with one key the same. Default: [`Fingerprinter::whole_request`].
    #[must_use]
    pub fn fingerprint(self, fingerprinter: Fingerprinter) -> Self {
        self.set(|policy| policy.fingerprinter = fingerprinter)
    }

    /// What happens to an operation whose attempt was lost. Default: [`Guarantee::AtMostOnce`].
    ///
    /// Under [`Guarantee::AtLeastOnce`] a key is not free for another request once an attempt was lost, even if the
    /// next attempt says that it did not execute: the lost one may have had its effect.
    #[must_use]
    pub fn guarantee(self, guarantee: Guarantee) -> Self {
        self.set(|policy| policy.guarantee = guarantee)
    }

    /// What a duplicate gets while the first request runs. Default: [`Concurrent::Refuse`], a conflict (409).
    #[must_use]
    pub fn on_concurrent(self, concurrent: Concurrent) -> Self {
        self.set(|policy| policy.concurrent = concurrent)
    }

    /// How many requests may wait for one key in this process; one more is refused (409). Default: 128.
    #[must_use]
    pub fn max_waiters(self, requests: usize) -> Self {
        self.set(|policy| policy.max_waiters = requests)
    }

    /// How long a completed operation is remembered, from its completion. After that its key is free, and **a retry
    /// runs again**: keep it longer than the slowest client retries. Default: 24 hours.
    /// New records only: those that exist keep theirs.
    ///
    /// # Panics
    /// If `retention` is zero.
    #[must_use]
    pub fn retention(self, retention: impl Into<Retention>) -> Self {
        let retention = retention.into();
        assert!(
            retention != Retention::For(Duration::ZERO),
            "an answer that is kept for no time protects nothing"
        );
        self.set(|policy| policy.retention = retention)
    }

    /// How long an attempt may go without a sign of life before it counts as lost. While the handler runs it is renewed
    /// three times as often, so this is not a limit for handlers. Default: 60 seconds.
    ///
    /// # Panics
    /// If `lease` is zero.
    #[must_use]
    pub fn lease(self, lease: Duration) -> Self {
        assert!(!lease.is_zero(), "a lease of no time is lost when it is granted");
        self.set(|policy| policy.lease = lease)
    }

    /// How long one call to the store may take; a claim is tried twice. Default: 3 seconds.
    ///
    /// # Panics
    /// If `limit` is zero.
    #[must_use]
    pub fn store_timeout(self, limit: Duration) -> Self {
        assert!(!limit.is_zero(), "no store answers in no time");
        self.set(|policy| policy.store_timeout = limit)
    }

    /// **Dangerous.** Runs requests without protection while the store cannot be reached: duplicates run too. They are
    /// counted in [`Counters::unprotected`]. Default: such requests are refused (503) and do not run.
    #[must_use]
    pub fn dangerously_run_without_store(self) -> Self {
        self.set(|policy| policy.run_without_store = true)
    }

    /// The most bytes of a request body; larger ones are refused (413), by their `Content-Length` before a byte is
    /// read. Only requests with a key are buffered and limited. Default: 1 MiB.
    ///
    /// axum's extractors have a limit of their own, 2 MB (`DefaultBodyLimit`).
    #[must_use]
    pub fn max_request_body(self, bytes: usize) -> Self {
        self.set(|policy| policy.max_request_body = bytes)
    }

    /// The most bytes of an answer's body that are kept. A larger one streams through; its duplicates are told that the
    /// operation is done but its answer was not kept (409), and never run. Default: 1 MiB.
    #[must_use]
    pub fn max_response_body(self, bytes: usize) -> Self {
        self.set(|policy| policy.max_response_body = bytes)
    }

    /// Which statuses say that the operation was executed, so that the answer is kept. Default: all but 401, 403, 408,
    /// 425, 429 and 503.
    ///
    /// **Dangerous to narrow.** A status that this closure rejects says that *nothing happened*: the key is free, and
    /// the next request with it runs, whatever the [`Guarantee`]. A handler that charges and then answers 500 charges
    /// twice under `|status| status.is_success()`. The same holds for the defaults: answer 408, 425, 429 or 503 only
    /// before any effect, and do not pass on a 503 of a service that you have already called.
    ///
    /// A gRPC call that fails without a message counts as the HTTP status of its code, so `UNAUTHENTICATED`,
    /// `PERMISSION_DENIED`, `RESOURCE_EXHAUSTED` and `UNAVAILABLE` free the key.
    ///
    /// A timeout layer *below* this one cuts the handler and answers for it, with 408 by default, which frees
    /// the key although the handler may have had its effect. Put it above this layer, where the handler runs on, or
    /// let it answer 504, which is kept.
    #[must_use]
    pub fn store_when(self, executed: impl Fn(StatusCode) -> bool + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.store_when = Arc::new(executed))
    }

    /// Which answers are streams by nature: they are passed on at once and not kept. Default: upgrades,
    /// `text/event-stream` and `multipart/x-mixed-replace`.
    #[must_use]
    pub fn stream_when(self, is_stream: impl Fn(&response::Parts) -> bool + Send + Sync + 'static) -> Self {
        self.set(|policy| policy.stream_when = Arc::new(is_stream))
    }

    /// One more field of answers that is not stored; the first answer still has it. Default: `Set-Cookie`,
    /// `WWW-Authenticate` and `Proxy-Authenticate`.
    ///
    /// The fields of the connection (`Connection` and what it names, `Keep-Alive`, `Proxy-*`, `TE`, `Trailer`,
    /// `Transfer-Encoding`, `Upgrade`) and `Date` are never stored.
    #[must_use]
    pub fn drop_header(self, name: HeaderName) -> Self {
        self.set(|policy| policy.dropped_headers.push(name))
    }

    /// Stores a field of answers that is [dropped](Self::drop_header) by default: every duplicate gets it.
    #[must_use]
    pub fn keep_header(self, name: &HeaderName) -> Self {
        self.set(|policy| policy.dropped_headers.retain(|dropped| dropped != name))
    }

    /// The field that tells a replay from a first answer, or none. Default: `idempotent-replayed: true`.
    #[must_use]
    pub fn replay_marker(self, marker: Option<(HeaderName, HeaderValue)>) -> Self {
        self.set(|policy| policy.replay_marker = marker)
    }

    /// Adds `Cache-Control: no-store` to replays, in place of what was stored. Default: replayed as first answered.
    #[must_use]
    pub fn replay_no_store(self) -> Self {
        self.set(|policy| policy.replay_no_store = true)
    }

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
            policy.problems.titles.insert(kind, title);
        })
    }

    /// What stands before [`RejectionKind::slug`] in a problem's `type`; it should be absolute and lead to your
    /// documentation. Default: this crate's, see [`problems`](crate::problems).
    #[must_use]
    pub fn problem_types(self, base: impl Into<Cow<'static, str>>) -> Self {
        let base = base.into();
        self.set(|policy| policy.problems.base = base)
    }

    /// What `Retry-After` says where trying again can help, in whole seconds, at least one; up to as much again is
    /// added at random. Default: 1 second.
    #[must_use]
    pub fn retry_after(self, base: Duration) -> Self {
        self.set(|policy| policy.problems.retry_after = base)
    }

    /// Makes the answer to a refused request, in the form that your API's errors have. Default: a problem document
    /// (RFC 9457) with a link to its documentation, and to a gRPC client a status.
    ///
    /// ```
    /// # use bytes::Bytes;
    /// # use http::Response;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// IdempotencyLayer::new(MemoryStore::new()).rejections(|rejection, _request| {
    ///     let after = rejection.retry_after().map_or(0, |after| after.as_secs());
    ///     Response::builder()
    ///         .status(rejection.status())
    ///         .header("content-type", "application/json")
    ///         .header("retry-after", after)
    ///         .body(Bytes::from(format!(r#"{{"error":"{}"}}"#, rejection.kind().slug())))
    ///         .expect("a status and a content type")
    /// });
    /// ```
    #[must_use]
    pub fn rejections(
        self,
        response: impl Fn(&Rejection, &request::Parts) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        self.set(|policy| policy.problems.hook = Some(Arc::new(response)))
    }

    /// Waits, at shutdown, for requests whose clients left before they were answered.
    pub fn drain(&self) -> Drain {
        Drain::new(Arc::clone(&self.shared.tasks))
    }

    /// What this layer and its clones have done so far.
    pub fn counters(&self) -> Counters {
        self.shared.tally.snapshot()
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = Idempotency<S>;

    fn layer(&self, inner: S) -> Idempotency<S> {
        Idempotency::new(inner, Arc::clone(&self.shared))
    }
}

impl fmt::Debug for IdempotencyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyLayer")
            .field("policy", &self.shared.policy)
            .finish_non_exhaustive()
    }
}
