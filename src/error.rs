//! What can go wrong with a store.

use std::{error::Error, fmt};

type Source = Box<dyn Error + Send + Sync>;

/// Why a store did not do what it was asked. The source says what happened underneath.
#[derive(Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    source: Option<Source>,
}

/// The kinds of [`StoreError`] that a layer tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// The store could not be reached or did not answer in time. The operation may have been applied.
    Unavailable,
    /// There is no room; nothing was changed.
    Full,
    /// The record belongs to somebody else by now; nothing was changed.
    Fenced,
    /// The stored bytes are not a record.
    Corrupt,
    /// The stored bytes were written by a newer version of the software.
    NewerVersion,
    /// Anything else: a wrong configuration, a refused log-in, a bug. Repeating it does not help.
    Other,
}

impl StoreError {
    /// An error without a source.
    pub fn new(kind: StoreErrorKind) -> Self {
        Self { kind, source: None }
    }

    /// An error that keeps what caused it.
    pub fn with_source(kind: StoreErrorKind, source: impl Into<Source>) -> Self {
        Self {
            kind,
            source: Some(source.into()),
        }
    }

    /// What to do about it.
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Whether the same operation may succeed when it is repeated with the same owner.
    pub fn is_retryable(&self) -> bool {
        self.kind == StoreErrorKind::Unavailable
    }
}

impl From<StoreErrorKind> for StoreError {
    fn from(kind: StoreErrorKind) -> Self {
        Self::new(kind)
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            StoreErrorKind::Unavailable => "the idempotency store is unavailable",
            StoreErrorKind::Full => "the idempotency store is full",
            StoreErrorKind::Fenced => "the lease was lost: the record belongs to another owner or is gone",
            StoreErrorKind::Corrupt => "a stored idempotency record is corrupt",
            StoreErrorKind::NewerVersion => "a stored idempotency record is of a newer version",
            StoreErrorKind::Other => "the idempotency store failed",
        })
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
