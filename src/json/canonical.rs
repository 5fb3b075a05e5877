//! Canonical JSON (RFC 8785), and what it leaves out.

use sha2::{Digest, Sha256};

use super::{Json, number};
use crate::rejection::{Rejection, RejectionKind};

/// The canonical text of a value, together with every number that the text only comes near to: RFC 8785 writes doubles,
/// so that 9007199254740993 and 9007199254740992 would be the same.
struct Canonical {
    text: Vec<u8>,
    /// By their places among all numbers of the text.
    exact: Vec<(u64, String)>,
}

impl Canonical {
    fn of(json: &Json<'_>) -> Result<Self, serde_json::Error> {
        let (mut text, mut exact) = (Vec::new(), Vec::new());
        write(json, &mut text)?;
        collect_exact(json, &mut 0, &mut exact);
        Ok(Self { text, exact })
    }

    fn hash_into(&self, hash: &mut Sha256) {
        hash.update((self.text.len() as u64).to_le_bytes());
        hash.update(&self.text);
        hash.update((self.exact.len() as u64).to_le_bytes());
        for (place, number) in &self.exact {
            hash.update(place.to_le_bytes());
            hash.update((number.len() as u64).to_le_bytes());
            hash.update(number);
        }
    }
}

/// A digest of the value.
pub(crate) fn digest(json: &Json<'_>) -> Result<[u8; 32], Rejection> {
    let mut hash = Sha256::new();
    hash_into(json, &mut hash)?;
    Ok(hash.finalize().into())
}

/// Different values give different input to the hash; equal ones the same.
pub(crate) fn hash_into(json: &Json<'_>, hash: &mut Sha256) -> Result<(), Rejection> {
    // JSON that was parsed can be written; the writer's signature says otherwise.
    let canonical = Canonical::of(json).map_err(|error| {
        Rejection::new(RejectionKind::BodyUnreadable)
            .with_detail(format!("the body cannot be written as JSON: {error}"))
    })?;
    canonical.hash_into(hash);
    Ok(())
}

/// In the order of the canonical text, which is the order of the members.
fn collect_exact(json: &Json<'_>, place: &mut u64, exact: &mut Vec<(u64, String)>) {
    match json {
        Json::Null | Json::Bool(_) | Json::String(_) => {}
        Json::Number(written) => {
            exact.extend(number::beyond_double(written).map(|number| (*place, number)));
            *place += 1;
        }
        Json::Array(elements) => elements.iter().for_each(|element| collect_exact(element, place, exact)),
        Json::Object(members) => members.iter().for_each(|(_, value)| collect_exact(value, place, exact)),
    }
}

/// Straight to the end of the text: the members are in their order already, and a library that has to sort them copies
/// each once for every object around it.
fn write(json: &Json<'_>, text: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    match json {
        Json::Null => text.extend(b"null"),
        Json::Bool(true) => text.extend(b"true"),
        Json::Bool(false) => text.extend(b"false"),
        // Doubles are written as JavaScript does.
        Json::Number(written) => text.extend(ryu_js::Buffer::new().format(number::nearest(written)).bytes()),
        // serde_json escapes what RFC 8785 says, and in its way.
        Json::String(string) => serde_json::to_writer(text, string)?,
        Json::Array(elements) => {
            for (at, element) in elements.iter().enumerate() {
                text.push(if at == 0 { b'[' } else { b',' });
                write(element, text)?;
            }
            text.extend(if elements.is_empty() { &b"[]"[..] } else { b"]" });
        }
        Json::Object(members) => {
            for (at, (name, value)) in members.iter().enumerate() {
                text.push(if at == 0 { b'{' } else { b',' });
                serde_json::to_writer(&mut *text, name)?;
                text.push(b':');
                write(value, text)?;
            }
            text.extend(if members.is_empty() { &b"{}"[..] } else { b"}" });
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) fn canonical_text(json: &Json<'_>) -> String {
    let text = Canonical::of(json).map(|canonical| canonical.text);
    String::from_utf8(text.unwrap_or_default()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn text(json: &str) -> String {
        canonical_text(&Json::parse(json.as_bytes()).unwrap())
    }

    fn hash(json: &str) -> Vec<u8> {
        let mut hash = Sha256::new();
        Canonical::of(&Json::parse(json.as_bytes()).unwrap())
            .unwrap()
            .hash_into(&mut hash);
        hash.finalize().to_vec()
    }

    #[test]
    fn the_text_is_that_of_rfc_8785() {
        // The example of §3.2.2 and §3.2.3 of the RFC.
        let example = r#"{"numbers":[333333333.33333329,1E30,4.50,2e-3,0.000000000000000000000000001],
            "string":"\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/","literals":[null,true,false]}"#;
        let expected = concat!(
            r#"{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"#,
            r#""string":"€$\u000f\nA'B\"\\\\\"/"}"#
        );
        assert_eq!(text(example), expected);
        // §3.2.3: by UTF-16 code units, so that an emoji stands before U+FB33.
        assert_eq!(
            text(r#"{"\ufb33":1,"\ud83d\ude00":2,"1":3,"\r":4,"\u20ac":5}"#),
            "{\"\\r\":4,\"1\":3,\"€\":5,\"😀\":2,\"\u{fb33}\":1}"
        );
    }

    #[test]
    fn order_white_space_and_the_form_of_numbers_and_strings_do_not_count() {
        let one = hash(r#"{"a":1,"b":[1.0,"x"]}"#);
        assert_eq!(hash("{ \"b\" : [ 1e0 , \"\\u0078\" ],\n\"a\":1.00 }"), one);
    }

    #[test]
    fn different_values_are_never_merged() {
        let values = [
            "1",
            "-1",
            "\"1\"",
            "[1]",
            "{}",
            "[]",
            "null",
            "false",
            "true",
            "0",
            "\"\"",
            "[[]]",
            "[{}]",
            r#"{"a":1}"#,
            r#"{"a":2}"#,
            r#"{"b":1}"#,
            r#"{"a":[1]}"#,
            "[1,2]",
            "[2,1]",
            "[12]",
            "9007199254740992",
            "9007199254740993",
            "9007199254740994",
            "0.1",
            "0.1000000000000000055",
            "0.10000000000000001",
            "1e-400",
            "1e-401",
            "12345678901234567890",
            "12345678901234567891",
            "[9007199254740993,1]",
            "[1,9007199254740993]",
            "[9007199254740993,9007199254740992]",
            "[9007199254740992,9007199254740993]",
            // The same letter, composed and decomposed: JSON compares code points.
            "\"\u{e9}\"",
            "\"e\u{301}\"",
        ];
        for (at, one) in values.iter().enumerate() {
            for other in &values[at + 1..] {
                assert_ne!(hash(one), hash(other), "{one} and {other}");
            }
        }
        assert_eq!(
            hash("9007199254740993"),
            hash("9007199254740993.0"),
            "one value in two forms"
        );
        assert_eq!(hash("0"), hash("-0"), "one number");
    }
}
