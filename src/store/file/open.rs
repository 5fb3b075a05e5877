//! From a path to a file that is ours alone.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    clock::Stamp,
    engine::{Backend, Settings, not_opened, start, unreadable},
    error::{FileStoreError, FileStoreErrorKind},
    layout::Layout,
    medium::{Disk, Medium, missing_is_fine},
    tables::initialise,
};

/// Opens the file, which is made first, with this stamp, if there is none.
pub(super) fn disk(path: &Path, first: &Stamp, settings: &Settings) -> Result<Disk, FileStoreError> {
    let error = |source| FileStoreError::io(path, source);
    // Somebody else may make the file, or clear up after making it, between any two steps.
    let mut attempts = 0;
    loop {
        attempts += 1;
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => return existing(path, file),
            Err(missing) if missing.kind() == ErrorKind::NotFound && attempts < 10 => {
                make(path, first, settings)?;
            }
            Err(source) => return Err(error(source)),
        }
    }
}

fn existing(path: &Path, file: File) -> Result<Disk, FileStoreError> {
    lock(path, &file)?;
    let metadata = file.metadata().map_err(|source| FileStoreError::io(path, source))?;
    if !metadata.is_file() {
        return Err(FileStoreError::new(
            FileStoreErrorKind::NotAStore,
            path,
            "it is no file",
        ));
    }
    // A file that we made is never empty, see below. This one has lost what was in it, and what was promised with it.
    if metadata.len() == 0 {
        let what = "it is empty; remove it if nothing was ever in it";
        return Err(FileStoreError::new(FileStoreErrorKind::Damaged, path, what));
    }
    // Whoever made it may have ended before it was durable that it is there.
    match sync_directory(path) {
        // One that may only be searched cannot be synced.
        Err(denied) if denied.kind() == ErrorKind::PermissionDenied => {}
        synced => synced.map_err(|source| FileStoreError::io(path, source))?,
    }
    Ok(Disk::new(file, beside(path, ".spare")))
}

fn lock(path: &Path, file: &File) -> Result<(), FileStoreError> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => FileStoreError::new(FileStoreErrorKind::InUse, path, "its file is locked"),
        TryLockError::Error(source) => FileStoreError::io(path, source),
    })
}

/// Makes the file under another name and gives it its own name when it is whole: nobody ever sees half of one.
fn make(path: &Path, first: &Stamp, settings: &Settings) -> Result<(), FileStoreError> {
    let error = |source| FileStoreError::io(path, source);
    let unborn = beside(path, ".new");
    // A link is not followed: what it leads to is not ours.
    if fs::symlink_metadata(&unborn).is_ok_and(|left| left.is_symlink()) {
        fs::remove_file(&unborn).or_else(missing_is_fine).map_err(error)?;
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(&unborn).map_err(error)?;
    lock(path, &file)?;
    // Whoever made the file held this lock until it had its name. If it has, this may be that very file.
    if path.try_exists().map_err(error)? {
        return fs::remove_file(&unborn).or_else(missing_is_fine).map_err(error);
    }
    // A crash left a whole file its first name, and somebody moved it away under its second. It must not be cut.
    if has_another_name(&file).map_err(error)? {
        return fs::remove_file(&unborn).or_else(missing_is_fine).map_err(error);
    }
    // Answers are for whoever runs the server.
    #[cfg(unix)]
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .map_err(error)?;
    // What a crash left; only whoever holds the lock may cut it.
    file.set_len(0).map_err(error)?;
    let medium: Arc<dyn Medium> = Arc::new(Disk::new(file, beside(path, ".spare")));
    let layout = Layout::make(&medium, settings.journal_bytes, settings.page_checksums).map_err(error)?;
    let backend = Backend::new(medium, layout);
    let database = start(&backend, &Settings::default()).map_err(|source| not_opened(path, source))?;
    initialise(&database, first).map_err(|source| unreadable(path, source))?;
    database
        .close()
        .map_err(|source| FileStoreError::new(FileStoreErrorKind::Failed, path, source))?;
    // A link, unlike a new name, never replaces what somebody else made meanwhile.
    let named = match fs::hard_link(&unborn, path) {
        Ok(()) => fs::remove_file(&unborn),
        Err(exists) if exists.kind() == ErrorKind::AlreadyExists => fs::remove_file(&unborn),
        // Somebody else made the file from the same beginnings: what is open here has no name any more.
        Err(gone) if gone.kind() == ErrorKind::NotFound => Ok(()),
        // There are file systems without links.
        Err(_) => fs::rename(&unborn, path),
    };
    named.and_then(|()| sync_directory(path)).map_err(error)
}

#[cfg(unix)]
fn has_another_name(file: &File) -> io::Result<bool> {
    file.metadata()
        .map(|metadata| std::os::unix::fs::MetadataExt::nlink(&metadata) > 1)
}

/// Nobody tells.
#[cfg(not(unix))]
fn has_another_name(_: &File) -> io::Result<bool> {
    Ok(false)
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// The name of a file is durable when its directory is.
#[cfg(unix)]
fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

#[cfg(not(unix))]
fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::store::file::clock::{Opening, SystemClock};

    #[test]
    fn the_directory_that_is_synced_is_the_files_own() {
        let directory = tempfile::tempdir().unwrap();
        assert!(sync_directory(&directory.path().join("store")).is_ok());
        assert!(sync_directory(&directory.path().join("gone/store")).is_err());
        // A name alone is in the present one.
        assert!(sync_directory(Path::new("store")).is_ok());
    }

    #[test]
    fn a_link_that_leads_nowhere_is_left_as_it_is_and_told_of_in_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        std::os::unix::fs::symlink(directory.path().join("gone"), &path).unwrap();
        let first = Opening::now(Arc::new(SystemClock::new())).stamp();
        let settings = Settings {
            journal_bytes: 1,
            ..Settings::default()
        };
        let error = disk(&path, &first, &settings).unwrap_err();
        assert_eq!(error.kind(), FileStoreErrorKind::NotAccessible);
        assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
        assert_eq!(
            fs::read_dir(&directory).unwrap().count(),
            1,
            "nothing is left beside it"
        );
    }
}
