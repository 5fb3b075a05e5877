//! The Redis store in a cluster: slots that move, nodes that die.
#![cfg(all(feature = "redis", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use redis::{ProtocolVersion, cluster::ClusterClientBuilder, cluster_read_routing::RandomReplicaStrategy};
use support::{
    redis_cluster::Cluster,
    steps::{Listener, MINUTE, acquire, claim, complete, id, is_replay, kept, key, kind, listening, until_back},
};
use tokio::{task::JoinSet, time::timeout};
use tower_idempotency::{
    Begin, RedisStore, Retention, Store, StoreErrorKind,
    testing::{self, Subject},
};

struct Real(Cluster);

impl Subject for Real {
    type Store = RedisStore;

    async fn store(&self) -> RedisStore {
        connected(&self.0).await
    }

    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    fn waits(&self) -> bool {
        true
    }
}

async fn connected(cluster: &Cluster) -> RedisStore {
    RedisStore::connect(&cluster.url()).await.unwrap()
}

#[tokio::test]
async fn the_store_keeps_the_contract_in_a_cluster() {
    testing::check(&Real(Cluster::start(3, &[]).await)).await.assert();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_keeps_the_contract_in_a_cluster_under_many_threads() {
    testing::check_races(&Real(Cluster::start(3, &[]).await)).await.assert();
}

#[tokio::test]
async fn records_are_spread_over_the_nodes_and_each_is_one_key() {
    let cluster = Cluster::start(3, &[]).await;
    let store = connected(&cluster).await;
    for number in 0..30 {
        let lease = acquire(&store, number).await;
        complete(&store, &lease, 10).await;
    }
    for node in &cluster.nodes {
        let size: u32 = node.ask(&["DBSIZE"]).await;
        assert!(size > 0 && size < 30, "{size} of 30");
    }
    // What remains is told to those who ask, in another round trip.
    let asking = claim().asking_for_remaining();
    match store.begin(&id(1), &asking).await.unwrap() {
        Begin::Completed {
            remaining: Some(Retention::For(left)),
            ..
        } => assert!(left <= MINUTE && left > MINUTE / 2, "{left:?}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_waiter_hears_over_the_channel_of_the_records_node_alone() {
    let cluster = Cluster::start(3, &[]).await;
    let (store, other) = (connected(&cluster).await, connected(&cluster).await);
    for number in 0..6 {
        let lease = acquire(&store, number).await;
        let heard = listening(&other, number).await;
        match number % 3 {
            0 => complete(&store, &lease, 1).await,
            1 => store.release(&lease).await.unwrap(),
            _ => store.abandon(&lease).await.unwrap(),
        }
        timeout(MINUTE, heard).await.expect("it was woken");
    }
    let unheard = acquire(&store, 6).await;
    complete(&store, &unheard, 1).await;
    let mut published = 0;
    for node in &cluster.nodes {
        published += node.calls("spublish").await;
        assert_eq!(node.calls("publish").await, 0);
    }
    assert_eq!(published, 6, "and never while nobody listens");
}

// ---- slots that move

/// With all records in one slot.
async fn in_one_slot(cluster: &Cluster) -> RedisStore {
    let builder = RedisStore::builder().prefix("{one}:");
    builder.connect(&cluster.url()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_moves_under_load_costs_no_record_and_grants_none_twice() {
    let cluster = Cluster::start(3, &[]).await;
    let slot = cluster.slot_of("{one}:").await;
    let stores = [in_one_slot(&cluster).await, in_one_slot(&cluster).await];
    for number in 0..300 {
        let lease = acquire(&stores[0], number).await;
        complete(&stores[0], &lease, 10).await;
    }
    let holder = usize::from(slot / (support::redis_cluster::SLOTS / 3)).min(2);
    let (is_over, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(1000)));
    let mut clients = JoinSet::new();
    for client in 0..8 {
        let (store, is_over, next) = (stores[client % 2].clone(), Arc::clone(&is_over), Arc::clone(&next));
        clients.spawn(async move {
            let mut granted: Vec<u32> = Vec::new();
            while !is_over.load(Relaxed) {
                // Each key is claimed by several at about the same time.
                let number = next.fetch_add(1, Relaxed) / 3;
                let own = claim();
                let Ok(begin) = store.begin(&id(number), &own).await else {
                    continue;
                };
                if let Begin::Acquired(lease) = begin {
                    granted.push(number);
                    while let Err(error) = store
                        .complete(&lease, &kept(number as usize % 100), MINUTE.into())
                        .await
                    {
                        assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{number}: {error:?}");
                    }
                }
            }
            granted
        });
    }
    for turn in 0..6 {
        let (from, to) = ((holder + turn) % 3, (holder + turn + 1) % 3);
        cluster.move_slot(slot, from, to).await;
    }
    is_over.store(true, Relaxed);
    let mut count: HashMap<u32, u32> = HashMap::new();
    for number in clients.join_all().await.into_iter().flatten() {
        *count.entry(number).or_default() += 1;
    }
    assert!(count.len() > 100, "only {} keys were claimed meanwhile", count.len());
    let twice: Vec<_> = count.iter().filter(|(_, times)| **times > 1).collect();
    assert!(twice.is_empty(), "granted more than once: {twice:?}");
    for number in count.keys() {
        let found = until_back(&stores[1], *number).await;
        assert!(is_replay(&found, *number as usize % 100), "{number}: {found:?}");
    }
    for number in 0..300 {
        let found = until_back(&stores[1], number).await;
        assert!(is_replay(&found, 10), "{number}: {found:?}");
    }
}

#[tokio::test]
async fn a_waiter_hears_of_a_record_whose_slot_moved_while_it_waited() {
    let cluster = Cluster::start(3, &[]).await;
    let (store, other) = (connected(&cluster).await, connected(&cluster).await);
    let lease = acquire(&store, 1).await;
    let mut heard = listening(&other, 1).await;
    let (slot, from) = (cluster.slot_of(&key(1)).await, cluster.holder(&key(1)).await);
    let to = (from + 1) % 3;
    cluster.move_slot(slot, from, to).await;
    // It is woken by its new subscription, looks again, and listens on.
    timeout(MINUTE, &mut heard).await.expect("it was subscribed to anew");
    assert!(matches!(
        other.begin(&id(1), &claim()).await,
        Ok(Begin::InProgress { .. })
    ));
    let heard = listening(&other, 1).await;
    complete(&store, &lease, 1).await;
    timeout(MINUTE, heard).await.expect("it was woken");
    assert_eq!(cluster.nodes[to].calls("spublish").await, 1);
}

#[tokio::test]
async fn a_waiter_whose_subscription_broke_looks_again_and_hears_again() {
    let cluster = Cluster::start(3, &[]).await;
    let (store, other) = (connected(&cluster).await, connected(&cluster).await);
    let lease = acquire(&store, 1).await;
    let heard = listening(&other, 1).await;
    let holder = cluster.holder(&key(1)).await;
    cluster.nodes[holder].say(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    // Something may have changed meanwhile.
    timeout(MINUTE, heard).await.expect("it was subscribed to anew");
    let heard = listening(&other, 1).await;
    complete(&store, &lease, 1).await;
    timeout(MINUTE, heard).await.expect("it was woken");
}

#[tokio::test]
async fn who_listens_while_the_records_node_is_away_hears_once_it_is_back() {
    let mut cluster = Cluster::start(3, &[]).await;
    let (store, other) = (connected(&cluster).await, connected(&cluster).await);
    let lease = acquire(&store, 1).await;
    let holder = cluster.holder(&key(1)).await;
    cluster.nodes[holder].kill();
    let mut heard: Listener<'_> = Box::pin(async { other.changed(&id(1)).await });
    // Asked for, and refused, before there is anybody again.
    let refused = timeout(Duration::from_secs(1), &mut heard).await;
    assert!(refused.is_err(), "nobody can have told it anything");
    cluster.nodes[holder].restart("Ready to accept connections");
    timeout(MINUTE, heard).await.expect("it was subscribed to");
    until_back(&store, 1).await;
    let heard = listening(&other, 1).await;
    while store.complete(&lease, &kept(1), MINUTE.into()).await.is_err() {}
    timeout(MINUTE, heard).await.expect("it was woken");
}

// ---- nodes that die

/// Some records of each node.
fn numbers() -> impl Iterator<Item = u32> {
    0..24
}

#[tokio::test]
async fn a_node_that_is_killed_makes_the_store_unavailable_until_it_is_back_and_no_record_is_lost() {
    let mut cluster = Cluster::start(3, &[]).await;
    let store = connected(&cluster).await;
    let mut running = Vec::new();
    for number in numbers() {
        let lease = acquire(&store, number).await;
        match number % 2 {
            0 => complete(&store, &lease, 10).await,
            _ => running.push(lease),
        }
    }
    let at = cluster.holder(&key(0)).await;
    cluster.nodes[at].kill();
    assert_eq!(kind(store.begin(&id(0), &claim()).await), StoreErrorKind::Unavailable);
    // Each of the others refuses all when it has noticed.
    for number in numbers() {
        let refused = loop {
            match store.begin(&id(number), &claim()).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
    }
    cluster.nodes[at].restart("Ready to accept connections");
    for number in numbers().filter(|number| number % 2 == 0) {
        assert!(is_replay(&until_back(&store, number).await, 10), "{number}");
    }
    for lease in running {
        while let Err(error) = store.complete(&lease, &kept(5), MINUTE.into()).await {
            assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}");
        }
    }
    for number in numbers().filter(|number| number % 2 == 1) {
        assert!(is_replay(&until_back(&store, number).await, 5), "{number}");
    }
}

#[tokio::test]
async fn a_cluster_that_is_down_is_unavailable() {
    let cluster = Cluster::start(3, &[]).await;
    let store = connected(&cluster).await;
    let lease = acquire(&store, 1).await;
    // A slot that nobody serves.
    let holder = cluster.holder(&key(1)).await;
    let unserved = (holder as u16 * (support::redis_cluster::SLOTS / 3)).to_string();
    for node in &cluster.nodes {
        node.say(&["CLUSTER", "DELSLOTS", &unserved]).await;
    }
    assert_eq!(kind(store.begin(&id(2), &claim()).await), StoreErrorKind::Unavailable);
    assert_eq!(kind(store.renew(&lease, MINUTE).await), StoreErrorKind::Unavailable);
    cluster.nodes[holder].say(&["CLUSTER", "ADDSLOTS", &unserved]).await;
    until_back(&store, 2).await;
    while store.complete(&lease, &kept(1), MINUTE.into()).await.is_err() {}
}

#[tokio::test]
async fn replicas_that_no_node_has_are_waited_for_in_vain() {
    let cluster = Cluster::start(3, &[]).await;
    let builder = RedisStore::builder().wait_for_replicas(1, Duration::from_millis(20));
    let store = builder.connect(&cluster.url()).await.unwrap();
    for number in 0..6 {
        assert_eq!(
            kind(store.begin(&id(number), &claim()).await),
            StoreErrorKind::Unavailable
        );
    }
}

// ---- replicas

#[tokio::test]
async fn no_step_is_made_on_a_replica_by_a_client_that_reads_from_replicas() {
    let mut cluster = Cluster::start(3, &[]).await;
    cluster.add_replicas().await;
    let client = ClusterClientBuilder::new(cluster.nodes.iter().map(|node| node.url()))
        .use_protocol(ProtocolVersion::RESP3)
        .read_routing_strategy(RandomReplicaStrategy)
        .build()
        .unwrap();
    let store = RedisStore::builder().connect_cluster(client.clone()).await.unwrap();
    let careful = RedisStore::builder()
        .wait_for_replicas(1, Duration::from_millis(900))
        .connect_cluster(client.clone())
        .await
        .unwrap();
    for number in 0..24 {
        let store = if number % 2 == 0 { &store } else { &careful };
        let lease = acquire(store, number).await;
        store.renew(&lease, MINUTE).await.unwrap();
        match number % 3 {
            0 => complete(store, &lease, 10).await,
            1 => store.abandon(&lease).await.unwrap(),
            _ => store.release(&lease).await.unwrap(),
        }
        for claim in [claim(), claim().asking_for_remaining()] {
            match (number % 3, store.begin(&id(number), &claim).await.unwrap()) {
                (0, found) => assert!(is_replay(&found, 10), "{number}: {found:?}"),
                (1, Begin::Abandoned { .. }) | (2, Begin::Acquired(_) | Begin::InProgress { .. }) => {}
                (_, found) => panic!("{number}: {found:?}"),
            }
        }
    }
    // Such a client does ask them, where it is left to it.
    let mut connection = client.get_async_connection().await.unwrap();
    for number in 0..24 {
        let _: u64 = redis::cmd("STRLEN")
            .arg(key(number))
            .query_async(&mut connection)
            .await
            .unwrap();
    }
    let mut asked = 0;
    for replica in &cluster.replicas {
        asked += replica.calls("strlen").await;
        // What it repeats of its primary's is none of these.
        for command in ["get", "getex", "pttl", "eval", "evalsha"] {
            assert_eq!(replica.calls(command).await, 0, "{command}");
        }
    }
    assert!(asked > 0, "none of them is ever asked");
}

// ---- mistakes

#[tokio::test]
async fn a_cluster_is_not_taken_for_a_server_and_a_server_not_for_a_cluster() {
    let cluster = Cluster::start(3, &[]).await;
    let mistaken = RedisStore::connect(&cluster.nodes[0].url()).await;
    assert_eq!(kind(mistaken), StoreErrorKind::Other);
    let single = support::redis::Redis::start(&[]);
    RedisStore::connect(&format!("redis+cluster://{}", single.host()))
        .await
        .unwrap_err();
}

#[tokio::test]
async fn a_cluster_is_refused_if_any_of_its_nodes_may_forget() {
    let cluster = Cluster::start(3, &[]).await;
    let strict = || RedisStore::builder().refuse_forgetful_server(true);
    strict().connect(&cluster.url()).await.unwrap();
    cluster.nodes[2]
        .say(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"])
        .await;
    assert_eq!(kind(strict().connect(&cluster.url()).await), StoreErrorKind::Other);
    connected(&cluster).await;
}
