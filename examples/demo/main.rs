//! A payments API that is safe to retry, with a page that shows what that means.
//!
//! `cargo run --release --example demo`, then open <http://127.0.0.1:3000>. `--help` lists the options.

mod api;
mod args;
#[cfg(feature = "postgres")]
mod bank;
mod faults;
mod ledger;
mod metrics;
mod providers;
mod store;

use std::{process::ExitCode, sync::Arc, time::Duration};

use tokio::net::TcpListener;
use tower_idempotency::{Drain, IdempotencyLayer};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use crate::{args::Args, ledger::Ledger, store::Store};

/// How long work that outlived its client may take at shutdown.
const DRAIN: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
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
    match serve(args).await {
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
    let listener = TcpListener::bind(args.listen)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", args.listen))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let (store, ledger) = Store::open(args.store, ledger).await?;
    if let Store::File { path, .. } = &store {
        eprintln!("demo: records are kept in {}", path.display());
    }
    let idempotency = IdempotencyLayer::new(store.any());
    let drain = idempotency.drain();
    let app = api::router(Arc::new(ledger), store.clone(), &idempotency, args.retention);

    let stop = stop_signal().map_err(|error| format!("cannot listen to signals: {error}"))?;
    println!("listening on http://{address}");
    axum::serve(listener, app)
        .with_graceful_shutdown(stop)
        .await
        .map_err(|error| error.to_string())?;
    finish(&drain).await;
    store.close().await;
    Ok(())
}

/// Handlers whose clients left are still running: their effects and answers must not be cut.
async fn finish(drain: &Drain) {
    if let Err(unfinished) = drain.within(DRAIN).await {
        eprintln!("demo: {unfinished}");
    }
}

/// Listens from now on, before anybody is told that the server is ready and may ask it to stop.
#[cfg(unix)]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async { drop(tokio::signal::ctrl_c().await) })
}
