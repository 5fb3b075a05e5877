//! Leases and retentions, by the store's clock.

use std::time::Duration;

use super::{Bench, Checks, Subject, response};
use crate::{
    codec::StoredResponse,
    error::StoreError,
    record::{Begin, Claim, Retention},
    store::Store,
};

pub(super) fn check<'a>(subject: &'a impl Subject, checks: &mut Checks<'a>) {
    checks.add(5, "a lease lasts as long as asked, and then it is over", || {
        lease(subject)
    });
    checks.add(5, "a renewed lease lasts from its renewal", || renewed(subject));
    checks.add(5, "durations that no clock can count are for ever", || endless(subject));
    checks.add(
        6,
        "a completed record is kept for its retention and then vacant",
        || retention(subject),
    );
    checks.add(6, "a retention counts from the completion", || from_completion(subject));
    checks.add(
        6,
        "an abandoned record is kept for the claim's retention and then vacant",
        || abandoned(subject),
    );
    checks.add(
        6,
        "a record that nobody ended is kept for its lease and the claim's retention",
        || never_ended(subject),
    );
    checks.add(6, "a renewed and lost record is kept for the claim's retention", || {
        renewed_and_lost(subject)
    });
    checks.add(6, "what is kept for ever does not expire", || forever(subject));
    checks.add(
        12,
        "a completed record says how long it is kept, and never more than it is",
        || remaining(subject),
    );
    checks.add(6, "an expired record is begun anew", || anew(subject));
}

type Checked = Result<(), String>;

fn failed(error: StoreError) -> String {
    format!("it failed: {error}")
}

async fn lease(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    bench.acquire(&bench.claim(1)?).await?;
    subject.pass(bench.tick * 3 / 2).await;
    let remaining = bench.expect_in_progress(1).await?;
    super::ensure(remaining <= bench.tick / 2, || {
        format!("{remaining:?} remain of half a tick")
    })?;
    subject.pass(bench.tick).await;
    bench.expect_abandoned(1).await.map(drop)
}

async fn renewed(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    for _ in 0..3 {
        subject.pass(bench.tick * 3 / 2).await;
        bench.store.renew(&lease, bench.tick * 2).await.map_err(failed)?;
    }
    subject.pass(bench.tick * 3 / 2).await;
    bench.expect_in_progress(1).await?;
    subject.pass(bench.tick).await;
    bench.expect_abandoned(1).await.map(drop)
}

async fn endless(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let claim = Claim {
        lease: Duration::MAX,
        retention: Retention::For(Duration::MAX),
        ..bench.claim(1)?
    };
    let lease = bench.acquire(&claim).await?;
    subject.pass(bench.tick).await;
    bench.expect_in_progress(1).await?;
    bench.store.renew(&lease, Duration::MAX).await.map_err(failed)?;
    bench.expect_in_progress(1).await?;
    let answer = response(b"kept");
    let retention = Retention::For(Duration::MAX);
    bench.store.complete(&lease, &answer, retention).await.map_err(failed)?;
    subject.pass(bench.tick).await;
    bench.expect_completed(1, &answer).await
}

/// Completes a record at once, for this long.
async fn complete<T: Subject>(subject: &T, retention: Retention) -> Result<(Bench<T::Store>, StoredResponse), String> {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    let answer = response(b"kept");
    bench.store.complete(&lease, &answer, retention).await.map_err(failed)?;
    Ok((bench, answer))
}

async fn retention(subject: &impl Subject) -> Checked {
    let (bench, answer) = complete(subject, Retention::For(subject.tick() * 3)).await?;
    // Longer than its lease was: a completed record has none.
    subject.pass(bench.tick * 5 / 2).await;
    bench.expect_completed(1, &answer).await?;
    subject.pass(bench.tick).await;
    bench.expect_vacant().await
}

async fn from_completion(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    subject.pass(bench.tick * 3 / 2).await;
    let answer = response(b"kept");
    let retention = Retention::For(bench.tick * 2);
    bench.store.complete(&lease, &answer, retention).await.map_err(failed)?;
    subject.pass(bench.tick * 3 / 2).await;
    bench.expect_completed(1, &answer).await?;
    subject.pass(bench.tick).await;
    bench.expect_vacant().await
}

async fn abandoned(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    bench.store.abandon(&lease).await.map_err(failed)?;
    subject.pass(bench.tick * 7 / 2).await;
    bench.expect_abandoned(1).await?;
    // Two ticks later than it would be due if the lease still counted.
    subject.pass(bench.tick * 3).await;
    bench.expect_vacant().await
}

async fn never_ended(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    bench.acquire(&bench.claim(1)?).await?;
    // The lease ends at 2 and the record at 6, without a word from its owner.
    subject.pass(bench.tick * 11 / 2).await;
    bench.expect_abandoned(1).await?;
    subject.pass(bench.tick * 2).await;
    bench.expect_vacant().await
}

async fn renewed_and_lost(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    bench.store.renew(&lease, bench.tick * 4).await.map_err(failed)?;
    // The lease ends at 4, the record at 8.
    subject.pass(bench.tick * 15 / 2).await;
    bench.expect_abandoned(1).await?;
    subject.pass(bench.tick).await;
    bench.expect_vacant().await
}

async fn forever(subject: &impl Subject) -> Checked {
    let (bench, answer) = complete(subject, Retention::Forever).await?;
    subject.pass(bench.tick * 8).await;
    bench.expect_completed(1, &answer).await
}

async fn anew(subject: &impl Subject) -> Checked {
    let (bench, _) = complete(subject, Retention::For(subject.tick())).await?;
    subject.pass(bench.tick * 3 / 2).await;
    let lease = bench.acquire(&bench.claim(2)?).await?;
    super::ensure(lease.fence == 1, || format!("the new lease is {lease:?}"))?;
    bench.expect_in_progress(2).await?;
    let answer = response(b"new");
    bench.complete(&lease, &answer).await?;
    bench.expect_completed(2, &answer).await
}

/// What a claim is told that asks for it.
async fn told<S: Store>(bench: &Bench<S>) -> Result<Option<Retention>, String> {
    match bench.begin(&bench.claim(99)?.asking_for_remaining()).await? {
        Begin::Completed { remaining, .. } => Ok(remaining),
        other => Err(format!("it is {other:?} where it had to be completed")),
    }
}

async fn remaining(subject: &impl Subject) -> Checked {
    let tick = subject.tick();
    let (bench, _) = complete(subject, Retention::For(tick * 4)).await?;
    let told_at = |told, most: u32| match told {
        None => Ok(()),
        Some(Retention::For(left)) if left <= tick * most => Ok(()),
        Some(other) => Err(format!("{other:?} remains where at most {most} ticks do")),
    };
    told_at(told(&bench).await?, 4)?;
    subject.pass(tick * 2).await;
    told_at(told(&bench).await?, 2)?;
    // Renewed and lost, its time to live was another one while it ran.
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    bench.store.renew(&lease, tick * 50).await.map_err(failed)?;
    let retention = Retention::For(tick * 2);
    let answer = response(b"kept");
    bench.store.complete(&lease, &answer, retention).await.map_err(failed)?;
    told_at(told(&bench).await?, 2)?;
    // A claim that does not ask is told no more than one that does.
    match bench.look().await? {
        Begin::Completed { remaining, .. } => told_at(remaining, 2),
        other => Err(format!("it is {other:?} where it had to be completed")),
    }
}
