//! Work that outlives the request that caused it, and waiting for it at shutdown.

use std::{fmt, future::Future, pin::pin, sync::Arc, time::Duration};

use crate::sync::{
    Handle, Notify,
    atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire},
    timeout,
};

/// Counts tasks, and tells when there is none.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    running: AtomicUsize,
    idle: Notify,
}

/// One running task; dropped when the task ends, however it ends.
struct Running(Arc<Tasks>);

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

impl Tasks {
    /// Runs `task` on `runtime`, counted.
    pub(crate) fn spawn<F>(self: &Arc<Self>, runtime: &Handle, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.running.fetch_add(1, AcqRel);
        let running = Running(Arc::clone(self));
        runtime.spawn(async move {
            task.await;
            drop(running);
        });
    }

    pub(crate) fn len(&self) -> usize {
        self.running.load(Acquire)
    }
}

/// Waits for requests that outlived their clients, of all clones of a layer; see
/// [`IdempotencyLayer::drain`](crate::IdempotencyLayer::drain).
///
/// A runtime that shuts down drops its tasks. Without a drain, a handler whose client left is then cut short and its
/// outcome is unknown.
///
/// ```no_run
/// # use std::time::Duration;
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
/// # async fn serve(listener: tokio::net::TcpListener, app: axum::Router, signal: impl Future<Output = ()> + Send +
/// 'static) { let idempotency = IdempotencyLayer::new(MemoryStore::new());
/// let drain = idempotency.drain();
/// // let app = app.layer(idempotency);
/// axum::serve(listener, app).with_graceful_shutdown(signal).await.unwrap();
/// if let Err(unfinished) = drain.within(Duration::from_secs(10)).await {
///     eprintln!("{unfinished}");
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Drain {
    tasks: Arc<Tasks>,
}

/// The deadline of a drain passed while work was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unfinished {
    /// How many requests were still running.
    pub running: usize,
}

impl Drain {
    pub(crate) fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks }
    }

    /// How many requests are running without a client.
    pub fn running(&self) -> usize {
        self.tasks.len()
    }

    /// Waits until no request is running without a client.
    pub async fn finished(&self) {
        loop {
            // Registered before the count is read, so the last task cannot end unseen in between.
            let mut idle = pin!(self.tasks.idle.notified());
            idle.as_mut().enable();
            if self.tasks.len() == 0 {
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
            running: self.running(),
        })
    }
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "requests still running: {}", self.running)
    }
}

impl std::error::Error for Unfinished {}
