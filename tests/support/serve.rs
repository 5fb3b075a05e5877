//! Servers on loopback, and handlers that count, that can be held, and whose clients can be seen to leave.

use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
};

use axum::{Router, body::Body};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tower::{Layer, Service, ServiceExt};

use super::http::{Answer, post};

/// How often a handler had its effect.
#[derive(Clone, Debug, Default)]
pub struct Effects(Arc<AtomicUsize>);

impl Effects {
    /// One more; says which one it is.
    pub fn happen(&self) -> usize {
        self.0.fetch_add(1, SeqCst) + 1
    }

    pub fn count(&self) -> usize {
        self.0.load(SeqCst)
    }
}

/// Where handlers stop until the test lets them on, one by one.
#[derive(Clone, Debug)]
pub struct Gate {
    entered: Arc<Semaphore>,
    open: Arc<Semaphore>,
}

impl Gate {
    pub fn closed() -> Self {
        Self {
            entered: Arc::new(Semaphore::new(0)),
            open: Arc::new(Semaphore::new(0)),
        }
    }

    /// For the handler.
    pub async fn pass(&self) {
        self.entered.add_permits(1);
        take(&self.open).await;
    }

    /// Until one more handler stands here.
    pub async fn entered(&self) {
        take(&self.entered).await;
    }

    /// Lets one handler on.
    pub fn open(&self) {
        self.open.add_permits(1);
    }
}

async fn take(semaphore: &Semaphore) {
    semaphore.acquire().await.expect("it is never closed").forget();
}

/// A layer that tells when the request below it is over, and when it was dropped before it was answered: its client
/// left.
#[derive(Clone, Debug)]
pub struct Departures {
    left: Arc<Semaphore>,
    over: Arc<Semaphore>,
}

impl Departures {
    pub fn none() -> Self {
        Self {
            left: Arc::new(Semaphore::new(0)),
            over: Arc::new(Semaphore::new(0)),
        }
    }

    /// Until one more client has left, and everything below knows it.
    pub async fn one_more(&self) {
        take(&self.left).await;
    }

    /// Until one more request is over, answered or not.
    pub async fn one_more_over(&self) {
        take(&self.over).await;
    }
}

impl<S> Layer<S> for Departures {
    type Service = Watched<S>;

    fn layer(&self, inner: S) -> Watched<S> {
        Watched {
            inner,
            departures: self.clone(),
        }
    }
}

#[derive(Clone)]
pub struct Watched<S> {
    inner: S,
    departures: Departures,
}

impl<S: Service<R>, R> Service<R> for Watched<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = WatchedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        WatchedFuture {
            future: Box::pin(self.inner.call(request)),
            ending: Ending {
                departures: self.departures.clone(),
                answered: false,
            },
        }
    }
}

pub struct WatchedFuture<F> {
    // Dropped in this order: what is below hears of the departure before the test does.
    future: Pin<Box<F>>,
    ending: Ending,
}

struct Ending {
    departures: Departures,
    answered: bool,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if !self.answered {
            self.departures.left.add_permits(1);
        }
        self.departures.over.add_permits(1);
    }
}

impl<F: Future> Future for WatchedFuture<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let poll = self.future.as_mut().poll(cx);
        self.ending.answered = poll.is_ready();
        poll
    }
}

/// A request with a key.
pub fn keyed(path: &str, key: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    post(path, &[("idempotency-key", key)], body)
}

/// An answer of whatever body, read to its end.
pub async fn whole<B: http_body::Body>(response: Response<B>) -> Result<Answer, B::Error> {
    let (parts, body) = response.into_parts();
    let collected = body.collect().await?;
    Ok(Answer {
        status: parts.status,
        headers: parts.headers,
        trailers: collected.trailers().cloned(),
        body: collected.to_bytes(),
    })
}

/// Asks a router without a socket.
pub async fn ask<B>(app: &Router, request: Request<B>) -> Answer
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    let response = app.clone().oneshot(request).await.expect("a router never fails");
    whole(response).await.expect("a whole body")
}

/// `retry` is `first` once more: but for the marker, and the date, which is the server's at each answer.
pub fn assert_replay(first: &Answer, retry: &Answer) {
    assert!(!first.is_replay(), "{first:?}");
    assert!(retry.is_replay(), "{retry:?}");
    let plain = |answer: &Answer| {
        let mut answer = answer.clone();
        answer.headers.remove("idempotent-replayed");
        answer.headers.remove("date");
        answer
    };
    assert_eq!(plain(first), plain(retry));
}

/// Serves a router with `axum::serve`.
pub async fn serve(app: Router) -> SocketAddr {
    let (listener, address) = listen().await;
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

pub async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    (listener, address)
}

/// What a raw hyper server takes, its body boxed so that it can be made again.
pub type HyperRequest = Request<BoxBody<Bytes, hyper::Error>>;

/// Serves a tower service with hyper alone, over HTTP/1.1 or HTTP/2.
pub async fn serve_hyper<S, B>(version: http::Version, service: S) -> SocketAddr
where
    S: Service<HyperRequest, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: std::error::Error + Send + Sync + 'static,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    let service = service.map_request(|request: Request<hyper::body::Incoming>| request.map(BodyExt::boxed));
    let service = TowerToHyperService::new(service);
    let (listener, address) = listen().await;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (stream, service) = (TokioIo::new(stream), service.clone());
            tokio::spawn(async move {
                // A client that leaves is an error to hyper; the tests look at what it leaves behind.
                let _ = match version {
                    http::Version::HTTP_2 => {
                        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        server.serve_connection(stream, service).await
                    }
                    _ => {
                        let server = hyper::server::conn::http1::Builder::new();
                        server.serve_connection(stream, service).with_upgrades().await
                    }
                };
            });
        }
    });
    address
}

/// One HTTP/2 connection, to be cloned for each request.
pub async fn connect_h2(address: SocketAddr) -> hyper::client::conn::http2::SendRequest<Body> {
    let stream = TcpStream::connect(address).await.expect("somebody listens");
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("a connection");
    tokio::spawn(connection);
    sender
}

/// The same request for a connection that wants absolute targets.
pub fn absolute<B>(request: Request<B>) -> Request<Body>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    let (mut parts, body) = request.into_parts();
    parts.headers.remove("host");
    parts.uri = format!("http://localhost{}", parts.uri).parse().expect("a target");
    Request::from_parts(parts, Body::new(body))
}

/// Any body over a connection of its own: [`super::http::send`] takes bytes only.
pub async fn send_body(address: SocketAddr, request: Request<Body>) -> hyper::Result<Answer> {
    let stream = TcpStream::connect(address).await.expect("somebody listens");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    whole(sender.send_request(request).await?).await
}

/// Sends bytes as they are, for what a client library would not say.
pub async fn raw(address: SocketAddr, bytes: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("somebody listens");
    stream.write_all(bytes.as_bytes()).await.expect("they are sent");
    stream
}

/// Reads until `end` has come, and says all that was read.
pub async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    while !read.ends_with(end.as_bytes()) {
        read.push(
            stream
                .read_u8()
                .await
                .unwrap_or_else(|error| panic!("{error} before {end:?}, after {:?}", String::from_utf8_lossy(&read))),
        );
    }
    String::from_utf8(read).expect("text")
}

/// A body of frames, whose size is not known before its end.
pub fn frames<const N: usize>(frames: [&'static str; N]) -> Body {
    Body::from_stream(futures_util::stream::iter(frames.map(Ok::<_, Infallible>)))
}

/// A body that the test sends frame by frame; it ends when the sender is dropped.
pub fn channel() -> (mpsc::UnboundedSender<&'static str>, Body) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let frames = futures_util::stream::unfold(receiver, async |mut receiver| {
        let frame = receiver.recv().await?;
        Some((Ok::<_, Infallible>(frame), receiver))
    });
    (sender, Body::from_stream(frames))
}
