//! An aggregation rule of one's own: the coordinate-wise trimmed mean of Yin et al. 2018, against two clients that send
//! the opposite of what they learnt, ten times over.
//!
//! `cargo run --example aggregation_rule` prints the accuracy of both rules.

mod digits;

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tributary_client::shard::Shard;
use tributary_client::trainer::{ClientUpdate, Task, TorchTrainer, TrainError, Trainer};
use tributary_common::aggregate::{AggregateError, AggregationRule, Contribution};
use tributary_common::job::Job;
use tributary_common::record::Metrics;

use self::digits::Learnt;

/// In each coordinate, the mean of the updates without the `trimmed` largest and the `trimmed` smallest values.
///
/// Examples are not weighed: whoever lies about values may lie about their number.
#[derive(Default)]
struct TrimmedMean {
    trimmed: usize,
    updates: Vec<Contribution>,
}

impl AggregationRule for TrimmedMean {
    fn begin(&mut self, _round: u32, _parameters: usize) {
        self.updates.clear();
    }

    fn add(&mut self, update: Contribution) {
        self.updates.push(update);
    }

    fn finish(&mut self, model: &[f32]) -> Result<Vec<f32>, AggregateError> {
        let (all, kept) = (self.updates.len(), self.updates.len().saturating_sub(2 * self.trimmed));
        if kept == 0 {
            return Err(AggregateError::Rule(format!("{all} updates are too few to trim {}", self.trimmed)));
        }
        let mut column = Vec::with_capacity(all);
        let mut step = |(at, old): (usize, &f32)| {
            column.clear();
            column.extend(self.updates.iter().filter_map(|update| update.delta().get(at)));
            // Sorted values have one sum, whatever the order in which updates came.
            column.sort_unstable_by(f32::total_cmp);
            let sum: f64 = column.iter().skip(self.trimmed).take(kept).map(|value| f64::from(*value)).sum();
            (f64::from(*old) + sum / kept as f64) as f32
        };
        Ok(model.iter().enumerate().map(&mut step).collect())
    }
}

/// Trains as it should, but two clients of the population turn their updates round.
struct WithSaboteurs(TorchTrainer);

impl Trainer for WithSaboteurs {
    fn train(&mut self, task: &Task, shard: &Shard, stop: &AtomicBool) -> Result<ClientUpdate, TrainError> {
        let mut update = self.0.train(task, shard, stop)?;
        if ["client-0", "client-1"].contains(&task.client.as_str()) {
            update.delta.iter_mut().for_each(|value| *value *= -10.0);
        }
        Ok(update)
    }

    fn evaluate(&mut self, job: &Job, model: &[f32], shard: &Shard) -> Result<Metrics, TrainError> {
        self.0.evaluate(job, model, shard)
    }
}

/// The weighted mean, and the trimmed mean.
pub(crate) fn run() -> Result<[Learnt; 2], Box<dyn Error>> {
    let scenario = digits::scenario()?;
    let learn = |rule| {
        let trainer = Arc::new(|| Ok(Box::new(WithSaboteurs(TorchTrainer::new())) as Box<dyn Trainer>));
        digits::learn(&scenario, scenario.federation()?, 2, trainer, rule)
    };
    Ok([learn(None)?, learn(Some(Box::new(TrimmedMean { trimmed: 2, ..TrimmedMean::default() })))?])
}

fn main() -> Result<(), Box<dyn Error>> {
    let [mean, trimmed] = run()?;
    println!("weighted mean  {:.3}", mean.accuracy());
    println!("trimmed mean   {:.3}", trimmed.accuracy());
    Ok(())
}
