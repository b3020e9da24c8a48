//! How the updates of a round become the next model: the contract, and the rule that a coordinator uses.

use super::sum::Accumulator;
use super::{AggregateError, Contribution};

/// Updates that [`WeightedMean`] holds back to add them together.
const HELD_UPDATES: usize = 16;
/// Bytes of them; a larger update is not held.
const HELD_BYTES: usize = 32 << 20;

/// What makes the next model of a round's updates.
///
/// A run calls [`begin`](AggregationRule::begin), then [`add`](AggregationRule::add) once for every update that it
/// accepts, then [`finish`](AggregationRule::finish) if enough came; `begin` again starts the next round, or another
/// attempt at the same one, which may follow before any update came. All updates of a round were checked and have as many
/// coordinates as the model.
///
/// Updates come in the order of their arrival. A run that is to give the same bits on other machines must not depend
/// on it: sort by [`Contribution::client`] where a result could. What a rule keeps from round to round (a momentum) is
/// lost when the process ends; the simulator runs a federation in one process.
pub trait AggregationRule: Send {
    /// `round` (from 1) of a model of `parameters` parameters begins; updates that were added before are forgotten.
    fn begin(&mut self, round: u32, parameters: usize);

    /// Takes an accepted update.
    fn add(&mut self, update: Contribution);

    /// The next model, from `model`, the one that the updates are changes to. It is published only if it is finite,
    /// of the same length, and within [`MODEL_NORM_LIMIT`](super::MODEL_NORM_LIMIT).
    ///
    /// # Errors
    /// Why there is none; the attempt then fails with that line. A rule of one's own uses [`AggregateError::Rule`].
    fn finish(&mut self, model: &[f32]) -> Result<Vec<f32>, AggregateError>;

    /// What a coordinator keeps for the rule from round to round, beside the model: an adaptive clip norm.
    fn clip_norm(&self) -> Option<f64> {
        None
    }
}

/// The mean of the updates, weighted by their examples, computed exactly: FedAvg (McMahan et al. 2017).
///
/// Independent of order. It keeps nothing from round to round.
#[derive(Debug)]
pub struct WeightedMean {
    sum: Accumulator,
    held: Vec<Contribution>,
    /// The first update that could not be added.
    refused: Option<AggregateError>,
}

impl Default for WeightedMean {
    fn default() -> Self {
        Self { sum: Accumulator::new(0), held: Vec::new(), refused: None }
    }
}

impl WeightedMean {
    fn add_held(&mut self) {
        let added = self.sum.add_all(&self.held);
        self.held.clear();
        if let Err(error) = added {
            self.refused.get_or_insert(error);
        }
    }
}

impl AggregationRule for WeightedMean {
    fn begin(&mut self, _round: u32, parameters: usize) {
        self.held.clear();
        self.refused = None;
        if self.sum.parameters() == parameters {
            self.sum.clear();
        } else {
            self.sum = Accumulator::new(parameters);
        }
    }

    fn add(&mut self, update: Contribution) {
        self.held.push(update);
        let bytes = self.held.iter().map(|held| size_of_val(held.delta())).sum::<usize>();
        if self.held.len() >= HELD_UPDATES || bytes >= HELD_BYTES {
            self.add_held();
        }
    }

    fn finish(&mut self, model: &[f32]) -> Result<Vec<f32>, AggregateError> {
        self.add_held();
        match self.refused.take() {
            Some(error) => Err(error),
            None => self.sum.average_onto(model),
        }
    }
}
