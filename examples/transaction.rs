//! A transfer between two accounts, before and after: what a retry pays twice becomes what happens exactly once.
//!
//! `cargo run --example transaction --features sqlx -- postgres://postgres@127.0.0.1/postgres`, with an address as well if
//! it is not to be 127.0.0.1:3000, then
//!
//! ```sh
//! curl -i 127.0.0.1:3000/transfers -H 'Idempotency-Key: k1' -H 'Content-Type: application/json' \
//!      -d '{"from":1,"to":2,"amount":5}'
//! ```

use axum::{Json, Router, extract::State, http::StatusCode, routing::post};
use deadpool_postgres::{Manager, Pool};
use serde::Deserialize;
use sqlx::{PgPool, query};
use tokio_postgres::NoTls;
use tower_idempotency::{Guarantee, IdempotencyLayer, PostgresStore, PostgresTransaction, SqlxTransaction};

#[derive(Deserialize)]
struct Transfer {
    from: i64,
    to: i64,
    amount: i64,
}

const TAKE: &str = "UPDATE accounts SET balance = balance - $2 WHERE id = $1 AND $2::bigint > 0";
const GIVE: &str = "UPDATE accounts SET balance = balance + $2 WHERE id = $1 AND $2::bigint > 0";

/// Nothing is kept of a 503: what failed is rolled back and may be tried again.
fn failed(error: impl std::error::Error) -> (StatusCode, String) {
    (StatusCode::SERVICE_UNAVAILABLE, error.to_string())
}

/// A 422 is kept, and what was written before it is rolled back.
fn one_account(rows: u64) -> Result<(), (StatusCode, String)> {
    let refused = || (StatusCode::UNPROCESSABLE_ENTITY, "no such account or amount".to_owned());
    (rows == 1).then_some(()).ok_or_else(refused)
}

type Answer = Result<StatusCode, (StatusCode, String)>;

// ---- before: a client whose connection breaks at the commit does not know, tries again, and pays twice

async fn unsafe_to_retry(State(pool): State<Pool>, Json(order): Json<Transfer>) -> Answer {
    let mut client = pool.get().await.map_err(failed)?;
    let transaction = client.transaction().await.map_err(failed)?;
    for (sql, account) in [(TAKE, order.from), (GIVE, order.to)] {
        let changed = transaction.execute(sql, &[&account, &order.amount]).await;
        one_account(changed.map_err(failed)?)?;
    }
    transaction.commit().await.map_err(failed)?;
    Ok(StatusCode::CREATED)
}

// ---- after: the transaction is the layer's, which commits it with the answer

async fn with_tokio_postgres(transaction: PostgresTransaction, Json(order): Json<Transfer>) -> Answer {
    for (sql, account) in [(TAKE, order.from), (GIVE, order.to)] {
        let changed = transaction.execute(sql, &[&account, &order.amount]).await;
        one_account(changed.map_err(failed)?)?;
    }
    Ok(StatusCode::CREATED)
}

async fn with_sqlx(mut transaction: SqlxTransaction, Json(order): Json<Transfer>) -> Answer {
    for (sql, account) in [(TAKE, order.from), (GIVE, order.to)] {
        let statement = query(sql).bind(account).bind(order.amount);
        let changed = statement.execute(&mut **transaction).await;
        one_account(changed.map_err(failed)?.rows_affected())?;
    }
    Ok(StatusCode::CREATED)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("give the database's URL")?;
    // Pools that the application has already.
    let pool = Pool::builder(Manager::new(url.parse()?, NoTls)).build()?;
    let sqlx_pool = PgPool::connect(&url).await?;
    let accounts = "CREATE TABLE IF NOT EXISTS accounts (id bigint PRIMARY KEY, balance bigint NOT NULL); \
         INSERT INTO accounts VALUES (1, 1000), (2, 1000) ON CONFLICT DO NOTHING";
    pool.get().await?.batch_execute(accounts).await?;

    let store = PostgresStore::builder()
        .create_table(true)
        .connect_pool(pool.clone())
        .await?;
    let exactly_once = |store| {
        IdempotencyLayer::new(store)
            .guarantee(Guarantee::Transactional)
            .require_key()
    };
    let app = Router::new()
        .route("/unsafe", post(unsafe_to_retry))
        .route(
            "/transfers",
            post(with_tokio_postgres).layer(exactly_once(store.clone())),
        )
        .route(
            "/sqlx/transfers",
            post(with_sqlx).layer(exactly_once(store.with_sqlx(sqlx_pool))),
        )
        .with_state(pool);

    let address = std::env::args().nth(2).unwrap_or_else(|| "127.0.0.1:3000".to_owned());
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
