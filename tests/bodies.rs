//! Bodies and headers: what is read before anything is begun, what is kept of an answer, and what a replay repeats.
#![cfg(feature = "axum")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    convert::Infallible,
    future::ready,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use axum::{
    Router,
    body::Body,
    middleware::map_request,
    response::{AppendHeaders, IntoResponse},
    routing::{MethodRouter, any, post},
};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
};
use tower::{ServiceBuilder, ServiceExt, util::BoxCloneSyncService};
use tower_http::limit::RequestBodyLimitLayer;
use tower_idempotency::{Attempt, BufferedBody, Guarantee, IdempotencyLayer, MemoryStore, RequestBody};

use crate::support::{
    http::{Answer, post as plain, send},
    serve::{
        Departures, Effects, HyperRequest, absolute, ask, assert_replay, channel, connect_h2, frames, keyed, raw,
        read_until, send_body, serve, serve_hyper, whole,
    },
};

/// Says what it received, and which run it is.
fn receive(effects: &Effects) -> MethodRouter {
    let effects = effects.clone();
    post(async move |body: Bytes| (StatusCode::CREATED, format!("{}: {body:?}", effects.happen())))
}

fn protected(route: MethodRouter, idempotency: IdempotencyLayer) -> Router {
    Router::new().route("/", route).layer(idempotency)
}

fn layer() -> IdempotencyLayer {
    IdempotencyLayer::new(MemoryStore::new())
}

/// A keyed request whose body has no known size: over HTTP/1.1 it is chunked.
fn chunked(body: Body) -> Request<Body> {
    keyed("/", "one", "").map(|_| body)
}

fn assert_not_kept(answer: &Answer, original: StatusCode) {
    assert_eq!(answer.problem(), "response-not-kept");
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(answer.json()["original_status"], original.as_u16());
    assert!(!answer.is_replay());
}

/// A body that says of its length what it is told to.
struct Says {
    hint: SizeHint,
    text: Option<&'static str>,
}

impl http_body::Body for Says {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.text.take().map(|text| Ok(Frame::data(Bytes::from(text)))))
    }

    fn size_hint(&self) -> SizeHint {
        self.hint
    }
}

/// The first answer and its retry, where the service answers with this body and four bytes may be kept.
async fn saying(hint: SizeHint, text: &'static str) -> (Answer, Answer) {
    let service =
        ServiceBuilder::new()
            .layer(layer().max_response_body(4))
            .service_fn(move |_: Request<Full<Bytes>>| {
                let text = Some(text);
                ready(Ok::<_, Infallible>(Response::new(Says { hint, text })))
            });
    let ask = async || {
        let answer = service.clone().oneshot(keyed("/", "one", "")).await.unwrap();
        whole(answer).await.unwrap()
    };
    (ask().await, ask().await)
}

#[tokio::test]
async fn an_answer_of_another_length_than_it_said_is_an_unknown_outcome() {
    for text in ["pai", "paid!"] {
        let (first, retry) = saying(SizeHint::with_exact(4), text).await;
        assert_eq!(
            (first.status, retry.problem()),
            (StatusCode::OK, "outcome-unknown".to_owned())
        );
    }
}

#[tokio::test]
async fn an_answer_that_says_only_how_long_it_is_at_least_is_kept_up_to_the_limit() {
    let at_least = |length| {
        let mut hint = SizeHint::new();
        hint.set_lower(length);
        hint
    };
    for least in [0, 3, 4] {
        let (first, retry) = saying(at_least(least), "paid").await;
        assert_replay(&first, &retry);
    }
    for least in [0, 4, 5] {
        let (first, retry) = saying(at_least(least), "paid!").await;
        assert_eq!(first.body, "paid!");
        assert_not_kept(&retry, StatusCode::OK);
    }
}

/// What the inner service receives of a request with this body.
async fn received<B>(body: B) -> Bytes
where
    B: RequestBody<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>> + std::fmt::Debug>
        + Send
        + 'static,
{
    let service = ServiceBuilder::new()
        .layer(layer())
        .service_fn(|request: Request<B>| async {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            Ok::<_, Infallible>(Response::new(Full::new(body)))
        });
    let request = keyed("/", "one", "").map(|_: Full<Bytes>| body);
    let answer = service.oneshot(request).await.unwrap();
    answer.into_body().collect().await.unwrap().to_bytes()
}

// ---- requests

#[tokio::test]
async fn the_service_gets_its_own_type_of_body_with_the_same_bytes() {
    let sent = || Full::new(Bytes::from("one two three"));
    assert_eq!(received(sent()).await, "one two three");
    assert_eq!(received(sent().boxed()).await, "one two three");
    assert_eq!(received(sent().boxed_unsync()).await, "one two three");
    let buffered = BufferedBody::new(Bytes::from("one two three"), None);
    assert_eq!(received(buffered).await, "one two three");
}

#[tokio::test]
async fn a_request_body_of_one_frame_is_not_copied() {
    let service = ServiceBuilder::new()
        .layer(layer())
        .service_fn(async |request: Request<Full<Bytes>>| {
            let body = request.into_body().collect().await?.to_bytes();
            Ok::<_, Infallible>(Response::new(Body::from(format!("{:p}", body.as_ptr()))))
        });
    let sent = Bytes::from(vec![b'x'; 1000]);
    let answer = service.oneshot(keyed("/", "one", sent.clone())).await.unwrap();
    assert_eq!(whole(answer).await.unwrap().body, format!("{:p}", sent.as_ptr()));
}

#[tokio::test]
async fn a_request_body_of_many_frames_arrives_whole() {
    let effects = Effects::default();
    let address = serve(protected(receive(&effects), layer())).await;
    let answer = send_body(address, chunked(frames(["one ", "two ", "", "three"])))
        .await
        .unwrap();
    assert_eq!(answer.body, "1: b\"one two three\"");
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn chunked_and_sized_the_same_bytes_are_the_same_request() {
    let effects = Effects::default();
    let address = serve(protected(receive(&effects), layer())).await;
    let sized = send(address, keyed("/", "one", "one two three")).await.unwrap();
    for body in [frames(["one two three"]), frames(["one ", "two ", "three"])] {
        assert_replay(&sized, &send_body(address, chunked(body)).await.unwrap());
    }
    let other = send_body(address, chunked(frames(["one ", "two"]))).await.unwrap();
    assert_eq!(other.problem(), "idempotency-key-reused");
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn a_content_length_over_the_limit_is_refused_before_a_byte_is_asked_for() {
    let (effects, store) = (Effects::default(), MemoryStore::new());
    let idempotency = IdempotencyLayer::new(store.clone()).max_request_body(5);
    let address = serve(protected(receive(&effects), idempotency)).await;
    let head = |length: usize| {
        format!(
            "POST / HTTP/1.1\r\nhost: localhost\r\nidempotency-key: one\r\nexpect: 100-continue\r\n\
             content-length: {length}\r\n\r\n"
        )
    };
    let mut client = raw(address, &head(6)).await;
    let answer = read_until(&mut client, "\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert_eq!((effects.count(), store.len()), (0, 0));
    // At the limit the body is asked for.
    let mut client = raw(address, &head(5)).await;
    let answer = read_until(&mut client, "\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 100 "), "{answer}");
    client.write_all(b"12345").await.unwrap();
    let answer = read_until(&mut client, "\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    assert_eq!((effects.count(), store.len()), (1, 1));
}

#[tokio::test]
async fn a_chunked_body_over_the_limit_is_refused_and_leaves_nothing() {
    let (effects, store) = (Effects::default(), MemoryStore::new());
    let idempotency = IdempotencyLayer::new(store.clone()).max_request_body(5);
    let address = serve(protected(receive(&effects), idempotency)).await;
    let refused = send_body(address, chunked(frames(["123", "456"]))).await.unwrap();
    assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(refused.problem(), "request-body-too-large");
    assert_eq!((effects.count(), store.len()), (0, 0));
    let fits = send_body(address, chunked(frames(["123", "45"]))).await.unwrap();
    assert_eq!((fits.status, fits.is_replay()), (StatusCode::CREATED, false));
}

#[tokio::test]
async fn a_body_over_the_limit_of_an_outer_layer_is_refused_as_too_large() {
    let (effects, store) = (Effects::default(), MemoryStore::new());
    let idempotency = IdempotencyLayer::new(store.clone());
    let app = protected(receive(&effects), idempotency).layer(RequestBodyLimitLayer::new(5));
    let address = serve(app).await;
    let sized = send(address, keyed("/", "one", "123456")).await.unwrap();
    assert_eq!(sized.status, StatusCode::PAYLOAD_TOO_LARGE);
    let streamed = send_body(address, chunked(frames(["123", "456"]))).await.unwrap();
    assert_eq!(streamed.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(streamed.problem(), "request-body-too-large");
    assert_eq!((effects.count(), store.len()), (0, 0));
}

#[tokio::test]
async fn of_a_truncated_body_nothing_is_begun_and_the_key_stays_free() {
    let (effects, store, requests) = (Effects::default(), MemoryStore::new(), Departures::none());
    let app = protected(receive(&effects), IdempotencyLayer::new(store.clone())).layer(requests.clone());
    let address = serve(app).await;
    let sized = "content-length: 6\r\n\r\n123";
    let chunked = "transfer-encoding: chunked\r\n\r\n3\r\n123\r\n";
    for cut in [sized, chunked] {
        let head = "POST / HTTP/1.1\r\nhost: localhost\r\nidempotency-key: one\r\n";
        drop(raw(address, &format!("{head}{cut}")).await);
        requests.one_more_over().await;
        assert_eq!((effects.count(), store.len()), (0, 0));
    }
    let fresh = send(address, keyed("/", "one", "123456")).await.unwrap();
    assert_eq!((fresh.status, fresh.is_replay()), (StatusCode::CREATED, false));
    assert_eq!((effects.count(), store.len()), (1, 1));
}

#[tokio::test]
async fn while_a_slow_body_arrives_its_key_is_not_claimed() {
    let (effects, store) = (Effects::default(), MemoryStore::new());
    let arrived = Arc::new(Semaphore::new(0));
    let seen = arrived.clone();
    let watch_frames = move |request: Request<Body>| {
        let seen = seen.clone();
        ready(request.map(|body| {
            Body::new(body.map_frame(move |frame| {
                seen.add_permits(1);
                frame
            }))
        }))
    };
    let app = protected(receive(&effects), IdempotencyLayer::new(store.clone())).layer(map_request(watch_frames));
    let address = serve(app).await;
    let head = "POST / HTTP/1.1\r\nhost: localhost\r\nidempotency-key: one\r\ncontent-length: 6\r\n\r\n";
    let mut slow = raw(address, &format!("{head}123")).await;
    arrived.acquire().await.unwrap().forget();
    assert!(store.is_empty());
    let quick = send(address, keyed("/", "one", "123456")).await.unwrap();
    assert_eq!(
        (quick.status, quick.body.as_ref()),
        (StatusCode::CREATED, &b"1: b\"123456\""[..])
    );
    assert!(!quick.is_replay());
    slow.write_all(b"456").await.unwrap();
    let answer = read_until(&mut slow, "1: b\"123456\"").await;
    assert!(
        answer.starts_with("HTTP/1.1 201 ") && answer.contains("idempotent-replayed: true"),
        "{answer}"
    );
    assert_eq!((effects.count(), store.len()), (1, 1));
}

// ---- answers that are not kept

#[tokio::test]
async fn an_answer_over_the_limit_streams_through_and_is_not_run_again() {
    let effects = Effects::default();
    let handler = effects.clone();
    let (sender, body) = channel();
    let body = Arc::new(Mutex::new(Some(body)));
    let route = post(async move || {
        handler.happen();
        let body = body.lock().unwrap_or_else(PoisonError::into_inner).take();
        (StatusCode::CREATED, body.expect("it runs once"))
    });
    let address = serve(protected(route, layer().max_response_body(8))).await;
    sender.send("12345").unwrap();
    sender.send("67890").unwrap();
    let mut connection = connect(address).await;
    let first = connection.send_request(chunked(Body::from("100"))).await.unwrap();
    assert_eq!(first.status(), StatusCode::CREATED);
    let mut body = first.into_body();
    let mut read = Vec::new();
    while read.len() < 10 {
        read.extend(body.frame().await.unwrap().unwrap().into_data().unwrap());
    }
    assert_eq!(read, b"1234567890", "it flows on although its end is not there yet");
    assert_not_kept(
        &send(address, keyed("/", "one", "100")).await.unwrap(),
        StatusCode::CREATED,
    );
    sender.send("the end").unwrap();
    drop(sender);
    assert_eq!(body.collect().await.unwrap().to_bytes(), "the end");
    assert_not_kept(
        &send(address, keyed("/", "one", "100")).await.unwrap(),
        StatusCode::CREATED,
    );
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn an_answer_that_says_it_is_over_the_limit_is_not_even_read() {
    let effects = Effects::default();
    let handler = effects.clone();
    let bytes = "0123456789".repeat(100_000);
    let answer = bytes.clone();
    let route = post(async move || {
        handler.happen();
        (StatusCode::ACCEPTED, answer)
    });
    let address = serve(protected(route, layer().max_response_body(999_999))).await;
    let first = send(address, keyed("/", "one", "100")).await.unwrap();
    assert_eq!(first.status, StatusCode::ACCEPTED);
    assert_eq!(first.header("content-length"), Some("1000000"));
    assert!(first.body == bytes, "identical bytes");
    assert_not_kept(
        &send(address, keyed("/", "one", "100")).await.unwrap(),
        StatusCode::ACCEPTED,
    );
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn an_answer_at_the_limit_is_kept() {
    let effects = Effects::default();
    for body in [|| Body::from("12345678"), || frames(["1234", "5678"])] {
        let handler = effects.clone();
        let route = post(async move || {
            handler.happen();
            body()
        });
        let app = protected(route, layer().max_response_body(8));
        let first = ask(&app, keyed("/", "one", "100")).await;
        assert_replay(&first, &ask(&app, keyed("/", "one", "100")).await);
    }
    assert_eq!(effects.count(), 2);
}

#[tokio::test]
async fn an_event_stream_is_not_held_back_and_not_kept() {
    let effects = Effects::default();
    let handler = effects.clone();
    let (sender, body) = channel();
    let body = Arc::new(Mutex::new(Some(body)));
    let route = post(async move || {
        handler.happen();
        let body = body.lock().unwrap_or_else(PoisonError::into_inner).take();
        (
            [("content-type", "text/event-stream; charset=utf-8")],
            body.expect("it runs once"),
        )
    });
    let address = serve(protected(route, layer())).await;
    let mut connection = connect(address).await;
    // The answer's head is here before the first event is.
    let mut events = connection
        .send_request(chunked(Body::from("100")))
        .await
        .unwrap()
        .into_body();
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        sender.send(event).unwrap();
        assert_eq!(events.frame().await.unwrap().unwrap().into_data().unwrap(), event);
    }
    assert_not_kept(&send(address, keyed("/", "one", "100")).await.unwrap(), StatusCode::OK);
    drop(sender);
    assert!(events.frame().await.is_none());
    assert_not_kept(&send(address, keyed("/", "one", "100")).await.unwrap(), StatusCode::OK);
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn an_upgrade_works_and_is_not_kept() {
    let effects = Effects::default();
    let handler = effects.clone();
    let route = any(async move |mut request: Request<Body>| {
        handler.happen();
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut io = TokioIo::new(upgrade.await.unwrap());
            let mut word = [0; 4];
            io.read_exact(&mut word).await.unwrap();
            io.write_all(&word).await.unwrap();
        });
        (
            StatusCode::SWITCHING_PROTOCOLS,
            [("connection", "upgrade"), ("upgrade", "echo")],
        )
    });
    let address = serve(protected(route, layer().methods([Method::GET]))).await;
    let request =
        "GET / HTTP/1.1\r\nhost: localhost\r\nidempotency-key: one\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
    let mut client = raw(address, request).await;
    let answer = read_until(&mut client, "\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.1 101 ") && answer.contains("upgrade: echo"),
        "{answer}"
    );
    client.write_all(b"ping").await.unwrap();
    assert_eq!(read_until(&mut client, "ping").await, "ping");
    let mut retry = keyed("/", "one", "");
    *retry.method_mut() = Method::GET;
    assert_not_kept(&send(address, retry).await.unwrap(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(effects.count(), 1);
}

/// A body that breaks after its first frame, whether its size was known or not.
fn broken(beginning: String, sized: bool) -> Body {
    let error = || std::io::Error::other("the disk is gone");
    if sized {
        let body = Full::new(Bytes::from(beginning)).map_err(|never| match never {});
        Body::new(body.with_trailers(ready(Some(Err(error())))))
    } else {
        Body::from_stream(stream::iter([Ok(beginning), Err(error())]))
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_an_unknown_outcome() {
    for (guarantee, sized) in [
        (Guarantee::AtMostOnce, false),
        (Guarantee::AtMostOnce, true),
        (Guarantee::AtLeastOnce, false),
        (Guarantee::AtLeastOnce, true),
    ] {
        let effects = Effects::default();
        let handler = effects.clone();
        let route = post(async move |attempt: Attempt| {
            handler.happen();
            let text = format!("attempt {}", attempt.number());
            let body = if attempt.number() == 1 {
                broken(text, sized)
            } else {
                Body::from(text)
            };
            (StatusCode::CREATED, body)
        });
        let app = protected(route, layer().guarantee(guarantee));
        let first = app.clone().oneshot(keyed("/", "one", "100")).await.unwrap();
        assert_eq!(first.status(), StatusCode::CREATED);
        let mut body = first.into_body();
        let beginning = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(beginning, "attempt 1");
        let error = body.frame().await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the disk is gone");

        let second = ask(&app, keyed("/", "one", "100")).await;
        let third = ask(&app, keyed("/", "one", "100")).await;
        match guarantee {
            Guarantee::AtLeastOnce => {
                assert_eq!(
                    (second.status, second.body.as_ref()),
                    (StatusCode::CREATED, &b"attempt 2"[..])
                );
                assert_replay(&second, &third);
                assert_eq!(effects.count(), 2);
            }
            _ => {
                assert_eq!(second.problem(), "outcome-unknown");
                assert_eq!(third.problem(), "outcome-unknown");
                assert_eq!(effects.count(), 1);
            }
        }
        let served = serve(app).await;
        let broken = send(served, keyed("/", "two", "100")).await;
        assert!(
            broken.is_err(),
            "a client on a socket sees that it is not whole: {broken:?}"
        );
        let retry = send(served, keyed("/", "two", "100")).await.unwrap();
        assert_eq!(retry.status == StatusCode::CREATED, guarantee == Guarantee::AtLeastOnce);
    }
}

async fn connect(address: std::net::SocketAddr) -> hyper::client::conn::http1::SendRequest<Body> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

// ---- answers that are kept

#[tokio::test]
async fn an_answer_of_many_frames_is_replayed_with_the_same_bytes() {
    let effects = Effects::default();
    let handler = effects.clone();
    let route = post(async move || {
        handler.happen();
        frames(["one ", "", "two ", "three"])
    });
    let address = serve(protected(route, layer())).await;
    let first = send(address, keyed("/", "one", "100")).await.unwrap();
    assert_eq!(first.body, "one two three");
    assert_replay(&first, &send(address, keyed("/", "one", "100")).await.unwrap());
    assert_eq!(effects.count(), 1);
}

type Raw = BoxCloneSyncService<HyperRequest, Response<Body>, Infallible>;

/// A service for raw hyper whose answer has trailers and no known size.
fn with_trailers(effects: &Effects, idempotency: Option<IdempotencyLayer>) -> Raw {
    let effects = effects.clone();
    let service = tower::service_fn(move |_: HyperRequest| {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-checksum", "abc".parse().unwrap());
        trailers.insert("x-run", effects.happen().into());
        let frames = [
            Frame::data(Bytes::from("part 1, ")),
            Frame::data("part 2".into()),
            Frame::trailers(trailers),
        ];
        let body = Body::new(StreamBody::new(stream::iter(frames.map(Ok::<_, Infallible>))));
        let announcement = [("trailer", "x-checksum, x-run")];
        ready(Ok((StatusCode::CREATED, announcement, body).into_response()))
    });
    match idempotency {
        None => BoxCloneSyncService::new(service),
        Some(layer) => BoxCloneSyncService::new(
            ServiceBuilder::new()
                .layer(layer)
                .service(service)
                .map_response(|r| r.map(Body::new)),
        ),
    }
}

fn assert_has_trailers(answer: &Answer, run: &str) {
    assert_eq!(answer.body, "part 1, part 2");
    let trailers = answer.trailers.as_ref().expect("trailers");
    assert_eq!(
        (&trailers["x-checksum"], &trailers["x-run"]),
        (&"abc".parse().unwrap(), &run.parse().unwrap())
    );
}

#[tokio::test]
async fn trailers_are_replayed_over_http_2() {
    let effects = Effects::default();
    let address = serve_hyper(Version::HTTP_2, with_trailers(&effects, Some(layer()))).await;
    let mut connection = connect_h2(address).await;
    let mut ask = async || {
        let response = connection
            .send_request(absolute(keyed("/", "one", "100")))
            .await
            .unwrap();
        whole(response).await.unwrap()
    };
    for _ in ["the first answer", "its replay"] {
        assert_has_trailers(&ask().await, "1");
    }
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn trailers_are_sent_and_replayed_over_http_1_to_a_client_that_takes_them() {
    let takes_trailers = || plain("/", &[("idempotency-key", "one"), ("te", "trailers")], "100");
    let unprotected = serve_hyper(Version::HTTP_11, with_trailers(&Effects::default(), None)).await;
    assert_has_trailers(&send(unprotected, takes_trailers()).await.unwrap(), "1");

    let effects = Effects::default();
    let address = serve_hyper(Version::HTTP_11, with_trailers(&effects, Some(layer()))).await;
    let first = send(address, takes_trailers()).await.unwrap();
    assert_has_trailers(&first, "1");
    let retry = send(address, takes_trailers()).await.unwrap();
    assert_has_trailers(&retry, "1");
    assert!(retry.is_replay());
    // Whoever does not take them gets the same bytes without.
    let without = send(address, keyed("/", "one", "100")).await.unwrap();
    assert_eq!((without.is_replay(), without.trailers.is_none()), (true, true));
    assert_eq!(without.body, first.body);
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn answers_without_a_body_are_replayed_without_one() {
    let effects = Effects::default();
    let handler = effects.clone();
    let route = || {
        let handler = handler.clone();
        any(async move |request: Request<Body>| {
            handler.happen();
            match *request.method() {
                Method::HEAD => ([("etag", "\"1\"")], "hello").into_response(),
                Method::POST => (StatusCode::NO_CONTENT, [("location", "/payments/1")]).into_response(),
                Method::PATCH => (StatusCode::NOT_MODIFIED, [("etag", "\"1\"")]).into_response(),
                _ => (StatusCode::CREATED, ()).into_response(),
            }
        })
    };
    let unprotected = serve(Router::new().route("/", route())).await;
    let methods = [Method::HEAD, Method::POST, Method::PATCH, Method::PUT];
    let address = serve(protected(route(), layer().methods(methods))).await;
    for (method, status, length) in [
        (Method::HEAD, StatusCode::OK, Some("5")),
        (Method::POST, StatusCode::NO_CONTENT, None),
        (Method::PATCH, StatusCode::NOT_MODIFIED, None),
        (Method::PUT, StatusCode::CREATED, Some("0")),
    ] {
        let request = || {
            let mut request = keyed("/", method.as_str(), "");
            *request.method_mut() = method.clone();
            request
        };
        let mut plain = send(unprotected, request()).await.unwrap();
        let first = send(address, request()).await.unwrap();
        let retry = send(address, request()).await.unwrap();
        assert_eq!(
            (first.status, first.header("content-length")),
            (status, length),
            "{method}"
        );
        assert!(first.body.is_empty() && first.header("transfer-encoding").is_none());
        assert_replay(&first, &retry);
        plain.headers.insert("date", first.headers["date"].clone());
        assert_eq!(first, plain, "the first answer is as without the layer");
    }
    assert_eq!(effects.count(), 8);
}

/// Both answers of a service that answers with these headers, without a server that would add its own.
async fn twice(headers: &[(&'static str, &'static [u8])]) -> (Answer, Answer) {
    let effects = Effects::default();
    let answer = effects.clone();
    let headers = headers.iter().map(|(name, value)| {
        (
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value).expect("a value"),
        )
    });
    let headers: Vec<_> = headers.collect();
    let service = ServiceBuilder::new()
        .layer(layer())
        .service_fn(move |_: Request<Full<Bytes>>| {
            answer.happen();
            let mut response = Response::new(Full::new(Bytes::from("paid")));
            *response.status_mut() = StatusCode::CREATED;
            for (name, value) in &headers {
                response.headers_mut().append(name, value.clone());
            }
            ready(Ok::<_, Infallible>(response))
        });
    let ask = async || {
        whole(service.clone().oneshot(keyed("/", "one", "100")).await.unwrap())
            .await
            .unwrap()
    };
    let both = (ask().await, ask().await);
    assert_eq!(effects.count(), 1);
    both
}

#[tokio::test]
async fn fields_of_the_connection_are_in_the_first_answer_only() {
    let (first, retry) = twice(&[
        ("connection", b"close, X-Internal"),
        ("connection", b"x-other"),
        ("x-internal", b"1"),
        ("x-other", b"1"),
        ("keep-alive", b"timeout=5"),
        ("proxy-authenticate", b"Basic"),
        ("proxy-connection", b"close"),
        ("proxy-whatever", b"1"),
        ("te", b"trailers"),
        ("trailer", b"x-checksum"),
        ("transfer-encoding", b"chunked"),
        ("upgrade", b"h2c"),
        ("date", b"Sun, 06 Nov 1994 08:49:37 GMT"),
        ("x-kept", b"1"),
    ])
    .await;
    assert_eq!(first.headers.len(), 14);
    let names: Vec<_> = retry.headers.keys().map(HeaderName::as_str).collect();
    assert_eq!(names, ["x-kept", "idempotent-replayed"]);
    assert_eq!((retry.status, &retry.body), (StatusCode::CREATED, &first.body));
}

#[tokio::test]
async fn cookies_and_challenges_are_in_the_first_answer_only() {
    let (first, retry) = twice(&[
        ("set-cookie", b"session=1"),
        ("set-cookie", b"theme=dark"),
        ("www-authenticate", b"Bearer"),
        ("x-kept", b"1"),
    ])
    .await;
    let cookies: Vec<_> = first.headers.get_all("set-cookie").iter().collect();
    assert_eq!(cookies, ["session=1", "theme=dark"]);
    assert_eq!(first.header("www-authenticate"), Some("Bearer"));
    let names: Vec<_> = retry.headers.keys().map(HeaderName::as_str).collect();
    assert_eq!(names, ["x-kept", "idempotent-replayed"]);
}

#[tokio::test]
async fn repeated_fields_and_values_that_are_not_text_are_replayed_in_order() {
    let (first, mut retry) = twice(&[
        ("link", b"</b>; rel=next"),
        ("x-bytes", b"\xff\xfe caf\xe9"),
        ("link", b"</a>; rel=prev"),
        ("vary", b"b, a"),
        ("x-empty", b""),
        ("vary", b"c"),
        ("x-bytes", b"\x80"),
    ])
    .await;
    assert_eq!(first.headers.len(), 7);
    // The last one, so that taking it away leaves the others in their places.
    retry.headers.remove("idempotent-replayed");
    let in_order = |answer: &Answer| -> Vec<_> {
        answer
            .headers
            .iter()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    };
    assert_eq!(in_order(&first), in_order(&retry));
    let bytes: Vec<_> = retry
        .headers
        .get_all("x-bytes")
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    assert_eq!(bytes, [&b"\xff\xfe caf\xe9"[..], b"\x80"]);
}

#[tokio::test]
async fn what_describes_the_answer_is_replayed_exactly() {
    let effects = Effects::default();
    let handler = effects.clone();
    let route = post(async move || {
        handler.happen();
        let headers = AppendHeaders([
            (header::CONTENT_TYPE, "application/vnd.pay+json; charset=\"UTF-8\""),
            (header::CONTENT_ENCODING, "br"),
            (header::LOCATION, "/payments/1?a=%20"),
            (header::ETAG, "W/\"1\""),
            (header::LINK, "</payments/1>; rel=\"self\""),
            (header::LINK, "</refunds>; rel=\"related\""),
            (header::CACHE_CONTROL, "max-age=60"),
        ]);
        (StatusCode::CREATED, headers, &b"\x00\xff not really brotli"[..])
    });
    let address = serve(protected(route, layer())).await;
    let first = send(address, keyed("/", "one", "100")).await.unwrap();
    assert_eq!(
        (first.status, first.header("content-encoding")),
        (StatusCode::CREATED, Some("br"))
    );
    assert_eq!(first.headers.get_all("link").iter().count(), 2);
    let retry = send(address, keyed("/", "one", "100")).await.unwrap();
    assert_replay(&first, &retry);
    assert_eq!(
        retry.headers.get_all("date").iter().count(),
        1,
        "the replay has a date of its own"
    );
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn every_kept_status_is_replayed_as_it_was() {
    let effects = Effects::default();
    let handler = effects.clone();
    let route = post(async move |body: String| {
        handler.happen();
        StatusCode::from_bytes(body.as_bytes()).unwrap()
    });
    let app = protected(route, layer());
    let kept = [
        "200", "201", "202", "205", "206", "226", "302", "400", "404", "409", "422", "418", "500", "502", "504", "799",
    ];
    for status in kept {
        let first = ask(&app, keyed("/", status, status)).await;
        assert_eq!(first.status.as_str(), status);
        assert_replay(&first, &ask(&app, keyed("/", status, status)).await);
    }
    assert_eq!(effects.count(), kept.len());
}

#[tokio::test]
async fn an_answer_without_a_body_may_announce_the_length_that_it_would_have() {
    for (method, status) in [
        (Method::HEAD, StatusCode::OK),
        (Method::POST, StatusCode::NO_CONTENT),
        (Method::POST, StatusCode::NOT_MODIFIED),
    ] {
        let service = ServiceBuilder::new()
            .layer(layer().methods([method.clone()]))
            .service_fn(move |_: Request<Full<Bytes>>| {
                let answer = Response::builder().status(status).header("content-length", "5");
                ready(Ok::<_, Infallible>(answer.body(Full::new(Bytes::new())).unwrap()))
            });
        let ask = async || {
            let mut request = keyed("/", "one", "");
            *request.method_mut() = method.clone();
            whole(service.clone().oneshot(request).await.unwrap()).await.unwrap()
        };
        let first = ask().await;
        assert_replay(&first, &ask().await);
    }
}

/// The first answer and its retry, of a service that announces and sends two trailers.
async fn announced(version: Version) -> (Answer, Answer) {
    let service = ServiceBuilder::new()
        .layer(layer())
        .service_fn(|_: Request<Full<Bytes>>| {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-checksum", HeaderValue::from_static("abc"));
            trailers.insert("set-cookie", HeaderValue::from_static("session=1"));
            let body = Full::new(Bytes::from("paid")).with_trailers(ready(Some(Ok(trailers))));
            let answer = Response::builder().header("trailer", "x-checksum, set-cookie");
            ready(Ok::<_, Infallible>(answer.body(body).unwrap()))
        });
    let ask = async || {
        let mut request = keyed("/", "one", "");
        *request.version_mut() = version;
        whole(service.clone().oneshot(request).await.unwrap()).await.unwrap()
    };
    (ask().await, ask().await)
}

#[tokio::test]
async fn a_replay_announces_its_trailers_only_where_the_version_asks_for_it() {
    let (_, retry) = announced(Version::HTTP_11).await;
    assert_eq!((retry.is_replay(), retry.header("trailer")), (true, Some("x-checksum")));
    let (_, retry) = announced(Version::HTTP_2).await;
    assert_eq!((retry.is_replay(), retry.header("trailer")), (true, None));
}

#[tokio::test]
async fn fields_that_are_not_kept_are_not_kept_in_trailers_either() {
    let (first, retry) = announced(Version::HTTP_2).await;
    assert_eq!(first.trailers.unwrap().len(), 2);
    let trailers = retry.trailers.unwrap();
    assert_eq!((trailers.len(), &trailers["x-checksum"]), (1, &"abc".parse().unwrap()));
}

#[tokio::test]
async fn every_type_that_is_a_stream_by_nature_is_not_kept() {
    for (content_type, kept) in [
        ("text/event-stream", false),
        ("Text/Event-Stream; charset=utf-8", false),
        ("multipart/x-mixed-replace; boundary=x", false),
        ("Multipart/X-Mixed-Replace", false),
        ("multipart/mixed; boundary=x", true),
        ("text/plain", true),
    ] {
        let route = post(async move || ([("content-type", content_type)], "whole"));
        let app = protected(route, layer());
        assert_eq!(ask(&app, keyed("/", "one", "")).await.body, "whole");
        let retry = ask(&app, keyed("/", "one", "")).await;
        assert_eq!(retry.is_replay(), kept, "{content_type}");
        if !kept {
            assert_not_kept(&retry, StatusCode::OK);
        }
    }
}

#[tokio::test]
async fn a_body_that_says_that_it_is_too_long_is_not_read_however_it_says_so() {
    /// Says how long it is at least, and is not to be read.
    struct Unread(u64);
    impl http_body::Body for Unread {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            panic!("it was read")
        }
        fn size_hint(&self) -> http_body::SizeHint {
            let mut hint = http_body::SizeHint::new();
            hint.set_lower(self.0);
            hint
        }
    }
    let app = protected(receive(&Effects::default()), layer().max_request_body(100));
    let by_its_header = keyed("/", "one", "").map(|_| Body::new(Unread(0)));
    let (mut parts, body) = by_its_header.into_parts();
    parts.headers.insert("content-length", HeaderValue::from_static("101"));
    let by_its_header = Request::from_parts(parts, body);
    let by_its_body = keyed("/", "one", "").map(|_| Body::new(Unread(101)));
    for request in [by_its_header, by_its_body] {
        assert_eq!(ask(&app, request).await.status, StatusCode::PAYLOAD_TOO_LARGE);
    }
}
