//! The layer and its settings.

mod answer;
mod attempt;
mod identity;
mod key;
mod refusal;

use std::{fmt, sync::Arc};

use tower_layer::Layer;

use crate::{
    drain::Drain,
    observe::Counters,
    policy::Policy,
    profile::Profile,
    service::Idempotency,
    shared::Shared,
    store::{AnyStore, Store},
};

/// Makes the service below it safe to retry: see the [crate's documentation](crate).
///
/// Every setter says its default, which is right for money. Clones share the store; a setter called on a clone changes
/// that clone alone, so routes can differ. Put one of them on each route. **Two on one request are dangerous**: the
/// outer one decides and the inner one does nothing, so a client that adds the outer one's key switches off the inner
/// one, with its [`require_key`](Self::require_key) and its scope.
///
/// ```
/// # use std::time::Duration;
/// # use axum::{Router, routing::post};
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Guarantee};
/// let idempotency = IdempotencyLayer::new(MemoryStore::new()).require_key();
/// let app: Router = Router::new()
///     .route("/payments", post(async || "paid").layer(idempotency.clone()))
///     .route("/reports", post(async || "made").layer(
///         idempotency.clone()
///             .guarantee(Guarantee::AtLeastOnce)
///             .retention(Duration::from_secs(5 * 60)),
///     ));
/// ```
#[derive(Clone)]
pub struct IdempotencyLayer {
    shared: Arc<Shared>,
}

impl IdempotencyLayer {
    /// A layer with the default settings over `store`.
    pub fn new(store: impl Store) -> Self {
        Self {
            shared: Arc::new(Shared::new(AnyStore::new(store).into_inner())),
        }
    }

    /// Takes the settings of an API; what its profile does not name stays as it is. Whatever is set afterwards goes
    /// first, on the routes of the profile, too. Default: none. See [`Profile`] for those that are here, and for how to
    /// write another.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Profile, Scope};
    /// IdempotencyLayer::new(MemoryStore::new())
    ///     .profile(Profile::pockyt())
    ///     .max_request_body(64 * 1024);
    /// ```
    ///
    /// # Panics
    /// As the settings of which the profile is made, such as [`route`](Self::route) where two patterns are one.
    #[must_use]
    pub fn profile(self, profile: Profile) -> Self {
        profile.apply(self)
    }

    /// Settings of the requests whose path this is, over those of all others. `pattern` is a route as axum writes it:
    /// `/refunds`, `/orders/{id}`, `/card/{*rest}`; where several match, the more exact one counts. Without
    /// a match the layer's own settings do. The path is the one that the client sent; where no pattern matches that, it
    /// is the rest that axum's nested routers left of it, so that a profile's routes hold under a prefix, too: for that
    /// the layer has to stand inside the nested router, since around it there is the whole path alone. It is
    /// compared character by character, so that `/refunds/` is not `/refunds`.
    ///
    /// The closure starts from the layer's settings as they are at this point, or from those of the pattern if it is
    /// there already. What is set on the layer afterwards is set for all of its routes, too. Default: no routes.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// IdempotencyLayer::new(MemoryStore::new())
    ///     .retention(Duration::from_secs(5 * 60))
    ///     .route("/refunds", |refunds| refunds.retention(Duration::from_secs(72 * 60 * 60)));
    /// ```
    ///
    /// # Panics
    /// If the pattern is not a route, or conflicts with an earlier one as axum's routes do: `/card/{id}` with
    /// `/card/{*rest}`, but not `/card/new` with either. If the closure adds routes: routes stand beside each other.
    #[must_use]
    pub fn route(mut self, pattern: &str, settings: impl FnOnce(Self) -> Self) -> Self {
        let shared = match self.shared.routes.named(pattern) {
            Some(route) => Arc::clone(route),
            None => Arc::new(self.shared.without_routes()),
        };
        let route = settings(Self { shared }).shared;
        assert!(
            route.routes.is_empty(),
            "the settings of {pattern:?} have routes of their own"
        );
        Arc::make_mut(&mut self.shared).routes.put(pattern, route);
        self
    }

    fn set(mut self, change: impl Fn(&mut Policy)) -> Self {
        Arc::make_mut(&mut self.shared).change(&change);
        self
    }

    /// A handle by which to wait, at shutdown, until no request with a key is running, with a client or without.
    pub fn drain(&self) -> Drain {
        Drain::new(Arc::clone(&self.shared.tasks))
    }

    /// What this layer and its clones have done so far.
    pub fn counters(&self) -> Counters {
        self.shared.tally.snapshot()
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = Idempotency<S>;

    fn layer(&self, inner: S) -> Idempotency<S> {
        Idempotency::new(inner, Arc::clone(&self.shared))
    }
}

impl fmt::Debug for IdempotencyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyLayer")
            .field("policy", &self.shared.policy)
            .field("routes", &self.shared.routes)
            .finish_non_exhaustive()
    }
}
