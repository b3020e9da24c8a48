//! `cargo xtask demo`: the federation of `jobs/demo.toml` in the simulator, from nothing to an accuracy.

use std::path::Path;
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
    libtorch::set_up(repository)?;
    println!("building the simulator (the first time: minutes)");
    // The whole workspace's features, as the tests have them: going from demo to test compiles no crate twice.
    cargo::run(cargo::cargo(repository).args(["build", "--workspace", "--bin", "tributary-sim"]))
        .context("the simulator does not build")?;
    let built = start.elapsed();
    let simulator = cargo::binaries("debug")?.join("tributary-sim");
    let status = Command::new(&simulator)
        .current_dir(repository)
        .args(["run", JOB, "--out", OUT])
        .args(arguments)
        .status()
        .with_context(|| format!("cannot start {}", simulator.display()))?;
    println!("demo: {} (set-up and build {})", cargo::elapsed(start), cargo::duration(built));
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
