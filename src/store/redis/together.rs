//! What the tasks of a runtime are about to do in one moment, so that it is done at once.

use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};

use tokio::{
    runtime::{Handle, Id},
    sync::oneshot,
    time::{Instant, error::Elapsed, timeout_at},
};

/// Whoever was not seen to by then sees to all. The task that was to do so may be behind another one that blocks its thread.
const PATIENCE: Duration = Duration::from_millis(20);

/// Steps that are about to be made. Those of each runtime are apart, since one that stands still must not hold up
/// another's.
pub(super) struct Together<S, A> {
    waiting: Mutex<HashMap<Id, Vec<Asked<S, A>>>>,
    /// Counts steps.
    next: AtomicU64,
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
    /// The runtime of those that were to make it is gone.
    Left,
    Late(Elapsed),
}

impl<S, A> Default for Together<S, A> {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            next: AtomicU64::default(),
        }
    }
}

impl<S: Send + 'static, A: Send + 'static> Together<S, A> {
    /// Makes a step with the others that tasks of this runtime make before it has run through all that can go on. A task of
    /// its own makes them, by the first one's `make`: none of them may depend on whether somebody polls another. Those that
    /// nobody waits for any more by then are not made.
    pub(super) async fn join<C, F>(
        self: &Arc<Self>,
        step: S,
        deadline: Instant,
        with: &Arc<C>,
        make: fn(Arc<C>, Vec<Asked<S, A>>) -> F,
    ) -> Result<A, Unanswered>
    where
        C: Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (runtime, number) = (Handle::current(), self.next.fetch_add(1, Relaxed));
        let (told, mut said) = oneshot::channel();
        if self.add(runtime.id(), Asked { step, told, number }) {
            let turn = Turn {
                together: Some(Arc::clone(self)),
                of: runtime.id(),
            };
            let with = Arc::clone(with);
            runtime.spawn(async move {
                go_to_the_end().await;
                make(with, turn.take()).await;
            });
        }
        let patience = deadline.min(Instant::now() + PATIENCE);
        if let Ok(said) = timeout_at(patience, &mut said).await {
            return said.map_err(|_| Unanswered::Left);
        }
        if let Some(waiting) = self.take_with(runtime.id(), number) {
            tokio::spawn(make(Arc::clone(with), waiting));
        }
        match timeout_at(deadline, said).await {
            Ok(said) => said.map_err(|_| Unanswered::Left),
            Err(elapsed) => Err(Unanswered::Late(elapsed)),
        }
    }

    /// Whether it is the first, and has to see to it that all are made.
    fn add(&self, of: Id, asked: Asked<S, A>) -> bool {
        let mut waiting = self.waiting();
        let steps = waiting.entry(of).or_default();
        steps.push(asked);
        steps.len() == 1
    }

    /// All, if this one is still among them.
    fn take_with(&self, of: Id, number: u64) -> Option<Vec<Asked<S, A>>> {
        let mut waiting = self.waiting();
        let steps = waiting.get(&of)?;
        let is_there = steps.iter().any(|asked| asked.number == number);
        let steps = if is_there { waiting.remove(&of) } else { None };
        steps.map(wanted)
    }
}

impl<S, A> Together<S, A> {
    fn take(&self, of: Id) -> Vec<Asked<S, A>> {
        self.waiting().remove(&of).map_or_else(Vec::new, wanted)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<Id, Vec<Asked<S, A>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those that somebody waits for still.
fn wanted<S, A>(mut steps: Vec<Asked<S, A>>) -> Vec<Asked<S, A>> {
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
