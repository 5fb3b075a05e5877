//! The store's time: it goes on where it was left, and no wall clock can push it.
//!
//! While a store is open its time is a monotonic clock's, so no step of the wall clock is even seen. Every opening has
//! to learn how long the store was closed:
//!
//! - Where the system tells which start of the machine this is and how long ago it was (Linux), and it is the same
//!   start as before, that tells it exactly, unless it is more than an hour longer than the wall clock says.
//! - Otherwise the wall clocks of then and now do, less [`TOLERANCE`]. A clock that went back, or forward by up to
//!   an hour, has no effect then: time stands still rather than leap, so nothing ends earlier than asked. That goes for
//!   a clock that is set right after it went back, too: what a run remembers is never behind what the one before
//!   remembered. A longer leap cannot be told from a machine that was switched off for so long.

use std::{
    fmt, fs,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;

use super::frame::{NEVER, Reader, Time, corrupt};
use crate::error::{StoreError, StoreErrorKind};

/// How much of a closed time is not believed when only the wall clock knows of it.
const TOLERANCE: Duration = Duration::from_secs(60 * 60);

/// Where a [`FileStore`](crate::FileStore) takes its time from. Another one than the system's is for tests.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The time since some moment before the store was opened. Never goes back.
    fn monotonic(&self) -> Duration;

    /// The time since 1970, as the machine believes it.
    fn wall(&self) -> Duration;

    /// Which start of the machine this is, and the time since then; `None` where nobody tells.
    fn machine(&self) -> Option<(MachineStart, Duration)>;
}

/// Tells one start of a machine from every other.
pub type MachineStart = [u8; 36];

/// The system's clocks; `tokio::time`, which a test may pause, within a run.
#[derive(Debug)]
pub(super) struct SystemClock {
    start: Instant,
}

impl SystemClock {
    pub(super) fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn wall(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    fn machine(&self) -> Option<(MachineStart, Duration)> {
        // Linux only; elsewhere there are no such files. Both are the machine's, in containers too.
        let start = fs::read("/proc/sys/kernel/random/boot_id").ok()?;
        let up = fs::read_to_string("/proc/uptime").ok()?;
        let up: f64 = up.split_whitespace().next()?.parse().ok()?;
        Some((*start.first_chunk()?, Duration::try_from_secs_f64(up).ok()?))
    }
}

pub(super) fn nanos(duration: Duration) -> Time {
    u64::try_from(duration.as_nanos()).unwrap_or(NEVER)
}

/// What the file remembers of the store's time. Version 1, little-endian: version (1), CRC-32 of what follows (4), run
/// (8), the store's time (8), wall (8), 1 if the machine's start is known or 0 (1), the start (36), the time since then
/// (8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// How often the store was opened.
    pub(super) run: u64,
    pub(super) time: Time,
    wall: Time,
    machine: Option<(MachineStart, Time)>,
}

const VERSION: u8 = 1;

impl Stamp {
    /// The wall clock is not believed where it is behind `wall`.
    fn take(run: u64, time: Time, wall: Time, clock: &dyn Clock) -> Self {
        Self {
            run,
            time,
            wall: nanos(clock.wall()).max(wall),
            machine: clock.machine().map(|(start, up)| (start, nanos(up))),
        }
    }

    /// How long the store was closed, as far as it can be believed.
    fn closed_for(&self, opened: &Opening) -> Time {
        let by_the_wall = opened.wall.saturating_sub(self.wall);
        match (&self.machine, &opened.machine) {
            // A container may count its own uptime and name its host's start: then the two are not of one clock, and
            // what the wall clock does not know of at all is not believed.
            (Some((then, since)), Some((now, up))) if then == now => {
                let by_the_machine = up.saturating_sub(*since);
                by_the_machine.min(by_the_wall.saturating_add(nanos(TOLERANCE)))
            }
            _ => by_the_wall.saturating_sub(nanos(TOLERANCE)),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, 0, 0, 0, 0];
        for number in [self.run, self.time, self.wall] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(self.machine.is_some().into());
        let (start, up) = self.machine.unwrap_or(([0; 36], 0));
        out.extend_from_slice(&start);
        out.extend_from_slice(&up.to_le_bytes());
        let checksum = crc32fast::hash(&out[5..]);
        out[1..5].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        let mut rest = Reader(bytes);
        let [version] = rest.take()?;
        if version > VERSION {
            return Err(StoreErrorKind::NewerVersion.into());
        }
        let checksum = u32::from_le_bytes(rest.take()?);
        if version != VERSION || checksum != crc32fast::hash(rest.0) {
            return Err(corrupt("the checksum of the store's time does not match"));
        }
        let (run, time, wall) = (rest.number()?, rest.number()?, rest.number()?);
        let [known] = rest.take()?;
        let machine = (rest.take()?, rest.number()?);
        Ok(Self {
            run,
            time,
            wall,
            machine: (known == 1).then_some(machine),
        })
    }
}

/// What the clocks said when a store was to be opened: all of them at one moment, on the thread that asked, whose time
/// a test may have paused. How long the opening takes is counted by the clock from then on.
#[derive(Debug)]
pub(super) struct Opening {
    clock: Arc<dyn Clock>,
    monotonic: Duration,
    wall: Time,
    machine: Option<(MachineStart, Time)>,
}

impl Opening {
    pub(super) fn now(clock: Arc<dyn Clock>) -> Self {
        Self {
            monotonic: clock.monotonic(),
            wall: nanos(clock.wall()),
            machine: clock.machine().map(|(start, up)| (start, nanos(up))),
            clock,
        }
    }

    /// The first stamp of a file.
    pub(super) fn stamp(&self) -> Stamp {
        Stamp {
            run: 0,
            // Not 0: nothing is older than the store.
            time: 1,
            wall: self.wall,
            machine: self.machine,
        }
    }
}

/// The time of one run of a store.
#[derive(Debug)]
pub(super) struct StoreTime {
    run: u64,
    clock: Arc<dyn Clock>,
    /// The store's time when the run began, and the clock's.
    began: Time,
    monotonic: Duration,
    /// The store's time and the wall clock's that the run before left.
    left: (Time, Time),
}

impl StoreTime {
    /// The run after the one that left `stamp`.
    pub(super) fn resume(stamp: &Stamp, opening: Opening) -> Self {
        Self {
            run: stamp.run + 1,
            began: stamp.time.saturating_add(stamp.closed_for(&opening)),
            monotonic: opening.monotonic,
            left: (stamp.time, stamp.wall),
            clock: opening.clock,
        }
    }

    pub(super) fn run(&self) -> u64 {
        self.run
    }

    pub(super) fn began(&self) -> Time {
        self.began
    }

    pub(super) fn now(&self) -> Time {
        let elapsed = self.clock.monotonic().saturating_sub(self.monotonic);
        self.began.saturating_add(nanos(elapsed))
    }

    /// What is to be remembered at `now`, which was this store's time a moment ago.
    pub(super) fn stamp(&self, now: Time) -> Stamp {
        // A wall clock that is behind for one run and right in the next would leap in between.
        let (time, wall) = self.left;
        let wall = wall.saturating_add(now.saturating_sub(time));
        Stamp::take(self.run, now, wall, &*self.clock)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[derive(Debug)]
    struct Set {
        wall: Duration,
        machine: Option<(u8, Duration)>,
    }

    impl Clock for Set {
        fn monotonic(&self) -> Duration {
            Duration::ZERO
        }

        fn wall(&self) -> Duration {
            self.wall
        }

        fn machine(&self) -> Option<(MachineStart, Duration)> {
            self.machine.map(|(start, up)| ([start; 36], up))
        }
    }

    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn closed_for(before: Set, after: Set) -> Duration {
        let stamp = Stamp::take(1, 1000, 0, &before);
        let resumed = StoreTime::resume(&stamp, Opening::now(Arc::new(after)));
        assert_eq!(resumed.run(), 2);
        Duration::from_nanos(resumed.now() - 1000)
    }

    #[test]
    fn a_machine_that_was_not_restarted_tells_exactly_how_long_the_store_was_closed() {
        let before = Set {
            wall: DAY,
            machine: Some((1, HOUR)),
        };
        for wall in [Duration::ZERO, DAY, DAY * 9000] {
            let after = Set {
                wall,
                machine: Some((1, HOUR + Duration::from_secs(5))),
            };
            let before = Set { ..before };
            assert_eq!(closed_for(before, after), Duration::from_secs(5));
        }
    }

    #[test]
    fn an_uptime_of_which_the_wall_clock_knows_nothing_is_of_another_clock() {
        let before = Set {
            wall: DAY,
            machine: Some((1, Duration::from_secs(5))),
        };
        let after = Set {
            wall: DAY + Duration::from_secs(60),
            machine: Some((1, DAY * 400)),
        };
        assert_eq!(closed_for(before, after), HOUR + Duration::from_secs(60));
    }

    #[test]
    fn a_wall_clock_that_went_back_or_an_hour_forward_counts_for_nothing() {
        for (then, now) in [(DAY, Duration::ZERO), (DAY, DAY - HOUR), (DAY, DAY), (DAY, DAY + HOUR)] {
            for machine in [None, Some((2, HOUR * 900))] {
                let before = Set {
                    wall: then,
                    machine: Some((1, HOUR)),
                };
                assert_eq!(
                    closed_for(before, Set { wall: now, machine }),
                    Duration::ZERO,
                    "{then:?} {now:?}"
                );
            }
        }
    }

    #[test]
    fn a_day_of_being_switched_off_counts_less_the_tolerance() {
        let before = Set {
            wall: DAY,
            machine: Some((1, HOUR)),
        };
        let after = Set {
            wall: DAY * 2,
            machine: Some((2, HOUR)),
        };
        assert_eq!(closed_for(before, after), DAY - HOUR);
    }

    #[test]
    fn a_stamp_is_read_as_it_was_first_released_and_no_flipped_bit_is_believed() {
        let stamp = Stamp {
            run: 3,
            time: 1_000_000_007,
            wall: 5,
            machine: Some(([b'a'; 36], 8)),
        };
        let golden: &[u8] = include_bytes!("golden/v1-stamp.bin");
        assert_eq!(stamp.encode(), golden);
        assert_eq!(Stamp::decode(golden).unwrap(), stamp);
        for bit in 0..golden.len() * 8 {
            let mut bytes = golden.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            Stamp::decode(&bytes).unwrap_err();
        }
        let unknown = Stamp { machine: None, ..stamp };
        assert_eq!(Stamp::decode(&unknown.encode()).unwrap(), unknown);
    }
}
