//! How work gets from tasks to the store's threads.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::frame::Time;
use crate::{
    codec::StoredResponse,
    error::StoreError,
    record::{Begin, Claim, Lease, RecordId},
};

/// A claim, and who wants to hear of it.
pub(super) struct BeginJob {
    pub(super) id: RecordId,
    pub(super) claim: Claim,
    /// The store's time when it was asked for.
    pub(super) asked: Time,
    /// Taken by whoever answers.
    pub(super) answer: Option<Answer<Begin>>,
}

/// A change to a record in progress, by its owner.
pub(super) struct ChangeJob {
    pub(super) lease: Lease,
    pub(super) change: Change,
    pub(super) asked: Time,
    pub(super) answer: Answer<()>,
}

pub(super) enum Change {
    Complete(StoredResponse, /* how long it is kept */ Time),
    Renew(Time),
    Release,
    Abandon,
}

impl BeginJob {
    /// Whether nobody waits for it any more.
    pub(super) fn is_gone(&self) -> bool {
        self.answer.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Whoever asked may be gone by now. What was acquired for it is a lease that ends, and its task, which knows the
    /// owner, may end it sooner.
    pub(super) fn answer(&mut self, result: Result<Begin, StoreError>) {
        if let Some(answer) = self.answer.take() {
            let _ = answer.send(result);
        }
    }
}

pub(super) type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

pub(super) enum WriteJob {
    Begin(BeginJob),
    Change(ChangeJob),
}

impl WriteJob {
    pub(super) fn asked(&self) -> Time {
        match self {
            Self::Begin(job) => job.asked,
            Self::Change(job) => job.asked,
        }
    }
}

/// What it takes of the room in a batch.
pub(super) trait Weigh {
    fn bytes(&self) -> usize;
}

impl Weigh for BeginJob {
    fn bytes(&self) -> usize {
        0
    }
}

impl Weigh for WriteJob {
    fn bytes(&self) -> usize {
        match self {
            Self::Change(ChangeJob {
                change: Change::Complete(response, _),
                ..
            }) => response.len(),
            _ => 0,
        }
    }
}

/// The most jobs of one batch, and the most bytes of answers. The first job is taken whatever it weighs.
pub(super) const MAX_BATCH: usize = 1024;
const MAX_BATCH_BYTES: usize = 4 << 20;

/// The most jobs that wait. Each is a request that waits, so there are other limits before this one.
const MAX_WAITING: usize = 1 << 16;

/// Locked for a moment by those who put and by those who take: never while anything is written or read.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    filled: Condvar,
}

struct State<T> {
    jobs: VecDeque<T>,
    /// Whether somebody who takes has nothing to do.
    idle: bool,
    /// How many jobs whoever takes waits for.
    wanted: usize,
    closed: bool,
}

/// Why a job was not taken.
#[derive(Clone, Copy, Debug)]
pub(super) enum Refused {
    Closed,
    TooMany,
    Busy,
}

impl<T: Weigh> Queue<T> {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                jobs: VecDeque::new(),
                idle: false,
                wanted: 1,
                closed: false,
            }),
            filled: Condvar::new(),
        }
    }

    /// No method leaves the state half changed, so a panic elsewhere is no reason to stop.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job that is not taken is given back.
    pub(super) fn put(&self, job: T) -> Result<(), (Refused, T)> {
        let state = self.lock();
        self.put_into(state, job)
    }

    /// Only if somebody waits for it and nothing is before it.
    pub(super) fn put_if_idle(&self, job: T) -> Result<(), (Refused, T)> {
        let state = self.lock();
        if !state.idle || !state.jobs.is_empty() {
            return Err((Refused::Busy, job));
        }
        self.put_into(state, job)
    }

    fn put_into(&self, mut state: MutexGuard<'_, State<T>>, job: T) -> Result<(), (Refused, T)> {
        if state.closed {
            return Err((Refused::Closed, job));
        }
        if state.jobs.len() >= MAX_WAITING {
            return Err((Refused::TooMany, job));
        }
        state.jobs.push_back(job);
        let enough = state.jobs.len() >= state.wanted;
        drop(state);
        if enough {
            self.filled.notify_one();
        }
        Ok(())
    }

    /// Nothing more is taken in; what waits is still handed out.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_all();
    }

    /// Waits for a job, then up to `patience` for `expected` of them, and moves what is there into `batch`. `false`
    /// once the queue is closed and empty.
    pub(super) fn take(&self, batch: &mut Vec<T>, most: usize, expected: usize, patience: Duration) -> bool {
        let mut state = self.lock();
        while state.jobs.is_empty() {
            if state.closed {
                return false;
            }
            state.idle = true;
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle = false;
        }
        if state.jobs.len() < expected && !patience.is_zero() {
            let until = Instant::now() + patience;
            state.wanted = expected;
            while state.jobs.len() < expected && !state.closed {
                let Some(left) = until.checked_duration_since(Instant::now()) else {
                    break;
                };
                let waited = self.filled.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            state.wanted = 1;
        }
        let mut bytes = 0;
        while let Some(job) = state.jobs.front() {
            bytes += job.bytes();
            if batch.len() == most || (bytes > MAX_BATCH_BYTES && !batch.is_empty()) {
                break;
            }
            batch.extend(state.jobs.pop_front());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::thread;

    use super::*;
    use crate::{
        fingerprint::Fingerprint,
        record::{Owner, Retention},
    };

    impl Weigh for usize {
        fn bytes(&self) -> usize {
            *self
        }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    fn filled(jobs: &[usize]) -> Queue<usize> {
        let queue = Queue::new();
        for job in jobs {
            queue.put(*job).unwrap();
        }
        queue
    }

    /// What one look takes that waits for nothing.
    fn taken(queue: &Queue<usize>, most: usize) -> Vec<usize> {
        let mut batch = Vec::new();
        assert!(queue.take(&mut batch, most, 1, Duration::ZERO));
        batch
    }

    #[test]
    fn a_batch_has_as_many_jobs_and_bytes_as_it_may_have() {
        let queue = filled(&[0, 1, 2]);
        assert_eq!((taken(&queue, 2), taken(&queue, 2)), (vec![0, 1], vec![2]));
        let most = MAX_BATCH_BYTES;
        let queue = filled(&[most - 1, 1, 1, most, most + 1, 0, 5]);
        let batches = [(); 4].map(|()| taken(&queue, 10));
        assert_eq!(batches[..2], [vec![most - 1, 1], vec![1]]);
        assert_eq!(
            batches[2..],
            [vec![most], vec![most + 1]],
            "the first whatever it weighs"
        );
        assert_eq!(taken(&queue, 10), [0, 5]);
    }

    #[test]
    fn whoever_takes_waits_for_as_many_as_are_expected_or_for_the_end() {
        for ends in [false, true] {
            let queue = filled(&[1]);
            thread::scope(|scope| {
                let batch = scope.spawn(|| {
                    let mut batch = Vec::new();
                    assert!(queue.take(&mut batch, 10, 3, HOUR));
                    batch
                });
                while queue.lock().wanted != 3 {
                    assert!(!batch.is_finished(), "it did not wait");
                    thread::yield_now();
                }
                queue.put(2).unwrap();
                match ends {
                    true => queue.close(),
                    false => queue.put(3).unwrap(),
                }
                let expected = if ends { vec![1, 2] } else { vec![1, 2, 3] };
                assert_eq!(batch.join().unwrap(), expected);
            });
            assert_eq!(queue.lock().wanted, 1);
        }
        let mut batch = Vec::new();
        assert!(filled(&[1]).take(&mut batch, 10, 3, Duration::from_nanos(1)));
        assert_eq!(batch, [1], "its patience has an end");
    }

    #[test]
    fn a_job_is_given_at_once_only_to_who_waits_for_it() {
        let queue = filled(&[]);
        assert!(matches!(queue.put_if_idle(1), Err((Refused::Busy, 1))));
        thread::scope(|scope| {
            let batch = scope.spawn(|| taken(&queue, 10));
            while queue.put_if_idle(2).is_err() {
                assert!(!batch.is_finished(), "it did not wait");
                thread::yield_now();
            }
            assert_eq!(batch.join().unwrap(), [2]);
        });
        queue.put(3).unwrap();
        assert!(matches!(queue.put_if_idle(4), Err((Refused::Busy, 4))));
    }

    #[test]
    fn a_closed_queue_takes_nothing_in_and_hands_out_what_waits() {
        let queue = filled(&[1]);
        queue.close();
        assert!(matches!(queue.put(2), Err((Refused::Closed, 2))));
        assert_eq!(taken(&queue, 10), [1]);
        assert!(!queue.take(&mut Vec::new(), 10, 1, HOUR));
    }

    #[test]
    fn only_answers_weigh_and_who_does_not_wait_is_gone() {
        let (answer, waits) = oneshot::channel();
        let owner = Owner::from_bytes([1; 16]);
        let id = RecordId::from_bytes([1; 32]);
        let mut begin = BeginJob {
            id,
            claim: Claim::new(Fingerprint::new(1, [0; 32]), owner, HOUR, Retention::Forever),
            asked: 0,
            answer: Some(answer),
        };
        assert!(!begin.is_gone());
        drop(waits);
        assert!(begin.is_gone());
        begin.answer(Err(crate::error::StoreErrorKind::Full.into()));
        assert!(begin.is_gone() && begin.answer.is_none());
        assert_eq!((begin.bytes(), WriteJob::Begin(begin).bytes()), (0, 0));
        let not_kept = StoredResponse::not_kept(http::StatusCode::OK);
        for (change, bytes) in [
            (Change::Complete(not_kept.clone(), 1), not_kept.len()),
            (Change::Release, 0),
        ] {
            let (answer, _) = oneshot::channel();
            let job = ChangeJob {
                lease: Lease::new(id, owner, 1),
                change,
                asked: 0,
                answer,
            };
            assert_eq!(WriteJob::Change(job).bytes(), bytes);
        }
    }
}
