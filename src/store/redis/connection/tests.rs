#![allow(clippy::unwrap_used)]

use std::error::Error;

use redis::{ErrorKind, ServerErrorKind};

use super::*;

#[test]
fn pauses_between_tries_to_connect_double_up_to_the_longest() {
    let mut state = State {
        link: None,
        compares: false,
        number: 0,
        opening: None,
        pause: Duration::ZERO,
        failing_since: None,
    };
    let pauses = [(); 7].map(|()| {
        state.wait_longer();
        state.pause.as_millis()
    });
    assert_eq!(pauses, [25, 50, 100, 200, 400, 500, 500]);
}

#[test]
fn those_that_landed_together_say_that_their_connection_is_well_if_one_was_answered_unless_it_leads_elsewhere() {
    let fails = |kind| Landed::failed((kind, "said the server").into());
    let lost = || fails(ErrorKind::Io);
    let elsewhere = || fails(ErrorKind::Server(ServerErrorKind::ReadOnly));
    let answered = || {
        let mut landed = lost();
        landed.answer = Ok(Value::Nil);
        landed
    };
    let refused = || fails(ErrorKind::Server(ServerErrorKind::NoScript));
    for (landed, said) in [
        (vec![answered(), answered()], None),
        (vec![lost(), answered()], None),
        (vec![lost(), refused()], None),
        (vec![lost(), lost()], Some(ErrorKind::Io)),
        (
            vec![lost(), answered(), elsewhere()],
            Some(ErrorKind::Server(ServerErrorKind::ReadOnly)),
        ),
    ] {
        assert_eq!(verdict(&landed).map(RedisError::kind), said, "{landed:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_time_that_no_clock_can_count_is_a_year() {
    let now = Instant::now();
    assert_eq!(after(now, Duration::from_secs(7)), now + Duration::from_secs(7));
    assert_eq!(after(now, Duration::MAX), now + Duration::from_secs(31_536_000));
}

#[test]
fn of_an_answer_that_nobody_expects_its_shape_is_told_and_not_itself() {
    let secret = || b"secret".to_vec();
    for (value, shape) in [
        (Value::Nil, "nothing"),
        (Value::Int(7), "a number"),
        (Value::BulkString(secret()), "a string"),
        (Value::Array(vec![Value::BulkString(secret())]), "a list"),
        (Value::Okay, "a status"),
        (Value::SimpleString("secret".to_owned()), "a status"),
        (Value::Double(0.5), "something else"),
    ] {
        let error = unexpected(&value);
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
        let source = error.source().unwrap().to_string();
        assert_eq!(source, format!("the server answered {shape}"));
    }
}
