//! The settings of a [`PostgresStore`].

use std::{sync::Arc, time::Duration};

use deadpool_postgres::{Hook, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tokio_postgres::{Config, NoTls};

use super::{
    Inner, PostgresStore, PostgresTable, connection::Connections, purge, server, statements::Statements,
    waiters::Waiters,
};
use crate::{
    error::{StoreError, StoreErrorKind},
    store::hints::Hints,
};

/// The settings of a [`PostgresStore`], from [`PostgresStore::builder`].
#[derive(Clone, Debug)]
#[must_use = "nothing is connected until it is asked to"]
pub struct PostgresStoreBuilder {
    table: PostgresTable,
    create_table: bool,
    timeout: Duration,
    max_connections: usize,
    prepared_statements: bool,
    purge_every: Option<Duration>,
    refuse_forgetful_server: bool,
}

impl Default for PostgresStoreBuilder {
    fn default() -> Self {
        Self {
            table: PostgresTable::default(),
            create_table: false,
            timeout: Duration::from_secs(1),
            max_connections: 16,
            prepared_statements: true,
            purge_every: Some(Duration::from_secs(10)),
            refuse_forgetful_server: false,
        }
    }
}

impl PostgresStoreBuilder {
    /// The table that holds the records. Services that share a database need different ones, and the nodes of one
    /// service the same. Default: `idempotency_records` in the schema `public`.
    pub fn table(self, table: PostgresTable) -> Self {
        Self { table, ..self }
    }

    /// Create the table where it is missing, as [`PostgresTable::create`] does. Default: a missing table is an error.
    pub fn create_table(self, create: bool) -> Self {
        Self {
            create_table: create,
            ..self
        }
    }

    /// Within this time every step is answered or has failed as [`Unavailable`](StoreErrorKind::Unavailable), waiting
    /// for a connection included. The layer gives up a call after its
    /// [`store_timeout`](crate::IdempotencyLayer::store_timeout), so less than that. Default: one second.
    ///
    /// # Panics
    /// If it is zero.
    pub fn timeout(self, timeout: Duration) -> Self {
        assert!(!timeout.is_zero(), "no server answers in no time");
        Self { timeout, ..self }
    }

    /// How many connections [`connect`](Self::connect) opens at most; a pool of your own has its own limit. A step takes
    /// one for as long as the server works on it, some milliseconds. Default: 16.
    ///
    /// # Panics
    /// If it is zero.
    pub fn max_connections(self, max: usize) -> Self {
        assert!(max > 0, "without a connection nothing is stored");
        Self {
            max_connections: max,
            ..self
        }
    }

    /// Prepare each statement once for each connection. `false` sends it whole each time, in one flight as well, which
    /// costs the server its planning; behind a pooler in transaction mode that knows nothing of prepared statements
    /// (pgbouncer without `max_prepared_statements`) it has to be `false`. Default: `true`.
    pub fn prepared_statements(self, prepared: bool) -> Self {
        Self {
            prepared_statements: prepared,
            ..self
        }
    }

    /// Remove what has expired, in batches of up to 1,000, about this often and more often while there is more. `None` leaves
    /// it to you, by [`PostgresStore::purge`]. It is done by a task of the runtime in which the store is connected, and ends
    /// with that runtime. Default: every 10 seconds.
    ///
    /// # Panics
    /// If it is zero.
    pub fn purge_every(self, interval: Option<Duration>) -> Self {
        assert!(interval != Some(Duration::ZERO), "a purge takes some time");
        Self {
            purge_every: interval,
            ..self
        }
    }

    /// Refuse to connect to a server that may forget what it was given: with `synchronous_commit`, `fsync` or
    /// `full_page_writes` off, or with an unlogged table. Default: it is used, with a warning.
    pub fn refuse_forgetful_server(self, refuse: bool) -> Self {
        Self {
            refuse_forgetful_server: refuse,
            ..self
        }
    }

    /// Connects to a server by its URL, such as `postgres://user:password@host:5432/database`, with a pool of its own
    /// and without TLS. Several hosts may be named; `target_session_attrs=read-write` finds the primary among them.
    ///
    /// # Errors
    /// [`Unavailable`](StoreErrorKind::Unavailable) if it cannot be reached now, and [`Other`](StoreErrorKind::Other)
    /// for a URL that is none, a refused log-in, a server before PostgreSQL 13, a replica, a table that is missing, of
    /// another version, not to be written to or without its unique index, or a server that is [refused](Self::refuse_forgetful_server).
    pub async fn connect(self, url: &str) -> Result<PostgresStore, StoreError> {
        let mut config: Config = url
            .parse()
            .map_err(|error: tokio_postgres::Error| StoreError::with_source(StoreErrorKind::Other, error))?;
        if config.get_application_name().is_none() {
            config.application_name("tower-idempotency");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(self.timeout);
        }
        // A look at the socket; whether the server answers is found by the step that needs it.
        let recycling_method = RecyclingMethod::Fast;
        let manager = Manager::from_config(config, NoTls, ManagerConfig { recycling_method });
        let notices = notices_its_client_is_gone(self.timeout);
        let pool = Pool::builder(manager)
            .max_size(self.max_connections)
            .post_create(Hook::async_fn(move |client, _| {
                let notices = notices.clone();
                Box::pin(async move {
                    // A server that cannot do one does without, and a connection that is lost says so at its first step.
                    for notice in notices {
                        let _ = client.batch_execute(&notice).await;
                    }
                    Ok(())
                })
            }))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| StoreError::with_source(StoreErrorKind::Other, error))?;
        self.connect_pool(pool).await
    }

    /// Uses a pool of your own making: with TLS, limits and hooks as you like them. It may be shared with your handlers;
    /// a handler that waits for a connection while it holds one may then keep the store from the last.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn connect_pool(self, pool: Pool) -> Result<PostgresStore, StoreError> {
        if self.create_table {
            let created = tokio::time::timeout(self.timeout, self.table.create(&pool)).await;
            created.map_err(|elapsed| StoreError::with_source(StoreErrorKind::Unavailable, elapsed))??;
        }
        let statements = Statements::new(&self.table);
        let connections = Arc::new(Connections::new(pool, self.prepared_statements, self.timeout));
        server::check(
            &connections,
            &self.table,
            &statements.look,
            self.refuse_forgetful_server,
        )
        .await?;
        let inner = Arc::new(Inner {
            waiters: Waiters::new(Arc::clone(&connections), statements.there.clone()),
            hints: Arc::new(Hints::new()),
            table: self.table,
            statements,
            connections,
            batch: purge::Batch::default(),
        });
        if let Some(every) = self.purge_every {
            tokio::spawn(purge::repeat(Arc::downgrade(&inner), every));
        }
        Ok(PostgresStore::new(inner))
    }
}

/// A session whose step waits for somebody's lock goes on waiting when the client has given up and closed its connection,
/// unless it looks for that now and then: each try of a request would leave one behind. Not a limit to the waiting
/// itself, which handlers on these connections would have, too; and not a cancellation, which may make a commit visible
/// before the standby has it.
///
/// And a session whose client has vanished without a word, with its machine or the network, keeps its transaction and its
/// locks for as long as the system takes to notice, which is two hours by default. What somebody has set is left as it is.
/// No `tcp_user_timeout`: that would cut a client, too, which is there and reads a large answer slowly.
fn notices_its_client_is_gone(every: Duration) -> [String; 2] {
    let millis = every.as_millis().clamp(1, i32::MAX as u128);
    let look = format!(
        "SELECT set_config('client_connection_check_interval', '{millis}ms', false) \
         WHERE current_setting('server_version_num')::int >= 140000 \
         AND current_setting('client_connection_check_interval', true) = '0'"
    );
    let keepalives = "SELECT set_config(name, value, false) FROM pg_settings JOIN (VALUES ('tcp_keepalives_idle', '10'), \
                      ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3')) \
                      AS wanted (name, value) USING (name) WHERE source = 'default'";
    [look, keepalives.to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_is_kept_whatever_is_set_after_it() {
        let default = PostgresStoreBuilder::default();
        assert_eq!((default.timeout, default.max_connections), (Duration::from_secs(1), 16));
        assert_eq!(default.purge_every, Some(Duration::from_secs(10)));
        let set = default
            .table(PostgresTable::new("own", "records"))
            .create_table(true)
            .timeout(Duration::from_secs(7))
            .max_connections(3)
            .prepared_statements(false)
            .purge_every(None)
            .refuse_forgetful_server(true);
        assert_eq!(set.table, PostgresTable::new("own", "records"));
        assert_eq!((set.timeout, set.max_connections), (Duration::from_secs(7), 3));
        assert_eq!(set.purge_every, None);
        assert!(set.create_table && !set.prepared_statements && set.refuse_forgetful_server);
    }

    #[test]
    fn a_session_looks_for_its_client_as_often_as_a_step_may_last_and_the_server_can_count() {
        for (every, millis) in [
            (Duration::from_micros(1), 1),
            (Duration::from_millis(1500), 1500),
            (Duration::MAX, i32::MAX),
        ] {
            let [said, _] = notices_its_client_is_gone(every);
            let set = format!("SELECT set_config('client_connection_check_interval', '{millis}ms', false) ");
            assert!(said.starts_with(&set), "{said}");
            assert!(said.contains(">= 140000") && said.ends_with("= '0'"), "{said}");
        }
    }
}
