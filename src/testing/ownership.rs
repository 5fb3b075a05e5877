//! Who gets a record, and who may change it.

use std::time::Duration;

use super::{Bench, Checks, Subject, ensure, response};
use crate::{
    error::{StoreError, StoreErrorKind},
    record::{Begin, Claim, Lease, Retention},
    store::Store,
};

pub(super) fn check<'a>(subject: &'a impl Subject, checks: &mut Checks<'a>) {
    checks.add(2, "a vacant record is acquired with fence 1", || vacant(subject));
    checks.add(2, "a record in progress is left as it is", || occupied(subject));
    checks.add(2, "an owner that claims again gets its own lease back", || {
        repeated(subject)
    });
    checks.add(2, "different records know nothing of each other", || apart(subject));
    checks.add(
        3,
        "an abandoned record is acquired by naming the lease that was lost",
        || takeover(subject),
    );
    checks.add(3, "a takeover that names another lease acquires nothing", || {
        another_lease(subject)
    });
    checks.add(3, "a takeover acquires nothing that is not abandoned", || {
        not_abandoned(subject)
    });
    checks.add(4, "only the owner changes a record in progress", || strangers(subject));
    checks.add(4, "an owner that was taken over changes nothing", || {
        late_owner(subject)
    });
    checks.add(
        4,
        "a lease that is over but not taken over may still be completed",
        || late_complete(subject),
    );
    checks.add(
        4,
        "a lease that is over but not taken over may still be renewed",
        || late_renew(subject),
    );
    checks.add(4, "a completed record never changes", || immutable(subject));
    checks.add(
        4,
        "a released record is vacant, and its old owner is fenced from the next",
        || released(subject),
    );
    checks.add(4, "whoever was not told of its claim's fence ends it with 0", || {
        without_fence(subject)
    });
    checks.add(4, "an abandoned lease is over at once", || abandoned(subject));
    checks.add(
        4,
        "a renewal that lands after an abandon is fenced and revives nothing",
        || late_renewal_of_abandoned(subject),
    );
    checks.add(2, "a claim that is repeated after an abandon revives nothing", || {
        repeated_after_abandon(subject)
    });
    checks.add(
        4,
        "an abandoned record may still be completed or released by its owner",
        || ended_after_abandon(subject),
    );
}

type Checked = Result<(), String>;

fn failed(error: StoreError) -> String {
    format!("it failed: {error}")
}

fn fenced(what: &str, result: Result<(), StoreError>) -> Checked {
    match result {
        Err(error) if error.kind() == StoreErrorKind::Fenced => Ok(()),
        other => Err(format!("{what} was not fenced: {other:?}")),
    }
}

/// Every change that a lease allows, by one that allows none.
async fn all_fenced<S: Store>(bench: &Bench<S>, lease: &Lease) -> Checked {
    let (store, tick) = (&bench.store, bench.tick);
    fenced("renew", store.renew(lease, tick * 50).await)?;
    fenced("release", store.release(lease).await)?;
    fenced("abandon", store.abandon(lease).await)?;
    let answer = response(b"of somebody else");
    fenced("complete", store.complete(lease, &answer, Retention::Forever).await)
}

async fn vacant(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let claim = bench.claim(1)?;
    let lease = bench.acquire(&claim).await?;
    ensure(lease == Lease::new(bench.id, claim.owner, 1), || {
        format!("the lease is {lease:?}")
    })
}

async fn occupied(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    let remaining = bench.expect_in_progress(1).await?;
    ensure(!remaining.is_zero() && remaining <= bench.tick * 2, || {
        format!("{remaining:?} of two ticks remain")
    })?;
    bench.expect_in_progress(1).await?;
    let answer = response(b"first");
    bench.complete(&lease, &answer).await?;
    bench.expect_completed(1, &answer).await
}

async fn repeated(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let claim = bench.claim(1)?;
    let lease = bench.acquire(&claim).await?;
    subject.pass(bench.tick).await;
    let again = bench.acquire(&claim).await?;
    ensure(lease == again, || format!("{lease:?} became {again:?}"))?;
    // Two ticks and a half after the first claim, one and a half after the second.
    subject.pass(bench.tick * 3 / 2).await;
    bench.expect_in_progress(1).await?;
    // Nothing but the lease is changed, whatever else the repetition says.
    let other = Claim {
        fingerprint: super::fingerprint(9),
        ..claim.clone()
    };
    bench.acquire(&other).await?;
    bench.expect_in_progress(1).await?;
    subject.pass(bench.tick * 3 / 2).await;
    // And when it is over, it is still its own.
    subject.pass(bench.tick).await;
    let late = bench.acquire(&claim).await?;
    ensure(lease == late, || format!("{lease:?} became {late:?}"))?;
    bench.expect_in_progress(1).await.map(drop)
}

async fn apart(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let other = Bench {
        store: bench.store.clone(),
        id: super::fresh_id()?,
        tick: bench.tick,
    };
    let lease = bench.acquire(&bench.claim(1)?).await?;
    other.acquire(&other.claim(2)?).await?;
    bench.store.release(&lease).await.map_err(failed)?;
    other.expect_in_progress(2).await?;
    bench.expect_vacant().await
}

/// A record that request 1 lost.
async fn lost<S: Store>(subject: &impl Subject<Store = S>) -> Result<(Bench<S>, Lease), String> {
    let bench = Bench::new(subject).await?;
    // Kept for so long that no pause of the machine's makes it vacant.
    let claim = Claim {
        retention: Retention::For(bench.tick * 60),
        ..bench.claim(1)?
    };
    let lease = bench.acquire(&claim).await?;
    subject.pass(bench.tick * 5 / 2).await;
    Ok((bench, lease))
}

async fn takeover(subject: &impl Subject) -> Checked {
    let (bench, first) = lost(subject).await?;
    let lost = bench.expect_abandoned(1).await?;
    ensure(lost == first, || format!("{first:?} was lost as {lost:?}"))?;
    let claim = bench.claim(2)?.taking_over(lost);
    let second = bench.acquire(&claim).await?;
    ensure(second == Lease::new(bench.id, claim.owner, 2), || {
        format!("the second lease is {second:?}")
    })?;
    bench.expect_in_progress(2).await?;
    bench.store.abandon(&second).await.map_err(failed)?;
    let third = bench.acquire(&bench.claim(3)?.taking_over(second)).await?;
    ensure(third.fence == 3, || format!("the third lease is {third:?}"))
}

async fn another_lease(subject: &impl Subject) -> Checked {
    let (bench, first) = lost(subject).await?;
    let stranger = bench.claim(2)?.owner;
    for other in [
        Lease::new(bench.id, first.owner, first.fence + 1),
        Lease::new(bench.id, first.owner, 0),
        // A counter alone may come round to the same number for another attempt.
        Lease::new(bench.id, stranger, first.fence),
    ] {
        let begin = bench.begin(&bench.claim(2)?.taking_over(other)).await?;
        let found = matches!(begin, Begin::Abandoned { lost, .. } if lost == first);
        ensure(found, || format!("a takeover of {other:?} found {begin:?}"))?;
    }
    bench.expect_abandoned(1).await.map(drop)
}

async fn not_abandoned(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let nobody = Lease::new(bench.id, bench.claim(7)?.owner, 7);
    let lease = bench.acquire(&bench.claim(1)?.taking_over(nobody)).await?;
    ensure(lease.fence == 1, || {
        format!("a vacant record was acquired as {lease:?}")
    })?;
    let begin = bench.begin(&bench.claim(2)?.taking_over(lease)).await?;
    ensure(matches!(begin, Begin::InProgress { .. }), || {
        format!("in progress, it found {begin:?}")
    })?;
    let answer = response(b"done");
    bench.complete(&lease, &answer).await?;
    let begin = bench.begin(&bench.claim(2)?.taking_over(lease)).await?;
    ensure(matches!(begin, Begin::Completed { .. }), || {
        format!("completed, it found {begin:?}")
    })
}

async fn strangers(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    // The right record and the right fence, but another owner.
    let stranger = Lease::new(bench.id, bench.claim(2)?.owner, lease.fence);
    all_fenced(&bench, &stranger).await?;
    bench.expect_in_progress(1).await?;
    subject.pass(bench.tick * 5 / 2).await;
    all_fenced(&bench, &stranger).await?;
    bench.expect_abandoned(1).await.map(drop)
}

async fn late_owner(subject: &impl Subject) -> Checked {
    let (bench, first) = lost(subject).await?;
    let second = bench.acquire(&bench.claim(2)?.taking_over(first)).await?;
    all_fenced(&bench, &first).await?;
    bench.expect_in_progress(2).await?;
    let answer = response(b"of the second");
    bench.complete(&second, &answer).await?;
    all_fenced(&bench, &first).await?;
    bench.expect_completed(2, &answer).await
}

async fn late_complete(subject: &impl Subject) -> Checked {
    let (bench, lease) = lost(subject).await?;
    bench.expect_abandoned(1).await?;
    let answer = response(b"late");
    bench.complete(&lease, &answer).await?;
    bench.expect_completed(1, &answer).await
}

async fn late_renew(subject: &impl Subject) -> Checked {
    let (bench, lease) = lost(subject).await?;
    bench.store.renew(&lease, bench.tick * 2).await.map_err(failed)?;
    bench.expect_in_progress(1).await.map(drop)
}

async fn immutable(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let claim = bench.claim(1)?;
    let lease = bench.acquire(&claim).await?;
    let answer = response(b"first");
    bench.complete(&lease, &answer).await?;
    // A repeated complete whose answer was lost may succeed, but then it changes nothing.
    let second = bench
        .store
        .complete(&lease, &response(b"second"), Retention::For(Duration::ZERO))
        .await;
    if second.is_err() {
        fenced("a second complete", second)?;
    }
    fenced("renew", bench.store.renew(&lease, bench.tick).await)?;
    fenced("release", bench.store.release(&lease).await)?;
    fenced("abandon", bench.store.abandon(&lease).await)?;
    bench.expect_completed(1, &answer).await?;
    let begin = bench.begin(&claim).await?;
    ensure(matches!(begin, Begin::Completed { .. }), || {
        format!("its own owner found {begin:?}")
    })
}

async fn released(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let first = bench.acquire(&bench.claim(1)?).await?;
    bench.store.release(&first).await.map_err(failed)?;
    all_fenced(&bench, &first).await?;
    // The next one has the same fence: only the owner tells them apart.
    let second = bench.acquire(&bench.claim(2)?).await?;
    ensure(second.fence == 1, || format!("the next lease is {second:?}"))?;
    all_fenced(&bench, &first).await?;
    bench.expect_in_progress(2).await.map(drop)
}

async fn without_fence(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let untold = |lease: Lease| Lease::new(lease.id, lease.owner, 0);
    let lease = bench.acquire(&bench.claim(1)?).await?;
    bench.store.release(&untold(lease)).await.map_err(failed)?;
    bench.expect_vacant().await?;
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    bench.store.abandon(&untold(lease)).await.map_err(failed)?;
    bench.expect_abandoned(1).await.map(drop)
}

async fn abandoned(subject: &impl Subject) -> Checked {
    let bench = Bench::new(subject).await?;
    let lease = bench.acquire(&bench.claim(1)?).await?;
    bench.store.abandon(&lease).await.map_err(failed)?;
    let lost = bench.expect_abandoned(1).await?;
    ensure(lost == lease, || format!("{lease:?} was lost as {lost:?}"))
}

/// A record that request 1 gave up, with the claim that it was begun by.
async fn given_up<S: Store>(subject: &impl Subject<Store = S>) -> Result<(Bench<S>, Claim, Lease), String> {
    let bench = Bench::new(subject).await?;
    let claim = bench.claim(1)?;
    let lease = bench.acquire(&claim).await?;
    bench.store.abandon(&lease).await.map_err(failed)?;
    Ok((bench, claim, lease))
}

async fn late_renewal_of_abandoned(subject: &impl Subject) -> Checked {
    let (bench, _, lease) = given_up(subject).await?;
    fenced("renew", bench.store.renew(&lease, bench.tick * 2).await)?;
    let lost = bench.expect_abandoned(1).await?;
    ensure(lost == lease, || format!("{lease:?} was lost as {lost:?}"))?;
    // It takes nothing from who takes the record over, either.
    bench.acquire(&bench.claim(2)?.taking_over(lease)).await.map(drop)
}

async fn repeated_after_abandon(subject: &impl Subject) -> Checked {
    let (bench, claim, lease) = given_up(subject).await?;
    match bench.begin(&claim).await? {
        Begin::Abandoned { lost, .. } if lost == lease => {}
        other => return Err(format!("its own owner found {other:?} where it had to be abandoned")),
    }
    bench.expect_abandoned(1).await.map(drop)
}

async fn ended_after_abandon(subject: &impl Subject) -> Checked {
    let (bench, _, lease) = given_up(subject).await?;
    let answer = response(b"after all");
    bench.complete(&lease, &answer).await?;
    bench.expect_completed(1, &answer).await?;
    let (bench, _, lease) = given_up(subject).await?;
    bench.store.release(&lease).await.map_err(failed)?;
    bench.expect_vacant().await
}
