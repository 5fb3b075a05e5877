//! One attempt: run → complete → reply.

use std::{
    any::Any,
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::{Pin, pin},
    task::Poll,
    thread,
};

use http::{HeaderName, Method, Request, Response, StatusCode, header, response};
use http_body::Body;
use tower_service::Service;

use crate::{
    body::{self, BufferedBody, Kept, RequestBody, ResponseBody, Resumed},
    codec::StoredResponse,
    extract::Attempt,
    flow::{Exchange, Step},
    grpc,
    guard::{Guard, Outcome},
    policy::{Policy, named_by_connection},
    record::Lease,
};

/// What the service answered.
enum Ran<R: Body, E> {
    /// The service could not take the request.
    NotReady(E),
    Failed(E),
    /// A status by which it says that it did not execute.
    NotExecuted(response::Parts, R),
    Whole(response::Parts, BufferedBody),
    Stream(response::Parts, R),
    OverLimit(response::Parts, Resumed<R>),
    Broken(response::Parts, Resumed<R>),
}

/// What the caller gets: an answer, the service's error, or its panic.
type Reply<R, E> = thread::Result<Result<Response<ResponseBody<R>>, E>>;

impl<S> Exchange<S> {
    /// Runs the service under a lease and tells the store how it ended before anybody else hears of it.
    pub(crate) fn run_under<B, R>(self, lease: Lease) -> impl Future<Output = Step<S, R, S::Error>>
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
            ..
        } = self;
        let guard = Guard::new(shared, lease);
        parts.extensions.insert(Attempt::new(lease.id, key, lease.fence));
        let request = Request::from_parts(parts, B::from_buffered(body));
        // Only what is needed from here on becomes part of the future.
        async move {
            let (outcome, reply) = {
                let call = pin!(call(service, request, guard.policy()));
                judge(guard.hold(catch_panic(call)).await, &guard)
            };
            guard.settle(outcome).await;
            Step::Done(reply.unwrap_or_else(|panic| resume_unwind(panic)))
        }
    }

    pub(crate) async fn run_unprotected<B, R>(mut self) -> Result<Response<ResponseBody<R>>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RequestBody,
        R: Body,
    {
        self.shared.tally.unprotected.add();
        let request = Request::from_parts(self.parts, B::from_buffered(self.body));
        ready(&mut self.service).await?;
        let response = self.service.call(request).await?;
        Ok(response.map(ResponseBody::passed))
    }
}

#[allow(clippy::manual_async_fn, reason = "an async fn holds its arguments twice")]
fn call<S, B, R>(mut service: S, request: Request<B>, policy: &Policy) -> impl Future<Output = Ran<R, S::Error>>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    async move {
        if let Err(error) = ready(&mut service).await {
            return Ran::NotReady(error);
        }
        let is_head = request.method() == Method::HEAD;
        let (parts, body) = match service.call(request).await {
            Ok(response) => response.into_parts(),
            Err(error) => return Ran::Failed(error),
        };
        if !(policy.store_when)(grpc::http_status(&parts.headers).unwrap_or(parts.status)) {
            return Ran::NotExecuted(parts, body);
        }
        if (policy.stream_when)(&parts) {
            return Ran::Stream(parts, body);
        }
        match body::keep(body, policy.max_response_body).await {
            // An answer without a body may announce the length that it would have with one.
            Kept::Whole(body) if !is_head && !is_complete(&parts, &body) => Ran::Broken(parts, Resumed::from(body)),
            Kept::Whole(body) => Ran::Whole(parts, body),
            Kept::OverLimit(body) => Ran::OverLimit(parts, body),
            Kept::Broken(body) => Ran::Broken(parts, body),
        }
    }
}

/// What the store is told, and what the caller gets.
fn judge<R: Body, E>(ran: thread::Result<Ran<R, E>>, guard: &Guard) -> (Outcome, Reply<R, E>) {
    // Of an operation whose earlier attempt was lost, this attempt can say for itself alone that it did not execute.
    let not_executed = if guard.is_first() {
        Outcome::NotExecuted
    } else {
        Outcome::Unknown
    };
    let policy = guard.policy();
    let answer = |parts, body| Ok(Ok(Response::from_parts(parts, body)));
    match ran {
        Err(panic) => (Outcome::Unknown, Err(panic)),
        Ok(Ran::Failed(error)) => (Outcome::Unknown, Ok(Err(error))),
        Ok(Ran::NotReady(error)) => (not_executed, Ok(Err(error))),
        Ok(Ran::NotExecuted(parts, body)) => (not_executed, answer(parts, ResponseBody::passed(body))),
        Ok(Ran::Whole(parts, body)) => (
            write_down(&parts, &body, policy),
            answer(parts, ResponseBody::buffered(body)),
        ),
        Ok(Ran::Stream(parts, body)) => (not_kept(&parts), answer(parts, ResponseBody::passed(body))),
        Ok(Ran::OverLimit(parts, body)) => (not_kept(&parts), answer(parts, ResponseBody::resumed(body))),
        Ok(Ran::Broken(parts, body)) => (Outcome::Unknown, answer(parts, ResponseBody::resumed(body))),
    }
}

fn write_down(parts: &response::Parts, body: &BufferedBody, policy: &Policy) -> Outcome {
    let connection = named_by_connection(&parts.headers);
    let keep = |name: &HeaderName| policy.keeps_header(name, &connection);
    let (data, trailers) = (body.data(), body.trailers());
    Outcome::Completed(StoredResponse::encode(
        parts.status,
        &parts.headers,
        keep,
        data,
        trailers,
    ))
}

/// Whether the body is as long as its head says.
fn is_complete(parts: &response::Parts, body: &BufferedBody) -> bool {
    let length = parts.headers.get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    matches!(parts.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || length.is_none_or(|length| length == body.data().len())
}

fn not_kept(parts: &response::Parts) -> Outcome {
    Outcome::Completed(StoredResponse::not_kept(parts.status))
}

/// A service that was polled ready before says so again; one that gave its place back asks for another.
async fn ready<S: Service<Q>, Q>(service: &mut S) -> Result<(), S::Error> {
    poll_fn(|cx| service.poll_ready(cx)).await
}

/// A panic of the handler as a value, so that the store hears of it before it goes on.
fn catch_panic<F: Future>(
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
