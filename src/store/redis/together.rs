//! What the tasks of a runtime are about to do in one moment, so that it is done at once.

use std::{
    future::{Future, poll_fn},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use tokio::{
    runtime::{Handle, Id},
    sync::oneshot,
    time::{Instant, error::Elapsed, sleep, timeout_at},
};

/// How long is waited for a task that is to make steps, before another one is to do so, as often as it takes: the first may be
/// behind something that blocks its thread.
pub(super) const PATIENCE: Duration = Duration::from_millis(20);

/// There is room for so many from the start.
const FEW: usize = 8;

/// Steps that are about to be made. Those of each runtime are apart, since one that stands still must not hold up
/// another's.
pub(super) struct Together<S, A> {
    waiting: Mutex<Waiting<S, A>>,
}

struct Waiting<S, A> {
    /// Few, nearly always one.
    of: Vec<(Id, Vec<Asked<S, A>>)>,
    watched: Vec<Watched>,
    /// Counts steps.
    next: u64,
}

/// A runtime that has a watch.
struct Watched {
    of: Id,
    on_duty: bool,
    /// Since the last look.
    has_come: bool,
}

/// A step, and who waits for its answer.
pub(super) struct Asked<S, A> {
    pub(super) step: S,
    pub(super) told: oneshot::Sender<A>,
    pub(super) number: u64,
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
        let waiting = Waiting {
            of: Vec::new(),
            watched: Vec::new(),
            next: 0,
        };
        Self {
            waiting: Mutex::new(waiting),
        }
    }
}

impl<S: Send + 'static, A: Send + 'static> Together<S, A> {
    /// Makes a step with the others that tasks of this runtime make before it has run through all that can go on. A task of
    /// its own makes them, by the first one's `make`: none of them may depend on whether somebody polls another. Those that
    /// nobody waits for any more by then are not made. Once there are enough, they are made without waiting for others.
    ///
    /// `make` answers each by its deadline. A watch sees to it that it is called, within two of its looks; where none is on duty
    /// yet each step has a timer instead. Timers by the thousand cost their runtime as much as the rest of this.
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
        let Added {
            number,
            count,
            is_watched,
            begins_watch,
        } = self.add(runtime.id(), step, told);
        let turn = |waits: bool| self.turn(&runtime, waits, with, make);
        if count == 1 || count == enough {
            turn(count < enough);
        }
        if begins_watch {
            let watch = Watch {
                together: Arc::clone(self),
                of: runtime.id(),
                is_over: false,
            };
            runtime.spawn(watch.keep(runtime.clone(), Arc::clone(with), make));
        }
        if is_watched {
            return said.await.map_err(|_| Unanswered::Left);
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

    /// A task that makes what is to be made when it is its turn.
    fn turn<C, F>(
        self: &Arc<Self>,
        runtime: &Handle,
        waits: bool,
        with: &Arc<C>,
        make: fn(Arc<C>, Vec<Asked<S, A>>) -> F,
    ) where
        C: Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let turn = Turn {
            together: Some(Arc::clone(self)),
            of: runtime.id(),
        };
        let with = Arc::clone(with);
        runtime.spawn(async move {
            if waits {
                // Twice: those who go on now may let others go on.
                go_to_the_end().await;
                go_to_the_end().await;
            }
            make(with, turn.take()).await;
        });
    }

    fn add(&self, of: Id, step: S, told: oneshot::Sender<A>) -> Added {
        let mut waiting = self.waiting();
        let number = waiting.next;
        waiting.next += 1;
        let asked = Asked { step, told, number };
        let count = match waiting.place(of) {
            Some(place) => {
                let (_, steps) = &mut waiting.of[place];
                steps.push(asked);
                steps.len()
            }
            None => {
                let mut steps = Vec::with_capacity(FEW);
                steps.push(asked);
                waiting.of.push((of, steps));
                1
            }
        };
        let (is_watched, begins_watch) = match waiting.watched(of) {
            Some(watched) => {
                watched.has_come = true;
                (watched.on_duty, false)
            }
            None => {
                waiting.watched.push(Watched {
                    of,
                    on_duty: false,
                    has_come: true,
                });
                (false, true)
            }
        };
        Added {
            number,
            count,
            is_watched,
            begins_watch,
        }
    }

    /// Whether it is not made yet.
    fn has(&self, of: Id, number: u64) -> bool {
        let waiting = self.waiting();
        let steps = waiting.place(of).map(|place| &waiting.of[place].1);
        steps.is_some_and(|steps| steps.iter().any(|asked| asked.number == number))
    }
}

impl<S, A> Together<S, A> {
    fn take(&self, of: Id) -> Vec<Asked<S, A>> {
        let taken = self.waiting().take(of);
        wanted(taken)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting<S, A>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Added {
    number: u64,
    /// How many there are now.
    count: usize,
    is_watched: bool,
    begins_watch: bool,
}

impl<S, A> Waiting<S, A> {
    fn watched(&mut self, of: Id) -> Option<&mut Watched> {
        self.watched.iter_mut().find(|watched| watched.of == of)
    }

    fn is_no_longer_watched(&mut self, of: Id) {
        self.watched.retain(|watched| watched.of != of);
    }

    /// That of a runtime's steps.
    fn place(&self, of: Id) -> Option<usize> {
        self.of.iter().position(|(runtime, _)| *runtime == of)
    }

    fn take(&mut self, of: Id) -> Vec<Asked<S, A>> {
        match self.place(of) {
            Some(place) => self.of.swap_remove(place).1,
            None => Vec::new(),
        }
    }
}

/// Those that somebody waits for still.
pub(super) fn wanted<S, A>(mut steps: Vec<Asked<S, A>>) -> Vec<Asked<S, A>> {
    steps.retain(|asked| !asked.told.is_closed());
    steps
}

/// Sees to it that the steps of a runtime are made, as long as there are any.
struct Watch<S, A> {
    together: Arc<Together<S, A>>,
    of: Id,
    /// There was nothing left to be watched.
    is_over: bool,
}

struct Look {
    /// What comes next is a step of this number.
    next: u64,
    finds_left: bool,
}

impl<S: Send + 'static, A: Send + 'static> Watch<S, A> {
    async fn keep<C, F>(mut self, runtime: Handle, with: Arc<C>, make: fn(Arc<C>, Vec<Asked<S, A>>) -> F)
    where
        C: Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        // Only now: where it was begun it may have been behind something that blocks its thread. From here on nothing wakes it
        // but its timer.
        if let Some(watched) = self.together.waiting().watched(self.of) {
            watched.on_duty = true;
        }
        let mut seen = 0;
        while let Some(look) = self.look(seen) {
            if look.finds_left {
                self.together.turn(&runtime, false, &with, make);
            }
            seen = look.next;
            sleep(PATIENCE).await;
        }
    }

    /// Whether steps with smaller numbers than this are left. `None` if none came since the last look, and none is left.
    fn look(&mut self, seen: u64) -> Option<Look> {
        let mut waiting = self.together.waiting();
        let next = waiting.next;
        let steps = waiting.place(self.of).map(|place| &waiting.of[place].1);
        let finds_left = steps.is_some_and(|steps| steps.iter().any(|asked| asked.number < seen));
        let is_empty = steps.is_none();
        let has_come = waiting
            .watched(self.of)
            .is_some_and(|watched| std::mem::take(&mut watched.has_come));
        if is_empty && !has_come {
            // Under the same lock under which others come.
            waiting.is_no_longer_watched(self.of);
            self.is_over = true;
            return None;
        }
        Some(Look { next, finds_left })
    }
}

impl<S, A> Drop for Watch<S, A> {
    /// Its runtime is gone: nobody makes what is left.
    fn drop(&mut self) {
        if !self.is_over {
            let left = {
                let mut waiting = self.together.waiting();
                waiting.is_no_longer_watched(self.of);
                waiting.take(self.of)
            };
            drop(left);
        }
    }
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

    fn watch(together: &Arc<Doubling>) -> Watch<u32, u32> {
        Watch {
            together: Arc::clone(together),
            of: Handle::current().id(),
            is_over: false,
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
    async fn who_is_not_seen_to_sees_to_all_where_no_watch_is_on_duty() {
        let (together, made): (Arc<Doubling>, Arc<Made>) = (Arc::default(), Arc::default());
        // As if the first one's turn were behind something that blocks, and the watch that it began.
        let (told, said) = oneshot::channel();
        assert!(together.add(Handle::current().id(), 1, told).begins_watch);
        let start = Instant::now();
        assert_eq!(join(&together, 2, 50, &made).await.unwrap(), 4);
        assert_eq!(said.await.unwrap(), 2);
        assert!(start.elapsed() >= PATIENCE);
        assert_eq!(*made.0.lock().unwrap(), [2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_sees_to_those_who_are_not_seen_to_until_there_are_none() {
        let (together, made): (Arc<Doubling>, Arc<Made>) = (Arc::default(), Arc::default());
        let (start, id) = (Instant::now(), Handle::current().id());
        let add = |step| {
            let (told, said) = oneshot::channel();
            (together.add(id, step, told), said)
        };
        // As if nobody had been given the turn.
        let (first, said_first) = add(1);
        assert!(first.begins_watch && !first.is_watched);
        let kept = tokio::spawn(watch(&together).keep(Handle::current(), Arc::clone(&made), double));
        go_to_the_end().await;
        let (second, said_second) = add(2);
        assert!(!second.begins_watch && second.is_watched);
        assert_eq!((said_first.await.unwrap(), said_second.await.unwrap()), (2, 4));
        assert!(
            (PATIENCE..=PATIENCE * 2).contains(&start.elapsed()),
            "{:?}",
            start.elapsed()
        );
        // Who comes while it is on duty is seen to, too.
        assert_eq!(join(&together, 3, 50, &made).await.unwrap(), 6);
        kept.await.unwrap();
        assert!(start.elapsed() <= PATIENCE * 4, "{:?}", start.elapsed());
        assert_eq!(*made.0.lock().unwrap(), [2, 1]);
        assert!(add(4).0.begins_watch, "the next one begins another");
    }

    #[test]
    fn those_who_are_watched_are_told_when_their_runtime_is_gone() {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let (together, made): (Arc<Doubling>, Arc<Made>) = (Arc::default(), Arc::default());
        let (told, said) = oneshot::channel();
        runtime.block_on(async {
            assert!(together.add(Handle::current().id(), 1, told).begins_watch);
            tokio::spawn(watch(&together).keep(Handle::current(), made, double));
            go_to_the_end().await;
            let of = Handle::current().id();
            assert!(together.waiting().watched(of).is_some_and(|watched| watched.on_duty));
        });
        drop(runtime);
        assert!(said.blocking_recv().is_err());
        assert!(together.waiting().watched.is_empty());
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
        // One that never comes on duty.
        together.waiting().watched.push(Watched {
            of: runtime.handle().id(),
            on_duty: false,
            has_come: false,
        });
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
    fn steps_behind_a_thread_that_is_blocked_are_made_by_the_watch() {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (together, made): (Arc<Doubling>, Arc<Made>) = Default::default();
        let _entered = runtime.enter();
        let id = runtime.handle().id();
        // What is there keeps the watch on duty.
        let (told, said) = oneshot::channel();
        assert!(together.add(id, 1, told).begins_watch);
        runtime.spawn(watch(&together).keep(runtime.handle().clone(), Arc::clone(&made), double));
        runtime.block_on(async {
            while !together.waiting().watched(id).is_some_and(|watched| watched.on_duty) {
                tokio::task::yield_now().await;
            }
        });
        let step = |step, enough| {
            let (together, made) = (Arc::clone(&together), Arc::clone(&made));
            async move { join(&together, step, enough, &made).await }
        };
        let (blocked, blocks) = channel();
        // Makes enough of them, so that it has the turn: next on the thread that it blocks.
        let blocking = runtime.spawn(block_at(1, step(2, 2), blocked));
        let block = blocks.recv().unwrap();
        let third = runtime.spawn(step(3, 50));
        let answers = runtime.block_on(async { (said.await.unwrap(), third.await.unwrap().unwrap()) });
        assert_eq!(answers, (2, 6));
        drop(block);
        assert_eq!(runtime.block_on(blocking).unwrap(), 4);
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
