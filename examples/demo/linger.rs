//! Reads on what a client still sends when it was answered before its end, as with a body that is too large. Who writes
//! all of a request before reading would find the connection closed, and not the reason.

use std::{
    mem,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::Request,
    http::{Version, header},
};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::{runtime::Handle, time::timeout};

/// How long at most, so that nobody keeps a connection by sending for ever.
const LINGER: Duration = Duration::from_secs(5);

/// Who sends nothing for so long is done, or waits for the connection to be closed.
const PAUSE: Duration = Duration::from_secs(1);

/// To be put before everything else. HTTP/2 has a word of its own for this.
pub async fn linger(request: Request) -> Request {
    let asks = request.headers().contains_key(header::EXPECT);
    let is_new = request.version() > Version::HTTP_11;
    request.map(|body| match is_new || body.is_end_stream() {
        true => body,
        false => Body::new(Lingering { body, comes: !asks }),
    })
}

struct Lingering {
    body: Body,
    /// Not yet, if the client asked whether to send it: then the answer may come in place of it.
    comes: bool,
}

impl HttpBody for Lingering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.comes = true;
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(None | Some(Err(_))) = frame {
            self.body = Body::empty();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let mut rest = mem::take(&mut self.body);
        if !self.comes || rest.is_end_stream() {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            let read = async move { while let Ok(Some(Ok(_))) = timeout(PAUSE, rest.frame()).await {} };
            runtime.spawn(timeout(LINGER, read));
        }
    }
}
