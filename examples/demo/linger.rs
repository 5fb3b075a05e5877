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

/// To be put before everything else. HTTP/2 has a word of its own for this, and who asks before sending a body is
/// answered in place of it.
pub async fn linger(request: Request) -> Request {
    if request.version() > Version::HTTP_11 || request.headers().contains_key(header::EXPECT) {
        return request;
    }
    request.map(|body| match body.is_end_stream() {
        true => body,
        false => Body::new(Lingering(body)),
    })
}

struct Lingering(Body);

impl HttpBody for Lingering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.0).poll_frame(cx);
        if let Poll::Ready(None | Some(Err(_))) = frame {
            self.0 = Body::empty();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let mut rest = mem::take(&mut self.0);
        if rest.is_end_stream() {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            let read = async move { while let Some(Ok(_)) = rest.frame().await {} };
            runtime.spawn(timeout(LINGER, read));
        }
    }
}
