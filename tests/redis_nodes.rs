//! Two nodes of the demo on one Redis server, under everything that ends a node or the server.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http::StatusCode;
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use support::{
    app::{gated, keyed, pay, spawn},
    demo::Demo,
    http::{Answer, post, read},
    redis::{Redis, free_port},
    redis_cluster::Cluster,
    redis_sentinel::Watched,
    redis_tls::Authority,
    serve::assert_replay,
};
use tokio::{net::TcpStream, task::JoinSet};
use tower_idempotency::{Concurrent, IdempotencyLayer, RedisStore};

const PATH: &str = "/payments";
/// At once.
const CLIENTS: usize = 32;
const BODY: &str = r#"{"amount":1,"key":"k"}"#;

/// Of a payment that its effect can be told by.
fn body(key: &str) -> String {
    format!(r#"{{"amount":1,"key":"{key}"}}"#)
}

fn node(server: &Redis) -> Demo {
    Demo::start(&["--store", &server.url()])
}

/// A connection to a node that carries one request after the other.
struct Line(SendRequest<Full<Bytes>>);

impl Line {
    async fn to(node: &Demo) -> Self {
        let stream = TcpStream::connect(node.address()).await.expect("it listens");
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    async fn pay(&mut self, key: &str) -> Answer {
        self.0.ready().await.expect("the connection stands");
        let request = post(PATH, &[("idempotency-key", key)], body(key));
        read(self.0.send_request(request).await.expect("an answer"))
            .await
            .expect("all of it")
    }
}

/// Sends each key this often, by turns to either node and from many clients at once, and gives every answer by key.
async fn load(nodes: &[Demo; 2], keys: usize, times: usize, sent: &Arc<AtomicUsize>) -> HashMap<String, Vec<Answer>> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let mut lines = [Line::to(&nodes[0]).await, Line::to(&nodes[1]).await];
        let (next, sent) = (Arc::clone(&next), Arc::clone(sent));
        clients.spawn(async move {
            let mut answers = Vec::new();
            loop {
                let number = next.fetch_add(1, Relaxed);
                if number >= keys * times {
                    return answers;
                }
                // The copies of a key are neighbours, so they meet.
                let key = format!("key-{}", number / times);
                let answer = lines[number % 2].pay(&key).await;
                sent.fetch_add(1, Relaxed);
                answers.push((key, answer));
            }
        });
    }
    let mut answers: HashMap<String, Vec<Answer>> = HashMap::new();
    for (key, answer) in clients.join_all().await.into_iter().flatten() {
        answers.entry(key).or_default().push(answer);
    }
    answers
}

/// Each key has one effect, or none and is refused for good; and every answer of a key is the same. Gives how many keys
/// were paid.
async fn assert_once_each(nodes: &[Demo; 2], answers: &HashMap<String, Vec<Answer>>) -> usize {
    let mut last = HashMap::new();
    for key in answers.keys() {
        let header = [("idempotency-key", key.as_str())];
        // What nobody ran before is run now.
        last.insert(key, nodes[0].settled(PATH, &header, &body(key)).await);
    }
    let mut effects = HashMap::new();
    for node in nodes {
        for effect in node.effects().await {
            let (id, key) = (effect["id"].clone(), effect["request"]["key"].clone());
            let key = key.as_str().expect("it was sent").to_owned();
            assert_eq!(effects.insert(key.clone(), id), None, "{key} has two effects");
        }
    }
    let mut paid = 0;
    for (key, answers) in answers {
        let last = &last[key];
        let (created, others): (Vec<_>, Vec<_>) =
            answers.iter().partition(|answer| answer.status == StatusCode::CREATED);
        if last.status == StatusCode::CREATED {
            paid += 1;
            assert_eq!(effects.get(key), Some(&last.json()["id"]), "{key}");
        } else {
            assert_eq!(last.problem(), "outcome-unknown", "{key}");
        }
        for answer in created {
            assert_eq!(answer.body, last.body, "{key}");
        }
        for other in others {
            let problem = other.problem();
            let passing = ["request-in-progress", "store-unavailable"];
            assert!(passing.contains(&problem.as_str()), "{key}: {problem}");
        }
    }
    paid
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_duplicated_requests_to_two_nodes_have_one_effect_each() {
    let server = Redis::start(&["--appendfsync", "everysec"]);
    let nodes = [node(&server), node(&server)];
    let answers = load(&nodes, 1000, 10, &Arc::default()).await;
    assert_eq!(answers.len(), 1000);
    assert_eq!(assert_once_each(&nodes, &answers).await, 1000);
    let all: usize = answers
        .values()
        .flatten()
        .filter(|answer| answer.status == StatusCode::CREATED)
        .count();
    assert!(all > 1000, "none was a duplicate");
}

#[tokio::test]
async fn a_node_that_is_killed_in_mid_handler_leaves_an_unknown_outcome_to_the_other() {
    let server = Redis::start(&[]);
    let (first, second) = (node(&server), node(&server));
    let header = [("idempotency-key", "k")];
    first.occupy(PATH, &header, BODY).await;
    let duplicate = second.post(PATH, &header, BODY).await;
    assert_eq!(
        (duplicate.status, duplicate.problem()),
        (StatusCode::CONFLICT, "request-in-progress".to_owned())
    );
    first.kill();
    let duplicate = second.post(PATH, &header, BODY).await;
    assert_eq!(duplicate.problem(), "request-in-progress", "its lease is not over");
    // As if the rest of the lease had passed on the server: what is left is the retention of a day.
    let keys: Vec<String> = server.ask(&["KEYS", "*"]).await;
    assert_eq!(keys.len(), 1);
    server
        .say(&["PEXPIRE", &keys[0], &(24 * 60 * 60 * 1000 - 1).to_string()])
        .await;
    for _ in 0..3 {
        let retry = second.post(PATH, &header, BODY).await;
        assert_eq!(
            (retry.status, retry.problem()),
            (StatusCode::CONFLICT, "outcome-unknown".to_owned())
        );
    }
    assert!(second.effects().await.is_empty());
}

#[tokio::test]
async fn what_one_node_answered_the_other_replays() {
    let server = Redis::start(&[]);
    let (first, second) = (node(&server), node(&server));
    let header = [("idempotency-key", "k")];
    let answer = first.post(PATH, &header, BODY).await;
    assert_eq!(answer.status, StatusCode::CREATED);
    assert_replay(&answer, &second.post(PATH, &header, BODY).await);
    first.kill();
    assert_replay(&answer, &second.post(PATH, &header, BODY).await);
    assert!(second.effects().await.is_empty());
}

#[tokio::test]
async fn a_duplicate_on_another_node_waits_for_the_answer_and_gets_it() {
    let server = Redis::start(&[]);
    let control = gated();
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let store = RedisStore::connect(&server.url()).await.unwrap();
        let patient = Concurrent::Wait(Duration::from_secs(3600));
        nodes.push(pay(&control, IdempotencyLayer::new(store).on_concurrent(patient)));
    }
    let first = spawn(&nodes[0], keyed("k", "a"));
    control.entered().await;
    let waiting: Vec<_> = (0..8).map(|_| spawn(&nodes[1], keyed("k", "a"))).collect();
    while server.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await.is_empty() {
        tokio::task::yield_now().await;
    }
    control.let_go();
    let first = first.await.unwrap();
    for waiting in waiting {
        let answer = waiting.await.unwrap();
        assert!(answer.is_replay());
        assert_eq!(answer.body, first.body);
    }
    assert_eq!(control.runs(), 1);
}

/// Two nodes, each of which replays what the other answered.
async fn assert_shared(url: &str, certificates: Option<&Authority>) {
    let start = || {
        let mut command = Demo::command();
        command.args(["--store", url]);
        if let Some(authority) = certificates {
            // What the system trusts.
            command.env("SSL_CERT_FILE", authority.path("authority.crt"));
        }
        Demo::run(command)
    };
    let (first, second) = (start(), start());
    for (number, node, other) in [(1, &first, &second), (2, &second, &first)] {
        let key = format!("key-{number}");
        let header = [("idempotency-key", key.as_str())];
        let answer = node.post(PATH, &header, &body(&key)).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{url}");
        assert_replay(&answer, &other.post(PATH, &header, &body(&key)).await);
    }
}

#[tokio::test]
async fn nodes_share_a_cluster() {
    let cluster = Cluster::start(3, &[]).await;
    assert_shared(&cluster.url(), None).await;
}

#[tokio::test]
async fn nodes_share_what_sentinels_watch_over() {
    let watched = Watched::start(&[]).await;
    assert_shared(&watched.url(), None).await;
}

#[cfg(feature = "redis-tls")]
#[tokio::test]
async fn nodes_share_a_server_in_secret() {
    let (authority, port) = (Authority::new(), free_port());
    let options = authority.options(port, false);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let _server = Redis::start(&options);
    assert_shared(&format!("rediss://localhost:{port}"), Some(&authority)).await;
}

/// The load's requests that were answered so far.
struct Progress(Arc<AtomicUsize>);

impl Progress {
    /// Until so many more were answered: more than were under way.
    fn wait(&self) {
        let until = self.0.load(Relaxed) + CLIENTS + 1;
        while self.0.load(Relaxed) < until {
            std::thread::yield_now();
        }
    }
}

/// Sends load, does something to the server in the middle of it, and looks at every key once the server is back.
async fn load_through(mut server: Redis, strike: impl FnOnce(&mut Redis, &Progress) + Send + 'static) {
    let nodes = [node(&server), node(&server)];
    let sent = Arc::new(AtomicUsize::new(0));
    let progress = Progress(Arc::clone(&sent));
    let striking = tokio::task::spawn_blocking(move || {
        progress.wait();
        strike(&mut server, &progress);
        server
    });
    let mut answers = load(&nodes, 300, 10, &sent).await;
    let _server = striking.await.unwrap();
    let is_refused = |answer: &Answer| answer.status == StatusCode::SERVICE_UNAVAILABLE;
    assert!(answers.values().flatten().any(is_refused), "nobody noticed");
    // Until both nodes have their connections again.
    for node in &nodes {
        let is_paid = |answer: &Answer| answer.status == StatusCode::CREATED;
        node.until(PATH, &[("idempotency-key", "after")], &body("after"), is_paid)
            .await;
    }
    answers.entry("after".to_owned()).or_default();
    let paid = assert_once_each(&nodes, &answers).await;
    assert!(paid > 50, "only {paid} keys were paid");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_under_load_costs_no_effect_twice() {
    let server = Redis::start(&[]);
    load_through(server, |server, progress| {
        server.pause();
        progress.wait();
        server.resume();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_restarted_under_load_costs_no_effect_twice() {
    let server = Redis::start(&[]);
    load_through(server, |server, progress| {
        server.kill();
        progress.wait();
        server.restart("Ready to accept connections");
    })
    .await;
}
