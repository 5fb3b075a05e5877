//! What makes two requests with one key the same request.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use http::request::Parts;
use sha2::{Digest, Sha256};

use crate::{
    json::{self, Json, JsonBody, Met, Pointer},
    record::RecordId,
    rejection::Rejection,
    scope::sent_uri,
};

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
    #[cfg(feature = "blake3")]
    Blake3,
    CanonicalJson,
    JsonMembers(Arc<[Pointer]>),
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
const CANONICAL_JSON: u8 = 2;
const JSON_MEMBERS: u8 = 3;
/// Of a key that is claimed beside an operation's own: names that operation.
const BESIDE: u8 = 4;
#[cfg(feature = "blake3")]
const BLAKE3: u8 = 5;

impl Fingerprinter {
    /// The first id that [`custom`](Self::custom) may take; those below are the crate's own.
    pub const FIRST_CUSTOM_ALGORITHM: u8 = 128;

    /// SHA-256 over method, path with query, and body, each with its length. Algorithm 1.
    pub fn whole_request() -> Self {
        Self(Kind::WholeRequest)
    }

    /// BLAKE3 in place of SHA-256, over the same. Algorithm 5.
    ///
    /// For large bodies: more than twice as fast at 1 MiB, slower at 1 KiB. Records that were begun under SHA-256 are
    /// still compared by it, and the other way round on servers that have this feature; one without it refuses what
    /// this one began as [`RecordFromNewerVersion`](crate::RejectionKind::RecordFromNewerVersion). So turn the feature
    /// on everywhere before it is used anywhere. Requests whose keys are
    /// [derived](crate::WithoutKey::DeriveAndReplay) have another key under it, and run again.
    #[cfg(feature = "blake3")]
    #[cfg_attr(docsrs, doc(cfg(feature = "blake3")))]
    pub fn blake3() -> Self {
        Self(Kind::Blake3)
    }

    /// Every request with the same key in the same scope is the same. Algorithm 0.
    pub fn none() -> Self {
        Self(Kind::None)
    }

    /// SHA-256 over method, path with query, and the JSON value of the body, whatever the order of its members, its
    /// white space and the form of its numbers and strings (RFC 8785). Algorithm 2.
    ///
    /// Two different values are never the same, numbers that no double can tell apart included. A body that is not
    /// JSON, or has an object with two members of one name, is refused as
    /// [`BodyUnreadable`](crate::RejectionKind::BodyUnreadable); an empty body is a value of its own. Costs about
    /// thirty times as much as [`whole_request`](Self::whole_request).
    pub fn canonical_json() -> Self {
        Self(Kind::CanonicalJson)
    }

    /// SHA-256 over method, path with query, and the JSON values of chosen members of the body, by their JSON pointers
    /// (RFC 6901; `*` stands for every element of an array). Nothing else in the body makes a request different.
    /// Algorithm 3.
    ///
    /// A member that is not there is a value of its own; so is, where a `*` stands, what is not there, `null`, no array,
    /// and an array of another length. Bodies are refused as under [`canonical_json`](Self::canonical_json). The
    /// pointers are part of the fingerprint: when they change, a retry of what was begun before is refused, and one whose
    /// key is [derived](crate::WithoutKey::DeriveAndReplay) runs again.
    ///
    /// ```
    /// # use tower_idempotency::Fingerprinter;
    /// Fingerprinter::json_members(["/order/invoice_number", "/order/amount"]);
    /// ```
    ///
    /// # Panics
    /// If there is no pointer, or one is not a JSON pointer.
    pub fn json_members<'a>(pointers: impl IntoIterator<Item = &'a str>) -> Self {
        let pointers: Arc<[_]> = pointers.into_iter().map(Pointer::parse).collect();
        assert!(
            !pointers.is_empty(),
            "without members every request would be the same; say `none` for that"
        );
        Self(Kind::JsonMembers(pointers))
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

    /// # Errors
    /// If the body has to be JSON and is not.
    pub(crate) fn fingerprint(
        &self,
        parts: &Parts,
        body: &Bytes,
        json: &JsonBody<'_>,
    ) -> Result<Fingerprint, Rejection> {
        Ok(match &self.0 {
            Kind::None => Fingerprint::new(NONE, [0; 32]),
            Kind::WholeRequest => Fingerprint::new(WHOLE_REQUEST, whole_request(parts, body)),
            #[cfg(feature = "blake3")]
            Kind::Blake3 => Fingerprint::new(BLAKE3, whole_request_by_blake3(parts, body)),
            Kind::CanonicalJson => Fingerprint::new(CANONICAL_JSON, canonical_json(parts, json)?),
            Kind::JsonMembers(pointers) => Fingerprint::new(JSON_MEMBERS, json_members(parts, json, pointers)?),
            Kind::Custom(algorithm, digest) => Fingerprint::new(*algorithm, digest(parts, body)),
        })
    }

    /// As above, to name a request that has no key: there is always something to tell it from others.
    pub(crate) fn for_name(&self, parts: &Parts, body: &Bytes, own: &Fingerprint) -> Fingerprint {
        match &self.0 {
            Kind::None => Fingerprint::new(WHOLE_REQUEST, whole_request(parts, body)),
            _ => *own,
        }
    }

    /// Compares old by old: a record that was begun under another built-in algorithm is compared by that one.
    pub(crate) fn compare(&self, stored: &Fingerprint, own: &Fingerprint, parts: &Parts, body: &Bytes) -> Comparison {
        let own = match stored.algorithm {
            same if same == own.algorithm => *own,
            NONE => Fingerprint::new(NONE, [0; 32]),
            WHOLE_REQUEST => Fingerprint::new(WHOLE_REQUEST, whole_request(parts, body)),
            #[cfg(feature = "blake3")]
            BLAKE3 => Fingerprint::new(BLAKE3, whole_request_by_blake3(parts, body)),
            // A body that cannot be read as JSON is not the one that could.
            CANONICAL_JSON => match canonical_json(parts, &JsonBody::new(body)) {
                Ok(digest) => Fingerprint::new(CANONICAL_JSON, digest),
                Err(_) => return Comparison::Different,
            },
            _ => return Comparison::Unknown,
        };
        if *stored == own {
            Comparison::Same
        } else {
            Comparison::Different
        }
    }
}

impl Fingerprint {
    /// What a record is kept with whose key was claimed beside that of `operation`.
    pub(crate) fn beside(operation: &RecordId) -> Self {
        Self::new(BESIDE, *operation.as_bytes())
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
            #[cfg(feature = "blake3")]
            Kind::Blake3 => f.write_str("Blake3"),
            Kind::CanonicalJson => f.write_str("CanonicalJson"),
            Kind::JsonMembers(pointers) => f.debug_tuple("JsonMembers").field(pointers).finish(),
            Kind::Custom(algorithm, _) => write!(f, "Custom({algorithm})"),
        }
    }
}

fn whole_request(parts: &Parts, body: &Bytes) -> [u8; 32] {
    let mut hash = hash_of_target(parts);
    // The last field needs no length: nothing follows that could be taken for it.
    hash.update(body);
    hash.finalize().into()
}

fn canonical_json(parts: &Parts, body: &JsonBody<'_>) -> Result<[u8; 32], Rejection> {
    let mut hash = hash_of_target(parts);
    if !body.is_empty() {
        json::hash_into(body.json()?, &mut hash)?;
    }
    Ok(hash.finalize().into())
}

fn json_members(parts: &Parts, body: &JsonBody<'_>, pointers: &[Pointer]) -> Result<[u8; 32], Rejection> {
    let mut hash = hash_of_target(parts);
    for pointer in pointers {
        let met = match body.is_empty() {
            true => vec![Met::End(None)],
            false => pointer.meet(body.json()?),
        };
        field(&mut hash, pointer.as_str().as_bytes());
        hash.update((met.len() as u64).to_le_bytes());
        for met in met {
            // Which element of which array a value belongs to is told by the lengths of all arrays on the way.
            match met {
                Met::End(None) => hash.update([0]),
                Met::End(Some(value)) => {
                    hash.update([1]);
                    json::hash_into(value, &mut hash)?;
                }
                Met::Star(None) => hash.update([2]),
                Met::Star(Some(Json::Null)) => hash.update([3]),
                Met::Star(Some(Json::Array(elements))) => {
                    hash.update([4]);
                    hash.update((elements.len() as u64).to_le_bytes());
                }
                Met::Star(Some(_)) => hash.update([5]),
            }
        }
    }
    Ok(hash.finalize().into())
}

#[cfg(feature = "blake3")]
fn whole_request_by_blake3(parts: &Parts, body: &Bytes) -> [u8; 32] {
    let mut hash = blake3::Hasher::new();
    for bytes in [parts.method.as_str(), target(parts)].map(str::as_bytes) {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    hash.update(body);
    hash.finalize().into()
}

/// A hash of method and path with query.
fn hash_of_target(parts: &Parts) -> Sha256 {
    let mut hash = Sha256::new();
    field(&mut hash, parts.method.as_str().as_bytes());
    field(&mut hash, target(parts).as_bytes());
    hash
}

fn target(parts: &Parts) -> &str {
    let target = sent_uri(&parts.extensions, &parts.uri).path_and_query();
    target.map_or("", |target| target.as_str())
}

fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

#[cfg(test)]
mod tests;
