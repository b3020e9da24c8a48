//! Training and evaluation with libtorch; the only place that uses it.
//!
//! Every call that can fail goes through tch's `f_` variants, so a refusal of libtorch is a
//! [`TrainError::Torch`], never a panic. libtorch's own random generator is never used.

mod batch;
mod network;
mod parameters;
mod sgd;
mod threads;

use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Reduction, TchError, Tensor};

use tributary_common::job::{Job, Model};
use tributary_common::record::{Metrics, one_line};

use self::batch::Batch;
use self::network::Network;
use self::parameters::Parameters;
use self::sgd::Sgd;
use super::batches::Batches;
use super::{ClientUpdate, EVALUATION_BATCH, Task, TrainError, Trainer, check, count, no_confusion};
use crate::shard::Shard;

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
/// Buffers are kept from call to call and grow to the largest model seen; no state is.
#[derive(Default)]
pub struct TorchTrainer {
    prepared: Option<Prepared>,
    batch: Batch,
}

/// What is built once per model and used again for every client.
struct Prepared {
    model: Model,
    network: Network,
    parameters: Parameters,
    sgd: Sgd,
}

impl TorchTrainer {
    /// A trainer for the calling thread.
    pub fn new() -> Self {
        threads::one_intra_op_thread();
        Self::default()
    }

    /// The network and buffers for the model of `job`, from the last call where it was the same.
    fn prepare<'a>(kept: &'a mut Option<Prepared>, job: &Job) -> Result<&'a mut Prepared, TrainError> {
        if let Some(other) = kept.take_if(|kept| kept.model != job.model) {
            drop(other);
        }
        let prepared = match kept.take() {
            Some(prepared) => prepared,
            None => {
                let layout = job.layout()?;
                Prepared {
                    model: job.model.clone(),
                    network: Network::new(&job.model, &layout)?,
                    parameters: Parameters::new(&layout)?,
                    sgd: Sgd::default(),
                }
            }
        };
        Ok(kept.insert(prepared))
    }
}

impl Trainer for TorchTrainer {
    /// Minimises the mean cross-entropy by mini-batch SGD with momentum, weight decay and, for FedProx, the
    /// proximal term, for [`tributary_common::job::Train::steps`] steps.
    fn train(&mut self, task: &Task, shard: &Shard, stop: &AtomicBool) -> Result<ClientUpdate, TrainError> {
        threads::one_intra_op_thread();
        let job = &task.job;
        let Prepared { network, parameters, sgd, .. } = Self::prepare(&mut self.prepared, job)?;
        check(job, parameters.values().len(), &task.model, shard)?;
        if shard.is_empty() {
            return Err(TrainError::NoExamples);
        }
        parameters.values_mut().copy_from_slice(&task.model);
        sgd.start(job, task.round, task.model.len());
        let mut batches = Batches::new(task, shard.len());
        let steps = task.steps(shard.len() as u64);
        let (mut loss_sum, mut seen) = (0.0, 0);
        for step in 1..=steps {
            if stop.load(Ordering::Relaxed) {
                return Err(TrainError::Cancelled);
            }
            let positions = batches.next();
            let examples = positions.iter().filter_map(|position| shard.indices.get(*position as usize));
            let (features, labels) = self.batch.gather(&shard.examples, &job.model.inputs, examples)?;
            let logits = network.forward(parameters.leaves(), features)?;
            let loss = cross_entropy(&logits, &labels, Reduction::Mean)?;
            let gradients = Tensor::f_run_backward(&[&loss], parameters.leaves(), false, false)?;
            let loss = loss.f_double_value(&[])?;
            if !loss.is_finite() {
                return Err(TrainError::Diverged { step });
            }
            loss_sum += loss * positions.len() as f64;
            seen += positions.len();
            parameters.update(&gradients, |range, values, gradient| {
                if let Some(start) = task.model.get(range.clone()) {
                    sgd.step(range, values, gradient, start);
                }
            })?;
        }
        let delta: Vec<f32> = parameters.values().iter().zip(task.model.iter()).map(|(w, s)| w - s).collect();
        if delta.iter().any(|value| !value.is_finite()) {
            return Err(TrainError::Diverged { step: steps });
        }
        Ok(ClientUpdate { delta, examples: shard.len() as u64, loss: loss_sum / seen.max(1) as f64 })
    }

    /// Sums the per-example losses in the order of the shard.
    fn evaluate(&mut self, job: &Job, model: &[f32], shard: &Shard) -> Result<Metrics, TrainError> {
        threads::one_intra_op_thread();
        let Prepared { network, parameters, .. } = Self::prepare(&mut self.prepared, job)?;
        check(job, parameters.values().len(), model, shard)?;
        if shard.is_empty() {
            return Ok(Metrics::default());
        }
        parameters.values_mut().copy_from_slice(model);
        let classes = job.model.classes;
        let mut metrics = Metrics { confusion: no_confusion(classes), ..Metrics::default() };
        let _no_graph = tch::no_grad_guard();
        for indices in shard.indices.chunks(EVALUATION_BATCH) {
            let (features, labels) = self.batch.gather(&shard.examples, &job.model.inputs, indices.iter())?;
            let logits = network.forward(parameters.leaves(), features)?;
            let losses: Vec<f32> = (&cross_entropy(&logits, &labels, Reduction::None)?).try_into()?;
            let predicted: Vec<i64> = (&logits.f_argmax(1, false)?).try_into()?;
            metrics.loss_sum += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
            let labels = indices.iter().filter_map(|index| shard.examples.labels.get(*index as usize));
            for (label, predicted) in labels.zip(predicted) {
                count(&mut metrics, classes, *label, predicted);
            }
        }
        if metrics.loss_sum.is_finite() { Ok(metrics) } else { Err(TrainError::LossNotFinite) }
    }
}

/// Cross-entropy of softmax(`logits`) against class numbers; every label is a class, so none is ignored.
fn cross_entropy(logits: &Tensor, labels: &Tensor, reduction: Reduction) -> Result<Tensor, TchError> {
    logits.f_cross_entropy_loss(labels, None::<Tensor>, reduction, -100, 0.0)
}

#[cfg(test)]
mod tests;
