//! The stored answer and its bytes. They are written once, when the operation completes, and read in place by every
//! replay.
//!
//! Version 1, all numbers little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 1 | version, 1 |
//! | 1 | flags: 1 = answer not kept, 2 = trailers present, 4 = trailers were announced |
//! | 2 | status |
//! | 4 | length of the headers |
//! | 4 | length of the trailers |
//! | 8 | length of the body |
//! | n | headers: for each the length of its name (2), of its value (4), name, value |
//! | n | trailers, likewise |
//! | n | body, to the end |
//!
//! The top bit of a value's length marks it as sensitive.

use std::{fmt, ops::Range};

use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::error::{StoreError, StoreErrorKind};

const VERSION: u8 = 1;
const NOT_KEPT: u8 = 1;
const TRAILERS: u8 = 2;
const TRAILERS_ANNOUNCED: u8 = 4;
/// In the length of a value: it is not to be logged or put into compression tables.
const SENSITIVE: u32 = 1 << 31;
const HEAD: usize = 20;
const HEADERS_LENGTH: Range<usize> = 4..8;
const TRAILERS_LENGTH: Range<usize> = 8..12;

/// The answer of a completed operation as a store keeps it: one buffer that is cheap to clone and never changes.
///
/// A store saves [`as_bytes`](Self::as_bytes) and restores [`from_bytes`](Self::from_bytes).
#[derive(Clone, PartialEq, Eq)]
pub struct StoredResponse {
    bytes: Bytes,
}

/// What a [`StoredResponse`] holds once it is read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<Box<HeaderMap>>,
    pub(crate) trailers_announced: bool,
}

impl StoredResponse {
    /// Writes an answer down. `keep` chooses its headers.
    pub(crate) fn encode(
        status: StatusCode,
        headers: &HeaderMap,
        keep: impl Fn(&HeaderName) -> bool,
        body: &[u8],
        trailers: Option<&HeaderMap>,
    ) -> Self {
        // Of all fields: few are dropped, and a little too much room is cheaper than judging each field twice.
        let room = fields_length(headers) + trailers.map_or(0, fields_length);
        let mut flags = 0;
        if trailers.is_some() {
            flags |= TRAILERS;
        }
        if headers.contains_key(http::header::TRAILER) {
            flags |= TRAILERS_ANNOUNCED;
        }
        let mut out = Vec::with_capacity(HEAD + room + body.len());
        push_head(&mut out, flags, status, body.len());
        push_fields(&mut out, headers, &keep, HEADERS_LENGTH);
        if let Some(trailers) = trailers {
            push_fields(&mut out, trailers, &keep, TRAILERS_LENGTH);
        }
        out.extend_from_slice(body);
        // What is kept for a day holds no spare room.
        out.shrink_to_fit();
        Self { bytes: out.into() }
    }

    /// The operation is done and was answered with `status`, but the answer is not kept.
    pub fn not_kept(status: StatusCode) -> Self {
        let mut out = Vec::with_capacity(HEAD);
        push_head(&mut out, NOT_KEPT, status, 0);
        Self { bytes: out.into() }
    }

    /// The start of an answer whose body, of so many bytes to be appended, only its writer can read. Whether it stands
    /// for one that is kept is all that it says.
    #[cfg(feature = "encrypted")]
    pub(crate) fn opaque_head(is_kept: bool, body: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD + body);
        push_head(&mut out, if is_kept { 0 } else { NOT_KEPT }, StatusCode::OK, body);
        out
    }

    /// The body of such an answer; `None` if it says anything else.
    ///
    /// # Errors
    /// As [`from_bytes`](Self::from_bytes).
    #[cfg(feature = "encrypted")]
    pub(crate) fn opaque_body(&self) -> Result<Option<Bytes>, StoreError> {
        let answer = self.decode()?;
        let says_nothing = answer.status == StatusCode::OK
            && answer.headers.is_empty()
            && answer.trailers.is_none()
            && !answer.trailers_announced;
        Ok(says_nothing.then_some(answer.body))
    }

    /// Takes back what [`as_bytes`](Self::as_bytes) gave. The bytes are kept, not copied.
    ///
    /// # Errors
    /// [`StoreErrorKind::NewerVersion`] for a version that this code does not know, and
    /// [`StoreErrorKind::Corrupt`] for anything that is not a stored answer. One with more fields than a
    /// [`HeaderMap`] takes, which nobody writes, is found out only when it is to be replayed, and refused then.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, StoreError> {
        check(&bytes)?;
        Ok(Self { bytes })
    }

    /// Bytes that nobody has read.
    #[cfg(test)]
    pub(crate) fn unread(bytes: Bytes) -> Self {
        Self { bytes }
    }

    /// The bytes to save: self-contained and versioned.
    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The size in bytes, headers and body together.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Never true: even an answer that was not kept has a status.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether there is an answer to replay.
    pub fn is_kept(&self) -> bool {
        self.bytes.get(1).is_some_and(|flags| flags & NOT_KEPT == 0)
    }

    /// The status of the first answer.
    pub fn status(&self) -> StatusCode {
        // Bytes that hold no status are found corrupt wherever they are decoded.
        let status = self.bytes.get(2..4).map_or(0, |mut bytes| bytes.get_u16_le());
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Reads the answer; its body and values are slices of the stored bytes.
    pub(crate) fn decode(&self) -> Result<Answer, StoreError> {
        let mut rest = self.bytes.clone();
        let head = Head::take(&mut rest)?;
        let headers = take_fields(&mut rest, head.headers_length)?;
        let trailers = take_fields(&mut rest, head.trailers_length)?;
        head.check_body(rest.len())?;
        Ok(Answer {
            status: head.status,
            headers,
            body: rest,
            trailers: (head.flags & TRAILERS != 0).then(|| Box::new(trailers)),
            trailers_announced: head.flags & TRAILERS_ANNOUNCED != 0,
        })
    }
}

/// Whether this is an answer that [`decode`](StoredResponse::decode) reads. Makes nothing of it: a store, which only passes
/// answers on, need not build their fields. That there are more than a map of them takes is noticed only then.
fn check(mut rest: &[u8]) -> Result<(), StoreError> {
    let head = Head::take(&mut rest)?;
    check_fields(&mut rest, head.headers_length)?;
    check_fields(&mut rest, head.trailers_length)?;
    head.check_body(rest.len())
}

/// What comes before the fields.
struct Head {
    flags: u8,
    status: StatusCode,
    headers_length: u32,
    trailers_length: u32,
    body_length: u64,
}

impl Head {
    fn take(rest: &mut impl Buf) -> Result<Self, StoreError> {
        let version = rest.try_get_u8().map_err(corrupt)?;
        if version > VERSION {
            return Err(StoreErrorKind::NewerVersion.into());
        }
        if version < VERSION {
            return Err(corrupt("there is no version 0"));
        }
        let flags = rest.try_get_u8().map_err(corrupt)?;
        if flags & !(NOT_KEPT | TRAILERS | TRAILERS_ANNOUNCED) != 0 {
            return Err(corrupt("unknown flags"));
        }
        Ok(Self {
            flags,
            status: StatusCode::from_u16(rest.try_get_u16_le().map_err(corrupt)?).map_err(corrupt)?,
            headers_length: rest.try_get_u32_le().map_err(corrupt)?,
            trailers_length: rest.try_get_u32_le().map_err(corrupt)?,
            body_length: rest.try_get_u64_le().map_err(corrupt)?,
        })
    }

    fn check_body(&self, length: usize) -> Result<(), StoreError> {
        match length as u64 == self.body_length {
            true => Ok(()),
            false => Err(corrupt("the body is not as long as it was")),
        }
    }
}

impl fmt::Debug for StoredResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoredResponse({} bytes)", self.len())
    }
}

/// The lengths of headers and trailers are filled in once they are known.
fn push_head(out: &mut Vec<u8>, flags: u8, status: StatusCode, body: usize) {
    out.extend_from_slice(&[VERSION, flags]);
    out.extend_from_slice(&status.as_u16().to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&(body as u64).to_le_bytes());
}

fn fields_length(fields: &HeaderMap) -> usize {
    let lengths = fields.iter().map(|(name, value)| 6 + name.as_str().len() + value.len());
    lengths.sum()
}

fn push_fields(out: &mut Vec<u8>, fields: &HeaderMap, keep: impl Fn(&HeaderName) -> bool, length: Range<usize>) {
    let start = out.len();
    for (name, value) in fields.iter().filter(|(name, _)| keep(name)) {
        out.extend_from_slice(&(name.as_str().len() as u16).to_le_bytes());
        let sensitive = if value.is_sensitive() { SENSITIVE } else { 0 };
        out.extend_from_slice(&(value.len() as u32 | sensitive).to_le_bytes());
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(value.as_bytes());
    }
    let written = (out.len() - start) as u32;
    out[length].copy_from_slice(&written.to_le_bytes());
}

fn take_fields(rest: &mut Bytes, length: u32) -> Result<HeaderMap, StoreError> {
    let mut section = take(rest, length as usize)?;
    let mut fields = HeaderMap::new();
    while section.has_remaining() {
        let name = section.try_get_u16_le().map_err(corrupt)?;
        let value = section.try_get_u32_le().map_err(corrupt)?;
        let name = HeaderName::from_bytes(&take(&mut section, name.into())?).map_err(corrupt)?;
        let (length, sensitive) = (value & !SENSITIVE, value & SENSITIVE != 0);
        let mut value = HeaderValue::from_maybe_shared(take(&mut section, length as usize)?).map_err(corrupt)?;
        value.set_sensitive(sensitive);
        fields.try_append(name, value).map_err(corrupt)?;
    }
    Ok(fields)
}

/// As [`take_fields`], without the fields.
fn check_fields(rest: &mut &[u8], length: u32) -> Result<(), StoreError> {
    let mut section = cut(rest, length as usize)?;
    while !section.is_empty() {
        let name = section.try_get_u16_le().map_err(corrupt)?;
        let value = section.try_get_u32_le().map_err(corrupt)?;
        let name = cut(&mut section, name.into())?;
        if name.is_empty() || !name.iter().all(is_of_name) {
            return Err(corrupt("a field has no name that one can have"));
        }
        let value = cut(&mut section, (value & !SENSITIVE) as usize)?;
        if !value.iter().all(is_of_value) {
            return Err(corrupt("a field has no value that one can have"));
        }
    }
    Ok(())
}

/// `token` of RFC 9110.
fn is_of_name(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}

fn is_of_value(byte: &u8) -> bool {
    *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f)
}

fn take(rest: &mut Bytes, length: usize) -> Result<Bytes, StoreError> {
    if length > rest.len() {
        return Err(past_the_end());
    }
    Ok(rest.split_to(length))
}

fn cut<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8], StoreError> {
    rest.split_off(..length).ok_or_else(past_the_end)
}

fn past_the_end() -> StoreError {
    corrupt("a length points past the end")
}

fn corrupt(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
    StoreError::with_source(StoreErrorKind::Corrupt, source)
}

#[cfg(test)]
mod tests;
