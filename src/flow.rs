//! The story of a request with a key:
//!
//! key → scope → fingerprint → begin → decide → run | replay | refuse → complete → reply
//!
//! Only this file knows the order. [`service`](crate::service) finds the key and [`future`](crate::future) reads the
//! body before it starts; [`attempt`](crate::attempt) runs the handler and ends what was begun.

#[cfg(test)]
mod tests;

use std::{future::Future, pin::Pin, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Version, header, request};
use http_body::Body;
use tower_service::Service;

use crate::{
    body::{BufferedBody, RequestBody, ResponseBody},
    codec::{Answer, StoredResponse},
    decide::{Decision, decide},
    error::{StoreError, StoreErrorKind},
    fingerprint::{Comparison, Fingerprint},
    identity::{Identity, identify},
    key::IdempotencyKey,
    policy::{Guarantee, Policy},
    record::{Begin, Claim, Lease, Owner, RecordId},
    rejection::{Rejection, RejectionKind},
    settle::{NEVER_GRANTED, Outcome, settle_later},
    shared::Shared,
    sync::Instant,
    wait::{Prepared, Wait},
};

/// A request with a key, read whole, and everything that it needs to be answered.
pub(crate) struct Exchange<S> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) service: S,
    pub(crate) parts: request::Parts,
    pub(crate) body: BufferedBody,
    pub(crate) identity: Identity,
    pub(crate) claim: Claim,
    /// Boxed: few wait.
    pub(crate) wait: Option<Box<Wait>>,
}

/// How far an exchange got before it has to wait.
pub(crate) enum Step<S, R: Body, E> {
    Done(Result<Response<ResponseBody<R>>, E>),
    /// For another request with the same key. Nothing is held meanwhile, so this may be dropped.
    Wait(Box<Exchange<S>>),
}

/// What became of a request that was read whole.
pub(crate) enum Opened<S, B, R: Body> {
    /// Boxed once, here: it goes through many hands.
    Exchange(Box<Exchange<S>>),
    /// Its body shows that it carries no key, and it needs none.
    Unkeyed(S, Box<Request<B>>),
    Refused(Box<Response<ResponseBody<R>>>),
}

/// Who the request is, and a claim under a name that no other attempt has.
pub(crate) fn open<S, B: RequestBody, R: Body>(
    shared: Arc<Shared>,
    service: S,
    parts: request::Parts,
    body: BufferedBody,
    key: Option<IdempotencyKey>,
) -> Opened<S, B, R> {
    let refused = |rejection, parts| Opened::Refused(Box::new(shared.refuse(rejection, parts, None)));
    let identity = match identify(&shared.policy, &parts, body.data(), key) {
        Ok(Some(identity)) => identity,
        Ok(None) => {
            return Opened::Unkeyed(service, Box::new(Request::from_parts(parts, B::from_buffered(body))));
        }
        Err(rejection) => return refused(rejection, &parts),
    };
    let claim = match claim(&shared.policy, identity.fingerprint) {
        Ok(claim) => claim,
        Err(rejection) => return refused(rejection, &parts),
    };
    Opened::Exchange(Box::new(Exchange {
        shared,
        service,
        parts,
        body,
        identity,
        claim,
        wait: None,
    }))
}

fn claim(policy: &Policy, fingerprint: Fingerprint) -> Result<Claim, Rejection> {
    let owner = Owner::random().map_err(|error| {
        tracing::error!(%error, "there is no randomness for an owner token");
        Rejection::new(RejectionKind::StoreUnavailable)
    })?;
    Ok(Claim::new(fingerprint, owner, policy.lease, policy.kept_for()))
}

/// What follows from what the store found.
pub(crate) enum Next<R: Body> {
    Reply(Response<ResponseBody<R>>),
    Run(Lease),
    RunUnprotected,
    BeginAgain,
    Wait,
}

/// How an exchange starts.
pub(crate) enum Start<S, R: Body, E> {
    Replied(Response<ResponseBody<R>>),
    /// Work that must run to its end once it is polled.
    Work(Arc<Shared>, Work<S, R, E>),
}

pub(crate) type Work<S, R, E> = Pin<Box<dyn Future<Output = Step<S, R, E>> + Send>>;

/// The first look at a store that answers at once: a replay is over with that, and costs no future.
pub(crate) fn start<S, B, R>(mut exchange: Box<Exchange<S>>) -> Start<S, R, S::Error>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: RequestBody + Send + 'static,
    R: Body + Send + 'static,
    R::Error: Send,
{
    // A lease may be counted from here on, however long the service keeps this thread.
    let asked = Instant::now();
    let begin = exchange
        .shared
        .store
        .begin_at_once(&exchange.identity.id, &exchange.claim);
    let next = begin.map(|begin| exchange.next(exchange.shared.noted(begin)));
    let shared = match next {
        Some(Next::Reply(response)) => return Start::Replied(response),
        _ => Arc::clone(&exchange.shared),
    };
    let work: Work<S, R, S::Error> = match next {
        Some(Next::Run(lease)) if exchange.identity.others.is_empty() => Box::pin(exchange.run_under(lease, asked)),
        Some(Next::Run(lease)) => Box::pin(exchange.claim_others_and_run(lease, asked)),
        _ => Box::pin(run(exchange)),
    };
    Start::Work(shared, work)
}

/// From a look at the store to the answer. Once it is polled it must run to its end.
///
/// What runs is boxed apart: others need not carry its size.
#[allow(clippy::manual_async_fn, reason = "an async fn holds its arguments twice")]
pub(crate) fn run<S, B, R>(mut exchange: Box<Exchange<S>>) -> impl Future<Output = Step<S, R, S::Error>>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    B: RequestBody,
    R: Body,
{
    async move {
        #[cfg(feature = "postgres")]
        if let Some(transactions) = exchange.shared.transactions() {
            return Box::pin(crate::transactional::run(exchange, transactions)).await;
        }
        loop {
            let Exchange {
                shared,
                identity,
                claim,
                ..
            } = &mut *exchange;
            // A lease may be counted from here on, however late the store tells of it.
            let asked = Instant::now();
            let begin = begin(shared, &identity.id, claim).await;
            let is_late = asked.elapsed() > claim.lease / 2;
            match exchange.next(begin) {
                Next::Reply(response) => return Step::Done(Ok(response)),
                Next::Run(lease) if exchange.identity.others.is_empty() && !is_late => {
                    return Box::pin(exchange.run_under(lease, asked)).await;
                }
                Next::Run(lease) => return Box::pin(exchange.claim_others_and_run(lease, asked)).await,
                Next::RunUnprotected => return Step::Done(Box::pin(exchange.run_unprotected()).await),
                Next::BeginAgain => {}
                Next::Wait => return Step::Wait(exchange),
            }
        }
    }
}

impl<S: Clone> Exchange<S> {
    /// decide → run | replay | refuse
    pub(crate) fn next<R: Body>(&mut self, begin: Result<Begin, StoreError>) -> Next<R> {
        let begin = match begin {
            Ok(begin) => begin,
            Err(error) if self.may_run_without_store(&error) => {
                self.stop_waiting();
                return Next::RunUnprotected;
            }
            Err(error) => return Next::Reply(self.refuse(unusable_store(&error))),
        };
        let comparison = self.compare(&begin);
        let policy = &self.shared.policy;
        let duplicates = self
            .identity
            .refuses_duplicates
            .then_some(RejectionKind::DuplicateRequest);
        match decide(begin, comparison, policy.guarantee, policy.concurrent, duplicates) {
            Decision::Run(lease) => {
                self.stop_waiting();
                Next::Run(lease)
            }
            Decision::Replay(stored) => Next::Reply(self.replay(&stored)),
            Decision::Refuse(rejection) => Next::Reply(self.refuse(rejection)),
            // A store that was asked for just this and neither did it nor found anything else would be asked for ever.
            Decision::TakeOver(lost) if self.claim.takeover == Some(lost) => {
                Next::Reply(self.refuse(Rejection::new(RejectionKind::StoreUnavailable)))
            }
            Decision::TakeOver(lost) => {
                self.claim.takeover = Some(lost);
                Next::BeginAgain
            }
            Decision::Wait(longest) => {
                // Somebody else took it over; what this request saw is no longer there.
                self.claim.takeover = None;
                match self.prepare_to_wait(longest) {
                    // The record may have changed before anybody listened.
                    Prepared::LookAgain => Next::BeginAgain,
                    Prepared::Wait => Next::Wait,
                    Prepared::NoPlaceOrTime => Next::Reply(self.refuse(Rejection::new(RejectionKind::InProgress))),
                }
            }
        }
    }
}

// ---- begin

/// One try, and a second one if the store does not answer the first. Where neither is told that it has the claim, the
/// first may still arrive; it is ended, and `claim` has another owner from then on, whom that end does not concern.
pub(crate) async fn begin(shared: &Arc<Shared>, id: &RecordId, claim: &mut Claim) -> Result<Begin, StoreError> {
    let asked = Instant::now();
    match shared.call(shared.store.begin(id, claim)).await {
        Err(error) if error.is_retryable() => {}
        result => return result,
    }
    // The first claim may have been applied and only its answer lost: the same owner gets its own lease back.
    claim.repeated = true;
    let second = shared.call(shared.store.begin(id, claim)).await;
    if !matches!(second, Ok(Begin::Acquired(_) | Begin::Completed { .. })) {
        let owner = claim.owner;
        match Owner::random() {
            Ok(next) => (claim.owner, claim.repeated) = (next, false),
            // With the same one it goes on, so it cannot be ended; after an error it does not.
            Err(_) if second.is_ok() => return second,
            Err(_) => {}
        }
        // It must not stay behind: nothing ran under it.
        let outcome = match claim.takeover {
            None => Outcome::NotExecuted,
            // The attempt that was to be taken over may have had its effect.
            Some(_) => Outcome::Unknown,
        };
        let until = asked.checked_add(claim.lease);
        settle_later(shared, Lease::new(*id, owner, NEVER_GRANTED), outcome, until);
    }
    second
}

impl<S> Exchange<S> {
    fn compare(&self, begin: &Begin) -> Comparison {
        #[cfg(seeded_bug)]
        if crate::seeded::is("forgets fingerprints") {
            return Comparison::Same;
        }
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
        #[cfg(seeded_bug)]
        if crate::seeded::is("runs without its store") {
            return true;
        }
        let policy = &self.shared.policy;
        policy.run_without_store
            // It could not write anything.
            && policy.guarantee != Guarantee::Transactional
            && matches!(error.kind(), StoreErrorKind::Unavailable | StoreErrorKind::Other)
    }
}

pub(crate) fn unusable_store(error: &StoreError) -> Rejection {
    let source = std::error::Error::source(error).map(tracing::field::display);
    tracing::error!(%error, source, "a request was refused because of the store");
    Rejection::new(match error.kind() {
        StoreErrorKind::Full => RejectionKind::StoreFull,
        StoreErrorKind::Corrupt => RejectionKind::RecordUnreadable,
        StoreErrorKind::NewerVersion => RejectionKind::RecordFromNewerVersion,
        StoreErrorKind::Unavailable | StoreErrorKind::Fenced | StoreErrorKind::Other => RejectionKind::StoreUnavailable,
    })
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
        let (status, body) = policy.replay.rewrite(status, &mut headers, body, &self.parts);
        policy.mark(&self.identity.key, &mut headers);
        #[cfg(seeded_bug)]
        let body = match crate::seeded::is("replays half a body") {
            true => body.slice(..body.len() / 2),
            false => body,
        };
        #[cfg(seeded_bug)]
        let policy = &match crate::seeded::is("replays without a marker") {
            true => Policy {
                replay_marker: None,
                ..policy.clone()
            },
            false => policy.clone(),
        };
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
        tracing::debug!(record = %self.identity.id, "a stored answer is replayed");
        let mut response = Response::new(ResponseBody::buffered(BufferedBody::from_parts(body, trailers)));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }

    pub(crate) fn refuse<R: Body>(&self, rejection: Rejection) -> Response<ResponseBody<R>> {
        self.shared.refuse(rejection, &self.parts, Some(self.identity.id))
    }
}

/// HTTP/1.1 sends trailers only when their names were announced; the stored announcement belonged to another
/// connection.
fn announce(trailers: &HeaderMap, version: Version, headers: &mut HeaderMap) {
    let names: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
    if version <= Version::HTTP_11 && !names.is_empty() {
        if let Ok(names) = HeaderValue::try_from(names.join(", ")) {
            headers.insert(header::TRAILER, names);
        }
    }
}
