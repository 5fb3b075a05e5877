//! What needs no server.
#![allow(clippy::unwrap_used)]

use std::{
    collections::VecDeque,
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::join_all;

use redis::{Arg, Cmd, Pipeline, RedisError, RedisFuture, RedisResult, Value, aio::ConnectionLike};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout_at},
};

use super::{
    RedisStore, RedisStoreBuilder, Said, address,
    connection::{Connection, Settings},
    flight::{Flight, Kind, Landed, Replicas},
    outbox::Outbox,
    piece::{self, Parcel},
    tls::Certificates,
    together::{Asked, PATIENCE},
    way::Way,
};
use crate::error::StoreErrorKind;

/// Answers as it is told to, each time it is asked; with nothing after the last.
#[derive(Clone, Default)]
struct Told {
    answers: Arc<Mutex<VecDeque<RedisResult<Value>>>>,
    asked: Arc<Mutex<Vec<Instant>>>,
    /// How many commands came at once. Each is answered with its last argument.
    pieces: Arc<Mutex<Vec<usize>>>,
    /// Answers nobody.
    is_silent: Arc<AtomicBool>,
}

impl Told {
    fn to(answers: impl IntoIterator<Item = RedisResult<Value>>) -> Self {
        let told = Self::default();
        told.answers.lock().unwrap().extend(answers);
        told
    }

    fn asked(&self) -> Vec<Instant> {
        self.asked.lock().unwrap().clone()
    }

    fn pieces(&self) -> Vec<usize> {
        self.pieces.lock().unwrap().clone()
    }

    async fn unless_silent<T>(&self, answer: T) -> T {
        match self.is_silent.load(Relaxed) {
            true => pending().await,
            false => answer,
        }
    }
}

impl ConnectionLike for Told {
    fn req_packed_command<'a>(&'a mut self, _: &'a Cmd) -> RedisFuture<'a, Value> {
        self.asked.lock().unwrap().push(Instant::now());
        let answer = self.answers.lock().unwrap().pop_front();
        let nothing = Value::BulkString(Vec::new());
        Box::pin(self.unless_silent(answer.unwrap_or(Ok(nothing))))
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        commands: &'a Pipeline,
        _: usize,
        _: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        self.pieces.lock().unwrap().push(commands.len());
        let last = |command: &Cmd| match command.args_iter().last() {
            Some(Arg::Simple(last)) => Value::BulkString(last.to_vec()),
            _ => Value::Nil,
        };
        let answers = commands.cmd_iter().map(last).collect();
        Box::pin(self.unless_silent(Ok(answers)))
    }

    fn get_db(&self) -> i64 {
        0
    }
}

fn broken() -> RedisResult<Value> {
    Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe).into())
}

fn says(info: &str) -> RedisResult<Value> {
    Ok(Value::BulkString(info.into()))
}

#[test]
fn a_way_is_known_by_its_url_for_what_it_can_do() {
    let abilities = |way: &Way| [way.is_cluster(), way.has_ears(), way.mends_itself()];
    let by = |url| address::way(url, &Certificates::default()).unwrap();
    assert_eq!(abilities(&by("redis://localhost")), [false, true, false]);
    assert_eq!(abilities(&by("redis+sentinel://localhost/main")), [false, true, false]);
    assert_eq!(abilities(&by("redis+cluster://localhost")), [true, true, true]);
    // What is published is not heard there.
    assert_eq!(abilities(&Way::Own(Box::new(Told::default()))), [false, false, true]);
}

#[test]
fn what_a_script_says_without_a_time_to_live_has_none() {
    let read = |parts| Said::read(Value::Array(parts)).map(|said| (said.what, said.value, said.left));
    let bytes = || Value::BulkString(b"x".to_vec());
    assert_eq!(read(vec![Value::Int(1)]).unwrap(), (1, None, -1));
    assert_eq!(
        read(vec![Value::Int(3), bytes()]).unwrap(),
        (3, Some(b"x".to_vec()), -1)
    );
    assert_eq!(
        read(vec![Value::Int(0), bytes(), Value::Int(7)]).unwrap(),
        (0, Some(b"x".to_vec()), 7)
    );
    for wrong in [vec![], vec![bytes()], vec![Value::Int(1), Value::Int(1)]] {
        assert_eq!(read(wrong).unwrap_err().kind(), StoreErrorKind::Unavailable);
    }
    assert!(Said::read(Value::Int(1)).is_err());
}

#[tokio::test]
async fn a_store_says_what_its_keys_begin_with_and_no_secret_of_its_own() {
    let builder = RedisStoreBuilder::default().prefix("shop:");
    #[cfg(feature = "redis-tls")]
    let builder = builder.client_certificate("a certificate", "a secret key");
    assert!(!format!("{builder:?}").contains("secret") && format!("{builder:?}").contains("Certificates(..)"));
    let store: RedisStore = builder.connect_with(Told::default()).await.unwrap();
    let said = format!("{store:?}");
    assert!(said.starts_with("RedisStore {") && said.contains("shop:"), "{said}");
}

/// By default one that works for ever.
fn connection(told: &Told, timeout: Duration) -> Connection {
    let settings = Settings {
        timeout,
        refuse_forgetful_server: false,
        replicas: None,
    };
    Connection::new(Arc::new(Way::Own(Box::new(told.clone()))), settings)
}

/// A step of so many bytes, and so many that are asked before it.
fn step(kind: Kind, length: usize, before: usize) -> Flight {
    Flight {
        before: (before > 0).then(|| Box::new(redis::cmd("PTTL").arg(vec![b'x'; before - 4]).clone())),
        step: redis::cmd("SET").arg(vec![b'x'; length - 3]).clone(),
        key_at: 1,
        after: None,
        kind,
    }
}

#[test]
fn short_steps_go_together_when_others_are_under_way_to_one_server_of_which_no_replica_is_waited_for() {
    let outbox = |way, replicas| {
        let settings = Settings {
            timeout: Duration::from_secs(1),
            refuse_forgetful_server: false,
            replicas,
        };
        Outbox::new(Arc::new(Connection::new(Arc::new(way), settings)))
    };
    let single = || Way::Single(redis::Client::open("redis://127.0.0.1:1").unwrap());
    let alone = outbox(single(), None);
    let shares = |kind, length, before, others| alone.shares(&step(kind, length, before), others);
    assert!(shares(Kind::Change, 16 * 1024, 0, 2));
    assert!(shares(Kind::Change, 8 * 1024, 8 * 1024, 99));
    assert!(!shares(Kind::Change, 100, 0, 1), "nobody to go with");
    assert!(shares(Kind::Read, 100, 0, 2), "a replay");
    assert!(!shares(Kind::LongRead, 100, 0, 99), "a replay of a long answer");
    assert!(!shares(Kind::Change, 16 * 1024 + 1, 0, 99), "long");
    assert!(
        !shares(Kind::Change, 8 * 1024, 8 * 1024 + 1, 99),
        "long, with what is asked before"
    );
    let replicas = Replicas {
        count: 1,
        within: Duration::from_secs(1),
    };
    assert!(!outbox(single(), Some(replicas)).shares(&step(Kind::Change, 100, 0), 99));
    let cluster = redis::cluster::ClusterClient::new(["redis://127.0.0.1:1"]).unwrap();
    for way in [Way::Cluster(Box::new(cluster)), Way::Own(Box::new(Told::default()))] {
        assert!(!outbox(way, None).shares(&step(Kind::Change, 100, 0), 99));
    }
}

async fn ask(connection: &Connection) -> RedisResult<Value> {
    let flight = Flight::alone(redis::cmd("PING"), 1, Kind::Change);
    connection.send(flight, connection.deadline()).await.answer
}

#[tokio::test(start_paused = true)]
async fn after_each_try_to_connect_that_fails_the_pause_is_twice_as_long_and_half_as_much_again_by_chance() {
    let tries = 8;
    let told = Told::to((0..tries).map(|_| broken()));
    let connection = connection(&told, Duration::from_secs(10));
    for _ in 0..tries {
        assert!(ask(&connection).await.is_err());
    }
    // The server is back: one more question at the opening, and then the step.
    ask(&connection).await.unwrap();
    let asked = told.asked();
    let pauses: Vec<_> = asked.windows(2).map(|two| two[1] - two[0]).collect();
    let expected = [25, 50, 100, 200, 400, 500, 500, 500].map(Duration::from_millis);
    for (pause, least) in pauses.iter().zip(expected) {
        // A timer counts whole milliseconds.
        let most = least * 3 / 2 + Duration::from_millis(2);
        assert!((least..=most).contains(pause), "{pause:?} where {least:?} is the least");
    }
    assert_eq!(pauses.len(), tries + 1);
    // It begins with the shortest again.
    assert_eq!(pauses.last(), Some(&Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_has_ended_is_given_up_once_and_the_next_one_is_used() {
    // The questions at its opening, and a step.
    let told = Told::to([says(""), broken(), says(""), says("second"), says("third")]);
    let connection = connection(&told, Duration::from_secs(10));
    let first = ask(&connection).await;
    assert!(first.is_err());
    // Whatever it was that ended, an opening comes before the next step.
    let answers = [ask(&connection).await, ask(&connection).await];
    assert_eq!(
        answers.map(Result::unwrap),
        ["second", "third"].map(|answer| Value::BulkString(answer.into()))
    );
}

/// A step that has to be answered by then, with this.
fn asked(answer: &str, deadline: Instant) -> (Asked<Parcel, Landed>, oneshot::Receiver<Landed>) {
    let (told, said) = oneshot::channel();
    let flight = Flight::alone(redis::cmd("ECHO").arg(answer).take(), 1, Kind::Change);
    let step = Parcel { flight, deadline };
    (Asked { step, told, number: 0 }, said)
}

#[tokio::test(start_paused = true)]
async fn of_the_steps_in_a_piece_that_is_not_answered_each_is_told_so_at_its_deadline() {
    // Its connection is open, or is being opened.
    for is_open in [true, false] {
        let told = Told::default();
        let connection = Arc::new(connection(&told, Duration::from_secs(10)));
        if is_open {
            ask(&connection).await.unwrap();
        }
        told.is_silent.store(true, Relaxed);
        let start = Instant::now();
        let deadlines = [7, 300, 50].map(Duration::from_millis);
        let (steps, said): (Vec<_>, Vec<_>) = deadlines.into_iter().map(|after| asked("", start + after)).unzip();
        let heard = said.into_iter().map(async |said| {
            let landed = said.await.unwrap();
            (landed.answer.unwrap_err().is_timeout(), start.elapsed())
        });
        let (heard, ()) = tokio::join!(join_all(heard), piece::send_all(Arc::clone(&connection), steps));
        for ((is_late, after), deadline) in heard.into_iter().zip(deadlines) {
            let most = deadline + Duration::from_millis(2);
            assert!(
                is_late && (deadline..=most).contains(&after),
                "{after:?} for {deadline:?}"
            );
        }
        assert_eq!(told.pieces(), if is_open { vec![3] } else { vec![] });
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_left_goes_in_no_piece_and_a_piece_that_all_have_left_is_given_up() {
    let told = Told::default();
    let connection = Arc::new(connection(&told, Duration::from_secs(10)));
    ask(&connection).await.unwrap();
    let start = Instant::now();
    let deadline = start + Duration::from_secs(10);
    let (steps, mut said): (Vec<_>, Vec<_>) = ["first", "second", "third", "late"]
        .into_iter()
        .map(|name| asked(name, if name == "late" { start } else { deadline }))
        .unzip();
    drop(said.remove(1));
    piece::send_all(Arc::clone(&connection), steps).await;
    let answers = join_all(said).await.into_iter().map(|landed| landed.unwrap().answer);
    let answers: Vec<_> = answers.collect();
    let is = |answer: &RedisResult<Value>, name: &str| *answer == Ok(Value::BulkString(name.into()));
    assert!(is(&answers[0], "first") && is(&answers[1], "third"), "{answers:?}");
    assert!(answers[2].as_ref().is_err_and(RedisError::is_timeout), "{answers:?}");
    let (alone, said) = asked("", deadline);
    drop(said);
    piece::send_all(Arc::clone(&connection), vec![alone]).await;
    assert_eq!(told.pieces(), [2], "where nobody is left nothing goes");
    told.is_silent.store(true, Relaxed);
    let (left, said) = asked("", deadline);
    let leaves = async {
        tokio::task::yield_now().await;
        drop(said);
    };
    tokio::join!(piece::send_all(connection, vec![left]), leaves);
    assert_eq!(told.pieces(), [2, 1]);
    assert!(start.elapsed() <= PATIENCE * 2, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_answers_no_piece_in_time_is_given_up_whoever_notices() {
    let told = Told::default();
    let timeout = Duration::from_millis(10);
    let connection = Arc::new(connection(&told, timeout));
    ask(&connection).await.unwrap();
    told.is_silent.store(true, Relaxed);
    // The second is late for longer than a connection is borne that mends itself.
    for pause in [0, 50] {
        sleep(Duration::from_millis(pause)).await;
        let deadline = Instant::now() + timeout;
        let (step, said) = asked("", deadline);
        // By a timer of its own, which is set before that of the piece.
        let leaves = tokio::spawn(async move { drop(timeout_at(deadline, said).await) });
        tokio::task::yield_now().await;
        let sent = tokio::spawn(piece::send_all(Arc::clone(&connection), vec![step]));
        leaves.await.unwrap();
        sent.await.unwrap();
    }
    told.is_silent.store(false, Relaxed);
    let before = told.asked().len();
    // There is a pause before the opening.
    while ask(&connection).await.is_err() {}
    assert_eq!(told.asked().len(), before + 2, "a question at an opening, and the step");
}

#[tokio::test]
async fn a_server_that_is_too_old_is_refused_whatever_its_version_is_made_of() {
    let connect = async |info: &str| {
        let told = Told::to([says(info)]);
        let opened = RedisStoreBuilder::default().connect_with(told).await;
        opened.map(drop).map_err(|error| error.kind())
    };
    for (version, works) in [
        ("6.2.14", false),
        ("6.9.0", false),
        ("7.0.0", true),
        ("7.2.4", true),
        ("8.0.1", true),
        ("10.1.0", true),
        ("unknown", true),
    ] {
        let connected = connect(&format!("redis_version:{version}\r\n")).await;
        let expected = if works { Ok(()) } else { Err(StoreErrorKind::Other) };
        assert_eq!(connected, expected, "{version}");
    }
}

#[tokio::test]
async fn a_server_that_may_not_be_asked_what_it_is_is_used_and_one_that_fails_is_not() {
    let no = |code: &'static str| Err(redis::make_extension_error(code.to_owned(), None));
    let connect = async |answer| {
        let opened = RedisStoreBuilder::default().connect_with(Told::to([answer])).await;
        opened.map(drop).map_err(|error| error.kind())
    };
    assert_eq!(connect(no("NOPERM")).await, Ok(()));
    assert_eq!(connect(no("WRONGPASS")).await, Err(StoreErrorKind::Other));
    assert_eq!(connect(broken()).await, Err(StoreErrorKind::Unavailable));
}
