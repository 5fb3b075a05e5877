//! Two nodes of the demo on one server, and load on both of them.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use http::StatusCode;
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet};

use super::{
    demo::Demo,
    http::{Answer, post, read},
};

pub const PATH: &str = "/payments";
/// At once.
const CLIENTS: usize = 32;
pub const BODY: &str = r#"{"amount":1,"key":"k"}"#;

/// Of a payment that its effect can be told by.
pub fn body(key: &str) -> String {
    format!(r#"{{"amount":1,"key":"{key}"}}"#)
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
pub async fn load(
    nodes: &[Demo; 2],
    keys: usize,
    times: usize,
    sent: &Arc<AtomicUsize>,
) -> HashMap<String, Vec<Answer>> {
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

/// The handler's.
fn is_own(answer: &Answer) -> bool {
    answer.status == StatusCode::CREATED
}

/// Each key has one effect, or none and is refused for good; and every answer of a key is the same. Gives how many keys
/// were paid.
pub async fn assert_once_each(nodes: &[Demo; 2], answers: &HashMap<String, Vec<Answer>>) -> usize {
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
            // Nodes on one database have their ledger there, and each shows all of it.
            let before = effects.insert(key.clone(), id.clone());
            assert!(before.is_none_or(|before| before == id), "{key} has two effects");
        }
    }
    let mut paid = 0;
    for (key, answers) in answers {
        let last = &last[key];
        let (own, others): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| is_own(answer));
        if last.status == StatusCode::CREATED {
            paid += 1;
            assert_eq!(effects.get(key), Some(&last.json()["id"]), "{key}");
        } else if !is_own(last) {
            assert_eq!(last.problem(), "outcome-unknown", "{key}");
        }
        for answer in own {
            assert_eq!((answer.status, &answer.body), (last.status, &last.body), "{key}");
        }
        for other in others {
            let problem = other.problem();
            let passing = ["request-in-progress", "store-unavailable"];
            assert!(passing.contains(&problem.as_str()), "{key}: {problem}");
        }
    }
    paid
}

/// The load's requests that were answered so far.
pub struct Progress(Arc<AtomicUsize>);

impl Progress {
    /// Until so many more were answered: more than were under way.
    pub fn wait(&self) {
        let until = self.0.load(Relaxed) + CLIENTS + 1;
        while self.0.load(Relaxed) < until {
            std::thread::yield_now();
        }
    }
}

/// Sends load, does something to the server in the middle of it, and looks at every key once the server is back.
pub async fn load_through<S: Send + 'static>(
    mut server: S,
    nodes: [Demo; 2],
    strike: impl FnOnce(&mut S, &Progress) + Send + 'static,
    end_leases: impl AsyncFnOnce(&S),
) {
    let sent = Arc::new(AtomicUsize::new(0));
    let progress = Progress(Arc::clone(&sent));
    let striking = tokio::task::spawn_blocking(move || {
        progress.wait();
        strike(&mut server, &progress);
        server
    });
    let mut answers = load(&nodes, 300, 10, &sent).await;
    let server = striking.await.unwrap();
    let is_refused = |answer: &Answer| answer.status == StatusCode::SERVICE_UNAVAILABLE;
    assert!(answers.values().flatten().any(is_refused), "nobody noticed");
    // Until both nodes have their connections again, with a key for each try: one that failed has its answer.
    for (number, node) in nodes.iter().enumerate() {
        for turn in 0.. {
            let key = format!("after-{number}-{turn}");
            let answer = node.post(PATH, &[("idempotency-key", &key)], &body(&key)).await;
            let is_back = answer.status == StatusCode::CREATED;
            answers.entry(key).or_default().push(answer);
            if is_back {
                break;
            }
        }
    }
    // What a handler answered is told to the server by a task of its node, now that it can be. What remains in progress
    // then was claimed by a step that its node had given up, and nobody runs under it.
    for (key, answers) in &answers {
        if answers.iter().any(is_own) {
            nodes[0]
                .until(PATH, &[("idempotency-key", key)], &body(key), is_own)
                .await;
        }
    }
    end_leases(&server).await;
    let paid = assert_once_each(&nodes, &answers).await;
    assert!(paid > 50, "only {paid} keys were paid");
}
