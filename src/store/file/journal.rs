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

#[cfg(test)]
mod tests;

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
    /// Where the last of them begins, and where it ends, from the region's beginning.
    last: u64,
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
    ///
    /// The last one is synced again: of what a sync failed for, the system may show what the medium does not have, and a
    /// later sync would not say so. Were an entry written after it, it would be missed.
    pub(super) fn open(backend: &Backend, region: Region, epoch: u64) -> Result<(Self, Vec<Vec<u8>>), redb::Error> {
        let mut bytes = vec![0; region.len as usize];
        backend.read_raw(region.at, &mut bytes)?;
        let Found { entries, last, end } = scan(&bytes, region.at, epoch)?;
        if last < end {
            backend.write_raw(region.at + last, &bytes[last as usize..end as usize])?;
            backend.sync_raw()?;
        }
        let mut salt = [0; 8];
        getrandom::fill(&mut salt).map_err(io::Error::from)?;
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
    let (mut last, mut first) = (0, 0);
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
        last = first;
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
    let [last, end] = [last, first].map(|sector| (sector * SECTOR) as u64);
    Ok(Found { entries, last, end })
}
