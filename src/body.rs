//! Bodies: requests are buffered whole, answers up to a limit.

use std::{
    convert::Infallible,
    fmt,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    vec,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

/// A body that was read to its end: at most one data frame, then the trailers if there were any.
#[derive(Clone, Debug, Default)]
pub struct BufferedBody {
    data: Bytes,
    // Boxed: a map of headers is large, and trailers are rare.
    trailers: Option<Box<HeaderMap>>,
}

impl BufferedBody {
    /// A body of these bytes and trailers.
    pub fn new(data: Bytes, trailers: Option<HeaderMap>) -> Self {
        Self::from_parts(data, trailers.map(Box::new))
    }

    pub(crate) fn from_parts(data: Bytes, trailers: Option<Box<HeaderMap>>) -> Self {
        Self { data, trailers }
    }

    /// What is left of the data.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// The trailers, if there are any.
    pub fn trailers(&self) -> Option<&HeaderMap> {
        self.trailers.as_deref()
    }
}

impl Body for BufferedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if !self.data.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.data)))));
        }
        Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(*trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_empty() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let length = self.data.len() as u64;
        if self.trailers.is_none() {
            return SizeHint::with_exact(length);
        }
        // Over HTTP/1.1 trailers follow chunks only, and a server announces an exact size instead of chunking.
        let mut hint = SizeHint::new();
        hint.set_lower(length);
        hint
    }
}

/// A request body that can be made again from its bytes, so that the protected service sees the type it always saw.
///
/// Implemented for the bodies of axum and tonic, for `Full<Bytes>` and for the boxed bodies of `http-body-util`. A raw
/// hyper service takes `hyper::body::Incoming`, which nobody but hyper can make: box the body above this layer, such as
/// with `.map_request(|request: http::Request<_>| request.map(Body::new))`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be made again from buffered bytes",
    note = "box the body above this layer, such as with `.map_request(|request: http::Request<_>| request.map(Body::new))`"
)]
pub trait RequestBody: Body {
    /// The body of the request that goes on to the service.
    fn from_buffered(body: BufferedBody) -> Self;
}

impl RequestBody for BufferedBody {
    fn from_buffered(body: BufferedBody) -> Self {
        body
    }
}

/// Trailers are dropped: this body has no place for them.
impl RequestBody for http_body_util::Full<Bytes> {
    fn from_buffered(body: BufferedBody) -> Self {
        Self::new(body.data)
    }
}

impl<E: 'static> RequestBody for http_body_util::combinators::BoxBody<Bytes, E> {
    fn from_buffered(body: BufferedBody) -> Self {
        Self::new(http_body_util::BodyExt::map_err(body, |never| match never {}))
    }
}

impl<E: 'static> RequestBody for http_body_util::combinators::UnsyncBoxBody<Bytes, E> {
    fn from_buffered(body: BufferedBody) -> Self {
        Self::new(http_body_util::BodyExt::map_err(body, |never| match never {}))
    }
}

#[cfg(feature = "axum")]
impl RequestBody for axum::body::Body {
    fn from_buffered(body: BufferedBody) -> Self {
        Self::new(body)
    }
}

#[cfg(feature = "tonic")]
impl RequestBody for tonic::body::Body {
    fn from_buffered(body: BufferedBody) -> Self {
        Self::new(body)
    }
}

/// Data frames and trailers as they come in, without a copy as long as there is one frame.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    /// The only frame, or nothing.
    first: Bytes,
    /// All frames, once there is more than one.
    rest: BytesMut,
    trailers: Option<Box<HeaderMap>>,
}

/// How reading a body ended.
#[derive(Debug)]
pub(crate) enum End<E> {
    Whole,
    OverLimit,
    Broken(E),
}

impl Collected {
    fn len(&self) -> usize {
        self.first.len() + self.rest.len()
    }

    fn push<D: Buf>(&mut self, frame: Frame<D>) {
        match frame.into_data() {
            Ok(mut data) if self.len() == 0 => self.first = data.copy_to_bytes(data.remaining()),
            Ok(data) => {
                // From the second frame on, all of it is in one buffer that grows.
                self.rest.extend_from_slice(&std::mem::take(&mut self.first));
                self.rest.put(data);
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    self.trailers = Some(Box::new(trailers));
                }
            }
        }
    }

    /// Reads on until the end of `body`, or until more than `limit` bytes are there.
    pub(crate) fn poll_from<B: Body>(
        &mut self,
        mut body: Pin<&mut B>,
        limit: usize,
        cx: &mut Context<'_>,
    ) -> Poll<End<B::Error>> {
        loop {
            match ready!(body.as_mut().poll_frame(cx)) {
                None => return Poll::Ready(End::Whole),
                Some(Err(error)) => return Poll::Ready(End::Broken(error)),
                Some(Ok(frame)) => self.push(frame),
            }
            if self.len() > limit {
                return Poll::Ready(End::OverLimit);
            }
            if body.is_end_stream() {
                return Poll::Ready(End::Whole);
            }
        }
    }

    pub(crate) fn into_body(self) -> BufferedBody {
        let data = if self.rest.is_empty() {
            self.first
        } else {
            self.rest.freeze()
        };
        BufferedBody::from_parts(data, self.trailers)
    }
}

/// What became of an answer's body when it was to be kept.
pub(crate) enum Kept<B: Body> {
    /// All of it is here.
    Whole(BufferedBody),
    /// More than the limit, of which the beginning is here; the rest can still be read.
    OverLimit(Resumed<B>),
    /// It broke after its beginning.
    Broken(Resumed<B>),
}

/// Reads an answer's body up to `limit` bytes.
pub(crate) async fn keep<B: Body>(body: B, limit: usize) -> Kept<B> {
    if body.is_end_stream() {
        return Kept::Whole(BufferedBody::default());
    }
    let mut collected = Collected::default();
    match body.size_hint().exact() {
        // It says that it fits, so it need not be given back and can stay where it is.
        Some(size) if size <= limit as u64 => {
            let mut body = pin!(body);
            match std::future::poll_fn(|cx| collected.poll_from(body.as_mut(), limit, cx)).await {
                End::Whole if collected.len() as u64 == size => Kept::Whole(collected.into_body()),
                End::Broken(error) => Kept::Broken(Resumed::new(collected, Some(error), None)),
                // Shorter or longer than it said: it is not the answer that was meant.
                End::Whole | End::OverLimit => Kept::Broken(Resumed::new(collected, None, None)),
            }
        }
        _ => {
            let mut body = Box::pin(body);
            if body.size_hint().lower() > limit as u64 {
                return Kept::OverLimit(Resumed::new(collected, None, Some(body)));
            }
            match std::future::poll_fn(|cx| collected.poll_from(body.as_mut(), limit, cx)).await {
                End::Whole => Kept::Whole(collected.into_body()),
                End::OverLimit => Kept::OverLimit(Resumed::new(collected, None, Some(body))),
                End::Broken(error) => Kept::Broken(Resumed::new(collected, Some(error), None)),
            }
        }
    }
}

/// A body that goes on where buffering it stopped: what was read, then an error or the rest.
pub(crate) struct Resumed<B: Body> {
    read: vec::IntoIter<Bytes>,
    error: Option<B::Error>,
    rest: Option<Pin<Box<B>>>,
}

/// What was read, although more was announced.
impl<B: Body> From<BufferedBody> for Resumed<B> {
    fn from(body: BufferedBody) -> Self {
        Self {
            read: vec![body.data].into_iter(),
            error: None,
            rest: None,
        }
    }
}

impl<B: Body> Resumed<B> {
    fn new(collected: Collected, error: Option<B::Error>, rest: Option<Pin<Box<B>>>) -> Self {
        let data = collected.into_body().data;
        let read = if data.is_empty() { Vec::new() } else { vec![data] };
        Self {
            read: read.into_iter(),
            error,
            rest,
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(data) = self.read.next() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if let Some(error) = self.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        match &mut self.rest {
            Some(rest) => poll_as_bytes(rest.as_mut(), cx),
            None => Poll::Ready(None),
        }
    }
}

fn poll_as_bytes<B: Body>(body: Pin<&mut B>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
    body.poll_frame(cx)
        .map_ok(|frame| frame.map_data(|mut data| data.copy_to_bytes(data.remaining())))
}

pin_project! {
    /// The body of an answer: the service's own, or one that was kept.
    pub struct ResponseBody<B: Body> {
        #[pin]
        inner: Inner<B>,
    }
}

pin_project! {
    #[project = InnerProj]
    enum Inner<B: Body> {
        Passed { #[pin] body: B },
        Buffered { body: BufferedBody },
        Resumed { body: Resumed<B> },
    }
}

impl<B: Body> ResponseBody<B> {
    pub(crate) fn passed(body: B) -> Self {
        Self {
            inner: Inner::Passed { body },
        }
    }

    pub(crate) fn buffered(body: BufferedBody) -> Self {
        Self {
            inner: Inner::Buffered { body },
        }
    }

    pub(crate) fn resumed(body: Resumed<B>) -> Self {
        Self {
            inner: Inner::Resumed { body },
        }
    }

    /// The trailers of a body that is known to have nothing else.
    #[cfg(feature = "postgres")]
    pub(crate) fn trailers_alone(&self) -> Option<&HeaderMap> {
        match &self.inner {
            Inner::Buffered { body } if body.data.is_empty() => body.trailers(),
            _ => None,
        }
    }
}

impl<B: Body> Body for ResponseBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        match self.project().inner.project() {
            InnerProj::Passed { body } => poll_as_bytes(body, cx),
            InnerProj::Buffered { body } => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            InnerProj::Resumed { body } => body.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.inner {
            Inner::Passed { body } => body.is_end_stream(),
            Inner::Buffered { body } => body.is_end_stream(),
            Inner::Resumed { .. } => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Inner::Passed { body } => body.size_hint(),
            Inner::Buffered { body } => body.size_hint(),
            Inner::Resumed { body } => body.size_hint(),
        }
    }
}

impl<B: Body> Resumed<B> {
    fn size_hint(&self) -> SizeHint {
        let Some(rest) = &self.rest else {
            return SizeHint::default();
        };
        let read: u64 = self.read.as_slice().iter().map(|data| data.len() as u64).sum();
        let rest = rest.size_hint();
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper().and_then(|upper| upper.checked_add(read)) {
            hint.set_upper(upper);
        }
        hint.set_lower(rest.lower().saturating_add(read));
        hint
    }
}

impl<B: Body> Default for ResponseBody<B> {
    fn default() -> Self {
        Self::buffered(BufferedBody::default())
    }
}

impl<B: Body> fmt::Debug for ResponseBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.inner {
            Inner::Passed { .. } => "ResponseBody::Passed(..)",
            Inner::Buffered { .. } => "ResponseBody::Buffered(..)",
            Inner::Resumed { .. } => "ResponseBody::Resumed(..)",
        })
    }
}
