//! Clients that send, leave and read, and say so to the history.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinHandle, time::timeout};

use super::{
    app::digest,
    event::{Event, Guarantee, History, Key, Reply},
    store::Struck,
    support::http::{Answer, read},
};

/// What one request is like.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    pub leaves_after: Option<Duration>,
    pub leaves_mid_body: bool,
    pub before_ms: u64,
    pub after_ms: u64,
    pub panics_before: bool,
    pub panics_after: bool,
    pub refuses: bool,
    pub bytes: u64,
}

pub struct Client {
    history: Arc<History>,
    struck: Arc<Struck>,
    address: SocketAddr,
    line: Option<(SendRequest<Full<Bytes>>, JoinHandle<()>)>,
}

impl Client {
    pub fn new(history: Arc<History>, struck: Arc<Struck>, address: SocketAddr) -> Self {
        Self {
            history,
            struck,
            address,
            line: None,
        }
    }

    /// With a connection of its own.
    pub fn another(&self) -> Self {
        Self::new(Arc::clone(&self.history), Arc::clone(&self.struck), self.address)
    }

    /// `None` if it was lost.
    pub async fn send(&mut self, key: Key, fingerprint: u8, manner: &Manner) -> Option<Reply> {
        let op = self.history.fresh();
        self.history.push(Event::Invoke { op, key, fingerprint });
        let reply = if manner.leaves_mid_body {
            self.leave_mid_body(key).await;
            None
        } else {
            match manner.leaves_after {
                None => self.exchange(key, fingerprint, manner).await,
                Some(after) => match timeout(after, self.exchange(key, fingerprint, manner)).await {
                    Ok(reply) => reply,
                    Err(_) => {
                        self.struck.add("client leaves");
                        None
                    }
                },
            }
        };
        match reply {
            Some(reply) => self.history.push(Event::Return { op, reply }),
            None => {
                // Whatever was under way on it is over for this client.
                self.hang_up();
                self.history.push(Event::Lost { op });
            }
        }
        reply
    }

    async fn exchange(&mut self, key: Key, fingerprint: u8, manner: &Manner) -> Option<Reply> {
        let mut request = Request::post(path(key))
            .header("host", "localhost")
            .header("authorization", format!("Basic tenant-{}", key.tenant))
            .header("idempotency-key", key.number.to_string())
            .header("test-before-ms", manner.before_ms)
            .header("test-after-ms", manner.after_ms)
            .header("test-bytes", manner.bytes);
        for (name, is_asked) in [
            ("test-panic-before", manner.panics_before),
            ("test-panic-after", manner.panics_after),
            ("test-refuse", manner.refuses),
        ] {
            if is_asked {
                request = request.header(name, "1");
            }
        }
        let request = request.body(Full::from(fingerprint.to_string())).expect("a request");
        let line = self.line().await?;
        line.ready().await.ok()?;
        let answer = read(line.send_request(request).await.ok()?).await.ok()?;
        if answer.status == StatusCode::GATEWAY_TIMEOUT {
            self.struck.add("timeout outside");
            return None;
        }
        Some(understand(&answer))
    }

    async fn leave_mid_body(&mut self, key: Key) {
        self.struck.add("client leaves mid body");
        let Ok(mut stream) = TcpStream::connect(self.address).await else {
            return;
        };
        let head = format!(
            "POST {} HTTP/1.1\r\nhost: localhost\r\nauthorization: Basic tenant-{}\r\nidempotency-key: {}\r\n\
             content-length: 10\r\n\r\n0",
            path(key),
            key.tenant,
            key.number
        );
        let _ = stream.write_all(head.as_bytes()).await;
    }

    async fn line(&mut self) -> Option<&mut SendRequest<Full<Bytes>>> {
        if self.line.as_ref().is_none_or(|(line, _)| line.is_closed()) {
            let stream = TcpStream::connect(self.address).await.ok()?;
            let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
            let connection = tokio::spawn(async move {
                let _ = connection.await;
            });
            self.line = Some((sender, connection));
        }
        self.line.as_mut().map(|(line, _)| line)
    }

    fn hang_up(&mut self) {
        if let Some((_, connection)) = self.line.take() {
            connection.abort();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.hang_up();
    }
}

fn path(key: Key) -> &'static str {
    match key.guarantee {
        Guarantee::AtMostOnce => "/once",
        Guarantee::AtLeastOnce => "/again",
    }
}

fn understand(answer: &Answer) -> Reply {
    if answer.status == StatusCode::CREATED {
        let body = String::from_utf8_lossy(&answer.body);
        let tenant = body.split(' ').next().and_then(|tenant| tenant.parse().ok());
        return Reply::Final {
            replayed: answer.is_replay(),
            digest: digest(answer.status, &answer.headers, &answer.body),
            tenant: tenant.unwrap_or(u16::MAX),
        };
    }
    if answer.header("content-type") != Some("application/problem+json") {
        return match answer.status {
            StatusCode::TOO_MANY_REQUESTS => Reply::NotExecuted,
            status => Reply::Other(status.as_u16()),
        };
    }
    match answer.problem().as_str() {
        "request-in-progress" => Reply::InProgress,
        "outcome-unknown" => Reply::Unknown,
        "idempotency-key-reused" => Reply::Reused,
        "store-unavailable" => Reply::Unavailable,
        _ => Reply::Other(answer.status.as_u16()),
    }
}
