//! The threads that read: they answer every claim that changes nothing, from what is durable, and hand on the others.
//! They never wait for a sync, so neither does a replay.

use std::{
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
    vec,
};

use redb::{Database, ReadableDatabase};

use super::{
    batch::{RECORDS, answer, decode},
    cache::Kept,
    look::{Found, look},
    pages::ChangedPage,
    queue::{BeginJob, WriteJob},
    shared::Shared,
};
use crate::{error::StoreError, record::Begin};

/// A read that waits for the medium holds up only what another thread does not take.
pub(super) const READERS: usize = 2;

/// The most claims that are looked up in one snapshot.
const MAX_JOBS: usize = 64;

/// Until the queue is closed and empty.
pub(super) fn run(shared: &Arc<Shared>) {
    let mut jobs = Vec::new();
    while shared.reads.take(&mut jobs, MAX_JOBS, 0, Duration::ZERO) {
        let jobs = mem::take(&mut jobs);
        // A claim whose reader panicked is unanswered, which its task hears.
        if catch_unwind(AssertUnwindSafe(|| answer_all(shared, jobs))).is_err() {
            tracing::error!("a reader of the idempotency store panicked");
        }
    }
}

fn answer_all(shared: &Shared, jobs: Vec<BeginJob>) {
    let mut left = jobs.into_iter();
    let database = shared.database();
    let error = match &*database {
        Some(database) if shared.broken.get().is_none() => look_up(shared, database, &mut left).err(),
        // The writer says why.
        _ => None,
    };
    drop(database);
    match error {
        // The writer opens the file again, and says so.
        Some(error) if is_for_the_writer(&error) => left.for_each(|job| hand_on(shared, job)),
        Some(error) => {
            let broken = shared.fail(Some(Arc::new(error)));
            left.for_each(|mut job| job.answer(Err(broken.clone().into())));
        }
        None => left.for_each(|job| hand_on(shared, job)),
    }
}

/// What is ahead of the tables first, the snapshot after it, and both after the claims were made: so they see all that
/// was answered before. The other way round a checkpoint in between would have it in neither.
fn look_up(shared: &Shared, database: &Database, jobs: &mut vec::IntoIter<BeginJob>) -> Result<(), redb::Error> {
    let ahead = shared.ahead.find(jobs.as_slice().iter().map(|job| &job.id));
    let mut others = Vec::new();
    for (latest, job) in ahead.into_iter().zip(jobs.by_ref()) {
        match latest {
            _ if job.is_gone() => {}
            Some(latest) => tell(shared, job, latest.as_deref()),
            None => others.push(job),
        }
    }
    *jobs = others.into_iter();
    if jobs.as_slice().is_empty() {
        return Ok(());
    }
    let snapshot = database.begin_read()?;
    let records = snapshot.open_table(RECORDS)?;
    for mut job in jobs {
        if let Some(error) = shared.damage.of(&job.id, &shared.file) {
            job.answer(Err(error));
            continue;
        }
        let stored = match records.get(job.id.as_bytes()) {
            Ok(stored) => stored,
            Err(error) => {
                let error = redb::Error::from(error);
                shared.damage.note(&job.id, &error);
                if let Some(error) = shared.damage.of(&job.id, &shared.file) {
                    job.answer(Err(error));
                    continue;
                }
                if is_for_the_writer(&error) {
                    hand_on(shared, job);
                    continue;
                }
                let error = Arc::new(error);
                let broken = shared.fail(Some(error));
                job.answer(Err(broken.into()));
                continue;
            }
        };
        tell(shared, job, stored.as_ref().map(|stored| stored.value()));
    }
    Ok(())
}

fn tell(shared: &Shared, mut job: BeginJob, stored: Option<&[u8]>) {
    let result = stored.map(|stored| find(shared, &job, stored)).transpose();
    match result.map(Option::flatten) {
        Ok(None) => hand_on(shared, job),
        Ok(Some(begin)) => job.answer(Ok(begin)),
        Err(error) => job.answer(Err(error)),
    }
}

/// `None` if the claim changes the record.
fn find(shared: &Shared, job: &BeginJob, stored: &[u8]) -> Result<Option<Begin>, StoreError> {
    let record = decode(&job.id, stored)?;
    let found = look(&job.id, Some(&record), &job.claim, shared.time.run(), job.asked);
    if matches!(found, Found::Vacant | Found::Own(_) | Found::TakenOver { .. }) {
        return Ok(None);
    }
    let begin = answer(found)?;
    if let Begin::Completed {
        fingerprint, response, ..
    } = &begin
    {
        let kept = Kept {
            fingerprint: *fingerprint,
            response: response.clone(),
            vacant_at: record.vacant_at,
        };
        shared.cache.put(job.id, kept);
    }
    Ok(Some(begin))
}

/// A damaged page, or any failure that another thread was told of.
pub(super) fn is_for_the_writer(error: &redb::Error) -> bool {
    match error {
        redb::Error::PreviousIo => true,
        redb::Error::Io(error) => ChangedPage::of(error).is_some(),
        _ => false,
    }
}

fn hand_on(shared: &Shared, job: BeginJob) {
    if let Err((why, WriteJob::Begin(mut job))) = shared.writes.put(WriteJob::Begin(job)) {
        job.answer(Err(shared.refusal(why)));
    }
}
