//! Settings: which requests are protected, under which key.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderName, Method};

use super::IdempotencyLayer;
use crate::{
    first_sent::FirstSent,
    key::{KeyFormat, KeyRule, KeySource},
    policy::WithoutKey,
};

impl IdempotencyLayer {
    /// The methods that are protected, in place of those that were; requests with any other pass. Default: `POST` and
    /// `PATCH`.
    #[must_use]
    pub fn methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        let methods: Arc<[_]> = methods.into_iter().collect();
        self.set(|policy| policy.methods = Arc::clone(&methods))
    }

    /// Where the key is found; nowhere else does it count. Default: the header `Idempotency-Key`.
    #[must_use]
    pub fn key(self, source: KeySource) -> Self {
        self.set(|policy| policy.key = source.clone())
    }

    /// Refuses a request without a key (400). Default: it passes, unprotected.
    #[must_use]
    pub fn require_key(self) -> Self {
        self.without_key(WithoutKey::Refuse)
    }

    /// Lets a request without a key pass, unprotected. Default: this.
    #[must_use]
    pub fn optional_key(self) -> Self {
        self.without_key(WithoutKey::Pass)
    }

    /// What happens to a request without a key. Default: [`WithoutKey::Pass`].
    #[must_use]
    pub fn without_key(self, what: WithoutKey) -> Self {
        self.set(|policy| policy.without_key = what)
    }

    /// How a key header is read. Default: [`KeyFormat::Lenient`], quoted or bare.
    #[must_use]
    pub fn key_format(self, format: KeyFormat) -> Self {
        self.set(|policy| policy.key_rules.format = format)
    }

    /// The most characters of a key, not bytes; a longer one is refused as
    /// [`KeyInvalid`](crate::RejectionKind::KeyInvalid). Default: 255.
    ///
    /// # Panics
    /// If `characters` is 0.
    #[must_use]
    pub fn max_key_length(self, characters: usize) -> Self {
        assert!(characters > 0, "no key is that short");
        self.set(|policy| policy.key_rules.max_length = characters)
    }

    /// Which keys are taken: the closure gets the characters and answers with the rule that they break, which the
    /// client is told. Default: visible ASCII characters
    /// ([`visible_ascii`](crate::key_rules::visible_ascii)); the module [`key_rules`](crate::key_rules) has others.
    #[must_use]
    pub fn key_rule(self, rule: impl Fn(&str) -> Result<(), &'static str> + Send + Sync + 'static) -> Self {
        let rule: Arc<KeyRule> = Arc::new(rule);
        self.set(|policy| policy.key_rules.rule = Arc::clone(&rule))
    }

    /// How many keys one request may claim [beside its own](KeySource::and_each); one more is refused as
    /// [`KeyInvalid`](crate::RejectionKind::KeyInvalid). Each costs a call to the store before the handler runs and one
    /// after it. Default: 256.
    #[must_use]
    pub fn max_keys(self, keys: usize) -> Self {
        self.set(|policy| policy.key_rules.max_keys = keys)
    }

    /// The header by which a client says when it sent this operation's first request, as an HTTP date (OASIS Repeatable
    /// Requests: `Repeatability-First-Sent`). Every request with a key has to have it, once, and one that has it needs
    /// a key (400 otherwise). One that was sent first longer ago than the [retention](Self::retention) is refused
    /// (412): its record may be gone, so that it would run again. `ahead` is how far a client's clock may be ahead of
    /// the server's; records are kept for so much longer, and a minute. A handler's
    /// [`Keep::AnswerFor`](crate::Keep::AnswerFor) of a shorter time undoes that. Default: no such header.
    #[must_use]
    pub fn first_sent(self, header: HeaderName, ahead: Duration) -> Self {
        self.first_sent_by(header, ahead, SystemTime::now)
    }

    /// As [`first_sent`](Self::first_sent), with a clock of the caller's, for tests. The time of a record is still the
    /// store's.
    #[must_use]
    pub fn first_sent_by(
        self,
        header: HeaderName,
        ahead: Duration,
        clock: impl Fn() -> SystemTime + Send + Sync + 'static,
    ) -> Self {
        let first_sent = FirstSent {
            header,
            ahead,
            clock: Arc::new(clock),
        };
        self.set(|policy| policy.first_sent = Some(first_sent.clone()))
    }
}
