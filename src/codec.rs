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
    /// [`StoreErrorKind::Corrupt`] for anything that is not a stored answer.
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
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn sample() -> StoredResponse {
        let mut headers = HeaderMap::new();
        headers.append("content-type", HeaderValue::from_static("text/plain"));
        headers.append("x-twice", HeaderValue::from_static("one"));
        headers.append("x-twice", HeaderValue::from_bytes(b"\xfftwo").unwrap());
        headers.append("date", HeaderValue::from_static("today"));
        let mut trailers = HeaderMap::new();
        trailers.append("grpc-status", HeaderValue::from_static("0"));
        StoredResponse::encode(
            StatusCode::CREATED,
            &headers,
            |name| name != "date",
            b"body",
            Some(&trailers),
        )
    }

    /// Version 1 as it was first released. These bytes are on disks: they never change.
    const GOLDEN: &str = "0102c9003d00000012000000\
        0400000000000000\
        0c000a000000636f6e74656e742d74797065746578742f706c61696e\
        070003000000782d74776963656f6e65\
        070004000000782d7477696365ff74776f\
        0b0001000000677270632d73746174757330\
        626f6479";

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn version_1_is_written_and_read_as_it_was_first_released() {
        assert_eq!(hex(sample().as_bytes()), GOLDEN);
        let bytes: Vec<u8> = (0..GOLDEN.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&GOLDEN[at..at + 2], 16).unwrap())
            .collect();
        let answer = StoredResponse::from_bytes(bytes.into()).unwrap().decode().unwrap();
        assert_eq!(answer.status, StatusCode::CREATED);
        let twice: Vec<_> = answer
            .headers
            .get_all("x-twice")
            .iter()
            .map(HeaderValue::as_bytes)
            .collect();
        assert_eq!(twice, [&b"one"[..], b"\xfftwo"]);
        assert_eq!(answer.headers.len(), 3);
        assert_eq!(answer.trailers.unwrap()["grpc-status"], "0");
        assert_eq!(answer.body, "body");
    }

    #[test]
    fn an_answer_that_is_not_kept_has_a_status_and_nothing_else() {
        let stored = StoredResponse::not_kept(StatusCode::ACCEPTED);
        assert!(!stored.is_kept() && !stored.is_empty());
        assert!(sample().is_kept());
        let answer = StoredResponse::from_bytes(stored.as_bytes().clone())
            .unwrap()
            .decode()
            .unwrap();
        assert_eq!(answer.status, StatusCode::ACCEPTED);
        assert!(answer.headers.is_empty() && answer.body.is_empty() && answer.trailers.is_none());
    }

    #[test]
    fn what_must_not_be_logged_is_marked_in_a_replay_too() {
        let mut headers = HeaderMap::new();
        let mut secret = HeaderValue::from_static("secret");
        secret.set_sensitive(true);
        headers.append("x-token", secret);
        headers.append("x-token", HeaderValue::from_static("public"));
        let stored = StoredResponse::encode(StatusCode::OK, &headers, |_| true, b"body", None);
        let answer = stored.decode().unwrap();
        let tokens: Vec<_> = answer.headers.get_all("x-token").iter().collect();
        assert_eq!(tokens, ["secret", "public"]);
        assert!(tokens[0].is_sensitive() && !tokens[1].is_sensitive());
        assert_eq!(
            format!("{stored:?}"),
            "StoredResponse(62 bytes)",
            "nothing of it is shown"
        );
    }

    #[test]
    fn the_body_of_a_replay_is_not_copied() {
        let stored = sample();
        let body = stored.decode().unwrap().body;
        assert!(stored.as_bytes().as_ptr_range().contains(&body.as_ptr()));
    }

    #[test]
    fn a_newer_version_is_an_error_of_its_own() {
        let mut bytes = sample().as_bytes().to_vec();
        bytes[0] = 2;
        let error = StoredResponse::from_bytes(bytes.into()).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::NewerVersion);
    }

    #[test]
    fn bytes_that_end_early_or_late_are_corrupt() {
        let bytes = sample().as_bytes().clone();
        for end in 0..bytes.len() {
            let error = StoredResponse::from_bytes(bytes.slice(..end)).unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Corrupt, "cut at {end}");
        }
        let longer = [&bytes[..], b"x"].concat();
        assert_eq!(
            StoredResponse::from_bytes(longer.into()).unwrap_err().kind(),
            StoreErrorKind::Corrupt
        );
    }

    #[test]
    fn no_bytes_make_the_reader_panic() {
        use proptest::prelude::*;
        proptest!(|(mut bytes in proptest::collection::vec(any::<u8>(), 0..80), version in 0u8..3)| {
            if let Some(first) = bytes.first_mut() {
                *first = version;
            }
            is_checked_as_it_is_read(bytes.into());
        });
        let good = sample().as_bytes().to_vec();
        proptest!(|(at in 0..good.len(), with in any::<u8>())| {
            let mut bytes = good.clone();
            bytes[at] = with;
            is_checked_as_it_is_read(bytes.into());
        });
    }

    /// What is taken back can be read later, and what cannot be read is not taken back.
    fn is_checked_as_it_is_read(bytes: Bytes) {
        let read = StoredResponse::unread(bytes.clone()).decode().map(drop);
        let checked = StoredResponse::from_bytes(bytes).map(drop);
        assert_eq!(
            checked.map_err(|error| error.kind()),
            read.map_err(|error| error.kind())
        );
    }

    #[test]
    fn every_byte_of_a_name_or_a_value_is_checked_as_it_is_read() {
        let good = sample().as_bytes().to_vec();
        let all = |at: usize| (0..=255).map(move |byte| (at, byte));
        // In a standard name, in a value, in a name of another kind, and in that of a trailer.
        for (at, byte) in [all(27), all(40), all(55), all(90)].into_iter().flatten() {
            let mut bytes = good.clone();
            bytes[at] = byte;
            is_checked_as_it_is_read(bytes.into());
        }
        // Without a name.
        let mut bytes = vec![VERSION, 0, 200, 0, 6, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend([0; 8]);
        bytes.extend([0; 6]);
        is_checked_as_it_is_read(bytes.into());
    }
}
