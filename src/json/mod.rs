//! JSON bodies, read once for keys, scopes and fingerprints.
//!
//! serde_json reads them; what it does not keep is kept here: the digits of every number, since two numbers may differ
//! although one double stands for both, and the fact that an object names a member twice, since readers disagree on
//! which of the two counts.

mod canonical;
mod number;
mod pointer;
#[cfg(test)]
mod properties;

use std::{
    borrow::Cow,
    cell::{Cell, OnceCell},
    fmt,
};

use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};

pub(crate) use self::{
    canonical::{digest, hash_into},
    pointer::{Met, Pointer},
};
use crate::rejection::{Rejection, RejectionKind};

/// A JSON value, borrowed from its text. Members are in the order of RFC 8785, each once.
#[derive(Debug, PartialEq)]
pub(crate) enum Json<'a> {
    Null,
    Bool(bool),
    /// As it was written.
    Number(&'a str),
    String(Cow<'a, str>),
    Array(Vec<Json<'a>>),
    Object(Vec<(Cow<'a, str>, Json<'a>)>),
}

impl<'a> Json<'a> {
    /// # Errors
    /// If the text is not JSON, nests deeper than 128 levels, has a number that no double is near to, or an object with
    /// two members of one name.
    pub(crate) fn parse(text: &'a [u8]) -> Result<Self, serde_json::Error> {
        let text = std::str::from_utf8(text).map_err(serde_json::Error::custom)?;
        let mut reader = serde_json::Deserializer::from_str(text);
        let numbers = Numbers { text, at: Cell::new(0) };
        let json = Seed(&numbers).deserialize(&mut reader)?;
        reader.end()?;
        Ok(json)
    }

    pub(crate) fn member(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Object(members) => members
                .binary_search_by(|(member, _)| utf16_order(member, name))
                .ok()
                .and_then(|at| members.get(at))
                .map(|(_, value)| value),
            _ => None,
        }
    }
}

/// RFC 8785 §3.2.3: members are sorted by their names' UTF-16 code units.
fn utf16_order(one: &str, other: &str) -> std::cmp::Ordering {
    one.encode_utf16().cmp(other.encode_utf16())
}

/// The numbers of a text in their order, as they are written.
struct Numbers<'a> {
    text: &'a str,
    at: Cell<usize>,
}

impl<'a> Numbers<'a> {
    /// Whether serde_json made this name up: with its feature `arbitrary_precision`, which any crate of the program may
    /// turn on, a number comes as an object of one member. A client's member of that name is borrowed from the text.
    fn is_not_from_the_text(&self, name: &str) -> bool {
        !self.text.as_bytes().as_ptr_range().contains(&name.as_ptr())
    }

    /// The next one. Called whenever the reader has read one, so that the text before it is known to be JSON.
    fn next(&self) -> &'a str {
        let bytes = self.text.as_bytes();
        let mut at = self.at.get();
        let mut in_string = false;
        while let Some(byte) = bytes.get(at) {
            match byte {
                b'"' => in_string = !in_string,
                b'\\' if in_string => at += 1,
                b'-' | b'0'..=b'9' if !in_string => break,
                _ => {}
            }
            at += 1;
        }
        let is_of_a_number = |byte: &u8| matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9');
        let rest = bytes.get(at..).unwrap_or_default();
        let end = at + rest.iter().take_while(|byte| is_of_a_number(byte)).count();
        self.at.set(end);
        self.text.get(at..end).unwrap_or_default()
    }
}

#[derive(Clone, Copy)]
struct Seed<'s, 'a>(&'s Numbers<'a>);

impl<'a> Seed<'_, 'a> {
    fn number<E: Error>(self) -> Result<Json<'a>, E> {
        let written = self.0.next();
        match number::is_in_range(written) {
            true => Ok(Json::Number(written)),
            false => Err(E::custom("number out of range")),
        }
    }
}

impl<'a> DeserializeSeed<'a> for Seed<'_, 'a> {
    type Value = Json<'a>;

    fn deserialize<D: Deserializer<'a>>(self, reader: D) -> Result<Json<'a>, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'a> Visitor<'a> for Seed<'_, 'a> {
    type Value = Json<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Json<'a>, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json<'a>, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Json<'a>, E> {
        self.number()
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Json<'a>, E> {
        self.number()
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Json<'a>, E> {
        self.number()
    }

    fn visit_borrowed_str<E>(self, value: &'a str) -> Result<Json<'a>, E> {
        Ok(Json::String(Cow::Borrowed(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json<'a>, E> {
        Ok(Json::String(Cow::Owned(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut elements: A) -> Result<Json<'a>, A::Error> {
        let mut array = Vec::new();
        while let Some(element) = elements.next_element_seed(self)? {
            array.push(element);
        }
        Ok(Json::Array(array))
    }

    fn visit_map<A: MapAccess<'a>>(self, mut members: A) -> Result<Json<'a>, A::Error> {
        let mut object = Vec::new();
        while let Some(name) = members.next_key_seed(Name)? {
            if matches!(name, Cow::Borrowed(name) if self.0.is_not_from_the_text(name)) {
                members.next_value_seed(Name)?;
                return self.number();
            }
            object.push((name, members.next_value_seed(self)?));
        }
        object.sort_by(|(one, _), (other, _)| utf16_order(one, other));
        match object.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            true => Err(A::Error::custom("an object has two members with the same name")),
            false => Ok(Json::Object(object)),
        }
    }
}

struct Name;

impl<'a> DeserializeSeed<'a> for Name {
    type Value = Cow<'a, str>;

    fn deserialize<D: Deserializer<'a>>(self, reader: D) -> Result<Cow<'a, str>, D::Error> {
        reader.deserialize_str(self)
    }
}

impl<'a> Visitor<'a> for Name {
    type Value = Cow<'a, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_borrowed_str<E>(self, name: &'a str) -> Result<Cow<'a, str>, E> {
        Ok(Cow::Borrowed(name))
    }

    fn visit_str<E>(self, name: &str) -> Result<Cow<'a, str>, E> {
        Ok(Cow::Owned(name.to_owned()))
    }
}

/// A request's body, parsed when somebody first asks for its JSON.
pub(crate) struct JsonBody<'a> {
    bytes: &'a [u8],
    parsed: OnceCell<Result<Json<'a>, serde_json::Error>>,
}

impl<'a> JsonBody<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            parsed: OnceCell::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn json(&self) -> Result<&Json<'a>, Rejection> {
        let parsed = self.parsed.get_or_init(|| Json::parse(self.bytes));
        parsed.as_ref().map_err(|error| {
            Rejection::new(RejectionKind::BodyUnreadable)
                .with_detail(format!("the body cannot be read as JSON: {error}"))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn numbers_are_kept_as_they_are_written() {
        let text = br#"{"a-1\"2": [1, -0.50, 12345678901234567890123, 1E+2], "b": {"3": "4\\", "c": 5e-1}, "d": 6}"#;
        let json = Json::parse(text).unwrap();
        let array = json.member("a-1\"2").unwrap();
        let numbers = ["1", "-0.50", "12345678901234567890123", "1E+2"].map(Json::Number);
        assert_eq!(array, &Json::Array(numbers.into()));
        let inner = json.member("b").unwrap();
        assert_eq!(inner.member("c"), Some(&Json::Number("5e-1")));
        assert_eq!(inner.member("3"), Some(&Json::String("4\\".into())));
        assert_eq!(json.member("d"), Some(&Json::Number("6")));
        assert_eq!(json.member("e"), None);
    }

    #[test]
    fn a_number_is_one_also_where_another_crate_makes_serde_json_give_it_as_an_object() {
        use serde::de::value::{BorrowedStrDeserializer, MapDeserializer};

        const MADE_UP: &str = "$serde_json::private::Number";
        let numbers = Numbers {
            text: "[1.50, 1e999]",
            at: Cell::new(0),
        };
        let number = || {
            let name = BorrowedStrDeserializer::<serde_json::Error>::new(MADE_UP);
            Seed(&numbers).visit_map(MapDeserializer::new([(name, "as it is written")].into_iter()))
        };
        assert_eq!(number().unwrap(), Json::Number("1.50"));
        assert!(number().unwrap_err().to_string().contains("out of range"));
        let of_a_client = format!(r#"{{"{MADE_UP}":"1"}}"#);
        let json = Json::parse(of_a_client.as_bytes()).unwrap();
        assert_eq!(json.member(MADE_UP), Some(&Json::String("1".into())));
    }

    #[test]
    fn what_is_not_json_or_not_clear_is_refused() {
        for (text, why) in [
            (&b""[..], "EOF"),
            (b"nonsense", "expected"),
            (b"{} {}", "trailing"),
            (b"\xef\xbb\xbf{}", "expected value"),
            (b"\"\xff\"", "utf-8"),
            (br#""\ud800""#, "hex escape"),
            (br#"{"a":1,"a":1}"#, "two members"),
            (br#"{"a":1,"b":{"c":1,"\u0063":2}}"#, "two members"),
            (b"1e400", "out of range"),
            (b"01", "number"),
            (b"NaN", "expected"),
        ] {
            let error = Json::parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{error:?} does not say {why:?}");
        }
        let deep = "[".repeat(200) + &"]".repeat(200);
        assert!(
            Json::parse(deep.as_bytes())
                .unwrap_err()
                .to_string()
                .contains("recursion")
        );
    }
}
