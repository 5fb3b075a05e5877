//! Records that this node lately saw completed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::record::RecordId;

const PLACES: usize = 1 << 16;
/// In a name.
const LONG: u64 = 1;

/// A replay that is expected is a plain read, which costs a server less than a claim. What is expected decides only what is
/// asked first, never what is answered of a sound record; so a place is simply taken by whoever comes last. They are half a
/// mebibyte, for the requests of a minute where there are a thousand a second.
pub(in crate::store) struct Hints(Box<[AtomicU64]>);

impl Hints {
    pub(in crate::store) fn new() -> Self {
        Self((0..PLACES).map(|_| AtomicU64::new(0)).collect())
    }

    pub(in crate::store) fn add(&self, id: &RecordId) {
        let (place, name) = self.place(id);
        expect(place, name);
    }

    /// Of one whose answer is long.
    #[cfg(feature = "redis")]
    pub(in crate::store) fn add_long(&self, id: &RecordId) {
        let (place, name) = self.place(id);
        expect(place, name | LONG);
    }

    #[cfg(feature = "redis")]
    pub(in crate::store) fn forget(&self, id: &RecordId) {
        if self.has(id) {
            self.place(id).0.store(0, Relaxed);
        }
    }

    pub(in crate::store) fn has(&self, id: &RecordId) -> bool {
        let (place, name) = self.place(id);
        place.load(Relaxed) & !LONG == name
    }

    #[cfg(feature = "redis")]
    pub(in crate::store) fn has_long(&self, id: &RecordId) -> bool {
        let (place, name) = self.place(id);
        place.load(Relaxed) == name | LONG
    }

    /// Ids are hashes: any part of one will do.
    fn place(&self, id: &RecordId) -> (&AtomicU64, u64) {
        let [a, b, c, d, e, f, g, h, low, high, ..] = *id.as_bytes();
        let place = usize::from(u16::from_le_bytes([low, high]));
        (&self.0[place], u64::from_le_bytes([a, b, c, d, e, f, g, h]) & !LONG)
    }
}

fn expect(place: &AtomicU64, name: u64) {
    // What is replayed often is known already, and stays where it is in the caches of those who look.
    if place.load(Relaxed) != name {
        place.store(name, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_last_is_expected_and_no_other() {
        let hints = Hints::new();
        let (one, two) = (RecordId::from_bytes([1; 32]), RecordId::from_bytes([2; 32]));
        let mut like_one = [1; 32];
        like_one[0] = 9;
        let like_one = RecordId::from_bytes(like_one);
        hints.add(&one);
        assert!(hints.has(&one) && !hints.has(&two) && !hints.has(&like_one));
        hints.add(&like_one);
        assert!(!hints.has(&one) && hints.has(&like_one), "they share a place");
        #[cfg(feature = "redis")]
        {
            assert!(!hints.has_long(&like_one));
            hints.add_long(&like_one);
            assert!(hints.has(&like_one) && hints.has_long(&like_one) && !hints.has_long(&one));
            hints.forget(&one);
            assert!(hints.has(&like_one), "another one's place");
            hints.forget(&like_one);
            assert!(!hints.has(&like_one));
        }
    }
}
