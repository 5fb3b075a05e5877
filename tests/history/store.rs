//! Any store, behind faults, with a witness: it tells the history which attempts the layer could not be sure of.
//!
//! What the witness says excuses no effect. It only says when "in progress" and "outcome unknown" are true.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    future::pending,
    sync::{Arc, Mutex, RwLock},
    time::Duration,
};

use tokio::{sync::watch, time::sleep};
use tower_idempotency::{
    AnyStore, Begin, Claim, Lease, Owner, RecordId, Retention, Store, StoreError, StoreErrorKind, StoredResponse,
};

use super::{
    event::{Event, History, Key},
    support::dice::Dice,
};

/// How often each fault struck.
#[derive(Debug, Default)]
pub struct Struck(Mutex<BTreeMap<&'static str, u64>>);

impl Struck {
    pub fn add(&self, fault: &'static str) {
        *self.0.lock().unwrap().entry(fault).or_default() += 1;
    }

    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().unwrap().clone()
    }
}

/// How often in a thousand calls each of them happens.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallRates {
    pub refused: u64,
    pub answer_lost: u64,
    pub late: u64,
    pub silent: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    Clear,
    /// Every call fails at once.
    Cut,
    /// No call is answered until it clears.
    Paused,
}

pub struct Witness {
    history: Arc<History>,
    pub struck: Arc<Struck>,
    /// `None` while it is restarted.
    store: RwLock<Option<AnyStore>>,
    rates: Mutex<CallRates>,
    dice: Mutex<Dice>,
    weather: watch::Sender<Weather>,
    names: Mutex<HashMap<RecordId, Key>>,
    doubts: Mutex<HashMap<Key, HashSet<Owner>>>,
}

tokio::task_local! {
    /// The key of the request that is served, for the first look at the store.
    pub static NAMED: Key;
}

/// What a call does to what is known of its owner.
#[derive(Clone, Copy, PartialEq)]
enum Call {
    Begin,
    Renew,
    Abandon,
    End,
}

impl Witness {
    pub fn new(history: Arc<History>, struck: Arc<Struck>, store: AnyStore, seed: u64) -> Self {
        Self {
            history,
            struck,
            store: RwLock::new(Some(store)),
            rates: Mutex::default(),
            dice: Mutex::new(Dice::of(seed)),
            weather: watch::Sender::new(Weather::Clear),
            names: Mutex::default(),
            doubts: Mutex::default(),
        }
    }

    pub fn rates(&self, rates: CallRates) {
        *self.rates.lock().unwrap() = rates;
    }

    pub fn make(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    pub fn replace(&self, store: Option<AnyStore>) {
        *self.store.write().unwrap() = store;
    }

    /// Until the store answers again.
    pub async fn is_up(&self) {
        let nobody = Lease::new(RecordId::from_bytes([0; 32]), Owner::from_bytes([0; 16]), 1);
        let store = self.store.read().unwrap().clone().expect("it was opened again");
        while !matches!(store.renew(&nobody, Duration::ZERO).await, Err(error) if error.kind() == StoreErrorKind::Fenced)
        {
            tokio::task::yield_now().await;
        }
    }

    fn doubt(&self, id: &RecordId, owner: Owner) {
        let Some(key) = self.names.lock().unwrap().get(id).copied() else {
            return;
        };
        if self.doubts.lock().unwrap().entry(key).or_default().insert(owner) {
            self.history.push(Event::OwnerLost { key });
        }
    }

    fn know(&self, id: &RecordId, owner: Owner, call: Call) {
        let Some(key) = self.names.lock().unwrap().get(id).copied() else {
            return;
        };
        let mut doubts = self.doubts.lock().unwrap();
        let owners = doubts.entry(key).or_default();
        let was_in_doubt = owners.remove(&owner);
        if owners.is_empty() && (was_in_doubt || call == Call::Abandon) {
            self.history.push(Event::Settled { key });
        }
    }

    async fn meet<T, F>(
        &self,
        call: Call,
        id: &RecordId,
        owner: Owner,
        apply: impl FnOnce(AnyStore) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut unanswered = Unanswered {
            witness: self,
            id,
            owner,
            answered: false,
        };
        let result = self.struck(apply).await;
        let failed = result
            .as_ref()
            .is_err_and(|error| error.kind() != StoreErrorKind::Fenced);
        if !failed {
            unanswered.answered = true;
            self.know(id, owner, call);
        }
        result
    }

    async fn struck<T, F>(&self, apply: impl FnOnce(AnyStore) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut weather = self.weather.subscribe();
        loop {
            let now = *weather.borrow_and_update();
            match now {
                Weather::Clear => break,
                Weather::Cut => {
                    self.struck.add("store cut");
                    return Err(StoreErrorKind::Unavailable.into());
                }
                Weather::Paused => {
                    self.struck.add("store paused");
                    let _ = weather.changed().await;
                }
            }
        }
        let Some(store) = self.store.read().unwrap().clone() else {
            self.struck.add("store killed");
            return Err(StoreErrorKind::Unavailable.into());
        };
        let rates = *self.rates.lock().unwrap();
        let (drawn, pause) = {
            let mut dice = self.dice.lock().unwrap();
            (dice.below(1000), Duration::from_millis(1 + dice.below(60)))
        };
        let refused = rates.refused;
        let lost = refused + rates.answer_lost;
        let late = lost + rates.late;
        let silent = late + rates.silent;
        match drawn {
            drawn if drawn < refused => {
                self.struck.add("store call refused");
                Err(StoreErrorKind::Unavailable.into())
            }
            drawn if drawn < lost => {
                let _ = apply(store).await;
                self.struck.add("store answer lost");
                Err(StoreErrorKind::Unavailable.into())
            }
            drawn if drawn < late => {
                self.struck.add("store late");
                sleep(pause).await;
                apply(store).await
            }
            drawn if drawn < silent => {
                let _ = apply(store).await;
                self.struck.add("store silent");
                pending().await
            }
            _ => apply(store).await,
        }
    }
}

/// A call whose future is dropped was not answered either.
struct Unanswered<'a> {
    witness: &'a Witness,
    id: &'a RecordId,
    owner: Owner,
    answered: bool,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.witness.doubt(self.id, self.owner);
        }
    }
}

impl Store for Witness {
    async fn begin(&self, id: &RecordId, claim: &Claim) -> Result<Begin, StoreError> {
        if let Ok(key) = NAMED.try_with(|key| *key) {
            self.names.lock().unwrap().insert(*id, key);
        }
        let begin = async |store: AnyStore| store.begin(id, claim).await;
        self.meet(Call::Begin, id, claim.owner, begin).await
    }

    async fn complete(&self, lease: &Lease, response: &StoredResponse, retention: Retention) -> Result<(), StoreError> {
        let complete = async |store: AnyStore| store.complete(lease, response, retention).await;
        self.meet(Call::End, &lease.id, lease.owner, complete).await
    }

    async fn renew(&self, lease: &Lease, length: Duration) -> Result<(), StoreError> {
        let renew = async |store: AnyStore| store.renew(lease, length).await;
        self.meet(Call::Renew, &lease.id, lease.owner, renew).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), StoreError> {
        let release = async |store: AnyStore| store.release(lease).await;
        self.meet(Call::End, &lease.id, lease.owner, release).await
    }

    async fn abandon(&self, lease: &Lease) -> Result<(), StoreError> {
        let abandon = async |store: AnyStore| store.abandon(lease).await;
        self.meet(Call::Abandon, &lease.id, lease.owner, abandon).await
    }

    async fn changed(&self, id: &RecordId) {
        let store = self.store.read().unwrap().clone();
        match store {
            Some(store) => store.changed(id).await,
            None => pending().await,
        }
    }
}
