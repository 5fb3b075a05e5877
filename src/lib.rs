#![cfg_attr(docsrs, feature(doc_cfg))]
#![doc = include_str!("../README.md")]
#![warn(unreachable_pub)]

mod attempt;
mod body;
mod claims;
mod codec;
mod decide;
mod drain;
mod error;
mod extract;
mod fingerprint;
mod first_sent;
mod flow;
mod future;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod grpc;
mod guard;
mod hex;
mod identity;
mod json;
mod keep;
mod key;
mod layer;
mod observe;
mod policy;
pub mod problems;
mod profile;
mod random;
mod record;
mod rejection;
mod routes;
mod scope;
#[cfg(seeded_bug)]
#[doc(hidden)]
pub mod seeded;
mod service;
mod settle;
mod shared;
mod statuses;
mod store;
#[cfg(not(shuttle))]
mod sync;
#[cfg(shuttle)]
#[doc(hidden)]
pub mod sync;
mod term;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "postgres")]
mod transactional;
mod wait;

#[cfg(feature = "file")]
pub use self::store::{FileRecord, FileRecordState, FileStore, FileStoreBuilder, FileStoreError, FileStoreErrorKind};
pub use self::{
    body::{BufferedBody, RequestBody, ResponseBody},
    codec::StoredResponse,
    drain::{Drain, Unfinished},
    error::{StoreError, StoreErrorKind},
    extract::{Attempt, MissingAttempt},
    fingerprint::{Fingerprint, Fingerprinter},
    future::ResponseFuture,
    keep::Keep,
    key::{IdempotencyKey, KeyFormat, KeySource},
    layer::IdempotencyLayer,
    observe::Counters,
    policy::{Concurrent, Guarantee, WithoutKey},
    profile::Profile,
    record::{Begin, Claim, Lease, Owner, RecordId, Retention},
    rejection::{Rejection, RejectionFormat, RejectionKind},
    scope::Scope,
    service::Idempotency,
    statuses::Statuses,
    store::{AnyStore, MemoryStore, MemoryStoreBuilder, Store},
};

#[cfg(feature = "sqlx")]
pub use self::store::SqlxTransaction;
#[cfg(feature = "cached")]
pub use self::store::{Cached, CachedBuilder};
#[cfg(feature = "encrypted")]
pub use self::store::{Encrypted, EncryptedError, EncryptedErrorKind, InvalidSecretKey, KeyRing, SecretKey};
#[cfg(feature = "redis")]
pub use self::store::{RedisStore, RedisStoreBuilder};
#[cfg(feature = "postgres")]
pub use self::{
    store::{PostgresStore, PostgresStoreBuilder, PostgresTable, PostgresTransaction},
    transactional::MissingTransaction,
};

/// The examples of the page on providers compile.
#[cfg(all(doctest, feature = "axum"))]
#[doc = include_str!("../docs/providers.md")]
struct ProvidersPage;

/// The examples of the page on transactions compile.
#[cfg(all(doctest, feature = "axum", feature = "postgres"))]
#[doc = include_str!("../docs/transactions.md")]
struct TransactionsPage;

/// Rules for the characters of keys, to be given to [`IdempotencyLayer::key_rule`].
pub mod key_rules {
    pub use crate::key::{any_text, uuid, visible_ascii};
}
