//! What the tests of all presets are made of.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, response::IntoResponse};
use http::{Request, StatusCode};
use tokio::time::advance;
use tower_idempotency::{IdempotencyLayer, Keep, MemoryStore, Profile};

use crate::support::{
    app::{Control, anywhere_answering, call, gated, open, request, spawn},
    http::Answer,
};

const MILLISECOND: Duration = Duration::from_millis(1);

/// An application under a preset. It answers as it was told last, with a resource that has the number of the run.
pub struct Bench {
    pub store: MemoryStore,
    pub control: Control,
    pub app: Router,
    says: Arc<Mutex<(StatusCode, Option<Keep>)>>,
    /// How a request of this API carries its key: the method, the headers and the body.
    carry: Carry,
}

type Carry = fn(&str, &str) -> Request<axum::body::Body>;

/// A `POST` to `/payments`.
pub fn post(headers: &[(&str, &str)], body: impl Into<String>) -> Request<axum::body::Body> {
    request("POST", "/payments", headers, body.into())
}

/// In a header `Idempotency-Key`.
pub fn by_header(key: &str, amount: &str) -> Request<axum::body::Body> {
    post(&[("idempotency-key", key)], amount)
}

impl Bench {
    pub fn new(profile: Profile, carry: Carry) -> Self {
        Self::with(open(), profile, |layer| layer, carry)
    }

    /// With handlers that wait.
    pub fn gated(profile: Profile, carry: Carry) -> Self {
        Self::with(gated(), profile, |layer| layer, carry)
    }

    /// With further settings.
    pub fn with(
        control: Control,
        profile: Profile,
        settings: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
        carry: Carry,
    ) -> Self {
        let store = MemoryStore::new();
        let layer = settings(IdempotencyLayer::new(store.clone()).profile(profile));
        let says = Arc::new(Mutex::new((StatusCode::CREATED, None)));
        let told = Arc::clone(&says);
        let app = anywhere_answering(&control, layer, move |run, _, _| {
            let (status, keep) = *told.lock().unwrap();
            let json = [("content-type", "application/json")];
            let answer = (status, json, format!(r#"{{"payments":{{"id":"PM{run}"}}}}"#));
            match keep {
                Some(keep) => (keep, answer).into_response(),
                None => answer.into_response(),
            }
        });
        Self {
            store,
            control,
            app,
            says,
            carry,
        }
    }

    /// What the handler answers from now on.
    pub fn says(&self, status: u16, keep: Option<Keep>) {
        *self.says.lock().unwrap() = (StatusCode::from_u16(status).unwrap(), keep);
    }

    pub async fn send(&self, request: Request<axum::body::Body>) -> Answer {
        call(&self.app, request).await
    }

    pub async fn pay(&self, key: &str, amount: &str) -> Answer {
        self.send((self.carry)(key, amount)).await
    }

    /// Whether the handler runs for this request.
    pub async fn runs(&self, request: Request<axum::body::Body>) -> bool {
        let before = self.control.runs();
        self.send(request).await;
        self.control.runs() > before
    }

    /// The answer to a duplicate of a request that is still running.
    pub async fn while_running(&self, key: &str) -> Answer {
        let first = spawn(&self.app, (self.carry)(key, "1"));
        self.control.entered().await;
        let duplicate = self.pay(key, "1").await;
        self.control.let_go();
        assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
        duplicate
    }

    /// The answer to another body under the key of an operation that is done.
    pub async fn with_another_body(&self) -> Answer {
        self.pay("0a4c5de0-0000-4000-8000-000000000000", "1").await;
        self.pay("0a4c5de0-0000-4000-8000-000000000000", "2").await
    }

    /// A duplicate gets the first answer, byte for byte.
    pub async fn assert_replayed(&self, key: &str) {
        let first = self.pay(key, "1").await;
        let again = self.pay(key, "1").await;
        assert_eq!((again.status, &again.body), (first.status, &first.body));
        assert_eq!(self.control.runs(), 1);
    }

    /// A key of this length is taken, and a longer one is refused.
    pub async fn assert_longest_key(&self, length: usize) {
        assert_eq!(self.pay(&"k".repeat(length), "1").await.status, StatusCode::CREATED);
        assert_eq!(
            self.pay(&"k".repeat(length + 1), "1").await.status,
            StatusCode::BAD_REQUEST
        );
        assert_eq!(self.pay("", "1").await.status, StatusCode::BAD_REQUEST);
        assert_eq!(self.control.runs(), 1);
    }

    /// The key is held for this long, and free from then on.
    pub async fn assert_kept_for(&self, time: Duration) {
        let key = "0a4c5de0-0000-4000-8000-000000000001";
        self.pay(key, "1").await;
        advance(time - MILLISECOND).await;
        self.pay(key, "1").await;
        assert_eq!(self.control.runs(), 1, "it is kept until the end");
        advance(MILLISECOND).await;
        self.pay(key, "1").await;
        assert_eq!(self.control.runs(), 2, "and no longer");
    }

    /// Answers of these statuses are kept, and others free the key.
    pub async fn assert_keeps(&self, kept: &[u16], freed: &[u16]) {
        let statuses = kept
            .iter()
            .map(|status| (status, 1))
            .chain(freed.iter().map(|status| (status, 2)));
        for (number, (status, expected)) in statuses.enumerate() {
            self.says(*status, None);
            let (key, before) = (format!("0a4c5de0-0000-4000-8000-{number:012}"), self.control.runs());
            assert_eq!(self.pay(&key, "1").await.status, *status);
            self.pay(&key, "1").await;
            assert_eq!(
                self.control.runs() - before,
                expected,
                "runs of what was answered with {status}"
            );
        }
    }

    /// The same key from another `Authorization`, or at another path, is another operation.
    pub async fn assert_apart_by_authorization_and_route(&self) {
        let key = "0a4c5de0-0000-4000-8000-000000000002";
        for (authorization, path) in [("a", "/payments"), ("b", "/payments"), ("a", "/refunds")] {
            let request = || {
                let mut request = (self.carry)(key, "1");
                request
                    .headers_mut()
                    .insert("authorization", authorization.parse().unwrap());
                *request.uri_mut() = path.parse().unwrap();
                request
            };
            assert!(self.runs(request()).await, "{authorization} at {path}");
            assert!(!self.runs(request()).await, "{authorization} at {path}");
        }
    }

    /// Requests of these methods are protected and those of others are not.
    pub async fn assert_covers(&self, covered: &[&str]) {
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
            let request = || {
                let mut request = (self.carry)("0a4c5de0-0000-4000-8000-000000000003", "1");
                *request.method_mut() = method.parse().unwrap();
                *request.uri_mut() = format!("/{method}").parse().unwrap();
                request
            };
            assert!(self.runs(request()).await);
            assert_eq!(!self.runs(request()).await, covered.contains(&method), "{method}");
        }
    }

    /// A request that carries no key runs each time and leaves nothing.
    pub async fn assert_key_is_optional(&self, without_key: impl Fn() -> Request<axum::body::Body>) {
        for _ in 0..2 {
            assert!(self.runs(without_key()).await);
        }
        assert!(self.store.is_empty());
    }
}

pub fn hours(hours: u64) -> Duration {
    Duration::from_secs(hours * 60 * 60)
}
