//! Where records are kept, as the command line says.

use std::{env, fs, path::PathBuf};

use tower_idempotency::{AnyStore, FileStore, FileStoreErrorKind, MemoryStore};

use crate::{args, ledger::Ledger};

#[derive(Clone)]
pub enum Store {
    Memory(MemoryStore),
    File {
        store: FileStore,
        path: PathBuf,
    },
    /// On a server, which knows its own size.
    #[cfg(any(feature = "redis", feature = "postgres"))]
    Server(AnyStore),
}

/// What a store holds.
pub struct Size {
    pub records: u64,
    pub bytes: u64,
}

impl Store {
    /// And the ledger, which is a table where the records are in one.
    pub async fn open(choice: args::Store, ledger: Ledger) -> Result<(Self, Ledger), String> {
        #[cfg(feature = "postgres")]
        if let args::Store::Postgres(url) = &choice {
            let builder = tower_idempotency::PostgresStore::builder().create_table(true);
            let store = Self::server(builder.connect(url).await)?;
            return Ok((store, ledger.in_bank(crate::bank::Bank::open(url).await?)));
        }
        let store = match choice {
            args::Store::Memory => Ok(Self::Memory(MemoryStore::new())),
            args::Store::File(path) => Self::file(path).await,
            args::Store::Default => Self::anywhere().await,
            #[cfg(feature = "redis")]
            args::Store::Redis(url) => Self::server(tower_idempotency::RedisStore::connect(&url).await),
            #[cfg(feature = "postgres")]
            args::Store::Postgres(_) => Err("the database is opened above".to_owned()),
        }?;
        Ok((store, ledger))
    }

    #[cfg(any(feature = "redis", feature = "postgres"))]
    fn server(connected: Result<impl tower_idempotency::Store, tower_idempotency::StoreError>) -> Result<Self, String> {
        match connected {
            Ok(store) => Ok(Self::Server(AnyStore::new(store))),
            Err(error) => Err(match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            }),
        }
    }

    async fn file(path: PathBuf) -> Result<Self, String> {
        match FileStore::open(&path).await {
            Ok(store) => Ok(Self::File { store, path }),
            Err(error) => Err(error.to_string()),
        }
    }

    /// In the platform's data directory, or else in the temporary one.
    async fn anywhere() -> Result<Self, String> {
        let mut error = String::new();
        for directory in data_directory().into_iter().chain([env::temp_dir()]) {
            let directory = directory.join("tower-idempotency-demo");
            let path = directory.join("store.redb");
            if let Err(refused) = fs::create_dir_all(&directory) {
                error = format!("{}: {refused}", directory.display());
                continue;
            }
            match FileStore::open(&path).await {
                Ok(store) => return Ok(Self::File { store, path }),
                Err(refused) if refused.kind() == FileStoreErrorKind::NotAccessible => error = refused.to_string(),
                Err(refused) if refused.kind() == FileStoreErrorKind::InUse => {
                    return Err(format!("{refused}\nIs another demo running? Try --store memory."));
                }
                // What is wrong with a file that is there is for a person to know.
                Err(refused) => return Err(refused.to_string()),
            }
        }
        Err(error)
    }

    pub fn any(&self) -> AnyStore {
        match self {
            Self::Memory(store) => AnyStore::new(store.clone()),
            Self::File { store, .. } => AnyStore::new(store.clone()),
            #[cfg(any(feature = "redis", feature = "postgres"))]
            Self::Server(store) => store.clone(),
        }
    }

    /// `None` for a server.
    pub fn size(&self) -> Option<Size> {
        match self {
            Self::Memory(store) => Some(Size {
                records: store.len(),
                bytes: store.bytes(),
            }),
            Self::File { store, path } => Some(Size {
                records: store.len(),
                bytes: fs::metadata(path).map_or(0, |metadata| metadata.len()),
            }),
            #[cfg(any(feature = "redis", feature = "postgres"))]
            Self::Server(_) => None,
        }
    }

    pub async fn close(&self) {
        if let Self::File { store, .. } = self {
            store.close().await;
        }
    }
}

fn data_directory() -> Option<PathBuf> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || variable("HOME");
    if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        home().map(|home| home.join("Library/Application Support"))
    } else {
        // A relative path means nothing there, says its specification.
        let data = variable("XDG_DATA_HOME").filter(|path| path.is_absolute());
        data.or_else(|| home().map(|home| home.join(".local/share")))
    }
}
