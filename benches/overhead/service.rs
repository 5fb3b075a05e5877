//! The service that everybody protects, and the requests that everybody gets: 1 KiB in, 1 KiB out.

#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::hint::black_box;

use axum::{Router, body::Body, http::Request, routing::post};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use tower::Service;

pub const AUTHORIZATION: &str = "Basic YWNjb3VudDpzZWNyZXQ=";

async fn handler(body: Bytes) -> ([(HeaderName, HeaderValue); 1], Vec<u8>) {
    black_box(&body);
    let content_type = HeaderValue::from_static("application/octet-stream");
    ([(header::CONTENT_TYPE, content_type)], vec![b'o'; 1024])
}

pub fn router() -> Router {
    Router::new().route("/payments", post(handler))
}

pub fn body() -> Bytes {
    Bytes::from(vec![b'i'; 1024])
}

/// Built anew for every operation and every contestant, so that what it costs is in both parts of a ratio.
pub fn request(key: u64, body: &Bytes) -> Request<Body> {
    with_header("idempotency-key", key, body)
}

/// The same, but for a header of another name in the place of the key.
pub fn without_key(body: &Bytes) -> Request<Body> {
    with_header("x-other-keyword", 0, body)
}

fn with_header(name: &'static str, key: u64, body: &Bytes) -> Request<Body> {
    Request::builder()
        .method(Method::POST)
        .uri("/payments")
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::AUTHORIZATION, AUTHORIZATION)
        .header(
            name,
            HeaderValue::try_from(format!("key-of-the-operation-{key:016}")).unwrap(),
        )
        .body(Body::from(body.clone()))
        .unwrap()
}

/// Sends a request and reads the answer to its end, which has to be of this status.
pub async fn send<S, B>(service: &mut S, request: Request<Body>, status: StatusCode) -> usize
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: std::fmt::Debug,
    B: http_body::Body + Unpin,
    B::Error: std::fmt::Debug,
{
    std::future::poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
    let response = service.call(request).await.unwrap();
    assert_eq!(response.status(), status);
    let mut body = response.into_body();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        length += frame.unwrap().data_ref().map_or(0, bytes::Buf::remaining);
    }
    length
}
