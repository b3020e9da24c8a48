//! Local training and evaluation of one client: what goes in, what comes out, and the two trainers.

mod arithmetic;
mod batches;
mod objective;
mod recorder;
mod torch;
mod units;

pub use arithmetic::ArithmeticTrainer;
pub use objective::Objective;
pub use recorder::{CountRelease, Recorder, Release};
pub use torch::{CanaryRecord, Sabotage, TorchTrainer, run_canaries};

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tributary_common::ids::NodeName;
use tributary_common::job::{Job, JobError};
use tributary_common::model::Parameters;
use tributary_common::record::Metrics;

use crate::shard::Shard;

/// One client's local training in one round.
#[derive(Debug, Clone)]
pub struct Task {
    /// The job as resolved.
    pub job: Arc<Job>,
    /// The round, from 1.
    pub round: u32,
    /// The client: with seed and round it names the stream that shuffles its examples.
    pub client: NodeName,
    /// The published model that training starts from.
    pub model: Parameters,
    /// What the node's operator declared as its number of examples, once and rounded: with `[privacy]` it stands for
    /// the true one, as weight and in the divisor.
    pub declared_examples: Option<u64>,
    /// Fewest of these and the job's steps are taken: a straggler's partial work (Li et al. 2020, section 3.2).
    pub max_steps: Option<u64>,
}

impl Task {
    /// SGD steps of a client with `examples` training examples.
    pub fn steps(&self, examples: u64) -> u64 {
        let asked = self.job.train.steps(examples);
        self.max_steps.map_or(asked, |most| asked.min(most.max(1)))
    }
}

/// What training produces.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientUpdate {
    /// Trained model minus published model, in the order of the layout; every value is finite. Where
    /// [`Job::sums_gradients`] says so, Σ of clipped gradients of one batch instead: without noise it is not to be
    /// written down.
    pub delta: Vec<f32>,
    /// The client's weight in the average: its number of examples; with `[privacy]` the declared one, or 1 where the
    /// unit is a client or gradients are summed.
    pub examples: u64,
    /// Mean cross-entropy over the examples as they were trained on; `None` with `[privacy]`.
    pub loss: Option<f64>,
}

/// Why a client could not train or evaluate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TrainError {
    /// `stop` was set; nothing was produced.
    #[error("training was cancelled")]
    Cancelled,
    /// There is nothing to train on.
    #[error("the client has no training examples; give it data or leave it out of the federation")]
    NoExamples,
    /// The examples have another size than the model takes.
    #[error("an example has {found} values, but the job says [model] inputs = {expected:?}")]
    Inputs {
        /// The job's inputs.
        expected: Vec<usize>,
        /// Values of one example.
        found: usize,
    },
    /// A label is not a class of the job.
    #[error("example {example} has label {label}, but the job says [model] classes = {classes} (labels 0 to {})", .classes.saturating_sub(1))]
    Label {
        /// Position in the examples, from 0.
        example: usize,
        /// Its label.
        label: i64,
        /// The job's classes.
        classes: usize,
    },
    /// Features, labels and positions do not belong together.
    #[error("the examples are inconsistent: {0}")]
    Examples(String),
    /// The model has another length than the job's architecture.
    #[error("the model has {found} parameters, but the job's architecture has {expected}")]
    Model {
        /// Parameters of the architecture.
        expected: usize,
        /// Parameters given.
        found: usize,
    },
    /// Training left the finite numbers.
    #[error("training diverged: loss or model is not finite at step {step}; lower [train] learning_rate")]
    Diverged {
        /// The step, from 1.
        step: u64,
    },
    /// The evaluated model left the finite numbers.
    #[error("the model's loss on these examples is not finite: it has diverged; lower [train] learning_rate")]
    LossNotFinite,
    /// Nobody said what stands for the number of examples, which is private.
    #[error(
        "the job has [privacy]: declare the number of examples in the node's configuration, once and rounded"
    )]
    DeclaredExamples,
    /// The job is none that can be audited.
    #[error("no audit: {0}")]
    Audit(String),
    /// There is no noise to be had.
    #[error("no noise, so no training: {0}")]
    Noise(String),
    /// The job's model cannot be built.
    #[error(transparent)]
    Job(#[from] JobError),
    /// libtorch refused an operation: too little memory, or a fault of ours.
    #[error("libtorch: {0}")]
    Torch(String),
}

/// Trains and evaluates for clients, one after another.
///
/// The result is a function of the arguments alone: of no earlier call, thread, clock or ambient generator. With
/// `[privacy]` and the unit `example` it is drawn with secret bits of the operating system's: no two are equal. With
/// `mechanism = "distributed"` there is no noise in it yet: whoever encodes it adds the client's share.
pub trait Trainer: Send {
    /// Trains `task` on `shard`; `stop` is looked at before every step.
    fn train(&mut self, task: &Task, shard: &Shard, stop: &AtomicBool) -> Result<ClientUpdate, TrainError>;

    /// Evaluates `model` on `shard`: the default metrics when it is empty; confusion counts up to
    /// [`CONFUSION_CLASSES`] classes.
    fn evaluate(&mut self, job: &Job, model: &[f32], shard: &Shard) -> Result<Metrics, TrainError>;
}

/// Examples whose losses an evaluation adds up before it adds the sums: parts of a held-out set that are multiples of
/// this, evaluated apart and added in order, give the same bits as the whole.
pub const EVALUATION_BATCH: usize = 500;
/// Most classes for which an evaluation counts confusions.
pub const CONFUSION_CLASSES: usize = 100;

/// Refuses a model or examples that do not fit the job, so that nothing after it needs to look again.
fn check(job: &Job, parameters: usize, model: &[f32], shard: &Shard) -> Result<(), TrainError> {
    if model.len() != parameters {
        return Err(TrainError::Model { expected: parameters, found: model.len() });
    }
    let examples = &shard.examples;
    let row = job.model.inputs.iter().product::<usize>();
    let (values, labels) = (examples.features.len(), examples.labels.len());
    if row.checked_mul(labels) != Some(values) {
        return Err(match values.checked_div(labels) {
            Some(found) if found * labels == values => {
                TrainError::Inputs { expected: job.model.inputs.clone(), found }
            }
            _ => TrainError::Examples(format!("{labels} labels, but {values} features")),
        });
    }
    let classes = job.model.classes;
    for position in shard.indices.iter() {
        let example = *position as usize;
        match examples.labels.get(example) {
            None => {
                return Err(TrainError::Examples(format!(
                    "the client's part names example {example}, but there are {labels}"
                )));
            }
            // A private job is not refused because of one row: it adds nothing.
            Some(label)
                if job.privacy.is_none() && !usize::try_from(*label).is_ok_and(|label| label < classes) =>
            {
                return Err(TrainError::Label { example, label: *label, classes });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Confusion counts that start at zero: `classes × classes`, or none for more than [`CONFUSION_CLASSES`].
fn no_confusion(classes: usize) -> Vec<Option<u64>> {
    if classes <= CONFUSION_CLASSES { vec![Some(0); classes * classes] } else { Vec::new() }
}

/// Counts one example.
fn count(metrics: &mut Metrics, classes: usize, label: i64, predicted: i64) {
    metrics.examples += 1;
    metrics.correct += u64::from(label == predicted);
    let cell = usize::try_from(label).ok().zip(usize::try_from(predicted).ok());
    let cell = cell.and_then(|(row, column)| metrics.confusion.get_mut(row * classes + column));
    if let Some(Some(cell)) = cell {
        *cell += 1;
    }
}

#[cfg(test)]
mod tests;
