//! With records in a database the ledger is a table there, and money moves between accounts beside it: what a transfer
//! writes is committed together with its answer, or not at all.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use deadpool_postgres::{Client, GenericClient, Manager, Object, Pool};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::{runtime::Handle, time::timeout};
use tokio_postgres::{Error, NoTls};
use tower_idempotency::{Attempt, PostgresTransaction};

use crate::{
    api::{Answer, App, answer, fresh_id, parse},
    faults::Faults,
    ledger::Effect,
    providers::problem,
};

/// The accounts at the start, and what each of them holds. Nodes that start together make them once.
const TABLES: &str = "\
BEGIN;
SELECT pg_advisory_xact_lock(8314046219);
CREATE TABLE IF NOT EXISTS demo_ledger (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id text NOT NULL, route text NOT NULL, request text NOT NULL, at text NOT NULL
);
CREATE TABLE IF NOT EXISTS demo_accounts (id bigint PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0));
INSERT INTO demo_accounts SELECT id, 100000 FROM generate_series(1, 10) AS id
    WHERE NOT EXISTS (SELECT FROM demo_accounts);
COMMIT";

/// How long the database may take for an answer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// And until the tables are there.
const TO_START: Duration = Duration::from_secs(20);

pub struct Bank {
    pool: Pool,
    /// The last effect in the table when this process started.
    started: i64,
}

impl Bank {
    pub async fn open(url: &str) -> Result<Self, String> {
        let config = url.parse().map_err(|error: Error| error.to_string())?;
        let pool = Pool::builder(Manager::new(config, NoTls)).build();
        let pool = pool.map_err(|error| error.to_string())?;
        let open = async {
            let client = pool.get().await.map_err(|error| error.to_string())?;
            client.batch_execute(TABLES).await.map_err(|error| error.to_string())?;
            let last = client.query_one("SELECT coalesce(max(number), 0) FROM demo_ledger", &[]);
            Ok::<_, String>(last.await.map_err(|error| error.to_string())?.get(0))
        };
        let started = timeout(TO_START, open).await;
        let started = started.map_err(|_| "the demo's tables do not answer; are they locked?")??;
        Ok(Self { pool, started })
    }

    /// What the database says, or why it does not.
    async fn ask<T>(&self, what: impl AsyncFnOnce(&Client) -> Result<T, Error>) -> Result<T, String> {
        let late = |_| "the database does not answer".to_owned();
        let client = timeout(TIMEOUT, self.pool.get()).await.map_err(late)?;
        let mut asked = Asked(Some(client.map_err(|error| error.to_string())?));
        let Asked(Some(client)) = &asked else {
            return Err("the connection is gone".to_owned());
        };
        let answer = timeout(TIMEOUT, what(client)).await.map_err(late)?;
        drop(asked.0.take());
        answer.map_err(|error| error.to_string())
    }

    /// Records an effect in a transaction of its own. After an error it may be there, too.
    pub async fn record(&self, effect: &Effect) -> Result<(), String> {
        self.ask(async |client| record(client, effect).await).await
    }

    /// Of all nodes since this one started, newest first.
    pub async fn effects(&self) -> Result<Vec<Arc<Effect>>, String> {
        let sql = "SELECT id, route, request, at FROM demo_ledger WHERE number > $1 ORDER BY number DESC";
        let rows = self
            .ask(async |client| client.query(sql, &[&self.started]).await)
            .await?;
        let effects = rows.into_iter().filter_map(|row| {
            Some(Arc::new(Effect {
                id: row.get("id"),
                route: row.get("route"),
                request: RawValue::from_string(row.get("request")).ok()?,
                at: row.get("at"),
            }))
        });
        Ok(effects.collect())
    }

    /// How many of those there are beside these.
    pub async fn count_beside(&self, ids: &[String]) -> Result<i64, String> {
        let sql = "SELECT count(*) FROM demo_ledger WHERE number > $1 AND id <> ALL ($2)";
        self.ask(async |client| Ok(client.query_one(sql, &[&self.started, &ids]).await?.get(0)))
            .await
    }

    pub async fn money(&self) -> Result<i64, String> {
        let sql = "SELECT coalesce(sum(balance), 0)::bigint FROM demo_accounts";
        self.ask(async |client| Ok(client.query_one(sql, &[]).await?.get(0)))
            .await
    }
}

/// A connection that was asked something. Dropped before the answer, it is closed, and what was asked is cancelled: it
/// would wait there for as long as it has to, and others behind it.
struct Asked(Option<Client>);

impl Drop for Asked {
    fn drop(&mut self) {
        if let (Some(client), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            let cancel = client.cancel_token();
            drop(Object::take(client));
            runtime.spawn(async move { timeout(TIMEOUT, cancel.cancel_query(NoTls)).await });
        }
    }
}

async fn record(client: &impl GenericClient, effect: &Effect) -> Result<(), Error> {
    let sql = "INSERT INTO demo_ledger (id, route, request, at) VALUES ($1, $2, $3, $4)";
    let insert = client.prepare_cached(sql).await?;
    let request = effect.request.get();
    client
        .execute(&insert, &[&effect.id, &effect.route, &request, &effect.at])
        .await?;
    Ok(())
}

#[derive(Deserialize)]
struct Transfer {
    from: i64,
    to: i64,
    amount: i64,
}

enum Refused {
    Unknown,
    TooPoor,
    Database(Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Database(error)
    }
}

/// Moves money from one account to another. The effect in the ledger is part of the same transaction.
pub async fn transfer(
    State(app): State<App>,
    attempt: Attempt,
    transaction: PostgresTransaction,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let faults = match Faults::from_headers(&headers) {
        Ok(faults) => faults,
        Err(name) => {
            return problem(
                StatusCode::BAD_REQUEST,
                &format!("the header {name} says nothing usable"),
            );
        }
    };
    if let Some(status) = faults.status {
        faults.strike().await;
        let detail = format!("x-demo-status asked for {}", status.as_u16());
        return answer(
            status,
            Answer {
                detail: Some(detail),
                ..Answer::default()
            },
            faults.response_bytes,
        );
    }
    let request = match parse(&body) {
        Ok(request) => request,
        Err(detail) => return problem(StatusCode::BAD_REQUEST, &detail),
    };
    let order: Transfer = match serde_json::from_str(request.get()) {
        Ok(order) => order,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &format!("not a transfer: {error}")),
    };
    if order.amount <= 0 || order.from == order.to {
        return problem(StatusCode::BAD_REQUEST, "a transfer moves an amount to another account");
    }
    let Some(id) = fresh_id("transfer") else {
        return problem(StatusCode::SERVICE_UNAVAILABLE, "there is no randomness for an id");
    };
    let effect = Effect::now(id.clone(), "/transfers".to_owned(), request);
    let at = effect.at.clone();
    let moved = move_money(&transaction, &order, &faults, &effect).await;
    drop((transaction, app));
    match moved {
        Ok(()) => {
            let created = Answer {
                id: Some(id),
                at: Some(at),
                attempt: Some(attempt.number()),
                ..Answer::default()
            };
            answer(StatusCode::CREATED, created, faults.response_bytes)
        }
        Err(Refused::Unknown) => problem(StatusCode::NOT_FOUND, "there is no such account"),
        Err(Refused::TooPoor) => problem(StatusCode::PAYMENT_REQUIRED, "the account does not hold so much"),
        // Not kept: whatever it was, it was rolled back, and may be tried again.
        Err(Refused::Database(error)) => problem(StatusCode::SERVICE_UNAVAILABLE, &error.to_string()),
    }
}

async fn move_money(
    transaction: &PostgresTransaction,
    order: &Transfer,
    faults: &Faults,
    effect: &Effect,
) -> Result<(), Refused> {
    // In one order, whichever way the money goes: two transfers do not wait for each other.
    let lock = "SELECT id, balance FROM demo_accounts WHERE id IN ($1, $2) ORDER BY id FOR UPDATE";
    let lock = transaction.prepare_cached(lock).await?;
    let accounts = transaction.query(&lock, &[&order.from, &order.to]).await?;
    let from = accounts
        .iter()
        .find(|account| account.get::<_, i64>("id") == order.from);
    let from = from.filter(|_| accounts.len() == 2).ok_or(Refused::Unknown)?;
    if from.get::<_, i64>("balance") < order.amount {
        return Err(Refused::TooPoor);
    }
    let add = transaction
        .prepare_cached("UPDATE demo_accounts SET balance = balance + $1 WHERE id = $2")
        .await?;
    transaction.execute(&add, &[&-order.amount, &order.from]).await?;
    // Between the halves, where it hurts most.
    faults.strike().await;
    transaction.execute(&add, &[&order.amount, &order.to]).await?;
    record(&**transaction, effect).await?;
    Ok(())
}

#[derive(Serialize)]
struct Account {
    id: i64,
    balance: i64,
}

#[derive(Serialize)]
struct Accounts {
    accounts: Vec<Account>,
    sum: i64,
}

/// All accounts and what they hold together, which never changes.
pub async fn accounts(State(app): State<App>) -> Response {
    let Some(bank) = app.ledger.bank() else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let sql = "SELECT id, balance FROM demo_accounts ORDER BY id";
    match bank.ask(async |client| client.query(sql, &[]).await).await {
        Ok(rows) => {
            let accounts: Vec<_> = rows
                .iter()
                .map(|row| Account {
                    id: row.get("id"),
                    balance: row.get("balance"),
                })
                .collect();
            let sum = accounts.iter().map(|account| account.balance).sum();
            Json(Accounts { accounts, sum }).into_response()
        }
        Err(error) => problem(StatusCode::SERVICE_UNAVAILABLE, &error.to_string()),
    }
}
