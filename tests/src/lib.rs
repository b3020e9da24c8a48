//! A federation of real processes over real TLS, for tests: starts, watches, kills and restarts them.
#![allow(clippy::expect_used)] // all of this is test code: a broken expectation is a failed test

mod wiretap;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

pub use wiretap::Wiretap;

/// Longest time that any step of a test may take; generous, because CI machines are slow.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The folder of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The folder with the data sets that are not part of the project, or `None` after saying so loudly.
pub fn shared_data(what: &str) -> Option<PathBuf> {
    let found = std::env::var_os("TRIBUTARY_DATA").map(PathBuf::from).filter(|path| path.join(what).exists());
    if found.is_none() {
        eprintln!("SKIPPED: TRIBUTARY_DATA does not name a folder with `{what}`; this test checked nothing");
    }
    found
}

/// The path of one of the workspace's programs, built on first use with the profile and features of the tests;
/// or of a built one, such as an unpacked tarball's, in the folder that `TRIBUTARY_PROGRAMS` names.
pub fn program(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        if let Some(folder) = std::env::var_os("TRIBUTARY_PROGRAMS") {
            return folder.into();
        }
        let test = std::env::current_exe().expect("the test's own path");
        let folder = test.ancestors().nth(2).expect("target/<profile>/deps/<test>").to_owned();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--workspace", "--bins"]).current_dir(workspace());
        if folder.file_name().is_some_and(|profile| profile == "release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo").success(), "the programs do not build");
        folder
    });
    folder.join(name)
}

/// Runs a program to its end and returns what it printed; fails the test unless it exits with `code`.
pub fn run(name: &str, arguments: &[&str], code: i32) -> Output {
    let output = Command::new(program(name)).args(arguments).output().expect("the program starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        output.status.code(),
        Some(code),
        "{name} {arguments:?}\n--- stdout\n{out}\n--- stderr\n{err}"
    );
    output
}

/// The JSON objects, one per line, that a program printed.
pub fn json_lines(stdout: &[u8]) -> Vec<serde_json::Value> {
    let text = String::from_utf8_lossy(stdout);
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// A running program whose output is kept.
pub struct Process {
    child: Child,
    name: String,
    output: Arc<Mutex<String>>,
}

impl Process {
    /// Starts a program; `label` names it in messages.
    pub fn start(name: &str, label: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(program(name))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let output = Arc::new(Mutex::new(String::new()));
        let streams: [Option<Box<dyn std::io::Read + Send>>; 2] =
            [child.stdout.take().map(|s| Box::new(s) as _), child.stderr.take().map(|s| Box::new(s) as _)];
        for stream in streams.into_iter().flatten() {
            let output = Arc::clone(&output);
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    let mut text = output.lock().unwrap_or_else(PoisonError::into_inner);
                    text.push_str(&line);
                    text.push('\n');
                }
            });
        }
        Self { child, name: label.to_owned(), output }
    }

    /// Starts the node whose configuration is `config`; its folder's name names it in messages.
    pub fn node(config: &Path, more: &[&str]) -> Self {
        let label = config.parent().and_then(Path::file_name).expect("a folder").to_string_lossy();
        let config = config.to_str().expect("UTF-8");
        Self::start("tributary-client", &label, &[&["start", "--config", config], more].concat())
    }

    /// All that it printed so far, both streams.
    pub fn output(&self) -> String {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until it printed `words`, `times` times.
    pub fn wait_for(&mut self, words: &str, times: usize) {
        let what = format!("{} to print {words:?} {times} times", self.name);
        let end = Instant::now() + PATIENCE;
        loop {
            let output = self.output();
            if output.matches(words).count() >= times {
                return;
            }
            let over = self.child.try_wait().expect("wait").is_some();
            // One more look: the last lines may still be on their way.
            if over && self.output().matches(words).count() < times && Instant::now() > end - PATIENCE / 2 {
                panic!("{} ended; waited for {what}\n{}", self.name, self.output());
            }
            assert!(Instant::now() < end, "waited too long for {what}\n{output}");
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Ends it at once, as a power cut would.
    pub fn kill(&mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("wait");
    }

    /// Asks it to end (SIGTERM).
    pub fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill").success());
    }

    /// Waits until it ends and returns its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status.code();
            }
            assert!(Instant::now() < end, "{} does not end\n{}", self.name, self.output());
            std::thread::sleep(Duration::from_millis(30));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {} printed\n{}", self.name, self.output());
        }
    }
}

/// A coordinator in a folder of its own.
pub struct Coordinator {
    folder: tempfile::TempDir,
    process: Option<Process>,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Coordinator {
    /// Initialises a coordinator and starts it on a free port.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("coordinator");
        let dir = dir.to_str().expect("UTF-8");
        run("tributary-server", &["init", dir, "--name", "localhost", "--listen", "127.0.0.1:0"], 0);
        let mut coordinator = Self { folder, process: None, address: SocketAddr::from(([127, 0, 0, 1], 0)) };
        coordinator.serve();
        // A restarted coordinator must be found where its nodes look for it.
        let config = coordinator.config();
        let text = std::fs::read_to_string(&config).expect("the configuration");
        let fixed = text.replace("127.0.0.1:0", &coordinator.address.to_string());
        std::fs::write(&config, fixed).expect("the configuration");
        coordinator
    }

    /// Starts the process (again).
    pub fn serve(&mut self) {
        self.serve_with(&[]);
    }

    /// The same with more arguments: a drill's.
    pub fn serve_with(&mut self, more: &[&str]) {
        let _ = std::fs::remove_file(self.path("data/address"));
        let config = self.config();
        let arguments = [&["serve", "--config", &config], more].concat();
        let mut process = Process::start("tributary-server", "coordinator", &arguments);
        process.wait_for("listening", 1);
        let text = std::fs::read_to_string(self.path("data/address")).expect("the address file");
        self.address = text.trim().parse().expect("an address");
        self.process = Some(process);
    }

    /// A path in the coordinator's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("coordinator").join(name)
    }

    /// A path beside the coordinator's folder, for what a test needs.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The path of its configuration.
    pub fn config(&self) -> String {
        self.path("server.toml").to_str().expect("UTF-8").to_owned()
    }

    /// The URL for its nodes.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    /// The running process.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the coordinator runs")
    }

    /// Runs an administrative command that must succeed.
    pub fn admin(&self, arguments: &[&str]) -> Output {
        let config = self.config();
        run("tributary-server", &[arguments, &["--config", &config]].concat(), 0)
    }

    /// A fresh join token for `name`.
    pub fn token(&self, name: &str) -> String {
        let output = self.admin(&["token", "create", "--name", name, "--format", "json"]);
        json_lines(&output.stdout)[0]["token"].as_str().expect("a token").to_owned()
    }

    /// Joins a node and writes its `node.toml`: where the coordinator is, and `configuration`.
    pub fn join(&self, name: &str, configuration: &str) -> PathBuf {
        let dir = self.folder.path().join(name);
        let (url, token) = (self.url(), self.token(name));
        run(
            "tributary-client",
            &["join", "--server", &url, "--token", &token, "--dir", dir.to_str().expect("UTF-8")],
            0,
        );
        let config = dir.join("node.toml");
        std::fs::write(&config, format!("server = \"{url}\"\n{configuration}\n")).expect("node.toml");
        config
    }

    /// Submits a job and returns the run's id.
    pub fn submit(&self, job: &Path) -> String {
        let output = self.admin(&["run", "submit", job.to_str().expect("UTF-8"), "--format", "json"]);
        json_lines(&output.stdout)[0]["run"].as_str().expect("a run").to_owned()
    }

    /// Submits a job by its text.
    pub fn submit_text(&self, job: &str) -> String {
        let file = self.scratch("job.toml");
        std::fs::write(&file, job).expect("the job's file");
        self.submit(&file)
    }

    /// Waits until the run is over and returns its last line.
    pub fn finished(&self, run: &str) -> serde_json::Value {
        let output = self.admin(&["run", "watch", run, "--format", "json"]);
        json_lines(&output.stdout).pop().expect("a last line")
    }
}
