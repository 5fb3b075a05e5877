//! A Redis server that is killed, paused and cut off, behind a network that loses answers.

use std::time::Duration;

use tokio::time::sleep;
use tower_idempotency::{AnyStore, RedisStore};

use super::{
    event::History,
    runner::{Arena, prove},
    store::Witness,
    support::{
        dice::Dice,
        proxy::{Proxy, Weather},
        redis::Redis,
    },
};

struct Server {
    redis: Redis,
    proxy: Proxy,
}

impl Arena for Server {
    const NAME: &'static str = "redis";
    const FAULTS: &'static [&'static str] = &[
        "server paused",
        "server killed",
        "network lost an answer",
        "network gone",
    ];

    async fn open(&mut self) -> AnyStore {
        self.redis.say(&["FLUSHALL"]).await;
        let store = RedisStore::builder().timeout(Duration::from_millis(110));
        AnyStore::new(store.connect(&self.proxy.url()).await.expect("it is up"))
    }

    async fn strike(&mut self, dice: &mut Dice, witness: &Witness, _: &History) {
        let pause = Duration::from_millis(dice.below(3) * dice.below(300));
        match dice.below(8) {
            0 | 1 => {
                witness.struck.add("server paused");
                self.redis.pause();
                sleep(pause).await;
                self.redis.resume();
            }
            2 => {
                witness.struck.add("server killed");
                self.redis.kill();
                sleep(pause / 2).await;
                self.redis.restart("Ready to accept connections");
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
        let records = self.redis.ask(&["DBSIZE"]).await;
        let memory: String = self.redis.ask(&["INFO", "memory"]).await;
        let used = memory.lines().find_map(|line| line.strip_prefix("used_memory:"));
        let bytes = used.and_then(|used| used.trim().parse().ok()).expect("a number");
        (records, bytes, 64 << 20)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_store_every_key_is_a_register_that_is_written_once() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::before(redis.port()).await;
    prove(Server { redis, proxy }).await;
}
