//! `GET /metrics` in Prometheus' text format.

use std::fmt::Write;

use axum::{extract::State, http::header, response::IntoResponse};

use crate::api::App;

pub async fn metrics(State(app): State<App>) -> impl IntoResponse {
    let counted = app.idempotency.counters();
    let mut text = String::new();
    for (name, help, value) in [
        ("executed", "Requests with a key whose handler ran.", counted.executed),
        ("replayed", "Requests answered with a stored answer.", counted.replayed),
        (
            "refused",
            "Requests that were refused, those without a required key included.",
            counted.refused,
        ),
        ("waited", "Requests that waited for another one.", counted.waited),
        (
            "released",
            "Operations that did not execute; their keys are free.",
            counted.released,
        ),
        (
            "abandoned",
            "Operations that ended without a known outcome.",
            counted.abandoned,
        ),
        ("taken_over", "Lost operations that were run again.", counted.taken_over),
        (
            "fenced",
            "Operations that lost their lease while they ran.",
            counted.fenced,
        ),
        (
            "detached",
            "Operations whose client left before their end.",
            counted.detached,
        ),
        ("store_errors", "Calls to the store that failed.", counted.store_errors),
        (
            "unprotected",
            "Requests that ran without protection.",
            counted.unprotected,
        ),
    ] {
        metric(&mut text, &format!("idempotency_{name}_total"), help, "counter", value);
    }
    // What a server holds, it tells itself.
    if let Some(store) = app.store.size() {
        let (records, bytes) = ("idempotency_records", "idempotency_record_bytes");
        metric(&mut text, records, "Records held by the store.", "gauge", store.records);
        metric(&mut text, bytes, "Bytes that the records take.", "gauge", store.bytes);
    }
    if let Ok(effects) = app.ledger.count().await {
        let (name, help) = ("demo_effects_total", "Effects in the ledger.");
        metric(&mut text, name, help, "counter", effects);
    }
    #[cfg(feature = "postgres")]
    if let Some(Ok(money)) = app.ledger.money().await {
        let (name, help) = ("demo_money", "What all accounts hold together, which never changes.");
        metric(&mut text, name, help, "gauge", money);
    }
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
}

fn metric(text: &mut String, name: &str, help: &str, kind: &str, value: u64) {
    // Writing to a string does not fail.
    let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n");
}
