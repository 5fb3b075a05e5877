//! Who a key belongs to: the same characters from two tenants, or for two operations, are two keys.

mod authorization;
mod id;
mod route;

use std::{
    fmt,
    sync::{Arc, Once},
};

use http::{Extensions, HeaderName, Uri, header, request::Parts};

use self::id::IdHasher;
use crate::{
    fingerprint::Fingerprint,
    json::{Json, JsonBody, Pointer, digest},
    key::IdempotencyKey,
    record::RecordId,
    rejection::{Rejection, RejectionKind},
};

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

/// Where the tenant is found.
#[derive(Clone, Default)]
pub(crate) enum Tenant {
    /// The `Authorization` header.
    #[default]
    Authorization,
    /// These parameters of an `Authorization` header of this scheme; of any other, the whole header.
    AuthorizationParameters(Arc<str>, Arc<[Box<str>]>),
    /// All of these headers.
    Headers(Arc<[HeaderName]>),
    Parts(Arc<FromParts>),
}

/// What the scope of a key is made of.
#[derive(Clone, Debug, Default)]
pub(crate) struct ScopeRules {
    pub(crate) tenant: Tenant,
    /// Members of a JSON body that are part of the scope.
    pub(crate) members: Vec<Pointer>,
    /// In place of the matched route.
    pub(crate) operation: Option<Arc<str>>,
}

/// What the settings name, and nothing that a request carries.
impl fmt::Debug for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Authorization => f.write_str("Authorization"),
            Self::AuthorizationParameters(scheme, names) => f
                .debug_tuple("AuthorizationParameters")
                .field(scheme)
                .field(names)
                .finish(),
            Self::Headers(names) => f.debug_tuple("Headers").field(names).finish(),
            Self::Parts(_) => f.write_str("Parts(..)"),
        }
    }
}

// Each field of the hash starts with what it is, so that "no tenant" and "a tenant of no characters" differ.
const NO_TENANT: u8 = 0;
const AUTHORIZATION: u8 = 1;
const TENANT: u8 = 2;
const ROUTE: u8 = 3;
const NAMED: u8 = 4;
const ANY: u8 = 5;
const KEY: u8 = 6;
const HEADER: u8 = 7;
const NO_HEADER: u8 = 8;
const PARAMETER: u8 = 9;
const MEMBER: u8 = 10;
const NO_MEMBER: u8 = 11;
const ALSO: u8 = 12;
const DERIVED: u8 = 13;
#[cfg(feature = "axum")]
const AFTER_SEGMENT: u8 = 14;
#[cfg(feature = "axum")]
const AFTER_SEGMENTS: u8 = 15;

impl ScopeRules {
    /// Adds to `scope` everything of a record's id but the key.
    pub(crate) fn hash_into(
        &self,
        ScopeHash(id): &mut ScopeHash,
        parts: &Parts,
        body: &JsonBody<'_>,
    ) -> Result<(), Rejection> {
        #[cfg(seeded_bug)]
        if crate::seeded::is("forgets scopes") {
            return Ok(());
        }
        let mut operation = Operation::Route;
        match &self.tenant {
            Tenant::Authorization => whole_authorization(id, parts),
            Tenant::AuthorizationParameters(scheme, names) => parameters(id, parts, scheme, names)?,
            Tenant::Headers(names) => names.iter().for_each(|name| header(id, parts, name)),
            Tenant::Parts(scope) => {
                let scope = scope(parts).ok_or_else(nobody)?;
                match &scope.tenant {
                    Some(tenant) => id.field(TENANT, tenant),
                    None => id.field(NO_TENANT, b""),
                }
                operation = scope.operation;
            }
        }
        match (operation, &self.operation) {
            (Operation::Route, Some(name)) => id.field(NAMED, name.as_bytes()),
            (Operation::Route, None) => route::hash_into(id, parts),
            (Operation::Named(name), _) => id.field(NAMED, name.as_bytes()),
            (Operation::Any, _) => id.field(ANY, b""),
        }
        for pointer in &self.members {
            member(id, pointer, body)?;
        }
        Ok(())
    }
}

fn nobody() -> Rejection {
    Rejection::new(RejectionKind::ScopeMissing)
}

fn whole_authorization(id: &mut IdHasher, parts: &Parts) {
    warn_once(parts);
    let mut anonymous = true;
    for value in parts.headers.get_all(header::AUTHORIZATION) {
        id.field(AUTHORIZATION, value.as_bytes());
        anonymous = false;
    }
    if anonymous {
        id.field(NO_TENANT, b"");
    }
}

/// Credentials of the scheme that do not clearly name these parameters name nobody: their nonce and signature would
/// make every retry a new operation.
fn parameters(id: &mut IdHasher, parts: &Parts, scheme: &str, names: &[Box<str>]) -> Result<(), Rejection> {
    let unclear = |what: String| nobody().with_detail(what);
    let lines = parts.headers.get_all(header::AUTHORIZATION);
    let Some(found) = lines.iter().find_map(|value| authorization::parameters(value, scheme)) else {
        if parts.headers.contains_key(header::AUTHORIZATION) {
            warn_of_another_scheme(scheme);
        }
        whole_authorization(id, parts);
        return Ok(());
    };
    if lines.iter().nth(1).is_some() {
        return Err(unclear("the header `authorization` was sent more than once".to_owned()));
    }
    let found = found.ok_or_else(|| unclear(format!("the parameters of the scheme {scheme} cannot be read")))?;
    for name in names {
        let value = authorization::only(&found, name)
            .ok_or_else(|| unclear(format!("the header `authorization` has to have one parameter `{name}`")))?;
        id.field(PARAMETER, name.as_bytes());
        id.field(PARAMETER, value.as_bytes());
    }
    Ok(())
}

/// The scheme may be misspelled here: then nothing that is signed anew for each attempt is protected.
fn warn_of_another_scheme(scheme: &str) {
    static ANOTHER: Once = Once::new();
    ANOTHER.call_once(|| {
        tracing::warn!(
            scheme,
            "the scope is to come from the parameters of one authorization scheme, but a request came with another: it \
             counts as a whole, so that credentials which are new for each attempt make every retry a new operation"
        );
    });
}

fn header(id: &mut IdHasher, parts: &Parts, name: &HeaderName) {
    let mut absent = true;
    for value in parts.headers.get_all(name) {
        id.field(HEADER, name.as_str().as_bytes());
        id.field(HEADER, value.as_bytes());
        absent = false;
    }
    if absent {
        id.field(NO_HEADER, name.as_str().as_bytes());
    }
}

/// By its value, so that `"7"` and `7` differ, and `7` and `7.0` do not.
fn member(id: &mut IdHasher, pointer: &Pointer, body: &JsonBody<'_>) -> Result<(), Rejection> {
    let found = match body.is_empty() {
        true => Vec::new(),
        false => pointer.find(body.json()?),
    };
    match found.first().copied().flatten() {
        None | Some(Json::Null) => id.field(NO_MEMBER, pointer.as_str().as_bytes()),
        Some(value) => {
            id.field(MEMBER, pointer.as_str().as_bytes());
            id.field(MEMBER, &digest(value)?);
        }
    }
    Ok(())
}

/// The hash of a scope, to be made the id of a record by what is named in it. Made once for a request and filled in place:
/// it is large.
pub(crate) struct ScopeHash(IdHasher);

impl ScopeHash {
    pub(crate) fn new() -> Self {
        Self(IdHasher::new())
    }

    /// The operation that the client's key names.
    pub(crate) fn key(mut self, key: &IdempotencyKey) -> RecordId {
        self.0.field(KEY, key.as_str().as_bytes());
        self.0.finish()
    }

    /// One of the keys that the operation claims beside its own.
    pub(crate) fn also(&self, pointer: &Pointer, key: &IdempotencyKey) -> RecordId {
        let mut id = self.0.clone();
        id.field(ALSO, pointer.as_str().as_bytes());
        id.field(KEY, key.as_str().as_bytes());
        id.finish()
    }

    /// The operation that has no key but what it is.
    pub(crate) fn derived(mut self, fingerprint: &Fingerprint) -> RecordId {
        self.0.field(DERIVED, &[fingerprint.algorithm()]);
        self.0.field(DERIVED, fingerprint.digest());
        self.0.finish()
    }
}

/// What the client asked for. A nested router strips its prefix, with the ids in it, before the request comes here.
#[cfg(feature = "axum")]
pub(crate) fn sent_uri<'r>(extensions: &'r Extensions, uri: &'r Uri) -> &'r Uri {
    match extensions.get::<axum::extract::OriginalUri>() {
        Some(original) => &original.0,
        None => uri,
    }
}

#[cfg(not(feature = "axum"))]
pub(crate) fn sent_uri<'r>(_: &'r Extensions, uri: &'r Uri) -> &'r Uri {
    uri
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
mod tests;
