//! The [contract](crate::Store#contract) that every store passes, as checks that an author of a store can run: add this
//! crate with its feature `testing` and tokio with `test-util` to the dev-dependencies, and call [`check`] from a
//! `#[tokio::test(start_paused = true)]`, and [`check_races`] from one with several threads.
//!
//! ```
//! use std::time::Duration;
//! use tower_idempotency::{MemoryStore, testing::{self, Subject}};
//!
//! struct Memory;
//!
//! impl Subject for Memory {
//!     type Store = MemoryStore;
//!
//!     async fn store(&self) -> MemoryStore {
//!         MemoryStore::new()
//!     }
//!
//!     async fn pass(&self, time: Duration) {
//!         tokio::time::advance(time).await;
//!     }
//! }
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
//! # runtime.block_on(async {
//! testing::check(&Memory).await.assert();
//! # });
//! ```

#[cfg(feature = "file")]
pub use crate::store::{Clock, MachineStart, Medium};

mod ownership;
mod races;
mod time;
mod values;

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};

use http::{HeaderMap, StatusCode};

use crate::{
    codec::StoredResponse,
    fingerprint::Fingerprint,
    record::{Begin, Claim, Lease, Owner, RecordId, Retention},
    store::Store,
};

/// A store to be checked, and its clock.
pub trait Subject: Sync {
    /// What is checked.
    type Store: Store;

    /// A store to work with. It need not be empty or new: each check uses record ids of its own.
    fn store(&self) -> impl Future<Output = Self::Store> + Send;

    /// Lets this much time pass on the store's clock: by advancing it, or by waiting.
    fn pass(&self, time: Duration) -> impl Future<Output = ()> + Send;

    /// The time that checks count in; leases and retentions are a few of it. A store on a real clock wants it longer
    /// than its slowest answer. Default: one second.
    fn tick(&self) -> Duration {
        Duration::from_secs(1)
    }

    /// Whether [`pass`](Self::pass) waits, so that many checks may do so at the same time, on some forty stores. Then
    /// [`check`] takes some ten ticks in place of some eighty. Nobody stops such a clock for a machine that stands still
    /// for half a tick, so a check that fails is made again, up to three times in all; on a busy machine let the tick be
    /// longer. Default: no, as is right for a clock that is advanced.
    fn waits(&self) -> bool {
        false
    }
}

/// What a store was found to do.
#[derive(Debug, Default)]
#[must_use = "a report that nobody reads finds nothing; call `assert`"]
pub struct Report {
    checks: usize,
    violations: Vec<Violation>,
}

/// A sentence of the contract that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The number of the sentence in the [contract](crate::Store#contract).
    pub rule: u8,
    /// The sentence, as it was checked.
    pub sentence: &'static str,
    /// What happened instead.
    pub found: String,
}

impl Report {
    /// How many sentences were checked.
    pub fn checks(&self) -> usize {
        self.checks
    }

    /// The sentences that do not hold.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// Passes if every sentence holds.
    ///
    /// # Panics
    /// If one does not, with all of them.
    #[allow(clippy::panic, reason = "this is what an assertion does")]
    pub fn assert(&self) {
        assert!(self.checks > 0, "nothing was checked");
        if !self.violations.is_empty() {
            panic!("the store breaks its contract:\n{self}");
        }
    }

    fn add(&mut self, rule: u8, sentence: &'static str, result: Result<(), String>) {
        self.checks += 1;
        if let Err(found) = result {
            self.violations.push(Violation { rule, sentence, found });
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.violations
            .iter()
            .try_for_each(|violation| writeln!(f, "{violation}"))
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}: {}; but {}", self.rule, self.sentence, self.found)
    }
}

/// Checks what can be seen of the contract from outside: all but rules 7 to 9, a store without room, and dropped futures.
/// Takes some eighty ticks of the subject's time, or ten if it [waits](Subject::waits).
pub async fn check(subject: &impl Subject) -> Report {
    let mut checks = Checks::default();
    ownership::check(subject, &mut checks);
    time::check(subject, &mut checks);
    values::check(subject, &mut checks);
    let mut report = checks.make(subject.waits()).await;
    races::check(subject, &mut report).await;
    report
}

/// Checks only what needs no time to pass: what holds when many work on one record at once. Run it on a
/// runtime with several threads as well.
pub async fn check_races(subject: &impl Subject) -> Report {
    let mut report = Report::default();
    races::check(subject, &mut report).await;
    report
}

// ---- what the checks are made of

type Checking<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

type Check<'a> = Box<dyn Fn() -> Checking<'a> + Send + Sync + 'a>;

/// Checks that know nothing of each other, each of which can be made again.
#[derive(Default)]
struct Checks<'a>(Vec<(u8, &'static str, Check<'a>)>);

/// How often a check on a clock that nobody stops is made before it counts: a machine that stands still for half a tick
/// makes any store look wrong.
const TRIES: usize = 3;

impl<'a> Checks<'a> {
    fn add<F>(&mut self, rule: u8, sentence: &'static str, check: impl Fn() -> F + Send + Sync + 'a)
    where
        F: Future<Output = Result<(), String>> + Send + 'a,
    {
        self.0.push((rule, sentence, Box::new(move || Box::pin(check()))));
    }

    /// One after the other, or all at once.
    async fn make(self, at_once: bool) -> Report {
        let mut report = Report::default();
        if !at_once {
            for (rule, sentence, check) in &self.0 {
                report.add(*rule, sentence, check().await);
            }
            return report;
        }
        let mut open = self.0;
        for left in (0..TRIES).rev() {
            let mut results = all(open.iter().map(|(.., check)| check()).collect()).await.into_iter();
            open.retain(|(rule, sentence, _)| match results.next() {
                Some(Err(_)) if left > 0 => true,
                Some(result) => {
                    report.add(*rule, sentence, result);
                    false
                }
                None => false,
            });
        }
        report
    }
}

/// What they come to, in their order.
async fn all(mut checks: Vec<Checking<'_>>) -> Vec<Result<(), String>> {
    let mut results: Vec<_> = checks.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for (check, result) in checks.iter_mut().zip(&mut results) {
            if result.is_none() {
                if let Poll::Ready(ready) = check.as_mut().poll(cx) {
                    *result = Some(ready);
                }
            }
        }
        match results.iter().all(Option::is_some) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    results.into_iter().flatten().collect()
}

/// One store and one record that nobody used before.
struct Bench<S> {
    store: Arc<S>,
    id: RecordId,
    tick: Duration,
}

impl<S: Store> Bench<S> {
    async fn new(subject: &impl Subject<Store = S>) -> Result<Self, String> {
        Ok(Self {
            store: Arc::new(subject.store().await),
            id: fresh_id()?,
            tick: subject.tick(),
        })
    }

    /// A claim with a lease of two ticks, remembered for four ticks afterwards.
    fn claim(&self, request: u8) -> Result<Claim, String> {
        let owner = Owner::random().map_err(|error| error.to_string())?;
        let retention = Retention::For(self.tick * 4);
        Ok(Claim::new(fingerprint(request), owner, self.tick * 2, retention))
    }

    async fn begin(&self, claim: &Claim) -> Result<Begin, String> {
        let begin = self.store.begin(&self.id, claim).await;
        begin.map_err(|error| format!("begin failed: {error}"))
    }

    async fn acquire(&self, claim: &Claim) -> Result<Lease, String> {
        match self.begin(claim).await? {
            Begin::Acquired(lease) => Ok(lease),
            other => Err(format!("begin answered {other:?} where it had to acquire")),
        }
    }

    async fn complete(&self, lease: &Lease, answer: &StoredResponse) -> Result<(), String> {
        let completed = self.store.complete(lease, answer, Retention::Forever).await;
        completed.map_err(|error| format!("complete failed: {error}"))
    }

    /// What somebody else finds, without a takeover.
    async fn look(&self) -> Result<Begin, String> {
        self.begin(&self.claim(99)?).await
    }

    async fn expect_in_progress(&self, request: u8) -> Result<Duration, String> {
        match self.look().await? {
            Begin::InProgress {
                fingerprint: found,
                remaining,
            } if found == fingerprint(request) => Ok(remaining),
            other => Err(format!(
                "it is {other:?} where it had to be in progress for request {request}"
            )),
        }
    }

    async fn expect_abandoned(&self, request: u8) -> Result<Lease, String> {
        match self.look().await? {
            Begin::Abandoned {
                fingerprint: found,
                lost,
            } if found == fingerprint(request) => Ok(lost),
            other => Err(format!(
                "it is {other:?} where it had to be abandoned by request {request}"
            )),
        }
    }

    async fn expect_completed(&self, request: u8, response: &StoredResponse) -> Result<(), String> {
        match self.look().await? {
            Begin::Completed {
                fingerprint: found,
                response: kept,
                ..
            } if found == fingerprint(request) && kept == *response => Ok(()),
            other => Err(format!(
                "it is {other:?} where it had to be completed by request {request}"
            )),
        }
    }

    /// Leaves a new lease behind.
    async fn expect_vacant(&self) -> Result<(), String> {
        match self.look().await? {
            Begin::Acquired(lease) if lease.fence == 1 => Ok(()),
            other => Err(format!("it is {other:?} where it had to be vacant")),
        }
    }
}

fn fresh_id() -> Result<RecordId, String> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut bytes: [u8; 32] = crate::random::bytes().map_err(|error| error.to_string())?;
    bytes[24..].copy_from_slice(&NEXT.fetch_add(1, Relaxed).to_le_bytes());
    Ok(RecordId::from_bytes(bytes))
}

fn fingerprint(request: u8) -> Fingerprint {
    Fingerprint::new(request, [request; 32])
}

fn response(body: &[u8]) -> StoredResponse {
    StoredResponse::encode(StatusCode::CREATED, &HeaderMap::new(), |_| true, body, None)
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}
