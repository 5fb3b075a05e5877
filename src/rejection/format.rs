//! Refusals in the form of an API's own errors.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::Value;

use super::{Rejection, RejectionKind};

/// How an API writes its errors: a JSON text with placeholders.
///
/// | placeholder | becomes |
/// |---|---|
/// | `{code}` | a string: [`Rejection::code`] |
/// | `{title}` | a string: [`Rejection::title`] |
/// | `{detail}` | a string: [`Rejection::detail`], or the title where there is none |
/// | `{type}` | a string: [`Rejection::type_uri`] |
/// | `{debug_id}` | a string: [`Rejection::debug_id`] |
/// | `{status}` | a number |
/// | `{original_status}`, `{retry_after}` | a number (of seconds), or `null` |
///
/// ```
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore, RejectionFormat, RejectionKind};
/// IdempotencyLayer::new(MemoryStore::new())
///     .rejection_format(RejectionFormat::json(
///         r#"{"name":{code},"message":{title},"debug_id":{debug_id}}"#,
///     ))
///     .rejection_code(RejectionKind::KeyReused, "DUPLICATE_REFERENCE_ID");
/// ```
#[derive(Clone)]
pub struct RejectionFormat {
    parts: Arc<[Part]>,
}

#[derive(Debug)]
enum Part {
    Text(String),
    Place(Place),
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Code,
    Title,
    Detail,
    Type,
    DebugId,
    Status,
    OriginalStatus,
    RetryAfter,
}

const PLACES: [(&str, Place); 8] = [
    ("{code}", Place::Code),
    ("{title}", Place::Title),
    ("{detail}", Place::Detail),
    ("{type}", Place::Type),
    ("{debug_id}", Place::DebugId),
    ("{status}", Place::Status),
    ("{original_status}", Place::OriginalStatus),
    ("{retry_after}", Place::RetryAfter),
];

impl RejectionFormat {
    /// Errors of type `application/json`. Placeholders stand where a value would, without quotes.
    ///
    /// # Panics
    /// If the text with values in its placeholders is not JSON, as when it has a placeholder that does not exist or one
    /// in quotes.
    pub fn json(template: &str) -> Self {
        let mut parts = Vec::new();
        let mut rest = template;
        while let Some((at, name, place)) = PLACES
            .iter()
            .filter_map(|(name, place)| rest.find(name).map(|at| (at, name, *place)))
            .min_by_key(|(at, ..)| *at)
        {
            parts.push(Part::Text(rest[..at].to_owned()));
            parts.push(Part::Place(place));
            rest = &rest[at + name.len()..];
        }
        parts.push(Part::Text(rest.to_owned()));
        let format = Self { parts: parts.into() };
        let sample = format.body(&Rejection::new(RejectionKind::KeyMissing));
        let parsed = serde_json::from_slice::<serde::de::IgnoredAny>(&sample);
        assert!(parsed.is_ok(), "{template:?} does not make JSON: {parsed:?}");
        format
    }

    /// An error in this form that the API's own handlers return: with the `status`, the API's `code` and a `message`,
    /// which stand in the places of status, code, and title or detail; `{type}` is empty and the rest `null`. It has a
    /// `debug_id` of its own, which is logged beside the code.
    pub fn error(&self, status: StatusCode, code: impl Into<String>, message: impl Into<String>) -> Response<Bytes> {
        // The kind shows nowhere: a format without `{type}` takes nothing from it.
        let mut error = Rejection::new(RejectionKind::BodyUnreadable);
        error.status = status;
        error.code = Some(code.into().into());
        error.title = message.into().into();
        error.draw_debug_id();
        tracing::info!(debug_id = error.debug_id, code = error.code(), "an error is returned");
        self.response(&error)
    }

    pub(super) fn response(&self, rejection: &Rejection) -> Response<Bytes> {
        let mut response = Response::new(self.body(rejection));
        *response.status_mut() = rejection.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        rejection.announce_retry(headers);
        response
    }

    fn body(&self, rejection: &Rejection) -> Bytes {
        let text = |text: &str| Value::from(text).to_string();
        let number = |number: Option<u64>| Value::from(number).to_string();
        let mut body = String::new();
        for part in self.parts.iter() {
            match part {
                Part::Text(literal) => body += literal,
                Part::Place(place) => {
                    body += &match place {
                        Place::Code => text(rejection.code()),
                        Place::Title => text(rejection.title()),
                        Place::Detail => text(rejection.detail().unwrap_or(rejection.title())),
                        Place::Type => text(rejection.type_uri()),
                        Place::DebugId => text(rejection.debug_id()),
                        Place::Status => rejection.status().as_u16().to_string(),
                        Place::OriginalStatus => {
                            number(rejection.original_status().map(|status| status.as_u16().into()))
                        }
                        Place::RetryAfter => number(rejection.retry_after().map(|after| after.as_secs())),
                    }
                }
            }
        }
        Bytes::from(body)
    }
}

impl fmt::Debug for RejectionFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.parts.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_is_said_stands_in_the_json_as_it_was_said(
            code in any::<String>(),
            title in any::<String>(),
            detail in prop_oneof![any::<String>(), r#"[{}"\\\ncode:,]{0,20}"#],
            uri in any::<String>(),
        ) {
            let format = RejectionFormat::json(
                r#"{"code":{code},"title":{title},"detail":[{detail}],"type":{type},"status":{status}}"#,
            );
            let mut rejection = Rejection::new(RejectionKind::KeyInvalid).with_detail(detail.clone());
            rejection.title = title.clone().into();
            rejection.code = Some(code.clone().into());
            rejection.type_uri = uri.clone().into();
            let expected = serde_json::json!({
                "code": code, "title": title, "detail": [detail], "type": uri, "status": 400,
            });
            prop_assert_eq!(serde_json::from_slice::<Value>(&format.body(&rejection)).unwrap(), expected);
            let problem: Value = serde_json::from_slice(&rejection.problem_document()).unwrap();
            prop_assert_eq!(&problem["detail"], &Value::from(detail));
            prop_assert_eq!(&problem["title"], &Value::from(title));
        }
    }

    #[test]
    fn placeholders_become_json_values_whatever_is_in_them() {
        let format = RejectionFormat::json(
            r#"{"n":{code},"d":{detail},"t":{title},"s":{status},"o":{original_status},"r":{retry_after},"x":"{y}"}"#,
        );
        let mut rejection = Rejection::new(RejectionKind::KeyInvalid).with_detail("a \"quoted\"\n{code}".to_owned());
        rejection.code = Some("CODE".into());
        let body: Value = serde_json::from_slice(&format.body(&rejection)).unwrap();
        assert_eq!(body["n"], "CODE");
        assert_eq!(body["d"], "a \"quoted\"\n{code}");
        assert_eq!(body["t"], "Idempotency key is invalid");
        assert_eq!(
            (&body["s"], &body["o"], &body["r"]),
            (&400.into(), &Value::Null, &Value::Null)
        );
        assert_eq!(body["x"], "{y}");
    }

    #[test]
    fn a_text_that_does_not_make_json_is_refused_at_once() {
        for template in ["", "{", r#"{"a":{nonsense}}"#, r#"{"a":"{code}"}"#] {
            assert!(
                std::panic::catch_unwind(|| RejectionFormat::json(template)).is_err(),
                "{template}"
            );
        }
    }
}
