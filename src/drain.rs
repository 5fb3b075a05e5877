//! Work that outlives the request that caused it, and waiting for it at shutdown.

use std::{fmt, future::Future, pin::pin, sync::Arc, time::Duration};

use crate::sync::{
    Handle, Notify,
    atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire},
    timeout,
};

/// Counts work that must not be cut, and tells when there is none.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    /// That of requests with a client, too: it may be leaving right now. A server that stops tells of the end of a
    /// connection before the connection drops what it was working on.
    working: AtomicUsize,
    /// What of it is a task.
    detached: AtomicUsize,
    idle: Notify,
}

/// Some work; dropped when it ends, however it ends.
pub(crate) struct Working(Arc<Tasks>);

impl Drop for Working {
    fn drop(&mut self) {
        if self.0.working.fetch_sub(1, AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

/// As above, in a task.
struct Detached(Working);

impl Drop for Detached {
    fn drop(&mut self) {
        let Working(tasks) = &self.0;
        tasks.detached.fetch_sub(1, AcqRel);
    }
}

impl Tasks {
    /// Counts work from now on.
    pub(crate) fn work(self: &Arc<Self>) -> Working {
        self.working.fetch_add(1, AcqRel);
        Working(Arc::clone(self))
    }

    /// Runs `task` on `runtime`, counted.
    pub(crate) fn spawn<F>(self: &Arc<Self>, runtime: &Handle, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.work().spawn(runtime, task);
    }

    /// How many tasks there are.
    pub(crate) fn len(&self) -> usize {
        self.detached.load(Acquire)
    }
}

impl Working {
    /// Goes on with `task`, on `runtime`.
    pub(crate) fn spawn<F>(self, runtime: &Handle, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.0.detached.fetch_add(1, AcqRel);
        let detached = Detached(self);
        runtime.spawn(async move {
            task.await;
            drop(detached);
        });
    }
}

/// By which to wait until no request with a key is running, of all clones of a layer, those included that outlived their
/// clients; see [`IdempotencyLayer::drain`](crate::IdempotencyLayer::drain).
///
/// A runtime that shuts down drops its tasks. Without a drain, a handler whose client left is then cut short and its
/// outcome is unknown.
///
/// ```no_run
/// # use std::time::Duration;
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
/// # async fn serve<S>(listener: tokio::net::TcpListener, app: axum::Router, signal: S)
/// # where
/// #     S: Future<Output = ()> + Send + 'static,
/// # {
/// let idempotency = IdempotencyLayer::new(MemoryStore::new());
/// let drain = idempotency.drain();
/// // let app = app.layer(idempotency);
/// axum::serve(listener, app).with_graceful_shutdown(signal).await.unwrap();
/// if let Err(unfinished) = drain.within(Duration::from_secs(10)).await {
///     eprintln!("{unfinished}");
/// }
/// # }
/// ```
///
/// A request counts from when it first has to wait. A handler that keeps its thread from its start, as blocking code does,
/// is not seen until then, if its connection ends meanwhile.
#[derive(Clone, Debug)]
#[must_use = "it waits only when it is asked to"]
pub struct Drain {
    tasks: Arc<Tasks>,
}

/// The deadline of a drain passed while work was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unfinished {
    /// How many requests were still running, with a client or without; and how many tasks that only tell the store how
    /// one has ended.
    pub running: usize,
}

impl Drain {
    pub(crate) fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks }
    }

    /// How many requests are running without a client. Tasks count, too, that only tell the store how a request has ended.
    pub fn running(&self) -> usize {
        self.tasks.len()
    }

    /// Waits until no request with a key is running. Those that have a client count, too: it may be leaving, and a server
    /// that is still open never comes to an end here. So stop it first.
    pub async fn finished(&self) {
        loop {
            // Registered before the count is read, so the last task cannot end unseen in between.
            let mut idle = pin!(self.tasks.idle.notified());
            idle.as_mut().enable();
            if self.tasks.working.load(Acquire) == 0 {
                return;
            }
            idle.await;
        }
    }

    /// Waits as [`finished`](Self::finished) does, but no longer than `deadline`.
    ///
    /// # Errors
    /// [`Unfinished`] if there was work left. It goes on for as long as the runtime lives.
    pub async fn within(&self, deadline: Duration) -> Result<(), Unfinished> {
        timeout(deadline, self.finished()).await.map_err(|_| Unfinished {
            running: self.tasks.working.load(Acquire),
        })
    }
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "requests still running: {}", self.running)
    }
}

impl std::error::Error for Unfinished {}
