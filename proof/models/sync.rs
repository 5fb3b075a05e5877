// The twins under a scheduler that decides at each of their steps who goes on, and a clock that only a model moves.

use std::{
    cell::RefCell,
    future::Future,
    ops::Add,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

pub use shuttle::sync::{Mutex, MutexGuard, atomic};
use shuttle::thread::yield_now;
pub use std::sync::PoisonError;

struct Clock {
    now: Duration,
    sleepers: Vec<Waker>,
}

thread_local! {
    // A model's threads are coroutines of one thread.
    static CLOCK: RefCell<Clock> = const { RefCell::new(Clock { now: Duration::ZERO, sleepers: Vec::new() }) };
}

/// A new model: its time begins.
pub fn begin_model() {
    CLOCK.with_borrow_mut(|clock| {
        clock.now = Duration::ZERO;
        clock.sleepers.clear();
    });
}

/// Lets time pass.
pub fn pass(time: Duration) {
    yield_now();
    let sleepers = CLOCK.with_borrow_mut(|clock| {
        clock.now += time;
        std::mem::take(&mut clock.sleepers)
    });
    sleepers.into_iter().for_each(Waker::wake);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(Duration);

impl Instant {
    pub fn now() -> Self {
        Self(CLOCK.with_borrow(|clock| clock.now))
    }

    pub fn elapsed(&self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }

    pub fn checked_add(&self, time: Duration) -> Option<Self> {
        self.0.checked_add(time).map(Self)
    }

    pub fn saturating_duration_since(&self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0 + time)
    }
}

#[derive(Debug)]
pub struct Sleep {
    until: Instant,
    /// It passes by itself, after everybody else had a chance.
    is_short: bool,
}

/// What somebody waits for when nothing else is to be heard, and what a model must not need to come to its end.
const SHORT: Duration = Duration::from_millis(10);

pub fn sleep(time: Duration) -> Sleep {
    Sleep {
        until: Instant::now() + time,
        is_short: time <= SHORT,
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.until {
            return Poll::Ready(());
        }
        if self.is_short {
            self.until = Instant::now();
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        CLOCK.with_borrow_mut(|clock| clock.sleepers.push(cx.waker().clone()));
        Poll::Pending
    }
}

#[derive(Debug)]
pub struct Elapsed;

impl std::fmt::Display for Elapsed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("it took too long")
    }
}

impl std::error::Error for Elapsed {}

pub async fn timeout<F: Future>(time: Duration, future: F) -> Result<F::Output, Elapsed> {
    let (mut future, mut sleep) = (std::pin::pin!(future), sleep(time));
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => Pin::new(&mut sleep).poll(cx).map(|()| Err(Elapsed)),
    })
    .await
}

/// Tokio's own, whose steps are whole: others may go on before each.
#[derive(Debug, Default)]
pub struct Notify(tokio::sync::Notify);

impl Notify {
    pub fn notify_one(&self) {
        yield_now();
        self.0.notify_one();
    }

    pub fn notify_waiters(&self) {
        yield_now();
        self.0.notify_waiters();
    }

    pub fn notified(&self) -> tokio::sync::futures::Notified<'_> {
        yield_now();
        self.0.notified()
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Handle;

impl Handle {
    /// There always is one.
    pub fn try_current() -> Result<Self, Elapsed> {
        Ok(Self)
    }

    pub fn spawn<F>(&self, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        drop(shuttle::future::spawn(task));
    }
}
