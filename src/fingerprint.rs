//! What makes two requests with one key the same request.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use http::request::Parts;
use sha2::{Digest, Sha256};

use crate::scope::sent_uri;

/// A hash of the request that began a record, with the id of the algorithm that made it.
///
/// Headers are never part of the built-in fingerprints: signatures, nonces and dates change on a retry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint {
    algorithm: u8,
    digest: [u8; 32],
}

impl Fingerprint {
    /// A fingerprint as a store kept it.
    pub fn new(algorithm: u8, digest: [u8; 32]) -> Self {
        Self { algorithm, digest }
    }

    /// Which algorithm made the digest; see [`Fingerprinter`].
    pub fn algorithm(&self) -> u8 {
        self.algorithm
    }

    /// The 32 bytes of the digest.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({}:", self.algorithm)?;
        for byte in &self.digest[..4] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("..)")
    }
}

type Custom = dyn Fn(&Parts, &Bytes) -> [u8; 32] + Send + Sync;

/// How requests are told apart. The default is [`whole_request`](Self::whole_request).
#[derive(Clone)]
pub struct Fingerprinter(Kind);

#[derive(Clone)]
enum Kind {
    None,
    WholeRequest,
    Custom(u8, Arc<Custom>),
}

/// How a stored fingerprint compares to the request at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    Same,
    Different,
    /// Made by an algorithm that this server does not have: nothing can be said.
    Unknown,
}

const NONE: u8 = 0;
const WHOLE_REQUEST: u8 = 1;

impl Fingerprinter {
    /// The first id that [`custom`](Self::custom) may take; those below are the crate's own.
    pub const FIRST_CUSTOM_ALGORITHM: u8 = 128;

    /// SHA-256 over method, path with query, and body, each with its length. Algorithm 1.
    pub fn whole_request() -> Self {
        Self(Kind::WholeRequest)
    }

    /// Every request with the same key in the same scope is the same. Algorithm 0.
    pub fn none() -> Self {
        Self(Kind::None)
    }

    /// A digest of the caller's making. `algorithm` is kept in each record: give a changed closure a new id.
    ///
    /// # Panics
    /// If `algorithm` is below [`FIRST_CUSTOM_ALGORITHM`](Self::FIRST_CUSTOM_ALGORITHM).
    pub fn custom(algorithm: u8, digest: impl Fn(&Parts, &Bytes) -> [u8; 32] + Send + Sync + 'static) -> Self {
        assert!(
            algorithm >= Self::FIRST_CUSTOM_ALGORITHM,
            "algorithms below {} are the crate's own",
            Self::FIRST_CUSTOM_ALGORITHM
        );
        Self(Kind::Custom(algorithm, Arc::new(digest)))
    }

    pub(crate) fn fingerprint(&self, parts: &Parts, body: &Bytes) -> Fingerprint {
        match &self.0 {
            Kind::None => Fingerprint::new(NONE, [0; 32]),
            Kind::WholeRequest => Fingerprint::new(WHOLE_REQUEST, whole_request(parts, body)),
            Kind::Custom(algorithm, digest) => Fingerprint::new(*algorithm, digest(parts, body)),
        }
    }

    /// Compares old by old: a record that was begun under another built-in algorithm is compared by that one.
    pub(crate) fn compare(&self, stored: &Fingerprint, own: &Fingerprint, parts: &Parts, body: &Bytes) -> Comparison {
        let own = match stored.algorithm {
            same if same == own.algorithm => *own,
            NONE => Self::none().fingerprint(parts, body),
            WHOLE_REQUEST => Self::whole_request().fingerprint(parts, body),
            _ => return Comparison::Unknown,
        };
        if *stored == own {
            Comparison::Same
        } else {
            Comparison::Different
        }
    }
}

impl Default for Fingerprinter {
    fn default() -> Self {
        Self::whole_request()
    }
}

impl fmt::Debug for Fingerprinter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::None => f.write_str("None"),
            Kind::WholeRequest => f.write_str("WholeRequest"),
            Kind::Custom(algorithm, _) => write!(f, "Custom({algorithm})"),
        }
    }
}

fn whole_request(parts: &Parts, body: &Bytes) -> [u8; 32] {
    let method = parts.method.as_str().as_bytes();
    let target = sent_uri(parts)
        .path_and_query()
        .map_or("", |target| target.as_str())
        .as_bytes();
    let mut hash = Sha256::new();
    for field in [method, target] {
        hash.update((field.len() as u64).to_le_bytes());
        hash.update(field);
    }
    // The last field needs no length: nothing follows that could be taken for it.
    hash.update(body);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parts(method: &str, target: &str) -> Parts {
        http::Request::builder()
            .method(method)
            .uri(target)
            .header("date", "today")
            .body(())
            .unwrap()
            .into_parts()
            .0
    }

    fn whole(method: &str, target: &str, body: &'static str) -> Fingerprint {
        Fingerprinter::default().fingerprint(&parts(method, target), &Bytes::from_static(body.as_bytes()))
    }

    #[test]
    fn method_path_query_and_body_all_count() {
        let one = whole("POST", "/a?b=1", "body");
        assert_eq!(one, whole("POST", "/a?b=1", "body"));
        assert_ne!(one, whole("PATCH", "/a?b=1", "body"));
        assert_ne!(one, whole("POST", "/a?b=2", "body"));
        assert_ne!(one, whole("POST", "/a", "body"));
        assert_ne!(one, whole("POST", "/a?b=1", "body "));
        assert_ne!(whole("POST", "/a", "bc"), whole("POST", "/ab", "c"));
    }

    #[test]
    fn headers_do_not_count() {
        let mut later = parts("POST", "/");
        later.headers.insert("date", "tomorrow".parse().unwrap());
        later.headers.insert("x-signature", "other".parse().unwrap());
        let body = Bytes::from_static(b"body");
        let own = Fingerprinter::default().fingerprint(&later, &body);
        assert_eq!(own, Fingerprinter::default().fingerprint(&parts("POST", "/"), &body));
    }

    #[test]
    fn a_record_made_by_another_algorithm_is_compared_by_that_one() {
        let (parts, body) = (parts("POST", "/"), Bytes::from_static(b"body"));
        let old = Fingerprinter::whole_request().fingerprint(&parts, &body);
        let new = Fingerprinter::custom(200, |_, body| Sha256::digest(body).into());
        let own = new.fingerprint(&parts, &body);
        assert_eq!(own.algorithm(), 200);
        assert_eq!(new.compare(&old, &own, &parts, &body), Comparison::Same);
        let other = Fingerprint::new(old.algorithm(), [7; 32]);
        assert_eq!(new.compare(&other, &own, &parts, &body), Comparison::Different);
    }

    #[test]
    fn a_record_made_by_an_algorithm_that_is_not_here_says_so() {
        let (parts, body) = (parts("POST", "/"), Bytes::new());
        let fingerprinter = Fingerprinter::default();
        let own = fingerprinter.fingerprint(&parts, &body);
        let foreign = Fingerprint::new(99, *own.digest());
        assert_eq!(
            fingerprinter.compare(&foreign, &own, &parts, &body),
            Comparison::Unknown
        );
    }

    #[test]
    fn without_a_fingerprint_every_request_is_the_same() {
        let none = Fingerprinter::none();
        let one = none.fingerprint(&parts("POST", "/"), &Bytes::from_static(b"a"));
        assert_eq!(one, none.fingerprint(&parts("PATCH", "/b"), &Bytes::from_static(b"c")));
    }
}
