//! The smallest protected service: `cargo run --example quickstart`, then
//!
//! ```sh
//! curl -i -X POST http://127.0.0.1:3000/payments -H 'Idempotency-Key: order-1'
//! curl -i -X POST http://127.0.0.1:3000/payments -H 'Idempotency-Key: order-1'
//! ```

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use axum::{Router, routing::post};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

async fn create_payment() -> String {
    static PAYMENTS: AtomicU64 = AtomicU64::new(0);
    let number = PAYMENTS.fetch_add(1, Relaxed) + 1;
    format!("this is payment number {number}\n")
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let idempotency = IdempotencyLayer::new(MemoryStore::new());
    let drain = idempotency.drain();

    let app = Router::new()
        .route("/payments", post(create_payment))
        .layer(idempotency);

    let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    let stop = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    axum::serve(listener, app).with_graceful_shutdown(stop).await?;
    // Handlers whose clients left are still running: let them end.
    drain
        .within(Duration::from_secs(10))
        .await
        .map_err(std::io::Error::other)
}
