//! How changes become durable, and are found again: in the journal first, in the tables at a checkpoint.

use redb::{Database, Durability, WriteTransaction};

use super::{
    effects::{self, Effects},
    engine::{Backend, Failed, Settings, start},
    journal::Journal,
    tables,
};

/// What pages may take in memory at least while there is no room for them on the disk: all that are changed between two
/// checkpoints, twice.
pub(super) const ENOUGH: usize = 128 << 20;

/// Opens the tables and brings them to where they were.
pub(super) fn reopen(backend: &Backend, settings: &Settings) -> Result<(Database, Option<Journal>), redb::Error> {
    recovered(start(backend, settings)?, backend, settings)
}

/// Brings the tables to where they were. They need no room on the disk for that, if memory has room for them.
pub(super) fn recovered(
    database: Database,
    backend: &Backend,
    settings: &Settings,
) -> Result<(Database, Option<Journal>), redb::Error> {
    match recover(&database, backend) {
        Ok(journal) => Ok((database, journal)),
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

/// Durable when it returns: in the journal if there is room for the effects, or else in the tables. What is not durable
/// yet is seen by nobody.
pub(super) fn commit(
    mut transaction: WriteTransaction,
    effects: &Effects,
    journal: &mut Option<Journal>,
) -> Result<(), redb::Error> {
    match journal {
        Some(journal) if journal.has_room_for(effects) => {
            journal.append(effects)?;
            transaction.set_durability(Durability::None)?;
            Ok(transaction.commit()?)
        }
        journal => commit_tables(transaction, journal),
    }
}

/// Syncs the tables, with all that the journal has. That takes a sync more than redb's plain commit, and needs no look at
/// all pages after a crash.
pub(super) fn commit_tables(
    mut transaction: WriteTransaction,
    journal: &mut Option<Journal>,
) -> Result<(), redb::Error> {
    if let Some(journal) = &*journal {
        tables::write_epoch(&transaction, journal.next_epoch())?;
        transaction.set_quick_repair(true);
    }
    transaction.commit()?;
    if let Some(journal) = journal {
        journal.restart();
    }
    Ok(())
}
