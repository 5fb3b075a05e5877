//! What a request may take from the allocator. Unlike time it is the same on every machine, so a change that adds an
//! allocation to every request, or bytes to every record, fails here.
//!
//! Counted beside the same router with a layer that does nothing, so that what axum does is not counted. Instructions are
//! not: they differ between compilers, and SHA-256 in software, as under valgrind, is nearly all of them.
#![cfg(feature = "axum")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use allocation_counter::measure;
use axum::{Router, body::Body, routing::post};
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use tokio::runtime::Runtime;
use tower::{ServiceExt, layer::util::Identity};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

/// What the layer adds: allocations exactly, so that less is written down here, too, and bytes at most, since the sizes of
/// futures differ a little between compilers.
const NOT_KEYED: (i64, i64) = (2, 150);
const FIRST: (i64, i64) = (11, 3300);
/// Less than nothing: the handler, which does not run, takes more.
const REPLAY: (i64, i64) = (-3, -1100);
/// Live heap of a completed key with an answer of 1,024 bytes.
const RECORD: i64 = 1450;

fn router() -> Router {
    let handler = async |body: Bytes| {
        assert_eq!(body.len(), 1024);
        ([(header::CONTENT_TYPE, "application/octet-stream")], vec![b'o'; 1024])
    };
    Router::new().route("/payments", post(handler))
}

fn request(key: Option<u64>, body: &Bytes) -> Request<Body> {
    let name = if key.is_some() {
        "idempotency-key"
    } else {
        "x-other-keyword"
    };
    Request::post("/payments")
        .header(header::AUTHORIZATION, "Basic YWNjb3VudDpzZWNyZXQ=")
        .header(name, format!("key-of-the-operation-{:016}", key.unwrap_or_default()))
        .body(Body::from(body.clone()))
        .unwrap()
}

async fn send(app: &Router, request: Request<Body>) -> Bytes {
    let answer = app.clone().oneshot(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    answer.into_body().collect().await.unwrap().to_bytes()
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// The least of a few: a map or a queue that grows does so for many requests.
fn counted(runtime: &Runtime, app: &Router, mut make: impl FnMut() -> Request<Body>) -> (i64, i64) {
    let one = |request| {
        let counted = measure(|| assert_eq!(runtime.block_on(send(app, request)).len(), 1024));
        (counted.count_total as i64, counted.bytes_total as i64)
    };
    one(make());
    (0..200).map(|_| one(make())).min().unwrap()
}

#[test]
fn a_request_takes_no_more_allocations_than_it_did() {
    let (runtime, body) = (runtime(), Bytes::from(vec![b'i'; 1024]));
    let protected = router().layer(IdempotencyLayer::new(MemoryStore::new()));
    let bare = counted(&runtime, &router().layer(Identity::new()), || request(None, &body));
    let added = |name: &str, most: (i64, i64), make: &mut dyn FnMut() -> Request<Body>| {
        let (count, bytes) = counted(&runtime, &protected, make);
        let added = (count - bare.0, bytes - bare.1);
        println!("{name}: {added:?} beside {bare:?}");
        assert!(
            added.0 == most.0 && added.1 <= most.1,
            "{name}: the layer adds {added:?} allocations and bytes, which was {most:?}"
        );
    };
    let mut key = 1;
    added("not keyed", NOT_KEYED, &mut || request(None, &body));
    added("replay", REPLAY, &mut || request(Some(0), &body));
    added("first", FIRST, &mut || {
        key += 1;
        request(Some(key), &body)
    });
}

#[test]
fn a_completed_key_takes_little_more_than_its_answer() {
    let (runtime, body) = (runtime(), Bytes::from(vec![b'i'; 1024]));
    const KEYS: u64 = 10_000;
    let store = MemoryStore::new();
    let app = router().layer(IdempotencyLayer::new(store.clone()));
    let counted = measure(|| {
        runtime.block_on(async {
            for key in 0..KEYS {
                send(&app, request(Some(key), &body)).await;
            }
        });
    });
    assert_eq!(store.len(), KEYS);
    let each = counted.bytes_current / KEYS as i64;
    assert!(each <= RECORD, "{each} bytes for each key");
}
