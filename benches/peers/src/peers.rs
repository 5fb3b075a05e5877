//! Each contestant, set up at its best.

use std::{sync::Arc, time::SystemTime};

use async_trait::async_trait;
use axum::{Router, routing::get};
use cratestack_axum::idempotency::{IdempotencyRecord, IdempotencyStore, ReservationOutcome};
use cratestack_core::CratestackError;
use dashmap::{DashMap, Entry};
use ruts::{
    CookieOptions, Session, SessionLayer,
    store::{Ttl, moka::MokaStore},
};
use tower_cookies::CookieManagerLayer;
use uuid::Uuid;

use super::hand_rolled::{self, Records};

const DAY: std::time::Duration = std::time::Duration::from_secs(24 * 60 * 60);

pub fn ours(router: Router) -> Router {
    router.layer(tower_idempotency::IdempotencyLayer::new(tower_idempotency::MemoryStore::new()))
}

pub fn by_hand(router: Router) -> Router {
    hand_rolled::around(router, &Records::default())
}

pub fn idempotent(router: Router) -> Router {
    let store = idempotent::memory::MemoryStore::builder().try_build().unwrap();
    router.layer(idempotent::middleware::IdempotencyLayer::new(store))
}

async fn login(session: Session<MokaStore>) -> &'static str {
    session.set("user", &1, Ttl::new(86_400).unwrap(), None).await.unwrap();
    "welcome"
}

pub fn axum_idempotent(router: Router) -> Router {
    let store = Arc::new(MokaStore::builder().build());
    let options = axum_idempotent::IdempotentOptions::default()
        .use_idempotency_key_header(Some("idempotency-key"), true)
        .expire_after(86_400);
    router
        .layer(axum_idempotent::IdempotentLayer::<MokaStore>::new(options))
        .route("/login", get(login))
        .layer(SessionLayer::new(store).with_cookie_options(CookieOptions::build().name("session").path("/")))
        .layer(CookieManagerLayer::new())
}

pub fn cratestack(router: Router) -> Router {
    let store = Arc::new(Claims::default());
    router.layer(cratestack_axum::idempotency::IdempotencyLayer::new(store, DAY))
}

#[derive(Default)]
struct Claims(DashMap<(String, String), Claim>);

enum Claim {
    Running { token: Uuid, hash: [u8; 32], expires: SystemTime },
    Done(IdempotencyRecord),
}

#[async_trait]
impl IdempotencyStore for Claims {
    async fn reserve_or_fetch(
        &self,
        principal: &str,
        key: &str,
        hash: [u8; 32],
        expires: SystemTime,
    ) -> Result<ReservationOutcome, CratestackError> {
        Ok(match self.0.entry((principal.to_owned(), key.to_owned())) {
            Entry::Occupied(found) => match found.get() {
                Claim::Running { hash: begun, .. } if *begun != hash => ReservationOutcome::Conflict,
                Claim::Running { .. } => ReservationOutcome::InFlight,
                Claim::Done(record) if record.request_hash != hash => ReservationOutcome::Conflict,
                Claim::Done(record) => ReservationOutcome::Replay(record.clone()),
            },
            Entry::Vacant(vacant) => {
                let token = Uuid::new_v4();
                vacant.insert(Claim::Running { token, hash, expires });
                ReservationOutcome::Reserved { token }
            }
        })
    }

    async fn complete(
        &self,
        principal: &str,
        key: &str,
        token: Uuid,
        status: u16,
        headers: &[u8],
        body: &[u8],
    ) -> Result<(), CratestackError> {
        if let Some(mut claim) = self.0.get_mut(&(principal.to_owned(), key.to_owned())) {
            if let Claim::Running { token: own, hash, expires } = &*claim {
                if *own == token {
                    *claim = Claim::Done(IdempotencyRecord {
                        key: key.to_owned(),
                        principal_fingerprint: principal.to_owned(),
                        request_hash: *hash,
                        response_status: status,
                        response_headers: headers.to_vec(),
                        response_body: body.to_vec(),
                        created_at: SystemTime::now(),
                        expires_at: *expires,
                    });
                }
            }
        }
        Ok(())
    }

    async fn release(&self, principal: &str, key: &str, token: Uuid) -> Result<(), CratestackError> {
        self.0.remove_if(&(principal.to_owned(), key.to_owned()), |_, claim| {
            matches!(claim, Claim::Running { token: own, .. } if *own == token)
        });
        Ok(())
    }
}
