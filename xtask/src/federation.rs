//! `cargo xtask demo --real`: a coordinator and nodes as processes of their own over mutual TLS on this machine,
//! each command printed as it is run, and the model compared with the simulator's.

use std::fmt::Write as _;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::cargo;
use crate::libtorch;

const JOB: &str = "jobs/four-nodes.toml";
const SCENARIO: &str = "jobs/four-nodes-sim.toml";
const OUT: &str = "runs/demo-real";
const NODES: usize = 4;
const START: Duration = Duration::from_secs(60);

/// What each node reads: its share of the scenario's images. The held-out ones are the evaluator's.
fn node_configuration(url: &str, index: Option<usize>) -> String {
    let mut text = format!("server = \"{url}\"\n");
    let data = "[data]\nsource = \"synthetic\"\nexamples = 2400\ntest_examples = 1000\n";
    match index {
        Some(index) => {
            let share = format!("scheme = \"iid\"\nclients = {NODES}\nseed = 7\nindex = {index}");
            let _ = write!(text, "\n{data}\n[share]\n{share}\n"); // a String takes everything
        }
        None => {
            let _ = write!(text, "role = \"evaluator\"\n\n{data}");
        }
    }
    text
}

/// Processes that end when the demonstration does.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The folder of built programs and the repository: runs commands and shows them.
struct Shell {
    programs: PathBuf,
    repository: PathBuf,
}

impl Shell {
    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        // A token is long, and a secret.
        let shown = |argument: &&str| {
            if argument.starts_with("tributary1.") { "TOKEN" } else { *argument }.to_owned()
        };
        println!("$ {program} {}", arguments.iter().map(shown).collect::<Vec<_>>().join(" "));
        let mut command = Command::new(self.programs.join(program));
        command.args(arguments).current_dir(&self.repository).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end and gives what it printed.
    fn output(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        cargo::output(&mut self.command(program, arguments))
    }

    /// Starts a command in the background with its output in `log`.
    fn start(&self, log: &str, program: &str, arguments: &[&str]) -> anyhow::Result<Child> {
        let file = File::create(self.repository.join(log)).with_context(|| format!("cannot write {log}"))?;
        let errors = file.try_clone().context("cannot share the log file")?;
        let mut command = self.command(program, arguments);
        command.stdout(file).stderr(errors).spawn().with_context(|| format!("cannot start {program}"))
    }
}

/// Sets up, builds, and demonstrates.
pub(crate) fn run(repository: &Path) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    libtorch::set_up(repository)?;
    eprintln!("building the programs (the first time: minutes)");
    cargo::run(cargo::cargo(repository).args(["build", "--workspace", "--bins"]))
        .context("the programs do not build")?;
    let shell = Shell { programs: cargo::binaries("debug")?, repository: repository.to_path_buf() };
    let out = repository.join(OUT);
    if out.exists() {
        std::fs::remove_dir_all(&out).with_context(|| format!("cannot empty {OUT}"))?;
    }
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {OUT}"))?;
    let real = demonstrate(&shell, &out)?;

    println!("\nthe same job in the simulator:");
    let simulated = format!("{OUT}/simulated");
    let lines = shell.output("tributary-sim", &["run", SCENARIO, "--format", "json", "--out", &simulated])?;
    let digest = digest_in(&lines).context("the simulator printed no digest")?;
    println!("coordinator and {NODES} nodes: {real}\nsimulator:               {digest}");
    eprintln!("demo: {}", cargo::elapsed(start));
    ensure!(real == digest, "the models differ; please report this with the folder {OUT}");
    println!("the same model, bit for bit");
    Ok(ExitCode::SUCCESS)
}

/// Starts a federation, runs the job on it, and gives the digest of the model.
fn demonstrate(shell: &Shell, out: &Path) -> anyhow::Result<String> {
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").context("no free port on this machine")?;
        listener.local_addr().context("no free port on this machine")?.port()
    };
    let (coordinator, listen) = (format!("{OUT}/coordinator"), format!("127.0.0.1:{port}"));
    let url = format!("https://localhost:{port}");
    shell.output("tributary-server", &["init", &coordinator, "--name", "localhost", "--listen", &listen])?;
    let config = format!("{coordinator}/server.toml");
    let serve = ["serve", "--config", &config];
    let mut children =
        Children(vec![shell.start(&format!("{OUT}/coordinator.log"), "tributary-server", &serve)?]);
    wait_for(&out.join("coordinator/data"), "admin.sock", &mut children)?;

    for index in 0..=NODES {
        let name = if index < NODES { format!("client-{index}") } else { "evaluator".to_owned() };
        let create = ["token", "create", "--config", &config, "--name", &name, "--format", "json"];
        let printed = shell.output("tributary-server", &create)?;
        let token = field(&printed, "token").context("no token was printed")?;
        let dir = format!("{OUT}/{name}");
        shell.output("tributary-client", &["join", "--server", &url, "--token", &token, "--dir", &dir])?;
        let node = format!("{dir}/node.toml");
        let text = node_configuration(&url, (index < NODES).then_some(index));
        std::fs::write(shell.repository.join(&node), text).with_context(|| format!("cannot write {node}"))?;
        children.0.push(shell.start(
            &format!("{dir}.log"),
            "tributary-client",
            &["start", "--config", &node],
        )?);
    }
    wait_for_nodes(shell, &config)?;
    let submitted =
        shell.output("tributary-server", &["run", "submit", JOB, "--config", &config, "--format", "json"])?;
    let run = field(&submitted, "run").context("no run was printed")?;
    let status = shell.command("tributary-server", &["run", "watch", &run, "--config", &config]).status();
    ensure!(
        status.context("cannot start tributary-server")?.success(),
        "the run failed; see {OUT}/coordinator.log"
    );
    let lines =
        shell.output("tributary-server", &["run", "watch", &run, "--config", &config, "--format", "json"])?;
    digest_in(&lines).context("the coordinator printed no digest")
}

/// Waits until a file is there.
fn wait_for(folder: &Path, name: &str, children: &mut Children) -> anyhow::Result<()> {
    let end = Instant::now() + START;
    while !folder.join(name).exists() {
        for child in &mut children.0 {
            if let Some(status) = child.try_wait().context("cannot look at a process")? {
                bail!("a process ended with {status}; see the logs in {OUT}");
            }
        }
        ensure!(Instant::now() < end, "the coordinator does not start; see {OUT}/coordinator.log");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Waits until all nodes are connected, so that the demonstration shows all of them from the first round.
fn wait_for_nodes(shell: &Shell, config: &str) -> anyhow::Result<()> {
    let end = Instant::now() + START;
    loop {
        let arguments = ["nodes", "list", "--config", config, "--format", "json"];
        let mut command = Command::new(shell.programs.join("tributary-server"));
        let listed = cargo::output(command.args(arguments).current_dir(&shell.repository))?;
        if listed.matches("\"connected\":true").count() > NODES {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the nodes do not connect; see the logs in {OUT}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The last `model_digest` in lines of JSON.
fn digest_in(lines: &str) -> Option<String> {
    lines.lines().rev().find_map(|line| field(line, "model_digest"))
}

/// The text of a field in flat JSON that our own programs printed: enough of a parser for tokens and digests.
fn field(json: &str, name: &str) -> Option<String> {
    let (_, rest) = json.split_once(&format!("\"{name}\":\""))?;
    rest.split_once('"').map(|(value, _)| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_digest_is_found() {
        let lines = "{\"event\":\"round\"}\n{\"event\":\"finished\",\"model_digest\":\"ab\",\"seconds\":1}\n";
        assert_eq!(digest_in(lines).as_deref(), Some("ab"));
        assert_eq!(digest_in("{}"), None);
    }

    #[test]
    fn nodes_share_the_scenarios_images() {
        let scenario =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(SCENARIO)).unwrap();
        let data: Vec<&str> = scenario.lines().skip_while(|line| *line != "[data]").take(4).collect();
        assert!(node_configuration("https://localhost:1", Some(2)).contains(&data.join("\n")));
        assert!(node_configuration("https://localhost:1", None).contains("role = \"evaluator\""));
    }
}
