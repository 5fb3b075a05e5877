//! The service: lets a request pass, refuses it, or sets it on its way.

use std::{
    fmt, mem,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response, header};
use http_body::Body;
use tower_service::Service;

use crate::{
    body::RequestBody,
    extract::Attempt,
    future::{Reading, ResponseFuture, too_large},
    rejection::{Rejection, RejectionKind},
    shared::Shared,
};

/// The service that [`IdempotencyLayer`](crate::IdempotencyLayer) puts around another.
#[derive(Clone)]
pub struct Idempotency<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S> Idempotency<S> {
    pub(crate) fn new(inner: S, shared: Arc<Shared>) -> Self {
        Self { inner, shared }
    }
}

impl<S, B, R> Service<Request<B>> for Idempotency<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: RequestBody + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    R: Body + Send + 'static,
    R::Error: Send + 'static,
{
    type Response = Response<crate::ResponseBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, B, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let policy = &self.shared.policy;
        if !self.covers(&request) {
            return ResponseFuture::passed(self.inner.call(request));
        }
        let (parts, body) = request.into_parts();
        let key = match policy.key.find(&parts, &policy.key_rules) {
            Ok(Some(key)) => key,
            Ok(None) if !policy.require_key => {
                return ResponseFuture::passed(self.inner.call(Request::from_parts(parts, body)));
            }
            Ok(None) => {
                let detail = format!("this operation requires {}", policy.key.describe());
                let rejection = Rejection::new(RejectionKind::KeyMissing).with_detail(detail);
                return ResponseFuture::answered(self.shared.refuse(rejection, &parts));
            }
            Err(rejection) => return ResponseFuture::answered(self.shared.refuse(rejection, &parts)),
        };
        let announced = parts.headers.get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if announced.unwrap_or(0).max(body.size_hint().lower()) > policy.max_request_body as u64 {
            let rejection = too_large(policy.max_request_body);
            return ResponseFuture::answered(self.shared.refuse(rejection, &parts));
        }
        // The service that was polled ready goes with the request; its clone has to be polled again.
        let clone = self.inner.clone();
        let service = mem::replace(&mut self.inner, clone);
        let shared = Arc::clone(&self.shared);
        ResponseFuture::reading(
            Reading {
                shared,
                service,
                reserved: true,
                parts,
                key,
            },
            body,
        )
    }
}

impl<S> Idempotency<S> {
    /// Whether this request can need protection, before anything is taken apart.
    fn covers<B>(&self, request: &Request<B>) -> bool {
        let policy = &self.shared.policy;
        policy.methods.contains(request.method())
            && (policy.require_key || policy.key.may_be_in(request.headers()))
            // A layer above this one has it under its protection already.
            && request.extensions().get::<Attempt>().is_none()
    }
}

impl<S: fmt::Debug> fmt::Debug for Idempotency<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotency")
            .field("inner", &self.inner)
            .field("policy", &self.shared.policy)
            .finish_non_exhaustive()
    }
}
