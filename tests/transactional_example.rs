//! The example of a transaction, run as a process of its own against a server, and asked what it says one should ask.
#![cfg(feature = "sqlx")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
};

use http::StatusCode;
use support::{
    demo,
    http::{post, send},
    postgres::Postgres,
    serve::assert_replay,
};

const SOURCE: &str = include_str!("../examples/transaction.rs");

struct Example(Child);

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What stands between these in the example's own words.
fn between<'s>(start: &str, end: &str) -> &'s str {
    let (_, rest) = SOURCE.split_once(start).expect("it says so");
    rest.split_once(end).expect("it ends").0
}

#[tokio::test]
async fn what_a_retry_pays_twice_happens_once_in_the_layers_transaction() {
    let server = Postgres::start(&[]);
    let program = demo::program().with_file_name(format!("transaction{}", std::env::consts::EXE_SUFFIX));
    let mut command = Command::new(program);
    command.args([&server.url(), "127.0.0.1:0"]).stdout(Stdio::piped());
    let mut example = Example(command.spawn().expect("cargo builds it with the tests"));
    let mut lines = BufReader::new(example.0.stdout.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    let address: SocketAddr = line.rsplit_once("http://").unwrap().1.parse().unwrap();

    // As the command at its beginning.
    let path = between("curl -i 127.0.0.1:3000", " ");
    let (name, key) = between("-H '", "'").split_once(": ").unwrap();
    let order = between("-d '", "'");
    let send_order = async |path: &str, key: &str, order: &str| {
        let request = post(
            path,
            &[("content-type", "application/json"), (name, key)],
            order.to_owned(),
        );
        send(address, request).await.unwrap()
    };
    let ask = async |path: &str| send_order(path, key, order).await;
    let balance = "SELECT balance FROM accounts WHERE id = 2";
    let mut expected = 1000;
    for (path, amount) in [(path, 5), ("/sqlx/transfers", 5)] {
        expected += amount;
        let first = ask(path).await;
        assert_eq!(first.status, StatusCode::CREATED, "{path} {first:?}");
        assert_replay(&first, &ask(path).await);
        assert_eq!(server.ask::<i64>(balance).await, expected, "{path}: once");
    }
    for _ in 0..2 {
        expected += 5;
        assert_eq!(ask("/unsafe").await.status, StatusCode::CREATED);
        assert_eq!(server.ask::<i64>(balance).await, expected, "each time");
    }
    let money = "SELECT sum(balance)::bigint FROM accounts";
    for (key, order) in [
        ("to-nobody", r#"{"from":1,"to":9,"amount":5}"#),
        ("backwards", r#"{"from":1,"to":2,"amount":-5}"#),
    ] {
        for path in [path, "/sqlx/transfers", "/unsafe"] {
            let refused = send_order(path, key, order).await;
            assert_eq!(
                refused.status,
                StatusCode::UNPROCESSABLE_ENTITY,
                "{path} {key}: {refused:?}"
            );
            assert_eq!(server.ask::<i64>(money).await, 2000, "{path} {key}");
            assert_eq!(server.ask::<i64>(balance).await, expected, "{path} {key}");
        }
    }
}
