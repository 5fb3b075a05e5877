//! PostgreSQL servers as processes of their own, on private ports of the loopback interface.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls, types::FromSqlOwned};

use super::ports::free_port;

/// A running server with a folder of its own, killed when it is dropped.
pub struct Postgres {
    process: Option<Child>,
    port: u16,
    folder: TempDir,
    settings: Vec<String>,
}

/// Whether somebody else took the port before the server did is only known once it has started.
const TRIES: usize = 20;

impl Postgres {
    /// A server with default settings, but for these, such as `max_connections=20`, and what makes it small. A kill of
    /// its processes loses nothing that the system has, so `fsync` is off unless it is asked for.
    pub fn start(settings: &[&str]) -> Self {
        Self::start_in(copy_of_template(), settings)
    }

    fn start_in(folder: TempDir, settings: &[&str]) -> Self {
        let mut server = Self {
            process: None,
            port: 0,
            folder,
            settings: settings.iter().map(|&setting| setting.to_owned()).collect(),
        };
        for _ in 0..TRIES {
            server.port = free_port();
            if server.run() {
                return server;
            }
        }
        panic!("postgres does not start; is the package postgresql installed?");
    }

    /// A standby of `primary` as a base backup makes one, which follows it. A slot is not needed for as long as this.
    pub fn standby_of(primary: &Self, settings: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        if let Some((user, group)) = ordinary_user() {
            std::os::unix::fs::chown(folder.path(), Some(user), Some(group)).expect("root may");
        }
        let mut command = Command::new(binary("pg_basebackup"));
        as_ordinary_user(&mut command);
        command.args(["--write-recovery-conf", "--no-sync", "--checkpoint=fast"]);
        command
            .arg("--dbname")
            .arg(primary.url())
            .arg("-D")
            .arg(folder.path().join("data"));
        run(command.current_dir(folder.path()));
        Self::start_in(folder, settings)
    }

    /// Starts it again on its port, with what its folder holds.
    pub fn restart(&mut self) {
        assert!(self.process.is_none(), "it is still running");
        assert!(self.run(), "it started before");
    }

    pub fn set_settings(&mut self, settings: &[&str]) {
        self.settings = settings.iter().map(|&setting| setting.to_owned()).collect();
    }

    fn run(&mut self) -> bool {
        let mut command = Command::new(binary("postgres"));
        as_ordinary_user(&mut command);
        command.arg("-D").arg(self.data());
        let port = format!("port={}", self.port);
        let few = [
            &port,
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=off",
            "shared_buffers=16MB",
            "max_wal_size=256MB",
            "logging_collector=off",
            "lc_messages=C",
        ];
        for setting in few.into_iter().chain(self.settings.iter().map(String::as_str)) {
            command.arg("-c").arg(setting);
        }
        let mut process = command
            .current_dir(self.folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the package postgresql is installed");
        let mut lines = BufReader::new(process.stderr.take().expect("it is piped")).lines();
        let until = "database system is ready to accept";
        let is_up = lines.by_ref().any(|line| line.is_ok_and(|line| line.contains(until)));
        if is_up {
            // Read on, so that it is never held up by a full pipe.
            std::thread::spawn(move || lines.for_each(drop));
            self.process = Some(process);
        } else {
            let _ = process.wait();
        }
        is_up
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        url(self.port)
    }

    /// As `pg_ctl stop -m immediate` does: no transaction ends, nothing is written, and the next start recovers.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            signal(process.id(), "-QUIT");
            process.wait().expect("it ended");
        }
    }

    /// All of its processes take bytes and answer none, until [`resume`](Self::resume).
    pub fn pause(&self) {
        // The postmaster before its children are listed: one that still runs makes another for whoever connects now.
        stop(&[self.postmaster()]);
        stop(&self.processes());
    }

    pub fn resume(&self) {
        self.processes().into_iter().for_each(|id| signal(id, "-CONT"));
    }

    fn postmaster(&self) -> u32 {
        self.process.as_ref().expect("it is running").id()
    }

    /// The postmaster, first, and its children.
    pub fn processes(&self) -> Vec<u32> {
        let postmaster = self.postmaster();
        let mut all = vec![postmaster];
        for entry in fs::read_dir("/proc").expect("a system with /proc").flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            // The name before it is in parentheses and may hold anything.
            let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1));
            if parent.is_some_and(|parent| parent == postmaster.to_string()) {
                all.push(id);
            }
        }
        all
    }

    /// A connection for the test itself.
    pub async fn client(&self) -> Client {
        client(self.port).await
    }

    /// A pool as a user brings it.
    pub fn pool(&self, connections: usize) -> Pool {
        pool(&self.url(), connections)
    }

    /// Runs statements without parameters.
    pub async fn say(&self, sql: &str) {
        self.client().await.batch_execute(sql).await.expect("it is understood");
    }

    /// The one value that a query answers.
    pub async fn ask<T: FromSqlOwned>(&self, sql: &str) -> T {
        self.client().await.query_one(sql, &[]).await.expect("an answer").get(0)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            // A stopped process takes the next signal only when it goes on.
            let processes = self.processes();
            signal(process.id(), "-QUIT");
            processes.into_iter().for_each(|id| signal(id, "-CONT"));
        }
        if let Some(process) = &mut self.process {
            let _ = process.wait();
        }
    }
}

/// A pgbouncer in transaction mode before a server, which knows nothing of prepared statements.
pub struct Bouncer {
    process: Child,
    port: u16,
    _folder: TempDir,
}

impl Bouncer {
    /// With so many connections to the server for all of its clients.
    pub fn before(server: &Postgres, connections: usize) -> Self {
        (0..TRIES)
            .find_map(|_| Self::try_start(server, connections))
            .expect("the package pgbouncer is installed")
    }

    fn try_start(server: &Postgres, connections: usize) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let (file, port) = (folder.path().join("pgbouncer.ini"), free_port());
        let settings = format!(
            "[databases]\npostgres = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n\
             default_pool_size = {connections}\nmax_client_conn = 1000\n",
            server.port()
        );
        fs::write(&file, settings).expect("a file");
        if let Some((user, group)) = ordinary_user() {
            run(Command::new("chown")
                .arg("-R")
                .arg(format!("{user}:{group}"))
                .arg(folder.path()));
        }
        let found = ["/usr/sbin/pgbouncer", "pgbouncer"]
            .into_iter()
            .find(|path| Path::new(path).exists());
        let mut command = Command::new(found.unwrap_or("pgbouncer"));
        as_ordinary_user(&mut command);
        command
            .arg(&file)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut process = command.spawn().expect("the package pgbouncer is installed");
        let mut lines = BufReader::new(process.stderr.take().expect("it is piped")).lines();
        if !lines
            .by_ref()
            .any(|line| line.is_ok_and(|line| line.contains("process up")))
        {
            let _ = process.wait();
            return None;
        }
        std::thread::spawn(move || lines.for_each(drop));
        let _folder = folder;
        Some(Self { process, port, _folder })
    }

    pub fn url(&self) -> String {
        url(self.port)
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The table's own SQL, for a table in four parts.
pub fn table_in_parts() -> String {
    let whole = " WITH (fillfactor = 70, vacuum_truncate = off);";
    let sql = tower_idempotency::PostgresTable::default().sql();
    assert!(sql.contains(whole));
    let parts = (0..4).map(|part| {
        format!(
            "CREATE TABLE part{part} PARTITION OF idempotency_records FOR VALUES WITH (MODULUS 4, REMAINDER {part});"
        )
    });
    sql.replace(
        whole,
        &format!(" PARTITION BY HASH (id); {}", parts.collect::<String>()),
    )
}

/// Of the server, or of what stands before it.
pub fn url(port: u16) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/postgres")
}

pub async fn client(port: u16) -> Client {
    let (client, connection) = tokio_postgres::connect(&url(port), NoTls).await.expect("it is up");
    tokio::spawn(connection);
    client
}

pub fn pool(url: &str, connections: usize) -> Pool {
    let recycling_method = RecyclingMethod::Fast;
    let manager = Manager::from_config(url.parse().expect("a URL"), NoTls, ManagerConfig { recycling_method });
    let pool = Pool::builder(manager).max_size(connections).runtime(Runtime::Tokio1);
    pool.build().expect("settings that fit")
}

/// A new cluster is made once, which takes seconds, and copied for each server, which does not.
fn copy_of_template() -> TempDir {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let folder = tempfile::tempdir().expect("a folder");
    let version = Command::new(binary("postgres")).arg("--version").output();
    let version = version.expect("the package postgresql is installed").stdout;
    let version = String::from_utf8_lossy(&version).replace(|char: char| !char.is_alphanumeric(), "-");
    let template = Path::new(env!("CARGO_TARGET_TMPDIR")).join(version.trim_end_matches('-'));
    {
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        if !template.exists() {
            make_template(&template);
        }
    }
    let data = folder.path().join("data");
    copy(&template, &data);
    if let Some((user, group)) = ordinary_user() {
        let owner = format!("{user}:{group}");
        run(Command::new("chown").arg("-R").arg(owner).arg(folder.path()));
    }
    folder
}

/// Made where the ordinary user may write, and kept where the tests' other files are.
fn make_template(template: &Path) {
    let folder = tempfile::tempdir().expect("a folder");
    if let Some((user, group)) = ordinary_user() {
        std::os::unix::fs::chown(folder.path(), Some(user), Some(group)).expect("root may");
    }
    let data = folder.path().join("data");
    let mut command = Command::new(binary("initdb"));
    as_ordinary_user(&mut command);
    command.args([
        "-A",
        "trust",
        "-U",
        "postgres",
        "-E",
        "UTF8",
        "--no-locale",
        "--no-sync",
    ]);
    run(command
        .args(["--wal-segsize=1", "-D"])
        .arg(&data)
        .current_dir(folder.path()));
    // Another test's process may do the same: whoever renames first has made it.
    let own = template.with_extension(std::process::id().to_string());
    copy(&data, &own);
    if fs::rename(&own, template).is_err() {
        let _ = fs::remove_dir_all(&own);
    }
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").arg(from).arg(to));
}

fn run(command: &mut Command) {
    let done = command.stdout(Stdio::null()).status();
    assert!(done.is_ok_and(|status| status.success()), "{command:?} failed");
}

/// The server refuses to be run by root: then by the user that comes with its package.
pub fn as_ordinary_user(command: &mut Command) {
    if let Some((user, group)) = ordinary_user() {
        command.uid(user).gid(group);
    }
}

/// `None` if the tests are run by one already.
fn ordinary_user() -> Option<(u32, u32)> {
    if fs::metadata("/proc/self").is_ok_and(|own| own.uid() != 0) {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("a list of users");
    let mut entries = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let entry = entries
        .find(|entry| entry[0] == "postgres")
        .expect("the package postgresql makes it");
    Some((entry[2].parse().expect("a number"), entry[3].parse().expect("a number")))
}

/// Debian keeps the server's programs out of the path, in a folder by version.
fn binary(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = versions.map(|version| version.path().join("bin").join(name)).collect();
    found.retain(|path| path.exists());
    found.sort();
    found.pop().unwrap_or_else(|| name.into())
}

pub fn signal(process: u32, signal: &str) {
    // One that has just ended cannot be told.
    let _ = Command::new("kill")
        .args([signal, &process.to_string()])
        .stderr(Stdio::null())
        .status();
}

/// Returns once none of them runs any more.
fn stop(processes: &[u32]) {
    processes.iter().for_each(|&id| signal(id, "-STOP"));
    for id in processes {
        // A signal is sent before it has arrived. The state comes after the name, which may hold anything; of a process
        // that has ended there is none.
        let runs = || {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
            state.is_some_and(|state| !matches!(state, 'T' | 't' | 'Z' | 'X'))
        };
        while runs() {
            std::thread::yield_now();
        }
    }
}
