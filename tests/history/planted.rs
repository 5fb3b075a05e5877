//! Bugs of the service, planted one at a time: the checker finds each.

use std::collections::BTreeMap;

use tower_idempotency::seeded::{BUGS, plant};

use super::{
    memory::Memory,
    runner::{Summary, round, seed},
};

/// Of one run.
const ROUNDS: u64 = 20;
const OPERATIONS: u64 = 600;

/// The number of the round in which a bug shows, if it does in one of twenty.
async fn caught(bug: &'static str, seed: u64) -> Option<(u64, String)> {
    plant(Some(bug));
    let (mut arena, mut summary) = (Memory::default(), Summary::default());
    for number in 0..ROUNDS {
        round(&mut arena, seed + number, OPERATIONS, &mut summary).await;
        if !summary.broken.is_empty() {
            return Some((number + 1, format!("{:?}", summary.broken)));
        }
    }
    None
}

/// `PLANTED_RUNS=20` runs each of them as often and wants 95 of 100 runs to catch it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_planted_bug_is_caught_within_twenty_rounds() {
    let runs: u64 = std::env::var("PLANTED_RUNS").map_or(1, |runs| runs.parse().expect("a number"));
    let seed = seed();
    println!("HISTORY_SEED={seed}");
    let mut missed = BTreeMap::new();
    for bug in BUGS {
        let mut catches = Vec::new();
        for run in 0..runs {
            catches.extend(caught(bug, seed + run * ROUNDS).await);
        }
        let latest = catches.iter().map(|(round, _)| round).max();
        let rules = catches.first().map(|(_, rules)| rules);
        println!(
            "{bug}: {} of {runs}, round {latest:?} at the latest, by {rules:?}",
            catches.len()
        );
        if (catches.len() as u64) * 100 < runs * 95 {
            missed.insert(bug, catches.len());
        }
    }
    plant(None);
    assert!(missed.is_empty(), "of {runs} runs, only so many caught: {missed:?}");
}
