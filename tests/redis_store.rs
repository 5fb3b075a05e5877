//! The Redis store's contract and own promises, on servers of the tests' own.
#![cfg(all(feature = "redis", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
    time::Duration,
};

use http::StatusCode;
use support::redis::Redis;
use tower_idempotency::{
    Begin, Claim, Fingerprint, Lease, Owner, RecordId, RedisStore, Retention, Store, StoreErrorKind, StoredResponse,
    testing::{self, Subject},
};

const MINUTE: Duration = Duration::from_secs(60);

fn claim() -> Claim {
    let fingerprint = Fingerprint::new(1, [1; 32]);
    Claim::new(fingerprint, Owner::random().unwrap(), MINUTE, MINUTE.into())
}

fn id(number: u8) -> RecordId {
    RecordId::from_bytes([number; 32])
}

fn key(number: u8) -> String {
    format!("idempotency:{}", id(number).to_hex())
}

fn answer() -> StoredResponse {
    StoredResponse::not_kept(StatusCode::CREATED)
}

async fn acquire(store: &RedisStore, number: u8) -> Lease {
    match store.begin(&id(number), &claim()).await {
        Ok(Begin::Acquired(lease)) => lease,
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

async fn refusal(store: &RedisStore, number: u8) -> StoreErrorKind {
    store.begin(&id(number), &claim()).await.unwrap_err().kind()
}

/// Whether it is ready when it is polled once.
async fn is_ready(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
    let mut future = future;
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await
}

struct Real(Redis);

impl Subject for Real {
    type Store = RedisStore;

    async fn store(&self) -> RedisStore {
        RedisStore::connect(&self.0.url()).await.unwrap()
    }

    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    fn tick(&self) -> Duration {
        Duration::from_millis(400)
    }
}

#[tokio::test]
async fn the_store_keeps_the_contract() {
    testing::check(&Real(Redis::start(&[]))).await.assert();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_keeps_the_contract_under_many_threads() {
    testing::check_races(&Real(Redis::start(&[]))).await.assert();
}
