//! Nodes as processes of their own, killed by `kill -9` in the middle of their work. What had an effect is read from
//! their ledger, which is a file beside the store.

use std::{
    collections::HashMap,
    fs::File,
    hash::{DefaultHasher, Hash, Hasher},
    io::{Read, Seek, SeekFrom},
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http::StatusCode;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};

use super::{
    event::{self, Event, Guarantee, History, Key, Reply},
    rules::{self, Rule},
    runner::{folder, operations, seed},
    store::Struck,
    support::{
        demo::Demo,
        dice::Dice,
        http::{Answer, post, send_over},
    },
};

const CLIENTS: u64 = 16;
const PATH: &str = "/payments";

/// What happens to nodes and to what they have in common.
trait Site: Send + 'static {
    const NAME: &'static str;
    const NODES: usize;

    fn store(&self) -> String;

    /// Does something to the server that the nodes share.
    fn strike(&mut self, _: &mut Dice) -> Option<&'static str> {
        None
    }

    /// As if the leases of dead nodes had run out.
    fn pass_leases(&mut self) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// The nodes' ledger, read as it grows.
struct Ledger {
    path: PathBuf,
    read: Mutex<(u64, Vec<u8>)>,
}

impl Ledger {
    /// Tells the history what was written since. Whoever was answered finds the effect there: it is written before.
    fn catch_up(&self, history: &History) {
        let mut read = self.read.lock().unwrap();
        let Ok(mut file) = File::open(&self.path) else { return };
        let (offset, rest) = &mut *read;
        file.seek(SeekFrom::Start(*offset)).expect("it only grows");
        *offset += file.read_to_end(rest).expect("it is a file") as u64;
        let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let lines: Vec<u8> = rest.drain(..whole).collect();
        for line in lines.split(|byte| *byte == b'\n') {
            // A line that was cut by a kill is no effect that was answered.
            let Ok(effect) = serde_json::from_slice::<Value>(line) else {
                continue;
            };
            let number = |name| effect["request"][name].as_u64().expect("it was sent");
            let key = key(number("tenant"), number("number"));
            let (run, fingerprint) = (history.fresh(), number("fingerprint") as u8);
            history.push(Event::Began { run, key, fingerprint });
            let digest = digest(effect["id"].as_str().expect("an id"));
            history.push(Event::Effect { run, digest });
        }
    }
}

fn key(tenant: u64, number: u64) -> Key {
    Key {
        tenant: tenant as u16,
        guarantee: Guarantee::AtMostOnce,
        number: number as u32,
    }
}

fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

struct Shared {
    history: History,
    struck: Struck,
    ledger: Ledger,
    nodes: Mutex<Vec<SocketAddr>>,
    /// The bytes of each answer, by its id: a replay has the same.
    answers: Mutex<HashMap<String, Vec<u8>>>,
    next: AtomicU64,
    over: AtomicBool,
}

/// What goes wrong with one request.
#[derive(Default)]
struct Manner {
    leaves_after: Option<Duration>,
    headers: Vec<(&'static str, String)>,
    panics: bool,
}

impl Shared {
    async fn send(&self, key: Key, fingerprint: u8, node: SocketAddr, manner: Manner) {
        let op = self.history.fresh();
        self.history.push(Event::Invoke { op, key, fingerprint });
        if manner.panics {
            self.history.push(Event::OwnerLost { key });
        }
        let authorization = format!("Basic tenant-{}", key.tenant);
        let number = key.number.to_string();
        let mut headers = vec![("authorization", authorization.as_str()), ("idempotency-key", &number)];
        headers.extend(manner.headers.iter().map(|(name, value)| (*name, value.as_str())));
        let body = json!({"tenant": key.tenant, "number": key.number, "fingerprint": fingerprint});
        let request = post(PATH, &headers, body.to_string());
        let exchange = async {
            let stream = TcpStream::connect(node).await.ok()?;
            send_over(stream, request).await.ok()
        };
        let answer = match manner.leaves_after {
            None => exchange.await,
            Some(after) => timeout(after, exchange).await.unwrap_or_else(|_| {
                self.struck.add("client leaves");
                None
            }),
        };
        self.ledger.catch_up(&self.history);
        let is_lost = answer.is_none();
        self.history.push(match answer {
            Some(answer) => Event::Return {
                op,
                reply: self.understand(key, &answer),
            },
            None => Event::Lost { op },
        });
        if is_lost {
            // Or all requests would be spent on a node that is dead.
            sleep(Duration::from_millis(3)).await;
        }
    }

    fn understand(&self, key: Key, answer: &Answer) -> Reply {
        match answer.status {
            StatusCode::CREATED => {
                let id = answer.json()["id"].as_str().expect("an id").to_owned();
                let mut answers = self.answers.lock().unwrap();
                let first = answers.entry(id.clone()).or_insert_with(|| answer.body.to_vec());
                Reply::Final {
                    replayed: answer.is_replay(),
                    digest: if *first == answer.body {
                        digest(&id)
                    } else {
                        digest("other bytes")
                    },
                    tenant: key.tenant,
                }
            }
            StatusCode::TOO_MANY_REQUESTS => Reply::NotExecuted,
            status if answer.header("content-type") == Some("application/problem+json") => {
                match answer.problem().as_str() {
                    "request-in-progress" => Reply::InProgress,
                    "outcome-unknown" => Reply::Unknown,
                    "idempotency-key-reused" => Reply::Reused,
                    "store-unavailable" => Reply::Unavailable,
                    _ => Reply::Other(status.as_u16()),
                }
            }
            status => Reply::Other(status.as_u16()),
        }
    }
}

async fn work(shared: Arc<Shared>, mut dice: Dice, operations: u64) {
    loop {
        let operation = shared.next.fetch_add(1, Relaxed);
        if operation >= operations {
            return;
        }
        let number = operation / 8 + dice.below(6);
        let mut manner = Manner::default();
        if dice.below(5) == 0 {
            manner.leaves_after = Some(Duration::from_micros(dice.below(15_000)));
        }
        if dice.below(3) == 0 {
            manner.headers.push(("x-demo-delay-ms", dice.below(30).to_string()));
            shared.struck.add("slow handler");
        }
        match dice.below(20) {
            0 => {
                manner.headers.push(("x-demo-panic", "1".to_owned()));
                manner.panics = true;
                shared.struck.add("handler panics");
            }
            1 => manner.headers.push(("x-demo-status", "429".to_owned())),
            _ => {}
        }
        let node = {
            let nodes = shared.nodes.lock().unwrap();
            nodes[dice.below(nodes.len() as u64) as usize]
        };
        let fingerprint = u8::from(dice.below(12) == 0);
        shared
            .send(key(number % 2, number / 2), fingerprint, node, manner)
            .await;
    }
}

async fn prove<S: Site>(mut site: S) {
    // A process costs more than a task: a tenth of what the others do.
    let (seed, operations) = (seed(), operations() / 10);
    let folder_of_ledger = TempDir::new().expect("a folder");
    let ledger = folder_of_ledger.path().join("ledger.jsonl");
    let options = [
        "--store".to_owned(),
        site.store(),
        "--ledger".to_owned(),
        ledger.display().to_string(),
    ];
    let start = move || Demo::start(&options.each_ref().map(String::as_str));
    let mut nodes: Vec<Demo> = (0..S::NODES).map(|_| start()).collect();
    let shared = Arc::new(Shared {
        history: History::default(),
        struck: Struck::default(),
        ledger: Ledger {
            path: ledger,
            read: Mutex::default(),
        },
        nodes: Mutex::new(nodes.iter().map(Demo::address).collect()),
        answers: Mutex::default(),
        next: AtomicU64::new(0),
        over: AtomicBool::new(false),
    });
    let mut dice = Dice::of(seed);
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(work(Arc::clone(&shared), Dice::of(dice.below(1 << 40)), operations));
    }
    let killer = Arc::clone(&shared);
    let killing = spawn_blocking(move || {
        while !killer.over.load(Relaxed) {
            std::thread::sleep(Duration::from_millis(50 + dice.below(250)));
            if dice.below(3) == 0 {
                killer.history.push(Event::Crash);
                if let Some(fault) = site.strike(&mut dice) {
                    killer.struck.add(fault);
                }
                killer.history.push(Event::Crash);
                continue;
            }
            let number = dice.below(nodes.len() as u64) as usize;
            nodes.swap_remove(number).kill();
            killer.struck.add("node killed");
            killer.ledger.catch_up(&killer.history);
            killer.history.push(Event::Crash);
            nodes.push(start());
            *killer.nodes.lock().unwrap() = nodes.iter().map(Demo::address).collect();
        }
        // What is under way comes to its end.
        for node in nodes.drain(..) {
            assert!(node.stop().success());
        }
        (site, start())
    });
    while let Some(client) = clients.join_next().await {
        client.expect("a client ends");
    }
    shared.over.store(true, Relaxed);
    let (mut site, node) = killing.await.expect("it ends");
    site.pass_leases().await;
    shared.ledger.catch_up(&shared.history);
    shared.history.push(Event::Quiet);
    for number in 0..operations / 8 + 6 {
        for fingerprint in [0, 1] {
            let key = key(number % 2, number / 2);
            shared.send(key, fingerprint, node.address(), Manner::default()).await;
        }
    }
    assert_good::<S>(seed, &shared);
}

fn assert_good<S: Site>(seed: u64, shared: &Shared) {
    let events = shared.history.events();
    let broken = rules::check(&events);
    let text: String = broken.iter().map(|violation| format!("{violation}\n")).collect();
    if !broken.is_empty() {
        event::keep(&folder(), &format!("{}-{seed}", S::NAME), &events, &text);
    }
    let rules: Vec<Rule> = broken.iter().map(|violation| violation.rule).collect();
    assert!(
        rules.is_empty(),
        "{}, HISTORY_SEED={seed}: {text}the history is in {:?}",
        S::NAME,
        folder()
    );
    let (census, faults) = (event::census(&events), shared.struck.counts());
    println!(
        "{}, HISTORY_SEED={seed}: {faults:?}\nwhat happened: {census:?}",
        S::NAME
    );
    for fault in ["node killed", "client leaves", "handler panics", "slow handler"] {
        assert!(faults.contains_key(fault), "there was no fault of this kind: {fault}");
    }
    for name in ["replayed", "answered", "in progress", "unknown", "reused"] {
        assert!(census.contains_key(name), "nobody was ever told: {name}");
    }
    assert!(census["lost"] * 20 >= census["invoked"], "hardly a request was lost");
}

#[cfg(feature = "file")]
struct OneFile(TempDir);

#[cfg(feature = "file")]
impl Site for OneFile {
    const NAME: &'static str = "node-with-a-file";
    const NODES: usize = 1;

    fn store(&self) -> String {
        format!("file:{}", self.0.path().join("store.redb").display())
    }
}

#[cfg(feature = "file")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_with_a_file_is_killed_and_every_key_is_a_register_that_is_written_once() {
    prove(OneFile(TempDir::new().expect("a folder"))).await;
}

#[cfg(feature = "redis")]
struct OnRedis(super::support::redis::Redis);

#[cfg(feature = "redis")]
impl Site for OnRedis {
    const NAME: &'static str = "nodes-on-redis";
    const NODES: usize = 2;

    fn store(&self) -> String {
        self.0.url()
    }

    fn strike(&mut self, dice: &mut Dice) -> Option<&'static str> {
        let pause = Duration::from_millis(dice.below(150));
        if dice.below(2) == 0 {
            self.0.pause();
            std::thread::sleep(pause);
            self.0.resume();
            return Some("server paused");
        }
        self.0.kill();
        std::thread::sleep(pause);
        self.0.restart("Ready to accept connections");
        Some("server killed")
    }

    /// What is left of a record's time is the rest of its lease, and then the retention of a day.
    async fn pass_leases(&mut self) {
        let keys: Vec<String> = self.0.ask(&["KEYS", "*"]).await;
        let day = 24 * 60 * 60 * 1000;
        for key in keys {
            let left: i64 = self.0.ask(&["PTTL", &key]).await;
            if left > day {
                self.0.say(&["PEXPIRE", &key, &(day - 1).to_string()]).await;
            }
        }
        sleep(Duration::from_millis(2)).await;
    }
}

#[cfg(feature = "redis")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_on_redis_are_killed_and_every_key_is_a_register_that_is_written_once() {
    prove(OnRedis(super::support::redis::Redis::start(&[]))).await;
}
