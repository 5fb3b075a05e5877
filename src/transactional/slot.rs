//! A transaction on its way to the handler and back.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use tokio::sync::{Mutex, OwnedMappedMutexGuard, OwnedMutexGuard};

/// Where a transaction lies while nobody works with it. The layer holds one handle, the request's extensions another.
///
/// What is in it when the last handle goes is dropped, and that has to end the transaction: it was leaked.
pub(crate) struct Slot<T> {
    transaction: Arc<Mutex<Option<T>>>,
    over: Arc<AtomicBool>,
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self {
            transaction: Arc::clone(&self.transaction),
            over: Arc::clone(&self.over),
        }
    }
}

/// What the handler holds; it lies in its slot again when this is dropped.
pub(crate) type Lent<T, U> = OwnedMappedMutexGuard<Option<T>, U>;

impl<T> Slot<T> {
    pub(crate) fn of(transaction: T) -> Self {
        Self {
            transaction: Arc::new(Mutex::new(Some(transaction))),
            over: Arc::default(),
        }
    }

    /// For the handler: what `part` finds in the transaction.
    pub(crate) fn lend<U>(
        &self,
        part: impl FnOnce(&mut T) -> Option<&mut U>,
    ) -> Result<Lent<T, U>, MissingTransaction> {
        let Ok(guard) = Arc::clone(&self.transaction).try_lock_owned() else {
            return Err(MissingTransaction(Missing::Taken));
        };
        if self.over.load(SeqCst) {
            return Err(MissingTransaction(Missing::Over));
        }
        OwnedMutexGuard::try_map(guard, |transaction| transaction.as_mut().and_then(part))
            .map_err(|_| MissingTransaction(Missing::Over))
    }

    /// For the layer, when the handler has answered: nobody gets it after this. `None` if somebody still has it.
    pub(crate) fn take_back(&self) -> Option<T> {
        self.over.store(true, SeqCst);
        self.transaction.try_lock().ok()?.take()
    }
}

/// A handler asked for its transaction and there is none, or not of this kind.
///
/// As an answer it is a 500 that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingTransaction(pub(crate) Missing);

/// Why there is no transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The request runs in none.
    None,
    /// It is there, but of another library.
    #[cfg(feature = "sqlx")]
    Other(&'static str),
    /// Somebody has it who has not given it back.
    Taken,
    /// The layer has ended it.
    Over,
}

impl fmt::Display for MissingTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Missing::None => f.write_str(
                "no transaction: the route is outside of every `IdempotencyLayer` with `Guarantee::Transactional`, or \
                 the request had no key. Use `.require_key()`, or extract an `Option`",
            ),
            #[cfg(feature = "sqlx")]
            Missing::Other(extractor) => write!(f, "the store runs its transactions otherwise: extract `{extractor}`"),
            Missing::Taken => f.write_str("the transaction was taken already and has not been given back"),
            Missing::Over => f.write_str("the transaction is over: the request was answered"),
        }
    }
}

impl std::error::Error for MissingTransaction {}

#[cfg(feature = "axum")]
impl axum::response::IntoResponse for MissingTransaction {
    fn into_response(self) -> axum::response::Response {
        tracing::error!("{self}");
        let status = axum::http::StatusCode::INTERNAL_SERVER_ERROR;
        // Nothing was executed: once the server is put together right, the same key runs.
        (status, crate::keep::Keep::Nothing, self.to_string()).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lend(slot: &Slot<u8>) -> Result<Lent<u8, u8>, Missing> {
        slot.lend(|number| Some(number)).map_err(|missing| missing.0)
    }

    #[test]
    fn one_at_a_time_has_the_transaction_and_gives_it_back() {
        let slot = Slot::of(7);
        let lent = lend(&slot);
        assert_eq!(lend(&slot).err(), Some(Missing::Taken));
        drop(lent);
        assert_eq!(lend(&slot).map(|lent| *lent).ok(), Some(7));
        assert_eq!(slot.take_back(), Some(7));
        assert_eq!(lend(&slot).err(), Some(Missing::Over));
    }

    #[test]
    fn a_handler_without_its_transaction_says_why_and_frees_the_key() {
        let whys = [
            (Missing::None, "no transaction: "),
            #[cfg(feature = "sqlx")]
            (Missing::Other("Tx"), "extract `Tx`"),
            (Missing::Taken, "was taken already"),
            (Missing::Over, "is over"),
        ];
        for (missing, why) in whys {
            let said = MissingTransaction(missing).to_string();
            assert!(said.contains(why), "{said}");
        }
        #[cfg(feature = "axum")]
        {
            use axum::response::IntoResponse;
            let response = MissingTransaction(Missing::None).into_response();
            assert_eq!(response.status(), http::StatusCode::INTERNAL_SERVER_ERROR);
            let word = response.extensions().get();
            assert!(matches!(word, Some(crate::keep::Keep::Nothing)));
        }
    }

    #[test]
    fn a_transaction_that_was_not_given_back_is_lent_no_more() {
        let slot = Slot::of(7);
        let lent = lend(&slot);
        assert_eq!(slot.take_back(), None);
        drop(lent);
        assert_eq!(lend(&slot).err(), Some(Missing::Over));
    }
}
