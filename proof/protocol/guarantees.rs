//! For each guarantee what holds, and, for each thing that it rests on, what does not hold without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;

use stateright::{Checker, Model};
use tower_idempotency_protocol::{Guarantee, Protocol};

const ONE: &str = "at most one effect";
const LOST: &str = "no more effects than lost attempts and one";
const SAME: &str = "every replay is the first one";
const OWN: &str = "no attempt writes over another's record";
const UNKNOWN: &str = "nothing runs once its outcome is unknown";
const EARLY: &str = "no lease ends early";
const REPLAYED: &str = "an answer is replayed";
const IS_LOST: &str = "an attempt is lost";

/// Of the properties, those that do not hold in every state that can be come to.
fn broken(protocol: Protocol) -> BTreeSet<&'static str> {
    let checker = protocol.checker().threads(2).spawn_bfs().join();
    assert!(checker.unique_state_count() > 100, "hardly anything was tried");
    let found = checker.discoveries();
    for example in [REPLAYED, IS_LOST] {
        assert!(found.contains_key(example), "it never happens that {example}");
    }
    [ONE, LOST, SAME, OWN, UNKNOWN, EARLY]
        .into_iter()
        .filter(|name| found.contains_key(name))
        .collect()
}

fn assert_broken(protocol: Protocol, expected: &[&'static str]) {
    let found = broken(protocol);
    for name in expected {
        assert!(
            found.contains(name),
            "{name:?} is to be broken by {protocol:?}, and is not: {found:?}"
        );
    }
}

#[test]
fn at_most_once_holds_whatever_dies() {
    assert_eq!(broken(Protocol::of(Guarantee::AtMostOnce)), BTreeSet::new());
}

#[test]
fn transactional_has_one_effect_although_lost_attempts_run_again() {
    assert_eq!(broken(Protocol::of(Guarantee::Transactional)), BTreeSet::new());
}

#[test]
fn at_least_once_has_no_more_effects_than_lost_attempts_and_one_and_is_not_once() {
    assert_eq!(broken(Protocol::of(Guarantee::AtLeastOnce)), BTreeSet::from([ONE]));
}

#[test]
fn a_lost_attempt_that_frees_its_key_is_found_unsafe() {
    let unsafe_cell = Protocol {
        lost_is_unknown: false,
        ..Protocol::of(Guarantee::AtMostOnce)
    };
    assert_broken(unsafe_cell, &[ONE]);
}

#[test]
fn looking_before_claiming_is_found_unsafe_under_each_guarantee() {
    for guarantee in [Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
        assert_broken(
            Protocol {
                atomic_claim: false,
                ..Protocol::of(guarantee)
            },
            &[ONE, LOST],
        );
    }
}

#[test]
fn completing_without_a_fence_is_found_unsafe() {
    let at_least_once = Protocol {
        fenced: false,
        ..Protocol::of(Guarantee::AtLeastOnce)
    };
    assert_broken(at_least_once, &[SAME, OWN]);
    let transactional = Protocol {
        fenced: false,
        ..Protocol::of(Guarantee::Transactional)
    };
    assert_broken(transactional, &[ONE, SAME, OWN]);
}

#[test]
fn an_owner_that_is_a_counter_is_found_unsafe() {
    let cell = |guarantee| Protocol {
        random_owner: false,
        ..Protocol::of(guarantee)
    };
    assert_broken(cell(Guarantee::AtLeastOnce), &[OWN]);
}

#[test]
fn leases_that_are_counted_by_the_nodes_clocks_are_found_unsafe() {
    // Nobody dies and nobody is late: a clock that is ahead is enough.
    for guarantee in [Guarantee::AtMostOnce, Guarantee::AtLeastOnce, Guarantee::Transactional] {
        let skewed = Protocol {
            store_time: false,
            crashes: 0,
            ..Protocol::of(guarantee)
        };
        assert_broken(skewed, &[EARLY]);
    }
}
