//! The demo server as a process of its own.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
};

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
        let mut command = Command::new(program());
        command.args(["--listen", "127.0.0.1:0"]).args(store).args(options);
        Self::run(command)
    }

    /// Starts the server as this command says.
    pub fn run(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the demo starts");
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
