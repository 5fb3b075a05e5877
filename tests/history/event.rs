//! What happened, in one order that everybody agrees on.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use serde::Serialize;

/// Names one operation: a key, whose it is, and on which route, each of which has a guarantee of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Key {
    pub tenant: u16,
    pub guarantee: Guarantee,
    pub number: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Guarantee {
    AtMostOnce,
    AtLeastOnce,
}

/// Of one request.
pub type Op = u64;
/// Of one run of the handler.
pub type Run = u64;

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub enum Event {
    /// Before the first byte is sent.
    Invoke { op: Op, key: Key, fingerprint: u8 },
    /// After the last byte is read.
    Return { op: Op, reply: Reply },
    /// The client left, or the connection broke.
    Lost { op: Op },
    /// The handler starts.
    Began { run: Run, key: Key, fingerprint: u8 },
    /// What the handler is for, and the digest of the answer that tells of it.
    Effect { run: Run, digest: u64 },
    /// The handler ends without an effect, and says so.
    NotExecuted { run: Run },
    /// An attempt may have come to its end without its outcome being stored: a panic, a store that did not answer.
    OwnerLost { key: Key },
    /// Every attempt at this key that was in doubt is known to the store again.
    Settled { key: Key },
    /// A node died, or stood still for so long that leases may have run out.
    Crash,
    /// Faults are over, and so is what was under way. Probes follow.
    Quiet,
    /// What the store says that it holds, and the most that it may.
    Stock { records: u64, bytes: u64, cap: u64 },
}

/// What a client was told.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub enum Reply {
    /// The answer of an operation that executed; the tenant is the one that its body names.
    Final { replayed: bool, digest: u64, tenant: u16 },
    /// 409 `request-in-progress`
    InProgress,
    /// 409 `outcome-unknown`
    Unknown,
    /// 422 `idempotency-key-reused`
    Reused,
    /// 503 of the layer
    Unavailable,
    /// The handler's own word that it did not execute.
    NotExecuted,
    /// Anything else, by its status.
    Other(u16),
}

/// The events of one round so far.
#[derive(Debug, Default)]
pub struct History {
    events: Mutex<Vec<Event>>,
    next: AtomicU64,
}

impl History {
    pub fn push(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    /// A number that no other operation, run or answer has.
    pub fn fresh(&self) -> u64 {
        self.next.fetch_add(1, Relaxed)
    }

    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }
}

/// Keeps a history that broke a rule, one event a line, beside what it broke, and says where.
pub fn keep(directory: &Path, name: &str, events: &[Event], broken: &str) -> PathBuf {
    let path = directory.join(format!("{name}.jsonl"));
    let mut lines = String::new();
    for event in events {
        writeln!(lines, "{}", serde_json::to_string(event).expect("an event is JSON")).expect("memory");
    }
    fs::create_dir_all(directory).expect("a folder for histories");
    fs::write(&path, lines).expect("a file");
    fs::write(path.with_extension("txt"), broken).expect("a file");
    path
}

/// How often each kind of event is there, for the question whether anything happened at all.
pub fn census(events: &[Event]) -> BTreeMap<&'static str, u64> {
    let mut census = BTreeMap::new();
    for event in events {
        let name = match event {
            Event::Invoke { .. } => "invoked",
            Event::Return { reply, .. } => match reply {
                Reply::Final { replayed: true, .. } => "replayed",
                Reply::Final { .. } => "answered",
                Reply::InProgress => "in progress",
                Reply::Unknown => "unknown",
                Reply::Reused => "reused",
                Reply::Unavailable => "unavailable",
                Reply::NotExecuted => "not executed",
                Reply::Other(_) => "other",
            },
            Event::Lost { .. } => "lost",
            Event::Began { .. } => "began",
            Event::Effect { .. } => "effects",
            Event::NotExecuted { .. } => "refused by the handler",
            Event::OwnerLost { .. } => "owners lost",
            Event::Settled { .. } => "settled",
            Event::Crash => "crashes",
            Event::Quiet | Event::Stock { .. } => continue,
        };
        *census.entry(name).or_default() += 1;
    }
    census
}
