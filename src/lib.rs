#![cfg_attr(docsrs, feature(doc_cfg))]
#![doc = include_str!("../README.md")]
#![warn(unreachable_pub)]

mod attempt;
mod body;
mod codec;
mod decide;
mod drain;
mod error;
mod extract;
mod fingerprint;
mod flow;
mod future;
mod grpc;
mod guard;
mod key;
mod layer;
mod observe;
mod policy;
pub mod problems;
mod random;
mod record;
mod rejection;
mod scope;
mod service;
mod shared;
mod store;
#[cfg(feature = "testing")]
pub mod testing;
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
    key::{IdempotencyKey, KeyFormat, KeySource},
    layer::IdempotencyLayer,
    observe::Counters,
    policy::{Concurrent, Guarantee},
    record::{Begin, Claim, Lease, Owner, RecordId, Retention},
    rejection::{Rejection, RejectionKind},
    scope::Scope,
    service::Idempotency,
    store::{AnyStore, MemoryStore, MemoryStoreBuilder, Store},
};
