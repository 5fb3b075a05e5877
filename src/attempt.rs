//! One attempt: run → complete → reply.

use std::{
    any::Any,
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    thread,
};

use http::{HeaderName, Method, Request, Response, StatusCode, header, response};
use http_body::Body;
use tower_service::Service;

use crate::{
    body::{self, BufferedBody, Kept, RequestBody, ResponseBody, Resumed},
    claims::claim_others,
    codec::StoredResponse,
    extract::Attempt,
    flow::{Exchange, Step},
    grpc,
    guard::Guard,
    keep::Keep,
    key::IdempotencyKey,
    policy::{Policy, named_by_connection},
    record::{Lease, Retention},
    rejection::{Rejection, RejectionKind},
    settle::Outcome,
    sync::Instant,
};

/// What the service answered.
pub(crate) enum Ran<R: Body, E> {
    /// The lease ran out before the service could be called.
    NotStarted(Response<ResponseBody<R>>),
    /// The service could not take the request.
    NotReady(E),
    Failed(E),
    /// A status by which it says that it did not execute.
    NotExecuted(response::Parts, R),
    /// To be kept for this long.
    Whole(response::Parts, BufferedBody, Retention),
    /// Not to be kept, by its nature or by the handler's word. The fact is, for this long.
    Stream(response::Parts, R, Retention),
    OverLimit(response::Parts, Resumed<R>, Retention),
    Broken(response::Parts, Resumed<R>),
}

/// What the caller gets: an answer, the service's error, or its panic.
pub(crate) type Reply<R, E> = thread::Result<Result<Response<ResponseBody<R>>, E>>;

impl<S> Exchange<S> {
    /// Runs the service under a lease and tells the store how it ended before anybody else hears of it.
    /// `asked` is when the store was asked for the lease.
    pub(crate) fn run_under<B, R>(
        self: Box<Self>,
        lease: Lease,
        asked: Instant,
    ) -> impl Future<Output = Step<S, R, S::Error>>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RequestBody,
        R: Body,
    {
        let guard = Guard::new(Arc::clone(&self.shared), lease, self.claim.repeated, asked);
        self.run_guarded(guard)
    }

    /// As above, after the operation's other keys were claimed, if there are any: all of them, or it does not run. Nor does
    /// it if its own was granted so late that others take it for lost by now.
    pub(crate) fn claim_others_and_run<B, R>(
        self: Box<Self>,
        lease: Lease,
        asked: Instant,
    ) -> impl Future<Output = Step<S, R, S::Error>>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RequestBody,
        R: Body,
    {
        // Here, as above: a lease is never without one.
        let guard = Guard::new(Arc::clone(&self.shared), lease, self.claim.repeated, asked);
        async move {
            // Not asked for again where it must not run any more, whoever has it.
            if let Err(kind @ RejectionKind::OutcomeUnknown) = guard.may_start() {
                return self.give_up(guard, Rejection::new(kind)).await;
            }
            let claimed = {
                let claims = pin!(claim_others(&guard, &self.claim, &self.identity.others, asked));
                guard.hold(claims).await
            };
            match claimed {
                Ok(()) => Box::pin(self.run_guarded(guard)).await,
                Err(rejection) => self.give_up(guard, rejection).await,
            }
        }
    }

    /// Nothing ran.
    async fn give_up<R: Body, E>(self: Box<Self>, mut guard: Guard, rejection: Rejection) -> Step<S, R, E> {
        guard.settle(Outcome::NotExecuted).await;
        Step::Done(Ok(self.refuse(rejection)))
    }

    fn run_guarded<B, R>(mut self: Box<Self>, mut guard: Guard) -> impl Future<Output = Step<S, R, S::Error>>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RequestBody,
        R: Body,
    {
        let lease = guard.lease();
        let key = &self.identity.key;
        let marked = guard.policy().marks_answers().then(|| key.clone());
        let attempt = Attempt::new(lease.id, key.clone(), lease.fence);
        self.parts.extensions.insert(attempt);
        async move {
            let (outcome, reply) = {
                let call = pin!(call(self, guard.policy(), Some(&guard)));
                judge(guard.hold(catch_panic(call)).await, guard.policy(), marked.as_ref())
            };
            #[cfg(seeded_bug)]
            if crate::seeded::is("replies before it records") {
                tokio::spawn(async move {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    guard.settle(outcome).await;
                });
                return Step::Done(reply.unwrap_or_else(|panic| resume_unwind(panic)));
            }
            guard.settle(outcome).await;
            Step::Done(reply.unwrap_or_else(|panic| resume_unwind(panic)))
        }
    }

    pub(crate) async fn run_unprotected<B, R>(mut self: Box<Self>) -> Result<Response<ResponseBody<R>>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RequestBody,
        R: Body,
    {
        self.shared.tally.unprotected.add();
        ready(&mut self.service).await?;
        let called = {
            let Self {
                mut service,
                parts,
                body,
                ..
            } = *self;
            service.call(Request::from_parts(parts, B::from_buffered(body)))
        };
        let response = called.await?;
        Ok(response.map(ResponseBody::passed))
    }
}

/// Calls the service and reads its answer. The request stays in its box until then: a future has room for all that it
/// starts with beside all that it becomes. Under a lease it has to be held still.
pub(crate) async fn call<S, B, R>(
    mut exchange: Box<Exchange<S>>,
    policy: &Policy,
    guard: Option<&Guard>,
) -> Ran<R, S::Error>
where
    S: Service<Request<B>, Response = Response<R>>,
    B: RequestBody,
    R: Body,
{
    if let Err(error) = ready(&mut exchange.service).await {
        return Ran::NotReady(error);
    }
    // It may have been a long time until then.
    if let Some(Err(kind)) = guard.map(Guard::start) {
        return Ran::NotStarted(exchange.refuse(Rejection::new(kind)));
    }
    let is_head = exchange.parts.method == Method::HEAD;
    let called = {
        let Exchange {
            mut service,
            parts,
            body,
            ..
        } = *exchange;
        service.call(Request::from_parts(parts, B::from_buffered(body)))
    };
    let (mut parts, body) = match called.await {
        Ok(response) => response.into_parts(),
        Err(error) => return Ran::Failed(error),
    };
    // Taken out: what it says is said to this layer, and not to one around a handler that passes the answer on.
    let word = parts.extensions.remove::<Keep>();
    let status = || grpc::http_status(&parts.headers).unwrap_or(parts.status);
    let retention = match word {
        Some(Keep::Nothing) => return Ran::NotExecuted(parts, body),
        Some(Keep::OnlyTheFact) => return Ran::Stream(parts, body, policy.kept_for()),
        Some(Keep::AnswerFor(retention)) => retention,
        Some(Keep::Answer) => policy.kept_for(),
        #[cfg(seeded_bug)]
        None if crate::seeded::is("keeps what did not execute") => policy.kept_for(),
        None if policy.store_when.holds(status()) => policy.kept_for(),
        None => return Ran::NotExecuted(parts, body),
    };
    if (policy.stream_when)(&parts) {
        return Ran::Stream(parts, body, retention);
    }
    match body::keep(body, policy.max_response_body).await {
        // An answer without a body may announce the length that it would have with one.
        Kept::Whole(body) if !is_head && !is_complete(&parts, &body) => Ran::Broken(parts, Resumed::from(body)),
        Kept::Whole(body) => Ran::Whole(parts, body, retention),
        Kept::OverLimit(body) => Ran::OverLimit(parts, body, retention),
        Kept::Broken(body) => Ran::Broken(parts, body),
    }
}

/// What the store is told, and what the caller gets.
pub(crate) fn judge<R: Body, E>(
    ran: thread::Result<Ran<R, E>>,
    policy: &Policy,
    marked: Option<&IdempotencyKey>,
) -> (Outcome, Reply<R, E>) {
    let answer = |parts, body| Ok(Ok(Response::from_parts(parts, body)));
    let executed = |mut parts: response::Parts, body| {
        if let Some(key) = marked {
            policy.mark(key, &mut parts.headers);
        }
        answer(parts, body)
    };
    match ran {
        #[cfg(seeded_bug)]
        Err(panic) if crate::seeded::is("frees what panicked") => (Outcome::NotExecuted, Err(panic)),
        Err(panic) => (Outcome::Unknown, Err(panic)),
        Ok(Ran::Failed(error)) => (Outcome::Unknown, Ok(Err(error))),
        Ok(Ran::NotStarted(refused)) => (Outcome::NotExecuted, Ok(Ok(refused))),
        Ok(Ran::NotReady(error)) => (Outcome::NotExecuted, Ok(Err(error))),
        Ok(Ran::NotExecuted(parts, body)) => (Outcome::NotExecuted, answer(parts, ResponseBody::passed(body))),
        Ok(Ran::Whole(parts, body, retention)) => (
            Outcome::Completed(write_down(&parts, &body, policy), retention),
            executed(parts, ResponseBody::buffered(body)),
        ),
        Ok(Ran::Stream(parts, body, retention)) => {
            (not_kept(&parts, retention), executed(parts, ResponseBody::passed(body)))
        }
        Ok(Ran::OverLimit(parts, body, retention)) => (
            not_kept(&parts, retention),
            executed(parts, ResponseBody::resumed(body)),
        ),
        Ok(Ran::Broken(parts, body)) => (Outcome::Unknown, answer(parts, ResponseBody::resumed(body))),
    }
}

fn write_down(parts: &response::Parts, body: &BufferedBody, policy: &Policy) -> StoredResponse {
    let connection = named_by_connection(&parts.headers);
    let keep = |name: &HeaderName| policy.keeps_header(name, &connection);
    let (data, trailers) = (body.data(), body.trailers());
    StoredResponse::encode(parts.status, &parts.headers, keep, data, trailers)
}

/// Whether the body is as long as its head says.
fn is_complete(parts: &response::Parts, body: &BufferedBody) -> bool {
    let length = parts.headers.get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    matches!(parts.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || length.is_none_or(|length| length == body.data().len())
}

fn not_kept(parts: &response::Parts, retention: Retention) -> Outcome {
    Outcome::Completed(StoredResponse::not_kept(parts.status), retention)
}

/// A service that was polled ready before says so again; one that gave its place back asks for another.
pub(crate) async fn ready<S: Service<Q>, Q>(service: &mut S) -> Result<(), S::Error> {
    poll_fn(|cx| service.poll_ready(cx)).await
}

/// A panic of the handler as a value, so that the store hears of it before it goes on.
pub(crate) fn catch_panic<F: Future>(
    mut work: Pin<&mut F>,
) -> impl Future<Output = Result<F::Output, Box<dyn Any + Send>>> + Unpin {
    // Unwind safety: nothing looks at `work` after it panicked.
    poll_fn(
        move |cx| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(cx))) {
            Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
            Ok(Poll::Pending) => Poll::Pending,
            Err(panic) => Poll::Ready(Err(panic)),
        },
    )
}
