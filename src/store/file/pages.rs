//! Checksums under redb's pages: a bit that flipped in what leads to a record must not hide it. redb has checksums of
//! its own, and reads them only when it is told to verify all of a file.
//!
//! After the journal come groups: a block of checksums, then the up to 1,024 pages of 4 KiB that they are of. Numbers
//! are little-endian.
//!
//! | | |
//! |---|---|
//! | a page's checksum | 4 bytes, at 4 times its place in the group: CRC-32 of its number (8) and its bytes |
//! | page 0 | redb's head alone, in the first 508 bytes; then 4 bytes: CRC-32 of 0 (8) and those |
//!
//! A page that something durable leads to is not written again before that is led to no more, so its checksum stays,
//! whatever of a block of them is written when power is lost: a sector is written wholly or not at all. What nothing
//! leads to is not read. redb's head is written in its place, so it shares a sector with its checksum.

use std::{
    error::Error,
    fmt, io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{engine::Backend, layout::BLOCK, sector::SECTOR};

const SUM: usize = 4;
const PAGE: usize = BLOCK as usize;
/// Pages of a group.
const GROUP: u64 = BLOCK / SUM as u64;
/// Bytes of redb's head that have room beside their checksum.
const HEAD: usize = SECTOR - SUM;

#[derive(Debug, Default)]
pub(super) struct Pages {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    head: Option<[u8; SECTOR]>,
    /// Read when a page of the group is.
    groups: Vec<Option<Group>>,
}

#[derive(Debug)]
struct Group {
    sums: Vec<u8>,
    /// Whether there are newer ones than on the medium.
    changed: bool,
}

/// A page, or the checksum it has, is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChangedPage {
    /// In the file.
    at: u64,
}

impl fmt::Display for ChangedPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its page at {} was changed since it was written", self.at)
    }
}

impl Error for ChangedPage {}

impl ChangedPage {
    /// If that is the error.
    pub(super) fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

/// The bytes of so many pages with their checksums, and back.
pub(super) fn with_checksums(len: u64) -> u64 {
    len + len.div_ceil(GROUP * BLOCK) * BLOCK
}

pub(super) fn without_checksums(len: u64) -> u64 {
    let blocks = len / BLOCK;
    (blocks - blocks.div_ceil(GROUP + 1)) * BLOCK
}

/// Where a page is, from the beginning of the first group.
fn place(number: u64) -> u64 {
    (number + number / GROUP + 1) * BLOCK
}

fn place_of_sums(group: u64) -> u64 {
    group * (GROUP + 1) * BLOCK
}

fn checksum(number: u64, bytes: &[u8]) -> [u8; SUM] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize().to_le_bytes()
}

/// The parts of `len` bytes of pages that are each in one group: the first page's number, and where in those bytes.
fn parts(offset: u64, len: usize) -> io::Result<impl Iterator<Item = (u64, std::ops::Range<usize>)>> {
    if !offset.is_multiple_of(BLOCK) || !len.is_multiple_of(PAGE) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "these are no whole pages"));
    }
    let mut from = 0;
    Ok(std::iter::from_fn(move || {
        let number = offset / BLOCK + (from / PAGE) as u64;
        let to = len.min(from + (GROUP - number % GROUP) as usize * PAGE);
        let part = from..to;
        from = to;
        (!part.is_empty()).then_some((number, part))
    }))
}

impl Pages {
    /// No method leaves it half changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever reads a page that is being written gets an error: redb has none that does.
    pub(super) fn read(&self, raw: &Backend, tables: u64, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if offset < BLOCK {
            return self.read_head(raw, tables, offset as usize, out);
        }
        for (first, part) in parts(offset, out.len())? {
            let out = &mut out[part];
            raw.read_raw(tables + place(first), out)?;
            self.load(raw, tables, first / GROUP)?;
            for (number, page) in (first..).zip(out.chunks(PAGE)) {
                if self
                    .state()
                    .sum(number)
                    .is_none_or(|sum| *sum != checksum(number, page))
                {
                    let at = tables + place(number);
                    return Err(io::Error::other(ChangedPage { at }));
                }
            }
        }
        Ok(())
    }

    /// The checksums follow with the next [`flush`](Self::flush).
    pub(super) fn write(&self, raw: &Backend, tables: u64, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset < BLOCK {
            return self.write_head(raw, tables, offset as usize, data);
        }
        for (first, part) in parts(offset, data.len())? {
            let data = &data[part];
            self.load(raw, tables, first / GROUP)?;
            raw.write_raw(tables + place(first), data)?;
            for (number, page) in (first..).zip(data.chunks(PAGE)) {
                let new = checksum(number, page);
                if let Some(sum) = self.state().sum_mut(number) {
                    *sum = new;
                }
            }
        }
        Ok(())
    }

    /// Before a sync that makes pages durable.
    pub(super) fn flush(&self, raw: &Backend, tables: u64) -> io::Result<()> {
        let groups = self.state().groups.len();
        for group in 0..groups {
            let Some(sums) = self.state().take_changed(group) else {
                continue;
            };
            let written = raw.write_raw(tables + place_of_sums(group as u64), &sums);
            if written.is_err() {
                self.state().still_changed(group);
                return written;
            }
        }
        Ok(())
    }

    /// The medium has room for the checksums of so many bytes of pages.
    pub(super) fn set_len(&self, len: u64) {
        self.state().groups.truncate(len.div_ceil(GROUP * BLOCK) as usize);
    }

    fn load(&self, raw: &Backend, tables: u64, group: u64) -> io::Result<()> {
        let at = group as usize;
        if self.state().groups.get(at).is_some_and(Option::is_some) {
            return Ok(());
        }
        let mut sums = vec![0; PAGE];
        raw.read_raw(tables + place_of_sums(group), &mut sums)?;
        let mut state = self.state();
        if state.groups.len() <= at {
            state.groups.resize_with(at + 1, || None);
        }
        // Somebody else may have been faster, and have changed them by now.
        if let Some(missing @ None) = state.groups.get_mut(at) {
            *missing = Some(Group { sums, changed: false });
        }
        Ok(())
    }

    fn head(raw: &Backend, tables: u64) -> io::Result<[u8; SECTOR]> {
        let mut head = [0; SECTOR];
        raw.read_raw(tables + place(0), &mut head)?;
        Ok(head)
    }

    fn read_head(&self, raw: &Backend, tables: u64, offset: usize, out: &mut [u8]) -> io::Result<()> {
        let head = Self::head(raw, tables)?;
        let (content, sum) = head.split_at(HEAD);
        if sum != checksum(0, content) {
            let at = tables + place(0);
            return Err(io::Error::other(ChangedPage { at }));
        }
        out.copy_from_slice(part_of_head(content.get(offset..offset + out.len()))?);
        Ok(())
    }

    fn write_head(&self, raw: &Backend, tables: u64, offset: usize, data: &[u8]) -> io::Result<()> {
        let known = self.state().head;
        let mut head = match known {
            Some(head) => head,
            // Who writes it has read it, if there was one.
            None => Self::head(raw, tables)?,
        };
        let (content, sum) = head.split_at_mut(HEAD);
        part_of_head(content.get_mut(offset..offset + data.len()))?.copy_from_slice(data);
        sum.copy_from_slice(&checksum(0, content));
        raw.write_raw(tables + place(0), &head)?;
        self.state().head = Some(head);
        Ok(())
    }
}

fn part_of_head<T>(part: Option<T>) -> io::Result<T> {
    part.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "redb's head is longer than it was"))
}

impl State {
    fn sum(&self, number: u64) -> Option<&[u8; SUM]> {
        let group = self.groups.get((number / GROUP) as usize)?.as_ref()?;
        group.sums.as_chunks().0.get((number % GROUP) as usize)
    }

    fn sum_mut(&mut self, number: u64) -> Option<&mut [u8; SUM]> {
        let group = self.groups.get_mut((number / GROUP) as usize)?.as_mut()?;
        group.changed = true;
        group.sums.as_chunks_mut().0.get_mut((number % GROUP) as usize)
    }

    /// If there are newer ones than on the medium.
    fn take_changed(&mut self, group: usize) -> Option<Vec<u8>> {
        let group = self.groups.get_mut(group)?.as_mut()?;
        std::mem::take(&mut group.changed).then(|| group.sums.clone())
    }

    fn still_changed(&mut self, group: usize) {
        if let Some(Some(group)) = self.groups.get_mut(group) {
            group.changed = true;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// As first released. These are on disks: they never change.
    #[test]
    fn pages_and_checksums_are_where_and_what_they_were_first() {
        assert_eq!(
            [0, 1, 1023, 1024].map(place),
            [1, 2, 1024, 1026].map(|block| block * 4096)
        );
        assert_eq!([0, 1, 2].map(place_of_sums), [0, 1025, 2050].map(|block| block * 4096));
        assert_eq!(checksum(7, &[0x5a; 4096]), [0x5c, 0x18, 0xb7, 0xfc]);
        assert_eq!(checksum(0, &[0x5a; HEAD]), [0x8e, 0x5c, 0x90, 0x69]);
        assert_eq!((GROUP, HEAD), (1024, 508));
    }

    #[test]
    fn a_length_is_the_same_with_and_without_checksums_whatever_it_is() {
        for pages in 0..5000 {
            let raw = with_checksums(pages * BLOCK);
            assert_eq!(without_checksums(raw), pages * BLOCK, "{pages}");
            // Room for the last page, and no more than that.
            if let Some(last) = pages.checked_sub(1) {
                assert_eq!(raw, place(last) + BLOCK, "{pages}");
                assert!(
                    without_checksums(raw - 1) < pages * BLOCK,
                    "a file that was cut is shorter"
                );
            }
        }
    }

    #[test]
    fn what_goes_over_the_end_of_a_group_is_parted_there() {
        let parts = |offset, len| parts(offset, len).map(|parts| parts.collect::<Vec<_>>());
        assert_eq!(parts(4096, 8192).unwrap(), [(1, 0..8192)]);
        let over = [
            (1022, 0..8192),
            (1024, 8192..8192 + (4 << 20)),
            (2048, 8192 + (4 << 20)..16384 + (4 << 20)),
        ];
        assert_eq!(parts(1022 * 4096, 16384 + (4 << 20)).unwrap(), over);
        assert!(parts(100, 4096).is_err() && parts(4096, 100).is_err());
    }
}
