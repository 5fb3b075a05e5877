//! A protected application on a connection over which anything may come.

use axum::{Router, body::Bytes, routing::post};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tower_idempotency::{Fingerprinter, IdempotencyLayer, MemoryStore};

/// Serves `bytes`, and then a good request on another connection, twice: it is answered, and replayed.
pub fn serve(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let layer = IdempotencyLayer::new(MemoryStore::new()).fingerprint(Fingerprinter::canonical_json());
        let app = Router::new().route("/pay", post(async |body: Bytes| body)).layer(layer);
        exchange(&app, bytes, true).await;
        let good = b"POST /pay HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nidempotency-key: after\r\n\
            content-length: 2\r\n\r\n{}";
        let first = exchange(&app, good, false).await;
        let second = exchange(&app, good, false).await;
        assert!(first.starts_with(b"HTTP/1.1 200 ") && first.ends_with(b"\r\n\r\n{}"));
        assert!(second.starts_with(b"HTTP/1.1 200 ") && second.ends_with(b"\r\n\r\n{}"));
        let second = String::from_utf8_lossy(&second);
        assert!(second.contains("idempotent-replayed: true"), "{second}");
    });
}

/// Sends all of it and reads what comes back.
async fn exchange(app: &Router, bytes: &[u8], hangs_up: bool) -> Vec<u8> {
    let (mut client, server) = duplex(1 << 16);
    let service = TowerToHyperService::new(app.clone());
    let serving = tokio::spawn(async move {
        let builder = Builder::new(TokioExecutor::new());
        let _ = builder.serve_connection(TokioIo::new(server), service).await;
    });
    let mut answer = Vec::new();
    let _ = client.write_all(bytes).await;
    if hangs_up {
        let _ = client.shutdown().await;
    }
    let _ = client.read_to_end(&mut answer).await;
    assert!(serving.await.is_ok(), "the server panicked");
    answer
}
