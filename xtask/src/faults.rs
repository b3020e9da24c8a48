//! `cargo xtask faults`: production code in a seeded world of trouble, and whether anything happened that must not.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::demo;

/// Builds the simulator, runs `tributary-sim faults` with `arguments`, and ends with its exit code.
pub(crate) fn run(repository: &Path, arguments: &[String]) -> anyhow::Result<ExitCode> {
    let simulator = demo::simulator(repository)?;
    let mut command = Command::new(&simulator);
    command.current_dir(repository).arg("faults").args(arguments);
    let status = command.status().with_context(|| format!("cannot start {}", simulator.display()))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
