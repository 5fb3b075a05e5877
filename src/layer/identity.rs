//! Settings: whom a key belongs to, and what makes two requests the same.

use std::sync::Arc;

use http::{HeaderName, request};

use super::IdempotencyLayer;
use crate::{
    fingerprint::Fingerprinter,
    json::Pointer,
    scope::{Scope, Tenant},
};

impl IdempotencyLayer {
    /// Whom a key belongs to; the closure gives a [`Scope`] or an `Option<Scope>`. Where it finds none the request is
    /// refused (400): a key that belongs to nobody would belong to everybody.
    ///
    /// Default: the `Authorization` header and the matched route, or the path where no route was matched (a plain tower
    /// service, tonic, the layer around a whole `Router`). The method is in the fingerprint, not in the scope. That
    /// keeps tenants apart who authenticate by this header, but a retry under a refreshed token is a new operation
    /// then, and callers who send none (they use cookies, or another header) share one scope. Prefer the account's id:
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// # #[derive(Clone)] struct Account { id: String }
    /// IdempotencyLayer::new(MemoryStore::new())
    ///     .scope(|parts| parts.extensions.get::<Account>().map(|account| Scope::tenant(&account.id)));
    /// ```
    ///
    /// The names of a route's parameters count for nothing, so a deploy may rename them. One that moves the layer from
    /// around a `Router` into it turns the path into a route, which is another scope: **a retry across that deploy runs
    /// again**, unless an [operation](Self::operation) is named before and after it. Host and scheme count for nothing;
    /// with tenants by host name and a credential that they share, take the host into the [`Scope`], too.
    #[must_use]
    pub fn scope<R>(self, scope: impl Fn(&request::Parts) -> R + Send + Sync + 'static) -> Self
    where
        R: Into<Option<Scope>>,
    {
        self.tenant(Tenant::Parts(Arc::new(move |parts| scope(parts).into())))
    }

    fn tenant(self, tenant: Tenant) -> Self {
        self.set(|policy| policy.scope.tenant = tenant.clone())
    }

    /// Takes the values of these headers, all of them, for the tenant; one that is not sent counts as such. In place of
    /// [`scope`](Self::scope), and of its default. Among them has to be what the server authenticates: a header that
    /// anybody can make up keeps nobody apart.
    ///
    /// # Panics
    /// If there is no name, or one is not a header name.
    #[must_use]
    #[allow(clippy::panic, reason = "documented, and before any request")]
    pub fn scope_headers<'a>(self, names: impl IntoIterator<Item = &'a str>) -> Self {
        let parse = |name: &str| match HeaderName::from_bytes(name.as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("{name:?} is not a header name"),
        };
        let names: Arc<[_]> = names.into_iter().map(parse).collect();
        assert!(!names.is_empty(), "without headers all callers would share one scope");
        self.tenant(Tenant::Headers(names))
    }

    /// Takes these parameters of an `Authorization` header for the tenant, where it is of this scheme:
    /// `Scheme id="m1",nonce="…",signature="…"`. What else it carries counts for nothing, so that a retry may be signed
    /// anew. In place of [`scope`](Self::scope), and of its default.
    ///
    /// Where such a header cannot be read, or has not each of the parameters once, the request is refused as
    /// [`ScopeMissing`](crate::RejectionKind::ScopeMissing). An `Authorization` of another scheme counts as a whole,
    /// and its absence as such, as by default: **a caller who signs anew under another scheme is a new tenant for each
    /// attempt**, so refuse other schemes above this layer. One `tracing` warning per process tells of the first.
    /// Scheme and names are compared without regard to case; values may be quoted or bare.
    ///
    /// Nothing here checks a signature: the layer that does stands above this one.
    ///
    /// # Panics
    /// If there is no parameter, or the scheme is not the name of one, such as with a space in it.
    #[must_use]
    pub fn scope_authorization<'a>(self, scheme: &str, parameters: impl IntoIterator<Item = &'a str>) -> Self {
        let parameters: Arc<[_]> = parameters.into_iter().map(Box::from).collect();
        assert!(
            !parameters.is_empty(),
            "without parameters all callers would share one scope"
        );
        // Schemes and the names of headers are tokens, both.
        let is_scheme = HeaderName::from_bytes(scheme.as_bytes()).is_ok();
        assert!(is_scheme, "{scheme:?} is not an authorization scheme");
        self.tenant(Tenant::AuthorizationParameters(scheme.into(), parameters))
    }

    /// One more part of the scope: a member of the JSON body, by its JSON pointer (RFC 6901), such as a merchant's
    /// number. Its value counts, of whatever type; a request that lacks it, or has `null` there, is apart from all that
    /// have it. The body of a request with a key, sent or [derived](crate::WithoutKey::DeriveAndReplay), has to be JSON or
    /// empty then, and is refused as [`BodyUnreadable`](crate::RejectionKind::BodyUnreadable) otherwise. Default: none.
    ///
    /// # Panics
    /// If `pointer` is not a JSON pointer to a single member.
    #[must_use]
    pub fn scope_member(self, pointer: &str) -> Self {
        let pointer = Pointer::parse(pointer);
        assert!(!pointer.is_to_many(), "a part of the scope is one member");
        self.set(|policy| policy.scope.members.push(pointer.clone()))
    }

    /// What the scope calls the operation, in place of the matched route: one name for all routes that make the same
    /// kind of thing. Their keys are one namespace then, but the path stays in the fingerprint: the same key on another
    /// route of the operation is refused, not replayed. A [`Scope`] that names its operation itself goes first.
    /// Default: the matched route.
    #[must_use]
    pub fn operation(self, name: impl Into<Arc<str>>) -> Self {
        let name = name.into();
        self.set(|policy| policy.scope.operation = Some(Arc::clone(&name)))
    }

    /// What makes two requests with one key the same; a request that is not is refused as
    /// [`KeyReused`](crate::RejectionKind::KeyReused). Default: [`Fingerprinter::whole_request`].
    ///
    /// Where keys are [derived](crate::WithoutKey::DeriveAndReplay) this is what they are made of. **A deploy that changes
    /// it then lets a retry without a key run again.**
    #[must_use]
    pub fn fingerprint(self, fingerprinter: Fingerprinter) -> Self {
        self.set(|policy| policy.fingerprinter = fingerprinter.clone())
    }
}
