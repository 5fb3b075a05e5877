//! An operation that claims more than one key: all of them, or none.
//!
//! The operation's own record is claimed first. Whoever holds it holds the right to the others, so what an earlier
//! attempt at the same operation left behind is taken over, and what another operation holds is never touched. Each of
//! the others is kept with the name of the operation in place of a fingerprint.

use crate::{
    error::{StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    flow::{begin, unusable_store},
    guard::Guard,
    record::{Begin, Claim, Lease, RecordId},
    rejection::{Rejection, RejectionKind},
    sync::Instant,
};

/// Claims `others` under a guard that holds the operation's own record, which the store was `asked` for then. What was
/// claimed is with the guard, also when the rest is refused.
pub(crate) async fn claim_others(
    guard: &Guard,
    claim: &Claim,
    others: &[RecordId],
    asked: Instant,
) -> Result<(), Rejection> {
    let operation = guard.lease().id;
    let beside = Fingerprint::beside(&operation);
    let claim = Claim::new(beside, claim.owner, claim.lease, claim.retention);
    let mut confirmed = true;
    for id in others {
        match claim_one(guard, id, claim.clone()).await {
            Ok(One::Claimed) => {}
            Ok(One::Done) => confirmed = false,
            Err(rejection) => {
                tracing::debug!(record = %operation, other = %id, "a key beside the operation's own is not to be had");
                return Err(rejection);
            }
        }
    }
    // So many claims, or so slow ones, its own among them, that the operation's own record may have been lost meanwhile.
    if !confirmed || asked.elapsed() > claim.lease / 2 {
        confirm(guard, &claim).await?;
    }
    Ok(())
}

/// How often a record is confirmed. The first time may be as late as what made it necessary.
const TRIES: usize = 2;

/// Whether the operation's own record still belongs to this attempt. Where one of the other keys was completed, it was by
/// an attempt that was lost before this one, or by one that this attempt was lost to.
async fn confirm(guard: &Guard, claim: &Claim) -> Result<(), Rejection> {
    let mut refusal = Rejection::new(RejectionKind::StoreUnavailable);
    for _ in 0..TRIES {
        let asked = Instant::now();
        match guard.renew_own().await {
            // So late that it says only what was.
            Ok(()) if asked.elapsed() >= claim.lease => {}
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == StoreErrorKind::Fenced => {
                return Err(Rejection::new(RejectionKind::InProgress));
            }
            Err(error) => refusal = unusable_store(&error),
        }
    }
    Err(refusal)
}

/// How a key came to be had.
enum One {
    Claimed,
    /// An earlier attempt at the operation completed it.
    Done,
}

async fn claim_one(guard: &Guard, id: &RecordId, mut claim: Claim) -> Result<One, Rejection> {
    loop {
        match found(begin(guard.shared(), id, &mut claim).await, &claim) {
            Found::Acquired(lease) => {
                guard.add(lease, claim.repeated);
                return Ok(One::Claimed);
            }
            Found::Done => return Ok(One::Done),
            Found::Lost(lost) if claim.takeover != Some(lost) => claim.takeover = Some(lost),
            Found::Lost(_) => return Err(Rejection::new(RejectionKind::StoreUnavailable)),
            Found::Refused(rejection) => return Err(rejection),
        }
    }
}

enum Found {
    Acquired(Lease),
    /// By an attempt at this operation.
    Done,
    /// By an earlier attempt at this operation.
    Lost(Lease),
    Refused(Rejection),
}

fn found(begin: Result<Begin, StoreError>, claim: &Claim) -> Found {
    let own = &claim.fingerprint;
    match begin {
        Ok(Begin::Acquired(lease)) => Found::Acquired(lease),
        Ok(Begin::Completed { fingerprint, .. }) if fingerprint == *own => Found::Done,
        Ok(Begin::Abandoned { fingerprint, lost }) if fingerprint == *own => Found::Lost(lost),
        // An attempt that lost the operation's own record has not let go of this one yet.
        Ok(Begin::InProgress { fingerprint, .. }) if fingerprint == *own => {
            Found::Refused(Rejection::new(RejectionKind::InProgress))
        }
        Ok(Begin::Completed { .. } | Begin::Abandoned { .. } | Begin::InProgress { .. }) => Found::Refused(
            Rejection::new(RejectionKind::KeyReused)
                .with_detail("one of the keys in the request's body belongs to another operation".to_owned()),
        ),
        Err(error) => Found::Refused(unusable_store(&error)),
    }
}
