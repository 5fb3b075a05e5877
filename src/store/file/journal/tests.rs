#![allow(clippy::unwrap_used)]

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

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
fn a_journal_goes_on_where_its_last_entry_ended_and_a_checkpoint_empties_it() {
    let medium: Arc<dyn Medium> = Arc::new(Bytes::default());
    let backend = Backend::new(Arc::clone(&medium), Layout::make(&medium, 4 << 20, true).unwrap());
    let region = backend.journal().unwrap();
    let entry = |number: u8, records: usize| {
        let mut effects = Effects::new();
        for _ in 0..records {
            effects.put(&[number; 32], &[number]);
        }
        effects
    };
    let (mut journal, _) = Journal::open(&backend, region, 3).unwrap();
    assert!(journal.is_empty() && !journal.is_due());
    for number in 0..3 {
        journal.append(&entry(number, 1)).unwrap();
    }
    assert!(!journal.is_empty() && !journal.is_due());
    let (mut journal, entries) = Journal::open(&backend, region, 3).unwrap();
    let expected = [0, 1, 2].map(|number| entry(number, 1).as_bytes().to_vec());
    assert_eq!(entries, expected);
    assert!(!journal.is_empty() && journal.is_due(), "nobody counted their changes");
    journal.restart();
    assert!(journal.is_empty() && !journal.is_due());
    journal.append(&entry(9, MAX_CHANGES - 1)).unwrap();
    assert!(!journal.is_due());
    journal.append(&entry(9, 1)).unwrap();
    assert!(journal.is_due(), "each change may be to another page");
    let (_, entries) = Journal::open(&backend, region, 4).unwrap();
    assert_eq!(entries.len(), 2);
}

#[test]
fn a_journal_may_be_full_to_its_last_sector() {
    let mut bytes = Vec::new();
    for number in 0..3 {
        let mut entry = Vec::new();
        let at = START + bytes.len() as u64;
        encode(&mut entry, at, place(7, 1, number), &content(number));
        bytes.extend(entry);
    }
    assert_eq!((found(&bytes), bytes.len() as u64), (Ok(3), 3 * BLOCK));
    let mut bytes = Vec::new();
    encode(&mut bytes, START, place(7, 1, 0), &vec![1; CONTENT * 8]);
    assert_eq!(bytes.len() as u64, BLOCK);
    assert_eq!(scan(&bytes, START, 7).unwrap().entries.len(), 1);
}

#[test]
fn an_entry_that_has_no_sectors_or_more_than_the_journal_is_damage() {
    for count in [0, 9, u16::MAX] {
        let mut bytes = Vec::new();
        sector::write(
            &mut bytes,
            START,
            &Place {
                count,
                ..place(7, 1, 0)
            },
            b"",
        );
        bytes.resize(BLOCK as usize, 0);
        assert_eq!(scan(&bytes, START, 7), Err(Damaged { at: START }), "{count}");
    }
}

#[test]
fn an_entry_begins_a_block_of_its_own() {
    let (_, begins) = journal();
    let block = BLOCK as usize / SECTOR;
    assert!(begins.iter().all(|begin| begin.is_multiple_of(block)), "{begins:?}");
}

/// Shows what was written to it, and has of that what was synced; after a sync that fails it takes all for clean.
#[derive(Debug, Default)]
struct Forgetful {
    shown: Bytes,
    had: Bytes,
    dirty: Mutex<Vec<(u64, Vec<u8>)>>,
    fails: AtomicBool,
}

impl Medium for Forgetful {
    fn len(&self) -> io::Result<u64> {
        self.shown.len()
    }

    fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        self.shown.read(at, out)
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.dirty.lock().unwrap().push((at, data.to_vec()));
        self.shown.write(at, data)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.had.set_len(len)?;
        self.shown.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        let dirty = std::mem::take(&mut *self.dirty.lock().unwrap());
        if self.fails.swap(false, Ordering::Relaxed) {
            return Err(io::Error::other("it did not arrive"));
        }
        dirty.iter().try_for_each(|(at, data)| self.had.write(*at, data))
    }

    fn hold(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_is_found_of_an_entry_whose_sync_failed_is_synced_before_another_is_written() {
    let forgetful = Arc::new(Forgetful::default());
    let medium: Arc<dyn Medium> = forgetful.clone();
    let layout = Layout::make(&medium, 64 << 10, true).unwrap();
    let start = || Backend::new(Arc::clone(&medium), layout);
    let backend = start();
    let region = backend.journal().unwrap();
    let append = |journal: &mut Journal, number: u8| {
        let mut effects = Effects::new();
        effects.put(&[number; 32], &[number; 1000]);
        journal.append(&effects)
    };
    let (mut journal, _) = Journal::open(&backend, region, 0).unwrap();
    append(&mut journal, 0).unwrap();
    forgetful.fails.store(true, Ordering::Relaxed);
    assert!(append(&mut journal, 1).is_err());
    let (mut journal, entries) = Journal::open(&start(), region, 0).unwrap();
    assert_eq!(entries.len(), 2, "it is shown");
    append(&mut journal, 2).unwrap();
    let mut had = vec![0; region.len as usize];
    forgetful.had.read(region.at, &mut had).unwrap();
    assert_eq!(scan(&had, region.at, 0).unwrap().entries.len(), 3);
}
