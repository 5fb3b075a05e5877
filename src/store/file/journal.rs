//! The journal: what was done to the tables since they were last synced, in a part of the file that is written again
//! and again.
//!
//! A change is durable once its entry is synced, which is one write to blocks that exist: no other sync of the file is
//! as cheap. The tables follow in memory. Once the journal is full they are synced themselves (a checkpoint), which
//! begins a new epoch: entries of earlier ones are of no account any more, and are written over.
//!
//! An entry begins a block of its own, so that none that was acknowledged is ever touched by the write of another, and
//! is written only when the one before is durable. So a reader of the journal knows which entries have to be there: all
//! that others come after. The last one may be torn, then nobody was told of it; see [`sector`].

use std::io;

use super::{
    effects::Effects,
    engine::Backend,
    layout::{BLOCK, Region},
    sector::{self, CONTENT, Place, SECTOR, Sector},
};

/// The most changes to records between two checkpoints. Each may be to another page, and all of these have to be written
/// by the checkpoint: 32 MiB, and by then they fit into half of the memory that [`ENOUGH`](super::commit::ENOUGH) is.
const MAX_CHANGES: usize = 8192;

#[derive(Debug)]
pub(super) struct Journal {
    backend: Backend,
    region: Region,
    epoch: u64,
    salt: u64,
    /// The next entry's.
    number: u32,
    /// Where the next entry goes, from the region's beginning.
    end: u64,
    /// How many changes to records are in it.
    changes: usize,
    /// Kept for its room.
    buffer: Vec<u8>,
}

/// What is in a journal.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    entries: Vec<Vec<u8>>,
    end: u64,
}

/// Why a journal cannot be believed: an entry that was acknowledged is not what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Damaged {
    /// In the file.
    at: u64,
}

impl From<Damaged> for redb::Error {
    fn from(Damaged { at }: Damaged) -> Self {
        Self::Corrupted(format!("its journal was changed at {at}"))
    }
}

impl Journal {
    /// Goes on where the epoch's last entry ends; returns the entries, oldest first.
    pub(super) fn open(backend: &Backend, region: Region, epoch: u64) -> Result<(Self, Vec<Vec<u8>>), redb::Error> {
        let mut bytes = vec![0; region.len as usize];
        backend.read_raw(region.at, &mut bytes)?;
        let Found { entries, end } = scan(&bytes, region.at, epoch)?;
        let mut salt = [0; 8];
        getrandom::fill(&mut salt).map_err(|error| io::Error::other(error.to_string()))?;
        let journal = Self {
            backend: backend.clone(),
            region,
            epoch,
            // Whatever part of a torn entry is where the next one goes, it is never taken for a part of that.
            salt: u64::from_le_bytes(salt),
            number: entries.len() as u32,
            end,
            // Not known of those that are in it.
            changes: if entries.is_empty() { 0 } else { MAX_CHANGES },
            buffer: Vec::new(),
        };
        Ok((journal, entries))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// Whether it is time for a checkpoint. A quarter of it is left for a day when the disk is full and there can be
    /// none.
    pub(super) fn is_due(&self) -> bool {
        self.end > self.region.len / 4 * 3 || self.changes >= MAX_CHANGES
    }

    pub(super) fn has_room_for(&self, effects: &Effects) -> bool {
        let sectors = effects.as_bytes().len().div_ceil(CONTENT);
        let len = ((sectors * SECTOR) as u64).next_multiple_of(BLOCK);
        sectors <= u16::MAX.into() && self.end + len <= self.region.len
    }

    /// Durable when it returns. There has to be room.
    pub(super) fn append(&mut self, effects: &Effects) -> io::Result<()> {
        let entry = effects.as_bytes();
        let at = self.region.at + self.end;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let place = Place {
            epoch: self.epoch,
            salt: self.salt,
            number: self.number,
            index: 0,
            count: 0,
        };
        encode(&mut buffer, at, place, entry);
        self.backend.write_raw(at, &buffer)?;
        self.backend.sync_raw()?;
        self.end += buffer.len() as u64;
        self.number += 1;
        self.changes += effects.changes();
        self.buffer = buffer;
        Ok(())
    }

    /// The epoch that a checkpoint begins.
    pub(super) fn next_epoch(&self) -> u64 {
        self.epoch + 1
    }

    /// All that is in it is in the tables, and they are durable.
    pub(super) fn restart(&mut self) {
        (self.epoch, self.number) = (self.epoch + 1, 0);
        (self.end, self.changes) = (0, 0);
    }
}

/// The blocks of an entry that begins at `at` in the file.
fn encode(out: &mut Vec<u8>, at: u64, place: Place, entry: &[u8]) {
    let count = entry.len().div_ceil(CONTENT) as u16;
    for (index, content) in (0..).zip(entry.chunks(CONTENT)) {
        let at = at + out.len() as u64;
        sector::write(out, at, &Place { index, count, ..place }, content);
    }
    // Whole blocks: a part of one would have to be read first.
    out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
}

/// The entries of an epoch in a journal that begins at `start` in the file.
fn scan(bytes: &[u8], start: u64, epoch: u64) -> Result<Found, Damaged> {
    let sector = |index: usize| {
        let from = index * SECTOR;
        sector::read(start + from as u64, &bytes[from..from + SECTOR])
    };
    let damaged = |index: usize| Damaged {
        at: start + (index * SECTOR) as u64,
    };
    let sectors = bytes.len() / SECTOR;
    let mut entries = Vec::new();
    let mut first = 0;
    while first < sectors {
        let number = entries.len() as u32;
        let head = match sector(first) {
            Sector::Whole(place, _) if (place.epoch, place.number, place.index) == (epoch, number, 0) => place,
            Sector::Damaged => return Err(damaged(first)),
            Sector::Whole(..) | Sector::Empty => break,
        };
        let mut entry = Vec::new();
        let mut whole = true;
        if head.count == 0 || first + usize::from(head.count) > sectors {
            return Err(damaged(first));
        }
        for index in 0..head.count {
            let at = first + usize::from(index);
            match sector(at) {
                Sector::Whole(place, content) if place == (Place { index, ..head }) => entry.extend_from_slice(content),
                Sector::Damaged => return Err(damaged(at)),
                Sector::Whole(..) | Sector::Empty => whole = false,
            }
        }
        if !whole {
            break;
        }
        entries.push(entry);
        first += (usize::from(head.count) * SECTOR).next_multiple_of(BLOCK as usize) / SECTOR;
    }
    // An entry is written when the one before is durable.
    let next = entries.len() as u32;
    for later in first..sectors {
        match sector(later) {
            Sector::Whole(place, _) if place.epoch == epoch && place.number > next => return Err(damaged(first)),
            _ => {}
        }
    }
    let end = (first * SECTOR) as u64;
    Ok(Found { entries, end })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::{Arc, Mutex};

    use super::{
        super::{layout::Layout, medium::Medium},
        *,
    };

    const START: u64 = 4096;

    #[derive(Clone, Debug, Default)]
    struct Bytes(Arc<Mutex<Vec<u8>>>);

    impl Medium for Bytes {
        fn len(&self) -> io::Result<u64> {
            Ok(self.0.lock().unwrap().len() as u64)
        }

        fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
            out.copy_from_slice(&self.0.lock().unwrap()[at as usize..][..out.len()]);
            Ok(())
        }

        fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
            let mut bytes = self.0.lock().unwrap();
            let end = at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at as usize..end].copy_from_slice(data);
            Ok(())
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.lock().unwrap().resize(len as usize, 0);
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }

        fn hold(&self, _: u64) -> io::Result<()> {
            Ok(())
        }
    }

    fn place(epoch: u64, salt: u64, number: u32) -> Place {
        Place {
            epoch,
            salt,
            number,
            index: 0,
            count: 0,
        }
    }

    fn content(number: u32) -> Vec<u8> {
        (0..1000 * (number + 1)).map(|at| (at * 7 + number) as u8).collect()
    }

    /// As `append` leaves it, from `first` on; returns where the next one goes.
    fn write(bytes: &mut [u8], first: usize, entry: Place) -> usize {
        let content = content(entry.number);
        let mut out = Vec::new();
        encode(&mut out, START + (first * SECTOR) as u64, entry, &content);
        bytes[first * SECTOR..][..out.len()].copy_from_slice(&out);
        first + out.len() / SECTOR
    }

    fn epoch_6() -> Vec<u8> {
        let mut bytes = vec![0; 16 * BLOCK as usize];
        let mut at = 0;
        for number in 0..5 {
            at = write(&mut bytes, at, place(6, 1, number));
        }
        bytes
    }

    /// Three entries of epoch 7, after a longer epoch 6, and where each begins.
    fn journal() -> (Vec<u8>, [usize; 4]) {
        let mut bytes = epoch_6();
        let mut begins = [0; 4];
        for number in 0..3 {
            begins[number + 1] = write(&mut bytes, begins[number], place(7, 2, number as u32));
        }
        (bytes, begins)
    }

    fn found(bytes: &[u8]) -> Result<usize, Damaged> {
        scan(bytes, START, 7).map(|found| {
            for (number, entry) in found.entries.iter().enumerate() {
                assert_eq!(*entry, content(number as u32));
            }
            found.entries.len()
        })
    }

    fn sectors_of(number: u32) -> usize {
        content(number).len().div_ceil(CONTENT)
    }

    #[test]
    fn the_entries_of_an_epoch_are_found_in_their_order_and_no_others() {
        let (bytes, begins) = journal();
        assert_eq!(found(&bytes), Ok(3));
        assert_eq!(scan(&bytes, START, 7).unwrap().end, (begins[3] * SECTOR) as u64);
        for epoch in [0, 5, 8] {
            assert_eq!(scan(&bytes, START, epoch).unwrap(), Found::default(), "epoch {epoch}");
        }
        // Tables of before a checkpoint that came before these entries were not kept as a sync promised.
        assert!(scan(&bytes, START, 6).is_err());
        assert_eq!(scan(&vec![0; 8192], START, 0).unwrap(), Found::default());
    }

    #[test]
    fn a_last_entry_of_which_any_sector_was_not_written_was_never_acknowledged() {
        let (whole, begins) = journal();
        for old in [vec![0; whole.len()], epoch_6()] {
            for lost in 1..1 << sectors_of(2) {
                let mut bytes = whole.clone();
                for sector in (0..sectors_of(2)).filter(|sector| lost & (1 << sector) != 0) {
                    let at = (begins[2] + sector) * SECTOR;
                    bytes[at..at + SECTOR].copy_from_slice(&old[at..at + SECTOR]);
                }
                assert_eq!(found(&bytes), Ok(2), "without the sectors {lost:b}");
            }
        }
    }

    #[test]
    fn every_flipped_bit_of_an_acknowledged_entry_is_noticed_even_of_the_last_one() {
        let (whole, begins) = journal();
        for number in 0..3 {
            let from = begins[number as usize] * SECTOR;
            for bit in from * 8..(from + sectors_of(number) * SECTOR) * 8 {
                let mut bytes = whole.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(found(&bytes).is_err(), "bit {bit} of entry {number}");
            }
        }
    }

    #[test]
    fn an_acknowledged_entry_that_is_not_there_any_more_is_noticed_if_others_come_after_it() {
        let (whole, begins) = journal();
        for number in 0..2 {
            let mut bytes = whole.clone();
            bytes[begins[number] * SECTOR..begins[number + 1] * SECTOR].fill(0);
            let at = START + (begins[number] * SECTOR) as u64;
            assert_eq!(found(&bytes), Err(Damaged { at }));
        }
    }

    #[test]
    fn no_part_of_a_torn_entry_is_taken_for_a_part_of_the_one_that_was_written_over_it() {
        let (mut bytes, begins) = journal();
        // Torn: its first sector was not written. Whoever opens the file next has another salt, and goes on there.
        write(&mut bytes, begins[3], place(7, 2, 3));
        bytes[begins[3] * SECTOR..][..SECTOR].fill(0);
        assert_eq!(found(&bytes), Ok(3));
        let torn = bytes.clone();
        write(&mut bytes, begins[3], place(7, 3, 3));
        assert_eq!(found(&bytes), Ok(4));
        let second = (begins[3] + 1) * SECTOR;
        bytes[second..second + SECTOR].copy_from_slice(&torn[second..second + SECTOR]);
        assert_eq!(found(&bytes), Ok(3), "half of the one and half of the other");
    }

    #[test]
    fn every_opening_writes_entries_that_fit_to_no_other_openings() {
        let medium: Arc<dyn Medium> = Arc::new(Bytes::default());
        let backend = Backend::new(Arc::clone(&medium), Layout::make(&medium, 64 << 10, true).unwrap());
        let region = backend.journal().unwrap();
        let torn = |record: &[u8]| {
            let (mut journal, entries) = Journal::open(&backend, region, 0).unwrap();
            let mut effects = Effects::new();
            effects.put(&[1; 32], record);
            journal.append(&effects).unwrap();
            let mut written = vec![0; region.len as usize];
            medium.read(region.at, &mut written).unwrap();
            // Its first sector did not arrive.
            medium.write(region.at, &[0; SECTOR]).unwrap();
            (entries.len(), written)
        };
        let (_, first) = torn(&[1; 1000]);
        let (found, mut second) = torn(&[2; 1000]);
        assert_eq!(found, 0);
        assert_eq!(scan(&second, region.at, 0).unwrap().entries.len(), 1);
        second[SECTOR..2 * SECTOR].copy_from_slice(&first[SECTOR..2 * SECTOR]);
        assert_eq!(scan(&second, region.at, 0).unwrap().entries.len(), 0);
    }

    #[test]
    fn an_entry_begins_a_block_of_its_own() {
        let (_, begins) = journal();
        let block = BLOCK as usize / SECTOR;
        assert!(begins.iter().all(|begin| begin.is_multiple_of(block)), "{begins:?}");
    }
}
