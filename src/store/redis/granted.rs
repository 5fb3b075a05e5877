//! Records in progress that this node lately wrote.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::record::{HEAD, NAME, name_of};
use crate::record::{Lease, Owner};

const PLACES: usize = 1 << 13;

type InProgress = [u8; HEAD];

/// Who completes a record compares it with these bytes, and does not have to read it first. A place is simply taken by
/// whoever comes last: a record that is not here is completed by a script. They are 608 KiB.
pub(super) struct Granted(Box<[Mutex<InProgress>]>);

impl Granted {
    pub(super) fn new() -> Self {
        Self((0..PLACES).map(|_| Mutex::new([0; HEAD])).collect())
    }

    pub(super) fn add(&self, owner: &Owner, record: &InProgress) {
        *self.place(owner) = *record;
    }

    pub(super) fn get(&self, lease: &Lease) -> Option<InProgress> {
        let record = *self.place(&lease.owner);
        (record[NAME] == name_of(lease)).then_some(record)
    }

    /// Owners are random: any part of one will do.
    fn place(&self, owner: &Owner) -> MutexGuard<'_, InProgress> {
        let [low, high, ..] = *owner.as_bytes();
        let place = usize::from(u16::from_le_bytes([low, high])) % PLACES;
        self.0[place].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::RecordId;

    fn in_progress(owner: Owner, fence: u8) -> InProgress {
        let mut record = [7; HEAD];
        record[NAME].fill(0);
        record[2..18].copy_from_slice(owner.as_bytes());
        record[18] = fence;
        record
    }

    #[test]
    fn what_was_granted_last_in_a_place_is_known_and_no_other_lease() {
        let granted = Granted::new();
        let (one, two) = (Owner::from_bytes([1; 16]), Owner::from_bytes([2; 16]));
        let mut like_one = [9; 16];
        like_one[..2].copy_from_slice(&[1; 2]);
        let like_one = Owner::from_bytes(like_one);
        let lease = |owner, fence| Lease::new(RecordId::from_bytes([0; 32]), owner, fence);
        granted.add(&one, &in_progress(one, 3));
        assert_eq!(granted.get(&lease(one, 3)), Some(in_progress(one, 3)));
        for other in [lease(one, 2), lease(two, 3), lease(like_one, 3)] {
            assert_eq!(granted.get(&other), None, "{other:?}");
        }
        granted.add(&like_one, &in_progress(like_one, 3));
        assert_eq!(granted.get(&lease(one, 3)), None, "they share a place");
        assert_eq!(granted.get(&lease(like_one, 3)), Some(in_progress(like_one, 3)));
    }

    #[test]
    fn of_a_place_that_nobody_took_nothing_is_known() {
        let nobody = Lease::new(RecordId::from_bytes([0; 32]), Owner::from_bytes([0; 16]), 1);
        assert_eq!(Granted::new().get(&nobody), None);
    }
}
