//! Requests at one key of a layer, in every order that matters: the guard, the waiters, and clients that leave.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    convert::Infallible,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use shuttle::{future, thread};
use support::{SECOND, explore};
use tower::{Layer, Service, ServiceExt, util::BoxCloneSyncService};
use tower_idempotency::{
    Begin, Claim, Concurrent, Guarantee, IdempotencyLayer, Lease, MemoryStore, RecordId, Retention, Store, StoreError,
    StoredResponse, sync,
};

/// A step of the scheduler's at which a future may be dropped.
async fn pause() {
    let mut paused = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut paused, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A memory store that is some way off: each call may be dropped before and after it is applied.
#[derive(Clone, Default)]
struct Remote(MemoryStore);

impl Store for Remote {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        pause().await;
        let begin = self.0.begin(id, claim).await;
        pause().await;
        begin
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        pause().await;
        let complete = self.0.complete(lease, response, retention).await;
        pause().await;
        complete
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.0.renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        pause().await;
        self.0.release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        pause().await;
        self.0.abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.0.changed(id).await;
    }
}

type App = BoxCloneSyncService<Request<Full<Bytes>>, (StatusCode, bool, Bytes), Infallible>;

/// A service whose handler counts its runs and answers with their number; the first `refusals` do not execute.
fn app(layer: &IdempotencyLayer, refusals: usize) -> (App, Arc<AtomicUsize>) {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let handler = tower::service_fn(move |_: Request<Full<Bytes>>| {
        let runs = Arc::clone(&counted);
        async move {
            let run = runs.fetch_add(1, SeqCst) + 1;
            pause().await;
            let status = match run <= refusals {
                true => StatusCode::SERVICE_UNAVAILABLE,
                false => StatusCode::CREATED,
            };
            let body = Full::new(Bytes::from(run.to_string()));
            Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
        }
    });
    let service = layer.layer(handler);
    let app = tower::service_fn(move |request| {
        let mut service = service.clone();
        async move {
            let response = service.ready().await?.call(request).await?;
            let (parts, body) = response.into_parts();
            let is_replay = parts.headers.contains_key("idempotent-replayed");
            let body = body.collect().await.unwrap().to_bytes();
            Ok((parts.status, is_replay, body))
        }
    });
    (BoxCloneSyncService::new(app), runs)
}

fn request() -> Request<Full<Bytes>> {
    Request::post("/pay")
        .header("idempotency-key", "k")
        .body(Full::default())
        .unwrap()
}

async fn ask(app: &App) -> (StatusCode, bool, Bytes) {
    app.clone().oneshot(request()).await.unwrap()
}

fn patient(store: impl Store) -> IdempotencyLayer {
    IdempotencyLayer::new(store).on_concurrent(Concurrent::Wait(1000 * SECOND))
}

/// Time stands still: who misses a call waits for ever, which the scheduler reports.
#[test]
fn whoever_waits_for_an_answer_gets_it() {
    explore(|| {
        let (app, runs) = app(&patient(MemoryStore::new()), 0);
        let clients: Vec<_> = (0..3)
            .map(|_| {
                let app = app.clone();
                future::spawn(async move { ask(&app).await })
            })
            .collect();
        let answers: Vec<_> = clients
            .into_iter()
            .map(|client| future::block_on(client).unwrap())
            .collect();
        assert!(
            answers
                .iter()
                .all(|(status, _, body)| *status == StatusCode::CREATED && body == "1")
        );
        assert_eq!(answers.iter().filter(|(_, is_replay, _)| !is_replay).count(), 1);
        assert_eq!(runs.load(SeqCst), 1);
    });
}

#[test]
fn of_those_who_wait_for_a_released_key_one_runs_and_the_others_get_its_answer() {
    explore(|| {
        let (app, runs) = app(&patient(MemoryStore::new()), 1);
        let clients: Vec<_> = (0..3)
            .map(|_| {
                let app = app.clone();
                future::spawn(async move { ask(&app).await })
            })
            .collect();
        let answers: Vec<_> = clients
            .into_iter()
            .map(|client| future::block_on(client).unwrap())
            .collect();
        let created = answers.iter().filter(|(status, _, _)| *status == StatusCode::CREATED);
        assert!(created.clone().all(|(_, _, body)| body == "2"));
        assert_eq!(created.count(), 2);
        assert_eq!(runs.load(SeqCst), 2);
    });
}

#[test]
fn a_client_that_leaves_at_any_point_leaves_no_key_stuck() {
    explore(|| {
        let layer = patient(Remote::default());
        let (app, runs) = app(&layer, 0);
        let leaving = {
            let app = app.clone();
            future::spawn(async move { ask(&app).await })
        };
        // Somewhere on its way.
        thread::yield_now();
        leaving.abort();
        future::block_on(async {
            let (status, _, body) = ask(&app).await;
            assert_eq!((status, &body[..]), (StatusCode::CREATED, &b"1"[..]));
            layer.drain().finished().await;
        });
        assert_eq!(runs.load(SeqCst), 1);
    });
}

#[test]
fn a_waiter_that_leaves_frees_its_place_and_keeps_no_call() {
    explore(|| {
        let store = MemoryStore::new();
        let layer = patient(store.clone()).max_waiters(2);
        let (app, runs) = app(&layer, 1);
        let clients: Vec<_> = (0..3)
            .map(|_| {
                let app = app.clone();
                future::spawn(async move { ask(&app).await })
            })
            .collect();
        clients[2].abort();
        let mut clients = clients.into_iter();
        for client in clients.by_ref().take(2) {
            // One of them may be told that nothing was executed.
            let (status, _, _) = future::block_on(client).unwrap();
            assert!(
                matches!(status, StatusCode::CREATED | StatusCode::SERVICE_UNAVAILABLE),
                "{status}"
            );
        }
        let _ = future::block_on(clients.next().unwrap());
        future::block_on(layer.drain().finished());
        assert!(runs.load(SeqCst) <= 3);
        assert_eq!(layer.counters().refused, 0, "there was a place for each");
    });
}

/// The lease ends while the handler runs, or before that, unless it is renewed; a rival comes in between.
#[test]
fn two_attempts_at_once_are_told_apart_by_their_fences() {
    explore(|| {
        let store = Remote::default();
        let layer = IdempotencyLayer::new(store.clone())
            .guarantee(Guarantee::AtLeastOnce)
            .lease(3 * SECOND)
            .store_timeout(1000 * SECOND);
        let (app, runs) = app(&layer, 0);
        let first = {
            let app = app.clone();
            future::spawn(async move { ask(&app).await })
        };
        let time = thread::spawn(|| (0..4).for_each(|_| sync::pass(SECOND)));
        let second = future::block_on(ask(&app));
        let first = future::block_on(first).unwrap();
        time.join().unwrap();
        future::block_on(layer.drain().finished());
        let ran = runs.load(SeqCst);
        let last = future::block_on(ask(&app));
        let expected = (StatusCode::CREATED, ran > 0);
        assert_eq!((last.0, last.1), expected, "one of those that ran was stored");
        let told = [first, second];
        let own = told
            .iter()
            .filter(|(status, is_replay, _)| *status == StatusCode::CREATED && !is_replay);
        assert_eq!(own.clone().count(), ran, "each run was answered once");
        assert!(
            ran == 0 || own.clone().any(|(_, _, body)| *body == last.2),
            "what is kept was answered"
        );
    });
}
