//! What holds when many work on one record at once.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use tokio::{sync::Barrier, task::JoinSet, time::timeout};

use super::{Bench, Report, Subject, ensure, response};
use crate::{
    error::StoreErrorKind,
    record::{Begin, Claim, Lease, Retention},
    store::Store,
};

pub(super) async fn check(subject: &impl Subject, report: &mut Report) {
    report.add(1, "of many who begin at once, one acquires", begin(subject).await);
    report.add(
        1,
        "of many who take over at once, one acquires",
        takeover(subject).await,
    );
    report.add(
        1,
        "a completion and a takeover exclude each other",
        complete_or_takeover(subject).await,
    );
    report.add(
        1,
        "a released record is acquired by one of many who wait for it",
        release(subject).await,
    );
    report.add(
        4,
        "of many who end one attempt, one decides how",
        endings(subject).await,
    );
    report.add(
        11,
        "a listener hears of a completion",
        hears(subject, Change::Complete).await,
    );
    report.add(
        11,
        "a listener hears of a release",
        hears(subject, Change::Release).await,
    );
    report.add(
        11,
        "a listener hears of an abandoned attempt",
        hears(subject, Change::Abandon).await,
    );
    report.add(11, "every listener hears of a completion", all_hear(subject).await);
    report.add(11, "a listener that left takes no other's call", left(subject).await);
}

type Checked = Result<(), String>;

const MANY: usize = 16;
const ROUNDS: usize = 16;

/// Runs one future for each claim, all from the same moment on.
async fn at_once<T, F>(works: Vec<F>) -> Result<Vec<T>, String>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let barrier = Arc::new(Barrier::new(works.len()));
    let mut tasks = JoinSet::new();
    for work in works {
        let barrier = Arc::clone(&barrier);
        tasks.spawn(async move {
            barrier.wait().await;
            work.await
        });
    }
    let mut results = Vec::new();
    while let Some(result) = tasks.join_next().await {
        results.push(result.map_err(|error| error.to_string())?);
    }
    Ok(results)
}

/// How many of these claims acquire the record when they are made at once.
async fn race<S: Store>(bench: &Bench<S>, claims: Vec<Claim>) -> Result<(Vec<Lease>, Vec<Begin>), String> {
    let works = claims.into_iter().map(|claim| {
        let (store, id) = (Arc::clone(&bench.store), bench.id);
        async move { store.begin(&id, &claim).await }
    });
    let (mut leases, mut others) = (Vec::new(), Vec::new());
    for begin in at_once(works.collect()).await? {
        match begin.map_err(|error| format!("begin failed: {error}"))? {
            Begin::Acquired(lease) => leases.push(lease),
            other => others.push(other),
        }
    }
    Ok((leases, others))
}

fn one(leases: &[Lease]) -> Checked {
    ensure(leases.len() == 1, || format!("{} of {MANY} acquired it", leases.len()))
}

async fn begin(subject: &impl Subject) -> Checked {
    for _ in 0..ROUNDS {
        let bench = Bench::new(subject).await?;
        let claims = (0..MANY).map(|_| bench.claim(1)).collect::<Result<_, _>>()?;
        let (leases, others) = race(&bench, claims).await?;
        one(&leases)?;
        let in_progress = others.iter().all(|other| matches!(other, Begin::InProgress { .. }));
        ensure(in_progress, || format!("the others found {others:?}"))?;
    }
    Ok(())
}

/// A record that request 1 gave up.
async fn abandoned<S: Store>(subject: &impl Subject<Store = S>) -> Result<(Bench<S>, Lease), String> {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    let result = bench.store.abandon(&lease).await;
    result.map_err(|error| format!("abandon failed: {error}"))?;
    Ok((bench, lease))
}

async fn takeover(subject: &impl Subject) -> Checked {
    for _ in 0..ROUNDS {
        let (bench, first) = abandoned(subject).await?;
        let claims = (0..MANY).map(|_| Ok(bench.claim(1)?.taking_over(first)));
        let (leases, _) = race(&bench, claims.collect::<Result<_, String>>()?).await?;
        one(&leases)?;
        ensure(leases[0].fence == 2, || format!("the takeover is {:?}", leases[0]))?;
    }
    Ok(())
}

async fn complete_or_takeover(subject: &impl Subject) -> Checked {
    for _ in 0..ROUNDS {
        let (bench, first) = abandoned(subject).await?;
        let completing = {
            let store = Arc::clone(&bench.store);
            async move { store.complete(&first, &response(b"first"), Retention::Forever).await }
        };
        let completing = tokio::spawn(completing);
        let claims = vec![bench.claim(1)?.taking_over(first); 1];
        let (leases, _) = race(&bench, claims).await?;
        let completed = completing.await.map_err(|error| error.to_string())?;
        match (completed, leases.len()) {
            (Ok(()), 0) => bench.expect_completed(1, &response(b"first")).await?,
            (Err(error), 1) if error.kind() == StoreErrorKind::Fenced => {
                bench.expect_in_progress(1).await?;
            }
            (completed, leases) => {
                return Err(format!(
                    "the completion was {completed:?} and {leases} takeovers succeeded"
                ));
            }
        }
    }
    Ok(())
}

async fn release(subject: &impl Subject) -> Checked {
    for _ in 0..ROUNDS {
        let bench = Bench::new(subject).await?;
        let lease = bench.acquire(&bench.claim(1)?).await?;
        let releasing = {
            let store = Arc::clone(&bench.store);
            tokio::spawn(async move { store.release(&lease).await })
        };
        let claims = (0..MANY).map(|_| bench.claim(1)).collect::<Result<_, _>>()?;
        let (leases, _) = race(&bench, claims).await?;
        let released = releasing.await.map_err(|error| error.to_string())?;
        released.map_err(|error| format!("release failed: {error}"))?;
        // All may have come before the release, but no two after it.
        ensure(leases.len() <= 1, || format!("{} of {MANY} acquired it", leases.len()))?;
    }
    Ok(())
}

async fn endings(subject: &impl Subject) -> Checked {
    for _ in 0..ROUNDS {
        let bench = Bench::new(subject).await?;
        let lease = bench.acquire(&bench.claim(1)?).await?;
        let works = (0..MANY).map(|number| {
            let store = Arc::clone(&bench.store);
            async move {
                if number % 2 == 0 {
                    store.release(&lease).await.is_ok()
                } else {
                    store
                        .complete(&lease, &response(b"done"), Retention::Forever)
                        .await
                        .is_ok()
                }
            }
        });
        let succeeded = at_once(works.collect()).await?;
        ensure(succeeded.contains(&true), || "none of them succeeded".to_owned())?;
        match bench.look().await? {
            // Repeating a completion may succeed; releasing what is completed, or completing what is released, may not.
            Begin::Completed { .. } => {}
            Begin::Acquired(_) => {
                let count = succeeded.iter().filter(|succeeded| **succeeded).count();
                ensure(count == 1, || {
                    format!("{count} endings of a released attempt succeeded")
                })?;
            }
            other => return Err(format!("it is {other:?} in the end")),
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Change {
    Complete,
    Release,
    Abandon,
}

async fn change<S: Store>(bench: &Bench<S>, lease: &Lease, change: Change) -> Checked {
    let result = match change {
        Change::Complete => {
            bench
                .store
                .complete(lease, &response(b"done"), Retention::Forever)
                .await
        }
        Change::Release => bench.store.release(lease).await,
        Change::Abandon => bench.store.abandon(lease).await,
    };
    result.map_err(|error| format!("the change failed: {error}"))
}

type Listener = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Registers, and says whether it has nothing to tell yet.
async fn is_quiet(listener: &mut Listener) -> bool {
    poll_fn(|cx| Poll::Ready(listener.as_mut().poll(cx).is_pending())).await
}

fn listen<S: Store>(bench: &Bench<S>) -> Listener {
    let (store, id) = (Arc::clone(&bench.store), bench.id);
    Box::pin(async move { store.changed(&id).await })
}

/// Listens until a listener is woken by nothing: a remote one may be when it is registered, and whoever takes that for
/// its call would have proven nothing. `None` if they are woken all the time, which is no violation.
async fn quiet<S: Store>(bench: &Bench<S>) -> Option<Listener> {
    for _ in 0..MANY {
        let mut listener = listen(bench);
        if timeout(bench.tick / 4, &mut listener).await.is_err() {
            return Some(listener);
        }
    }
    None
}

async fn woken(tick: Duration, listener: Listener) -> Checked {
    let result = timeout(tick * 2, listener).await;
    result.map_err(|_| "it was not woken within two ticks".to_owned())
}

async fn hears(subject: &impl Subject, what: Change) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    let Some(heard) = quiet(&bench).await else {
        return Ok(());
    };
    change(&bench, &lease, what).await?;
    woken(bench.tick, heard).await
}

async fn all_hear(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    let Some(first) = quiet(&bench).await else {
        return Ok(());
    };
    let mut waiting = vec![first];
    for _ in 1..MANY {
        let mut listener = listen(&bench);
        if is_quiet(&mut listener).await {
            waiting.push(listener);
        }
    }
    change(&bench, &lease, Change::Complete).await?;
    for listener in waiting {
        woken(bench.tick, listener).await?;
    }
    Ok(())
}

/// A release need wake one listener only; it must not be one that is gone.
async fn left(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    let Some(leaving) = quiet(&bench).await else {
        return Ok(());
    };
    let mut staying = listen(&bench);
    if !is_quiet(&mut staying).await {
        return Ok(());
    }
    change(&bench, &lease, Change::Release).await?;
    // Called, perhaps, but gone before it looked.
    drop(leaving);
    woken(bench.tick, staying).await
}
