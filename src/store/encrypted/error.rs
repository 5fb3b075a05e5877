//! Why an encrypted store does not open, and why an answer does not.

use std::{error::Error, fmt};

use crate::error::{StoreError, StoreErrorKind};

/// Why an [`Encrypted`](super::Encrypted) store could not be opened. Where the store below failed, its error is the
/// source.
#[derive(Debug)]
pub struct EncryptedError {
    kind: EncryptedErrorKind,
    source: Option<StoreError>,
}

/// The kinds of [`EncryptedError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EncryptedErrorKind {
    /// The store is in use with another look-up secret.
    AnotherLookUpSecret,
    /// The store is in use by a newer version of the software, which makes its ids in another way.
    NewerVersion,
    /// The store below failed or does not answer, or the record that names its look-up secret is damaged.
    Failed,
}

impl EncryptedError {
    /// What to do about it.
    pub fn kind(&self) -> EncryptedErrorKind {
        self.kind
    }
}

impl From<EncryptedErrorKind> for EncryptedError {
    fn from(kind: EncryptedErrorKind) -> Self {
        Self { kind, source: None }
    }
}

impl From<StoreError> for EncryptedError {
    fn from(source: StoreError) -> Self {
        Self {
            kind: EncryptedErrorKind::Failed,
            source: Some(source),
        }
    }
}

impl fmt::Display for EncryptedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            EncryptedErrorKind::AnotherLookUpSecret => {
                "the idempotency store is in use with another look-up secret; with this one none of its records would \
                 be found, and what they stand for would run again"
            }
            EncryptedErrorKind::NewerVersion => "the idempotency store is in use by a newer version",
            EncryptedErrorKind::Failed => "the look-up secret of the idempotency store could not be compared",
        })?;
        // One line has to be enough for whoever starts a server.
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl Error for EncryptedError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

/// Why a sealed answer was not opened: the source of a [`Corrupt`](StoreErrorKind::Corrupt) record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unopened {
    UnknownKey(u32),
    /// Which of the three cannot be told.
    DoesNotFit(u32),
    NotSealed,
}

impl fmt::Display for Unopened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey(key) => write!(f, "its answer is sealed with key {key}, which is not in the key ring"),
            Self::DoesNotFit(key) => write!(
                f,
                "its answer was changed, or comes from another record, or key {key} is another one in the key ring"
            ),
            Self::NotSealed => f.write_str("its answer is not a sealed one"),
        }
    }
}

impl Error for Unopened {}

impl From<Unopened> for StoreError {
    fn from(unopened: Unopened) -> Self {
        Self::with_source(StoreErrorKind::Corrupt, unopened)
    }
}
