//! The one thread that writes: takes what waits, decides and applies it in one transaction, makes that durable, and only
//! then answers.

use std::{
    io, mem,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use redb::Database;

use super::{
    batch::Batch,
    cache::Kept,
    commit::{Commits, reopen},
    engine::{Backend, Broken, Failed},
    frame::Time,
    listeners::Wake,
    queue::{Change, ChangeJob, MAX_BATCH, WriteJob},
    shared::Shared,
    tables::write_time,
};
use crate::{
    error::{StoreError, StoreErrorKind},
    record::Begin,
};

pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    backend: Backend,
    commits: Commits,
    /// The latest time that anything was decided at.
    now: Time,
    stamped: Time,
    /// While the disk is full: the bytes that removed records made room for.
    room: Option<u64>,
    /// When there was last a try to get out of that.
    tried: Time,
    last: Last,
}

/// The batch before, from which the next one learns how long to wait for company.
#[derive(Default)]
struct Last {
    jobs: usize,
    took: Duration,
}

/// How often a full disk is tried again, and how often the time is written down.
const SECOND: Time = 1_000_000_000;

/// The longest wait for company; a sync takes longer on any medium where waiting pays.
const PATIENCE: Duration = Duration::from_micros(500);

/// The most expired records that one batch removes, so that no request waits for a purge.
const MAX_PURGED: usize = 512;

/// What became of a job.
enum Outcome {
    Begin(Result<Begin, StoreError>),
    /// With what was kept, if that is what it did.
    Change(Result<Option<Kept>, StoreError>),
    /// Nobody waits for it any more, and nothing was done.
    Skipped,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, backend: Backend, commits: Commits) -> Self {
        let now = shared.time.began();
        let room = backend.spare.is_short().then_some(0);
        Self {
            shared,
            backend,
            commits,
            now,
            stamped: now,
            room,
            tried: now,
            last: Last::default(),
        }
    }

    /// Until the queue is closed and empty.
    pub(super) fn run(mut self) {
        let mut jobs = Vec::new();
        loop {
            // One alone never waits; many, that come back one after the other once they were answered, share a sync.
            let expected = if self.last.jobs > 1 { self.last.jobs } else { 0 };
            let patience = (self.last.took / 8).min(PATIENCE);
            if !self.shared.writes.take(&mut jobs, MAX_BATCH, expected, patience) {
                break;
            }
            let started = Instant::now();
            self.last.jobs = jobs.len();
            if let Err(broken) = self.careful(|writer| writer.batch(&mut jobs)) {
                refuse(&mut jobs, || broken.clone().into());
            }
            self.last.took = started.elapsed();
            // Nobody waits for it; those who come later hear of a failure.
            let _ = self.careful(Self::checkpoint);
        }
        // Whoever waits for the end hears of it, whatever redb stumbles over, and it is closed here and nowhere else.
        let _ = self.careful(Self::look_for_damage);
        let _ = self.careful(Self::checkpoint_the_end);
        if self.shared.broken.get().is_some() {
            // All of it is in the journal; redb would write what it has in one step, of which a part may stay.
            self.backend.give_up();
        }
        let _ = self.careful(|writer| {
            drop(mem::take(&mut writer.commits));
            writer.shared.close_database();
        });
        let Self {
            shared,
            backend,
            commits,
            ..
        } = self;
        backend.spare.give_back();
        // The lock goes with the medium, and only then may the file be opened again.
        drop((commits, backend));
        shared.closed.send_replace(true);
    }

    /// What panics has failed before anybody hears of it.
    fn careful(&mut self, step: impl FnOnce(&mut Self)) -> Result<(), Broken> {
        catch_unwind(AssertUnwindSafe(|| step(self))).map_err(|_| self.shared.fail(None))
    }

    fn checkpoint_the_end(&mut self) {
        if let Err(error) = self.remember_the_end() {
            let file = &self.shared.file;
            tracing::warn!(%file, %error, "the idempotency store could not write down when it was closed");
        }
    }

    /// Without the time a store that is opened often and changed seldom would never count the time it is open, where
    /// only the wall clock tells. The next opening finds an empty journal.
    fn remember_the_end(&mut self) -> Result<(), redb::Error> {
        let now = self.now.max(self.shared.closed_at.load(SeqCst));
        let stamp = now.saturating_sub(self.stamped) >= SECOND;
        if self.room.is_some() || self.shared.broken.get().is_some() || !(stamp || self.commits.is_ahead()) {
            return Ok(());
        }
        if let Some(database) = &*self.shared.database() {
            let transaction = self.commits.begin(database)?;
            if stamp {
                write_time(&transaction, &self.shared.time.stamp(now).encode())?;
            }
            self.commits.commit_tables(transaction, &self.shared.ahead)?;
        }
        Ok(())
    }

    /// That a reader met: redb takes no more work, which the transaction that is open would notice at a checkpoint only.
    fn look_for_damage(&mut self) {
        if self.shared.broken.get().is_none() && self.backend.met_damage() {
            drop(self.failed(redb::Error::PreviousIo));
        }
    }

    fn batch(&mut self, jobs: &mut Vec<WriteJob>) {
        self.look_for_damage();
        if let Some(broken) = self.shared.broken.get() {
            return refuse(jobs, || broken.clone().into());
        }
        self.now = jobs.iter().map(WriteJob::asked).fold(self.now, Time::max);
        self.try_to_recover();
        let result = match &*self.shared.database() {
            Some(database) => {
                let (stamped, room) = (self.stamped, self.room);
                apply(self.now, stamped, room, &self.shared, database, &mut self.commits, jobs)
            }
            None => return refuse(jobs, || StoreErrorKind::Unavailable.into()),
        };
        match result {
            Ok(applied) => {
                if applied.stamped {
                    self.stamped = self.now;
                }
                // The spare may have been used for this very batch.
                self.room = match applied.room {
                    None if self.backend.spare.is_short() => Some(0),
                    room => room,
                };
                for (job, outcome) in jobs.drain(..).zip(applied.outcomes) {
                    self.tell(job, outcome);
                }
            }
            Err(error) => {
                let error = self.failed(error);
                refuse(jobs, || error.clone().into());
            }
        }
    }

    /// When the journal has had enough, once those of the last batch were answered. Not while the disk is full: it would
    /// take room, and fail. A failure harms nobody's change, since all of them are in the journal.
    fn checkpoint(&mut self) {
        if !self.commits.is_due() || self.room.is_some() || self.shared.broken.get().is_some() {
            return;
        }
        let result = match &*self.shared.database() {
            Some(database) => (self.commits.begin(database))
                .and_then(|transaction| self.commits.commit_tables(transaction, &self.shared.ahead)),
            None => return,
        };
        match result {
            Ok(()) if self.backend.spare.is_short() => self.room = Some(0),
            Ok(()) => {}
            Err(error) => drop(self.failed(error)),
        }
    }

    /// Whether the batch was applied is not known: a commit may have failed after its last byte.
    fn failed(&mut self, error: redb::Error) -> Broken {
        let failed = self.backend.take_failure();
        let cause = Arc::new(match failed {
            // A reader may have met it first, and then redb says no more than that.
            Some(Failed::Changed(page)) => io::Error::other(page).into(),
            _ => error,
        });
        let file = Arc::clone(&self.shared.file);
        match failed {
            Some(Failed::Full) => {
                tracing::warn!(%cause, "the disk is full: the idempotency store opens its file again");
                self.room = Some(0);
                self.reopen();
            }
            Some(Failed::Changed(_)) => {
                tracing::error!(%file, %cause, "the idempotency store's file is damaged; it purges nothing any more");
                self.shared.damage.found();
                self.reopen();
            }
            Some(Failed::Unknown) | None => return self.shared.fail(Some(cause)),
        }
        Broken {
            file,
            goes_on: self.shared.broken.get().is_none(),
            cause: Some(cause),
        }
    }

    /// redb takes no more work after any error. After one that was only for want of room its file is as good as ever, and
    /// after a damaged page what that page does not lead to is.
    fn reopen(&mut self) {
        let mut database = self.shared.database_mut();
        // A transaction that is open would keep redb from closing its file.
        drop(mem::take(&mut self.commits));
        drop(database.take());
        self.backend.take_failure();
        match reopen(&self.backend, &self.shared.settings) {
            Ok((opened, commits)) => {
                self.commits = commits;
                self.shared.ahead.clear();
                *database = Some(opened);
            }
            Err(error) if self.backend.take_failure() == Some(Failed::Full) => {
                tracing::warn!(%error, "the disk is full: the idempotency store cannot be opened");
                // So that it is tried again, whatever it was opened for.
                self.room = Some(0);
            }
            Err(error) => drop(self.shared.fail(Some(Arc::new(error)))),
        }
    }

    /// While the disk is full, once a second.
    fn try_to_recover(&mut self) {
        if self.room.is_none() || self.now.saturating_sub(self.tried) < SECOND {
            return;
        }
        self.tried = self.now;
        if self.shared.database().is_none() {
            self.reopen();
        }
        // A file that could not be opened is tried again, whatever room there is by now.
        if self.shared.database().is_some() && self.backend.spare.hold() {
            tracing::info!("the disk has room again: the idempotency store takes new keys");
            self.room = None;
        }
    }

    /// Listeners first: whoever hears that a change is made can count on them to know.
    fn tell(&self, job: WriteJob, outcome: Outcome) {
        match (job, outcome) {
            (WriteJob::Begin(mut job), Outcome::Begin(result)) => job.answer(result),
            (WriteJob::Change(job), Outcome::Change(result)) => {
                let result = result.map(|kept| self.publish(&job, kept));
                // The attempt ends the same way whether or not anybody hears of it.
                let _ = job.answer.send(result);
            }
            _ => {}
        }
    }

    fn publish(&self, job: &ChangeJob, kept: Option<Kept>) {
        let id = job.lease.id;
        let wake = match &job.change {
            Change::Renew(_) => return,
            Change::Release => Wake::One,
            Change::Abandon | Change::Complete(..) => Wake::All,
        };
        if let Some(kept) = kept {
            self.shared.cache.put(id, kept);
        }
        self.shared.listeners.wake(&id, wake);
    }
}

struct Applied {
    outcomes: Vec<Outcome>,
    room: Option<u64>,
    stamped: bool,
}

/// All of a batch, or nothing of it.
fn apply(
    now: Time,
    stamped: Time,
    room: Option<u64>,
    shared: &Shared,
    database: &Database,
    commits: &mut Commits,
    jobs: &mut [WriteJob],
) -> Result<Applied, redb::Error> {
    let transaction = commits.begin(database)?;
    let mut outcomes = Vec::with_capacity(jobs.len());
    let mut batch = Batch::new(&transaction, &shared.damage, shared.time.run(), room)?;
    let purged = match shared.damage.is_found() {
        true => 0,
        false => (jobs.len() * 2 + 8).min(MAX_PURGED),
    };
    if room.is_some() {
        // First: it makes room.
        batch.purge(now, purged)?;
    }
    for job in jobs {
        outcomes.push(match job {
            WriteJob::Begin(job) if job.is_gone() => Outcome::Skipped,
            WriteJob::Begin(job) => {
                let id = job.id;
                let result = match shared.damage.of(&id, &shared.file) {
                    Some(error) => Err(error),
                    None => batch.begin(job, now)?,
                };
                if batch.changed() {
                    Outcome::Begin(result)
                } else {
                    // It saw nothing but what is durable, and changed nothing: no sync has to come before its answer.
                    job.answer(result);
                    Outcome::Skipped
                }
            }
            WriteJob::Change(job) => {
                let id = job.lease.id;
                Outcome::Change(match shared.damage.of(&id, &shared.file) {
                    Some(error) => Err(error),
                    None => batch.change(job, now)?,
                })
            }
        });
    }
    if room.is_none() && batch.changed() {
        batch.purge(now, purged)?;
    }
    let (changed, room, records) = (batch.changed(), batch.room(), batch.records()?);
    let (mut effects, latest) = batch.into_effects();
    let stamped = changed && now.saturating_sub(stamped) >= SECOND;
    if stamped {
        let stamp = shared.time.stamp(now).encode();
        effects.time(&stamp);
        write_time(&transaction, &stamp)?;
    }
    if changed {
        commits.commit(transaction, &effects, latest, &shared.ahead)?;
        shared.records.store(records, SeqCst);
    } else {
        commits.unchanged(transaction);
    }
    Ok(Applied {
        outcomes,
        room,
        stamped,
    })
}

fn refuse(jobs: &mut Vec<WriteJob>, error: impl Fn() -> StoreError) {
    for job in jobs.drain(..) {
        match job {
            WriteJob::Begin(mut job) => job.answer(Err(error())),
            WriteJob::Change(job) => drop(job.answer.send(Err(error()))),
        }
    }
}
