//! The future of a request, as named states: it passes, or is refused, or is read, run and perhaps waited for.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response, request};
use http_body::Body;
use http_body_util::LengthLimitError;
use pin_project_lite::pin_project;
use tower_service::Service;
use tracing::{Instrument, Span};

use crate::{
    attempt,
    body::{Collected, End, RequestBody, ResponseBody},
    drain::Working,
    flow::{self, Exchange, Opened, Start, Step},
    key::IdempotencyKey,
    rejection::{Rejection, RejectionKind},
    shared::Shared,
    sync::Handle,
};

pin_project! {
    /// The future of an [`Idempotency`](crate::Idempotency) service.
    ///
    /// Dropped while the body is read or while it waits for another request, it ends there. Dropped after the store
    /// was asked, it moves itself to a task and runs to its end, in the span that it was polled in.
    pub struct ResponseFuture<S, B, R>
    where
        S: Service<Request<B>>,
        S: 'static,
        S::Error: 'static,
        R: Body,
        R: 'static,
    {
        #[pin]
        state: State<S, S::Future, B, R, S::Error>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, F, B, R, E>
    where
        S: 'static,
        R: Body,
        R: 'static,
        E: 'static,
    {
        Passed { #[pin] future: F },
        Answered { response: Option<Response<ResponseBody<R>>> },
        Reading { reading: Option<Reading<S>>, collected: Collected, #[pin] body: B },
        Running { run: Detachable<Step<S, R, E>> },
        Waiting { wait: Pin<Box<dyn Future<Output = Box<Exchange<S>>> + Send>> },
        Unkeyed { future: Unkeyed<R, E> },
    }
}

/// The service's answer to a request whose body had to be read to see that it carries no key. Dropped, it ends.
type Unkeyed<R, E> = Pin<Box<dyn Future<Output = Result<Response<ResponseBody<R>>, E>> + Send>>;

/// A request whose body is being read. Nothing has been begun.
pub(crate) struct Reading<S> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) service: S,
    /// Whether the service was polled ready, and holds whatever place that reserved.
    pub(crate) reserved: bool,
    pub(crate) parts: request::Parts,
    /// `None` if it is in the body, or made of it.
    pub(crate) key: Option<IdempotencyKey>,
}

impl<S, B, R> ResponseFuture<S, B, R>
where
    S: Service<Request<B>> + 'static,
    S::Error: 'static,
    R: Body + 'static,
{
    pub(crate) fn passed(future: S::Future) -> Self {
        Self {
            state: State::Passed { future },
        }
    }

    pub(crate) fn answered(response: Response<ResponseBody<R>>) -> Self {
        Self {
            state: State::Answered {
                response: Some(response),
            },
        }
    }

    pub(crate) fn reading(reading: Reading<S>, body: B) -> Self {
        Self {
            state: State::Reading {
                reading: Some(reading),
                collected: Collected::default(),
                body,
            },
        }
    }
}

impl<S, B, R> Future for ResponseFuture<S, B, R>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: RequestBody + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    R: Body + Send + 'static,
    R::Error: Send + 'static,
{
    type Output = Result<Response<ResponseBody<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            let next = match state.as_mut().project() {
                StateProj::Passed { future } => {
                    return future.poll(cx).map_ok(|response| response.map(ResponseBody::passed));
                }
                StateProj::Answered { response } => {
                    return response
                        .take()
                        .map_or(Poll::Pending, |response| Poll::Ready(Ok(response)));
                }
                StateProj::Reading {
                    reading,
                    collected,
                    body,
                } => {
                    let Some(waiting) = reading else {
                        return Poll::Pending;
                    };
                    let Poll::Ready(end) = collected.poll_from(body, waiting.limit(), cx) else {
                        waiting.give_place_back();
                        return Poll::Pending;
                    };
                    let Some(reading) = reading.take() else {
                        return Poll::Pending;
                    };
                    match reading.finish(std::mem::take(collected), end) {
                        Opened::Refused(response) => return Poll::Ready(Ok(*response)),
                        Opened::Unkeyed(service, request) => State::Unkeyed {
                            future: Box::pin(run_unkeyed(service, *request)),
                        },
                        Opened::Exchange(exchange) => match flow::start(exchange) {
                            Start::Replied(response) => return Poll::Ready(Ok(response)),
                            Start::Work(shared, work) => State::Running {
                                run: Detachable::new(shared, work),
                            },
                        },
                    }
                }
                StateProj::Running { run } => match ready!(run.poll(cx)) {
                    Step::Done(result) => return Poll::Ready(result),
                    Step::Wait(exchange) => State::Waiting {
                        wait: Box::pin(exchange.wait()),
                    },
                },
                StateProj::Waiting { wait } => {
                    let exchange = ready!(wait.as_mut().poll(cx));
                    State::Running {
                        run: Detachable::new(Arc::clone(&exchange.shared), Box::pin(flow::run(exchange))),
                    }
                }
                StateProj::Unkeyed { future } => return future.as_mut().poll(cx),
            };
            state.set(next);
        }
    }
}

impl<S: Clone> Reading<S> {
    /// A body may be slow: others may run meanwhile. The service is polled ready again before it is called.
    fn give_place_back(&mut self) {
        if std::mem::take(&mut self.reserved) {
            self.service = self.service.clone();
        }
    }
}

impl<S> Reading<S> {
    fn limit(&self) -> usize {
        self.shared.policy.max_request_body
    }

    fn finish<B: RequestBody, R: Body, E>(self, collected: Collected, end: End<E>) -> Opened<S, B, R>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let Self {
            shared,
            service,
            parts,
            key,
            ..
        } = self;
        let rejection = match end {
            End::Whole => return flow::open(shared, service, parts, collected.into_body(), key),
            End::OverLimit => too_large(shared.policy.max_request_body),
            End::Broken(error) => broken(error.into()),
        };
        Opened::Refused(Box::new(shared.refuse(rejection, &parts, None)))
    }
}

/// The service is polled ready again: it may have given its place back while the body was read.
async fn run_unkeyed<S, B, R>(mut service: S, request: Request<B>) -> Result<Response<ResponseBody<R>>, S::Error>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    attempt::ready(&mut service).await?;
    Ok(service.call(request).await?.map(ResponseBody::passed))
}

pub(crate) fn too_large(limit: usize) -> Rejection {
    Rejection::new(RejectionKind::BodyTooLarge).with_detail(format!("the limit is {limit} bytes"))
}

/// A limit above this layer makes the body break, too; that is not the client's connection.
fn broken(error: Box<dyn std::error::Error + Send + Sync>) -> Rejection {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&*error);
    while let Some(error) = cause {
        if error.is::<LengthLimitError>() {
            return Rejection::new(RejectionKind::BodyTooLarge).with_detail("it is over the server's limit".to_owned());
        }
        cause = error.source();
    }
    tracing::debug!(%error, "a request body broke off");
    Rejection::new(RejectionKind::BodyIncomplete)
}

/// Work that must not be cut: polled in place, and moved to a task of its own when it is dropped unfinished.
struct Detachable<T: 'static> {
    /// Away while it is polled, so that work that panicked is not polled again.
    work: Option<Pin<Box<dyn Future<Output = T> + Send>>>,
    /// Where to go; known, and counted, once the work has been pending.
    home: Option<(Handle, Span, Working)>,
    shared: Arc<Shared>,
}

impl<T: 'static> Detachable<T> {
    fn new(shared: Arc<Shared>, work: Pin<Box<dyn Future<Output = T> + Send>>) -> Self {
        Self {
            work: Some(work),
            home: None,
            shared,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<T> {
        let Some(mut work) = self.work.take() else {
            return Poll::Pending;
        };
        let poll = work.as_mut().poll(cx);
        if poll.is_pending() {
            if self.home.is_none() {
                let home = |runtime| (runtime, Span::current(), self.shared.tasks.work());
                self.home = Handle::try_current().ok().map(home);
            }
            self.work = Some(work);
        } else {
            self.home = None;
        }
        poll
    }
}

impl<T: 'static> Drop for Detachable<T> {
    fn drop(&mut self) {
        #[cfg(seeded_bug)]
        if crate::seeded::is("ends with its client") {
            return;
        }
        if let (Some(work), Some((runtime, span, working))) = (self.work.take(), self.home.take()) {
            self.shared.tally.detached.add();
            tracing::debug!(parent: &span, "the client left; its request runs on");
            let work = async move { drop(work.await) };
            working.spawn(&runtime, work.instrument(span));
        }
    }
}

impl<S, B, R> fmt::Debug for ResponseFuture<S, B, R>
where
    S: Service<Request<B>> + 'static,
    S::Error: 'static,
    R: Body + 'static,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.state {
            State::Passed { .. } => "ResponseFuture::Passed(..)",
            State::Answered { .. } => "ResponseFuture::Answered(..)",
            State::Reading { .. } => "ResponseFuture::Reading(..)",
            State::Running { .. } => "ResponseFuture::Running(..)",
            State::Waiting { .. } => "ResponseFuture::Waiting(..)",
            State::Unkeyed { .. } => "ResponseFuture::Unkeyed(..)",
        })
    }
}
