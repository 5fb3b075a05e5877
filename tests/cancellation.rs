//! Clients that leave, and everything else that drops a future.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use support::{
    app::{call, gated, keyed, open, pay, spawn},
    faulty::{Fault, FaultyStore, Op},
    log::subscribe,
};
use tokio::sync::mpsc;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_idempotency::{Concurrent, Guarantee, IdempotencyLayer, MemoryStore};
use tracing::Instrument;

async fn assert_pending<F: Future>(future: &mut Pin<Box<F>>) {
    let poll = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await;
    assert!(poll.is_pending(), "it was answered before the client could leave");
}

/// Polls a request once, and leaves.
async fn poll_once_and_leave(app: &axum::Router, request: Request<Body>) {
    let mut future = Box::pin(app.clone().oneshot(request));
    poll_fn(|cx| {
        assert!(
            future.as_mut().poll(cx).is_pending(),
            "it was answered before the client could leave"
        );
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_while_the_handler_runs_finds_the_answer_when_it_comes_back() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let control = gated();
    let app = pay(&control, layer.clone());
    let client = spawn(&app, keyed("k", "a"));
    control.entered().await;
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    let drain = layer.drain();
    assert_eq!(drain.running(), 1);
    control.let_go();
    drain.finished().await;
    let retry = call(&app, keyed("k", "a")).await;
    assert_eq!((retry.status, retry.is_replay()), (StatusCode::CREATED, true));
    assert_eq!(retry.body, "run 1 attempt 1: a");
    assert_eq!((control.runs(), control.ends(), layer.counters().detached), (1, 1, 1));
}

tokio::task_local! {
    static TENANT: &'static str;
}

#[tokio::test]
async fn what_stands_below_the_layer_stays_around_a_handler_whose_client_left() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let control = gated();
    let handler = {
        let control = control.clone();
        async move || {
            control.pass().await;
            (StatusCode::CREATED, TENANT.get())
        }
    };
    let app = axum::Router::new()
        .route("/pay", axum::routing::post(handler))
        .layer(axum::middleware::from_fn(|request, next: axum::middleware::Next| {
            TENANT.scope("seven", next.run(request))
        }))
        .layer(layer.clone());
    let client = spawn(&app, keyed("k", "a"));
    control.entered().await;
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    control.let_go();
    layer.drain().finished().await;
    let retry = call(&app, keyed("k", "a")).await;
    assert!(retry.is_replay() && retry.body == "seven", "{retry:?}");
}

#[tokio::test]
async fn a_drain_that_begins_before_the_client_has_left_waits_for_its_handler_too() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let control = gated();
    let app = pay(&control, layer.clone());
    let mut request = Box::pin(app.clone().oneshot(keyed("k", "a")));
    assert_pending(&mut request).await;
    let drain = layer.drain();
    assert_eq!(drain.running(), 0, "it has a client");
    let mut drained = Box::pin(drain.finished());
    assert_pending(&mut drained).await;
    // As a server does that has told of its end already.
    drop(request);
    assert_pending(&mut drained).await;
    control.let_go();
    drained.await;
    assert_eq!((control.ends(), drain.running()), (1, 0));
}

#[tokio::test]
async fn a_request_that_was_answered_holds_no_drain_up() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let control = gated();
    let app = pay(&control, layer.clone());
    let mut request = Box::pin(app.clone().oneshot(keyed("k", "a")));
    assert_pending(&mut request).await;
    control.let_go();
    assert_eq!((&mut request).await.unwrap().status(), StatusCode::CREATED);
    layer.drain().finished().await;
}

#[tokio::test]
async fn a_client_that_leaves_before_its_body_is_whole_leaves_nothing_behind() {
    let store = FaultyStore::default();
    let control = open();
    let app = pay(&control, IdempotencyLayer::new(store.clone()));
    let (send, mut frames) = mpsc::channel::<Result<http_body::Frame<Bytes>, std::io::Error>>(1);
    let stream = futures_util::stream::poll_fn(move |cx| frames.poll_recv(cx));
    let body = Body::new(StreamBody::new(stream));
    let request = Request::post("/pay").header("idempotency-key", "k").body(body).unwrap();
    send.send(Ok(http_body::Frame::data(Bytes::from_static(b"half"))))
        .await
        .unwrap();
    poll_once_and_leave(&app, request).await;
    assert!(send.is_closed(), "the body was dropped with the request");
    assert_eq!((store.calls(Op::Begin), control.runs()), (0, 0));
    assert_eq!(call(&app, keyed("k", "another")).await.status, StatusCode::CREATED);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_while_its_claim_is_on_its_way_never_leaves_a_stuck_key() {
    for fault in [Fault::BlackHole, Fault::AppliedBlackHole] {
        let store = FaultyStore::default();
        let layer = IdempotencyLayer::new(store.clone());
        let control = open();
        let app = pay(&control, layer.clone());
        store.fail(Op::Begin, [fault]);
        poll_once_and_leave(&app, keyed("k", "a")).await;
        layer.drain().finished().await;
        // The claim was repeated by the same owner after its deadline: the request ran, without its client.
        assert_eq!(control.runs(), 1, "{fault:?}");
        assert!(call(&app, keyed("k", "a")).await.is_replay(), "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_while_the_answer_is_stored_finds_it_when_it_comes_back() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone());
    let control = open();
    let app = pay(&control, layer.clone());
    store.fail(Op::Complete, [Fault::BlackHole]);
    poll_once_and_leave(&app, keyed("k", "a")).await;
    layer.drain().finished().await;
    assert!(call(&app, keyed("k", "a")).await.is_replay());
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_stored_even_if_the_client_left_before_it() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let control = gated();
    let app = support::app::answering(&control, layer.clone(), |_, _, _| panic!("the handler panics"));
    let client = spawn(&app, keyed("k", "a"));
    control.entered().await;
    client.abort();
    let _ = client.await;
    control.let_go();
    layer.drain().finished().await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
}

#[tokio::test]
async fn the_span_of_a_request_goes_with_its_work() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let _guard = subscribe(tracing_subscriber::registry());
    let control = gated();
    let service = {
        let (seen, control) = (Arc::clone(&seen), control.clone());
        service_fn(move |_: Request<Body>| {
            let (seen, control) = (Arc::clone(&seen), control.clone());
            async move {
                seen.lock().unwrap().push(tracing::Span::current().id());
                control.pass().await;
                seen.lock().unwrap().push(tracing::Span::current().id());
                Ok::<_, std::convert::Infallible>(http::Response::new(Body::empty()))
            }
        })
    };
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let service = layer.layer(service);
    let span = tracing::info_span!("request");
    let id = span.id().expect("the subscriber gives spans an id");
    let mut future = Box::pin(service.oneshot(keyed("k", "a")).instrument(span));
    assert_pending(&mut future).await;
    drop(future);
    control.let_go();
    layer.drain().finished().await;
    assert_eq!(
        *seen.lock().unwrap(),
        [Some(id.clone()), Some(id)],
        "before and after the client left"
    );
}

#[tokio::test(start_paused = true)]
async fn the_lease_is_renewed_after_the_client_left() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).guarantee(Guarantee::AtLeastOnce);
    let control = gated();
    let app = pay(&control, layer.clone());
    let client = spawn(&app, keyed("k", "a"));
    control.entered().await;
    client.abort();
    let _ = client.await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
    control.let_go();
    layer.drain().finished().await;
    assert_eq!(control.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_what_outlived_its_client_but_not_longer_than_it_is_told() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let control = gated();
    let app = pay(&control, layer.clone());
    let drain = layer.drain();
    drain.finished().await;
    for key in ["a", "b"] {
        let client = spawn(&app, keyed(key, "a"));
        control.entered().await;
        client.abort();
        let _ = client.await;
    }
    let unfinished = drain.within(Duration::from_secs(10)).await.unwrap_err();
    assert_eq!(unfinished.running, 2);
    assert!(unfinished.to_string().contains('2'));
    control.let_go();
    control.let_go();
    assert_eq!(drain.within(Duration::from_secs(10)).await, Ok(()));
    assert_eq!(drain.running(), 0);
}

#[test]
fn a_runtime_that_is_dropped_leaves_its_claims_and_releases_none() {
    let store = MemoryStore::new();
    let control = gated();
    let app = pay(&control, IdempotencyLayer::new(store.clone()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let attached = spawn(&app, keyed("attached", "a"));
        control.entered().await;
        let left = spawn(&app, keyed("left", "a"));
        control.entered().await;
        left.abort();
        let _ = left.await;
        drop(attached);
    });
    drop(runtime);
    assert_eq!(store.len(), 2);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        for key in ["attached", "left"] {
            let answer = call(&app, keyed(key, "a")).await.problem();
            assert!(
                ["request-in-progress", "outcome-unknown"].contains(&&*answer),
                "{key}: {answer}"
            );
        }
    });
    assert_eq!(control.runs(), 2);
}

#[test]
fn where_there_is_no_runtime_a_request_that_is_dropped_leaves_its_key_to_its_lease() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).lease(Duration::from_secs(5));
    let control = gated();
    let app = pay(&control, layer.clone());
    let mut request = Box::pin(app.clone().oneshot(keyed("k", "a")));
    let poll = request.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(poll.is_pending());
    drop(request);
    assert_eq!((control.runs(), control.ends(), layer.counters().abandoned), (1, 0, 1));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        assert_eq!(call(&app, keyed("k", "a")).await.problem(), "request-in-progress");
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(call(&app, keyed("k", "a")).await.problem(), "outcome-unknown");
    });
    assert_eq!(control.runs(), 1);
}

#[tokio::test]
async fn a_future_that_is_dropped_outside_the_runtime_still_runs_to_its_end() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let control = gated();
    let app = pay(&control, layer.clone());
    let mut future = Box::pin(app.clone().oneshot(keyed("k", "a")));
    assert_pending(&mut future).await;
    std::thread::spawn(move || drop(future)).join().unwrap();
    control.let_go();
    layer.drain().finished().await;
    assert!(call(&app, keyed("k", "a")).await.is_replay());
}

#[tokio::test]
async fn a_future_that_is_never_polled_begins_nothing() {
    let store = FaultyStore::default();
    let control = open();
    let mut service =
        IdempotencyLayer::new(store.clone()).layer(pay(&control, IdempotencyLayer::new(MemoryStore::new())));
    drop(service.call(keyed("k", "a")));
    assert_eq!((store.calls(Op::Begin), control.runs()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_waiter_whose_claim_succeeds_as_its_client_leaves_runs_to_its_end() {
    let store = FaultyStore::default();
    let layer = IdempotencyLayer::new(store.clone()).on_concurrent(Concurrent::Wait(Duration::from_secs(60)));
    let control = gated();
    let app = support::app::answering(&control, layer.clone(), |run, _, _| {
        let status = if run == 1 {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::OK
        };
        axum::response::IntoResponse::into_response((status, format!("run {run}")))
    });
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let mut waiter: Pin<Box<_>> = Box::pin(app.clone().oneshot(keyed("k", "a")));
    assert_pending(&mut waiter).await;
    // Its next claim is applied, and the client leaves before it hears of it.
    store.fail(Op::Begin, [Fault::AppliedBlackHole]);
    control.let_go();
    first.await.unwrap();
    assert_pending(&mut waiter).await;
    drop(waiter);
    control.let_go();
    layer.drain().finished().await;
    let answer = call(&app, keyed("k", "a")).await;
    assert_eq!((&answer.body[..], answer.is_replay()), (&b"run 2"[..], true));
}

#[tokio::test]
async fn the_body_of_an_answer_is_complete_before_it_is_given_out() {
    // A client that leaves while it reads its answer has nothing left to lose.
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let control = open();
    let app = pay(&control, layer);
    let Ok(response) = app.clone().oneshot(keyed("k", "a")).await;
    drop(response.into_body().frame());
    assert!(call(&app, keyed("k", "a")).await.is_replay());
}

#[tokio::test(start_paused = true)]
async fn everybody_who_drains_is_told_of_the_end() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let control = gated();
    let app = pay(&control, layer.clone());
    let client = spawn(&app, keyed("k", "a"));
    control.entered().await;
    client.abort();
    let _ = client.await;
    let (one, other) = (layer.drain(), layer.drain());
    let minute = Duration::from_secs(60);
    let (one, other, ()) = tokio::join!(one.within(minute), other.within(minute), async { control.let_go() });
    assert_eq!((one, other), (Ok(()), Ok(())));
}
