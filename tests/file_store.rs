//! The file store: the contract, and what it promises beside it.
#![cfg(all(feature = "file", feature = "testing"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{path::PathBuf, time::Duration};

use tempfile::TempDir;
use tokio::{sync::Mutex, time::advance};
use tower_idempotency::{
    AnyStore, FileStore,
    testing::{self, Subject},
};

/// One file, on paused time.
struct OneFile {
    store: FileStore,
}

impl Subject for OneFile {
    type Store = FileStore;

    async fn store(&self) -> FileStore {
        self.store.clone()
    }

    async fn pass(&self, time: Duration) {
        advance(time).await;
    }
}

/// A file that is closed and opened again between any two checks.
struct Reopened {
    path: PathBuf,
    open: Mutex<Option<FileStore>>,
}

impl Subject for Reopened {
    type Store = AnyStore;

    async fn store(&self) -> AnyStore {
        let mut open = self.open.lock().await;
        if let Some(before) = open.take() {
            before.close().await;
        }
        let store = FileStore::open(&self.path).await.unwrap();
        *open = Some(store.clone());
        AnyStore::new(store)
    }

    async fn pass(&self, time: Duration) {
        advance(time).await;
    }
}

fn directory() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    (directory, path)
}

#[tokio::test(start_paused = true)]
async fn the_file_store_keeps_the_contract() {
    let (_directory, path) = directory();
    let store = FileStore::open(path).await.unwrap();
    let report = testing::check(&OneFile { store }).await;
    report.assert();
    assert!(report.checks() >= 35, "only {} sentences were checked", report.checks());
}

#[tokio::test(start_paused = true)]
async fn the_file_store_keeps_the_contract_in_a_file_that_was_opened_again() {
    let (_directory, path) = directory();
    let open = Mutex::default();
    testing::check(&Reopened { path, open }).await.assert();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_file_store_keeps_the_contract_among_threads() {
    let (_directory, path) = directory();
    let store = FileStore::open(path).await.unwrap();
    testing::check_races(&OneFile { store }).await.assert();
}
