//! The routes.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{MatchedPath, State},
    http::{HeaderMap, StatusCode, Uri},
    middleware::map_request,
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use serde::Serialize;
use serde_json::{Value, value::RawValue};
#[cfg(feature = "postgres")]
use tower_idempotency::Guarantee;
use tower_idempotency::{Attempt, IdempotencyLayer};

#[cfg(feature = "postgres")]
use crate::bank;
use crate::{
    faults::Faults,
    ledger::{Effect, Ledger},
    linger::linger,
    metrics,
    providers::{PROVIDERS, Provider, problem},
    store::Store,
};

#[derive(Clone)]
pub struct App {
    pub ledger: Arc<Ledger>,
    pub store: Store,
    pub idempotency: IdempotencyLayer,
}

/// Every route; `retention` overrides each provider's own.
pub fn router(
    ledger: Arc<Ledger>,
    store: Store,
    idempotency: &IdempotencyLayer,
    retention: Option<Duration>,
) -> Router {
    let mut router = Router::new();
    for provider in PROVIDERS {
        let mut layer = (provider.protect)(idempotency.clone());
        if let Some(retention) = retention {
            layer = layer.retention(retention);
        }
        for route in provider.routes {
            let operation = post(move |state, path, uri, attempt, headers, body| {
                create(provider, state, path, uri, attempt, headers, body)
            });
            router = router.route(route, operation.layer(layer.clone()));
        }
    }
    #[cfg(feature = "postgres")]
    if ledger.bank().is_some() {
        let mut layer = idempotency.clone().guarantee(Guarantee::Transactional).require_key();
        if let Some(retention) = retention {
            layer = layer.retention(retention);
        }
        router = router
            .route("/transfers", post(bank::transfer).layer(layer))
            .route("/accounts", get(bank::accounts));
    }
    router
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/ledger", get(show_ledger))
        .route("/metrics", get(metrics::metrics))
        .layer(map_request(linger))
        .with_state(App {
            ledger,
            store,
            idempotency: idempotency.clone(),
        })
}

/// Creates something that costs money: one effect in the ledger and a fresh id.
async fn create(
    provider: &'static Provider,
    State(app): State<App>,
    path: MatchedPath,
    uri: Uri,
    attempt: Option<Attempt>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let faults = match Faults::from_headers(&headers) {
        Ok(faults) => faults,
        Err(name) => {
            return (provider.error)(
                StatusCode::BAD_REQUEST,
                &format!("the header {name} says nothing usable"),
            );
        }
    };
    faults.strike().await;
    if let Some(status) = faults.status {
        let detail = format!("x-demo-status asked for {}", status.as_u16());
        return answer(
            status,
            Answer {
                detail: Some(detail),
                ..Answer::default()
            },
            faults.response_bytes,
        );
    }
    let request = match parse(&body) {
        Ok(request) => request,
        Err(detail) => return (provider.error)(StatusCode::BAD_REQUEST, &detail),
    };
    let Some(id) = fresh_id(provider.prefix) else {
        return (provider.error)(StatusCode::SERVICE_UNAVAILABLE, "there is no randomness for an id");
    };
    // A route with a wildcard is several operations: show which one it was.
    let route = if path.as_str().contains('{') {
        uri.path()
    } else {
        path.as_str()
    };
    let effect = match app.ledger.record(id, route.to_owned(), request).await {
        Ok(effect) => effect,
        Err(error) => {
            return (provider.error)(
                StatusCode::INTERNAL_SERVER_ERROR,
                &format!("the ledger cannot be written: {error}"),
            );
        }
    };
    let created = Answer {
        id: Some(effect.id.clone()),
        at: Some(effect.at.clone()),
        attempt: Some(attempt.map_or(1, |attempt| attempt.number())),
        ..Answer::default()
    };
    answer(StatusCode::CREATED, created, faults.response_bytes)
}

#[derive(Default, Serialize)]
pub struct Answer {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub padding: String,
}

/// An answer that is at least `bytes` long, and no longer than it has to be.
pub fn answer(status: StatusCode, mut answer: Answer, bytes: usize) -> Response {
    if matches!(
        status,
        StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED
    ) {
        return status.into_response();
    }
    let length = |answer: &Answer| serde_json::to_vec(answer).map_or(0, |json| json.len());
    if length(&answer) < bytes {
        // With its name.
        answer.padding = "x".to_owned();
        answer.padding += &"x".repeat(bytes.saturating_sub(length(&answer)));
    }
    (status, Json(answer)).into_response()
}

/// A JSON object; an amount in it has to be one that can be paid.
pub fn parse(body: &[u8]) -> Result<Box<RawValue>, String> {
    let request: Box<RawValue> =
        serde_json::from_slice(body).map_err(|error| format!("the body is not JSON: {error}"))?;
    let value: Value = serde_json::from_str(request.get()).map_err(|error| format!("the body is not JSON: {error}"))?;
    if !value.is_object() {
        return Err("the body is not a JSON object".to_owned());
    }
    // DOKU has it in the order, MidasPay in each unit of one, too.
    let units = value["purchase_units"].as_array().into_iter().flatten();
    let holders = [&value, &value["order"]].into_iter().chain(units);
    match holders.filter_map(|holder| holder.get("amount")).all(is_payable) {
        true => Ok(request),
        false => Err("the amount is not a positive number".to_owned()),
    }
}

fn is_payable(amount: &Value) -> bool {
    let number = match amount {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.parse().ok(),
        // With its currency, such as MidasPay's.
        Value::Object(amount) => return amount.get("value").is_none_or(is_payable),
        _ => None,
    };
    number.is_some_and(|number| number.is_finite() && number > 0.0)
}

pub fn fresh_id(prefix: &str) -> Option<String> {
    let mut bytes = [0; 12];
    getrandom::fill(&mut bytes).ok()?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{prefix}_{digits}"))
}

async fn show_ledger(State(app): State<App>) -> Response {
    match app.ledger.effects().await {
        Ok(effects) => {
            let effects: Vec<&Effect> = effects.iter().map(|effect| &**effect).collect();
            Json(Shown { effects }).into_response()
        }
        Err(error) => {
            let detail = format!("the ledger cannot be read: {error}");
            problem(StatusCode::SERVICE_UNAVAILABLE, &detail)
        }
    }
}

#[derive(Serialize)]
struct Shown<'a> {
    effects: Vec<&'a Effect>,
}
