//! What really happened: every effect, apart from the idempotency store.

#[cfg(feature = "postgres")]
use std::collections::HashSet;
use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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

struct Lines {
    file: File,
    /// The last line was not written to its end, and is there.
    is_torn: bool,
}

/// Ends a line that was not written to its end. It may lack nothing but its line break, and is no effect all the same: an
/// object with this behind it is no JSON.
const TORN: &str = " (torn)\n";

impl Lines {
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let metadata = file.metadata()?;
        let mut last = *b"\n";
        // Only a file has an end: a pipe would be waited for.
        if metadata.is_file() && metadata.len() > 0 {
            let mut written = File::open(path)?;
            written.seek(SeekFrom::End(-1))?;
            written.read_exact(&mut last)?;
        }
        Ok(Self {
            file,
            is_torn: last != *b"\n",
        })
    }

    fn append(&mut self, line: &str) -> io::Result<()> {
        let before = self.file.metadata()?;
        // A line break in JSON as it was sent is only white space, and this is one line.
        let start = if self.is_torn { TORN } else { "" };
        let line = start.to_owned() + &line.replace(['\n', '\r'], " ") + "\n";
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            let error = match self.file.write(rest) {
                Ok(0) => io::ErrorKind::WriteZero.into(),
                Ok(written) => {
                    rest = &rest[written..];
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            let written = (line.len() - rest.len()) as u64;
            if written > 0 {
                self.is_torn |= !self.cut(&before, written);
            }
            return Err(error);
        }
        self.is_torn = false;
        Ok(())
    }

    /// Takes back what was written of a line. Only a file can be cut, and only where no other process wrote behind it.
    fn cut(&self, before: &Metadata, written: u64) -> bool {
        let is_last = |now: Metadata| now.is_file() && now.len() == before.len() + written;
        self.file.metadata().is_ok_and(is_last) && self.file.set_len(before.len()).is_ok()
    }
}

#[derive(Default)]
pub struct Ledger {
    /// Oldest first. With a database, only what its table is not known to hold.
    effects: Mutex<Vec<Arc<Effect>>>,
    file: Option<Mutex<Lines>>,
    #[cfg(feature = "postgres")]
    bank: Option<Bank>,
}

impl Ledger {
    pub fn open(file: Option<&Path>) -> io::Result<Self> {
        let file = file.map(Lines::open).transpose()?;
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

    /// Records an effect, which happens with that. An error says that there was none. In a task of its own: whoever asks
    /// for it may leave, and it is in all places all the same.
    pub async fn record(
        self: &Arc<Self>,
        id: String,
        route: String,
        request: Box<RawValue>,
    ) -> io::Result<Arc<Effect>> {
        tokio::spawn(Arc::clone(self).keep(id, route, request)).await?
    }

    async fn keep(self: Arc<Self>, id: String, route: String, request: Box<RawValue>) -> io::Result<Arc<Effect>> {
        let ledger = Arc::clone(&self);
        let append = move || ledger.append(id, route, request);
        let effect = match self.file {
            None => append(),
            Some(_) => tokio::task::spawn_blocking(append).await?,
        }?;
        #[cfg(feature = "postgres")]
        if let Some(bank) = &self.bank {
            match bank.record(&effect).await {
                Ok(()) => self.held().retain(|held| held.id != effect.id),
                Err(error) => tracing::warn!(error, id = effect.id, "an effect is in this process's memory alone"),
            }
        }
        Ok(effect)
    }

    fn append(&self, id: String, route: String, request: Box<RawValue>) -> io::Result<Arc<Effect>> {
        let Some(file) = &self.file else {
            let mut effects = self.held();
            let effect = Arc::new(Effect::now(id, route, request));
            effects.push(Arc::clone(&effect));
            return Ok(effect);
        };
        // It is locked from before the time is taken, so that the order is that of the times.
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let effect = Arc::new(Effect::now(id, route, request));
        file.append(&serde_json::to_string(&*effect)?)?;
        self.held().push(Arc::clone(&effect));
        Ok(effect)
    }

    fn held(&self) -> MutexGuard<'_, Vec<Arc<Effect>>> {
        self.effects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since this process started, newest first; in a table, those of other nodes, too.
    pub async fn effects(&self) -> io::Result<Vec<Arc<Effect>>> {
        let held: Vec<_> = self.held().iter().rev().cloned().collect();
        #[cfg(feature = "postgres")]
        if let Some(bank) = &self.bank {
            let mut effects = bank.effects().await.map_err(io::Error::other)?;
            let ids: HashSet<_> = effects.iter().map(|effect| effect.id.clone()).collect();
            let count = effects.len();
            effects.extend(held.into_iter().filter(|effect| !ids.contains(&effect.id)));
            if effects.len() > count {
                effects.sort_by(|one, other| other.at.cmp(&one.at));
            }
            return Ok(effects);
        }
        Ok(held)
    }

    /// How many there are.
    pub async fn count(&self) -> io::Result<u64> {
        let ids: Vec<_> = self.held().iter().map(|effect| effect.id.clone()).collect();
        let held = ids.len() as u64;
        #[cfg(feature = "postgres")]
        if let Some(bank) = &self.bank {
            let beside = bank.count_beside(&ids).await.map_err(io::Error::other)?;
            return Ok(held + beside.cast_unsigned());
        }
        Ok(held)
    }

    /// What all accounts hold together, where there are any.
    #[cfg(feature = "postgres")]
    pub async fn money(&self) -> Option<io::Result<u64>> {
        let money = self.bank.as_ref()?.money().await;
        Some(money.map(i64::cast_unsigned).map_err(io::Error::other))
    }
}
