//! Training and evaluation with libtorch; the only place that uses it.
//!
//! Every call that can fail goes through tch's `f_` variants, so a refusal of libtorch is a
//! [`TrainError::Torch`], never a panic. libtorch's own random generator is never used.

mod canary;
mod convolution;
mod elementwise;
mod embedding;
mod linear;
mod loss;
mod memory;
mod network;
mod normalisation;
mod parameters;
mod pooling;
mod private;
mod sgd;
mod slots;
mod threads;

pub use canary::{CanaryRecord, Sabotage, run_canaries};

use std::sync::atomic::{AtomicBool, Ordering};

use tch::TchError;

use tributary_common::job::{Job, Model, PrivacyUnit};
use tributary_common::model::Layout;
use tributary_common::record::{Metrics, one_line};
use tributary_common::rng::{Purpose, Stream};

use self::linear::Target;
use self::network::Network;
use self::parameters::Parameters;
use self::sgd::Sgd;
use super::batches::Batches;
use super::{
    ClientUpdate, EVALUATION_BATCH, Objective, Recorder, Task, TrainError, Trainer, check, count,
    no_confusion,
};
use crate::data::Split;
use crate::shard::Shard;

/// Examples per forward pass of an evaluation, a divisor of [`EVALUATION_BATCH`]: their values stay in a core's cache.
const EVALUATION_PART: usize = 100;

impl From<TchError> for TrainError {
    fn from(error: TchError) -> Self {
        // libtorch puts its C++ stack trace behind the first line.
        TrainError::Torch(one_line(error.to_string().lines().next().unwrap_or("an error without a message")))
    }
}

/// Trains with libtorch on one core of the CPU.
///
/// Create and use it on a thread of your own (`std::thread`), never on tokio's pools: libtorch keeps its number of
/// threads per operating system thread, and only one intra-op thread gives the same bits everywhere. Each thread
/// is set to one before its first tensor, here and again in every call, so a trainer may move between such threads.
/// Buffers are kept from call to call and grow to the largest model and batch seen; no state is.
#[derive(Default)]
pub struct TorchTrainer {
    prepared: Option<Prepared>,
    objective: Option<Box<dyn Objective>>,
    recorder: Option<Box<dyn Recorder>>,
    #[cfg(feature = "seeded-noise")]
    seed: Option<u64>,
    labels: Vec<usize>,
    /// Model and gradient in the order of the layout, for an objective.
    for_objective: [Vec<f32>; 2],
}

/// What is built once per model and used again for every client.
struct Prepared {
    model: Model,
    layout: Layout,
    parameters: Parameters,
    sgd: Sgd,
    /// Adds each step's change to the values within its matrix products.
    plain: Option<Network>,
    /// Leaves each step's gradient for the update rule.
    general: Option<Network>,
    /// Adds up single examples' gradients, each brought down to a norm.
    clipping: Option<Network>,
    evaluating: Option<Network>,
}

impl Prepared {
    fn new(job: &Job) -> Result<Self, TrainError> {
        let layout = job.layout()?;
        let parameters = Parameters::new(&layout)?;
        let (plain, general, clipping, evaluating) = (None, None, None, None);
        Ok(Self {
            model: job.model.clone(),
            layout,
            parameters,
            sgd: Sgd::default(),
            plain,
            general,
            clipping,
            evaluating,
        })
    }

    /// The network for `target`, with the parameters that it computes on.
    fn network(
        &mut self,
        target: Option<Target>,
    ) -> Result<(&mut Network, &mut Parameters, &mut Sgd), TrainError> {
        let Self { model, layout, parameters, sgd, plain, general, clipping, evaluating } = self;
        let kept = match target {
            Some(Target::Values) => plain,
            Some(Target::Gradient) => general,
            Some(Target::Clipped) => clipping,
            None => evaluating,
        };
        let network = match kept.take() {
            Some(network) => network,
            None => {
                if matches!(target, Some(Target::Gradient | Target::Clipped)) {
                    parameters.make_gradient()?;
                }
                let layers = model.network().map_err(tributary_common::job::JobError::from)?;
                Network::new(layers.layers(), &model.inputs, layout, target)?
            }
        };
        Ok((kept.insert(network), parameters, sgd))
    }
}

impl TorchTrainer {
    /// A trainer for the calling thread.
    pub fn new() -> Self {
        threads::one_intra_op_thread();
        Self::default()
    }

    /// A trainer whose clients minimise the job's loss and the terms of `objective`.
    pub fn with_objective(objective: Box<dyn Objective>) -> Self {
        Self { objective: Some(objective), ..Self::new() }
    }

    /// A trainer that `recorder` watches in every private training: for audits.
    pub fn with_recorder(recorder: Box<dyn Recorder>) -> Self {
        Self { recorder: Some(recorder), ..Self::new() }
    }

    /// A trainer whose noise anybody can repeat: its updates promise nothing.
    #[cfg(feature = "seeded-noise")]
    pub fn with_seeded_noise(seed: u64) -> Self {
        Self { seed: Some(seed), ..Self::new() }
    }

    /// What is kept for the model of `job`: from the last call, where it was the same.
    fn prepare<'a>(kept: &'a mut Option<Prepared>, job: &Job) -> Result<&'a mut Prepared, TrainError> {
        // Dropped before the next is made: two large models need not be in memory at once.
        drop(kept.take_if(|kept| kept.model != job.model));
        let prepared = match kept.take() {
            Some(prepared) => prepared,
            None => Prepared::new(job)?,
        };
        Ok(kept.insert(prepared))
    }
}

impl Trainer for TorchTrainer {
    /// Minimises the mean cross-entropy by mini-batch SGD with momentum, weight decay and, for FedProx, the
    /// proximal term, for [`Task::steps`] steps; with `[privacy]` as its unit and mechanism ask.
    fn train(&mut self, task: &Task, shard: &Shard, stop: &AtomicBool) -> Result<ClientUpdate, TrainError> {
        threads::one_intra_op_thread();
        let _no_graph = tch::no_grad_guard();
        let job = &task.job;
        let parameters = Self::prepare(&mut self.prepared, job)?.parameters.len();
        check(job, parameters, &task.model, shard)?;
        match &job.privacy {
            None => self.train_openly(task, shard, stop),
            Some(privacy) => match privacy.unit {
                PrivacyUnit::Example if job.sums_gradients() => {
                    self.sum_gradients(task, shard, privacy, stop)
                }
                PrivacyUnit::Example => self.train_private(task, shard, privacy, stop),
                PrivacyUnit::Client => of_client(self.train_openly(task, shard, stop), parameters),
            },
        }
    }

    /// Sums the per-example losses of each [`EVALUATION_BATCH`] examples in the order of the shard, and then the sums.
    fn evaluate(&mut self, job: &Job, model: &[f32], shard: &Shard) -> Result<Metrics, TrainError> {
        threads::one_intra_op_thread();
        let _no_graph = tch::no_grad_guard();
        let prepared = Self::prepare(&mut self.prepared, job)?;
        check(job, prepared.parameters.len(), model, shard)?;
        if shard.is_empty() {
            return Ok(Metrics::default());
        }
        let (network, parameters, _) = prepared.network(None)?;
        parameters.load(model);
        let classes = job.model.classes;
        let mut metrics = Metrics { confusion: no_confusion(classes), ..Metrics::default() };
        for batch in shard.indices.chunks(EVALUATION_BATCH) {
            let mut loss_sum = 0.0;
            for part in batch.chunks(EVALUATION_PART) {
                let examples =
                    take_batch(network, parameters, &mut self.labels, &shard.examples, part.iter())?;
                let logits = network.forward(parameters, examples, None)?;
                for (logits, label) in logits.chunks_exact(classes).zip(&self.labels) {
                    let (loss, predicted) = loss::cross_entropy(logits, *label);
                    loss_sum += loss;
                    count(&mut metrics, classes, *label as i64, predicted as i64);
                }
            }
            metrics.loss_sum += loss_sum;
        }
        if metrics.loss_sum.is_finite() { Ok(metrics) } else { Err(TrainError::LossNotFinite) }
    }
}

impl TorchTrainer {
    fn train_openly(
        &mut self,
        task: &Task,
        shard: &Shard,
        stop: &AtomicBool,
    ) -> Result<ClientUpdate, TrainError> {
        let job = &task.job;
        let prepared = Self::prepare(&mut self.prepared, job)?;
        if shard.is_empty() {
            return Err(TrainError::NoExamples);
        }
        prepared.sgd.start(job, task.round, task.model.len());
        let plain = prepared.sgd.is_plain() && self.objective.is_none();
        let target = if plain { Target::Values } else { Target::Gradient };
        let (network, parameters, sgd) = prepared.network(Some(target))?;
        parameters.load(&task.model);
        if !plain {
            parameters.keep_start();
        }
        if let Some(objective) = &mut self.objective {
            objective.begin(task, shard.len() as u64);
        }
        let mut dropout = Stream::new(job.seed, Purpose::Dropout, task.round, task.client.as_str());
        let mut batches = Batches::new(task, shard.len());
        let steps = task.steps(shard.len() as u64);
        let (mut loss_sum, mut seen) = (0.0, 0);
        for step in 1..=steps {
            if stop.load(Ordering::Relaxed) {
                return Err(TrainError::Cancelled);
            }
            let positions =
                batches.next().iter().filter_map(|position| shard.indices.get(*position as usize));
            let examples = take_batch(network, parameters, &mut self.labels, &shard.examples, positions)?;
            network.forward(parameters, examples, Some(&mut dropout))?;
            let mean = 1.0 / examples.max(1) as f64;
            let scale = if plain { -f64::from(sgd.learning_rate()) * mean } else { mean };
            let loss = network.loss(&self.labels, scale);
            if !loss.is_finite() {
                return Err(TrainError::Diverged { step });
            }
            loss_sum += loss;
            seen += examples;
            network.backward(parameters, examples)?;
            if !plain {
                descend(parameters, sgd, step, &mut self.objective, &mut self.for_objective);
            }
        }
        let delta = parameters.change_since(&task.model);
        if !all_finite(&delta) {
            return Err(TrainError::Diverged { step: steps });
        }
        if let Some(objective) = &mut self.objective {
            objective.finish(task, steps, &delta);
        }
        Ok(ClientUpdate { delta, examples: shard.len() as u64, loss: Some(loss_sum / seen.max(1) as f64) })
    }
}

/// What leaves where the client is the unit: weight one, no loss and, whatever its data did, an update. One without
/// examples, or that left the finite numbers, changes nothing.
fn of_client(
    trained: Result<ClientUpdate, TrainError>,
    parameters: usize,
) -> Result<ClientUpdate, TrainError> {
    let delta = match trained {
        Ok(update) => update.delta,
        Err(TrainError::Diverged { .. } | TrainError::NoExamples) => vec![0.0; parameters],
        Err(error) => return Err(error),
    };
    Ok(ClientUpdate { delta, examples: 1, loss: None })
}

/// Puts the examples at `indices`, which [`check`] has seen, into the network; their labels into `labels`. Returns
/// how many they are.
fn take_batch<'a>(
    network: &mut Network,
    parameters: &Parameters,
    labels: &mut Vec<usize>,
    examples: &Split,
    indices: impl Iterator<Item = &'a u32> + Clone,
) -> Result<usize, TchError> {
    let count = indices.clone().count();
    network.bind(parameters, count)?;
    labels.clear();
    let row = examples.features.len().checked_div(examples.labels.len()).unwrap_or_default();
    for (at, index) in indices.enumerate() {
        let index = *index as usize;
        network.take(at, examples.features.get(index * row..(index + 1) * row).unwrap_or_default());
        labels
            .push(examples.labels.get(index).map_or(0, |label| usize::try_from(*label).unwrap_or_default()));
    }
    Ok(count)
}

/// One step of the update rule along the gradient, after an objective added its own terms to it.
fn descend(
    parameters: &mut Parameters,
    sgd: &mut Sgd,
    step: u64,
    objective: &mut Option<Box<dyn Objective>>,
    for_objective: &mut [Vec<f32>; 2],
) {
    if let Some(objective) = objective {
        let [model, gradient] = for_objective;
        parameters.to_layout(parameters.values.values(), model);
        parameters.to_layout(parameters.gradient.values(), gradient);
        objective.gradient(step, model, gradient);
        parameters.set_gradient(gradient);
    }
    let Parameters { values, gradient, start, .. } = parameters;
    sgd.step(values.values_mut(), gradient.values(), start);
}

/// Whether every value is a finite number.
fn all_finite(values: &[f32]) -> bool {
    // A finite number has another exponent than all ones. As a maximum of integers this takes one pass of vectors.
    let magnitude = |value: &f32| value.to_bits() & 0x7fff_ffff;
    values.iter().map(magnitude).fold(0, u32::max) < f32::INFINITY.to_bits()
}

#[cfg(test)]
mod reference;
#[cfg(test)]
mod replay;
#[cfg(test)]
mod tests;
