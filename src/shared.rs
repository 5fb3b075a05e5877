//! What a layer, its clones' services and their requests have in common.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::Poll,
};

use http::{Response, request};
use http_body::Body;
use tokio::{sync::Semaphore, time::timeout};

use crate::{
    body::{BufferedBody, ResponseBody},
    drain::Tasks,
    error::{StoreError, StoreErrorKind},
    observe::Tally,
    policy::Policy,
    rejection::Rejection,
    store::{Call, DynStore},
    wait::Waiting,
};

#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) store: Arc<dyn DynStore>,
    pub(crate) policy: Policy,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) waiting: Arc<Waiting>,
    /// Outcomes that wait for the store to come back.
    pub(crate) settling: Arc<Semaphore>,
}

/// The most outcomes that wait for the store to come back.
const MAX_SETTLING: usize = 1024;

impl Shared {
    pub(crate) fn new(store: Arc<dyn DynStore>) -> Self {
        Self {
            store,
            policy: Policy::default(),
            tasks: Arc::default(),
            tally: Arc::default(),
            waiting: Arc::default(),
            settling: Arc::new(Semaphore::new(MAX_SETTLING)),
        }
    }

    /// A call to the store, with a deadline. One that is answered at once costs no timer.
    pub(crate) async fn call<T: Unpin>(&self, mut call: Call<'_, T>) -> Result<T, StoreError> {
        let now = poll_fn(|cx| Poll::Ready(Pin::new(&mut call).poll(cx))).await;
        let result = match now {
            Poll::Ready(result) => result,
            // Boxed: a timer is large, and whoever is answered at once would carry it about.
            Poll::Pending => match Box::pin(timeout(self.policy.store_timeout, call)).await {
                Ok(result) => result,
                Err(elapsed) => Err(StoreError::with_source(StoreErrorKind::Unavailable, elapsed)),
            },
        };
        self.noted(result)
    }

    /// Counts what failed.
    pub(crate) fn noted<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        result.inspect_err(|error| {
            if error.kind() != StoreErrorKind::Fenced {
                self.tally.store_errors.add();
            }
        })
    }

    pub(crate) fn refuse<R: Body>(&self, rejection: Rejection, parts: &request::Parts) -> Response<ResponseBody<R>> {
        self.tally.refused.add();
        let response = self.policy.problems.respond(rejection, parts);
        response.map(|body| ResponseBody::buffered(BufferedBody::new(body, None)))
    }
}
