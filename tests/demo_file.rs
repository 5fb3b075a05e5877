//! The demo server with its records in a file: over restarts, and killed in the middle of its work.
#![cfg(feature = "file")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::HashMap,
    env::consts::EXE_SUFFIX,
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use http::StatusCode;
use serde_json::Value;
use support::{
    demo::{self, Demo},
    http::{Answer, post, send, send_over},
};
use tokio::net::TcpStream;

fn options<'a>(store: &'a str, ledger: &'a str) -> [&'a str; 4] {
    ["--store", store, "--ledger", ledger]
}

async fn pay(demo: &Demo, key: &str) -> Option<Answer> {
    let body = format!("{{\"reference\":\"{key}\"}}");
    send(demo.address(), post("/payments", &[("idempotency-key", key)], body))
        .await
        .ok()
}

/// What is in the ledger's file: for each key the ids of its effects. A last line that was cut is no effect that was
/// answered.
fn effects(ledger: &Path) -> HashMap<String, Vec<String>> {
    let mut effects: HashMap<String, Vec<String>> = HashMap::new();
    for line in std::fs::read_to_string(ledger).unwrap().lines() {
        let Ok(effect) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        effects
            .entry(text(&effect["request"]["reference"]))
            .or_default()
            .push(text(&effect["id"]));
    }
    effects
}

#[tokio::test]
async fn the_default_store_is_a_file_in_the_data_directory_and_outlives_the_server() {
    let home = tempfile::tempdir().unwrap();
    let start = || {
        let mut command = Command::new(demo::program());
        command.args(["--listen", "127.0.0.1:0"]);
        for variable in ["XDG_DATA_HOME", "LOCALAPPDATA", "HOME"] {
            command.env(variable, home.path());
        }
        Demo::run(command)
    };
    let first = start();
    let answered = pay(&first, "k").await.unwrap();
    assert_eq!((answered.status, answered.is_replay()), (StatusCode::CREATED, false));
    #[cfg(unix)]
    assert!(first.stop().success());
    #[cfg(not(unix))]
    first.kill();
    let second = start();
    let replay = pay(&second, "k").await.unwrap();
    assert_eq!(
        (replay.status, replay.is_replay(), &replay.body),
        (StatusCode::CREATED, true, &answered.body)
    );
    if cfg!(target_os = "linux") {
        assert!(home.path().join("tower-idempotency-demo/store.redb").exists());
    }
}

#[tokio::test]
async fn a_data_directory_that_cannot_be_made_leaves_the_temporary_one() {
    let home = tempfile::tempdir().unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let no_directory = home.path().join("file");
    std::fs::write(&no_directory, "").unwrap();
    let mut command = Command::new(demo::program());
    command.args(["--listen", "127.0.0.1:0"]);
    for variable in ["XDG_DATA_HOME", "LOCALAPPDATA", "HOME"] {
        command.env(variable, &no_directory);
    }
    for variable in ["TMPDIR", "TEMP", "TMP"] {
        command.env(variable, temporary.path());
    }
    let demo = Demo::run(command);
    assert_eq!(pay(&demo, "k").await.unwrap().status, StatusCode::CREATED);
    assert!(temporary.path().join("tower-idempotency-demo/store.redb").exists());
}

#[tokio::test]
async fn a_second_server_on_the_same_file_is_told_which_file_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let store = format!("file:{}", path.display());
    let first = Demo::start(&["--store", &store]);
    for (store, path) in [
        (store.clone(), path.display().to_string()),
        (
            "file:/nonexistent/store.redb".to_owned(),
            "/nonexistent/store.redb".to_owned(),
        ),
    ] {
        let second = Command::new(demo::program())
            .args(["--listen", "127.0.0.1:0", "--store", &store])
            .output()
            .unwrap();
        assert_eq!(second.status.code(), Some(1));
        let error = String::from_utf8(second.stderr).unwrap();
        assert!(error.contains(&path), "{error:?} does not name {path:?}");
    }
    assert_eq!(
        pay(&first, "k").await.unwrap().status,
        StatusCode::CREATED,
        "the first one did not notice"
    );
    let nothing = Command::new(demo::program())
        .args(["--store", "file:"])
        .output()
        .unwrap();
    assert_eq!(nothing.status.code(), Some(2));
}

#[tokio::test]
async fn a_file_is_inspected_once_its_server_is_gone_without_keys_or_answers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let demo = Demo::start(&["--store", &format!("file:{}", path.display())]);
    let answer = pay(&demo, "a-secret-key").await.unwrap();
    let inspect = || {
        Command::new(demo::program().with_file_name(format!("inspect{EXE_SUFFIX}")))
            .arg(&path)
            .output()
            .unwrap()
    };
    let in_use = inspect();
    assert_eq!(in_use.status.code(), Some(1));
    assert!(
        String::from_utf8(in_use.stderr)
            .unwrap()
            .contains("store.redb is open already")
    );
    demo.kill();
    let inspected = inspect();
    assert!(inspected.status.success());
    let text = String::from_utf8(inspected.stdout).unwrap();
    assert!(text.starts_with("completed: 1 records, "), "{text}");
    assert!(
        text.contains("  201  attempt 1  ") && text.contains("expires in "),
        "{text}"
    );
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    assert!(!text.contains("secret") && !text.contains(&id), "{text}");
}

#[tokio::test]
async fn an_effect_after_a_line_that_was_cut_stands_on_a_line_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = directory.path().join("ledger.jsonl");
    // The second one lacks its line break alone. It was never answered either.
    for cut in [r#"{"id":"pay_"#, r#"{"id":"pay_1","request":{"reference":"cut"}}"#] {
        std::fs::write(&ledger, cut).unwrap();
        let demo = Demo::start(&["--ledger", ledger.to_str().unwrap()]);
        let answer = pay(&demo, "k").await.unwrap();
        let id = answer.json()["id"].as_str().unwrap().to_owned();
        let expected = HashMap::from([("k".to_owned(), vec![id])]);
        assert_eq!(effects(&ledger), expected, "after {cut:?}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_effect_whose_line_break_found_no_room_is_none() {
    /// What the server may write to one file, in the shell's blocks of 512 bytes.
    const LIMIT: usize = 8 * 512;
    let directory = tempfile::tempdir().unwrap();
    let ledger = directory.path().join("ledger.jsonl");
    let demo = Demo::start(&["--ledger", ledger.to_str().unwrap()]);
    // Checkbook keeps successes only, so that each of them runs.
    let ask = async |demo: &Demo| demo.post("/v3/check/digital", &[], "{}").await.status;
    assert_eq!(ask(&demo).await, StatusCode::CREATED);
    let line = std::fs::read(&ledger).unwrap().len();
    let room = LIMIT - (line - 1);
    let before = format!("{{{}}}\n", " ".repeat(room - "{}\n".len()));
    std::fs::write(&ledger, &before).unwrap();
    let mut command = Command::new("sh");
    command
        .args(["-c", r#"trap '' XFSZ; ulimit -f 8; exec "$0" "$@""#])
        .arg(demo::program())
        .args(["--listen", "127.0.0.1:0", "--store", "memory", "--ledger"])
        .arg(&ledger);
    let demo = Demo::run(command);
    for _ in 0..2 {
        assert_eq!(ask(&demo).await, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(std::fs::read_to_string(&ledger).unwrap(), before);
    }
    assert!(demo.effects().await.is_empty());
}

/// What became of every key, as the clients saw it.
#[derive(Default)]
struct Seen {
    acknowledged: HashMap<String, Bytes>,
    /// Sent, and never answered.
    open: Vec<String>,
    /// Answered with "outcome unknown".
    unknown: Vec<String>,
}

/// Clients that pay with new keys until the server dies, which happens after so many answers.
async fn work(demo: Demo, cycle: usize, kill_after: usize, seen: &Arc<Mutex<Seen>>) {
    let address = demo.address();
    let (demo, answers) = (Arc::new(Mutex::new(Some(demo))), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..6)
        .map(|client| {
            let (demo, answers, seen) = (Arc::clone(&demo), Arc::clone(&answers), Arc::clone(seen));
            tokio::spawn(async move {
                for number in 0.. {
                    let key = format!("{cycle}-{client}-{number}");
                    let body = format!("{{\"reference\":\"{key}\"}}");
                    let request = post("/payments", &[("idempotency-key", &key)], body);
                    // Without a connection it is as good as never sent, and asked for later all the same.
                    let answer = match TcpStream::connect(address).await {
                        Ok(stream) => send_over(stream, request).await.ok(),
                        Err(_) => None,
                    };
                    match answer {
                        Some(answer) => {
                            assert_eq!((answer.status, answer.is_replay()), (StatusCode::CREATED, false));
                            seen.lock().unwrap().acknowledged.insert(key, answer.body);
                        }
                        None => {
                            seen.lock().unwrap().open.push(key);
                            return;
                        }
                    }
                    if answers.fetch_add(1, SeqCst) + 1 == kill_after {
                        // While the others are in the middle of theirs.
                        let demo = demo.lock().unwrap().take().expect("it is killed once");
                        demo.kill();
                    }
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
}

/// Asks for keys that were answered before, and counts those that are answered otherwise.
async fn lost(demo: &Demo, keys: &[(String, Bytes)]) -> usize {
    let mut lost = 0;
    for (key, body) in keys {
        let replay = pay(demo, key).await.expect("the server answers");
        if !(replay.is_replay() && replay.status == StatusCode::CREATED && replay.body == *body) {
            println!("{key} was answered {body:?} and then {replay:?}");
            lost += 1;
        }
    }
    lost
}

/// `KILL_CYCLES=10000 cargo test --release --all-features --test demo_file` kills it more often.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_loses_no_answer_and_doubles_no_effect() {
    let cycles = std::env::var("KILL_CYCLES").map_or(200, |cycles| cycles.parse().expect("a number"));
    let directory = tempfile::tempdir().unwrap();
    let store = format!("file:{}", directory.path().join("store.redb").display());
    let ledger = directory.path().join("ledger.jsonl");
    let start = || Demo::start(&options(&store, ledger.to_str().unwrap()));
    let seen = Arc::new(Mutex::new(Seen::default()));
    let (mut answers_lost, mut random) = (0, 7_u64);
    let mut earlier: Vec<(String, Bytes)> = Vec::new();
    for cycle in 0..cycles {
        let demo = start();
        // All of the cycle before, some from any time, and those that were never answered.
        let latest: Vec<_> = seen.lock().unwrap().acknowledged.drain().collect();
        answers_lost += lost(&demo, &latest).await;
        earlier.extend(latest);
        for _ in 0..earlier.len().min(3) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let any = (random >> 33) as usize % earlier.len();
            answers_lost += lost(&demo, &earlier[any..=any]).await;
        }
        let open = std::mem::take(&mut seen.lock().unwrap().open);
        for key in open {
            let answer = pay(&demo, &key).await.expect("the server answers");
            match answer.status {
                StatusCode::CREATED => earlier.push((key, answer.body)),
                StatusCode::CONFLICT => {
                    assert_eq!(answer.problem(), "outcome-unknown");
                    seen.lock().unwrap().unknown.push(key);
                }
                other => panic!("{key}: {other}"),
            }
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        work(demo, cycle, 1 + (random >> 33) as usize % 25, &seen).await;
    }
    let demo = start();
    earlier.extend(std::mem::take(&mut seen.lock().unwrap().acknowledged));
    answers_lost += lost(&demo, &earlier).await;
    let unknown = std::mem::take(&mut seen.lock().unwrap().unknown);
    for key in &unknown {
        assert_eq!(pay(&demo, key).await.unwrap().problem(), "outcome-unknown", "{key}");
    }
    let effects = effects(&ledger);
    let doubled = effects.values().filter(|ids| ids.len() > 1).count();
    let missing = earlier.iter().filter(|(key, body)| {
        let id = serde_json::from_slice::<Value>(body).unwrap()["id"]
            .as_str()
            .unwrap()
            .to_owned();
        effects.get(key) != Some(&vec![id])
    });
    let (answered, missing) = (earlier.len(), missing.count());
    println!("{cycles} kills, {answered} answers, {} outcomes unknown", unknown.len());
    println!("{answers_lost} answers lost, {doubled} effects doubled, {missing} answers without their effect");
    assert_eq!((answers_lost, doubled, missing), (0, 0, 0));
    assert!(answered > cycles * 2 && !unknown.is_empty(), "nothing was interrupted");
}
