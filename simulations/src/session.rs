//! One run from its scenario to its folder: simulated, followed, reported and written.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use tributary_common::model::{self, Layout};
use tributary_common::record::RunState;

use crate::engine::{self, Finished, Observation, Settings, SimulationError, Timing};
use crate::follow::Follower;
use crate::population::Spread;
use crate::report::{
    self, Crossing, FolderError, History, Machine, Row, RunFolder, RunReport, RunWriter, Target,
};
use crate::scenario::{Federation, Scenario, ScenarioError};

/// Why a run leaves no folder. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// The simulation cannot go on.
    #[error(transparent)]
    Simulation(#[from] SimulationError),
    /// The report cannot be made.
    #[error("{0}")]
    Report(String),
    /// The folder cannot be written.
    #[error(transparent)]
    Folder(#[from] FolderError),
}

/// A run that can start.
pub(crate) struct Session<'a> {
    scenario: &'a Scenario,
    scenario_toml: String,
    layout: Layout,
    federation: Federation,
    spread: Spread,
}

/// A run that ended, whether well or not. Dropped before [`Ended::write`], it leaves nothing.
pub(crate) struct Ended<'a> {
    scenario: &'a Scenario,
    scenario_toml: String,
    layout: Layout,
    spread: Spread,
    machine: Machine,
    finished: Finished,
    writer: RunWriter,
    history: History,
    rows: Vec<Row>,
    crossing: Option<Crossing>,
    seconds: f64,
    interrupted: bool,
}

impl<'a> Session<'a> {
    /// A run of `scenario` over `federation`.
    ///
    /// # Errors
    /// A job without a layout, or a value that cannot be written as TOML.
    pub(crate) fn new(scenario: &'a Scenario, federation: Federation) -> Result<Self, ScenarioError> {
        let path = || scenario.path.clone();
        let layout = scenario.job.layout().map_err(|error| ScenarioError::Job { path: path(), error })?;
        // A job that costs more than it says is not begun.
        scenario.job.guarantee().map_err(|error| ScenarioError::Job { path: path(), error })?;
        let scenario_toml = scenario.to_toml()?;
        let spread = Spread::of(&federation);
        Ok(Self { scenario, scenario_toml, layout, federation, spread })
    }

    /// One line that says what will run.
    pub(crate) fn opening(&self, workers: usize) -> String {
        let (job, spread) = (&self.scenario.job, &self.spread);
        let examples = if spread.examples.minimum == spread.examples.maximum {
            format!("{} examples each", spread.examples.median)
        } else {
            format!("{} to {} examples each", spread.examples.minimum, spread.examples.maximum)
        };
        format!(
            "{}: {} clients ({}), {examples}; {} ({} parameters); {} rounds of {} clients; {workers} workers",
            job.name,
            spread.clients,
            self.scenario.partition.scheme.name(),
            job.model.architecture.name(),
            self.layout.parameters(),
            job.rounds,
            job.invited().min(u32::try_from(spread.clients).unwrap_or(u32::MAX)),
        )
    }

    /// Runs to the end, or until `stop` is set, and writes records for `target` as they are made. `trainer` names
    /// what trains, for the report; `also` is told everything before the follower is.
    ///
    /// # Errors
    /// A [`SessionError`]; a run that fails by its own rules is an [`Ended::problem`].
    pub(crate) fn run(
        self,
        settings: Settings,
        trainer: &str,
        target: Target,
        mut follower: Follower<'_>,
        stop: &AtomicBool,
        also: &mut dyn FnMut(&Observation<'_>),
    ) -> Result<Ended<'a>, SessionError> {
        let Self { scenario, scenario_toml, layout, federation, spread } = self;
        let machine = Machine {
            processor: processor(),
            instruction_sets: instruction_sets(),
            trainer: trainer.to_owned(),
            workers: settings.workers,
            has_secret_noise: settings.has_secret_noise,
        };
        let (mut writer, mut history, mut lost) = (target.open()?, History::default(), false);
        let finished = engine::simulate(scenario, federation, settings, stop, &mut |observation| {
            if let Observation::Event(event) = &observation {
                history.take(event);
                if !writer.take(event) {
                    // A run whose records are lost is not gone on with; `write` says why.
                    lost = true;
                    stop.store(true, Ordering::Relaxed);
                }
            }
            also(&observation);
            follower.observe(observation);
        });
        let crossing = follower.crossing();
        let (rows, seconds) = follower.finish();
        let finished = finished?;
        let interrupted = stop.load(Ordering::Relaxed) && finished.state == RunState::Stopped && !lost;
        Ok(Ended {
            scenario,
            scenario_toml,
            layout,
            spread,
            machine,
            finished,
            writer,
            history,
            rows,
            crossing,
            seconds,
            interrupted,
        })
    }
}

impl Ended<'_> {
    /// Whether it was stopped by the flag.
    pub(crate) fn interrupted(&self) -> bool {
        self.interrupted
    }

    /// How long the real federation would have taken.
    pub(crate) fn timing(&self) -> Timing {
        self.finished.timing.clone()
    }

    /// What went over the network, in one line or more.
    pub(crate) fn traffic(&self) -> String {
        let mut text = self.history.traffic();
        if self.finished.values_cut > 0 {
            text.push_str(&format!(
                "\nnote: {} values of updates were cut to [secure_aggregation] coordinate_limit: a larger one may be needed",
                self.finished.values_cut
            ));
        }
        text
    }

    /// Why it is not what was asked for, in one line.
    pub(crate) fn problem(&self) -> Option<String> {
        self.shortfall().map(|what| format!("the run {what}"))
    }

    fn shortfall(&self) -> Option<String> {
        let reached = format!("after {} of {} rounds", self.finished.published, self.scenario.job.rounds);
        let why_stopped = if self.finished.deserted {
            "too few clients are left that can take part"
        } else {
            "by its operator"
        };
        match &self.finished.state {
            RunState::Finished => None,
            RunState::Failed { reason } => Some(format!("failed {reached}: {reason}")),
            _ if self.interrupted => Some(format!("was interrupted {reached}")),
            _ => Some(format!("was stopped {reached}, {why_stopped}")),
        }
    }

    /// Writes its folder and returns where it is.
    ///
    /// # Errors
    /// A [`SessionError`]; then nothing is left, and an earlier run's folder is as it was.
    pub(crate) fn write(self) -> Result<PathBuf, SessionError> {
        let warning = self.warning();
        let Self { scenario, scenario_toml, layout, spread, machine, finished, rows, .. } = self;
        let html = report::render(&RunReport {
            job: &scenario.job,
            scenario_toml: &scenario_toml,
            warning,
            rows: &rows,
            crossing: self.crossing,
            history: &self.history,
            timing: &finished.timing,
            spread: &spread,
            digest: model::digest(&finished.model).to_string(),
            seconds: self.seconds,
            machine: &machine,
        })
        .map_err(SessionError::Report)?;
        Ok(self.writer.close(&RunFolder {
            job: &scenario.job,
            scenario_toml: &scenario_toml,
            rows: &rows,
            layout: &layout,
            model: &finished.model,
            report: &html,
            ledger: finished.ledger.as_deref(),
        })?)
    }

    fn warning(&self) -> Option<String> {
        let failed = matches!(self.finished.state, RunState::Failed { .. });
        let rest = if failed { "." } else { ": this report is partial." };
        self.shortfall().map(|what| format!("The run {what}{rest}"))
    }
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn instruction_sets() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let known = [
            ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
            ("FMA", std::arch::is_x86_feature_detected!("fma")),
            ("AVX-512F", std::arch::is_x86_feature_detected!("avx512f")),
            ("AVX-512 VNNI", std::arch::is_x86_feature_detected!("avx512vnni")),
            ("AVX-512 BF16", std::arch::is_x86_feature_detected!("avx512bf16")),
        ];
        let present: Vec<&str> = known.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect();
        if present.is_empty() { "x86-64 baseline".to_owned() } else { present.join(", ") }
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH.to_owned()
}
