//! The story of a request in a transaction, with transactions that find and end as they are told to.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::{pending, ready},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use tokio::time::Instant;
use tower::ServiceExt;

use super::{Answer, Boxed, Ended, Found, Opened, Transaction, Transactions, Whose};
use crate::{
    Counters, Keep,
    body::BufferedBody,
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    policy::Guarantee,
    record::{Begin, Claim, Lease, RecordId, Retention},
    service::Idempotency,
    shared::Shared,
    store::{Call, DynStore},
};

/// What a claim finds.
enum Finds {
    Nothing,
    /// Beside the own record, which is had.
    Beside(Found),
    Own(Found),
    Completed,
    Fails(StoreErrorKind),
}

#[derive(Default)]
struct Story {
    /// What each claim finds, one after the other; nothing, after the last.
    finds: VecDeque<Finds>,
    /// How the transactions end, one after the other; as they are asked to, after the last.
    ends: VecDeque<Ended>,
    /// What is said of a commit, one time after the other.
    committed: VecDeque<Result<bool, StoreErrorKind>>,
    /// What was asked for.
    log: Vec<&'static str>,
}

#[derive(Clone, Default)]
struct Told(Arc<Mutex<Story>>);

impl Told {
    fn note(&self, what: &'static str) {
        self.0.lock().unwrap().log.push(what);
    }

    fn ended(&self, what: &'static str) -> Boxed<'static, Ended> {
        self.note(what);
        Box::pin(ready(self.0.lock().unwrap().ends.pop_front().unwrap_or(Ended::AsAsked)))
    }
}

impl Transactions for Told {
    fn begin<'a>(
        &'a self,
        _: &'a RecordId,
        claim: &'a Claim,
        _: &'a [RecordId],
    ) -> Boxed<'a, Result<Opened, StoreError>> {
        self.note("begin");
        let finds = self.0.lock().unwrap().finds.pop_front().unwrap_or(Finds::Nothing);
        let (own, others) = match finds {
            Finds::Nothing => (Found::Acquired, vec![]),
            Finds::Beside(found) => (Found::Acquired, vec![found]),
            Finds::Own(found) => (found, vec![]),
            Finds::Completed => (Found::Kept(completed(claim)), vec![]),
            Finds::Fails(kind) => return Box::pin(ready(Err(kind.into()))),
        };
        let transaction: Box<dyn Transaction> = Box::new(self.clone());
        Box::pin(ready(Ok(Opened {
            own,
            others,
            transaction: Some(transaction),
        })))
    }

    fn was_committed<'a>(&'a self, _: &'a Lease) -> Boxed<'a, Result<bool, StoreError>> {
        self.note("was it committed?");
        let said = self.0.lock().unwrap().committed.pop_front();
        let said = said.unwrap_or(Err(StoreErrorKind::Unavailable));
        Box::pin(ready(said.map_err(StoreError::from)))
    }

    fn over<'a>(&'a self, _: &'a RecordId) -> Boxed<'a, ()> {
        Box::pin(pending())
    }
}

fn completed(claim: &Claim) -> Begin {
    Begin::Completed {
        fingerprint: claim.fingerprint,
        response: StoredResponse::not_kept(StatusCode::CREATED),
        remaining: None,
    }
}

impl Transaction for Told {
    fn lend(&mut self, _: &mut Extensions) {}

    fn commit(self: Box<Self>, answer: Answer) -> Boxed<'static, Ended> {
        self.ended(match answer.with_writes {
            true => "commit",
            false => "commit the answer alone",
        })
    }

    fn roll_back(self: Box<Self>) -> Boxed<'static, Ended> {
        self.ended("roll back")
    }
}

/// Has transactions, and nothing else is ever asked of it.
struct Store(Told);

impl DynStore for Store {
    fn begin<'a>(&'a self, _: &'a RecordId, _: &'a Claim) -> Call<'a, Begin> {
        panic!("it is begun in a transaction")
    }

    fn begin_at_once(&self, _: &RecordId, _: &Claim) -> Option<Result<Begin, StoreError>> {
        None
    }

    fn complete<'a>(&'a self, _: &'a Lease, _: &'a StoredResponse, _: Retention) -> Call<'a, ()> {
        panic!("it is completed in its transaction")
    }

    fn renew<'a>(&'a self, _: &'a Lease, _: Duration) -> Call<'a, ()> {
        panic!("a transaction has no lease")
    }

    fn release<'a>(&'a self, _: &'a Lease) -> Call<'a, ()> {
        panic!("it is rolled back")
    }

    fn abandon<'a>(&'a self, _: &'a Lease) -> Call<'a, ()> {
        panic!("it is rolled back")
    }

    fn changed<'a>(&'a self, _: &'a RecordId) -> crate::transactional::Boxed<'a, ()> {
        Box::pin(pending())
    }

    fn transactions(&self) -> Option<Arc<dyn Transactions>> {
        Some(Arc::new(self.0.clone()))
    }
}

/// What a handler does.
#[derive(Clone, Copy)]
enum Does {
    Answers(u16),
    /// A gRPC call, with this message, that ends in trailers with this code.
    Ends(&'static str, u16),
    Nothing,
    Panics,
}

/// What became of one request.
struct Happened {
    response: Result<(StatusCode, String), String>,
    log: Vec<&'static str>,
    counters: Counters,
    took: Duration,
}

impl Happened {
    fn status(&self) -> u16 {
        self.response.as_ref().unwrap().0.as_u16()
    }

    fn says(&self, what: &str) -> bool {
        self.response.as_ref().unwrap().1.contains(what)
    }

    fn count(&self, what: &str) -> usize {
        self.log.iter().filter(|noted| **noted == what).count()
    }
}

async fn happens(story: Story, does: Does, store_timeout: Duration) -> Happened {
    let told = Told(Arc::new(Mutex::new(story)));
    let mut shared = Shared::new(Arc::new(Store(told.clone())));
    shared.policy.guarantee = Guarantee::Transactional;
    shared.policy.store_timeout = store_timeout;
    let shared = Arc::new(shared);
    let log = told.clone();
    let handler = tower::service_fn(move |_: Request<Full<Bytes>>| {
        log.note("run");
        async move {
            let mut response = Response::new(BufferedBody::new(Bytes::from_static(b"paid"), None));
            match does {
                Does::Answers(status) => *response.status_mut() = StatusCode::from_u16(status).unwrap(),
                Does::Ends(message, code) => {
                    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from(code))]);
                    *response.body_mut() = BufferedBody::new(Bytes::from_static(message.as_bytes()), Some(trailers));
                    let grpc = HeaderValue::from_static("application/grpc");
                    response.headers_mut().insert(header::CONTENT_TYPE, grpc);
                }
                Does::Nothing => drop(response.extensions_mut().insert(Keep::Nothing)),
                Does::Panics => panic!("the handler's own words"),
            }
            Ok::<_, Infallible>(response)
        }
    });
    let request = Request::post("/pay").header("idempotency-key", "k");
    let request = request.body(Full::new(Bytes::new())).unwrap();
    let start = Instant::now();
    let call = tokio::spawn(Idempotency::new(handler, Arc::clone(&shared)).oneshot(request));
    let response = match call.await {
        Ok(response) => {
            let (parts, body) = response.unwrap().into_parts();
            let body = http_body_util::BodyExt::collect(body).await.unwrap().to_bytes();
            Ok((parts.status, String::from_utf8(body.to_vec()).unwrap()))
        }
        Err(panicked) => Err((*panicked.into_panic().downcast_ref::<&str>().unwrap()).to_owned()),
    };
    let took = start.elapsed();
    let log = std::mem::take(&mut told.0.lock().unwrap().log);
    Happened {
        response,
        log,
        counters: shared.tally.snapshot(),
        took,
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn finds<const N: usize>(finds: [Finds; N]) -> Story {
    Story {
        finds: finds.into(),
        ..Story::default()
    }
}

fn ends(how: Ended) -> Story {
    Story {
        ends: [how].into(),
        ..Story::default()
    }
}

fn unknown(committed: &[Result<bool, StoreErrorKind>]) -> Story {
    Story {
        committed: committed.iter().copied().collect(),
        ..ends(Ended::Unknown(StoreErrorKind::Unavailable.into()))
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_written_is_committed_with_an_answer_whose_status_says_so_and_else_the_answer_alone() {
    for (status, commits) in [(201, "commit"), (302, "commit"), (422, "commit the answer alone")] {
        let done = happens(Story::default(), Does::Answers(status), SECOND).await;
        assert_eq!(done.status(), status);
        assert_eq!(done.log, ["begin", "run", commits]);
        assert_eq!((done.counters.executed, done.counters.released), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_grpc_call_wrote_that_failed_without_a_message_is_not_committed_although_it_failed_in_trailers() {
    for (message, code, commits) in [
        ("", 14, "commit the answer alone"),
        ("", 13, "commit the answer alone"),
        ("", 0, "commit"),
        ("a message", 0, "commit"),
        ("a message", 14, "commit"),
    ] {
        let done = happens(Story::default(), Does::Ends(message, code), SECOND).await;
        assert_eq!((done.status(), done.says(message)), (200, true));
        assert_eq!(done.log, ["begin", "run", commits], "{message:?}, {code}");
        let kept = (done.counters.executed, done.counters.released);
        assert_eq!(
            kept,
            (1, 0),
            "its key is not free: it may be an answer that could not be encoded"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_not_executed_is_rolled_back_and_counted_as_released() {
    let done = happens(Story::default(), Does::Nothing, SECOND).await;
    assert_eq!((done.status(), done.says("paid")), (200, true));
    assert_eq!(done.log, ["begin", "run", "roll back"]);
    assert_eq!((done.counters.executed, done.counters.released), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn of_a_rollback_whose_answer_is_lost_nobody_is_told() {
    let lost = || unknown(&[]);
    let done = happens(lost(), Does::Nothing, SECOND).await;
    assert_eq!((done.status(), done.says("paid")), (200, true));
    assert_eq!(done.log, ["begin", "run", "roll back"], "there is nothing to find out");
    let done = happens(lost(), Does::Panics, SECOND).await;
    assert_eq!(done.response.unwrap_err(), "the handler's own words");
}

#[tokio::test(start_paused = true)]
async fn a_panic_goes_on_as_it_was_whatever_became_of_its_transaction() {
    let done = happens(ends(Ended::Misused("it was leaked")), Does::Panics, SECOND).await;
    assert_eq!(done.response.unwrap_err(), "the handler's own words");
    let done = happens(ends(Ended::Misused("it was leaked")), Does::Answers(201), SECOND).await;
    assert_eq!((done.status(), done.says("it was leaked")), (500, true));
}

#[tokio::test(start_paused = true)]
async fn a_commit_whose_answer_is_lost_is_asked_for_until_it_is_known_and_nobody_is_answered_before() {
    use StoreErrorKind::{Other, Unavailable};
    let done = happens(unknown(&[Ok(true)]), Does::Answers(201), SECOND).await;
    assert_eq!((done.status(), done.took), (201, Duration::ZERO));
    let done = happens(unknown(&[Err(Unavailable), Ok(true)]), Does::Answers(201), SECOND).await;
    assert_eq!((done.status(), done.count("was it committed?")), (201, 2));
    let done = happens(unknown(&[Err(Unavailable), Ok(false)]), Does::Answers(201), SECOND).await;
    assert!(done.status() == 503 && done.says("transaction-rolled-back"));
    // What does not help is not repeated.
    let done = happens(unknown(&[Err(Other), Ok(true)]), Does::Answers(201), SECOND).await;
    assert!(done.status() == 503 && done.says("not known whether the request was executed"));
    assert_eq!(done.count("was it committed?"), 1);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_found_out_is_asked_for_with_growing_pauses_within_the_stores_time() {
    for (within, asked, took) in [(25, 1, 0), (26, 2, 25), (75, 2, 25), (76, 3, 75), (1000, 6, 775)] {
        let within = Duration::from_millis(within);
        let done = happens(unknown(&[]), Does::Answers(201), within).await;
        assert!(done.status() == 503 && done.says("not known whether the request was executed"));
        assert_eq!(done.count("was it committed?"), asked, "within {within:?}");
        assert_eq!(done.took, Duration::from_millis(took), "within {within:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_is_made_again_once_if_its_connection_may_have_broken_and_never_else() {
    use StoreErrorKind::{Full, Other, Unavailable};
    let fails = |kinds: &[StoreErrorKind]| Story {
        finds: kinds.iter().map(|kind| Finds::Fails(*kind)).collect(),
        ..Story::default()
    };
    for (kinds, status, log) in [
        (&[Unavailable][..], 201, &["begin", "begin", "run", "commit"][..]),
        (&[Unavailable, Unavailable], 503, &["begin", "begin"]),
        (&[Other], 503, &["begin"]),
        (&[Full], 503, &["begin"]),
    ] {
        let done = happens(fails(kinds), Does::Answers(201), SECOND).await;
        assert_eq!((done.status(), &done.log[..]), (status, log), "{kinds:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_has_its_own_record_and_meets_one_beside_it_that_is_being_ended_looks_again_and_runs() {
    for whose in [Whose::Same, Whose::Unclear] {
        let beside = Finds::Beside(Found::InFlight(whose));
        let done = happens(finds([beside]), Does::Answers(201), SECOND).await;
        assert_eq!(done.status(), 201);
        assert_eq!(done.log, ["begin", "roll back", "begin", "run", "commit"], "{whose:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_will_not_run_gives_its_transaction_back_and_is_told_why() {
    for (found, status, says) in [
        (Finds::Own(Found::InFlight(Whose::Same)), 409, "in-progress"),
        (Finds::Own(Found::InFlight(Whose::Another)), 422, "key-reused"),
        (
            Finds::Beside(Found::InFlight(Whose::Another)),
            422,
            "belongs to another operation",
        ),
        (Finds::Completed, 409, "response-not-kept"),
    ] {
        let done = happens(finds([found]), Does::Answers(201), SECOND).await;
        assert!(done.status() == status && done.says(says), "{:?}", done.response);
        assert_eq!(done.log, ["begin", "roll back"], "{says}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_cannot_see_who_is_at_work_is_told_so_when_the_stores_time_is_over() {
    let unclear = || Finds::Own(Found::InFlight(Whose::Unclear));
    let done = happens(finds([unclear()]), Does::Answers(201), SECOND).await;
    assert_eq!((done.status(), done.count("begin")), (201, 2));
    let for_ever = finds([(); 20].map(|()| unclear()));
    // Looked at after 2, 6 and 14 ms.
    let done = happens(for_ever, Does::Answers(201), Duration::from_millis(20)).await;
    assert!(done.status() == 409 && done.says("in-progress"), "{:?}", done.response);
    assert_eq!(
        (done.count("begin"), done.count("roll back"), done.count("run")),
        (4, 4, 0)
    );
}
