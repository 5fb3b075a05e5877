#![allow(clippy::unwrap_used)]

use super::*;

fn parts(method: &str, target: &str) -> Parts {
    http::Request::builder()
        .method(method)
        .uri(target)
        .header("date", "today")
        .body(())
        .unwrap()
        .into_parts()
        .0
}

fn of(fingerprinter: &Fingerprinter, parts: &Parts, body: &Bytes) -> Fingerprint {
    fingerprinter.fingerprint(parts, body, &JsonBody::new(body)).unwrap()
}

fn whole(method: &str, target: &str, body: &'static str) -> Fingerprint {
    let body = Bytes::from_static(body.as_bytes());
    of(&Fingerprinter::default(), &parts(method, target), &body)
}

fn json(fingerprinter: &Fingerprinter, body: &'static str) -> Fingerprint {
    of(
        fingerprinter,
        &parts("POST", "/a"),
        &Bytes::from_static(body.as_bytes()),
    )
}

#[test]
fn method_path_query_and_body_all_count() {
    let one = whole("POST", "/a?b=1", "body");
    assert_eq!(one, whole("POST", "/a?b=1", "body"));
    assert_ne!(one, whole("PATCH", "/a?b=1", "body"));
    assert_ne!(one, whole("POST", "/a?b=2", "body"));
    assert_ne!(one, whole("POST", "/a", "body"));
    assert_ne!(one, whole("POST", "/a?b=1", "body "));
    assert_ne!(whole("POST", "/a", "bc"), whole("POST", "/ab", "c"));
}

#[test]
fn headers_do_not_count() {
    let mut later = parts("POST", "/");
    later.headers.insert("date", "tomorrow".parse().unwrap());
    later.headers.insert("x-signature", "other".parse().unwrap());
    let body = Bytes::from_static(b"body");
    let default = Fingerprinter::default();
    assert_eq!(of(&default, &later, &body), of(&default, &parts("POST", "/"), &body));
}

#[test]
fn a_record_made_by_another_algorithm_is_compared_by_that_one() {
    let (parts, body) = (parts("POST", "/"), Bytes::from_static(b"body"));
    let old = of(&Fingerprinter::whole_request(), &parts, &body);
    let new = Fingerprinter::custom(200, |_, body| Sha256::digest(body).into());
    let own = of(&new, &parts, &body);
    assert_eq!(own.algorithm(), 200);
    assert_eq!(new.compare(&old, &own, &parts, &body), Comparison::Same);
    let other = Fingerprint::new(old.algorithm(), [7; 32]);
    assert_eq!(new.compare(&other, &own, &parts, &body), Comparison::Different);
}

#[test]
fn a_record_made_by_an_algorithm_that_is_not_here_says_so() {
    let (parts, body) = (parts("POST", "/"), Bytes::new());
    let fingerprinter = Fingerprinter::default();
    let own = of(&fingerprinter, &parts, &body);
    let foreign = Fingerprint::new(99, *own.digest());
    assert_eq!(
        fingerprinter.compare(&foreign, &own, &parts, &body),
        Comparison::Unknown
    );
}

#[test]
fn without_a_fingerprint_every_request_is_the_same() {
    let none = Fingerprinter::none();
    let one = of(&none, &parts("POST", "/"), &Bytes::from_static(b"a"));
    assert_eq!(one, of(&none, &parts("PATCH", "/b"), &Bytes::from_static(b"c")));
}

#[test]
fn the_json_value_counts_and_not_its_form() {
    let canonical = Fingerprinter::canonical_json();
    let one = json(&canonical, r#"{"a":1,"b":"x"}"#);
    assert_eq!(one, json(&canonical, "{ \"b\" : \"\\u0078\", \"a\": 1.0 }"));
    assert_ne!(one, json(&canonical, r#"{"a":2,"b":"x"}"#));
    assert_ne!(
        one,
        of(
            &canonical,
            &parts("POST", "/b"),
            &Bytes::from_static(br#"{"a":1,"b":"x"}"#)
        )
    );
    assert_ne!(json(&canonical, ""), json(&canonical, "null"), "no body is not a value");
}

#[test]
fn a_body_that_is_not_json_is_refused_where_json_is_compared() {
    let parts = parts("POST", "/");
    for fingerprinter in [Fingerprinter::canonical_json(), Fingerprinter::json_members(["/a"])] {
        for body in [&b"nonsense"[..], br#"{"a":1,"a":1}"#] {
            let body = Bytes::from_static(body);
            let rejection = fingerprinter
                .fingerprint(&parts, &body, &JsonBody::new(&body))
                .unwrap_err();
            assert_eq!(rejection.kind(), crate::RejectionKind::BodyUnreadable);
        }
    }
}

#[test]
fn only_the_chosen_members_count_and_absence_is_a_value() {
    let chosen = Fingerprinter::json_members(["/order/no", "/items/*/amount"]);
    let one = json(&chosen, r#"{"order":{"no":1},"items":[{"amount":5}],"note":"a"}"#);
    assert_eq!(
        one,
        json(&chosen, r#"{"items":[{"amount":5.0,"x":1}],"order":{"no":1}}"#)
    );
    for other in [
        r#"{"order":{"no":2},"items":[{"amount":5}]}"#,
        r#"{"order":{"no":1},"items":[{"amount":6}]}"#,
        r#"{"order":{"no":1},"items":[{"amount":5},{}]}"#,
        r#"{"order":{"no":1},"items":[]}"#,
        r#"{"order":{"no":null},"items":[{"amount":5}]}"#,
        r#"{"items":[{"amount":5}]}"#,
    ] {
        assert_ne!(one, json(&chosen, other), "{other}");
    }
    let reordered = Fingerprinter::json_members(["/items/*/amount", "/order/no"]);
    let body = r#"{"order":{"no":1},"items":[{"amount":5}],"note":"a"}"#;
    assert_ne!(one, json(&reordered, body), "other pointers make another fingerprint");
}

#[test]
fn no_two_bodies_with_other_chosen_members_or_in_other_arrays_are_the_same() {
    let amounts = Fingerprinter::json_members(["/orders/*/lines/*/amount"]);
    let bodies = [
        "",
        "{}",
        r#"{"orders":null}"#,
        r#"{"orders":"x"}"#,
        r#"{"orders":[]}"#,
        r#"{"orders":[5]}"#,
        r#"{"orders":[{"lines":null}]}"#,
        r#"{"orders":[{"lines":"x"}]}"#,
        r#"{"orders":[{"lines":[]}]}"#,
        r#"{"orders":[{"lines":[]},{"lines":[]}]}"#,
        r#"{"orders":[{"lines":[{}]}]}"#,
        r#"{"orders":[{"lines":[{"amount":null}]}]}"#,
        r#"{"orders":[{"lines":[{"amount":5}]}]}"#,
        r#"{"orders":[{"lines":[{"amount":5},{"amount":6}]},{"lines":[{"amount":7}]}]}"#,
        r#"{"orders":[{"lines":[{"amount":5}]},{"lines":[{"amount":6},{"amount":7}]}]}"#,
        r#"{"orders":[{"lines":[{"amount":5},{"amount":6},{"amount":7}]}]}"#,
        r#"{"orders":[{"lines":[{"amount":5},{"amount":6},{"amount":7}]},{"lines":[]}]}"#,
    ];
    for (at, one) in bodies.iter().enumerate() {
        for other in bodies.iter().skip(at + 1) {
            assert_ne!(json(&amounts, one), json(&amounts, other), "{one} and {other}");
        }
    }
    let one = r#"{"orders":[{"lines":[{"amount":5}]}]}"#;
    let other = r#"{"note":1,"orders":[{"lines":[{"amount":5.0,"no":1}],"no":2}]}"#;
    assert_eq!(json(&amounts, one), json(&amounts, other), "nothing else counts");
}

#[test]
fn a_record_that_was_compared_as_json_still_is_after_the_setting_changed() {
    let parts = parts("POST", "/a");
    let old = json(&Fingerprinter::canonical_json(), r#"{"a":1}"#);
    let now = Fingerprinter::whole_request();
    let compare = |body: &'static [u8]| {
        let body = Bytes::from_static(body);
        now.compare(&old, &of(&now, &parts, &body), &parts, &body)
    };
    assert_eq!(compare(b"{ \"a\": 1 }"), Comparison::Same);
    assert_eq!(compare(br#"{"a":2}"#), Comparison::Different);
    assert_eq!(compare(b"nonsense"), Comparison::Different);
}

#[cfg(feature = "blake3")]
#[test]
fn sha_256_and_blake3_compare_each_others_records_by_what_these_were_made_with() {
    let (parts, body) = (parts("POST", "/a"), Bytes::from_static(b"body"));
    let (sha, blake) = (Fingerprinter::whole_request(), Fingerprinter::blake3());
    let (by_sha, by_blake) = (of(&sha, &parts, &body), of(&blake, &parts, &body));
    assert_eq!((by_sha.algorithm(), by_blake.algorithm()), (1, 5));
    assert_ne!(by_sha.digest(), by_blake.digest());
    let other = Bytes::from_static(b"other");
    for (fingerprinter, stored) in [(&sha, &by_blake), (&blake, &by_sha), (&blake, &by_blake)] {
        let compare = |body| fingerprinter.compare(stored, &of(fingerprinter, &parts, body), &parts, body);
        assert_eq!(compare(&body), Comparison::Same);
        assert_eq!(compare(&other), Comparison::Different);
    }
}

#[cfg(feature = "blake3")]
#[test]
fn under_blake3_method_path_query_and_body_all_count() {
    let one = |method, target, body: &'static str| {
        of(
            &Fingerprinter::blake3(),
            &parts(method, target),
            &Bytes::from_static(body.as_bytes()),
        )
    };
    let first = one("POST", "/a?b=1", "body");
    assert_eq!(first, one("POST", "/a?b=1", "body"));
    for other in [
        one("PATCH", "/a?b=1", "body"),
        one("POST", "/a?b=2", "body"),
        one("POST", "/a", "body"),
        one("POST", "/a?b=1", "body "),
    ] {
        assert_ne!(first, other);
    }
    assert_ne!(one("POST", "/a", "bc"), one("POST", "/ab", "c"));
}
