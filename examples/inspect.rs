//! Lists the records of a file by state: `cargo run --example inspect -- PATH`.
//!
//! The file must not be open: stop the server, or copy the file while it is stopped. Ids are hashes over scope and key;
//! neither keys nor answers are shown.

use std::{collections::BTreeMap, env, process::ExitCode, time::Duration};

use tower_idempotency::{FileRecord, FileRecordState, FileStore};

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let (Some(path), None) = (arguments.next(), arguments.next()) else {
        eprintln!("Usage: inspect PATH");
        return ExitCode::from(2);
    };
    let mut states: BTreeMap<&str, Vec<FileRecord>> = BTreeMap::new();
    let result = FileStore::inspect(path, |record| states.entry(name(&record)).or_default().push(record));
    if let Err(error) = result {
        eprintln!("inspect: {error}");
        return ExitCode::FAILURE;
    }
    for (state, records) in &states {
        let bytes: usize = records.iter().map(|record| record.bytes).sum();
        println!("{state}: {} records, {bytes} bytes", records.len());
        for record in records {
            println!("  {}", line(record));
        }
    }
    if states.is_empty() {
        println!("no records");
    }
    ExitCode::SUCCESS
}

fn name(record: &FileRecord) -> &'static str {
    match record.state {
        FileRecordState::Abandoned => "abandoned",
        FileRecordState::Completed { .. } => "completed",
        FileRecordState::Expired => "expired",
        FileRecordState::Unreadable => "unreadable",
        _ => "other",
    }
}

fn line(record: &FileRecord) -> String {
    let result = match record.state {
        FileRecordState::Completed { status, kept: true } => status.as_u16().to_string(),
        FileRecordState::Completed { status, .. } => format!("{} (not kept)", status.as_u16()),
        _ => "-".to_owned(),
    };
    let expires = match record.expires_in {
        Some(left) => format!("expires in {}", seconds(left)),
        None => "never expires".to_owned(),
    };
    let (id, attempt, bytes) = (record.id.to_hex(), record.attempt, record.bytes);
    format!(
        "{id}  {result}  attempt {attempt}  {bytes} bytes  since {}, {expires}",
        seconds(record.age)
    )
}

fn seconds(duration: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(Duration::from_secs(duration.as_secs()))
}
