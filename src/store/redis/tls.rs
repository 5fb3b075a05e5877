//! Certificates of encrypted connections.

use redis::{Client, ConnectionInfo, RedisResult, cluster::ClusterClientBuilder, sentinel::SentinelClientBuilder};
#[cfg(feature = "redis-tls")]
use redis::{ClientTlsConfig, TlsCertificates};

/// Instead of, and beside, those that the system trusts.
#[derive(Clone, Default)]
pub(super) struct Certificates {
    #[cfg(feature = "redis-tls")]
    pub(super) root: Option<Vec<u8>>,
    /// A certificate and its key.
    #[cfg(feature = "redis-tls")]
    pub(super) client: Option<(Vec<u8>, Vec<u8>)>,
}

#[cfg(feature = "redis-tls")]
impl Certificates {
    /// rustls wants to be told whose cryptography it uses where a program has several, and panics if nobody did. What
    /// the program chose itself stays.
    #[allow(clippy::unnecessary_wraps, reason = "without the feature it fails")]
    pub(super) fn prepare(&self) -> RedisResult<()> {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // Somebody else may have been faster.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        Ok(())
    }

    fn given(&self) -> Option<TlsCertificates> {
        let client_tls = self.client.clone().map(|(client_cert, client_key)| ClientTlsConfig {
            client_cert,
            client_key,
        });
        let root_cert = self.root.clone();
        let is_given = client_tls.is_some() || root_cert.is_some();
        is_given.then_some(TlsCertificates { client_tls, root_cert })
    }

    pub(super) fn client(&self, info: ConnectionInfo) -> RedisResult<Client> {
        match self.given() {
            Some(certificates) => Client::build_with_tls(info, certificates),
            None => Client::open(info),
        }
    }

    pub(super) fn of_cluster(&self, builder: ClusterClientBuilder) -> ClusterClientBuilder {
        match self.given() {
            Some(certificates) => builder.certs(certificates),
            None => builder,
        }
    }

    pub(super) fn of_sentinel(&self, builder: SentinelClientBuilder) -> SentinelClientBuilder {
        match self.given() {
            Some(certificates) => builder
                .set_client_to_redis_certificates(certificates.clone())
                .set_client_to_sentinel_certificates(certificates),
            None => builder,
        }
    }
}

#[cfg(not(feature = "redis-tls"))]
impl Certificates {
    pub(super) fn prepare(&self) -> RedisResult<()> {
        Err(super::address::wrong(
            "an encrypted connection needs the feature redis-tls",
        ))
    }

    pub(super) fn client(&self, info: ConnectionInfo) -> RedisResult<Client> {
        Client::open(info)
    }

    pub(super) fn of_cluster(&self, builder: ClusterClientBuilder) -> ClusterClientBuilder {
        builder
    }

    pub(super) fn of_sentinel(&self, builder: SentinelClientBuilder) -> SentinelClientBuilder {
        builder
    }
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Certificates(..)")
    }
}
