//! Redis servers as processes of their own, on private ports of the loopback interface.

use std::{
    env,
    ffi::OsString,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use redis::{Value, aio::MultiplexedConnection};
use tempfile::TempDir;

use super::ports::free_port;

/// A running server with a folder of its own, killed when it is dropped.
pub struct Redis {
    process: Option<Child>,
    port: u16,
    folder: TempDir,
    options: Vec<String>,
}

/// Whether somebody else took the port before the server did is only known once it has started.
const TRIES: usize = 20;

/// What is run as a server, and as a sentinel: `redis-server`, or what the environment has in `REDIS_SERVER`.
pub fn program() -> OsString {
    env::var_os("REDIS_SERVER").unwrap_or_else(|| "redis-server".into())
}

/// Runs the [`program`] of this command, which says why not where it cannot.
pub fn spawn(command: &mut Command) -> Child {
    command.spawn().unwrap_or_else(|error| {
        let program = command.get_program();
        panic!("{program:?} does not run: {error}; is the package redis-server installed, or REDIS_SERVER wrong?")
    })
}

impl Redis {
    /// A server that neither evicts nor forgets. Options are those of the [`program`].
    pub fn start(options: &[&str]) -> Self {
        let mut server = Self {
            process: None,
            port: 0,
            folder: tempfile::tempdir().expect("a folder"),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        };
        for _ in 0..TRIES {
            server.port = free_port();
            if server.run("Ready to accept connections") {
                return server;
            }
        }
        panic!("{:?} runs, and does not become ready with {options:?}", program());
    }

    /// Starts it again on its port, with what its folder holds, and waits until it says so much.
    pub fn restart(&mut self, until: &str) {
        assert!(self.process.is_none(), "it is still running");
        assert!(self.run(until), "it started before");
    }

    pub fn set_options(&mut self, options: &[&str]) {
        self.options = options.iter().map(|&option| option.to_owned()).collect();
    }

    fn run(&mut self, until: &str) -> bool {
        let mut process = spawn(
            Command::new(program())
                .args(["--bind", "127.0.0.1", "--port", &self.port.to_string()])
                .args(["--appendonly", "yes", "--appendfsync", "always", "--save", ""])
                .args(&self.options)
                .current_dir(self.folder.path())
                .stdout(Stdio::piped())
                .stderr(Stdio::null()),
        );
        let mut lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let is_up = lines.by_ref().any(|line| line.is_ok_and(|line| line.contains(until)));
        if is_up {
            // Read on, so that it is never held up by a full pipe.
            std::thread::spawn(move || lines.for_each(drop));
            self.process = Some(process);
        } else {
            let _ = process.wait();
        }
        is_up
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// As a power switch would.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("it was running");
            process.wait().expect("it ended");
        }
    }

    /// It takes bytes and answers none, until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.signal("-STOP");
    }

    pub fn resume(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let id = self.process.as_ref().expect("it is running").id().to_string();
        let sent = Command::new("kill").args([signal, &id]).status();
        assert!(sent.is_ok_and(|status| status.success()), "the signal was sent");
    }

    /// A connection for the test itself.
    pub async fn connection(&self) -> MultiplexedConnection {
        let client = redis::Client::open(self.url()).expect("a URL");
        client.get_multiplexed_async_connection().await.expect("it is up")
    }

    pub async fn ask<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let mut command = redis::cmd(words[0]);
        for word in &words[1..] {
            command.arg(*word);
        }
        let mut connection = self.connection().await;
        command.query_async(&mut connection).await.expect("an answer")
    }

    pub async fn say(&self, words: &[&str]) {
        let _: Value = self.ask(words).await;
    }

    /// How often the server ran this command, called by scripts included.
    pub async fn calls(&self, command: &str) -> u64 {
        let statistics: String = self.ask(&["INFO", "commandstats"]).await;
        let name = format!("cmdstat_{command}:calls=");
        let calls = statistics.lines().find_map(|line| line.strip_prefix(name.as_str()));
        let number = calls.and_then(|calls| calls.split(',').next());
        number.map_or(0, |number| number.parse().expect("a number"))
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
