//! The command line: arguments, what is printed, exit codes.

mod canary;
mod figures;
mod ledgers;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

/// Recomputes privacy claims from what was recorded, offline.
#[derive(Debug, Parser)]
#[command(
    name = "tributary-audit",
    version,
    after_help = "Exit codes: 0 nothing to object to, 1 findings, 2 bad usage or unreadable input."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what a mechanism costs.
    Epsilon(figures::EpsilonArguments),
    /// Say how much noise a target epsilon asks for.
    Noise(figures::NoiseArguments),
    /// Check ledgers: nothing changed, nothing overspent, no claim too small.
    Verify(ledgers::VerifyArguments),
    /// Write a report of what was promised and spent, by whom, until when.
    Report(ledgers::ReportArguments),
    /// Hold a node's ledger against a coordinator's.
    Compare(ledgers::CompareArguments),
    /// Test a claim by an audit run's canaries and the noise that it recorded.
    Canary(canary::CanaryArguments),
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

/// What a command that could be carried out came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Nothing to object to.
    Sound,
    /// Something is wrong with the claim or with what was done.
    Findings,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // clap prints usage errors and ends the process with 2 by itself.
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Epsilon(arguments) => figures::epsilon(&arguments),
        Command::Noise(arguments) => figures::noise(&arguments),
        Command::Verify(arguments) => ledgers::verify(&arguments),
        Command::Report(arguments) => ledgers::report(&arguments),
        Command::Compare(arguments) => ledgers::compare(&arguments),
        Command::Canary(arguments) => canary::canary(&arguments),
    };
    match outcome {
        Ok(Outcome::Sound) => ExitCode::SUCCESS,
        Ok(Outcome::Findings) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("tributary-audit: {error:#}");
            ExitCode::from(2)
        }
    }
}
