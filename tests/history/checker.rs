//! The checker, checked: a bad history for each rule, and good ones that pass.

use super::{
    event::{Event, Guarantee, Key, Reply},
    rules::{Rule, check},
};

const KEY: Key = key(1, Guarantee::AtMostOnce, 1);
const AGAIN: Key = key(1, Guarantee::AtLeastOnce, 1);

const fn key(tenant: u16, guarantee: Guarantee, number: u32) -> Key {
    Key {
        tenant,
        guarantee,
        number,
    }
}

fn invoke(op: u64, key: Key) -> Event {
    Event::Invoke {
        op,
        key,
        fingerprint: 0,
    }
}

fn other(op: u64, key: Key) -> Event {
    Event::Invoke {
        op,
        key,
        fingerprint: 1,
    }
}

fn began(run: u64, key: Key) -> Event {
    Event::Began {
        run,
        key,
        fingerprint: 0,
    }
}

fn effect(run: u64) -> Event {
    Event::Effect { run, digest: run }
}

fn first(op: u64, digest: u64) -> Event {
    let reply = Reply::Final {
        replayed: false,
        digest,
        tenant: 1,
    };
    Event::Return { op, reply }
}

fn replay(op: u64, digest: u64) -> Event {
    let reply = Reply::Final {
        replayed: true,
        digest,
        tenant: 1,
    };
    Event::Return { op, reply }
}

fn told(op: u64, reply: Reply) -> Event {
    Event::Return { op, reply }
}

/// A request that ran: its key, as request, run and digest 1.
fn paid(key: Key) -> Vec<Event> {
    vec![invoke(1, key), began(1, key), effect(1), first(1, 1)]
}

fn rules(events: &[Event]) -> Vec<Rule> {
    check(events).into_iter().map(|violation| violation.rule).collect()
}

fn after(mut events: Vec<Event>, more: &[Event]) -> Vec<Event> {
    events.extend_from_slice(more);
    events
}

#[track_caller]
fn assert_breaks(rule: Rule, events: &[Event]) {
    assert_eq!(rules(events), [rule], "{:?}", check(events));
}

#[test]
fn r1_two_effects_of_one_key_are_found() {
    let twice = [
        invoke(1, KEY),
        invoke(2, KEY),
        began(1, KEY),
        began(2, KEY),
        effect(1),
        effect(2),
    ];
    assert_breaks(Rule::R1, &twice);
    let twice = twice.map(|event| match event {
        Event::Invoke { op, .. } => invoke(op, AGAIN),
        Event::Began { run, .. } => began(run, AGAIN),
        other => other,
    });
    assert_breaks(Rule::R1, &twice);
}

#[test]
fn r2_an_answer_without_an_effect_or_before_it_is_found() {
    assert_breaks(Rule::R2, &[invoke(1, KEY), began(1, KEY), first(1, 1)]);
    assert_breaks(Rule::R2, &[invoke(1, KEY), began(1, KEY), first(1, 1), effect(1)]);
    let of_another_key = after(paid(KEY), &[invoke(2, key(1, Guarantee::AtMostOnce, 2)), first(2, 1)]);
    assert_breaks(Rule::R2, &of_another_key);
}

#[test]
fn r3_two_answers_of_one_key_are_found() {
    let events = [
        invoke(1, KEY),
        invoke(2, KEY),
        began(1, KEY),
        effect(1),
        first(1, 1),
        replay(2, 9),
    ];
    let broken = rules(&events);
    assert!(broken.contains(&Rule::R3), "{broken:?}");
}

#[test]
fn r4_two_first_answers_are_found() {
    let events = [
        invoke(1, KEY),
        invoke(2, KEY),
        began(1, KEY),
        effect(1),
        first(1, 1),
        first(2, 1),
    ];
    assert_breaks(Rule::R4, &events);
}

#[test]
fn r5_an_acknowledged_answer_that_is_gone_is_found() {
    for reply in [Reply::InProgress, Reply::NotExecuted, Reply::Other(500)] {
        let mut events = after(paid(KEY), &[invoke(2, KEY), invoke(3, KEY), told(2, reply)]);
        assert_breaks(Rule::R5, &events);
        events.push(replay(3, 1));
        assert_breaks(Rule::R5, &events);
    }
}

#[test]
fn r6_another_request_with_the_key_that_is_answered_or_runs_is_found() {
    assert_breaks(Rule::R6, &after(paid(KEY), &[other(2, KEY), replay(2, 1)]));
    let runs = [
        invoke(1, KEY),
        began(1, KEY),
        Event::OwnerLost { key: AGAIN },
        other(2, AGAIN),
        Event::Began {
            run: 2,
            key: AGAIN,
            fingerprint: 1,
        },
        invoke(3, AGAIN),
        began(3, AGAIN),
        effect(2),
        effect(3),
    ];
    assert_breaks(Rule::R6, &runs);
    let refused = after(
        paid(KEY),
        &[invoke(2, key(1, Guarantee::AtMostOnce, 2)), told(2, Reply::Reused)],
    );
    assert_breaks(Rule::R6, &refused);
}

#[test]
fn r7_an_answer_of_another_tenant_is_found() {
    let theirs = key(2, Guarantee::AtMostOnce, 1);
    let reply = Reply::Final {
        replayed: true,
        digest: 1,
        tenant: 1,
    };
    let events = after(paid(KEY), &[invoke(2, theirs), told(2, reply)]);
    let broken = rules(&events);
    assert!(
        broken.iter().all(|rule| *rule == Rule::R7) && !broken.is_empty(),
        "{broken:?}"
    );
}

#[test]
fn r8_an_effect_that_nobody_asked_for_is_found() {
    assert_breaks(Rule::R8, &[began(1, KEY)]);
    assert_breaks(Rule::R8, &[effect(1)]);
    assert_breaks(Rule::R8, &[other(1, KEY), began(1, KEY)]);
}

#[test]
fn r9_in_progress_without_a_rival_and_unknown_without_a_lost_owner_are_found() {
    assert_breaks(Rule::R9, &[invoke(1, KEY), told(1, Reply::InProgress)]);
    let one_after_the_other = [
        invoke(1, KEY),
        told(1, Reply::NotExecuted),
        invoke(2, KEY),
        told(2, Reply::InProgress),
    ];
    assert_breaks(Rule::R9, &one_after_the_other);
    let cut = [
        invoke(1, KEY),
        began(1, KEY),
        Event::Lost { op: 1 },
        invoke(2, KEY),
        told(2, Reply::Unknown),
    ];
    assert_breaks(Rule::R9, &cut);
}

#[test]
fn r10_a_probe_that_does_not_settle_is_found() {
    for reply in [Reply::Unavailable, Reply::NotExecuted, Reply::Other(500)] {
        assert_breaks(Rule::R10, &[Event::Quiet, invoke(1, KEY), told(1, reply)]);
    }
    assert_breaks(Rule::R10, &[Event::Quiet, invoke(1, KEY), Event::Lost { op: 1 }]);
    let stuck = [
        invoke(1, KEY),
        Event::OwnerLost { key: KEY },
        Event::Lost { op: 1 },
        Event::Quiet,
        invoke(2, KEY),
        told(2, Reply::InProgress),
    ];
    assert_breaks(Rule::R10, &stuck);
}

#[test]
fn r11_a_run_after_an_unknown_outcome_is_found() {
    let lost = [
        invoke(1, KEY),
        began(1, KEY),
        Event::OwnerLost { key: KEY },
        Event::Lost { op: 1 },
    ];
    let again = [
        invoke(2, KEY),
        told(2, Reply::Unknown),
        invoke(3, KEY),
        began(3, KEY),
        effect(3),
    ];
    assert_breaks(Rule::R11, &after(lost.to_vec(), &again));
}

#[test]
fn r12_an_answer_that_is_gone_after_a_crash_is_found() {
    for reply in [Reply::Unknown, Reply::InProgress] {
        let events = after(
            paid(KEY),
            &[invoke(2, KEY), Event::Crash, invoke(3, KEY), told(3, reply)],
        );
        assert_breaks(Rule::R12, &events);
    }
    let runs_again = after(
        paid(KEY),
        &[Event::Crash, invoke(2, KEY), began(2, KEY), effect(2), first(2, 2)],
    );
    let broken = rules(&runs_again);
    assert!(broken.contains(&Rule::R12) && broken.contains(&Rule::R1), "{broken:?}");
}

#[test]
fn r13_records_that_are_missing_or_left_over_or_too_large_are_found() {
    let stock = |records, bytes| Event::Stock {
        records,
        bytes,
        cap: 100,
    };
    assert_breaks(Rule::R13, &after(paid(KEY), &[stock(0, 10)]));
    assert_breaks(Rule::R13, &after(paid(KEY), &[stock(2, 10)]));
    assert_breaks(Rule::R13, &after(paid(KEY), &[stock(1, 101)]));
    assert_eq!(rules(&after(paid(KEY), &[stock(1, 100)])), []);
}

#[test]
fn good_histories_pass() {
    let lost = Event::Lost { op: 1 };
    let owner_lost = |key| Event::OwnerLost { key };
    let good: [Vec<Event>; 11] = [
        // A claim of which nobody heard is unknown, until its owner says that nothing ran.
        vec![
            invoke(1, KEY),
            owner_lost(KEY),
            told(1, Reply::Unavailable),
            invoke(2, KEY),
            told(2, Reply::Unknown),
            Event::Settled { key: KEY },
            invoke(3, KEY),
            began(3, KEY),
            effect(3),
            first(3, 3),
        ],
        // An attempt that was taken over comes to its end after the other, which is what is kept.
        vec![
            invoke(1, AGAIN),
            began(1, AGAIN),
            owner_lost(AGAIN),
            invoke(2, AGAIN),
            began(2, AGAIN),
            effect(2),
            first(2, 2),
            Event::Settled { key: AGAIN },
            effect(1),
            first(1, 1),
            invoke(3, AGAIN),
            replay(3, 2),
        ],
        // A first answer, a replay, and another request that is refused.
        after(
            paid(KEY),
            &[invoke(2, KEY), replay(2, 1), other(3, KEY), told(3, Reply::Reused)],
        ),
        // Two at once: one is told that the other runs.
        vec![
            invoke(1, KEY),
            began(1, KEY),
            invoke(2, KEY),
            told(2, Reply::InProgress),
            effect(1),
            first(1, 1),
        ],
        // The client leaves, its handler goes on, the retry is a replay.
        vec![
            invoke(1, KEY),
            began(1, KEY),
            lost,
            invoke(2, KEY),
            told(2, Reply::InProgress),
            effect(1),
            Event::Quiet,
        ]
        .into_iter()
        .chain([invoke(3, KEY), replay(3, 1)])
        .collect(),
        // It says that it did not execute, and another request takes the key.
        vec![
            invoke(1, KEY),
            began(1, KEY),
            Event::NotExecuted { run: 1 },
            told(1, Reply::NotExecuted),
            other(2, KEY),
            Event::Began {
                run: 2,
                key: KEY,
                fingerprint: 1,
            },
            effect(2),
            first(2, 2),
        ],
        // It panics: at most once it stays unknown.
        vec![
            invoke(1, KEY),
            began(1, KEY),
            owner_lost(KEY),
            lost,
            invoke(2, KEY),
            told(2, Reply::Unknown),
        ],
        // The effect of an attempt that was on its way when its outcome was said to be unknown.
        vec![
            invoke(1, KEY),
            began(1, KEY),
            owner_lost(KEY),
            invoke(2, KEY),
            told(2, Reply::Unknown),
            effect(1),
            first(1, 1),
        ],
        // At least once it runs again, also where the first one had its effect.
        vec![
            invoke(1, AGAIN),
            began(1, AGAIN),
            effect(1),
            owner_lost(AGAIN),
            lost,
            invoke(2, AGAIN),
            began(2, AGAIN),
            effect(2),
            first(2, 2),
        ],
        // Its answer goes out while the store is away, and its duplicate waits until the store knows.
        vec![
            invoke(1, KEY),
            began(1, KEY),
            effect(1),
            owner_lost(KEY),
            first(1, 1),
            invoke(2, KEY),
            told(2, Reply::InProgress),
            Event::Settled { key: KEY },
            invoke(3, KEY),
            replay(3, 1),
        ],
        // A crash: what was acknowledged is replayed, what was under way is unknown.
        after(
            paid(KEY),
            &[
                invoke(2, key(1, Guarantee::AtMostOnce, 2)),
                Event::Crash,
                Event::Lost { op: 2 },
                invoke(3, key(1, Guarantee::AtMostOnce, 2)),
                told(3, Reply::Unknown),
                invoke(4, KEY),
                replay(4, 1),
                Event::Quiet,
                invoke(5, KEY),
                replay(5, 1),
            ],
        ),
    ];
    for (number, events) in good.iter().enumerate() {
        assert_eq!(rules(events), [], "history {number}: {:?}", check(events));
    }
}
