//! Where records are kept.

use tower_idempotency::{AnyStore, MemoryStore};

use crate::args;

/// The store that was asked for; and, if it is the one in memory, what it says of itself.
#[cfg_attr(not(feature = "redis"), allow(clippy::unused_async))]
pub async fn open(store: &args::Store) -> Result<(AnyStore, Option<MemoryStore>), String> {
    match store {
        args::Store::Memory => {
            let memory = MemoryStore::new();
            Ok((AnyStore::new(memory.clone()), Some(memory)))
        }
        #[cfg(feature = "redis")]
        args::Store::Redis(url) => {
            let store = tower_idempotency::RedisStore::connect(url).await;
            let store = store.map_err(|error| match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            })?;
            Ok((AnyStore::new(store), None))
        }
    }
}
