//! What needs no server.
#![allow(clippy::unwrap_used)]

use std::{future::Future, pin::pin, sync::Arc, task::Context, time::Duration};

use deadpool_postgres::{Manager, Pool};
use tokio::time::Instant;
use tokio_postgres::{Config, NoTls};

use super::{
    Inner, PostgresStore, PostgresTable, PostgresTransaction,
    connection::Connections,
    statements::Statements,
    waiters::{Waiters, Wake},
};
use crate::{record::RecordId, store::hints::Hints, transactional::Missing};

/// To a server that nobody has.
fn connections(timeout: Duration) -> Arc<Connections> {
    let manager = Manager::new(Config::new(), NoTls);
    let pool = Pool::builder(manager).max_size(3).build().unwrap();
    Arc::new(Connections::new(pool, false, timeout))
}

fn waiters() -> Arc<Waiters> {
    Waiters::new(connections(Duration::from_secs(1)), String::new())
}

fn store() -> PostgresStore {
    let connections = connections(Duration::from_secs(1));
    let table = PostgresTable::new("own", "records");
    PostgresStore::new(Arc::new(Inner {
        statements: Statements::new(&table),
        waiters: Waiters::new(Arc::clone(&connections), String::new()),
        hints: Arc::new(Hints::new()),
        connections,
        table,
        batch: super::purge::Batch::default(),
    }))
}

#[tokio::test(start_paused = true)]
async fn a_step_is_given_up_when_its_time_is_over_and_never_if_no_clock_counts_so_far() {
    let seven = connections(Duration::from_secs(7));
    assert_eq!(seven.deadline(), Instant::now() + Duration::from_secs(7));
    assert_eq!((seven.timeout(), seven.is_prepared()), (Duration::from_secs(7), false));
    let for_ever = connections(Duration::MAX);
    assert_eq!(for_ever.deadline(), Instant::now() + Duration::from_secs(31_536_000));
}

#[test]
fn a_store_says_its_table_and_its_connections_and_not_where_they_lead() {
    let said = format!("{:?}", store());
    assert!(
        said.starts_with("PostgresStore {") && said.contains("records"),
        "{said}"
    );
    assert!(said.contains("max_size: 3"), "{said}");
}

#[test]
fn a_request_outside_of_every_transaction_has_none() {
    let missing = PostgresTransaction::from_extensions(&http::Extensions::new()).err();
    assert_eq!(missing.map(|missing| missing.0), Some(Missing::None));
    #[cfg(feature = "sqlx")]
    {
        let missing = super::SqlxTransaction::from_extensions(&http::Extensions::new()).err();
        assert_eq!(missing.map(|missing| missing.0), Some(Missing::None));
    }
}

#[test]
fn a_release_wakes_one_listener_and_a_completion_all_and_none_is_left_behind() {
    let waiters = waiters();
    let (id, another) = (RecordId::from_bytes([1; 32]), RecordId::from_bytes([2; 32]));
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let mut listening = [(); 4].map(|()| Box::pin(waiters.changed(&id)));
    let mut elsewhere = pin!(waiters.changed(&another));
    assert!(listening.iter_mut().all(|one| one.as_mut().poll(&mut cx).is_pending()));
    assert!(elsewhere.as_mut().poll(&mut cx).is_pending());
    waiters.wake(&id, Wake::One);
    let mut woken = || listening.each_mut().map(|one| one.as_mut().poll(&mut cx).is_ready());
    assert_eq!(woken(), [true, false, false, false]);
    let [first, second, mut third, mut fourth] = listening;
    drop((first, second));
    waiters.wake(&id, Wake::All);
    assert!(third.as_mut().poll(&mut cx).is_ready() && fourth.as_mut().poll(&mut cx).is_ready());
    assert!(elsewhere.as_mut().poll(&mut cx).is_pending());
    drop((third, fourth));
    assert_eq!(
        waiters.records(),
        Some(vec![another]),
        "nothing is left of those who have heard"
    );
}

#[test]
fn while_nobody_listens_nothing_is_asked_for() {
    let waiters = waiters();
    assert_eq!(waiters.records(), None);
    let id = RecordId::from_bytes([1; 32]);
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let mut listening = Box::pin(waiters.changed(&id));
    assert!(listening.as_mut().poll(&mut cx).is_pending());
    assert_eq!(waiters.records(), Some(vec![id]));
    drop(listening);
    assert_eq!(waiters.records(), None);
}
