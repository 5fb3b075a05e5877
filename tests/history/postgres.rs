//! A PostgreSQL server that is killed, paused and cut off, behind a network that loses answers.

use std::time::Duration;

use tokio::time::sleep;
use tower_idempotency::{AnyStore, PostgresStore};

use super::{
    event::History,
    runner::{Arena, prove},
    store::Witness,
    support::{
        dice::Dice,
        postgres::{Postgres, url},
        proxy::{Proxy, Weather},
    },
};

struct Server {
    postgres: Postgres,
    proxy: Proxy,
}

impl Arena for Server {
    const NAME: &'static str = "postgres";
    const FAULTS: &'static [&'static str] = &[
        "server paused",
        "server killed",
        "network lost an answer",
        "network gone",
    ];

    async fn open(&mut self) -> AnyStore {
        self.postgres.say("DROP TABLE IF EXISTS idempotency_records").await;
        let store = PostgresStore::builder()
            .create_table(true)
            .purge_every(None)
            .timeout(Duration::from_millis(200));
        loop {
            // What was begun before may still be in its way, and a machine that is busy is no fault.
            match store.clone().connect(&url(self.proxy.port())).await {
                Ok(store) => return AnyStore::new(store),
                Err(error) => assert!(error.is_retryable(), "{error:?}"),
            }
        }
    }

    async fn strike(&mut self, dice: &mut Dice, witness: &Witness, _: &History) {
        let pause = Duration::from_millis(dice.below(3) * dice.below(300));
        match dice.below(10) {
            0 | 1 => {
                witness.struck.add("server paused");
                self.postgres.pause();
                sleep(pause).await;
                self.postgres.resume();
            }
            2 => {
                witness.struck.add("server killed");
                self.postgres.kill();
                sleep(pause / 2).await;
                self.postgres.restart();
            }
            3 => {
                witness.struck.add("network gone");
                self.proxy.black_hole();
            }
            _ => {
                for _ in 0..8 {
                    witness.struck.add("network lost an answer");
                    self.proxy.make(Weather::LoseAnswer);
                    sleep(pause / 16).await;
                }
                self.proxy.make(Weather::Clear);
            }
        }
    }

    async fn stock(&mut self) -> (u64, u64, u64) {
        let records: i64 = self.postgres.ask("SELECT count(*) FROM idempotency_records").await;
        let bytes: i64 = self
            .postgres
            .ask("SELECT pg_total_relation_size('idempotency_records')")
            .await;
        (records as u64, bytes as u64, 64 << 20)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_store_every_key_is_a_register_that_is_written_once() {
    let postgres = Postgres::start(&[]);
    let proxy = Proxy::before(postgres.port()).await;
    prove(Server { postgres, proxy }).await;
}
