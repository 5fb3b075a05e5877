//! How answers get into records on Redis servers: by a comparison where the server has one, by scripts that completions
//! share, and by a script for each where neither will do.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
    time::Duration,
};

use futures_util::future::join_all;
use support::{
    redis::Redis,
    steps::{MINUTE, acquire, claim, complete, id, is_replay, kept, key, kind, listening},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Builder,
};
use tower_idempotency::{Begin, Lease, RedisStore, Retention, Store, StoreError, StoreErrorKind};

/// Whether the server has `SET … IFEQ`.
async fn compares(server: &Redis) -> bool {
    let mut connection = server.connection().await;
    let mut set = redis::cmd("SET");
    set.arg("nothing").arg("new").arg("IFEQ").arg("old");
    set.query_async::<redis::Value>(&mut connection).await.is_ok()
}

/// A store that does not know what the server is, and so sends it nothing but scripts.
async fn by_script(server: &Redis) -> RedisStore {
    with_account(server, "app", &["-info"]).await
}

async fn with_account(server: &Redis, name: &str, rights: &[&str]) -> RedisStore {
    let account = ["ACL", "SETUSER", name, "on", ">secret", "~*", "&*", "+@all"];
    server.say(&[&account, rights].concat()).await;
    let url = format!("redis://{name}:secret@{}", server.host());
    RedisStore::connect(&url).await.unwrap()
}

async fn acquire_all(store: &RedisStore, count: u32) -> Vec<Lease> {
    join_all((0..count).map(|number| acquire(store, number))).await
}

/// In one moment.
async fn complete_all(store: &RedisStore, leases: &[Lease]) -> Vec<Result<(), StoreError>> {
    let answer = kept(10);
    join_all(leases.iter().map(|lease| store.complete(lease, &answer, MINUTE.into()))).await
}

async fn complete_for_ever(store: &RedisStore, number: u32) {
    let lease = acquire(store, number).await;
    store.complete(&lease, &kept(10), Retention::Forever).await.unwrap();
}

async fn is_completed(store: &RedisStore, number: u32) -> bool {
    is_replay(&store.begin(&id(number), &claim()).await.unwrap(), 10)
}

#[tokio::test]
async fn a_completion_is_one_command_where_the_server_compares_and_a_script_elsewhere() {
    let server = Redis::start(&[]);
    let store = RedisStore::connect(&server.url()).await.unwrap();
    complete(&store, &acquire(&store, 1).await, 10).await;
    assert!(is_completed(&store, 1).await);
    let scripts = async || server.calls("eval").await + server.calls("evalsha").await;
    let (sets, before) = (server.calls("set").await, scripts().await);
    complete(&store, &acquire(&store, 2).await, 10).await;
    // The claim's, and one for the answer, which may be made by a script.
    assert_eq!(server.calls("set").await - sets, 2);
    let expected = if compares(&server).await { 0 } else { 1 };
    assert_eq!(scripts().await - before, expected);
    // What is kept for ever goes by a script: replicas would be sent the comparison.
    complete_for_ever(&store, 3).await;
    let before = scripts().await;
    complete_for_ever(&store, 4).await;
    assert_eq!(scripts().await - before, 1);
}

#[tokio::test]
async fn a_record_has_the_same_bytes_and_the_same_end_in_whichever_way_it_is_completed() {
    let server = Redis::start(&[]);
    let stores = [
        RedisStore::connect(&server.url()).await.unwrap(),
        by_script(&server).await,
    ];
    for (number, retention) in [(0, Retention::For(MINUTE)), (1, Retention::Forever)] {
        for (store, base) in stores.iter().zip([10, 20]) {
            let lease = acquire(store, base + number).await;
            store.complete(&lease, &kept(10), retention).await.unwrap();
            // Nothing is known of this one: it was acquired elsewhere.
            let elsewhere = acquire(&RedisStore::connect(&server.url()).await.unwrap(), base + 5 + number).await;
            store.complete(&elsewhere, &kept(10), retention).await.unwrap();
        }
        let mut records = Vec::new();
        for base in [10, 15, 20, 25] {
            let mut record: Vec<u8> = server.ask(&["GET", &key(base + number)]).await;
            // Each has an owner of its own, and a checksum over it.
            record.drain(67..71);
            record.drain(2..18);
            records.push(record);
            let left: i64 = server.ask(&["PTTL", &key(base + number)]).await;
            match retention {
                Retention::Forever => assert_eq!(left, -1),
                Retention::For(_) => assert!((50_000..=60_000).contains(&left), "{left}"),
            }
        }
        assert!(records.iter().all(|record| *record == records[0]), "{records:?}");
    }
}

/// How many scripts it takes at least, of a few tries, to write these answers in one moment: on a machine that is busy with
/// something else a moment may be longer than anybody waits for others.
async fn fewest_scripts(server: &Redis, store: &RedisStore, lengths: &[usize]) -> u64 {
    let mut fewest = u64::MAX;
    for _ in 0..20 {
        server.say(&["FLUSHALL"]).await;
        let count = u32::try_from(lengths.len()).unwrap();
        let leases = acquire_all(store, count).await;
        let answers: Vec<_> = lengths.iter().map(|length| kept(*length)).collect();
        let before = server.calls("evalsha").await;
        let all = leases.iter().zip(&answers);
        let results = join_all(all.map(|(lease, answer)| store.complete(lease, answer, MINUTE.into()))).await;
        assert!(results.iter().all(Result::is_ok));
        fewest = fewest.min(server.calls("evalsha").await - before);
        for (number, length) in (0..count).zip(lengths) {
            let found = store.begin(&id(number), &claim()).await.unwrap();
            assert!(is_replay(&found, *length), "{number}");
        }
    }
    fewest
}

#[tokio::test]
async fn completions_of_one_moment_share_scripts_of_sixteen() {
    let server = Redis::start(&[]);
    for store in [
        by_script(&server).await,
        with_account(&server, "one", &["-info", "-mget"]).await,
    ] {
        // No more than are polled without a pause.
        assert_eq!(fewest_scripts(&server, &store, &[10; 30]).await, 2);
    }
}

#[tokio::test]
async fn of_completions_that_share_a_script_each_ends_as_it_would_alone() {
    let server = Redis::start(&[]);
    for store in [
        by_script(&server).await,
        RedisStore::connect(&server.url()).await.unwrap(),
        // Whoever may not read several records at once, and whoever may not ask who listens.
        with_account(&server, "one", &["-info", "-mget"]).await,
        with_account(&server, "deaf", &["-info", "-pubsub"]).await,
    ] {
        server.say(&["FLUSHALL"]).await;
        let mut leases = acquire_all(&store, 8).await;
        store.release(&leases[1]).await.unwrap();
        store.abandon(&leases[2]).await.unwrap();
        store.abandon(&leases[3]).await.unwrap();
        let next = match store.begin(&id(3), &claim().taking_over(leases[3])).await.unwrap() {
            Begin::Acquired(next) => next,
            other => panic!("it was to be taken over, not {other:?}"),
        };
        server.say(&["DEL", &key(4)]).await;
        server.say(&["LPUSH", &key(4), "not a record"]).await;
        complete(&store, &leases[5], 10).await;
        server.say(&["DEL", &key(6)]).await;
        leases.push(next);
        let results = complete_all(&store, &leases).await;
        let kinds: Vec<_> = results
            .into_iter()
            .map(|result| result.err().map(|error| error.kind()))
            .collect();
        let (fenced, corrupt) = (Some(StoreErrorKind::Fenced), Some(StoreErrorKind::Corrupt));
        assert_eq!(
            kinds,
            [
                None,    // as it was granted
                fenced,  // released
                None,    // abandoned, and still its owner's
                fenced,  // taken over
                corrupt, // not a record any more
                None,    // completed before
                fenced,  // lost
                None,    // as it was granted
                None,    // taken over from another
            ]
        );
        for (number, expected) in [(0, true), (2, true), (3, true), (5, true), (7, true)] {
            assert_eq!(is_completed(&store, number).await, expected, "{number}");
        }
        for vacant in [1, 6] {
            acquire(&store, vacant).await;
        }
    }
}

#[tokio::test]
async fn a_long_answer_has_a_script_of_its_own() {
    let server = Redis::start(&[]);
    let store = by_script(&server).await;
    let lengths = [100_000, 10, 100_000, 10];
    assert_eq!(fewest_scripts(&server, &store, &lengths).await, 3);
}

#[tokio::test]
async fn those_who_wait_hear_of_completions_of_one_moment_and_nothing_is_published_for_others() {
    let server = Redis::start(&[]);
    let elsewhere = RedisStore::connect(&server.url()).await.unwrap();
    for store in [
        by_script(&server).await,
        RedisStore::connect(&server.url()).await.unwrap(),
    ] {
        server.say(&["FLUSHALL"]).await;
        let leases = acquire_all(&store, 20).await;
        let mut listeners = Vec::new();
        for number in [3, 8, 17] {
            listeners.push(listening(&elsewhere, number).await);
        }
        let published = server.calls("publish").await;
        assert!(complete_all(&store, &leases).await.iter().all(Result::is_ok));
        for listener in &mut listeners {
            tokio::time::timeout(MINUTE, listener).await.expect("it was woken");
        }
        assert_eq!(server.calls("publish").await - published, 3);
    }
}

#[tokio::test]
async fn where_nobody_listens_a_shared_script_asks_for_that_once() {
    let server = Redis::start(&[]);
    let store = by_script(&server).await;
    let elsewhere = RedisStore::connect(&server.url()).await.unwrap();
    let questions_of_each = async || {
        server.say(&["FLUSHALL"]).await;
        let leases = acquire_all(&store, 30).await;
        let (asked, scripts) = (server.calls("pubsub|numsub").await, server.calls("evalsha").await);
        assert!(complete_all(&store, &leases).await.iter().all(Result::is_ok));
        let asked = server.calls("pubsub|numsub").await - asked;
        asked as f64 / (server.calls("evalsha").await - scripts) as f64
    };
    // The server gets to know the script.
    questions_of_each().await;
    assert_eq!(questions_of_each().await, 1.0);
    // To any record, and so each of them is asked about.
    let _listener = listening(&elsewhere, 99).await;
    let mut most: f64 = 0.0;
    for _ in 0..20 {
        // One whose claim is not remembered any more has a script of its own, and of that the other question is no part.
        most = most.max(questions_of_each().await);
    }
    assert_eq!(most, 2.0);
}

/// Its first try may have ended between the change and the word of it.
#[tokio::test]
async fn a_completion_that_is_repeated_wakes_those_who_listen() {
    let server = Redis::start(&[]);
    let elsewhere = RedisStore::connect(&server.url()).await.unwrap();
    for store in [
        by_script(&server).await,
        RedisStore::connect(&server.url()).await.unwrap(),
    ] {
        server.say(&["FLUSHALL"]).await;
        let lease = acquire(&store, 1).await;
        complete(&store, &lease, 10).await;
        let listener = listening(&elsewhere, 1).await;
        complete(&store, &lease, 10).await;
        tokio::time::timeout(MINUTE, listener).await.expect("it was woken");
    }
}

/// On a full server the script is refused as a whole.
#[tokio::test]
async fn on_a_full_server_each_of_those_that_share_a_script_is_told_so() {
    let server = Redis::start(&[]);
    for store in [
        by_script(&server).await,
        RedisStore::connect(&server.url()).await.unwrap(),
    ] {
        server.say(&["FLUSHALL"]).await;
        let leases = acquire_all(&store, 3).await;
        server.say(&["CONFIG", "SET", "maxmemory", "1"]).await;
        for result in complete_all(&store, &leases).await {
            assert_eq!(kind(result), StoreErrorKind::Full);
        }
        server.say(&["CONFIG", "SET", "maxmemory", "0"]).await;
        assert!(complete_all(&store, &leases).await.iter().all(Result::is_ok));
    }
}

// ---- runtimes

type Completing<'a> = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send + 'a>>;

fn completing<'a>(store: &'a RedisStore, lease: &'a Lease) -> Completing<'a> {
    Box::pin(async move { store.complete(lease, &kept(10), MINUTE.into()).await })
}

fn threads(count: usize) -> tokio::runtime::Runtime {
    Builder::new_multi_thread()
        .worker_threads(count)
        .enable_all()
        .build()
        .unwrap()
}

/// A runtime on which a completion has begun, and which stands still since then.
fn begun(completion: &mut Completing<'_>) -> tokio::runtime::Runtime {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let poll = runtime.block_on(poll_fn(|cx| Poll::Ready(completion.as_mut().poll(cx))));
    assert!(poll.is_pending());
    runtime
}

#[test]
fn completions_of_a_runtime_that_stands_still_hold_up_nobody_elsewhere() {
    let server = Redis::start(&[]);
    let runtime = threads(1);
    let store = runtime.block_on(by_script(&server));
    let leases = runtime.block_on(acquire_all(&store, 3));
    let mut first = completing(&store, &leases[0]);
    let still = begun(&mut first);
    let results = runtime.block_on(complete_all(&store, &leases[1..]));
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    // It goes on as soon as its runtime does.
    still.block_on(first).unwrap();
    for number in 0..3 {
        assert!(runtime.block_on(is_completed(&store, number)), "{number}");
    }
}

#[test]
fn a_completion_whose_runtime_is_gone_before_it_was_sent_is_sent_by_itself() {
    let server = Redis::start(&[]);
    let runtime = threads(1);
    let store = runtime.block_on(by_script(&server));
    let leases = runtime.block_on(acquire_all(&store, 1));
    let mut completion = completing(&store, &leases[0]);
    drop(begun(&mut completion));
    runtime.block_on(completion).unwrap();
    assert!(runtime.block_on(is_completed(&store, 0)));
}

#[tokio::test]
async fn a_completion_that_nobody_waits_for_any_more_takes_none_of_the_others_with_it() {
    let server = Redis::start(&[]);
    let store = by_script(&server).await;
    let leases = acquire_all(&store, 3).await;
    // The first of its moment: it is the one that all are sent by.
    let mut left = completing(&store, &leases[0]);
    assert!(poll_fn(|cx| Poll::Ready(left.as_mut().poll(cx))).await.is_pending());
    let mut others: Vec<_> = leases[1..].iter().map(|lease| completing(&store, lease)).collect();
    for other in &mut others {
        assert!(poll_fn(|cx| Poll::Ready(other.as_mut().poll(cx))).await.is_pending());
    }
    drop(left);
    for other in others {
        tokio::time::timeout(MINUTE, other).await.unwrap().unwrap();
    }
    for number in 1..3 {
        assert!(is_completed(&store, number).await, "{number}");
    }
    // It was sent or not, and may be again.
    completing(&store, &leases[0]).await.unwrap();
    assert!(is_completed(&store, 0).await);
}

/// The task that sends for all may be on a thread that somebody blocks.
#[test]
fn a_thread_that_is_blocked_holds_up_no_completion_on_another() {
    let server = Redis::start(&[]);
    let (network, runtime) = (threads(2), threads(2));
    let store = network.block_on(by_script(&server));
    let leases = network.block_on(acquire_all(&store, 4));
    let (release, released) = std::sync::mpsc::channel::<()>();
    let (begun, begins) = tokio::sync::oneshot::channel();
    let (own, first) = (store.clone(), leases[0]);
    let blocking = runtime.spawn(async move {
        let mut completion = completing(&own, &first);
        assert!(
            poll_fn(|cx| Poll::Ready(completion.as_mut().poll(cx)))
                .await
                .is_pending()
        );
        let _ = begun.send(());
        // As a handler does that reckons for long.
        let _ = released.recv();
        completion.await
    });
    runtime.block_on(begins).unwrap();
    let others = runtime.spawn({
        let (store, leases) = (store.clone(), leases.clone());
        async move { complete_all(&store, &leases[1..]).await }
    });
    let results = runtime.block_on(others).unwrap();
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    release.send(()).unwrap();
    runtime.block_on(blocking).unwrap().unwrap();
    for number in 0..4 {
        assert!(network.block_on(is_completed(&store, number)), "{number}");
    }
}

// ---- a server that is not what it says

/// One that wants the keys of a step in one place, and does not say that it is part of a cluster.
#[tokio::test]
async fn where_keys_are_in_several_places_each_completion_has_a_script() {
    let server = Redis::start(&["--cluster-enabled", "yes"]);
    server.say(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
    loop {
        let info: String = server.ask(&["CLUSTER", "INFO"]).await;
        if info.contains("cluster_state:ok") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let store = by_script(&server).await;
    for round in 0..2 {
        let leases = join_all((0..5).map(|number| acquire(&store, 10 * round + number))).await;
        assert!(complete_all(&store, &leases).await.iter().all(Result::is_ok));
        // Whether they may share one was tried once.
        let said: String = server.ask(&["INFO", "errorstats"]).await;
        assert!(said.contains("errorstat_CROSSSLOT:count=1\r"), "{said}");
        for number in 0..5 {
            assert!(is_completed(&store, 10 * round + number).await, "{number}");
        }
    }
}

/// Passes everything on, and makes a Redis server say that it is a later one.
async fn flatterer(port: u16) -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
            tokio::spawn(async move {
                let mut buffer = vec![0; 256 * 1024];
                while let Ok(length @ 1..) = from_server.read(&mut buffer).await {
                    let said = &mut buffer[..length];
                    let version = b"redis_version:";
                    if let Some(at) = said.windows(version.len()).position(|found| found == version) {
                        said[at + version.len()..][..3].copy_from_slice(b"8.4");
                    }
                    if to_client.write_all(said).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    url
}

#[tokio::test]
async fn a_server_that_does_not_know_the_comparison_after_all_is_sent_a_script() {
    let server = Redis::start(&[]);
    let store = RedisStore::connect(&flatterer(server.port()).await).await.unwrap();
    let leases = acquire_all(&store, 5).await;
    let before = server.calls("set").await;
    assert!(complete_all(&store, &leases).await.iter().all(Result::is_ok));
    let sets = server.calls("set").await - before;
    // Each was tried by a `SET` of its own, by which none or all were done.
    assert_eq!(sets, if compares(&server).await { 5 } else { 10 });
    for number in 0..5 {
        assert!(is_completed(&store, number).await, "{number}");
    }
}
