//! `cargo xtask demo`: the federation of `jobs/demo.toml` in the simulator, from nothing to an accuracy.
//! Its own lines go to standard error: with `--format json` standard output is the simulator's alone.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::Context;

use crate::cargo;
use crate::libtorch;

const JOB: &str = "jobs/demo.toml";
const OUT: &str = "runs/demo";

/// Sets up, builds the simulator, runs the demo job with `arguments` added, and ends with its exit code.
pub(crate) fn run(repository: &Path, arguments: &[String]) -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    let simulator = simulator(repository)?;
    let built = start.elapsed();
    let status = Command::new(&simulator)
        .current_dir(repository)
        .args(simulator_arguments(arguments))
        .status()
        .with_context(|| format!("cannot start {}", simulator.display()))?;
    eprintln!("demo: {} (set-up and build {})", cargo::elapsed(start), cargo::duration(built));
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Sets up, builds the simulator, and says where it is.
pub(crate) fn simulator(repository: &Path) -> anyhow::Result<PathBuf> {
    libtorch::set_up(repository)?;
    eprintln!("building the simulator (the first time: minutes)");
    // The whole workspace's features, as the tests have them: going from demo to test compiles no crate twice.
    cargo::run(cargo::cargo(repository).args(["build", "--workspace", "--bin", "tributary-sim"]))
        .context("the simulator does not build")?;
    Ok(cargo::binaries("debug")?.join("tributary-sim"))
}

/// The demo's arguments: the user's own `--out` stands in for the usual folder.
fn simulator_arguments(arguments: &[String]) -> Vec<&str> {
    let names_out = arguments.iter().any(|argument| argument == "--out" || argument.starts_with("--out="));
    let out: &[&str] = if names_out { &[] } else { &["--out", OUT] };
    ["run", JOB].iter().chain(out).copied().chain(arguments.iter().map(String::as_str)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_out_replaces_the_usual_one() {
        let with = |arguments: &[&str]| {
            let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
            simulator_arguments(&arguments).join(" ")
        };
        assert_eq!(with(&["--seed", "3"]), "run jobs/demo.toml --out runs/demo --seed 3");
        assert_eq!(with(&["--out", "there"]), "run jobs/demo.toml --out there");
        assert_eq!(with(&["--out=there"]), "run jobs/demo.toml --out=there");
    }
}
