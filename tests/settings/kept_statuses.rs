//! Which statuses say that an operation was executed.

use axum::{Router, response::IntoResponse};
use http::StatusCode;
use tower_idempotency::{IdempotencyLayer, Statuses};

use crate::{
    layer,
    support::app::{anywhere_answering, call, open, request},
};

/// `/201` answers 201.
fn statuses(layer: IdempotencyLayer) -> Router {
    anywhere_answering(&open(), layer, |_, request, _| {
        let status: StatusCode = request.uri.path()[1..].parse().unwrap();
        status.into_response()
    })
}

async fn is_kept(app: &Router, status: u16) -> bool {
    let path = format!("/{status}");
    let send = async || call(app, request("POST", &path, &[("idempotency-key", "k")], "a")).await;
    let (first, second) = (send().await, send().await);
    assert_eq!((first.status, second.status.as_u16()), (second.status, status));
    second.is_replay()
}

const USUAL: [u16; 19] = [
    200, 201, 202, 204, 299, 301, 400, 401, 402, 403, 404, 408, 409, 422, 425, 429, 500, 503, 504,
];

#[tokio::test]
async fn the_statuses_whose_answers_are_kept_are_a_setting() {
    let success = |status: u16| (200..300).contains(&status);
    let freed = [401, 403, 408, 425, 429, 503];
    let not_5xx = Statuses::all().without_class(5);
    let chosen = Statuses::none().with([StatusCode::OK, StatusCode::BAD_REQUEST]);
    type Kept = Box<dyn Fn(u16) -> bool>;
    let cases: [(Statuses, Kept); 6] = [
        (Statuses::success(), Box::new(success)),
        (Statuses::all(), Box::new(|_| true)),
        (Statuses::none(), Box::new(|_| false)),
        (not_5xx, Box::new(|status| status < 500)),
        (chosen, Box::new(|status| status == 200 || status == 400)),
        (Statuses::default(), Box::new(move |status| !freed.contains(&status))),
    ];
    for (kept, expected) in cases {
        let name = format!("{kept:?}");
        let app = statuses(layer().1.store_statuses(kept));
        for status in USUAL {
            assert_eq!(is_kept(&app, status).await, expected(status), "{status} under {name}");
        }
    }
}

#[tokio::test]
async fn a_set_and_a_closure_say_the_same_thing_and_the_later_one_counts() {
    let (_, layer) = layer();
    let closure = |status: StatusCode| status == StatusCode::BAD_GATEWAY;
    let set_last = statuses(layer.clone().store_when(closure).store_statuses(Statuses::success()));
    let closure_last = statuses(layer.store_statuses(Statuses::success()).store_when(closure));
    assert!(is_kept(&set_last, 200).await && !is_kept(&set_last, 502).await);
    assert!(!is_kept(&closure_last, 201).await && is_kept(&closure_last, 502).await);
}

#[tokio::test]
async fn an_answer_that_is_not_kept_leaves_no_record() {
    let (store, layer) = layer();
    let app = statuses(layer.store_statuses(Statuses::success()));
    assert!(!is_kept(&app, 500).await);
    assert!(store.is_empty());
}
