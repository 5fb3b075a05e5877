//! What an error of the server, the connection or the pool means for a step.

use std::{error::Error as StdError, fmt};

use deadpool_postgres::PoolError;
use tokio::time::error::Elapsed;
use tokio_postgres::Error;

use crate::error::{StoreError, StoreErrorKind};

/// Fenced, corrupt bytes and newer versions are found in answers; these are the steps that got none.
pub(crate) fn classify(error: Error) -> StoreError {
    StoreError::with_source(kind(&error), error)
}

/// No connection: nothing was sent.
pub(crate) fn of_pool(error: PoolError) -> StoreError {
    let kind = match &error {
        PoolError::Backend(error) => kind(error),
        PoolError::Closed | PoolError::NoRuntimeSpecified => StoreErrorKind::Other,
        // All are taken, or a hook of the user's refused this one.
        PoolError::Timeout(_) | PoolError::PostCreateHook(_) => StoreErrorKind::Unavailable,
    };
    StoreError::with_source(kind, error)
}

/// All were taken for all of a step's time, or no other one could be made.
pub(crate) fn no_connection() -> StoreError {
    StoreError::with_source(StoreErrorKind::Unavailable, NoConnection)
}

#[derive(Debug)]
struct NoConnection;

impl fmt::Display for NoConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("there was no connection within the time of a step")
    }
}

impl StdError for NoConnection {}

/// It had a connection, and may have had more to do than fits into its time: ours, or one that somebody set, on the server
/// or on the way to it, who may only close the connection.
pub(crate) fn may_be_too_much(error: &StoreError) -> bool {
    StdError::source(error).is_some_and(|source| source.is::<Elapsed>() || source.is::<Error>())
}

/// Where it is open whether the step was applied, or where the same step may succeed later, it is `Unavailable`.
fn kind(error: &Error) -> StoreErrorKind {
    match error.code() {
        Some(state) => kind_of(state.code()),
        // The client could not make the request, or the server is no such server; else the connection broke.
        None if error.to_string().contains("invalid configuration") => StoreErrorKind::Other,
        None => StoreErrorKind::Unavailable,
    }
}

pub(crate) fn kind_of(code: &str) -> StoreErrorKind {
    match code {
        // Disk full.
        "53100" => StoreErrorKind::Full,
        // A primary that became a replica: the next connection may find the new primary.
        "25006" => StoreErrorKind::Unavailable,
        // A plan for a table that was altered meanwhile; a prepared statement of another connection, behind a pooler
        // that does not know of it. A connection of the store's is given up, and the next one knows better.
        "0A000" | "26000" | "42P05" => StoreErrorKind::Unavailable,
        // A lock was not to be had, or a transaction was not over, in the time that somebody set.
        "55P03" | "25P03" | "25P04" => StoreErrorKind::Unavailable,
        "XX001" | "XX002" => StoreErrorKind::Corrupt,
        _ => match code.get(..2) {
            // Connections; rolled back for the sake of others (40001, 40P01); out of connections (53300) or another
            // resource; stopped by somebody (57P01, 57014); the system around the server.
            Some("08" | "40" | "53" | "57" | "58") => StoreErrorKind::Unavailable,
            _ => StoreErrorKind::Other,
        },
    }
}

/// The server rolled the step back for the sake of another one, and it can be repeated at once.
pub(crate) fn is_rolled_back(error: &StoreError) -> bool {
    let source = StdError::source(error).and_then(|source| source.downcast_ref::<Error>());
    source
        .and_then(Error::code)
        .is_some_and(|state| state.code().starts_with("40"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tokio::io::AsyncWriteExt;
    use tokio_postgres::{Config, NoTls};

    use super::*;

    /// The error that a server's refusal of a log-in is; without one, that of a connection that breaks.
    async fn refused_with(code: Option<&str>) -> Error {
        let (client, mut server) = tokio::io::duplex(1024);
        if let Some(code) = code {
            let said = format!("SERROR\0VERROR\0C{code}\0Mno\0\0");
            let length = u32::try_from(said.len()).unwrap() + 4;
            let message = [b"E", &length.to_be_bytes()[..], said.as_bytes()].concat();
            server.write_all(&message).await.unwrap();
        } else {
            drop(server);
        }
        match Config::new().user("app").connect_raw(client, NoTls).await {
            Ok(_) => unreachable!("it is refused"),
            Err(error) => error,
        }
    }

    #[tokio::test]
    async fn what_was_undone_for_the_sake_of_another_step_is_repeated_and_nothing_else_is() {
        for (code, repeated) in [
            (Some("40001"), true),
            (Some("40P01"), true),
            (Some("23505"), false),
            (Some("57014"), false),
            (Some("04000"), false),
            (None, false),
        ] {
            let error = classify(refused_with(code).await);
            assert_eq!(is_rolled_back(&error), repeated, "{code:?}");
        }
        assert!(!is_rolled_back(&StoreErrorKind::Unavailable.into()));
    }

    #[tokio::test]
    async fn an_error_of_the_server_is_of_its_codes_kind_and_a_wrong_setting_never_gets_better() {
        for (code, kind) in [
            (Some("53100"), StoreErrorKind::Full),
            (Some("42501"), StoreErrorKind::Other),
            (Some("57P03"), StoreErrorKind::Unavailable),
            (None, StoreErrorKind::Unavailable),
        ] {
            let error = refused_with(code).await;
            assert_eq!(classify(error).kind(), kind, "{code:?}");
            let from_a_pool = PoolError::Backend(refused_with(code).await);
            assert_eq!(of_pool(from_a_pool).kind(), kind, "{code:?}");
        }
        let Err(without_a_host) = Config::new().connect(NoTls).await else {
            unreachable!("it leads nowhere")
        };
        assert_eq!(classify(without_a_host).kind(), StoreErrorKind::Other);
    }

    #[test]
    fn what_may_be_gone_when_it_is_tried_again_is_unavailable() {
        use StoreErrorKind::{Corrupt, Full, Other, Unavailable};
        for (code, expected) in [
            ("08006", Unavailable),
            ("40001", Unavailable),
            ("40P01", Unavailable),
            ("53300", Unavailable),
            ("57014", Unavailable),
            ("57P01", Unavailable),
            ("58030", Unavailable),
            ("25006", Unavailable),
            ("25P03", Unavailable),
            ("25P04", Unavailable),
            ("0A000", Unavailable),
            ("26000", Unavailable),
            ("42P05", Unavailable),
            ("55P03", Unavailable),
            ("53100", Full),
            ("XX001", Corrupt),
            ("XX002", Corrupt),
            ("XX000", Other),
            ("42P01", Other),
            ("42501", Other),
            ("25001", Other),
            ("55000", Other),
            ("", Other),
        ] {
            assert_eq!(kind_of(code), expected, "{code:?}");
        }
    }

    #[test]
    fn a_pool_that_was_closed_does_not_come_back() {
        for (error, expected) in [
            (PoolError::Closed, StoreErrorKind::Other),
            (PoolError::NoRuntimeSpecified, StoreErrorKind::Other),
            (
                PoolError::Timeout(deadpool_postgres::TimeoutType::Wait),
                StoreErrorKind::Unavailable,
            ),
        ] {
            let found = of_pool(error);
            assert_eq!(found.kind(), expected, "{found:?}");
        }
    }
}
