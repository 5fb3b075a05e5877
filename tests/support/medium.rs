//! Media of a test's making: they forget what was not synced, fail when they are told to, and run out of room.

use std::{
    collections::HashSet,
    io::{self, ErrorKind},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tower_idempotency::testing::{Clock, MachineStart, Medium};

/// What happened to a medium, in order.
#[derive(Clone, Debug)]
pub enum Event {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Sync,
    /// Something was acknowledged; the test knows what.
    Acknowledged(usize),
}

/// Bytes in memory that remember everything that was done to them. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    events: Vec<Event>,
}

impl Recorded {
    pub fn with(bytes: Vec<u8>) -> Self {
        let medium = Self::default();
        medium.state.lock().unwrap().bytes = bytes;
        medium
    }

    pub fn acknowledge(&self, what: usize) {
        self.state.lock().unwrap().events.push(Event::Acknowledged(what));
    }

    pub fn events(&self) -> Vec<Event> {
        self.state.lock().unwrap().events.clone()
    }
}

impl Event {
    /// Done to `bytes`, if it does anything to them.
    pub fn apply(&self, bytes: &mut Vec<u8>) {
        self.apply_sectors(bytes, |_| true);
    }

    /// The same, but only the sectors of a write that `keep` picks.
    pub fn apply_sectors(&self, bytes: &mut Vec<u8>, mut keep: impl FnMut(usize) -> bool) {
        match self {
            Self::Write(offset, data) => {
                let offset = *offset as usize;
                if bytes.len() < offset + data.len() {
                    bytes.resize(offset + data.len(), 0);
                }
                for (sector, chunk) in data.chunks(512).enumerate() {
                    if keep(sector) {
                        let at = offset + sector * 512;
                        bytes[at..at + chunk.len()].copy_from_slice(chunk);
                    }
                }
            }
            Self::SetLen(len) => bytes.resize(*len as usize, 0),
            Self::Sync | Self::Acknowledged(_) => {}
        }
    }
}

fn read(bytes: &[u8], offset: u64, out: &mut [u8]) -> io::Result<()> {
    let from = offset as usize;
    let found = bytes.get(from..from + out.len()).ok_or(ErrorKind::UnexpectedEof)?;
    out.copy_from_slice(found);
    Ok(())
}

impl Medium for Recorded {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        read(&self.state.lock().unwrap().bytes, offset, out)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let event = Event::Write(offset, data.to_vec());
        event.apply(&mut state.bytes);
        state.events.push(event);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.bytes.resize(len as usize, 0);
        state.events.push(Event::SetLen(len));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.state.lock().unwrap().events.push(Event::Sync);
        Ok(())
    }

    fn hold(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes in memory on a medium that can be told to fail, and that may have little room. Clones share them.
#[derive(Clone, Debug)]
pub struct Failing {
    state: Arc<Mutex<FailingState>>,
    calls: Arc<AtomicU64>,
    reads: Arc<AtomicU64>,
    /// Of a place, each time that the store read it.
    watched: Arc<(AtomicU64, AtomicU64)>,
    writes: Arc<AtomicU64>,
    syncs: Arc<AtomicU64>,
    /// Closed while a test wants syncs to take their time.
    gate: Arc<(Mutex<bool>, Condvar)>,
}

#[derive(Debug)]
struct FailingState {
    bytes: Vec<u8>,
    /// Those that were ever written: a block that exists by the length alone takes no room.
    blocks: HashSet<u64>,
    held: u64,
    /// What others keep on the same disk.
    others: u64,
    /// Whether they take at once whatever is given back.
    greedy: bool,
    /// Whether nothing may be set aside, whatever room there is.
    no_spare: bool,
    room: u64,
    /// Not even what replaces something: a file system that never writes to the same place.
    takes_nothing: bool,
    fail: Option<(Calls, u64)>,
    once: bool,
}

/// Which calls fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// Every one from a certain number on.
    All,
    Reads,
    Writes,
    Syncs,
}

impl Default for Failing {
    fn default() -> Self {
        let state = FailingState {
            bytes: Vec::new(),
            blocks: HashSet::new(),
            held: 0,
            others: 0,
            greedy: false,
            no_spare: false,
            room: u64::MAX,
            takes_nothing: false,
            fail: None,
            once: false,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            calls: Arc::default(),
            reads: Arc::default(),
            watched: Arc::new((AtomicU64::new(u64::MAX), AtomicU64::new(0))),
            writes: Arc::default(),
            syncs: Arc::default(),
            gate: Arc::new((Mutex::new(false), Condvar::new())),
        }
    }
}

impl Failing {
    pub fn with(bytes: Vec<u8>) -> Self {
        let medium = Self::default();
        medium.state.lock().unwrap().bytes = bytes;
        medium
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap().bytes.clone()
    }

    pub fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        change(&mut self.state.lock().unwrap().bytes);
    }

    /// The room of the whole disk.
    pub fn room(&self, room: u64) {
        self.state.lock().unwrap().room = room;
    }

    /// Whether there is no room at all, not even for what replaces something, as where nothing is written in its place.
    pub fn takes_nothing(&self, nothing: bool) {
        self.state.lock().unwrap().takes_nothing = nothing;
    }

    pub fn taken(&self) -> u64 {
        let state = self.state.lock().unwrap();
        state.used() + state.held + state.others
    }

    /// Somebody else fills the disk, up to this many bytes that are left.
    pub fn others_leave(&self, left: u64) {
        let mut state = self.state.lock().unwrap();
        state.others = (state.room - state.used() - state.held).saturating_sub(left);
    }

    /// From now on they take at once what the store gives back.
    pub fn others_are_greedy(&self) {
        self.state.lock().unwrap().greedy = true;
    }

    /// A directory in which no other file may be made.
    pub fn without_spare(&self) {
        self.state.lock().unwrap().no_spare = true;
    }

    /// Such calls fail after `after` more of them, for good.
    pub fn fail(&self, calls: Calls, after: u64) {
        self.state.lock().unwrap().fail = Some((calls, after));
    }

    /// The next such call fails, and no other.
    pub fn fail_once(&self, calls: Calls) {
        let mut state = self.state.lock().unwrap();
        (state.fail, state.once) = (Some((calls, 0)), true);
    }

    pub fn heal(&self) {
        self.state.lock().unwrap().fail = None;
    }

    pub fn calls(&self) -> u64 {
        self.calls.load(SeqCst)
    }

    pub fn reads(&self) -> u64 {
        self.reads.load(SeqCst)
    }

    /// From now on the reads of this place are counted apart.
    pub fn watch(&self, offset: u64) {
        self.watched.0.store(offset, SeqCst);
    }

    pub fn reads_of_the_watched(&self) -> u64 {
        self.watched.1.load(SeqCst)
    }

    pub fn writes(&self) -> u64 {
        self.writes.load(SeqCst)
    }

    /// Syncs that were begun.
    pub fn syncs(&self) -> u64 {
        self.syncs.load(SeqCst)
    }

    /// No sync returns until this is undone.
    pub fn block_syncs(&self, block: bool) {
        *self.gate.0.lock().unwrap() = block;
        self.gate.1.notify_all();
    }

    fn enter(&self, kind: Calls) -> io::Result<std::sync::MutexGuard<'_, FailingState>> {
        // Before it counts: whoever sees the call and changes the bytes comes after it.
        let mut state = self.state.lock().unwrap();
        self.calls.fetch_add(1, SeqCst);
        match kind {
            Calls::Reads => self.reads.fetch_add(1, SeqCst),
            Calls::Writes => self.writes.fetch_add(1, SeqCst),
            Calls::Syncs => self.syncs.fetch_add(1, SeqCst),
            Calls::All => 0,
        };
        if let Some((calls, after)) = &mut state.fail {
            if *calls == Calls::All || *calls == kind {
                if *after == 0 {
                    if state.once {
                        state.fail = None;
                    }
                    return Err(io::Error::other("injected"));
                }
                *after -= 1;
            }
        }
        Ok(state)
    }
}

const BLOCK: u64 = 4096;

impl FailingState {
    fn used(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    /// Whether so much more fits.
    fn fits(&self, more: u64) -> io::Result<()> {
        if more > 0 && self.used() + self.held + self.others + more > self.room {
            return Err(ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

impl Medium for Failing {
    fn len(&self) -> io::Result<u64> {
        Ok(self.enter(Calls::Reads)?.bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (watched, times) = &*self.watched;
        if (offset..offset + out.len() as u64).contains(&watched.load(SeqCst)) {
            times.fetch_add(1, SeqCst);
        }
        read(&self.enter(Calls::Reads)?.bytes, offset, out)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.enter(Calls::Writes)?;
        if state.takes_nothing {
            return Err(ErrorKind::StorageFull.into());
        }
        let touched = offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK);
        let new: Vec<_> = touched.filter(|block| !state.blocks.contains(block)).collect();
        state.fits(new.len() as u64 * BLOCK)?;
        state.blocks.extend(new);
        Event::Write(offset, data.to_vec()).apply(&mut state.bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.enter(Calls::Writes)?;
        state.bytes.resize(len as usize, 0);
        state.blocks.retain(|block| block * BLOCK < len);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        drop(self.enter(Calls::Syncs)?);
        let blocked = self.gate.0.lock().unwrap();
        drop(self.gate.1.wait_while(blocked, |blocked| *blocked).unwrap());
        Ok(())
    }

    fn hold(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if state.no_spare {
            return Err(ErrorKind::PermissionDenied.into());
        }
        state.fits(bytes.saturating_sub(state.held))?;
        if state.greedy {
            state.others += state.held.saturating_sub(bytes);
        }
        state.held = bytes;
        Ok(())
    }
}

/// A clock that a test sets. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct TestClock(Arc<Mutex<Times>>);

#[derive(Clone, Copy, Debug, Default)]
struct Times {
    monotonic: Duration,
    wall: Duration,
    machine: Option<(u8, Duration)>,
}

impl TestClock {
    /// A machine that was started ten hours ago, in 2020.
    pub fn new() -> Self {
        let clock = Self::default();
        clock.0.lock().unwrap().wall = Duration::from_secs(50 * 365 * 24 * 3600);
        clock.0.lock().unwrap().machine = Some((1, Duration::from_secs(36_000)));
        clock
    }

    /// All of it goes on, as it does on a good day.
    pub fn pass(&self, time: Duration) {
        let mut times = self.0.lock().unwrap();
        times.monotonic += time;
        times.wall += time;
        if let Some((_, up)) = &mut times.machine {
            *up += time;
        }
    }

    /// Somebody sets the wall clock.
    pub fn jump(&self, change: impl FnOnce(Duration) -> Duration) {
        let mut times = self.0.lock().unwrap();
        times.wall = change(times.wall);
    }

    /// The machine is started anew, and no time was lost by it.
    pub fn restart(&self) {
        let mut times = self.0.lock().unwrap();
        times.monotonic = Duration::ZERO;
        times.machine = times.machine.map(|(start, _)| (start + 1, Duration::ZERO));
    }

    /// A system that does not tell when it was started.
    pub fn without_uptime(&self) {
        self.0.lock().unwrap().machine = None;
    }
}

impl Clock for TestClock {
    fn monotonic(&self) -> Duration {
        self.0.lock().unwrap().monotonic
    }

    fn wall(&self) -> Duration {
        self.0.lock().unwrap().wall
    }

    fn machine(&self) -> Option<(MachineStart, Duration)> {
        let machine = self.0.lock().unwrap().machine;
        machine.map(|(start, up)| ([start; 36], up))
    }
}
