//! The story of a request that runs in a transaction.

use std::{panic::resume_unwind, pin::pin, sync::Arc, time::Duration};

use http::{Request, Response, StatusCode, request};
use http_body::Body;
use tokio::time::{Instant, sleep, timeout};
use tower_service::Service;

use super::{Answer, Ended, Found, Opened, Transaction, Transactions, Whose};
use crate::{
    attempt::{Reply, call, catch_panic, judge},
    body::{RequestBody, ResponseBody},
    error::{StoreError, StoreErrorKind},
    extract::Attempt,
    fingerprint::Fingerprint,
    flow::{Exchange, Next, Step, unusable_store},
    grpc,
    guard::Outcome,
    identity::Identity,
    random,
    record::{Begin, Claim, Lease, RecordId},
    rejection::{Rejection, RejectionKind},
    shared::Shared,
    store::Call,
};

/// How soon a duplicate looks again for a transaction on another node. On this one it hears of its end.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// From a look at the store to the answer. Once it is polled it must run to its end; cut, it is rolled back.
pub(crate) async fn run<S, B, R>(
    mut exchange: Box<Exchange<S>>,
    transactions: Arc<dyn Transactions>,
) -> Step<S, R, S::Error>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    B: RequestBody,
    R: Body,
{
    let mut unclear = None;
    loop {
        let Exchange {
            shared,
            identity,
            claim,
            ..
        } = &*exchange;
        let found = match begin(shared, identity, claim, &*transactions).await {
            Ok(opened) => match claimed(shared, identity, claim, opened).await {
                Claimed::All(transaction) => {
                    return Box::pin(exchange.run_in(transaction, transactions)).await;
                }
                Claimed::Unclear => {
                    if unclear.get_or_insert_with(|| Unclear::new(shared)).look_again().await {
                        continue;
                    }
                    // Whoever it is, it is at work. Not a refusal for good: it may be the same request.
                    Ok(in_progress(claim))
                }
                Claimed::Refused(rejection) => return Step::Done(Ok(exchange.refuse(rejection))),
                Claimed::Found(begin) => Ok(begin),
            },
            Err(error) => Err(error),
        };
        match exchange.next(found) {
            Next::Reply(response) => return Step::Done(Ok(response)),
            Next::Wait => return Step::Wait(exchange),
            Next::BeginAgain => {}
            // Nothing that was found is a lease, and nothing runs outside of a transaction.
            Next::Run(_) | Next::RunUnprotected => {
                let rejection = Rejection::new(RejectionKind::StoreUnavailable);
                return Step::Done(Ok(exchange.refuse(rejection)));
            }
        }
    }
}

// ---- begin and claim

async fn begin(
    shared: &Shared,
    identity: &Identity,
    claim: &Claim,
    transactions: &dyn Transactions,
) -> Result<Opened, StoreError> {
    let begin = || shared.call(Call::Pending(transactions.begin(&identity.id, claim, &identity.others)));
    match begin().await {
        // A connection that had broken unseen, perhaps. What was begun on it is rolled back.
        Err(error) if error.is_retryable() => begin().await,
        result => result,
    }
}

/// What follows from what a transaction found.
enum Claimed {
    /// The operation's own record, and all others.
    All(Box<dyn Transaction>),
    Found(Begin),
    Refused(Rejection),
    /// Somebody is at work, and it is not to be seen who.
    Unclear,
}

/// How often and how long it is looked again who is at work: a transaction that ends lets go of its locks one after the
/// other, which takes no time unless its process is held up.
struct Unclear {
    /// `None`: in a time that no clock can count.
    give_up: Option<Instant>,
    pause: Duration,
}

const SHORTEST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

impl Unclear {
    fn new(shared: &Shared) -> Self {
        Self {
            give_up: Instant::now().checked_add(shared.policy.store_timeout),
            pause: SHORTEST_PAUSE,
        }
    }

    /// `false` when the time is over.
    async fn look_again(&mut self) -> bool {
        if self
            .give_up
            .is_some_and(|give_up| Instant::now() + self.pause > give_up)
        {
            return false;
        }
        sleep(self.pause).await;
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
        true
    }
}

/// As if a record that cannot be seen yet were to be seen already.
fn in_progress(claim: &Claim) -> Begin {
    Begin::InProgress {
        fingerprint: claim.fingerprint,
        remaining: LOOK_AGAIN + Duration::from_millis(random::below(LOOK_AGAIN.as_millis() as u64)),
    }
}

/// All of it was claimed, or the transaction is over and its connection given back.
async fn claimed(shared: &Shared, identity: &Identity, claim: &Claim, opened: Opened) -> Claimed {
    let Opened {
        own,
        others,
        transaction,
    } = opened;
    let claimed = match (own, transaction) {
        (Found::Acquired, transaction) => {
            let beside = Fingerprint::beside(&identity.id);
            // Who has the operation's own record to itself meets of the same operation only what is ending.
            let unclear = |found: &Found| matches!(found, Found::InFlight(Whose::Same | Whose::Unclear));
            let is_unclear = others.iter().any(unclear);
            let refused = others
                .into_iter()
                .filter(|found| !unclear(found))
                .find_map(|other| not_to_be_had(other, &beside));
            match (refused, transaction) {
                (None, Some(transaction)) if !is_unclear => return Claimed::All(transaction),
                (Some(rejection), transaction) => (Claimed::Refused(rejection), transaction),
                (None, transaction) => (Claimed::Unclear, transaction),
            }
        }
        (Found::InFlight(Whose::Another), transaction) => {
            (Claimed::Refused(Rejection::new(RejectionKind::KeyReused)), transaction)
        }
        (Found::InFlight(Whose::Same), transaction) => (Claimed::Found(in_progress(claim)), transaction),
        (Found::InFlight(Whose::Unclear), transaction) => (Claimed::Unclear, transaction),
        (Found::Kept(begin), transaction) => (Claimed::Found(begin), transaction),
    };
    let (claimed, transaction) = claimed;
    if let Some(transaction) = transaction {
        let _ = end(shared, transaction, None).await;
    }
    claimed
}

/// Why a key beside the operation's own cannot be claimed; see [`claims`](crate::claims).
fn not_to_be_had(other: Found, beside: &Fingerprint) -> Option<Rejection> {
    let kind = match other {
        Found::Acquired => return None,
        // By an earlier attempt at this operation.
        Found::Kept(Begin::Completed { fingerprint, .. }) if fingerprint == *beside => return None,
        Found::Kept(Begin::InProgress { fingerprint, .. }) if fingerprint == *beside => RejectionKind::InProgress,
        // A transaction leaves none; one that committed by itself, or another guarantee, did.
        Found::Kept(Begin::Abandoned { fingerprint, .. }) if fingerprint == *beside => RejectionKind::OutcomeUnknown,
        Found::Kept(_) | Found::InFlight(_) => {
            let detail = "one of the keys in the request's body belongs to another operation".to_owned();
            return Some(Rejection::new(RejectionKind::KeyReused).with_detail(detail));
        }
    };
    Some(Rejection::new(kind))
}

// ---- run → complete and commit → reply

impl<S> Exchange<S> {
    async fn run_in<B, R>(
        mut self: Box<Self>,
        mut transaction: Box<dyn Transaction>,
        transactions: Arc<dyn Transactions>,
    ) -> Step<S, R, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RequestBody,
        R: Body,
    {
        let shared = Arc::clone(&self.shared);
        let Identity { id, ref key, .. } = self.identity;
        let key = key.clone();
        shared.tally.executed.add();
        let lease = Lease::new(id, self.claim.owner, 1);
        let marked = shared.policy.marks_answers().then(|| key.clone());
        // A refusal is made for the request as it came.
        let head = self.parts.clone();
        self.parts.extensions.insert(Attempt::new(id, key, lease.fence));
        transaction.lend(&mut self.parts.extensions);
        let (outcome, reply) = {
            let call = pin!(call(self, &shared.policy));
            judge(catch_panic(call).await, &shared.policy, marked.as_ref())
        };
        let answer = match outcome {
            Outcome::Completed(response, retention) => Some(Answer {
                with_writes: status(&reply).is_some_and(|status| shared.policy.commit_statuses.contains(status)),
                response,
                retention,
            }),
            Outcome::NotExecuted | Outcome::Unknown => None,
        };
        let is_kept = answer.is_some();
        let reply = match end(&shared, transaction, answer).await {
            Ended::Unknown(error) if is_kept => {
                note(id, "the answer to a commit was lost", &error);
                match resolve(&shared, &*transactions, &lease).await {
                    Ok(()) => reply,
                    Err(rejection) => refused(&shared, rejection, &head, id),
                }
            }
            ended => match rejection(ended, is_kept, id) {
                // Its panic or its error goes on as it was.
                Some(rejection) if matches!(reply, Ok(Ok(_))) => refused(&shared, rejection, &head, id),
                _ => reply,
            },
        };
        if !is_kept {
            shared.tally.released.add();
        }
        Step::Done(reply.unwrap_or_else(|panic| resume_unwind(panic)))
    }
}

fn refused<R: Body, E>(shared: &Shared, rejection: Rejection, head: &request::Parts, id: RecordId) -> Reply<R, E> {
    Ok(Ok(shared.refuse(rejection, head, Some(id))))
}

/// Of the answer; a gRPC call that failed without a message has that of its code.
fn status<R: Body, E>(reply: &Reply<R, E>) -> Option<StatusCode> {
    match reply {
        Ok(Ok(response)) => {
            let response: &Response<ResponseBody<R>> = response;
            Some(grpc::http_status(response.headers()).unwrap_or(response.status()))
        }
        _ => None,
    }
}

/// Commits with an answer, or rolls back without one. Within its time: a connection that does not answer is given up.
async fn end(shared: &Shared, transaction: Box<dyn Transaction>, answer: Option<Answer>) -> Ended {
    let end = match answer {
        Some(answer) => transaction.commit(answer),
        None => transaction.roll_back(),
    };
    let ended = match timeout(shared.policy.store_timeout, end).await {
        Ok(ended) => ended,
        Err(elapsed) => Ended::Unknown(StoreError::with_source(StoreErrorKind::Unavailable, elapsed)),
    };
    if matches!(ended, Ended::RolledBack(_) | Ended::Failed(_) | Ended::Unknown(_)) {
        shared.tally.store_errors.add();
    }
    ended
}

/// What the client is told of an end that was not the one that was asked for.
fn rejection(ended: Ended, is_kept: bool, id: RecordId) -> Option<Rejection> {
    let (kind, error) = match ended {
        Ended::AsAsked => return None,
        Ended::Misused(how) => {
            tracing::error!(record = %id, how, "a handler did not leave its transaction to the layer");
            return Some(Rejection::new(RejectionKind::TransactionMisused).with_detail(how.to_owned()));
        }
        // Nothing was to be kept, and nothing is.
        Ended::RolledBack(_) | Ended::Failed(_) | Ended::Unknown(_) if !is_kept => return None,
        Ended::RolledBack(error) | Ended::Unknown(error) => (RejectionKind::TransactionRolledBack, error),
        Ended::Failed(error) => (RejectionKind::TransactionFailed, error),
    };
    note(id, "a transaction was not committed", &error);
    match error.kind() {
        StoreErrorKind::Full | StoreErrorKind::Corrupt => Some(unusable_store(&error)),
        _ => Some(Rejection::new(kind)),
    }
}

fn note(id: RecordId, what: &str, error: &StoreError) {
    let source = std::error::Error::source(error).map(tracing::field::display);
    tracing::warn!(record = %id, %error, source, "{what}");
}

/// The first pause before the store is asked again, which grows.
const FIRST_PAUSE: Duration = Duration::from_millis(25);

/// Finds out what became of a commit. Nobody is answered before: if it cannot be found out, the client is told to ask
/// again, and finds the answer or runs anew.
async fn resolve(shared: &Shared, transactions: &dyn Transactions, lease: &Lease) -> Result<(), Rejection> {
    let give_up = Instant::now() + shared.policy.store_timeout;
    let mut pause = FIRST_PAUSE;
    loop {
        match shared.call(Call::Pending(transactions.was_committed(lease))).await {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(Rejection::new(RejectionKind::TransactionRolledBack)),
            Err(error) if error.is_retryable() && Instant::now() + pause < give_up => {}
            Err(error) => {
                let detail = "it is not known whether the request was executed; the same request is told, sent again";
                return Err(unusable_store(&error).with_detail(detail.to_owned()));
            }
        }
        sleep(pause).await;
        pause *= 2;
    }
}
