//! The operator's day: the very lines of `docs/operations.md`, from an empty folder to a coordinator put back from a backup.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tributary_tests::{PATIENCE, program, workspace};

const HEADING: &str = "## A whole day, command by command";
const DATA: &str = "\n[data]\nsource = \"synthetic\"\nexamples = 60\ntest_examples = 30\n";
const JOB: &str = "name = \"day\"\nseed = 3\nrounds = 3\n[model]\narchitecture = \"logistic\"\ninputs = [784]\nclasses = 10\n\
    [train]\nalgorithm = \"fedavg\"\nlearning_rate = 0.1\nlocal_steps = 2\nbatch_size = 10\n\
    [cohort]\nsize = 3\nminimum = 2\nsettle_seconds = 2\n[evaluation]\nfederated = true\n";

/// The commands of the page.
fn commands() -> Vec<String> {
    let page = fs::read_to_string(workspace().join("docs/operations.md")).expect("the page");
    let section = page.split(HEADING).nth(1).expect("the section");
    let block =
        section.split("```console\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a block");
    block.lines().map(|line| line.strip_prefix("$ ").expect("a command on each line").to_owned()).collect()
}

/// Processes that run until the test ends.
struct Running(Vec<Child>);

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // The shell has handed over to the program: `exec`.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn shell(command: &str, folder: &Path) -> Command {
    let programs = program("tributary-server");
    let programs = programs.parent().expect("a folder").to_str().expect("UTF-8");
    let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).current_dir(folder).env("PATH", path).stdin(Stdio::null());
    shell
}

/// Waits until a coordinator answers on its port, or until none does.
fn until(listens: bool, port: u16) {
    let end = Instant::now() + PATIENCE;
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() != listens {
        assert!(Instant::now() < end, "the coordinator does not {}", if listens { "listen" } else { "end" });
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_day_of_the_page_goes_as_it_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    fs::write(folder.join("data.toml"), DATA).expect("data.toml");
    fs::write(folder.join("job.toml"), JOB).expect("job.toml");
    // A port that is free now.
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its number").port();
    let commands = commands();
    let mut running = Running(Vec::new());
    let mut token = String::new();
    let mut printed = Vec::new();
    for (number, line) in (1..).zip(&commands) {
        println!("{number:>2}  {line}");
        let command = line.replace("7443", &port.to_string()).replace("TOKEN", &token);
        if let Some(command) = command.strip_suffix(" &") {
            let child =
                shell(&format!("exec {command}"), folder).stderr(Stdio::null()).stdout(Stdio::null()).spawn();
            running.0.push(child.expect("a start"));
            if command.contains(" serve ") {
                until(true, port);
            }
            continue;
        }
        let output = shell(&command, folder).output().expect("a shell");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command}\n--- stdout\n{out}\n--- stderr\n{err}");
        if command.starts_with("pkill") {
            until(false, port);
        }
        if let Some(word) = out.split_whitespace().find(|word| word.contains("tributary1.")) {
            token = word.trim_matches(|c| "'\"`".contains(c)).to_owned();
        }
        printed.push((line.clone(), out.into_owned()));
    }
    println!("{} commands", commands.len());
    let of = |part: &'static str| {
        printed.iter().filter(move |(line, _)| line.contains(part)).map(|(_, out)| out.as_str())
    };
    let runs: Vec<&str> = of("run submit").collect();
    assert_eq!(runs.len(), 2);
    assert!(runs.iter().all(|out| out.contains("finished") || out.contains("accuracy")), "{runs:?}");
    assert!(of("renew").next().is_some_and(|out| out.contains("the certificate is renewed")));
    assert!(of("nodes list").next().is_some_and(|out| out.contains("revoked")));
    assert!(of("preflight").next().is_some_and(|out| out.contains("PASS") && !out.contains("FAIL")));
}
