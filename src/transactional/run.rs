//! The story of a request that runs in a transaction.

use std::{panic::resume_unwind, pin::pin, sync::Arc, time::Duration};

use http::{Request, Response, StatusCode, request};
use http_body::Body;
use tokio::time::{Instant, sleep, timeout};
use tower_service::Service;

use super::{
    Answer, Ended, Transaction, Transactions,
    claim::{Claimed, Unclear, begin, claimed, in_progress},
};
use crate::{
    attempt::{Reply, call, catch_panic, judge},
    body::{RequestBody, ResponseBody},
    error::{StoreError, StoreErrorKind},
    extract::Attempt,
    flow::{Exchange, Next, Step, unusable_store},
    grpc,
    identity::Identity,
    record::{Lease, RecordId},
    rejection::{Rejection, RejectionKind},
    settle::Outcome,
    shared::Shared,
    store::Call,
};

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
        self.stop_waiting();
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
            let call = pin!(call(self, &shared.policy, None));
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

/// Of the answer; a gRPC call that ended without a message has that of its code, be it in its headers or, as streams of
/// messages have it, in its trailers. Whether it is kept is judged by the headers alone: a handler that succeeded, and
/// whose answer could then not be encoded, ends in trailers, too. Here both are calls that failed.
fn status<R: Body, E>(reply: &Reply<R, E>) -> Option<StatusCode> {
    match reply {
        Ok(Ok(response)) => {
            let response: &Response<ResponseBody<R>> = response;
            let headers = response.headers();
            let in_trailers = || grpc::http_status_in_trailers(headers, response.body().trailers_alone()?);
            let of_the_call = grpc::http_status(headers).or_else(in_trailers);
            Some(of_the_call.unwrap_or(response.status()))
        }
        _ => None,
    }
}

/// Commits with an answer, or rolls back without one. Within its time: a connection that does not answer is given up.
pub(super) async fn end(shared: &Shared, transaction: Box<dyn Transaction>, answer: Option<Answer>) -> Ended {
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
    // None: a time that no clock can count is never over.
    let give_up = Instant::now().checked_add(shared.policy.store_timeout);
    let mut pause = FIRST_PAUSE;
    loop {
        match shared.call(Call::Pending(transactions.was_committed(lease))).await {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(Rejection::new(RejectionKind::TransactionRolledBack)),
            Err(error) if error.is_retryable() && give_up.is_none_or(|give_up| Instant::now() + pause < give_up) => {}
            Err(error) => {
                let detail = "it is not known whether the request was executed; the same request is told, sent again";
                return Err(unusable_store(&error).with_detail(detail.to_owned()));
            }
        }
        sleep(pause).await;
        pause *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_told_of_an_end_that_was_not_asked_for_if_anything_was_to_be_kept() {
        use RejectionKind::{
            RecordUnreadable, StoreFull, TransactionFailed, TransactionMisused, TransactionRolledBack,
        };
        use StoreErrorKind::{Corrupt, Full, Other, Unavailable};
        let id = RecordId::from_bytes([7; 32]);
        let told = |ended, is_kept| rejection(ended, is_kept, id).map(|rejection| rejection.kind());
        for (error, [rolled_back, failed, unknown]) in [
            (
                Unavailable,
                [TransactionRolledBack, TransactionFailed, TransactionRolledBack],
            ),
            (Other, [TransactionRolledBack, TransactionFailed, TransactionRolledBack]),
            (Full, [StoreFull; 3]),
            (Corrupt, [RecordUnreadable; 3]),
        ] {
            assert_eq!(told(Ended::RolledBack(error.into()), true), Some(rolled_back));
            assert_eq!(told(Ended::Failed(error.into()), true), Some(failed));
            assert_eq!(told(Ended::Unknown(error.into()), true), Some(unknown));
            assert_eq!(told(Ended::RolledBack(error.into()), false), None);
            assert_eq!(told(Ended::Failed(error.into()), false), None);
            assert_eq!(told(Ended::Unknown(error.into()), false), None);
        }
        for is_kept in [false, true] {
            assert_eq!(told(Ended::AsAsked, is_kept), None);
            assert_eq!(told(Ended::Misused("it was leaked"), is_kept), Some(TransactionMisused));
        }
    }
}
