//! The steps of a store, as tests take them.

use std::{
    fmt::Debug,
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
    time::{Duration, Instant},
};

use tower_idempotency::{
    Begin, Claim, Fingerprint, Lease, Owner, RecordId, Store, StoreError, StoreErrorKind, StoredResponse,
};

pub const MINUTE: Duration = Duration::from_secs(60);

pub fn claim() -> Claim {
    let fingerprint = Fingerprint::new(1, [1; 32]);
    Claim::new(fingerprint, Owner::random().unwrap(), MINUTE, MINUTE.into())
}

pub fn id(number: u32) -> RecordId {
    let mut bytes = [7; 32];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    // Of an id, which is a hash, any part tells it from others.
    bytes[8..12].copy_from_slice(&number.to_le_bytes());
    RecordId::from_bytes(bytes)
}

/// The name of a record on a Redis server.
pub fn key(number: u32) -> String {
    format!("idempotency:{}", id(number).to_hex())
}

/// An answer that is kept, of so many bytes.
pub fn kept(length: usize) -> StoredResponse {
    let mut bytes = vec![1, 0, 201, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes.extend((length as u64).to_le_bytes());
    bytes.resize(bytes.len() + length, b'x');
    StoredResponse::from_bytes(bytes.into()).unwrap()
}

pub async fn acquire(store: &impl Store, number: u32) -> Lease {
    match store.begin(&id(number), &claim()).await {
        Ok(Begin::Acquired(lease)) => lease,
        other => panic!("{number} was to be acquired, not {other:?}"),
    }
}

pub async fn complete(store: &impl Store, lease: &Lease, length: usize) {
    store.complete(lease, &kept(length), MINUTE.into()).await.unwrap();
}

pub fn kind<T: Debug>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.unwrap_err().kind()
}

/// Asks until the store is there again.
pub async fn until_back(store: &impl Store, number: u32) -> Begin {
    let start = Instant::now();
    while start.elapsed() < MINUTE {
        match store.begin(&id(number), &claim()).await {
            Ok(begin) => return begin,
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}"),
        }
    }
    panic!("it does not come back");
}

pub fn is_replay(begin: &Begin, length: usize) -> bool {
    matches!(begin, Begin::Completed { response, .. } if *response == kept(length))
}

pub type Listener<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// A listener that is registered and was woken by nothing yet.
pub async fn listening<S: Store>(store: &S, number: u32) -> Listener<'_> {
    loop {
        let mut listener: Listener<'_> = Box::pin(async move { store.changed(&id(number)).await });
        let quiet = tokio::time::timeout(Duration::from_millis(300), &mut listener).await;
        if quiet.is_err() {
            return listener;
        }
    }
}

/// Whether it is ready when it is polled once.
pub async fn is_ready(listener: &mut Listener<'_>) -> bool {
    poll_fn(|cx| Poll::Ready(listener.as_mut().poll(cx).is_ready())).await
}

/// Whoever waits for a change hears of it, and of nothing before.
pub async fn assert_tells_of_a_change(store: &impl Store) {
    let lease = acquire(store, 77).await;
    let id = id(77);
    let mut changed = std::pin::pin!(store.changed(&id));
    let poll = poll_fn(|cx| Poll::Ready(changed.as_mut().poll(cx))).await;
    assert!(poll.is_pending(), "nothing has changed");
    complete(store, &lease, 4).await;
    changed.await;
}
