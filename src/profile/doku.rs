//! DOKU.

use std::time::Duration;

use http::{Method, StatusCode};

use super::Profile;
use crate::{key::KeySource, statuses::Statuses};

impl Profile {
    /// DOKU: every GET, HEAD, OPTIONS, POST, PUT, PATCH and DELETE has an `X-REQUEST-ID` or a `Request-Id`; the same one
    /// with the same body is answered with the stored body and status 409. All answers are kept, for 24 hours.
    ///
    /// Source: DOKU's guide "Handling Idempotency". What it leaves open, and how it is closed here:
    /// - *Whose request ids they are*: each client's, by the headers `Client-Id` and `Authorization` (neither of which
    ///   may change between two attempts), for each endpoint.
    /// - *Another body under the same id*: refused, 422, and so is told from a replay. Where only order number and
    ///   amount make a request another one, add `.fingerprint(Fingerprinter::json_members(["/order/invoice_number",
    ///   "/order/amount"]))`.
    /// - *A request that is still running*: a 409 like a replay's, but with a problem document and without the
    ///   `idempotent-replayed` field.
    /// - *How long*: 24 hours. *Both headers*: `X-REQUEST-ID` counts. *Length*: 255 characters.
    /// - *Requests that browsers make by themselves* (a preflight by OPTIONS) carry no id, and are refused: put the layer
    ///   that answers them above this one.
    ///
    /// Proxies and tracing layers above this one must not set an `X-Request-ID`: it would be new for every attempt.
    pub fn doku() -> Self {
        Self::new("DOKU", |layer| {
            // Every request.
            layer
                .methods([
                    Method::GET,
                    Method::HEAD,
                    Method::OPTIONS,
                    Method::POST,
                    Method::PUT,
                    Method::PATCH,
                    Method::DELETE,
                ])
                .key(KeySource::headers(["x-request-id", "request-id"]))
                .require_key()
                .scope_headers(["client-id", "authorization"])
                .retention(Duration::from_secs(24 * 60 * 60))
                .store_statuses(Statuses::all())
                .replay_status(StatusCode::CONFLICT)
        })
    }
}
