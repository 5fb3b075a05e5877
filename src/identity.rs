//! key → scope → fingerprint: which record a request belongs to, and what it is kept with.

use bytes::Bytes;
use http::request;

use crate::{
    fingerprint::Fingerprint,
    json::JsonBody,
    key::IdempotencyKey,
    policy::{Policy, WithoutKey},
    record::RecordId,
    rejection::{Rejection, RejectionKind},
    scope::ScopeHash,
};

/// Who a request is.
pub(crate) struct Identity {
    pub(crate) key: IdempotencyKey,
    pub(crate) id: RecordId,
    pub(crate) fingerprint: Fingerprint,
    /// Whether the client sent no key, and a duplicate is to be told so.
    pub(crate) refuses_duplicates: bool,
    /// What the operation claims beside its own record, in the order in which everybody claims.
    pub(crate) others: Box<[RecordId]>,
}

/// `None` for a request without a key that may pass. `key` is what was found in the request's head.
pub(crate) fn identify(
    policy: &Policy,
    parts: &request::Parts,
    body: &Bytes,
    key: Option<IdempotencyKey>,
) -> Result<Option<Identity>, Rejection> {
    let json = JsonBody::new(body);
    let key = match key {
        Some(key) => Some(key),
        None => policy.key.in_body(&json, &policy.key_rules)?,
    };
    match (&key, policy.without_key) {
        (None, WithoutKey::Pass) => match &policy.first_sent {
            // It means to be protected.
            Some(first_sent) if first_sent.is_in(&parts.headers) => return Err(key_missing(policy)),
            _ => return Ok(None),
        },
        (None, WithoutKey::Refuse) => return Err(key_missing(policy)),
        (None, WithoutKey::DeriveAndReplay | WithoutKey::DeriveAndRefuse) | (Some(_), _) => {}
    }
    // By now: its body may have been slow.
    if let Some(first_sent) = &policy.first_sent {
        first_sent.check(parts, policy.retention)?;
    }
    let mut scope = ScopeHash::new();
    policy.scope.hash_into(&mut scope, parts, &json)?;
    let fingerprint = policy.fingerprinter.fingerprint(parts, body, &json)?;
    let others = policy.key.others(&json, &policy.key_rules)?;
    let mut others: Box<[_]> = others.iter().map(|(pointer, key)| scope.also(pointer, key)).collect();
    // Whoever claims several claims them in one order: of two that want the same ones, the first one's first is free.
    others.sort_unstable();
    let refuses_duplicates = key.is_none() && policy.without_key == WithoutKey::DeriveAndRefuse;
    let (key, id) = match key {
        Some(key) => {
            let id = scope.key(&key);
            (key, id)
        }
        None => {
            // Another fingerprinter gives another name: what was begun under the one before is not looked for.
            let name = policy.fingerprinter.for_name(parts, body, &fingerprint);
            (IdempotencyKey::derived(&name), scope.derived(&name))
        }
    };
    Ok(Some(Identity {
        key,
        id,
        fingerprint,
        refuses_duplicates,
        others,
    }))
}

pub(crate) fn key_missing(policy: &Policy) -> Rejection {
    let detail = format!("this operation requires {}", policy.key.describe());
    Rejection::new(RejectionKind::KeyMissing).with_detail(detail)
}
