//! The service: lets a request pass, refuses it, or sets it on its way.

use std::{
    fmt, mem,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response, header, request};
use http_body::Body;
use tower_service::Service;

use crate::{
    body::RequestBody,
    extract::Attempt,
    future::{Reading, ResponseFuture, too_large},
    identity::key_missing,
    key::{IdempotencyKey, InHead},
    policy::{Policy, WithoutKey},
    rejection::Rejection,
    scope::sent_uri,
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
        let shared = self.settings_of(&request);
        let policy = &shared.policy;
        if !covers(policy, &request) {
            return ResponseFuture::passed(self.inner.call(request));
        }
        let (parts, body) = request.into_parts();
        let key = match head(policy, &parts) {
            Ok(Head::Key(key)) => Some(key),
            Ok(Head::Unknown) => None,
            Ok(Head::Passes) => return ResponseFuture::passed(self.inner.call(Request::from_parts(parts, body))),
            Err(rejection) => return ResponseFuture::answered(shared.refuse(rejection, &parts, None)),
        };
        let announced = parts.headers.get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if announced.unwrap_or(0).max(body.size_hint().lower()) > policy.max_request_body as u64 {
            let rejection = too_large(policy.max_request_body);
            return ResponseFuture::answered(shared.refuse(rejection, &parts, None));
        }
        let shared = Arc::clone(shared);
        // The service that was polled ready goes with the request; its clone has to be polled again.
        let clone = self.inner.clone();
        let service = mem::replace(&mut self.inner, clone);
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
    /// Those of its route, or the layer's own.
    fn settings_of<B>(&self, request: &Request<B>) -> &Arc<Shared> {
        let routes = &self.shared.routes;
        if routes.is_empty() {
            return &self.shared;
        }
        let sent = sent_uri(request.extensions(), request.uri()).path();
        // A nested router strips its prefix: a pattern may mean the path with it or without.
        let found = routes.find(sent).or_else(|| routes.find(request.uri().path()));
        found.unwrap_or(&self.shared)
    }
}

/// Whether this request can need protection, before anything is taken apart.
fn covers<B>(policy: &Policy, request: &Request<B>) -> bool {
    policy.methods.contains(request.method())
        && (policy.without_key != WithoutKey::Pass
            || policy.key.may_be_in(request.headers())
            || policy.first_sent.as_ref().is_some_and(|first_sent| first_sent.is_in(request.headers())))
        // A layer above this one has it under its protection already.
        && request.extensions().get::<Attempt>().is_none()
}

/// What the head of a request says about its protection.
enum Head {
    Passes,
    Key(IdempotencyKey),
    /// The body has the last word.
    Unknown,
}

fn head(policy: &Policy, parts: &request::Parts) -> Result<Head, Rejection> {
    let head = match policy.key.in_head(parts, &policy.key_rules)? {
        InHead::Key(key) => Head::Key(key),
        InHead::Unknown => Head::Unknown,
        InHead::Missing if policy.without_key.derives() => Head::Unknown,
        InHead::Missing if policy.without_key == WithoutKey::Refuse => return Err(key_missing(policy)),
        InHead::Missing => match &policy.first_sent {
            // It means to be protected.
            Some(first_sent) if first_sent.is_in(&parts.headers) => return Err(key_missing(policy)),
            _ => return Ok(Head::Passes),
        },
    };
    // What the body has to say is judged when it is there.
    if let (Some(first_sent), Head::Key(_)) = (&policy.first_sent, &head) {
        first_sent.check(parts, policy.retention)?;
    }
    Ok(head)
}

impl<S: fmt::Debug> fmt::Debug for Idempotency<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotency")
            .field("inner", &self.inner)
            .field("policy", &self.shared.policy)
            .finish_non_exhaustive()
    }
}
