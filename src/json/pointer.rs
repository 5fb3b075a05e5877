//! JSON pointers (RFC 6901) with one addition: `*` stands for every element of an array.

use std::fmt;

use super::Json;

/// A place in a JSON document, or several if it contains `*`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Pointer {
    text: String,
    steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Named(String),
    Each,
}

impl Pointer {
    /// # Panics
    /// If the text is not a JSON pointer to a member: it has to start with `/`, and `~` may stand only in `~0` and
    /// `~1`.
    #[allow(clippy::panic, reason = "documented where users call it, and before any request")]
    pub(crate) fn parse(text: &str) -> Self {
        let Some(rest) = text.strip_prefix('/') else {
            panic!("{text:?} is not a JSON pointer to a member: it starts with a slash");
        };
        let step = |step: &str| match step {
            "*" => Step::Each,
            _ => {
                let plain = step.replace("~0", "").replace("~1", "");
                assert!(
                    !plain.contains('~'),
                    "{text:?} is not a JSON pointer: ~ stands only in ~0 and ~1"
                );
                Step::Named(step.replace("~1", "/").replace("~0", "~"))
            }
        };
        Self {
            text: text.to_owned(),
            steps: rest.split('/').map(step).collect(),
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn is_to_many(&self) -> bool {
        self.steps.contains(&Step::Each)
    }

    /// What the pointer leads to, in the document's order, with `None` for every member that is not there. An array
    /// that is not there, or is null, has no elements.
    pub(crate) fn find<'j, 'a>(&self, json: &'j Json<'a>) -> Vec<Option<&'j Json<'a>>> {
        let mut found = Vec::new();
        walk(&self.steps, Some(json), &mut |met| match met {
            Met::End(at) => found.push(at),
            Met::Star(None | Some(Json::Null | Json::Array(_))) => {}
            Met::Star(Some(_)) => found.push(None),
        });
        found
    }

    /// As [`find`](Self::find), with whatever stands where a `*` does, before what it leads to: no two documents in
    /// which the pointer leads to something else, or in other arrays, give the same.
    pub(crate) fn meet<'j, 'a>(&self, json: &'j Json<'a>) -> Vec<Met<'j, 'a>> {
        let mut all = Vec::new();
        walk(&self.steps, Some(json), &mut |met| all.push(met));
        all
    }
}

/// What is met along a pointer; `None` is a member that is not there.
pub(crate) enum Met<'j, 'a> {
    /// Where the pointer ends.
    End(Option<&'j Json<'a>>),
    /// Where a `*` stands. What it leads to follows for each element, if it is an array.
    Star(Option<&'j Json<'a>>),
}

fn walk<'j, 'a>(steps: &[Step], at: Option<&'j Json<'a>>, meet: &mut impl FnMut(Met<'j, 'a>)) {
    match steps.split_first() {
        None => meet(Met::End(at)),
        Some((Step::Named(name), rest)) => walk(rest, at.and_then(|at| named(at, name)), meet),
        Some((Step::Each, rest)) => {
            meet(Met::Star(at));
            if let Some(Json::Array(elements)) = at {
                for element in elements {
                    walk(rest, Some(element), meet);
                }
            }
        }
    }
}

fn named<'j, 'a>(at: &'j Json<'a>, name: &str) -> Option<&'j Json<'a>> {
    match at {
        // Digits only: what parses as a number may have a sign.
        Json::Array(elements) if name == "0" || name.starts_with(|first| matches!(first, '1'..='9')) => {
            elements.get(name.parse::<usize>().ok()?)
        }
        at => at.member(name),
    }
}

impl fmt::Debug for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.text)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const ORDER: &[u8] = br#"{"id":"a","units":[{"id":"u1"},{"no":1},{"id":null}],"a/b":{"~":2},"*":3,"none":null}"#;

    fn find(pointer: &str) -> Vec<Option<String>> {
        let json = Json::parse(ORDER).unwrap();
        let found = Pointer::parse(pointer).find(&json);
        found
            .into_iter()
            .map(|value| value.map(|value| format!("{value:?}")))
            .collect()
    }

    #[test]
    fn a_pointer_leads_to_a_member_or_to_nothing() {
        assert_eq!(find("/id"), [Some("String(\"a\")".to_owned())]);
        assert_eq!(find("/units/0/id"), [Some("String(\"u1\")".to_owned())]);
        assert_eq!(find("/a~1b/~0"), [Some("Number(\"2\")".to_owned())]);
        for absent in [
            "/nothing",
            "/id/deeper",
            "/units/9",
            "/units/00",
            "/units/-1",
            "/units/+1",
            "/",
        ] {
            assert_eq!(find(absent), [None], "{absent}");
        }
    }

    #[test]
    fn a_star_stands_for_every_element_and_tells_those_that_lack_the_member() {
        let ids = find("/units/*/id");
        assert_eq!(ids, [Some("String(\"u1\")".to_owned()), None, Some("Null".to_owned())]);
        assert_eq!(find("/absent/*/id"), [], "an array that is not there has no elements");
        assert_eq!(find("/none/*/id"), []);
        assert_eq!(find("/id/*/id"), [None], "a string is no array");
    }

    #[test]
    fn what_is_not_a_pointer_is_refused() {
        for text in ["", "id", "/a~2", "/a~"] {
            assert!(std::panic::catch_unwind(|| Pointer::parse(text)).is_err(), "{text:?}");
        }
    }
}
