//! What is where in a file: who wrote it, then the journal, then redb's pages.
//!
//! | bytes | content |
//! |---|---|
//! | 17 | `tower-idempotency` |
//! | 1 | version, 3 |
//! | 4 | CRC-32 of the version and of the length of the journal |
//! | 8 | the length of the journal, a multiple of 4096, little-endian |
//! | | zeros up to 4096: the head |
//! | | the [journal](super::journal) |
//! | | the tables: a redb file, with [checksums](super::pages) under its pages |
//!
//! Version 2 had no checksums under the pages, and the CRC-32 was of the length alone.
//! Version 1 was a redb file alone. It is kept as it is: it has no journal, so each change syncs redb's own pages.

use std::{io, sync::Arc};

use super::medium::Medium;

/// What a file begins with, and the value of its table's format.
pub(super) const OURS: &[u8; 17] = b"tower-idempotency";
const VERSION: u8 = 3;
const WITHOUT_CHECKSUMS: u8 = 2;

/// A file of version 1 begins with what a redb file begins with.
const REDB: &[u8; 9] = b"redb\x1A\x0A\xA9\x0D\x0A";

/// The head's length, and what everything after it is aligned to: no write of one thing touches a block of another.
pub(super) const BLOCK: u64 = 4096;

const HEAD: usize = 30;

/// Where the journal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) at: u64,
    pub(super) len: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// `None` in a file of version 1.
    pub(super) journal: Option<Region>,
    /// Where redb's pages begin.
    pub(super) tables: u64,
    /// Whether they have checksums of ours.
    pub(super) checked: bool,
}

/// Why a file has no layout.
#[derive(Debug)]
pub(super) enum Unknown {
    NotOurs,
    Newer(u8),
    Damaged,
    Io(io::Error),
}

impl Layout {
    fn new(journal: u64, checked: bool) -> Self {
        let journal = Region {
            at: BLOCK,
            len: journal,
        };
        Self {
            journal: Some(journal),
            tables: journal.at + journal.len,
            checked,
        }
    }

    /// Lays out an empty medium. It is whole when its tables are synced.
    pub(super) fn make(medium: &Arc<dyn Medium>, journal: u64, checked: bool) -> io::Result<Self> {
        let layout = Self::new(journal.max(1).next_multiple_of(BLOCK), checked);
        // Every block is written once now, so that later a sync has nothing to do but to write one again.
        let zeros = vec![0; 1 << 20];
        let mut at = 0;
        while at < layout.tables {
            let some = (layout.tables - at).min(zeros.len() as u64);
            medium.write(at, &zeros[..some as usize])?;
            at += some;
        }
        medium.write(0, &layout.encode())?;
        Ok(layout)
    }

    fn encode(&self) -> Vec<u8> {
        let journal = self.journal.map_or(0, |journal| journal.len).to_le_bytes();
        let version = if self.checked { VERSION } else { WITHOUT_CHECKSUMS };
        let checksum = checksum(version, &journal).to_le_bytes();
        [&OURS[..], &[version], &checksum, &journal].concat()
    }

    pub(super) fn read(medium: &Arc<dyn Medium>) -> Result<Self, Unknown> {
        let len = medium.len().map_err(Unknown::Io)?;
        let mut head = vec![0; len.min(HEAD as u64) as usize];
        medium.read(0, &mut head).map_err(Unknown::Io)?;
        Self::decode(&head, len)
    }

    fn decode(head: &[u8], len: u64) -> Result<Self, Unknown> {
        if head.starts_with(REDB) {
            return Ok(Self {
                journal: None,
                tables: 0,
                checked: false,
            });
        }
        let Some(rest) = head.strip_prefix(OURS) else {
            return Err(Unknown::NotOurs);
        };
        let version = rest.first().copied().unwrap_or(VERSION);
        if version > VERSION {
            return Err(Unknown::Newer(version));
        }
        let Some((checksum, journal)) = rest.get(1..13).and_then(|rest| rest.split_first_chunk::<4>()) else {
            return Err(Unknown::Damaged);
        };
        let whole = u32::from_le_bytes(*checksum) == self::checksum(version, journal);
        let (Some(journal), WITHOUT_CHECKSUMS..=VERSION, true) = (journal.first_chunk(), version, whole) else {
            return Err(Unknown::Damaged);
        };
        let journal = u64::from_le_bytes(*journal);
        // Where tables should be there is no more file. redb would begin anew on what is left.
        let tables = len.saturating_sub(BLOCK).saturating_sub(journal);
        // The first page of theirs, and its checksum.
        let least = if version == VERSION { 2 * BLOCK } else { 1 };
        if journal == 0 || journal % BLOCK != 0 || tables < least {
            return Err(Unknown::Damaged);
        }
        Ok(Self::new(journal, version == VERSION))
    }
}

/// No flipped bit makes one version of the other.
fn checksum(version: u8, journal: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    if version != WITHOUT_CHECKSUMS {
        hasher.update(&[version]);
    }
    hasher.update(journal);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Versions 2 and 3 as they were first released, with a journal of 8 MiB. These bytes are on disks: they never
    /// change.
    const VERSION_2: &[u8] = include_bytes!("golden/v2-head.bin");
    const HEAD_OF_8_MIB: &[u8] = include_bytes!("golden/v3-head.bin");

    #[test]
    fn a_head_is_written_and_read_as_it_was_first_released() {
        for (head, checked) in [(VERSION_2, false), (HEAD_OF_8_MIB, true)] {
            let layout = Layout::new(8 << 20, checked);
            assert_eq!(layout.encode(), head);
            assert_eq!(Layout::decode(head, 10 << 20).unwrap(), layout);
            let journal = layout.journal.unwrap();
            assert_eq!(
                (journal.at, journal.len, layout.tables),
                (4096, 8 << 20, (8 << 20) + 4096)
            );
        }
    }

    #[test]
    fn a_file_of_version_1_has_no_journal() {
        let layout = Layout::decode(b"redb\x1A\x0A\xA9\x0D\x0A and so on", 10 << 20).unwrap();
        assert_eq!((layout.journal, layout.tables), (None, 0));
    }

    #[test]
    fn no_flipped_bit_of_a_head_is_believed() {
        let bits = 0..HEAD_OF_8_MIB.len() * 8;
        for (head, bit) in bits.flat_map(|bit| [(VERSION_2, bit), (HEAD_OF_8_MIB, bit)]) {
            let mut bytes = head.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = Layout::decode(&bytes, 10 << 20).unwrap_err();
            match bit / 8 {
                0..17 => assert!(matches!(error, Unknown::NotOurs), "bit {bit}: {error:?}"),
                17 => assert!(
                    matches!(error, Unknown::Newer(_) | Unknown::Damaged),
                    "bit {bit}: {error:?}"
                ),
                _ => assert!(matches!(error, Unknown::Damaged), "bit {bit}: {error:?}"),
            }
        }
    }

    #[test]
    fn a_journal_of_no_length_is_damage_and_the_least_of_tables_is_enough() {
        for (checked, least) in [(false, 1), (true, 2 * BLOCK)] {
            let head = |journal| Layout::new(journal, checked).encode();
            let whole = |journal, tables| Layout::decode(&head(journal), BLOCK + journal + tables).is_ok();
            assert!(whole(BLOCK, least) && !whole(BLOCK, least - 1));
            assert!(!whole(0, 1 << 20) && !whole(BLOCK + 1, 1 << 20));
        }
    }

    #[test]
    fn a_file_that_ends_before_its_tables_is_damaged() {
        for len in [17, 29, 4096, (8 << 20) + 4096] {
            let head = &HEAD_OF_8_MIB[..HEAD_OF_8_MIB.len().min(len)];
            assert!(
                matches!(Layout::decode(head, len as u64), Err(Unknown::Damaged)),
                "{len}"
            );
        }
    }
}
