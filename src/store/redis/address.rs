//! URLs of single servers, sentinels and clusters.

use percent_encoding::percent_decode_str;
use redis::{
    Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo, ProtocolVersion, RedisError, RedisResult,
    TlsMode,
    cluster::ClusterClientBuilder,
    io::tcp::TcpSettings,
    sentinel::{SentinelClientBuilder, SentinelServerType},
};

use super::{tls::Certificates, way::Way};

const SENTINEL_PORT: u16 = 26379;

/// What a URL says before its hosts.
enum Kind {
    Single,
    Cluster,
    Sentinel,
}

/// The way to the servers of a URL.
pub(super) fn way(url: &str, certificates: &Certificates) -> RedisResult<Way> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", ""));
    let (base, kind) = match scheme.split_once('+') {
        Some((base, "cluster")) => (base, Kind::Cluster),
        Some((base, "sentinel")) => (base, Kind::Sentinel),
        _ => (scheme, Kind::Single),
    };
    let has_tls = matches!(base, "rediss" | "valkeys");
    if has_tls {
        certificates.prepare()?;
    }
    let hosts = Hosts::parse(rest);
    match kind {
        Kind::Single => single(url, has_tls, certificates),
        Kind::Cluster => cluster(base, &hosts, certificates),
        Kind::Sentinel => sentinel(base, &hosts, has_tls, certificates),
    }
}

fn single(url: &str, has_tls: bool, certificates: &Certificates) -> RedisResult<Way> {
    let info = url.into_connection_info()?;
    let tcp = info.tcp_settings().clone().set_nodelay(true);
    let info = info.set_tcp_settings(tcp);
    let client = if has_tls {
        certificates.client(info)?
    } else {
        Client::open(info)?
    };
    Ok(Way::Single(client))
}

fn cluster(base: &str, hosts: &Hosts<'_>, certificates: &Certificates) -> RedisResult<Way> {
    let nodes = hosts.infos(base, hosts.user)?;
    let builder = ClusterClientBuilder::new(nodes)
        // Channels of waiters need it.
        .use_protocol(ProtocolVersion::RESP3)
        .tcp_settings(TcpSettings::default().set_nodelay(true))
        // Each step has a deadline of its own, which ends its retries.
        .retries(8)
        .min_retry_wait(10)
        .max_retry_wait(200);
    Ok(Way::Cluster(Box::new(certificates.of_cluster(builder).build()?)))
}

fn sentinel(base: &str, hosts: &Hosts<'_>, has_tls: bool, certificates: &Certificates) -> RedisResult<Way> {
    let (service, database) = hosts.path.split_once('/').unwrap_or((hosts.path, ""));
    if service.is_empty() {
        return Err(wrong("a URL of sentinels ends with the name of the service"));
    }
    let sentinels = hosts.infos(base, "")?;
    let addresses: Vec<_> = std::iter::zip(&hosts.hosts, &sentinels)
        .map(|(host, info)| with_sentinel_port(host, info.addr().clone()))
        .collect();
    // Credentials in the URL are those of the servers.
    let named = format!("{base}://{}localhost/{database}", hosts.user).into_connection_info()?;
    let of_server = named.redis_settings();
    let tcp = || TcpSettings::default().set_nodelay(true);
    let mut builder = SentinelClientBuilder::new(addresses, service, SentinelServerType::Master)?
        .set_client_to_redis_db(of_server.db())
        .set_client_to_redis_tcp_settings(tcp())
        .set_client_to_sentinel_tcp_settings(tcp());
    if let Some(username) = of_server.username() {
        builder = builder.set_client_to_redis_username(username);
    }
    if let Some(password) = of_server.password() {
        builder = builder.set_client_to_redis_password(password);
    }
    if let Some(username) = hosts.decoded("sentinel_username")? {
        builder = builder.set_client_to_sentinel_username(username);
    }
    if let Some(password) = hosts.decoded("sentinel_password")? {
        builder = builder.set_client_to_sentinel_password(password);
    }
    if has_tls {
        builder = certificates
            .of_sentinel(builder)
            .set_client_to_redis_tls_mode(TlsMode::Secure)
            .set_client_to_sentinel_tls_mode(TlsMode::Secure);
    }
    Ok(Way::sentinel(builder.build()?))
}

/// A sentinel listens elsewhere than a server, where its host names no port.
fn with_sentinel_port(host: &str, address: ConnectionAddr) -> ConnectionAddr {
    let names_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
    match address {
        ConnectionAddr::Tcp(name, _) if !names_port => ConnectionAddr::Tcp(name, SENTINEL_PORT),
        ConnectionAddr::TcpTls {
            host,
            insecure,
            tls_params,
            ..
        } if !names_port => ConnectionAddr::TcpTls {
            host,
            port: SENTINEL_PORT,
            insecure,
            tls_params,
        },
        named => named,
    }
}

/// What follows the scheme: `user:password@host:port,host:port/path?parameters`.
struct Hosts<'a> {
    /// With its `@`, or nothing.
    user: &'a str,
    hosts: Vec<&'a str>,
    path: &'a str,
    parameters: &'a str,
}

impl<'a> Hosts<'a> {
    fn parse(rest: &'a str) -> Self {
        let (rest, parameters) = rest.split_once('?').unwrap_or((rest, ""));
        // A password may hold a slash, a host may not.
        let (user, rest) = rest.split_at(rest.rfind('@').map_or(0, |at| at + 1));
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        Self {
            user,
            hosts: hosts.split(',').collect(),
            path,
            parameters,
        }
    }

    fn infos(&self, base: &str, user: &str) -> RedisResult<Vec<ConnectionInfo>> {
        let info = |host: &&str| format!("{base}://{user}{host}").into_connection_info();
        self.hosts.iter().map(info).collect()
    }

    /// Its value as the client decodes those before the hosts: with `%` for whatever would end it.
    fn decoded(&self, name: &str) -> RedisResult<Option<String>> {
        let decode = |value| {
            let decoded = percent_decode_str(value).decode_utf8();
            decoded
                .map(String::from)
                .map_err(|_| wrong("a credential of the sentinels is not UTF-8"))
        };
        self.parameter(name).map(decode).transpose()
    }

    fn parameter(&self, name: &str) -> Option<&'a str> {
        let mut parameters = self.parameters.split('&').filter_map(|pair| pair.split_once('='));
        parameters.find(|(found, _)| *found == name).map(|(_, value)| value)
    }
}

pub(super) fn wrong(why: &'static str) -> RedisError {
    (ErrorKind::InvalidClientConfig, why).into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_url_names_credentials_hosts_a_path_and_parameters() {
        let hosts = Hosts::parse("me:p/@ss@one:1,[::1]:2,three/orders/4?sentinel_password=x&sentinel_username=y");
        assert_eq!((hosts.user, hosts.path), ("me:p/@ss@", "orders/4"));
        assert_eq!(hosts.hosts, ["one:1", "[::1]:2", "three"]);
        assert_eq!(hosts.parameter("sentinel_password"), Some("x"));
        assert_eq!(hosts.parameter("sentinel_username"), Some("y"));
        let decoded = |parameters: &str| Hosts::parse(&format!("localhost?{parameters}")).decoded("sentinel_password");
        assert_eq!(decoded("sentinel_password=p%40s%26%25").unwrap().unwrap(), "p@s&%");
        assert_eq!(decoded("other=x").unwrap(), None);
        assert!(decoded("sentinel_password=%ff").is_err());
        let plain = Hosts::parse("localhost");
        assert_eq!((plain.user, plain.hosts, plain.path), ("", vec!["localhost"], ""));
    }

    #[test]
    fn a_sentinel_without_a_port_has_that_of_sentinels() {
        let port = |host: &str| {
            let info = format!("redis://{host}").into_connection_info().unwrap();
            match with_sentinel_port(host, info.addr().clone()) {
                ConnectionAddr::Tcp(_, port) => port,
                _ => 0,
            }
        };
        assert_eq!((port("one"), port("[::1]")), (SENTINEL_PORT, SENTINEL_PORT));
        assert_eq!((port("one:7"), port("[::1]:7")), (7, 7));
        let encrypted = |host: &str| {
            let address = ConnectionAddr::TcpTls {
                host: "one".to_owned(),
                port: 7,
                insecure: false,
                tls_params: None,
            };
            match with_sentinel_port(host, address) {
                ConnectionAddr::TcpTls { host, port, .. } => (host, port),
                _ => (String::new(), 0),
            }
        };
        assert_eq!(encrypted("one"), ("one".to_owned(), SENTINEL_PORT));
        assert_eq!(encrypted("one:7"), ("one".to_owned(), 7));
    }

    #[test]
    fn what_is_no_url_of_a_kind_that_there_is_is_refused() {
        for url in [
            "",
            "localhost",
            "http://localhost",
            "redis+cluster://",
            "redis+sentinel://localhost",
            "redis+sentinel://localhost/",
            "redis+something://localhost",
            "redis+cluster://one,,two",
        ] {
            assert!(way(url, &Certificates::default()).is_err(), "{url}");
        }
        for url in [
            "redis://localhost/1",
            "valkey://localhost",
            "redis+cluster://me:secret@one:1,two:2",
            "redis+sentinel://me:secret@one,two:2/orders/3?sentinel_password=x",
        ] {
            assert!(way(url, &Certificates::default()).is_ok(), "{url}");
        }
    }
}
