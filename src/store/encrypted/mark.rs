//! One look-up secret for one store: the record that says which.
//!
//! Two nodes with different secrets would find nothing of each other's and both run what they are sent. So whoever opens
//! a store completes a record under an id that no request has, for ever, whose fingerprint tells secrets apart; and
//! whoever finds it completed with another one does not serve.

use std::time::Duration;

use http::StatusCode;
use tokio::time::timeout;

use super::error::{EncryptedError, EncryptedErrorKind};
use crate::{
    codec::StoredResponse,
    error::{StoreError, StoreErrorKind},
    fingerprint::Fingerprint,
    record::{Begin, Claim, Owner, RecordId, Retention},
    store::Store,
};

/// In place of a fingerprint's algorithm: how ids and fingerprints are made of the secret.
const VERSION: u8 = 1;

/// Long for two steps of a store, short for whoever comes after one that crashed between them.
const LEASE: Duration = Duration::from_secs(10);

/// Before it is looked again without a call; at the least, since a lease may have no time left and not be over.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const PAUSE: Duration = Duration::from_millis(500);

/// A store that does not answer by then is unavailable.
async fn within_a_lease<T>(call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let late = |error| StoreError::with_source(StoreErrorKind::Unavailable, error);
    timeout(LEASE, call).await.map_err(late)?
}

/// Other records have the MAC of an id.
pub(super) fn id() -> RecordId {
    RecordId::from_bytes(*b"tower-idempotency/look-up-secret")
}

/// Returns when the store belongs to the secret that `check` is of.
pub(super) async fn leave(store: &impl Store, check: [u8; 32]) -> Result<(), EncryptedError> {
    let (id, own) = (id(), Fingerprint::new(VERSION, check));
    let owner = Owner::random().map_err(|error| StoreError::with_source(StoreErrorKind::Unavailable, error))?;
    let mut claim = Claim::new(own, owner, LEASE, Retention::Forever);
    loop {
        match within_a_lease(store.begin(&id, &claim)).await? {
            Begin::Acquired(lease) => {
                // It needs no room.
                let fact = StoredResponse::not_kept(StatusCode::OK);
                match within_a_lease(store.complete(&lease, &fact, Retention::Forever)).await {
                    Ok(()) => return Ok(()),
                    // It took longer than its lease.
                    Err(error) if error.kind() == StoreErrorKind::Fenced => claim.takeover = None,
                    Err(error) => return Err(error.into()),
                }
            }
            Begin::Completed { fingerprint, .. } if fingerprint == own => return Ok(()),
            Begin::Completed { fingerprint, .. } if fingerprint.algorithm() > VERSION => {
                return Err(EncryptedErrorKind::NewerVersion.into());
            }
            Begin::Completed { .. } => return Err(EncryptedErrorKind::AnotherLookUpSecret.into()),
            // Whatever its secret was: it is fenced from here on, so it has served nobody and never will.
            Begin::Abandoned { lost, .. } if claim.takeover != Some(lost) => claim = claim.taking_over(lost),
            Begin::Abandoned { .. } => return Err(StoreError::new(StoreErrorKind::Other).into()),
            Begin::InProgress { remaining, .. } => {
                claim.takeover = None;
                // A call may come between the look and the listening; then this is a pause.
                let _ = timeout(remaining.clamp(SHORTEST_PAUSE, PAUSE), store.changed(&id)).await;
            }
        }
    }
}
