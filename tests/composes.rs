//! The layer composes: with axum's routers and tower-http's layers, with plain tower, tonic and raw hyper.
#![cfg(feature = "axum")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::HashMap,
    convert::Infallible,
    future::{Ready, ready},
    pin::pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    middleware::{Next, from_fn},
    response::IntoResponse,
    routing::{MethodRouter, post},
};
use bytes::Bytes;
use futures_util::poll;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use tokio::sync::oneshot;
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn, util::BoxCloneService};
use tower_http::{
    compression::CompressionLayer, limit::RequestBodyLimitLayer, timeout::TimeoutLayer, trace::TraceLayer,
};
use tower_idempotency::{
    Attempt, Concurrent, Fingerprinter, Guarantee, IdempotencyLayer, MemoryStore, Scope, Unfinished,
};

use crate::support::{
    http::send,
    serve::{
        Departures, Effects, Gate, HyperRequest, absolute, ask, assert_replay, channel, connect_h2, frames, keyed,
        listen, raw, serve, serve_hyper, whole,
    },
};

/// A route with one effect and an answer that no second run would give.
fn pay(effects: &Effects) -> MethodRouter {
    let effects = effects.clone();
    post(async move || (StatusCode::CREATED, format!("payment {}", effects.happen())))
}

/// As [`pay`], but it waits at the gate before its effect.
fn pay_slowly(effects: &Effects, gate: &Gate) -> MethodRouter {
    let (effects, gate) = (effects.clone(), gate.clone());
    post(async move || {
        gate.pass().await;
        (StatusCode::CREATED, format!("payment {}", effects.happen()))
    })
}

// ---- axum's routers

#[tokio::test]
async fn a_layer_on_the_router_protects_every_route() {
    let effects = Effects::default();
    let app = Router::new()
        .route("/payments", pay(&effects))
        .route("/refunds", pay(&effects))
        .layer(IdempotencyLayer::new(MemoryStore::new()));
    let address = serve(app).await;
    for (route, runs) in [("/payments", 1), ("/refunds", 2)] {
        let first = send(address, keyed(route, "one", "100")).await.unwrap();
        let retry = send(address, keyed(route, "one", "100")).await.unwrap();
        assert_eq!(first.status, StatusCode::CREATED);
        assert_eq!(first.body, format!("payment {runs}"));
        assert_replay(&first, &retry);
        assert_eq!(effects.count(), runs);
    }
}

#[tokio::test]
async fn the_same_key_on_two_routes_is_two_operations() {
    let (effects, store) = (Effects::default(), MemoryStore::new());
    let idempotency = IdempotencyLayer::new(store.clone());
    let app = Router::new()
        .route("/payments/{id}", pay(&effects).layer(idempotency.clone()))
        .route("/refunds/{id}", pay(&effects).layer(idempotency.require_key()));
    let payment = ask(&app, keyed("/payments/7", "one", "100")).await;
    let refund = ask(&app, keyed("/refunds/7", "one", "100")).await;
    assert_eq!(
        (payment.body.as_ref(), refund.body.as_ref()),
        (&b"payment 1"[..], &b"payment 2"[..])
    );
    assert_replay(&payment, &ask(&app, keyed("/payments/7", "one", "100")).await);
    assert_replay(&refund, &ask(&app, keyed("/refunds/7", "one", "100")).await);
    assert_eq!((effects.count(), store.len()), (2, 2));
    // The operation is the route, not the path: the path is part of what the key stands for.
    let other = ask(&app, keyed("/payments/8", "one", "100")).await;
    assert_eq!(other.problem(), "idempotency-key-reused");
    // A setting of one route is not the other's.
    let keyless = |path| support::http::post(path, &[], "100");
    assert_eq!(ask(&app, keyless("/payments/7")).await.status, StatusCode::CREATED);
    assert_eq!(
        ask(&app, keyless("/refunds/7")).await.problem(),
        "idempotency-key-missing"
    );
}

#[tokio::test(start_paused = true)]
async fn each_route_keeps_its_records_for_its_own_retention() {
    let (short, long) = (Effects::default(), Effects::default());
    let idempotency = IdempotencyLayer::new(MemoryStore::new());
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
    let app = Router::new()
        .route(
            "/payments",
            pay(&short).layer(idempotency.clone().retention(minutes(5))),
        )
        .route("/refunds", pay(&long).layer(idempotency.retention(minutes(72 * 60))));
    ask(&app, keyed("/payments", "one", "100")).await;
    let refund = ask(&app, keyed("/refunds", "one", "100")).await;
    tokio::time::advance(minutes(6)).await;
    let payment = ask(&app, keyed("/payments", "one", "100")).await;
    assert!(!payment.is_replay());
    assert_replay(&refund, &ask(&app, keyed("/refunds", "one", "100")).await);
    assert_eq!((short.count(), long.count()), (2, 1));
}

#[tokio::test]
async fn each_route_has_its_own_guarantee_for_a_lost_attempt() {
    let effects = Effects::default();
    let panics_once = |attempts: &Effects| {
        let (attempts, effects) = (attempts.clone(), effects.clone());
        post(async move |attempt: Attempt| {
            assert!(attempts.happen() > 1, "the first attempt is lost");
            effects.happen();
            attempt.number().to_string()
        })
    };
    let (once, again) = (Effects::default(), Effects::default());
    let idempotency = IdempotencyLayer::new(MemoryStore::new());
    let app = Router::new()
        .route("/payments", panics_once(&once).layer(idempotency.clone()))
        .route(
            "/reports",
            panics_once(&again).layer(idempotency.guarantee(Guarantee::AtLeastOnce)),
        );
    for route in ["/payments", "/reports"] {
        let lost = tokio::spawn(app.clone().oneshot(keyed(route, "one", "100"))).await;
        assert!(lost.unwrap_err().is_panic(), "the panic goes on as it was");
    }
    assert_eq!(
        ask(&app, keyed("/payments", "one", "100")).await.problem(),
        "outcome-unknown"
    );
    assert_eq!(ask(&app, keyed("/reports", "one", "100")).await.body, "2");
    assert_eq!((once.count(), again.count(), effects.count()), (1, 2, 1));
}

#[tokio::test]
async fn two_routes_that_name_one_operation_share_its_keys() {
    let effects = Effects::default();
    let refund = IdempotencyLayer::new(MemoryStore::new()).scope(|_| Scope::tenant("shop").operation("refund"));
    let body_only = refund.clone().fingerprint(Fingerprinter::custom(200, |_, body| {
        let mut digest = [0; 32];
        digest[..body.len()].copy_from_slice(body);
        digest
    }));
    let app = Router::new()
        .route("/v1/refund", pay(&effects).layer(refund.clone()))
        .route("/v2/refund", pay(&effects).layer(refund))
        .route("/v3/refund", pay(&effects).layer(body_only.clone()))
        .route("/v4/refund", pay(&effects).layer(body_only));
    // To the default fingerprint another path is another request.
    ask(&app, keyed("/v1/refund", "one", "100")).await;
    assert_eq!(
        ask(&app, keyed("/v2/refund", "one", "100")).await.problem(),
        "idempotency-key-reused"
    );
    // To one that looks at the body alone it is the same.
    let first = ask(&app, keyed("/v3/refund", "two", "100")).await;
    assert_replay(&first, &ask(&app, keyed("/v4/refund", "two", "100")).await);
    assert_eq!(effects.count(), 2);
}

// ---- twice

#[tokio::test]
async fn of_two_layers_on_one_request_the_inner_one_does_nothing() {
    let (effects, store, inner_store) = (Effects::default(), MemoryStore::new(), MemoryStore::new());
    let outer = IdempotencyLayer::new(store.clone());
    let inner = IdempotencyLayer::new(inner_store.clone());
    let app = Router::new()
        .route("/same", pay(&effects).layer(outer.clone()))
        .route("/other", pay(&effects).layer(inner.clone()))
        .layer(outer.clone());
    for (route, records) in [("/same", 1), ("/other", 2)] {
        let first = ask(&app, keyed(route, "one", "100")).await;
        assert_eq!(first.status, StatusCode::CREATED);
        assert_replay(&first, &ask(&app, keyed(route, "one", "100")).await);
        assert_eq!((effects.count(), store.len()), (records as usize, records));
    }
    assert!(inner_store.is_empty());
    assert_eq!(inner.counters().executed, 0);
    assert_eq!((outer.counters().executed, outer.counters().replayed), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn two_layers_that_wait_do_not_wait_for_each_other() {
    let (effects, gate, store) = (Effects::default(), Gate::closed(), MemoryStore::new());
    let idempotency = IdempotencyLayer::new(store.clone()).on_concurrent(Concurrent::Wait(Duration::from_secs(5)));
    let app = Router::new()
        .route("/payments", pay_slowly(&effects, &gate))
        .layer(idempotency.clone())
        .layer(idempotency.clone());
    let mut first = pin!(ask(&app, keyed("/payments", "one", "100")));
    let mut second = pin!(ask(&app, keyed("/payments", "one", "100")));
    assert!(poll!(&mut first).is_pending());
    assert!(poll!(pin!(gate.entered())).is_ready(), "the first runs");
    assert!(poll!(&mut second).is_pending());
    assert_eq!(
        idempotency.counters().waited,
        1,
        "the duplicate waits, the first does not"
    );
    gate.open();
    let (first, second) = tokio::join!(first, second);
    assert_replay(&first, &second);
    assert_eq!((effects.count(), store.len()), (1, 1));
}

// ---- tower-http around it and below it

#[tokio::test(start_paused = true)]
async fn in_one_stack_with_tracing_timeout_compression_and_from_fn_the_retry_is_a_replay() {
    let effects = Effects::default();
    let below = Effects::default();
    let count = below.clone();
    let tag = move |request: Request<Body>, next: Next| {
        count.happen();
        async move {
            let mut response = next.run(request).await;
            response.headers_mut().insert("x-tag", "below".parse().unwrap());
            response
        }
    };
    let handler = effects.clone();
    let app = Router::new()
        .route(
            "/payments",
            post(async move |body: String| format!("{}: {body}", handler.happen())),
        )
        .layer(
            ServiceBuilder::new()
                .layer(TraceLayer::new_for_http())
                .layer(TimeoutLayer::with_status_code(
                    StatusCode::GATEWAY_TIMEOUT,
                    Duration::from_secs(5),
                ))
                .layer(CompressionLayer::new())
                .layer(IdempotencyLayer::new(MemoryStore::new()))
                .layer(from_fn(tag)),
        );
    let body = "a payment of a hundred ".repeat(50);
    let first = ask(&app, keyed("/payments", "one", body.clone())).await;
    assert_eq!(first.body, format!("1: {body}"));
    assert_eq!(first.header("x-tag"), Some("below"));
    assert_replay(&first, &ask(&app, keyed("/payments", "one", body)).await);
    assert_eq!((effects.count(), below.count()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_timeout_outside_answers_the_client_and_the_handler_runs_to_its_end() {
    let (effects, gate) = (Effects::default(), Gate::closed());
    let idempotency = IdempotencyLayer::new(MemoryStore::new());
    let app = Router::new().route("/payments", pay_slowly(&effects, &gate)).layer(
        ServiceBuilder::new()
            .layer(TimeoutLayer::with_status_code(
                StatusCode::GATEWAY_TIMEOUT,
                Duration::from_secs(5),
            ))
            .layer(idempotency.clone()),
    );
    // The clock is paused: it jumps to the timeout once nothing else can happen.
    let timed_out = ask(&app, keyed("/payments", "one", "100")).await;
    assert_eq!(timed_out.status, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!((effects.count(), idempotency.drain().running()), (0, 1));
    assert_eq!(
        ask(&app, keyed("/payments", "one", "100")).await.problem(),
        "request-in-progress"
    );
    gate.open();
    idempotency.drain().finished().await;
    assert_eq!(effects.count(), 1);
    let retry = ask(&app, keyed("/payments", "one", "100")).await;
    assert!(retry.is_replay());
    assert_eq!(
        (retry.status, retry.body.as_ref()),
        (StatusCode::CREATED, &b"payment 1"[..])
    );
    assert_eq!(effects.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_below_is_the_handlers_answer_and_is_replayed() {
    let (effects, gate) = (Effects::default(), Gate::closed());
    let started = effects.clone();
    let handler = post(async move || {
        started.happen();
        gate.pass().await;
    });
    let app = Router::new().route("/payments", handler).layer(
        ServiceBuilder::new()
            .layer(IdempotencyLayer::new(MemoryStore::new()))
            .layer(TimeoutLayer::with_status_code(
                StatusCode::GATEWAY_TIMEOUT,
                Duration::from_secs(5),
            )),
    );
    let first = ask(&app, keyed("/payments", "one", "100")).await;
    assert_eq!(first.status, StatusCode::GATEWAY_TIMEOUT);
    assert_replay(&first, &ask(&app, keyed("/payments", "one", "100")).await);
    assert_eq!(
        effects.count(),
        1,
        "nobody knows what the handler did: it is not run again"
    );
}

/// At most two new keys for each tenant.
async fn two_for_each_tenant(
    used: Arc<Mutex<HashMap<String, u32>>>,
    request: Request<Body>,
    next: Next,
) -> Response<Body> {
    let tenant = request.headers()["authorization"].to_str().unwrap().to_owned();
    let number = *used
        .lock()
        .unwrap()
        .entry(tenant)
        .and_modify(|used| *used += 1)
        .or_insert(1);
    if number > 2 {
        let problem = r#"{"type":"about:blank","title":"Quota of new keys exceeded","status":429}"#;
        let head = [("content-type", "application/problem+json"), ("retry-after", "60")];
        return (StatusCode::TOO_MANY_REQUESTS, head, problem).into_response();
    }
    next.run(request).await
}

#[tokio::test]
async fn a_quota_below_charges_new_keys_and_no_replays_and_what_it_refuses_leaves_nothing() {
    let (effects, store, used) = (
        Effects::default(),
        MemoryStore::new(),
        Arc::<Mutex<HashMap<_, _>>>::default(),
    );
    let app = Router::new().route("/payments", pay(&effects)).layer(
        ServiceBuilder::new()
            .layer(IdempotencyLayer::new(store.clone()))
            .layer(from_fn(move |request, next| {
                two_for_each_tenant(Arc::clone(&used), request, next)
            })),
    );
    let of = |tenant: &'static str, key| {
        let mut request = keyed("/payments", key, "100");
        request
            .headers_mut()
            .insert("authorization", HeaderValue::from_static(tenant));
        request
    };
    let first = ask(&app, of("a", "one")).await;
    for _ in 0..5 {
        assert_replay(&first, &ask(&app, of("a", "one")).await);
    }
    assert_eq!(ask(&app, of("a", "two")).await.status, StatusCode::CREATED);
    let refused = ask(&app, of("a", "three")).await;
    assert_eq!(
        (
            refused.status,
            &refused.headers["retry-after"],
            &refused.headers["content-type"]
        ),
        (
            StatusCode::TOO_MANY_REQUESTS,
            &HeaderValue::from_static("60"),
            &HeaderValue::from_static("application/problem+json")
        )
    );
    assert_eq!((effects.count(), store.len()), (2, 2), "what it refused left nothing");
    // Who is over the quota still gets the answers of what ran, and others their own quota.
    assert_replay(&first, &ask(&app, of("a", "one")).await);
    assert_eq!(ask(&app, of("b", "three")).await.status, StatusCode::CREATED);
    assert_eq!((effects.count(), store.len()), (3, 3));
}

#[tokio::test]
async fn below_a_layer_that_changes_the_bodys_type_it_is_boxed_first() {
    let effects = Effects::default();
    let handler = effects.clone();
    let app = Router::new()
        .route(
            "/payments",
            post(async move |body: String| format!("{}: {body}", handler.happen())),
        )
        .layer(
            ServiceBuilder::new()
                .layer(RequestBodyLimitLayer::new(3))
                .map_request(|request: Request<_>| request.map(Body::new))
                .layer(IdempotencyLayer::new(MemoryStore::new())),
        );
    let streamed = |frame| keyed("/payments", "one", "").map(|_| frames([frame]));
    assert_eq!(ask(&app, streamed("1000")).await.problem(), "request-body-too-large");
    let first = ask(&app, streamed("100")).await;
    assert_eq!(first.body, "1: 100");
    assert_replay(&first, &ask(&app, streamed("100")).await);
    assert_eq!(effects.count(), 1);
}

fn gunzip(answer: &support::http::Answer) -> String {
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    std::io::read_to_string(flate2::read::GzDecoder::new(&*answer.body)).expect("gzip")
}

fn with_gzip(path: &str, key: &str) -> Request<Full<Bytes>> {
    support::http::post(path, &[("idempotency-key", key), ("accept-encoding", "gzip")], "100")
}

fn report(effects: &Effects) -> MethodRouter {
    let effects = effects.clone();
    post(async move || format!("report {}: {}", effects.happen(), "all is well, ".repeat(100)))
}

#[tokio::test]
async fn compressed_outside_a_replay_decompresses_to_the_same_bytes() {
    let effects = Effects::default();
    let app = Router::new().route("/reports", report(&effects)).layer(
        ServiceBuilder::new()
            .layer(CompressionLayer::new())
            .layer(IdempotencyLayer::new(MemoryStore::new())),
    );
    let address = serve(app).await;
    let first = send(address, with_gzip("/reports", "one")).await.unwrap();
    let retry = send(address, with_gzip("/reports", "one")).await.unwrap();
    assert!(retry.is_replay());
    assert_eq!(gunzip(&first), gunzip(&retry));
    // What is kept is not compressed: a client that takes no gzip gets the plain bytes of the same answer.
    let plain = send(address, keyed("/reports", "one", "100")).await.unwrap();
    assert_eq!((plain.is_replay(), plain.header("content-encoding")), (true, None));
    assert_eq!(plain.body, gunzip(&first));
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn compressed_below_a_replay_has_the_stored_encoding_and_identical_bytes() {
    let effects = Effects::default();
    let app = Router::new().route("/reports", report(&effects)).layer(
        ServiceBuilder::new()
            .layer(IdempotencyLayer::new(MemoryStore::new()))
            .layer(CompressionLayer::new()),
    );
    let address = serve(app).await;
    let first = send(address, with_gzip("/reports", "one")).await.unwrap();
    let retry = send(address, with_gzip("/reports", "one")).await.unwrap();
    assert_replay(&first, &retry);
    assert!(gunzip(&retry).starts_with("report 1: all is well"));
    assert_eq!(effects.count(), 1);
}

// ---- plain tower

#[tokio::test]
async fn a_tower_service_over_full_bytes_needs_no_axum() {
    let effects = Effects::default();
    let handler = effects.clone();
    let service = ServiceBuilder::new()
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .service_fn(move |request: Request<Full<Bytes>>| {
            let handler = handler.clone();
            async move {
                let body = request.into_body().collect().await?.to_bytes();
                handler.happen();
                Ok::<_, Infallible>(Response::new(Full::new(body)))
            }
        });
    let first = whole(service.clone().oneshot(keyed("/", "one", "100")).await.unwrap())
        .await
        .unwrap();
    let retry = whole(service.oneshot(keyed("/", "one", "100")).await.unwrap())
        .await
        .unwrap();
    assert_eq!(first.body, "100");
    assert_replay(&first, &retry);
    assert_eq!(effects.count(), 1);
}

/// A service that counts and echoes.
fn echo(
    effects: &Effects,
) -> impl tower::Service<Request<Full<Bytes>>, Response = Response<Full<Bytes>>, Error = Infallible, Future: Send>
+ Clone
+ Send
+ 'static {
    let effects = effects.clone();
    service_fn(move |request: Request<Full<Bytes>>| {
        effects.happen();
        ready(Ok(Response::new(request.into_body())))
    })
}

async fn runs_once_for_each_key<S, B>(service: S, effects: &Effects)
where
    S: tower::Service<Request<Full<Bytes>>, Response = Response<B>, Error: std::fmt::Debug> + Clone,
    B: http_body::Body<Error: std::fmt::Debug>,
{
    let ask = async |key| {
        let response = service.clone().oneshot(keyed("/", key, "100")).await.unwrap();
        whole(response).await.unwrap()
    };
    for (key, runs) in [("one", 1), ("two", 2)] {
        let first = ask(key).await;
        assert_eq!(first.body, "100");
        assert_replay(&first, &ask(key).await);
        assert_eq!(effects.count(), runs);
    }
}

#[tokio::test]
async fn a_service_that_is_not_sync_may_be_below() {
    let effects = Effects::default();
    let service = BoxCloneService::new(echo(&effects));
    let idempotency = IdempotencyLayer::new(MemoryStore::new());
    runs_once_for_each_key(ServiceBuilder::new().layer(idempotency).service(service), &effects).await;
}

#[tokio::test]
async fn a_buffer_may_be_below() {
    let effects = Effects::default();
    let service = ServiceBuilder::new()
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .buffer(1)
        .service(echo(&effects));
    runs_once_for_each_key(service, &effects).await;
}

#[tokio::test]
async fn a_concurrency_limit_may_be_below_and_replays_give_its_permits_back() {
    let effects = Effects::default();
    let service = ServiceBuilder::new()
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .concurrency_limit(1)
        .service(echo(&effects));
    runs_once_for_each_key(service, &effects).await;
}

/// A service with two places, whose requests to `/slow` stop at the gate.
fn two_places(
    idempotency: IdempotencyLayer,
    gate: &Gate,
) -> BoxCloneService<Request<Body>, Response<Body>, Infallible> {
    let gate = gate.clone();
    let handler = service_fn(move |request: Request<Body>| {
        let gate = gate.clone();
        async move {
            if request.uri() == "/slow" {
                gate.pass().await;
            }
            Ok(Response::new(request.into_body()))
        }
    });
    let service = ServiceBuilder::new()
        .layer(idempotency)
        .concurrency_limit(2)
        .service(handler);
    BoxCloneService::new(service.map_response(|response: Response<_>| response.map(Body::new)))
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_duplicate_takes_no_place_below() {
    let gate = Gate::closed();
    let idempotency = IdempotencyLayer::new(MemoryStore::new()).on_concurrent(Concurrent::Wait(Duration::from_secs(5)));
    let service = two_places(idempotency.clone(), &gate);
    let ask = |path, key| service.clone().oneshot(keyed(path, key, "100").map(Body::new));
    let mut first = pin!(ask("/slow", "one"));
    assert!(poll!(&mut first).is_pending());
    let mut duplicate = pin!(ask("/slow", "one"));
    assert!(poll!(&mut duplicate).is_pending());
    assert_eq!(idempotency.counters().waited, 1);
    let other = poll!(pin!(ask("/", "two")));
    assert!(other.is_ready(), "the second place is free");
    gate.open();
    let (first, duplicate) = tokio::join!(first, duplicate);
    assert_replay(
        &whole(first.unwrap()).await.unwrap(),
        &whole(duplicate.unwrap()).await.unwrap(),
    );
}

#[tokio::test]
async fn whose_body_is_slow_takes_no_place_below() {
    let service = two_places(IdempotencyLayer::new(MemoryStore::new()), &Gate::closed());
    let ask = |key, body| service.clone().oneshot(keyed("/", key, "").map(|_| body));
    let (first_sender, first_body) = channel();
    let (second_sender, second_body) = channel();
    let mut first = pin!(ask("one", first_body));
    let mut second = pin!(ask("two", second_body));
    assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
    let other = poll!(pin!(ask("three", Body::from("300"))));
    assert!(other.is_ready(), "both places are free");
    drop((first_sender, second_sender));
    assert!(first.await.is_ok() && second.await.is_ok());
}

/// A service that cannot take the second request that asks.
#[derive(Clone, Default)]
struct SometimesFull {
    asked: Effects,
    effects: Effects,
}

impl tower::Service<Request<Body>> for SometimesFull {
    type Response = Response<Body>;
    type Error = &'static str;
    type Future = Ready<Result<Response<Body>, &'static str>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        Poll::Ready(if self.asked.happen() == 2 { Err("full") } else { Ok(()) })
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.effects.happen();
        ready(Ok(Response::new(request.into_body())))
    }
}

#[tokio::test]
async fn a_service_that_cannot_take_the_request_leaves_its_key_free() {
    let (below, store) = (SometimesFull::default(), MemoryStore::new());
    let service = IdempotencyLayer::new(store.clone()).layer(below.clone());
    let (sender, body) = channel();
    let mut slow = pin!(service.clone().oneshot(keyed("/", "one", "").map(|_| body)));
    assert!(poll!(&mut slow).is_pending());
    drop(sender);
    assert_eq!(slow.await.unwrap_err(), "full");
    assert_eq!((below.effects.count(), store.len()), (0, 0));
    let retry = whole(service.oneshot(keyed("/", "one", "").map(Body::new)).await.unwrap())
        .await
        .unwrap();
    assert!(!retry.is_replay());
    assert_eq!((below.effects.count(), store.len()), (1, 1));
}

#[tokio::test]
async fn the_trailers_of_request_and_answer_are_kept() {
    let effects = Effects::default();
    let handler = effects.clone();
    let service = ServiceBuilder::new()
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .service_fn(move |request: Request<Body>| {
            let handler = handler.clone();
            async move {
                let sent = request.into_body().collect().await?;
                let checksum = sent.trailers().unwrap()["x-checksum"].clone();
                let mut trailers = HeaderMap::new();
                trailers.insert("x-run", handler.happen().into());
                trailers.insert("x-seen", checksum);
                let body = Full::new(sent.to_bytes()).with_trailers(ready(Some(Ok(trailers))));
                Ok::<_, axum::Error>(Response::new(body))
            }
        });
    let ask = async || {
        let trailers = HeaderMap::from_iter([("x-checksum".parse().unwrap(), "abc".parse().unwrap())]);
        let request = keyed("/", "one", "100");
        let request = request.map(|body| Body::new(body.with_trailers(ready(Some(Ok(trailers))))));
        whole(service.clone().oneshot(request).await.unwrap()).await.unwrap()
    };
    let first = ask().await;
    let trailers = first.trailers.as_ref().unwrap();
    assert_eq!(
        (&trailers["x-run"], &trailers["x-seen"]),
        (&"1".parse().unwrap(), &"abc".parse().unwrap())
    );
    assert_replay(&first, &ask().await);
    assert_eq!(effects.count(), 1);
}

// ---- raw hyper

/// A service for hyper alone: its effect is behind a gate.
fn hyper_service(
    idempotency: &IdempotencyLayer,
    effects: &Effects,
    gate: &Gate,
    departures: &Departures,
) -> impl tower::Service<
    HyperRequest,
    Response = Response<impl http_body::Body<Data = Bytes, Error = Infallible> + Send + 'static>,
    Error = hyper::Error,
    Future: Send,
> + Clone
+ Send
+ 'static {
    let (effects, gate) = (effects.clone(), gate.clone());
    ServiceBuilder::new()
        .layer(departures.clone())
        .layer(idempotency.clone())
        .service_fn(move |request: HyperRequest| {
            let (effects, gate) = (effects.clone(), gate.clone());
            async move {
                let sent = request.into_body().collect().await?.to_bytes();
                gate.pass().await;
                let answer = format!("{} for {sent:?}", effects.happen());
                Ok(Response::new(Full::new(Bytes::from(answer))))
            }
        })
}

#[tokio::test]
async fn a_raw_hyper_server_is_protected_over_http_1() {
    let (effects, gate) = (Effects::default(), Gate::closed());
    let idempotency = IdempotencyLayer::new(MemoryStore::new());
    let service = hyper_service(&idempotency, &effects, &gate, &Departures::none());
    let address = serve_hyper(Version::HTTP_11, service).await;
    gate.open();
    let first = send(address, keyed("/", "one", "100")).await.unwrap();
    assert_eq!(first.body, "1 for b\"100\"");
    assert_replay(&first, &send(address, keyed("/", "one", "100")).await.unwrap());
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn a_raw_hyper_server_is_protected_over_http_2() {
    let (effects, gate) = (Effects::default(), Gate::closed());
    let idempotency = IdempotencyLayer::new(MemoryStore::new());
    let service = hyper_service(&idempotency, &effects, &gate, &Departures::none());
    let address = serve_hyper(Version::HTTP_2, service).await;
    let mut connection = connect_h2(address).await;
    let mut ask = async || {
        let response = connection
            .send_request(absolute(keyed("/", "one", "100")))
            .await
            .unwrap();
        whole(response).await.unwrap()
    };
    gate.open();
    let first = ask().await;
    assert_eq!(first.body, "1 for b\"100\"");
    assert_replay(&first, &ask().await);
    assert_eq!(effects.count(), 1);
}

#[tokio::test]
async fn when_one_stream_is_reset_its_handler_runs_on_and_the_other_streams_are_unharmed() {
    let (effects, gate, departures) = (Effects::default(), Gate::closed(), Departures::none());
    let idempotency = IdempotencyLayer::new(MemoryStore::new());
    let service = hyper_service(&idempotency, &effects, &gate, &departures);
    let address = serve_hyper(Version::HTTP_2, service).await;
    let mut connection = connect_h2(address).await;
    let reset = tokio::spawn(connection.send_request(absolute(keyed("/", "reset", "100"))));
    gate.entered().await;
    let unharmed = tokio::spawn(connection.send_request(absolute(keyed("/", "unharmed", "200"))));
    gate.entered().await;
    // To hyper's client, dropping a request is RST_STREAM.
    reset.abort();
    departures.one_more().await;
    assert_eq!((effects.count(), idempotency.drain().running()), (0, 1));
    gate.open();
    // A drain would wait for the other stream's handler, too.
    while idempotency.drain().running() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(effects.count(), 1, "nobody reads the answer, but there is one");
    gate.open();
    let unharmed = whole(unharmed.await.unwrap().unwrap()).await.unwrap();
    assert_eq!(unharmed.body, "2 for b\"200\"");
    // On the same connection.
    for (key, amount, answer) in [
        ("reset", "100", "1 for b\"100\""),
        ("unharmed", "200", "2 for b\"200\""),
    ] {
        let retry = connection
            .send_request(absolute(keyed("/", key, amount)))
            .await
            .unwrap();
        let retry = whole(retry).await.unwrap();
        assert!(retry.is_replay());
        assert_eq!(retry.body, answer);
    }
    assert_eq!((effects.count(), idempotency.counters().detached), (2, 1));
}

// ---- shutdown

#[tokio::test]
async fn a_graceful_shutdown_drains_the_requests_whose_clients_left() {
    let (effects, gate, departures) = (Effects::default(), Gate::closed(), Departures::none());
    let store = MemoryStore::new();
    let idempotency = IdempotencyLayer::new(store.clone());
    let drain = idempotency.drain();
    let app = Router::new()
        .route("/payments", pay_slowly(&effects, &gate))
        .layer(ServiceBuilder::new().layer(departures.clone()).layer(idempotency));
    let (listener, address) = listen().await;
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move { stopped.await.unwrap() };
    let server = axum::serve(listener, app.clone()).with_graceful_shutdown(shutdown);
    let server = tokio::spawn(server.into_future());

    let request = "POST /payments HTTP/1.1\r\nhost: localhost\r\nidempotency-key: one\r\ncontent-length: 3\r\n\r\n100";
    let client = raw(address, request).await;
    gate.entered().await;
    drop(client);
    departures.one_more().await;
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();

    // The server is gone; the attempt is not.
    assert_eq!(drain.running(), 1);
    let unfinished: Unfinished = drain.within(Duration::ZERO).await.unwrap_err();
    assert_eq!(unfinished.running, 1);
    let mut finished = pin!(drain.within(Duration::MAX));
    assert!(poll!(&mut finished).is_pending());
    gate.open();
    finished.await.unwrap();
    assert_eq!((effects.count(), store.len(), drain.running()), (1, 1, 0));
    let retry = ask(&app, keyed("/payments", "one", "100")).await;
    assert!(retry.is_replay());
    assert_eq!(retry.body, "payment 1");
    assert_eq!(
        drain.within(Duration::ZERO).await,
        Ok(()),
        "with nothing left there is nothing to wait for"
    );
}

// ---- tonic

#[cfg(feature = "tonic")]
mod grpc {
    use std::net::SocketAddr;

    use futures_util::future::BoxFuture;
    use http::uri::PathAndQuery;
    use prost::Message;
    use tonic::{
        Code, Status,
        client::Grpc,
        metadata::MetadataValue,
        server::NamedService,
        transport::{Channel, Server, server::TcpIncoming},
    };
    use tonic_prost::ProstCodec;
    use tower_idempotency::Rejection;

    use super::*;

    #[derive(Clone, PartialEq, Message)]
    struct Payment {
        #[prost(uint64, tag = "1")]
        amount: u64,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Receipt {
        #[prost(uint64, tag = "1")]
        number: u64,
    }

    /// An amount that the service has no time for.
    const BUSY: u64 = 7;

    /// Pays every amount but 0, for which there are no funds, and [`BUSY`].
    #[derive(Clone)]
    struct Payments(Effects);

    impl NamedService for Payments {
        const NAME: &'static str = "test.Payments";
    }

    impl tower::Service<Request<tonic::body::Body>> for Payments {
        type Response = Response<tonic::body::Body>;
        type Error = Infallible;
        type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
            let effects = self.0.clone();
            let pay = service_fn(move |request: tonic::Request<Payment>| {
                let number = effects.happen() as u64;
                ready(match request.get_ref().amount {
                    0 => {
                        let mut status = Status::failed_precondition(format!("no funds at {number}"));
                        let state = MetadataValue::from_static("empty");
                        status.metadata_mut().insert("account-state", state);
                        Err(status)
                    }
                    BUSY => Err(Status::unavailable(format!("try later, {number}"))),
                    _ => Ok(tonic::Response::new(Receipt { number })),
                })
            });
            Box::pin(async move {
                let codec = ProstCodec::<Receipt, Payment>::default();
                Ok(tonic::server::Grpc::new(codec).unary(pay, request).await)
            })
        }
    }

    async fn serve(idempotency: IdempotencyLayer, effects: &Effects) -> SocketAddr {
        let (listener, address) = listen().await;
        let server = Server::builder()
            .layer(idempotency)
            .add_service(Payments(effects.clone()));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        address
    }

    async fn call(address: SocketAddr, key: &'static str, amount: u64) -> Result<tonic::Response<Receipt>, Status> {
        let channel = Channel::from_shared(format!("http://{address}"))
            .unwrap()
            .connect()
            .await
            .unwrap();
        let mut client = Grpc::new(channel);
        client.ready().await.unwrap();
        let mut request = tonic::Request::new(Payment { amount });
        request
            .metadata_mut()
            .insert("idempotency-key", MetadataValue::from_static(key));
        let path = PathAndQuery::from_static("/test.Payments/Pay");
        client
            .unary(request, path, ProstCodec::<Payment, Receipt>::default())
            .await
    }

    #[tokio::test]
    async fn a_tonic_call_runs_once_and_its_reply_is_replayed() {
        let effects = Effects::default();
        let address = serve(IdempotencyLayer::new(MemoryStore::new()), &effects).await;
        let first = call(address, "one", 100).await.unwrap();
        let retry = call(address, "one", 100).await.unwrap();
        assert_eq!((first.get_ref().number, retry.get_ref().number), (1, 1));
        assert!(first.metadata().get("idempotent-replayed").is_none());
        assert_eq!(retry.metadata().get("idempotent-replayed").unwrap(), "true");
        assert_eq!(retry.metadata().get("grpc-status").unwrap(), "0");
        assert_eq!(effects.count(), 1);
        assert_eq!(call(address, "two", 100).await.unwrap().get_ref().number, 2);
    }

    #[tokio::test]
    async fn the_grpc_status_is_replayed_in_the_trailers_where_it_was() {
        let effects = Effects::default();
        let address = serve(IdempotencyLayer::new(MemoryStore::new()), &effects).await;
        let mut connection = connect_h2(address).await;
        let mut call = async || {
            let message = Payment { amount: 100 }.encode_to_vec();
            let mut framed = vec![0, 0, 0, 0, message.len() as u8];
            framed.extend(message);
            let headers = [
                ("content-type", "application/grpc"),
                ("te", "trailers"),
                ("idempotency-key", "one"),
            ];
            let request = absolute(support::http::post("/test.Payments/Pay", &headers, framed));
            whole(connection.send_request(request).await.unwrap()).await.unwrap()
        };
        let first = call().await;
        assert_eq!(first.trailers.as_ref().unwrap()["grpc-status"], "0");
        assert_replay(&first, &call().await);
        assert_eq!(effects.count(), 1);
    }

    #[tokio::test]
    async fn a_grpc_error_is_replayed_with_its_code_message_and_metadata() {
        let effects = Effects::default();
        let address = serve(IdempotencyLayer::new(MemoryStore::new()), &effects).await;
        let first = call(address, "one", 0).await.unwrap_err();
        let retry = call(address, "one", 0).await.unwrap_err();
        for status in [&first, &retry] {
            assert_eq!(
                (status.code(), status.message()),
                (Code::FailedPrecondition, "no funds at 1")
            );
            assert_eq!(status.metadata().get("account-state").unwrap(), "empty");
        }
        assert!(first.metadata().get("idempotent-replayed").is_none());
        assert_eq!(retry.metadata().get("idempotent-replayed").unwrap(), "true");
        assert_eq!(effects.count(), 1);
    }

    #[tokio::test]
    async fn a_refusal_can_be_told_in_the_words_of_grpc() {
        let effects = Effects::default();
        let refuse = |rejection: &Rejection, _: &http::request::Parts| {
            let status = Status::invalid_argument(rejection.kind().slug());
            status.into_http::<Bytes>()
        };
        let idempotency = IdempotencyLayer::new(MemoryStore::new()).rejections(refuse);
        let address = serve(idempotency, &effects).await;
        call(address, "one", 100).await.unwrap();
        let refused = call(address, "one", 200).await.unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (Code::InvalidArgument, "idempotency-key-reused")
        );
        assert_eq!(effects.count(), 1);
    }

    #[tokio::test]
    async fn a_refusal_reaches_a_grpc_client_as_a_grpc_status() {
        let effects = Effects::default();
        let address = serve(IdempotencyLayer::new(MemoryStore::new()), &effects).await;
        call(address, "one", 100).await.unwrap();
        let refused = call(address, "one", 200).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        assert_eq!(refused.message(), "Idempotency key was used for a different request");
        assert_eq!(effects.count(), 1);
    }

    #[tokio::test]
    async fn a_grpc_status_that_says_not_executed_frees_the_key() {
        let effects = Effects::default();
        let address = serve(IdempotencyLayer::new(MemoryStore::new()), &effects).await;
        for run in 1..=2 {
            let status = call(address, "one", BUSY).await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            assert_eq!(status.message(), format!("try later, {run}"));
            assert!(status.metadata().get("idempotent-replayed").is_none());
        }
        assert_eq!(effects.count(), 2);
    }
}

#[tokio::test]
async fn a_request_without_its_store_takes_a_place_below_like_any_other() {
    let store = crate::support::faulty::FaultyStore::default();
    store.down(crate::support::faulty::Fault::Error(
        tower_idempotency::StoreErrorKind::Unavailable,
    ));
    let layer = IdempotencyLayer::new(store).dangerously_run_without_store();
    let service = two_places(layer, &Gate::closed());
    let (sender, body) = channel();
    let mut slow = pin!(service.clone().oneshot(keyed("/", "one", "").map(|_| body)));
    // The place is given back while the body arrives.
    assert!(poll!(&mut slow).is_pending());
    drop(sender);
    assert_eq!(slow.await.unwrap().status(), StatusCode::OK);
}
