//! The settings of a [`RedisStore`].

use std::{sync::Arc, time::Duration};

use redis::{Client, IntoConnectionInfo};

use super::{
    Inner, RedisStore, connection::Connection, failure::classify, keys::Keys, scripts::Scripts, server,
    waiters::Waiters,
};
use crate::error::{StoreError, StoreErrorKind};

/// The settings of a [`RedisStore`], from [`RedisStore::builder`].
#[derive(Clone, Debug)]
#[must_use = "nothing is connected until it is asked to"]
pub struct RedisStoreBuilder {
    prefix: String,
    timeout: Duration,
    refuse_forgetful_server: bool,
}

impl Default for RedisStoreBuilder {
    fn default() -> Self {
        Self {
            prefix: "idempotency:".to_owned(),
            timeout: Duration::from_secs(1),
            refuse_forgetful_server: false,
        }
    }
}

impl RedisStoreBuilder {
    /// What the name of each key begins with. Services that share a server need different ones, and the nodes of one
    /// service the same. Default: `idempotency:`.
    pub fn prefix(self, prefix: impl Into<String>) -> Self {
        Self {
            prefix: prefix.into(),
            ..self
        }
    }

    /// Within this time every step is answered or has failed as [`Unavailable`](StoreErrorKind::Unavailable), waiting
    /// for a connection included. The layer tries a claim twice within its
    /// [`store_timeout`](crate::IdempotencyLayer::store_timeout), so less than half of that. Default: one second.
    ///
    /// # Panics
    /// If it is zero.
    pub fn timeout(self, timeout: Duration) -> Self {
        assert!(!timeout.is_zero(), "no server answers in no time");
        Self { timeout, ..self }
    }

    /// Refuse to connect to a server that may evict records (a `maxmemory-policy` other than `noeviction`), that
    /// forgets them at a restart (no append-only file), or that does not say. Default: it is used, with a warning.
    pub fn refuse_forgetful_server(self, refuse: bool) -> Self {
        Self {
            refuse_forgetful_server: refuse,
            ..self
        }
    }

    /// Connects to a server by its URL, such as `redis://user:password@host:6379/0`, with `TCP_NODELAY`.
    ///
    /// # Errors
    /// [`Unavailable`](StoreErrorKind::Unavailable) if it cannot be reached now, and [`Other`](StoreErrorKind::Other)
    /// for a URL that is none, a refused log-in, a server before Redis 7.0, or one that is
    /// [refused](Self::refuse_forgetful_server).
    pub async fn connect(self, url: &str) -> Result<RedisStore, StoreError> {
        let info = url.into_connection_info().map_err(classify)?;
        let tcp = info.tcp_settings().clone().set_nodelay(true);
        let client = Client::open(info.set_tcp_settings(tcp)).map_err(classify)?;
        self.connect_client(client).await
    }

    /// Connects by a client of your own making: with your version of the `redis` crate's features, such as TLS, and
    /// with TCP settings, which should have `TCP_NODELAY`.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn connect_client(self, client: Client) -> Result<RedisStore, StoreError> {
        let first_look = async {
            // On a connection of its own, without the retries of the one for records: a mistake is told at once.
            client.get_multiplexed_async_connection().await.map(drop)
        };
        match tokio::time::timeout(self.timeout, first_look).await {
            Ok(result) => result.map_err(classify)?,
            Err(elapsed) => return Err(StoreError::with_source(StoreErrorKind::Unavailable, elapsed)),
        }
        let connection = Connection::new(client.clone(), self.timeout)?;
        server::check(&connection, self.refuse_forgetful_server).await?;
        let keys = Keys::new(self.prefix);
        let inner = Inner {
            connection,
            scripts: Scripts::new(),
            waiters: Waiters::new(client, keys.clone(), self.timeout),
            keys,
        };
        Ok(RedisStore { inner: Arc::new(inner) })
    }
}
