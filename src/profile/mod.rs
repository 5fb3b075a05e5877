//! Settings of known APIs: one file each, made of the setters that everybody has.

mod adyen;
mod aip_155;
mod checkbook;
mod doku;
mod gocardless;
mod midaspay;
mod oasis;
mod paypal;
mod pockyt;
mod square;
mod stripe;
mod svix;

use std::{borrow::Cow, fmt, sync::Arc};

use crate::{layer::IdempotencyLayer, rejection::RejectionKind};

type Settings = dyn Fn(IdempotencyLayer) -> IdempotencyLayer + Send + Sync;

/// The idempotency of an API, as settings of a layer. The presets are made of the same setters that a user has, and of
/// nothing else, so a further one is written in the same way. Each says where its facts come from, what that source
/// leaves open, and how it is closed here; `docs/providers.md` in the repository has all of them side by side.
///
/// ```
/// # use std::time::Duration;
/// # use tower_idempotency::{IdempotencyLayer, KeySource, MemoryStore, Profile, Statuses};
/// let acme = Profile::new("Acme", |layer| {
///     layer
///         .key(KeySource::header("acme-request"))
///         .max_key_length(36)
///         .store_statuses(Statuses::success())
///         .route("/refunds", |refunds| refunds.retention(Duration::from_secs(72 * 60 * 60)))
/// });
/// let layer = IdempotencyLayer::new(MemoryStore::new()).profile(acme);
/// ```
#[derive(Clone)]
pub struct Profile {
    name: Cow<'static, str>,
    settings: Arc<Settings>,
}

impl Profile {
    /// A profile with a name and its settings. The closure gets the layer as it is and gives it back; it may start from
    /// another profile. It runs each time that the profile is [taken](IdempotencyLayer::profile).
    pub fn new(
        name: impl Into<Cow<'static, str>>,
        settings: impl Fn(IdempotencyLayer) -> IdempotencyLayer + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            settings: Arc::new(settings),
        }
    }

    /// What the API is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn apply(&self, layer: IdempotencyLayer) -> IdempotencyLayer {
        (self.settings)(layer)
    }
}

impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Profile").field(&self.name).finish()
    }
}

/// `IDEMPOTENCY_KEY_MISSING` and its like, for APIs that write their codes so.
fn codes_in_capitals(layer: IdempotencyLayer) -> IdempotencyLayer {
    RejectionKind::ALL.iter().fold(layer, |layer, kind| {
        layer.rejection_code(*kind, kind.slug().replace('-', "_").to_uppercase())
    })
}
