//! Where the key is found.

use std::{fmt, sync::Arc};

use http::{HeaderMap, HeaderName, request::Parts};

use super::{IdempotencyKey, KeyRules};
use crate::{
    json::{Json, JsonBody, Pointer},
    rejection::{Rejection, RejectionKind},
};

/// Where the idempotency key of a request is found.
///
/// ```
/// use tower_idempotency::KeySource;
///
/// let one = KeySource::header("idempotency-key");
/// let first_of_two = KeySource::headers(["x-request-id", "request-id"]);
/// let from_the_body = KeySource::body("/reference_id");
/// let order_and_units = KeySource::body("/reference_id").and_each("/purchase_units/*/reference_id");
/// let from_the_path = KeySource::parts(|parts| {
///     parts.uri.path().rsplit('/').next().map(str::to_owned)
/// });
/// ```
#[derive(Clone)]
pub struct KeySource {
    place: Place,
    /// Keys in the body that are claimed beside the operation's own.
    each: Vec<Pointer>,
}

type FromParts = dyn Fn(&Parts) -> Option<String> + Send + Sync;

#[derive(Clone)]
enum Place {
    Headers(Arc<[HeaderName]>),
    Parts(Arc<FromParts>),
    Body(Pointer),
}

/// What the head of a request says about its key.
pub(crate) enum InHead {
    Key(IdempotencyKey),
    Missing,
    /// It is in the body.
    Unknown,
}

impl KeySource {
    /// One header. A request that carries it on two lines is refused.
    ///
    /// Not a request or trace id that proxies make: it is new for every attempt, so that every retry would run.
    ///
    /// # Panics
    /// If `name` is not a header name.
    pub fn header(name: &str) -> Self {
        Self::headers([name])
    }

    /// The first of several headers that the request carries, in the order given here.
    ///
    /// # Panics
    /// If there is no name, or one is not a header name.
    #[allow(clippy::panic, reason = "documented, and before any request")]
    pub fn headers<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let parse = |name: &str| match HeaderName::from_bytes(name.as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("{name:?} is not a header name"),
        };
        let names: Arc<[_]> = names.into_iter().map(parse).collect();
        assert!(!names.is_empty(), "a key source needs at least one header");
        Self::at(Place::Headers(names))
    }

    /// A member of a JSON body, by its JSON pointer (RFC 6901). Its value has to be a string; `null` is no key.
    ///
    /// The body of every covered request is read then, keyed or not, and has to be JSON or empty.
    ///
    /// # Panics
    /// If `pointer` is not a JSON pointer to a single member: `*` has no place in it.
    pub fn body(pointer: &str) -> Self {
        let pointer = Pointer::parse(pointer);
        assert!(
            !pointer.is_to_many(),
            "an operation has one key of its own; name more by `and_each`"
        );
        Self::at(Place::Body(pointer))
    }

    /// More keys that the operation claims beside its own: the strings that a JSON pointer leads to, where `*` stands
    /// for every element of an array.
    ///
    /// All of them are claimed or none. A request with one that another operation of its scope holds is refused as
    /// [`KeyReused`](RejectionKind::KeyReused), one with two equal ones at one pointer as
    /// [`KeyRepeated`](RejectionKind::KeyRepeated), one where an element lacks its key as
    /// [`KeyMissing`](RejectionKind::KeyMissing). They are free again, or taken for good, together with the operation's
    /// own. A key is refused, too, while the other operation still runs and may yet free it.
    ///
    /// An array that is not there, or is `null`, has no elements: **a misspelled pointer claims nothing, and nothing
    /// says so**. Test that a key which two operations share is refused.
    ///
    /// The keys belong to the same tenant and operation as the operation's own: to have them unique across routes, give
    /// these one [`operation`](crate::IdempotencyLayer::operation).
    ///
    /// The rules for keys hold for each of them; [`max_keys`](crate::IdempotencyLayer::max_keys) limits how many. The
    /// same characters at two pointers, or in the operation's own key, are different keys. A request without a key of
    /// its own that [passes](crate::WithoutKey::Pass) claims none.
    ///
    /// # Panics
    /// If `pointer` is not a JSON pointer.
    #[must_use]
    pub fn and_each(mut self, pointer: &str) -> Self {
        self.each.push(Pointer::parse(pointer));
        self
    }

    fn at(place: Place) -> Self {
        Self {
            place,
            each: Vec::new(),
        }
    }

    /// Whatever the closure makes of the request's parts; `None` means that no key was sent. The rules for keys hold
    /// for it, too.
    pub fn parts(key: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Self {
        Self::at(Place::Parts(Arc::new(key)))
    }
}

impl Default for KeySource {
    /// The `Idempotency-Key` header.
    fn default() -> Self {
        Self::header("idempotency-key")
    }
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Headers(names) => f.debug_tuple("Headers").field(names).finish()?,
            Place::Parts(_) => f.write_str("Parts(..)")?,
            Place::Body(pointer) => f.debug_tuple("Body").field(pointer).finish()?,
        }
        match self.each.is_empty() {
            true => Ok(()),
            false => write!(f, " and each of {:?}", self.each),
        }
    }
}

impl KeySource {
    /// The key in the head of this request, or the rule that it breaks.
    pub(crate) fn in_head(&self, parts: &Parts, rules: &KeyRules) -> Result<InHead, Rejection> {
        match &self.place {
            Place::Headers(names) => {
                for name in names.iter() {
                    let mut lines = parts.headers.get_all(name).iter();
                    return match (lines.next(), lines.next()) {
                        (None, _) => continue,
                        (Some(value), None) => rules.parse_header(name, value).map(InHead::Key),
                        (Some(_), Some(_)) => {
                            Err(rules.invalid(format!("the header `{name}` was sent more than once")))
                        }
                    };
                }
                Ok(InHead::Missing)
            }
            Place::Parts(key) => match key(parts) {
                None => Ok(InHead::Missing),
                Some(text) => rules.check(&text).map(InHead::Key),
            },
            Place::Body(_) => Ok(InHead::Unknown),
        }
    }

    /// The key in the body, `None` if it carries none, or the rule that it breaks.
    pub(crate) fn in_body(&self, body: &JsonBody<'_>, rules: &KeyRules) -> Result<Option<IdempotencyKey>, Rejection> {
        let Place::Body(pointer) = &self.place else {
            return Ok(None);
        };
        if body.is_empty() {
            return Ok(None);
        }
        match pointer.find(body.json()?).first().copied().flatten() {
            None | Some(Json::Null) => Ok(None),
            Some(value) => string(value, pointer, rules).map(Some),
        }
    }

    /// The keys to be claimed beside the operation's own.
    pub(crate) fn others<'k>(
        &'k self,
        body: &JsonBody<'_>,
        rules: &KeyRules,
    ) -> Result<Vec<(&'k Pointer, IdempotencyKey)>, Rejection> {
        let mut keys = Vec::new();
        for pointer in self.each.iter().filter(|_| !body.is_empty()) {
            let first = keys.len();
            for found in pointer.find(body.json()?) {
                let value = found
                    .filter(|value| **value != Json::Null)
                    .ok_or_else(|| missing(pointer))?;
                if keys.len() == rules.max_keys {
                    return Err(rules.invalid(format!("the request has more than {} keys in its body", rules.max_keys)));
                }
                keys.push((pointer, string(value, pointer, rules)?));
            }
            let mut texts: Vec<_> = keys[first..].iter().map(|(_, key)| key.as_str()).collect();
            texts.sort_unstable();
            if texts.windows(2).any(|pair| pair[0] == pair[1]) {
                let detail = format!("two members at `{}` are equal", pointer.as_str());
                return Err(Rejection::new(RejectionKind::KeyRepeated).with_detail(detail));
            }
        }
        Ok(keys)
    }

    /// A quick look: `false` means that the request carries no key.
    pub(crate) fn may_be_in(&self, headers: &HeaderMap) -> bool {
        match &self.place {
            Place::Headers(names) => names.iter().any(|name| headers.contains_key(name)),
            Place::Parts(_) | Place::Body(_) => true,
        }
    }

    /// What to call the place in a message to the client.
    pub(crate) fn describe(&self) -> String {
        match &self.place {
            Place::Headers(names) => {
                let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
                format!("the header {}", names.join(" or "))
            }
            Place::Parts(_) => "an idempotency key".to_owned(),
            Place::Body(pointer) => format!("the member `{}` of its body", pointer.as_str()),
        }
    }
}

fn string(value: &Json<'_>, pointer: &Pointer, rules: &KeyRules) -> Result<IdempotencyKey, Rejection> {
    match value {
        Json::String(text) => rules.check(text),
        _ => Err(rules.invalid(format!(
            "the member `{}` of the body has to be a string",
            pointer.as_str()
        ))),
    }
}

fn missing(pointer: &Pointer) -> Rejection {
    let detail = format!("this operation requires every `{}` of its body", pointer.as_str());
    Rejection::new(RejectionKind::KeyMissing).with_detail(detail)
}
