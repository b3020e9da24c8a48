//! The exact, order-independent sum of client updates.
//!
//! Every coordinate is a fixed-point integer, so a sum has one value whatever the order, the number of
//! threads or the transport.

use std::ops::Range;

use super::{AggregateError, Contribution, check, check_weight, kernel};

/// Fractional bits of a fixed-point coordinate: a delta is rounded to a multiple of 2^-32.
pub const FRACTION_BITS: u32 = 32;
/// Coordinates that a batch of updates is added to at a time: 16 KiB of lanes, which stay in a core's first cache.
const BLOCK: usize = 2048;
/// Largest product of weight and coordinate, in fixed point, for which four products and their sum are exact in `f64`
/// and the sum at most 2^51.
const LIGHT: u64 = 1 << 49;

/// The exact sum of the updates of one round.
///
/// Bounds: a coordinate has at most 46 bits, a weight 32, a cohort 17, so a sum needs 96 bits. It is kept in lanes of
/// 64 bits as long as Σ weight · largest coordinate says that none can overflow, and only then carried into 128 bits:
/// with coordinates below 1 that is after 2^31 examples.
#[derive(Debug, Clone)]
pub struct Accumulator {
    lanes: Vec<i64>,
    /// No lane is further from zero than this, which is at most `i64::MAX`.
    lane_bound: u64,
    /// What was carried out of the lanes; empty until something is.
    carried: Vec<i128>,
    weight: u128,
    updates: u32,
}

/// An update that was checked, as the sum needs it.
#[derive(Clone, Copy)]
struct Term<'a> {
    delta: &'a [f32],
    examples: u64,
    /// Weight times largest coordinate, in fixed point.
    reach: u128,
}

impl<'a> Term<'a> {
    fn new(delta: &'a [f32], examples: u64, largest: f32) -> Self {
        // Rounding keeps order, so no coordinate is beyond the largest.
        let reach = u128::from(kernel::fixed_point(largest).unsigned_abs()) * u128::from(examples);
        Self { delta, examples, reach }
    }

    /// Some of its coordinates.
    fn part(&self, range: &Range<usize>) -> &'a [f32] {
        self.delta.get(range.clone()).unwrap_or_default()
    }
}

impl Accumulator {
    /// An empty sum for a model of `parameters` parameters.
    pub fn new(parameters: usize) -> Self {
        Self { lanes: vec![0; parameters], lane_bound: 0, carried: Vec::new(), weight: 0, updates: 0 }
    }

    /// Parameters of the model.
    pub fn parameters(&self) -> usize {
        self.lanes.len()
    }

    /// Forgets everything that was summed.
    pub fn clear(&mut self) {
        self.lanes.fill(0);
        self.carried = Vec::new();
        (self.lane_bound, self.weight, self.updates) = (0, 0, 0);
    }

    /// Adds an update that weighs `examples`. An error leaves the sum as it was.
    pub fn add(&mut self, delta: &[f32], examples: u64) -> Result<(), AggregateError> {
        self.check_length(delta.len())?;
        check_weight(examples)?;
        let largest = check(delta)?;
        self.add_terms(&[Term::new(delta, examples, largest)]);
        Ok(())
    }

    /// Adds several updates at once, which is faster than one after another and gives the same sum. An error leaves
    /// the sum as it was.
    pub fn add_all(&mut self, updates: &[Contribution]) -> Result<(), AggregateError> {
        for update in updates {
            self.check_length(update.delta().len())?;
        }
        let term = |update| Term::new(Contribution::delta(update), update.examples(), update.largest());
        let terms: Vec<Term<'_>> = updates.iter().map(term).collect();
        self.add_terms(&terms);
        Ok(())
    }

    /// Adds another sum of the same length: partial sums of several workers.
    pub fn merge(&mut self, other: &Accumulator) -> Result<(), AggregateError> {
        self.check_length(other.lanes.len())?;
        self.carry();
        for (sum, lane) in self.carried.iter_mut().zip(&other.lanes) {
            *sum += i128::from(*lane);
        }
        for (sum, carried) in self.carried.iter_mut().zip(&other.carried) {
            *sum += carried;
        }
        self.weight += other.weight;
        self.updates += other.updates;
        Ok(())
    }

    /// How many updates were summed.
    pub fn updates(&self) -> u32 {
        self.updates
    }

    /// Weighted FedAvg's step (McMahan et al. 2017, algorithm 1, in its delta form): `model + Σ weight·delta / Σ weight`,
    /// computed in `f64`, rounded once to `f32`.
    pub fn average_onto(&self, model: &[f32]) -> Result<Vec<f32>, AggregateError> {
        self.check_length(model.len())?;
        if self.weight == 0 {
            return Err(AggregateError::Empty);
        }
        let scale = self.weight as f64 * (1u64 << FRACTION_BITS) as f64;
        let step = |old: &f32, sum: f64| (f64::from(*old) + sum / scale) as f32;
        let old_and_lane = model.iter().zip(&self.lanes);
        Ok(if self.carried.is_empty() {
            old_and_lane.map(|(old, lane)| step(old, *lane as f64)).collect()
        } else {
            let all = old_and_lane.zip(&self.carried);
            all.map(|((old, lane), carried)| step(old, (carried + i128::from(*lane)) as f64)).collect()
        })
    }

    /// The sums themselves, a value per parameter: `Σ weight·delta`.
    pub fn sums(&self) -> impl Iterator<Item = f64> {
        let carried = self.carried.iter().copied().map(Some).chain(std::iter::repeat(None));
        let sum = |(lane, carried): (&i64, Option<i128>)| carried.unwrap_or(0) + i128::from(*lane);
        self.lanes.iter().zip(carried).map(move |both| sum(both) as f64 / (1u64 << FRACTION_BITS) as f64)
    }

    fn check_length(&self, found: usize) -> Result<(), AggregateError> {
        let expected = self.lanes.len();
        if found == expected { Ok(()) } else { Err(AggregateError::WrongLength { expected, found }) }
    }

    fn add_terms(&mut self, terms: &[Term<'_>]) {
        let (light, heavy): (Vec<Term<'_>>, Vec<Term<'_>>) =
            terms.iter().copied().partition(|term| term.reach <= u128::from(LIGHT));
        // At most 2^12 of them are below 2^61: carrying once makes room for them all.
        for light in light.chunks(1 << 12) {
            self.make_room(light.iter().map(|term| term.reach).sum());
            self.add_light(light);
        }
        for Term { delta, examples, reach } in heavy {
            if self.make_room(reach) {
                // A weight has at most 33 bits.
                kernel::add_heavy(&mut self.lanes, delta, examples as i64);
            } else {
                for (sum, value) in self.carried.iter_mut().zip(delta) {
                    *sum += i128::from(kernel::fixed_point(*value)) * i128::from(examples);
                }
            }
        }
        for term in terms {
            self.weight += u128::from(term.examples);
            self.updates += 1;
        }
    }

    /// Blockwise, so that the lanes of a block are still in the cache for the next update.
    fn add_light(&mut self, terms: &[Term<'_>]) {
        let (fours, rest) = terms.as_chunks::<4>();
        for (index, lanes) in self.lanes.chunks_mut(BLOCK).enumerate() {
            let block = index * BLOCK..index * BLOCK + lanes.len();
            for four in fours {
                let deltas = four.map(|term| term.part(&block));
                kernel::add_four_light(lanes, deltas, four.map(|term| term.examples as f64));
            }
            for term in rest {
                kernel::add_light(lanes, term.part(&block), term.examples as f64);
            }
        }
    }

    /// Makes sure that `reach` more fits into every lane. If it never does, the lanes are empty afterwards, `carried`
    /// is there to be added to, and the answer is no.
    fn make_room(&mut self, reach: u128) -> bool {
        const MOST: u128 = i64::MAX as u128;
        if u128::from(self.lane_bound) + reach > MOST {
            self.carry();
        }
        let fits = reach <= MOST;
        if fits {
            self.lane_bound += reach as u64;
        }
        fits
    }

    /// Empties the lanes into `carried`.
    fn carry(&mut self) {
        self.carried.resize(self.lanes.len(), 0);
        for (sum, lane) in self.carried.iter_mut().zip(&mut self.lanes) {
            *sum += i128::from(std::mem::take(lane));
        }
        self.lane_bound = 0;
    }
}
