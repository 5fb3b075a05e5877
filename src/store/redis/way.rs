//! The ways to a server: directly, by asking sentinels, into a cluster, or over a connection that somebody else made.

use std::{sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, Cmd, Pipeline, RedisResult, Value,
    aio::{ConnectionLike, MultiplexedConnection},
    cluster::{ClusterClient, ClusterConfig},
    cluster_async::ClusterConnection,
    cluster_routing::{MultipleNodeRoutingInfo, Route, RoutingInfo, SingleNodeRoutingInfo, SlotAddr},
    sentinel::SentinelClient,
};
use tokio::sync::{Mutex, mpsc::unbounded_channel};

use super::waiters::Ears;

/// Commands, or pieces of several, that wait to be written.
const PIPELINE: usize = 1024;
/// Bytes that are gathered before they are written, whatever else is to be sent: two hundred records of a KiB. The client's
/// own 8 KiB are seven.
const BUFFER: usize = 256 * 1024;

/// Each opening finds out anew where it leads: names are looked up, sentinels are asked who is the primary.
#[allow(clippy::large_enum_variant, reason = "there is one for each store")]
pub(super) enum Way {
    Single(Client),
    Sentinel(Arc<Mutex<SentinelClient>>),
    Cluster(Box<ClusterClient>),
    Own(Box<dyn OwnConnection>),
}

/// What commands are sent through. Clones share it.
#[derive(Clone)]
pub(super) enum Link {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
    Own(Box<dyn OwnConnection>),
}

/// Somebody else's connection, which takes care of itself.
pub(super) trait OwnConnection: ConnectionLike + Send + Sync {
    fn again(&self) -> Box<dyn OwnConnection>;
}

impl<C: ConnectionLike + Clone + Send + Sync + 'static> OwnConnection for C {
    fn again(&self) -> Box<dyn OwnConnection> {
        Box::new(self.clone())
    }
}

impl Clone for Box<dyn OwnConnection> {
    fn clone(&self) -> Self {
        (**self).again()
    }
}

impl Way {
    pub(super) fn sentinel(client: SentinelClient) -> Self {
        Self::Sentinel(Arc::new(Mutex::new(client)))
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    /// Whether all goes to one server, over a connection that this store made.
    pub(super) fn leads_to_one(&self) -> bool {
        matches!(self, Self::Single(_) | Self::Sentinel(_))
    }

    /// Whether somebody else made it.
    pub(super) fn is_foreign(&self) -> bool {
        matches!(self, Self::Own(_))
    }

    /// Whether what is published can be heard.
    pub(super) fn has_ears(&self) -> bool {
        !self.is_foreign()
    }

    /// Whether what is opened finds its own way when servers come and go.
    pub(super) fn mends_itself(&self) -> bool {
        matches!(self, Self::Cluster(_) | Self::Own(_))
    }

    pub(super) async fn open(&self, timeout: Duration) -> RedisResult<Link> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(timeout))
            // Each step has a deadline already.
            .set_response_timeout(None)
            .set_pipeline_buffer_size(PIPELINE)
            .set_write_backpressure_boundary(BUFFER);
        match self {
            Self::Single(client) => Ok(Link::Single(
                client.get_multiplexed_async_connection_with_config(&config).await?,
            )),
            Self::Sentinel(sentinels) => {
                let client = sentinels.lock().await.async_get_client().await?;
                Ok(Link::Single(
                    client.get_multiplexed_async_connection_with_config(&config).await?,
                ))
            }
            Self::Cluster(client) => {
                let config = ClusterConfig::new()
                    .set_connection_timeout(timeout)
                    .set_response_timeout(timeout);
                Ok(Link::Cluster(client.get_async_connection_with_config(config).await?))
            }
            Self::Own(connection) => Ok(Link::Own(connection.clone())),
        }
    }

    /// A connection for what is published. `None` where there is none to be had.
    pub(super) async fn listen(&self, timeout: Duration) -> RedisResult<Option<Ears>> {
        match self {
            Self::Single(client) => Ok(Some(Ears::single(client.get_async_pubsub().await?))),
            Self::Sentinel(sentinels) => {
                let client = sentinels.lock().await.async_get_client().await?;
                Ok(Some(Ears::single(client.get_async_pubsub().await?)))
            }
            Self::Cluster(client) => {
                let (pushes, pushed) = unbounded_channel();
                let config = ClusterConfig::new()
                    .set_connection_timeout(timeout)
                    .set_response_timeout(timeout)
                    .set_push_sender(pushes);
                let connection = client.get_async_connection_with_config(config).await?;
                Ok(Some(Ears::cluster(connection, pushed)))
            }
            Self::Own(_) => Ok(None),
        }
    }
}

impl Link {
    pub(super) async fn send(&mut self, command: &Cmd) -> RedisResult<Value> {
        let answer = match self {
            Self::Single(connection) => connection.send_packed_command(command).await,
            Self::Cluster(connection) => connection.req_packed_command(command).await,
            Self::Own(connection) => connection.req_packed_command(command).await,
        };
        answer.and_then(Value::extract_error)
    }

    /// A cluster's client may have been told to read from replicas, which lag behind.
    pub(super) async fn ask_primary(&mut self, key: &[u8], command: &Cmd) -> RedisResult<Value> {
        let Self::Cluster(connection) = self else {
            return self.send(command).await;
        };
        let primary = SingleNodeRoutingInfo::SpecificNode(Route::with_key(key, SlotAddr::Master));
        // Boxed: it is large, and whoever asks one server would carry it about.
        let answer = Box::pin(connection.route_command(command.clone(), RoutingInfo::SingleNode(primary)));
        answer.await.and_then(Value::extract_error)
    }

    /// Commands in one flight, which in a cluster concern one key. Each may have failed.
    pub(super) async fn send_all(&mut self, key: &[u8], commands: Pipeline) -> RedisResult<Vec<Value>> {
        let count = commands.len();
        match self {
            Self::Single(connection) => connection.send_packed_commands(&commands, 0, count).await,
            Self::Cluster(connection) => {
                let route = SingleNodeRoutingInfo::SpecificNode(Route::with_key(key, SlotAddr::Master));
                // Boxed, as above.
                Box::pin(connection.route_pipeline(commands, 0, count, route)).await
            }
            Self::Own(connection) => connection.req_packed_commands(&commands, 0, count).await,
        }
    }

    /// What each server of the deployment answers.
    pub(super) async fn ask_each(&mut self, command: &Cmd) -> RedisResult<Vec<Value>> {
        let Self::Cluster(connection) = self else {
            return Ok(vec![self.send(command).await?]);
        };
        let all = RoutingInfo::MultiNode((MultipleNodeRoutingInfo::AllNodes, None));
        match connection.route_command(command.clone(), all).await? {
            Value::Map(answers) => answers.into_iter().map(|(_, answer)| answer.extract_error()).collect(),
            answer => Ok(vec![answer]),
        }
    }
}
