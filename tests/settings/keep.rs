//! A handler's word on its own answer.

use std::{convert::Infallible, time::Duration};

use axum::{
    Router,
    body::Body,
    response::{IntoResponse, Response},
};
use http::{Request, StatusCode};
use tokio::time::advance;
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_idempotency::{
    Attempt, Begin, Claim, Fingerprint, Guarantee, IdempotencyLayer, Keep, MemoryStore, Owner, RecordId, Retention,
    Statuses, Store, StoredResponse,
};

use crate::{
    layer,
    support::{
        app::{Control, answering, call, keyed, open},
        http::Answer,
    },
};

type Service = BoxCloneSyncService<Request<Body>, Response, Infallible>;

/// The same handler twice: it says what it wants as a part of an axum answer, and as a plain extension.
fn both(control: &Control, layer: &IdempotencyLayer, status: StatusCode, keep: Keep) -> [Service; 2] {
    let part = answering(control, layer.clone(), move |run, _, _| {
        (status, keep, format!("run {run}")).into_response()
    });
    let control = control.clone();
    let plain = layer.layer(service_fn(move |_: Request<Body>| {
        let control = control.clone();
        async move {
            let run = control.pass().await;
            let mut response = http::Response::new(Body::from(format!("run {run}")));
            *response.status_mut() = status;
            response.extensions_mut().insert(keep);
            Ok::<_, Infallible>(response)
        }
    }));
    let boxed = |response: http::Response<tower_idempotency::ResponseBody<Body>>| response.map(Body::new);
    [part.boxed_clone_sync(), plain.map_response(boxed).boxed_clone_sync()]
}

trait Boxed {
    fn boxed_clone_sync(self) -> Service;
}

impl<S> Boxed for S
where
    S: tower::Service<Request<Body>, Response = Response, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
{
    fn boxed_clone_sync(self) -> Service {
        BoxCloneSyncService::new(self)
    }
}

async fn send(service: &Service) -> Answer {
    call(service, keyed("k", "a")).await
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const MILLISECOND: Duration = Duration::from_millis(1);

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_to_be_kept_is_kept_whatever_its_status_for_as_long_as_the_layer_says() {
    for status in [
        StatusCode::SERVICE_UNAVAILABLE,
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::OK,
    ] {
        let (_, layer) = layer();
        let layer = layer.store_statuses(Statuses::none());
        for service in both(&open(), &layer, status, Keep::Answer) {
            // The second service's records are the first one's: they have expired.
            let first = send(&service).await;
            assert!(!first.is_replay());
            advance(DAY - MILLISECOND).await;
            let replay = send(&service).await;
            assert!(replay.is_replay());
            assert_eq!((replay.status, &replay.body), (status, &first.body));
            advance(MILLISECOND).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_may_be_kept_for_a_time_of_its_own() {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    for time in [Duration::from_secs(5), 2 * DAY] {
        let (_, layer) = layer();
        for service in both(&open(), &layer, status, Keep::AnswerFor(Retention::For(time))) {
            assert!(!send(&service).await.is_replay());
            advance(time - MILLISECOND).await;
            assert!(send(&service).await.is_replay(), "{time:?}");
            advance(MILLISECOND).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_may_be_kept_for_ever() {
    for at in 0..2 {
        let (_, layer) = layer();
        let service = &both(&open(), &layer, StatusCode::OK, Keep::AnswerFor(Retention::Forever))[at];
        send(service).await;
        advance(1000 * DAY).await;
        assert!(send(service).await.is_replay());
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_kept_for_no_time_frees_its_key_at_once() {
    let (_, layer) = layer();
    let control = open();
    for service in both(
        &control,
        &layer,
        StatusCode::OK,
        Keep::AnswerFor(Retention::For(Duration::ZERO)),
    ) {
        assert!(!send(&service).await.is_replay());
        assert!(!send(&service).await.is_replay());
    }
    assert_eq!(control.runs(), 4);
}

#[tokio::test(start_paused = true)]
async fn the_fact_of_an_answer_that_is_too_large_is_kept_for_the_time_that_the_handler_names() {
    let (_, layer) = layer();
    let (control, layer) = (open(), layer.max_response_body(2));
    let keep = Keep::AnswerFor(Retention::For(Duration::from_secs(5)));
    for service in both(&control, &layer, StatusCode::OK, keep) {
        let runs = control.runs();
        assert_eq!(send(&service).await.status, StatusCode::OK);
        assert_eq!(send(&service).await.problem(), "response-not-kept");
        advance(Duration::from_secs(5)).await;
        assert_eq!(send(&service).await.status, StatusCode::OK, "its time is over");
        assert_eq!(control.runs() - runs, 2);
        advance(DAY).await;
    }
}

/// What a store holds of the operation that a handler was called for.
async fn held(store: &MemoryStore, id: RecordId) -> StoredResponse {
    let owner = Owner::random().unwrap();
    let claim = Claim::new(Fingerprint::new(1, [0; 32]), owner, DAY, Retention::Forever);
    match store.begin(&id, &claim).await.unwrap() {
        Begin::Completed { response, .. } => response,
        other => panic!("it is {other:?}"),
    }
}

#[tokio::test]
async fn of_an_answer_that_holds_a_secret_only_the_fact_is_stored() {
    let (store, layer) = layer();
    let ids = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&ids);
    let app = crate::support::app::anywhere_answering(&open(), layer, move |_, request, _| {
        seen.lock()
            .unwrap()
            .push(request.extensions.get::<Attempt>().unwrap().id());
        (
            StatusCode::CREATED,
            Keep::OnlyTheFact,
            [("x-secret", "hunter2")],
            "hunter2",
        )
            .into_response()
    });
    let first = call(&app, keyed("k", "a")).await;
    assert_eq!(
        (&first.body[..], first.header("x-secret")),
        (&b"hunter2"[..], Some("hunter2"))
    );
    let again = call(&app, keyed("k", "a")).await;
    assert_eq!(again.status, StatusCode::CONFLICT);
    assert_eq!(again.problem(), "response-not-kept");
    assert_eq!(again.json()["original_status"], 201);
    assert_eq!(again.header("x-secret"), None);
    let id = ids.lock().unwrap()[0];
    let held = held(&store, id).await;
    assert!(!held.is_kept());
    assert!(!held.as_bytes().windows(7).any(|bytes| bytes == b"hunter2"));
    assert_eq!(ids.lock().unwrap().len(), 1, "it ran once");
}

#[tokio::test]
async fn only_the_fact_is_kept_of_an_answer_whose_status_would_free_the_key() {
    for at in 0..2 {
        let (_, layer) = layer();
        let control = open();
        let service = &both(&control, &layer, StatusCode::SERVICE_UNAVAILABLE, Keep::OnlyTheFact)[at];
        assert_eq!(send(service).await.body, "run 1");
        let again = send(service).await;
        assert_eq!(again.problem(), "response-not-kept");
        assert_eq!(again.json()["original_status"], 503);
        assert_eq!(control.runs(), 1);
    }
}

#[tokio::test]
async fn an_operation_that_did_not_happen_frees_its_key_whatever_its_status_and_guarantee() {
    for guarantee in [Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
        let (store, layer) = layer();
        let control = open();
        let layer = layer.guarantee(guarantee).store_statuses(Statuses::all());
        for service in both(&control, &layer, StatusCode::CREATED, Keep::Nothing) {
            for _ in 0..2 {
                let answer = send(&service).await;
                assert_eq!(answer.status, StatusCode::CREATED);
                assert!(!answer.is_replay());
                assert!(store.is_empty());
            }
        }
        assert_eq!(control.runs(), 4);
    }
}

#[tokio::test]
async fn a_handler_may_answer_with_its_word_alone() {
    let (_, layer) = layer();
    let control = open();
    let app: Router = answering(&control, layer, |_, _, _| Keep::Nothing.into_response());
    for _ in 0..2 {
        let answer = call(&app, keyed("k", "a")).await;
        assert_eq!((answer.status, answer.is_replay()), (StatusCode::OK, false));
    }
    assert_eq!(control.runs(), 2);
}
