//! The job file: what a federation trains and how. Data, never code, so that a node's policy can read it.

use serde::{Deserialize, Serialize};
use toml::Table;

use crate::document::{self, DocumentError, Schema};
use crate::limits;
use crate::model::{self, Architecture, ArchitectureError, LayerSpec, Layout, Network};

mod aggregation;
mod compression;
mod privacy;
mod secure_aggregation;

pub use aggregation::{Aggregation, Combination};
pub use compression::{Compression, CompressionScheme, SupportRule};
pub use privacy::{AdaptiveClipping, Clipping, Mechanism, MetricsRelease, Privacy, PrivacyUnit, Sampler};
pub use secure_aggregation::{Level, MINIMUM_SURVIVORS, SecureAggregation};

/// Why a job is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum JobError {
    /// The file is not understood.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The model cannot be built.
    #[error(transparent)]
    Architecture(#[from] ArchitectureError),
    /// A value is outside its range, or two settings contradict each other.
    #[error("{0}")]
    Invalid(String),
}

/// A whole job. Serialised, it is the job file as resolved, with every default written out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Name, for people; a node name's alphabet.
    pub name: String,
    /// The run's seed: with the data and the accepted sets it decides every bit of the model.
    pub seed: u64,
    /// Rounds to publish.
    pub rounds: u32,
    /// What is trained.
    pub model: Model,
    /// How each client trains.
    pub train: Train,
    /// Who takes part in a round and how long it may last.
    pub cohort: Cohort,
    /// When the published model is evaluated.
    #[serde(default)]
    pub evaluation: Evaluation,
    /// What is promised about the people in the data; `None` is `unit = "none"`: nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub privacy: Option<Privacy>,
    /// Whether updates are masked; `None` is `enabled = false`: the coordinator sees each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secure_aggregation: Option<SecureAggregation>,
    /// What an update is reduced to; `None` is `scheme = "none"`: it is sent whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// How updates become one; absent, their weighted mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggregation: Option<Aggregation>,
}

/// `[model]`: the architecture and its shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// A built-in architecture, or `sequential`.
    pub architecture: Architecture,
    /// Shape of one example: `[features]` or `[channels, height, width]`.
    pub inputs: Vec<usize>,
    /// Classes to tell apart.
    pub classes: usize,
    /// Widths of the hidden layers, for `mlp` alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hidden: Vec<usize>,
    /// The layers, for `sequential` alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerSpec>,
}

/// The federated algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// FedAvg: McMahan et al. 2017.
    Fedavg,
    /// FedProx: FedAvg with a proximal term in each client's loss (Li et al. 2020).
    Fedprox,
}

/// How the learning rate changes over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// The same in every round.
    #[default]
    Constant,
    /// Multiplied by `decay` after each round.
    Exponential,
    /// Multiplied by `decay` after every `decay_every_rounds` rounds.
    Step,
    /// Half a cosine, from `learning_rate` in the first round towards zero after the last.
    Cosine,
}

/// `[train]`: local training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// FedAvg or FedProx.
    pub algorithm: Algorithm,
    /// FedProx's µ: the weight of `µ/2·‖w − w_t‖²` in each client's loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proximal_mu: Option<f64>,
    /// Learning rate of the clients' SGD in the first round.
    pub learning_rate: f64,
    /// How it changes over the rounds.
    #[serde(default)]
    pub schedule: Schedule,
    /// Factor of the `exponential` and `step` schedules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay: Option<f64>,
    /// Period of the `step` schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_every_rounds: Option<u32>,
    /// SGD's momentum, 0 to below 1; it starts at zero in every round.
    #[serde(default)]
    pub momentum: f64,
    /// SGD's weight decay (L2).
    #[serde(default)]
    pub weight_decay: f64,
    /// Passes over a client's examples; either this or `local_steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_epochs: Option<u32>,
    /// SGD steps per round; either this or `local_epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_steps: Option<u32>,
    /// Examples in one SGD step; 0, or absent, where `sampling_rate` draws them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub batch_size: u32,
    /// With `[privacy] mechanism = "dp-sgd"`, in place of `batch_size`: the probability with which each example (or
    /// person) is in a step's batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_rate: Option<f64>,
}

/// `[cohort]`: who takes part in a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cohort {
    /// Updates a round waits for.
    pub size: u32,
    /// Quorum: fewest updates with which a round is published; default `size`.
    #[serde(default)]
    pub minimum: u32,
    /// Clients invited per update waited for, from 1; surplus updates are not used.
    #[serde(default = "one")]
    pub over_selection: f64,
    /// Longest time from the invitation to the last update of a round.
    #[serde(default = "default_deadline_seconds")]
    pub deadline_seconds: u32,
    /// How long a cohort member that lost its connection may take to come back before it counts as missing.
    #[serde(default = "default_reconnect_seconds")]
    pub reconnect_seconds: u32,
    /// With fewer than the wanted clients connected (but a quorum): how long nobody must have come or gone
    /// before the round starts without them.
    #[serde(default = "default_settle_seconds")]
    pub settle_seconds: u32,
    /// Attempts at one round before the run is stopped as failed.
    #[serde(default = "default_attempts")]
    pub attempts: u32,
}

/// `[evaluation]`: when the published model is evaluated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Evaluate after every so many rounds, and always after the last; 0 means only then.
    #[serde(default = "one_u32")]
    pub every_rounds: u32,
    /// Whether the clients of the round also evaluate the published model on their own test examples.
    #[serde(default)]
    pub federated: bool,
}

impl Default for Evaluation {
    fn default() -> Self {
        Self { every_rounds: 1, federated: false }
    }
}

fn one() -> f64 {
    1.0
}
fn one_u32() -> u32 {
    1
}
fn is_zero(value: &u32) -> bool {
    *value == 0
}
fn default_deadline_seconds() -> u32 {
    600
}
fn default_reconnect_seconds() -> u32 {
    60
}
fn default_settle_seconds() -> u32 {
    10
}
fn default_attempts() -> u32 {
    3
}

/// The keys of a job file.
pub const SCHEMA: Schema = Schema {
    keys: &["name", "seed", "rounds"],
    tables: &[
        ("model", Some(&MODEL)),
        ("train", Some(&TRAIN)),
        ("cohort", Some(&COHORT)),
        ("evaluation", Some(&Schema { keys: &["every_rounds", "federated"], tables: &[] })),
        ("privacy", Some(&privacy::SCHEMA)),
        ("secure_aggregation", Some(&secure_aggregation::SCHEMA)),
        ("compression", Some(&compression::SCHEMA)),
        ("aggregation", Some(&aggregation::SCHEMA)),
    ],
};
const MODEL: Schema =
    Schema { keys: &["architecture", "inputs", "classes", "hidden", "layers"], tables: &[] };
const TRAIN: Schema = Schema {
    keys: &[
        "algorithm",
        "proximal_mu",
        "learning_rate",
        "schedule",
        "decay",
        "decay_every_rounds",
        "momentum",
        "weight_decay",
        "local_epochs",
        "local_steps",
        "batch_size",
        "sampling_rate",
    ],
    tables: &[],
};
const COHORT: Schema = Schema {
    keys: &[
        "size",
        "minimum",
        "over_selection",
        "deadline_seconds",
        "reconnect_seconds",
        "settle_seconds",
        "attempts",
    ],
    tables: &[],
};

impl Job {
    /// Reads and checks a job file.
    pub fn parse(text: &str) -> Result<Self, JobError> {
        if text.len() > limits::JOB_FILE_BYTES {
            let message =
                format!("the job file has {} bytes; at most {} are read", text.len(), limits::JOB_FILE_BYTES);
            return Err(JobError::Invalid(message));
        }
        Self::from_table(document::parse(text)?)
    }

    /// Reads and checks a job that is already a TOML table, such as a scenario's with overrides applied.
    pub fn from_table(mut table: Table) -> Result<Self, JobError> {
        document::check_keys(&table, &SCHEMA)?;
        leave_out_what_asks_for_nothing(&mut table)?;
        if let Some(layers) = table.get("model").and_then(|model| model.get("layers")) {
            model::check_layers(layers)?;
        }
        let mut job: Job = document::read(table)?;
        if job.cohort.minimum == 0 {
            job.cohort.minimum = job.cohort.size;
        }
        job.check()?;
        Ok(job)
    }

    /// The job file as resolved: every default written out. Reads back to the same job.
    pub fn to_toml(&self) -> Result<String, JobError> {
        toml::to_string(self).map_err(|error| JobError::Invalid(error.to_string()))
    }

    /// The layout of the job's model.
    pub fn layout(&self) -> Result<Layout, JobError> {
        Ok(self.model.network()?.layout())
    }

    /// Clients invited to one round: `⌈size · over_selection⌉`.
    pub fn invited(&self) -> u32 {
        // A hair below the product, so that 10 · 1.1 is 11 and not 12.
        (f64::from(self.cohort.size) * self.cohort.over_selection - 1e-9).ceil() as u32
    }

    /// Whether the model of `round` (from 1) is evaluated.
    pub fn evaluates(&self, round: u32) -> bool {
        let every = self.evaluation.every_rounds;
        round == self.rounds || (every > 0 && round.is_multiple_of(every))
    }

    fn check(&self) -> Result<(), JobError> {
        let invalid = |message: String| Err(JobError::Invalid(message));
        let name_bytes = self.name.len();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_. ".contains(c);
        if !(1..=limits::JOB_NAME_BYTES).contains(&name_bytes) || !self.name.chars().all(plain) {
            return invalid(format!(
                "name = {:?}: use 1 to {} letters, digits, '-', '_', '.' or spaces",
                self.name,
                limits::JOB_NAME_BYTES
            ));
        }
        if i64::try_from(self.seed).is_err() {
            return invalid(format!("seed = {}: TOML holds at most {}", self.seed, i64::MAX));
        }
        if !(1..=limits::ROUNDS).contains(&self.rounds) {
            return invalid(format!("rounds = {}: 1 to {} are possible", self.rounds, limits::ROUNDS));
        }
        self.layout()?;
        self.train.check(self.privacy.as_ref())?;
        self.cohort.check(self.invited())?;
        self.privacy.as_ref().map_or(Ok(()), |privacy| privacy.check(self))?;
        self.secure_aggregation.as_ref().map_or(Ok(()), |masks| masks.check(self))?;
        self.compression.as_ref().map_or(Ok(()), |compression| compression.check(self))?;
        self.aggregation.as_ref().map_or(Ok(()), |aggregation| aggregation.check(self))?;
        self.noise_plan().map(|_| ())
    }

    /// Whether clients add shares of noise under masks.
    pub fn is_distributed(&self) -> bool {
        self.privacy.as_ref().is_some_and(|privacy| privacy.mechanism == Mechanism::Distributed)
    }

    /// Whether clients send sums of clipped gradients of a Poisson batch, and the coordinator takes the step.
    pub fn sums_gradients(&self) -> bool {
        let example = |privacy: &Privacy| privacy.unit == PrivacyUnit::Example;
        self.is_distributed() && self.privacy.as_ref().is_some_and(example)
    }
}

impl Model {
    /// The network to train: the layers of the architecture, checked for `inputs` and `classes`.
    ///
    /// # Errors
    /// An [`ArchitectureError`]: the first layer, or setting, that does not fit.
    pub fn network(&self) -> Result<Network, ArchitectureError> {
        self.architecture.network(&self.inputs, self.classes, &self.hidden, &self.layers)
    }
}

impl Train {
    /// The learning rate of `round` (from 1) of `rounds`.
    pub fn learning_rate(&self, round: u32, rounds: u32) -> f64 {
        let done = round.saturating_sub(1);
        let decay = self.decay.unwrap_or(1.0);
        self.learning_rate
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Exponential => decay.powf(f64::from(done)),
                Schedule::Step => decay.powf(f64::from(done / self.decay_every_rounds.unwrap_or(1).max(1))),
                Schedule::Cosine => {
                    0.5 * (1.0 + (std::f64::consts::PI * f64::from(done) / f64::from(rounds.max(1))).cos())
                }
            }
    }

    /// SGD steps of a client with `examples` training examples; the last batch of an epoch may be smaller.
    pub fn steps(&self, examples: u64) -> u64 {
        match (self.local_steps, self.local_epochs) {
            (Some(steps), _) => u64::from(steps),
            (None, epochs) => {
                examples.div_ceil(u64::from(self.batch_size.max(1))) * u64::from(epochs.unwrap_or(1))
            }
        }
    }

    fn check(&self, privacy: Option<&Privacy>) -> Result<(), JobError> {
        let invalid = |message: String| Err(JobError::Invalid(message));
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(self.learning_rate) || self.learning_rate > 1e6 {
            return invalid(format!(
                "[train] learning_rate = {}: a number above 0 is needed",
                self.learning_rate
            ));
        }
        match (self.algorithm, self.proximal_mu) {
            (Algorithm::Fedprox, None) => return invalid("[train] fedprox needs proximal_mu".into()),
            (Algorithm::Fedprox, Some(mu)) if !mu.is_finite() || mu < 0.0 => {
                return invalid(format!("[train] proximal_mu = {mu}: a number from 0 is needed"));
            }
            (Algorithm::Fedavg, Some(_)) => {
                return invalid("[train] proximal_mu belongs to algorithm = \"fedprox\"".into());
            }
            _ => {}
        }
        match self.schedule {
            Schedule::Constant | Schedule::Cosine if self.decay.is_some() => {
                return invalid("[train] decay belongs to schedule = \"exponential\" or \"step\"".into());
            }
            Schedule::Exponential | Schedule::Step
                if !self.decay.is_some_and(|d| positive(d) && d <= 1.0) =>
            {
                return invalid("[train] this schedule needs decay, above 0 and at most 1".into());
            }
            _ => {}
        }
        if (self.schedule == Schedule::Step) != self.decay_every_rounds.is_some_and(|rounds| rounds > 0) {
            return invalid(
                "[train] schedule = \"step\", and no other, needs decay_every_rounds from 1".into(),
            );
        }
        if !(0.0..1.0).contains(&self.momentum) {
            return invalid(format!("[train] momentum = {}: 0 to below 1 is possible", self.momentum));
        }
        if !self.weight_decay.is_finite() || self.weight_decay < 0.0 {
            return invalid(format!(
                "[train] weight_decay = {}: a number from 0 is needed",
                self.weight_decay
            ));
        }
        match (self.local_epochs, self.local_steps) {
            (Some(_), Some(_)) | (None, None) => {
                return invalid("[train] give either local_epochs or local_steps".into());
            }
            (Some(work), None) | (None, Some(work)) if !(1..=1_000_000).contains(&work) => {
                return invalid(format!(
                    "[train] local_epochs or local_steps = {work}: 1 to 1000000 are possible"
                ));
            }
            _ => {}
        }
        let private_steps = privacy.is_some_and(|privacy| privacy.samples_examples());
        match self.sampling_rate {
            None if private_steps => {
                return invalid(
                    "[train] with unit = \"example\" give sampling_rate, above 0 and at most 1".into(),
                );
            }
            Some(_) if !private_steps => {
                return invalid(
                    "[train] sampling_rate belongs to [privacy] unit = \"example\"; use batch_size".into(),
                );
            }
            Some(rate) if !(rate > 0.0 && rate <= 1.0) => {
                return invalid(format!("[train] sampling_rate = {rate}: above 0 and at most 1 is needed"));
            }
            _ => {}
        }
        if private_steps && (self.batch_size != 0 || self.local_epochs.is_some()) {
            return invalid(
                "[train] batch_size and local_epochs would tell how many examples a node has: with \
                 unit = \"example\" give sampling_rate and local_steps alone"
                    .into(),
            );
        }
        if privacy.is_some_and(|privacy| private_steps && privacy.mechanism == Mechanism::Distributed) {
            // Corrections 18: the shares cover one sum, so a round is one step, and the coordinator takes it.
            let plain = self.local_steps == Some(1)
                && self.momentum == 0.0
                && self.weight_decay == 0.0
                && self.algorithm == Algorithm::Fedavg;
            if !plain {
                return invalid(
                    "[train] mechanism = \"distributed\" for examples sums one batch per round: it needs fedavg, \
                     local_steps = 1, no momentum and no weight_decay"
                        .into(),
                );
            }
        }
        if !private_steps && !(1..=1_000_000).contains(&self.batch_size) {
            return invalid(format!("[train] batch_size = {}: 1 to 1000000 are possible", self.batch_size));
        }
        Ok(())
    }
}

impl Cohort {
    fn check(&self, invited: u32) -> Result<(), JobError> {
        let invalid = |message: String| Err(JobError::Invalid(message));
        if !(1.0..=10.0).contains(&self.over_selection) {
            return invalid(format!(
                "[cohort] over_selection = {}: 1 to 10 is possible",
                self.over_selection
            ));
        }
        if self.size == 0 || invited > limits::COHORT_MEMBERS {
            return invalid(format!(
                "[cohort] size = {}: 1 to {} clients, over-selection included, are possible",
                self.size,
                limits::COHORT_MEMBERS
            ));
        }
        if self.minimum > self.size {
            return invalid(format!("[cohort] minimum = {} is above size = {}", self.minimum, self.size));
        }
        if !(1..=604_800).contains(&self.deadline_seconds) {
            let deadline = self.deadline_seconds;
            return invalid(format!(
                "[cohort] deadline_seconds = {deadline}: 1 to 604800 (a week) are possible"
            ));
        }
        if !(1..=1000).contains(&self.attempts) {
            return invalid(format!("[cohort] attempts = {}: 1 to 1000 are possible", self.attempts));
        }
        Ok(())
    }
}

/// Takes out the tables that ask for nothing: `unit = "none"`, `enabled = false`, `scheme = "none"`.
///
/// # Errors
/// Such a table has other keys: a slip of the pen, perhaps.
fn leave_out_what_asks_for_nothing(table: &mut Table) -> Result<(), JobError> {
    let nothings: [(&str, &str, toml::Value, &str); 3] = [
        ("privacy", "unit", "none".into(), "unit = \"none\" promises nothing"),
        ("secure_aggregation", "enabled", false.into(), "enabled = false masks nothing"),
        ("compression", "scheme", "none".into(), "scheme = \"none\" sends whole updates"),
    ];
    for (name, key, nothing, words) in nothings {
        let Some(inner) = table.get(name).and_then(toml::Value::as_table) else { continue };
        if inner.get(key) != Some(&nothing) {
            continue;
        }
        if inner.len() > 1 {
            return Err(JobError::Invalid(format!(
                "[{name}] {words}: remove the table's other keys, or ask for something by {key}"
            )));
        }
        table.remove(name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = r#"
        name = "heart-disease"
        seed = 7
        rounds = 15
        [model]
        architecture = "logistic"
        inputs = [13]
        classes = 2
        [train]
        algorithm = "fedavg"
        learning_rate = 1e-3
        local_steps = 100
        batch_size = 4
        [cohort]
        size = 4
        minimum = 3
    "#;

    fn with(overrides: &[&str]) -> Result<Job, String> {
        let mut table = document::parse(JOB).unwrap();
        for assignment in overrides {
            document::set(&mut table, assignment).unwrap();
        }
        Job::from_table(table).map_err(|error| error.to_string())
    }

    #[test]
    fn a_resolved_job_reads_back_to_itself() {
        let job = Job::parse(JOB).unwrap();
        assert_eq!(Job::parse(&job.to_toml().unwrap()).unwrap(), job);
        assert_eq!(job.layout().unwrap().parameters(), 28);
        let prox =
            with(&["train.algorithm=fedprox", "train.proximal_mu=0.1", "train.schedule=cosine"]).unwrap();
        assert_eq!(Job::parse(&prox.to_toml().unwrap()).unwrap(), prox);
        let layers =
            "model.layers=[{ linear = 5 }, 'relu', { residual = { body = ['tanh'] } }, { linear = 2 }]";
        let own = with(&["model.architecture=sequential", layers]).unwrap();
        assert_eq!(Job::parse(&own.to_toml().unwrap()).unwrap(), own);
        assert_eq!(own.layout().unwrap().parameters(), 70 + 12);
        let tables_alone = with(&["model.architecture=sequential", "model.layers=[{ linear = 2 }]"]).unwrap();
        assert_eq!(Job::parse(&tables_alone.to_toml().unwrap()).unwrap(), tables_alone);
    }

    #[test]
    fn every_bad_value_is_refused_and_named() {
        for (overrides, words) in [
            (&["train.learning_rte=1"][..], "did you mean `train.learning_rate`?"),
            (&["model.architecture=small-cn"], "unknown variant `small-cn`"),
            (&["rounds=0"], "rounds = 0"),
            (&["rounds=-1"], "rounds"),
            (&["name=a/b"], "name = "),
            (&["train.learning_rate=nan"], "learning_rate"),
            (&["train.learning_rate=0"], "learning_rate"),
            (&["train.momentum=1.0"], "momentum = 1"),
            (&["train.weight_decay=-1.0"], "weight_decay"),
            (&["train.local_epochs=1"], "either local_epochs or local_steps"),
            (&["train.local_steps=0"], "local_steps"),
            (&["train.batch_size=0"], "batch_size = 0"),
            (&["train.algorithm=fedprox"], "needs proximal_mu"),
            (&["train.proximal_mu=0.1"], "belongs to algorithm"),
            (&["train.schedule=step", "train.decay=0.5"], "decay_every_rounds"),
            (&["train.schedule=exponential"], "needs decay"),
            (&["train.decay=0.5"], "decay belongs"),
            (&["cohort.size=0"], "size = 0"),
            (&["cohort.minimum=5"], "minimum = 5 is above size = 4"),
            (&["cohort.over_selection=0.5"], "over_selection"),
            (&["cohort.deadline_seconds=0"], "deadline_seconds"),
            (&["cohort.attempts=0"], "attempts"),
            (&["model.classes=1"], "classes = 1"),
            (&["model.layers=['relu']"], "`logistic` has no such setting; only `sequential` does"),
            (&["model.architecture=sequential"], "`sequential` needs at least one layer"),
            (
                &["model.architecture=sequential", "model.layers=['relu', { linear = 3 }]"],
                "layer 2 (linear): yields [3], but the last layer must yield [2]",
            ),
            (&["model.architecture=sequential", "model.layers=['rlu']"], "layer 1: unknown layer"),
            (&["model.architecture=sequential", "model.hidden=[3]"], "only `mlp` does"),
            (&["train.sampling_rate=0.1"], "sampling_rate belongs to"),
            (&["privacy.unit=example"], "missing field"),
            (&["privacy.unit=none", "privacy.noise_multiplier=1.0"], "promises nothing"),
            (&["secure_aggregation.enabled=false", "secure_aggregation.value_bits=8"], "masks nothing"),
            (&["compression.scheme=none", "compression.density=0.1"], "sends whole updates"),
            (&["secure_aggregation.enabled=true", "cohort.minimum=2"], "hides nobody"),
            (&["secure_aggregation.enabled=true", "secure_aggregation.value_bits=23"], "value_bits = 23"),
            (
                &["secure_aggregation.enabled=true", "secure_aggregation.coordinate_limit=0.0"],
                "coordinate_limit",
            ),
            (&["secure_aggregation.enabled=true", "secure_aggregation.weight_limit=0"], "weight_limit"),
            (
                &["secure_aggregation.enabled=true", "secure_aggregation.maximum_dropout=1.0"],
                "maximum_dropout",
            ),
            (&["secure_aggregation.enabled=true", "secure_aggregation.colluders=1"], "colluders belongs"),
            (&["secure_aggregation.enabled=true", "compression.scheme=int8"], "under masks"),
            (&["aggregation.rule=mediann"], "median"),
            (&["aggregation.rule=norm-bound"], "needs norm_bound"),
            (&["aggregation.rule=norm-bound", "aggregation.norm_bound=0"], "norm_bound = 0"),
            (&["aggregation.rule=median", "aggregation.norm_bound=1.0"], "belongs to rule = \"norm-bound\""),
            (&["aggregation.rule=krum"], "needs attackers"),
            (&["aggregation.rule=median", "aggregation.attackers=1"], "does not belong"),
            (&["aggregation.rule=krum", "aggregation.attackers=1000"], "minimum = 2003 or more"),
            (&["aggregation.rule=trimmed-mean", "aggregation.attackers=1000"], "minimum = 2001 or more"),
            (&["aggregation.rule=median", "aggregation.selected=1"], "belongs to rule = \"multi-krum\""),
            (
                &[
                    "aggregation.rule=median",
                    "secure_aggregation.enabled=true",
                    "cohort.size=4",
                    "cohort.minimum=3",
                ],
                "has to see each update",
            ),
            (&["compression.scheme=top-k"], "needs density"),
            (&["compression.scheme=top-k", "compression.density=0.01"], "less than one coordinate"),
            (&["compression.scheme=top-k", "compression.density=1.5"], "density = 1.5"),
            (
                &["compression.scheme=top-k", "compression.density=0.1", "compression.value_bits=4"],
                "value_bits = 4",
            ),
            (&["compression.scheme=int8", "compression.density=0.1"], "density belongs"),
            (&["compression.scheme=int8", "compression.levels=3"], "levels belongs"),
            (&["compression.scheme=qsgd", "compression.levels=0"], "levels = 0"),
            (&["compression.scheme=int8", "compression.support=track"], "support and exploration belong"),
        ] {
            let error = with(overrides).unwrap_err();
            assert!(error.contains(words), "{overrides:?}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let harmless =
            with(&["privacy.unit=none", "secure_aggregation.enabled=false", "compression.scheme=none"]);
        assert_eq!(harmless.unwrap(), Job::parse(JOB).unwrap());
        assert!(Job::parse("name = 1").unwrap_err().to_string().contains("invalid type"));
        assert!(Job::parse(&" ".repeat(70_000)).is_err());
    }

    const PRIVATE: [&str; 10] = [
        "train.batch_size=0",
        "train.local_steps=10",
        "train.sampling_rate=0.05",
        "privacy.unit=example",
        "privacy.mechanism=dp-sgd",
        "privacy.noise_multiplier=1.6",
        "privacy.clip_norm=2.0",
        "privacy.delta=1e-5",
        "privacy.max_epsilon=3.0",
        "rounds=30",
    ];
    const CLIENT: [&str; 6] = [
        "privacy.unit=client",
        "privacy.mechanism=gaussian",
        "privacy.noise_multiplier=4.0",
        "privacy.clip_norm=2.0",
        "privacy.delta=1e-5",
        "privacy.max_epsilon=3.0",
    ];

    const DISTRIBUTED: [&str; 12] = [
        "train.batch_size=0",
        "train.local_steps=1",
        "train.sampling_rate=0.05",
        "privacy.unit=example",
        "privacy.mechanism=distributed",
        "privacy.noise_multiplier=1.6",
        "privacy.clip_norm=2.0",
        "privacy.expected_batch_size=40.0",
        "privacy.delta=1e-5",
        "privacy.max_epsilon=3.0",
        "secure_aggregation.enabled=true",
        "rounds=30",
    ];

    #[test]
    fn masked_and_compressed_jobs_read_back_to_themselves() {
        let masked = ["secure_aggregation.enabled=true"];
        let top_k = ["compression.scheme=top-k", "compression.density=0.5"];
        for sets in [
            &masked[..],
            &top_k,
            &[masked[0], top_k[0], top_k[1]],
            &["compression.scheme=qsgd", "compression.levels=3"],
            &DISTRIBUTED,
            &[&DISTRIBUTED[..], &top_k].concat(),
        ] {
            let job = with(sets).unwrap();
            assert_eq!(Job::parse(&job.to_toml().unwrap()).unwrap(), job);
        }
        let both = with(&[masked[0], top_k[0], top_k[1]]).unwrap();
        assert_eq!(
            (both.masked_coordinates().unwrap(), both.support_rule()),
            (14, Some(SupportRule::DelayedVote))
        );
        assert!(both.has_error_feedback());
        let private = with(&[&DISTRIBUTED[..], &top_k].concat()).unwrap();
        assert_eq!(private.support_rule(), Some(SupportRule::Track));
        assert!(!private.has_error_feedback() && private.sums_gradients());
    }

    #[test]
    fn a_private_job_says_what_it_costs_and_reads_back_to_itself() {
        let job = with(&PRIVATE).unwrap();
        assert_eq!(Job::parse(&job.to_toml().unwrap()).unwrap(), job);
        let [event] = job.round_events()[..] else { panic!() };
        assert_eq!((event.sampling_rate, event.count, event.sensitivity), (0.05, 10, 2.0));
        assert_eq!((event.noise_multiplier(), event.noise_standard_deviation), (1.6, 3.2));
        assert_eq!(job.events(30)[0].count, 300);
        assert!(with(&[]).unwrap().events(30).is_empty());

        let promised = job.guarantee().unwrap().unwrap();
        assert!(promised.epsilon > 2.0 && promised.epsilon < 3.0 && promised.delta == 1e-5, "{promised:?}");
        let tight = with(&[&PRIVATE[..], &["privacy.max_epsilon=2.0"]].concat()).unwrap();
        let error = tight.guarantee().unwrap_err().to_string();
        assert!(error.contains("more than max_epsilon = 2") && error.contains("δ = 0.00001"), "{error}");
        assert_eq!(with(&[]).unwrap().guarantee(), Ok(None));

        // Correction 15: nobody's absence from a cohort is a secret.
        let [event] = with(&CLIENT).unwrap().round_events()[..] else { panic!() };
        assert_eq!((event.sampling_rate, event.count), (1.0, 1));

        let noised = ["evaluation.federated=true", "privacy.metrics=noised", "privacy.metrics_noise=20.0"];
        let noised = with(&[&PRIVATE[..], &noised].concat()).unwrap();
        assert_eq!(Job::parse(&noised.to_toml().unwrap()).unwrap(), noised);
        let [_, metrics] = noised.round_events()[..] else { panic!() };
        assert_eq!(
            (metrics.sampling_rate, metrics.sensitivity, metrics.noise_standard_deviation),
            (1.0, 1.0, 20.0)
        );
        let adaptive = with(&[&PRIVATE[..], &["privacy.clipping=adaptive"]].concat()).unwrap();
        let constants = adaptive.privacy.as_ref().unwrap().adaptive(100.0).unwrap();
        assert_eq!(
            (constants.count_noise, constants.target_quantile, constants.learning_rate),
            (5.0, 0.5, 0.2)
        );
        let both = constants.sum_noise_multiplier.powi(-2) + (2.0 * constants.count_noise).powi(-2);
        assert!(
            (both.powf(-0.5) - 1.6).abs() < 1e-12,
            "pitfall 9: sum and count together cost the job's multiplier"
        );
    }

    /// Correction 1 and pitfall 8: nothing that would follow from a number of examples; and whatever else does not fit.
    #[test]
    fn a_private_job_that_cannot_keep_its_promise_is_refused() {
        for (base, overrides, words) in [
            (&PRIVATE[..], &["train.batch_size=10"][..], "would tell how many examples"),
            (&PRIVATE, &["train.sampling_rate=0.0"], "sampling_rate = 0"),
            (&PRIVATE, &["train.sampling_rate=1.5"], "sampling_rate = 1.5"),
            (&PRIVATE, &["privacy.unit=client"], "\"dp-sgd\" protects examples"),
            (&PRIVATE, &["privacy.mechanism=gaussian"], "sampling_rate belongs to"),
            (&CLIENT, &["privacy.unit=example"], "\"gaussian\" protects clients"),
            (&PRIVATE, &["privacy.mechanism=distributed"], "local_steps = 1"),
            (
                &PRIVATE,
                &["privacy.mechanism=distributed", "train.local_steps=1"],
                "[secure_aggregation] enabled = true",
            ),
            (&CLIENT, &["privacy.mechanism=distributed"], "[secure_aggregation] enabled = true"),
            (&DISTRIBUTED, &["train.momentum=0.9"], "no momentum"),
            (&DISTRIBUTED, &["privacy.expected_batch_size=0.0"], "expected_batch_size"),
            (&DISTRIBUTED, &["secure_aggregation.value_bits=8"], "follow from the noise"),
            (&DISTRIBUTED, &["secure_aggregation.colluders=3"], "somebody must add noise"),
            (&DISTRIBUTED, &["privacy.clipping=adaptive"], "fixed clip norm"),
            (&PRIVATE, &["privacy.expected_batch_size=16.0"], "belongs to"),
            (
                &DISTRIBUTED,
                &["compression.scheme=top-k", "compression.density=0.5", "compression.error_feedback=true"],
                "keeps what was not noised",
            ),
            (
                &DISTRIBUTED,
                &["compression.scheme=top-k", "compression.density=0.5", "compression.support=delayed-vote"],
                "without noise",
            ),
            (&CLIENT, &["compression.scheme=int8"], "sums whole updates"),
            (&CLIENT, &["secure_aggregation.enabled=true"], "which must see it"),
            (&PRIVATE, &["privacy.noise_multiplier=0.0"], "noise_multiplier = 0"),
            (&PRIVATE, &["privacy.clip_norm=nan"], "clip_norm"),
            (&PRIVATE, &["privacy.delta=0.0"], "delta = 0"),
            (&PRIVATE, &["privacy.delta=1.0"], "delta = 1"),
            (&PRIVATE, &["privacy.max_epsilon=-1.0"], "max_epsilon = -1"),
            (&PRIVATE, &["privacy.target_quantile=0.5"], "belongs to clipping"),
            (
                &PRIVATE,
                &["privacy.clipping=adaptive", "privacy.count_noise=0.8"],
                "count_noise must be above",
            ),
            (&PRIVATE, &["privacy.clipping=adaptive", "privacy.target_quantile=1.0"], "target_quantile"),
            (&PRIVATE, &["privacy.metrics=noised"], "needs metrics_noise"),
            (&PRIVATE, &["privacy.metrics=noised", "privacy.metrics_noise=9.0"], "federated = true"),
            (&PRIVATE, &["privacy.metrics_noise=9.0"], "belongs to metrics"),
            (&PRIVATE, &["privacy.noise=1.0"], "unknown key"),
            (&CLIENT, &["train.sampling_rate=0.5"], "sampling_rate belongs to"),
            (&CLIENT, &["cohort.over_selection=1.5"], "over_selection = 1"),
            (&CLIENT, &["privacy.sampler=discrete-gaussian"], "belongs to mechanism"),
        ] {
            let error = with(&[base, overrides].concat()).unwrap_err();
            assert!(error.contains(words), "{overrides:?}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let epochs: Vec<&str> = PRIVATE.iter().copied().filter(|set| !set.contains("local_steps")).collect();
        let mut table = document::parse(&JOB.replace("local_steps = 100", "local_epochs = 1")).unwrap();
        for assignment in epochs {
            document::set(&mut table, assignment).unwrap();
        }
        assert!(Job::from_table(table).unwrap_err().to_string().contains("would tell how many examples"));
        assert!(with(&PRIVATE[3..]).unwrap_err().contains("give sampling_rate"));
    }

    #[test]
    fn schedules_and_counts() {
        let rate = |overrides: &[&str], round| with(overrides).unwrap().train.learning_rate(round, 15);
        assert_eq!(rate(&[], 9), 1e-3);
        assert_eq!(rate(&["train.schedule=exponential", "train.decay=0.5"], 3), 0.25e-3);
        let step = ["train.schedule=step", "train.decay=0.5", "train.decay_every_rounds=2"];
        assert_eq!([rate(&step, 2), rate(&step, 3)], [1e-3, 0.5e-3]);
        assert_eq!(rate(&["train.schedule=cosine"], 1), 1e-3);
        assert!(rate(&["train.schedule=cosine"], 15) < 0.02e-3);
        assert_eq!(with(&["cohort.over_selection=1.1", "cohort.size=10"]).unwrap().invited(), 11);
        assert_eq!(with(&["cohort.over_selection=1.3"]).unwrap().invited(), 6);
        let job = with(&["evaluation.every_rounds=5"]).unwrap();
        let evaluated: Vec<u32> = (1..=15).filter(|round| job.evaluates(*round)).collect();
        assert_eq!(evaluated, [5, 10, 15]);
        assert!(!with(&["evaluation.every_rounds=0"]).unwrap().evaluates(14));
    }
}
