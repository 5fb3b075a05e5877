//! What has to hold for bytes of anybody's making. `fuzz/` makes them up for hours; the tests below do for seconds, and
//! go through the corpus that is kept there.

use bytes::Bytes;
use http::{HeaderName, HeaderValue};

use crate::{
    StoredResponse,
    json::{Json, digest},
    key::{KeyFormat, KeyRules},
};

const HEADER: HeaderName = HeaderName::from_static("idempotency-key");

/// A key is taken under the rules or refused, and its quoted form is the same key.
pub fn key_header(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(bytes) else {
        return;
    };
    let lenient = KeyRules::default();
    let strict = KeyRules {
        format: KeyFormat::Strict,
        ..KeyRules::default()
    };
    let taken = lenient.parse_header(&HEADER, &value);
    if let Ok(key) = strict.parse_header(&HEADER, &value) {
        assert!(
            taken.is_ok_and(|lenient| lenient == key),
            "strict takes what lenient does"
        );
    }
    let Ok(key) = lenient.parse_header(&HEADER, &value) else {
        return;
    };
    let text = key.as_str();
    assert!((1..=255).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()));
    let quoted = format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    if let Ok(quoted) = HeaderValue::from_str(&quoted) {
        assert!(strict.parse_header(&HEADER, &quoted).is_ok_and(|quoted| quoted == key));
    }
}

/// The strict form takes exactly what RFC 9651 calls a String (section 4.2.5), if it is alone and within the key's own
/// rules; the parser that takes it is not asked here.
pub fn structured_field(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(bytes) else {
        return;
    };
    let strict = KeyRules {
        format: KeyFormat::Strict,
        ..KeyRules::default()
    };
    let is_key = |text: &String| (1..=255).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    let expected = structured_string(bytes.trim_ascii()).filter(is_key);
    let taken = strict.parse_header(&HEADER, &value).ok();
    assert_eq!(taken.as_ref().map(|key| key.as_str()), expected.as_deref());
}

fn structured_string(bytes: &[u8]) -> Option<String> {
    let mut bytes = bytes.strip_prefix(b"\"")?.iter();
    let mut text = String::new();
    loop {
        match *bytes.next()? {
            b'"' if bytes.len() == 0 => return Some(text),
            b'"' => return None,
            b'\\' => match *bytes.next()? {
                byte @ (b'"' | b'\\') => text.push(char::from(byte)),
                _ => return None,
            },
            byte @ b' '..=b'~' => text.push(char::from(byte)),
            _ => return None,
        }
    }
}

/// Stored bytes are an answer that is written down the same again, or an error.
pub fn codec(bytes: &[u8]) {
    let Ok(stored) = StoredResponse::from_bytes(Bytes::copy_from_slice(bytes)) else {
        return;
    };
    let answer = stored.decode();
    // More fields than a map of them takes, of seven bytes at least; fewer if their names meet in its places.
    assert!(answer.is_ok() || bytes.len() > 7 * 6_554);
    let (Ok(answer), true) = (answer, stored.is_kept()) else {
        return;
    };
    let written = StoredResponse::encode(
        answer.status,
        &answer.headers,
        |_| true,
        &answer.body,
        answer.trailers.as_deref(),
    );
    let again = written.decode();
    assert!(again.is_ok_and(|again| {
        (again.status, &again.headers, &again.body, &again.trailers)
            == (answer.status, &answer.headers, &answer.body, &answer.trailers)
    }));
}

/// A body that is JSON has one canonical form, whatever white space is around it; any other is refused.
pub fn canonical_json(bytes: &[u8]) {
    let spaced = [b" \r\n\t", bytes, b"\n "].concat();
    match (Json::parse(bytes), Json::parse(&spaced)) {
        (Ok(json), Ok(spaced)) => match (digest(&json), digest(&spaced)) {
            (Ok(one), Ok(other)) => assert_eq!(one, other),
            (one, other) => assert_eq!(one.is_err(), other.is_err()),
        },
        (one, other) => assert_eq!(one.is_err(), other.is_err()),
    }
}

/// What a Redis server has under a key is a record of ours or an error.
#[cfg(feature = "redis")]
pub fn redis_record(bytes: &[u8]) {
    crate::store::look_at_redis_record(bytes);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use std::{fs, path::Path};

    use proptest::{collection::vec, prelude::*};

    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let files = fs::read_dir(folder).expect("the corpus is there");
        let inputs: Vec<_> = files.map(|file| fs::read(file.unwrap().path()).unwrap()).collect();
        assert!(!inputs.is_empty(), "there is nothing in the corpus");
        inputs
    }

    /// The corpus as it is, and changed in a few places.
    fn try_out(target: &str, holds: fn(&[u8])) {
        let inputs = corpus(target);
        inputs.iter().for_each(|input| holds(input));
        let anything = vec(any::<u8>(), 0..400);
        let changed = (
            any::<prop::sample::Index>(),
            vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        );
        let changed = changed.prop_map(move |(which, changes)| {
            let mut input = inputs[which.index(inputs.len())].clone();
            for (at, byte) in changes {
                if !input.is_empty() {
                    let at = at.index(input.len());
                    input[at] = byte;
                }
            }
            input
        });
        proptest!(ProptestConfig::with_cases(4_000), |(input in prop_oneof![anything, changed])| holds(&input));
    }

    #[test]
    fn a_key_of_any_bytes_is_taken_by_the_rules_or_refused() {
        try_out("key_header", super::key_header);
    }

    #[test]
    fn the_strict_form_takes_strings_as_the_rfc_defines_them_and_nothing_else() {
        try_out("structured_field", super::structured_field);
    }

    #[test]
    fn stored_bytes_of_any_kind_are_an_answer_or_an_error() {
        try_out("codec", super::codec);
    }

    #[test]
    fn a_body_of_any_bytes_has_one_canonical_form_or_none() {
        try_out("canonical_json", super::canonical_json);
    }

    #[cfg(feature = "redis")]
    #[test]
    fn a_value_of_any_bytes_on_a_redis_server_is_a_record_or_an_error() {
        try_out("redis_record", super::redis_record);
    }
}
