//! Connections that hear what is published.

use std::{future::Future, pin::Pin, sync::Weak, time::Duration};

use futures_util::StreamExt;
use redis::{
    PushInfo, PushKind, RedisResult, Value,
    aio::{PubSub, PubSubSink, PubSubStream},
    cluster_async::ClusterConnection,
};
use tokio::{sync::mpsc::UnboundedReceiver, time::sleep};

use super::Waiters;
use crate::record::RecordId;

/// Before a part of a cluster that is away is asked again.
const AGAIN: Duration = Duration::from_millis(500);

pub(in super::super) enum Ears {
    Single {
        sink: PubSubSink,
        messages: PubSubStream,
    },
    /// With channels that live where their record does.
    Cluster {
        connection: ClusterConnection,
        pushed: UnboundedReceiver<PushInfo>,
    },
}

pub(super) enum Heard {
    Changed(String),
    /// The channel is somewhere else now.
    Left(String),
    Nothing,
    Ended,
}

pub(super) type Reply = Pin<Box<dyn Future<Output = RedisResult<()>> + Send>>;

impl Ears {
    pub(in super::super) fn single(connection: PubSub) -> Self {
        let (sink, messages) = connection.split();
        Self::Single { sink, messages }
    }

    pub(in super::super) fn cluster(connection: ClusterConnection, pushed: UnboundedReceiver<PushInfo>) -> Self {
        Self::Cluster { connection, pushed }
    }

    /// Whether silence means that the connection is broken. In a cluster it may be one of many that is.
    pub(super) fn is_one(&self) -> bool {
        matches!(self, Self::Single { .. })
    }

    pub(super) fn subscribe(&self, waiters: &Weak<Waiters>, id: RecordId, channel: String) -> Reply {
        match self {
            Self::Single { sink, .. } => {
                let mut sink = sink.clone();
                Box::pin(async move { sink.subscribe(channel).await })
            }
            Self::Cluster { connection, .. } => {
                let (mut connection, waiters) = (connection.clone(), waiters.clone());
                Box::pin(async move {
                    while connection.ssubscribe(&channel).await.is_err() {
                        sleep(AGAIN).await;
                        if !waiters.upgrade().is_some_and(|waiters| waiters.is_heard(&id)) {
                            break;
                        }
                    }
                    Ok(())
                })
            }
        }
    }

    pub(super) fn unsubscribe(&self, channel: String) -> Reply {
        match self {
            Self::Single { sink, .. } => {
                let mut sink = sink.clone();
                Box::pin(async move { sink.unsubscribe(channel).await })
            }
            Self::Cluster { connection, .. } => {
                let mut connection = connection.clone();
                Box::pin(async move {
                    // What stays behind wakes nobody.
                    let _ = connection.sunsubscribe(channel).await;
                    Ok(())
                })
            }
        }
    }

    /// Nothing is lost when it is dropped.
    pub(super) async fn hear(&mut self) -> Heard {
        match self {
            Self::Single { messages, .. } => match messages.next().await {
                Some(message) => Heard::Changed(message.get_channel_name().to_owned()),
                None => Heard::Ended,
            },
            Self::Cluster { pushed, .. } => match pushed.recv().await {
                Some(push) => heard(push),
                None => Heard::Ended,
            },
        }
    }
}

fn heard(push: PushInfo) -> Heard {
    let channel = match push.data.first() {
        Some(Value::BulkString(name)) => String::from_utf8_lossy(name).into_owned(),
        Some(Value::SimpleString(name)) => name.clone(),
        _ => return Heard::Nothing,
    };
    match push.kind {
        // Subscribed to anew, by the client itself, after a connection broke: something may have changed meanwhile.
        PushKind::SMessage | PushKind::SSubscribe => Heard::Changed(channel),
        PushKind::SUnsubscribe => Heard::Left(channel),
        _ => Heard::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a letter: what is heard of a channel of this name.
    fn of(kind: PushKind, name: Value) -> (char, String) {
        let data = vec![name, Value::Int(1)];
        match heard(PushInfo { kind, data }) {
            Heard::Changed(name) => ('c', name),
            Heard::Left(name) => ('l', name),
            Heard::Nothing => ('n', String::new()),
            Heard::Ended => ('e', String::new()),
        }
    }

    #[test]
    fn what_a_cluster_pushes_is_a_change_a_channel_that_left_or_nothing() {
        let name = || "channel".to_owned();
        for named in [Value::BulkString(b"channel".to_vec()), Value::SimpleString(name())] {
            assert_eq!(of(PushKind::SMessage, named.clone()), ('c', name()));
            assert_eq!(of(PushKind::SSubscribe, named.clone()), ('c', name()));
            assert_eq!(of(PushKind::SUnsubscribe, named.clone()), ('l', name()));
            assert_eq!(of(PushKind::Invalidate, named).0, 'n');
        }
        assert_eq!(of(PushKind::SMessage, Value::Int(7)).0, 'n');
    }
}
