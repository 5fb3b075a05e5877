//! The protocol between nodes and a store, without code: one key, a few nodes that may stop or die at any point, and a
//! clock. Each switch takes away one thing that a guarantee rests on, so that it is seen to be needed.

use stateright::{Model, Property};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarantee {
    AtMostOnce,
    AtLeastOnce,
    /// The effect commits in the transaction that completes the record.
    Transactional,
}

/// What is built, and what is left out of it.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    pub guarantee: Guarantee,
    /// Changes compare the owner.
    pub fenced: bool,
    /// Claiming is one step; otherwise a node looks, and writes later.
    pub atomic_claim: bool,
    /// The store's clock counts leases; otherwise each node's, of which one is ahead.
    pub store_time: bool,
    /// An attempt that was lost leaves an unknown outcome; otherwise its key is free.
    pub lost_is_unknown: bool,
    /// An owner is a random name; otherwise a counter that starts anew with each record.
    pub random_owner: bool,
    /// Faults that take place.
    pub crashes: u8,
}

impl Protocol {
    /// As it is built.
    pub fn of(guarantee: Guarantee) -> Self {
        Self {
            guarantee,
            fenced: true,
            atomic_claim: true,
            store_time: true,
            lost_is_unknown: true,
            random_owner: true,
            crashes: 2,
        }
    }
}

const NODES: usize = 3;
/// So long is a lease, and so long is a lost record kept after it.
const LEASE: u8 = 2;
const KEPT: u8 = 2;
/// The clock stops here, so that there is an end.
const END: u8 = 6;
/// By which the clock of the first node is ahead.
const SKEW: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Record {
    Vacant,
    InProgress { owner: u8, fence: u8, until: u8 },
    Completed { by: u8 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    Idle,
    /// It looked, saw nothing, and has not written yet.
    Looked,
    /// It holds a lease, or believes so.
    Claimed {
        owner: u8,
        run: u8,
    },
    /// Its handler had its effect.
    Effected {
        owner: u8,
        run: u8,
    },
    /// It answered its client.
    Answered {
        run: u8,
    },
    Dead,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub time: u8,
    pub record: Record,
    pub nodes: [Node; NODES],
    pub runs: u8,
    pub effects: u8,
    /// Attempts that were taken over, or freed, while nobody knew how they ended.
    pub lost: u8,
    crashes: u8,
    /// The run whose answer a client was given from the record, first and last.
    pub first_replay: Option<u8>,
    pub last_replay: Option<u8>,
    /// Effects of attempts whose record was somebody else's by then, and which were stored over it.
    pub overwritten: bool,
    pub unknown_was_said: bool,
    pub ran_after_unknown: bool,
    /// A lease was taken to be over while the store's clock says that it lasts.
    pub ended_early: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Begin(usize),
    Write(usize),
    Effect(usize),
    Complete(usize),
    Renew(usize),
    Crash(usize),
    Restart(usize),
    Tick,
}

impl Protocol {
    fn time_of(&self, state: &State, node: usize) -> u8 {
        match self.store_time {
            false if node == 0 => state.time + SKEW,
            _ => state.time,
        }
    }

    fn claim(&self, state: &mut State, node: usize, fence: u8) {
        let run = state.runs;
        state.runs += 1;
        state.ran_after_unknown |= state.unknown_was_said;
        let owner = if self.random_owner { run } else { fence };
        let until = state.time + LEASE;
        state.record = Record::InProgress { owner, fence, until };
        state.nodes[node] = Node::Claimed { owner, run };
    }

    fn begin(&self, state: &mut State, node: usize) {
        let now = self.time_of(state, node);
        match state.record {
            Record::Vacant if self.atomic_claim => self.claim(state, node, 1),
            Record::Vacant => state.nodes[node] = Node::Looked,
            Record::InProgress { fence, until, .. } if now >= until => {
                state.ended_early |= state.time < until;
                if now >= until + KEPT && self.guarantee != Guarantee::AtMostOnce {
                    // Forgotten: a new record, which knows nothing of the old one.
                    state.lost += 1;
                    self.claim(state, node, 1);
                } else if self.guarantee != Guarantee::AtMostOnce {
                    state.lost += 1;
                    self.claim(state, node, fence + 1);
                } else if !self.lost_is_unknown {
                    state.lost += 1;
                    self.claim(state, node, 1);
                } else {
                    state.unknown_was_said = true;
                }
            }
            Record::InProgress { .. } => {}
            Record::Completed { by } => {
                state.first_replay.get_or_insert(by);
                state.last_replay = Some(by);
            }
        }
    }

    fn owns(&self, state: &State, owner: u8) -> bool {
        match state.record {
            Record::InProgress { owner: holder, .. } => holder == owner || !self.fenced,
            Record::Completed { .. } => !self.fenced,
            Record::Vacant => false,
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            time: 0,
            record: Record::Vacant,
            nodes: [Node::Idle; NODES],
            runs: 0,
            effects: 0,
            lost: 0,
            crashes: 0,
            first_replay: None,
            last_replay: None,
            overwritten: false,
            unknown_was_said: false,
            ran_after_unknown: false,
            ended_early: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for node in 0..NODES {
            match state.nodes[node] {
                Node::Idle => actions.push(Action::Begin(node)),
                Node::Looked => actions.push(Action::Write(node)),
                Node::Claimed { .. } => {
                    if self.guarantee != Guarantee::Transactional {
                        actions.push(Action::Effect(node));
                    } else {
                        actions.push(Action::Complete(node));
                    }
                    actions.push(Action::Renew(node));
                }
                Node::Effected { .. } => actions.push(Action::Complete(node)),
                Node::Answered { .. } | Node::Dead => actions.push(Action::Restart(node)),
            }
            let is_alive = matches!(state.nodes[node], Node::Claimed { .. } | Node::Effected { .. });
            if is_alive && state.crashes < self.crashes {
                actions.push(Action::Crash(node));
            }
        }
        if state.time < END {
            actions.push(Action::Tick);
        }
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        match action {
            Action::Tick => state.time += 1,
            Action::Begin(node) => self.begin(&mut state, node),
            Action::Write(node) => self.claim(&mut state, node, 1),
            Action::Effect(node) => {
                if let Node::Claimed { owner, run } = state.nodes[node] {
                    state.effects += 1;
                    state.nodes[node] = Node::Effected { owner, run };
                }
            }
            Action::Complete(node) => {
                let (Node::Claimed { owner, run } | Node::Effected { owner, run }) = state.nodes[node] else {
                    return None;
                };
                if self.owns(&state, owner) {
                    // Another attempt's record, or its answer, is written over.
                    state.overwritten |= match state.record {
                        Record::Completed { by } => by != run,
                        Record::InProgress { .. } => state.runs > run + 1,
                        Record::Vacant => false,
                    };
                    state.record = Record::Completed { by: run };
                    state.effects += u8::from(self.guarantee == Guarantee::Transactional);
                }
                // Fenced, a transaction rolls back, and any other attempt answers its own client.
                state.nodes[node] = Node::Answered { run };
            }
            Action::Renew(node) => {
                let Node::Claimed { owner, .. } = state.nodes[node] else {
                    return None;
                };
                if let Record::InProgress {
                    owner: holder, fence, ..
                } = state.record
                {
                    if holder == owner {
                        let until = state.time + LEASE;
                        state.record = Record::InProgress { owner, fence, until };
                    }
                }
            }
            Action::Crash(node) => {
                state.crashes += 1;
                state.nodes[node] = Node::Dead;
            }
            Action::Restart(node) => state.nodes[node] = Node::Idle,
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one effect", |_, state: &State| state.effects <= 1),
            Property::always("no more effects than lost attempts and one", |_, state: &State| {
                state.effects <= 1 + state.lost
            }),
            Property::always("every replay is the first one", |_, state: &State| {
                state.first_replay == state.last_replay
            }),
            Property::always("no attempt writes over another's record", |_, state: &State| {
                !state.overwritten
            }),
            Property::always("nothing runs once its outcome is unknown", |_, state: &State| {
                !state.ran_after_unknown
            }),
            Property::always("no lease ends early", |_, state: &State| !state.ended_early),
            Property::sometimes("an answer is replayed", |_, state: &State| state.first_replay.is_some()),
            Property::sometimes("an attempt is lost", |_, state: &State| {
                state.lost > 0 || state.unknown_was_said
            }),
        ]
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.runs <= 4
    }
}
