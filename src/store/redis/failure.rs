//! What an error of the server or of the connection means for a step.

use std::{error::Error, sync::Arc};

use redis::{ErrorKind, RedisError, ServerErrorKind};

use crate::error::{StoreError, StoreErrorKind};

/// Fenced, corrupt and newer are found in answers; these are the steps that got none.
pub(super) fn classify(error: RedisError) -> StoreError {
    let kind = kind(&error);
    StoreError::with_source(kind, error)
}

/// Where it is open whether the step was applied, or where the same step may succeed later, it is `Unavailable`.
fn kind(error: &RedisError) -> StoreErrorKind {
    match error.kind() {
        // Cut off, refused, late; and what came was no answer, so the step may have been applied.
        ErrorKind::Io | ErrorKind::Parse | ErrorKind::UnexpectedReturnType => StoreErrorKind::Unavailable,
        // A cluster or sentinels without a server for the record, for now.
        ErrorKind::Client
        | ErrorKind::ClusterConnectionNotFound
        | ErrorKind::MasterNameNotFoundBySentinel
        | ErrorKind::NoValidReplicasFoundBySentinel => StoreErrorKind::Unavailable,
        ErrorKind::Server(
            ServerErrorKind::BusyLoading
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::MasterDown
            | ServerErrorKind::TryAgain
            // A slot that moved, and moved again while it was looked for.
            | ServerErrorKind::Moved
            | ServerErrorKind::Ask
            // A primary that became a replica: the next connection may find the new primary.
            | ServerErrorKind::ReadOnly,
        ) => StoreErrorKind::Unavailable,
        _ => match error.code() {
            Some("OOM") => StoreErrorKind::Full,
            Some("WRONGTYPE") => StoreErrorKind::Corrupt,
            // A script that hangs, a disk that is full, replicas that are away: for now.
            Some("BUSY" | "MISCONF" | "NOREPLICAS" | "UNKILLABLE") => StoreErrorKind::Unavailable,
            _ if error.to_string().contains("max number of clients") => StoreErrorKind::Unavailable,
            _ => StoreErrorKind::Other,
        },
    }
}

/// The server was asked and said no.
pub(super) fn is_answer(error: &RedisError) -> bool {
    matches!(kind(error), StoreErrorKind::Full | StoreErrorKind::Corrupt)
        || matches!(
            error.kind(),
            ErrorKind::Server(ServerErrorKind::NoScript | ServerErrorKind::NoPerm)
        )
}

/// The server did not understand, and did nothing.
pub(super) fn is_refused(error: &RedisError) -> bool {
    error.code() == Some("ERR")
}

pub(super) fn is_said_by_the_server(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension)
}

/// One step may not concern keys that are in several places.
pub(super) fn is_of_several_places(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::CrossSlot)
}

/// The server is no primary any more, and another one is.
pub(super) fn leads_elsewhere(error: &RedisError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown)
    )
}

/// Whatever it was sent through has ended, with the runtime that it was made on.
pub(super) fn is_over(error: &RedisError) -> bool {
    let source = error
        .source()
        .and_then(|source| source.downcast_ref::<Arc<dyn Error + Send + Sync>>());
    let io = source.and_then(|source| source.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use redis::make_extension_error;

    use super::*;

    /// As the server writes it.
    fn said(code: &str) -> StoreErrorKind {
        kind(&make_extension_error(code.to_owned(), None))
    }

    #[test]
    fn a_connection_whose_runtime_ended_is_over_and_one_that_is_cut_may_mend_itself() {
        let io = |kind: std::io::ErrorKind| RedisError::from(std::io::Error::from(kind));
        assert!(is_over(&io(std::io::ErrorKind::BrokenPipe)));
        assert!(!is_over(&io(std::io::ErrorKind::ConnectionReset)));
        assert!(!is_over(&RedisError::from((ErrorKind::Io, "closed"))));
    }

    #[test]
    fn a_server_that_is_no_primary_leads_elsewhere_and_one_that_said_no_has_answered() {
        let of_server = |kind| RedisError::from((ErrorKind::Server(kind), "said the server"));
        let answers = |error: &RedisError| (leads_elsewhere(error), is_answer(error));
        for kind in [ServerErrorKind::ReadOnly, ServerErrorKind::MasterDown] {
            assert_eq!(answers(&of_server(kind)), (true, false), "{kind:?}");
        }
        for kind in [ServerErrorKind::NoScript, ServerErrorKind::NoPerm] {
            assert_eq!(answers(&of_server(kind)), (false, true), "{kind:?}");
        }
        for code in ["OOM", "WRONGTYPE"] {
            let error = make_extension_error(code.to_owned(), None);
            assert_eq!(answers(&error), (false, true), "{code}");
        }
        assert_eq!(answers(&of_server(ServerErrorKind::BusyLoading)), (false, false));
        assert_eq!(answers(&RedisError::from((ErrorKind::Io, "closed"))), (false, false));
        let crowded = make_extension_error("ERR".to_owned(), Some("max number of clients reached".to_owned()));
        assert_eq!(kind(&crowded), StoreErrorKind::Unavailable);
    }

    #[test]
    fn an_error_that_passes_is_unavailable_and_one_that_stays_is_not() {
        for passing in ["MISCONF", "NOREPLICAS", "BUSY"] {
            assert_eq!(said(passing), StoreErrorKind::Unavailable, "{passing}");
        }
        for staying in ["NOAUTH", "WRONGPASS", "ERR", "SOMETHING"] {
            assert_eq!(said(staying), StoreErrorKind::Other, "{staying}");
        }
        assert_eq!(said("OOM"), StoreErrorKind::Full);
        assert_eq!(said("WRONGTYPE"), StoreErrorKind::Corrupt);
        for passing in [
            ServerErrorKind::BusyLoading,
            ServerErrorKind::ClusterDown,
            ServerErrorKind::MasterDown,
            ServerErrorKind::ReadOnly,
            ServerErrorKind::TryAgain,
            ServerErrorKind::Moved,
            ServerErrorKind::Ask,
        ] {
            let error = RedisError::from((ErrorKind::Server(passing), "said the server"));
            assert_eq!(kind(&error), StoreErrorKind::Unavailable, "{passing:?}");
        }
        for staying in [ServerErrorKind::CrossSlot, ServerErrorKind::NoPerm] {
            let error = RedisError::from((ErrorKind::Server(staying), "said the server"));
            assert_eq!(kind(&error), StoreErrorKind::Other, "{staying:?}");
        }
    }
}
