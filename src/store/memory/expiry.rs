//! When to look at which record again, in O(1) for each step and without a sweep.
//!
//! Deadlines that are equally far away are reached in the order in which they were set, so each distance has its own
//! queue and only the fronts are ever looked at. A deadline that is no longer wanted is marked in its place, found by
//! the ticket that its record holds. Distances for which there is no queue left are kept apart, in order, in O(log n).

use std::collections::{BTreeMap, VecDeque};

use super::{NEVER, Time};
use crate::record::RecordId;

/// Distances that get a queue of their own at one time: a few leases and retentions in practice. More of them are kept
/// apart: in the queue of another distance each would be removed as late as the one before it.
const MAX_CLASSES: usize = 32;

pub(super) struct Expiry {
    classes: Vec<Class>,
    /// The deadlines that are in no queue, by their time; the numbers tell those of one time apart.
    apart: BTreeMap<(Time, u64), RecordId>,
    /// How many were ever put there.
    set_apart: u64,
    /// No deadline is before this one; most of the time no queue has to be looked at.
    next: Time,
}

struct Class {
    distance: Time,
    queue: VecDeque<Entry>,
    /// The number of the queue's first entry.
    first: u64,
    cancelled: usize,
}

struct Entry {
    at: Time,
    id: RecordId,
}

/// The place of a record's only deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ticket {
    Queued { class: u8, number: u64 },
    Apart { at: Time, number: u64 },
}

const CANCELLED: Time = 0;

impl Default for Expiry {
    fn default() -> Self {
        Self {
            classes: Vec::new(),
            apart: BTreeMap::new(),
            set_apart: 0,
            next: NEVER,
        }
    }
}

impl Expiry {
    /// Sets a deadline; `None` if it never comes.
    pub(super) fn set(&mut self, id: RecordId, now: Time, distance: Time) -> Option<Ticket> {
        // Time 0 is taken to mark what was cancelled; a nanosecond late is not early.
        let at = now.saturating_add(distance).max(CANCELLED + 1);
        if at == NEVER {
            return None;
        }
        self.next = self.next.min(at);
        let Some(index) = self.class(distance) else {
            let number = self.set_apart;
            self.set_apart += 1;
            self.apart.insert((at, number), id);
            return Some(Ticket::Apart { at, number });
        };
        let class = &mut self.classes[index];
        let number = class.first + class.queue.len() as u64;
        class.queue.push_back(Entry { at, id });
        Some(Ticket::Queued {
            class: index as u8,
            number,
        })
    }

    /// The queue of a distance, if there is one or one is to be had.
    fn class(&mut self, distance: Time) -> Option<usize> {
        if let Some(found) = self.classes.iter().position(|class| class.distance == distance) {
            return Some(found);
        }
        if self.classes.len() < MAX_CLASSES {
            self.classes.push(Class {
                distance,
                queue: VecDeque::new(),
                first: 0,
                cancelled: 0,
            });
            return Some(self.classes.len() - 1);
        }
        let empty = self.classes.iter().position(|class| class.queue.is_empty())?;
        self.classes[empty].distance = distance;
        Some(empty)
    }

    /// Forgets a deadline. `moved` is told of every ticket that changes its number.
    pub(super) fn cancel(&mut self, ticket: Ticket, moved: impl FnMut(&RecordId, Ticket)) {
        let (index, number) = match ticket {
            Ticket::Queued { class, number } => (class, number),
            Ticket::Apart { at, number } => {
                let forgotten = self.apart.remove(&(at, number));
                debug_assert!(forgotten.is_some(), "a ticket without a deadline");
                return;
            }
        };
        let class = &mut self.classes[usize::from(index)];
        let place = number.checked_sub(class.first).map(|place| place as usize);
        let Some(entry) = place.and_then(|place| class.queue.get_mut(place)) else {
            debug_assert!(false, "a ticket without an entry");
            return;
        };
        debug_assert_ne!(entry.at, CANCELLED, "cancelled twice");
        entry.at = CANCELLED;
        class.cancelled += 1;
        class.trim();
        // At most as many cancelled entries as live ones stay behind a long-lived first one.
        if class.cancelled > 32 && class.cancelled * 2 > class.queue.len() {
            class.compact(index, moved);
        }
    }

    /// The next record whose deadline has come, wherever it is. Its ticket is used up.
    pub(super) fn pop(&mut self, now: Time) -> Option<RecordId> {
        if now < self.next {
            return None;
        }
        let queued = self.classes.iter_mut().find_map(|class| {
            let due = class.queue.front().is_some_and(|entry| entry.at <= now);
            let entry = if due { class.queue.pop_front() } else { None }?;
            class.first += 1;
            class.trim();
            Some(entry.id)
        });
        let due = queued.or_else(|| self.pop_apart(now));
        if due.is_none() {
            let fronts = self.classes.iter().filter_map(|class| class.queue.front());
            let apart = self.apart.keys().next().map(|(at, _)| *at);
            self.next = fronts.map(|entry| entry.at).chain(apart).min().unwrap_or(NEVER);
        }
        due
    }

    fn pop_apart(&mut self, now: Time) -> Option<RecordId> {
        let first = self.apart.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }
}

impl Class {
    /// Keeps the first entry a live one.
    fn trim(&mut self) {
        while self.queue.front().is_some_and(|entry| entry.at == CANCELLED) {
            self.queue.pop_front();
            self.first += 1;
            self.cancelled -= 1;
        }
    }

    fn compact(&mut self, class: u8, mut moved: impl FnMut(&RecordId, Ticket)) {
        self.queue.retain(|entry| entry.at != CANCELLED);
        self.queue.shrink_to(self.queue.len() * 2);
        self.cancelled = 0;
        for (place, entry) in self.queue.iter().enumerate() {
            let number = self.first + place as u64;
            moved(&entry.id, Ticket::Queued { class, number });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn id(number: u64) -> RecordId {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        RecordId::from_bytes(bytes)
    }

    /// Every record has room for one.
    const _: () = assert!(size_of::<Option<Ticket>>() <= 24);

    #[test]
    fn deadlines_come_when_they_are_due_and_not_before() {
        let mut expiry = Expiry::default();
        expiry.set(id(1), 10, 100);
        expiry.set(id(2), 20, 5);
        assert_eq!(expiry.pop(24), None);
        assert_eq!(expiry.pop(25), Some(id(2)));
        assert_eq!(expiry.pop(109), None);
        assert_eq!(expiry.pop(110), Some(id(1)));
        assert_eq!(expiry.set(id(3), 10, NEVER), None);
        assert_eq!(expiry.pop(NEVER - 1), None);
        // What was cancelled is marked by time 0; a deadline at that time is none of it.
        expiry.set(id(4), 0, 0);
        assert_eq!((expiry.pop(0), expiry.pop(1)), (None, Some(id(4))));
    }

    #[test]
    fn cancelled_deadlines_take_no_room_behind_a_long_one() {
        let mut expiry = Expiry::default();
        let mut tickets = HashMap::from([(id(0), expiry.set(id(0), 0, 60).unwrap())]);
        for number in 1..10_000 {
            tickets.insert(id(number), expiry.set(id(number), number, 60).unwrap());
            let ticket = tickets[&id(number)];
            expiry.cancel(ticket, |id, ticket| {
                tickets.insert(*id, ticket);
            });
            assert!(expiry.classes[0].queue.len() <= 70);
        }
        expiry.cancel(tickets[&id(0)], |_, _| ());
        assert!(expiry.classes[0].queue.is_empty());
    }

    #[test]
    fn forgetting_deadlines_leaves_little_behind_and_moves_few() {
        let mut expiry = Expiry::default();
        let mut tickets: Vec<_> = (0..1000).map(|number| expiry.set(id(number), 0, 60).unwrap()).collect();
        let mut moved = 0;
        let mut cancel = |expiry: &mut Expiry, number: usize| {
            expiry.cancel(tickets[number], |id, ticket| {
                moved += 1;
                tickets[u64::from_le_bytes(id.as_bytes()[..8].try_into().unwrap()) as usize] = ticket;
            });
            moved
        };
        // In their order there is nothing to be moved.
        for number in 0..200 {
            assert_eq!(cancel(&mut expiry, number), 0);
        }
        // Behind one that stays, what is left is halved a few times.
        for number in 201..1000 {
            let moved = cancel(&mut expiry, number);
            let (live, queued) = (1000 - number, expiry.classes[0].queue.len());
            assert!(queued <= 2 * live + 40, "{queued} are queued for {live}");
            assert!(moved <= 1000, "{moved} were moved");
        }
    }

    #[test]
    fn where_there_is_no_queue_left_a_deadline_waits_for_no_other() {
        let mut expiry = Expiry::default();
        for number in 1..=MAX_CLASSES as u64 {
            expiry.set(id(number), 0, 100 * number);
        }
        // Far longer than all of them, and before a shorter one.
        let longest = expiry.set(id(100), 0, 1_000_000).unwrap();
        assert!(matches!(longest, Ticket::Apart { .. }), "{longest:?}");
        expiry.set(id(101), 0, 3200);
        expiry.set(id(102), 0, 3201);
        let mut popped = 0;
        while expiry.pop(3201).is_some() {
            popped += 1;
        }
        assert_eq!(popped, MAX_CLASSES + 2, "all but the longest");
        assert_eq!((expiry.pop(999_999), expiry.pop(1_000_000)), (None, Some(id(100))));
    }

    #[test]
    fn a_distance_gets_the_queue_of_another_as_soon_as_one_is_empty() {
        let mut expiry = Expiry::default();
        for number in 1..=MAX_CLASSES as u64 {
            expiry.set(id(number), 0, 100 * number);
        }
        let apart = expiry.set(id(100), 0, 5000).unwrap();
        assert_eq!(expiry.pop(100), Some(id(1)));
        let queued = expiry.set(id(101), 100, 5000).unwrap();
        assert!(matches!(queued, Ticket::Queued { class: 0, .. }), "{queued:?}");
        expiry.cancel(apart, |_, _| ());
        expiry.cancel(queued, |_, _| ());
        assert!(expiry.apart.is_empty() && expiry.classes[0].queue.is_empty());
    }

    #[test]
    fn more_distances_than_queues_are_neither_late_nor_early() {
        let mut expiry = Expiry::default();
        for number in (0..1000).rev() {
            expiry.set(id(number), 0, 1 + number);
        }
        assert_eq!(expiry.classes.len(), MAX_CLASSES);
        for number in 0..1000 {
            assert_eq!(expiry.pop(number), None);
            assert_eq!(expiry.pop(number + 1), Some(id(number)));
        }
        assert!(expiry.apart.is_empty());
    }

    #[test]
    fn two_deadlines_of_one_record_at_one_time_are_two() {
        let mut expiry = Expiry::default();
        for number in 1..=MAX_CLASSES as u64 {
            expiry.set(id(number), 0, 100 * number);
        }
        // As it is for a moment whenever a deadline is moved.
        let old = expiry.set(id(100), 0, 50).unwrap();
        expiry.set(id(100), 0, 50);
        expiry.cancel(old, |_, _| ());
        assert_eq!(expiry.pop(50), Some(id(100)));
        assert_eq!(expiry.pop(50), None);
    }

    proptest! {
        /// Against a plain map as the model: what is set and not cancelled comes once, when it is due.
        #[test]
        fn every_deadline_comes_once_unless_it_was_cancelled(
            steps in proptest::collection::vec((0u8..4, 0u64..40, 0usize..80), 1..400),
            // A few, or more than there are queues.
            many in proptest::bool::ANY,
        ) {
            let distance = |pick: usize| match many {
                true => 5 + 50 * pick as Time,
                false => [5, 50, 500][pick % 3],
            };
            let mut expiry = Expiry::default();
            let mut model: HashMap<RecordId, (Time, Ticket)> = HashMap::new();
            let (mut now, mut next) = (1, 0);
            for (step, pick, far) in steps {
                match step {
                    0 | 1 => {
                        next += 1;
                        let ticket = expiry.set(id(next), now, distance(far)).unwrap();
                        model.insert(id(next), (now + distance(far), ticket));
                    }
                    2 => {
                        let mut live: Vec<_> = model.keys().copied().collect();
                        live.sort();
                        if let Some(chosen) = live.get(pick as usize % live.len().max(1)) {
                            let (_, ticket) = model.remove(chosen).unwrap();
                            expiry.cancel(ticket, |id, ticket| model.get_mut(id).unwrap().1 = ticket);
                        }
                    }
                    _ => now += pick,
                }
                while let Some(popped) = expiry.pop(now) {
                    let (at, _) = model.remove(&popped).expect("came twice or was cancelled");
                    prop_assert!(at <= now);
                }
                prop_assert!(model.values().all(|(at, _)| *at > now), "a deadline was missed");
            }
        }
    }
}
