//! What an error of the server or of the connection means for a step.

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
        ErrorKind::Server(
            ServerErrorKind::BusyLoading
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::MasterDown
            | ServerErrorKind::TryAgain
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

#[cfg(test)]
mod tests {
    use redis::make_extension_error;

    use super::*;

    /// As the server writes it.
    fn said(code: &str) -> StoreErrorKind {
        kind(&make_extension_error(code.to_owned(), None))
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
        ] {
            let error = RedisError::from((ErrorKind::Server(passing), "said the server"));
            assert_eq!(kind(&error), StoreErrorKind::Unavailable, "{passing:?}");
        }
        for staying in [
            ServerErrorKind::Moved,
            ServerErrorKind::CrossSlot,
            ServerErrorKind::NoPerm,
        ] {
            let error = RedisError::from((ErrorKind::Server(staying), "said the server"));
            assert_eq!(kind(&error), StoreErrorKind::Other, "{staying:?}");
        }
    }
}
