//! Settings by route.

use std::{panic::catch_unwind, time::Duration};

use axum::{Router, routing::post};
use http::{Method, StatusCode};
use tokio::time::advance;
use tower_idempotency::{IdempotencyLayer, RejectionKind};

use crate::{
    layer,
    support::app::{anywhere, call, open, request},
};

/// Whose refusals of a missing key say which settings hold.
fn named(layer: IdempotencyLayer, name: &'static str) -> IdempotencyLayer {
    layer.rejection_title(RejectionKind::KeyMissing, name)
}

async fn settings_at(app: &Router, path: &str) -> String {
    let answer = call(app, request("POST", path, &[], "a")).await;
    assert_eq!(answer.problem(), "idempotency-key-missing", "{path}");
    answer.json()["title"].as_str().unwrap().to_owned()
}

#[tokio::test(start_paused = true)]
async fn the_settings_of_a_route_hold_there_and_nowhere_else() {
    let (_, layer) = layer();
    let control = open();
    let layer = layer
        .retention(Duration::from_secs(300))
        .route("/refunds", |refunds| refunds.retention(Duration::from_secs(600)));
    let app = anywhere(&control, layer);
    let send = async |path| call(&app, request("POST", path, &[("idempotency-key", "k")], "a")).await;
    for path in ["/payments", "/refunds"] {
        assert!(!send(path).await.is_replay());
    }
    advance(Duration::from_millis(299_999)).await;
    for path in ["/payments", "/refunds"] {
        assert!(send(path).await.is_replay(), "{path}");
    }
    advance(Duration::from_millis(1)).await;
    assert!(!send("/payments").await.is_replay());
    assert!(send("/refunds").await.is_replay());
    advance(Duration::from_secs(300)).await;
    assert!(!send("/refunds").await.is_replay());
    assert_eq!(control.runs(), 4);
}

#[tokio::test]
async fn the_most_exact_pattern_counts_whatever_the_order_in_which_they_were_given() {
    let patterns = [
        ("/{first}/{second}", "two"),
        ("/card/{*rest}", "rest"),
        ("/card/new", "new"),
    ];
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let own = named(layer().1.require_key(), "own");
        let layer = order.into_iter().fold(own, |layer, at| {
            let (pattern, name) = patterns[at];
            layer.route(pattern, |route| named(route, name))
        });
        let app = anywhere(&open(), layer);
        for (path, name) in [
            ("/card/new", "new"),
            ("/card/new?x=1", "new"),
            ("/card/7", "rest"),
            ("/card/7/pay", "rest"),
            ("/card/new/pay", "rest"),
            ("/card/newer", "rest"),
            ("/cards/7", "two"),
            ("/card", "own"),
            ("/card/", "own"),
            ("/Card/new", "two"),
            ("/v1/card/new", "own"),
        ] {
            assert_eq!(settings_at(&app, path).await, name, "{path}");
        }
    }
}

#[tokio::test]
async fn what_is_set_before_a_route_is_inherited_and_what_is_set_after_it_holds_there_too() {
    let layer = named(layer().1.require_key(), "before").route("/a", |a| named(a, "a"));
    let app = anywhere(&open(), layer.clone());
    assert_eq!(
        settings_at(&app, "/a").await,
        "a",
        "which requires a key, as was set before"
    );
    assert_eq!(settings_at(&app, "/b").await, "before", "nothing leaks out of a route");
    let app = anywhere(&open(), named(layer, "after"));
    assert_eq!(settings_at(&app, "/a").await, "after");
    assert_eq!(settings_at(&app, "/b").await, "after");
}

#[tokio::test]
async fn a_setter_after_the_routes_leaves_their_other_settings_alone() {
    let (_, layer) = layer();
    let control = open();
    let layer = layer.route("/a", IdempotencyLayer::require_key).max_key_length(4);
    let app = anywhere(&control, layer);
    assert_eq!(settings_at(&app, "/a").await, "Idempotency key is missing");
    for path in ["/a", "/b"] {
        let long = call(&app, request("POST", path, &[("idempotency-key", "12345")], "a")).await;
        assert_eq!(long.problem(), "idempotency-key-invalid", "{path}");
    }
    assert_eq!(
        call(&app, request("POST", "/b", &[], "a")).await.status,
        StatusCode::CREATED
    );
}

#[tokio::test]
async fn a_route_may_cover_other_methods() {
    let (store, layer) = layer();
    let layer = layer.methods([]).route("/a", |a| a.methods([Method::PUT]));
    let app = anywhere(&open(), layer);
    for (method, path, records) in [("POST", "/a", 0), ("PUT", "/b", 0), ("PUT", "/a", 1)] {
        call(&app, request(method, path, &[("idempotency-key", "k")], "a")).await;
        assert_eq!(store.len(), records, "{method} {path}");
    }
}

#[tokio::test]
async fn a_route_of_a_clone_is_not_one_of_the_original() {
    let original = named(layer().1.require_key(), "own").route("/a", |a| named(a, "a"));
    let clone = original.clone().route("/b", |b| named(b, "b"));
    let (original, clone) = (anywhere(&open(), original), anywhere(&open(), clone));
    assert_eq!(settings_at(&original, "/b").await, "own");
    assert_eq!(settings_at(&clone, "/b").await, "b");
    assert_eq!(settings_at(&clone, "/a").await, "a");
}

#[tokio::test]
async fn in_a_nested_router_the_path_is_the_one_that_the_client_sent() {
    let own = named(layer().1.require_key(), "own");
    let layer = own
        .route("/v1/pay", |pay| named(pay, "sent"))
        .route("/pay", |pay| named(pay, "stripped"));
    let inner = Router::new().route("/pay", post(async || "paid"));
    let on_the_inner = Router::new().nest("/v1", inner.clone().layer(layer.clone()));
    let on_the_route = Router::new().nest(
        "/v1",
        Router::new().route("/pay", post(async || "paid").layer(layer.clone())),
    );
    let on_the_outer = Router::new().nest("/v1", inner).layer(layer);
    for app in [on_the_inner, on_the_route, on_the_outer] {
        assert_eq!(settings_at(&app, "/v1/pay").await, "sent");
    }
}

#[tokio::test]
async fn under_a_prefix_that_no_pattern_has_it_is_what_the_nested_router_left_of_it() {
    let layer = named(layer().1.require_key(), "own").route("/pay", |pay| named(pay, "pay"));
    let inner = Router::new().route("/pay", post(async || "paid")).layer(layer);
    let app = Router::new().nest("/v1", inner);
    assert_eq!(settings_at(&app, "/v1/pay").await, "pay");
}

#[tokio::test]
async fn a_route_that_is_named_again_is_changed_further() {
    let layer = named(layer().1.require_key(), "own").route("/a", |a| named(a, "a"));
    let layer = layer.route("/a", |a| a.max_key_length(4));
    let app = anywhere(&open(), layer);
    assert_eq!(settings_at(&app, "/a").await, "a");
    let long = call(&app, request("POST", "/a", &[("idempotency-key", "12345")], "a")).await;
    assert_eq!(long.problem(), "idempotency-key-invalid");
    assert_eq!(settings_at(&app, "/b").await, "own");
}

#[tokio::test]
async fn requests_to_every_route_are_counted_by_the_layer() {
    let (_, layer) = layer();
    let layer = layer.route("/a", |a| a.retention(Duration::from_secs(5)));
    let app = anywhere(&open(), layer.clone());
    for path in ["/a", "/b"] {
        call(&app, request("POST", path, &[("idempotency-key", "k")], "a")).await;
    }
    assert_eq!(layer.counters().executed, 2);
}

#[test]
fn a_pattern_that_is_none_or_meets_another_is_refused_when_it_is_given() {
    for (first, second) in [
        ("/a/{x}", "/a/{y}"),
        ("/a/{x}", "/a/{*rest}"),
        ("/{*all}", "/{*rest}"),
        ("/a", "/{"),
        ("/a", "/{*rest}/a"),
    ] {
        let both = || {
            let layer = layer().1.route(first, |route| route);
            layer.route(second, |route| route)
        };
        assert!(catch_unwind(both).is_err(), "{first} and {second}");
    }
    let nested = || layer().1.route("/a", |a| a.route("/b", |b| b));
    assert!(catch_unwind(nested).is_err(), "routes stand beside each other");
}
