//! The application under test: its handler writes each effect to a ledger that is not the store, and fails as its
//! request says.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    BoxError, Router,
    body::Bytes,
    error_handling::HandleErrorLayer,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::post,
};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle, time::sleep};
use tower::{ServiceBuilder, timeout::TimeoutLayer};
use tower_http::timeout::TimeoutLayer as AnsweringTimeout;
use tower_idempotency::{Guarantee as Promise, IdempotencyLayer};

use super::{
    event::{Event, Guarantee, History, Key, Run},
    store::{NAMED, Struck},
};

#[derive(Clone)]
pub struct App {
    pub history: Arc<History>,
    pub struck: Arc<Struck>,
    /// Of a timeout layer around the idempotency layer.
    pub outside: Duration,
    /// Of a timeout layer between it and the handler.
    pub inside: Duration,
}

/// When an attempt came to the timeout below the layer, which counts from later on.
#[derive(Clone, Copy)]
struct Since(Instant);

/// The payload of every panic that is a fault and no failure.
pub const PANIC: &str = "a fault of the test's making";

impl App {
    pub fn router(&self, layer: &IdempotencyLayer) -> Router {
        let protected = |promise| {
            let stack = ServiceBuilder::new()
                .layer(middleware::from_fn(name))
                .layer(HandleErrorLayer::new(async |_: BoxError| {
                    StatusCode::INTERNAL_SERVER_ERROR
                }))
                .layer(layer.clone().guarantee(promise))
                .map_request(|mut request: Request| {
                    request.extensions_mut().insert(Since(Instant::now()));
                    request
                })
                .layer(TimeoutLayer::new(self.inside));
            post(handle).layer(stack)
        };
        Router::new()
            .route("/once", protected(Promise::AtMostOnce))
            .route("/again", protected(Promise::AtLeastOnce))
            .layer(AnsweringTimeout::with_status_code(
                StatusCode::GATEWAY_TIMEOUT,
                self.outside,
            ))
            .with_state(self.clone())
    }
}

/// A router that is served until it is told to stop, which it has when every connection is closed.
pub struct Served {
    pub address: std::net::SocketAddr,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Served {
    pub async fn start(router: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(async move {
            let served = axum::serve(listener, router).with_graceful_shutdown(async move {
                let _ = stopped.await;
            });
            served.await.expect("it listens");
        });
        Self { address, stop, serving }
    }

    pub async fn stop(self) {
        let _ = self.stop.send(());
        self.serving.await.expect("it ends");
    }
}

/// Tells the store's witness whose request this is.
async fn name(request: Request, next: Next) -> Response {
    match key_of(request.uri().path(), request.headers()) {
        Some(key) => NAMED.scope(key, next.run(request)).await,
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn key_of(path: &str, headers: &HeaderMap) -> Option<Key> {
    Some(Key {
        tenant: text(headers, "authorization")?
            .strip_prefix("Basic tenant-")?
            .parse()
            .ok()?,
        guarantee: match path {
            "/once" => Guarantee::AtMostOnce,
            _ => Guarantee::AtLeastOnce,
        },
        number: text(headers, "idempotency-key")?.parse().ok()?,
    })
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn number(headers: &HeaderMap, name: &str) -> u64 {
    text(headers, name).map_or(0, |text| text.parse().expect("a number"))
}

/// Of the parts of an answer that are stored.
pub fn digest(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    status.as_u16().hash(&mut hasher);
    let mut fields: Vec<_> = headers
        .iter()
        .filter(|(name, _)| name.as_str().starts_with("x-") || *name == http::header::CONTENT_TYPE)
        .map(|(name, value)| (name.as_str(), value.as_bytes()))
        .collect();
    // Stable: values of one name keep their order.
    fields.sort_by_key(|(name, _)| *name);
    fields.hash(&mut hasher);
    body.hash(&mut hasher);
    hasher.finish()
}

/// One run of the handler. A panic or a timeout below the layer is an owner that was lost; any other way to be dropped
/// before its end is the layer's fault, and nothing excuses what follows from it.
struct Running<'a> {
    app: &'a App,
    key: Key,
    run: Run,
    since: Instant,
    ended: bool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let timed_out = self.since.elapsed() >= self.app.inside;
        if !self.ended && (timed_out || std::thread::panicking()) {
            self.app.history.push(Event::OwnerLost { key: self.key });
            self.app
                .struck
                .add(if timed_out { "timeout inside" } else { "handler panics" });
        }
    }
}

async fn handle(State(app): State<App>, request: Request) -> Response {
    let key = key_of(request.uri().path(), request.headers()).expect("it was named");
    let (parts, body) = request.into_parts();
    let Since(since) = *parts.extensions.get().expect("it came through the stack");
    let body = axum::body::to_bytes(body, usize::MAX)
        .await
        .expect("it was read by the layer");
    let fingerprint = body.first().map_or(0, |byte| byte - b'0');
    let run = app.history.fresh();
    app.history.push(Event::Began { run, key, fingerprint });
    let mut running = Running {
        app: &app,
        key,
        run,
        since,
        ended: false,
    };
    pause(&app, number(&parts.headers, "test-before-ms")).await;
    assert!(!parts.headers.contains_key("test-panic-before"), "{PANIC}");
    if parts.headers.contains_key("test-refuse") {
        running.ended = true;
        app.history.push(Event::NotExecuted { run });
        app.struck.add("not executed");
        return StatusCode::TOO_MANY_REQUESTS.into_response();
    }
    let answer = answer(&app.history, key, number(&parts.headers, "test-bytes"));
    let digest = digest(answer.0, &answer.1, &answer.2);
    app.history.push(Event::Effect {
        run: running.run,
        digest,
    });
    pause(&app, number(&parts.headers, "test-after-ms")).await;
    assert!(!parts.headers.contains_key("test-panic-after"), "{PANIC}");
    running.ended = true;
    answer.into_response()
}

async fn pause(app: &App, milliseconds: u64) {
    if milliseconds > 0 {
        app.struck.add("slow handler");
        sleep(Duration::from_millis(milliseconds)).await;
    }
}

/// An answer that no other run gives.
fn answer(history: &History, key: Key, bytes: u64) -> (StatusCode, HeaderMap, Bytes) {
    let nonce = history.fresh();
    let body = format!("{} {nonce} {}", key.tenant, "x".repeat(bytes as usize));
    let mut headers = HeaderMap::new();
    headers.insert("content-type", HeaderValue::from_static("text/plain"));
    headers.insert("x-nonce", nonce.into());
    headers.append("x-part", HeaderValue::from_static("one"));
    headers.append("x-part", HeaderValue::from_static("two"));
    (StatusCode::CREATED, headers, body.into())
}
