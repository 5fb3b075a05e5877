//! A payments API that is safe to retry, with a page that shows what that means.
//!
//! `cargo run --release --example demo`, then open <http://127.0.0.1:3000>. `--help` lists the options.

mod api;
mod args;
#[cfg(feature = "postgres")]
mod bank;
mod faults;
mod ledger;
mod linger;
mod metrics;
mod providers;
mod store;

use std::{io::Write, pin::pin, process::ExitCode, sync::Arc, time::Duration};

#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::Notify,
    time::{Instant, timeout, timeout_at},
};
use tower_idempotency::{Drain, IdempotencyLayer};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use crate::{args::Args, ledger::Ledger, store::Store};

/// How long all of what was begun may take at shutdown.
const DRAIN: Duration = Duration::from_secs(10);

/// And how long the store's last writes.
const CLOSE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::builder()
                .with_default_directive(LevelFilter::WARN.into())
                .from_env_lossy(),
        )
        .with_writer(std::io::stderr)
        .init();
    let args = match Args::from_env() {
        Ok(Some(args)) => args,
        Ok(None) => {
            print!("{}", args::HELP);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("demo: {error}\nTry --help.");
            return ExitCode::from(2);
        }
    };
    let served = Runtime::new().map_err(|error| error.to_string()).and_then(|runtime| {
        let served = runtime.block_on(serve(args));
        // What blocks a thread, such as a ledger that nobody reads, is not waited for.
        runtime.shutdown_background();
        served
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(args: Args) -> Result<(), String> {
    let ledger = Ledger::open(args.ledger.as_deref())
        .map_err(|error| format!("cannot open the ledger {:?}: {error}", args.ledger.unwrap_or_default()))?;
    // Before the store, which is left alone if there is nowhere to listen.
    let listener = TcpListener::bind(&*args.listen)
        .await
        .map_err(|error| format!("cannot listen on {:?}: {error}", args.listen))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let (store, ledger) = Store::open(args.store, ledger).await?;
    if let Store::File { path, .. } = &store {
        eprintln!("demo: records are kept in {}", path.display());
    }
    let idempotency = IdempotencyLayer::new(store.any());
    let drain = idempotency.drain();
    let app = api::router(Arc::new(ledger), store.clone(), &idempotency, args.retention);

    let mut stop = Stop::listen().map_err(|error| format!("cannot listen to signals: {error}"))?;
    // Who closed its output can still be served.
    let _ = writeln!(std::io::stdout(), "listening on http://{address}");
    let asked = Arc::new(Notify::new());
    let server = axum::serve(listener, app).with_graceful_shutdown(Arc::clone(&asked).notified_owned());
    let mut server = pin!(server.into_future());
    tokio::select! {
        served = &mut server => return served.map_err(|error| error.to_string()),
        () = stop.asked() => asked.notify_one(),
    }
    tokio::select! {
        () = finish(server, &drain, &store) => {}
        () = stop.asked() => eprintln!("demo: stopped at once, as was asked for again"),
    }
    Ok(())
}

/// Clients that are connected get their answers, and handlers whose clients left run to their ends: effects and answers
/// must not be cut. But all of that has its time.
async fn finish(server: impl Future<Output = std::io::Result<()>>, drain: &Drain, store: &Store) {
    let deadline = Instant::now() + DRAIN;
    if timeout_at(deadline, server).await.is_err() {
        eprintln!("demo: some clients are still connected");
    }
    if let Err(unfinished) = drain.within(deadline.saturating_duration_since(Instant::now())).await {
        eprintln!("demo: {unfinished}");
    }
    if timeout(CLOSE, store.close()).await.is_err() {
        eprintln!("demo: the store is not closed yet; that loses nothing");
    }
}

/// The signals that ask a server to stop. They are listened to before anybody is told that it is ready, and may ask.
#[cfg(unix)]
struct Stop(Signal, Signal);

#[cfg(unix)]
impl Stop {
    fn listen() -> std::io::Result<Self> {
        Ok(Self(signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?))
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Stop;

#[cfg(not(unix))]
impl Stop {
    fn listen() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn asked(&mut self) {
        drop(tokio::signal::ctrl_c().await);
    }
}
