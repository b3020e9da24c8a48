//! The crash matrix: every party killed at every step of a round, and every file torn, truncated or gone. Each row ends in
//! the same model, or in one clear line; nothing that was acknowledged is lost. The table is printed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tributary_tests::{Coordinator, Process, json_lines, program};

const NODES: [&str; 4] = ["north", "east", "south", "west"];

/// Two rounds of four nodes, all of which are needed: with masks, one may be missing.
fn job(masked: bool) -> String {
    let (minimum, masks) =
        if masked { (3, "[secure_aggregation]\nenabled = true\nstep_seconds = 12\n") } else { (4, "") };
    format!(
        "name = \"crash\"\nseed = 5\nrounds = 2\n[model]\narchitecture = \"logistic\"\ninputs = [784]\nclasses = 10\n\
         [train]\nalgorithm = \"fedavg\"\nlearning_rate = 0.1\nlocal_steps = 2\nbatch_size = 10\n[cohort]\nsize = 4\n\
         minimum = {minimum}\nsettle_seconds = 1\nreconnect_seconds = 5\ndeadline_seconds = 60\nattempts = 5\n{masks}"
    )
}

/// A coordinator with four nodes that are not started.
struct Federation {
    coordinator: Coordinator,
    configs: Vec<PathBuf>,
}

impl Federation {
    fn new() -> Self {
        let coordinator = Coordinator::start();
        let data = |seed| {
            format!(
                "[data]\nsource = \"synthetic\"\nexamples = 60\ntest_examples = 30\nseed = {seed}\n\
                 [policy]\nfixed_cohort = false\n"
            )
        };
        let configs = (3..).zip(NODES).map(|(seed, name)| coordinator.join(name, &data(seed))).collect();
        Self { coordinator, configs }
    }

    fn node(&self, index: usize, more: &[&str]) -> Process {
        Process::node(&self.configs[index], &[&["--trainer", "arithmetic"], more].concat())
    }

    fn nodes(&self, but: Option<usize>) -> Vec<Process> {
        (0..NODES.len()).filter(|index| Some(*index) != but).map(|index| self.node(index, &[])).collect()
    }

    /// Rounds with who was in them, and the digest at the end.
    fn finished(&self, run: &str) -> (String, Vec<u64>) {
        let output = self.coordinator.admin(&["run", "watch", run, "--format", "json"]);
        let lines = json_lines(&output.stdout);
        let completed = |line: &Value| line["completed"].as_u64();
        let rounds = lines.iter().filter(|line| line["event"] == "round").filter_map(completed).collect();
        let last = lines.last().expect("a last line");
        assert_eq!(last["event"], "finished", "{last}");
        (last["model_digest"].as_str().expect("a digest").to_owned(), rounds)
    }
}

fn undisturbed(masked: bool) -> String {
    let federation = Federation::new();
    let _nodes = federation.nodes(None);
    let run = federation.coordinator.submit_text(&job(masked));
    federation.finished(&run).0
}

fn killed_coordinator(masked: bool, point: &str) -> (String, Vec<u64>) {
    let mut federation = Federation::new();
    federation.coordinator.process().kill();
    federation.coordinator.serve_with(&["--pause-at", point]);
    let _nodes = federation.nodes(None);
    let run = federation.coordinator.submit_text(&job(masked));
    federation.coordinator.process().wait_for("drill: stands still", 1);
    federation.coordinator.process().kill();
    federation.coordinator.serve();
    federation.finished(&run)
}

fn killed_node(masked: bool, point: &str) -> (String, Vec<u64>) {
    let federation = Federation::new();
    let _others = federation.nodes(Some(0));
    let mut victim = federation.node(0, &["--pause-at", point]);
    let run = federation.coordinator.submit_text(&job(masked));
    victim.wait_for("drill: stands still", 1);
    victim.kill();
    let _again = federation.node(0, &[]);
    federation.finished(&run)
}

fn row(party: &str, point: &str, job: &str, outcome: &str) {
    println!("| {party} | {point} | {job} | {outcome} |");
}

fn outcome((digest, rounds): (String, Vec<u64>), undisturbed: &str) -> (bool, String) {
    let same = digest == undisturbed;
    let rounds = rounds.iter().map(u64::to_string).collect::<Vec<_>>().join(" and ");
    let words = if same { "same digest as undisturbed" } else { "another model, of those who were there" };
    (same, format!("resumed: {rounds} of 4 in the rounds; {words}"))
}

#[test]
fn without_masks_every_kill_ends_in_the_same_model() {
    let expected = undisturbed(false);
    for point in ["attempt", "model", "commit"] {
        let (same, words) = outcome(killed_coordinator(false, point), &expected);
        row("coordinator", point, "plain", &words);
        assert!(same, "{point}: {words}");
    }
    for point in ["charged", "trained", "stored-plain", "uploaded"] {
        // Without [privacy] nothing is charged or sealed: the node's file is there once it waits before the upload.
        let result = if point == "stored-plain" { paused_before_upload() } else { killed_node(false, point) };
        let (same, words) = outcome(result, &expected);
        row("node", point, "plain", &words);
        assert!(same, "{point}: {words}");
    }
}

fn paused_before_upload() -> (String, Vec<u64>) {
    let federation = Federation::new();
    let _others = federation.nodes(Some(0));
    let mut victim = federation.node(0, &["--pause-before-upload-seconds", "600"]);
    let run = federation.coordinator.submit_text(&job(false));
    victim.wait_for("before the upload, as told", 1);
    victim.kill();
    let _again = federation.node(0, &[]);
    federation.finished(&run)
}

#[test]
fn with_masks_no_kill_of_the_coordinator_changes_the_model_and_no_node_masks_twice() {
    let expected = undisturbed(true);
    for point in ["attempt", "roster", "shares", "survivors", "model", "commit"] {
        let (same, words) = outcome(killed_coordinator(true, point), &expected);
        row("coordinator", point, "masked", &words);
        assert!(same, "{point}: {words}");
    }
    for point in ["keyed", "masked", "uploaded", "confirmed", "unmasked"] {
        let (digest, rounds) = killed_node(true, point);
        let (_, words) = outcome((digest, rounds.clone()), &expected);
        row("node", point, "masked", &words);
        // A node that died with its keys is missing where its update had not arrived, and in the next round if it is back
        // by then; no round is lost.
        assert_eq!(rounds.len(), 2, "{point}: {words}");
        assert!(rounds.iter().all(|completed| (3..=4).contains(completed)), "{point}: {words}");
    }
}

/// Starts a program that must end within seconds (else its exit code is 124), and gives its exit code and last line.
fn refused(name: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let output =
        Command::new("timeout").arg("5").arg(program(name)).args(arguments).output().expect("a start");
    let errors = String::from_utf8_lossy(&output.stderr);
    let line = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    (output.status.code(), line.trim().to_owned())
}

/// Puts a file back as it was, for nobody else to read.
fn mend(path: &Path, content: &[u8]) {
    fs::write(path, content).expect("the file");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("its mode");
}

/// What one does to a file.
#[derive(Clone, Copy)]
enum Damage {
    Cut(usize),
    Flip,
    Gone,
}

fn damage(path: &Path, how: Damage) {
    let mut bytes = fs::read(path).expect("the file");
    match how {
        Damage::Cut(left_out) => bytes.truncate(bytes.len().saturating_sub(left_out)),
        Damage::Flip => {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
        }
        Damage::Gone => return fs::remove_file(path).expect("the file goes"),
    }
    fs::write(path, bytes).expect("the file");
}

fn newest(dir: &Path) -> PathBuf {
    let files = fs::read_dir(dir).expect("the folder").map(|entry| entry.expect("an entry").path());
    files
        .filter(|path| path.is_file())
        .max_by_key(|path| path.metadata().expect("its age").modified().ok())
        .expect("a file")
}

/// Torn, truncated, changed and missing files: mended where only what was never acknowledged is gone, refused otherwise.
#[test]
fn damaged_files_are_mended_or_named() {
    let mut federation = Federation::new();
    let nodes = federation.nodes(None);
    let run = federation.coordinator.submit_text(&job(false));
    let (digest, _) = federation.finished(&run);
    drop(nodes);
    federation.coordinator.process().kill();
    let (data, config) = (federation.coordinator.path("data"), federation.coordinator.config());
    let serve = ["serve", "--config", config.as_str()];
    let ledger = data.join("ledgers").join(format!("{run}.jsonl"));
    let model = newest(&data.join("store").join("models"));

    // Only the end of a record that was being written: cut off, and the coordinator goes on.
    let sound = fs::read(&ledger).expect("the run's ledger");
    fs::write(&ledger, [&sound[..], &sound[..40]].concat()).expect("a torn end");
    federation.coordinator.serve();
    assert_eq!(federation.finished(&run).0, digest);
    row(
        "coordinator",
        "ledger ends in half a record",
        "plain",
        "mended: the half is cut off, and said; nothing is lost",
    );
    federation.coordinator.process().kill();

    for (what, path, how) in [
        ("model, a bit changed", model.clone(), Damage::Flip),
        ("model, cut off", model.clone(), Damage::Cut(5)),
        ("model, missing", model, Damage::Gone),
        ("run's ledger, a bit changed", ledger.clone(), Damage::Flip),
        ("authority's key, missing", data.join("authority").join("authority.key"), Damage::Gone),
    ] {
        let before = fs::read(&path).expect("the file");
        damage(&path, how);
        let (mut code, mut line) = refused("tributary-server", &serve);
        if code == Some(124) {
            // What a run that is over left is read when it is asked for.
            federation.coordinator.serve();
            let out = federation.coordinator.scratch("export");
            let out = out.to_str().expect("UTF-8");
            let arguments: &[&str] = if what.starts_with("model") {
                &["run", "export", &run, "--out", out, "--config", &config]
            } else {
                &["ledger", "export", &run, "--out", out, "--config", &config]
            };
            (code, line) = refused("tributary-server", arguments);
            federation.coordinator.process().kill();
        }
        row(
            "coordinator",
            what,
            "plain",
            &format!("exit code {}: {}", code.unwrap_or(-1), shown(&line, &data)),
        );
        assert_eq!(code, Some(1), "{what}: {line}");
        assert!(!line.is_empty() && !line.contains("panicked"), "{what}: {line}");
        mend(&path, &before);
    }
    federation.coordinator.serve();
    assert_eq!(federation.finished(&run).0, digest, "mended, everything is there again");
    federation.coordinator.process().kill();

    let config = federation.configs[0].clone();
    let dir = config.parent().expect("a folder").to_owned();
    let start = ["start", "--config", config.to_str().expect("UTF-8"), "--trainer", "arithmetic"];
    for (file, how) in
        [("ledger.jsonl", Damage::Flip), ("key.pem", Damage::Cut(60)), ("certificate.pem", Damage::Gone)]
    {
        let path = dir.join(file);
        let before = fs::read(&path).expect("the file");
        damage(&path, how);
        let (code, line) = refused("tributary-client", &start);
        row(
            "node",
            &format!("{file} damaged"),
            "plain",
            &format!("exit code {}: {}", code.unwrap_or(-1), shown(&line, &dir)),
        );
        assert_eq!(code, Some(1), "{file}: {line}");
        mend(&path, &before);
    }
    let journal = dir.join("masked-uploads.json");
    fs::write(&journal, "{").expect("a torn journal");
    let (code, line) = refused("tributary-client", &start);
    row(
        "node",
        "masked-uploads.json torn",
        "masked",
        &format!("exit code {}: {}", code.unwrap_or(-1), shown(&line, &dir)),
    );
    assert_eq!(code, Some(1), "{line}");
}

/// The line without the name of the test's own folder.
fn shown(line: &str, folder: &Path) -> String {
    line.replace(folder.to_str().expect("UTF-8"), "…").replace("error: ", "")
}

/// A disk on which there is no room: a file system in memory of a few hundred kilobytes, if this user may mount one.
struct Small {
    dir: PathBuf,
}

impl Small {
    fn mount(dir: &Path, size: &str) -> Option<Self> {
        let option = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(dir).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self { dir: dir.to_owned() })
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.dir).output();
    }
}

#[test]
fn a_full_and_a_read_only_disk_end_in_one_line_and_lose_nothing() {
    let mut federation = Federation::new();
    federation.coordinator.process().kill();
    let data = federation.coordinator.path("data");
    let aside = federation.coordinator.scratch("aside");
    assert!(Command::new("cp").args(["-a"]).arg(&data).arg(&aside).status().expect("cp").success());
    let Some(small) = Small::mount(&data, "2m") else {
        eprintln!("SKIPPED: this user may not mount a file system; full and read-only disks were not tested");
        return;
    };
    let copied = Command::new("sh").args(["-c", "cp -a \"$0\"/. \"$1\""]).arg(&aside).arg(&data).status();
    assert!(copied.expect("cp").success());
    fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).expect("its mode");
    federation.coordinator.serve();
    let nodes = federation.nodes(None);
    // All that is left is taken.
    let filler = data.join("filler");
    let _ =
        Command::new("dd").args(["if=/dev/zero", "bs=4k"]).arg(format!("of={}", filler.display())).output();
    let config = federation.coordinator.config();
    let job_file = federation.coordinator.scratch("job.toml");
    fs::write(&job_file, job(false)).expect("the job");
    let (code, line) = refused(
        "tributary-server",
        &["run", "submit", job_file.to_str().expect("UTF-8"), "--config", &config],
    );
    row(
        "coordinator",
        "disk full at a submission",
        "plain",
        &format!("exit code {}: {}", code.unwrap_or(-1), shown(&line, &data)),
    );
    assert_eq!(code, Some(1), "{line}");
    assert!(line.contains("No space left"), "{line}");
    fs::remove_file(&filler).expect("room again");
    // The process ended, or goes on: a new one certainly does.
    federation.coordinator.process().kill();
    federation.coordinator.serve();
    let run = federation.coordinator.submit_text(&job(false));
    let (digest, _) = federation.finished(&run);
    assert_eq!(digest, undisturbed(false));
    row("coordinator", "disk freed, process started again", "plain", "same digest as undisturbed");
    federation.coordinator.process().kill();
    drop(nodes);
    let remounted = Command::new("mount").args(["-o", "remount,ro"]).arg(&data).status();
    assert!(remounted.expect("mount").success());
    let (code, line) = refused("tributary-server", &["serve", "--config", &config]);
    row(
        "coordinator",
        "disk read-only at start",
        "plain",
        &format!("exit code {}: {}", code.unwrap_or(-1), shown(&line, &data)),
    );
    assert_eq!(code, Some(1), "{line}");
    assert!(line.contains("Read-only"), "{line}");
    drop(small);
}
