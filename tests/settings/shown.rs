//! What is shown of settings and values: enough to see what is set, and nothing that a request carries.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use tower::{Layer, service_fn};
use tower_idempotency::{
    Fingerprint, Fingerprinter, IdempotencyLayer, KeySource, Owner, RecordId, RejectionFormat, RejectionKind,
    ResponseBody, Scope,
};

use crate::layer;

#[track_caller]
fn assert_shows(shown: &str, parts: &[&str]) {
    for part in parts {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    assert!(!shown.contains("secret"), "{shown}");
}

fn shown(settings: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer) -> String {
    format!("{:?}", settings(layer().1))
}

#[test]
fn a_layer_shows_its_settings() {
    assert_shows(
        &shown(|layer| layer),
        &[
            "IdempotencyLayer",
            r#"key: Headers(["idempotency-key"])"#,
            "max_length: 255",
            "tenant: Authorization",
            "replay: AsFirst",
            "store_when: Statuses(100-400",
            r#"replay_marker: Some("idempotent-replayed")"#,
            "routes: {}",
        ],
    );
    let secret = HeaderValue::from_static("secret");
    let layer = layer()
        .1
        .key(KeySource::body("/id").and_each("/units/*/id"))
        .fingerprint(Fingerprinter::json_members(["/amount"]))
        .scope_headers(["x-tenant"])
        .first_sent(HeaderName::from_static("x-first-sent"), Duration::from_secs(7))
        .store_when(|status| status.is_success())
        .replay_status(StatusCode::CONFLICT)
        .answer_header(HeaderName::from_static("x-node"), secret.clone())
        .replay_marker(Some((HeaderName::from_static("x-replayed"), secret)))
        .rejection_status(RejectionKind::KeyReused, StatusCode::IM_A_TEAPOT)
        .problem_types("https://errors.example.com/")
        .route("/refunds", IdempotencyLayer::require_key);
    let parts = [
        r#"key: Body("/id") and each of "#,
        "/units/*/id",
        "/amount",
        r#"tenant: Headers(["x-tenant"])"#,
        r#"FirstSent("x-first-sent", 7s)"#,
        "store_when: (..)",
        "replay: WithStatus(409)",
        r#"answer_headers: ["x-node"]"#,
        r#"replay_marker: Some("x-replayed")"#,
        "(KeyReused, 418)",
        r#""https://errors.example.com/""#,
        r#"routes: {"/refunds": Policy"#,
    ];
    assert_shows(&format!("{layer:?}"), &parts);
    let service = layer.layer("the inner service");
    assert_shows(
        &format!("{service:?}"),
        &["Idempotency", "the inner service", "/units/*/id"],
    );
}

#[test]
fn settings_that_are_closures_are_shown_as_such() {
    assert_shows(
        &shown(|layer| layer.key(KeySource::parts(|_| None))),
        &["key: Parts(..)"],
    );
    let in_parts = shown(|layer| layer.scope(|_| Some(Scope::tenant("acme"))));
    assert_shows(&in_parts, &["tenant: Parts(..)"]);
    assert_shows(
        &shown(|layer| layer.replay_as(|first, _| first)),
        &["replay: Rewritten(..)"],
    );
    let signed = shown(|layer| layer.scope_authorization("Signed", ["account"]));
    assert_shows(&signed, &[r#"AuthorizationParameters("Signed", ["account"])"#]);
}

#[test]
fn of_ids_and_digests_the_beginning_is_shown_and_of_tokens_nothing() {
    let id = RecordId::from_bytes([0xa7; 32]);
    assert_eq!(
        (id.to_string(), format!("{id:?}")),
        ("a7a7a7a7".into(), "RecordId(a7a7a7a7..)".into())
    );
    let fingerprint = Fingerprint::new(1, [0xf0; 32]);
    assert_eq!(format!("{fingerprint:?}"), "Fingerprint(1:f0f0f0f0..)");
    assert_eq!(format!("{:?}", Owner::from_bytes([1; 16])), "Owner(..)");
    assert_eq!(format!("{:?}", Scope::tenant("secret")), "Scope(..)");
}

#[tokio::test]
async fn of_forms_bodies_and_futures_no_content_is_shown() {
    let format = RejectionFormat::json(r#"{"error":{code}}"#);
    assert_shows(&format!("{format:?}"), &["error", "Code"]);
    let service = service_fn(async |_: Request<Full<Bytes>>| {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("secret"))))
    });
    let mut service = layer().1.layer(service);
    let request = Request::post("/pay").header("idempotency-key", "secret");
    let request = request.body(Full::new(Bytes::from("secret"))).unwrap();
    let future = tower::Service::call(&mut service, request);
    assert_shows(&format!("{future:?}"), &["ResponseFuture"]);
    let response: Response<ResponseBody<Full<Bytes>>> = future.await.unwrap();
    assert_shows(&format!("{:?}", response.body()), &["ResponseBody"]);
}
