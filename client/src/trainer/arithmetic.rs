//! A deterministic stand-in for training, without libtorch: for protocol and fault tests.

use std::sync::atomic::{AtomicBool, Ordering};

use rand::RngExt;

use tributary_common::job::{Job, PrivacyUnit};
use tributary_common::record::Metrics;
use tributary_common::rng::{Purpose, Stream};

use super::{ClientUpdate, Task, TrainError, Trainer, check, count, no_confusion};
use crate::shard::Shard;

/// "Trains" by arithmetic: bits that depend on everything that real training depends on, in microseconds.
///
/// Each value of the change is `rate · (target − value) + noise`, where the target is the mean label of the client
/// as a share of the classes and the noise, ±0.01, comes from the stream (seed, shuffle, round, client): a wrong
/// round, client, model or shard shows in the bits, and any number of rounds stays finite.
///
/// With `[privacy]` it reports what a private trainer reports, and adds no noise of the mechanism's: its updates are
/// for protocol tests and promise nobody anything.
#[derive(Debug, Clone, Copy, Default)]
pub struct ArithmeticTrainer;

impl Trainer for ArithmeticTrainer {
    fn train(&mut self, task: &Task, shard: &Shard, stop: &AtomicBool) -> Result<ClientUpdate, TrainError> {
        let job = &task.job;
        check(job, job.layout()?.parameters(), &task.model, shard)?;
        let unit = job.privacy.as_ref().map(|privacy| privacy.unit);
        let declared = task.declared_examples.filter(|declared| *declared > 0);
        let clip_norm =
            job.privacy.as_ref().filter(|_| job.sums_gradients()).map(|privacy| privacy.clip_norm);
        let weight = match unit {
            None if shard.is_empty() => return Err(TrainError::NoExamples),
            None => shard.len() as u64,
            Some(PrivacyUnit::Client) => 1,
            Some(PrivacyUnit::Example) if job.sums_gradients() => 1,
            Some(PrivacyUnit::Example) => declared.ok_or(TrainError::DeclaredExamples)?,
        };
        if stop.load(Ordering::Relaxed) {
            return Err(TrainError::Cancelled);
        }
        let labels = shard.indices.iter().filter_map(|index| shard.examples.labels.get(*index as usize));
        let target = labels.sum::<i64>() as f64 / (shard.len().max(1) * job.model.classes) as f64;
        let share = task.steps(shard.len() as u64) as f64 / job.train.steps(shard.len() as u64).max(1) as f64;
        let rate = (job.train.learning_rate(task.round, job.rounds).min(0.5) * share) as f32;
        let mut stream = Stream::new(job.seed, Purpose::Shuffle, task.round, task.client.as_str());
        let change = |value: &f32| {
            let noise = (stream.random::<f32>() - 0.5) * 0.02;
            rate * (target as f32 - value) + noise
        };
        let mut delta: Vec<f32> = task.model.iter().map(change).collect();
        if let Some(clip_norm) = clip_norm {
            // A gradient points the other way, and as many are summed as a batch is expected to have.
            let batch = job.train.sampling_rate.unwrap_or(1.0) * shard.len() as f64;
            let norm = delta.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            let factor = -batch * (clip_norm / norm.max(f64::MIN_POSITIVE)).min(1.0);
            delta.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
        }
        if delta.iter().any(|value| !value.is_finite()) {
            return Err(TrainError::Diverged { step: 1 });
        }
        let loss = unit.is_none().then(|| 1.0 / f64::from(task.round.max(1)) + target);
        Ok(ClientUpdate { delta, examples: weight, loss })
    }

    /// Loss ½ per example; three of four examples are right, every fourth counts as the class after its own.
    fn evaluate(&mut self, job: &Job, model: &[f32], shard: &Shard) -> Result<Metrics, TrainError> {
        check(job, job.layout()?.parameters(), model, shard)?;
        if shard.is_empty() {
            return Ok(Metrics::default());
        }
        let classes = job.model.classes;
        let mut metrics = Metrics { confusion: no_confusion(classes), ..Metrics::default() };
        let labels = shard.indices.iter().filter_map(|index| shard.examples.labels.get(*index as usize));
        for (position, label) in labels.enumerate() {
            let wrong = position % 4 == 3;
            count(&mut metrics, classes, *label, if wrong { (label + 1) % classes as i64 } else { *label });
            metrics.loss_sum += 0.5;
        }
        Ok(metrics)
    }
}
