//! Records in a table of a PostgreSQL server.

#![allow(dead_code, reason = "the store that uses them is the next step")]

pub(crate) mod failure;
pub(crate) mod record;
pub(crate) mod statements;
mod table;

pub use self::table::PostgresTable;
