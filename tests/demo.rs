//! The demo server as a process, over real sockets, by its fixed interface.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::Duration,
};

use http::StatusCode;
use serde_json::{Value, json};
use support::{
    demo::{self, Demo, ENDLESS},
    http::{Answer, get, post, send},
};

async fn pay(demo: &Demo, headers: &[(&str, &str)], body: &str) -> Answer {
    demo.post("/payments", headers, body).await
}

/// Each operation, where its key is sent, and the status of its replays.
const ROUTES: [(&str, &str, u16); 11] = [
    ("/payments", "idempotency-key", 201),
    ("/v3/check/digital", "idempotency-key", 201),
    ("/v3/payouts/pay", "pockyt-request-id", 201),
    ("/v3/payouts/refund", "pockyt-request-id", 201),
    // In the body.
    ("/v1/payment/orders", "x-nothing", 201),
    ("/v1/payment/orders/authorization", "x-nothing", 201),
    ("/v1/payment/orders/refund", "x-nothing", 201),
    ("/v1/subscription/create", "x-nothing", 201),
    ("/v1/mor/session/create", "x-nothing", 201),
    ("/v1/card/bind", "x-nothing", 201),
    ("/checkout/v1/payment", "x-request-id", 409),
];

#[tokio::test]
async fn every_route_creates_once_and_replays_what_it_answered() {
    let demo = Demo::start(&[]);
    for (route, header, replayed_as) in ROUTES {
        let body = format!(r#"{{"reference_id":"{route}","amount":"5.00"}}"#);
        let first = demo.post(route, &[(header, "k")], &body).await;
        assert_eq!(
            (first.status, first.is_replay()),
            (StatusCode::CREATED, false),
            "{route}"
        );
        let replay = demo.post(route, &[(header, "k")], &body).await;
        assert_eq!(
            (replay.status.as_u16(), replay.is_replay(), &replay.body),
            (replayed_as, true, &first.body)
        );
        let effects = demo.effects().await;
        assert_eq!(
            (&effects[0]["route"], &effects[0]["id"]),
            (&json!(route), &first.json()["id"])
        );
        assert_eq!(effects[0]["request"]["reference_id"], route);
        assert!(effects[0]["at"].is_string());
    }
    assert_eq!(demo.effects().await.len(), ROUTES.len());
}

#[tokio::test]
async fn payments_require_a_key_and_belong_to_the_authorization() {
    let demo = Demo::start(&[]);
    let missing = pay(&demo, &[], "{}").await;
    assert_eq!(
        (missing.status, missing.problem()),
        (StatusCode::BAD_REQUEST, "idempotency-key-missing".to_owned())
    );
    let alice = pay(&demo, &[("idempotency-key", "k"), ("authorization", "alice")], "{}").await;
    let bob = pay(&demo, &[("idempotency-key", "k"), ("authorization", "bob")], "{}").await;
    assert_ne!(alice.json()["id"], bob.json()["id"]);
    let other = pay(
        &demo,
        &[("idempotency-key", "k"), ("authorization", "bob")],
        "{\"amount\":1}",
    )
    .await;
    assert_eq!(
        (other.status.as_u16(), &*other.problem()),
        (422, "idempotency-key-reused")
    );
    assert_eq!(demo.effects().await.len(), 2);
}

#[tokio::test]
async fn the_ledger_shows_requests_as_they_were_sent_newest_first() {
    let demo = Demo::start(&[]);
    for (key, body) in [
        ("a", "{\"amount\": 500.00,\n \"a\":1}"),
        ("b", "{\"z\":1e2, \"a\":12345678901234567890123}"),
    ] {
        assert_eq!(
            pay(&demo, &[("idempotency-key", key)], body).await.status,
            StatusCode::CREATED
        );
    }
    let ledger = get(demo.address(), "/ledger").await;
    let text = String::from_utf8(ledger.body.to_vec()).unwrap();
    let newer = text
        .find("{\"z\":1e2, \"a\":12345678901234567890123}")
        .expect("as it was sent");
    let older = text.find("{\"amount\": 500.00,\n \"a\":1}").expect("as it was sent");
    assert!(newer < older);
}

#[tokio::test]
async fn each_effect_is_in_the_ledger_file_before_it_is_answered_and_survives_a_kill() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ledger.jsonl");
    let path = file.to_str().unwrap();
    let mut shown = Vec::new();
    for start in 0..2 {
        let demo = Demo::start(&["--ledger", path]);
        for number in 0..10 {
            let key = format!("{start}-{number}");
            let answer = pay(&demo, &[("idempotency-key", &key)], "{\"a\":1,\n\"b\":2}").await;
            assert_eq!(answer.status, StatusCode::CREATED);
        }
        let mut effects = demo.effects().await;
        effects.reverse();
        shown.extend(effects);
        demo.kill();
        let lines = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines, shown, "the same objects, one on each line");
    }
}

#[tokio::test]
async fn faults_come_on_demand_and_before_the_effect() {
    let demo = Demo::start(&[]);
    let with = |key, fault| vec![("idempotency-key", key), fault];
    let kept = pay(&demo, &with("kept", ("x-demo-status", "500")), "{}").await;
    assert_eq!(kept.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(
        pay(&demo, &[("idempotency-key", "kept")], "{}").await.is_replay(),
        "faults are not in the fingerprint"
    );
    let freed = pay(&demo, &with("freed", ("x-demo-status", "503")), "{}").await;
    assert_eq!(freed.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(demo.effects().await.len(), 0);
    assert_eq!(
        pay(&demo, &[("idempotency-key", "freed")], "{}").await.status,
        StatusCode::CREATED
    );
    let panicked = post("/payments", &with("panicked", ("x-demo-panic", "1")), "{}");
    assert!(send(demo.address(), panicked).await.is_err(), "the connection breaks");
    assert_eq!(
        pay(&demo, &[("idempotency-key", "panicked")], "{}").await.problem(),
        "outcome-unknown"
    );
    let padded = pay(&demo, &with("padded", ("x-demo-response-bytes", "5000")), "{}").await;
    assert_eq!(padded.body.len(), 5000, "no more than it has to be");
    assert_eq!(
        pay(&demo, &[("idempotency-key", "padded")], "{}").await.body,
        padded.body
    );
    let huge = pay(&demo, &with("huge", ("x-demo-response-bytes", "2000000")), "{}").await;
    assert!(huge.body.len() >= 2_000_000);
    let retry = pay(&demo, &[("idempotency-key", "huge")], "{}").await;
    assert_eq!(
        (retry.problem(), &retry.json()["original_status"]),
        ("response-not-kept".to_owned(), &json!(201))
    );
    for (key, fault) in [
        ("late", ("x-demo-delay-ms", "soon")),
        ("early", ("x-demo-status", "100")),
        ("unknown", ("x-demo-status", "1000")),
        ("endless", ("x-demo-response-bytes", "1000000000000")),
    ] {
        let answer = pay(&demo, &with(key, fault), "{}").await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{fault:?}");
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    }
    for status in ["204", "205", "304"] {
        let bare = pay(&demo, &with(status, ("x-demo-status", status)), "{}").await;
        assert_eq!((bare.status.as_str(), bare.body.len()), (status, 0));
        assert!(matches!(bare.header("content-length"), None | Some("0")), "{status}");
    }
    assert_eq!(demo.effects().await.len(), 3);
}

#[tokio::test]
async fn a_pockyt_payout_that_was_lost_runs_again() {
    let demo = Demo::start(&[]);
    let panicking = [("pockyt-request-id", "k"), ("x-demo-panic", "1")];
    assert!(
        send(demo.address(), post("/v3/payouts/pay", &panicking, "{}"))
            .await
            .is_err()
    );
    let second = demo.post("/v3/payouts/pay", &[("pockyt-request-id", "k")], "{}").await;
    assert_eq!(
        (second.status, &second.json()["attempt"]),
        (StatusCode::CREATED, &json!(2))
    );
}

#[tokio::test]
async fn bodies_that_cannot_be_paid_have_no_effect() {
    let demo = Demo::start(&[]);
    let amounts = ["0", "-5", "\"much\"", "null", "1e999"].map(|amount| format!("{{\"amount\":{amount}}}"));
    let others = ["", "nonsense", "[]", "1", "{} {}"].map(str::to_owned);
    for (number, body) in amounts.iter().chain(&others).enumerate() {
        let answer = pay(&demo, &[("idempotency-key", &number.to_string())], body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body:?}");
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    }
    for (route, header, body) in [
        ("/checkout/v1/payment", "x-request-id", r#"{"order":{"amount":-5}}"#),
        (
            "/v1/payment/orders/refund",
            "x-nothing",
            r#"{"reference_id":"a","amount":{"value":"-5"}}"#,
        ),
        (
            "/v1/payment/orders",
            "x-nothing",
            r#"{"reference_id":"b","purchase_units":[{"amount":{"value":"0"}}]}"#,
        ),
    ] {
        let answer = demo.post(route, &[(header, "k")], body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body:?}");
    }
    let too_large = format!("{{\"a\":\"{}\"}}", "x".repeat(1 << 20));
    assert_eq!(
        pay(&demo, &[("idempotency-key", "k")], &too_large).await.problem(),
        "request-body-too-large"
    );
    assert_eq!(demo.effects().await.len(), 0);
}

#[tokio::test]
async fn a_client_that_is_killed_in_mid_request_gets_the_answer_on_its_retry() {
    let demo = Demo::start(&[]);
    let mut client = TcpStream::connect(demo.address()).unwrap();
    let request = "POST /payments HTTP/1.1\r\nhost: localhost\r\nidempotency-key: k\r\nx-demo-delay-ms: 200\r\n\
                   content-length: 2\r\n\r\n{}";
    client.write_all(request.as_bytes()).unwrap();
    demo.until_executed(1).await;
    drop(client);
    let retry = demo.settled("/payments", &[("idempotency-key", "k")], "{}").await;
    assert_eq!((retry.status, retry.is_replay()), (StatusCode::CREATED, true));
    assert_eq!(demo.effects().await.len(), 1);
}

#[tokio::test]
async fn a_retention_overrides_every_routes_own() {
    let demo = Demo::start(&["--retention", "1ms"]);
    for (route, header) in [
        ("/payments", "idempotency-key"),
        ("/v3/payouts/refund", "pockyt-request-id"),
    ] {
        let first = demo.post(route, &[(header, "k")], "{}").await;
        let expired = |next: &Answer| !next.is_replay();
        let next = demo.until(route, &[(header, "k")], "{}", expired).await;
        assert_eq!(next.status, StatusCode::CREATED);
        assert_ne!(next.body, first.body, "it expired: this is a new operation");
    }
}

#[tokio::test]
async fn the_metrics_count_what_happened() {
    let demo = Demo::start(&[]);
    pay(&demo, &[("idempotency-key", "k")], "{}").await;
    pay(&demo, &[("idempotency-key", "k")], "{}").await;
    pay(&demo, &[("idempotency-key", "k")], "{\"a\":1}").await;
    let metrics = get(demo.address(), "/metrics").await;
    assert!(
        metrics
            .header("content-type")
            .unwrap()
            .starts_with("text/plain; version=0.0.4")
    );
    let text = String::from_utf8(metrics.body.to_vec()).unwrap();
    for line in [
        "# TYPE idempotency_executed_total counter",
        "idempotency_executed_total 1",
        "idempotency_replayed_total 1",
        "idempotency_refused_total 1",
        "idempotency_records 1",
        "demo_effects_total 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} is not in\n{text}");
    }
}

#[tokio::test]
async fn the_page_is_served_at_the_root() {
    let demo = Demo::start(&[]);
    let page = get(demo.address(), "/").await;
    assert_eq!(page.status, StatusCode::OK);
    assert!(page.header("content-type").unwrap().starts_with("text/html"));
}

#[tokio::test]
async fn a_graceful_stop_finishes_what_outlived_its_client() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ledger.jsonl");
    let demo = Demo::start(&["--ledger", file.to_str().unwrap()]);
    let mut client = TcpStream::connect(demo.address()).unwrap();
    let request = "POST /payments HTTP/1.1\r\nhost: localhost\r\nidempotency-key: k\r\nx-demo-delay-ms: 500\r\n\
                   content-length: 2\r\n\r\n{}";
    client.write_all(request.as_bytes()).unwrap();
    demo.until_executed(1).await;
    drop(client);
    assert!(demo.stop().success());
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 1);
}

/// The status of what comes next.
fn read_status(stream: &mut TcpStream) -> String {
    let mut line = [0; 12];
    stream.read_exact(&mut line).unwrap();
    String::from_utf8_lossy(&line[9..]).into_owned()
}

#[tokio::test]
async fn who_writes_all_of_a_large_body_before_reading_learns_why_it_was_refused() {
    let demo = Demo::start(&[]);
    let body = vec![b'x'; 8 << 20];
    let sized = format!("content-length: {}\r\n\r\n", body.len());
    let chunked = format!("transfer-encoding: chunked\r\n\r\n{:x}\r\n", body.len());
    for (key, head, end, status) in [
        ("idempotency-key: k\r\n", &sized, "", "413"),
        ("idempotency-key: k\r\n", &chunked, "\r\n0\r\n\r\n", "413"),
        ("", &sized, "", "400"),
    ] {
        let mut stream = TcpStream::connect(demo.address()).unwrap();
        write!(stream, "POST /payments HTTP/1.1\r\nhost: localhost\r\n{key}{head}").unwrap();
        stream.write_all(&body).expect("it is read to its end");
        stream.write_all(end.as_bytes()).unwrap();
        assert_eq!(read_status(&mut stream), status, "{head}");
    }
    // Who asked whether to send it, and was told so, as nobody knew how large it would be.
    let mut stream = TcpStream::connect(demo.address()).unwrap();
    let asks = "POST /payments HTTP/1.1\r\nhost: localhost\r\nidempotency-key: k\r\nexpect: 100-continue\r\n";
    stream.write_all(format!("{asks}{chunked}").as_bytes()).unwrap();
    assert_eq!(read_status(&mut stream), "100");
    stream.read_exact(&mut [0; "Continue\r\n\r\n".len() + 1]).unwrap();
    stream.write_all(&body).expect("it is read to its end");
    stream.write_all(b"\r\n0\r\n\r\n").unwrap();
    assert_eq!(read_status(&mut stream), "413");
    // Who asks first need not send it.
    let mut stream = TcpStream::connect(demo.address()).unwrap();
    stream.write_all(format!("{asks}{sized}").as_bytes()).unwrap();
    assert_eq!(read_status(&mut stream), "413");
    assert!(demo.effects().await.is_empty());
}

/// Long enough for what is open below; how long exactly is the demo's own affair.
async fn until_it_ends(demo: Demo) -> std::process::ExitStatus {
    let stopped = tokio::task::spawn_blocking(|| demo.stop());
    let stopped = tokio::time::timeout(Duration::from_secs(60), stopped).await;
    stopped.expect("it ends, whatever is still open").unwrap()
}

#[cfg(unix)]
#[tokio::test]
async fn a_graceful_stop_ends_although_clients_are_still_connected_and_a_file_does_not_take_what_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // Somebody has it open and never reads.
    let reader = std::fs::File::options().read(true).write(true).open(&pipe).unwrap();
    let demo = Demo::start(&["--ledger", pipe.to_str().unwrap()]);
    let open = |request: &str| {
        let mut client = TcpStream::connect(demo.address()).unwrap();
        client.write_all(request.as_bytes()).unwrap();
        client
    };
    let head = "POST /payments HTTP/1.1\r\nhost: localhost\r\nidempotency-key: k\r\n";
    let clients = [
        open(&format!(
            "{head}content-length: 2\r\n{}: {}\r\n\r\n{{}}",
            ENDLESS.0, ENDLESS.1
        )),
        open(&format!("{head}content-length: 2\r\n\r\n{{")),
        open("POST /payments HTTP/1.1\r\n"),
    ];
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(200_000));
    tokio::spawn(send(
        demo.address(),
        post("/payments", &[("idempotency-key", "written")], large),
    ));
    demo.until_executed(2).await;
    assert!(demo.effects().await.is_empty(), "others are served meanwhile");
    assert!(until_it_ends(demo).await.success());
    drop((clients, reader));
}

#[cfg(unix)]
#[tokio::test]
async fn a_stop_that_is_asked_for_again_waits_for_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let said = directory.path().join("said");
    let mut command = Demo::command();
    command
        .args(["--store", "memory"])
        .stderr(std::fs::File::create(&said).unwrap());
    let demo = Demo::run(command);
    demo.occupy("/payments", &[("idempotency-key", "k")], "{}").await;
    // Of another kind: two of one kind may arrive as one.
    let interrupted = Command::new("kill")
        .args(["-INT", &demo.id().to_string()])
        .status()
        .unwrap();
    assert!(interrupted.success());
    assert!(until_it_ends(demo).await.success());
    let said = std::fs::read_to_string(&said).unwrap();
    assert!(said.contains("asked for again"), "{said:?}");
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_effect_that_cannot_be_written_to_the_file_is_none() {
    let demo = Demo::start(&["--ledger", "/dev/full"]);
    let headers = [("idempotency-key", "k")];
    for _ in 0..2 {
        // Checkbook keeps successes only, so the second one runs again.
        let answer = demo.post("/v3/check/digital", &headers, "{}").await;
        assert_eq!(
            (answer.status, answer.is_replay()),
            (StatusCode::INTERNAL_SERVER_ERROR, false)
        );
    }
    assert!(demo.effects().await.is_empty());
}

#[test]
fn the_demo_listens_on_a_name_too() {
    let mut command = Command::new(demo::program());
    command.args(["--listen", "localhost:0", "--store", "memory"]);
    drop(Demo::run(command));
}

#[test]
fn the_command_line_explains_itself_and_its_mistakes() {
    let run = |options: &[&str]| Command::new(demo::program()).args(options).output().unwrap();
    for help in ["-h", "--help"] {
        let output = run(&[help]);
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        for option in [
            "--listen",
            "--store",
            "--retention",
            "--ledger",
            "x-demo-delay-ms",
            "x-demo-panic",
        ] {
            assert!(text.contains(option), "{option} is not explained");
        }
    }
    for (options, code, complaint) in [
        (&["--nonsense"][..], 2, "--nonsense"),
        (&["--store", "nonsense:"], 2, "nonsense"),
        (&["--store", "mysql:app:hunter2@localhost"], 2, "mysql"),
        (&["--store", "Postgres://app:hunter2@localhost"], 2, "Postgres"),
        (&["--retention", "soon"], 2, "soon"),
        (&["--listen", "nowhere"], 2, "nowhere"),
        (
            &["--ledger", "/nonexistent/directory/ledger"],
            1,
            "/nonexistent/directory/ledger",
        ),
        (&["--listen", "192.0.2.1:1"], 1, "192.0.2.1:1"),
    ] {
        let output = run(options);
        assert_eq!(output.status.code(), Some(code), "{options:?}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(complaint), "{error:?} does not name {complaint:?}");
        assert!(!error.contains("hunter2"), "{error:?} has the password");
    }
}

#[test]
fn raw_requests_that_hyper_lets_through_are_refused() {
    let demo = Demo::start(&[]);
    let ask = |lines: &[u8]| {
        let mut stream = TcpStream::connect(demo.address()).unwrap();
        let mut request =
            b"POST /payments HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 2\r\n".to_vec();
        request.extend_from_slice(lines);
        request.extend_from_slice(b"\r\n{}");
        stream.write_all(&request).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let long = [b"idempotency-key: ", &b"k".repeat(10_000)[..], b"\r\n"].concat();
    for lines in [
        &b"idempotency-key:\r\n"[..],
        b"idempotency-key: \"\"\r\n",
        b"idempotency-key: \xff\r\n",
        "idempotency-key: schl\u{fc}ssel\r\n".as_bytes(),
        b"idempotency-key: a\r\nidempotency-key: b\r\n",
        b"idempotency-key: a\r\nIdempotency-Key: a\r\n",
        b"idempotency-key: a, b\r\n",
        b"idempotency-key: \"a\";x=1\r\n",
        &long,
    ] {
        let answer = ask(lines);
        assert!(
            answer.starts_with("HTTP/1.1 400 "),
            "{:?}: {answer}",
            String::from_utf8_lossy(lines)
        );
        assert!(answer.contains("#idempotency-key-invalid"), "{answer}");
    }
    assert!(ask(b"idempotency-key: good\r\n").starts_with("HTTP/1.1 201 "));
}
