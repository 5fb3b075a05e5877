//! What a file store promises where two of its parts meet: its memory and its end, its file and what lies beside it,
//! its time and the clocks of several runs.
#![cfg(all(feature = "file", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use sha2::{Digest, Sha256};
use support::medium::{Failing, TestClock};
use tower_idempotency::{
    Begin, Claim, FileStore, Fingerprint, Lease, Owner, RecordId, Retention, Store, StoreErrorKind, StoredResponse,
    testing::Medium,
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
