//! `cargo xtask bench`: what the simulator costs, beside other frameworks and against the size of its work.

mod options;
mod peers;
mod privacy;
mod probe;
mod robust;
mod scale;
mod secagg;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, bail};

use crate::{cargo, files, libtorch};

pub(crate) use options::{Bench, parse};

/// Where the runs of benchmarks are left, from the repository.
const OUT: &str = "runs/bench";
/// How often a child's peak memory is read: what it adds in its last moment is not seen.
const MEMORY_EVERY: Duration = Duration::from_millis(10);

/// Runs a benchmark to its end. Exit code 2 means that it was skipped.
pub(crate) fn run(repository: &Path, bench: &Bench) -> anyhow::Result<ExitCode> {
    match bench {
        Bench::Engine { filter } => {
            libtorch::set_up(repository)?;
            let mut command = cargo::cargo(repository);
            cargo::run(command.args(["bench", "--workspace", "--benches", "--"]).args(filter))?;
        }
        Bench::Peers(options) => return peers::run(repository, options),
        Bench::Privacy { python } => return privacy::run(repository, python.as_deref()),
        Bench::Secagg(options) => return secagg::run(repository, options),
        Bench::Robust { program } => return robust::run(repository, program.as_deref()),
        Bench::Scale(options) => scale::run(repository, options)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A built simulator.
struct Simulator {
    program: PathBuf,
    repository: PathBuf,
}

/// What one run showed.
#[derive(Debug, PartialEq)]
struct Measured {
    /// Seconds from the invitation to the published model of each round.
    round_seconds: Vec<f64>,
    /// Share of correct examples after the last round, 0 to 1.
    accuracy: Option<f64>,
    /// Largest resident memory, in bytes; 0 where the system does not tell.
    peak_bytes: u64,
}

impl Measured {
    /// The mean of all rounds but the first, which pays for the start.
    fn seconds_per_round(&self) -> Option<f64> {
        let rest = self.round_seconds.get(1..).filter(|rest| !rest.is_empty())?;
        Some(rest.iter().sum::<f64>() / rest.len() as f64)
    }
}

impl Simulator {
    /// The release build, or the program that the user names.
    fn new(repository: &Path, program: Option<&Path>) -> anyhow::Result<Self> {
        let program = match program {
            Some(program) => fs::canonicalize(program)
                .with_context(|| format!("--program {}: is not there", program.display()))?,
            None => {
                libtorch::set_up(repository)?;
                eprintln!("building the simulator for release (the first time: many minutes)");
                let mut command = cargo::cargo(repository);
                cargo::run(command.args(["build", "--release", "--workspace", "--bin", "tributary-sim"]))
                    .context("the simulator does not build")?;
                cargo::binaries("release")?.join("tributary-sim")
            }
        };
        Ok(Self { program, repository: repository.to_path_buf() })
    }

    /// Runs a scenario with `arguments` added into the folder `name` and measures it.
    fn measure(&self, scenario: &str, name: &str, arguments: &[OsString]) -> anyhow::Result<Measured> {
        let out = self.repository.join(OUT).join(name);
        files::remove(&out)?;
        let mut child = Command::new(&self.program)
            .current_dir(&self.repository)
            .args(["run", scenario, "--format", "json", "--out"])
            .arg(&out)
            .args(arguments)
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let status = PathBuf::from(format!("/proc/{}/status", child.id()));
        let mut peak_bytes = 0;
        let ended = loop {
            peak_bytes = fs::read_to_string(&status).ok().and_then(|text| peak(&text)).unwrap_or(peak_bytes);
            if let Some(ended) = child.try_wait()? {
                break ended;
            }
            thread::sleep(MEMORY_EVERY);
        };
        if !ended.success() {
            bail!("tributary-sim run {scenario} ended with {ended}");
        }
        let metrics = out.join("metrics.csv");
        let text =
            fs::read_to_string(&metrics).with_context(|| format!("cannot read {}", metrics.display()))?;
        let (round_seconds, accuracy) =
            rounds(&text).with_context(|| format!("{} is not a run's table", metrics.display()))?;
        Ok(Measured { round_seconds, accuracy, peak_bytes })
    }
}

/// The largest resident memory in bytes that `/proc/PID/status` tells.
fn peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// Each round's seconds and the last accuracy of a `metrics.csv`.
fn rounds(csv: &str) -> Option<(Vec<f64>, Option<f64>)> {
    let mut lines = csv.lines();
    let columns: Vec<&str> = lines.next()?.split(',').collect();
    let column = |name: &str| columns.iter().position(|column| *column == name);
    let (seconds_at, accuracy_at) = (column("seconds")?, column("accuracy")?);
    let (mut seconds, mut accuracy) = (Vec::new(), None);
    for line in lines {
        let cells: Vec<&str> = line.split(',').collect();
        seconds.push(cells.get(seconds_at)?.parse().ok()?);
        accuracy = cells.get(accuracy_at)?.parse().ok();
    }
    Some((seconds, accuracy))
}

/// The middle value, or the mean of the two in the middle; 0 without any.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => at(odd / 2),
        even => f64::midpoint(at(even / 2 - 1), at(even / 2)),
    }
}

/// Prints a table: the first column to the left, the others to the right.
fn print_table(rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = width(column);
            line += &if column == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
        }
        println!("{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runs_table_gives_seconds_and_the_last_accuracy() {
        let csv = "round,accuracy,loss,seconds\n1,,,3.5\n2,,,1.0\n3,0.9,0.3,2.0\n";
        assert_eq!(rounds(csv), Some((vec![3.5, 1.0, 2.0], Some(0.9))));
        assert_eq!(rounds("round,accuracy,loss,seconds\n1,,,x\n"), None);
        assert_eq!(rounds("a,b\n"), None);
        let measured = |round_seconds| Measured { round_seconds, accuracy: None, peak_bytes: 0 };
        assert_eq!(measured(vec![3.5, 1.0, 2.0]).seconds_per_round(), Some(1.5));
        assert_eq!(measured(vec![3.5]).seconds_per_round(), None);
    }

    #[test]
    fn medians_and_peaks() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
        assert_eq!(peak("Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n"), Some(2048 * 1024));
        assert_eq!(peak("Name:\tx\n"), None);
    }
}
