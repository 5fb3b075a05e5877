//! The words that a layer and a store exchange.

use std::{fmt, io, time::Duration};

use crate::{codec::StoredResponse, fingerprint::Fingerprint, hex, random};

/// The look-up key of a record: a hash over scope and idempotency key, of fixed length and safe to log in part.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordId([u8; 32]);

impl RecordId {
    /// An id as a store kept it.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes, uniformly distributed.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl RecordId {
    /// All 64 hexadecimal digits.
    pub fn to_hex(&self) -> String {
        hex::of(&self.0)
    }
}

impl fmt::Display for RecordId {
    /// The first eight hexadecimal digits: enough to find a request in a log, too few to find a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordId({self}..)")
    }
}

/// A random 128-bit token that tells one attempt from every other, on every node and at every time.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner([u8; 16]);

impl Owner {
    /// A token that was never used before.
    ///
    /// # Errors
    /// If the operating system has no randomness to give.
    pub fn random() -> io::Result<Self> {
        Ok(Self(random::bytes()?))
    }

    /// A token as a store kept it.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Owner(..)")
    }
}

/// How long a record is kept: for a time, counted by the store's clock, or for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Retention {
    /// At least this long after the operation completed.
    For(Duration),
    /// The record never expires.
    Forever,
}

impl From<Duration> for Retention {
    fn from(duration: Duration) -> Self {
        Self::For(duration)
    }
}

/// A request to become the owner of a record.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Claim {
    /// Of the request at hand; kept with the record and given back, never compared by a store.
    pub fingerprint: Fingerprint,
    /// Who asks. A claim that is repeated with the same owner gets its own lease back.
    pub owner: Owner,
    /// How long the lease lasts unless it is renewed.
    pub lease: Duration,
    /// How long the record is remembered after its lease ended without an outcome.
    pub retention: Retention,
    /// Take over the record that this lease was lost on, and no other.
    pub takeover: Option<Lease>,
    /// Say how long a completed record is still kept, even if that costs a little more.
    pub asks_for_remaining: bool,
    /// Whether it was made before and not answered. Nothing that a store sees.
    pub(crate) repeated: bool,
}

impl Claim {
    /// A claim on a vacant record.
    pub fn new(fingerprint: Fingerprint, owner: Owner, lease: Duration, retention: Retention) -> Self {
        Self {
            fingerprint,
            owner,
            lease,
            retention,
            takeover: None,
            asks_for_remaining: false,
            repeated: false,
        }
    }

    /// The same claim, which may also take over the record that `lost` was lost on.
    #[must_use]
    pub fn taking_over(mut self, lost: Lease) -> Self {
        self.takeover = Some(lost);
        self
    }

    /// The same claim, which also wants to know how long a completed record is still kept: for those who keep a copy.
    #[must_use]
    pub fn asking_for_remaining(mut self) -> Self {
        self.asks_for_remaining = true;
        self
    }
}

/// The right to run an operation and to say how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lease {
    /// Of the record.
    pub id: RecordId,
    /// Who holds the lease. Every change to the record compares it.
    pub owner: Owner,
    /// 1 for the first attempt at a record, and one more with every takeover; 0 if nobody was told of it.
    pub fence: u64,
}

impl Lease {
    /// A lease that a store grants.
    pub fn new(id: RecordId, owner: Owner, fence: u64) -> Self {
        Self { id, owner, fence }
    }
}

/// What a store found when it was asked to begin.
#[derive(Debug)]
#[non_exhaustive]
pub enum Begin {
    /// The record was vacant (or was lost by the lease that the claim names) and now belongs to the claim's owner.
    Acquired(Lease),
    /// Somebody else holds a lease that has not ended.
    InProgress {
        /// Of the request that holds it.
        fingerprint: Fingerprint,
        /// Until the lease ends, unless it is renewed.
        remaining: Duration,
    },
    /// The lease ended without an outcome.
    Abandoned {
        /// Of the request that held it.
        fingerprint: Fingerprint,
        /// The lease that was lost, to be named in a takeover.
        lost: Lease,
    },
    /// The operation is done.
    Completed {
        /// Of the request that was answered.
        fingerprint: Fingerprint,
        /// The answer, or the fact that it was not kept.
        response: StoredResponse,
        /// The record is kept at least this long, from the moment on at which `begin` was called. `None` if the store
        /// does not know, or [was not asked](Claim::asks_for_remaining).
        remaining: Option<Retention>,
    },
}
