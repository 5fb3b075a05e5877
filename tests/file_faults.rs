//! Bad days of a file store: media that fail, a disk that is full, files that are not what they should be.
#![cfg(all(feature = "file", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{error::Error, io, os::unix::fs::FileExt, path::Path, time::Duration};

use http::StatusCode;
use sha2::{Digest, Sha256};
use support::medium::{Calls, Failing, TestClock};
use tower_idempotency::{
    Begin, Claim, FileStore, FileStoreError, FileStoreErrorKind, Fingerprint, Lease, Owner, RecordId, Retention, Store,
    StoreError, StoreErrorKind, StoredResponse,
};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn id(number: u64) -> RecordId {
    RecordId::from_bytes(Sha256::digest(number.to_le_bytes()).into())
}

fn claim() -> Claim {
    let owner = Owner::random().unwrap();
    let fingerprint = Fingerprint::new(1, [1; 32]);
    Claim::new(fingerprint, owner, Duration::from_secs(60), Retention::For(DAY))
}

fn response(number: u64, length: usize) -> StoredResponse {
    let mut bytes = vec![1, 0, 201, 0];
    bytes.extend([0; 8]);
    bytes.extend((length as u64).to_le_bytes());
    bytes.extend((0..length).map(|at| (at as u64 * 7 + number) as u8));
    StoredResponse::from_bytes(bytes.into()).unwrap()
}

async fn open(medium: &Failing, clock: &TestClock) -> Result<FileStore, FileStoreError> {
    let builder = FileStore::builder("simulated")
        .medium(medium.clone())
        .clock(clock.clone());
    // Small, so that the medium is read, and without answers in memory.
    builder.cache_bytes(64 << 10).replay_bytes(0).open().await
}

/// A new medium with a journal that is full after a few changes.
async fn with_a_short_journal(clock: &TestClock) -> Failing {
    let medium = Failing::default();
    let builder = FileStore::builder("simulated").medium(medium.clone());
    let store = builder.clock(clock.clone()).journal_bytes(64 << 10).open().await;
    store.unwrap().close().await;
    medium
}

async fn acquire(store: &FileStore, number: u64) -> Result<Lease, StoreError> {
    match store.begin(&id(number), &claim()).await? {
        Begin::Acquired(lease) => Ok(lease),
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

async fn is_completed(store: &FileStore, number: u64, response: &StoredResponse) -> bool {
    match store.begin(&id(number), &claim()).await.unwrap() {
        Begin::Completed { response: kept, .. } => kept == *response,
        _ => false,
    }
}

fn said(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

/// Claims and completes until something fails; says what was acknowledged, and that everything fails from then on.
async fn work_until_it_fails(store: &FileStore) -> Vec<u64> {
    let mut completed = Vec::new();
    for number in 0..12 {
        let step = async {
            let lease = acquire(store, number).await?;
            store
                .complete(&lease, &response(number, 3000), Retention::Forever)
                .await?;
            Ok::<_, StoreError>(lease)
        };
        match step.await {
            Ok(_) => completed.push(number),
            Err(error) => {
                assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}");
                everything_says_so(store).await;
                break;
            }
        }
        let replayed = store.begin(&id(number / 2), &claim()).await;
        if let Err(error) = replayed {
            assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}");
            everything_says_so(store).await;
            break;
        }
    }
    completed
}

async fn everything_says_so(store: &FileStore) {
    let lease = Lease::new(id(0), Owner::random().unwrap(), 1);
    let answer = response(0, 10);
    for result in [
        store.begin(&id(0), &claim()).await.map(drop),
        store.begin(&id(1000), &claim()).await.map(drop),
        store.complete(&lease, &answer, Retention::Forever).await,
        store.renew(&lease, DAY).await,
        store.release(&lease).await,
        store.abandon(&lease).await,
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
        assert!(
            said(&error).contains("simulated failed and takes no more work until it is opened again"),
            "{}",
            said(&error)
        );
    }
}

#[tokio::test]
async fn an_error_at_any_call_to_the_medium_loses_nothing_and_is_told_from_then_on() {
    for calls in [Calls::All, Calls::Reads, Calls::Writes, Calls::Syncs] {
        let mut after = 0;
        let mut failed_while_open = 0;
        loop {
            let clock = TestClock::new();
            // A file gets its name once it is whole, so the medium is made before it begins to fail.
            let medium = with_a_short_journal(&clock).await;
            medium.fail(calls, after);
            let completed = match open(&medium, &clock).await {
                Ok(store) => {
                    let completed = work_until_it_fails(&store).await;
                    store.close().await;
                    failed_while_open += usize::from(completed.len() < 12);
                    completed
                }
                Err(error) => {
                    assert_eq!(
                        error.kind(),
                        FileStoreErrorKind::Failed,
                        "{calls:?} after {after}: {error}"
                    );
                    assert!(error.to_string().contains("simulated"), "{error}");
                    Vec::new()
                }
            };
            medium.heal();
            let store = open(&medium, &clock)
                .await
                .unwrap_or_else(|error| panic!("{calls:?} after {after}: {error}"));
            for number in &completed {
                let kept = is_completed(&store, *number, &response(*number, 3000)).await;
                assert!(kept, "{number} was lost with {calls:?} after {after}");
            }
            if completed.len() == 12 {
                break;
            }
            after += 1;
        }
        assert!(
            failed_while_open >= 10,
            "only {failed_while_open} of the failures were those of {calls:?}"
        );
    }
}

#[tokio::test]
async fn a_failed_sync_is_the_end_until_the_file_is_opened_again() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    // With answers in memory: those say so as well.
    let builder = FileStore::builder("simulated")
        .medium(medium.clone())
        .clock(clock.clone());
    let store = builder.open().await.unwrap();
    let lease = acquire(&store, 0).await.unwrap();
    store
        .complete(&lease, &response(0, 10), Retention::Forever)
        .await
        .unwrap();
    let running = acquire(&store, 1).await.unwrap();
    medium.fail_once(Calls::Syncs);
    let error = store
        .complete(&running, &response(1, 10), Retention::Forever)
        .await
        .unwrap_err();
    assert_eq!(
        error.kind(),
        StoreErrorKind::Unavailable,
        "nobody knows whether it was applied"
    );
    // The next sync would say that all is well: what the failed one lost stays lost.
    everything_says_so(&store).await;
    assert!(
        said(&acquire(&store, 5).await.unwrap_err()).contains("injected"),
        "and why"
    );
    store.close().await;
    let store = open(&medium, &clock).await.unwrap();
    assert!(is_completed(&store, 0, &response(0, 10)).await);
}

const MIB: u64 = 1 << 20;

/// Fills a disk of 40 MiB with answers until one is refused.
async fn fill(store: &FileStore, retention: Duration) -> u64 {
    for number in 1000.. {
        let lease = match acquire(store, number).await {
            Ok(lease) => lease,
            Err(error) => {
                assert_eq!(error.kind(), StoreErrorKind::Full, "{}", said(&error));
                return number;
            }
        };
        let answer = response(number, 100_000);
        match store.complete(&lease, &answer, Retention::For(retention)).await {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error.kind(), StoreErrorKind::Full, "{}", said(&error));
                let not_kept = StoredResponse::not_kept(StatusCode::CREATED);
                store
                    .complete(&lease, &not_kept, Retention::For(retention))
                    .await
                    .unwrap();
                return number;
            }
        }
    }
    unreachable!()
}

#[tokio::test]
async fn a_full_disk_refuses_claims_ends_what_is_in_flight_replays_and_recovers() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    medium.room(40 * MIB);
    let store = open(&medium, &clock).await.unwrap();
    let running = [0, 1, 2, 3].map(|number| acquire(&store, number));
    let [kept, renewed, released, abandoned] = running;
    let (kept, renewed) = (kept.await.unwrap(), renewed.await.unwrap());
    let (released, abandoned) = (released.await.unwrap(), abandoned.await.unwrap());
    let refused = fill(&store, DAY).await;
    assert!(refused > 1050, "only {} answers found room", refused - 1000);
    let running = store.begin(&id(1), &claim()).await.unwrap();
    assert!(
        matches!(running, Begin::InProgress { .. }),
        "a duplicate is told what it is told on any day"
    );
    assert_eq!(acquire(&store, 9000).await.unwrap_err().kind(), StoreErrorKind::Full);
    let large = store
        .complete(&kept, &response(0, 100_000), Retention::For(DAY))
        .await
        .unwrap_err();
    assert_eq!(large.kind(), StoreErrorKind::Full);
    let not_kept = StoredResponse::not_kept(StatusCode::CREATED);
    store.complete(&kept, &not_kept, Retention::For(DAY)).await.unwrap();
    store.renew(&renewed, DAY).await.unwrap();
    store.release(&released).await.unwrap();
    store.abandon(&abandoned).await.unwrap();
    assert!(is_completed(&store, 0, &not_kept).await);
    for number in 1000..refused {
        assert!(
            is_completed(&store, number, &response(number, 100_000)).await,
            "{number} is readable"
        );
    }
    // Somebody makes room.
    medium.room(80 * MIB);
    clock.pass(Duration::from_secs(2));
    assert_eq!(acquire(&store, 9000).await.unwrap().fence, 1);
    let lease = acquire(&store, 9001).await.unwrap();
    store
        .complete(&lease, &response(9001, 100_000), Retention::For(DAY))
        .await
        .unwrap();
    store.close().await;
    let store = open(&medium, &clock).await.unwrap();
    assert!(is_completed(&store, 1000, &response(1000, 100_000)).await);
    assert!(is_completed(&store, 9001, &response(9001, 100_000)).await);
}

#[tokio::test]
async fn a_disk_without_room_for_what_replaces_something_is_opened_again_until_it_has() {
    let clock = TestClock::new();
    let medium = with_a_short_journal(&clock).await;
    let store = open(&medium, &clock).await.unwrap();
    let lease = acquire(&store, 0).await.unwrap();
    let answer = response(0, 1000);
    store.complete(&lease, &answer, Retention::Forever).await.unwrap();
    let running = acquire(&store, 1).await.unwrap();
    medium.takes_nothing(true);
    for _ in 0..3 {
        let error = acquire(&store, 2).await.unwrap_err();
        assert!(
            matches!(error.kind(), StoreErrorKind::Full | StoreErrorKind::Unavailable),
            "{}",
            said(&error)
        );
        clock.pass(Duration::from_secs(2));
    }
    medium.takes_nothing(false);
    clock.pass(Duration::from_secs(2));
    assert_eq!(acquire(&store, 2).await.unwrap().fence, 1);
    assert!(is_completed(&store, 0, &answer).await);
    store.complete(&running, &answer, Retention::Forever).await.unwrap();
    store.close().await;
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_again_for_another_reason_than_room_is_given_up() {
    let clock = TestClock::new();
    let medium = with_a_short_journal(&clock).await;
    let store = open(&medium, &clock).await.unwrap();
    medium.takes_nothing(true);
    assert!(acquire(&store, 2).await.is_err());
    medium.takes_nothing(false);
    medium.fail(Calls::Reads, 0);
    clock.pass(Duration::from_secs(2));
    assert!(acquire(&store, 2).await.is_err());
    medium.heal();
    clock.pass(Duration::from_secs(2));
    everything_says_so(&store).await;
}

#[tokio::test]
async fn on_a_full_disk_what_expires_makes_room() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    medium.room(40 * MIB);
    let store = open(&medium, &clock).await.unwrap();
    fill(&store, Duration::from_secs(600)).await;
    assert_eq!(acquire(&store, 9000).await.unwrap_err().kind(), StoreErrorKind::Full);
    // Others took what the spare gave back: the disk stays full.
    medium.others_leave(0);
    clock.pass(Duration::from_secs(1000));
    // The first ones pay for the purge of what comes after them.
    let mut refused = 0;
    let lease = loop {
        match acquire(&store, 9100).await {
            Ok(lease) => break lease,
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Full, "{}", said(&error)),
        }
        refused += 1;
        assert!(refused < 100, "nothing was purged");
    };
    store
        .complete(&lease, &response(9100, 1000), Retention::For(DAY))
        .await
        .unwrap();
    assert!(is_completed(&store, 9100, &response(9100, 1000)).await);
}

#[tokio::test]
async fn a_disk_that_others_fill_to_the_last_byte_loses_nothing_and_recovers() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    medium.room(200 * MIB);
    let store = open(&medium, &clock).await.unwrap();
    let mut kept = Vec::new();
    let (mut refused, mut unknown) = (0, 0);
    for number in 0..300 {
        if number == 100 {
            // The spare goes to others as well.
            medium.others_leave(0);
            medium.others_are_greedy();
        }
        clock.pass(Duration::from_millis(100));
        let answer = response(number, 30_000);
        let step = async {
            let lease = acquire(&store, number).await?;
            store.complete(&lease, &answer, Retention::For(DAY)).await
        };
        match step.await {
            Ok(()) => kept.push(number),
            Err(error) if error.kind() == StoreErrorKind::Full => refused += 1,
            Err(error) => {
                assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{}", said(&error));
                unknown += 1;
            }
        }
        // What was kept is replayed all the while.
        let earlier = kept[number as usize % kept.len()];
        assert!(
            is_completed(&store, earlier, &response(earlier, 30_000)).await,
            "{earlier} was lost at {number}"
        );
    }
    assert!(
        unknown >= 1 && refused > 100,
        "{unknown} failed and {refused} were refused"
    );
    assert!(
        unknown <= 3,
        "{unknown} calls failed for what is known to be want of room"
    );
    medium.room(400 * MIB);
    clock.pass(Duration::from_secs(2));
    let lease = acquire(&store, 9000).await.unwrap();
    store
        .complete(&lease, &response(9000, 30_000), Retention::For(DAY))
        .await
        .unwrap();
    for number in kept {
        assert!(
            is_completed(&store, number, &response(number, 30_000)).await,
            "{number} was lost"
        );
    }
}

#[tokio::test]
async fn where_no_room_can_be_set_aside_the_store_does_without_until_the_disk_is_full() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    medium.room(10 * MIB);
    medium.without_spare();
    let store = open(&medium, &clock).await.unwrap();
    let mut kept = Vec::new();
    let mut full = false;
    for number in 0..400 {
        let answer = response(number, 50_000);
        let step = async {
            let lease = acquire(&store, number).await?;
            store.complete(&lease, &answer, Retention::For(DAY)).await
        };
        match step.await {
            Ok(()) => kept.push(number),
            Err(error) => full |= error.kind() == StoreErrorKind::Full,
        }
    }
    assert!(kept.len() > 50 && full, "{} were kept", kept.len());
    for number in &kept {
        assert!(
            is_completed(&store, *number, &response(*number, 50_000)).await,
            "{number} was lost"
        );
    }
    medium.room(100 * MIB);
    clock.pass(Duration::from_secs(2));
    acquire(&store, 9000).await.unwrap();
}

// ---- files that are not what they should be

async fn refused(path: &Path) -> FileStoreError {
    let error = FileStore::open(path).await.expect_err("it must not open");
    let name = path.display().to_string();
    assert!(error.to_string().contains(&name), "{error} does not name {name}");
    assert_eq!(error.path(), path);
    error
}

/// A closed file with a few hundred answers.
async fn filled(path: &Path) {
    complete_a_hundred(FileStore::open(path).await.unwrap()).await;
}

async fn complete_a_hundred(store: FileStore) {
    for number in 0..100 {
        let lease = acquire(&store, number).await.unwrap();
        store
            .complete(&lease, &response(number, 2000), Retention::Forever)
            .await
            .unwrap();
    }
    store.close().await;
}

#[tokio::test]
async fn a_file_that_is_open_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let store = FileStore::open(&path).await.unwrap();
    let error = refused(&path).await;
    assert_eq!(error.kind(), FileStoreErrorKind::InUse);
    let lease = acquire(&store, 1).await.unwrap();
    store.release(&lease).await.unwrap();
    store.close().await;
    FileStore::open(&path).await.unwrap();
}

#[tokio::test]
async fn a_place_that_cannot_be_written_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("file"), "x").unwrap();
    for path in [
        directory.path().join("missing/store.redb"),
        directory.path().join("file/store.redb"),
        directory.path().to_owned(),
    ] {
        assert_eq!(
            refused(&path).await.kind(),
            FileStoreErrorKind::NotAccessible,
            "{path:?}"
        );
    }
    #[cfg(target_os = "linux")]
    {
        // Nobody writes there, whatever rights the test has.
        let kind = refused(Path::new("/proc/self/store.redb")).await.kind();
        assert_eq!(kind, FileStoreErrorKind::NotAccessible);
    }
}

#[tokio::test]
async fn a_file_of_something_else_is_refused_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notes.txt");
    for content in [
        &b"x"[..],
        b"Remember the milk, and the eggs.",
        &[0; 100_000],
        &[0xff; 5000],
    ] {
        std::fs::write(&path, content).unwrap();
        assert_eq!(refused(&path).await.kind(), FileStoreErrorKind::NotAStore);
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
    std::fs::remove_file(&path).unwrap();
    const OTHER: redb::TableDefinition<&str, &str> = redb::TableDefinition::new("recipes");
    let other = redb::Database::create(&path).unwrap();
    let transaction = other.begin_write().unwrap();
    transaction.open_table(OTHER).unwrap().insert("a", "b").unwrap();
    transaction.commit().unwrap();
    drop(other);
    assert_eq!(refused(&path).await.kind(), FileStoreErrorKind::NotAStore);
}

#[tokio::test]
async fn a_file_that_was_cut_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    filled(&path).await;
    let whole = std::fs::read(&path).unwrap();
    let length = whole.len();
    for cut in [
        0,
        1,
        8,
        100,
        319,
        320,
        4095,
        4096,
        8192,
        72 << 10,
        TABLES as usize,
        TABLES as usize + 1,
        TABLES as usize + 4095,
        TABLES as usize + 4096,
        TABLES as usize + 8191,
        length / 2,
        length - 4096,
        length - 1,
    ] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let kind = refused(&path).await.kind();
        let expected = if (1..9).contains(&cut) {
            FileStoreErrorKind::NotAStore
        } else {
            FileStoreErrorKind::Damaged
        };
        assert_eq!(kind, expected, "cut at {cut} of {length}");
        assert!(
            std::fs::read(&path).unwrap() == whole[..cut],
            "what is left is left as it is"
        );
    }
    std::fs::write(&path, &whole).unwrap();
    FileStore::open(&path).await.unwrap();
}

/// The tables of a file of version 2, which come after its journal.
#[derive(Debug)]
struct Tables(std::fs::File);

const TABLES: u64 = (4 << 20) + 4096;

impl redb::StorageBackend for Tables {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len() - TABLES)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, TABLES + offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(TABLES + len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, TABLES + offset)
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_newer_version_is_refused() {
    const ABOUT: redb::TableDefinition<&str, &[u8]> = redb::TableDefinition::new("store");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    complete_a_hundred(FileStore::builder(&path).page_checksums(false).open().await.unwrap()).await;
    let write = |key, value: &[u8]| {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path);
        let database = redb::Database::builder().create_with_backend(Tables(file.unwrap()));
        let database = database.unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(ABOUT).unwrap().insert(key, value).unwrap();
        transaction.commit().unwrap();
    };
    let whole = std::fs::read(&path).unwrap();
    let mut newer = whole.clone();
    newer[17] = 4;
    std::fs::write(&path, newer).unwrap();
    assert_eq!(refused(&path).await.kind(), FileStoreErrorKind::NewerVersion);
    std::fs::write(&path, whole).unwrap();
    write("format", b"tower-idempotency\x02");
    assert_eq!(refused(&path).await.kind(), FileStoreErrorKind::NewerVersion);
    write("format", b"tower-idempotency\x01");
    write("time", &[2; 70]);
    assert_eq!(refused(&path).await.kind(), FileStoreErrorKind::NewerVersion);
    write("time", &[1; 70]);
    assert_eq!(refused(&path).await.kind(), FileStoreErrorKind::Damaged);
}

/// Changes the bytes of one record, wherever they are, as bad memory or a bad disk does, in a file that has no checksum
/// but the record's own.
async fn damaged(change: impl Fn(&mut [u8])) -> Result<Begin, StoreError> {
    let (medium, clock) = (Failing::default(), TestClock::new());
    let builder = FileStore::builder("simulated").medium(medium.clone());
    let builder = builder.clock(clock.clone()).page_checksums(false);
    builder.open().await.unwrap().close().await;
    let store = open(&medium, &clock).await.unwrap();
    let lease = acquire(&store, 7).await.unwrap();
    let answer = response(7, 3000);
    store.complete(&lease, &answer, Retention::Forever).await.unwrap();
    store.close().await;
    medium.change(|bytes| {
        let body = answer.as_bytes();
        let places: Vec<_> = (0..bytes.len() - body.len())
            .filter(|at| bytes[*at..].starts_with(body))
            .collect();
        assert!(!places.is_empty(), "it is in the file");
        // The record's own bytes begin 71 before those of its answer.
        places
            .iter()
            .for_each(|at| change(&mut bytes[*at - 71..*at + body.len()]));
    });
    let store = open(&medium, &clock).await.unwrap();
    let found = store.begin(&id(7), &claim()).await;
    // Nor by its owner, nor by a purge.
    assert!(store.release(&lease).await.is_err());
    clock.pass(DAY * 1000);
    acquire(&store, 8).await.unwrap();
    assert!(
        store.begin(&id(7), &claim()).await.is_err(),
        "it is not vacant later either"
    );
    found
}

#[tokio::test]
async fn a_record_with_a_flipped_bit_is_an_error_and_never_vacant_or_another_answer() {
    for at in (0..3000).step_by(97).chain([1, 2, 5, 6, 30, 70, 71, 72]) {
        let error = damaged(|record| record[at] ^= 0x10).await.unwrap_err();
        let expected = if at == 0 {
            StoreErrorKind::NewerVersion
        } else {
            StoreErrorKind::Corrupt
        };
        assert_eq!(error.kind(), expected, "byte {at}");
    }
}

/// What became of a store of 60 records in whose closed file bits were flipped, one at a time.
#[derive(Debug, Default)]
struct Flipped {
    harmless: u32,
    not_opened: u32,
    /// Of those that opened.
    errors: u32,
    /// A record was lost, and its handler would run again.
    vacant: u32,
    /// All that was not an error was answered as before, after each error as well.
    others_answered: u64,
}

async fn flip_bits(page_checksums: bool, every: usize) -> Flipped {
    let (medium, clock) = (Failing::default(), TestClock::new());
    let builder = FileStore::builder("simulated")
        .medium(medium.clone())
        .clock(clock.clone());
    let builder = builder.page_checksums(page_checksums).journal_bytes(1 << 16);
    let store = builder.open().await.unwrap();
    for number in 0..60 {
        let lease = acquire(&store, number).await.unwrap();
        let answer = response(number, 1000);
        store.complete(&lease, &answer, Retention::Forever).await.unwrap();
    }
    store.close().await;
    let whole = medium.bytes();
    let mut found = Flipped::default();
    // Of blocks that something was ever written to; the journal is another test's.
    let blocks = (4096 + (1 << 16)..whole.len()).step_by(4096);
    let written = blocks.filter(|at| whole[*at..*at + 4096].iter().any(|byte| *byte != 0));
    let bits: Vec<_> = written.flat_map(|at| at * 8..(at + 4096) * 8).step_by(every).collect();
    for bit in bits {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let medium = Failing::with(bytes);
        let (mut errors, mut vacant) = (0, 0);
        // Again after a life in which other records were written beside it.
        for life in 0..2 {
            let Ok(store) = open(&medium, &clock).await else {
                errors = u64::MAX;
                break;
            };
            for number in (0..60).rev() {
                match store.begin(&id(number), &claim()).await {
                    Ok(Begin::Completed { response: kept, .. }) => {
                        assert_eq!(kept, response(number, 1000), "bit {bit}");
                        found.others_answered += u64::from(errors > 0);
                    }
                    // What this process or the one before it acquired was vacant then.
                    Ok(Begin::Acquired(_) | Begin::Abandoned { .. }) => vacant += 1,
                    Ok(other) => panic!("bit {bit}: {other:?}"),
                    Err(_) => errors += 1,
                }
            }
            for number in 0..20 {
                if let Ok(lease) = store.begin(&id(1000 + life * 20 + number), &claim()).await {
                    let Begin::Acquired(lease) = lease else {
                        panic!("bit {bit}: {lease:?}")
                    };
                    let _ = store.complete(&lease, &response(1, 1000), Retention::Forever).await;
                }
            }
            store.close().await;
        }
        match (errors, vacant) {
            (_, 1..) => {
                found.vacant += 1;
                if !page_checksums {
                    break;
                }
            }
            (u64::MAX, _) => found.not_opened += 1,
            (0, _) => found.harmless += 1,
            _ => found.errors += 1,
        }
    }
    found
}

#[tokio::test]
async fn a_flipped_bit_anywhere_in_a_closed_file_never_makes_a_record_vacant() {
    let every = std::env::var("FLIPPED_BITS_EVERY").map_or(5021, |every| every.parse().expect("a number"));
    let found = flip_bits(true, every).await;
    println!("{found:?}");
    assert_eq!(found.vacant, 0, "{found:?}");
    assert!(found.errors > 50 && found.harmless > 50, "{found:?}");
    assert!(
        found.others_answered > u64::from(found.errors) * 10,
        "one page fails alone: {found:?}"
    );
}

#[tokio::test]
async fn without_checksums_under_its_pages_a_flipped_bit_hides_a_record() {
    // Until the first.
    let found = flip_bits(false, 1511).await;
    println!("{found:?}");
    assert!(found.vacant > 0, "the test above could not fail: {found:?}");
}

/// A closed file with 60 records, of which a page of one is not what was written.
async fn seven_is_damaged() -> (Failing, TestClock) {
    let (medium, clock) = (Failing::default(), TestClock::new());
    let store = open(&medium, &clock).await.unwrap();
    for number in 0..60 {
        let lease = acquire(&store, number).await.unwrap();
        let keep = Retention::For(if number == 7 { DAY / 2 } else { DAY * 2 });
        store.complete(&lease, &response(number, 1000), keep).await.unwrap();
    }
    store.close().await;
    medium.change(|bytes| {
        let answer = response(7, 1000);
        let places: Vec<_> = (0..bytes.len() - 1000)
            .filter(|at| bytes[*at..].starts_with(answer.as_bytes()))
            .collect();
        assert!(!places.is_empty(), "it is in the file");
        places.iter().for_each(|at| bytes[*at + 500] ^= 1);
        medium.watch(places[0] as u64 + 500);
    });
    (medium, clock)
}

#[tokio::test]
async fn a_damaged_page_fails_those_it_leads_to_and_a_purge_does_not_spread_it() {
    let (medium, clock) = seven_is_damaged().await;
    let store = open(&medium, &clock).await.unwrap();
    let mut reads = Vec::new();
    for round in 0..3 {
        let error = store.begin(&id(7), &claim()).await.unwrap_err();
        let said = said(&error);
        assert!(said.contains("was changed since it was written"), "{said}");
        // A reader may have been the one who met it.
        let met = round == 0 && said.contains("and is opened again");
        assert!(met || said.contains("is damaged where it has this record"), "{said}");
        // Whoever meets it does not know whether it was applied; from then on it is no matter of trying again.
        let kind = if met {
            StoreErrorKind::Unavailable
        } else {
            StoreErrorKind::Corrupt
        };
        assert_eq!(error.kind(), kind, "{said}");
        let mut answered = 0;
        for number in (0..60).filter(|number| *number != 7) {
            match store.begin(&id(number), &claim()).await {
                Ok(Begin::Completed { response: kept, .. }) => {
                    assert_eq!(kept, response(number, 1000));
                    answered += 1;
                }
                Ok(other) => panic!("{number}: {other:?}"),
                // Its neighbours in the page.
                Err(error) => assert!(
                    matches!(error.kind(), StoreErrorKind::Unavailable | StoreErrorKind::Corrupt),
                    "{error:?}"
                ),
            }
        }
        assert!(answered > 50, "{answered} in round {round}");
        reads.push(medium.reads_of_the_watched());
        // Over by now, but not vacant: nobody can say what it was.
        clock.pass(DAY / 2);
    }
    assert!(
        reads[0] > 0 && reads[2] == reads[0],
        "each record of the page is looked for in vain once: {reads:?}"
    );
    store.close().await;
    // Whose first purge meets the page.
    let store = open(&medium, &clock).await.unwrap();
    let mut acquired = 0;
    for number in 100..110 {
        acquired += usize::from(store.begin(&id(number), &claim()).await.is_ok());
    }
    assert!(acquired > 6, "{acquired} of 10 new keys");
    assert!(store.begin(&id(7), &claim()).await.is_err());
}

#[tokio::test]
async fn a_damaged_page_that_a_reader_meets_fails_nobody_but_who_asked_for_it() {
    let (medium, clock) = seven_is_damaged().await;
    let store = open(&medium, &clock).await.unwrap();
    let mut leases = Vec::new();
    for number in 100..103 {
        leases.push(acquire(&store, number).await.unwrap());
    }
    let syncs = medium.syncs();
    medium.block_syncs(true);
    let completing = tokio::spawn({
        let (store, lease) = (store.clone(), leases[0]);
        async move { store.complete(&lease, &response(100, 1000), Retention::Forever).await }
    });
    while medium.syncs() == syncs {
        tokio::task::yield_now().await;
    }
    // The writer is in the middle of its sync, so a reader looks.
    let error = store.begin(&id(7), &claim()).await.unwrap_err();
    assert!(said(&error).contains("is damaged where it has this record"), "{error}");
    medium.block_syncs(false);
    completing.await.unwrap().unwrap();
    for (lease, number) in leases[1..].iter().zip(101..) {
        store
            .complete(lease, &response(number, 1000), Retention::Forever)
            .await
            .unwrap();
    }
    let mut answered = 0;
    // 0 is in that page, so not first.
    for number in (0..60).rev().filter(|number| *number != 7) {
        let found = store.begin(&id(number), &claim()).await;
        answered += usize::from(matches!(found, Ok(Begin::Completed { .. })));
        // Its neighbours in the page are never answered; nobody else is refused on its account, not even once.
        let again = store.begin(&id(number), &claim()).await;
        assert_eq!(found.is_ok(), again.is_ok(), "{number}: {found:?}, then {again:?}");
    }
    assert!(answered > 50, "{answered}");
}

#[tokio::test]
async fn a_reader_whose_view_of_the_file_is_damaged_leaves_it_to_the_writer_who_opens_it_again() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    let builder = FileStore::builder("simulated").medium(medium.clone()).clock(clock);
    // All of it is in the tables when it is opened next.
    complete_a_hundred(builder.open().await.unwrap()).await;
    let builder = FileStore::builder("simulated")
        .medium(medium.clone())
        .clock(TestClock::new());
    let store = builder.cache_bytes(0).replay_bytes(0).open().await.unwrap();
    let lease = acquire(&store, 200).await.unwrap();
    let syncs = medium.syncs();
    medium.block_syncs(true);
    let completing = tokio::spawn({
        let store = store.clone();
        async move { store.complete(&lease, &response(200, 1000), Retention::Forever).await }
    });
    while medium.syncs() == syncs {
        tokio::task::yield_now().await;
    }
    // The writer is in the middle of its sync, so a reader looks, and no page is what it was.
    let flip = |bytes: &mut Vec<u8>| bytes.iter_mut().skip(2000).step_by(4096).for_each(|byte| *byte ^= 1);
    medium.change(flip);
    let reads = medium.reads();
    let looking = tokio::spawn({
        let store = store.clone();
        async move { is_completed(&store, 8, &response(8, 2000)).await }
    });
    while medium.reads() == reads {
        tokio::task::yield_now().await;
    }
    medium.change(flip);
    medium.block_syncs(false);
    completing.await.unwrap().unwrap();
    assert!(looking.await.unwrap(), "the writer found it");
    assert!(is_completed(&store, 200, &response(200, 1000)).await);
    store.close().await;
}

#[tokio::test]
async fn a_store_whose_reader_met_a_damaged_page_is_closed_with_nothing_left_to_do() {
    let (medium, clock) = seven_is_damaged().await;
    let store = open(&medium, &clock).await.unwrap();
    let lease = acquire(&store, 100).await.unwrap();
    store
        .complete(&lease, &response(100, 1000), Retention::Forever)
        .await
        .unwrap();
    // Nobody writes at this moment, so a reader looks.
    assert!(store.begin(&id(7), &claim()).await.is_err());
    store.close().await;
    let reads = medium.reads();
    let store = open(&medium, &clock).await.unwrap();
    let opened_with = medium.reads() - reads;
    assert!(is_completed(&store, 100, &response(100, 1000)).await);
    store.close().await;
    let reads = medium.reads();
    let store = open(&medium, &clock).await.unwrap();
    assert_eq!(medium.reads() - reads, opened_with, "as after a close without damage");
    store.close().await;
}

#[tokio::test]
async fn a_damaged_page_of_the_order_of_the_purge_hides_no_record() {
    const RECORDS: u64 = 300;
    let clock = TestClock::new();
    let medium = with_a_short_journal(&clock).await;
    let store = open(&medium, &clock).await.unwrap();
    for number in 0..RECORDS {
        clock.pass(Duration::from_secs(1));
        let lease = acquire(&store, number).await.unwrap();
        let keep = Retention::For(DAY);
        store.complete(&lease, &response(number, 10), keep).await.unwrap();
    }
    store.close().await;
    medium.change(|bytes| {
        // Its keys are a time and an id, so 40 bytes lie between the ends of an id and of the next one.
        let last = [1, 2].map(|before| *id(RECORDS - before).as_bytes());
        let places: Vec<_> = (40..bytes.len() - 32)
            .filter(|at| bytes[*at..].starts_with(&last[0]) && bytes[..at - 8].ends_with(&last[1]))
            .collect();
        assert!(!places.is_empty(), "they are in the file");
        places.iter().for_each(|at| bytes[*at - 1] ^= 1);
    });
    let store = open(&medium, &clock).await.unwrap();
    for _ in 0..2 {
        // A new one has its place in that page. It is not blamed for the damage: it has no record yet.
        let error = store.begin(&id(RECORDS), &claim()).await.unwrap_err();
        assert!(said(&error).contains("and is opened again"), "{}", said(&error));
        for number in 0..RECORDS {
            let replay = is_completed(&store, number, &response(number, 10)).await;
            assert!(replay, "{number} is hidden");
        }
    }
}

#[tokio::test]
async fn a_verified_opening_finds_a_flipped_bit_anywhere() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    let builder = FileStore::builder("simulated").medium(medium.clone());
    let store = builder
        .clock(clock.clone())
        .journal_bytes(1 << 16)
        .open()
        .await
        .unwrap();
    for number in 0..60 {
        let lease = acquire(&store, number).await.unwrap();
        store
            .complete(&lease, &response(number, 1000), Retention::Forever)
            .await
            .unwrap();
    }
    store.close().await;
    let whole = medium.bytes();
    for bit in (0..whole.len() * 8).step_by(4099) {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let medium = Failing::with(bytes);
        let opened = FileStore::builder("simulated")
            .medium(medium)
            .clock(clock.clone())
            .verify(true)
            .open()
            .await;
        // A bit of a page that nothing is in harms nothing.
        if let Ok(store) = opened {
            for number in 0..60 {
                assert!(
                    is_completed(&store, number, &response(number, 1000)).await,
                    "bit {bit}: {number}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_flipped_bit_in_the_journal_that_a_lost_process_left_takes_back_nothing_that_was_acknowledged() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    let store = open(&medium, &clock).await.unwrap();
    for number in 0..10 {
        let lease = acquire(&store, number).await.unwrap();
        store
            .complete(&lease, &response(number, 1000), Retention::Forever)
            .await
            .unwrap();
    }
    // While it is open: what the next opening finds if this process is lost now.
    let whole = medium.bytes();
    let (mut refused, mut harmless) = (0, 0);
    for bit in (4096 * 8..4096 * 8 * 30).step_by(2011) {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        match open(&Failing::with(bytes), &clock).await {
            Err(error) => {
                assert_eq!(error.kind(), FileStoreErrorKind::Damaged, "{error}");
                refused += 1;
            }
            Ok(store) => {
                for number in 0..10 {
                    assert!(
                        is_completed(&store, number, &response(number, 1000)).await,
                        "bit {bit}: {number}"
                    );
                }
                harmless += 1;
            }
        }
    }
    // Entries fill their last block with zeros, and those say nothing.
    assert!(
        refused > 50 && harmless > 100,
        "{refused} were noticed, {harmless} harmless"
    );
}

#[tokio::test]
async fn a_checkpoint_for_which_there_is_no_room_harms_no_change() {
    let (medium, clock) = (Failing::default(), TestClock::new());
    medium.room(12 * MIB);
    medium.without_spare();
    let builder = FileStore::builder("simulated").medium(medium.clone());
    let store = builder.clock(clock.clone()).replay_bytes(0).open().await.unwrap();
    // Of what is there already the journal is a part.
    medium.others_leave(0);
    let running = acquire(&store, 9000).await.unwrap();
    let mut kept = Vec::new();
    let refused = loop {
        let number = kept.len() as u64;
        let lease = match acquire(&store, number).await {
            Ok(lease) => lease,
            Err(error) => break error,
        };
        let answer = response(number, 50_000);
        store.complete(&lease, &answer, Retention::For(DAY)).await.unwrap();
        kept.push(number);
    };
    assert_eq!(refused.kind(), StoreErrorKind::Full, "{}", said(&refused));
    assert!(kept.len() > 40, "it was no checkpoint that failed after {}", kept.len());
    // What is in flight ends: a part of the journal is for that.
    store.renew(&running, DAY).await.unwrap();
    let not_kept = StoredResponse::not_kept(StatusCode::CREATED);
    store.complete(&running, &not_kept, Retention::For(DAY)).await.unwrap();
    for number in &kept {
        assert!(
            is_completed(&store, *number, &response(*number, 50_000)).await,
            "{number}"
        );
    }
    // And a process that is lost now finds all of them.
    let crashed = Failing::with(medium.bytes());
    let store = open(&crashed, &clock).await.unwrap();
    for number in &kept {
        assert!(
            is_completed(&store, *number, &response(*number, 50_000)).await,
            "{number}"
        );
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_new_file_is_for_its_owner_alone() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    // What was left of an earlier try is no store, and in nobody's way.
    std::fs::write(directory.path().join("store.redb.new"), "half of one").unwrap();
    let store = FileStore::open(&path).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o077, 0);
    store.close().await;
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}
