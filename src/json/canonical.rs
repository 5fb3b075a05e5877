//! Canonical JSON (RFC 8785), and what it leaves out.

use serde::{Serialize, Serializer, ser::SerializeMap};
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
        let text = serde_json_canonicalizer::to_vec(json)?;
        let mut exact = Vec::new();
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

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, writer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => writer.serialize_unit(),
            Self::Bool(value) => writer.serialize_bool(*value),
            Self::Number(written) => writer.serialize_f64(number::nearest(written)),
            Self::String(text) => writer.serialize_str(text),
            Self::Array(elements) => writer.collect_seq(elements),
            Self::Object(members) => {
                let mut map = writer.serialize_map(Some(members.len()))?;
                for (name, value) in members {
                    map.serialize_entry(name, value)?;
                }
                map.end()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn text(json: &str) -> String {
        let canonical = Canonical::of(&Json::parse(json.as_bytes()).unwrap()).unwrap();
        String::from_utf8(canonical.text).unwrap()
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
