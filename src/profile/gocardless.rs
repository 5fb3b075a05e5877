//! GoCardless.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};
use serde_json::{Value, json};

use super::Profile;
use crate::{key::KeySource, rejection::RejectionFormat, statuses::Statuses};

impl Profile {
    /// GoCardless: `Idempotency-Key` on POST, optional, kept for 30 days. A duplicate of a request that created a
    /// resource is a 409 `idempotent_creation_conflict` with the resource's id in `links.conflicting_resource_id`.
    ///
    /// Source: GoCardless' API reference, "Idempotency keys". What it leaves open, and how it is closed here:
    /// - *The key's length*: 255 characters. *Another body under the same key*: refused, 422. *A request that is still
    ///   running*: 409, without a link.
    /// - *A failed create*: its key is free. **A handler must not fail after an effect.** A failure that is kept
    ///   nonetheless ([`Keep::Answer`](crate::Keep::Answer)) created nothing, and is answered as it was.
    /// - *Where the id is*: in the first answer, which is an object of one resource (`{"payments":{"id":"PM1"}}`), or
    ///   has the `id` itself. An answer without one is a conflict with the link `null`.
    pub fn gocardless() -> Self {
        const ERRORS: &str = concat!(
            r#"{"error":{"code":{status},"type":"invalid_state","message":{title},"#,
            r#""errors":[{"reason":{code},"message":{detail}}],"request_id":{debug_id}}}"#,
        );
        Self::new("GoCardless", |layer| {
            layer
                .methods([Method::POST])
                .key(KeySource::header("idempotency-key"))
                .optional_key()
                .retention(Duration::from_secs(30 * 24 * 60 * 60))
                .store_statuses(Statuses::success())
                .replay_as(|first, _| match first.status().is_success() {
                    true => conflict(&first),
                    false => first,
                })
                .rejection_format(RejectionFormat::json(ERRORS))
        })
    }
}

fn conflict(first: &Response<Bytes>) -> Response<Bytes> {
    let message = "A resource has already been created with this idempotency key";
    let body = json!({"error": {
        "code": 409,
        "type": "invalid_state",
        "message": message,
        "errors": [{
            "reason": "idempotent_creation_conflict",
            "message": message,
            "links": {"conflicting_resource_id": resource_id(first.body())},
        }],
    }});
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = StatusCode::CONFLICT;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn resource_id(answer: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let resources = answer.as_object()?.values();
    let mut ids = [&answer]
        .into_iter()
        .chain(resources)
        .filter_map(|value| value.get("id")?.as_str());
    ids.next().map(str::to_owned)
}
