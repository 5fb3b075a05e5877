//! What a process is warned of once. Each warning is said once in a process, so each has one test, and these tests have
//! a process of their own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use http::{HeaderName, HeaderValue};
use support::{
    app::{call, keyed, open, pay},
    log::Log,
};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

/// Whether a request with this header is warned of, in these words.
async fn is_warned_of(layer: &IdempotencyLayer, header: Option<(&'static str, &'static str)>, words: &str) -> bool {
    let (log, _guard) = Log::start();
    let mut request = keyed("k", "a");
    if let Some((name, value)) = header {
        let (name, value) = (HeaderName::from_static(name), HeaderValue::from_static(value));
        request.headers_mut().insert(name, value);
    }
    call(&pay(&open(), layer.clone()), request).await;
    let lines = log.lines("WARN");
    assert!(lines.iter().all(|line| line.contains(words)), "{lines:?}");
    assert!(header.is_none_or(|(_, value)| !log.text().contains(value)), "{lines:?}");
    lines.len() == 1
}

#[tokio::test]
async fn a_bearer_token_in_the_default_scope_is_warned_of_once() {
    let (layer, words) = (IdempotencyLayer::new(MemoryStore::new()), "a bearer token was sent");
    for harmless in ["Basic c2VjcmV0", "Bearers secret", "Bearer "] {
        assert!(
            !is_warned_of(&layer, Some(("authorization", harmless)), words).await,
            "{harmless}"
        );
    }
    for (token, expected) in [("bEARER secret", true), ("Bearer another", false)] {
        assert_eq!(
            is_warned_of(&layer, Some(("authorization", token)), words).await,
            expected
        );
    }
}

#[tokio::test]
async fn a_caller_that_the_default_scope_does_not_see_is_warned_of_once() {
    let (layer, words) = (IdempotencyLayer::new(MemoryStore::new()), "a Cookie or X-Api-Key");
    for (header, expected) in [
        (None, false),
        (Some(("x-tenant", "acme")), false),
        (Some(("cookie", "session=secret")), true),
        (Some(("x-api-key", "secret")), false),
    ] {
        assert_eq!(is_warned_of(&layer, header, words).await, expected, "{header:?}");
    }
}

#[tokio::test]
async fn an_authorization_of_another_scheme_than_the_one_that_is_read_is_warned_of_once() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).scope_authorization("Signed", ["account"]);
    let words = "a request came with another";
    for (header, expected) in [
        (None, false),
        (Some(("authorization", "signed account=acme, nonce=secret")), false),
        (Some(("authorization", "Basic c2VjcmV0")), true),
        (Some(("authorization", "Digest secret")), false),
    ] {
        assert_eq!(is_warned_of(&layer, header, words).await, expected, "{header:?}");
    }
}
