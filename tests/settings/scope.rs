//! Whom a key belongs to.

use axum::{Router, routing::post};
use http::{HeaderValue, StatusCode};
use tower_idempotency::{Fingerprinter, IdempotencyLayer, Scope};

use crate::{
    layer,
    support::app::{anywhere, call, open, request, to_pay},
};

const SCHEME: &str = "TX-SHA256";

fn signed() -> IdempotencyLayer {
    layer()
        .1
        .scope_authorization(SCHEME, ["auth_id", "auth_type"])
        .require_key()
}

/// Sends the same key and body with other headers, and says whether it was taken for the same operation.
async fn is_replayed(app: &Router, headers: &[(&str, &str)]) -> bool {
    let headers = [&[("idempotency-key", "k")], headers].concat();
    let answer = call(app, to_pay(&headers, "a")).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{headers:?}");
    answer.is_replay()
}

#[tokio::test]
async fn in_no_scope_does_a_tenant_get_the_answer_of_another() {
    let by_id = layer().1.scope(|parts| {
        let id = parts.headers.get("client-id")?;
        Some(Scope::tenant(id.as_bytes()))
    });
    for (name, layer, one, other) in [
        ("default", layer().1, ("authorization", "a"), ("authorization", "b")),
        ("closure", by_id, ("client-id", "a"), ("client-id", "b")),
        (
            "headers",
            layer().1.scope_headers(["client-id"]),
            ("client-id", "a"),
            ("client-id", "b"),
        ),
        (
            "parameters",
            signed(),
            ("authorization", "TX-SHA256 auth_id=a,auth_type=m"),
            ("authorization", "TX-SHA256 auth_id=b,auth_type=m"),
        ),
        (
            "one scheme and another",
            signed(),
            ("authorization", "TX-SHA256 auth_id=a,auth_type=m"),
            ("authorization", "Bearer auth_id=a,auth_type=m"),
        ),
    ] {
        let control = open();
        let app = anywhere(&control, layer);
        for tenant in [one, other] {
            assert!(!is_replayed(&app, &[tenant]).await, "{name}: {tenant:?}");
        }
        for tenant in [one, other] {
            assert!(is_replayed(&app, &[tenant]).await, "{name}: {tenant:?}");
        }
        assert_eq!(control.runs(), 2, "{name}");
    }
}

// ---- headers

#[tokio::test]
async fn all_values_of_the_chosen_headers_are_the_tenant_and_nothing_else_is() {
    let control = open();
    let app = anywhere(&control, layer().1.scope_headers(["client-id", "x-account"]));
    let tenants: [&[(&str, &str)]; 9] = [
        &[],
        &[("client-id", "")],
        &[("x-account", "")],
        &[("client-id", "a")],
        &[("x-account", "a")],
        &[("client-id", "a"), ("x-account", "b")],
        &[("client-id", "b"), ("x-account", "a")],
        &[("client-id", "a"), ("client-id", "b")],
        &[("client-id", "a, b")],
    ];
    for tenant in tenants {
        assert!(!is_replayed(&app, tenant).await, "{tenant:?} is a tenant of its own");
    }
    for tenant in tenants {
        let elsewhere = [tenant, &[("authorization", "new"), ("date", "today")]].concat();
        assert!(is_replayed(&app, &elsewhere).await, "{tenant:?} needs no other header");
    }
    let mixed = [("x-account", "b"), ("client-id", "a")];
    assert!(
        is_replayed(&app, &mixed).await,
        "the order of different headers counts for nothing"
    );
    assert_eq!(control.runs(), tenants.len());
}

#[test]
#[should_panic(expected = "is not a header name")]
fn what_is_not_a_header_name_is_no_scope() {
    let _ = layer().1.scope_headers(["client id"]);
}

// ---- parameters of the authorization

#[tokio::test]
async fn a_retry_may_be_signed_anew() {
    let app = anywhere(&open(), signed());
    let first = r#"TX-SHA256 auth_id="m1",auth_type=MERCHANT,nonce="n1",timestamp=1,signature="c2ln+/=""#;
    assert!(!is_replayed(&app, &[("authorization", first)]).await);
    for again in [
        r#"TX-SHA256 auth_id="m1",auth_type=MERCHANT,nonce="n2",timestamp=2,signature="b3RoZXI=""#,
        "TX-SHA256 nonce=n3, auth_type=MERCHANT, auth_id=m1, signature=b3RoZXI=",
        "tx-sha256 AUTH_ID=m1,Auth_Type=MERCHANT",
        r#"TX-SHA256 auth_id="m1",auth_type="MERCHANT",note="auth_id=m2, auth_type=X""#,
    ] {
        assert!(is_replayed(&app, &[("authorization", again)]).await, "{again}");
    }
}

#[tokio::test]
async fn each_parameter_is_part_of_the_tenant_in_its_own_place() {
    let app = anywhere(&open(), signed());
    for credentials in [
        "TX-SHA256 auth_id=a,auth_type=b",
        "TX-SHA256 auth_id=b,auth_type=a",
        "TX-SHA256 auth_id=ab,auth_type=b",
        "TX-SHA256 auth_id=a,auth_type=bb",
        "TX-SHA256 auth_id=A,auth_type=b",
    ] {
        assert!(
            !is_replayed(&app, &[("authorization", credentials)]).await,
            "{credentials}"
        );
    }
}

#[tokio::test]
async fn credentials_of_another_scheme_count_as_a_whole_and_none_as_such() {
    let app = anywhere(&open(), signed());
    let tenants: [&[(&str, &str)]; 5] = [
        &[],
        &[("authorization", "Bearer auth_id=a,auth_type=b,nonce=1")],
        &[("authorization", "Bearer auth_id=a,auth_type=b,nonce=2")],
        &[("authorization", "TX-SHA256x auth_id=a,auth_type=b")],
        &[("authorization", "")],
    ];
    for tenant in tenants {
        assert!(!is_replayed(&app, tenant).await, "{tenant:?}");
    }
    for tenant in tenants {
        assert!(is_replayed(&app, tenant).await, "{tenant:?}");
    }
}

#[tokio::test]
async fn credentials_that_name_nobody_clearly_are_refused() {
    let (store, layer) = layer();
    let control = open();
    let app = anywhere(&control, layer.scope_authorization(SCHEME, ["auth_id", "auth_type"]));
    for credentials in [
        "TX-SHA256",
        "TX-SHA256 nonsense",
        "TX-SHA256 auth_id=m1",
        "TX-SHA256 auth_id=,auth_type=b",
        r#"TX-SHA256 auth_id="",auth_type=b"#,
        "TX-SHA256 auth_id=m1,auth_id=m2,auth_type=b",
        "TX-SHA256 auth_id=m1,AUTH_ID=m1,auth_type=b",
        r#"TX-SHA256 auth_id="m1,auth_type=b"#,
        r#"TX-SHA256 auth_id="m\"1",auth_type=b"#,
        "TX-SHA256 auth_id=m1 auth_type=b",
        r#"TX-SHA256 note="auth_id=m1",auth_type=b"#,
    ] {
        let headers = [("idempotency-key", "k"), ("authorization", credentials)];
        let answer = call(&app, to_pay(&headers, "a")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{credentials}");
        assert_eq!(answer.problem(), "idempotency-scope-missing", "{credentials}");
        let problem = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(!problem.contains("m1"), "credentials are not sent back: {problem}");
    }
    let clear = ("authorization", "TX-SHA256 auth_id=m1,auth_type=b");
    let twice = to_pay(&[("idempotency-key", "k"), clear, clear], "a");
    assert_eq!(call(&app, twice).await.problem(), "idempotency-scope-missing");
    let mut garbled = to_pay(&[("idempotency-key", "k")], "a");
    let value = HeaderValue::from_bytes(b"TX-SHA256 auth_id=\xff,auth_type=b").unwrap();
    garbled.headers_mut().insert("authorization", value);
    assert_eq!(call(&app, garbled).await.problem(), "idempotency-scope-missing");
    assert_eq!((control.runs(), store.len()), (0, 0));
}

// ---- a member of the body

#[tokio::test]
async fn a_member_of_the_body_keeps_merchants_apart() {
    let control = open();
    let app = anywhere(&control, layer().1.scope_member("/merchant"));
    let send = async |body: &'static str| call(&app, to_pay(&[("idempotency-key", "k")], body)).await;
    let merchants = [
        r#"{"merchant":"7"}"#,
        r#"{"merchant":7}"#,
        r#"{"merchant":{"id":7}}"#,
        r#"{"merchant":9007199254740993}"#,
        r#"{"merchant":9007199254740992}"#,
        "{}",
    ];
    for (run, body) in (1..).zip(merchants) {
        assert_eq!(send(body).await.body, format!("run {run} attempt 1: {body}"));
    }
    for body in merchants {
        assert!(send(body).await.is_replay(), "{body}");
    }
    for (body, same_merchant) in [
        (r#"{"merchant":7.0}"#, "7"),
        (r#"{ "merchant" : "\u0037" }"#, "the string 7"),
        (r#"{"merchant":null}"#, "nobody"),
        (r#"{"amount":1}"#, "nobody"),
        ("", "nobody"),
    ] {
        assert_eq!(send(body).await.problem(), "idempotency-key-reused", "{same_merchant}");
    }
    assert_eq!(control.runs(), merchants.len());
}

#[tokio::test]
async fn where_a_member_is_part_of_the_scope_the_body_has_to_be_json_or_empty() {
    let (store, layer) = layer();
    let control = open();
    let app = anywhere(&control, layer.scope_member("/merchant"));
    for body in ["merchant=7", r#"{"merchant":"a","merchant":"b"}"#] {
        let answer = call(&app, to_pay(&[("idempotency-key", "k")], body)).await;
        assert_eq!(answer.problem(), "request-body-unreadable");
    }
    assert_eq!((control.runs(), store.len()), (0, 0));
    let without_key = call(&app, to_pay(&[], "merchant=7")).await;
    assert_eq!(
        without_key.status,
        StatusCode::CREATED,
        "what is not protected is not read"
    );
}

#[tokio::test]
async fn members_and_headers_are_parts_of_one_scope() {
    let layer = layer()
        .1
        .scope_headers(["client-id"])
        .scope_member("/a")
        .scope_member("/b");
    let control = open();
    let app = anywhere(&control, layer);
    for (client, body) in [
        ("c", r#"{"a":1}"#),
        ("d", r#"{"a":1}"#),
        ("c", r#"{"b":1}"#),
        ("c", r#"{"a":1,"b":1}"#),
        ("c", "{}"),
    ] {
        let headers = [("idempotency-key", "k"), ("client-id", client)];
        assert_eq!(call(&app, to_pay(&headers, body)).await.status, StatusCode::CREATED);
        assert!(call(&app, to_pay(&headers, body)).await.is_replay());
    }
    assert_eq!(control.runs(), 5);
}

#[test]
fn a_part_of_the_scope_is_one_member() {
    for pointer in ["merchant", "/merchants/*/id"] {
        assert!(std::panic::catch_unwind(|| layer().1.scope_member(pointer)).is_err());
    }
}

// ---- the operation

#[tokio::test]
async fn routes_with_one_operation_share_their_keys() {
    let (_, layer) = layer();
    let control = open();
    let layer = layer.fingerprint(Fingerprinter::none());
    let layer = layer
        .route("/v1/refund", |refund| refund.operation("refund"))
        .route("/v2/refund", |refund| refund.operation("refund"))
        .route("/named", |named| named.operation("/plain"));
    let app = anywhere(&control, layer);
    for (path, is_replay) in [
        ("/v1/refund", false),
        ("/v2/refund", true),
        ("/refund", false),
        ("/plain", false),
        ("/named", false),
    ] {
        let answer = call(&app, request("POST", path, &[("idempotency-key", "k")], "a")).await;
        assert_eq!(answer.is_replay(), is_replay, "{path}");
    }
    assert_eq!(control.runs(), 4);
}

/// Of two nodes in a rolling deploy, and of one before and after any.
#[tokio::test]
async fn a_retry_is_a_replay_although_a_deploy_renamed_a_parameter_of_its_route() {
    let (_, layer) = layer();
    let control = open();
    let node = |route: &str| {
        let control = control.clone();
        let refund = async move || format!("refund {}", control.pass().await);
        Router::new().route(route, post(refund)).layer(layer.clone())
    };
    let refund = || request("POST", "/orders/7/refunds", &[("idempotency-key", "k")], "a");
    let first = call(&node("/orders/{id}/refunds"), refund()).await;
    let retry = call(&node("/orders/{order_id}/refunds"), refund()).await;
    assert!(retry.is_replay());
    assert_eq!((retry.body, control.runs()), (first.body, 1));
    let another = call(&node("/orders/{id}/{what}"), refund()).await;
    assert!(!another.is_replay(), "it is another route");
}

#[test]
fn what_cannot_be_a_scheme_is_refused_when_it_is_given() {
    for scheme in ["", "KESTREL-V2 ", "Authorization: KESTREL-V2", "a b"] {
        let given = || layer().1.scope_authorization(scheme, ["merchant"]);
        assert!(std::panic::catch_unwind(given).is_err(), "{scheme:?}");
    }
}

#[tokio::test]
async fn a_scope_that_names_its_operation_goes_before_that_of_the_layer() {
    let (_, layer) = layer();
    let control = open();
    let layer = layer
        .fingerprint(Fingerprinter::none())
        .operation("of the layer")
        .scope(|parts| match parts.headers.contains_key("x-own") {
            true => Scope::tenant("t").operation("own"),
            false => Scope::tenant("t"),
        });
    let app = anywhere(&control, layer);
    for (path, own, is_replay) in [
        ("/a", false, false),
        ("/b", false, true),
        ("/c", true, false),
        ("/d", true, true),
    ] {
        let mut headers = vec![("idempotency-key", "k")];
        headers.extend(own.then_some(("x-own", "1")));
        let answer = call(&app, request("POST", path, &headers, "a")).await;
        assert_eq!(answer.is_replay(), is_replay, "{path}");
    }
}
