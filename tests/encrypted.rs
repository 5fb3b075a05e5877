//! Whoever reads an encrypted store learns nothing, whoever writes to it gives nobody a wrong answer, and no rotation of
//! its secrets runs anything twice.
#![cfg(all(feature = "encrypted", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{body::Body, response::IntoResponse};
use futures_util::future::join_all;
use http::{Request, StatusCode};
use support::{
    app::{Control, answering, call, keyed, open, pay, spawn},
    faulty::{Fault, FaultyStore, Op},
    http::Answer,
    log::Log,
};
use tokio::time::advance;
use tower_idempotency::{
    AnyStore, Begin, Claim, Encrypted, EncryptedError, EncryptedErrorKind, Fingerprint, Guarantee, IdempotencyLayer,
    KeyRing, KeySource, Lease, MemoryStore, Owner, RecordId, Retention, SecretKey, Store, StoreError, StoreErrorKind,
    StoredResponse,
    testing::{self, Subject},
};

const SECOND: Duration = Duration::from_secs(1);
const LOOK_UP_SECRET: u8 = 0xc1;

fn key(byte: u8) -> SecretKey {
    SecretKey::from_bytes([byte; 32])
}

fn ring() -> KeyRing {
    KeyRing::sealing(1, &key(0xd1))
}

async fn opened<S: Store>(store: S) -> Encrypted<S> {
    opened_with(store, ring()).await
}

async fn opened_with<S: Store>(store: S, ring: KeyRing) -> Encrypted<S> {
    Encrypted::open(store, &key(LOOK_UP_SECRET), ring).await.unwrap()
}

async fn opened_by<S: Store>(store: S, secret: u8) -> Result<Encrypted<S>, EncryptedError> {
    Encrypted::open(store, &key(secret), ring()).await
}

fn claim() -> Claim {
    let fingerprint = Fingerprint::new(1, [0xf1; 32]);
    Claim::new(fingerprint, Owner::random().unwrap(), SECOND, SECOND.into())
}

/// A node: its application, and what its handlers did.
async fn node(store: impl Store, ring: KeyRing, control: &Control) -> axum::Router {
    pay(control, IdempotencyLayer::new(opened_with(store, ring).await))
}

// ---- the contract

struct Paused<F>(F);

impl<S: Store, M: Future<Output = S> + Send, F: Fn() -> M + Sync> Subject for Paused<F> {
    type Store = S;

    fn store(&self) -> impl Future<Output = S> + Send {
        (self.0)()
    }

    async fn pass(&self, time: Duration) {
        advance(time).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_encrypted_store_keeps_the_contract() {
    let report = testing::check(&Paused(|| opened(MemoryStore::new()))).await;
    report.assert();
    assert!(report.checks() >= 35, "only {} sentences were checked", report.checks());
    // Nodes on one store.
    let shared = MemoryStore::new();
    testing::check(&Paused(|| opened(shared.clone()))).await.assert();
    let any = || async { AnyStore::new(opened(AnyStore::new(MemoryStore::new())).await) };
    testing::check(&Paused(any)).await.assert();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_encrypted_store_keeps_the_contract_among_threads() {
    for _ in 0..3 {
        testing::check_races(&Paused(|| opened(MemoryStore::new())))
            .await
            .assert();
    }
}

#[cfg(feature = "cached")]
#[tokio::test(start_paused = true)]
async fn an_encrypted_store_keeps_the_contract_behind_and_in_front_of_copies() {
    use tower_idempotency::Cached;
    let shared = MemoryStore::new();
    let behind = || async { Cached::new(opened(shared.clone()).await) };
    testing::check(&Paused(behind)).await.assert();
    let in_front = || opened(Cached::new(shared.clone()));
    testing::check(&Paused(in_front)).await.assert();
}

#[cfg(feature = "file")]
#[tokio::test]
async fn an_encrypted_store_keeps_the_contract_in_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let file = tower_idempotency::FileStore::open(path).await.unwrap();
    let store = opened(file).await;
    // Not sooner: its threads would look like a wait.
    tokio::time::pause();
    testing::check(&Paused(|| async { store.clone() })).await.assert();
}

/// Time is the store's own there: what needs it to pass is checked above.
#[cfg(any(feature = "redis", feature = "postgres"))]
async fn assert_two_nodes_share<S: Store + Clone>(store: S) {
    let subject = Paused(|| opened(store.clone()));
    testing::check_races(&subject).await.assert();
    let control = open();
    let one = node(store.clone(), ring(), &control).await;
    let other = node(store.clone(), ring(), &control).await;
    let first = call(&one, keyed("k", "a")).await;
    let replay = call(&other, keyed("k", "a")).await;
    assert!(replay.is_replay() && replay.body == first.body);
    let reused = call(&other, keyed("k", "b")).await;
    assert_eq!((reused.status, control.runs()), (StatusCode::UNPROCESSABLE_ENTITY, 1));
    let refused = opened_by(store, 2).await.err().unwrap();
    assert_eq!(refused.kind(), EncryptedErrorKind::AnotherLookUpSecret);
}

#[cfg(feature = "redis")]
#[tokio::test]
async fn nodes_share_an_encrypted_store_on_redis() {
    let server = support::redis::Redis::start(&[]);
    let store = tower_idempotency::RedisStore::connect(&server.url()).await.unwrap();
    assert_two_nodes_share(store).await;
    let lives: i64 = server
        .ask(&[
            "PTTL",
            "idempotency:746f7765722d6964656d706f74656e63792f6c6f6f6b2d75702d736563726574",
        ])
        .await;
    assert_eq!(lives, -1, "its mark is there for ever");
}

#[cfg(feature = "postgres")]
#[tokio::test]
async fn nodes_share_an_encrypted_store_on_postgresql() {
    let server = support::postgres::Postgres::start(&[]);
    let builder = tower_idempotency::PostgresStore::builder().create_table(true);
    assert_two_nodes_share(builder.connect(&server.url()).await.unwrap()).await;
}

// ---- who reads the store

/// Notes what a store is asked for, in plain or in secret.
#[derive(Clone)]
struct Noting<S> {
    store: S,
    noted: Arc<Mutex<Vec<Vec<u8>>>>,
    calls: Arc<AtomicUsize>,
}

impl<S> Noting<S> {
    fn new(store: S) -> Self {
        let (noted, calls) = Default::default();
        Self { store, noted, calls }
    }

    /// The ids and the digests that were seen, each once.
    fn noted(&self) -> HashSet<Vec<u8>> {
        self.noted.lock().unwrap().iter().cloned().collect()
    }

    fn call(&self) -> &S {
        self.calls.fetch_add(1, SeqCst);
        &self.store
    }
}

impl<S: Store> Store for Noting<S> {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let digest = claim.fingerprint.digest().to_vec();
        self.noted.lock().unwrap().extend([id.as_bytes().to_vec(), digest]);
        self.call().begin(id, claim).await
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.call().complete(lease, response, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.call().renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.call().release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.call().abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.store.changed(id).await;
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Of a request and its replay: whether the file has the answer's body, its content type, and the plain hashes of key and
/// request.
#[cfg(feature = "file")]
async fn found_in_a_file(encrypted: bool) -> Vec<bool> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let file = tower_idempotency::FileStore::open(&path).await.unwrap();
    let store = match encrypted {
        true => AnyStore::new(opened(file.clone()).await),
        false => AnyStore::new(file.clone()),
    };
    let plain = Noting::new(store);
    let control = open();
    let app = pay(&control, IdempotencyLayer::new(plain.clone()));
    let first = call(&app, keyed("the-clients-key", "the card is 4242")).await;
    let again = call(&app, keyed("the-clients-key", "the card is 4242")).await;
    assert_eq!((first.status, control.runs()), (StatusCode::CREATED, 1));
    assert!(again.is_replay() && again.body == first.body && contains(&first.body, b"the card is 4242"));
    drop(app);
    file.close().await;
    let bytes = std::fs::read(&path).unwrap();
    for secret in [b"the-clients-key", &[LOOK_UP_SECRET; 32][..], &[0xd1; 32]] {
        assert!(!contains(&bytes, secret), "{secret:?}");
    }
    let hashes = plain.noted();
    assert_eq!(hashes.len(), 2, "an id and a fingerprint");
    let texts = ["the card is 4242", "text/plain"].map(|text| text.as_bytes().to_vec());
    texts.iter().chain(&hashes).map(|part| contains(&bytes, part)).collect()
}

#[cfg(feature = "file")]
#[tokio::test]
async fn a_file_has_neither_the_answer_nor_the_hashes_of_key_and_body() {
    // What is looked for would be found.
    assert_eq!(found_in_a_file(false).await, [true; 4]);
    assert_eq!(found_in_a_file(true).await, [false; 4]);
}

#[tokio::test]
async fn what_a_store_is_asked_for_is_in_secret_and_no_call_more() {
    let (inside, outside) = (Noting::new(MemoryStore::new()), Noting::new(MemoryStore::new()));
    let store = opened(inside.clone()).await;
    assert_eq!(
        inside.calls.swap(0, SeqCst),
        2,
        "it is opened by a claim and its completion"
    );
    opened(inside.clone()).await;
    assert_eq!(inside.calls.swap(0, SeqCst), 1, "and again by a look");
    let control = open();
    let encrypted = pay(&control, IdempotencyLayer::new(store));
    let plain = pay(&control, IdempotencyLayer::new(outside.clone()));
    for body in ["a", "a", "b"] {
        call(&encrypted, keyed("k", body)).await;
        call(&plain, keyed("k", body)).await;
    }
    assert_eq!(control.runs(), 2, "each of them ran one");
    assert_eq!(inside.calls.load(SeqCst), outside.calls.load(SeqCst));
    let (secret, plain) = (inside.noted(), outside.noted());
    assert_eq!(
        (secret.len(), plain.len()),
        (2 + 3, 3),
        "the store's own mark and its check aside"
    );
    assert!(secret.is_disjoint(&plain));
}

#[tokio::test]
async fn no_debug_and_no_error_shows_a_secret() {
    let memory = MemoryStore::new();
    let store = opened_with(memory.clone(), ring().opening(7, &key(0xd7))).await;
    let debug = format!("{store:?}");
    assert!(debug.contains("sealing: 1, opening: [7]"), "{debug}");
    let error = opened_by(memory, 2).await.unwrap_err();
    for shown in [debug, format!("{error:?} {error}")] {
        for secret in ["c1c1", "d1d1", "d7d7", "193, 193", "209, 209", "215, 215"] {
            assert!(!shown.to_lowercase().contains(secret), "{shown}");
        }
    }
}

// ---- who writes to the store

/// A memory store whose answers are changed by somebody on the way back, as if they had been changed in it.
#[derive(Clone, Default)]
struct Tampered {
    memory: MemoryStore,
    /// The answer that is given in place of the stored one.
    exchanged: Arc<Mutex<Option<StoredResponse>>>,
    given: Arc<Mutex<Option<StoredResponse>>>,
}

impl Store for Tampered {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let begin = self.memory.begin(id, claim).await?;
        let Begin::Completed {
            fingerprint,
            response,
            remaining,
        } = begin
        else {
            return Ok(begin);
        };
        *self.given.lock().unwrap() = Some(response.clone());
        let response = self.exchanged.lock().unwrap().clone().unwrap_or(response);
        Ok(Begin::Completed {
            fingerprint,
            response,
            remaining,
        })
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        self.memory.complete(lease, response, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.memory.renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.memory.release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.memory.abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.memory.changed(id).await;
    }
}

#[track_caller]
fn assert_unreadable(answer: &Answer) {
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(contains(&answer.body, b"#record-unreadable"), "{:?}", answer.body);
}

#[tokio::test]
async fn the_answer_of_another_record_is_refused_and_never_given() {
    let tampered = Tampered::default();
    let control = open();
    let app = node(tampered.clone(), ring(), &control).await;
    for (key, body) in [("of-alice", "alice's"), ("of-bob", "bob's")] {
        call(&app, keyed(key, body)).await;
        assert!(call(&app, keyed(key, body)).await.is_replay());
    }
    let of_bob = tampered.given.lock().unwrap().clone().unwrap();
    *tampered.exchanged.lock().unwrap() = Some(of_bob);
    // In its own place it is still an answer.
    assert!(call(&app, keyed("of-bob", "bob's")).await.is_replay());
    let refused = call(&app, keyed("of-alice", "alice's")).await;
    assert_unreadable(&refused);
    assert!(!contains(&refused.body, b"bob"));
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn a_changed_answer_is_refused_and_runs_nothing() {
    let tampered = Tampered::default();
    let control = open();
    let app = node(tampered.clone(), ring(), &control).await;
    call(&app, keyed("k", "a")).await;
    assert!(call(&app, keyed("k", "a")).await.is_replay());
    let stored = tampered.given.lock().unwrap().clone().unwrap();
    // Not its head, which a store reads itself.
    for byte in 20..stored.len() {
        let mut bytes = stored.as_bytes().to_vec();
        bytes[byte] ^= 1;
        *tampered.exchanged.lock().unwrap() = StoredResponse::from_bytes(bytes.into()).ok();
        let refused = call(&app, keyed("k", "a")).await;
        assert_unreadable(&refused);
    }
    // Nor is one that was never sealed.
    for unsealed in [StoredResponse::not_kept(StatusCode::CREATED), plain_answer()] {
        *tampered.exchanged.lock().unwrap() = Some(unsealed);
        assert_unreadable(&call(&app, keyed("k", "a")).await);
    }
    assert_eq!(control.runs(), 1);
}

/// An answer without fields whose body is `forged`.
fn plain_answer() -> StoredResponse {
    let mut bytes = vec![1, 0, 201, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0];
    bytes.extend_from_slice(b"forged");
    StoredResponse::from_bytes(bytes.into()).unwrap()
}

// ---- the keys of answers are rotated

#[tokio::test]
async fn a_rotation_in_stages_replays_everything_and_runs_nothing_twice() {
    let memory = MemoryStore::new();
    let control = open();
    let (old, new) = (key(1), key(2));
    let before = node(memory.clone(), KeyRing::sealing(1, &old), &control).await;
    let added = node(memory.clone(), KeyRing::sealing(1, &old).opening(2, &new), &control).await;
    let turned = node(memory.clone(), KeyRing::sealing(2, &new).opening(1, &old), &control).await;
    let dropped = node(memory.clone(), KeyRing::sealing(2, &new), &control).await;
    let mut answers = Vec::new();
    // Nodes of two neighbouring stages work side by side, and each replays what the other sealed.
    for (stage, [one, other]) in [[&before, &added], [&added, &turned], [&turned, &dropped]]
        .into_iter()
        .enumerate()
    {
        for (name, first, second) in [("a", one, other), ("b", other, one)] {
            let key = format!("{stage}-{name}");
            let answer = call(first, keyed(&key, "pay")).await;
            let replay = call(second, keyed(&key, "pay")).await;
            assert!(
                replay.is_replay() && replay.body == answer.body,
                "stage {stage}, {name}"
            );
            answers.push((key, answer));
        }
    }
    for (key, answer) in &answers {
        let replay = call(&turned, keyed(key, "pay")).await;
        assert!(replay.is_replay() && replay.body == answer.body, "{key}");
    }
    assert_eq!(control.runs(), answers.len());
}

#[tokio::test]
async fn an_answer_whose_key_was_dropped_or_is_not_there_yet_is_refused_and_runs_nothing() {
    let memory = MemoryStore::new();
    let control = open();
    let old = node(memory.clone(), KeyRing::sealing(1, &key(1)), &control).await;
    let new = node(memory.clone(), KeyRing::sealing(2, &key(2)), &control).await;
    call(&old, keyed("k", "a")).await;
    call(&new, keyed("l", "a")).await;
    assert_unreadable(&call(&new, keyed("k", "a")).await);
    assert_unreadable(&call(&old, keyed("l", "a")).await);
    // Another key under its id is not its key.
    let exchanged = node(memory.clone(), KeyRing::sealing(1, &key(9)), &control).await;
    assert_unreadable(&call(&exchanged, keyed("k", "a")).await);
    // With its key it is what it was.
    assert!(call(&old, keyed("k", "a")).await.is_replay());
    // Another request under that key does not run either.
    assert_unreadable(&call(&new, keyed("k", "b")).await);
    assert_eq!(control.runs(), 2);
}

#[tokio::test]
async fn the_log_says_which_key_an_answer_was_sealed_with_and_shows_none() {
    let memory = MemoryStore::new();
    let control = open();
    let (log, _guard) = Log::start();
    let old = node(memory.clone(), KeyRing::sealing(17, &key(0xab)), &control).await;
    let new = node(memory.clone(), KeyRing::sealing(18, &key(0xcd)), &control).await;
    call(&old, keyed("the-clients-key", "a")).await;
    assert_unreadable(&call(&new, keyed("the-clients-key", "a")).await);
    let line = log.lines("ERROR").remove(0);
    assert!(
        line.contains("sealed with key 17, which is not in the key ring"),
        "{line}"
    );
    for secret in ["abab", "cdcd", "c1c1", "the-clients-key"] {
        assert!(log.lines(secret).is_empty(), "{}", log.text());
    }
}

// ---- one look-up secret

#[tokio::test(start_paused = true)]
async fn a_node_with_another_look_up_secret_does_not_open_the_store() {
    let memory = MemoryStore::new();
    let _one = opened_by(memory.clone(), 1).await.unwrap();
    let error = opened_by(memory.clone(), 2).await.unwrap_err();
    assert_eq!(error.kind(), EncryptedErrorKind::AnotherLookUpSecret);
    assert!(
        error.to_string().contains("in use with another look-up secret"),
        "{error}"
    );
    // However long it waits, and whoever is there.
    advance(Duration::from_secs(100 * 365 * 24 * 3600)).await;
    let error = opened_by(memory.clone(), 2).await.unwrap_err();
    assert_eq!(error.kind(), EncryptedErrorKind::AnotherLookUpSecret);
    opened_by(memory.clone(), 1).await.unwrap();
    assert_eq!(memory.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_nodes_that_open_a_store_at_once_all_with_one_look_up_secret_do() {
    for round in 0..20 {
        // So that many come while one is at it.
        let store = Slow::taking(Duration::ZERO, Duration::from_millis(1));
        let nodes = (0..16).map(|node| tokio::spawn(opened_by(store.clone(), (node + round) % 2)));
        let nodes: Vec<_> = join_all(nodes).await.into_iter().map(Result::unwrap).collect();
        let opened: Vec<_> = nodes.iter().map(Result::is_ok).collect();
        let [even, odd] = [0, 1].map(|from| opened.iter().skip(from).step_by(2).copied().collect::<Vec<_>>());
        assert!(
            (even == [true; 8] && odd == [false; 8]) || (even == [false; 8] && odd == [true; 8]),
            "{opened:?}"
        );
        for refused in nodes.into_iter().filter_map(Result::err) {
            assert_eq!(refused.kind(), EncryptedErrorKind::AnotherLookUpSecret);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_crash_while_a_store_is_opened_locks_out_nobody() {
    for later in [1, 2] {
        let store = FaultyStore::default();
        store.fail(Op::Complete, [Fault::BlackHole]);
        let crashed = tokio::spawn(opened_by(store.clone(), 1));
        while store.calls(Op::Complete) == 0 {
            tokio::task::yield_now().await;
        }
        crashed.abort();
        assert!(crashed.await.unwrap_err().is_cancelled());
        let start = tokio::time::Instant::now();
        opened_by(store.clone(), later).await.unwrap();
        assert!(start.elapsed() <= Duration::from_secs(11), "{:?}", start.elapsed());
        // From then on it is settled.
        let other = opened_by(store.clone(), 3 - later).await.unwrap_err();
        assert_eq!(other.kind(), EncryptedErrorKind::AnotherLookUpSecret);
    }
}

/// A store whose answers take their time.
#[derive(Clone)]
struct Slow {
    memory: MemoryStore,
    claim: Duration,
    completion: Duration,
}

impl Slow {
    fn taking(claim: Duration, completion: Duration) -> Self {
        Self {
            memory: MemoryStore::new(),
            claim,
            completion,
        }
    }
}

impl Store for Slow {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        let begin = self.memory.begin(id, claim).await;
        tokio::time::sleep(self.claim).await;
        begin
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        tokio::time::sleep(self.completion).await;
        self.memory.complete(lease, response, retention).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        self.memory.renew(lease, length).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        self.memory.release(lease).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        self.memory.abandon(lease).await
    }

    async fn changed(&self, id: &RecordId) {
        self.memory.changed(id).await;
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_opens_a_store_too_slowly_finds_what_others_made_of_it() {
    for (later, expected) in [(1, None), (2, Some(EncryptedErrorKind::AnotherLookUpSecret))] {
        let slow = Slow::taking(SECOND * 9, SECOND * 9);
        let first = tokio::spawn(opened_by(slow.clone(), 1));
        tokio::time::sleep(SECOND).await;
        // It waits for the lease to end, takes over, and is done long before.
        opened_by(slow.memory.clone(), later).await.unwrap();
        assert!(!first.is_finished());
        let found = first.await.unwrap().err().map(|error| error.kind());
        assert_eq!(found, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_another_opening_is_called_when_it_is_done() {
    let slow = Slow::taking(Duration::ZERO, SECOND * 5);
    let start = tokio::time::Instant::now();
    let first = tokio::spawn(opened_by(slow.clone(), 1));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let others = [1, 2].map(|secret| opened_by(slow.memory.clone(), secret));
    let [same, other] = <[_; 2]>::try_from(join_all(others).await).ok().unwrap();
    // In paused time: by the call, and not at the next look.
    assert_eq!(start.elapsed(), SECOND * 5);
    assert!(same.is_ok() && first.await.unwrap().is_ok());
    assert_eq!(other.unwrap_err().kind(), EncryptedErrorKind::AnotherLookUpSecret);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_is_not_opened_and_opens_when_it_is_back() {
    for op in [Op::Begin, Op::Complete] {
        for fault in [Fault::Error(StoreErrorKind::Unavailable), Fault::AnswerLost] {
            let store = FaultyStore::default();
            store.fail(op, [fault]);
            let error = opened_by(store.clone(), 1).await.unwrap_err();
            assert_eq!(error.kind(), EncryptedErrorKind::Failed);
            assert!(
                error.to_string().contains("the idempotency store is unavailable"),
                "{error}"
            );
            let source = std::error::Error::source(&error).unwrap().downcast_ref::<StoreError>();
            assert!(source.unwrap().is_retryable());
            opened_by(store, 1).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_damaged_mark_opens_for_nobody() {
    let store = FaultyStore::default();
    opened(store.clone()).await;
    store.fail(Op::Begin, [Fault::Error(StoreErrorKind::Corrupt)]);
    let error = opened_by(store.clone(), LOOK_UP_SECRET).await.unwrap_err();
    assert_eq!(error.kind(), EncryptedErrorKind::Failed);
    assert!(error.to_string().contains("corrupt"), "{error}");
}

#[tokio::test]
async fn a_mark_of_a_newer_version_is_an_error_of_its_own() {
    let memory = MemoryStore::new();
    let id = RecordId::from_bytes(*b"tower-idempotency/look-up-secret");
    let newer = Claim::new(
        Fingerprint::new(2, [0; 32]),
        Owner::random().unwrap(),
        SECOND,
        SECOND.into(),
    );
    let Ok(Begin::Acquired(lease)) = memory.begin(&id, &newer).await else {
        panic!("it was vacant");
    };
    let fact = StoredResponse::not_kept(StatusCode::OK);
    memory.complete(&lease, &fact, Retention::Forever).await.unwrap();
    let error = opened_by(memory, 1).await.unwrap_err();
    assert_eq!(error.kind(), EncryptedErrorKind::NewerVersion);
}

#[tokio::test]
async fn a_store_without_room_for_the_mark_is_not_opened_and_a_full_one_keeps_it() {
    let none = MemoryStore::builder().max_records(0).build();
    let error = opened_by(none, 1).await.unwrap_err();
    assert!(error.to_string().contains("full"), "{error}");
    let two = MemoryStore::builder().max_records(2).build();
    let store = opened_by(two.clone(), 1).await.unwrap();
    let ids = [1, 2].map(|byte| RecordId::from_bytes([byte; 32]));
    assert!(matches!(store.begin(&ids[0], &claim()).await, Ok(Begin::Acquired(_))));
    assert_eq!(
        store.begin(&ids[1], &claim()).await.unwrap_err().kind(),
        StoreErrorKind::Full
    );
    assert!(opened_by(two, 2).await.is_err());
}

#[cfg(feature = "file")]
#[tokio::test]
async fn a_file_knows_its_look_up_secret_when_it_is_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    for (secret, opens) in [(1, true), (2, false), (1, true)] {
        let file = tower_idempotency::FileStore::open(&path).await.unwrap();
        assert_eq!(opened_by(file.clone(), secret).await.is_ok(), opens, "{secret}");
        file.close().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_answer_is_not_opened_and_opens_when_it_does() {
    for op in [Op::Begin, Op::Complete] {
        for silence in [Fault::BlackHole, Fault::AppliedBlackHole] {
            let store = FaultyStore::default();
            store.fail(op, [silence]);
            let start = tokio::time::Instant::now();
            let error = opened_by(store.clone(), 1).await.unwrap_err();
            assert_eq!(error.kind(), EncryptedErrorKind::Failed);
            assert!(start.elapsed() <= SECOND * 11, "{:?}", start.elapsed());
            opened_by(store.clone(), 1).await.unwrap();
            assert!(opened_by(store, 2).await.is_err());
        }
    }
}

// ---- what layers do with it

#[tokio::test]
async fn several_keys_of_one_request_are_found_in_secret() {
    let control = open();
    let store = opened(MemoryStore::new()).await;
    let layer = IdempotencyLayer::new(store).key(KeySource::body("/id").and_each("/units/*/id"));
    let app = pay(&control, layer);
    let order = |body: &'static str| Request::post("/pay").body(Body::from(body)).unwrap();
    let first = call(&app, order(r#"{"id":"a","units":[{"id":"u"}]}"#)).await;
    let replay = call(&app, order(r#"{"id":"a","units":[{"id":"u"}]}"#)).await;
    assert!(replay.is_replay() && replay.body == first.body);
    let held = call(&app, order(r#"{"id":"b","units":[{"id":"v"},{"id":"u"}]}"#)).await;
    assert_eq!(held.problem(), "idempotency-key-reused");
    // The refused one took nothing.
    let other = call(&app, order(r#"{"id":"c","units":[{"id":"v"}]}"#)).await;
    assert_eq!((other.status, control.runs()), (StatusCode::CREATED, 2));
}

#[tokio::test]
async fn an_answer_that_does_not_fit_into_the_store_is_known_to_have_been_given() {
    let control = open();
    let memory = MemoryStore::builder().max_bytes(2500).build();
    let layer = IdempotencyLayer::new(opened(memory).await);
    let app = answering(&control, layer, |_, _, _| {
        (StatusCode::ACCEPTED, "x".repeat(2000)).into_response()
    });
    assert_eq!(call(&app, keyed("k", "a")).await.body.len(), 2000);
    let again = call(&app, keyed("k", "a")).await;
    assert_eq!(again.problem(), "response-not-kept");
    // Its status is not readable in the store, and is told here.
    assert!(contains(&again.body, b"202"), "{:?}", again.body);
    assert_eq!(control.runs(), 1);
}

#[tokio::test]
async fn an_attempt_that_was_lost_before_a_rotation_is_taken_over_after_it() {
    let memory = MemoryStore::new();
    let control = open();
    let layer = |store| IdempotencyLayer::new(store).guarantee(Guarantee::AtLeastOnce);
    let app = |store| {
        answering(&control, layer(store), |run, attempt, _| {
            assert!(run > 1, "the first run panics");
            format!("run {run} attempt {attempt}").into_response()
        })
    };
    let before = app(opened_with(memory.clone(), KeyRing::sealing(1, &key(1))).await);
    let after = app(opened_with(memory, KeyRing::sealing(2, &key(2)).opening(1, &key(1))).await);
    assert!(spawn(&before, keyed("k", "a")).await.unwrap_err().is_panic());
    assert_eq!(call(&after, keyed("k", "b")).await.problem(), "idempotency-key-reused");
    assert_eq!(call(&after, keyed("k", "a")).await.body, "run 2 attempt 2");
    assert!(call(&after, keyed("k", "a")).await.is_replay());
}

#[tokio::test]
#[should_panic(expected = "needs a store that has transactions")]
async fn no_handler_runs_in_a_transaction_of_an_encrypted_store() {
    let _ = IdempotencyLayer::new(opened(MemoryStore::new()).await).guarantee(Guarantee::Transactional);
}
