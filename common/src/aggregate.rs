//! Exact, order-independent summation of client updates, and the server's step.
//!
//! Every coordinate is a fixed-point integer, so a sum has one value whatever the order, the number of
//! threads or the transport. Weighted FedAvg (McMahan et al. 2017, algorithm 1) in its delta form:
//! `x' = x + Σ n_k·Δ_k / Σ n_k`, with `Δ_k` the change that client `k` made to the model.

use crate::limits::EXAMPLES_PER_UPDATE;

/// Fractional bits of a fixed-point coordinate: a delta is rounded to a multiple of 2^-32.
pub const FRACTION_BITS: u32 = 32;
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
}

/// Refuses a vector that is not finite or has a coordinate beyond [`COORDINATE_LIMIT`].
///
/// `first` is the position of `values[0]` in the whole vector, for the message.
pub fn check(values: &[f32], first: usize) -> Result<(), AggregateError> {
    // A range holds neither NaN nor an infinity.
    match values.iter().position(|value| !(-COORDINATE_LIMIT..=COORDINATE_LIMIT).contains(value)) {
        None => Ok(()),
        Some(at) => {
            let (index, value) = (first + at, values.get(at).copied().unwrap_or(f32::NAN));
            Err(if value.is_finite() {
                AggregateError::TooLarge { index, value }
            } else {
                AggregateError::NotFinite { index, value }
            })
        }
    }
}

/// Refuses a weight that no update may have.
pub fn check_weight(examples: u64) -> Result<(), AggregateError> {
    if (1..=EXAMPLES_PER_UPDATE).contains(&examples) { Ok(()) } else { Err(AggregateError::Weight(examples)) }
}

/// The exact sum of the updates of one round.
///
/// Bounds: a coordinate has at most 46 bits, a weight 32, a cohort 17, so a sum needs 96 of 128.
#[derive(Debug, Clone)]
pub struct Accumulator {
    sum: Vec<i128>,
    weight: u128,
    updates: u32,
}

impl Accumulator {
    /// An empty sum for a model of `parameters` parameters.
    pub fn new(parameters: usize) -> Self {
        Self { sum: vec![0; parameters], weight: 0, updates: 0 }
    }

    /// Adds a whole update that weighs `examples`. An error leaves the sum as it was.
    pub fn add(&mut self, delta: &[f32], examples: u64) -> Result<(), AggregateError> {
        if delta.len() != self.sum.len() {
            return Err(AggregateError::WrongLength { expected: self.sum.len(), found: delta.len() });
        }
        check(delta, 0)?;
        check_weight(examples)?;
        self.add_part(0, delta, examples);
        self.close_update(examples);
        Ok(())
    }

    /// Adds `values` at position `first` of an update that passed [`check`] and [`check_weight`] whole.
    ///
    /// For updates too large to be in memory at once: all parts, then [`Accumulator::close_update`].
    pub fn add_part(&mut self, first: usize, values: &[f32], examples: u64) {
        let weight = i128::from(examples);
        for (sum, value) in self.sum.iter_mut().skip(first).zip(values) {
            *sum += i128::from(fixed_point(*value)) * weight;
        }
    }

    /// Counts an update whose parts were all added.
    pub fn close_update(&mut self, examples: u64) {
        self.weight += u128::from(examples);
        self.updates += 1;
    }

    /// Adds another sum of the same length: partial sums of several workers.
    pub fn merge(&mut self, other: &Accumulator) -> Result<(), AggregateError> {
        if other.sum.len() != self.sum.len() {
            return Err(AggregateError::WrongLength { expected: self.sum.len(), found: other.sum.len() });
        }
        for (sum, value) in self.sum.iter_mut().zip(&other.sum) {
            *sum += value;
        }
        self.weight += other.weight;
        self.updates += other.updates;
        Ok(())
    }

    /// How many updates were summed.
    pub fn updates(&self) -> u32 {
        self.updates
    }

    /// The server's step: `model + Σ weight·delta / Σ weight`, computed in `f64`, rounded once to `f32`.
    pub fn average_onto(&self, model: &[f32]) -> Result<Vec<f32>, AggregateError> {
        if model.len() != self.sum.len() {
            return Err(AggregateError::WrongLength { expected: self.sum.len(), found: model.len() });
        }
        if self.weight == 0 {
            return Err(AggregateError::Empty);
        }
        let scale = self.weight as f64 * (1u64 << FRACTION_BITS) as f64;
        let step = |(old, sum): (&f32, &i128)| (f64::from(*old) + *sum as f64 / scale) as f32;
        let next: Vec<f32> = model.iter().zip(&self.sum).map(step).collect();
        let norm = norm(&next);
        if norm.is_finite() && norm <= MODEL_NORM_LIMIT {
            Ok(next)
        } else {
            Err(AggregateError::ModelNorm(norm))
        }
    }
}

/// Euclidean norm, summed in `f64` in the order of the vector.
pub fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

/// `round(value · 2^32)`, ties to even; exact in `f64` for every admitted value.
///
/// Adding 1.5·2^52 leaves the rounded integer in the mantissa for |x| < 2^51; larger products are whole
/// multiples of 2^-… already, so both ways agree (`round_ties_even` is a slow libm call on baseline x86-64).
fn fixed_point(value: f32) -> i64 {
    const MAGIC: f64 = 6_755_399_441_055_744.0;
    let scaled = f64::from(value) * (1u64 << FRACTION_BITS) as f64;
    ((scaled + MAGIC) - MAGIC) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fixed_point_rounds_ties_to_even() {
        let unit = 2f32.powi(-32);
        for (value, expected) in [
            (unit, 1),
            (unit * 0.5, 0),
            (unit * 1.5, 2),
            (unit * 2.5, 2),
            (-unit * 1.5, -2),
            (16_384.0, 1 << 46),
        ] {
            assert_eq!(fixed_point(value), expected);
        }
    }

    #[test]
    fn an_average_is_the_weighted_mean() {
        let mut sum = Accumulator::new(2);
        sum.add(&[1.0, -2.0], 1).unwrap();
        sum.add(&[4.0, 1.0], 2).unwrap();
        assert_eq!(sum.average_onto(&[10.0, 10.0]).unwrap(), [13.0, 10.0]);
    }

    #[test]
    fn unfit_updates_are_refused_and_leave_no_trace() {
        let mut sum = Accumulator::new(2);
        sum.add(&[0.5, 0.5], 3).unwrap();
        for (bad, weight) in [
            (vec![0.0, f32::NAN], 1),
            (vec![f32::INFINITY, 0.0], 1),
            (vec![0.0, 16_385.0], 1),
            (vec![0.0], 1),
            (vec![0.0, 0.0], 0),
            (vec![0.0, 0.0], EXAMPLES_PER_UPDATE + 1),
        ] {
            assert!(sum.add(&bad, weight).is_err(), "{bad:?} {weight}");
        }
        assert_eq!(sum.updates(), 1);
        assert_eq!(sum.average_onto(&[0.0, 0.0]).unwrap(), [0.5, 0.5]);
        assert_eq!(Accumulator::new(1).average_onto(&[0.0]), Err(AggregateError::Empty));
    }

    #[test]
    fn an_absurd_model_is_not_published() {
        let mut sum = Accumulator::new(1);
        sum.add(&[1.0], 1).unwrap();
        for model in [f32::NAN, f32::INFINITY, 2e8] {
            assert!(matches!(sum.average_onto(&[model]), Err(AggregateError::ModelNorm(_))));
        }
    }

    proptest! {
        #[test]
        fn any_order_and_any_split_gives_the_same_bits(
            updates in prop::collection::vec((prop::collection::vec(-16_000f32..16_000.0, 5), 1u64..100_000), 1..8),
            cut in 0usize..8,
        ) {
            let mut forward = Accumulator::new(5);
            let mut backward = Accumulator::new(5);
            let (mut left, mut right) = (Accumulator::new(5), Accumulator::new(5));
            for (index, (delta, weight)) in updates.iter().enumerate() {
                forward.add(delta, *weight).unwrap();
                if index < cut { left.add(delta, *weight).unwrap() } else { right.add(delta, *weight).unwrap() }
            }
            for (delta, weight) in updates.iter().rev() {
                backward.add_part(3, &delta[3..], *weight);
                backward.add_part(0, &delta[..3], *weight);
                backward.close_update(*weight);
            }
            left.merge(&right).unwrap();
            let model = [0.25f32; 5];
            let expected = forward.average_onto(&model).unwrap();
            prop_assert_eq!(&expected, &backward.average_onto(&model).unwrap());
            prop_assert_eq!(&expected, &left.average_onto(&model).unwrap());
        }
    }
}
