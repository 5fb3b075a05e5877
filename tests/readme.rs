//! What the README shows is what happens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::process::{Command, Stdio};

use support::demo::Demo;

const README: &str = include_str!("../README.md");

/// A command and what it printed, as the README shows them.
struct Shown {
    command: String,
    output: String,
}

/// The commands of all `console` blocks, in order.
fn transcript() -> Vec<Shown> {
    let mut shown: Vec<Shown> = Vec::new();
    for block in README.split("```console\n").skip(1) {
        let (block, _) = block.split_once("```").expect("a block ends");
        for line in block.lines() {
            match line.strip_prefix("$ ") {
                Some(command) => shown.push(Shown {
                    command: command.to_owned(),
                    output: String::new(),
                }),
                None => {
                    let last = shown.last_mut().expect("a command comes before its output");
                    last.output += &format!("{line}\n");
                }
            }
        }
    }
    shown
}

/// What differs from one run to the next, made equal: ids, times and the jitter of `Retry-After`.
fn masked(text: &str) -> String {
    let mut masked = String::new();
    for line in text.replace('\r', "").lines() {
        let line = match line.split_once(": ") {
            Some(("date" | "retry-after", _)) => line.split(": ").next().unwrap().to_owned(),
            _ => mask_values(line),
        };
        masked += &format!("{line}\n");
    }
    masked
}

fn mask_values(line: &str) -> String {
    let mut parts = line.split('"').map(|part| {
        let is_id = part
            .strip_prefix("pay_")
            .is_some_and(|rest| rest.chars().all(|c| c.is_ascii_hexdigit()));
        let is_time = part.len() == 24 && part.ends_with('Z') && part.as_bytes()[10] == b'T';
        if is_id || is_time { "..." } else { part }
    });
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |line, part| line + "\"" + part)
}

#[test]
fn the_commands_of_the_readme_print_what_it_shows() {
    let demo = Demo::start(&[]);
    let shown = transcript();
    assert!(shown.len() >= 5, "first, replay, reused, in progress and the ledger");
    // A command that ends in `&` goes on while the next ones run.
    let mut background = Vec::new();
    for Shown { command, output } in &shown {
        let here = command.replace("127.0.0.1:3000", &demo.address().to_string());
        let here = here.replace("localhost:3000", &demo.address().to_string());
        if let Some(here) = here.strip_suffix('&') {
            let child = Command::new("sh").args(["-c", here]).stdout(Stdio::null()).spawn();
            background.push(child.expect("sh is there"));
            wait_for_execution(&demo);
            continue;
        }
        let ran = Command::new("sh").args(["-c", &here]).output().expect("sh is there");
        let printed = String::from_utf8(ran.stdout).expect("it prints text");
        let complaint = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(
            masked(printed.trim_end()),
            masked(output.trim_end()),
            "of {command}\n{complaint}"
        );
    }
    for mut child in background {
        assert!(child.wait().expect("it was started").success());
    }
}

/// Until one more handler has been started than have ended.
fn wait_for_execution(demo: &Demo) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        loop {
            let metrics = support::http::get(demo.address(), "/metrics").await;
            let metrics = String::from_utf8(metrics.body.to_vec()).unwrap();
            let value = |name: &str| -> u64 {
                let line = metrics
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
                line.expect("the metric is there").parse().expect("a number")
            };
            if value("idempotency_executed_total") > value("demo_effects_total") {
                return;
            }
        }
    });
}

#[test]
fn the_two_commands_are_there() {
    assert!(README.contains("\ncargo run --release --example demo\n"));
    assert!(README.contains("\n./tests/run\n"));
}
