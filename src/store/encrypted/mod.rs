//! Stored answers that only their keys open, under names that only a secret makes.

mod error;
mod keys;
mod look_up;
mod mark;
mod seal;

use std::{fmt, sync::Arc, time::Duration};

use self::look_up::LookUp;
pub use self::{
    error::{EncryptedError, EncryptedErrorKind},
    keys::{InvalidSecretKey, KeyRing, SecretKey},
};
use super::Store;
use crate::{
    codec::StoredResponse,
    error::StoreError,
    record::{Begin, Claim, Lease, RecordId, Retention},
};

/// Any store, with everything that it keeps under keys that it does not have.
///
#[doc = include_str!("../../../docs/encryption.md")]
#[derive(Clone)]
pub struct Encrypted<S> {
    store: S,
    keys: Arc<Keys>,
}

struct Keys {
    look_up: LookUp,
    ring: KeyRing,
}

impl<S: Store> Encrypted<S> {
    /// Opens `store` with its look-up secret and the keys of its answers.
    ///
    /// The first opening leaves a record for ever in the store, which tells this look-up secret from others; each later
    /// one is a look at it. Where another node is just opening the store, or crashed while it did, this waits for it:
    /// ten seconds at most for each. A store that does not answer for ten seconds is one that failed.
    ///
    /// # Errors
    /// See [`EncryptedErrorKind`]. Nothing may be served by whoever does not open the store.
    pub async fn open(store: S, look_up_secret: &SecretKey, keys: KeyRing) -> Result<Self, EncryptedError> {
        let look_up = LookUp::new(look_up_secret);
        mark::leave(&store, look_up.check()).await?;
        let keys = Arc::new(Keys { look_up, ring: keys });
        Ok(Self { store, keys })
    }
}

impl<S> Encrypted<S> {
    /// The store below, which knows records by other ids.
    pub fn store(&self) -> &S {
        &self.store
    }

    fn inner(&self, lease: &Lease) -> Lease {
        Lease {
            id: self.keys.look_up.id(&lease.id),
            ..*lease
        }
    }

    /// What the store below found, in the caller's words.
    fn outer(&self, id: &RecordId, found: Begin) -> Result<Begin, StoreError> {
        let Keys { look_up, ring } = &*self.keys;
        Ok(match found {
            Begin::Acquired(lease) => Begin::Acquired(Lease { id: *id, ..lease }),
            Begin::InProgress { fingerprint, remaining } => Begin::InProgress {
                fingerprint: look_up.show(id, &fingerprint),
                remaining,
            },
            Begin::Abandoned { fingerprint, lost } => Begin::Abandoned {
                fingerprint: look_up.show(id, &fingerprint),
                lost: Lease { id: *id, ..lost },
            },
            Begin::Completed {
                fingerprint,
                response,
                remaining,
            } => Begin::Completed {
                fingerprint: look_up.show(id, &fingerprint),
                response: seal::open(ring, id, &response)?,
                remaining,
            },
        })
    }
}

impl<S: Store> Store for Encrypted<S> {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let look_up = &self.keys.look_up;
        let stored = look_up.id(id);
        // For whoever looks for the record of a line in the log.
        tracing::debug!(record = %id, %stored, "the idempotency store has this record under another id");
        let claim = Claim {
            fingerprint: look_up.hide(id, &claim.fingerprint),
            takeover: claim.takeover.as_ref().map(|lost| self.inner(lost)),
            ..claim.clone()
        };
        let found = self.store.begin(&stored, &claim).await?;
        self.outer(id, found)
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        let sealed = seal::seal(&self.keys.ring, &lease.id, response)?;
        self.store.complete(&self.inner(lease), &sealed, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.store.renew(&self.inner(lease), length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.store.release(&self.inner(lease)).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.store.abandon(&self.inner(lease)).await
    }

    async fn changed(&self, id: &RecordId) {
        self.store.changed(&self.keys.look_up.id(id)).await;
    }
}

impl<S: fmt::Debug> fmt::Debug for Encrypted<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encrypted")
            .field("store", &self.store)
            .field("keys", &self.keys.ring)
            .finish_non_exhaustive()
    }
}
