//! Requests that say when they were sent first.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{Router, body::Body};
use http::{HeaderName, StatusCode};
use tokio::time::advance;
use tower_idempotency::{IdempotencyLayer, KeySource, MemoryStore, Retention, WithoutKey};

use crate::{
    layer,
    support::{
        app::{Control, call, keyed, open, pay, to_pay},
        http::Answer,
    },
};

const RETENTION: u64 = 3600;
const AHEAD: u64 = 300;
/// When the tests take place, in seconds.
const NOW: u64 = 1_800_000_000;

/// A clock of the server's, which stands still unless it is told otherwise.
#[derive(Clone)]
struct Clock(Arc<AtomicU64>);

impl Clock {
    fn at(seconds: u64) -> Self {
        Self(Arc::new(AtomicU64::new(seconds)))
    }

    async fn advance(&self, time: Duration) {
        self.0.fetch_add(time.as_secs(), SeqCst);
        advance(time).await;
    }

    fn now(&self) -> u64 {
        self.0.load(SeqCst)
    }
}

fn dated(layer: IdempotencyLayer, clock: &Clock) -> IdempotencyLayer {
    let clock = clock.clone();
    layer.retention(Duration::from_secs(RETENTION)).first_sent_by(
        HeaderName::from_static("first-sent"),
        Duration::from_secs(AHEAD),
        move || UNIX_EPOCH + Duration::from_secs(clock.now()),
    )
}

struct Bench {
    store: MemoryStore,
    clock: Clock,
    control: Control,
    app: Router,
}

fn bench(settings: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer) -> Bench {
    let (store, layer) = layer();
    let (clock, control) = (Clock::at(NOW), open());
    let app = pay(&control, settings(dated(layer, &clock)));
    Bench {
        store,
        clock,
        control,
        app,
    }
}

fn date(seconds: u64) -> String {
    httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(seconds))
}

impl Bench {
    async fn send(&self, key: &str, first_sent: u64) -> Answer {
        let date = date(first_sent);
        call(
            &self.app,
            to_pay(&[("idempotency-key", key), ("first-sent", &date)], "a"),
        )
        .await
    }

    async fn assert_invalid(&self, headers: &[(&str, &str)]) {
        let answer = call(&self.app, to_pay(headers, "a")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{headers:?}");
        assert_eq!(answer.problem(), "first-sent-invalid", "{headers:?}");
        assert_eq!((self.control.runs(), self.store.len()), (0, 0));
    }
}

#[tokio::test]
async fn a_request_that_says_when_it_was_sent_first_runs_once() {
    let bench = bench(|layer| layer);
    assert_eq!(bench.send("k", NOW - 5).await.status, StatusCode::CREATED);
    assert!(bench.send("k", NOW - 5).await.is_replay());
    assert_eq!(bench.control.runs(), 1);
}

#[tokio::test]
async fn a_key_without_the_time_is_refused() {
    bench(|layer| layer).assert_invalid(&[("idempotency-key", "k")]).await;
}

#[tokio::test]
async fn a_time_that_is_not_an_http_date_is_refused() {
    let bench = bench(|layer| layer);
    for value in [
        "",
        "now",
        "1800000000",
        "2027-01-15T08:00:00Z",
        "Fri, 32 Jan 2027 08:00:00 GMT",
    ] {
        bench
            .assert_invalid(&[("idempotency-key", "k"), ("first-sent", value)])
            .await;
    }
}

#[tokio::test]
async fn a_time_that_was_sent_twice_is_refused_even_if_both_say_the_same() {
    let now = date(NOW);
    let headers = [("idempotency-key", "k"), ("first-sent", &now), ("first-sent", &now)];
    bench(|layer| layer).assert_invalid(&headers).await;
}

#[tokio::test]
async fn every_form_of_an_http_date_is_taken() {
    let bench = bench(|layer| layer);
    assert_eq!(date(NOW), "Fri, 15 Jan 2027 08:00:00 GMT");
    for (key, value) in [
        ("a", "Fri, 15 Jan 2027 08:00:00 GMT"),
        ("b", "Friday, 15-Jan-27 08:00:00 GMT"),
        ("c", "Fri Jan 15 08:00:00 2027"),
    ] {
        let answer = call(
            &bench.app,
            to_pay(&[("idempotency-key", key), ("first-sent", value)], "a"),
        )
        .await;
        assert_eq!(answer.status, StatusCode::CREATED, "{value}");
    }
}

#[tokio::test]
async fn a_clients_clock_may_be_ahead_by_so_much_and_no_more() {
    let bench = bench(|layer| layer);
    let late = date(NOW + AHEAD + 1);
    bench
        .assert_invalid(&[("idempotency-key", "k"), ("first-sent", &late)])
        .await;
    for ahead in [0, 1, AHEAD] {
        let answer = bench.send(&format!("k{ahead}"), NOW + ahead).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{ahead}");
    }
}

#[tokio::test]
async fn what_was_sent_first_longer_ago_than_records_are_kept_does_not_run() {
    let bench = bench(|layer| layer);
    for age in [RETENTION + 1, NOW] {
        let answer = bench.send("k", NOW - age).await;
        assert_eq!(answer.status, StatusCode::PRECONDITION_FAILED, "{age}");
        assert_eq!(answer.problem(), "first-sent-too-old");
        assert!(answer.json()["detail"].as_str().unwrap().contains("3600"));
    }
    assert_eq!((bench.control.runs(), bench.store.len()), (0, 0));
    let at_the_edge = bench.send("k", NOW - RETENTION).await;
    assert_eq!(at_the_edge.status, StatusCode::CREATED);
}

#[tokio::test(start_paused = true)]
async fn a_record_outlives_every_request_that_may_still_come_for_it() {
    for ahead in [0, AHEAD] {
        let bench = bench(|layer| layer);
        let first_sent = NOW + ahead;
        bench.send("k", first_sent).await;
        // By a clock that is ahead by all that it may be, the last request comes as much later.
        bench.clock.advance(Duration::from_secs(RETENTION + ahead)).await;
        assert!(bench.send("k", first_sent).await.is_replay(), "{ahead}");
        bench.clock.advance(Duration::from_secs(1)).await;
        let late = bench.send("k", first_sent).await;
        assert_eq!(late.status, StatusCode::PRECONDITION_FAILED, "and never a second run");
        assert_eq!(bench.control.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_is_kept_for_longer_by_what_a_clock_may_be_ahead_and_by_a_minute() {
    let bench = bench(|layer| layer);
    bench.send("k", NOW).await;
    // The server's clock stands still here, and only the store's goes on.
    advance(Duration::from_secs(RETENTION + AHEAD + 60) - Duration::from_millis(1)).await;
    assert!(bench.send("k", NOW).await.is_replay());
    advance(Duration::from_millis(1)).await;
    assert!(!bench.send("k", NOW).await.is_replay());
}

#[tokio::test]
async fn a_request_that_gets_too_old_while_its_body_arrives_does_not_run() {
    let bench = bench(|layer| layer);
    let clock = bench.clock.clone();
    let slow = futures_util::stream::once(async move {
        clock.0.fetch_add(1, SeqCst);
        Ok::<_, std::convert::Infallible>("a")
    });
    let date = date(NOW - RETENTION);
    let headers = [("idempotency-key", "k"), ("first-sent", &*date)];
    let answer = call(&bench.app, to_pay(&headers, Body::from_stream(slow))).await;
    assert_eq!(answer.problem(), "first-sent-too-old");
    assert_eq!(bench.control.runs(), 0);
}

#[tokio::test]
async fn where_the_key_is_in_the_body_only_a_request_with_a_key_has_to_have_the_time() {
    let bench = bench(|layer| layer.key(KeySource::body("/id")));
    let date = date(NOW);
    for (headers, body, expected) in [
        (&[][..], "{}", None),
        (&[][..], r#"{"id":"k"}"#, Some("first-sent-invalid")),
        (&[("first-sent", &*date)][..], "{}", Some("idempotency-key-missing")),
        (&[("first-sent", &*date)][..], r#"{"id":"k"}"#, None),
    ] {
        let answer = call(&bench.app, to_pay(headers, body)).await;
        match expected {
            Some(problem) => assert_eq!(answer.problem(), problem, "{headers:?} {body}"),
            None => assert_eq!(answer.status, StatusCode::CREATED, "{headers:?} {body}"),
        }
    }
    assert_eq!((bench.control.runs(), bench.store.len()), (2, 1));
}

#[tokio::test]
async fn where_records_are_kept_for_ever_nothing_is_too_old() {
    let bench = bench(|layer| layer.retention(Retention::Forever));
    assert_eq!(bench.send("k", 0).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn a_request_with_neither_passes_where_the_key_is_optional() {
    let bench = bench(|layer| layer);
    let answer = call(&bench.app, to_pay(&[], "a")).await;
    assert_eq!(answer.body, "run 1 attempt 0: a");
    assert!(bench.store.is_empty());
}

#[tokio::test]
async fn a_time_without_a_key_means_to_be_protected_and_is_refused() {
    let bench = bench(|layer| layer);
    let answer = call(&bench.app, to_pay(&[("first-sent", &date(NOW))], "a")).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.problem(), "idempotency-key-missing");
    assert_eq!(bench.control.runs(), 0);
}

#[tokio::test]
async fn a_request_whose_key_is_derived_has_to_have_the_time_too() {
    let bench = bench(|layer| layer.without_key(WithoutKey::DeriveAndReplay));
    bench.assert_invalid(&[]).await;
    let dated = || to_pay(&[("first-sent", "Fri, 15 Jan 2027 08:00:00 GMT")], "a");
    assert_eq!(call(&bench.app, dated()).await.status, StatusCode::CREATED);
    assert!(call(&bench.app, dated()).await.is_replay());
}

#[tokio::test]
async fn without_a_clock_of_the_callers_the_systems_is_used() {
    let (_, layer) = layer();
    let layer = layer.first_sent(HeaderName::from_static("first-sent"), Duration::from_secs(AHEAD));
    let app = pay(&open(), layer);
    assert_eq!(call(&app, keyed("k", "a")).await.problem(), "first-sent-invalid");
    let send = async |time: SystemTime| {
        let date = httpdate::fmt_http_date(time);
        call(&app, to_pay(&[("idempotency-key", "k"), ("first-sent", &date)], "a")).await
    };
    let two_days_ago = SystemTime::now() - Duration::from_secs(2 * 24 * 60 * 60);
    assert_eq!(send(two_days_ago).await.status, StatusCode::PRECONDITION_FAILED);
    assert_eq!(send(SystemTime::now()).await.status, StatusCode::CREATED);
}
