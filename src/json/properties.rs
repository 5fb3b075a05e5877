//! What holds for every JSON text: made of values whose equality is plain, and written in every form that they have.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use proptest::{collection, prelude::*, sample::Index};

use super::{Json, Pointer, canonical::canonical_text, digest};

#[derive(Clone, Debug, PartialEq)]
enum Value {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    Array(Vec<Value>),
    Object(BTreeMap<String, Value>),
}

/// Digits without zeros at either end, times ten to the exponent: one form for each number. Zero has no digits.
#[derive(Clone, Debug, PartialEq)]
struct Number {
    negative: bool,
    digits: String,
    exponent: i32,
}

impl Number {
    fn new(negative: bool, digits: &str, exponent: i32) -> Self {
        let digits = digits.trim_start_matches('0');
        let significant = digits.trim_end_matches('0');
        if significant.is_empty() {
            return Self {
                negative: false,
                digits: String::new(),
                exponent: 0,
            };
        }
        Self {
            negative,
            digits: significant.to_owned(),
            exponent: exponent + (digits.len() - significant.len()) as i32,
        }
    }
}

// ---- every value

fn number() -> impl Strategy<Value = Number> {
    let small = (any::<bool>(), 0..12_u32, -2..3_i32);
    let small = small.prop_map(|(negative, digits, exponent)| Number::new(negative, &digits.to_string(), exponent));
    // Where doubles stand further apart than one.
    let big = (
        any::<bool>(),
        9_007_199_254_740_985_u64..9_007_199_254_741_000,
        -20..20_i32,
    );
    let big = big.prop_map(|(negative, digits, exponent)| Number::new(negative, &digits.to_string(), exponent));
    let near = (0..4_u32).prop_map(|last| Number::new(false, &format!("1000000000000000000{last}"), -20));
    let long = (any::<bool>(), "[0-9]{1,60}", -340..240_i32);
    let long = long.prop_map(|(negative, digits, exponent)| Number::new(negative, &digits, exponent));
    prop_oneof![small, big, near, long]
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ab]{0,2}",
        "[\"\\\\/\u{8}\n\u{1}{}:,é\u{301}e😀\u{fb33}0-9-]{0,4}",
        any::<String>()
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        number().prop_map(Value::Number),
        text().prop_map(Value::String),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
            collection::btree_map(text(), inner, 0..4).prop_map(Value::Object),
        ]
    })
}

// ---- every form

/// Choices in a row, made of a seed.
struct Form(u64);

impl Form {
    fn below(&mut self, limit: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn space(&mut self, out: &mut String) {
        for _ in 0..self.below(3) {
            out.push([' ', '\t', '\n', '\r'][self.below(4) as usize]);
        }
    }

    fn number(&mut self, number: &Number, out: &mut String) {
        let Number {
            negative,
            digits,
            exponent,
        } = number;
        if digits.is_empty() {
            let forms = ["0", "-0", "0.0", "0e5", "-0.00E-7", "0e+0"];
            *out += forms[self.below(6) as usize];
            return;
        }
        // Zeros at the end, then the point somewhere in or before the digits, and an exponent that makes up for both.
        let zeros = self.below(4) as usize;
        let digits = format!("{digits}{}", "0".repeat(zeros));
        let mut exponent = exponent - zeros as i32;
        let fraction = self.below(digits.len() as u64 + 3) as usize;
        exponent += fraction as i32;
        let padded = format!("{}{digits}", "0".repeat((fraction + 1).saturating_sub(digits.len())));
        let (whole, fraction) = padded.split_at(padded.len() - fraction);
        *out += if *negative { "-" } else { "" };
        *out += whole;
        if !fraction.is_empty() {
            *out += &format!(".{fraction}");
        }
        let e = ['e', 'E'][self.below(2) as usize];
        match (exponent, self.below(2)) {
            (0, 0) => {}
            (0.., 1) => *out += &format!("{e}+{exponent}"),
            _ => *out += &format!("{e}{exponent}"),
        }
    }

    fn string(&mut self, text: &str, out: &mut String) {
        out.push('"');
        for letter in text.chars() {
            if self.below(3) == 0 || letter < ' ' {
                let mut units = [0; 2];
                for unit in letter.encode_utf16(&mut units) {
                    *out += &match self.below(2) {
                        0 => format!("\\u{unit:04x}"),
                        _ => format!("\\u{unit:04X}"),
                    };
                }
            } else {
                out.extend(matches!(letter, '"' | '\\').then_some('\\'));
                out.push(letter);
            }
        }
        out.push('"');
    }

    fn value(&mut self, value: &Value, out: &mut String) {
        self.space(out);
        match value {
            Value::Null => *out += "null",
            Value::Bool(value) => *out += if *value { "true" } else { "false" },
            Value::Number(number) => self.number(number, out),
            Value::String(text) => self.string(text, out),
            Value::Array(elements) => self.list("[]", elements, out, |form, element, out| form.value(element, out)),
            Value::Object(members) => {
                let mut members: Vec<_> = members.iter().collect();
                for at in (1..members.len()).rev() {
                    members.swap(at, self.below(at as u64 + 1) as usize);
                }
                self.list("{}", &members, out, |form, (name, value), out| {
                    form.space(out);
                    form.string(name, out);
                    form.space(out);
                    out.push(':');
                    form.value(value, out);
                });
            }
        }
        self.space(out);
    }

    fn list<T>(&mut self, brackets: &str, items: &[T], out: &mut String, write: impl Fn(&mut Self, &T, &mut String)) {
        *out += &brackets[..1];
        for (at, item) in items.iter().enumerate() {
            out.extend((at > 0).then_some(','));
            write(self, item, out);
        }
        self.space(out);
        *out += &brackets[1..];
    }
}

fn written(value: &Value, form: u64) -> String {
    let mut text = String::new();
    Form(form).value(value, &mut text);
    text
}

fn digest_of(text: &str) -> [u8; 32] {
    digest(&Json::parse(text.as_bytes()).unwrap()).unwrap()
}

/// Adds one to the last digit of one of the numbers, however many digits it has.
fn nudge(value: &mut Value, left: &mut usize) {
    match value {
        Value::Number(number) => {
            if *left == 0 {
                let (digits, exponent) = (format!("{}1", number.digits), number.exponent - 1);
                *number = Number::new(number.negative, &digits, exponent);
            }
            *left = left.wrapping_sub(1);
        }
        Value::Array(elements) => elements.iter_mut().for_each(|element| nudge(element, left)),
        Value::Object(members) => members.values_mut().for_each(|member| nudge(member, left)),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn order_white_space_and_the_form_of_numbers_and_strings_never_count(
        value in value(), one in any::<u64>(), other in any::<u64>(),
    ) {
        let (one, other) = (written(&value, one), written(&value, other));
        prop_assert_eq!(digest_of(&one), digest_of(&other), "{} and {}", one, other);
    }

    #[test]
    fn two_values_have_one_digest_only_if_they_are_equal(one in value(), other in value(), form in any::<u64>()) {
        let (first, second) = (digest_of(&written(&one, form)), digest_of(&written(&other, !form)));
        prop_assert_eq!(first == second, one == other);
    }

    #[test]
    fn two_lists_of_numbers_have_one_digest_only_if_they_are_equal(
        one in collection::vec(number(), 0..3), other in collection::vec(number(), 0..3), form in any::<u64>(),
    ) {
        let list = |numbers: &[Number]| Value::Array(numbers.iter().cloned().map(Value::Number).collect());
        let (first, second) = (written(&list(&one), form), written(&list(&other), !form));
        prop_assert_eq!(digest_of(&first) == digest_of(&second), one == other, "{} and {}", first, second);
    }

    #[test]
    fn a_further_digit_of_any_number_makes_another_value(
        value in value(), at in any::<Index>(), form in any::<u64>(),
    ) {
        let mut count = usize::MAX;
        nudge(&mut value.clone(), &mut count);
        let numbers = usize::MAX - count;
        prop_assume!(numbers > 0);
        let mut nudged = value.clone();
        nudge(&mut nudged, &mut at.index(numbers));
        let (one, other) = (written(&value, form), written(&nudged, form));
        prop_assert_ne!(digest_of(&one), digest_of(&other), "{} and {}", one, other);
    }

    #[test]
    fn a_pointer_of_any_steps_looks_into_any_value_without_harm(
        value in value(),
        steps in collection::vec("\\*|[0-9+-]{1,3}|[ab]{0,2}|(~0|~1|é|😀|99999999999999999999){1,2}", 1..5),
    ) {
        let text = written(&value, 0);
        let json = Json::parse(text.as_bytes()).unwrap();
        let pointer = Pointer::parse(&format!("/{}", steps.join("/")));
        let found = pointer.find(&json);
        prop_assert!(pointer.is_to_many() || found.len() == 1);
    }

    #[test]
    fn every_member_and_element_is_found_by_its_pointer(value in value(), form in any::<u64>()) {
        let text = written(&value, form);
        let json = Json::parse(text.as_bytes()).unwrap();
        let children: Vec<(String, &Value)> = match &value {
            Value::Array(elements) => (0..).map(|at: usize| at.to_string()).zip(elements).collect(),
            Value::Object(members) => members.iter().map(|(name, value)| (name.clone(), value)).collect(),
            _ => Vec::new(),
        };
        for (name, child) in children.into_iter().filter(|(name, _)| name != "*") {
            let pointer = Pointer::parse(&format!("/{}", name.replace('~', "~0").replace('/', "~1")));
            let found = pointer.find(&json)[0].unwrap();
            prop_assert_eq!(digest(found).unwrap(), digest_of(&written(child, 0)));
        }
    }

    #[test]
    fn the_text_is_the_one_that_another_writer_of_rfc_8785_makes(value in value(), form in any::<u64>()) {
        let text = written(&value, form);
        let theirs: serde_json::Value = serde_json::from_str(&text).unwrap();
        let theirs = serde_json_canonicalizer::to_string(&theirs).unwrap();
        prop_assert_eq!(canonical_text(&Json::parse(text.as_bytes()).unwrap()), theirs);
    }

    #[test]
    fn what_is_read_is_what_serde_json_reads(
        text in prop_oneof![
            "[\\[\\]{}:,\"\\\\0-9eE.+a -]{0,16}",
            "(true|null|[\\[\\]{},:]|\"a\"|-?[0-9.e]{1,4}| ){0,8}",
        ],
    ) {
        let theirs = serde_json::from_str::<serde_json::Value>(&text);
        match (Json::parse(text.as_bytes()), theirs) {
            (Ok(ours), Ok(theirs)) => prop_assert!(is_same(&ours, &theirs), "{}", text),
            (Err(error), Ok(_)) => prop_assert!(error.to_string().contains("two members"), "{}: {}", text, error),
            (Err(_), Err(_)) => {}
            (Ok(_), Err(error)) => prop_assert!(false, "{}: {}", text, error),
        }
    }
}

fn is_same(ours: &Json<'_>, theirs: &serde_json::Value) -> bool {
    use serde_json::Value as Theirs;
    match (ours, theirs) {
        (Json::Null, Theirs::Null) => true,
        (Json::Bool(ours), Theirs::Bool(theirs)) => ours == theirs,
        (Json::Number(ours), Theirs::Number(theirs)) => {
            let ours: f64 = ours.parse().unwrap();
            // serde_json's own reading may be off by the last bit.
            theirs
                .as_f64()
                .is_some_and(|theirs| (ours - theirs).abs() <= ours.abs() * 1e-15)
        }
        (Json::String(ours), Theirs::String(theirs)) => ours == theirs,
        (Json::Array(ours), Theirs::Array(theirs)) => {
            ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(ours, theirs)| is_same(ours, theirs))
        }
        (Json::Object(ours), Theirs::Object(theirs)) => {
            let mut ours_and_theirs = ours.iter().map(|(name, ours)| (ours, theirs.get(&**name)));
            ours.len() == theirs.len()
                && ours_and_theirs.all(|(ours, theirs)| theirs.is_some_and(|theirs| is_same(ours, theirs)))
        }
        _ => false,
    }
}
