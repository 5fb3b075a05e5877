//! What the bytes are on: a file, or what a test puts in its place.

use std::{
    fmt,
    fs::{self, File},
    io::{self, ErrorKind, Write},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

/// Where a [`FileStore`](crate::FileStore) has its bytes. Another one than a file is for tests of what media do.
pub trait Medium: fmt::Debug + Send + Sync + 'static {
    /// The length in bytes.
    ///
    /// # Errors
    /// Whatever the medium says; the same goes for the other methods.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are no bytes.
    ///
    /// # Errors
    /// As [`len`](Self::len).
    fn is_empty(&self) -> io::Result<bool> {
        self.len().map(|len| len == 0)
    }

    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Errors
    /// Also where the bytes end before `out` is full.
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data`. What is written is durable after the next [`sync`](Self::sync), and until then it may be
    /// lost in any part.
    ///
    /// # Errors
    /// [`ErrorKind::StorageFull`] makes the store give back what it [holds](Self::hold) and try again.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Cuts, or adds zeros.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Returns once everything that was written is durable.
    ///
    /// # Errors
    /// After one nobody knows what is durable, and nothing more is written.
    fn sync(&self) -> io::Result<()>;

    /// Sets this many bytes of room aside, apart from the bytes themselves; 0 gives them back.
    ///
    /// # Errors
    /// If there is no such room. Then nothing is set aside.
    fn hold(&self, bytes: u64) -> io::Result<()>;
}

/// A file, locked for as long as it is open.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    /// Where room is set aside.
    spare: PathBuf,
}

impl Disk {
    pub(super) fn new(file: File, spare: PathBuf) -> Self {
        Self { file, spare }
    }
}

#[cfg(unix)]
fn read_at(file: &File, offset: u64, out: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(unix)]
fn write_at(file: &File, offset: u64, data: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, data, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> io::Result<()> {
    while !out.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, out, offset)?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        out = &mut out[read..];
        offset += read as u64;
    }
    Ok(())
}

#[cfg(windows)]
fn write_at(file: &File, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let written = std::os::windows::fs::FileExt::seek_write(file, data, offset)?;
        if written == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        data = &data[written..];
        offset += written as u64;
    }
    Ok(())
}

impl Medium for Disk {
    fn len(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        read_at(&self.file, offset, out)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        write_at(&self.file, offset, data)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn hold(&self, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return fs::remove_file(&self.spare);
        }
        // What a crash left behind. It was synced when it had its whole length.
        if fs::symlink_metadata(&self.spare).is_ok_and(|spare| spare.is_file() && spare.len() == bytes) {
            return Ok(());
        }
        let write = || {
            // Whatever has the name, a link among them, is not written through.
            fs::remove_file(&self.spare).or_else(missing_is_fine)?;
            let mut file = File::create_new(&self.spare)?;
            let zeros = vec![0; 1 << 20];
            let mut left = bytes;
            while left > 0 {
                let some = left.min(zeros.len() as u64);
                file.write_all(&zeros[..some as usize])?;
                left -= some;
            }
            // Room that was only promised may still be refused; this asks for it.
            file.sync_all()
        };
        write().inspect_err(|_| {
            let _ = fs::remove_file(&self.spare);
        })
    }
}

/// For what is to be removed.
pub(super) fn missing_is_fine(error: io::Error) -> io::Result<()> {
    match error.kind() {
        ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}

/// Whether there was no room.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
    )
}

/// How much room is set aside: more than a checkpoint needs on most days, so that a full disk is noticed by a write that
/// succeeds. Where it is not enough the file is opened again, and nothing is lost: all is in the journal.
const SPARE: u64 = 16 << 20;

/// Room for the day when the disk is full. An error would make redb refuse everything from then on; with the spare it
/// sees none, and the store has time to refuse what takes room.
#[derive(Debug)]
pub(super) struct Spare {
    medium: Arc<dyn Medium>,
    held: AtomicBool,
    /// Whether it is not held because there is no room for it.
    short: AtomicBool,
}

impl Spare {
    pub(super) fn new(medium: Arc<dyn Medium>) -> Self {
        Self {
            medium,
            held: AtomicBool::new(false),
            short: AtomicBool::new(false),
        }
    }

    pub(super) fn is_short(&self) -> bool {
        self.short.load(SeqCst)
    }

    /// Whether there is room. Where something else is in the way, such as a directory that may not be written, the
    /// store does without: it opens its file again then if the disk is ever full.
    pub(super) fn hold(&self) -> bool {
        let result = self.medium.hold(SPARE);
        let short = result.as_ref().is_err_and(is_full);
        self.held.store(result.is_ok(), SeqCst);
        self.short.store(short, SeqCst);
        if let (Err(error), false) = (result, short) {
            tracing::warn!(%error, "the idempotency store can set no room aside for the day when the disk is full");
        }
        !short
    }

    /// Whether there was something to give back.
    pub(super) fn give_back(&self) -> bool {
        if !self.held.swap(false, SeqCst) {
            return false;
        }
        self.short.store(true, SeqCst);
        self.medium.hold(0).is_ok()
    }
}

/// Gone with the store, however that ends: a file that turned out to be no store among the ways. The medium, and its
/// lock with it, is still there.
impl Drop for Spare {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn room_is_set_aside_in_a_file_of_its_own_and_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let spare = path("store.spare");
        let disk = Disk::new(File::create_new(path("store")).unwrap(), spare.clone());
        let held = || {
            fs::symlink_metadata(&spare)
                .map(|spare| (spare.is_file(), spare.len()))
                .ok()
        };
        let bytes = (2 << 20) + 7;
        disk.hold(bytes).unwrap();
        assert_eq!(held(), Some((true, bytes)));
        // What a crash left in its whole length is taken, what it left in part is not.
        fs::write(&spare, b"in part").unwrap();
        disk.hold(bytes).unwrap();
        assert_eq!(held(), Some((true, bytes)));
        let before = fs::metadata(&spare).unwrap().modified().unwrap();
        disk.hold(bytes).unwrap();
        assert_eq!(fs::metadata(&spare).unwrap().modified().unwrap(), before);
        disk.hold(0).unwrap();
        assert_eq!(held(), None);
        assert_eq!(disk.hold(0).unwrap_err().kind(), ErrorKind::NotFound);
        // Whatever has the name, it is not written through, and a directory stays.
        fs::write(path("precious"), vec![b'x'; bytes as usize]).unwrap();
        std::os::unix::fs::symlink(path("precious"), &spare).unwrap();
        disk.hold(bytes).unwrap();
        assert_eq!(held(), Some((true, bytes)));
        assert_eq!(fs::read(path("precious")).unwrap()[0], b'x');
        disk.hold(0).unwrap();
        fs::create_dir(&spare).unwrap();
        assert!(disk.hold(bytes).is_err() && spare.is_dir());
    }
}
