//! Random clients, handlers and store faults, against what the contract says whatever happens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, response::IntoResponse, routing::post};
use http::StatusCode;
use support::{
    app::{call, keyed},
    dice::Dice,
    faulty::{Fault, FaultyStore, Op},
    http::Answer,
};
use tokio::time::{sleep, timeout};
use tower_idempotency::{Concurrent, Guarantee, IdempotencyLayer, StoreErrorKind};

fn fault(dice: &mut Dice, op: Op) -> Fault {
    match dice.below(7) {
        0 => Fault::Error(StoreErrorKind::Unavailable),
        1 => Fault::AnswerLost,
        2 => Fault::BlackHole,
        3 => Fault::AppliedBlackHole,
        4 if matches!(op, Op::Begin | Op::Complete) => Fault::Error(StoreErrorKind::Full),
        _ => Fault::Pass,
    }
}

/// What one run of the handler does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Run {
    Creates,
    SaysNotExecuted,
    Panics,
}

async fn round(seed: u64, guarantee: Guarantee) {
    let mut dice = Dice::of(seed);
    let store = FaultyStore::default();
    let concurrent = match dice.below(2) {
        0 => Concurrent::Refuse,
        _ => Concurrent::Wait(Duration::from_millis(1 + dice.below(5_000))),
    };
    let layer = IdempotencyLayer::new(store.clone())
        .guarantee(guarantee)
        .on_concurrent(concurrent)
        .max_waiters(3);
    for op in [Op::Begin, Op::Complete, Op::Release, Op::Abandon, Op::Renew] {
        let mut faults: Vec<_> = (0..dice.below(4)).map(|_| fault(&mut dice, op)).collect();
        // There is always room for the fact that an answer is not kept.
        let full = |fault: &Fault| matches!(fault, Fault::Error(StoreErrorKind::Full));
        faults.dedup_by(|fault, before| full(fault) && full(before));
        store.fail(op, faults);
    }
    if dice.below(4) == 0 {
        store.deafen();
    }
    let plan: Vec<_> = (0..32)
        .map(|_| {
            let run = match dice.below(6) {
                0 | 1 => Run::SaysNotExecuted,
                2 => Run::Panics,
                _ => Run::Creates,
            };
            (run, dice.below(4) * dice.below(30_000))
        })
        .collect();
    let counts: [Arc<AtomicUsize>; 5] = Default::default();
    let handler = {
        let [created, panicked, running, most, number] = counts.clone();
        async move || {
            let number = number.fetch_add(1, SeqCst);
            let (run, takes) = plan[number % plan.len()];
            most.fetch_max(running.fetch_add(1, SeqCst) + 1, SeqCst);
            sleep(Duration::from_millis(takes)).await;
            running.fetch_sub(1, SeqCst);
            match run {
                Run::Creates => created.fetch_add(1, SeqCst),
                Run::Panics => panicked.fetch_add(1, SeqCst),
                Run::SaysNotExecuted => 0,
            };
            match run {
                Run::Creates => (StatusCode::CREATED, format!("run {number}")).into_response(),
                Run::SaysNotExecuted => StatusCode::SERVICE_UNAVAILABLE.into_response(),
                Run::Panics => panic!("run {number} panics"),
            }
        }
    };
    let app = Router::new().route("/pay", post(handler)).layer(layer.clone());
    let mut clients = Vec::new();
    for _ in 0..8 {
        let (app, comes, stays) = (
            app.clone(),
            dice.below(3) * dice.below(40_000),
            1 + dice.below(3) * dice.below(20_000),
        );
        let patient = dice.below(2) == 0;
        clients.push(tokio::spawn(async move {
            sleep(Duration::from_millis(comes)).await;
            let call = call(&app, keyed("k", "a"));
            match patient {
                true => Some(call.await),
                false => timeout(Duration::from_millis(stays), call).await.ok(),
            }
        }));
    }
    let mut answers: Vec<Answer> = Vec::new();
    for client in clients {
        // A panic of the handler goes on to its client.
        answers.extend(client.await.ok().flatten());
    }
    layer.drain().finished().await;
    let [created, panicked, _, most, number] = counts;
    let before = created.load(SeqCst) + panicked.load(SeqCst);
    // Whatever was left in progress is over by now.
    sleep(Duration::from_secs(300)).await;
    let last = support::app::spawn(&app, keyed("k", "a")).await;
    layer.drain().finished().await;
    let (created, panicked) = (created.load(SeqCst), panicked.load(SeqCst));
    let told = format!(
        "seed {seed}, {guarantee:?}: {} runs, {created} created, {panicked} panicked, last {last:?}",
        number.load(SeqCst)
    );
    let created_answers = answers.iter().filter(|answer| answer.status == StatusCode::CREATED);
    let first: Vec<_> = created_answers.collect();
    assert!(most.load(SeqCst) <= 1, "two handlers at once; {told}");
    assert!(created <= 1, "{told}");
    assert!(first.windows(2).all(|two| two[0].body == two[1].body), "{told}");
    assert!(first.iter().filter(|answer| !answer.is_replay()).count() <= 1, "{told}");
    if guarantee == Guarantee::AtMostOnce {
        assert!(created + panicked <= 1, "{told}");
    }
    // A panic goes on to the client.
    let Ok(last) = last else { return };
    if let Some(first) = first.last() {
        let kept = last.status == StatusCode::CREATED && last.is_replay() && last.body == first.body;
        // A store that is full keeps the fact only, and a fault may be left for the last request.
        let said = last.status == StatusCode::CONFLICT && last.problem() == "response-not-kept";
        assert!(kept || said || last.status == StatusCode::SERVICE_UNAVAILABLE, "{told}");
    } else if last.status == StatusCode::CONFLICT {
        assert_ne!(last.problem(), "request-in-progress", "{told}");
        assert!(before > 0, "nothing had an effect, and the key is used up; {told}");
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_one_run_creates_and_everybody_is_told_the_same() {
    std::panic::set_hook(Box::new(|_| ()));
    let rounds = std::env::var("ROUNDS").map_or(500, |rounds| rounds.parse().unwrap());
    for seed in 0..rounds {
        let guarantee = [Guarantee::AtMostOnce, Guarantee::AtLeastOnce][seed as usize % 2];
        let result = tokio::spawn(round(seed, guarantee)).await;
        if let Err(error) = result {
            let panic = error.into_panic();
            let _ = std::panic::take_hook();
            match panic.downcast_ref::<String>() {
                Some(text) => panic!("seed {seed}: {text}"),
                None => panic!("seed {seed}"),
            }
        }
    }
}
