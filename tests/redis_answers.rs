//! What Redis servers say that they are, and what they say that they will not do.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use redis::{Cmd, Pipeline, RedisFuture, Value, aio::ConnectionLike};
use support::{
    redis::Redis,
    steps::{MINUTE, acquire, claim, complete, id, is_replay, kept, kind, until_back},
};
use tokio::net::TcpListener;
use tower_idempotency::{Begin, RedisStore, Store, StoreErrorKind};

async fn connect(url: &str) -> RedisStore {
    RedisStore::connect(url).await.unwrap()
}

fn strict() -> tower_idempotency::RedisStoreBuilder {
    RedisStore::builder().refuse_forgetful_server(true)
}

// ---- what they say that they are

/// A server that says just this of itself.
#[derive(Clone)]
struct Says(&'static str);

impl ConnectionLike for Says {
    fn req_packed_command<'a>(&'a mut self, _: &'a Cmd) -> RedisFuture<'a, Value> {
        Box::pin(async { Ok(Value::BulkString(self.0.into())) })
    }

    fn req_packed_commands<'a>(&'a mut self, _: &'a Pipeline, _: usize, _: usize) -> RedisFuture<'a, Vec<Value>> {
        Box::pin(async { Ok(vec![Value::BulkString(self.0.into())]) })
    }

    fn get_db(&self) -> i64 {
        0
    }
}

#[tokio::test]
async fn a_server_that_is_too_old_or_part_of_a_cluster_is_refused_and_one_that_does_not_say_is_not() {
    let connect = async |says| RedisStore::builder().connect_with(Says(says)).await;
    assert_eq!(kind(connect("redis_version:6.2.14\r\n").await), StoreErrorKind::Other);
    assert_eq!(kind(connect("cluster_enabled:1\r\n").await), StoreErrorKind::Other);
    connect("redis_version:7.0.0\r\ncluster_enabled:0\r\n").await.unwrap();
    connect("").await.unwrap();
    assert_eq!(kind(strict().connect_with(Says("")).await), StoreErrorKind::Other);
}

#[tokio::test]
async fn an_account_that_may_not_ask_what_the_server_is_works_with_and_is_refused_where_that_matters() {
    let server = Redis::start(&[]);
    let account = [
        "ACL",
        "SETUSER",
        "app",
        "on",
        ">secret",
        "~idempotency:*",
        "&idempotency:*",
        "+@all",
        "-info",
    ];
    server.say(&account).await;
    let url = format!("redis://app:secret@{}", server.host());
    assert_eq!(kind(strict().connect(&url).await), StoreErrorKind::Other);
    let store = connect(&url).await;
    let lease = acquire(&store, 1).await;
    complete(&store, &lease, 10).await;
    assert!(is_replay(&store.begin(&id(1), &claim()).await.unwrap(), 10));
}

#[tokio::test]
async fn an_account_with_the_commands_that_the_page_names_does_all_there_is_to_do() {
    let server = Redis::start(&[]);
    let commands =
        "+set +get +mget +getex +setrange +del +pttl +pexpire +eval +evalsha +subscribe +unsubscribe +publish +pubsub";
    let mut account = vec![
        "ACL",
        "SETUSER",
        "app",
        "on",
        ">secret",
        "~idempotency:*",
        "&idempotency:*",
    ];
    account.extend(commands.split(' '));
    server.say(&account).await;
    let store = connect(&format!("redis://app:secret@{}", server.host())).await;
    for number in 0..4 {
        let lease = acquire(&store, number).await;
        // The first to listen is woken when its server lets it.
        store.changed(&id(number)).await;
        store.renew(&lease, MINUTE).await.unwrap();
        match number {
            0 | 1 => complete(&store, &lease, 10).await,
            2 => store.release(&lease).await.unwrap(),
            _ => store.abandon(&lease).await.unwrap(),
        }
    }
    assert!(is_replay(&store.begin(&id(0), &claim()).await.unwrap(), 10));
    let asking = claim().asking_for_remaining();
    assert!(is_replay(&store.begin(&id(1), &asking).await.unwrap(), 10));
    acquire(&store, 2).await;
    assert!(matches!(
        store.begin(&id(3), &claim()).await,
        Ok(Begin::Abandoned { .. })
    ));
    assert_eq!(server.calls("publish").await, 4);
}

/// As after a failover to a server with other settings.
#[tokio::test]
async fn a_server_that_may_forget_is_refused_also_when_it_comes_later() {
    let mut server = Redis::start(&[]);
    let store = strict().connect(&server.url()).await.unwrap();
    acquire(&store, 1).await;
    server.kill();
    server.set_options(&["--maxmemory-policy", "allkeys-lru"]);
    server.restart("Ready to accept connections");
    let refused = loop {
        match kind(store.begin(&id(1), &claim()).await) {
            StoreErrorKind::Unavailable => {}
            refused => break refused,
        }
    };
    assert_eq!(refused, StoreErrorKind::Other);
    server.say(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]).await;
    while let Err(error) = store.begin(&id(1), &claim()).await {
        assert!([StoreErrorKind::Other, StoreErrorKind::Unavailable].contains(&error.kind()));
    }
}

// ---- what they say that they will not do

#[tokio::test]
async fn a_server_without_a_place_for_another_client_is_unavailable_until_it_has_one() {
    let server = Redis::start(&["--maxclients", "4"]);
    let own = server.connection().await;
    let mut others = Vec::new();
    let client = redis::Client::open(server.url()).unwrap();
    while let Ok(connection) = client.get_multiplexed_async_connection().await {
        others.push(connection);
    }
    assert_eq!(
        kind(RedisStore::connect(&server.url()).await),
        StoreErrorKind::Unavailable
    );
    drop((own, others));
    let store = loop {
        match RedisStore::connect(&server.url()).await {
            Ok(store) => break store,
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}"),
        }
    };
    acquire(&store, 1).await;
}

#[tokio::test]
async fn a_server_that_lacks_its_replicas_is_unavailable_until_it_may_do_without() {
    let server = Redis::start(&["--min-replicas-to-write", "1"]);
    let store = connect(&server.url()).await;
    assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    server.say(&["CONFIG", "SET", "min-replicas-to-write", "0"]).await;
    let lease = acquire(&store, 1).await;
    server.say(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
    let refused = store.complete(&lease, &kept(10), MINUTE.into()).await;
    assert_eq!(kind(refused), StoreErrorKind::Unavailable);
    server.say(&["CONFIG", "SET", "min-replicas-to-write", "0"]).await;
    complete(&store, &lease, 10).await;
}

#[tokio::test]
async fn a_server_that_a_script_holds_up_is_unavailable_until_it_is_let_go() {
    let server = Redis::start(&["--busy-reply-threshold", "1"]);
    let store = connect(&server.url()).await;
    let lease = acquire(&store, 1).await;
    let mut other = server.connection().await;
    let endless = tokio::spawn(async move {
        let mut script = redis::cmd("EVAL");
        script.arg("while true do end").arg(0);
        let _ = script.query_async::<Value>(&mut other).await;
    });
    let mut watcher = server.connection().await;
    while redis::cmd("PING").query_async::<String>(&mut watcher).await.is_ok() {}
    assert_eq!(kind(store.begin(&id(2), &claim()).await), StoreErrorKind::Unavailable);
    assert_eq!(kind(store.renew(&lease, MINUTE).await), StoreErrorKind::Unavailable);
    let _: String = redis::cmd("SCRIPT")
        .arg("KILL")
        .query_async(&mut watcher)
        .await
        .unwrap();
    endless.await.unwrap();
    assert!(matches!(until_back(&store, 2).await, Begin::Acquired(_)));
    store.renew(&lease, MINUTE).await.unwrap();
}

#[tokio::test]
async fn a_server_that_cannot_write_its_file_is_unavailable_until_it_can() {
    let server = Redis::start(&["--save", "3600 1", "--dbfilename", "a"]);
    let store = connect(&server.url()).await;
    // What it would write to is a folder.
    let folder: Vec<String> = server.ask(&["CONFIG", "GET", "dir"]).await;
    let in_the_way = std::path::Path::new(&folder[1]).join("a");
    std::fs::create_dir(&in_the_way).unwrap();
    std::fs::write(in_the_way.join("b"), "").unwrap();
    server.say(&["BGSAVE"]).await;
    let failed = async || {
        let info: String = server.ask(&["INFO", "persistence"]).await;
        info.contains("rdb_last_bgsave_status:err")
    };
    while !failed().await {}
    assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    std::fs::remove_dir_all(&in_the_way).unwrap();
    server.say(&["BGSAVE"]).await;
    while failed().await {}
    acquire(&store, 1).await;
}

/// It would be made anew all the time, and others' steps with it.
#[tokio::test]
async fn a_connection_on_which_the_server_says_no_is_kept() {
    let server = Redis::start(&["--maxmemory-policy", "noeviction"]);
    server
        .say(&["ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all"])
        .await;
    let timeout = Duration::from_millis(300);
    let builder = RedisStore::builder().timeout(timeout);
    let url = format!("redis://app:secret@{}", server.host());
    let store = builder.connect(&url).await.unwrap();
    let lease = acquire(&store, 1).await;
    let refusal = async || kind(store.complete(&lease, &kept(1000), MINUTE.into()).await);
    let connection = async || {
        let clients: String = server.ask(&["CLIENT", "LIST"]).await;
        let own = clients.lines().find(|line| line.contains("user=app"));
        own.and_then(|line| line.split(' ').next()).map(str::to_owned)
    };
    server.say(&["CONFIG", "SET", "maxmemory", "1"]).await;
    // For longer than one that gives no answers is waited for.
    let (mut start, mut before) = (Instant::now(), connection().await);
    assert!(before.is_some());
    while start.elapsed() < 3 * timeout {
        match refusal().await {
            StoreErrorKind::Full => {}
            // An answer that was late, on a busy machine: that is another matter, and all begins anew.
            StoreErrorKind::Unavailable => {
                // Whatever else it is given, it is one that answers.
                while refusal().await != StoreErrorKind::Full {}
                (start, before) = (Instant::now(), connection().await);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(connection().await, before);
}

// ---- how often they are asked

#[tokio::test]
async fn the_pauses_between_tries_to_connect_grow() {
    let mut server = Redis::start(&[]);
    let builder = RedisStore::builder().timeout(Duration::from_millis(300));
    let store = builder.connect(&server.url()).await.unwrap();
    let port = server.port();
    server.kill();
    // In its place somebody who hangs up on everybody.
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let tries = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&tries);
    let strangers = tokio::spawn(async move {
        while let Ok((stranger, _)) = listener.accept().await {
            drop(stranger);
            counted.fetch_add(1, SeqCst);
        }
    });
    let start = Instant::now();
    while tries.load(SeqCst) < 6 {
        assert_eq!(kind(store.begin(&id(1), &claim()).await), StoreErrorKind::Unavailable);
    }
    // The first may have come at once. A busy machine makes it only longer.
    let least: u64 = [25, 50, 100, 200, 400].iter().sum();
    assert!(start.elapsed() >= Duration::from_millis(least), "{:?}", start.elapsed());
    strangers.abort();
    assert!(strangers.await.unwrap_err().is_cancelled());
    server.restart("Ready to accept connections");
    assert!(matches!(until_back(&store, 1).await, Begin::Acquired(_)));
}
