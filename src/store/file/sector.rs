//! A journal's sectors: the units that a medium writes wholly or not at all, each with a checksum of its own.
//!
//! So a sector that does not fit its checksum was changed after it was written, and one that was not reached by a write
//! is what it was before: zeros, or a sector of an earlier entry. That is what tells an entry that was never whole from
//! one that was, and is damaged.
//!
//! Version 1, all numbers little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 4 | CRC-32 of the sector's place in the file (8, little-endian) and of what follows |
//! | 8 | the epoch: which checkpoint the entry comes after |
//! | 8 | a random number of whoever wrote it |
//! | 4 | the entry's number in its epoch, from 0 |
//! | 2 | the sector's number in its entry, from 0 |
//! | 2 | how many sectors the entry has |
//! | 2 | how many bytes of the entry are in this sector |
//! | 482 | those, then zeros |

use super::frame::Reader;
use crate::error::StoreError;

pub(super) const SECTOR: usize = 512;
const HEAD: usize = 30;
/// What fits into one.
pub(super) const CONTENT: usize = SECTOR - HEAD;

/// Where a sector belongs. All sectors of an entry differ in `index` alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) epoch: u64,
    pub(super) salt: u64,
    pub(super) number: u32,
    pub(super) index: u16,
    pub(super) count: u16,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sector<'a> {
    /// Nothing was ever written there.
    Empty,
    Whole(Place, &'a [u8]),
    /// It was changed since it was written.
    Damaged,
}

/// Appends the sector, whose first byte is at `at` in the file. `content` fits.
pub(super) fn write(out: &mut Vec<u8>, at: u64, place: &Place, content: &[u8]) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&place.epoch.to_le_bytes());
    out.extend_from_slice(&place.salt.to_le_bytes());
    out.extend_from_slice(&place.number.to_le_bytes());
    out.extend_from_slice(&place.index.to_le_bytes());
    out.extend_from_slice(&place.count.to_le_bytes());
    out.extend_from_slice(&(content.len() as u16).to_le_bytes());
    out.extend_from_slice(content);
    out.resize(start + SECTOR, 0);
    let checksum = checksum(at, &out[start + 4..]);
    out[start..start + 4].copy_from_slice(&checksum.to_le_bytes());
}

pub(super) fn read(at: u64, bytes: &[u8]) -> Sector<'_> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Sector::Empty;
    }
    decode(at, bytes).ok().flatten().unwrap_or(Sector::Damaged)
}

fn decode(at: u64, bytes: &[u8]) -> Result<Option<Sector<'_>>, StoreError> {
    let mut rest = Reader(bytes);
    if u32::from_le_bytes(rest.take()?) != checksum(at, rest.0) {
        return Ok(None);
    }
    let place = Place {
        epoch: rest.number()?,
        salt: rest.number()?,
        number: u32::from_le_bytes(rest.take()?),
        index: u16::from_le_bytes(rest.take()?),
        count: u16::from_le_bytes(rest.take()?),
    };
    let length = u16::from_le_bytes(rest.take()?);
    Ok(rest.0.get(..length.into()).map(|content| Sector::Whole(place, content)))
}

fn checksum(at: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&at.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place {
        epoch: 7,
        salt: 0x0123_4567_89ab_cdef,
        number: 5,
        index: 2,
        count: 3,
    };

    /// Version 1 as it was first released, at 8192 in its file. These bytes are on disks: they never change.
    const GOLDEN: &[u8] = include_bytes!("golden/v1-sector.bin");

    #[test]
    fn a_sector_is_written_and_read_as_it_was_first_released() {
        let mut out = Vec::new();
        write(&mut out, 8192, &PLACE, b"the end of an entry");
        assert_eq!(out, GOLDEN);
        assert_eq!(read(8192, GOLDEN), Sector::Whole(PLACE, b"the end of an entry"));
    }

    #[test]
    fn a_sector_is_whole_empty_or_damaged_and_belongs_where_it_was_written() {
        assert_eq!(read(8192, &[0; SECTOR]), Sector::Empty);
        assert_eq!(read(8704, GOLDEN), Sector::Damaged);
        for bit in 0..SECTOR * 8 {
            let mut bytes = GOLDEN.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(8192, &bytes), Sector::Damaged, "bit {bit}");
        }
    }
}
