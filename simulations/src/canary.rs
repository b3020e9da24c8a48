//! The audit job: trains one client of a scenario with canaries in its data, and leaves what `tributary-audit canary`
//! reads.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use tributary_client::shard::Shard;
use tributary_client::trainer::{Sabotage, Task, TrainError, run_canaries};
use tributary_common::ids::NodeName;
use tributary_common::privacy::canary::{AuditClaim, AuditRun, Canary, NoiseRecord};

use crate::scenario::{Scenario, ScenarioError};

/// Guesses per side: this share of the canaries, fixed before the run.
const GUESSED_SHARE: usize = 10;

/// Why there is no record. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum CanaryError {
    /// The scenario.
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    /// The scenario has no such client.
    #[error("there is no client {0}; the first one is {1}")]
    Client(NodeName, NodeName),
    /// The job promises nothing that canaries could test.
    #[error("the job has no [privacy]: there is no claim to test")]
    NoClaim,
    /// Too few canaries.
    #[error("--canaries {0}: at least 20 are needed for a tenth to be guessed on each side")]
    Few(usize),
    /// Training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The record cannot be written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
}

/// A fault to plant, to see that the audit finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Fault {
    /// None.
    #[default]
    Nothing,
    /// Half of the noise.
    HalfNoise,
    /// Canaries are not clipped.
    NoClipping,
}

/// What to audit.
#[derive(Debug, Args)]
pub struct CanaryArguments {
    /// Canaries: gradients in random directions, each in the data by a fair secret coin.
    #[arg(long, value_name = "N", default_value_t = 3000)]
    canaries: usize,
    /// The client whose training is audited; without it, the first.
    #[arg(long, value_name = "NAME")]
    client: Option<NodeName>,
    /// The record's file.
    #[arg(long, value_name = "FILE", default_value = "canaries.json")]
    out: PathBuf,
    /// Plant a fault, to see that the audit finds it. Such a run is no audit.
    #[arg(long, value_enum, default_value_t)]
    fault: Fault,
}

impl CanaryArguments {
    /// Trains and writes the record; returns one line that says what was done.
    ///
    /// # Errors
    /// [`CanaryError`].
    pub fn run(&self, scenario: &Scenario, stop: &AtomicBool) -> Result<String, CanaryError> {
        let job = Arc::new(scenario.job.clone());
        let privacy = job.privacy.as_ref().ok_or(CanaryError::NoClaim)?;
        if self.canaries < 2 * GUESSED_SHARE {
            return Err(CanaryError::Few(self.canaries));
        }
        let federation = scenario.federation()?;
        let first = federation.shares.first().ok_or(CanaryError::Train(TrainError::NoExamples))?;
        let share = match &self.client {
            None => first,
            Some(name) => federation
                .shares
                .iter()
                .find(|share| share.name == *name)
                .ok_or_else(|| CanaryError::Client(name.clone(), first.name.clone()))?,
        };
        let layout =
            job.layout().map_err(|error| ScenarioError::Job { path: scenario.path.clone(), error })?;
        let shard = Shard {
            examples: federation.dataset.train.clone(),
            indices: share.train.clone(),
            shift: share.shift.clone(),
        };
        let task = Task {
            job: job.clone(),
            round: 1,
            client: share.name.clone(),
            model: Arc::new(layout.initial(job.seed)),
            declared_examples: scenario.data.declared_examples_of(Some(&share.name)),
            max_steps: None,
        };
        let sabotage = match self.fault {
            Fault::Nothing => Sabotage::Nothing,
            Fault::HalfNoise => Sabotage::HalfNoise,
            Fault::NoClipping => Sabotage::NoClipping,
        };
        let found = run_canaries(&task, &shard.as_seen(), self.canaries, sabotage, stop)?;
        let declared_standard_deviation = privacy.noise_multiplier * privacy.clip_norm;
        let measured = found.noise_ratio * declared_standard_deviation;
        let pairs = found.included.iter().zip(&found.scores);
        let record = AuditRun {
            // One round is trained, whatever the job's length.
            claim: AuditClaim { events: job.events(1), delta: privacy.delta, unit: privacy.unit(false) },
            canaries: pairs.map(|(included, score)| Canary { included: *included, score: *score }).collect(),
            guesses_per_side: self.canaries / GUESSED_SHARE,
            noise: vec![NoiseRecord {
                declared_standard_deviation,
                coordinates: found.noise_values,
                sum_of_squares: measured * measured * found.noise_values as f64,
            }],
            one_shot: None,
        };
        write(&self.out, &record)?;
        Ok(format!(
            "{} canaries in {} steps of client {}: {}",
            self.canaries,
            found.steps,
            task.client,
            self.out.display()
        ))
    }
}

fn write(path: &Path, record: &AuditRun) -> Result<(), CanaryError> {
    let io = |cause: std::io::Error| CanaryError::Io { path: path.to_path_buf(), cause };
    let json = serde_json::to_vec(record).map_err(|error| io(error.into()))?;
    std::fs::write(path, json).map_err(io)
}
