//! Who a key belongs to: the same characters from two tenants, or for two operations, are two keys.

use std::{
    fmt,
    sync::{Arc, Once},
};

use http::{Uri, header, request::Parts};
use sha2::{Digest, Sha256};

use crate::{key::IdempotencyKey, record::RecordId};

/// The part of a record's identity that the server knows: the tenant and the operation.
///
/// The record's id is a hash over both and the key, each with its length, so that no two different triples meet.
///
/// ```
/// use tower_idempotency::Scope;
///
/// // The tenant, and the matched route (which is the default operation):
/// Scope::tenant("account-42");
/// // One name for several routes that create the same kind of thing:
/// Scope::tenant("account-42").operation("refund");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Scope {
    tenant: Option<Vec<u8>>,
    operation: Operation,
}

#[derive(Clone, PartialEq, Eq)]
enum Operation {
    Route,
    Named(String),
    Any,
}

impl Scope {
    /// One tenant's keys, apart from every other tenant's. Use what stays the same between two attempts:
    /// an account's id, not an access token.
    pub fn tenant(tenant: impl AsRef<[u8]>) -> Self {
        Self {
            tenant: Some(tenant.as_ref().to_vec()),
            operation: Operation::Route,
        }
    }

    /// One scope for all callers: whoever sends another caller's key with the same request **gets that caller's
    /// answer**. Only for services that have a single tenant.
    pub fn shared_by_all_tenants() -> Self {
        Self {
            tenant: None,
            operation: Operation::Route,
        }
    }

    /// Names the operation instead of taking the matched route.
    #[must_use]
    pub fn operation(mut self, name: impl Into<String>) -> Self {
        self.operation = Operation::Named(name.into());
        self
    }

    /// A key counts once across all operations of the tenant.
    #[must_use]
    pub fn any_operation(mut self) -> Self {
        self.operation = Operation::Any;
        self
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scope(..)")
    }
}

type FromParts = dyn Fn(&Parts) -> Option<Scope> + Send + Sync;

#[derive(Clone, Default)]
pub(crate) enum ScopeSource {
    /// The `Authorization` header and the matched route.
    #[default]
    Authorization,
    Parts(Arc<FromParts>),
}

/// A closure found nobody whom the request's key could belong to.
#[derive(Debug)]
pub(crate) struct NoScope;

// Each field of the hash starts with what it is, so that "no tenant" and "a tenant of no characters" differ.
const NO_TENANT: u8 = 0;
const AUTHORIZATION: u8 = 1;
const TENANT: u8 = 2;
const ROUTE: u8 = 3;
const NAMED: u8 = 4;
const ANY: u8 = 5;
const KEY: u8 = 6;

impl ScopeSource {
    pub(crate) fn record_id(&self, parts: &Parts, key: &IdempotencyKey) -> Result<RecordId, NoScope> {
        let mut id = IdHasher::new();
        match self {
            Self::Authorization => {
                warn_once(parts);
                let mut anonymous = true;
                for value in parts.headers.get_all(header::AUTHORIZATION) {
                    id.field(AUTHORIZATION, value.as_bytes());
                    anonymous = false;
                }
                if anonymous {
                    id.field(NO_TENANT, b"");
                }
                id.field(ROUTE, route(parts).as_bytes());
            }
            Self::Parts(scope) => {
                let scope = scope(parts).ok_or(NoScope)?;
                match &scope.tenant {
                    Some(tenant) => id.field(TENANT, tenant),
                    None => id.field(NO_TENANT, b""),
                }
                match &scope.operation {
                    Operation::Route => id.field(ROUTE, route(parts).as_bytes()),
                    Operation::Named(name) => id.field(NAMED, name.as_bytes()),
                    Operation::Any => id.field(ANY, b""),
                }
            }
        }
        id.field(KEY, key.as_str().as_bytes());
        Ok(id.finish())
    }
}

/// SHA-256 over tagged fields with their lengths; collected first, since many small updates cost more than one.
struct IdHasher {
    input: [u8; 256],
    filled: usize,
    hash: Option<Sha256>,
}

impl IdHasher {
    fn new() -> Self {
        Self {
            input: [0; 256],
            filled: 0,
            hash: None,
        }
    }

    fn field(&mut self, tag: u8, bytes: &[u8]) {
        self.write(&[tag]);
        self.write(&(bytes.len() as u64).to_le_bytes());
        self.write(bytes);
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.filled + bytes.len() > self.input.len() {
            let hash = self.hash.get_or_insert_with(Sha256::new);
            hash.update(&self.input[..self.filled]);
            self.filled = 0;
            if bytes.len() > self.input.len() {
                hash.update(bytes);
                return;
            }
        }
        self.input[self.filled..self.filled + bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
    }

    fn finish(self) -> RecordId {
        let rest = &self.input[..self.filled];
        let digest = match self.hash {
            None => Sha256::digest(rest),
            Some(hash) => hash.chain_update(rest).finalize(),
        };
        RecordId::from_bytes(digest.into())
    }
}

#[cfg(feature = "axum")]
fn route(parts: &Parts) -> &str {
    match parts.extensions.get::<axum::extract::MatchedPath>() {
        Some(matched) => matched.as_str(),
        None => sent_uri(parts).path(),
    }
}

#[cfg(not(feature = "axum"))]
fn route(parts: &Parts) -> &str {
    sent_uri(parts).path()
}

/// What the client asked for. A nested router strips its prefix, with the ids in it, before the request comes here.
#[cfg(feature = "axum")]
pub(crate) fn sent_uri(parts: &Parts) -> &Uri {
    match parts.extensions.get::<axum::extract::OriginalUri>() {
        Some(original) => &original.0,
        None => &parts.uri,
    }
}

#[cfg(not(feature = "axum"))]
pub(crate) fn sent_uri(parts: &Parts) -> &Uri {
    &parts.uri
}

/// The default scope is safe between tenants that authenticate by the `Authorization` header; say once where it may not
/// be what is wanted.
fn warn_once(parts: &Parts) {
    static BEARER: Once = Once::new();
    static ELSEWHERE: Once = Once::new();
    let authorization = parts.headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    match authorization {
        Some(value) if value.len() > 7 && value[..7].eq_ignore_ascii_case(b"bearer ") => BEARER.call_once(|| {
            tracing::warn!(
                "the default scope hashes the Authorization header and a bearer token was sent: once the token is \
                 refreshed, a retry is a new operation; use .scope() with the account's id"
            );
        }),
        None if parts.headers.contains_key(header::COOKIE) || parts.headers.contains_key("x-api-key") => {
            ELSEWHERE.call_once(|| {
                tracing::warn!(
                    "the default scope hashes the Authorization header, but a request came without one and with a \
                     Cookie or X-Api-Key: such callers share one scope; use .scope() with the account's id"
                );
            });
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::key::{KeyRules, KeySource};

    fn request(authorization: Option<&str>, path: &str, key: &str) -> Parts {
        let mut request = http::Request::post(path).header("idempotency-key", key);
        if let Some(value) = authorization {
            request = request.header("authorization", value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn id_of(source: &ScopeSource, parts: &Parts) -> RecordId {
        let key = KeySource::default().find(parts, &KeyRules::default()).unwrap().unwrap();
        source.record_id(parts, &key).unwrap()
    }

    fn id(authorization: Option<&str>, path: &str, key: &str) -> RecordId {
        id_of(&ScopeSource::Authorization, &request(authorization, path, key))
    }

    fn scoped(scope: Scope, path: &str, key: &str) -> RecordId {
        let source = ScopeSource::Parts(Arc::new(move |_| Some(scope.clone())));
        id_of(&source, &request(None, path, key))
    }

    #[test]
    fn the_default_scope_keeps_tenants_and_routes_apart() {
        let one = id(Some("token-a"), "/payments", "k");
        assert_eq!(one, id(Some("token-a"), "/payments", "k"));
        assert_ne!(one, id(Some("token-b"), "/payments", "k"));
        assert_ne!(one, id(None, "/payments", "k"));
        assert_ne!(one, id(Some("token-a"), "/refunds", "k"));
        assert_ne!(one, id(Some("token-a"), "/payments", "K"));
    }

    #[test]
    fn no_two_scopes_and_keys_meet_by_concatenation() {
        assert_ne!(
            scoped(Scope::tenant("a:b").any_operation(), "/", "c"),
            scoped(Scope::tenant("a").any_operation(), "/", "b:c"),
        );
        assert_ne!(
            scoped(Scope::tenant("a").operation("bc"), "/", "d"),
            scoped(Scope::tenant("ab").operation("c"), "/", "d"),
        );
        assert_ne!(
            scoped(Scope::tenant("").operation("o"), "/", "k"),
            scoped(Scope::shared_by_all_tenants().operation("o"), "/", "k"),
        );
        assert_ne!(
            scoped(Scope::tenant("t").operation("/payments"), "/payments", "k"),
            scoped(Scope::tenant("t"), "/payments", "k"),
            "a name is not a route",
        );
        assert_ne!(
            id(Some("t"), "/p", "k"),
            scoped(Scope::tenant("t"), "/p", "k"),
            "a tenant is not an Authorization header",
        );
    }

    #[test]
    fn an_operation_can_span_routes() {
        let refund = |path| scoped(Scope::tenant("t").operation("refund"), path, "k");
        assert_eq!(refund("/v1/refunds"), refund("/v2/refunds"));
        assert_ne!(
            scoped(Scope::tenant("t"), "/v1", "k"),
            scoped(Scope::tenant("t"), "/v2", "k")
        );
    }

    #[test]
    fn ids_longer_than_the_buffer_depend_on_every_byte() {
        let long = "x".repeat(1000);
        let mut other = long.clone();
        other.replace_range(999..1000, "y");
        assert_eq!(id(Some(&long), "/p", "k"), id(Some(&long), "/p", "k"));
        assert_ne!(id(Some(&long), "/p", "k"), id(Some(&other), "/p", "k"));
        assert_ne!(id(Some(&long), "/p", "k"), id(Some(&long), "/p", "l"));
    }

    #[test]
    fn the_id_does_not_depend_on_how_the_fields_meet_the_buffer() {
        for length in 0..600 {
            let tenant = "t".repeat(length);
            let mut whole = Sha256::new();
            for (tag, bytes) in [(TENANT, tenant.as_bytes()), (ANY, b""), (KEY, b"k")] {
                whole.update([tag]);
                whole.update((bytes.len() as u64).to_le_bytes());
                whole.update(bytes);
            }
            let expected = RecordId::from_bytes(whole.finalize().into());
            assert_eq!(
                scoped(Scope::tenant(&tenant).any_operation(), "/", "k"),
                expected,
                "{length}"
            );
        }
    }

    #[test]
    fn a_caller_without_a_scope_has_no_id() {
        let parts = request(None, "/", "k");
        let key = KeySource::default()
            .find(&parts, &KeyRules::default())
            .unwrap()
            .unwrap();
        let nobody = ScopeSource::Parts(Arc::new(|_| None));
        assert!(nobody.record_id(&parts, &key).is_err());
    }
}
