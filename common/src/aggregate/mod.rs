//! From the updates of a round to the next model: what an update must be, and the rule that combines them.
//!
//! [`Contribution`] is an update that was checked whole. An [`AggregationRule`] makes a model of them; the
//! coordinator's is the one of the job's `[aggregation]` ([`rule_of`]), usually [`WeightedMean`], or [`ClientLevel`] where
//! the job protects clients, over the exact sum of [`Accumulator`].

mod client_level;
mod kernel;
mod robust;
mod rule;
mod sum;

use std::sync::Arc;

pub use self::client_level::{AddNoise, ClientLevel};
pub use self::robust::{NormBound, OrderStatistics, rule_of};
pub use self::rule::{AggregationRule, WeightedMean};
pub use self::sum::{Accumulator, FRACTION_BITS};

use crate::ids::NodeName;
use crate::limits::EXAMPLES_PER_UPDATE;

/// Largest magnitude of one coordinate of a delta; a larger one is refused.
pub const COORDINATE_LIMIT: f32 = 16_384.0;
/// Largest Euclidean norm of a model that may be published.
pub const MODEL_NORM_LIMIT: f64 = 1e8;

/// Why an update or an aggregate is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AggregateError {
    /// A coordinate is NaN or infinite.
    #[error("coordinate {index} is {value}; an update must be finite (lower the learning rate?)")]
    NotFinite {
        /// Position in the flat vector.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// A coordinate is absurdly large.
    #[error("coordinate {index} is {value}, beyond ±{COORDINATE_LIMIT} (lower the learning rate?)")]
    TooLarge {
        /// Position in the flat vector.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// The vector has another length than the model.
    #[error("{found} parameters, but the model has {expected}")]
    WrongLength {
        /// Parameters of the model.
        expected: usize,
        /// Parameters of the update.
        found: usize,
    },
    /// The weight is zero or beyond [`EXAMPLES_PER_UPDATE`].
    #[error("an update weighs {0} examples; 1 to {EXAMPLES_PER_UPDATE} are possible")]
    Weight(u64),
    /// Nothing was summed.
    #[error("no update was accepted, so there is nothing to average")]
    Empty,
    /// The resulting model is not fit to be published.
    #[error("the aggregated model has norm {0:e}, beyond {MODEL_NORM_LIMIT:e}; it is not published")]
    ModelNorm(f64),
    /// A rule of one's own cannot make a model of these updates.
    #[error("the aggregation rule: {0}")]
    Rule(String),
}

/// A client's update that was checked whole: what an [`AggregationRule`] is given.
///
/// Every coordinate is finite and within ±[`COORDINATE_LIMIT`], and the weight is one that is possible. A clone shares
/// the values.
#[derive(Debug, Clone)]
pub struct Contribution {
    client: NodeName,
    examples: u64,
    delta: Arc<Vec<f32>>,
    largest: f32,
}

impl Contribution {
    /// Checks `delta`, the change that `client` made to a model of `parameters` parameters with `examples` examples.
    ///
    /// # Errors
    /// [`AggregateError::Weight`], [`AggregateError::WrongLength`], or the first coordinate that is not fit.
    pub fn new(
        client: NodeName,
        examples: u64,
        delta: Arc<Vec<f32>>,
        parameters: usize,
    ) -> Result<Self, AggregateError> {
        if delta.len() != parameters {
            return Err(AggregateError::WrongLength { expected: parameters, found: delta.len() });
        }
        check_weight(examples)?;
        let largest = check(&delta)?;
        Ok(Self { client, examples, delta, largest })
    }

    /// An update that changes nothing: what an unfit one counts as where clients are protected, for a refusal would
    /// tell of it.
    pub fn nothing(client: NodeName, parameters: usize) -> Self {
        Self { client, examples: 1, delta: Arc::new(vec![0.0; parameters]), largest: 0.0 }
    }

    /// Whose it is.
    pub fn client(&self) -> &NodeName {
        &self.client
    }

    /// Its weight: the client's training examples, 1 to [`EXAMPLES_PER_UPDATE`].
    pub fn examples(&self) -> u64 {
        self.examples
    }

    /// The change, in the order of the job's layout.
    pub fn delta(&self) -> &[f32] {
        &self.delta
    }

    /// The largest magnitude among its coordinates.
    pub fn largest(&self) -> f32 {
        self.largest
    }
}

/// Refuses a vector that is not finite or has a coordinate beyond ±[`COORDINATE_LIMIT`]; else its largest magnitude.
pub fn check(values: &[f32]) -> Result<f32, AggregateError> {
    if let Some(largest) = kernel::largest(values).filter(|largest| *largest <= COORDINATE_LIMIT) {
        return Ok(largest);
    }
    // A range holds neither NaN nor an infinity.
    let unfit = |value: &f32| !(-COORDINATE_LIMIT..=COORDINATE_LIMIT).contains(value);
    let index = values.iter().position(unfit).unwrap_or_default();
    let value = values.get(index).copied().unwrap_or(f32::NAN);
    Err(if value.is_finite() {
        AggregateError::TooLarge { index, value }
    } else {
        AggregateError::NotFinite { index, value }
    })
}

/// Refuses a weight that no update may have.
pub fn check_weight(examples: u64) -> Result<(), AggregateError> {
    if (1..=EXAMPLES_PER_UPDATE).contains(&examples) { Ok(()) } else { Err(AggregateError::Weight(examples)) }
}

/// Refuses a model that is not fit to be published: of another length than `parameters`, not finite, or with a norm
/// beyond [`MODEL_NORM_LIMIT`].
pub fn check_model(model: &[f32], parameters: usize) -> Result<(), AggregateError> {
    if model.len() != parameters {
        return Err(AggregateError::WrongLength { expected: parameters, found: model.len() });
    }
    let norm = norm(model);
    if norm.is_finite() && norm <= MODEL_NORM_LIMIT { Ok(()) } else { Err(AggregateError::ModelNorm(norm)) }
}

/// Euclidean norm, summed in `f64` in the order of the vector.
pub fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests;
