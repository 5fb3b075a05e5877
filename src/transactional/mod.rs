//! Exactly once ([`Guarantee::Transactional`](crate::Guarantee::Transactional)): what the handler writes and the record
//! of its answer are one transaction of the store's database.
//!
//! key → scope → fingerprint → begin and claim in it → decide → run in it | replay | refuse → complete and commit → reply
//!
//! [`run`] knows the order, `claim` what a claim may have found. A store that has transactions gives it [`Transactions`].

mod claim;
mod run;
mod slot;
#[cfg(test)]
mod tests;

use std::{future::Future, pin::Pin};

use http::Extensions;

pub use self::slot::MissingTransaction;
pub(crate) use self::{
    run::run,
    slot::{Lent, Missing, Slot},
};
use crate::{
    codec::StoredResponse,
    error::StoreError,
    record::{Begin, Claim, Lease, RecordId, Retention},
};

pub(crate) type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A store's transactions.
pub(crate) trait Transactions: Send + Sync {
    /// Begins a transaction and claims in it, without waiting for anybody: the operation's own record, then each of the
    /// others for it. Dropped, it leaves nothing behind.
    fn begin<'a>(
        &'a self,
        id: &'a RecordId,
        claim: &'a Claim,
        others: &'a [RecordId],
    ) -> Boxed<'a, Result<Opened, StoreError>>;

    /// Whether the transaction of this attempt was committed; only once it is over, on whatever connection it ran.
    fn was_committed<'a>(&'a self, lease: &'a Lease) -> Boxed<'a, Result<bool, StoreError>>;

    /// Until a transaction of this process that has claimed the record is over. A hint, as
    /// [`changed`](crate::Store::changed) is.
    fn over<'a>(&'a self, id: &'a RecordId) -> Boxed<'a, ()>;
}

/// A transaction, and what it found.
pub(crate) struct Opened {
    pub(crate) own: Found,
    /// In the order in which they were asked for.
    pub(crate) others: Vec<Found>,
    /// `None` if it is over, because not all was acquired.
    pub(crate) transaction: Option<Box<dyn Transaction>>,
}

/// What a claim in a transaction found.
#[derive(Debug)]
pub(crate) enum Found {
    /// A vacant record, which is claimed now.
    Acquired,
    /// Another transaction has claimed it and is not over.
    InFlight(Whose),
    /// A record that was committed; never `Acquired`.
    Kept(Begin),
}

/// Which request a transaction belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Same,
    Another,
    /// It cannot be seen now: it is being ended, most likely, and gone in a moment.
    Unclear,
}

/// An open transaction. Dropped without an end, it is rolled back.
pub(crate) trait Transaction: Send {
    /// Puts a handle for the handler among the request's extensions.
    fn lend(&mut self, extensions: &mut Extensions);

    /// Writes the answer down and commits.
    fn commit(self: Box<Self>, answer: Answer) -> Boxed<'static, Ended>;

    /// Undoes everything.
    fn roll_back(self: Box<Self>) -> Boxed<'static, Ended>;
}

/// What is kept of an operation.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: StoredResponse,
    pub(crate) retention: Retention,
    /// Whether what the handler wrote is committed with it.
    pub(crate) with_writes: bool,
}

/// How a transaction ended.
#[derive(Debug)]
pub(crate) enum Ended {
    AsAsked,
    /// It was not the layer's any more: this happened to it.
    Misused(&'static str),
    /// Undone, for a reason that may be gone when it is tried again.
    RolledBack(StoreError),
    /// Undone, and that is how it would end again.
    Failed(StoreError),
    /// Whatever was asked may have been done.
    Unknown(StoreError),
}
