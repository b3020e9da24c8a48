//! Developer commands (`cargo xtask …`): set-up, demo, test, faults, dist, benchmarks. Never links libtorch.

mod bench;
mod cargo;
mod command_line;
mod demo;
mod dist;
mod download;
mod faults;
mod federation;
mod files;
mod libtorch;
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;

use command_line::{Command, USAGE};

fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
    let command = match command_line::parse(arguments) {
        Ok(command) => command,
        Err(message) => {
            eprintln!("error: {message}; `cargo xtask --help` lists the commands");
            return ExitCode::from(2);
        }
    };
    match run(command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let repository = repository()?;
    match command {
        Command::Help => print!("{USAGE}"),
        Command::Setup => libtorch::set_up(&repository)?,
        Command::Demo { arguments } => return demo::run(&repository, &arguments),
        Command::RealDemo => return federation::run(&repository),
        Command::Test { quick } => test::run(&repository, quick)?,
        Command::Faults { arguments } => return faults::run(&repository, &arguments),
        Command::Bench(bench) => return bench::run(&repository, &bench),
        Command::Dist { out } => dist::run(&repository, out.as_deref())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The repository's root: the folder above this crate, where cargo says the crate is now.
fn repository() -> anyhow::Result<PathBuf> {
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.parent().map(Path::to_path_buf).context("xtask's folder has no parent; run it as `cargo xtask`")
}
