//! Settings: which answers are kept, for how long, and what a replay looks like.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, request, response};

use super::IdempotencyLayer;
use crate::{
    policy::{IsStream, Replay, StoreWhen},
    record::Retention,
    statuses::Statuses,
};

impl IdempotencyLayer {
    /// How long a completed operation is remembered, from its completion. After that its key is free, and **a retry
    /// runs again**: keep it longer than the slowest client retries. Called after [`route`](Self::route) it replaces
    /// the routes' spans, too. Default: 24 hours.
    /// New records only: those that exist keep theirs. Under [`Retention::Forever`] nothing is ever forgotten, an
    /// operation whose outcome is unknown included, and the store grows for good.
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

    /// Which statuses say that the operation was executed, so that the answer is kept. Default: all but 401, 403, 408,
    /// 425, 429 and 503 ([`Statuses::default`]). A handler's [`Keep`](crate::Keep) goes first.
    ///
    /// **Dangerous to narrow.** A status that this closure rejects says that *nothing happened*: the key is free, and
    /// the next request with it runs, whatever the [`Guarantee`](crate::Guarantee). A handler that charges and then
    /// answers 500 charges twice under `|status| status.is_success()`. The same holds for the defaults: answer 408,
    /// 425, 429 or 503 only before any effect, and do not pass on a 503 of a service that you have already called.
    ///
    /// A gRPC call that fails in the headers of its answer, as a unary handler's error does, counts as the HTTP status
    /// of its code, so `UNAUTHENTICATED`, `PERMISSION_DENIED`, `RESOURCE_EXHAUSTED` and `UNAVAILABLE` free the key. One
    /// that fails in trailers, as a stream of messages does, its first one included, counts as 200 and is kept: an
    /// answer that could not be encoded after an effect looks the same.
    ///
    /// A timeout layer *below* this one cuts the handler and answers for it, with 408 by default, which frees
    /// the key although the handler may have had its effect. Put it above this layer, where the handler runs on, or
    /// let it answer 504, which is kept.
    #[must_use]
    pub fn store_when(self, executed: impl Fn(StatusCode) -> bool + Send + Sync + 'static) -> Self {
        let executed = StoreWhen::Says(Arc::new(executed));
        self.set(|policy| policy.store_when = executed.clone())
    }

    /// As [`store_when`](Self::store_when), and in its place, by a set of statuses, with the same danger. Default:
    /// [`Statuses::default`].
    #[must_use]
    pub fn store_statuses(self, executed: Statuses) -> Self {
        self.set(|policy| policy.store_when = StoreWhen::In(executed.clone()))
    }

    /// Under [`Guarantee::Transactional`](crate::Guarantee::Transactional): the statuses with which what the handler
    /// wrote is committed. With another one that is kept, its writes are rolled back and its answer alone is committed,
    /// so that a declined transfer is declined once and leaves nothing behind. What is not kept is rolled back as a
    /// whole. A gRPC call that fails without a message counts as the HTTP status of its code, in headers or in trailers;
    /// one that fails after a message counts as 200, and so does one whose trailers are in its body, as gRPC-Web has them.
    /// Default: all but 4xx and 5xx.
    #[must_use]
    pub fn commit_statuses(self, committed: Statuses) -> Self {
        self.set(|policy| policy.commit_statuses = committed.clone())
    }

    /// The most bytes of an answer's body that are kept. A larger one streams through; its duplicates are told that the
    /// operation is done but its answer was not kept (409), and never run. Headers and trailers do not count. Default:
    /// 1 MiB.
    ///
    /// An answer is read to this limit or to its end before the client gets any of it, and there is **no limit of time**:
    /// one that stalls or trickles, such as that of another service which hangs, keeps its operation in progress, and
    /// its lease renewed, for as long as it lasts. So it does after the client left, and a [`Drain`](crate::Drain)
    /// waits for it. Put tower-http's `ResponseBodyTimeoutLayer` below this layer, which cuts a body that stalls, or its
    /// `ResponseBodyDeadlineLayer`, which cuts one that trickles, too. The outcome of what is cut is unknown.
    #[must_use]
    pub fn max_response_body(self, bytes: usize) -> Self {
        self.set(|policy| policy.max_response_body = bytes)
    }

    /// Which answers are streams by nature: they are passed on at once and not kept. Default: upgrades,
    /// `text/event-stream` and `multipart/x-mixed-replace`. Not lines of JSON (NDJSON) nor the streams of gRPC: name those
    /// that go on, since others are [read whole](Self::max_response_body) before anybody gets a byte.
    #[must_use]
    pub fn stream_when(self, is_stream: impl Fn(&response::Parts) -> bool + Send + Sync + 'static) -> Self {
        let is_stream: Arc<IsStream> = Arc::new(is_stream);
        self.set(|policy| policy.stream_when = Arc::clone(&is_stream))
    }

    /// One more field of answers that is not stored; the first answer still has it. Default: `Set-Cookie`,
    /// `WWW-Authenticate` and `Proxy-Authenticate`.
    ///
    /// The fields of the connection (`Connection` and what it names, `Keep-Alive`, `Proxy-*`, `TE`, `Trailer`,
    /// `Transfer-Encoding`, `Upgrade`) and `Date` are never stored.
    #[must_use]
    pub fn drop_header(self, name: HeaderName) -> Self {
        self.set(|policy| policy.dropped_headers.push(name.clone()))
    }

    /// Stores a field of answers that is [dropped](Self::drop_header) by default: every duplicate gets it. Not
    /// `Proxy-Authenticate`, nor any other field of the connection: those are never stored.
    #[must_use]
    pub fn keep_header(self, name: &HeaderName) -> Self {
        self.set(|policy| policy.dropped_headers.retain(|dropped| dropped != name))
    }

    /// The field that tells a replay from a first answer, or none. Default: `idempotent-replayed: true`.
    #[must_use]
    pub fn replay_marker(self, marker: Option<(HeaderName, HeaderValue)>) -> Self {
        self.set(|policy| policy.replay_marker = marker.clone())
    }

    /// The status of replays, in place of the first answer's: some APIs tell by a 409 that the answer is an old one. It
    /// replaces the status of kept failures, too: with a 2xx a kept 402 reads as a success. Give such a one by
    /// [`replay_as`](Self::replay_as), to successes alone.
    /// In place of [`replay_as`](Self::replay_as). Default: the first answer's.
    ///
    /// # Panics
    /// If an answer of this status has no body: 1xx, 204, 205 and 304.
    #[must_use]
    pub fn replay_status(self, status: StatusCode) -> Self {
        let has_body = !status.is_informational() && !matches!(status.as_u16(), 204 | 205 | 304);
        assert!(
            has_body,
            "an answer of status {status} has no body, so it cannot be the first one's"
        );
        self.set(|policy| policy.replay = Replay::WithStatus(status))
    }

    /// Makes what a duplicate gets out of the first answer and the duplicate's head. Trailers stay as they were; the
    /// [marker](Self::replay_marker) is added afterwards. In place of [`replay_status`](Self::replay_status). The
    /// closure runs for every replay, and what it makes is not stored; another body may need another
    /// `Content-Encoding` and `ETag` than the first answer's, which are in what the closure gets. Default: the first
    /// answer.
    #[must_use]
    pub fn replay_as(
        self,
        rewrite: impl Fn(Response<Bytes>, &request::Parts) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        let replay = Replay::Rewritten(Arc::new(rewrite));
        self.set(|policy| policy.replay = replay.clone())
    }

    /// One more field of every answer of an executed operation, the first and the replays, in place of one that the
    /// handler set; refusals, and answers that free the key, do not have it. It is not stored. Default: none.
    #[must_use]
    pub fn answer_header(self, name: HeaderName, value: HeaderValue) -> Self {
        self.set(|policy| policy.answer_headers.push((name.clone(), value.clone())))
    }

    /// The field of those same answers that has the key. A key with characters that no header can have is left out.
    /// Default: none.
    #[must_use]
    pub fn echo_key(self, name: HeaderName) -> Self {
        self.set(|policy| policy.echo_key = Some(name.clone()))
    }

    /// Adds `Cache-Control: no-store` to replays, in place of what was stored. Default: replayed as first answered.
    #[must_use]
    pub fn replay_no_store(self) -> Self {
        self.set(|policy| policy.replay_no_store = true)
    }
}
