//! Steps of one moment, which share their way to a Redis server.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::mpsc::channel,
    task::Poll,
    time::Duration,
};

use futures_util::future::join_all;
use support::{
    proxy::{Proxy, Weather},
    redis::Redis,
    steps::{MINUTE, acquire, claim, complete, id, is_replay, key, kind},
};
use tokio::{runtime::Builder, sync::oneshot, time::timeout};
use tower_idempotency::{Begin, Lease, RedisStore, Store, StoreError, StoreErrorKind};

type Beginning<'a> = Pin<Box<dyn Future<Output = Result<Begin, StoreError>> + Send + 'a>>;

fn beginning(store: &RedisStore, number: u32) -> Beginning<'_> {
    Box::pin(async move { store.begin(&id(number), &claim()).await })
}

fn all(store: &RedisStore, numbers: impl Iterator<Item = u32>) -> Vec<Beginning<'_>> {
    numbers.map(|number| beginning(store, number)).collect()
}

/// Polls each once: what can be sent is on its way then.
async fn poll_all(steps: &mut [Beginning<'_>]) {
    for step in steps {
        assert!(poll_fn(|cx| Poll::Ready(step.as_mut().poll(cx))).await.is_pending());
    }
}

fn is_acquired(begin: &Result<Begin, StoreError>) -> bool {
    matches!(begin, Ok(Begin::Acquired(_)))
}

#[tokio::test]
async fn each_of_many_steps_of_one_moment_gets_its_own_answer() {
    let server = Redis::start(&[]);
    let store = RedisStore::connect(&server.url()).await.unwrap();
    for number in 0..200 {
        match number % 4 {
            0 => complete(&store, &acquire(&store, number).await, number as usize).await,
            1 => drop(acquire(&store, number).await),
            2 => server.say(&["RPUSH", &key(number), "not a record"]).await,
            _ => {}
        }
    }
    // Another one's: a replay is not expected here, and is asked for its end besides.
    let elsewhere = RedisStore::connect(&server.url()).await.unwrap();
    for (store, asks) in [(&store, false), (&elsewhere, true), (&store, true)] {
        let begins = (0..200).map(async |number| {
            let claim = if asks { claim().asking_for_remaining() } else { claim() };
            (number, store.begin(&id(number), &claim).await)
        });
        for (number, begin) in join_all(begins).await {
            match (number % 4, begin) {
                (0, Ok(begin)) => {
                    assert!(is_replay(&begin, number as usize), "{number}: {begin:?}");
                    let end = matches!(begin, Begin::Completed { remaining: Some(_), .. });
                    assert!(end || !asks, "{number}: {begin:?}");
                }
                (1, begin) => assert!(matches!(begin, Ok(Begin::InProgress { .. })), "{number}: {begin:?}"),
                // Only whoever asked for it is told what the server refused.
                (2, begin) => assert_eq!(kind(begin), StoreErrorKind::Corrupt, "{number}"),
                (_, Ok(Begin::Acquired(lease))) => store.release(&lease).await.unwrap(),
                other => panic!("{number}: {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn where_the_server_is_silent_each_of_many_steps_ends_by_its_deadline() {
    let server = Redis::start(&[]);
    let builder = RedisStore::builder().timeout(Duration::from_millis(300));
    let store = builder.connect(&server.url()).await.unwrap();
    acquire(&store, 0).await;
    server.pause();
    let begun = timeout(MINUTE, join_all(all(&store, 1..100))).await.unwrap();
    for begin in begun {
        assert_eq!(kind(begin), StoreErrorKind::Unavailable);
    }
    server.resume();
    let again = support::steps::until_back(&store, 100).await;
    assert!(matches!(again, Begin::Acquired(_)));
    // Where others were sent together just before.
    for _ in 0..3 {
        join_all(all(&store, 101..200)).await;
    }
    server.pause();
    let begun = timeout(MINUTE, join_all(all(&store, 201..300))).await.unwrap();
    for begin in begun {
        assert_eq!(kind(begin), StoreErrorKind::Unavailable);
    }
    server.resume();
}

#[tokio::test]
async fn a_step_that_nobody_waits_for_any_more_is_not_sent_and_takes_none_of_the_others_with_it() {
    let server = Redis::start(&[]);
    let store = RedisStore::connect(&server.url()).await.unwrap();
    // Two are sent by themselves.
    let mut steps = all(&store, 0..4);
    poll_all(&mut steps[..3]).await;
    // The first of its moment: by it all are sent.
    drop(steps.remove(2));
    poll_all(&mut steps[2..]).await;
    let begun = timeout(MINUTE, join_all(steps)).await.unwrap();
    assert!(begun.iter().all(is_acquired), "{begun:?}");
    assert!(!server.ask::<bool>(&["EXISTS", &key(2)]).await);
}

/// Two that are under way for as long as these are there: whatever comes meanwhile goes together.
async fn two_under_way(store: &RedisStore) -> Vec<Beginning<'_>> {
    let mut two = all(store, 1000..1002);
    poll_all(&mut two).await;
    two
}

#[tokio::test]
async fn claims_of_one_moment_whose_answers_were_lost_are_their_owners_when_they_are_repeated() {
    for lose in [Weather::LoseAnswer, Weather::CutAnswer] {
        let server = Redis::start(&[]);
        let proxy = Proxy::before(server.port()).await;
        let builder = RedisStore::builder().timeout(MINUTE);
        let store = builder.connect(&proxy.url()).await.unwrap();
        let _two = two_under_way(&store).await;
        // Theirs come before this one.
        acquire(&store, 1002).await;
        let claims: Vec<_> = (0..100).map(|_| claim()).collect();
        let begin_all = async || {
            let begins = claims.iter().zip(0..);
            join_all(begins.map(async |(own, number)| store.begin(&id(number), own).await)).await
        };
        proxy.make(lose);
        let mut lost = 0;
        for begin in begin_all().await {
            match begin {
                Ok(begin) => assert!(matches!(begin, Begin::Acquired(_)), "{begin:?}"),
                Err(error) => {
                    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
                    lost += 1;
                }
            }
        }
        assert!(lost >= 16 && proxy.weather() == Weather::Clear, "{lost}");
        assert!(server.ask::<u32>(&["DBSIZE"]).await > 3, "some of them were made");
        for ((begin, own), number) in begin_all().await.into_iter().zip(&claims).zip(0..) {
            let lease = Lease::new(id(number), own.owner, 1);
            assert!(
                matches!(&begin, Ok(Begin::Acquired(acquired)) if *acquired == lease),
                "{begin:?}"
            );
        }
        for begin in join_all(all(&store, 0..100)).await {
            assert!(matches!(begin, Ok(Begin::InProgress { .. })), "{begin:?}");
        }
    }
}

#[tokio::test]
async fn expected_replays_of_one_moment_go_together_and_each_is_its_own() {
    let server = Redis::start(&[]);
    let store = RedisStore::builder()
        .timeout(MINUTE)
        .connect(&server.url())
        .await
        .unwrap();
    for number in 0..96 {
        complete(&store, &acquire(&store, number).await, number as usize).await;
    }
    // Long, and so by itself.
    complete(&store, &acquire(&store, 96).await, 20_000).await;
    let _two = two_under_way(&store).await;
    acquire(&store, 1002).await;
    for asks in [false, true] {
        let (read, set) = (server.calls("getex").await, server.calls("set").await);
        let begins = (0..97).map(async |number| {
            let claim = if asks { claim().asking_for_remaining() } else { claim() };
            (number, store.begin(&id(number), &claim).await.unwrap())
        });
        for (number, begin) in join_all(begins).await {
            let length = if number == 96 { 20_000 } else { number as usize };
            assert!(is_replay(&begin, length), "{number}: {begin:?}");
            let end = matches!(begin, Begin::Completed { remaining: Some(_), .. });
            assert_eq!(end, asks, "{number}");
        }
        assert_eq!(server.calls("getex").await, read + 97);
        assert_eq!(server.calls("set").await, set);
    }
}

/// Together they are told nothing before the last one is there, which on such a network is too late for all.
#[tokio::test]
async fn answers_that_a_slow_network_brings_too_late_together_are_heard_one_by_one() {
    const COUNT: u32 = 16;
    const LENGTH: usize = 128 * 1024;
    let server = Redis::start(&[]);
    let elsewhere = RedisStore::connect(&server.url()).await.unwrap();
    for number in 0..COUNT {
        complete(&elsewhere, &acquire(&elsewhere, number).await, LENGTH).await;
    }
    let proxy = Proxy::before(server.port()).await;
    let builder = RedisStore::builder().timeout(Duration::from_millis(300));
    let store = builder.connect(&proxy.url()).await.unwrap();
    let _two = two_under_way(&store).await;
    // 64 KiB at a time.
    proxy.make(Weather::Slow(Duration::from_millis(20)));
    let mut missing: Vec<_> = (0..COUNT).collect();
    let hear_all = async {
        while !missing.is_empty() {
            let begins = missing.iter().map(async |&number| {
                let begin = store.begin(&id(number), &claim()).await;
                (number, begin)
            });
            for (number, begin) in join_all(begins).await {
                match begin {
                    Ok(begin) => {
                        assert!(is_replay(&begin, LENGTH), "{number}");
                        missing.retain(|&other| other != number);
                    }
                    Err(error) => assert_eq!(error.kind(), StoreErrorKind::Unavailable),
                }
            }
        }
    };
    timeout(MINUTE, hear_all).await.unwrap();
}

/// The task that sends for all may be on a thread that somebody blocks.
#[test]
fn a_thread_that_is_blocked_holds_up_no_step_on_another() {
    let server = Redis::start(&[]);
    let threads = || {
        Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
    };
    let (network, runtime) = (threads(), threads());
    let store = network.block_on(RedisStore::connect(&server.url())).unwrap();
    let (release, released) = channel::<()>();
    let (begun, begins) = oneshot::channel();
    // They are under way until somebody asks for their answers.
    let mut others = all(&store, 0..8);
    network.block_on(poll_all(&mut others));
    // Others go on all the while.
    let own = store.clone();
    let mut going_on = runtime.spawn(async move {
        for number in 100.. {
            assert!(is_acquired(&beginning(&own, number).await));
        }
    });
    let own = store.clone();
    let blocking = runtime.spawn(async move {
        let mut step = all(&own, 8..9);
        poll_all(&mut step).await;
        let _ = begun.send(());
        // As a handler does that reckons for long.
        let _ = released.recv();
        join_all(step).await.iter().all(is_acquired)
    });
    runtime.block_on(begins).unwrap();
    let own = store.clone();
    let another = runtime.spawn(async move { is_acquired(&beginning(&own, 9).await) });
    assert!(runtime.block_on(another).unwrap());
    assert!(runtime.block_on(async {
        poll_fn(|cx| Poll::Ready(Pin::new(&mut going_on).poll(cx)))
            .await
            .is_pending()
    }));
    going_on.abort();
    release.send(()).unwrap();
    assert!(runtime.block_on(blocking).unwrap());
    assert!(network.block_on(join_all(others)).iter().all(is_acquired));
}
