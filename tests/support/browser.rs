//! A real browser, driven over the WebDriver protocol: JSON over HTTP to a `chromedriver` of its own.

use std::{
    env, fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio, id},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};

use super::http::send;

/// How long a condition may take to come true, on a machine that is busy with other things.
const DEADLINE: Duration = Duration::from_secs(20);
const POLL_EVERY: Duration = Duration::from_millis(25);

/// The member that holds an element's reference, whatever the browser (WebDriver §12.2).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser with one window and an empty profile. It ends when this is dropped, also by a panic.
pub struct Browser {
    driver: Child,
    address: SocketAddr,
    session: Option<String>,
    profile: PathBuf,
    // Kept open: a process whose output nobody reads any more may end by a broken pipe.
    _output: BufReader<ChildStdout>,
}

impl Browser {
    /// Starts a driver on a free port and a browser with it.
    ///
    /// # Panics
    /// If there is no driver or no browser: a test that cannot look has not seen that all is well.
    pub async fn start() -> Self {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| match error.kind() {
                ErrorKind::NotFound => panic!(
                    "chromedriver is missing, and this test needs it: install Chromium and its driver \
                     (on Debian the packages chromium and chromium-driver)"
                ),
                _ => panic!("chromedriver does not start: {error}"),
            });
        let mut output = BufReader::new(driver.stdout.take().expect("its output is piped"));
        let port = read_port(&mut output);
        let mut browser = Self {
            driver,
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, port.unwrap_or_default())),
            session: None,
            profile: empty_directory(),
            _output: output,
        };
        // Only now, so that the driver is ended in any case.
        assert!(port.is_some(), "chromedriver ended before it said its port");
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": browser.arguments()},
            "goog:loggingPrefs": {"browser": "ALL"},
            "timeouts": {"script": 10_000, "pageLoad": 20_000},
        }}});
        let session = browser.call(Method::POST, "/session", &wanted).await;
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        assert!(browser.session.is_some(), "not a session: {session}");
        browser
    }

    fn arguments(&self) -> Vec<String> {
        let fixed = [
            "--headless=new",
            // Tests may run as root, for whom the sandbox is not available, and where shared memory is small.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--window-size=1400,900",
            // Nobody but the server under test is asked for anything.
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-proxy-server",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ];
        let mut arguments: Vec<String> = fixed.map(str::to_owned).to_vec();
        arguments.push(format!("--user-data-dir={}", self.profile.display()));
        arguments
    }

    pub async fn open(&self, url: &str) {
        self.command("/url", json!({ "url": url })).await;
    }

    /// A click as a person makes it: it fails if the element cannot be seen, or is covered.
    pub async fn click(&self, selector: &str) {
        let element = self.find(selector).await;
        self.command(&format!("/element/{element}/click"), json!({})).await;
    }

    /// Types text in place of what a field holds.
    pub async fn fill(&self, selector: &str, text: &str) {
        let element = self.find(selector).await;
        self.command(&format!("/element/{element}/clear"), json!({})).await;
        self.command(&format!("/element/{element}/value"), json!({ "text": text }))
            .await;
    }

    async fn find(&self, selector: &str) -> String {
        let found = self
            .command("/element", json!({"using": "css selector", "value": selector}))
            .await;
        let reference = found[ELEMENT].as_str();
        reference
            .unwrap_or_else(|| panic!("not an element: {found}"))
            .to_owned()
    }

    /// What a script returns; in it, `arguments` are the members of `arguments`.
    pub async fn run(&self, script: &str, arguments: &[Value]) -> Value {
        self.command("/execute/sync", json!({"script": script, "args": arguments}))
            .await
    }

    /// Waits until a script returns something other than `null` or `false`, and returns that.
    ///
    /// # Panics
    /// If it does not within the deadline; `what` says what was waited for.
    pub async fn until(&self, what: &str, script: &str, arguments: &[Value]) -> Value {
        let started = Instant::now();
        loop {
            let value = self.run(script, arguments).await;
            if !matches!(value, Value::Null | Value::Bool(false)) {
                return value;
            }
            if started.elapsed() > DEADLINE {
                let seen = self.run("return document.body.innerText", &[]).await;
                panic!(
                    "{what}: not within {DEADLINE:?}. The page says:\n{}",
                    seen.as_str().unwrap_or_default()
                );
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    /// What the browser complained about: scripts that threw, and rules of the page that were broken. Answers with
    /// an error status are not among it; a refusal is one.
    pub async fn complaints(&self) -> Vec<Value> {
        let log = self.command("/se/log", json!({"type": "browser"})).await;
        let entries = log.as_array().expect("a log").iter();
        entries.filter(|entry| entry["source"] != "network").cloned().collect()
    }

    async fn command(&self, path: &str, body: Value) -> Value {
        let session = self.session.as_ref().expect("a session");
        self.call(Method::POST, &format!("/session/{session}{path}"), &body)
            .await
    }

    async fn call(&self, method: Method, path: &str, body: &Value) -> Value {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .expect("a request");
        let answer = send(self.address, request).await.expect("chromedriver answers");
        let json = answer.json();
        assert!(
            answer.status.is_success(),
            "{path} {body}: {}",
            json["value"]["message"]
        );
        json["value"].clone()
    }

    /// Asks the driver to end the browser; there is no runtime to wait with while a panic unwinds.
    fn end_session(&self, session: &str) -> std::io::Result<()> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        write!(
            stream,
            "DELETE /session/{session} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        )?;
        // The answer's first byte comes when the browser has ended.
        stream.read_exact(&mut [0])
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if let Some(session) = &self.session {
            let _ = self.end_session(session);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        let _ = fs::remove_dir_all(&self.profile);
    }
}

/// The driver takes a free port and says which; `None` if it ends without having said so.
fn read_port(output: &mut impl BufRead) -> Option<u16> {
    output.lines().map_while(Result::ok).find_map(|line| {
        let (_, port) = line.rsplit_once("started successfully on port ")?;
        port.trim_end_matches('.').parse().ok()
    })
}

fn empty_directory() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let name = format!("tower-idempotency-browser-{}-{}", id(), NEXT.fetch_add(1, Relaxed));
        let path = env::temp_dir().join(name);
        match fs::create_dir(&path) {
            Ok(()) => return path,
            // Left by an earlier process that had the same id.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => panic!("no directory for the browser's profile: {error}"),
        }
    }
}
