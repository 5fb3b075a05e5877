//! What a layer, its clones' services and their requests have in common.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::Poll,
};

use http::{Response, request};
use http_body::Body;
use tokio::sync::Semaphore;

use crate::{
    body::{BufferedBody, ResponseBody},
    drain::Tasks,
    error::{StoreError, StoreErrorKind},
    observe::Tally,
    policy::Policy,
    record::RecordId,
    rejection::Rejection,
    routes::Routes,
    store::{Call, DynStore},
    sync::timeout,
    wait::Waiting,
};

#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) store: Arc<dyn DynStore>,
    pub(crate) policy: Policy,
    /// Requests that have settings of their own.
    pub(crate) routes: Routes,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) waiting: Arc<Waiting>,
    /// Outcomes that wait for the store to come back.
    pub(crate) settling: Arc<Semaphore>,
    /// Claims that were not granted and are to be ended. They have places of their own: nothing ran under them, and an
    /// answer must not be lost for their sake.
    pub(crate) giving_up: Arc<Semaphore>,
}

/// The most of each.
const MAX_SETTLING: usize = 1024;

impl Shared {
    pub(crate) fn new(store: Arc<dyn DynStore>) -> Self {
        Self {
            store,
            policy: Policy::default(),
            routes: Routes::default(),
            tasks: Arc::default(),
            tally: Arc::default(),
            waiting: Arc::default(),
            settling: Arc::new(Semaphore::new(MAX_SETTLING)),
            giving_up: Arc::new(Semaphore::new(MAX_SETTLING)),
        }
    }

    /// Those that requests run in.
    #[cfg(feature = "postgres")]
    pub(crate) fn transactions(&self) -> Option<Arc<dyn crate::transactional::Transactions>> {
        match self.policy.guarantee {
            crate::policy::Guarantee::Transactional => self.store.transactions(),
            _ => None,
        }
    }

    /// Whether the store can run handlers in transactions of its own.
    pub(crate) fn has_transactions(&self) -> bool {
        #[cfg(feature = "postgres")]
        return self.store.transactions().is_some();
        #[cfg(not(feature = "postgres"))]
        false
    }

    /// The same work under settings that may become others.
    pub(crate) fn without_routes(&self) -> Self {
        Self {
            routes: Routes::default(),
            ..self.clone()
        }
    }

    /// Changes the settings of every route.
    pub(crate) fn change(&mut self, change: &dyn Fn(&mut Policy)) {
        change(&mut self.policy);
        for route in self.routes.all_mut() {
            Arc::make_mut(route).change(change);
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

    /// The answer to a request that does not run; `record` is its look-up key, if it got that far.
    pub(crate) fn refuse<R: Body>(
        &self,
        rejection: Rejection,
        parts: &request::Parts,
        record: Option<RecordId>,
    ) -> Response<ResponseBody<R>> {
        self.tally.refused.add();
        let response = self.policy.problems.respond(rejection, parts);
        if let Some(rejection) = response.extensions().get::<Rejection>() {
            let (reason, debug_id) = (rejection.kind().slug(), rejection.debug_id());
            tracing::info!(
                reason,
                debug_id,
                record = record.map(tracing::field::display),
                "a request is refused"
            );
        }
        response.map(|body| ResponseBody::buffered(BufferedBody::new(body, None)))
    }
}
