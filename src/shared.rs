//! What a layer, its clones' services and their requests have in common.

use std::{
    future::{Future, poll_fn},
    pin::pin,
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
    store::DynStore,
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
    pub(crate) async fn call<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let mut call = pin!(call);
        let now = poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx))).await;
        let result = match now {
            Poll::Ready(result) => result,
            Poll::Pending => match timeout(self.policy.store_timeout, call).await {
                Ok(result) => result,
                Err(elapsed) => Err(StoreError::with_source(StoreErrorKind::Unavailable, elapsed)),
            },
        };
        if let Err(error) = &result {
            if error.kind() != StoreErrorKind::Fenced {
                self.tally.store_errors.add();
            }
        }
        result
    }

    pub(crate) fn refuse<R: Body>(&self, rejection: Rejection, parts: &request::Parts) -> Response<ResponseBody<R>> {
        self.tally.refused.add();
        let response = self.policy.problems.respond(rejection, parts);
        response.map(|body| ResponseBody::buffered(BufferedBody::new(body, None)))
    }
}
