//! Whatever the bytes are: what was answered is replayed, and how a request came does not count.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/any_bytes.rs"]
mod any_bytes;

use std::{convert::Infallible, fs, path::Path, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use proptest::{collection::vec, prelude::*};
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

type Frames = StreamBody<futures_util::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

fn body(chunks: &[Vec<u8>], trailers: Option<&HeaderMap>) -> Frames {
    let data = chunks.iter().map(|chunk| Frame::data(Bytes::copy_from_slice(chunk)));
    let frames: Vec<_> = data.chain(trailers.cloned().map(Frame::trailers)).map(Ok).collect();
    StreamBody::new(futures_util::stream::iter(frames))
}

/// Fields that are neither of the connection nor dropped, several of one name among them.
fn fields() -> impl Strategy<Value = HeaderMap> {
    let name = prop_oneof![
        "x-[a-z]{1,3}",
        Just("content-encoding".to_owned()),
        Just("link".to_owned())
    ];
    let value = vec(prop_oneof![0x20_u8..0x7f, 0x80_u8..=0xff, Just(b'\t')], 0..20);
    vec((name, value), 0..12).prop_map(|fields| {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            headers.append(name, HeaderValue::from_bytes(&value).expect("a value"));
        }
        headers
    })
}

fn chunks() -> impl Strategy<Value = Vec<Vec<u8>>> {
    vec(vec(any::<u8>(), 0..60), 0..6)
}

/// The same bytes, cut elsewhere.
fn cut_at(bytes: &[u8], places: &[prop::sample::Index]) -> Vec<Vec<u8>> {
    let mut places: Vec<usize> = places.iter().map(|place| place.index(bytes.len() + 1)).collect();
    places.sort_unstable();
    let ends = places.iter().copied().chain([bytes.len()]);
    let mut start = 0;
    ends.map(|end| bytes[std::mem::replace(&mut start, end)..end].to_vec())
        .collect()
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    trailers: Option<HeaderMap>,
}

async fn whole<B: http_body::Body<Data = Bytes>>(response: Response<B>) -> Answer
where
    B::Error: std::fmt::Debug,
{
    let (parts, body) = response.into_parts();
    let body = body.collect().await.expect("a whole body");
    Answer {
        status: parts.status,
        headers: parts.headers,
        trailers: body.trailers().cloned(),
        body: body.to_bytes(),
    }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(work)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn whatever_was_answered_is_replayed_byte_for_byte(
        headers in fields(),
        trailers in proptest::option::of(fields()),
        chunks in chunks(),
        status in 200_u16..300,
    ) {
        run(async {
            let (sent, end) = (headers.clone(), trailers.clone());
            let handler = service_fn(move |_: Request<axum::body::Body>| {
                let mut response = Response::new(body(&chunks, end.as_ref()));
                *response.status_mut() = StatusCode::from_u16(status).expect("a status");
                *response.headers_mut() = sent.clone();
                async move { Ok::<_, Infallible>(response) }
            });
            let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler);
            let ask = async || {
                let request = Request::post("/").header("idempotency-key", "k").body(axum::body::Body::empty());
                whole(service.clone().oneshot(request.expect("a request")).await.expect("an answer")).await
            };
            let (first, mut second) = (ask().await, ask().await);
            assert_eq!(second.headers.remove("idempotent-replayed"), Some(HeaderValue::from_static("true")));
            // Announced anew, for this connection.
            second.headers.remove("trailer");
            assert_eq!((first.status, &first.headers), (StatusCode::from_u16(status).expect("a status"), &headers));
            assert_eq!((second.status, second.body, second.trailers), (first.status, first.body, first.trailers.clone()));
            assert_eq!(second.headers, first.headers);
            assert_eq!(first.trailers, trailers);
        });
    }

    #[test]
    fn a_request_is_the_same_however_its_bytes_are_cut(
        bytes in vec(any::<u8>(), 0..200),
        one in vec(any::<prop::sample::Index>(), 0..5),
        other in vec(any::<prop::sample::Index>(), 0..5),
        is_sized in any::<bool>(),
    ) {
        run(async {
            let handler = service_fn(async |request: Request<axum::body::Body>| {
                let body = request.into_body().collect().await.expect("it was read").to_bytes();
                Ok::<_, Infallible>(Response::new(axum::body::Body::from(body)))
            });
            let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler);
            let ask = async |body: axum::body::Body| {
                let request = Request::post("/").header("idempotency-key", "k").body(body).expect("a request");
                whole(service.clone().oneshot(request).await.expect("an answer")).await
            };
            let cut = |places: &[_]| axum::body::Body::new(body(&cut_at(&bytes, places), None));
            let first = ask(cut(&one)).await;
            let sized = axum::body::Body::from(bytes.clone());
            let second = ask(if is_sized { sized } else { cut(&other) }).await;
            assert_eq!((first.status, &first.body[..]), (StatusCode::OK, &bytes[..]));
            assert!(second.headers.contains_key("idempotent-replayed"), "{}", second.status);
            assert_eq!(second.body, first.body);
            let mut longer = bytes.clone();
            longer.push(0);
            let third = ask(longer.into()).await;
            assert_eq!(third.status, StatusCode::UNPROCESSABLE_ENTITY);
        });
    }
}

#[test]
fn any_bytes_on_a_connection_leave_the_application_as_it_was() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/middleware");
    let inputs: Vec<Vec<u8>> = fs::read_dir(folder)
        .expect("the corpus is there")
        .map(|file| fs::read(file.unwrap().path()).unwrap())
        .collect();
    assert!(!inputs.is_empty());
    inputs.iter().for_each(|input| any_bytes::serve(input));
    let inputs = Arc::new(inputs);
    let changes = vec((any::<prop::sample::Index>(), any::<u8>()), 1..8);
    let changed = (any::<prop::sample::Index>(), changes).prop_map(move |(which, changes)| {
        let mut input = inputs[which.index(inputs.len())].clone();
        for (at, byte) in changes {
            let at = at.index(input.len());
            input[at] = byte;
        }
        input
    });
    proptest!(ProptestConfig::with_cases(1_000), |(input in prop_oneof![vec(any::<u8>(), 0..300), changed])| {
        any_bytes::serve(&input);
    });
}
