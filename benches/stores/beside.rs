//! A store's step beside its floor, on a server.
//!
//! Each figure is the median of ratios, each within one round of floor and store by turns: neighbours on the machine
//! disturb both. CPU is the server's own, and this process's.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use cpu_time::ProcessTime;

/// Of floor and store by turns.
const ROUNDS: u32 = 12;

#[derive(Clone, Copy)]
struct Figures {
    rate: f64,
    latency: f64,
    server_cpu: f64,
    client_cpu: f64,
}

/// So many at once, for this long.
async fn measure_one<F: Future<Output = ()> + Send>(
    server_cpu: &impl AsyncFn() -> f64,
    at_once: usize,
    time: Duration,
    step: impl Fn() -> F + Clone + Send + 'static,
) -> Figures {
    let server = server_cpu().await;
    let (start, client) = (Instant::now(), ProcessTime::now());
    let tasks: Vec<_> = (0..at_once)
        .map(|_| {
            let step = step.clone();
            tokio::spawn(async move {
                let mut took = Vec::new();
                while start.elapsed() < time {
                    let start = Instant::now();
                    step().await;
                    took.push(start.elapsed());
                }
                took
            })
        })
        .collect();
    let mut took = Vec::new();
    for task in tasks {
        took.extend(task.await.unwrap());
    }
    let (elapsed, client) = (start.elapsed(), client.elapsed());
    let server = server_cpu().await - server;
    took.sort();
    let count = took.len() as f64;
    Figures {
        rate: count / elapsed.as_secs_f64(),
        latency: took[took.len() / 2].as_secs_f64(),
        server_cpu: server / count,
        client_cpu: client.as_secs_f64() / count,
    }
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Measures steps beside their floors.
pub struct Beside<C> {
    /// Seconds that the server has used up so far.
    pub server_cpu: C,
    /// For each figure.
    pub time: Duration,
}

impl<C: AsyncFn() -> f64> Beside<C> {
    pub fn heading() {
        println!("step                      at once    steps/s        p50     rate  latency  srv CPU  own CPU");
    }

    /// A store's step beside its floor.
    pub async fn beside<F, S>(
        &self,
        name: &str,
        at_once: usize,
        floor: impl Fn() -> F + Clone + Send + 'static,
        step: impl Fn() -> S + Clone + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
        S: Future<Output = ()> + Send + 'static,
    {
        let slice = self.time / ROUNDS;
        let mut rounds = Vec::new();
        for round in 0..ROUNDS {
            // Who comes first takes turns, too.
            let cpu = &self.server_cpu;
            rounds.push(if round % 2 == 0 {
                let floor = measure_one(cpu, at_once, slice, floor.clone()).await;
                (floor, measure_one(cpu, at_once, slice, step.clone()).await)
            } else {
                let step = measure_one(cpu, at_once, slice, step.clone()).await;
                (measure_one(cpu, at_once, slice, floor.clone()).await, step)
            });
        }
        let ratio = |of: fn(&Figures) -> f64| median(rounds.iter().map(|(floor, step)| of(step) / of(floor)).collect());
        let rate = median(rounds.iter().map(|(_, step)| step.rate).collect());
        let latency = median(rounds.iter().map(|(_, step)| step.latency).collect());
        println!(
            "{name:28} {at_once:4} {rate:9.0} {:>10} {:8.2} {:8.2} {:8.2} {:8.2}",
            format!("{:.1?}", Duration::from_secs_f64(latency)),
            ratio(|figures| figures.rate),
            ratio(|figures| figures.latency),
            ratio(|figures| figures.server_cpu),
            ratio(|figures| figures.client_cpu),
        );
    }
}
