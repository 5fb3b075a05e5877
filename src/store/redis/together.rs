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
    /// yet each step has a timer instead. Those of a runtime share one lock, and took a twentieth of the time of many steps.
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
fn wanted<S, A>(mut steps: Vec<Asked<S, A>>) -> Vec<Asked<S, A>> {
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
mod tests;
