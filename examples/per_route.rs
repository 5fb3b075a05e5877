//! Routes that differ, over one store: `cargo run --example per_route`.
//!
//! The tenant comes from an authentication layer, which therefore stands above the idempotency layer.

use std::time::Duration;

use axum::{
    Router,
    extract::Request,
    http::{StatusCode, header::AUTHORIZATION, request::Parts},
    middleware::{Next, from_fn},
    response::Response,
    routing::post,
};
use tower_idempotency::{Attempt, Concurrent, Guarantee, IdempotencyLayer, MemoryStore, Scope};

/// Who is asking, put into the request's extensions by `authenticate`.
#[derive(Clone)]
struct Account(String);

async fn authenticate(mut request: Request, next: Next) -> Result<Response, StatusCode> {
    // Whatever tells who is asking. The token may be refreshed between two attempts; the account stays.
    let token = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    let account = token.and_then(|token| token.strip_prefix("Bearer token-of-"));
    let account = Account(account.ok_or(StatusCode::UNAUTHORIZED)?.to_owned());
    request.extensions_mut().insert(account);
    Ok(next.run(request).await)
}

fn account(parts: &Parts) -> Option<Scope> {
    let Account(id) = parts.extensions.get()?;
    Some(Scope::tenant(id))
}

async fn create_payment() -> &'static str {
    "charged"
}

/// Safe to repeat, since the service that it calls is idempotent itself and gets the operation's name as its key. Not the
/// client's key: two tenants may use the same one.
async fn send_receipt(attempt: Attempt) -> String {
    format!("sent with key {}, attempt {}", attempt.id().to_hex(), attempt.number())
}

fn app() -> Router {
    let idempotency = IdempotencyLayer::new(MemoryStore::new()).require_key().scope(account);

    let payments = idempotency
        .clone()
        .retention(Duration::from_secs(72 * 60 * 60))
        .on_concurrent(Concurrent::Wait(Duration::from_secs(5)));
    let receipts = idempotency
        .guarantee(Guarantee::AtLeastOnce)
        .retention(Duration::from_secs(5 * 60));

    Router::new()
        .route("/payments", post(create_payment).layer(payments))
        .route("/receipts", post(send_receipt).layer(receipts))
        .layer(from_fn(authenticate))
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    axum::serve(listener, app()).await
}
