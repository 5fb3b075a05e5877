//! A protected application inside the test: its handler counts, and ends when the test says so.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use axum::{Router, body::Body, response::IntoResponse, response::Response, routing::post};
use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use tokio::sync::Semaphore;
use tower::{Service, ServiceExt};
use tower_idempotency::{Attempt, IdempotencyLayer};

use super::http::Answer;

/// What the test and the handler share.
#[derive(Clone, Debug)]
pub struct Control {
    runs: Arc<AtomicUsize>,
    ends: Arc<AtomicUsize>,
    entered: Arc<Semaphore>,
    gate: Arc<Semaphore>,
}

impl Control {
    fn new(open: bool) -> Self {
        Self {
            runs: Arc::default(),
            ends: Arc::default(),
            entered: Arc::new(Semaphore::new(0)),
            gate: Arc::new(Semaphore::new(if open { Semaphore::MAX_PERMITS } else { 0 })),
        }
    }

    /// How often the handler was started.
    pub fn runs(&self) -> usize {
        self.runs.load(SeqCst)
    }

    /// How often it came to its end.
    pub fn ends(&self) -> usize {
        self.ends.load(SeqCst)
    }

    /// Waits until one more handler has started.
    pub async fn entered(&self) {
        self.entered.acquire().await.expect("never closed").forget();
    }

    /// Lets one handler go on to its end.
    pub fn let_go(&self) {
        self.gate.add_permits(1);
    }

    /// The part of a handler that counts and waits; gives the number of the run.
    pub async fn pass(&self) -> usize {
        let run = self.runs.fetch_add(1, SeqCst) + 1;
        self.entered.add_permits(1);
        self.gate.acquire().await.expect("never closed").forget();
        self.ends.fetch_add(1, SeqCst);
        run
    }
}

/// A handler that ends at once.
pub fn open() -> Control {
    Control::new(true)
}

/// A handler that waits for [`Control::let_go`].
pub fn gated() -> Control {
    Control::new(false)
}

/// `POST /pay` answers 201 with the number of the run, the attempt and the request's body.
pub fn pay(control: &Control, layer: IdempotencyLayer) -> Router {
    answering(control, layer, |run, attempt, body: Bytes| {
        let body = String::from_utf8_lossy(&body).into_owned();
        (
            http::StatusCode::CREATED,
            format!("run {run} attempt {attempt}: {body}"),
        )
            .into_response()
    })
}

/// `POST /pay` answers as it is told, after the gate.
pub fn answering(
    control: &Control,
    layer: IdempotencyLayer,
    answer: impl Fn(usize, u64, Bytes) -> Response + Clone + Send + Sync + 'static,
) -> Router {
    let control = control.clone();
    let handler = async move |attempt: Option<Attempt>, body: Bytes| {
        let run = control.pass().await;
        answer(run, attempt.map_or(0, |attempt| attempt.number()), body)
    };
    Router::new().route("/pay", post(handler)).layer(layer)
}

/// A request to `/pay` with a key.
pub fn keyed(key: &str, body: &'static str) -> Request<Body> {
    Request::post("/pay")
        .header("idempotency-key", key)
        .body(Body::from(body))
        .expect("a request")
}

/// Sends a request into the application and reads the answer.
pub async fn call<S, B>(service: &S, request: Request<Body>) -> Answer
where
    S: Service<Request<Body>, Response = http::Response<B>, Error = Infallible> + Clone,
    B: http_body::Body,
    B::Error: std::fmt::Debug,
{
    let Ok(response) = service.clone().oneshot(request).await;
    let (parts, body) = response.into_parts();
    let collected = body.collect().await.expect("a whole body");
    Answer {
        status: parts.status,
        headers: parts.headers,
        trailers: collected.trailers().cloned(),
        body: collected.to_bytes(),
    }
}

/// Sends a request from a client of its own, which can be made to leave by aborting it.
pub fn spawn(service: &Router, request: Request<Body>) -> tokio::task::JoinHandle<Answer> {
    let service = service.clone();
    tokio::spawn(async move { call(&service, request).await })
}

/// Every method and path answers 201 with the number of the run, the attempt and the request's body.
pub fn anywhere(control: &Control, layer: IdempotencyLayer) -> Router {
    anywhere_answering(control, layer, |run, request, body| {
        let attempt = request.extensions.get().map_or(0, Attempt::number);
        let body = String::from_utf8_lossy(&body).into_owned();
        let answer = format!("run {run} attempt {attempt}: {body}");
        (http::StatusCode::CREATED, answer).into_response()
    })
}

/// Every method and path answers as it is told, after the gate.
pub fn anywhere_answering(
    control: &Control,
    layer: IdempotencyLayer,
    answer: impl Fn(usize, &http::request::Parts, Bytes) -> Response + Clone + Send + Sync + 'static,
) -> Router {
    let control = control.clone();
    let handler = async move |request: Request<Body>| {
        let run = control.pass().await;
        let (parts, body) = request.into_parts();
        let body = body.collect().await.expect("a whole body").to_bytes();
        answer(run, &parts, body)
    };
    Router::new().fallback(handler).layer(layer)
}

/// A request with these headers, in their order.
pub fn request(method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Request<Body> {
    let request = headers.iter().fold(Request::builder(), |request, (name, value)| {
        request.header(*name, *value)
    });
    request.method(method).uri(path).body(body.into()).expect("a request")
}

/// A `POST` to `/pay` with these headers.
pub fn to_pay(headers: &[(&str, &str)], body: impl Into<Body>) -> Request<Body> {
    request("POST", "/pay", headers, body)
}
