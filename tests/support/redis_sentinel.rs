//! A primary and a replica, watched by sentinels that change them when the primary is gone.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;

use super::{
    ports::free_port,
    redis::{Redis, program, spawn},
};

pub const SERVICE: &str = "orders";
const SENTINELS: usize = 3;

pub struct Watched {
    /// The first is the primary to begin with.
    pub servers: [Redis; 2],
    sentinels: Vec<Sentinel>,
}

struct Sentinel {
    process: Child,
    port: u16,
    _folder: TempDir,
}

impl Watched {
    /// Options are those of each `redis-server`.
    pub async fn start(options: &[&str]) -> Self {
        let primary = Redis::start(options);
        let port = primary.port().to_string();
        let mut all = vec!["--replicaof", "127.0.0.1", &port, "--repl-diskless-sync-delay", "0"];
        all.extend(options);
        let replica = Redis::start(&all);
        let watched = Self {
            sentinels: (0..SENTINELS).map(|_| Sentinel::start(primary.port())).collect(),
            servers: [primary, replica],
        };
        watched.until_watched().await;
        watched
    }

    /// Each sentinel knows the replica, which is up to date, and the others.
    async fn until_watched(&self) {
        for sentinel in &self.sentinels {
            loop {
                let master = sentinel.ask::<Vec<String>>(&["SENTINEL", "MASTER", SERVICE]).await;
                let field = |name: &str| {
                    let at = master.iter().position(|field| field == name);
                    at.and_then(|at| master.get(at + 1)).map(String::as_str)
                };
                let others = (SENTINELS - 1).to_string();
                if field("num-slaves") == Some("1") && field("num-other-sentinels") == Some(&others) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        loop {
            let info: String = self.servers[1].ask(&["INFO", "replication"]).await;
            if info.contains("master_link_status:up") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // The replica says so first. Its primary may learn it a second later, and counts it from then on.
        while self.servers[0].ask::<usize>(&["WAIT", "1", "100"]).await == 0 {}
    }

    /// All sentinels; one that nobody runs is before them.
    pub fn url(&self) -> String {
        let mut hosts = vec![format!("127.0.0.1:{}", free_port())];
        hosts.extend(
            self.sentinels
                .iter()
                .map(|sentinel| format!("127.0.0.1:{}", sentinel.port)),
        );
        format!("redis+sentinel://{}/{SERVICE}", hosts.join(","))
    }

    /// By hand: nobody dies.
    pub async fn fail_over(&self) {
        let _: redis::Value = self.sentinels[0].ask(&["SENTINEL", "FAILOVER", SERVICE]).await;
    }

    pub async fn primary(&self) -> u16 {
        let address: Vec<String> = self.sentinels[0]
            .ask(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE])
            .await;
        address[1].parse().expect("a port")
    }
}

impl Sentinel {
    fn start(primary: u16) -> Self {
        let (folder, port) = (tempfile::tempdir().expect("a folder"), free_port());
        let file = folder.path().join("sentinel.conf");
        let lines = [
            format!("port {port}"),
            "bind 127.0.0.1".to_owned(),
            format!("sentinel monitor {SERVICE} 127.0.0.1 {primary} 2"),
            format!("sentinel down-after-milliseconds {SERVICE} 500"),
            format!("sentinel failover-timeout {SERVICE} 5000"),
        ];
        fs::write(&file, lines.join("\n")).expect("it is written");
        let process = spawn(
            Command::new(program())
                .arg(&file)
                .arg("--sentinel")
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        Self {
            process,
            port,
            _folder: folder,
        }
    }

    /// Waits until it is there.
    async fn ask<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let client = redis::Client::open(format!("redis://127.0.0.1:{}", self.port)).expect("a URL");
        loop {
            if let Ok(mut connection) = client.get_multiplexed_async_connection().await {
                let mut command = redis::cmd(words[0]);
                command.arg(&words[1..]);
                return command.query_async(&mut connection).await.expect("an answer");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
