//! Rounds: rates are drawn, clients and faults are let loose, and what happened is checked.

use std::{
    collections::BTreeMap,
    future::Future,
    path::Path,
    sync::{
        Arc, Once,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::{task::JoinSet, time::sleep};
use tower_idempotency::{AnyStore, Concurrent, IdempotencyLayer};

use super::{
    app::{App, PANIC, Served},
    client::{Client, Manner},
    event::{self, Event, Guarantee, History, Key},
    rules::{self, Rule},
    store::{CallRates, Struck, Weather, Witness},
    support::dice::Dice,
};

/// A kind of store, and what can be done to it.
pub trait Arena: Sized {
    const NAME: &'static str;
    /// Faults that only this kind has, each of which has to have struck.
    const FAULTS: &'static [&'static str];

    /// An empty store.
    fn open(&mut self) -> impl Future<Output = AnyStore> + Send;

    /// Does something to the store's server, or its file, and makes it good again.
    fn strike(&mut self, dice: &mut Dice, witness: &Witness, history: &History) -> impl Future<Output = ()> + Send;

    /// Records, bytes, and the most bytes that there may be.
    fn stock(&mut self) -> impl Future<Output = (u64, u64, u64)> + Send;
}

/// What all rounds together came to.
#[derive(Default)]
pub struct Summary {
    pub rounds: u64,
    pub operations: u64,
    pub faults: BTreeMap<&'static str, u64>,
    pub census: BTreeMap<&'static str, u64>,
    pub broken: BTreeMap<Rule, u64>,
}

impl Summary {
    /// How many faults there were.
    fn struck(&self) -> u64 {
        self.faults.values().sum()
    }
}

const ROUND: u64 = 2_000;
const CLIENTS: u64 = 48;
const TENANTS: u64 = 3;

/// The faults that every kind of store meets.
const FAULTS: [&str; 12] = [
    "client leaves",
    "client leaves mid body",
    "timeout outside",
    "timeout inside",
    "handler panics",
    "slow handler",
    "not executed",
    "store cut",
    "store paused",
    "store answer lost",
    "store late",
    "store silent",
];

/// The CI's share, or what `HISTORY_OPERATIONS` says.
pub fn operations() -> u64 {
    std::env::var("HISTORY_OPERATIONS").map_or(40_000, |operations| operations.parse().expect("a number"))
}

pub fn seed() -> u64 {
    std::env::var("HISTORY_SEED").map_or_else(
        |_| {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            now.map_or(1, |now| now.as_nanos() as u64 % 1_000_000_000)
        },
        |seed| seed.parse().expect("a number"),
    )
}

/// An eighth of the others' share, for what stands in front of a store that has its own: runs rounds until this has
/// happened often enough meanwhile, and asserts that no rule was broken.
pub async fn run_in_front<A: Arena>(arena: A, fault: &str) {
    const OFTEN: u64 = 5;
    let operations = operations() / 8;
    let struck = |summary: &Summary| summary.faults.get(fault).copied().unwrap_or(0);
    let is_enough = |summary: &Summary| {
        summary.operations >= operations && struck(summary) >= OFTEN || summary.operations >= operations * 4
    };
    let summary = run_until(arena, is_enough).await;
    assert!(struck(&summary) >= OFTEN, "{fault}: only {} times", struck(&summary));
    for name in ["replayed", "in progress"] {
        assert!(summary.census.contains_key(name), "nobody was ever told: {name}");
    }
}

/// Runs rounds until there were enough, and asserts that no rule was broken.
async fn run_until<A: Arena>(mut arena: A, is_enough: impl Fn(&Summary) -> bool) -> Summary {
    let seed = seed();
    let mut summary = Summary::default();
    while !is_enough(&summary) {
        let round_seed = seed + summary.rounds;
        round(&mut arena, round_seed, ROUND, &mut summary).await;
        assert!(
            summary.broken.is_empty(),
            "{}, HISTORY_SEED={round_seed}: broken {:?}; the history is in {}",
            A::NAME,
            summary.broken,
            folder().display()
        );
    }
    println!(
        "{}, HISTORY_SEED={seed}: {} operations in {} rounds, {} faults",
        A::NAME,
        summary.operations,
        summary.rounds,
        summary.struck()
    );
    println!("faults: {:?}", summary.faults);
    println!("what happened: {:?}", summary.census);
    summary
}

/// Runs the CI's share, and asserts that no rule was broken and that everything was tried.
pub async fn prove<A: Arena>(arena: A) {
    let operations = operations();
    let all = || FAULTS.iter().chain(A::FAULTS);
    // How often a fault strikes is drawn anew for each round: some go on until there were enough.
    let is_enough = |summary: &Summary| {
        let enough = summary.struck() * 8 >= operations * 3 && all().all(|fault| summary.faults.contains_key(fault));
        summary.operations >= operations && enough || summary.operations >= operations * 2
    };
    let summary = run_until(arena, is_enough).await;
    for fault in all() {
        assert!(
            summary.faults.contains_key(fault),
            "there was no fault of this kind: {fault}"
        );
    }
    assert!(
        summary.struck() * 8 >= operations * 3,
        "only {} faults",
        summary.struck()
    );
    let happened = |name| summary.census.get(name).copied().unwrap_or(0);
    assert!(happened("lost") * 20 >= summary.operations, "hardly a request was lost");
    for name in [
        "replayed",
        "answered",
        "in progress",
        "unknown",
        "reused",
        "unavailable",
    ] {
        assert!(happened(name) > 0, "nobody was ever told: {name}");
    }
}

pub fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("histories")
}

/// One round; adds to the summary, and keeps a history that broke a rule.
pub async fn round<A: Arena>(arena: &mut A, seed: u64, operations: u64, summary: &mut Summary) {
    hush();
    let mut dice = Dice::of(seed);
    let rates = Rates::draw(seed, &mut dice);
    let (history, struck) = (Arc::new(History::default()), Arc::new(Struck::default()));
    let store = arena.open().await;
    let witness = Arc::new(Witness::new(
        Arc::clone(&history),
        Arc::clone(&struck),
        store,
        dice.below(1 << 40),
    ));
    witness.rates(rates.calls);
    let layer = IdempotencyLayer::new(Arc::clone(&witness))
        .lease(rates.lease)
        .store_timeout(Duration::from_millis(250))
        .retention(Duration::from_secs(24 * 60 * 60))
        .require_key();
    let layer = match rates.waits {
        true => layer
            .on_concurrent(Concurrent::Wait(Duration::from_millis(200)))
            .max_waiters(8),
        false => layer,
    };
    let app = App {
        history: Arc::clone(&history),
        struck: Arc::clone(&struck),
        outside: rates.outside,
        inside: rates.inside,
    };
    let served = Served::start(app.router(&layer)).await;
    let pool = Arc::new(Pool {
        next: AtomicU64::new(0),
        operations,
        own: AtomicU64::new(0),
    });
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let client = Client::new(Arc::clone(&history), Arc::clone(&struck), served.address);
        clients.spawn(work(client, Dice::of(dice.below(1 << 40)), rates, Arc::clone(&pool)));
    }
    let over = Arc::new(AtomicBool::new(false));
    let watch = tokio::spawn(watch(
        Arc::clone(&history),
        Arc::clone(&struck),
        rates.lease,
        Arc::clone(&over),
    ));
    let weather = async {
        while let Some(client) = clients.join_next().await {
            client.expect("a client ends");
        }
        over.store(true, Relaxed);
    };
    tokio::join!(weather, rage(arena, &mut dice, &rates, &witness, &history, &over));
    witness.rates(CallRates::default());
    served.stop().await;
    let drained = layer.drain().within(Duration::from_secs(30)).await;
    drained.expect("what outlived its client ends");
    watch.await.expect("it ends");
    witness.is_up().await;
    history.push(Event::Quiet);
    probe(&app, &layer, pool.keys()).await;
    let (records, bytes, cap) = arena.stock().await;
    history.push(Event::Stock { records, bytes, cap });
    let events = history.events();
    let violations = rules::check(&events);
    if let Some(first) = violations.first() {
        let broken: String = violations.iter().map(|violation| format!("{violation}\n")).collect();
        let path = event::keep(&folder(), &format!("{}-{seed}", A::NAME), &events, &broken);
        println!(
            "{} rules broken, first: {first}; kept in {}",
            violations.len(),
            path.display()
        );
    }
    for violation in &violations {
        *summary.broken.entry(violation.rule).or_default() += 1;
    }
    summary.rounds += 1;
    let census = event::census(&events);
    summary.operations += census.get("invoked").copied().unwrap_or(0);
    add(&mut summary.census, census);
    add(&mut summary.faults, struck.counts());
}

fn add(to: &mut BTreeMap<&'static str, u64>, counts: BTreeMap<&'static str, u64>) {
    for (name, count) in counts {
        *to.entry(name).or_default() += count;
    }
}

/// What is drawn for a round. Rates are in a thousand.
#[derive(Clone, Copy, Debug)]
struct Rates {
    leaves: u64,
    leaves_mid_body: u64,
    slow: u64,
    slower_than_a_lease: u64,
    panics: u64,
    refuses: u64,
    other_fingerprint: u64,
    calls: CallRates,
    lease: Duration,
    waits: bool,
    outside: Duration,
    inside: Duration,
    /// Between two strikes at the store.
    calm_ms: u64,
}

impl Rates {
    /// What decides whether a fault can happen at all goes by turns, so that a few rounds have seen each.
    fn draw(seed: u64, dice: &mut Dice) -> Self {
        let lease = Duration::from_millis([1_000, 2_000][dice.below(2) as usize]);
        Self {
            leaves: 100 + dice.below(300),
            leaves_mid_body: dice.below(60),
            slow: 100 + dice.below(400),
            slower_than_a_lease: dice.below(8),
            panics: 20 + dice.below(150),
            refuses: dice.below(150),
            other_fingerprint: 20 + dice.below(150),
            calls: CallRates {
                refused: dice.below(60),
                answer_lost: dice.below(60),
                late: dice.below(120),
                silent: dice.below(15),
            },
            lease,
            waits: dice.below(2) == 0,
            outside: Duration::from_millis(60 + seed % 3 * 1_500),
            // Handlers that outlive a lease are to be seen, too.
            inside: Duration::from_millis([50, 5_000][(seed % 2) as usize]),
            calm_ms: 300 + dice.below(700),
        }
    }
}

/// Which keys are asked for: many at once for a few, then on to the next.
struct Pool {
    next: AtomicU64,
    operations: u64,
    /// Keys beside those that are drawn.
    own: AtomicU64,
}

/// Requests for one key, on average.
const EACH: u64 = 8;
/// Keys that are asked for at one time.
const AT_ONCE: u64 = 12;

impl Pool {
    fn draw(&self, dice: &mut Dice) -> Option<Key> {
        let operation = self.next.fetch_add(1, Relaxed);
        (operation < self.operations).then(|| Self::key(operation / EACH + dice.below(AT_ONCE)))
    }

    /// A key that nobody has asked for.
    fn own(&self) -> Key {
        Self::key(self.operations / EACH + AT_ONCE + self.own.fetch_add(1, Relaxed))
    }

    /// Numbers are shared by tenants and routes.
    fn key(number: u64) -> Key {
        Key {
            tenant: (number % TENANTS) as u16,
            guarantee: match number / TENANTS % 2 {
                0 => Guarantee::AtMostOnce,
                _ => Guarantee::AtLeastOnce,
            },
            number: (number / TENANTS / 2) as u32,
        }
    }

    fn keys(&self) -> impl Iterator<Item = Key> + use<> {
        (0..self.operations / EACH + AT_ONCE + self.own.load(Relaxed)).map(Self::key)
    }
}

async fn work(mut client: Client, mut dice: Dice, rates: Rates, pool: Arc<Pool>) {
    while let Some(key) = pool.draw(&mut dice) {
        let mut happens = |rate| dice.below(1000) < rate;
        let other = happens(rates.other_fingerprint);
        let mut manner = Manner {
            leaves_mid_body: happens(rates.leaves_mid_body),
            panics_before: happens(rates.panics / 2),
            panics_after: happens(rates.panics / 2),
            refuses: happens(rates.refuses),
            ..Manner::default()
        };
        let (leaves, slow, slower) = (
            happens(rates.leaves),
            happens(rates.slow),
            happens(rates.slower_than_a_lease),
        );
        if leaves {
            manner.leaves_after = Some(Duration::from_micros(dice.below(20_000)));
        }
        if slow {
            manner.before_ms = dice.below(40);
            manner.after_ms = dice.below(40);
        }
        manner.bytes = dice.below(2) * dice.below(3_000);
        if slower {
            outlive_a_lease(&mut client, pool.own(), other.into(), &rates).await;
            continue;
        }
        let reply = client.send(key, other.into(), &manner).await;
        if matches!(reply, Some(event::Reply::Unavailable)) {
            // As its `Retry-After` asks, or all requests would be spent on a store that is away.
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A handler that is renewed, or its lease is over before it ends; and a duplicate that comes just then.
async fn outlive_a_lease(client: &mut Client, key: Key, fingerprint: u8, rates: &Rates) {
    let slow = Manner {
        before_ms: rates.lease.as_millis() as u64 * 4 / 3,
        ..Manner::default()
    };
    let mut rival = client.another();
    let duplicate = async {
        sleep(rates.lease * 7 / 6).await;
        rival.send(key, fingerprint, &Manner::default()).await
    };
    tokio::join!(client.send(key, fingerprint, &slow), duplicate);
}

/// Strikes at the store by turns until the clients are done.
async fn rage<A: Arena>(
    arena: &mut A,
    dice: &mut Dice,
    rates: &Rates,
    witness: &Witness,
    history: &History,
    over: &AtomicBool,
) {
    while !over.load(Relaxed) {
        sleep(Duration::from_millis(dice.below(rates.calm_ms))).await;
        match dice.below(4) {
            0 => witness.make(Weather::Cut),
            1 => witness.make(Weather::Paused),
            _ => arena.strike(dice, witness, history).await,
        }
        sleep(Duration::from_millis(dice.below(80))).await;
        witness.make(Weather::Clear);
    }
}

/// Where this process was not run for so long that leases may have ended, that is as good as a crash.
async fn watch(history: Arc<History>, struck: Arc<Struck>, lease: Duration, over: Arc<AtomicBool>) {
    let tick = Duration::from_millis(20);
    while !over.load(Relaxed) {
        let start = Instant::now();
        sleep(tick).await;
        if start.elapsed() > tick + lease / 4 {
            struck.add("node stands still");
            history.push(Event::Crash);
        }
    }
}

/// Asks for every key once more, with either request, until it is known what became of it.
async fn probe(app: &App, layer: &IdempotencyLayer, keys: impl Iterator<Item = Key>) {
    let calm = App {
        outside: Duration::from_secs(60),
        inside: Duration::from_secs(60),
        ..app.clone()
    };
    let served = Served::start(calm.router(layer)).await;
    let mut probes = JoinSet::new();
    let keys: Vec<Key> = keys.collect();
    for keys in keys.chunks(keys.len() / 8 + 1) {
        let mut client = Client::new(Arc::clone(&app.history), Arc::clone(&app.struck), served.address);
        let keys = keys.to_vec();
        probes.spawn(async move {
            for key in keys {
                for fingerprint in [0, 1] {
                    // A pool may still hold connections that are dead.
                    for _ in 0..50 {
                        let reply = client.send(key, fingerprint, &Manner::default()).await;
                        if reply != Some(event::Reply::Unavailable) {
                            break;
                        }
                    }
                }
            }
        });
    }
    while let Some(probe) = probes.join_next().await {
        probe.expect("a probe ends");
    }
    served.stop().await;
}

/// Panics that are faults say nothing.
fn hush() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.payload().downcast_ref::<String>().map(String::as_str) != Some(PANIC) {
                before(panic);
            }
        }));
    });
}
