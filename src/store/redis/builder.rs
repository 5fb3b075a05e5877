//! The settings of a [`RedisStore`].

use std::{sync::Arc, time::Duration};

use redis::{Client, aio::ConnectionLike, cluster::ClusterClient, sentinel::SentinelClient};

use super::{
    Inner, RedisStore, address,
    complete::Queue,
    connection::{Connection, Settings},
    failure::classify,
    flight::Replicas,
    granted::Granted,
    keys::Keys,
    outbox::Outbox,
    scripts::Scripts,
    tls::Certificates,
    waiters::Waiters,
    way::Way,
};
use crate::{
    error::{StoreError, StoreErrorKind},
    store::hints::Hints,
};

/// The settings of a [`RedisStore`], from [`RedisStore::builder`].
#[derive(Clone, Debug)]
#[must_use = "nothing is connected until it is asked to"]
pub struct RedisStoreBuilder {
    prefix: String,
    settings: Settings,
    certificates: Certificates,
}

impl Default for RedisStoreBuilder {
    fn default() -> Self {
        Self {
            prefix: "idempotency:".to_owned(),
            settings: Settings {
                timeout: Duration::from_secs(1),
                refuse_forgetful_server: false,
                replicas: None,
            },
            certificates: Certificates::default(),
        }
    }
}

impl RedisStoreBuilder {
    /// What the name of each key begins with. Services that share a server need different ones, and the nodes of one
    /// service the same. A name with braces keeps all records in one slot of a cluster. Default: `idempotency:`.
    pub fn prefix(self, prefix: impl Into<String>) -> Self {
        Self {
            prefix: prefix.into(),
            ..self
        }
    }

    /// Within this time every step is answered or has failed as [`Unavailable`](StoreErrorKind::Unavailable), waiting
    /// for a connection included, unless something blocks the threads of its runtime for longer. Each of the layer's two tries
    /// has its [`store_timeout`](crate::IdempotencyLayer::store_timeout), so less than that, or the layer gives steps up
    /// before it is known what became of them. Default: one second.
    ///
    /// # Panics
    /// If it is zero.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        assert!(!timeout.is_zero(), "no server answers in no time");
        self.settings.timeout = timeout;
        self
    }

    /// Refuse servers that may evict records (a `maxmemory-policy` other than `noeviction`), that forget them at a
    /// restart (no append-only file), or that do not say; the new primary after a failover, too, and of a cluster
    /// each server that can be reached when it is connected to. Default: they are used, with a warning.
    pub fn refuse_forgetful_server(mut self, refuse: bool) -> Self {
        self.settings.refuse_forgetful_server = refuse;
        self
    }

    /// Nothing is done until this many replicas have acknowledged it (`WAIT`). If fewer do `within` this time, which is
    /// rounded down to milliseconds, the step fails as [`Unavailable`](StoreErrorKind::Unavailable): no handler runs
    /// under such a claim, and a completion is tried again. It may be on the primary all the same.
    ///
    /// A failover that promotes a replica which acknowledged loses nothing then. Which one it promotes is not up to us,
    /// so this makes a loss rarer and not impossible. All steps of a process wait in one line, so their number per second
    /// is at most that of a replica's answers. `within` has to be less than the [`timeout`](Self::timeout), or nothing
    /// connects: a step would end, and its connection with it, before it is known that there are too few. Default: none
    /// are waited for.
    ///
    /// # Panics
    /// If `count` is zero.
    pub fn wait_for_replicas(mut self, count: usize, within: Duration) -> Self {
        assert!(count > 0, "there is nothing to wait for");
        self.settings.replicas = Some(Replicas { count, within });
        self
    }

    /// Certificates (PEM) that servers' own are checked against. Default: those that the system trusts.
    ///
    /// rustls is the encryption. If the program has not chosen its cryptography (`CryptoProvider::install_default`) by
    /// the time of the first encrypted connection, it is ring from then on.
    #[cfg(feature = "redis-tls")]
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.certificates.root = Some(pem.into());
        self
    }

    /// The certificate (PEM) that servers know this client by, and its key. Default: none.
    #[cfg(feature = "redis-tls")]
    pub fn client_certificate(mut self, pem: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.certificates.client = Some((pem.into(), key.into()));
        self
    }

    /// Connects by URL, with `TCP_NODELAY`:
    ///
    /// | URL | leads to |
    /// |---|---|
    /// | `redis://user:password@host:6379/0` | one server |
    /// | `redis+cluster://user:password@host:6379,host:6380` | a cluster, by any of its nodes |
    /// | `redis+sentinel://user:password@host:26379,host:26380/service/0` | the primary of a service, by its sentinels |
    ///
    /// `rediss` in place of `redis` encrypts (feature `redis-tls`); `valkey` and `valkeys` are the same as `redis` and
    /// `rediss`. Credentials are those of the servers; `?sentinel_username=…&sentinel_password=…` are those of
    /// sentinels. In all of them `%` and two hexadecimal digits stand for a byte.
    ///
    /// # Errors
    /// [`Unavailable`](StoreErrorKind::Unavailable) if it cannot be reached now, and [`Other`](StoreErrorKind::Other)
    /// for a URL that is none, a refused log-in, a server before Redis 7.0, or one that is
    /// [refused](Self::refuse_forgetful_server).
    pub async fn connect(self, url: &str) -> Result<RedisStore, StoreError> {
        let way = address::way(url, &self.certificates).map_err(classify)?;
        self.start(way).await
    }

    /// Connects by a client of your own making, with TCP settings, which should have `TCP_NODELAY`, and certificates.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn connect_client(self, client: Client) -> Result<RedisStore, StoreError> {
        self.start(Way::Single(client)).await
    }

    /// Connects by a client of a cluster of your own making. Its waiters hear of changes if it speaks RESP3, and look
    /// again each second if it does not. One that reads from replicas makes each step on a primary all the same; but it
    /// listens at replicas, where nothing is told, so that its waiters look again each second, too.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn connect_cluster(self, client: ClusterClient) -> Result<RedisStore, StoreError> {
        self.start(Way::Cluster(Box::new(client))).await
    }

    /// Connects by a client of sentinels of your own making, which has to be one for the primary. They are asked again
    /// whenever the connection breaks or its server is no primary any more.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn connect_sentinel(self, client: SentinelClient) -> Result<RedisStore, StoreError> {
        self.start(Way::sentinel(client)).await
    }

    /// Works on a connection of your own, such as a `ConnectionManager` that the rest of the program uses, too; not one
    /// to a cluster. It has to make itself anew when it breaks. Waiters look again four times a second: nothing is subscribed to.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn connect_with<C>(self, connection: C) -> Result<RedisStore, StoreError>
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        self.start(Way::Own(Box::new(connection))).await
    }

    async fn start(self, way: Way) -> Result<RedisStore, StoreError> {
        if self
            .settings
            .replicas
            .is_some_and(|replicas| replicas.within >= self.settings.timeout)
        {
            let what = "replicas are to be waited for as long as for the server itself, or longer";
            return Err(StoreError::with_source(StoreErrorKind::Other, what));
        }
        let (way, keys, timeout) = (Arc::new(way), Keys::new(self.prefix), self.settings.timeout);
        let connection = Arc::new(Connection::new(Arc::clone(&way), self.settings));
        connection.open().await.map_err(classify)?;
        let inner = Inner {
            outbox: Outbox::new(Arc::clone(&connection)),
            connection,
            scripts: Scripts::new(way.is_cluster()),
            waiters: Waiters::new(way, keys.clone(), timeout),
            keys,
            granted: Granted::new(),
            queue: Queue::default(),
            hints: Hints::new(),
        };
        Ok(RedisStore { inner: Arc::new(inner) })
    }
}
