//! The rules: each (scope, key) is a register that is written once.
//!
//! The checker knows nothing of the layer. It reads a history from its beginning to its end and keeps, for each key, what
//! was promised so far.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use super::event::{Event, Guarantee, Key, Op, Reply, Run};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// More effects than the guarantee allows.
    R1,
    /// A final reply matches no effect of its key, or precedes it.
    R2,
    /// Two final replies of one key differ.
    R3,
    /// More than one final reply that is not marked as a replay.
    R4,
    /// After an acknowledged reply the same request gets anything else.
    R5,
    /// A request with another fingerprint gets a final reply or has an effect; or one is refused that has no rival.
    R6,
    /// A reply of another scope.
    R7,
    /// An effect that nobody asked for.
    R8,
    /// "In progress" with no rival open, or "outcome unknown" with no owner lost.
    R9,
    /// After everything is quiet, a probe does not settle.
    R10,
    /// At most once: a run that began after "outcome unknown" was said, and after another run.
    R11,
    /// After a crash an acknowledged reply differs or is missing.
    R12,
    /// The store holds other records than the keys that were touched, or more bytes than it may.
    R13,
}

/// A rule that was broken, and by which event.
#[derive(Debug)]
pub struct Violation {
    pub rule: Rule,
    pub at: usize,
    pub why: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at event {}: {}", self.rule, self.at, self.why)
    }
}

/// Every rule that this history breaks.
pub fn check(events: &[Event]) -> Vec<Violation> {
    let mut checker = Checker::default();
    for (at, event) in events.iter().enumerate() {
        checker.at = at;
        checker.step(*event);
    }
    for ((key, _), at) in std::mem::take(&mut checker.unsettled) {
        checker.at = at;
        checker.break_rule(Rule::R10, format!("{key:?} was probed, and the store was never there"));
    }
    checker.violations
}

#[derive(Default)]
struct Checker {
    at: usize,
    keys: HashMap<Key, Register>,
    ops: HashMap<Op, Request>,
    runs: HashMap<Run, Running>,
    /// By digest.
    effects: HashMap<u64, (Key, u8)>,
    /// Probes that the store was not there for, and that were not repeated with more success.
    unsettled: HashMap<(Key, u8), usize>,
    quiet: bool,
    crashes: usize,
    violations: Vec<Violation>,
}

/// What is known of one key.
#[derive(Default)]
struct Register {
    open: HashSet<Op>,
    invoked: HashSet<u8>,
    /// Requests that were lost: their handlers may run on until everything is quiet.
    lost: bool,
    owners_lost: usize,
    /// An attempt was lost, and the store has not heard of its end.
    in_doubt: bool,
    /// Runs that did not say that they did not execute.
    runs: usize,
    effects: usize,
    effect_of: Option<u8>,
    /// The final reply that a client has read, and of which fingerprint it was.
    acknowledged: Option<Acknowledged>,
    first_replies: usize,
    unknown_was_said: bool,
}

#[derive(Clone, Copy)]
struct Acknowledged {
    digest: u64,
    fingerprint: u8,
    crashes: usize,
}

struct Request {
    key: Key,
    fingerprint: u8,
    /// What its key had promised when it was sent.
    promised: Option<Acknowledged>,
    has_rival: bool,
    /// An attempt at its key was in doubt while it was open.
    saw_doubt: bool,
    /// It was open when an attempt at its key was lost, which may be its own.
    saw_loss: bool,
    is_probe: bool,
}

struct Running {
    key: Key,
    fingerprint: u8,
}

impl Checker {
    fn break_rule(&mut self, rule: Rule, why: String) {
        self.violations.push(Violation { rule, at: self.at, why });
    }

    fn key(&mut self, key: Key) -> &mut Register {
        self.keys.entry(key).or_default()
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Invoke { op, key, fingerprint } => self.invoke(op, key, fingerprint),
            Event::Return { op, reply } => self.answer(op, reply),
            Event::Lost { op } => self.lose(op),
            Event::Began { run, key, fingerprint } => self.begin(run, key, fingerprint),
            Event::Effect { run, digest } => self.effect(run, digest),
            Event::NotExecuted { run } => {
                if let Some(Running { key, .. }) = self.runs.remove(&run) {
                    self.key(key).runs -= 1;
                }
            }
            Event::OwnerLost { key } => self.lose_owner(key),
            Event::Settled { key } => self.key(key).in_doubt = false,
            Event::Crash => self.crash(),
            Event::Quiet => {
                self.quiet = true;
                self.keys.values_mut().for_each(|register| register.lost = false);
            }
            Event::Stock { records, bytes, cap } => self.count(records, bytes, cap),
        }
    }

    fn invoke(&mut self, op: Op, key: Key, fingerprint: u8) {
        let register = self.keys.entry(key).or_default();
        let has_rival = !register.open.is_empty() || register.lost;
        for other in &register.open {
            if let Some(other) = self.ops.get_mut(other) {
                other.has_rival = true;
            }
        }
        register.open.insert(op);
        register.invoked.insert(fingerprint);
        let promised = register.acknowledged;
        let request = Request {
            key,
            fingerprint,
            promised,
            has_rival,
            saw_doubt: register.in_doubt,
            saw_loss: false,
            is_probe: self.quiet,
        };
        self.ops.insert(op, request);
    }

    fn lose(&mut self, op: Op) {
        let Some(Request { key, is_probe, .. }) = self.ops.remove(&op) else {
            return;
        };
        let register = self.key(key);
        register.open.remove(&op);
        register.lost = true;
        if is_probe {
            self.break_rule(Rule::R10, format!("{key:?} was probed, and nobody answered"));
        }
    }

    fn begin(&mut self, run: Run, key: Key, fingerprint: u8) {
        let register = self.key(key);
        let asked = register.invoked.contains(&fingerprint);
        // Where nothing ran, an owner says in time that it was nothing. But what it says may lie on the way until the lease is
        // over, or the store's clock may jump.
        let unknown = register.unknown_was_said && register.runs > 0;
        register.runs += 1;
        if !asked {
            self.break_rule(Rule::R8, format!("{key:?} ran for {fingerprint}, which nobody sent"));
        }
        if unknown && key.guarantee == Guarantee::AtMostOnce {
            self.break_rule(Rule::R11, format!("{key:?} ran although its outcome was unknown"));
        }
        self.runs.insert(run, Running { key, fingerprint });
    }

    fn effect(&mut self, run: Run, digest: u64) {
        let Some(Running { key, fingerprint }) = self.runs.remove(&run) else {
            return self.break_rule(Rule::R8, format!("run {run} had an effect and never began"));
        };
        self.effects.insert(digest, (key, fingerprint));
        let register = self.key(key);
        register.effects += 1;
        let allowed = match key.guarantee {
            Guarantee::AtMostOnce => 1,
            Guarantee::AtLeastOnce => 1 + register.owners_lost,
        };
        let (effects, first) = (register.effects, *register.effect_of.get_or_insert(fingerprint));
        if effects > allowed {
            self.break_rule(
                Rule::R1,
                format!("{key:?} had {effects} effects, {allowed} are allowed"),
            );
        }
        if first != fingerprint {
            self.break_rule(
                Rule::R6,
                format!("{key:?} had an effect for {first} and for {fingerprint}"),
            );
        }
    }

    fn lose_owner(&mut self, key: Key) {
        let register = self.keys.entry(key).or_default();
        register.owners_lost += 1;
        register.in_doubt = true;
        for open in &register.open {
            if let Some(request) = self.ops.get_mut(open) {
                request.saw_doubt = true;
                request.saw_loss = true;
            }
        }
        if key.guarantee == Guarantee::AtLeastOnce {
            // The lost attempt's answer may have reached its client, and the next attempt has an answer of its own.
            register.acknowledged = None;
        }
    }

    fn crash(&mut self) {
        self.crashes += 1;
        let in_flight: Vec<Key> = self
            .keys
            .iter()
            .filter(|(_, register)| !register.open.is_empty() || register.lost)
            .map(|(key, _)| *key)
            .collect();
        for key in in_flight {
            let attempts = self.key(key).open.len().max(1);
            let (acknowledged, in_doubt) = (self.key(key).acknowledged, self.key(key).in_doubt);
            for _ in 0..attempts {
                self.lose_owner(key);
            }
            // What a client has read is durable, whoever else was under way.
            let register = self.key(key);
            register.acknowledged = acknowledged;
            register.in_doubt = in_doubt || acknowledged.is_none();
        }
    }

    fn answer(&mut self, op: Op, reply: Reply) {
        let Some(request) = self.ops.remove(&op) else { return };
        let key = request.key;
        self.key(key).open.remove(&op);
        self.keeps_promise(&request, reply);
        match reply {
            Reply::Final {
                replayed,
                digest,
                tenant,
            } => self.final_reply(&request, replayed, digest, tenant),
            Reply::InProgress => {
                if !request.has_rival && !request.saw_doubt {
                    self.break_rule(Rule::R9, format!("{key:?} is said to be in progress, and nobody is"));
                }
            }
            Reply::Unknown => {
                let register = self.key(key);
                register.unknown_was_said = true;
                if register.owners_lost == 0 {
                    self.break_rule(
                        Rule::R9,
                        format!("{key:?} is said to be unknown, and no owner was lost"),
                    );
                }
            }
            Reply::Reused => {
                if self.key(key).invoked.len() < 2 {
                    self.break_rule(
                        Rule::R6,
                        format!("{key:?} is said to be another request's, and there is none"),
                    );
                }
            }
            Reply::Unavailable | Reply::NotExecuted | Reply::Other(_) => {}
        }
        let settles = matches!(reply, Reply::Final { .. } | Reply::Unknown | Reply::Reused);
        let probed = (key, request.fingerprint);
        if request.is_probe && reply == Reply::Unavailable {
            self.unsettled.insert(probed, self.at);
        } else if request.is_probe && settles {
            self.unsettled.remove(&probed);
        } else if request.is_probe {
            self.break_rule(Rule::R10, format!("{key:?} was probed and got {reply:?}"));
        }
    }

    /// What was acknowledged before this request was sent is what it gets.
    fn keeps_promise(&mut self, request: &Request, reply: Reply) {
        let Some(promised) = request.promised else { return };
        if promised.fingerprint != request.fingerprint {
            return;
        }
        let key = request.key;
        let register = &self.keys[&key];
        // The promise of an attempt that was lost since is not one; that of another attempt is.
        let Some(now) = register.acknowledged else { return };
        let kept = match reply {
            Reply::Final { digest, .. } => digest == promised.digest || digest == now.digest,
            Reply::Unavailable => true,
            // Its answer went out although the store could not be told, which is still trying.
            Reply::InProgress | Reply::Unknown => request.saw_doubt,
            _ => false,
        };
        if !kept {
            let crashed = promised.crashes < self.crashes;
            let rule = if crashed { Rule::R12 } else { Rule::R5 };
            self.break_rule(rule, format!("{key:?} was answered, and then got {reply:?}"));
        }
    }

    fn final_reply(&mut self, request: &Request, replayed: bool, digest: u64, tenant: u16) {
        let (key, fingerprint) = (request.key, request.fingerprint);
        match self.effects.get(&digest).copied() {
            None => self.break_rule(Rule::R2, format!("{key:?} was answered by nothing that happened")),
            Some((of, _)) if of.tenant != key.tenant => {
                self.break_rule(Rule::R7, format!("{key:?} got the answer of {of:?}"));
            }
            Some((of, _)) if of != key => {
                self.break_rule(Rule::R2, format!("{key:?} got the answer of {of:?}"));
            }
            Some((_, of)) if of != fingerprint => {
                self.break_rule(Rule::R6, format!("{key:?} for {fingerprint} got the answer for {of}"));
            }
            Some(_) => {}
        }
        if tenant != key.tenant {
            self.break_rule(Rule::R7, format!("{key:?} got an answer that names tenant {tenant}"));
        }
        let crashes = self.crashes;
        let register = self.key(key);
        let allowed = match key.guarantee {
            Guarantee::AtMostOnce => 1,
            Guarantee::AtLeastOnce => 1 + register.owners_lost,
        };
        register.first_replies += usize::from(!replayed);
        let (first_replies, before) = (register.first_replies, register.acknowledged);
        // Of an attempt in doubt the next one may give another answer, where there may be a next one; and one that comes
        // to its end after it was taken over still answers its own client, whatever is kept by then.
        let may_be_lost = register.in_doubt || !replayed && request.saw_loss;
        if key.guarantee == Guarantee::AtMostOnce || !may_be_lost {
            register.acknowledged = Some(Acknowledged {
                digest,
                fingerprint,
                crashes,
            });
        }
        if !replayed && first_replies > allowed {
            self.break_rule(Rule::R4, format!("{key:?} got {first_replies} first replies"));
        }
        let may_differ = key.guarantee == Guarantee::AtLeastOnce && allowed > 1;
        if before.is_some_and(|before| before.digest != digest) && !may_differ {
            self.break_rule(Rule::R3, format!("{key:?} got two final replies"));
        }
    }

    fn count(&mut self, records: u64, bytes: u64, cap: u64) {
        let keys = self
            .keys
            .values()
            .filter(|register| !register.invoked.is_empty())
            .count() as u64;
        if records != keys {
            self.break_rule(Rule::R13, format!("{records} records for {keys} keys"));
        }
        if bytes > cap {
            self.break_rule(Rule::R13, format!("{bytes} bytes of {cap}"));
        }
    }
}
