//! Power is lost at any moment: what was acknowledged is there, and nothing is half there.
//!
//! A store works on a medium that records each write. Then power is lost after every one of them: what was synced
//! stays, and of what was written since, any part may be there: nothing, all, some writes, some sectors of some writes.
//! The store is opened on what is left, and sometimes power is lost again while it does that.
//!
//! `POWER_LOSS_POINTS=1000000 cargo test --release --all-features --test file_power_loss` looks at a million moments.
#![cfg(all(feature = "file", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use sha2::{Digest, Sha256};
use support::medium::{Event, Recorded, TestClock};
use tower_idempotency::{
    Begin, Claim, FileStore, FileStoreError, Fingerprint, Lease, Owner, RecordId, Retention, Store, StoredResponse,
};

/// Small numbers from one seed.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }
}

/// What was acknowledged of a record, step by step; each step is one more than the one before.
#[derive(Clone, Debug)]
enum Known {
    Held(Lease),
    Abandoned(Lease),
    Completed(StoredResponse),
    Released,
}

#[derive(Default)]
struct History {
    /// Of each record, in the order of its steps.
    steps: Mutex<BTreeMap<u64, Vec<Known>>>,
    /// Which step of which record an acknowledgement was.
    acknowledged: Mutex<Vec<(u64, usize)>>,
}

fn id(number: u64) -> RecordId {
    RecordId::from_bytes(Sha256::digest(number.to_le_bytes()).into())
}

fn claim(number: u64, retention: Duration) -> Claim {
    let fingerprint = Fingerprint::new(1, Sha256::digest(number.to_be_bytes()).into());
    let owner = Owner::random().unwrap();
    Claim::new(fingerprint, owner, Duration::from_secs(600), Retention::For(retention))
}

fn response(random: &mut Random) -> StoredResponse {
    let length = if random.one_in(8) {
        random.below(20_000)
    } else {
        random.below(1_500)
    };
    let mut bytes = vec![1, 0, 201, 0];
    bytes.extend([0; 8]);
    bytes.extend(length.to_le_bytes());
    bytes.extend((0..length).map(|at| at as u8 ^ random.0 as u8));
    StoredResponse::from_bytes(bytes.into()).unwrap()
}

const DAY: Duration = Duration::from_secs(24 * 3600);
const JOURNAL: u64 = 96 << 10;
const WORKERS: u64 = 6;
const RECORDS_OF_A_WORKER: u64 = 14;

/// With a journal that is full again and again, if the medium is new.
async fn open(medium: Recorded, clock: TestClock) -> Result<FileStore, FileStoreError> {
    let builder = FileStore::builder("simulated").medium(medium).clock(clock);
    builder.cache_bytes(1 << 20).journal_bytes(JOURNAL).open().await
}

/// One worker's records, each through some of its life.
async fn work(store: FileStore, worker: u64, seed: u64, medium: Recorded, history: Arc<History>, clock: TestClock) {
    let random = &mut Random(seed * 31 + worker);
    for number in worker * 1000..worker * 1000 + RECORDS_OF_A_WORKER {
        let know = |known| {
            let step = {
                let mut steps = history.steps.lock().unwrap();
                let steps = steps.entry(number).or_default();
                steps.push(known);
                steps.len()
            };
            let mut acknowledged = history.acknowledged.lock().unwrap();
            acknowledged.push((number, step));
            medium.acknowledge(acknowledged.len() - 1);
        };
        // Some that expire beside it, so that there is always something to purge.
        if random.one_in(2) {
            let passing = 1_000_000 + number;
            if let Begin::Acquired(lease) = store.begin(&id(passing), &claim(passing, DAY)).await.unwrap() {
                let second = Retention::For(Duration::from_secs(1));
                store.complete(&lease, &response(random), second).await.unwrap();
            }
            clock.pass(Duration::from_secs(2));
        }
        let Begin::Acquired(mut lease) = store.begin(&id(number), &claim(number, DAY)).await.unwrap() else {
            panic!("{number} was vacant");
        };
        know(Known::Held(lease));
        if random.one_in(4) {
            store.abandon(&lease).await.unwrap();
            know(Known::Abandoned(lease));
            if random.one_in(2) {
                continue;
            }
            let again = claim(number, DAY).taking_over(lease);
            let Begin::Acquired(second) = store.begin(&id(number), &again).await.unwrap() else {
                panic!("{number} was abandoned");
            };
            lease = second;
            know(Known::Held(lease));
        }
        match random.below(8) {
            0 => {}
            1 => {
                store.release(&lease).await.unwrap();
                know(Known::Released);
            }
            _ => {
                let response = response(random);
                store.complete(&lease, &response, Retention::Forever).await.unwrap();
                know(Known::Completed(response));
            }
        }
    }
}

/// A life of a store: what happened to its medium, and what was said.
async fn live(seed: u64) -> (Vec<u8>, Vec<Event>, Arc<History>, TestClock) {
    let (clock, history) = (TestClock::new(), Arc::new(History::default()));
    // A file without a journal has to keep what it says, too, and one without checksums under its pages.
    let begun = match seed % 8 {
        3 => version_2(&clock).await.split_off(4096 + JOURNAL as usize),
        7 => version_2(&clock).await,
        _ => Vec::new(),
    };
    let medium = Recorded::with(begun.clone());
    let store = open(medium.clone(), clock.clone()).await.unwrap();
    // A file gets its name when this much is done.
    history.acknowledged.lock().unwrap().push((u64::MAX, 0));
    medium.acknowledge(0);
    let workers = (0..WORKERS).map(|worker| {
        tokio::spawn(work(
            store.clone(),
            worker,
            seed,
            medium.clone(),
            Arc::clone(&history),
            clock.clone(),
        ))
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
    store.close().await;
    (begun, medium.events(), history, clock)
}

/// A new file of version 2. What comes after its journal is one of version 1.
async fn version_2(clock: &TestClock) -> Vec<u8> {
    let medium = Recorded::default();
    let builder = FileStore::builder("simulated")
        .medium(medium.clone())
        .clock(clock.clone());
    let store = builder.journal_bytes(JOURNAL).page_checksums(false).open().await;
    store.unwrap().close().await;
    let mut whole = Vec::new();
    medium.events().iter().for_each(|event| event.apply(&mut whole));
    whole
}

/// What a medium with these synced bytes may hold after power is lost in the middle of these writes.
fn lose(synced: &[u8], since: &[Event], random: &mut Random) -> Vec<u8> {
    let mut bytes = synced.to_vec();
    let way = random.below(5);
    // All up to some moment, as if the cache were written in order.
    let in_order = random.below(since.len() as u64 + 1) as usize;
    for (number, event) in since.iter().enumerate() {
        match way {
            0 => {}
            1 => event.apply(&mut bytes),
            2 if number < in_order => event.apply(&mut bytes),
            2 => {}
            3 => {
                if random.one_in(2) {
                    event.apply(&mut bytes);
                }
            }
            _ => {
                if !random.one_in(4) {
                    let torn = random.one_in(2);
                    event.apply_sectors(&mut bytes, |_| !torn || random.one_in(2));
                }
            }
        }
    }
    bytes
}

/// What is wrong with the store that these bytes are opened as.
async fn judge(
    medium: &Recorded,
    known: &BTreeMap<u64, usize>,
    history: &History,
    clock: &TestClock,
) -> Result<(), String> {
    let opened = open(medium.clone(), clock.clone()).await;
    let store = opened.map_err(|error| format!("it does not open: {error}"))?;
    for (number, acknowledged) in known {
        let stranger = claim(0, DAY);
        let found = store.begin(&id(*number), &stranger).await;
        let found = found.map_err(|error| format!("{number} cannot be read: {error}"))?;
        let steps = history.steps.lock().unwrap()[number].clone();
        // What was on its way when power was lost may have arrived.
        let step = |step: usize| match step.checked_sub(1) {
            None => matches!(found, Begin::Acquired(_)),
            Some(index) => steps.get(index).is_some_and(|step| is(&found, step, *number)),
        };
        if !step(*acknowledged) && !step(*acknowledged + 1) {
            return Err(format!("{number} is {found:?} after step {acknowledged} of {steps:?}"));
        }
    }
    Ok(())
}

fn is(found: &Begin, known: &Known, number: u64) -> bool {
    let expected = claim(number, DAY).fingerprint;
    match (found, known) {
        (Begin::Abandoned { fingerprint, lost }, Known::Held(lease) | Known::Abandoned(lease)) => {
            (fingerprint, lost) == (&expected, lease)
        }
        (
            Begin::Completed {
                fingerprint, response, ..
            },
            Known::Completed(kept),
        ) => (fingerprint, response) == (&expected, kept),
        (Begin::Acquired(lease), Known::Released) => lease.fence == 1,
        _ => false,
    }
}

#[derive(Default)]
struct Count {
    points: AtomicUsize,
    during_recovery: AtomicUsize,
    violations: Mutex<Vec<String>>,
}

/// Loses power at up to `points` moments of one life.
async fn lose_power(seed: u64, points: usize, syncs_lie: bool, count: &Count) {
    let (begun, events, history, clock) = live(seed).await;
    let random = &mut Random(seed);
    let each = points.div_ceil(events.len()) + 1;
    let (mut synced, mut since) = (begun, Vec::<Event>::new());
    let mut known = BTreeMap::new();
    let mut recent = Vec::new();
    let mut left = points;
    for event in &events {
        match event {
            Event::Sync if syncs_lie => {}
            Event::Sync => since.drain(..).for_each(|event| event.apply(&mut synced)),
            Event::Acknowledged(what) => {
                let (number, step) = history.acknowledged.lock().unwrap()[*what];
                if step > 0 {
                    known.insert(number, step);
                    recent.push(number);
                }
            }
            other => since.push(other.clone()),
        }
        if known.is_empty() {
            continue;
        }
        for _ in 0..each.min(left) {
            left -= 1;
            // The last ones, which a mistake would lose, and one from any time.
            let mut judged: BTreeMap<_, _> = recent
                .iter()
                .rev()
                .take(6)
                .map(|number| (*number, known[number]))
                .collect();
            let any = recent[random.below(recent.len() as u64) as usize];
            judged.insert(any, known[&any]);
            let left_over = lose(&synced, &since, random);
            let medium = Recorded::with(left_over.clone());
            let mut result = judge(&medium, &judged, &history, &clock).await;
            count.points.fetch_add(1, SeqCst);
            if result.is_ok() && random.one_in(4) {
                result = again(left_over, &medium.events(), &judged, &history, &clock, random).await;
                count.during_recovery.fetch_add(1, SeqCst);
            }
            if let Err(violation) = result {
                count
                    .violations
                    .lock()
                    .unwrap()
                    .push(format!("seed {seed}: {violation}"));
            }
        }
    }
}

/// Power is lost once more while the file is recovered, or just after that.
async fn again(
    left_over: Vec<u8>,
    events: &[Event],
    judged: &BTreeMap<u64, usize>,
    history: &History,
    clock: &TestClock,
    random: &mut Random,
) -> Result<(), String> {
    let until = random.below(events.len() as u64 + 1) as usize;
    let (mut synced, mut since) = (left_over, Vec::new());
    for event in &events[..until] {
        match event {
            Event::Sync => since.drain(..).for_each(|event: Event| event.apply(&mut synced)),
            other => since.push(other.clone()),
        }
    }
    let medium = Recorded::with(lose(&synced, &since, random));
    // Whoever looked after the first recovery acquired what was released by then, and is lost now itself.
    let untouched = |(number, step): &(&u64, &usize)| {
        let steps = history.steps.lock().unwrap();
        let around = steps[number].iter().skip(**step - 1).take(2);
        !around.clone().any(|step| matches!(step, Known::Released))
    };
    let judged = judged
        .iter()
        .filter(untouched)
        .map(|(number, step)| (*number, *step))
        .collect();
    let result = judge(&medium, &judged, history, clock).await;
    result.map_err(|violation| format!("after a second loss: {violation}"))
}

/// On every core, a few thousand moments of one life each.
fn simulate(points: usize, syncs_lie: bool) -> Count {
    let (count, next) = (Count::default(), AtomicUsize::new(0));
    let of_a_life = points.min(2_500);
    let lives = points.div_ceil(of_a_life);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                loop {
                    let life = next.fetch_add(1, SeqCst);
                    if life >= lives {
                        return;
                    }
                    runtime.block_on(lose_power(life as u64 + 1, of_a_life, syncs_lie, &count));
                }
            });
        }
    });
    count
}

#[test]
fn nothing_that_was_acknowledged_is_lost_with_the_power() {
    let points = std::env::var("POWER_LOSS_POINTS").map_or(10_000, |points| points.parse().expect("a number"));
    let count = simulate(points, false);
    let (points, again) = (count.points.into_inner(), count.during_recovery.into_inner());
    println!("power was lost at {points} moments, and again during {again} recoveries");
    let violations = count.violations.into_inner().unwrap();
    assert!(
        violations.is_empty(),
        "{} of {points}, such as\n{}",
        violations.len(),
        violations[0]
    );
    assert!(
        points >= 10_000 && again >= points / 5,
        "too few moments were looked at"
    );
}

/// The simulation is worth something only if it sees what it looks for.
#[test]
fn a_medium_whose_syncs_lie_is_caught() {
    let count = simulate(400, true);
    let violations = count.violations.into_inner().unwrap();
    assert!(
        violations.len() >= 100,
        "only {} of 400 losses were noticed",
        violations.len()
    );
}
