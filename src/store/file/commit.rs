//! How changes become durable, and are found again: in the journal first, in the tables at a checkpoint.

use redb::{Database, Durability, WriteTransaction};

use super::{
    ahead::{Ahead, Latest},
    effects::{self, Effects},
    engine::{Backend, Failed, Settings, start},
    journal::Journal,
    tables,
};
use crate::record::RecordId;

/// What pages may take in memory at least while there is no room for them on the disk: all that are changed between two
/// checkpoints, twice.
pub(super) const ENOUGH: usize = 128 << 20;

/// Opens the tables and brings them to where they were.
pub(super) fn reopen(backend: &Backend, settings: &Settings) -> Result<(Database, Commits), redb::Error> {
    recovered(start(backend, settings)?, backend, settings)
}

/// Brings the tables to where they were. They need no room on the disk for that, if memory has room for them.
pub(super) fn recovered(
    database: Database,
    backend: &Backend,
    settings: &Settings,
) -> Result<(Database, Commits), redb::Error> {
    match recover(&database, backend) {
        Ok(journal) => Ok((database, Commits::new(journal))),
        Err(error) if settings.cache_bytes < ENOUGH && backend.take_failure() == Some(Failed::Full) => {
            tracing::warn!(%error, "the disk is full: the idempotency store keeps its latest pages in memory");
            drop(database);
            let settings = Settings {
                cache_bytes: ENOUGH,
                ..*settings
            };
            reopen(backend, &settings)
        }
        Err(error) => Err(error),
    }
}

/// Does again what the journal says was done since the tables were synced. In memory alone: it is durable where it is.
fn recover(database: &Database, backend: &Backend) -> Result<Option<Journal>, redb::Error> {
    let Some(region) = backend.journal() else {
        return Ok(None);
    };
    let mut transaction = database.begin_write()?;
    let epoch = tables::epoch(&transaction)?;
    let (journal, entries) = Journal::open(backend, region, epoch)?;
    if entries.is_empty() {
        transaction.abort()?;
    } else {
        for entry in &entries {
            effects::apply(&transaction, entry)?;
        }
        transaction.set_durability(Durability::None)?;
        transaction.commit()?;
    }
    Ok(Some(journal))
}

/// How changes are made durable between two checkpoints.
#[derive(Default)]
pub(super) struct Commits {
    /// `None` in a file that has none.
    journal: Option<Journal>,
    /// What the journal has, in the tables. What redb does for a commit, even for one in memory, costs as much as all the
    /// changes of a batch, so it is done at a checkpoint alone; until then readers look for them in [`Ahead`].
    open: Option<WriteTransaction>,
}

impl Commits {
    fn new(journal: Option<Journal>) -> Self {
        Self { journal, open: None }
    }

    /// In which all is that was committed. Whoever drops it has given up the tables: they are opened again.
    pub(super) fn begin(&mut self, database: &Database) -> Result<WriteTransaction, redb::Error> {
        match self.open.take() {
            Some(open) => Ok(open),
            None => Ok(database.begin_write()?),
        }
    }

    /// Nothing was changed in it.
    pub(super) fn unchanged(&mut self, transaction: WriteTransaction) {
        self.open = Some(transaction);
    }

    /// Durable when it returns, and seen by readers: in the journal if there is room for the effects, or else in the
    /// tables. What is not durable yet is seen by nobody.
    pub(super) fn commit(
        &mut self,
        transaction: WriteTransaction,
        effects: &Effects,
        latest: Vec<(RecordId, Latest)>,
        ahead: &Ahead,
    ) -> Result<(), redb::Error> {
        match &mut self.journal {
            Some(journal) if journal.has_room_for(effects) => {
                journal.append(effects)?;
                ahead.put(latest);
                self.open = Some(transaction);
                Ok(())
            }
            _ => self.commit_tables(transaction, ahead),
        }
    }

    /// Syncs the tables, with all that the journal has. That takes a sync more than redb's plain commit, and needs no look
    /// at all pages after a crash.
    pub(super) fn commit_tables(
        &mut self,
        mut transaction: WriteTransaction,
        ahead: &Ahead,
    ) -> Result<(), redb::Error> {
        if let Some(journal) = &self.journal {
            tables::write_epoch(&transaction, journal.next_epoch())?;
            transaction.set_quick_repair(true);
        }
        transaction.commit()?;
        if let Some(journal) = &mut self.journal {
            journal.restart();
        }
        ahead.clear();
        Ok(())
    }

    /// Whether it is time for a checkpoint.
    pub(super) fn is_due(&self) -> bool {
        self.journal.as_ref().is_some_and(Journal::is_due)
    }

    /// Whether the journal has anything that the tables on the medium have not.
    pub(super) fn is_ahead(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| !journal.is_empty())
    }
}
