//! Transfers between accounts through whatever may happen: duplicates, clients that leave, panics, nodes that are killed,
//! backends that are terminated, servers that crash, and a network that breaks at the COMMIT. No money appears or
//! vanishes, each operation happens once, and each answer that was given is given again.
//!
//! `MONEY_TRANSFERS` says how many, `MONEY_SEED` repeats a run.
#![cfg(feature = "sqlx")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    http::HeaderMap,
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::json;
use support::{
    bank::{self, ACCOUNTS, AnyTransaction, BALANCE, Library},
    commit_proxy::{CommitProxy, Cut},
    dice::Dice,
    http::Answer,
    postgres::{self, Postgres},
};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower_idempotency::{Counters, Guarantee, IdempotencyLayer};

/// How many clients work at the same time.
const CLIENTS: u64 = 16;
/// So long after the last progress nothing will come any more.
const STUCK: Duration = Duration::from_secs(120);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |number| number.parse().expect("a number"))
}

#[derive(Deserialize)]
struct Transfer {
    key: String,
    from: i64,
    to: i64,
    amount: i64,
}

/// Both halves and the entry in the books; what is not covered is declined after it was written.
async fn transfer(headers: HeaderMap, mut transaction: AnyTransaction, Json(order): Json<Transfer>) -> Response {
    let Transfer { key, from, to, amount } = order;
    let (first, second) = if from < to {
        (-amount, amount)
    } else {
        (amount, -amount)
    };
    let (low, high) = (from.min(to), from.max(to));
    let halves = [(low, first), (high, second)]
        .map(|(account, change)| format!("UPDATE accounts SET balance = balance + {change} WHERE id = {account}"));
    let entry = format!("INSERT INTO transfers (reference, amount) VALUES ('{key}', {amount})");
    let covered = format!("SELECT 1 / (balance >= 0)::int FROM accounts WHERE id = {from}");
    for sql in [&halves[0], &entry] {
        if transaction.run(sql).await.is_err() {
            return StatusCode::SERVICE_UNAVAILABLE.into_response();
        }
    }
    assert!(!headers.contains_key("x-panic"), "asked for");
    if transaction.run(&halves[1]).await.is_err() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    match transaction.run(&covered).await {
        Ok(()) => (StatusCode::CREATED, Json(json!({ "done": key, "nonce": nonce() }))).into_response(),
        Err(error) if error.contains("division by zero") => (
            StatusCode::PAYMENT_REQUIRED,
            Json(json!({ "declined": key, "nonce": nonce() })),
        )
            .into_response(),
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

/// Two runs of one operation never answer alike.
fn nonce() -> String {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("randomness");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A process, but for its memory: all of its tasks end where they are when it is killed.
struct Node {
    runtime: Option<Runtime>,
    library: Library,
    layer: IdempotencyLayer,
}

impl Node {
    fn start(library: Library, url: &str) -> (Self, SocketAddr) {
        let runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = { runtime }.worker_threads(1).enable_all().build().expect("a runtime");
        let url = url.to_owned();
        let (send, receive) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            // The server may be down at this moment.
            let store = loop {
                let pool = postgres::pool(&url, 8);
                match tower_idempotency::PostgresStore::builder().connect_pool(pool).await {
                    Ok(store) => break store,
                    Err(_) => sleep(Duration::from_millis(20)).await,
                }
            };
            let store = match library {
                Library::TokioPostgres => store,
                Library::Sqlx => store.with_sqlx(bank::sqlx_pool(&url, 8)),
            };
            let layer = IdempotencyLayer::new(store)
                .guarantee(Guarantee::Transactional)
                .require_key();
            let app = Router::new().route("/", post(transfer)).layer(layer.clone());
            let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
            let address = listener.local_addr().expect("it is bound");
            send.send((layer, address)).expect("somebody waits");
            axum::serve(listener, app).await.expect("it serves");
        });
        let (layer, address) = receive.recv().expect("a node");
        let node = Self {
            runtime: Some(runtime),
            library,
            layer,
        };
        (node, address)
    }

    fn kill(mut self) -> Counters {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        self.layer.counters()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// What happened, so that a run in which nothing did is no proof.
#[derive(Debug, Default)]
struct Seen {
    answers: AtomicUsize,
    replays: AtomicUsize,
    conflicts: AtomicUsize,
    rolled_back: AtomicUsize,
    unavailable: AtomicUsize,
    lost: AtomicUsize,
    declined: AtomicUsize,
}

struct World {
    nodes: Mutex<Vec<SocketAddr>>,
    next: AtomicUsize,
    seen: Seen,
}

async fn ask(address: SocketAddr, body: &str, key: &str, panic: bool) -> Option<Answer> {
    let stream = TcpStream::connect(address).await.ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    let driver = tokio::spawn(connection);
    let mut request = Request::post("/")
        .header("host", "bank")
        .header("content-type", "application/json")
        .header("idempotency-key", key);
    if panic {
        request = request.header("x-panic", "1");
    }
    let request = request
        .body(Full::new(Bytes::from(body.to_owned())))
        .expect("a request");
    let answer = async {
        let (parts, body) = sender.send_request(request).await.ok()?.into_parts();
        let body = body.collect().await.ok()?;
        Some(Answer {
            status: parts.status,
            headers: parts.headers,
            trailers: None,
            body: body.to_bytes(),
        })
    }
    .await;
    driver.abort();
    answer
}

impl World {
    fn node(&self, dice: &mut Dice) -> SocketAddr {
        let nodes = self.nodes.lock().unwrap();
        nodes[dice.below(nodes.len() as u64) as usize]
    }

    /// One request, and what it says if it is final.
    async fn once(&self, dice: &mut Dice, key: &str, body: &str) -> Option<(StatusCode, Bytes)> {
        let panic = dice.below(40) == 0;
        let patience = match dice.below(12) {
            0 => Duration::from_micros(dice.below(4000)),
            _ => Duration::from_secs(20),
        };
        let asked = timeout(patience, ask(self.node(dice), body, key, panic));
        let Ok(Some(answer)) = asked.await else {
            self.seen.lost.fetch_add(1, SeqCst);
            return None;
        };
        if answer.is_replay() {
            self.seen.replays.fetch_add(1, SeqCst);
        }
        match answer.status.as_u16() {
            201 | 402 => return Some((answer.status, answer.body)),
            409 => {
                assert_eq!(answer.problem(), "request-in-progress", "{key} {answer:?}");
                &self.seen.conflicts
            }
            503 if answer.body.is_empty() => &self.seen.unavailable,
            503 => match &*answer.problem() {
                "transaction-rolled-back" => &self.seen.rolled_back,
                "store-unavailable" => &self.seen.unavailable,
                other => panic!("{key}: {other}"),
            },
            _ => panic!("{key}: {answer:?}"),
        }
        .fetch_add(1, SeqCst);
        None
    }

    /// Sends it until it is answered, sometimes twice at a time, and gives that answer.
    async fn insist(&self, dice: &mut Dice, key: &str, body: &str) -> (StatusCode, Bytes) {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < STUCK, "{key} is never answered: {:?}", self.seen);
            let answer = if dice.below(4) == 0 {
                let mut other = Dice::of(dice.below(u64::MAX));
                let (one, two) = tokio::join!(self.once(dice, key, body), self.once(&mut other, key, body));
                if let (Some(one), Some(two)) = (&one, &two) {
                    assert_eq!(one, two, "{key} has two answers");
                }
                one.or(two)
            } else {
                self.once(dice, key, body).await
            };
            if let Some(answer) = answer {
                return answer;
            }
            sleep(Duration::from_millis(2)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_is_conserved_each_operation_happens_once_and_each_answer_is_replayed() {
    let transfers = number("MONEY_TRANSFERS", 4000);
    let seed = number("MONEY_SEED", u64::from(std::process::id()));
    println!("MONEY_TRANSFERS={transfers} MONEY_SEED={seed}");
    let mut server = Postgres::start(&["max_connections=60"]);
    bank::create_tables(&server.pool(1)).await;
    let proxy = CommitProxy::before(server.port()).await;
    let mut cuts = Dice::of(seed ^ 1);
    proxy.cut_by(move || match cuts.below(150) {
        0 => Some(Cut::Before),
        1 => Some(Cut::During),
        2 => Some(Cut::After),
        _ => None,
    });
    let url = postgres::url(proxy.port());
    let start = |library| Node::start(library, &url);
    let (one, two) = tokio::task::block_in_place(|| (start(Library::TokioPostgres), start(Library::Sqlx)));
    let mut nodes = [one.0, two.0];
    let world = Arc::new(World {
        nodes: Mutex::new(vec![one.1, two.1]),
        next: AtomicUsize::default(),
        seen: Seen::default(),
    });

    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let world = Arc::clone(&world);
        clients.spawn(async move {
            let mut dice = Dice::of(seed.wrapping_add(client) ^ 0xc0ffee);
            let mut answers = Vec::new();
            loop {
                let number = world.next.fetch_add(1, SeqCst) as u64;
                if number >= transfers {
                    return answers;
                }
                let from = 1 + dice.below(ACCOUNTS as u64);
                let to = 1 + (from + dice.below(ACCOUNTS as u64 - 1)) % ACCOUNTS as u64;
                let amount = 20 + dice.below(400);
                let key = format!("op-{number}");
                let body = json!({ "key": key, "from": from, "to": to, "amount": amount }).to_string();
                let (status, answer) = world.insist(&mut dice, &key, &body).await;
                world.seen.answers.fetch_add(1, SeqCst);
                if status == StatusCode::PAYMENT_REQUIRED {
                    world.seen.declined.fetch_add(1, SeqCst);
                }
                answers.push((key, body, status, answer));
            }
        });
    }

    // What goes wrong, each time that so much has been done.
    let mut dice = Dice::of(seed ^ 2);
    let (mut terminated, mut crashed, mut killed, mut executed) = (0, 0, 0, 0);
    let step = (transfers / 40).max(50);
    let mut next_fault = step;
    let mut answers = Vec::new();
    let mut last = (0, Instant::now());
    while (world.seen.answers.load(SeqCst) as u64) < transfers {
        let done = world.seen.answers.load(SeqCst) as u64;
        if done > last.0 {
            last = (done, Instant::now());
        }
        assert!(last.1.elapsed() < STUCK, "nothing happens any more: {:?}", world.seen);
        if done < next_fault {
            sleep(Duration::from_millis(5)).await;
            // Whoever panicked has a reason.
            while let Some(ended) = clients.try_join_next() {
                answers.extend(ended.expect("a client that is content"));
            }
            continue;
        }
        next_fault += step;
        match dice.below(3) {
            0 => {
                let everybody = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() \
                                 AND backend_type = 'client backend'";
                server.say(everybody).await;
                terminated += 1;
            }
            1 => {
                tokio::task::block_in_place(|| {
                    server.kill();
                    server.restart();
                });
                crashed += 1;
            }
            _ => {
                let which = dice.below(2) as usize;
                let library = nodes[which].library;
                let (node, address) = tokio::task::block_in_place(|| start(library));
                world.nodes.lock().unwrap()[which] = address;
                executed += std::mem::replace(&mut nodes[which], node).kill().executed;
                killed += 1;
            }
        }
    }
    answers.extend(clients.join_all().await.into_iter().flatten());
    proxy.cut_by(|| None);
    executed += nodes.iter().map(|node| node.layer.counters().executed).sum::<u64>();

    // Everything is well again: each answer is there, byte for byte, on either node.
    for (key, body, status, answer) in &answers {
        let again = loop {
            let again = ask(world.node(&mut dice), body, key, false).await.expect("an answer");
            if again.status != StatusCode::CONFLICT && again.status != StatusCode::SERVICE_UNAVAILABLE {
                break again;
            }
        };
        assert!(again.is_replay(), "{key} ran again: {again:?}");
        assert_eq!((&again.status, &again.body), (status, answer), "{key}");
    }
    let seen = &world.seen;
    println!(
        "{seen:?}, {executed} runs, {} commits cut, {terminated} times terminated, {crashed} crashes, {killed} nodes killed",
        proxy.cuts()
    );
    assert_eq!(answers.len() as u64, transfers);

    let client = server.client().await;
    let sum: i64 = client
        .query_one("SELECT sum(balance)::bigint FROM accounts", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(sum, ACCOUNTS * BALANCE, "money is conserved");
    let twice = "SELECT reference FROM transfers GROUP BY reference HAVING count(*) > 1";
    assert!(
        client.query(twice, &[]).await.unwrap().is_empty(),
        "something happened twice"
    );
    let rows = client.query("SELECT reference FROM transfers", &[]).await.unwrap();
    let done: std::collections::HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
    for (key, _, status, _) in &answers {
        assert_eq!(
            done.contains(key),
            *status == StatusCode::CREATED,
            "{key} was answered {status}"
        );
    }
    let records: i64 = client
        .query_one("SELECT count(*) FROM idempotency_records", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(records as u64, transfers, "one record for each operation");

    // Each kind of fault did happen, and did not come to nothing.
    assert!(terminated > 0 && crashed > 0 && killed > 0 && proxy.cuts() > 0);
    assert!(executed > transfers, "some attempts were rolled back");
    for count in [
        &seen.replays,
        &seen.conflicts,
        &seen.rolled_back,
        &seen.unavailable,
        &seen.lost,
        &seen.declined,
    ] {
        assert!(count.load(SeqCst) > 0, "{seen:?}");
    }
}
