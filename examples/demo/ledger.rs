//! What really happened: every effect, apart from the idempotency store.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

#[cfg(feature = "postgres")]
use crate::bank::Bank;
use serde::Serialize;
use serde_json::value::RawValue;

/// One effect, in the form in which it is shown and written.
#[derive(Serialize)]
pub struct Effect {
    pub id: String,
    pub route: String,
    /// The request's JSON as it was sent: the order of members and the digits of numbers included.
    pub request: Box<RawValue>,
    pub at: String,
}

impl Effect {
    pub fn now(id: String, route: String, request: Box<RawValue>) -> Self {
        let at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        Self { id, route, request, at }
    }
}

#[derive(Default)]
pub struct Ledger {
    effects: Mutex<Vec<Arc<Effect>>>,
    file: Option<Mutex<File>>,
    #[cfg(feature = "postgres")]
    bank: Option<Bank>,
}

impl Ledger {
    pub fn open(file: Option<&Path>) -> io::Result<Self> {
        let file = file
            .map(|path| OpenOptions::new().create(true).append(true).open(path))
            .transpose()?;
        Ok(Self {
            file: file.map(Mutex::new),
            ..Self::default()
        })
    }

    /// In a table, in place of memory.
    #[cfg(feature = "postgres")]
    pub fn in_bank(self, bank: Bank) -> Self {
        Self {
            bank: Some(bank),
            ..self
        }
    }

    #[cfg(feature = "postgres")]
    pub fn bank(&self) -> Option<&Bank> {
        self.bank.as_ref()
    }

    /// Records an effect; when this returns it is in the table and in the file, if there are such.
    pub async fn record(self: &Arc<Self>, effect: Effect) -> io::Result<()> {
        #[cfg(feature = "postgres")]
        if let Some(bank) = &self.bank {
            bank.record(&effect).await.map_err(io::Error::other)?;
        }
        let ledger = Arc::clone(self);
        let append = move || {
            if let Some(file) = &ledger.file {
                // A line break in JSON as it was sent is only white space, and this is one line.
                let line = serde_json::to_string(&effect)?.replace(['\n', '\r'], " ") + "\n";
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.write_all(line.as_bytes())?;
            }
            let mut effects = ledger.effects.lock().unwrap_or_else(PoisonError::into_inner);
            effects.push(Arc::new(effect));
            Ok(())
        };
        if self.file.is_none() {
            return append();
        }
        tokio::task::spawn_blocking(append).await?
    }

    /// Newest first; in a table, those of all nodes and all times.
    pub async fn effects(&self) -> io::Result<Vec<Arc<Effect>>> {
        #[cfg(feature = "postgres")]
        if let Some(bank) = &self.bank {
            let effects = bank.effects().await.map_err(io::Error::other)?;
            return Ok(effects.into_iter().map(Arc::new).collect());
        }
        Ok(self.in_memory())
    }

    fn in_memory(&self) -> Vec<Arc<Effect>> {
        let effects = self.effects.lock().unwrap_or_else(PoisonError::into_inner);
        effects.iter().rev().cloned().collect()
    }

    /// How many there are.
    pub async fn count(&self) -> io::Result<u64> {
        #[cfg(feature = "postgres")]
        if let Some(bank) = &self.bank {
            return bank.count().await.map(i64::cast_unsigned).map_err(io::Error::other);
        }
        Ok(self.effects.lock().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }

    /// What all accounts hold together, where there are any.
    #[cfg(feature = "postgres")]
    pub async fn money(&self) -> Option<io::Result<u64>> {
        let money = self.bank.as_ref()?.money().await;
        Some(money.map(i64::cast_unsigned).map_err(io::Error::other))
    }
}
