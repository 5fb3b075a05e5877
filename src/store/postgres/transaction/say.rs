//! Statements with their values, for either client.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};
use tokio_postgres::{
    error::Severity,
    types::{IsNull, ToSql, Type, to_sql_checked},
};

use super::super::failure;
use crate::error::StoreError;

/// One thing to say to the server.
#[derive(Clone, Debug)]
pub(in super::super) enum Say {
    Plain(&'static str),
    /// Answered with one row at most.
    Ask(Arc<Statement>, Vec<Value>),
}

impl Say {
    pub(super) fn ask(statement: &Arc<Statement>, values: impl IntoIterator<Item = Value>) -> Self {
        Self::Ask(Arc::clone(statement), values.into_iter().collect())
    }
}

/// What may be said many times, with other values.
#[derive(Debug)]
pub(in super::super) struct Statement {
    pub(super) sql: String,
    /// In a session of the server: the same for the same text alone.
    pub(super) name: String,
}

impl Statement {
    pub(super) fn of(sql: impl Into<String>) -> Arc<Self> {
        let sql = sql.into();
        Arc::new(Self {
            name: Self::name_of(&sql),
            sql,
        })
    }

    fn name_of(sql: &str) -> String {
        let mut name = "tower_idempotency_".to_owned();
        crate::hex::push(&mut name, &Sha256::digest(sql)[..16]);
        name
    }
}

/// The value of a parameter.
#[derive(Clone, Debug)]
pub(in super::super) enum Value {
    Bytes(Bytes),
    BytesList(Vec<Vec<u8>>),
    Small(i16),
    Int(i32),
    IntList(Vec<i32>),
    Long(i64),
    Text(String),
}

impl<const N: usize> From<&[u8; N]> for Value {
    fn from(bytes: &[u8; N]) -> Self {
        Self::Bytes(Bytes::copy_from_slice(bytes))
    }
}

impl From<i16> for Value {
    fn from(number: i16) -> Self {
        Self::Small(number)
    }
}

impl From<i32> for Value {
    fn from(number: i32) -> Self {
        Self::Int(number)
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Long(number)
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl Value {
    pub(super) fn kind(&self) -> Type {
        match self {
            Self::Bytes(_) => Type::BYTEA,
            Self::BytesList(_) => Type::BYTEA_ARRAY,
            Self::Small(_) => Type::INT2,
            Self::Int(_) => Type::INT4,
            Self::IntList(_) => Type::INT4_ARRAY,
            Self::Long(_) => Type::INT8,
            Self::Text(_) => Type::TEXT,
        }
    }
}

impl ToSql for Value {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Self::Bytes(bytes) => (&**bytes).to_sql(kind, out),
            Self::BytesList(list) => list.to_sql(kind, out),
            Self::Small(number) => number.to_sql(kind, out),
            Self::Int(number) => number.to_sql(kind, out),
            Self::IntList(list) => list.to_sql(kind, out),
            Self::Long(number) => number.to_sql(kind, out),
            Self::Text(text) => text.to_sql(kind, out),
        }
    }

    /// Every statement says the types of its parameters.
    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// What went wrong first in a flight.
#[derive(Debug)]
pub(in super::super) struct Failure {
    /// The server's, if it said something.
    pub(super) code: Option<String>,
    /// The connection ended with it.
    pub(super) fatal: bool,
    /// All before the commit was well.
    pub(super) by_commit: bool,
    pub(super) error: StoreError,
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

impl From<StoreError> for Failure {
    /// Nothing was sent.
    fn from(error: StoreError) -> Self {
        Self {
            code: None,
            fatal: false,
            by_commit: false,
            error,
        }
    }
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        let server = error.as_db_error();
        Self {
            code: server.map(|server| server.code().code().to_owned()),
            fatal: server.is_some_and(|server| server.parsed_severity() != Some(Severity::Error)),
            by_commit: false,
            error: failure::classify(error),
        }
    }
}
