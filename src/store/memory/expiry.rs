//! When to look at which record again, in O(1) for each step and without a sweep.
//!
//! Deadlines that are equally far away are reached in the order in which they were set, so each distance has its own
//! queue and only the fronts are ever looked at. A deadline that is no longer wanted is marked in its place, found by
//! the ticket that its record holds.

use std::collections::VecDeque;

use super::{NEVER, Time};
use crate::record::RecordId;

/// Distances that get a queue of their own at one time: a few leases and retentions in practice. More of them share the
/// queue of the next longer one, or of the longest, where a record may be removed late but never early.
const MAX_CLASSES: usize = 32;

pub(super) struct Expiry {
    classes: Vec<Class>,
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
pub(super) struct Ticket {
    class: u8,
    number: u64,
}

const CANCELLED: Time = 0;

impl Default for Expiry {
    fn default() -> Self {
        Self {
            classes: Vec::new(),
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
        let index = self.class(distance);
        let class = &mut self.classes[index];
        let number = class.first + class.queue.len() as u64;
        class.queue.push_back(Entry { at, id });
        self.next = self.next.min(at);
        Some(Ticket {
            class: index as u8,
            number,
        })
    }

    fn class(&mut self, distance: Time) -> usize {
        if let Some(found) = self.classes.iter().position(|class| class.distance == distance) {
            return found;
        }
        if self.classes.len() < MAX_CLASSES {
            self.classes.push(Class {
                distance,
                queue: VecDeque::new(),
                first: 0,
                cancelled: 0,
            });
            return self.classes.len() - 1;
        }
        if let Some(empty) = self.classes.iter().position(|class| class.queue.is_empty()) {
            self.classes[empty].distance = distance;
            return empty;
        }
        // Among the shorter ones, which come last, the longest is the least wrong.
        let choice = |&index: &usize| match self.classes[index].distance {
            longer if longer >= distance => (0, longer),
            shorter => (1, NEVER - shorter),
        };
        (0..self.classes.len()).min_by_key(choice).unwrap_or_default()
    }

    /// Forgets a deadline. `moved` is told of every ticket that changes its number.
    pub(super) fn cancel(&mut self, ticket: Ticket, moved: impl FnMut(&RecordId, Ticket)) {
        let class = &mut self.classes[usize::from(ticket.class)];
        let place = ticket.number.checked_sub(class.first).map(|place| place as usize);
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
            class.compact(ticket.class, moved);
        }
    }

    /// The next record whose deadline has come, from any queue. Its ticket is used up.
    pub(super) fn pop(&mut self, now: Time) -> Option<RecordId> {
        if now < self.next {
            return None;
        }
        let due = self.classes.iter_mut().find_map(|class| {
            let due = class.queue.front().is_some_and(|entry| entry.at <= now);
            let entry = if due { class.queue.pop_front() } else { None }?;
            class.first += 1;
            class.trim();
            Some(entry.id)
        });
        if due.is_none() {
            let fronts = self.classes.iter().filter_map(|class| class.queue.front());
            self.next = fronts.map(|entry| entry.at).min().unwrap_or(NEVER);
        }
        due
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
            moved(&entry.id, Ticket { class, number });
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
    fn where_there_is_no_queue_left_the_next_longer_one_is_shared() {
        let mut expiry = Expiry::default();
        for number in 1..=MAX_CLASSES as u64 {
            expiry.set(id(number), 0, 100 * number);
        }
        let mut shared = |distance| {
            let ticket = expiry.set(id(distance), 0, distance).unwrap();
            expiry.classes[usize::from(ticket.class)].distance
        };
        assert_eq!((shared(50), shared(150), shared(3100)), (100, 200, 3100));
        assert_eq!(shared(5000), 3200, "of those that are too short, the longest");
    }

    #[test]
    fn more_distances_than_queues_may_be_late_but_never_early() {
        let mut expiry = Expiry::default();
        for number in 0..1000 {
            expiry.set(id(number), 0, 1 + number);
        }
        assert_eq!(expiry.classes.len(), MAX_CLASSES);
        for now in 0..1000 {
            while let Some(popped) = expiry.pop(now) {
                let number = u64::from_le_bytes(popped.as_bytes()[..8].try_into().unwrap());
                assert!(number < now, "{number} came early");
            }
        }
    }

    proptest! {
        /// Against a plain map as the model: what is set and not cancelled comes once, when it is due.
        #[test]
        fn every_deadline_comes_once_unless_it_was_cancelled(
            steps in proptest::collection::vec((0u8..4, 0u64..40, 0usize..3), 1..400)
        ) {
            let distances = [5, 50, 500];
            let mut expiry = Expiry::default();
            let mut model: HashMap<RecordId, (Time, Ticket)> = HashMap::new();
            let (mut now, mut next) = (1, 0);
            for (step, pick, class) in steps {
                match step {
                    0 | 1 => {
                        next += 1;
                        let ticket = expiry.set(id(next), now, distances[class]).unwrap();
                        model.insert(id(next), (now + distances[class], ticket));
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
