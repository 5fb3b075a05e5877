#![allow(clippy::unwrap_used)]

use super::*;
use sha2::{Digest, Sha256};

use crate::key::{InHead, KeyRules, KeySource};

fn request(authorization: Option<&str>, path: &str, key: &str) -> Parts {
    let mut request = http::Request::post(path).header("idempotency-key", key);
    if let Some(value) = authorization {
        request = request.header("authorization", value);
    }
    request.body(()).unwrap().into_parts().0
}

fn id_of(tenant: Tenant, parts: &Parts) -> RecordId {
    let rules = ScopeRules {
        tenant,
        ..ScopeRules::default()
    };
    let mut scope = ScopeHash::new();
    rules.hash_into(&mut scope, parts, &JsonBody::new(b"")).unwrap();
    scope.key(&key_of(parts))
}

fn key_of(parts: &Parts) -> IdempotencyKey {
    match KeySource::default().in_head(parts, &KeyRules::default()) {
        Ok(InHead::Key(key)) => key,
        _ => unreachable!("every request here has a key"),
    }
}

fn id(authorization: Option<&str>, path: &str, key: &str) -> RecordId {
    id_of(Tenant::Authorization, &request(authorization, path, key))
}

fn scoped(scope: Scope, path: &str, key: &str) -> RecordId {
    let tenant = Tenant::Parts(Arc::new(move |_| Some(scope.clone())));
    id_of(tenant, &request(None, path, key))
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
    let rules = ScopeRules {
        tenant: Tenant::Parts(Arc::new(|_| None)),
        ..ScopeRules::default()
    };
    let request = request(None, "/", "k");
    let rejection = rules
        .hash_into(&mut ScopeHash::new(), &request, &JsonBody::new(b""))
        .unwrap_err();
    assert_eq!(rejection.kind(), RejectionKind::ScopeMissing);
}
