//! The command line: arguments, exit codes, and the order of things in each command.

mod faults;
mod sweep;

use std::collections::BTreeSet;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Args, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use tributary_client::data::fetch::{self, FetchProgress, MNIST_MIRROR};
use tributary_client::trainer::{ArithmeticTrainer, TorchTrainer, TrainError, Trainer};
use tributary_common::model::{self, Layout};
use tributary_common::progress::Progress;

use crate::canary::{CanaryArguments, CanaryError};
use crate::engine::{Masks, Settings, Transport};
use crate::follow::{Follower, Format};
use crate::plan::Plan;
use crate::privacy_plan;
use crate::replay;
use crate::report::{self, Target};
use crate::scenario::{Overrides, Scenario, ScenarioError};
use crate::session::Session;
use crate::workers::MakeTrainer;

/// libtorch's version: tch 0.26 builds against this one alone.
const LIBTORCH: &str = "libtorch 2.13.0, one thread per worker";
/// Largest `.safetensors` file that is read.
const MODEL_FILE_BYTES: u64 = 1 << 38;

/// Simulates federated learning with the code that a real federation runs.
#[derive(Debug, Parser)]
#[command(
    name = "tributary-sim",
    version,
    after_help = "Exit codes: 0 done, 1 a failed or stopped run, \
2 bad usage, configuration or data, 130 interrupted (what was reached is in the run's folder)."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a scenario and leave a folder with its report.
    Run(RunArguments),
    /// Run a scenario once for every combination of values, and compare.
    Sweep(sweep::SweepArguments),
    /// Say what a scenario will cost, before anything runs.
    Plan {
        #[command(flatten)]
        scenario: ScenarioArguments,
        /// How to print it.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Train one client with canaries in its data, for `tributary-audit canary`: does the noise hide them?
    Canary {
        #[command(flatten)]
        scenario: ScenarioArguments,
        #[command(flatten)]
        canaries: CanaryArguments,
    },
    /// Let everything go wrong, by seed: production code in a world of late, lost and doubled messages, deaths, full disks,
    /// set clocks and ended certificates. Ends with the number of seeds and of violations.
    Faults(faults::FaultsArguments),
    /// Put the curves of several runs into one report.
    Report {
        /// The runs' folders.
        #[arg(required = true, value_name = "DIR")]
        runs: Vec<PathBuf>,
        /// The report's file.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Get data.
    Data {
        #[command(subcommand)]
        command: DataCommand,
    },
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    /// Download a data set and check its content.
    Fetch {
        /// Which.
        #[arg(value_enum)]
        dataset: Downloadable,
        /// The folder to put it into.
        #[arg(long, value_name = "DIR", default_value = "data/mnist")]
        into: PathBuf,
        /// Where from: the address of a folder that holds the files.
        #[arg(long, value_name = "URL", default_value = MNIST_MIRROR)]
        mirror: String,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Downloadable {
    /// Handwritten digits: 60,000 to train on, 10,000 to test on (12 MB).
    Mnist,
}

#[derive(Debug, Args)]
struct ScenarioArguments {
    /// The scenario's file.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The folder that `[data] path` is relative to, in place of the scenario's own.
    #[arg(long, value_name = "DIR", env = "TRIBUTARY_DATA")]
    data: Option<PathBuf>,
    /// The run's seed, in place of the job's.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Change a setting. Keys of a job (name, seed, rounds, model, train, cohort, evaluation, …) change the job,
    /// keys of a scenario (population, data, partition, policy) the scenario: train.learning_rate=0.1,
    /// population.clients=50.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl ScenarioArguments {
    fn overrides(&self) -> Overrides {
        Overrides { set: self.set.clone(), data: self.data.clone(), seed: self.seed }
    }

    fn read(&self) -> Result<Scenario, ScenarioError> {
        Scenario::read(&self.file, &self.overrides())
    }
}

#[derive(Debug, Args)]
struct RunArguments {
    #[command(flatten)]
    scenario: ScenarioArguments,
    /// The run's folder; an earlier run there is replaced. Without it: runs/NAME-SEED-N.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Worker threads; without it, as many as the machine has cores. The model does not depend on it.
    #[arg(long, value_name = "N")]
    workers: Option<NonZeroUsize>,
    /// Impose the accepted sets of an earlier run: its folder, or its rounds.jsonl.
    #[arg(long, value_name = "RECORD")]
    replay: Option<PathBuf>,
    /// Start from this .safetensors model.
    #[arg(long, value_name = "FILE")]
    initial_model: Option<PathBuf>,
    /// Tell when this accuracy, such as 0.97, was first reached.
    #[arg(long, value_name = "SHARE", value_parser = accuracy)]
    target_accuracy: Option<f64>,
    /// How to print progress.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// How models and updates travel.
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,
    /// Whether the masks of a job with [secure_aggregation] are made, or left out: the models are the same. Without it:
    /// on for cohorts of up to 64.
    #[arg(long, value_enum)]
    masks: Option<Masks>,
    /// What trains: for tests of everything else.
    #[arg(long, value_enum, default_value_t, hide = true)]
    trainer: TrainerKind,
    /// Noise that can be repeated, for experiments: the run is not private, and says so.
    #[cfg(feature = "seeded-noise")]
    #[arg(long, value_name = "N")]
    seeded_noise: Option<u64>,
}

impl RunArguments {
    /// The trainer, its name, and whether its noise is drawn from secret bits.
    fn trainer(&self) -> (MakeTrainer, &'static str, bool) {
        #[cfg(feature = "seeded-noise")]
        if let Some(seed) = self.seeded_noise {
            let make = move || Ok(Box::new(TorchTrainer::with_seeded_noise(seed)) as Box<dyn Trainer>);
            return (Arc::new(make), "libtorch 2.13.0 with noise that can be repeated: not private", false);
        }
        let (make, name) = trainer(self.trainer);
        (make, name, self.trainer == TrainerKind::Torch)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum TrainerKind {
    #[default]
    Torch,
    Arithmetic,
}

/// How a command ended, beside success.
enum End {
    /// Exit code 1.
    Failed(String),
    /// Exit code 2.
    Unusable(String),
    /// Exit code 130.
    Interrupted(String),
}

fn unusable(error: impl std::fmt::Display) -> End {
    End::Unusable(error.to_string())
}

fn failed(error: impl std::fmt::Display) -> End {
    End::Failed(error.to_string())
}

/// Reads the command line, does what it says, and ends with the documented exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = std::io::stdout();
    match perform(cli.command, &mut out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(End::Failed(message)) => say(&message, 1),
        Err(End::Unusable(message)) => say(&message, 2),
        Err(End::Interrupted(message)) => say(&message, 130),
    }
}

fn say(message: &str, code: u8) -> ExitCode {
    eprintln!("tributary-sim: {message}");
    ExitCode::from(code)
}

fn perform(command: Command, out: &mut dyn Write) -> Result<(), End> {
    match command {
        Command::Run(arguments) => run(&arguments, out),
        Command::Sweep(arguments) => sweep::sweep(&arguments, out),
        Command::Plan { scenario, format } => {
            let scenario = scenario.read().map_err(unusable)?;
            let federation = scenario.federation().map_err(unusable)?;
            let plan = Plan::of(&scenario, &federation).map_err(unusable)?;
            let text = match format {
                Format::Human => plan.to_string(),
                Format::Json => serde_json::to_string(&plan).map_err(failed)?,
            };
            writeln!(out, "{text}").map_err(failed)
        }
        Command::Canary { scenario, canaries } => {
            let scenario = scenario.read().map_err(unusable)?;
            let stop = interruptible().map_err(failed)?;
            let line = canaries.run(&scenario, &stop).map_err(|error| match error {
                CanaryError::Train(TrainError::Cancelled) => End::Interrupted("interrupted".into()),
                CanaryError::Train(_) | CanaryError::Io { .. } => failed(error),
                _ => unusable(error),
            })?;
            writeln!(out, "{line}").map_err(failed)
        }
        Command::Report { runs, out: file } => {
            let runs =
                runs.iter().map(|run| report::load(run)).collect::<Result<Vec<_>, _>>().map_err(unusable)?;
            let html = report::compare(&runs).map_err(failed)?;
            std::fs::write(&file, html)
                .map_err(|cause| unusable(format!("{}: cannot be written ({cause})", file.display())))?;
            writeln!(out, "report: {}", file.display()).map_err(failed)
        }
        Command::Faults(arguments) => match faults::run(&arguments, out).map_err(failed)? {
            true => Ok(()),
            false => Err(failed("something happened that must not: see above")),
        },
        Command::Data { command: DataCommand::Fetch { dataset: Downloadable::Mnist, into, mirror } } => {
            fetch_mnist(&into, &mirror, out)
        }
    }
}

fn run(arguments: &RunArguments, out: &mut dyn Write) -> Result<(), End> {
    let scenario = arguments.scenario.read().map_err(unusable)?;
    let layout = scenario.job.layout().map_err(unusable)?;
    let initial = arguments.initial_model.as_deref().map(|path| initial_model(path, &layout)).transpose()?;
    let target = Target::choose(arguments.out.as_deref(), &scenario.job).map_err(unusable)?;
    let federation = scenario.federation().map_err(unusable)?;
    let clients: BTreeSet<_> = federation.shares.iter().map(|share| &share.name).collect();
    let imposed = arguments.replay.as_deref();
    let imposed = imposed
        .map(|path| replay::read(path, scenario.job.rounds, &clients))
        .transpose()
        .map_err(unusable)?;
    let session = Session::new(&scenario, federation).map_err(unusable)?;

    let workers = arguments.workers.map_or_else(cores, NonZeroUsize::get);
    let (trainer, trainer_name, has_secret_noise) = arguments.trainer();
    let job = Arc::new(scenario.job.clone());
    let progress = if has_secret_noise { Progress::of(&job) } else { Progress::without_noise(&job) };
    for warning in privacy_plan::warnings(&job) {
        eprintln!("note: {warning}");
    }
    let mut follower = Follower::new(arguments.format, progress, out);
    follower.watch_for(arguments.target_accuracy);
    if arguments.format == Format::Human {
        follower.print(&session.opening(workers));
        if job.secure_aggregation.is_some() {
            follower.print(masks_words(arguments.masks.unwrap_or_else(|| Masks::by_default(&job))));
        }
    }
    let stop = interruptible().map_err(failed)?;
    let (transport, masks) = (arguments.transport, arguments.masks);
    let settings =
        Settings { initial, imposed, transport, masks, has_secret_noise, ..Settings::new(workers, trainer) };
    let ended = session.run(settings, trainer_name, target, follower, &stop, &mut |_| {}).map_err(failed)?;
    let (problem, interrupted, timing) = (ended.problem(), ended.interrupted(), ended.timing());
    let traffic = ended.traffic();
    let folder = ended.write().map_err(failed)?;
    if arguments.format == Format::Human {
        // A reader that went away has seen enough.
        let _ = writeln!(out, "{traffic}");
        let _ = writeln!(out, "virtual time: {timing}");
        let _ = writeln!(out, "report: {}", folder.join("report.html").display());
    }
    match problem {
        None => Ok(()),
        Some(_) if interrupted => Err(End::Interrupted("interrupted".into())),
        Some(problem) => Err(failed(problem)),
    }
}

/// One line that says whether masks are made.
fn masks_words(masks: Masks) -> &'static str {
    match masks {
        Masks::On => "masks on: every client has a session with real keys; its messages are in the bytes",
        Masks::Off => {
            "masks off: the same sums without them, for speed; no message of a session is in the bytes"
        }
    }
}

/// How many threads the machine runs at once.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Reads an accuracy, above 0 to 1.
fn accuracy(text: &str) -> Result<f64, String> {
    let accuracy = text.parse::<f64>().ok().filter(|accuracy| *accuracy > 0.0 && *accuracy <= 1.0);
    accuracy.ok_or_else(|| "an accuracy is a share above 0 and at most 1, such as 0.97".to_owned())
}

fn trainer(kind: TrainerKind) -> (MakeTrainer, &'static str) {
    match kind {
        TrainerKind::Torch => (Arc::new(|| Ok(Box::new(TorchTrainer::new()) as Box<dyn Trainer>)), LIBTORCH),
        TrainerKind::Arithmetic => (
            Arc::new(|| Ok(Box::new(ArithmeticTrainer) as Box<dyn Trainer>)),
            "the arithmetic stand-in: nothing is learnt",
        ),
    }
}

fn initial_model(path: &Path, layout: &Layout) -> Result<Vec<f32>, End> {
    let at = |error: &dyn std::fmt::Display| unusable(format!("{}: {error}", path.display()));
    let bytes = std::fs::metadata(path).map_err(|error| at(&error))?.len();
    if bytes > MODEL_FILE_BYTES {
        return Err(at(&"too large for a model"));
    }
    let bytes = std::fs::read(path).map_err(|error| at(&error))?;
    model::import(layout, &bytes).map_err(|error| at(&error))
}

/// A flag that the first Ctrl-C (or SIGTERM) sets; the second ends the process at once.
fn interruptible() -> std::io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
        // In this order: the handler that ends the process sees the flag of an earlier signal only.
        signal_hook::flag::register_conditional_shutdown(signal, code, stop.clone())?;
        signal_hook::flag::register(signal, stop.clone())?;
    }
    Ok(stop)
}

fn fetch_mnist(into: &Path, mirror: &str, out: &mut dyn Write) -> Result<(), End> {
    let bar = ProgressBar::no_length();
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut tell = |progress: FetchProgress| {
        let line = match progress {
            FetchProgress::Receiving { file, received_bytes, total_bytes } => {
                bar.set_message(file);
                total_bytes.into_iter().for_each(|total| bar.set_length(total));
                bar.set_position(received_bytes);
                return;
            }
            FetchProgress::Present { file } => format!("{file}: there already"),
            FetchProgress::Verified { file } => format!("{file}: verified"),
            FetchProgress::Retrying { file, reason, pause_milliseconds } => {
                let pause = pause_milliseconds as f64 / 1000.0;
                return bar.suspend(|| eprintln!("note: {file}: {reason}; again in {pause:.1} s"));
            }
        };
        // A reader that went away has seen enough.
        let _ = bar.suspend(|| writeln!(out, "{line}"));
    };
    let fetched = fetch::fetch_mnist(mirror, into, &mut tell);
    bar.finish_and_clear();
    fetched.map_err(failed)?;
    let _ = writeln!(
        out,
        "use it with: [data] source = \"idx\", path = \"mnist\" and --data {}",
        into.parent().unwrap_or(Path::new(".")).display()
    );
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
