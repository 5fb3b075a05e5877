//! The story of a request with a key:
//!
//! key → scope → fingerprint → begin → decide → run | replay | refuse → complete → reply
//!
//! Only this file knows the order. [`service`](crate::service) finds the key and [`future`](crate::future) reads the
//! body before it starts; from there on nothing is begun that is not also ended.

use std::{
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::pin,
    sync::Arc,
    task::Poll,
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Version, header, request, response};
use http_body::Body;
use tower_service::Service;

use crate::{
    body::{self, BufferedBody, Kept, RequestBody, ResponseBody, Resumed},
    codec::{Answer, StoredResponse},
    decide::{Decision, decide},
    error::{StoreError, StoreErrorKind},
    extract::Attempt,
    fingerprint::Comparison,
    grpc,
    guard::{Guard, Outcome, settle_later},
    key::IdempotencyKey,
    policy::{Policy, named_by_connection},
    record::{Begin, Claim, Lease, Owner, RecordId},
    rejection::{Rejection, RejectionKind},
    scope::NoScope,
    shared::Shared,
    wait::{Next, Wait},
};

/// A request with a key, read whole, and everything that it needs to be answered.
pub(crate) struct Exchange<S> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) service: S,
    parts: request::Parts,
    body: BufferedBody,
    key: IdempotencyKey,
    pub(crate) id: RecordId,
    claim: Claim,
    pub(crate) wait: Option<Wait>,
}

/// How far an exchange got before it has to wait.
pub(crate) enum Step<S, R: Body, E> {
    Done(Result<Response<ResponseBody<R>>, E>),
    /// For another request with the same key. Nothing is held meanwhile, so this may be dropped.
    Wait(Box<Exchange<S>>),
}

impl<S> Exchange<S> {
    /// Scope and fingerprint, and a claim under a name that no other attempt has.
    pub(crate) fn new<R: Body>(
        shared: Arc<Shared>,
        service: S,
        parts: request::Parts,
        body: BufferedBody,
        key: IdempotencyKey,
    ) -> Result<Self, Box<Response<ResponseBody<R>>>> {
        match identify(&shared.policy, &parts, &body, &key) {
            Ok((id, claim)) => Ok(Self {
                shared,
                service,
                parts,
                body,
                key,
                id,
                claim,
                wait: None,
            }),
            Err(rejection) => Err(Box::new(shared.refuse(rejection, &parts))),
        }
    }
}

fn identify(
    policy: &Policy,
    parts: &request::Parts,
    body: &BufferedBody,
    key: &IdempotencyKey,
) -> Result<(RecordId, Claim), Rejection> {
    let id = policy.scope.record_id(parts, key);
    let id = id.map_err(|NoScope| Rejection::new(RejectionKind::ScopeMissing))?;
    let fingerprint = policy.fingerprinter.fingerprint(parts, body.data());
    let owner = Owner::random().map_err(|error| {
        tracing::error!(%error, "there is no randomness for an owner token");
        Rejection::new(RejectionKind::StoreUnavailable)
    })?;
    Ok((id, Claim::new(fingerprint, owner, policy.lease, policy.retention)))
}

/// From the first look at the store to the answer. Once it is polled it must run to its end.
pub(crate) async fn run<S, B, R>(mut exchange: Exchange<S>) -> Step<S, R, S::Error>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    B: RequestBody,
    R: Body,
{
    loop {
        let begin = match begin(&exchange.shared, &exchange.id, &exchange.claim).await {
            Ok(begin) => begin,
            Err(error) if exchange.may_run_without_store(&error) => {
                exchange.shared.tally.unprotected.add();
                return Step::Done(exchange.run_unprotected().await);
            }
            Err(error) => return Step::Done(Ok(exchange.refuse(unusable_store(&error)))),
        };
        let comparison = exchange.compare(&begin);
        let policy = &exchange.shared.policy;
        match decide(begin, comparison, policy.guarantee, policy.concurrent) {
            Decision::Run(lease) => return Step::Done(exchange.run_under(lease).await),
            Decision::TakeOver(fence) => exchange.claim.takeover = Some(fence),
            Decision::Replay(stored) => return Step::Done(Ok(exchange.replay(&stored))),
            Decision::Refuse(rejection) => return Step::Done(Ok(exchange.refuse(rejection))),
            Decision::Wait(longest) => {
                // Somebody else took it over. The same fence may be another operation's when the wait is over.
                exchange.claim.takeover = None;
                match exchange.prepare_to_wait(longest) {
                    // The record may have changed before anybody listened: look again.
                    Next::LookAgain => {}
                    Next::Wait => return Step::Wait(Box::new(exchange)),
                    Next::GiveUp => return Step::Done(Ok(exchange.refuse(Rejection::new(RejectionKind::InProgress)))),
                }
            }
        }
    }
}

// ---- begin

async fn begin(shared: &Arc<Shared>, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
    match shared.call(shared.store.begin(id, claim)).await {
        Err(error) if error.is_retryable() => {}
        result => return result,
    }
    // The first claim may have been applied and only its answer lost: the same owner gets its own lease back.
    let second = shared.call(shared.store.begin(id, claim)).await;
    if second.is_err() {
        // Whatever the second was told, the first may have been applied. It must not stay behind: nothing ran under it.
        let outcome = match claim.takeover {
            None => Outcome::NotExecuted,
            // The attempt that was to be taken over may have had its effect.
            Some(_) => Outcome::Unknown,
        };
        settle_later(shared, Lease::new(*id, claim.owner, 0), outcome);
    }
    second
}

impl<S> Exchange<S> {
    fn compare(&self, begin: &Begin) -> Comparison {
        let stored = match begin {
            Begin::Acquired(_) => return Comparison::Same,
            Begin::InProgress { fingerprint, .. }
            | Begin::Abandoned { fingerprint, .. }
            | Begin::Completed { fingerprint, .. } => fingerprint,
        };
        let fingerprinter = &self.shared.policy.fingerprinter;
        fingerprinter.compare(stored, &self.claim.fingerprint, &self.parts, self.body.data())
    }

    fn may_run_without_store(&self, error: &StoreError) -> bool {
        self.shared.policy.run_without_store
            && matches!(error.kind(), StoreErrorKind::Unavailable | StoreErrorKind::Other)
    }
}

fn unusable_store(error: &StoreError) -> Rejection {
    let source = std::error::Error::source(error).map(tracing::field::display);
    tracing::error!(%error, source, "a request was refused because of the store");
    Rejection::new(match error.kind() {
        StoreErrorKind::Full => RejectionKind::StoreFull,
        StoreErrorKind::Corrupt => RejectionKind::RecordUnreadable,
        StoreErrorKind::NewerVersion => RejectionKind::RecordFromNewerVersion,
        StoreErrorKind::Unavailable | StoreErrorKind::Fenced | StoreErrorKind::Other => RejectionKind::StoreUnavailable,
    })
}

// ---- run → complete → reply

/// What the service answered, and what is to be remembered of it.
enum Ran<R: Body, E> {
    /// The service could not take the request.
    NotReady(E),
    /// A status by which it says that it did not execute.
    NotExecuted(response::Parts, R),
    Whole(response::Parts, BufferedBody),
    Stream(response::Parts, R),
    OverLimit(response::Parts, Resumed<R>),
    Broken(response::Parts, Resumed<R>),
}

impl<S> Exchange<S> {
    async fn run_under<B, R>(self, lease: Lease) -> Result<Response<ResponseBody<R>>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RequestBody,
        R: Body,
    {
        let Self {
            shared,
            service,
            mut parts,
            body,
            key,
            id,
            wait,
            ..
        } = self;
        let guard = Guard::new(Arc::clone(&shared), lease);
        // Its place is for those who wait.
        drop(wait);
        shared.tally.executed.add();
        if lease.fence > 1 {
            shared.tally.taken_over.add();
            tracing::warn!(record = %id, fence = lease.fence, "a lost attempt is taken over");
        }
        parts.extensions.insert(Attempt::new(key, lease.fence));
        let request = Request::from_parts(parts, B::from_buffered(body));
        let ran = guard.hold(catch_panic(call(service, request, &shared))).await;
        let unknown = Outcome::Unknown;
        // Of an operation whose earlier attempt was lost, this attempt alone says that it did not execute.
        let not_executed = match lease.fence {
            ..=1 => Outcome::NotExecuted,
            _ => Outcome::Unknown,
        };
        match ran {
            Err(panic) => {
                guard.settle(unknown).await;
                resume_unwind(panic)
            }
            Ok(Err(error)) => {
                guard.settle(unknown).await;
                Err(error)
            }
            Ok(Ok(Ran::NotReady(error))) => {
                guard.settle(not_executed).await;
                Err(error)
            }
            Ok(Ok(Ran::NotExecuted(parts, body))) => {
                guard.settle(not_executed).await;
                Ok(Response::from_parts(parts, ResponseBody::passed(body)))
            }
            Ok(Ok(Ran::Whole(parts, body))) => {
                guard.settle(Outcome::Completed(shared.write_down(&parts, &body))).await;
                Ok(Response::from_parts(parts, ResponseBody::buffered(body)))
            }
            Ok(Ok(Ran::Stream(parts, body))) => {
                guard.settle(not_kept(&parts)).await;
                Ok(Response::from_parts(parts, ResponseBody::passed(body)))
            }
            Ok(Ok(Ran::OverLimit(parts, body))) => {
                guard.settle(not_kept(&parts)).await;
                Ok(Response::from_parts(parts, ResponseBody::resumed(body)))
            }
            Ok(Ok(Ran::Broken(parts, body))) => {
                guard.settle(unknown).await;
                Ok(Response::from_parts(parts, ResponseBody::resumed(body)))
            }
        }
    }

    async fn run_unprotected<B, R>(mut self) -> Result<Response<ResponseBody<R>>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RequestBody,
        R: Body,
    {
        let request = Request::from_parts(self.parts, B::from_buffered(self.body));
        ready(&mut self.service).await?;
        let response = self.service.call(request).await?;
        Ok(response.map(ResponseBody::passed))
    }
}

async fn call<S, B, R>(mut service: S, request: Request<B>, shared: &Shared) -> Result<Ran<R, S::Error>, S::Error>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    if let Err(error) = ready(&mut service).await {
        return Ok(Ran::NotReady(error));
    }
    let policy = &shared.policy;
    let (parts, body) = service.call(request).await?.into_parts();
    if !(policy.store_when)(grpc::http_status(&parts.headers).unwrap_or(parts.status)) {
        return Ok(Ran::NotExecuted(parts, body));
    }
    if (policy.stream_when)(&parts) {
        return Ok(Ran::Stream(parts, body));
    }
    Ok(match body::keep(body, policy.max_response_body).await {
        Kept::Whole(body) => Ran::Whole(parts, body),
        Kept::OverLimit(body) => Ran::OverLimit(parts, body),
        Kept::Broken(body) => Ran::Broken(parts, body),
    })
}

/// A service that was polled ready before says so again; one that gave its place back asks for another.
async fn ready<S: Service<Q>, Q>(service: &mut S) -> Result<(), S::Error> {
    poll_fn(|cx| service.poll_ready(cx)).await
}

/// A panic of the handler as a value, so that the store hears of it before it goes on.
async fn catch_panic<F: Future>(work: F) -> std::thread::Result<F::Output> {
    let mut work = pin!(work);
    // Unwind safety: nothing looks at `work` after it panicked.
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(cx))) {
        Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
        Ok(Poll::Pending) => Poll::Pending,
        Err(panic) => Poll::Ready(Err(panic)),
    })
    .await
}

fn not_kept(parts: &response::Parts) -> Outcome {
    Outcome::Completed(StoredResponse::not_kept(parts.status))
}

impl Shared {
    fn write_down(&self, parts: &response::Parts, body: &BufferedBody) -> StoredResponse {
        let connection = named_by_connection(&parts.headers);
        let keep = |name: &HeaderName| self.policy.keeps_header(name, &connection);
        StoredResponse::encode(parts.status, &parts.headers, keep, body.data(), body.trailers())
    }
}

// ---- replay | refuse

impl<S> Exchange<S> {
    fn replay<R: Body>(&self, stored: &StoredResponse) -> Response<ResponseBody<R>> {
        let Answer {
            status,
            mut headers,
            body,
            trailers,
            trailers_announced,
        } = match stored.decode() {
            Ok(answer) => answer,
            Err(error) => return self.refuse(unusable_store(&error)),
        };
        let policy = &self.shared.policy;
        if let Some((name, value)) = &policy.replay_marker {
            headers.insert(name, value.clone());
        }
        if policy.replay_no_store {
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        }
        if let Some(trailers) = trailers.as_deref().filter(|_| trailers_announced) {
            announce(trailers, self.parts.version, &mut headers);
        }
        self.shared.tally.replayed.add();
        tracing::debug!(record = %self.id, "a stored answer is replayed");
        let mut response = Response::new(ResponseBody::buffered(BufferedBody::new(body, trailers)));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }

    fn refuse<R: Body>(&self, rejection: Rejection) -> Response<ResponseBody<R>> {
        tracing::debug!(record = %self.id, reason = rejection.kind().slug(), "a request is refused");
        self.shared.refuse(rejection, &self.parts)
    }
}

/// HTTP/1.1 sends trailers only when their names were announced; the stored announcement belonged to another connection.
fn announce(trailers: &HeaderMap, version: Version, headers: &mut HeaderMap) {
    let names: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
    if version <= Version::HTTP_11 && !names.is_empty() {
        if let Ok(names) = HeaderValue::try_from(names.join(", ")) {
            headers.insert(header::TRAILER, names);
        }
    }
}
