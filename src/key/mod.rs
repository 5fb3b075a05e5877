//! The idempotency key: where it is taken from and what it may look like.

mod source;

use std::{fmt, sync::Arc};

use http::{HeaderName, HeaderValue};
use sfv::{BareItem, Item, Parser};

pub(crate) use self::source::InHead;
pub use self::source::KeySource;

use crate::{
    fingerprint::Fingerprint,
    hex,
    rejection::{Rejection, RejectionKind},
};

/// The client's name for one operation, already checked against the layer's rules.
///
/// Of a request without a key whose key is [derived](crate::WithoutKey::DeriveAndReplay) it is the hexadecimal digest
/// of the fingerprint.
///
/// Keys are case-sensitive. The text is at most [`max_key_length`](crate::IdempotencyLayer::max_key_length)
/// characters long; by default each is visible ASCII.
///
/// A key may identify a customer, so `Debug` does not show it; [`as_str`](Self::as_str) does.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct IdempotencyKey(Arc<str>);

impl IdempotencyKey {
    /// The characters of the key, without the quotes of a structured field.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of an operation that the client gave none.
    pub(crate) fn derived(fingerprint: &Fingerprint) -> Self {
        Self(hex::of(fingerprint.digest()).into())
    }
}

impl fmt::Debug for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdempotencyKey(..)")
    }
}

/// How the value of a key header is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyFormat {
    /// A Structured Field String (`"8e03"`) and the bare characters (`8e03`) are the same key.
    #[default]
    Lenient,
    /// Only a Structured Field String (RFC 9651 §3.3.3) is a key, as the IETF draft asks for.
    Strict,
}

/// A closure's answer for a key that it does not take: the rule that the key broke, for the client to read.
pub(crate) type KeyRule = dyn Fn(&str) -> Result<(), &'static str> + Send + Sync;

/// What a key may look like.
#[derive(Clone)]
pub(crate) struct KeyRules {
    pub(crate) format: KeyFormat,
    pub(crate) max_length: usize,
    pub(crate) rule: Arc<KeyRule>,
    /// In the body of one request, beside its own.
    pub(crate) max_keys: usize,
}

impl fmt::Debug for KeyRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRules")
            .field("format", &self.format)
            .field("max_length", &self.max_length)
            .field("max_keys", &self.max_keys)
            .finish_non_exhaustive()
    }
}

impl Default for KeyRules {
    fn default() -> Self {
        Self {
            format: KeyFormat::Lenient,
            max_length: 255,
            rule: Arc::new(visible_ascii),
            max_keys: 256,
        }
    }
}

/// Takes what [`IdempotencyLayer::key_rule`](crate::IdempotencyLayer::key_rule) takes by default.
///
/// # Errors
/// For characters that are not visible ASCII.
pub fn visible_ascii(key: &str) -> Result<(), &'static str> {
    // Without a way out at the first of them, which lets many be looked at in one step.
    if key.bytes().fold(true, |all, byte| all & byte.is_ascii_graphic()) {
        Ok(())
    } else {
        Err("the idempotency key may contain only visible ASCII characters")
    }
}

/// Takes keys of any characters; those of a header have to be UTF-8. For
/// [`key_rule`](crate::IdempotencyLayer::key_rule).
///
/// # Errors
/// None.
pub fn any_text(_: &str) -> Result<(), &'static str> {
    Ok(())
}

/// Takes UUIDs (RFC 9562), written with hyphens: 36 characters. For
/// [`key_rule`](crate::IdempotencyLayer::key_rule). The key is still compared as text: the same UUID in upper and in
/// lower case is two keys.
///
/// # Errors
/// For everything else.
pub fn uuid(key: &str) -> Result<(), &'static str> {
    let is_uuid = key.len() == 36
        && key.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        });
    match is_uuid {
        true => Ok(()),
        false => Err("the idempotency key has to be a UUID, such as 123e4567-e89b-12d3-a456-426614174000"),
    }
}

impl KeyRules {
    pub(crate) fn parse_header(&self, name: &HeaderName, value: &HeaderValue) -> Result<IdempotencyKey, Rejection> {
        let bytes = value.as_bytes().trim_ascii();
        // In the longest accepted form every character is escaped and the whole is quoted.
        if bytes.len() > self.max_length.saturating_mul(4).saturating_add(2) {
            return Err(self.too_long());
        }
        if bytes.starts_with(b"\"") {
            return match Parser::new(bytes).parse::<Item>() {
                Ok(item) if !item.params.is_empty() => Err(self.invalid(format!(
                    "the header `{name}` carries parameters after the quoted string"
                ))),
                Ok(Item {
                    bare_item: BareItem::String(text),
                    ..
                }) => self.check(text.as_str()),
                Ok(_) | Err(_) => Err(self.invalid(format!(
                    "the header `{name}` starts with a quote but is not a structured field string (RFC 9651)"
                ))),
            };
        }
        if self.format == KeyFormat::Strict {
            return Err(self.invalid(format!(
                "the header `{name}` must be a quoted structured field string (RFC 9651), such as \"8e03978e\""
            )));
        }
        match std::str::from_utf8(bytes) {
            Ok(text) => self.check(text),
            Err(_) => Err(self.invalid(format!("the header `{name}` is not text"))),
        }
    }

    pub(crate) fn check(&self, text: &str) -> Result<IdempotencyKey, Rejection> {
        if text.is_empty() {
            return Err(self.invalid("the idempotency key is empty".to_owned()));
        }
        // Bytes first: there are no more characters than bytes, and counting those of a huge key would be work for an
        // attacker's sake.
        let may_be_too_long = text.len() > self.max_length;
        if may_be_too_long && (text.len() > self.max_length.saturating_mul(4) || text.chars().count() > self.max_length)
        {
            return Err(self.too_long());
        }
        match (self.rule)(text) {
            Ok(()) => Ok(IdempotencyKey(Arc::from(text))),
            Err(rule) => Err(self.invalid(rule.to_owned())),
        }
    }

    fn too_long(&self) -> Rejection {
        self.invalid(format!(
            "the idempotency key is longer than {} characters",
            self.max_length
        ))
    }

    pub(crate) fn invalid(&self, detail: String) -> Rejection {
        Rejection::new(RejectionKind::KeyInvalid).with_detail(detail)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn find(source: &KeySource, rules: &KeyRules, lines: &[(&'static str, &[u8])]) -> Result<Option<String>, String> {
        let mut request = http::Request::new(());
        for (name, value) in lines {
            request
                .headers_mut()
                .append(*name, HeaderValue::from_bytes(value).unwrap());
        }
        let (parts, ()) = request.into_parts();
        match source.in_head(&parts, rules) {
            Ok(InHead::Key(key)) => Ok(Some(key.as_str().to_owned())),
            Ok(_) => Ok(None),
            Err(rejection) => {
                assert_eq!(rejection.kind(), RejectionKind::KeyInvalid);
                Err(rejection.detail().unwrap().to_owned())
            }
        }
    }

    fn lenient(value: &[u8]) -> Result<String, String> {
        find(
            &KeySource::default(),
            &KeyRules::default(),
            &[("idempotency-key", value)],
        )
        .map(Option::unwrap)
    }

    fn strict(value: &[u8]) -> Result<String, String> {
        let rules = KeyRules {
            format: KeyFormat::Strict,
            ..KeyRules::default()
        };
        find(&KeySource::default(), &rules, &[("idempotency-key", value)]).map(Option::unwrap)
    }

    #[test]
    fn quoted_and_bare_forms_of_the_same_characters_are_the_same_key() {
        assert_eq!(lenient(b"8e03"), lenient(b"\"8e03\""));
        assert_eq!(
            lenient(br#"a\"b"#),
            Ok(r#"a\"b"#.to_owned()),
            "a bare key has no escapes"
        );
        assert_eq!(lenient(br#""a\"b""#), Ok(r#"a"b"#.to_owned()));
        assert_eq!(lenient(br#""a\\b""#), Ok(r"a\b".to_owned()));
    }

    #[test]
    fn strict_takes_only_the_quoted_form() {
        assert_eq!(strict(b"\"8e03\""), Ok("8e03".to_owned()));
        for value in [&b"8e03"[..], b"12", b"?1", b":YQ==:", b"@5", b""] {
            assert!(strict(value).unwrap_err().contains("quoted"), "{value:?}");
        }
    }

    #[test]
    fn every_unusable_key_is_refused_with_the_rule_that_it_broke() {
        let long = [b'k'; 256];
        let huge = vec![b'k'; 500_000];
        let quoted_long = [&b"\""[..], &long[..], b"\""].concat();
        for (value, rule) in [
            (&b""[..], "empty"),
            (b"  ", "empty"),
            (b"\"\"", "empty"),
            (&long, "longer than 255"),
            (&huge, "longer than 255"),
            (&quoted_long, "longer than 255"),
            (b"a, b", "visible ASCII"),
            (b"a b", "visible ASCII"),
            (b"\"a b\"", "visible ASCII"),
            (b"\xff", "not text"),
            ("schlüssel".as_bytes(), "visible ASCII"),
            (b"a\tb", "visible ASCII"),
            (b"\"a", "structured field string"),
            (b"\"a\"b", "structured field string"),
            (b"\"a\", \"b\"", "structured field string"),
            (br#""a\x""#, "structured field string"),
            (b"\"a\";x=1", "parameters"),
        ] {
            let detail = lenient(value).unwrap_err();
            assert!(detail.contains(rule), "{detail:?} does not say {rule:?}");
        }
    }

    #[test]
    fn the_length_of_a_key_is_counted_in_characters() {
        let rules = KeyRules {
            max_length: 4,
            rule: Arc::new(any_text),
            ..KeyRules::default()
        };
        for key in ["abcd", "éééé", "日本語ね", "🔑🔑🔑🔑"] {
            assert!(rules.check(key).is_ok(), "{key}");
            assert!(rules.check(&format!("{key}x")).is_err(), "{key}x");
        }
    }

    #[test]
    fn keys_that_mean_something_elsewhere_are_only_characters_here() {
        for value in ["x{1}y", "*", ":", "';DROP", "a,b", "a;x=1", "a:b", &"k".repeat(255)] {
            assert_eq!(lenient(value.as_bytes()), Ok(value.to_owned()));
        }
        assert_ne!(lenient(b"ABC"), lenient(b"abc"));
    }

    #[test]
    fn a_header_on_two_lines_is_refused_even_when_both_say_the_same() {
        let twice: &[(_, &[u8])] = &[("idempotency-key", b"a"), ("idempotency-key", b"a")];
        let detail = find(&KeySource::default(), &KeyRules::default(), twice).unwrap_err();
        assert!(detail.contains("more than once"));
    }

    #[test]
    fn the_first_header_of_several_that_is_there_is_the_key() {
        let source = KeySource::headers(["x-request-id", "request-id"]);
        let rules = KeyRules::default();
        assert_eq!(find(&source, &rules, &[]), Ok(None));
        assert_eq!(find(&source, &rules, &[("request-id", b"b")]), Ok(Some("b".to_owned())));
        let both: &[(_, &[u8])] = &[("request-id", b"b"), ("x-request-id", b"a")];
        assert_eq!(find(&source, &rules, both), Ok(Some("a".to_owned())));
    }

    #[test]
    fn a_closure_takes_the_key_from_the_parts_and_the_rules_still_hold() {
        let source = KeySource::parts(|parts| Some(parts.uri.path().trim_start_matches('/').to_owned()));
        let find = |uri: &str| {
            let (parts, ()) = http::Request::builder().uri(uri).body(()).unwrap().into_parts();
            source.in_head(&parts, &KeyRules::default())
        };
        assert!(matches!(find("/abc"), Ok(InHead::Key(key)) if key.as_str() == "abc"));
        assert!(matches!(find("/"), Err(rejection) if rejection.kind() == RejectionKind::KeyInvalid));
    }

    #[test]
    fn the_rule_may_be_replaced_and_the_limit_counts_characters() {
        let rules = KeyRules {
            max_length: 3,
            rule: Arc::new(|_| Ok(())),
            ..KeyRules::default()
        };
        let source = KeySource::default();
        assert_eq!(
            find(&source, &rules, &[("idempotency-key", "äöü".as_bytes())]),
            Ok(Some("äöü".to_owned()))
        );
        assert!(find(&source, &rules, &[("idempotency-key", "äöüß".as_bytes())]).is_err());
    }

    #[test]
    fn debug_does_not_show_the_key() {
        let key = KeyRules::default().check("secret").unwrap();
        assert!(!format!("{key:?}").contains("secret"));
    }
}
