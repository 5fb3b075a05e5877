//! The ways through a request that no store and no system of good health leads to.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::{Future, pending},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use tower::ServiceExt;

use crate::{
    Counters,
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    random,
    record::{Begin, Claim, Lease, Owner, RecordId, Retention},
    service::Idempotency,
    shared::Shared,
    store::{Call, DynStore},
};

/// What a claim finds; whether the system has no randomness to give from then on.
struct Finds(fn(&Claim) -> Result<Begin, StoreErrorKind>, bool);

/// A store that finds what it is told to, and has room for nothing else.
#[derive(Default)]
struct Told {
    finds: Mutex<VecDeque<Finds>>,
    owners: Mutex<Vec<Owner>>,
    released: Mutex<Vec<Owner>>,
}

impl DynStore for Told {
    fn begin<'a>(&'a self, _: &'a RecordId, claim: &'a Claim) -> Call<'a, Begin> {
        self.owners.lock().unwrap().push(claim.owner);
        let Finds(found, is_gone) = self.finds.lock().unwrap().pop_front().unwrap();
        random::tests::IS_GONE.set(is_gone);
        Call::Answered(Some(found(claim).map_err(StoreError::from)))
    }

    fn begin_at_once(&self, _: &RecordId, _: &Claim) -> Option<Result<Begin, StoreError>> {
        None
    }

    fn complete<'a>(&'a self, _: &'a Lease, _: &'a StoredResponse, _: Retention) -> Call<'a, ()> {
        panic!("nothing runs")
    }

    fn renew<'a>(&'a self, _: &'a Lease, _: Duration) -> Call<'a, ()> {
        panic!("nothing runs")
    }

    fn release<'a>(&'a self, lease: &'a Lease) -> Call<'a, ()> {
        self.released.lock().unwrap().push(lease.owner);
        Call::Answered(Some(Ok(())))
    }

    fn abandon<'a>(&'a self, _: &'a Lease) -> Call<'a, ()> {
        panic!("nothing runs")
    }

    fn changed<'a>(&'a self, _: &'a RecordId) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(pending())
    }
}

struct Happened {
    status: StatusCode,
    body: String,
    counters: Counters,
    store: Arc<Told>,
}

async fn nothing_runs(_: Request<Full<Bytes>>) -> Result<Response<Full<Bytes>>, Infallible> {
    panic!("nothing runs")
}

/// One request, and all that is left to be told afterwards.
async fn happens<const N: usize>(finds: [Finds; N]) -> Happened {
    let store = Arc::new(Told {
        finds: Mutex::new(finds.into()),
        ..Told::default()
    });
    let shared = Arc::new(Shared::new(Arc::clone(&store) as Arc<dyn DynStore>));
    let handler = tower::service_fn(nothing_runs);
    let request = Request::post("/pay").header("idempotency-key", "k");
    let request = request.body(Full::new(Bytes::new())).unwrap();
    let response = Idempotency::new(handler, Arc::clone(&shared)).oneshot(request).await;
    let (parts, body) = response.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    random::tests::IS_GONE.set(false);
    // The clock is paused: whatever somebody goes on trying has been tried by then.
    tokio::time::sleep(shared.policy.lease * 2).await;
    assert!(store.finds.lock().unwrap().is_empty(), "all was asked for");
    Happened {
        status: parts.status,
        body: String::from_utf8(body.to_vec()).unwrap(),
        counters: shared.tally.snapshot(),
        store,
    }
}

impl Happened {
    fn is_refused(&self, status: u16, slug: &str) -> bool {
        self.status.as_u16() == status && self.body.contains(slug)
    }

    fn released(&self) -> Vec<Owner> {
        self.store.released.lock().unwrap().clone()
    }

    fn owners(&self) -> Vec<Owner> {
        self.store.owners.lock().unwrap().clone()
    }
}

fn away(_: &Claim) -> Result<Begin, StoreErrorKind> {
    Err(StoreErrorKind::Unavailable)
}

fn in_progress(claim: &Claim) -> Result<Begin, StoreErrorKind> {
    Ok(Begin::InProgress {
        fingerprint: claim.fingerprint,
        remaining: Duration::from_secs(60),
    })
}

fn completed(claim: &Claim, bytes: &'static [u8]) -> Result<Begin, StoreErrorKind> {
    Ok(Begin::Completed {
        fingerprint: claim.fingerprint,
        response: StoredResponse::unread(Bytes::from_static(bytes)),
        remaining: None,
    })
}

#[tokio::test(start_paused = true)]
async fn without_randomness_for_an_owner_a_request_is_refused_and_nothing_is_claimed() {
    random::tests::IS_GONE.set(true);
    let done = happens([]).await;
    assert!(done.is_refused(503, "store-unavailable"), "{}", done.body);
    assert_eq!((done.counters.refused, done.owners().len()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_cannot_be_read_is_refused_and_runs_nothing() {
    let done = happens([Finds(|claim| completed(claim, &[0, 0]), false)]).await;
    assert!(done.is_refused(500, "record-unreadable"), "{}", done.body);
    assert_eq!((done.counters.refused, done.counters.replayed), (1, 0));
    let done = happens([Finds(|claim| completed(claim, &[255, 0]), false)]).await;
    assert!(done.is_refused(503, "record-from-newer-version"), "{}", done.body);
}

#[tokio::test(start_paused = true)]
async fn claims_whose_answers_were_lost_are_ended_under_their_owner() {
    // Neither was answered, or the second found somebody: the first may still arrive.
    for (second, status) in [(away as fn(&Claim) -> _, 503), (in_progress, 409)] {
        let done = happens([Finds(away, false), Finds(second, false)]).await;
        assert_eq!(done.status.as_u16(), status);
        let owners = done.owners();
        assert_eq!(owners[0], owners[1], "the same claim, twice");
        // Said twice: a claim may arrive behind the first word.
        assert_eq!(done.released(), owners);
    }
}

#[tokio::test(start_paused = true)]
async fn without_randomness_for_another_owner_a_claim_is_ended_if_it_is_given_up_and_not_if_it_goes_on() {
    let done = happens([Finds(away, false), Finds(away, true)]).await;
    assert!(done.is_refused(503, "store-unavailable"), "{}", done.body);
    assert_eq!(done.released(), done.owners());
    let done = happens([Finds(away, false), Finds(in_progress, true)]).await;
    assert!(done.is_refused(409, "request-in-progress"), "{}", done.body);
    assert_eq!(done.released(), [], "whoever waits or takes over is the same owner");
}
