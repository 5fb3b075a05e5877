//! What a file store promises where two of its parts meet: its memory and its end, its file and what lies beside it,
//! its time and the clocks of several runs.
#![cfg(all(feature = "file", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::Poll,
    time::Duration,
};

use sha2::{Digest, Sha256};
use support::medium::{Failing, TestClock};
use tower_idempotency::{
    Begin, Claim, FileStore, Fingerprint, Lease, Owner, RecordId, Retention, Store, StoreError, StoreErrorKind,
    StoredResponse, testing::Medium,
};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn id(number: u64) -> RecordId {
    RecordId::from_bytes(Sha256::digest(number.to_le_bytes()).into())
}

fn claim() -> Claim {
    let owner = Owner::random().unwrap();
    Claim::new(Fingerprint::new(1, [1; 32]), owner, MINUTE, Retention::For(DAY))
}

fn response() -> StoredResponse {
    StoredResponse::not_kept(http::StatusCode::CREATED)
}

async fn acquire(store: &FileStore, number: u64) -> Lease {
    match store.begin(&id(number), &claim()).await.unwrap() {
        Begin::Acquired(lease) => lease,
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

async fn complete(store: &FileStore, number: u64, retention: Retention) {
    let lease = acquire(store, number).await;
    store.complete(&lease, &response(), retention).await.unwrap();
}

async fn is_completed(store: &FileStore, number: u64) -> bool {
    matches!(
        store.begin(&id(number), &claim()).await.unwrap(),
        Begin::Completed { .. }
    )
}

async fn open(medium: &Failing, clock: &TestClock) -> FileStore {
    let builder = FileStore::builder("simulated").medium(medium.clone());
    builder.clock(clock.clone()).open().await.unwrap()
}

// ---- its memory

#[tokio::test]
async fn a_closed_store_does_not_answer_from_memory_either() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    let store = open(&medium, &clock).await;
    complete(&store, 1, Retention::Forever).await;
    assert!(is_completed(&store, 1).await);
    store.close().await;
    // Somebody else may have the file by now, and the last word on what is in it.
    let error = store.begin(&id(1), &claim()).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
}

// ---- its end

/// Stands for an engine that stumbles over a page which something else changed.
#[derive(Clone, Debug, Default)]
struct Stumbling {
    medium: Failing,
    writes: Arc<AtomicBool>,
    reads: Arc<AtomicBool>,
}

impl Medium for Stumbling {
    fn len(&self) -> io::Result<u64> {
        self.medium.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        assert!(!self.reads.load(SeqCst), "stumbled over a read");
        self.medium.read(offset, out)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(!self.writes.load(SeqCst), "stumbled over a write");
        self.medium.write(offset, data)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.medium.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.medium.sync()
    }

    fn hold(&self, bytes: u64) -> io::Result<()> {
        self.medium.hold(bytes)
    }
}

#[tokio::test]
async fn a_writer_that_stumbles_answers_everybody_and_is_the_end_until_the_file_is_opened_again() {
    let (medium, clock) = (Stumbling::default(), TestClock::new());
    let builder = FileStore::builder("simulated").medium(medium.clone());
    let store = builder.clock(clock.clone()).open().await.unwrap();
    complete(&store, 1, Retention::Forever).await;
    let lease = acquire(&store, 2).await;
    medium.writes.store(true, SeqCst);
    let answer = response();
    let (first, second, owner) = (id(10), id(11), claim());
    let (completed, begun, begun_too) = tokio::join!(
        store.complete(&lease, &answer, Retention::Forever),
        store.begin(&first, &owner),
        store.begin(&second, &owner),
    );
    for result in [completed, begun.map(drop), begun_too.map(drop)] {
        assert_eq!(result.unwrap_err().kind(), StoreErrorKind::Unavailable);
    }
    medium.writes.store(false, SeqCst);
    for number in [1, 2, 3] {
        let error = store.begin(&id(number), &claim()).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{number}, also from memory");
    }
    store.close().await;
    let store = open(&Failing::with(medium.medium.bytes()), &clock).await;
    assert!(is_completed(&store, 1).await);
}

#[tokio::test]
async fn a_store_that_stumbles_at_its_end_is_closed_all_the_same() {
    let (medium, clock) = (Stumbling::default(), TestClock::new());
    let builder = FileStore::builder("simulated").medium(medium.clone());
    let store = builder.clock(clock.clone()).open().await.unwrap();
    complete(&store, 1, Retention::Forever).await;
    medium.writes.store(true, SeqCst);
    store.close().await;
    let store = open(&Failing::with(medium.medium.bytes()), &clock).await;
    assert!(is_completed(&store, 1).await);
}

#[tokio::test]
async fn a_reader_that_stumbles_answers_everybody() {
    let (medium, clock) = (Stumbling::default(), TestClock::new());
    let builder = FileStore::builder("simulated").medium(medium.clone());
    let builder = builder.cache_bytes(0).replay_bytes(0);
    let store = builder.clock(clock.clone()).open().await.unwrap();
    for number in 0..100 {
        complete(&store, number, Retention::Forever).await;
    }
    medium.reads.store(true, SeqCst);
    let claims = (0..100).map(|number| {
        let store = store.clone();
        tokio::spawn(async move { store.begin(&id(number), &claim()).await })
    });
    for claim in claims.collect::<Vec<_>>() {
        match claim.await.unwrap() {
            Ok(found) => assert!(matches!(found, Begin::Completed { .. }), "{found:?}"),
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Unavailable),
        }
    }
    store.close().await;
}

// ---- what lies beside the file

#[tokio::test]
async fn a_file_of_something_else_leaves_nothing_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notes.txt");
    std::fs::write(&path, "Remember the milk, and the eggs.").unwrap();
    FileStore::open(&path).await.unwrap_err();
    let names = std::fs::read_dir(directory.path()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["notes.txt"]);
}

#[cfg(unix)]
#[tokio::test]
async fn room_is_set_aside_in_a_file_of_its_own_and_not_where_a_link_leads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let other = directory.path().join("letters");
    std::fs::write(&other, "Dear all").unwrap();
    std::os::unix::fs::symlink(&other, directory.path().join("store.redb.spare")).unwrap();
    FileStore::open(&path).await.unwrap().close().await;
    assert_eq!(std::fs::read_to_string(&other).unwrap(), "Dear all");
}

#[cfg(unix)]
#[tokio::test]
async fn a_file_is_made_as_a_file_of_its_own_and_not_where_a_link_leads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let other = directory.path().join("letters");
    std::fs::write(&other, "Dear all").unwrap();
    std::os::unix::fs::symlink(&other, directory.path().join("store.redb.new")).unwrap();
    let store = FileStore::open(&path).await.unwrap();
    complete(&store, 1, Retention::Forever).await;
    store.close().await;
    assert_eq!(std::fs::read_to_string(&other).unwrap(), "Dear all");
}

/// The second name is what a crash leaves between the moment when a new file gets its name and the one when it loses
/// the name that it was made under.
#[cfg(unix)]
#[tokio::test]
async fn a_file_that_was_moved_away_is_not_emptied_by_its_successor() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let moved = directory.path().join("backup.redb");
    let store = FileStore::open(&path).await.unwrap();
    complete(&store, 1, Retention::Forever).await;
    store.close().await;
    std::fs::hard_link(&path, directory.path().join("store.redb.new")).unwrap();
    std::fs::rename(&path, &moved).unwrap();
    let store = FileStore::open(&path).await.unwrap();
    assert!(matches!(
        store.begin(&id(1), &claim()).await.unwrap(),
        Begin::Acquired(_)
    ));
    let backup = FileStore::open(&moved).await.unwrap();
    assert!(is_completed(&backup, 1).await, "the backup was emptied");
}

// ---- its time

#[tokio::test]
async fn a_wall_clock_that_was_behind_during_one_run_ends_nothing_early_in_the_next() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    let store = open(&medium, &clock).await;
    complete(&store, 1, Retention::For(DAY)).await;
    store.close().await;
    // A machine without a battery: it believes that it is 1970, until somebody tells it better.
    let mut right = Duration::ZERO;
    clock.restart();
    clock.jump(|wall| {
        right = wall;
        Duration::ZERO
    });
    let store = open(&medium, &clock).await;
    assert!(is_completed(&store, 1).await);
    clock.pass(MINUTE);
    complete(&store, 2, Retention::For(DAY)).await;
    store.close().await;
    clock.restart();
    clock.jump(|wall| right + wall);
    let store = open(&medium, &clock).await;
    clock.pass(DAY - 2 * MINUTE);
    assert!(is_completed(&store, 1).await && is_completed(&store, 2).await);
    clock.pass(2 * MINUTE);
    assert!(!is_completed(&store, 1).await && !is_completed(&store, 2).await);
}

#[tokio::test]
async fn a_store_that_is_never_open_for_long_and_seldom_changed_still_forgets() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    clock.without_uptime();
    let store = open(&medium, &clock).await;
    complete(&store, 1, Retention::For(DAY)).await;
    store.close().await;
    for runs in 0..48 {
        let store = open(&medium, &clock).await;
        assert_eq!(is_completed(&store, 1).await, runs < 24, "after {runs} hours");
        clock.pass(HOUR);
        store.close().await;
        if runs == 24 {
            break;
        }
    }
}

// ---- changes that share a sync

/// Polls each in turn while a sync holds the writer up, so that all of them are in the batch after it.
async fn in_one_batch(
    store: &FileStore,
    medium: &Failing,
    steps: Vec<Step<'_>>,
) -> Vec<Result<&'static str, StoreErrorKind>> {
    let before = medium.syncs();
    medium.block_syncs(true);
    let (other, owner) = (id(1_000_000 + before), claim());
    let mut holding = Box::pin(store.begin(&other, &owner));
    let _ = poll_once(&mut holding).await;
    while medium.syncs() == before {
        tokio::task::yield_now().await;
    }
    let mut steps = steps;
    for step in &mut steps {
        assert!(poll_once(step).await.is_none(), "it was answered before its sync");
    }
    medium.block_syncs(false);
    holding.await.unwrap();
    let mut results = Vec::new();
    for step in steps {
        results.push(step.await);
    }
    results
}

type Step<'a> = Pin<Box<dyn Future<Output = Result<&'static str, StoreErrorKind>> + 'a>>;

async fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|cx| match Pin::new(&mut *future).poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

fn word(found: Result<Begin, StoreError>) -> Result<&'static str, StoreErrorKind> {
    found.map_err(|error| error.kind()).map(|found| match found {
        Begin::Acquired(lease) if lease.fence == 1 => "acquired",
        Begin::Acquired(_) => "taken over",
        Begin::InProgress { .. } => "in progress",
        Begin::Abandoned { .. } => "abandoned",
        Begin::Completed { .. } => "completed",
        other => panic!("{other:?}"),
    })
}

fn done(result: Result<(), StoreError>) -> Result<&'static str, StoreErrorKind> {
    result.map_err(|error| error.kind()).map(|()| "done")
}

#[tokio::test]
async fn changes_of_one_batch_are_made_one_after_the_other() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    let store = &open(&medium, &clock).await;
    let answer = &response();
    let leases = [
        acquire(store, 0).await,
        acquire(store, 1).await,
        acquire(store, 2).await,
    ];
    let [completed, abandoned, expired] = &leases;
    let wrong = Lease::new(abandoned.id, Owner::random().unwrap(), 1);
    let stale = Lease::new(abandoned.id, abandoned.owner, 9);
    let (one, two) = (&claim(), &claim());
    let takers = &[wrong, stale, *abandoned, *abandoned].map(|lost| claim().taking_over(lost));
    let fenced = Err(StoreErrorKind::Fenced);
    let steps: Vec<(Step<'_>, Result<&'static str, StoreErrorKind>)> = vec![
        (
            Box::pin(async { done(store.complete(completed, answer, Retention::Forever).await) }),
            Ok("done"),
        ),
        (Box::pin(async { done(store.release(completed).await) }), fenced),
        (Box::pin(async { done(store.abandon(abandoned).await) }), Ok("done")),
        (Box::pin(async { done(store.renew(abandoned, MINUTE).await) }), fenced),
        (Box::pin(async { done(store.abandon(abandoned).await) }), Ok("done")),
        (Box::pin(async { done(store.renew(&wrong, MINUTE).await) }), fenced),
        (Box::pin(async { done(store.release(expired).await) }), Ok("done")),
        (Box::pin(async { done(store.release(expired).await) }), fenced),
    ];
    let (steps, expected): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
    assert_eq!(in_one_batch(store, &medium, steps).await, expected);
    let begin =
        |number: u64, claim| -> Step<'_> { Box::pin(async move { word(store.begin(&id(number), claim).await) }) };
    // A vacant record, which is claimed twice, and once more by the first.
    let steps = vec![begin(2, one), begin(2, two), begin(2, one), begin(1, &takers[2])];
    let found = in_one_batch(store, &medium, steps).await;
    let sorted = |mut words: Vec<_>| {
        words.sort_by_key(|word| format!("{word:?}"));
        words
    };
    let [first, second, again, taken] = found[..] else {
        panic!("{found:?}")
    };
    assert_eq!((first, taken), (again, Ok("taken over")), "{found:?}");
    assert_eq!(sorted(vec![first, second]), [Ok("acquired"), Ok("in progress")]);
    for (taker, found) in [
        (0, "in progress"),
        (1, "in progress"),
        (3, "in progress"),
        (2, "taken over"),
    ] {
        assert_eq!(word(store.begin(&id(1), &takers[taker]).await), Ok(found));
    }
    assert_eq!(
        done(store.complete(abandoned, answer, Retention::Forever).await),
        fenced
    );
    assert_eq!(word(store.begin(&id(0), one).await), Ok("completed"));
}
