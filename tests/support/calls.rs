//! Calls to the demo that tests of several providers make.

use std::{io::Write, net::TcpStream};

use serde_json::Value;

use super::{
    demo::Demo,
    http::{Answer, get, post, send},
};

/// So long that a handler under it is still running when its test ends; a header of the demo's.
pub const ENDLESS: (&str, &str) = ("x-demo-delay-ms", "3600000");

/// The answer to a POST.
pub async fn to(demo: &Demo, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    send(demo.address(), post(path, headers, body.to_owned()))
        .await
        .expect("an answer")
}

/// What really happened, newest first.
pub async fn effects(demo: &Demo) -> Vec<Value> {
    let ledger = get(demo.address(), "/ledger").await;
    assert_eq!(ledger.header("content-type"), Some("application/json"));
    ledger.json()["effects"].as_array().expect("a list").clone()
}

/// Until this many handlers have been started.
pub async fn executed(demo: &Demo, handlers: usize) {
    let line = format!("\nidempotency_executed_total {handlers}\n");
    while !String::from_utf8_lossy(&get(demo.address(), "/metrics").await.body).contains(&line) {
        tokio::task::yield_now().await;
    }
}

/// Sends a request, which is to be the first that runs, from a client that is gone once its handler has started.
pub async fn send_and_leave(demo: &Demo, path: &str, headers: &[(&str, &str)], body: &str) {
    let mut client = TcpStream::connect(demo.address()).expect("somebody listens");
    let mut request = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\nx-demo-delay-ms: 100\r\n");
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    request += &format!("content-length: {}\r\n\r\n{body}", body.len());
    client.write_all(request.as_bytes()).expect("it is sent");
    executed(demo, 1).await;
}

/// The only effect, which the answer tells of.
pub async fn assert_one_effect(demo: &Demo, answer: &Answer) {
    let effects = effects(demo).await;
    assert_eq!(effects.len(), 1, "{effects:?}");
    assert_eq!(effects[0]["id"], answer.json()["id"]);
}
