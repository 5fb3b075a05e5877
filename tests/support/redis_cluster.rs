//! Clusters of Redis servers.

use std::{thread::yield_now, time::Duration};

use super::{ports::free_port, redis::Redis};

/// Servers that share the slots evenly.
pub struct Cluster {
    pub nodes: Vec<Redis>,
    /// None to begin with, or one for each node.
    pub replicas: Vec<Redis>,
}

pub const SLOTS: u16 = 16384;

impl Cluster {
    /// Options are those of each `redis-server`.
    pub async fn start(count: u16, options: &[&str]) -> Self {
        let mut nodes = Vec::new();
        let mut buses = Vec::new();
        for _ in 0..count {
            let (node, bus) = node(options);
            nodes.push(node);
            buses.push(bus);
        }
        let replicas = Vec::new();
        let cluster = Self { nodes, replicas };
        let share = SLOTS / count;
        for (number, node) in (0..count).zip(&cluster.nodes) {
            let last = if number + 1 == count {
                SLOTS - 1
            } else {
                (number + 1) * share - 1
            };
            let (first, last) = ((number * share).to_string(), last.to_string());
            node.say(&["CLUSTER", "ADDSLOTSRANGE", &first, &last]).await;
            node.say(&["CLUSTER", "SET-CONFIG-EPOCH", &(number + 1).to_string()])
                .await;
        }
        for (node, bus) in cluster.nodes.iter().zip(&buses).skip(1) {
            cluster.meet(node, *bus).await;
        }
        cluster.until_up().await;
        cluster
    }

    async fn meet(&self, node: &Redis, bus: u16) {
        let (port, bus) = (node.port().to_string(), bus.to_string());
        self.nodes[0].say(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]).await;
    }

    /// One for each node, which has all that the node has.
    pub async fn add_replicas(&mut self) {
        for _ in &self.nodes {
            let (replica, bus) = node(&["--repl-diskless-sync-delay", "0"]);
            self.meet(&replica, bus).await;
            self.replicas.push(replica);
        }
        self.until_up().await;
        for (node, replica) in self.nodes.iter().zip(&self.replicas) {
            let id: String = node.ask(&["CLUSTER", "MYID"]).await;
            replica.say(&["CLUSTER", "REPLICATE", &id]).await;
            while node.ask::<usize>(&["WAIT", "1", "100"]).await == 0 {}
        }
        // Each is known as what it is.
        for node in self.nodes.iter().chain(&self.replicas) {
            loop {
                let nodes: String = node.ask(&["CLUSTER", "NODES"]).await;
                if nodes.matches("slave").count() == self.replicas.len() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Each node knows of each other, and that all slots are served.
    pub async fn until_up(&self) {
        for node in self.nodes.iter().chain(&self.replicas) {
            loop {
                let info: String = node.ask(&["CLUSTER", "INFO"]).await;
                let known = format!("cluster_known_nodes:{}", self.nodes.len() + self.replicas.len());
                if info.contains("cluster_state:ok") && info.contains(&known) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// By its first two nodes; the third is found.
    pub fn url(&self) -> String {
        let hosts: Vec<_> = self.nodes.iter().take(2).map(|node| node.host()).collect();
        format!("redis+cluster://{}", hosts.join(","))
    }

    /// Where in the list of nodes this key is.
    pub async fn holder(&self, key: &str) -> usize {
        for (number, node) in self.nodes.iter().enumerate() {
            if node.ask::<Vec<String>>(&["KEYS", key]).await.len() == 1 {
                return number;
            }
        }
        panic!("no node has {key}");
    }

    pub async fn slot_of(&self, key: &str) -> u16 {
        self.nodes[0].ask(&["CLUSTER", "KEYSLOT", key]).await
    }

    /// Moves a slot and all that is in it, as `redis-cli --cluster reshard` does.
    pub async fn move_slot(&self, slot: u16, from: usize, to: usize) {
        let (source, target) = (&self.nodes[from], &self.nodes[to]);
        let slot = slot.to_string();
        let source_id: String = source.ask(&["CLUSTER", "MYID"]).await;
        let target_id: String = target.ask(&["CLUSTER", "MYID"]).await;
        target
            .say(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source_id])
            .await;
        source
            .say(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target_id])
            .await;
        loop {
            let keys: Vec<String> = source.ask(&["CLUSTER", "GETKEYSINSLOT", &slot, "10"]).await;
            if keys.is_empty() {
                break;
            }
            let port = target.port().to_string();
            let mut command = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
            command.extend(keys.iter().map(String::as_str));
            source.say(&command).await;
            yield_now();
        }
        for node in [target, source] {
            node.say(&["CLUSTER", "SETSLOT", &slot, "NODE", &target_id]).await;
        }
    }
}

/// A node of a cluster, and the port of its bus.
fn node(options: &[&str]) -> (Redis, u16) {
    let bus = free_port();
    let bus_option = bus.to_string();
    let mut all = vec!["--cluster-enabled", "yes", "--cluster-port", &bus_option];
    all.extend(["--cluster-node-timeout", "1000"]);
    all.extend(options);
    (Redis::start(&all), bus)
}
