//! The command line of `tributary-server`: what it accepts, and with which exit code it ends.

mod backup;
mod commands;
mod init;
mod show;
#[cfg(test)]
mod tests;

use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;
use tributary_common::ids::{NodeName, RunId};

use crate::config::{Drill, ServerConfig};

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  it failed: the coordinator refused or cannot go on, or the run failed or was stopped
  2  wrong usage, configuration or job

Logs go to stderr; RUST_LOG sets what is logged (default: info).";

/// Tributary's coordinator: runs rounds over nodes that train on their own data.
#[derive(Debug, Parser)]
#[command(name = "tributary-server", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Form of the log on stderr.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// Form of what a command prints on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// For machines: one JSON object per line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a folder for a coordinator: its configuration, certificate authority and store.
    Init {
        /// The folder; it is made if it is missing.
        dir: PathBuf,
        /// Name or address under which nodes reach the coordinator; the first is in the URL that they dial.
        #[arg(long = "name", value_name = "HOST", default_value = "localhost")]
        names: Vec<String>,
        /// Where the coordinator listens.
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7443")]
        listen: SocketAddr,
    },
    /// Run the coordinator, until SIGTERM or SIGINT; a second signal ends it at once.
    Serve {
        #[command(flatten)]
        config: ConfigArg,
        /// For drills: stand still at this step of a round, to be killed.
        #[arg(long, value_name = "STEP", hide = true)]
        pause_at: Option<Drill>,
    },
    /// Tokens with which nodes enrol.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Nodes that enrolled.
    #[command(subcommand)]
    Nodes(NodesCommand),
    /// Runs of jobs.
    #[command(subcommand)]
    Run(RunCommand),
    /// The privacy ledgers of runs.
    #[command(subcommand)]
    Ledger(LedgerCommand),
    /// Write all that the coordinator keeps, of one moment, to a file; it may be running or stopped. The file holds
    /// its keys: keep it as you keep them.
    Backup {
        /// The file to write; it must not be there yet.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Put a backup into a new folder. Nothing is written unless the whole backup is sound.
    Restore {
        /// The backup.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
        /// The folder; it must be missing or empty.
        #[arg(long)]
        dir: PathBuf,
    },
    /// Check a configuration file, and say what it means.
    CheckConfig {
        /// The file.
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum LedgerCommand {
    /// Write the privacy ledger of a run with its signed head to a file, for `tributary-audit`.
    Export {
        /// The run's id.
        run: RunId,
        /// The file to write; an existing one is replaced.
        #[arg(long, value_name = "FILE", default_value = "ledger-export.jsonl")]
        out: PathBuf,
        #[command(flatten)]
        config: ConfigArg,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token with which one node can enrol once, and print the commands for its operator.
    Create {
        /// The node's name: 1 to 63 of a-z, 0-9, '-', '_' and '.'.
        #[arg(long)]
        name: NodeName,
        /// How long the token is valid.
        #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=720))]
        valid_hours: u32,
        #[command(flatten)]
        format: FormatArg,
        #[command(flatten)]
        config: ConfigArg,
    },
}

#[derive(Debug, Subcommand)]
enum NodesCommand {
    /// List the enrolled nodes.
    List {
        #[command(flatten)]
        format: FormatArg,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Accept the ledger of a node that lost records, such as after a restore from a backup: forget the head that it
    /// showed before. Ask its operator first; both heads stay in the runs' ledgers, and an auditor sees them.
    AcceptLedger {
        /// The node's name.
        name: NodeName,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Revoke a node: its connections end at once, and it can come back only with a new token.
    Revoke {
        /// The node's name.
        name: NodeName,
        #[command(flatten)]
        config: ConfigArg,
    },
}

#[derive(Debug, Subcommand)]
enum RunCommand {
    /// Submit a job: it runs when the runs before it are over. Prints the run's id.
    Submit {
        /// The job file.
        job: PathBuf,
        /// A .safetensors file to start from, instead of parameters drawn from the job's seed.
        #[arg(long, value_name = "FILE")]
        initial_model: Option<PathBuf>,
        /// Watch the run to its end.
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        format: FormatArg,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// List all runs.
    List {
        #[command(flatten)]
        format: FormatArg,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Show a run: its job, and what came of each round.
    Show {
        /// The run's id.
        run: RunId,
        #[command(flatten)]
        format: FormatArg,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Watch a run from its first round to its end.
    Watch {
        /// The run's id.
        run: RunId,
        #[command(flatten)]
        format: FormatArg,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Stop a run. Its published rounds stay.
    Stop {
        /// The run's id.
        run: RunId,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Write the last published model of a run as a .safetensors file.
    Export {
        /// The run's id.
        run: RunId,
        /// The file to write; an existing one is replaced.
        #[arg(long, value_name = "FILE", default_value = "model.safetensors")]
        out: PathBuf,
        #[command(flatten)]
        config: ConfigArg,
    },
}

#[derive(Debug, Args)]
struct ConfigArg {
    /// The coordinator's configuration file.
    #[arg(long = "config", value_name = "FILE", env = "TRIBUTARY_SERVER_CONFIG", default_value = CONFIG_FILE)]
    path: PathBuf,
}

impl ConfigArg {
    fn load(&self) -> Result<ServerConfig, Failure> {
        ServerConfig::load(&self.path).map_err(Failure::usage)
    }
}

#[derive(Debug, Args)]
struct FormatArg {
    /// Form of the output.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// The configuration file's name, as `init` writes it.
const CONFIG_FILE: &str = "server.toml";

/// Why a command ends without success: one line, and the exit code.
#[derive(Debug)]
struct Failure {
    code: u8,
    line: String,
}

impl Failure {
    /// Wrong usage, configuration or job.
    fn usage(error: impl std::fmt::Display) -> Self {
        Self { code: 2, line: error.to_string() }
    }

    /// Anything else.
    fn failed(error: impl std::fmt::Display) -> Self {
        Self { code: 1, line: error.to_string() }
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        match status.code() {
            tonic::Code::InvalidArgument => Self::usage(status.message()),
            _ if status.message().is_empty() => Self::failed(status.code().description()),
            _ => Self::failed(status.message()),
        }
    }
}

/// Reads the command line, does what it says, and returns the exit code.
pub fn main() -> ExitCode {
    let Cli { command, log_format } = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(colours).with_target(false);
    // An error means that a log is set up already, and that one is used then.
    let _ = match log_format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().try_init(),
    };
    match run(command) {
        Ok(code) => code,
        Err(Failure { code, line }) => {
            let line = line.replace('\n', " ");
            // With stderr closed there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "error: {line}");
            ExitCode::from(code)
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    let done = |()| ExitCode::SUCCESS;
    match command {
        Command::Init { dir, names, listen } => print(&init::init(&dir, &names, listen)?).map(done),
        Command::CheckConfig { file } => {
            let config = ServerConfig::load(&file).map_err(Failure::usage)?;
            print(&show::config(&config)).map(done)
        }
        Command::Serve { config, pause_at } => {
            commands::serve(&ServerConfig { pause_at, ..config.load()? }).map(done)
        }
        Command::Backup { out, config } => commands::with_runtime(backup::backup(out, config)),
        Command::Restore { from, dir } => print(&backup::restore(&from, &dir)?).map(done),
        Command::Token(command) => commands::with_runtime(commands::token(command)),
        Command::Nodes(command) => commands::with_runtime(commands::nodes(command)),
        Command::Run(command) => commands::with_runtime(commands::run(command)),
        Command::Ledger(command) => commands::with_runtime(commands::ledger(command)),
    }
}

/// Prints text as it is on stdout.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    printed.map_err(|error| Failure::failed(format!("cannot write to stdout: {error}")))
}
