//! The `[attacks]` table: hostile clients, and what they send in place of what they trained.
//!
//! Attackers know the job, the model and each other's data, and send in time: what robust rules are for. They are drawn
//! once, from a stream of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use rand::seq::SliceRandom as _;
use serde::{Deserialize, Serialize};
use tributary_client::data::Split;
use tributary_client::shard::Shard;
use tributary_client::trainer::{ClientUpdate, Task, TrainError, Trainer};
use tributary_common::aggregate::COORDINATE_LIMIT;
use tributary_common::document::Schema;
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::record::Metrics;
use tributary_common::rng::{Purpose, Stream};

use crate::scenario::Federation;
use crate::workers::MakeTrainer;

/// The keys of the `[attacks]` table.
pub const SCHEMA: Schema = Schema { keys: &["kind", "fraction", "strength"], tables: &[] };

/// What attackers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attack {
    /// Send what they trained, turned round and `strength` times as long.
    SignFlip,
    /// Send what they trained on flipped labels, `strength` times as long: the boost of a model replacement (Bagdasaryan
    /// et al. 2020).
    Scaled,
    /// Train honestly on labels that are flipped: class c becomes the last class less c.
    LabelFlip,
    /// Send, all the same, the mean of what they would have trained less `strength` standard deviations of each coordinate
    /// (Baruch et al. 2019, "A little is enough").
    LittleIsEnough,
}

/// The `[attacks]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttacksConfig {
    /// What attackers do.
    pub kind: Attack,
    /// Share of the clients that attack, 0 to below 1; rounded down.
    pub fraction: f64,
    /// How hard; 1 by default.
    #[serde(default = "one")]
    pub strength: f64,
}

fn one() -> f64 {
    1.0
}

impl AttacksConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// One line that names the key.
    pub fn validate(&self) -> Result<(), String> {
        if !(0.0..1.0).contains(&self.fraction) {
            return Err(format!("[attacks] fraction = {}: 0 to below 1 is possible", self.fraction));
        }
        if !(self.strength.is_finite() && self.strength >= 0.0) {
            return Err(format!("[attacks] strength = {}: 0 or more is needed", self.strength));
        }
        Ok(())
    }

    /// The attackers among `clients`, whatever the order of these.
    pub fn attackers<'a>(
        &self,
        seed: u64,
        clients: impl Iterator<Item = &'a NodeName>,
    ) -> BTreeSet<NodeName> {
        let mut names: Vec<&NodeName> = clients.collect();
        names.sort();
        let count = (names.len() as f64 * self.fraction) as usize;
        names.shuffle(&mut Stream::new(seed, Purpose::Faults, 0, "attackers"));
        names.into_iter().take(count).cloned().collect()
    }

    /// Trainers like those of `make`, of which the attackers' do what the table says.
    pub(crate) fn among(&self, federation: &Federation, job: &Job, make: MakeTrainer) -> MakeTrainer {
        let names = federation.shares.iter().map(|share| &share.name);
        let names = self.attackers(job.seed, names);
        let shard = |name: &NodeName| {
            let share = federation.shares.iter().find(|share| share.name == *name)?;
            let (train, shift) = (share.train.clone(), share.shift.clone());
            Some(Shard { examples: federation.dataset.train.clone(), indices: train, shift })
        };
        let shards = names.iter().filter_map(|name| Some((name.clone(), shard(name)?))).collect();
        let gang = Arc::new(Gang { config: self.clone(), shards, sent: Mutex::default() });
        Arc::new(move || Ok(Box::new(Attacking { honest: make()?, gang: gang.clone() })))
    }
}

/// All attackers.
struct Gang {
    config: AttacksConfig,
    shards: BTreeMap<NodeName, Shard>,
    /// What all of them send in a round.
    sent: Mutex<Option<(u32, Vec<f32>)>>,
}

/// A trainer of honest clients and of attackers.
struct Attacking {
    honest: Box<dyn Trainer>,
    gang: Arc<Gang>,
}

/// The examples with flipped labels.
fn flipped(shard: &Shard, classes: usize) -> Shard {
    let seen = shard.as_seen();
    let Split { features, labels, .. } = &*seen.examples;
    let width = features.len() / labels.len().max(1);
    let mut split = Split::default();
    for position in seen.indices.iter() {
        let at = *position as usize;
        if let (Some(row), Some(label)) = (features.get(at * width..(at + 1) * width), labels.get(at)) {
            split.features.extend_from_slice(row);
            split.labels.push(classes as i64 - 1 - label);
        }
    }
    Shard::whole(Arc::new(split))
}

/// Multiplied, and kept to what a coordinator takes at all.
fn scale(update: &mut ClientUpdate, factor: f64) {
    let most = f64::from(COORDINATE_LIMIT);
    for value in &mut update.delta {
        *value = (f64::from(*value) * factor).clamp(-most, most) as f32;
    }
}

impl Attacking {
    /// The mean of what all attackers would have trained, less some standard deviations.
    fn a_little(&mut self, task: &Task, stop: &AtomicBool) -> Result<Vec<f32>, TrainError> {
        let gang = self.gang.clone();
        let mut sent = gang.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((round, values)) = &*sent
            && *round == task.round
        {
            return Ok(values.clone());
        }
        let (mut sums, mut squares) = (vec![0.0f64; task.model.len()], vec![0.0f64; task.model.len()]);
        for (name, shard) in &gang.shards {
            let task = Task { client: name.clone(), ..task.clone() };
            let update = self.honest.train(&task, shard, stop)?;
            for ((sum, square), value) in sums.iter_mut().zip(&mut squares).zip(&update.delta) {
                let value = f64::from(*value);
                *sum += value;
                *square += value * value;
            }
        }
        let count = gang.shards.len().max(1) as f64;
        let value = |(sum, square): (&f64, &f64)| {
            let mean = sum / count;
            let deviation = (square / count - mean * mean).max(0.0).sqrt();
            (mean - gang.config.strength * deviation) as f32
        };
        let values: Vec<f32> = sums.iter().zip(&squares).map(value).collect();
        *sent = Some((task.round, values.clone()));
        Ok(values)
    }
}

impl Trainer for Attacking {
    fn train(&mut self, task: &Task, shard: &Shard, stop: &AtomicBool) -> Result<ClientUpdate, TrainError> {
        if !self.gang.shards.contains_key(&task.client) {
            return self.honest.train(task, shard, stop);
        }
        let AttacksConfig { kind, strength, .. } = self.gang.config;
        let classes = task.job.model.classes;
        match kind {
            Attack::SignFlip => {
                let mut update = self.honest.train(task, shard, stop)?;
                scale(&mut update, -strength);
                Ok(update)
            }
            Attack::Scaled => {
                let mut update = self.honest.train(task, &flipped(shard, classes), stop)?;
                scale(&mut update, strength);
                Ok(update)
            }
            Attack::LabelFlip => self.honest.train(task, &flipped(shard, classes), stop),
            Attack::LittleIsEnough => {
                let delta = self.a_little(task, stop)?;
                Ok(ClientUpdate { delta, examples: shard.len() as u64, loss: Some(0.0) })
            }
        }
    }

    fn evaluate(&mut self, job: &Job, model: &[f32], shard: &Shard) -> Result<Metrics, TrainError> {
        self.honest.evaluate(job, model, shard)
    }
}
