//! Faults on demand, by request header. They are never part of a fingerprint: headers are not.

use std::{str::FromStr, time::Duration};

use axum::http::{HeaderMap, StatusCode};

/// Of an answer: it is made in memory.
const MOST_BYTES: usize = 64 << 20;

#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    delay: Option<u64>,
    pub status: Option<StatusCode>,
    panic: bool,
    pub response_bytes: usize,
}

impl Faults {
    /// # Errors
    /// The name of the header that says nothing usable.
    pub fn from_headers(headers: &HeaderMap) -> Result<Self, &'static str> {
        Ok(Self {
            delay: parse(headers, "x-demo-delay-ms")?,
            status: match parse::<StatusCode>(headers, "x-demo-status")? {
                // No answer to a request, but word that one follows.
                Some(status) if status.is_informational() => return Err("x-demo-status"),
                status => status,
            },
            panic: parse::<u8>(headers, "x-demo-panic")?.is_some_and(|value| value != 0),
            response_bytes: match parse(headers, "x-demo-response-bytes")? {
                Some(bytes) if bytes > MOST_BYTES => return Err("x-demo-response-bytes"),
                bytes => bytes.unwrap_or(0),
            },
        })
    }

    /// What comes before the effect.
    pub async fn strike(&self) {
        if let Some(milliseconds) = self.delay {
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        }
        assert!(!self.panic, "x-demo-panic was sent");
    }
}

fn parse<T: FromStr>(headers: &HeaderMap, name: &'static str) -> Result<Option<T>, &'static str> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(|value| value.trim().parse().ok());
    parsed.map(Some).ok_or(name)
}
