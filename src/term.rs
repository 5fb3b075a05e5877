//! What an attempt knows of its lease: when to ask for it again, and whether it ever ran out.

use std::time::Duration;

use crate::sync::{Instant, Mutex, MutexGuard, PoisonError};

/// The lease of the operation's own record, as its owner counts it: from when the store was asked for it, since the store
/// counts from a moment after that.
pub(crate) struct Term {
    length: Duration,
    state: Mutex<State>,
}

enum State {
    Known(Known),
    /// The store said that it belongs to another attempt, or to none.
    Lost,
}

struct Known {
    asked: Instant,
    /// How long after that it is to be asked again.
    again_in: Duration,
    /// `None` if no clock can count that far.
    until: Option<Instant>,
    ran_out: bool,
}

/// What an attempt may conclude from its clock. The store has the last word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// At no moment could anybody take the attempt for lost.
    Held,
    /// It ran out, and was granted again to the same attempt: nobody took it over.
    Regained,
    /// It ran out. Whose it is, the store knows.
    Over,
    Lost,
}

impl Term {
    /// `asked` is when the store was asked for the lease.
    pub(crate) fn new(length: Duration, asked: Instant) -> Self {
        Self {
            length,
            state: Mutex::new(State::Known(Known::new(asked, length))),
        }
    }

    /// How long the lease can wait before it is asked for again. What was held before this counts, too.
    pub(crate) fn due_in(&self) -> Duration {
        match &*self.state() {
            State::Known(Known { asked, again_in, .. }) => again_in.saturating_sub(asked.elapsed()),
            State::Lost => self.length / 3,
        }
    }

    /// It is asked for, and again so long after that.
    pub(crate) fn ask_again_in(&self, pause: Duration) {
        if let State::Known(known) = &mut *self.state() {
            (known.asked, known.again_in) = (Instant::now(), pause);
        }
    }

    /// The store was `asked` then, and has granted it by now.
    pub(crate) fn renewed(&self, asked: Instant) {
        let mut state = self.state();
        let ran_out = match &*state {
            State::Known(known) => known.ran_out || known.is_over(),
            State::Lost => return,
        };
        *state = State::Known(Known {
            ran_out,
            ..Known::new(asked, self.length)
        });
    }

    pub(crate) fn lost(&self) {
        *self.state() = State::Lost;
    }

    pub(crate) fn standing(&self) -> Standing {
        match &*self.state() {
            State::Known(known) if known.is_over() => Standing::Over,
            State::Known(Known { ran_out: true, .. }) => Standing::Regained,
            State::Known(_) => Standing::Held,
            State::Lost => Standing::Lost,
        }
    }

    /// When it runs out if it is not granted again; `None` if no clock can count that far.
    pub(crate) fn until(&self) -> Option<Instant> {
        match &*self.state() {
            State::Lost => Instant::now().checked_add(self.length),
            State::Known(known) => known.until,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn new(asked: Instant, length: Duration) -> Self {
        Self {
            asked,
            again_in: length / 3,
            until: asked.checked_add(length),
            ran_out: false,
        }
    }

    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }
}
