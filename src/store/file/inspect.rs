//! A look at every record of a file, for people.

use std::{path::Path, sync::Arc, time::Duration};

use http::StatusCode;
use redb::{ReadableDatabase, ReadableTable};

use super::{
    FileStore,
    batch::{RECORDS, decode},
    clock::{Opening, StoreTime, SystemClock},
    commit,
    engine::{self, Backend},
    error::FileStoreError,
    frame::{NEVER, State},
    layout::Layout,
    medium::Medium,
    open, tables,
};
use crate::{codec::StoredResponse, record::RecordId};

/// A record of a file as [`FileStore::inspect`] shows it. Neither its answer nor its owner is shown.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FileRecord {
    /// A hash over scope and key.
    pub id: RecordId,
    /// What became of the operation.
    pub state: FileRecordState,
    /// Which attempt it is: 1 for the first.
    pub attempt: u64,
    /// How long it has been in this state.
    pub age: Duration,
    /// When it expires; `None` if it never does.
    pub expires_in: Option<Duration>,
    /// The bytes of the record, its answer included.
    pub bytes: usize,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileRecordState {
    /// It was running when the file was closed. Nobody knows how it ended.
    Abandoned,
    /// It is done and was answered with this status.
    Completed {
        /// Of the answer.
        status: StatusCode,
        /// Whether there is an answer to replay.
        kept: bool,
    },
    /// It is vacant and waits to be removed.
    Expired,
    /// Its bytes cannot be read.
    Unreadable,
}

impl FileStore {
    /// Shows every record of a file that no process has open, in the order of their ids. Blocks: it reads all of the
    /// file. Nothing is changed, except that what a crash left is recovered as any opening does.
    ///
    /// # Errors
    /// See [`FileStoreErrorKind`](crate::FileStoreErrorKind); a file that does not exist is not made.
    pub fn inspect(path: impl AsRef<Path>, mut show: impl FnMut(FileRecord)) -> Result<(), FileStoreError> {
        let path = path.as_ref();
        std::fs::metadata(path).map_err(|source| FileStoreError::io(path, source))?;
        let opening = Opening::now(Arc::new(SystemClock::new()));
        let settings = engine::Settings::default();
        let medium: Arc<dyn Medium> = Arc::new(open::disk(path, &opening.stamp(), &settings)?);
        let layout = Layout::read(&medium).map_err(|source| engine::not_laid_out(path, source))?;
        let backend = Backend::new(medium, layout);
        let database = engine::start(&backend, &settings).map_err(|source| engine::not_opened(path, source))?;
        tables::check_format(&database, path)?;
        let recovered = commit::recovered(database, &backend, &settings);
        let (database, _) = recovered.map_err(|source| engine::unreadable(path, source))?;
        let now = StoreTime::resume(&tables::read_stamp(&database, path)?, opening).now();
        let failed = |source| engine::unreadable(path, source);
        let snapshot = database.begin_read().map_err(|source| failed(source.into()))?;
        let records = snapshot.open_table(RECORDS).map_err(|source| failed(source.into()))?;
        for entry in records.iter().map_err(|source| failed(source.into()))? {
            let (id, bytes) = entry.map_err(|source| failed(source.into()))?;
            show(describe(RecordId::from_bytes(*id.value()), bytes.value(), now));
        }
        Ok(())
    }
}

fn describe(id: RecordId, bytes: &[u8], now: u64) -> FileRecord {
    let Ok(record) = decode(&id, bytes) else {
        return FileRecord {
            id,
            state: FileRecordState::Unreadable,
            attempt: 0,
            age: Duration::ZERO,
            expires_in: None,
            bytes: bytes.len(),
        };
    };
    let state = match record.state {
        _ if record.vacant_at <= now => FileRecordState::Expired,
        State::InProgress(_) => FileRecordState::Abandoned,
        State::Completed(answer) => match StoredResponse::from_bytes(bytes::Bytes::copy_from_slice(answer)) {
            Ok(response) => FileRecordState::Completed {
                status: response.status(),
                kept: response.is_kept(),
            },
            Err(_) => FileRecordState::Unreadable,
        },
    };
    let expires_in = Duration::from_nanos(record.vacant_at.saturating_sub(now));
    FileRecord {
        id,
        state,
        attempt: record.fence,
        age: Duration::from_nanos(now.saturating_sub(record.since)),
        expires_in: (record.vacant_at != NEVER).then_some(expires_in),
        bytes: bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{
        super::frame::{Progress, Record},
        *,
    };
    use crate::{fingerprint::Fingerprint, record::Owner};

    fn found_at(now: u64, vacant_at: u64, state: State<'_>) -> FileRecord {
        let record = Record {
            vacant_at,
            indexed_at: vacant_at,
            since: 100,
            fence: 3,
            fingerprint: Fingerprint::new(1, [0; 32]),
            state,
        };
        let id = RecordId::from_bytes([7; 32]);
        describe(id, &record.encode(&id), now)
    }

    #[test]
    fn a_record_is_shown_as_what_a_claim_would_find() {
        let running = State::InProgress(Progress {
            owner: Owner::from_bytes([1; 16]),
            lease_until: 150,
            keep: 50,
            run: 1,
        });
        let not_kept = StoredResponse::not_kept(StatusCode::ACCEPTED);
        let completed = State::Completed(not_kept.as_bytes());
        let as_completed = FileRecordState::Completed {
            status: StatusCode::ACCEPTED,
            kept: false,
        };
        for (now, state, expected) in [
            (199, running, FileRecordState::Abandoned),
            (200, running, FileRecordState::Expired),
            (199, completed, as_completed),
            (200, completed, FileRecordState::Expired),
            (199, State::Completed(b"no answer"), FileRecordState::Unreadable),
        ] {
            let record = found_at(now, 200, state);
            assert_eq!((record.state, record.attempt), (expected, 3), "at {now}");
            assert_eq!(record.age, Duration::from_nanos(now - 100));
            assert_eq!(record.expires_in, Some(Duration::from_nanos(200 - now)));
        }
        assert_eq!(found_at(199, NEVER, completed).expires_in, None);
    }
}
