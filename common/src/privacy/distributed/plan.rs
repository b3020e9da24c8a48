//! The plan of a round with noise in shares: grid, share, box and width, from public numbers alone.
//!
//! A client sends ⌈s·Rx⌋ cut to a box, plus its share: R the rotation, s the scale in grid steps per unit. Enough shares for
//! a noise multiplier z on clip norm C are in the sum if σ² = z²C²/(fewest survivors − colluders) is each one's variance
//! before scaling.

use serde::{Deserialize, Serialize};

use super::rotation::{padded, smallest_block};
use super::skellam::{Skellam, ln_tail, reach, variance_at_least};
use crate::privacy::accounting::distributed::rounded_norm;
use crate::privacy::{Event, Noise, SkellamShares};

/// ln of the probability, per round, with which noise may take a sum out of the ring: 2⁻⁴⁰.
const LN_WRAP: f64 = -40.0 * std::f64::consts::LN_2;
/// Example level: the probability, per round, with which rounding may exceed the sensitivity (paid into delta).
const ROUNDING_FAILURE: f64 = 1.0 / (1u64 << 40) as f64;
/// The box is this many deviations of a rotated coordinate: one of a vector of the largest norm is cut with a probability
/// of at most 2e^(−24.5) over the seed.
const BOX_DEVIATIONS: f64 = 7.0;
/// Most bits of a ring here: lifted sums and their bounds are then exact in f64 and i64.
pub const MOST_BITS: u32 = 52;
/// Most steps that a coordinate of one client can have.
const MOST_STEPS: f64 = (1u32 << 31) as f64;
/// The largest share, as a standard deviation, that [`Scale::Width`] chooses: one draw from one table.
const WIDE_SHARE: f64 = 4096.0;
/// Relative precision of a scale that is searched.
const SCALE_PRECISION: f64 = 1e-6;

/// Whose influence on the sum is bounded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// A client's whole vector, clipped to the clip norm here.
    Client,
    /// One example's (or one person's), clipped by the trainer to (1 − 10⁻⁶) of the clip norm: a client's vector is the
    /// sum over its Poisson batch, added up in f64.
    Example {
        /// The Euclidean norm that a batch's sum is expected to stay within, in clip norms: the expected batch and six
        /// of its deviations, say. It only places the box: what lies outside is cut, which costs accuracy, never privacy.
        batch_norm: f64,
    },
}

/// How fine the grid is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// Grid steps per unit of the vector.
    Steps(f64),
    /// The coarsest grid on which rounding makes the sensitivity larger by at most this part of itself (0.01, say).
    Inflation(f64),
    /// The finest grid whose sums fit this many bits.
    Width(u32),
}

/// What a job asks for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Requirements {
    /// Whose influence is bounded.
    pub level: Level,
    /// Standard deviation z of the noise that counts, per clip norm, above 0.
    pub noise_multiplier: f64,
    /// Clip norm C, above 0.
    pub clip_norm: f64,
    /// Coordinates of the vector, from 1.
    pub dimension: usize,
    /// Fewest survivors with which a sum is released.
    pub fewest_survivors: u32,
    /// How many of them may be dishonest: fewer than all.
    pub colluders: u32,
    /// Most clients in a sum.
    pub most_clients: u32,
    /// How fine the grid is.
    pub scale: Scale,
}

/// A round's grid, share and width. Lengths are in grid steps unless they say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Plan {
    /// What was asked for.
    pub requirements: Requirements,
    /// Grid steps per unit of the vector.
    pub scale: f64,
    /// Coordinates that are sent: those of the vector, padded for the rotation.
    pub padded: usize,
    /// Variance of one share per coordinate.
    pub share_variance: f64,
    /// Largest Euclidean norm by which one unit changes the sum.
    pub sensitivity: f64,
    /// Largest sum of magnitudes by which it does.
    pub absolute_sensitivity: f64,
    /// Largest magnitude Q of a coordinate of one client before its noise.
    pub box_bound: u32,
    /// Bits b of the ring: sums are taken modulo 2ᵇ.
    pub width: u32,
    /// Probability, per round, that noise takes any coordinate of the sum out of the ring: at most 2⁻⁴⁰.
    pub wrap_probability: f64,
    /// Probability, per round, that rounding exceeds the sensitivity; paid into delta.
    pub rounding_failure: f64,
    /// Total variation distance of all noise of a round from what is accounted for; (1 + e^ε) times it is paid into delta.
    pub sampler_distance: f64,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// A number is out of its range.
    #[error("noise in shares: {name} = {value}: {needed} is needed")]
    Requirement {
        /// Whose.
        name: &'static str,
        /// What it is.
        value: f64,
        /// What it can be.
        needed: &'static str,
    },
    /// The sums do not fit.
    #[error(
        "noise in shares: sums of {clients} clients do not fit {bits} bits; a coarser scale, less noise or fewer clients are needed"
    )]
    Width {
        /// Most clients in a sum.
        clients: u32,
        /// Bits that there are.
        bits: u32,
    },
    /// No noise is enough.
    #[error("noise in shares: no noise multiplier up to 10^4 gives epsilon {target}")]
    OutOfReach {
        /// The target.
        target: f64,
    },
    /// The shares are too wide.
    #[error(
        "noise in shares: a share of {0:.3e} grid steps is out of the sampler's range, 2^-8 to 2^17; change the scale"
    )]
    Share(f64),
}

impl Requirements {
    fn check(&self) -> Result<(), PlanError> {
        let wrong = |name, value, needed| Err(PlanError::Requirement { name, value, needed });
        let possible = |value: f64| (1e-9..=1e9).contains(&value);
        for (name, value) in [("noise_multiplier", self.noise_multiplier), ("clip_norm", self.clip_norm)] {
            if !possible(value) {
                return wrong(name, value, "a number from 1e-9 to 1e9");
            }
        }
        if !(1..=1 << 30).contains(&self.dimension) {
            return wrong("the vector's length", self.dimension as f64, "1 to 2^30");
        }
        let (survivors, colluders) = (self.fewest_survivors, self.colluders);
        if colluders >= survivors {
            return wrong("colluders", colluders.into(), "fewer than the fewest survivors");
        }
        if self.most_clients < survivors || self.most_clients > 1 << 20 {
            return wrong("the most clients", self.most_clients.into(), "the fewest survivors to 2^20");
        }
        match self.level {
            Level::Example { batch_norm } if !possible(batch_norm) => {
                return wrong("batch_norm", batch_norm, "a number from 1e-9 to 1e9");
            }
            Level::Client | Level::Example { .. } => {}
        }
        match self.scale {
            Scale::Steps(steps) if !(1e-12..=1e12).contains(&steps) => {
                wrong("scale", steps, "a number from 1e-12 to 1e12")
            }
            Scale::Inflation(part) if !(1e-6..=10.0).contains(&part) => {
                wrong("inflation", part, "a number from 1e-6 to 10")
            }
            Scale::Width(bits) if !(2..=MOST_BITS).contains(&bits) => {
                wrong("width", bits.into(), "2 to 52 bits")
            }
            _ => Ok(()),
        }
    }

    /// Shares that count.
    fn honest(&self) -> u32 {
        self.fewest_survivors.saturating_sub(self.colluders)
    }

    /// The sensitivity at a scale, and the probability that rounding exceeds it.
    ///
    /// Client level: rounding is repeated until it holds for β = e^(−1/2), so it always does. Example level: the bound is on
    /// the difference of two rounded sums, which nobody can check; β = 2⁻⁴⁰ is paid, unless the bound that needs no β is
    /// smaller.
    fn sensitivity(&self, scale: f64) -> (f64, f64) {
        let (norm, dimension) = (scale * self.clip_norm, padded(self.dimension));
        match self.level {
            Level::Client => (rounded_norm(norm, dimension, Some((-0.5f64).exp())), 0.0),
            Level::Example { .. } => {
                let always = rounded_norm(norm, dimension, None);
                let likely = rounded_norm(norm, dimension, Some(ROUNDING_FAILURE));
                if likely < always { (likely, ROUNDING_FAILURE) } else { (always, 0.0) }
            }
        }
    }

    /// Q: after the rotation no coordinate is expected outside of seven deviations, and none can be outside of the norm.
    fn box_bound(&self, scale: f64) -> f64 {
        let norm = match self.level {
            Level::Client => 1.0,
            Level::Example { batch_norm } => batch_norm,
        };
        let spread = (BOX_DEVIATIONS / (smallest_block(self.dimension) as f64).sqrt()).min(1.0);
        (scale * self.clip_norm * norm * spread).ceil()
    }

    /// What everything else follows from at a scale.
    fn at(&self, scale: f64) -> Result<Plan, PlanError> {
        let padded = padded(self.dimension);
        let deviation = scale * self.noise_multiplier * self.clip_norm / f64::from(self.honest()).sqrt();
        let share_variance = variance_at_least(deviation * deviation).ok_or(PlanError::Share(deviation))?;
        let (sensitivity, rounding_failure) = self.sensitivity(scale);
        let (clients, bound) = (f64::from(self.most_clients), self.box_bound(scale));
        let too_wide = |bits| PlanError::Width { clients: self.most_clients, bits };
        if bound > MOST_STEPS {
            return Err(too_wide(32));
        }
        // Both signs of every coordinate.
        let ln_cases = (2.0 * padded as f64).ln();
        let variance = clients * share_variance;
        let largest = clients * bound + reach(variance, LN_WRAP - ln_cases);
        // Sums up to 2^(b−1) − 1 are lifted to themselves.
        let width = (largest + 1.0).log2().ceil().max(1.0) + 1.0;
        if width > f64::from(MOST_BITS) {
            return Err(too_wide(MOST_BITS));
        }
        let room = (width - 1.0).exp2() - clients * bound;
        Ok(Plan {
            requirements: *self,
            scale,
            padded,
            share_variance,
            sensitivity,
            absolute_sensitivity: sensitivity * (padded as f64).sqrt().min(sensitivity),
            box_bound: bound as u32,
            width: width as u32,
            wrap_probability: (ln_cases + ln_tail(variance, room)).exp(),
            rounding_failure,
            sampler_distance: 0.0,
        })
    }

    fn inflation(&self, scale: f64) -> f64 {
        self.sensitivity(scale).0 / (scale * self.clip_norm) - 1.0
    }

    /// Bisects ln of the scale between one that does and one that does not; the answer does.
    fn search(does: f64, does_not: f64, holds: impl Fn(f64) -> bool) -> f64 {
        let (mut inside, mut outside) = (does.ln(), does_not.ln());
        while (inside - outside).abs() > SCALE_PRECISION {
            let middle = 0.5 * (inside + outside);
            if holds(middle.exp()) { inside = middle } else { outside = middle }
        }
        inside.exp()
    }

    fn chosen_scale(&self) -> Result<f64, PlanError> {
        // With √K steps per clip norm rounding adds one to three parts of the sensitivity; 10⁸ times that, next to none.
        let unit = (padded(self.dimension) as f64).sqrt().max(1.0) / self.clip_norm;
        match self.scale {
            Scale::Steps(steps) => Ok(steps),
            Scale::Inflation(part) => {
                Ok(Self::search(1e8 * unit, 1e-3 * unit, |scale| self.inflation(scale) <= part))
            }
            Scale::Width(bits) => {
                let fits = |scale: f64| {
                    let narrow =
                        |plan: Plan| plan.width <= bits && plan.share_variance <= WIDE_SHARE * WIDE_SHARE;
                    self.at(scale).is_ok_and(narrow)
                };
                // Below the coarsest grid whose share can be drawn there is nothing to find.
                let coarsest = 2f64.powi(-8) * f64::from(self.honest()).sqrt();
                let coarsest = coarsest * 1.001 / (self.noise_multiplier * self.clip_norm);
                if !fits(coarsest) {
                    return Err(PlanError::Width { clients: self.most_clients, bits });
                }
                Ok(Self::search(coarsest, 1e12 * coarsest, fits))
            }
        }
    }
}

impl Plan {
    /// The plan for `requirements`. It takes some milliseconds: the sampler's table is made for its distance.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn new(requirements: &Requirements) -> Result<Self, PlanError> {
        requirements.check()?;
        let plan = requirements.at(requirements.chosen_scale()?)?;
        let deviation = plan.share_variance.sqrt();
        let sampler = Skellam::new(plan.share_variance).map_err(|_| PlanError::Share(deviation))?;
        let draws = plan.padded as f64 * f64::from(requirements.honest());
        Ok(Self { sampler_distance: draws * sampler.distance(), ..plan })
    }

    /// Standard deviation of one share per coordinate.
    pub fn share_standard_deviation(&self) -> f64 {
        self.share_variance.sqrt()
    }

    /// How much larger than scale times clip norm the sensitivity is, as a part of it.
    pub fn inflation(&self) -> f64 {
        self.requirements.inflation(self.scale)
    }

    /// The largest magnitude of a coordinate of a sum of `clients` clients that noise does not exceed but with probability
    /// 2⁻⁴⁰ per round: beyond it, somebody sent what was not agreed.
    pub fn largest_sum(&self, clients: u32) -> i64 {
        let clients = f64::from(clients);
        let ln_cases = (2.0 * self.padded as f64).ln();
        let noise = reach(clients * self.share_variance, LN_WRAP - ln_cases);
        (clients * f64::from(self.box_bound) + noise) as i64
    }

    /// What `count` rounds do to one unit, each over a Poisson sample of rate `sampling_rate` (client level: 1).
    pub fn event(&self, sampling_rate: f64, count: u64) -> Event {
        let Requirements { fewest_survivors: survivors, colluders, clip_norm, .. } = self.requirements;
        Event {
            noise: Noise::Skellam(SkellamShares {
                survivors,
                colluders,
                share_variance: self.share_variance,
                dimension: u32::try_from(self.padded).unwrap_or(u32::MAX),
                scale: self.scale,
                clip_norm,
                rounding_failure: self.rounding_failure,
                sampler_distance: self.sampler_distance,
            }),
            sampling_rate,
            sensitivity: self.sensitivity,
            noise_standard_deviation: (f64::from(self.requirements.honest()) * self.share_variance).sqrt(),
            count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requirements() -> Requirements {
        Requirements {
            level: Level::Client,
            noise_multiplier: 1.2,
            clip_norm: 0.5,
            dimension: 26_010,
            fewest_survivors: 7,
            colluders: 1,
            most_clients: 10,
            scale: Scale::Inflation(0.01),
        }
    }

    #[test]
    fn shares_of_the_fewest_honest_survivors_make_up_the_noise() {
        let plan = Plan::new(&requirements()).unwrap();
        let share = 1.2 * 0.5 / 6f64.sqrt() * plan.scale;
        assert!(plan.share_standard_deviation() >= share && plan.share_standard_deviation() < share * 1.0001);
        let event = plan.event(1.0, 30);
        assert_eq!((event.count, event.sampling_rate, event.sensitivity), (30, 1.0, plan.sensitivity));
        assert!((event.noise_standard_deviation / (1.2 * 0.5 * plan.scale) - 1.0).abs() < 1e-4);
        let shares = event.shares().unwrap();
        assert_eq!((shares.honest, shares.dimension), (6, 26_624));
        assert!((shares.absolute_sensitivity() - plan.absolute_sensitivity).abs() < 1e-6);
        assert_eq!(event.alone().shares().unwrap().honest, 1);
        assert!((event.alone().noise_standard_deviation - plan.share_standard_deviation()).abs() < 1e-9);
        // One part in a hundred is what was asked for, and what it takes.
        assert!(plan.inflation() <= 0.01 && plan.inflation() > 0.009_99, "{}", plan.inflation());
        assert!(plan.scale * 0.5 > 1.6 * 26_624f64.sqrt());
        assert_eq!(plan.rounding_failure, 0.0);
        assert!(plan.sampler_distance > 0.0 && plan.sampler_distance < 1e-25);
    }

    /// Correction 5: at example level the failure is paid, not repeated away, and costs 0.7 % at 1000 steps.
    #[test]
    fn at_example_level_the_rounding_is_paid() {
        let level = Level::Example { batch_norm: 64.0 };
        let fine = Requirements { level, clip_norm: 1.0, scale: Scale::Steps(1000.0), ..requirements() };
        let plan = Plan::new(&fine).unwrap();
        assert_eq!(plan.rounding_failure, 2f64.powi(-40));
        assert!((plan.inflation() - 0.0073).abs() < 1e-4, "{}", plan.inflation());
        // Where √K is less than what β buys, nothing is paid.
        let few = Plan::new(&Requirements { dimension: 7, ..fine }).unwrap();
        assert_eq!((few.rounding_failure, few.sensitivity), (0.0, 1000.0 + 8f64.sqrt()));
    }

    #[test]
    fn the_ring_holds_the_signal_surely_and_the_noise_but_for_two_to_the_minus_forty() {
        for level in [Level::Client, Level::Example { batch_norm: 300.0 }] {
            for dimension in [1, 28, 4097, 26_010, 1 << 20] {
                for noise_multiplier in [0.01, 1.0, 10.0] {
                    let asked = Requirements { level, dimension, noise_multiplier, ..requirements() };
                    let plan = Plan::new(&asked).unwrap();
                    let half = 1i64 << (plan.width - 1);
                    let signal = 10 * i64::from(plan.box_bound);
                    assert!(signal < half, "{plan:?}");
                    assert!(plan.wrap_probability <= 2f64.powi(-40), "{plan:?}");
                    assert!(plan.largest_sum(10) < half && plan.largest_sum(10) > signal);
                    // One bit less would not do.
                    assert!(plan.largest_sum(10) >= half / 2, "{plan:?}");
                    // The formula, written out: both signs of all coordinates, at the room that is left.
                    let (variance, room) = (10.0 * plan.share_variance, (half - signal) as f64);
                    let bound = 2.0 * plan.padded as f64 * ln_tail(variance, room).exp();
                    assert!((plan.wrap_probability - bound).abs() <= 1e-9 * bound);
                }
            }
        }
    }

    /// On a narrow ring the noise does wrap, about as often as a normal tail says and never more than the bound.
    #[test]
    fn the_wrap_bound_is_met_by_drawn_noise() {
        let noise = Skellam::new(100.0).unwrap();
        let mut sums = vec![0i64; 200_000];
        let mut rng = crate::privacy::noise::SecretRng::seeded(21);
        (0..4).for_each(|_| noise.add(&mut rng, &mut sums));
        let (room, signal) = (64i64, 13i64);
        let beyond = sums.iter().filter(|sum| (*sum + signal) >= room).count() as f64 / sums.len() as f64;
        let bound = ln_tail(400.0, (room - signal) as f64).exp();
        // 2.55 deviations: 0.0057 of a normal variable.
        assert!(beyond < bound && (beyond - 0.0057).abs() < 0.001, "{beyond} {bound}");
    }

    #[test]
    fn the_finest_grid_that_fits_a_width_is_found() {
        for width in [11, 14, 17] {
            let asked = Requirements { scale: Scale::Width(width), ..requirements() };
            let plan = Plan::new(&asked).unwrap();
            assert_eq!(plan.width, width);
            let finer = Requirements { scale: Scale::Steps(plan.scale * 1.01), ..asked };
            assert_eq!(Plan::new(&finer).unwrap().width, width + 1);
        }
        // Beyond what one table draws, more bits bring nothing.
        let wide = Plan::new(&Requirements { scale: Scale::Width(50), ..requirements() }).unwrap();
        assert!(wide.share_standard_deviation() <= 4096.0 && wide.share_standard_deviation() > 4090.0);
        let none = Requirements { scale: Scale::Width(2), ..requirements() };
        assert!(matches!(Plan::new(&none), Err(PlanError::Width { bits: 2, .. })));
    }

    #[test]
    fn what_cannot_be_planned_is_said_in_one_line() {
        let base = requirements();
        for bad in [
            Requirements { colluders: 7, ..base },
            Requirements { most_clients: 6, ..base },
            Requirements { noise_multiplier: 0.0, ..base },
            Requirements { clip_norm: f64::NAN, ..base },
            Requirements { dimension: 0, ..base },
            Requirements { scale: Scale::Steps(0.0), ..base },
            Requirements { scale: Scale::Inflation(0.0), ..base },
            Requirements { scale: Scale::Width(60), ..base },
            Requirements { scale: Scale::Steps(1e12), ..base },
            Requirements { level: Level::Example { batch_norm: -1.0 }, ..base },
        ] {
            let error = Plan::new(&bad).unwrap_err().to_string();
            assert!(error.starts_with("noise in shares: ") && !error.contains('\n'), "{error}");
        }
    }
}
