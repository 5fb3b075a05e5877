//! The demo server as a process of its own.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
};

use futures_util::future::join_all;
use http::StatusCode;
use serde_json::Value;

use super::{
    http::{Answer, get, post, send},
    serve::assert_replay,
};

/// After so many questions what was waited for does not come; no more fit into the ports of one machine.
const MANY: usize = 20_000;

/// So long that a handler under it is still running when its test ends; a header of the demo's.
pub const ENDLESS: (&str, &str) = ("x-demo-delay-ms", "3600000");

/// A running demo server, killed when it is dropped.
pub struct Demo {
    child: Child,
    address: SocketAddr,
    // Kept open: a process whose output nobody reads any more may end by a broken pipe.
    _output: BufReader<ChildStdout>,
}

/// The demo's program, which cargo builds together with the tests.
pub fn program() -> PathBuf {
    let mut path = std::env::current_exe().expect("a test has a path");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.push("examples");
    path.push(format!("demo{}", std::env::consts::EXE_SUFFIX));
    assert!(
        path.exists(),
        "{path:?} is missing: build it with `cargo build --example demo`"
    );
    path
}

impl Demo {
    /// Starts the server on a free port and waits until it says that it is ready. Without a store among the options it
    /// has one in memory: the default one belongs to whoever runs the tests.
    pub fn start(options: &[&str]) -> Self {
        let store: &[&str] = if options.contains(&"--store") {
            &[]
        } else {
            &["--store", "memory"]
        };
        let mut command = Self::command();
        command.args(store).args(options);
        Self::run(command)
    }

    /// As [`start`](Self::start), and writes what it has to say from this level on to `log`.
    pub fn start_with_log(level: &str, log: File) -> Self {
        let mut command = Self::command();
        command.args(["--store", "memory"]).env("RUST_LOG", level);
        command.env("NO_COLOR", "1").stderr(log);
        Self::run(command)
    }

    /// The server on a free port, to be given further options.
    pub fn command() -> Command {
        let mut command = Command::new(program());
        command.args(["--listen", "127.0.0.1:0"]).stderr(Stdio::null());
        command
    }

    /// Starts the server as this command says.
    pub fn run(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the demo starts");
        let mut output = BufReader::new(child.stdout.take().expect("its output is piped"));
        let mut line = String::new();
        output.read_line(&mut line).expect("it prints a line");
        let address = line.trim().strip_prefix("listening on http://");
        let address = address.and_then(|address| address.parse().ok());
        Self {
            address: address.unwrap_or_else(|| panic!("not a ready line: {line:?}")),
            child,
            _output: output,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub async fn post(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let request = post(path, headers, body.to_owned());
        send(self.address, request).await.expect("an answer")
    }

    /// Sends a request whose handler panics: the connection breaks.
    pub async fn lose(&self, path: &str, headers: &[(&str, &str)], body: &str) {
        let headers = [headers, &[("x-demo-panic", "1")]].concat();
        let request = post(path, &headers, body.to_owned());
        assert!(send(self.address, request).await.is_err(), "the connection breaks");
    }

    /// Starts a request that is not answered while the test lasts, and waits until its handler runs, as the first one.
    pub async fn occupy(&self, path: &str, headers: &[(&str, &str)], body: &str) {
        let headers = [headers, &[ENDLESS]].concat();
        tokio::spawn(send(self.address, post(path, &headers, body.to_owned())));
        self.until_executed(1).await;
    }

    /// Sends a request whose client leaves while the first handler runs.
    pub async fn leave(&self, path: &str, headers: &[(&str, &str)], body: &str) {
        let headers = [headers, &[("x-demo-delay-ms", "200")]].concat();
        let client = tokio::spawn(send(self.address, post(path, &headers, body.to_owned())));
        self.until_executed(1).await;
        client.abort();
        let _ = client.await;
    }

    /// Sends 32 equal requests at the same time: one is answered, the others are told that it runs or get its answer.
    /// Gives that answer.
    pub async fn crowd(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let headers = [headers, &[("x-demo-delay-ms", "200")]].concat();
        let answers = join_all((0..32).map(|_| self.post(path, &headers, body))).await;
        let is_first = |answer: &Answer| answer.status == StatusCode::CREATED && !answer.is_replay();
        let (first, others): (Vec<_>, Vec<_>) = answers.into_iter().partition(is_first);
        assert_eq!((first.len(), others.len()), (1, 31));
        for other in others {
            match other.is_replay() {
                true => assert_replay(&first[0], &other),
                false => {
                    assert_eq!(other.problem(), "request-in-progress");
                    assert_eq!(other.status, StatusCode::CONFLICT);
                    assert!(other.header("retry-after").is_some());
                }
            }
        }
        first.into_iter().next().expect("there is one")
    }

    /// Asks again until the answer is such a one.
    pub async fn until(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
        is_such: impl Fn(&Answer) -> bool,
    ) -> Answer {
        for _ in 0..MANY {
            let answer = self.post(path, headers, body).await;
            if is_such(&answer) {
                return answer;
            }
            tokio::task::yield_now().await;
        }
        panic!("there is no such answer");
    }

    /// Asks again until no request with this key is running any more, and the store is there to say so.
    pub async fn settled(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let is_settled = |answer: &Answer| match answer.status {
            StatusCode::CONFLICT => answer.problem() != "request-in-progress",
            status => status != StatusCode::SERVICE_UNAVAILABLE,
        };
        self.until(path, headers, body, is_settled).await
    }

    /// What the ledger shows, newest first.
    pub async fn effects(&self) -> Vec<Value> {
        let ledger = get(self.address, "/ledger").await;
        assert_eq!(ledger.header("content-type"), Some("application/json"));
        ledger.json()["effects"].as_array().expect("a list").clone()
    }

    /// The only effect is the one that the answer tells of.
    pub async fn assert_one_effect(&self, answer: &Answer) {
        let effects = self.effects().await;
        assert_eq!(effects.len(), 1, "{effects:?}");
        assert_eq!(effects[0]["id"], answer.json()["id"]);
    }

    /// Until this many handlers of requests with a key have been started.
    pub async fn until_executed(&self, handlers: u64) {
        let line = format!("\nidempotency_executed_total {handlers}\n");
        for _ in 0..MANY {
            let metrics = get(self.address, "/metrics").await;
            if String::from_utf8_lossy(&metrics.body).contains(&line) {
                return;
            }
            tokio::task::yield_now().await;
        }
        panic!("{handlers} handlers were never started");
    }

    /// As a power switch would: nothing is finished.
    pub fn kill(mut self) {
        self.child.kill().expect("it was running");
        self.child.wait().expect("it ended");
    }

    /// Asks it to stop and waits until it has.
    pub fn stop(mut self) -> std::process::ExitStatus {
        let asked = Command::new("kill").arg(self.child.id().to_string()).status();
        assert!(asked.is_ok_and(|status| status.success()), "the signal was sent");
        self.child.wait().expect("it ended")
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
