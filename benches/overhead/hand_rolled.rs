//! What a careful engineer writes in an afternoon instead of taking a crate: a middleware over a `DashMap` that runs
//! each key once, answers duplicates, refuses another body (422) and a request in flight (409), keeps tenants apart, and
//! remembers that an attempt was lost. It keeps what it stores for a day, and forgets it when it is looked at after that.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use dashmap::{DashMap, Entry};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use sha2::{Digest, Sha256};

type Id = [u8; 32];

#[derive(Clone, Default)]
pub struct Records(Arc<DashMap<Id, Record>>);

struct Record {
    fingerprint: [u8; 32],
    state: Kept,
}

enum Kept {
    InFlight,
    Lost,
    Completed {
        status: StatusCode,
        headers: HeaderMap,
        body: Bytes,
        expires: Instant,
    },
}

const LIMIT: usize = 1 << 20;
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

pub fn around(router: Router, records: &Records) -> Router {
    router.layer(from_fn_with_state(records.clone(), once))
}

/// Dropped without an answer, the attempt is lost: the client left, or the handler panicked.
struct InFlight {
    records: Records,
    id: Id,
    done: bool,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.done {
            if let Some(mut record) = self.records.0.get_mut(&self.id) {
                record.state = Kept::Lost;
            }
        }
    }
}

async fn once(State(records): State<Records>, request: Request, next: Next) -> Response {
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let Some(key) = request.headers().get("idempotency-key").cloned() else {
        return next.run(request).await;
    };
    if key.is_empty() || key.len() > 255 || !key.as_bytes().iter().all(u8::is_ascii_graphic) {
        return StatusCode::BAD_REQUEST.into_response();
    }
    let (parts, body) = request.into_parts();
    let Ok(body) = to_bytes(body, LIMIT).await else {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    };
    let tenant = parts
        .headers
        .get(header::AUTHORIZATION)
        .map_or(&[][..], HeaderValue::as_bytes);
    let path = parts.uri.path_and_query().map_or("", |path| path.as_str());
    let id = hash(&[tenant, path.as_bytes(), key.as_bytes()]);
    let fingerprint = hash(&[parts.method.as_str().as_bytes(), path.as_bytes(), &body]);
    match records.0.entry(id) {
        Entry::Vacant(vacant) => {
            vacant.insert(Record {
                fingerprint,
                state: Kept::InFlight,
            });
        }
        Entry::Occupied(mut occupied) => {
            let record = occupied.get_mut();
            match &record.state {
                Kept::Completed { expires, .. } if *expires <= Instant::now() => {
                    record.fingerprint = fingerprint;
                    record.state = Kept::InFlight;
                }
                _ if record.fingerprint != fingerprint => return StatusCode::UNPROCESSABLE_ENTITY.into_response(),
                Kept::InFlight | Kept::Lost => return StatusCode::CONFLICT.into_response(),
                Kept::Completed {
                    status, headers, body, ..
                } => {
                    let mut response = Response::new(Body::from(body.clone()));
                    *response.status_mut() = *status;
                    *response.headers_mut() = headers.clone();
                    let marker = HeaderValue::from_static("true");
                    response.headers_mut().insert("idempotent-replayed", marker);
                    return response;
                }
            }
        }
    }
    let mut attempt = InFlight {
        records,
        id,
        done: false,
    };
    let response = next.run(Request::from_parts(parts, Body::from(body))).await;
    let (parts, body) = response.into_parts();
    let Ok(body) = to_bytes(body, LIMIT).await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let mut headers = parts.headers.clone();
    headers.remove(header::SET_COOKIE);
    if let Some(mut record) = attempt.records.0.get_mut(&id) {
        record.state = Kept::Completed {
            status: parts.status,
            headers,
            body: body.clone(),
            expires: Instant::now() + KEPT,
        };
    }
    attempt.done = true;
    Response::from_parts(parts, Body::from(body))
}

fn hash(fields: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for field in fields {
        hash.update((field.len() as u64).to_le_bytes());
        hash.update(field);
    }
    hash.finalize().into()
}
