//! What the tasks of a runtime are about to do in one moment, so that it is done at once.

use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use tokio::{
    runtime::{Handle, Id},
    sync::oneshot,
    time::{Instant, error::Elapsed, timeout_at},
};

/// Whoever was not seen to by then has another task see to all, as often as it takes: the one that was to do so may be behind
/// something that blocks its thread.
const PATIENCE: Duration = Duration::from_millis(20);

/// Steps that are about to be made. Those of each runtime are apart, since one that stands still must not hold up
/// another's.
pub(super) struct Together<S, A> {
    waiting: Mutex<Waiting<S, A>>,
}

struct Waiting<S, A> {
    of: HashMap<Id, Vec<Asked<S, A>>>,
    /// Counts steps.
    next: u64,
}

/// A step, and who waits for its answer.
pub(super) struct Asked<S, A> {
    pub(super) step: S,
    pub(super) told: oneshot::Sender<A>,
    number: u64,
}

/// Why there is no answer. The step was made or not.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// Those that were to make it are gone, with their runtime.
    Left,
    Late(Elapsed),
}

impl<S, A> Default for Together<S, A> {
    fn default() -> Self {
        let of = HashMap::new();
        Self {
            waiting: Mutex::new(Waiting { of, next: 0 }),
        }
    }
}

impl<S: Send + 'static, A: Send + 'static> Together<S, A> {
    /// Makes a step with the others that tasks of this runtime make before it has run through all that can go on. A task of
    /// its own makes them, by the first one's `make`: none of them may depend on whether somebody polls another. Those that
    /// nobody waits for any more by then are not made. Once there are enough, they are made without waiting for others.
    pub(super) async fn join<C, F>(
        self: &Arc<Self>,
        step: S,
        enough: usize,
        deadline: Instant,
        with: &Arc<C>,
        make: fn(Arc<C>, Vec<Asked<S, A>>) -> F,
    ) -> Result<A, Unanswered>
    where
        C: Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let runtime = Handle::current();
        let (told, mut said) = oneshot::channel();
        let (number, count) = self.add(runtime.id(), step, told);
        let turn = |waits: bool| {
            let turn = Turn {
                together: Some(Arc::clone(self)),
                of: runtime.id(),
            };
            let with = Arc::clone(with);
            runtime.spawn(async move {
                if waits {
                    go_to_the_end().await;
                }
                make(with, turn.take()).await;
            });
        };
        if count == 1 || count == enough {
            turn(count < enough);
        }
        loop {
            let patience = deadline.min(Instant::now() + PATIENCE);
            match timeout_at(patience, &mut said).await {
                Ok(said) => return said.map_err(|_| Unanswered::Left),
                Err(elapsed) if patience == deadline => return Err(Unanswered::Late(elapsed)),
                Err(_) if self.has(runtime.id(), number) => turn(false),
                Err(_) => break,
            }
        }
        match timeout_at(deadline, said).await {
            Ok(said) => said.map_err(|_| Unanswered::Left),
            Err(elapsed) => Err(Unanswered::Late(elapsed)),
        }
    }

    /// Its number, and how many there are now.
    fn add(&self, of: Id, step: S, told: oneshot::Sender<A>) -> (u64, usize) {
        let mut waiting = self.waiting();
        let number = waiting.next;
        waiting.next += 1;
        let steps = waiting.of.entry(of).or_default();
        steps.push(Asked { step, told, number });
        (number, steps.len())
    }

    /// Whether it is not made yet.
    fn has(&self, of: Id, number: u64) -> bool {
        let waiting = self.waiting();
        let steps = waiting.of.get(&of);
        steps.is_some_and(|steps| steps.iter().any(|asked| asked.number == number))
    }
}

impl<S, A> Together<S, A> {
    fn take(&self, of: Id) -> Vec<Asked<S, A>> {
        self.waiting().of.remove(&of).map_or_else(Vec::new, wanted)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting<S, A>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those that somebody waits for still.
pub(super) fn wanted<S, A>(mut steps: Vec<Asked<S, A>>) -> Vec<Asked<S, A>> {
    steps.retain(|asked| !asked.told.is_closed());
    steps
}

/// The duty to make the steps of a runtime.
struct Turn<S, A> {
    /// Until it was done.
    together: Option<Arc<Together<S, A>>>,
    of: Id,
}

impl<S, A> Turn<S, A> {
    /// Whoever comes from now on is the first again.
    fn take(mut self) -> Vec<Asked<S, A>> {
        self.together
            .take()
            .map_or_else(Vec::new, |together| together.take(self.of))
    }
}

impl<S, A> Drop for Turn<S, A> {
    /// Its runtime is gone before it was its turn: nobody waits for what nobody makes.
    fn drop(&mut self) {
        if let Some(together) = self.together.take() {
            drop(together.take(self.of));
        }
    }
}

/// Behind all that can go on. Unlike what [`tokio::task::yield_now`] puts off, another thread may take it from there, if
/// this one is held up.
async fn go_to_the_end() {
    let mut is_there = false;
    poll_fn(|context| match is_there {
        true => Poll::Ready(()),
        false => {
            is_there = true;
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::{
        pin::pin,
        sync::{
            atomic::{AtomicU32, Ordering::Relaxed},
            mpsc::{Sender, channel},
        },
    };

    use futures_util::future::join_all;
    use tokio::runtime::Builder;

    use super::*;

    /// How many were made at once each time.
    #[derive(Default)]
    struct Made(Mutex<Vec<usize>>);

    type Doubling = Together<u32, u32>;

    async fn double(made: Arc<Made>, steps: Vec<Asked<u32, u32>>) {
        made.0.lock().unwrap().push(steps.len());
        for Asked { step, told, .. } in steps {
            let _ = told.send(step * 2);
        }
    }

    async fn join(together: &Arc<Doubling>, step: u32, enough: usize, made: &Arc<Made>) -> Result<u32, Unanswered> {
        let deadline = Instant::now() + Duration::from_secs(1);
        together.join(step, enough, deadline, made, double).await
    }

    #[tokio::test]
    async fn steps_of_one_moment_are_made_at_once_and_each_gets_its_own_answer() {
        let (together, made) = (Arc::default(), Arc::default());
        for start in [0, 100] {
            let answers = join_all((start..start + 10).map(|step| join(&together, step, 50, &made))).await;
            let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
            assert_eq!(answers, (start..start + 10).map(|step| step * 2).collect::<Vec<_>>());
        }
        assert_eq!(*made.0.lock().unwrap(), [10, 10]);
    }

    #[tokio::test]
    async fn once_there_are_enough_nobody_else_is_waited_for() {
        let (together, made) = (Arc::default(), Arc::default());
        let late = async {
            go_to_the_end().await;
            join(&together, 3, 2, &made).await
        };
        let (first, second, late) = tokio::join!(join(&together, 1, 2, &made), join(&together, 2, 2, &made), late);
        assert_eq!([first, second, late].map(Result::unwrap), [2, 4, 6]);
        let made = made.0.lock().unwrap();
        assert_eq!(made.iter().filter(|count| **count > 0).collect::<Vec<_>>(), [&2, &1]);
    }

    #[test]
    fn those_of_different_runtimes_are_made_apart() {
        let runtime = || Builder::new_current_thread().enable_all().build().unwrap();
        let (still, other) = (runtime(), runtime());
        let (together, made) = (Arc::default(), Arc::default());
        let mut first = Box::pin(join(&together, 1, 50, &made));
        let poll = still.block_on(poll_fn(|context| Poll::Ready(first.as_mut().poll(context))));
        assert!(poll.is_pending());
        assert_eq!(other.block_on(join(&together, 2, 50, &made)).unwrap(), 4);
        assert_eq!(*made.0.lock().unwrap(), [1]);
        drop(still);
        assert!(matches!(other.block_on(first), Err(Unanswered::Left)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_not_seen_to_sees_to_all() {
        let (together, made): (Arc<Doubling>, Arc<Made>) = (Arc::default(), Arc::default());
        // As if the first one's turn were behind something that blocks.
        let (told, said) = oneshot::channel();
        together.add(Handle::current().id(), 1, told);
        let start = Instant::now();
        assert_eq!(join(&together, 2, 50, &made).await.unwrap(), 4);
        assert_eq!(said.await.unwrap(), 2);
        assert!(start.elapsed() >= PATIENCE);
        assert_eq!(*made.0.lock().unwrap(), [2]);
    }

    /// Blocks its thread at the `poll`th poll of a step that is about to be made, until it is let go.
    async fn block_at(
        poll: usize,
        step: impl Future<Output = Result<u32, Unanswered>>,
        blocked: Sender<Sender<()>>,
    ) -> u32 {
        let (mut step, mut polls) = (pin!(step), 0);
        poll_fn(|context| {
            let polled = step.as_mut().poll(context);
            polls += 1;
            if polls == poll {
                let (let_go, until) = channel::<()>();
                // Whoever holds the other end of this lets go by dropping it.
                blocked.send(let_go).unwrap();
                let _ = until.recv();
            }
            polled
        })
        .await
        .unwrap()
    }

    #[test]
    fn steps_behind_threads_that_are_blocked_are_made_by_another() {
        let runtime = Builder::new_multi_thread()
            .worker_threads(3)
            .enable_all()
            .build()
            .unwrap();
        let (together, made): (Arc<Doubling>, Arc<Made>) = Default::default();
        let step = |step| {
            let (together, made) = (Arc::clone(&together), Arc::clone(&made));
            async move {
                let deadline = Instant::now() + Duration::from_secs(60);
                together.join(step, 50, deadline, &made, double).await
            }
        };
        let (blocked, blocks) = channel();
        // The first has its turn in a place from which nobody takes it: next on the thread that it blocks. The second has
        // lost its patience by then, and blocks another thread with the turn that follows from that.
        let first = runtime.spawn(block_at(1, step(1), blocked.clone()));
        let first_block = blocks.recv().unwrap();
        let second = runtime.spawn(block_at(2, step(2), blocked));
        let second_block = blocks.recv().unwrap();
        assert_eq!(runtime.block_on(runtime.spawn(step(3))).unwrap().unwrap(), 6);
        drop((first_block, second_block));
        assert_eq!(runtime.block_on(first).unwrap(), 2);
        assert_eq!(runtime.block_on(second).unwrap(), 4);
        let made: usize = made.0.lock().unwrap().iter().sum();
        assert_eq!(made, 3, "each once");
    }

    #[test]
    fn on_many_threads_each_gets_its_own_answer_and_none_is_made_twice() {
        const TASKS: u32 = 64;
        const STEPS: u32 = 200;
        /// How often each was made: first those that are waited for, then those that are left at once.
        type Times = Vec<AtomicU32>;
        async fn count(times: Arc<Times>, steps: Vec<Asked<u32, u32>>) {
            for Asked { step, told, .. } in steps {
                times[step as usize].fetch_add(1, Relaxed);
                let _ = told.send(step * 2);
            }
        }
        let runtime = Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .unwrap();
        let together: Arc<Doubling> = Arc::default();
        let times: Arc<Times> = Arc::new((0..2 * TASKS * STEPS).map(|_| AtomicU32::new(0)).collect());
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let (together, times) = (Arc::clone(&together), Arc::clone(&times));
                runtime.spawn(async move {
                    for step in task * STEPS..(task + 1) * STEPS {
                        let deadline = Instant::now() + Duration::from_secs(60);
                        let enough = [2, 7, 50][step as usize % 3];
                        let join = |step| together.join(step, enough, deadline, &times, count);
                        assert_eq!(join(step).await.unwrap(), step * 2);
                        if step.is_multiple_of(5) {
                            // The turn that it leaves behind may be that of others.
                            let mut left = Box::pin(join(TASKS * STEPS + step));
                            poll_fn(|context| Poll::Ready(left.as_mut().poll(context).is_pending())).await;
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            runtime.block_on(task).unwrap();
        }
        let times: Vec<_> = times.iter().map(|times| times.load(Relaxed)).collect();
        let (waited, left) = times.split_at((TASKS * STEPS) as usize);
        assert!(waited.iter().all(|times| *times == 1));
        assert!(left.iter().all(|times| *times <= 1));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_no_answer_by_its_deadline_is_told_so() {
        let (together, nothing): (Arc<Doubling>, _) = (Arc::default(), Arc::new(()));
        let deadline = Instant::now() + Duration::from_secs(1);
        let never = |_, steps: Vec<Asked<u32, u32>>| async move {
            std::future::pending::<()>().await;
            drop(steps);
        };
        let answer = together.join(1, 50, deadline, &nothing, never).await;
        assert!(matches!(answer, Err(Unanswered::Late(_))));
        assert_eq!(Instant::now().duration_since(deadline).as_millis(), 0);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_not_made() {
        let (together, made) = (Arc::default(), Arc::default());
        {
            let mut left = Box::pin(join(&together, 1, 50, &made));
            assert!(
                poll_fn(|context| Poll::Ready(left.as_mut().poll(context)))
                    .await
                    .is_pending()
            );
        }
        assert_eq!(join(&together, 2, 50, &made).await.unwrap(), 4);
        assert_eq!(*made.0.lock().unwrap(), [1]);
    }
}
