#![allow(clippy::unwrap_used)]

use super::*;

fn sample() -> StoredResponse {
    let mut headers = HeaderMap::new();
    headers.append("content-type", HeaderValue::from_static("text/plain"));
    headers.append("x-twice", HeaderValue::from_static("one"));
    headers.append("x-twice", HeaderValue::from_bytes(b"\xfftwo").unwrap());
    headers.append("date", HeaderValue::from_static("today"));
    let mut trailers = HeaderMap::new();
    trailers.append("grpc-status", HeaderValue::from_static("0"));
    StoredResponse::encode(
        StatusCode::CREATED,
        &headers,
        |name| name != "date",
        b"body",
        Some(&trailers),
    )
}

/// Version 1 as it was first released. These bytes are on disks: they never change.
const GOLDEN: &str = "0102c9003d00000012000000\
    0400000000000000\
    0c000a000000636f6e74656e742d74797065746578742f706c61696e\
    070003000000782d74776963656f6e65\
    070004000000782d7477696365ff74776f\
    0b0001000000677270632d73746174757330\
    626f6479";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn version_1_is_written_and_read_as_it_was_first_released() {
    assert_eq!(hex(sample().as_bytes()), GOLDEN);
    let bytes: Vec<u8> = (0..GOLDEN.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&GOLDEN[at..at + 2], 16).unwrap())
        .collect();
    let answer = StoredResponse::from_bytes(bytes.into()).unwrap().decode().unwrap();
    assert_eq!(answer.status, StatusCode::CREATED);
    let twice: Vec<_> = answer
        .headers
        .get_all("x-twice")
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    assert_eq!(twice, [&b"one"[..], b"\xfftwo"]);
    assert_eq!(answer.headers.len(), 3);
    assert_eq!(answer.trailers.unwrap()["grpc-status"], "0");
    assert_eq!(answer.body, "body");
}

#[test]
fn an_answer_that_is_not_kept_has_a_status_and_nothing_else() {
    let stored = StoredResponse::not_kept(StatusCode::ACCEPTED);
    assert!(!stored.is_kept() && !stored.is_empty());
    assert!(sample().is_kept());
    let answer = StoredResponse::from_bytes(stored.as_bytes().clone())
        .unwrap()
        .decode()
        .unwrap();
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    assert!(answer.headers.is_empty() && answer.body.is_empty() && answer.trailers.is_none());
}

#[test]
fn what_must_not_be_logged_is_marked_in_a_replay_too() {
    let mut headers = HeaderMap::new();
    let mut secret = HeaderValue::from_static("secret");
    secret.set_sensitive(true);
    headers.append("x-token", secret);
    headers.append("x-token", HeaderValue::from_static("public"));
    let stored = StoredResponse::encode(StatusCode::OK, &headers, |_| true, b"body", None);
    let answer = stored.decode().unwrap();
    let tokens: Vec<_> = answer.headers.get_all("x-token").iter().collect();
    assert_eq!(tokens, ["secret", "public"]);
    assert!(tokens[0].is_sensitive() && !tokens[1].is_sensitive());
    assert_eq!(
        format!("{stored:?}"),
        "StoredResponse(62 bytes)",
        "nothing of it is shown"
    );
}

#[test]
fn the_body_of_a_replay_is_not_copied() {
    let stored = sample();
    let body = stored.decode().unwrap().body;
    assert!(stored.as_bytes().as_ptr_range().contains(&body.as_ptr()));
}

#[test]
fn a_newer_version_is_an_error_of_its_own() {
    let mut bytes = sample().as_bytes().to_vec();
    bytes[0] = 2;
    let error = StoredResponse::from_bytes(bytes.into()).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NewerVersion);
}

#[test]
fn bytes_that_end_early_or_late_are_corrupt() {
    let bytes = sample().as_bytes().clone();
    for end in 0..bytes.len() {
        let error = StoredResponse::from_bytes(bytes.slice(..end)).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "cut at {end}");
    }
    let longer = [&bytes[..], b"x"].concat();
    assert_eq!(
        StoredResponse::from_bytes(longer.into()).unwrap_err().kind(),
        StoreErrorKind::Corrupt
    );
}

#[test]
fn no_bytes_make_the_reader_panic() {
    use proptest::prelude::*;
    proptest!(|(mut bytes in proptest::collection::vec(any::<u8>(), 0..80), version in 0u8..3)| {
        if let Some(first) = bytes.first_mut() {
            *first = version;
        }
        is_checked_as_it_is_read(bytes.into());
    });
    let good = sample().as_bytes().to_vec();
    proptest!(|(at in 0..good.len(), with in any::<u8>())| {
        let mut bytes = good.clone();
        bytes[at] = with;
        is_checked_as_it_is_read(bytes.into());
    });
}

/// What is taken back can be read later, and what cannot be read is not taken back.
fn is_checked_as_it_is_read(bytes: Bytes) {
    let read = StoredResponse::unread(bytes.clone()).decode().map(drop);
    let checked = StoredResponse::from_bytes(bytes).map(drop);
    assert_eq!(
        checked.map_err(|error| error.kind()),
        read.map_err(|error| error.kind())
    );
}

#[test]
fn every_byte_of_a_name_or_a_value_is_checked_as_it_is_read() {
    let good = sample().as_bytes().to_vec();
    let all = |at: usize| (0..=255).map(move |byte| (at, byte));
    // In a standard name, in a value, in a name of another kind, and in that of a trailer.
    for (at, byte) in [all(27), all(40), all(55), all(90)].into_iter().flatten() {
        let mut bytes = good.clone();
        bytes[at] = byte;
        is_checked_as_it_is_read(bytes.into());
    }
    // Without a name.
    let mut bytes = vec![VERSION, 0, 200, 0, 6, 0, 0, 0, 0, 0, 0, 0];
    bytes.extend([0; 8]);
    bytes.extend([0; 6]);
    is_checked_as_it_is_read(bytes.into());
}
