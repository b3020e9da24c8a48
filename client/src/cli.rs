//! The command line of `tributary-client`.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::{Job, Level};

use tributary_common::ledger::account::NodeLedger;
use tributary_common::ledger::book::NodeBook;
use tributary_common::ledger::head::LedgerKey;
use tributary_common::ledger::hex::Hex;
use tributary_common::ledger::record::PublicKey;
use tributary_common::record::Reason;
use tributary_common::secagg::abort::Abort;
use tributary_common::secagg::parameters::what_a_sum_reveals;
use tributary_common::time::Clock;
use tributary_common::token::JoinToken;

use crate::account;
use crate::config::NodeConfig;
use crate::enrol::{self, Credentials, KEY_FILE};
use crate::masking::peers;
use crate::node::{self, Format, Options, TrainerKind};
use crate::participant::Drill;

const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;

/// A node of a Tributary federation: trains on data that stay here.
///
/// Exit codes: 0 done or stopped, 1 failed or refused, 2 bad usage or configuration.
#[derive(Debug, Parser)]
#[command(name = "tributary-client", version)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Enrol this node with a one-time token; its private key is made here and never leaves.
    Join {
        /// The coordinator, such as https://coordinator.example.org:7443.
        #[arg(long)]
        server: String,
        /// The token from `tributary-server token create`.
        #[arg(long)]
        token: String,
        /// The node's own folder; made if it is not there.
        #[arg(long)]
        dir: PathBuf,
        /// The node's name, if you want it checked against the token's.
        #[arg(long)]
        name: Option<NodeName>,
    },
    /// Take part: connect, train when invited, until stopped (SIGTERM or Ctrl-C).
    Start(Start),
    /// Get a new certificate now, for the same key; a running node renews by itself when less than a third of the time is
    /// left, and goes on with the present one until then.
    Renew {
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
    },
    /// Check configuration, data, certificate and connection, one line each.
    Preflight {
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
    },
    /// What this node allows.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// What this node's data spent: its privacy ledger.
    #[command(subcommand)]
    Ledger(LedgerCommand),
    /// Show this node's fingerprint, for other nodes to pin: read it out by telephone.
    Identity {
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
    },
    /// Whom this node knows: masks protect it from the coordinator only among nodes that are really others'.
    #[command(subcommand)]
    Peers(PeersCommand),
}

#[derive(Debug, Subcommand)]
enum PeersCommand {
    /// Show pinned nodes, and the identities of others as they were seen first.
    List {
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
        /// How to print it.
        #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
        format: OutputFormat,
    },
    /// Pin a node: whoever has another fingerprint is not it. Ask its operator, never the coordinator.
    Pin {
        /// The node's name.
        name: NodeName,
        /// What `tributary-client identity` prints there; with spaces, quote it.
        fingerprint: String,
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
    },
    /// Take a pin back.
    Unpin {
        /// The node's name.
        name: NodeName,
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum LedgerCommand {
    /// Show how the accounts stand, whether the node runs or not.
    Show {
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
        /// How to print it.
        #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
        format: OutputFormat,
    },
    /// Write the whole ledger with its signed head to a file, for `tributary-audit`.
    Export {
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
        /// The file to write; an existing one is replaced.
        #[arg(long, value_name = "FILE", default_value = "ledger-export.jsonl")]
        out: PathBuf,
    },
    /// Accept that records were lost, such as after a restore from a backup, so that the node may spend again. Every
    /// capped account is charged all that is left of it, unless --charge says how much the lost records spent at most.
    AcceptRestore {
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
        /// Why, for the ledger, in one line.
        #[arg(long)]
        reason: String,
        /// ε that the lost records spent at most on this node's account: your word, and the ledger says so.
        #[arg(long, value_name = "EPSILON")]
        charge: Option<f64>,
    },
    /// Give back what a run that is over had set aside for rounds that never started. A coordinator says so itself when
    /// its run is over; this is for one that is gone.
    Close {
        /// The run's id, as the node's log shows it.
        run: RunId,
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Start {
    /// The node's configuration.
    #[arg(long)]
    config: PathBuf,
    /// How progress is printed.
    #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
    format: OutputFormat,
    /// For drills: wait so long between storing an update and sending it, so that a test can kill the node there.
    #[arg(long, hide = true, default_value_t = 0)]
    pause_before_upload_seconds: u32,
    /// For drills: stand still at this step of a round, so that a test can kill the node there.
    #[arg(long, hide = true, value_enum)]
    pause_at: Option<Drill>,
    /// For protocol tests: `arithmetic` does not train.
    #[arg(long, hide = true, value_enum, default_value_t = TrainerChoice::Torch)]
    trainer: TrainerChoice,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Tell whether this node would take part in a job: OK, or the reason.
    Check {
        /// The job file.
        job: PathBuf,
        /// The node's configuration.
        #[arg(long)]
        config: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OutputFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TrainerChoice {
    Torch,
    Arithmetic,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let CommandLine { command } = CommandLine::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_ansi(colours).with_target(false).init();
    let result = match command {
        Command::Join { server, token, dir, name } => join(&server, &token, &dir, name.as_ref()),
        Command::Start(start) => run(&start),
        Command::Renew { config } => renew(&config),
        Command::Preflight { config } => preflight(&config),
        Command::Policy(PolicyCommand::Check { job, config }) => policy_check(&job, &config),
        Command::Ledger(command) => ledger(command),
        Command::Identity { config } => identity(&config),
        Command::Peers(command) => known_peers(command),
    };
    result.unwrap_or_else(|Failure { code, line }| {
        // Standard error may be closed: then only the exit code tells.
        let _ = writeln!(std::io::stderr(), "error: {line}");
        ExitCode::from(code)
    })
}

/// One line for people, and the exit code.
struct Failure {
    code: u8,
    line: String,
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure { code: FAILED, line: error.to_string() }
}

fn bad_usage(error: impl std::fmt::Display) -> Failure {
    Failure { code: BAD_USAGE, line: error.to_string() }
}

fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{line}"); // whoever reads may have gone away
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().map_err(failed)
}

fn join(server: &str, token: &str, dir: &Path, name: Option<&NodeName>) -> Result<ExitCode, Failure> {
    let token: JoinToken = token.trim().parse().map_err(bad_usage)?;
    if !server.starts_with("https://") {
        return Err(bad_usage(format!("--server {server}: write https://HOST:PORT")));
    }
    let joined = runtime()?.block_on(enrol::join(server, &token, dir, name)).map_err(failed)?;
    let config = joined.config.display();
    let days = (joined.credentials.expires.seconds_since(Clock.now()) / 86_400.0).round();
    say(format_args!(
        "node {} is enrolled; its certificate is valid for {days} days",
        joined.credentials.node
    ));
    if joined.config_kept {
        say(format_args!("{config} was there already and is left as it is"));
    } else {
        say(format_args!("say in {config} which data this node has"));
    }
    say(format_args!("then: tributary-client preflight --config {config}"));
    say(format_args!("and:  tributary-client start --config {config}"));
    Ok(ExitCode::SUCCESS)
}

fn run(start: &Start) -> Result<ExitCode, Failure> {
    let config = NodeConfig::load(&start.config).map_err(bad_usage)?;
    let options = Options {
        format: match start.format {
            OutputFormat::Text => Format::Text,
            OutputFormat::Json => Format::Json,
        },
        pause_before_upload_seconds: start.pause_before_upload_seconds,
        pause_at: start.pause_at,
        trainer: match start.trainer {
            TrainerChoice::Torch => TrainerKind::Torch,
            TrainerChoice::Arithmetic => TrainerKind::Arithmetic,
        },
    };
    let data = config.load_data(&start.config).map_err(bad_usage)?;
    runtime()?.block_on(node::run(&config, data, &options)).map_err(failed)?;
    Ok(ExitCode::SUCCESS)
}

fn renew(config: &Path) -> Result<ExitCode, Failure> {
    let config = NodeConfig::load(config).map_err(bad_usage)?;
    let present = Credentials::load(&config.dir).map_err(failed)?;
    present.check(Clock.now()).map_err(failed)?;
    let dialer = present.dialer(&config.server);
    let renewed = runtime()?.block_on(enrol::renew(&dialer, &config.dir, &present)).map_err(failed)?;
    let days = renewed.expires.seconds_since(Clock.now()) / 86_400.0;
    say(format_args!("{}: the certificate is renewed, and valid for {days:.0} days", renewed.node));
    Ok(ExitCode::SUCCESS)
}

fn ledger(command: LedgerCommand) -> Result<ExitCode, Failure> {
    match command {
        LedgerCommand::Show { config, format } => {
            let (ledger, _) = peek(&config)?;
            if ledger.is_halted() {
                say(format_args!(
                    "HALTED: this ledger was longer once; nothing is spent until the loss is accepted (ledger accept-restore)"
                ));
            }
            for reading in ledger.readings() {
                match format {
                    OutputFormat::Text => say(format_args!("{}", account::describe(&reading))),
                    OutputFormat::Json => say(format_args!("{}", account::to_json(&reading))),
                }
            }
        }
        LedgerCommand::Export { config, out } => {
            let (_, export) = peek(&config)?;
            std::fs::write(&out, export)
                .map_err(|error| failed(format_args!("{}: {error}", out.display())))?;
            say(format_args!("{}", out.display()));
        }
        LedgerCommand::AcceptRestore { config, reason, charge } => {
            let config_path = config;
            let config = NodeConfig::load(&config_path).map_err(bad_usage)?;
            let credentials = Credentials::load(&config.dir).map_err(failed)?;
            account::accept_restore(
                &config.dir,
                &credentials.key_pem,
                &config.account.name,
                &reason,
                charge,
                Clock.now(),
            )
            .map_err(|error| failed(crate::transport::chain(&error)))?;
            say(format_args!("the loss is in the ledger; the node may start"));
        }
        LedgerCommand::Close { run, config } => {
            let config_path = config;
            let config = NodeConfig::load(&config_path).map_err(bad_usage)?;
            let _folder = crate::store::Folder::open(&config.dir).map_err(failed)?;
            let credentials = Credentials::load(&config.dir).map_err(failed)?;
            let data = config.load_data(&config_path).map_err(bad_usage)?;
            let mut account =
                node::open_account(&config, &data, &credentials, Clock.now()).map_err(failed)?;
            account.run_over(run, Clock.now()).map_err(|error| failed(crate::transport::chain(&error)))?;
            say(format_args!("{}", account.describe()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn identity(config: &Path) -> Result<ExitCode, Failure> {
    let config = NodeConfig::load(config).map_err(bad_usage)?;
    let credentials = Credentials::load(&config.dir).map_err(failed)?;
    let key = peers::identity(&credentials.key_pem).map_err(failed)?;
    let identity = PublicKey(Hex(key.verifying_key().to_bytes()));
    say(format_args!("{}: {}", credentials.node, peers::fingerprint(&identity)));
    Ok(ExitCode::SUCCESS)
}

fn known_peers(command: PeersCommand) -> Result<ExitCode, Failure> {
    let dir = |config: &Path| NodeConfig::load(config).map(|config| config.dir).map_err(bad_usage);
    match command {
        PeersCommand::List { config, format } => {
            let known = peers::load(&dir(&config)?).map_err(failed)?;
            match format {
                OutputFormat::Text => {
                    for pin in known.pins() {
                        say(format_args!("pinned  {}: {}", pin.name, peers::fingerprint(&pin.identity)));
                    }
                    for (id, identity) in peers::seen(&known) {
                        say(format_args!("seen    {id}: {}", peers::fingerprint(&identity)));
                    }
                    if known.has_no_pins() {
                        say(format_args!(
                            "nobody is pinned: the coordinator could be every other participant"
                        ));
                    }
                }
                OutputFormat::Json => {
                    say(format_args!("{}", serde_json::to_string(&known).map_err(failed)?));
                }
            }
        }
        PeersCommand::Pin { name, fingerprint, config } => {
            let identity = peers::read_fingerprint(&fingerprint).map_err(bad_usage)?;
            peers::change(&dir(&config)?, |known| known.pin(name.clone(), identity)).map_err(failed)?;
            say(format_args!("{name} is pinned: {}", peers::fingerprint(&identity)));
        }
        PeersCommand::Unpin { name, config } => {
            let was_pinned = peers::change(&dir(&config)?, |known| known.unpin(&name)).map_err(failed)?;
            if !was_pinned {
                return Err(failed(format_args!("{name} was not pinned")));
            }
            say(format_args!("{name} is no longer pinned"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The ledger of a node that may be running.
fn peek(config: &Path) -> Result<(NodeLedger, String), Failure> {
    let config = NodeConfig::load(config).map_err(bad_usage)?;
    let credentials = Credentials::load(&config.dir).map_err(failed)?;
    let key = LedgerKey::from_pem(&credentials.key_pem).map_err(failed)?;
    let path = config.dir.join(account::LEDGER_FILE);
    NodeBook::peek(&path, &key).map_err(|error| failed(crate::transport::chain(&error)))
}

fn policy_check(job: &Path, config_path: &Path) -> Result<ExitCode, Failure> {
    let config = NodeConfig::load(config_path).map_err(bad_usage)?;
    let text =
        std::fs::read_to_string(job).map_err(|error| bad_usage(format!("{}: {error}", job.display())))?;
    let job = Job::parse(&text).map_err(|error| bad_usage(format!("{}: {error}", job.display())))?;
    let data = config.load_data(config_path).map_err(bad_usage)?;
    let checked = config.profile(&data).check(&job, data.counts()).and_then(|()| {
        let Ok(credentials) = Credentials::load(&config.dir) else {
            return Ok("not enrolled yet, so no account".into());
        };
        let strict = job.secure_aggregation.as_ref().is_some_and(|masks| masks.level == Level::Strict);
        if strict && peers::load(&config.dir).is_ok_and(|known| known.has_no_pins()) {
            let detail = Abort::NoPins.to_string();
            return Err(crate::machine::Failure { reason: Reason::Policy, detail });
        }
        account::would_admit(&config, &data, &credentials, &job)
    });
    match checked {
        Ok(account) => {
            say(format_args!("OK: this node would take part in {:?} ({account})", job.name));
            if let Ok(Some(promise)) = job.promise() {
                say(format_args!("{promise}"));
            }
            if let Some(line) = account::worth_alone(&job) {
                say(format_args!("{line}"));
            }
            if job.secure_aggregation.is_some() {
                say(format_args!(
                    "masked: {}",
                    what_a_sum_reveals(job.cohort.minimum.min(u32::from(u16::MAX)) as u16)
                ));
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(refusal) => {
            say(format_args!("REFUSED: {}", refusal.detail));
            Ok(ExitCode::from(FAILED))
        }
    }
}

/// One check after the other; what cannot be checked after a failure is left out.
fn preflight(config_path: &Path) -> Result<ExitCode, Failure> {
    let mut passed = true;
    let mut check = |what: &str, result: Result<String, String>| {
        passed &= result.is_ok();
        match result {
            Ok(detail) => say(format_args!("PASS  {what}: {detail}")),
            Err(problem) => say(format_args!("FAIL  {what}: {problem}")),
        }
    };
    let config = NodeConfig::load(config_path);
    check(
        "configuration",
        config.as_ref().map(|_| config_path.display().to_string()).map_err(ToString::to_string),
    );
    if let Ok(config) = &config {
        check("data", describe_data(config, config_path));
        check("private key", key_is_private(&config.dir.join(KEY_FILE)));
        let credentials = Credentials::load(&config.dir);
        let valid = credentials.as_ref().map_err(ToString::to_string).and_then(|credentials| {
            credentials.check(Clock.now()).map_err(|error| error.to_string())?;
            let days = credentials.expires.seconds_since(Clock.now()) / 86_400.0;
            Ok(format!("node {}, valid for {days:.0} days", credentials.node))
        });
        check("certificate", valid);
        let known = peers::load(&config.dir).map_err(|error| error.to_string());
        check(
            "peers",
            known.map(|known| match known.pins().count() {
                0 => {
                    "nobody is pinned: in masked rounds the coordinator could be every other node".to_owned()
                }
                pins => format!("{pins} pinned"),
            }),
        );
        if let Ok(credentials) = &credentials {
            let dialer = credentials.dialer(&config.server);
            let reached = runtime()?.block_on(dialer.control()).map(|_| config.server.clone());
            check("coordinator", reached);
        }
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

fn describe_data(config: &NodeConfig, config_path: &Path) -> Result<String, String> {
    let data = config.load_data(config_path).map_err(|error| error.to_string())?;
    let (counts, shape, classes) = (data.counts(), &data.example_shape, data.classes);
    let needed = match config.role {
        crate::machine::Role::Trainer => counts.train,
        crate::machine::Role::Evaluator => counts.test,
    };
    if needed == 0 {
        return Err(format!(
            "{} training and {} test examples: nothing to do for this role",
            counts.train, counts.test
        ));
    }
    let (train, test) = (counts.train, counts.test);
    Ok(format!("{train} training and {test} test examples of shape {shape:?} in {classes} classes"))
}

fn key_is_private(path: &Path) -> Result<String, String> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = std::fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(format!("{}: mode {mode:03o} lets others read it: run chmod 600", path.display()));
    }
    Ok(format!("{} (mode {mode:03o})", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound_and_hides_the_drills() {
        CommandLine::command().debug_assert();
        let mut command = CommandLine::command();
        let help = command.find_subcommand_mut("start").unwrap().render_long_help().to_string();
        assert!(
            help.contains("--config") && !help.contains("pause") && !help.contains("arithmetic"),
            "{help}"
        );
        assert!(CommandLine::try_parse_from(["tributary-client", "join", "--server", "x"]).is_err());
        let drill = [
            "tributary-client",
            "start",
            "--config",
            "n",
            "--pause-before-upload-seconds",
            "3",
            "--trainer",
            "arithmetic",
        ];
        assert!(CommandLine::try_parse_from(drill).is_ok());
    }
}
