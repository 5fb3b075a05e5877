//! A bank whose handlers work in the layer's transactions, by either client.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{FromRequestParts, State},
    http::request::Parts,
    response::{IntoResponse, Response},
    routing::post,
};
use deadpool_postgres::Pool;
use http::{Request, StatusCode};
use serde::Deserialize;
use serde_json::json;
use sqlx::{Executor, PgPool, postgres::PgPoolOptions};
use tokio_postgres::{NoTls, types::FromSqlOwned};
use tower_idempotency::{
    Guarantee, IdempotencyLayer, Keep, MissingTransaction, PostgresStore, PostgresTable, PostgresTransaction,
    SqlxTransaction,
};

use super::{
    app::{Control, call, open},
    http::Answer,
    postgres::{self, Postgres},
};

/// What handlers work with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    TokioPostgres,
    Sqlx,
}

pub const BOTH: [Library; 2] = [Library::TokioPostgres, Library::Sqlx];

/// The transaction of a request, whatever the library. Statements are without parameters.
pub enum AnyTransaction {
    TokioPostgres(PostgresTransaction),
    Sqlx(SqlxTransaction),
}

impl AnyTransaction {
    /// Begins one within, by the library's own means, and never ends it.
    async fn leak_savepoint(&mut self) {
        match self {
            Self::TokioPostgres(transaction) => {
                let begun = transaction.batch_execute("SAVEPOINT of_the_handlers_own").await;
                begun.expect("a savepoint");
            }
            Self::Sqlx(transaction) => {
                let begun = sqlx::Connection::begin(&mut ***transaction).await;
                std::mem::forget(begun.expect("a savepoint"));
            }
        }
    }

    /// The message of what fails.
    pub async fn run(&mut self, sql: &str) -> Result<(), String> {
        match self {
            Self::TokioPostgres(transaction) => {
                let done = transaction.batch_execute(sql).await;
                done.map_err(|error| {
                    error
                        .as_db_error()
                        .map_or(error.to_string(), |error| error.message().to_owned())
                })
            }
            Self::Sqlx(transaction) => {
                let done = transaction.execute(sql).await;
                done.map(drop).map_err(|error| error.to_string())
            }
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for AnyTransaction {
    type Rejection = MissingTransaction;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, MissingTransaction> {
        match <SqlxTransaction as FromRequestParts<S>>::from_request_parts(parts, state).await {
            Ok(transaction) => Ok(Self::Sqlx(transaction)),
            Err(_) => <PostgresTransaction as FromRequestParts<S>>::from_request_parts(parts, state)
                .await
                .map(Self::TokioPostgres),
        }
    }
}

/// So long a step may take on a machine that has much to do. Where it is the time itself that matters, tests set less.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How many accounts there are, each with as much money.
pub const ACCOUNTS: i64 = 10;
pub const BALANCE: i64 = 1000;

/// Tables of a bank and of the records.
pub async fn create_tables(pool: &Pool) {
    let client = pool.get().await.expect("a connection");
    let sql = format!(
        "CREATE TABLE accounts (id bigint PRIMARY KEY, balance bigint NOT NULL);
         INSERT INTO accounts SELECT id, {BALANCE} FROM generate_series(1, {ACCOUNTS}) AS id;
         CREATE TABLE transfers (id bigserial PRIMARY KEY, reference text NOT NULL, amount bigint NOT NULL,
             CONSTRAINT odd CHECK (amount <> 13));
         CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)"
    );
    client.batch_execute(&sql).await.expect("new tables");
    drop(client);
    PostgresTable::default().create(pool).await.expect("a new table");
}

thread_local! {
    /// One for each test, which has a thread of its own.
    static SERVER: Arc<Postgres> = Arc::new(Postgres::start(&[]));
}
static NUMBER: AtomicUsize = AtomicUsize::new(0);

/// A bank with a database of its own.
pub struct Bank {
    server: Arc<Postgres>,
    database: String,
    pub store: PostgresStore,
    pub layer: IdempotencyLayer,
    pub control: Control,
    pub app: Router,
}

impl Bank {
    pub async fn of(library: Library) -> Self {
        Self::with(library, open(), |layer| layer).await
    }

    pub async fn with(
        library: Library,
        control: Control,
        set: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
    ) -> Self {
        let server = SERVER.with(Arc::clone);
        Self::on(&server, library, control, set).await
    }

    pub async fn on(
        server: &Arc<Postgres>,
        library: Library,
        control: Control,
        set: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
    ) -> Self {
        let database = format!("bank_{}", NUMBER.fetch_add(1, SeqCst));
        server.say(&format!("CREATE DATABASE {database}")).await;
        let url = database_url(server, &database);
        let pool = postgres::pool(&url, 4);
        create_tables(&pool).await;
        let store = store(library, &url, pool).await;
        let layer = IdempotencyLayer::new(store.clone())
            .guarantee(Guarantee::Transactional)
            .require_key()
            .store_timeout(2 * PATIENCE);
        let layer = set(layer);
        Self {
            app: app(&control, layer.clone()),
            server: Arc::clone(server),
            database,
            store,
            layer,
            control,
        }
    }

    pub async fn ask(&self, request: Request<Body>) -> Answer {
        call(&self.app, request).await
    }

    /// How many transfers were made, and what all accounts hold.
    pub async fn books(&self) -> (i64, i64) {
        let transfers = self.look("SELECT count(*) FROM transfers").await;
        let sum = self.look("SELECT sum(balance)::bigint FROM accounts").await;
        (transfers, sum)
    }

    pub async fn records(&self) -> i64 {
        self.look("SELECT count(*) FROM idempotency_records").await
    }

    /// The one value that a query answers.
    pub async fn look<T: FromSqlOwned>(&self, sql: &str) -> T {
        self.client().await.query_one(sql, &[]).await.expect("an answer").get(0)
    }

    pub async fn say(&self, sql: &str) {
        self.client().await.batch_execute(sql).await.expect("it is understood");
    }

    /// A connection for the test itself.
    pub async fn client(&self) -> tokio_postgres::Client {
        let url = self.url();
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("it is up");
        tokio::spawn(connection);
        client
    }

    pub fn port(&self) -> u16 {
        self.server.port()
    }

    /// Of a bank that has its server for itself.
    pub fn server_mut(&mut self) -> &mut Postgres {
        Arc::get_mut(&mut self.server).expect("nobody else has it")
    }

    pub fn url(&self) -> String {
        database_url(&self.server, &self.database)
    }
}

fn database_url(server: &Postgres, database: &str) -> String {
    let (server, _) = server
        .url()
        .rsplit_once('/')
        .map(|(server, _)| (server.to_owned(), ()))
        .expect("a path");
    format!("{server}/{database}")
}

pub async fn store(library: Library, url: &str, pool: Pool) -> PostgresStore {
    // Nobody but the requests of a test uses its connections.
    let store = PostgresStore::builder().timeout(PATIENCE).purge_every(None);
    let store = store.connect_pool(pool).await.expect("a store");
    match library {
        Library::TokioPostgres => store,
        Library::Sqlx => store.with_sqlx(sqlx_pool(url, 4)),
    }
}

/// `POST /transfer` under this layer.
pub fn app(control: &Control, layer: IdempotencyLayer) -> Router {
    Router::new()
        .route("/transfer", post(transfer))
        .route("/count", post(count))
        .layer(layer)
        .with_state(control.clone())
}

/// What it writes follows from what it read.
async fn count(State(control): State<Control>, mut transaction: AnyTransaction) -> StatusCode {
    let sql = "INSERT INTO transfers (reference, amount) SELECT 'count', count(*) FROM transfers";
    let counted = transaction.run(sql).await;
    control.pass().await;
    match counted {
        Ok(()) => StatusCode::CREATED,
        // Nothing is kept of it.
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

pub fn counting(key: &str) -> Request<Body> {
    Request::post("/count")
        .header("idempotency-key", key)
        .body(Body::empty())
        .expect("a request")
}

/// A transfer of so much from account 1 to account 2, and what happens after it was written.
#[derive(Deserialize)]
struct Transfer {
    amount: i64,
    #[serde(default)]
    then: String,
}

async fn transfer(
    State(control): State<Control>,
    mut transaction: AnyTransaction,
    Json(order): Json<Transfer>,
) -> Response {
    let amount = order.amount;
    let sql = format!(
        "UPDATE accounts SET balance = balance - {amount} WHERE id = 1;
         UPDATE accounts SET balance = balance + {amount} WHERE id = 2;
         INSERT INTO transfers (reference, amount) VALUES ('t', {amount})"
    );
    if let Err(error) = transaction.run(&sql).await {
        return (StatusCode::INTERNAL_SERVER_ERROR, error).into_response();
    }
    let then = match order.then.strip_prefix("nested") {
        Some(then) => {
            transaction.leak_savepoint().await;
            match then.trim_start().strip_prefix("fails ") {
                Some(then) => {
                    transaction.run("SELECT 1 / 0").await.expect_err("it fails");
                    then
                }
                None => then.trim_start(),
            }
        }
        None => &order.then,
    };
    let run = control.pass().await;
    let answer = (StatusCode::CREATED, Json(json!({ "run": run }))).into_response();
    match then {
        "" => answer,
        "panic" => panic!("asked for"),
        "break" => {
            let parts = futures_util::stream::iter([Ok("a"), Err(std::io::Error::other("broken"))]);
            (StatusCode::CREATED, Body::from_stream(parts)).into_response()
        }
        "stream" => (
            StatusCode::ACCEPTED,
            [("content-type", "text/event-stream")],
            "data: 1\n\n",
        )
            .into_response(),
        "large" => (StatusCode::CREATED, "x".repeat(2 << 20)).into_response(),
        "nothing" => (StatusCode::CREATED, Keep::Nothing).into_response(),
        "leak" => {
            tokio::spawn(async move {
                let _transaction = transaction;
                control.pass().await;
            });
            answer
        }
        "body" => {
            let stream = futures_util::stream::once(async move {
                drop(transaction);
                Ok::<_, std::io::Error>("data: 1\n\n")
            });
            let stream = Body::from_stream(stream);
            (StatusCode::CREATED, [("content-type", "text/event-stream")], stream).into_response()
        }
        // A statement of the handler's own; what becomes of it is the handler's own mistake.
        sql if sql.contains(' ') || sql == "COMMIT" || sql == "ROLLBACK" => {
            match transaction.run(sql).await {
                // Because of another transaction: nothing is kept of it, and the client tries again.
                Err(error) if error.contains("deadlock detected") || error.contains("could not serialize") => {
                    StatusCode::SERVICE_UNAVAILABLE.into_response()
                }
                _ => answer,
            }
        }
        status => StatusCode::from_u16(status.parse().expect("a status"))
            .expect("a status")
            .into_response(),
    }
}

pub fn order(key: &str, amount: i64, then: &str) -> Request<Body> {
    Request::post("/transfer")
        .header("idempotency-key", key)
        .header("content-type", "application/json")
        .body(json!({ "amount": amount, "then": then }).to_string().into())
        .expect("a request")
}

/// The same route under a layer of another guarantee: nothing is transferred.
pub fn plain(control: &Control, layer: IdempotencyLayer) -> Router {
    let handler = async |State(control): State<Control>| {
        control.pass().await;
    };
    Router::new()
        .route("/transfer", post(handler))
        .layer(layer)
        .with_state(control.clone())
}

pub fn sqlx_pool(url: &str, connections: u32) -> PgPool {
    let pool = PgPoolOptions::new().max_connections(connections);
    pool.connect_lazy(url).expect("a URL")
}
