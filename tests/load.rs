//! Many keys, many waiters, a long day. `LOAD=full cargo test --release --all-features --test load -- --nocapture` takes
//! the numbers of docs/reliability.md; without it a twentieth of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    env, fs,
    process::Command,
    time::{Duration, Instant},
};

use axum::{Router, response::IntoResponse};
use bytes::Bytes;
use futures_util::future::join_all;
use http::StatusCode;
use http_body_util::Full;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use support::{
    app::{answering, call, gated, keyed, open, pay, spawn},
    dice::Dice,
    http::{Answer, post, read},
    serve::serve,
};
use tokio::net::TcpStream;
use tower_idempotency::{
    Begin, Claim, Concurrent, Fingerprint, IdempotencyLayer, MemoryStore, Owner, RecordId, Retention, Store,
    StoreErrorKind, StoredResponse,
};

fn is_full() -> bool {
    env::var("LOAD").is_ok_and(|load| load == "full")
}

fn share(of: u64) -> u64 {
    if is_full() { of } else { of / 20 }
}

/// Of this process, in bytes; Linux only, nothing elsewhere.
fn resident() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|pages| pages.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

/// Whether this is a process with nothing but this test in it, so that its memory is all that is resident. Otherwise the
/// test has run in one when this returns.
fn is_alone(test: &str) -> bool {
    const ALONE: &str = "RUN_ALONE";
    if env::var_os(ALONE).is_some() {
        return true;
    }
    let mut command = Command::new(env::current_exe().unwrap());
    let output = command
        .args(["--exact", test, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    said.lines()
        .filter(|line| line.contains("resident"))
        .for_each(|line| println!("{line}"));
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("1 passed"), "{said}");
    false
}

fn random_id(dice: &mut Dice) -> RecordId {
    let mut bytes = [0; 32];
    bytes
        .chunks_exact_mut(4)
        .for_each(|chunk| chunk.copy_from_slice(&(dice.below(1 << 32) as u32).to_le_bytes()));
    RecordId::from_bytes(bytes)
}

fn claim(retention: Retention) -> Claim {
    let fingerprint = Fingerprint::new(1, [0; 32]);
    Claim::new(
        fingerprint,
        Owner::random().unwrap(),
        Duration::from_secs(60),
        retention,
    )
}

#[tokio::test]
async fn random_keys_stay_within_the_budget_and_live_claims_are_kept() {
    if !is_alone("random_keys_stay_within_the_budget_and_live_claims_are_kept") {
        return;
    }
    let (keys, budget) = (share(10_000_000), share(400 << 20));
    let store = MemoryStore::builder().max_bytes(budget).build();
    let (mut dice, before) = (Dice::of(7), resident());
    let live: Vec<_> = (0..1_000)
        .map(|_| (random_id(&mut dice), claim(Retention::Forever)))
        .collect();
    for (id, claim) in &live {
        assert!(matches!(store.begin(id, claim).await, Ok(Begin::Acquired(_))));
    }
    let mut refused = 0;
    for _ in 0..keys {
        match store.begin(&random_id(&mut dice), &claim(Retention::Forever)).await {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), StoreErrorKind::Full);
                refused += 1;
            }
        }
        assert!(store.bytes() <= budget);
    }
    assert!(refused > 0, "there was room for all of them");
    for (id, claim) in &live {
        assert!(
            matches!(store.begin(id, claim).await, Ok(Begin::Acquired(_))),
            "it is still its owner's"
        );
    }
    let grown = resident().saturating_sub(before);
    println!(
        "{keys} random keys: {} held, {refused} refused, {} MiB resident for a budget of {} MiB",
        store.len(),
        grown >> 20,
        budget >> 20
    );
    // The budget's own count is near to what it takes.
    assert!(grown < budget * 3 / 2, "{grown} bytes for a budget of {budget}");
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_waiters_on_one_key_get_one_answer() {
    const WAITERS: usize = 10_000;
    let control = gated();
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .on_concurrent(Concurrent::Wait(Duration::from_secs(3600)))
        .max_waiters(WAITERS);
    let app = pay(&control, layer.clone());
    let first = spawn(&app, keyed("k", "a"));
    control.entered().await;
    let waiters: Vec<_> = (0..WAITERS).map(|_| spawn(&app, keyed("k", "a"))).collect();
    while layer.counters().waited < WAITERS as u64 {
        tokio::task::yield_now().await;
    }
    let one_more = call(&app, keyed("k", "a")).await;
    assert_eq!(
        (one_more.status, one_more.problem()),
        (StatusCode::CONFLICT, "request-in-progress".to_owned())
    );
    let start = Instant::now();
    control.let_go();
    let body = first.await.unwrap().body;
    for answer in join_all(waiters).await {
        let answer = answer.unwrap();
        assert!(answer.is_replay() && answer.body == body);
    }
    println!("{WAITERS} waiters were answered within {:?}", start.elapsed());
    assert_eq!(control.runs(), 1);
}

#[tokio::test]
async fn a_million_keys_resident_are_looked_up_like_a_thousand() {
    let keys = share(1_000_000);
    let store = MemoryStore::new();
    let (mut dice, mut ids) = (Dice::of(11), Vec::new());
    let fact = StoredResponse::not_kept(StatusCode::CREATED);
    let mut fill = async |ids: &mut Vec<RecordId>, up_to: u64| {
        while (ids.len() as u64) < up_to {
            let id = random_id(&mut dice);
            let Ok(Begin::Acquired(lease)) = store.begin(&id, &claim(Retention::Forever)).await else {
                panic!("it is vacant");
            };
            store.complete(&lease, &fact, Retention::Forever).await.unwrap();
            ids.push(id);
        }
    };
    let look = async |ids: &[RecordId]| {
        let claim = claim(Retention::Forever);
        let start = cpu_time::ThreadTime::now();
        for number in 0..100_000_usize {
            let id = &ids[number * 7919 % ids.len()];
            assert!(matches!(store.begin(id, &claim).await, Ok(Begin::Completed { .. })));
        }
        start.elapsed() / 100_000
    };
    fill(&mut ids, 1_000).await;
    let few = look(&ids).await;
    fill(&mut ids, keys).await;
    let many = look(&ids).await;
    println!(
        "a look-up takes {few:?} among 1000 keys and {many:?} among {keys}, in {} MiB",
        resident() >> 20
    );
    assert_eq!(store.len(), keys);
}

/// An application, and a connection to it.
struct Served {
    app: Router,
    keys: usize,
    sender: SendRequest<Full<Bytes>>,
    firsts: Vec<Duration>,
    replays: Vec<Duration>,
}

impl Served {
    async fn with(keys: usize) -> Self {
        let layer = IdempotencyLayer::new(MemoryStore::new());
        let app = answering(&open(), layer, |_, _, body| match &body[..] {
            b"not now" => StatusCode::SERVICE_UNAVAILABLE.into_response(),
            _ => (StatusCode::CREATED, body).into_response(),
        });
        for number in 0..keys {
            assert!(!call(&app, keyed(&format!("resident-{number}"), "a")).await.is_replay());
        }
        let stream = TcpStream::connect(serve(app.clone()).await).await.unwrap();
        let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self {
            app,
            keys,
            sender,
            firsts: Vec::new(),
            replays: Vec::new(),
        }
    }

    async fn ask(&mut self, key: &str, body: &'static str) -> (Answer, Duration) {
        let request = post("/pay", &[("idempotency-key", key)], body);
        let start = Instant::now();
        let response = self.sender.send_request(request).await.unwrap();
        let answer = read(response).await.unwrap();
        (answer, start.elapsed())
    }

    /// So many replays, spread over all keys, and as many first requests, in turn, whose keys are free again afterwards.
    async fn round(&mut self, round: usize, requests: usize) {
        for number in round * requests..(round + 1) * requests {
            let (answer, took) = self.ask(&format!("resident-{}", number * 7919 % self.keys), "a").await;
            assert!(answer.is_replay());
            self.replays.push(took);
            let (answer, took) = self.ask(&format!("new-{number}"), "not now").await;
            assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
            self.firsts.push(took);
        }
    }
}

/// In the middle, and of one in a hundred.
fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: usize| times[times.len() * share / 100];
    format!("{:?} (99th percentile {:?})", at(50), at(99))
}

#[tokio::test]
async fn a_million_keys_resident_are_served_like_a_thousand() {
    let (rounds, requests) = if is_full() { (40, 1_000) } else { (4, 100) };
    let keys = share(1_000_000) as usize;
    let mut servers = [Served::with(1_000).await, Served::with(keys).await];
    for round in 0..rounds {
        for served in &mut servers {
            served.round(round, requests).await;
        }
    }
    for served in servers {
        println!(
            "among {} keys a replay over a connection takes {}, a first request {}",
            served.keys,
            percentiles(served.replays),
            percentiles(served.firsts),
        );
        // Whoever was served first still is.
        assert!(call(&served.app, keyed("resident-0", "a")).await.is_replay());
    }
}

/// What expired is gone, and what is kept is replayed.
#[tokio::test(start_paused = true)]
async fn a_day_of_traffic_leaves_what_is_kept_and_nothing_else() {
    // Twenty requests a second, or one in four.
    let (each_time, pause) = if is_full() { (20, 1) } else { (1, 4) };
    let store = MemoryStore::new();
    let hour = Duration::from_secs(60 * 60);
    let layer = IdempotencyLayer::new(store.clone()).retention(hour);
    let control = open();
    let app = pay(&control, layer);
    let (mut number, mut most) = (0_u64, 0);
    for _ in 0..24 * 60 * 60 / pause {
        for _ in 0..each_time {
            number += 1;
            let answer = call(&app, keyed(&number.to_string(), "a")).await;
            assert_eq!((answer.status, answer.is_replay()), (StatusCode::CREATED, false));
        }
        if number > 100 && number.is_multiple_of(97) {
            let earlier = (number - 50).to_string();
            assert!(call(&app, keyed(&earlier, "a")).await.is_replay());
        }
        most = most.max(store.len());
        tokio::time::advance(Duration::from_secs(pause)).await;
    }
    let kept = 60 * 60 / pause * each_time;
    println!("{number} operations in a day: at most {most} records at a time, {kept} of an hour");
    assert_eq!(control.runs() as u64, number);
    assert!((kept..kept * 5 / 4).contains(&most), "{most} records for {kept}");
}
