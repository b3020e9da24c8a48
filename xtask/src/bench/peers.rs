//! `cargo xtask bench peers`: other frameworks and the simulator on the same work, in turn.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context;

use super::options::Peers;
use super::probe::Probe;
use super::{Simulator, median, print_table};
use crate::cargo;

const CLIENTS: &str = "1000";
const COHORT: &str = "100";

/// A framework's script and what stands before it.
struct Peer {
    name: &'static str,
    before: &'static [&'static str],
    script: &'static str,
}

const PEERS: [Peer; 3] = [
    Peer { name: "plain PyTorch, one core", before: &[], script: "ideal.py" },
    Peer {
        name: "pfl, two processes",
        before: &["-m", "torch.distributed.run", "--nproc_per_node", "2"],
        script: "pfl_sim.py",
    },
    Peer { name: "Flower, two actors", before: &[], script: "flower_sim.py" },
];

/// What the scripts need.
struct Place {
    scripts: PathBuf,
    python: PathBuf,
    data: PathBuf,
}

/// One run's figures.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Figures {
    seconds_per_round: f64,
    accuracy: f64,
}

/// Measures every peer and the simulator, alternated, and prints a table of medians. Skips in one line, with exit
/// code 2, where the scripts, Python or the data are not there.
pub(super) fn run(repository: &Path, options: &Peers) -> anyhow::Result<ExitCode> {
    let place = match find(options) {
        Ok(place) => place,
        Err(reason) => {
            eprintln!("SKIPPED: {reason}");
            return Ok(ExitCode::from(2));
        }
    };
    let simulator = Simulator::new(repository, options.program.as_deref())?;
    let before = Probe::take();
    println!("before: {before}");
    let mut rows = vec![
        ["model", "framework", "s/round", "ours, s/round", "ratio", "accuracy", "ours"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for model in &options.models {
        let (mut ours, mut theirs) = (Vec::new(), PEERS.map(|_| Vec::new()));
        for repeat in 1..=options.repeats {
            for (peer, runs) in PEERS.iter().zip(&mut theirs) {
                eprintln!("{model}, repeat {repeat} of {}: {}", options.repeats, peer.name);
                runs.push(run_peer(&place, peer, model, options.rounds)?);
                // Right after each: both see the same machine.
                ours.push(run_ours(&simulator, &place, model, options.rounds)?);
            }
        }
        for (peer, runs) in PEERS.iter().zip(&theirs) {
            rows.push(row(model, peer.name, runs, &ours));
        }
    }
    let after = Probe::take();
    println!("after: {after}\n");
    print_table(&rows);
    println!(
        "\nMedians of {} repeats of {} rounds, the first round left out but for plain PyTorch, which has no\n\
         start to pay for; accuracy after the last round.",
        options.repeats, options.rounds
    );
    if !(before.is_quiet() && after.is_quiet()) {
        println!("The machine was not quiet.");
    }
    Ok(ExitCode::SUCCESS)
}

/// The folder that the variable `name` names.
pub(super) fn folder(name: &str, what: &str) -> Result<PathBuf, String> {
    let folder =
        std::env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("{name} names no {what}"))?;
    if folder.is_dir() { Ok(folder) } else { Err(format!("{name}={}: is no folder", folder.display())) }
}

/// Python with the peers' packages: the user's choice, or the environment's.
pub(super) fn python(option: Option<&Path>) -> Result<PathBuf, String> {
    let python = option.map(PathBuf::from);
    python.or_else(|| std::env::var_os("TRIBUTARY_PEERS_PYTHON").map(PathBuf::from)).ok_or_else(|| {
        "neither --python nor TRIBUTARY_PEERS_PYTHON names a Python with the peers' packages".to_owned()
    })
}

fn find(options: &Peers) -> Result<Place, String> {
    let scripts = folder("TRIBUTARY_PEERS", "folder with the peers' scripts")?;
    if let Some(missing) = PEERS.iter().find(|peer| !scripts.join(peer.script).is_file()) {
        return Err(format!("{} is not in {}", missing.script, scripts.display()));
    }
    let data = folder("TRIBUTARY_DATA", "folder with the data set mnist")?;
    if !data.join("mnist").is_dir() {
        return Err(format!("{} has no folder mnist", data.display()));
    }
    let python = python(options.python.as_deref())?;
    if !cargo::answers(&python.to_string_lossy(), &["-c", "import torch, pfl, flwr"]) {
        return Err(format!("{} cannot import torch, pfl and flwr", python.display()));
    }
    Ok(Place { scripts, python, data })
}

fn run_peer(place: &Place, peer: &Peer, model: &str, rounds: u32) -> anyhow::Result<Figures> {
    let printed = cargo::output(
        Command::new(&place.python)
            .args(peer.before)
            .arg(place.scripts.join(peer.script))
            .args([
                "--clients",
                CLIENTS,
                "--cohort",
                COHORT,
                "--model",
                model,
                "--rounds",
                &rounds.to_string(),
            ])
            .env("MNIST_DIR", place.data.join("mnist"))
            .env("PYTHONDONTWRITEBYTECODE", "1"),
    )
    .with_context(|| format!("{} failed", peer.script))?;
    read(&printed).with_context(|| format!("{} printed no seconds per round and accuracy", peer.script))
}

/// The figures of a line such as `pfl: 0.463 s/round, first round 1.2 s, accuracy 0.9123`.
fn read(printed: &str) -> Option<Figures> {
    let line = printed.lines().find(|line| line.contains("s/round"))?;
    let seconds = line.split("s/round").next()?.split_whitespace().next_back()?.parse().ok()?;
    let accuracy = line.split_once("accuracy ")?.1.split_whitespace().next()?.parse().ok()?;
    Some(Figures { seconds_per_round: seconds, accuracy })
}

fn run_ours(simulator: &Simulator, place: &Place, model: &str, rounds: u32) -> anyhow::Result<Figures> {
    let name = if model == "2nn" { "mnist-1000-2nn" } else { "mnist-1000" };
    let set = format!("rounds={rounds}");
    let arguments: Vec<OsString> =
        vec!["--set".into(), set.into(), "--data".into(), place.data.clone().into()];
    let measured = simulator.measure(&format!("jobs/bench/{name}.toml"), name, &arguments)?;
    let seconds_per_round = measured.seconds_per_round().context("the run has too few rounds")?;
    let accuracy = measured.accuracy.context("the run was not evaluated")?;
    Ok(Figures { seconds_per_round, accuracy })
}

fn row(model: &str, peer: &str, theirs: &[Figures], ours: &[Figures]) -> Vec<String> {
    let of =
        |runs: &[Figures], figure: fn(&Figures) -> f64| median(&runs.iter().map(figure).collect::<Vec<_>>());
    let seconds = |runs| of(runs, |run| run.seconds_per_round);
    let accuracy = |runs| format!("{:.4}", of(runs, |run| run.accuracy));
    vec![
        model.to_owned(),
        peer.to_owned(),
        format!("{:.3}", seconds(theirs)),
        format!("{:.3}", seconds(ours)),
        format!("{:.2}", seconds(theirs) / seconds(ours)),
        accuracy(theirs),
        accuracy(ours),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scripts_lines_are_read() {
        let figures = |seconds_per_round, accuracy| Some(Figures { seconds_per_round, accuracy });
        let pfl = "a warning\npfl: 0.463 s/round, first round 1.2 s, accuracy 0.9123\npfl: 0.5 s/round, …\n";
        assert_eq!(read(pfl), figures(0.463, 0.9123));
        assert_eq!(read("ideal one-core: 1.060 s/round, accuracy 0.9000"), figures(1.06, 0.9));
        assert_eq!(read("pfl: nan"), None);
        assert_eq!(read("pfl: 0.4 s/round"), None);
    }

    #[test]
    fn a_row_compares_medians() {
        let runs = |seconds: &[f64]| {
            seconds.iter().map(|s| Figures { seconds_per_round: *s, accuracy: 0.9 }).collect::<Vec<_>>()
        };
        let cells = row("2nn", "pfl", &runs(&[0.3, 0.1, 0.2]), &runs(&[0.1, 9.0, 0.1]));
        assert_eq!(cells[2..], ["0.200", "0.100", "2.00", "0.9000", "0.9000"]);
    }
}
