//! Why a store in a file does not open.

use std::{
    error::Error,
    fmt, io,
    path::{Path, PathBuf},
};

type Source = Box<dyn Error + Send + Sync>;

/// Why a [`FileStore`](crate::FileStore) could not be opened. It names the file; its source says what happened
/// underneath.
#[derive(Debug)]
pub struct FileStoreError {
    kind: FileStoreErrorKind,
    path: PathBuf,
    source: Option<Source>,
}

/// The kinds of [`FileStoreError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileStoreErrorKind {
    /// Another process has the file open, or this one has it already.
    InUse,
    /// The file or its directory may not be read or written, or the directory does not exist.
    NotAccessible,
    /// The file is something else. Nothing in it was changed, unless it is a redb database of another program: that is
    /// opened as such before it is refused.
    NotAStore,
    /// The file was cut or changed by something else than a store.
    Damaged,
    /// The file was written by a newer version of the software.
    NewerVersion,
    /// There is no room on the disk for what opening a store has to write.
    Full,
    /// The medium failed.
    Failed,
}

impl FileStoreError {
    pub(super) fn new(kind: FileStoreErrorKind, path: &Path, source: impl Into<Source>) -> Self {
        Self {
            kind,
            path: path.to_owned(),
            source: Some(source.into()),
        }
    }

    pub(super) fn io(path: &Path, error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::NotFound
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::IsADirectory => FileStoreErrorKind::NotAccessible,
            _ if super::medium::is_full(&error) => FileStoreErrorKind::Full,
            _ if super::pages::ChangedPage::of(&error).is_some() => FileStoreErrorKind::Damaged,
            _ => FileStoreErrorKind::Failed,
        };
        Self::new(kind, path, error)
    }

    /// What to do about it.
    pub fn kind(&self) -> FileStoreErrorKind {
        self.kind
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Display for FileStoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.kind {
            FileStoreErrorKind::InUse => write!(
                f,
                "the idempotency store {path} is open already, here or in another process"
            ),
            FileStoreErrorKind::NotAccessible => write!(f, "the idempotency store {path} cannot be read and written"),
            FileStoreErrorKind::NotAStore => write!(f, "{path} is not an idempotency store; it was left as it is"),
            FileStoreErrorKind::Damaged => write!(f, "the idempotency store {path} is damaged; it was left as it is"),
            FileStoreErrorKind::NewerVersion => write!(f, "the idempotency store {path} is of a newer version"),
            FileStoreErrorKind::Full => write!(f, "there is no room to open the idempotency store {path}"),
            FileStoreErrorKind::Failed => write!(f, "the idempotency store {path} could not be opened"),
        }?;
        // One line has to be enough for whoever starts a server.
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl Error for FileStoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_file_and_gives_away_what_happened_underneath() {
        let path = Path::new("/var/lib/keys.redb");
        for (found, kind) in [
            (io::ErrorKind::PermissionDenied, FileStoreErrorKind::NotAccessible),
            (io::ErrorKind::ReadOnlyFilesystem, FileStoreErrorKind::NotAccessible),
            (io::ErrorKind::NotFound, FileStoreErrorKind::NotAccessible),
            (io::ErrorKind::NotADirectory, FileStoreErrorKind::NotAccessible),
            (io::ErrorKind::IsADirectory, FileStoreErrorKind::NotAccessible),
            (io::ErrorKind::StorageFull, FileStoreErrorKind::Full),
            (io::ErrorKind::TimedOut, FileStoreErrorKind::Failed),
        ] {
            let error = FileStoreError::io(path, io::Error::new(found, "underneath"));
            assert_eq!((error.kind(), error.path()), (kind, path), "{found}");
            let source = error.source().map(ToString::to_string);
            assert_eq!(source.as_deref(), Some("underneath"));
            let said = error.to_string();
            assert!(
                said.contains("/var/lib/keys.redb") && said.ends_with(": underneath"),
                "{said}"
            );
        }
    }
}
