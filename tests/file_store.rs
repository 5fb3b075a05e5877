//! The file store: the contract, and what it promises beside it.
#![cfg(all(feature = "file", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    io,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Condvar},
    task::Poll,
    time::Duration,
};

use sha2::{Digest, Sha256};
use support::{
    app::{call, gated, keyed, open, pay, spawn},
    medium::{Failing, TestClock},
    steps::assert_tells_of_a_change,
};
use tempfile::TempDir;
use tokio::{
    sync::Mutex,
    time::{advance, timeout},
};
use tower_idempotency::{
    AnyStore, Begin, Claim, Concurrent, FileRecordState, FileStore, FileStoreErrorKind, Fingerprint, Guarantee,
    IdempotencyLayer, Lease, Owner, RecordId, Retention, Store, StoreError, StoreErrorKind, StoredResponse,
    testing::{self, Medium, Subject},
};

/// One file, on paused time.
struct OneFile {
    store: FileStore,
}

impl Subject for OneFile {
    type Store = FileStore;

    async fn store(&self) -> FileStore {
        self.store.clone()
    }

    async fn pass(&self, time: Duration) {
        advance(time).await;
    }
}

/// A file that is closed and opened again between any two checks.
struct Reopened {
    path: PathBuf,
    open: Mutex<Option<FileStore>>,
}

impl Subject for Reopened {
    type Store = AnyStore;

    async fn store(&self) -> AnyStore {
        let mut open = self.open.lock().await;
        if let Some(before) = open.take() {
            before.close().await;
        }
        let store = FileStore::open(&self.path).await.unwrap();
        *open = Some(store.clone());
        AnyStore::new(store)
    }

    async fn pass(&self, time: Duration) {
        advance(time).await;
    }
}

fn directory() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    (directory, path)
}

#[tokio::test(start_paused = true)]
async fn the_file_store_keeps_the_contract() {
    let (_directory, path) = directory();
    let store = FileStore::open(path).await.unwrap();
    let report = testing::check(&OneFile { store }).await;
    report.assert();
    assert!(report.checks() >= 35, "only {} sentences were checked", report.checks());
}

#[tokio::test(start_paused = true)]
async fn the_file_store_keeps_the_contract_in_a_file_that_was_opened_again() {
    let (_directory, path) = directory();
    let open = Mutex::default();
    testing::check(&Reopened { path, open }).await.assert();
}

#[tokio::test]
async fn a_change_is_told_of() {
    let (_directory, path) = directory();
    assert_tells_of_a_change(&FileStore::open(path).await.unwrap()).await;
}

#[tokio::test]
async fn what_was_just_answered_is_replayed_at_once() {
    let (_directory, path) = directory();
    let store = FileStore::open(&path).await.unwrap();
    assert!(store.is_empty());
    let lease = acquire(&store, 1).await;
    assert!(!store.is_empty());
    store.complete(&lease, &response(4), Retention::For(DAY)).await.unwrap();
    let found = store.begin_at_once(&id(1), &claim());
    assert!(matches!(found, Some(Ok(Begin::Completed { .. }))), "{found:?}");
    let shown = format!("{store:?}");
    assert!(
        shown.contains("FileStore") && shown.contains("failed: false"),
        "{shown}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_file_store_keeps_the_contract_among_threads() {
    let (_directory, path) = directory();
    let store = FileStore::open(path).await.unwrap();
    testing::check_races(&OneFile { store }).await.assert();
}

// ---- what the tests below are made of

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn id(number: u64) -> RecordId {
    RecordId::from_bytes(Sha256::digest(number.to_le_bytes()).into())
}

/// A lease of a minute, remembered for a day.
fn claim() -> Claim {
    let owner = Owner::random().unwrap();
    Claim::new(Fingerprint::new(1, [1; 32]), owner, MINUTE, Retention::For(DAY))
}

async fn acquire(store: &FileStore, number: u64) -> Lease {
    match store.begin(&id(number), &claim()).await.unwrap() {
        Begin::Acquired(lease) => lease,
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

fn response(length: usize) -> StoredResponse {
    let mut bytes = vec![1, 0, 201, 0];
    bytes.extend([0; 8]);
    bytes.extend((length as u64).to_le_bytes());
    bytes.extend(vec![b'x'; length]);
    StoredResponse::from_bytes(bytes.into()).unwrap()
}

async fn complete(store: &FileStore, number: u64, retention: Retention) -> Lease {
    let lease = acquire(store, number).await;
    store.complete(&lease, &response(1000), retention).await.unwrap();
    lease
}

/// A word for what a stranger finds.
async fn state(store: &FileStore, number: u64) -> &'static str {
    match store.begin(&id(number), &claim()).await.unwrap() {
        Begin::Acquired(lease) => {
            store.release(&lease).await.unwrap();
            "vacant"
        }
        Begin::InProgress { .. } => "in progress",
        Begin::Abandoned { .. } => "abandoned",
        Begin::Completed { response: kept, .. } if kept == response(1000) => "completed",
        Begin::Completed { response: kept, .. } if kept == response(5 << 20) => "long",
        other => panic!("{other:?}"),
    }
}

/// A store on a medium and a clock of the test's, which outlive it.
#[derive(Clone)]
struct Machine {
    medium: Failing,
    clock: TestClock,
}

impl Machine {
    fn new() -> Self {
        Self {
            medium: Failing::default(),
            clock: TestClock::new(),
        }
    }

    /// What is left when the process is lost; the store that was open goes on elsewhere, and is of no account.
    fn crash(&self) -> Self {
        Self {
            medium: Failing::with(self.medium.bytes()),
            clock: self.clock.clone(),
        }
    }

    /// Every answer comes from the medium.
    async fn open(&self) -> FileStore {
        let builder = FileStore::builder("simulated")
            .medium(self.medium.clone())
            .clock(self.clock.clone());
        builder.replay_bytes(0).open().await.unwrap()
    }
}

async fn yield_until(done: impl Fn() -> bool) {
    while !done() {
        tokio::task::yield_now().await;
    }
}

// ---- time

#[tokio::test]
async fn a_wall_clock_that_jumps_while_the_store_is_open_changes_nothing() {
    type Jump = fn(Duration) -> Duration;
    let jumps: [Jump; 4] = [
        |wall| wall - HOUR,
        |wall| wall + HOUR,
        |_| Duration::ZERO,
        |wall| wall + DAY * 3650,
    ];
    for jump in jumps {
        let machine = Machine::new();
        let store = machine.open().await;
        acquire(&store, 1).await;
        complete(&store, 2, Retention::For(5 * MINUTE)).await;
        machine.clock.jump(jump);
        machine.clock.pass(MINUTE - Duration::from_secs(1));
        assert_eq!(
            (state(&store, 1).await, state(&store, 2).await),
            ("in progress", "completed")
        );
        machine.clock.pass(Duration::from_secs(1));
        assert_eq!(state(&store, 1).await, "abandoned", "the lease is not immortal");
        machine.clock.pass(4 * MINUTE - Duration::from_secs(1));
        assert_eq!(state(&store, 2).await, "completed");
        machine.clock.pass(Duration::from_secs(1));
        assert_eq!(state(&store, 2).await, "vacant", "nor is the record");
    }
}

#[tokio::test]
async fn a_store_that_is_opened_again_has_lost_no_time_and_won_none_whatever_the_wall_clock_did() {
    type Jump = fn(Duration) -> Duration;
    let jumps: [Jump; 5] = [
        |wall| wall,
        |wall| wall - HOUR,
        |wall| wall + HOUR,
        |_| Duration::ZERO,
        |wall| wall + DAY * 3650,
    ];
    for jump in jumps {
        let machine = Machine::new();
        let store = machine.open().await;
        complete(&store, 1, Retention::For(10 * MINUTE)).await;
        machine.clock.pass(4 * MINUTE);
        store.close().await;
        machine.clock.jump(jump);
        machine.clock.pass(5 * MINUTE);
        let store = machine.open().await;
        machine.clock.pass(MINUTE - Duration::from_secs(1));
        assert_eq!(state(&store, 1).await, "completed");
        machine.clock.pass(Duration::from_secs(1));
        assert_eq!(state(&store, 1).await, "vacant");
    }
}

#[tokio::test]
async fn after_a_restart_of_the_machine_a_wall_clock_may_be_an_hour_off_and_nothing_ends_early_or_never() {
    type Jump = fn(Duration) -> Duration;
    let jumps: [Jump; 4] = [|wall| wall, |wall| wall - HOUR, |wall| wall + HOUR, |_| Duration::ZERO];
    for (tells, jump) in jumps.iter().flat_map(|jump| [(true, jump), (false, jump)]) {
        let machine = Machine::new();
        if !tells {
            machine.clock.without_uptime();
        }
        let store = machine.open().await;
        complete(&store, 1, Retention::For(10 * MINUTE)).await;
        let machine = machine.crash();
        machine.clock.restart();
        machine.clock.jump(jump);
        let store = machine.open().await;
        machine.clock.pass(10 * MINUTE - Duration::from_secs(1));
        assert_eq!(state(&store, 1).await, "completed");
        machine.clock.pass(Duration::from_secs(1));
        assert_eq!(state(&store, 1).await, "vacant");
    }
}

#[tokio::test]
async fn a_machine_that_was_off_for_days_forgets_what_was_due() {
    let machine = Machine::new();
    let store = machine.open().await;
    complete(&store, 1, Retention::For(DAY)).await;
    complete(&store, 2, Retention::For(7 * DAY)).await;
    complete(&store, 3, Retention::Forever).await;
    store.close().await;
    machine.clock.restart();
    machine.clock.jump(|wall| wall + 2 * DAY);
    let store = machine.open().await;
    let found = (state(&store, 1).await, state(&store, 2).await, state(&store, 3).await);
    assert_eq!(found, ("vacant", "completed", "completed"));
}

// ---- restarts

#[tokio::test]
async fn attempts_of_an_earlier_run_are_abandoned_at_once_and_their_owners_may_still_end_them() {
    let machine = Machine::new();
    let store = machine.open().await;
    let forgotten = acquire(&store, 1).await;
    let late = acquire(&store, 2).await;
    let renewed = acquire(&store, 3).await;
    let store = machine.crash().open().await;
    for number in [1, 2, 3] {
        assert_eq!(state(&store, number).await, "abandoned");
    }
    match store.begin(&id(1), &claim().taking_over(forgotten)).await.unwrap() {
        Begin::Acquired(lease) => assert_eq!(lease.fence, 2),
        other => panic!("{other:?}"),
    }
    store
        .complete(&late, &response(1000), Retention::Forever)
        .await
        .unwrap();
    store.renew(&renewed, MINUTE).await.unwrap();
    let found = (state(&store, 1).await, state(&store, 2).await, state(&store, 3).await);
    assert_eq!(found, ("in progress", "completed", "in progress"));
}

#[tokio::test]
async fn after_a_restart_the_first_answer_is_replayed_and_a_lost_attempt_follows_its_guarantee() {
    let (_directory, path) = directory();
    let store = FileStore::open(&path).await.unwrap();
    let control = open();
    let app = pay(&control, IdempotencyLayer::new(store.clone()));
    let first = call(&app, keyed("answered", "a")).await;
    let stuck = gated();
    let slow = pay(&stuck, IdempotencyLayer::new(store.clone()));
    let lost = [spawn(&slow, keyed("once", "a")), spawn(&slow, keyed("again", "a"))];
    stuck.entered().await;
    stuck.entered().await;
    // As a lost process leaves the file: copied while they run.
    let copy = path.with_extension("copy");
    std::fs::copy(&path, &copy).unwrap();
    let store = FileStore::open(&copy).await.unwrap();
    let app = pay(&control, IdempotencyLayer::new(store.clone()));
    let replay = call(&app, keyed("answered", "a")).await;
    assert!(replay.is_replay());
    assert_eq!((replay.status, replay.body), (first.status, first.body));
    assert_eq!(call(&app, keyed("once", "a")).await.problem(), "outcome-unknown");
    let again = IdempotencyLayer::new(store).guarantee(Guarantee::AtLeastOnce);
    let second = call(&pay(&control, again), keyed("again", "a")).await;
    assert!(
        String::from_utf8_lossy(&second.body).contains("attempt 2"),
        "{second:?}"
    );
    assert_eq!(control.runs(), 2);
    lost.iter().for_each(|client| client.abort());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_clients_of_one_key_have_one_effect_and_one_answer() {
    let (_directory, path) = directory();
    let store = FileStore::open(&path).await.unwrap();
    let control = open();
    let layer = IdempotencyLayer::new(store.clone()).on_concurrent(Concurrent::Wait(MINUTE));
    let app = pay(&control, layer);
    let keys: Vec<String> = (0..60).map(|number| format!("key-{number}")).collect();
    let clients = keys
        .iter()
        .flat_map(|key| (0..8).map(|_| (key.clone(), spawn(&app, keyed(key, "a")))));
    let mut bodies = std::collections::BTreeMap::<_, Vec<_>>::new();
    for (key, client) in clients.collect::<Vec<_>>() {
        let answer = client.await.unwrap();
        assert_eq!(answer.status, http::StatusCode::CREATED);
        bodies.entry(key).or_default().push(answer.body);
    }
    assert!(
        bodies
            .values()
            .all(|bodies| bodies.iter().all(|body| *body == bodies[0]))
    );
    assert_eq!((control.runs(), store.len()), (60, 60));
}

#[tokio::test]
async fn a_closed_store_fails_every_call_and_its_file_may_be_opened_again() {
    let (_directory, path) = directory();
    let store = FileStore::open(&path).await.unwrap();
    let clone = store.clone();
    let lease = complete(&store, 1, Retention::Forever).await;
    store.close().await;
    clone.close().await;
    assert_eq!(
        clone.renew(&lease, DAY).await.unwrap_err().kind(),
        StoreErrorKind::Unavailable
    );
    assert_eq!(
        clone.begin(&id(2), &claim()).await.unwrap_err().kind(),
        StoreErrorKind::Unavailable
    );
    let names = std::fs::read_dir(path.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["store.redb"], "nothing is left beside it");
    let again = FileStore::open(&path).await.unwrap();
    assert_eq!(state(&again, 1).await, "completed");
}

#[tokio::test]
async fn a_store_that_nobody_has_any_more_closes_its_file() {
    let (_directory, path) = directory();
    let store = FileStore::open(&path).await.unwrap();
    complete(&store, 1, Retention::Forever).await;
    drop(store);
    let again = loop {
        match FileStore::open(&path).await {
            Ok(store) => break store,
            Err(error) => assert_eq!(error.kind(), FileStoreErrorKind::InUse),
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(state(&again, 1).await, "completed");
}

// ---- who waits for what

#[tokio::test]
async fn no_change_is_answered_before_its_sync() {
    let machine = Machine::new();
    let store = &machine.open().await;
    let mut leases = Vec::new();
    for number in 0..4 {
        leases.push(acquire(store, number).await);
    }
    let (new, stranger, answer) = (id(100), claim(), response(1000));
    let taking_over = stranger.clone().taking_over(leases[3]);
    type Changing<'a> = Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>>;
    let changes: [Changing<'_>; 6] = [
        Box::pin(async { store.begin(&new, &stranger).await.map(drop) }),
        Box::pin(store.complete(&leases[0], &answer, Retention::Forever)),
        Box::pin(store.renew(&leases[1], DAY)),
        Box::pin(store.release(&leases[2])),
        Box::pin(store.abandon(&leases[3])),
        Box::pin(async { store.begin(&leases[3].id, &taking_over).await.map(drop) }),
    ];
    for (number, mut change) in changes.into_iter().enumerate() {
        let before = machine.medium.syncs();
        machine.medium.block_syncs(true);
        assert!(poll_once(&mut change).await.is_none());
        yield_until(|| machine.medium.syncs() > before).await;
        for _ in 0..100 {
            assert!(
                poll_once(&mut change).await.is_none(),
                "change {number} was answered before its sync"
            );
            tokio::task::yield_now().await;
        }
        machine.medium.block_syncs(false);
        change.await.unwrap();
    }
    assert!(matches!(
        store.begin(&new, &claim()).await,
        Ok(Begin::InProgress { .. })
    ));
}

#[tokio::test]
async fn what_changes_nothing_does_not_wait_for_a_sync() {
    let machine = Machine::new();
    let store = machine.open().await;
    complete(&store, 1, Retention::Forever).await;
    let running = acquire(&store, 2).await;
    let ended = acquire(&store, 3).await;
    store.abandon(&ended).await.unwrap();
    let syncs = machine.medium.syncs();
    machine.medium.block_syncs(true);
    let answer = response(1000);
    let mut completing = Box::pin(store.complete(&running, &answer, Retention::Forever));
    assert!(poll_once(&mut completing).await.is_none());
    yield_until(|| machine.medium.syncs() > syncs).await;
    // On this very thread, with the writer in the middle of its sync. (Waiting for it would be for ever.)
    let replayed = timeout(MINUTE, state(&store, 1)).await;
    assert_eq!(replayed.expect("a replay waits for a sync"), "completed");
    assert_eq!(
        state(&store, 2).await,
        "in progress",
        "what is not durable yet is not seen"
    );
    assert_eq!(state(&store, 3).await, "abandoned");
    let stranger = claim();
    let new = id(4);
    let mut beginning = Box::pin(store.begin(&new, &stranger));
    for _ in 0..100 {
        assert!(poll_once(&mut completing).await.is_none() && poll_once(&mut beginning).await.is_none());
        tokio::task::yield_now().await;
    }
    machine.medium.block_syncs(false);
    completing.await.unwrap();
    assert!(matches!(beginning.await.unwrap(), Begin::Acquired(_)));
    assert_eq!(state(&store, 2).await, "completed");
}

#[tokio::test]
async fn what_was_acknowledged_is_seen_while_the_tables_are_behind_and_once_they_are_not() {
    let machine = Machine::new();
    let store = machine.open().await;
    let mut leases = Vec::new();
    for number in 0..6 {
        leases.push(acquire(&store, number).await);
    }
    store
        .complete(&leases[0], &response(1000), Retention::Forever)
        .await
        .unwrap();
    store.abandon(&leases[1]).await.unwrap();
    // Longer than the journal has room for: this one goes into the tables, with all before it.
    for checkpoint in [false, true] {
        if checkpoint {
            store
                .complete(&leases[2], &response(5 << 20), Retention::Forever)
                .await
                .unwrap();
        }
        let stuck = leases[if checkpoint { 5 } else { 4 }];
        let syncs = machine.medium.syncs();
        machine.medium.block_syncs(true);
        let answer = response(10);
        let mut completing = Box::pin(store.complete(&stuck, &answer, Retention::Forever));
        assert!(poll_once(&mut completing).await.is_none());
        yield_until(|| machine.medium.syncs() > syncs).await;
        // The writer is in the middle of its sync, so these are answered by readers.
        let third = if checkpoint { "long" } else { "in progress" };
        for (number, expected) in [(0, "completed"), (1, "abandoned"), (2, third), (3, "in progress")] {
            let found = timeout(MINUTE, state(&store, number)).await;
            assert_eq!(found, Ok(expected), "{number} after a checkpoint: {checkpoint}");
        }
        machine.medium.block_syncs(false);
        completing.await.unwrap();
    }
    store.release(&leases[3]).await.unwrap();
    assert_eq!(state(&store, 3).await, "vacant");
}

/// Holds up the store's readers wherever they read.
#[derive(Clone, Debug, Default)]
struct SlowReaders {
    medium: Failing,
    /// Whether they are held up, and how many are.
    held: Arc<(std::sync::Mutex<(bool, usize)>, Condvar)>,
}

impl SlowReaders {
    fn hold_up(&self, hold: bool) {
        self.held.0.lock().unwrap().0 = hold;
        self.held.1.notify_all();
    }

    fn wait(&self) {
        if std::thread::current().name() == Some("idempotency-read") {
            let mut held = self.held.0.lock().unwrap();
            held.1 += 1;
            held = self.held.1.wait_while(held, |(hold, _)| *hold).unwrap();
            held.1 -= 1;
        }
    }
}

impl Medium for SlowReaders {
    fn len(&self) -> io::Result<u64> {
        self.medium.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.wait();
        self.medium.read(offset, out)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
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
async fn a_checkpoint_in_the_middle_of_a_look_takes_back_nothing_that_was_acknowledged_before_it() {
    let (medium, machine) = (SlowReaders::default(), Machine::new());
    let builder = FileStore::builder("simulated").medium(medium.clone());
    let builder = builder.cache_bytes(0).replay_bytes(0).clock(machine.clock);
    let store = &builder.open().await.unwrap();
    let long = response(5 << 20);
    let mut leases = Vec::new();
    for number in 0..5 {
        leases.push(acquire(store, number).await);
    }
    // The tables that readers see know that 0 is in progress, and the journal that it is completed.
    store.complete(&leases[1], &long, Retention::Forever).await.unwrap();
    store
        .complete(&leases[0], &response(1000), Retention::Forever)
        .await
        .unwrap();
    let syncs = medium.medium.syncs();
    medium.medium.block_syncs(true);
    let answer = response(1000);
    let mut completing = Box::pin(store.complete(&leases[2], &answer, Retention::Forever));
    assert!(poll_once(&mut completing).await.is_none());
    yield_until(|| medium.medium.syncs() > syncs).await;
    // The writer is in the middle of its sync, so a reader looks, and finds the medium slow.
    medium.hold_up(true);
    let looks = [0, 3].map(|number| {
        let store = store.clone();
        tokio::spawn(async move { state(&store, number).await })
    });
    yield_until(|| medium.held.0.lock().unwrap().1 > 0).await;
    medium.medium.block_syncs(false);
    completing.await.unwrap();
    store.complete(&leases[4], &long, Retention::Forever).await.unwrap();
    medium.hold_up(false);
    let [zero, three] = looks;
    assert_eq!(
        (zero.await.unwrap(), three.await.unwrap()),
        ("completed", "in progress")
    );
}

async fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|cx| match std::pin::Pin::new(&mut *future).poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

#[tokio::test]
async fn changes_that_wait_together_share_a_sync() {
    let machine = Machine::new();
    let store = machine.open().await;
    let before = machine.medium.syncs();
    machine.medium.block_syncs(true);
    let works: Vec<_> = (0..200)
        .map(|number| {
            let store = store.clone();
            tokio::spawn(async move { acquire(&store, number).await })
        })
        .collect();
    yield_until(|| machine.medium.syncs() > before).await;
    // All the others have come to their queue when this stranger, who came last, is looked at.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    machine.medium.block_syncs(false);
    for work in works {
        work.await.unwrap();
    }
    let syncs = machine.medium.syncs() - before;
    // The first alone, the others together; a file that grows is synced for that as well.
    assert!(syncs <= 20, "{syncs} syncs for 200 claims");
}

#[tokio::test]
async fn a_claim_that_nobody_waits_for_any_more_is_not_made() {
    let machine = Machine::new();
    let store = machine.open().await;
    complete(&store, 1, Retention::Forever).await;
    let (store, medium) = (&store, &machine.medium);
    let syncs = medium.syncs();
    medium.block_syncs(true);
    let writing = tokio::spawn({
        let store = store.clone();
        async move { acquire(&store, 2).await }
    });
    yield_until(|| medium.syncs() > syncs).await;
    // The writer is in the middle of its sync, and takes these up afterwards.
    let mut left: Vec<_> = (10..20)
        .map(|number| {
            let (store, id, claim) = (store.clone(), id(number), claim());
            Box::pin(async move { store.begin(&id, &claim).await })
        })
        .collect();
    for claim in &mut left {
        assert!(poll_once(claim).await.is_none());
    }
    // By now the readers have handed them on.
    for _ in 0..10 {
        assert_eq!(state(store, 1).await, "completed");
    }
    drop(left);
    medium.block_syncs(false);
    writing.await.unwrap();
    for number in 10..20 {
        assert_eq!(state(store, number).await, "vacant", "{number}");
    }
}

#[tokio::test]
async fn a_claim_whose_future_is_dropped_was_made_wholly_or_not_at_all() {
    let machine = Machine::new();
    let store = machine.open().await;
    for round in 0..20 {
        let numbers = round * 100..round * 100 + 20;
        for number in numbers.clone() {
            let (dropped, id) = (claim(), id(number));
            let mut beginning = Box::pin(store.begin(&id, &dropped));
            let _ = poll_once(&mut beginning).await;
            if number % 3 == 0 {
                tokio::task::yield_now().await;
            }
        }
        for number in numbers {
            let found = state(&store, number).await;
            assert!(["vacant", "in progress"].contains(&found), "{found}");
        }
    }
    complete(&store, 1_000_000, Retention::Forever).await;
}

// ---- the file

#[tokio::test]
async fn a_steady_load_has_a_steady_file() {
    let machine = Machine::new();
    let store = machine.open().await;
    let mut sizes = Vec::new();
    let mut number = 0;
    // A hundred operations an hour, kept for a day, some of them lost.
    for _ in 0..12 {
        for _ in 0..24 {
            for _ in 0..100 {
                number += 1;
                match number % 10 {
                    0 => drop(acquire(&store, number).await),
                    _ => drop(complete(&store, number, Retention::For(DAY)).await),
                }
            }
            machine.clock.pass(HOUR);
        }
        let length = machine.medium.bytes().len();
        sizes.push(length);
    }
    // It grows in steps, and one may come late; a file that keeps what expired would be ten times as long.
    assert!(sizes[11] <= sizes[1] * 2, "the file grows from day to day: {sizes:?}");
    store.close().await;
    // No more than a day of them is in it.
    let (directory, path) = directory();
    std::fs::write(&path, machine.medium.bytes()).unwrap();
    let mut records = 0;
    FileStore::inspect(&path, |_| records += 1).unwrap();
    assert!((2400..2700).contains(&records), "{records} records");
    drop(directory);
}

#[tokio::test]
async fn a_purge_is_done_in_small_parts_by_what_comes_after_it() {
    let machine = Machine::new();
    let store = machine.open().await;
    let works = (0..16).map(|worker| {
        let store = store.clone();
        tokio::spawn(async move {
            for number in 0..250 {
                complete(&store, worker * 1000 + number, Retention::For(HOUR)).await;
            }
        })
    });
    for work in works.collect::<Vec<_>>() {
        work.await.unwrap();
    }
    machine.clock.pass(2 * HOUR);
    assert_eq!(store.len(), 4000);
    for number in 0..400 {
        let before = store.len();
        acquire(&store, 1_000_000 + number).await;
        let purged = before + 1 - store.len();
        assert!(purged <= 16, "one claim paid for the purge of {purged} records");
    }
    assert!(
        store.len() < 800,
        "{} records are left: the old ones went as the new ones came",
        store.len()
    );
}

#[tokio::test]
async fn what_is_kept_for_less_time_than_its_claim_asked_for_is_removed_by_its_own_time() {
    let machine = Machine::new();
    let store = machine.open().await;
    for number in 0..200 {
        // The claim would be remembered for a day.
        complete(&store, number, Retention::For(5 * MINUTE)).await;
    }
    machine.clock.pass(10 * MINUTE);
    for number in 1000..1050 {
        acquire(&store, number).await;
    }
    assert_eq!(store.len(), 50);
}

#[tokio::test]
async fn what_is_renewed_beyond_its_place_in_the_purge_is_not_removed() {
    let machine = Machine::new();
    let store = machine.open().await;
    let mut short = claim();
    short.retention = Retention::For(MINUTE);
    let Begin::Acquired(lease) = store.begin(&id(1), &short).await.unwrap() else {
        panic!("1 was vacant")
    };
    for number in 0..20 {
        machine.clock.pass(MINUTE / 2);
        store.renew(&lease, MINUTE).await.unwrap();
        // Something for the purge to come along with.
        acquire(&store, 100 + number).await;
        assert_eq!(state(&store, 1).await, "in progress");
    }
    machine.clock.pass(2 * MINUTE);
    assert_eq!(state(&store, 1).await, "vacant");
}

#[tokio::test]
async fn opening_a_closed_file_does_not_read_all_of_it() {
    let mut reads = Vec::new();
    for records in [500, 10_000] {
        let machine = Machine::new();
        let store = machine.open().await;
        let works = (0..50).map(|worker| {
            let store = store.clone();
            tokio::spawn(async move {
                for number in 0..records / 50 {
                    complete(&store, worker * 100_000 + number, Retention::Forever).await;
                }
            })
        });
        for work in works.collect::<Vec<_>>() {
            work.await.unwrap();
        }
        store.close().await;
        let before = machine.medium.reads();
        let store = machine.open().await;
        reads.push(machine.medium.reads() - before);
        assert_eq!(state(&store, 100_000).await, "completed");
    }
    assert!(
        reads[1] <= reads[0] + 20,
        "{reads:?} reads for 500 and for 10,000 records"
    );
}

#[tokio::test]
async fn a_crash_is_recovered_from_without_reading_all_of_the_file() {
    let mut reads = Vec::new();
    for records in [500, 10_000] {
        let machine = Machine::new();
        let store = machine.open().await;
        let works = (0..50).map(|worker| {
            let store = store.clone();
            tokio::spawn(async move {
                for number in 0..records / 50 {
                    complete(&store, worker * 100_000 + number, Retention::Forever).await;
                }
            })
        });
        for work in works.collect::<Vec<_>>() {
            work.await.unwrap();
        }
        let crashed = machine.crash();
        let store = crashed.open().await;
        reads.push(crashed.medium.reads());
        for worker in 0..50 {
            assert_eq!(state(&store, worker * 100_000).await, "completed");
            assert_eq!(state(&store, worker * 100_000 + records / 50 - 1).await, "completed");
        }
    }
    // Pages of which the journal has something are read, and those that lead to them.
    assert!(reads[1] < 2000, "{reads:?} reads for 500 and for 10,000 records");
}

/// Of version 2, with one completed record.
async fn version_2(machine: &Machine) -> Vec<u8> {
    let builder = FileStore::builder("simulated").medium(machine.medium.clone());
    let builder = builder.clock(machine.clock.clone()).page_checksums(false);
    let store = builder.open().await.unwrap();
    complete(&store, 1, Retention::Forever).await;
    store.close().await;
    machine.medium.bytes()
}

/// A file of version 1 is the tables alone.
fn without_journal(whole: &[u8]) -> Vec<u8> {
    let journal = u64::from_le_bytes(whole[22..30].try_into().unwrap());
    whole[4096 + journal as usize..].to_vec()
}

#[tokio::test]
async fn a_file_of_version_1_is_used_as_it_is() {
    let machine = Machine::new();
    let whole = version_2(&machine).await;
    an_old_file_is_used_as_it_is(without_journal(&whole), b"redb", machine.clock).await;
}

#[tokio::test]
async fn a_file_of_version_2_is_used_as_it_is() {
    let machine = Machine::new();
    let whole = version_2(&machine).await;
    an_old_file_is_used_as_it_is(whole, b"tower-idempotency\x02", machine.clock).await;
}

async fn an_old_file_is_used_as_it_is(bytes: Vec<u8>, begins: &[u8], clock: TestClock) {
    let old = Machine {
        medium: Failing::with(bytes),
        clock,
    };
    let store = old.open().await;
    assert_eq!(state(&store, 1).await, "completed");
    complete(&store, 2, Retention::Forever).await;
    let lease = acquire(&store, 3).await;
    let crashed = old.crash();
    store.close().await;
    for old in [crashed, old] {
        let store = old.open().await;
        let found = (state(&store, 1).await, state(&store, 2).await, state(&store, 3).await);
        assert_eq!(found, ("completed", "completed", "abandoned"));
        store.release(&lease).await.unwrap();
        store.close().await;
        assert!(old.medium.bytes().starts_with(begins), "it stays what it is");
    }
}

#[tokio::test]
async fn an_answer_that_is_longer_than_the_journal_is_kept_all_the_same() {
    let machine = Machine::new();
    let store = machine.open().await;
    let long = response(5 << 20);
    let mut leases = Vec::new();
    for number in 0..3 {
        leases.push(acquire(&store, number).await);
    }
    store.complete(&leases[0], &long, Retention::Forever).await.unwrap();
    store
        .complete(&leases[1], &response(1000), Retention::Forever)
        .await
        .unwrap();
    let store = machine.crash().open().await;
    match store.begin(&id(0), &claim()).await.unwrap() {
        Begin::Completed { response, .. } => assert_eq!(response, long),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        (state(&store, 1).await, state(&store, 2).await),
        ("completed", "abandoned")
    );
}

#[tokio::test]
async fn what_a_lost_process_left_is_inspected_too_and_opens_afterwards() {
    let (_directory, path) = directory();
    let store = FileStore::open(&path).await.unwrap();
    for number in 0..20 {
        complete(&store, number, Retention::Forever).await;
    }
    let copy = path.with_extension("copy");
    std::fs::copy(&path, &copy).unwrap();
    for _ in 0..2 {
        let mut records = 0;
        FileStore::inspect(&copy, |_| records += 1).unwrap();
        assert_eq!(records, 20);
    }
    let store = FileStore::open(&copy).await.unwrap();
    for number in 0..20 {
        assert_eq!(state(&store, number).await, "completed");
    }
}

#[tokio::test]
async fn how_many_records_there_are_is_known_from_the_opening_on() {
    let machine = Machine::new();
    let store = machine.open().await;
    assert_eq!((store.len(), store.is_empty()), (0, true));
    for number in 0..3 {
        complete(&store, number, Retention::Forever).await;
    }
    assert_eq!((store.len(), store.is_empty()), (3, false));
    store.close().await;
    assert_eq!(machine.open().await.len(), 3);
}

#[tokio::test]
async fn a_file_is_inspected_by_state() {
    let (_directory, path) = directory();
    let missing = FileStore::inspect(&path, |_| ()).unwrap_err();
    assert_eq!(missing.kind(), FileStoreErrorKind::NotAccessible);
    assert!(!path.exists(), "it is not made");
    let store = FileStore::open(&path).await.unwrap();
    complete(&store, 1, Retention::Forever).await;
    let lease = acquire(&store, 2).await;
    let not_kept = StoredResponse::not_kept(http::StatusCode::ACCEPTED);
    store.complete(&lease, &not_kept, Retention::For(DAY)).await.unwrap();
    acquire(&store, 3).await;
    assert_eq!(
        FileStore::inspect(&path, |_| ()).unwrap_err().kind(),
        FileStoreErrorKind::InUse
    );
    store.close().await;
    let mut found = std::collections::BTreeMap::new();
    FileStore::inspect(&path, |record| found.extend([(record.id, record)])).unwrap();
    let states = [1, 2, 3].map(|number| (found[&id(number)].state, found[&id(number)].expires_in.is_some()));
    let completed = |status, kept| FileRecordState::Completed { status, kept };
    assert_eq!(states[0], (completed(http::StatusCode::CREATED, true), false));
    assert_eq!(states[1], (completed(http::StatusCode::ACCEPTED, false), true));
    assert_eq!(states[2], (FileRecordState::Abandoned, true));
    assert!(found[&id(1)].bytes > 1000);
    assert_eq!(found.len(), 3);
}
