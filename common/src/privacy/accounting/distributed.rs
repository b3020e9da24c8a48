//! Noise that many parties add in shares on an integer grid, under masks: what the sum of the shares is worth.
//!
//! All lengths here are in grid units: a vector x is sent as the integers nearest to x/γ. Shares that count are those of
//! honest parties whose update reached the sum; a party knows its own share, so at most one less than all.

use super::rdp::{self, Bound};
use crate::privacy::{Event, Noise, SkellamShares};

/// Whole orders that are tried.
const ORDERS: std::ops::RangeInclusive<u32> = 2..=128;
/// And one beyond.
const LAST_ORDER: u32 = 256;

/// The largest Euclidean norm, in grid units, of a vector of `norm` grid units and `dimension` coordinates after
/// stochastic rounding (Kairouz, Liu and Steinke 2021, arXiv 2102.06387, Theorem 1).
///
/// With `failure` β the bound is √(n² + d/4 + √(2 ln(1/β))·(n + √d/2)), which a rounding exceeds with a probability of at
/// most β. Either rounding is repeated until it holds, which a single party can do for its own vector, or β is paid into
/// delta. Without it, or where it is smaller, the bound is n + √d, always.
pub fn rounded_norm(norm: f64, dimension: usize, failure: Option<f64>) -> f64 {
    let dimension = dimension as f64;
    let always = norm + dimension.sqrt();
    let likely = |failure: f64| {
        let spread = (-2.0 * failure.ln()).max(0.0).sqrt();
        (norm * norm + dimension / 4.0 + spread * (norm + dimension.sqrt() / 2.0)).sqrt()
    };
    failure
        .filter(|failure| *failure > 0.0 && *failure < 1.0)
        .map_or(always, |failure| likely(failure).min(always))
}

/// How the shares are distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareNoise {
    /// Discrete Gaussians, whose sum is only nearly one.
    DiscreteGaussian,
    /// Differences of two Poisson variates, whose sum is one again.
    Skellam,
}

/// The shares of noise in a sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shares {
    /// Their distribution.
    pub noise: ShareNoise,
    /// How many count: honest parties in the sum.
    pub honest: u32,
    /// Standard deviation of one share per coordinate, in grid units, above 0.
    pub share_standard_deviation: f64,
    /// Largest Euclidean norm, in grid units, by which one unit changes the sum: a [`rounded_norm`].
    pub sensitivity: f64,
    /// Coordinates.
    pub dimension: usize,
}

impl Shares {
    /// Standard deviation of all that count together, in grid units.
    pub fn standard_deviation(&self) -> f64 {
        f64::from(self.honest).sqrt() * self.share_standard_deviation
    }

    /// Largest sum of magnitudes by which one unit changes the sum: integers of norm Δ have at most Δ² of it.
    pub fn absolute_sensitivity(&self) -> f64 {
        self.sensitivity * (self.dimension as f64).sqrt().min(self.sensitivity)
    }

    /// How far the sum of discrete Gaussians is from one, τ of [`divergence`](Self::divergence).
    pub fn excess(&self) -> f64 {
        let variance = self.share_standard_deviation * self.share_standard_deviation;
        let term = |k: u32| {
            let k = f64::from(k);
            (-2.0 * std::f64::consts::PI.powi(2) * variance * k / (k + 1.0)).exp()
        };
        10.0 * (1..self.honest).map(term).sum::<f64>()
    }

    /// Rényi divergence of whole order `order` ≥ 2 of one sum of everybody's contributions.
    ///
    /// - Discrete Gaussian: Kairouz, Liu and Steinke 2021, arXiv 2102.06387, Proposition 14, with S² = n·σ²:
    ///   the least of αΔ²/(2S²) + τd, (α/2)(Δ²/S² + 2Δ₁τ/S + τ²d) and (α/2)(Δ/S + √d·τ)².
    /// - Skellam: Agarwal, Kairouz and Liu 2021, arXiv 2110.04995, with variance μ:
    ///   αΔ²/(2μ) + min(((2α − 1)Δ² + 6Δ₁)/(4μ²), 3Δ₁/(2μ)).
    ///
    /// No noise costs infinity.
    pub fn divergence(&self, order: u32) -> f64 {
        let order = f64::from(order);
        let (deviation, absolute) = (self.standard_deviation(), self.absolute_sensitivity());
        if !(deviation > 0.0 && deviation.is_finite() && self.sensitivity.is_finite()) {
            return f64::INFINITY;
        }
        let square = self.sensitivity * self.sensitivity;
        let variance = deviation * deviation;
        match self.noise {
            ShareNoise::DiscreteGaussian => {
                let (tau, dimension) = (self.excess(), self.dimension as f64);
                let first = order * square / (2.0 * variance) + tau * dimension;
                let second = order / 2.0
                    * (square / variance + 2.0 * absolute * tau / deviation + tau * tau * dimension);
                let third = order / 2.0 * (self.sensitivity / deviation + dimension.sqrt() * tau).powi(2);
                first.min(second).min(third)
            }
            ShareNoise::Skellam => {
                let first = ((2.0 * order - 1.0) * square + 6.0 * absolute) / (4.0 * variance * variance);
                let second = 3.0 * absolute / (2.0 * variance);
                order * square / (2.0 * variance) + first.min(second)
            }
        }
    }

    /// The epsilon at `delta` of `rounds` sums, each over a Poisson sample of rate `sampling_rate` (1: everybody), by the
    /// best whole order.
    ///
    /// Sampling is counted by Zhu and Wang 2019, Theorem 5, which holds for every mechanism.
    pub fn epsilon(&self, sampling_rate: f64, rounds: u64, delta: f64) -> Bound {
        let unsampled: Vec<f64> = (2..=LAST_ORDER).map(|order| self.divergence(order)).collect();
        let orders = ORDERS.chain([LAST_ORDER]);
        let figures = orders.map(|order| {
            let one = sampled(&unsampled, order, sampling_rate);
            let value = rdp::epsilon_at(rounds as f64 * one, delta, f64::from(order));
            Bound { value, order: f64::from(order) }
        });
        let none = Bound { value: f64::INFINITY, order: 2.0 };
        figures.fold(none, |best, figure| if figure.value < best.value { figure } else { best })
    }
}

/// Divergence of order `order` under Poisson sampling of a mechanism whose divergences of orders 2, 3, … are `unsampled`.
///
/// Zhu and Wang 2019 (Poisson subsampled Rényi differential privacy), Theorem 5, with rate γ:
/// ln\[(1−γ)^(α−1)(αγ−γ+1) + C(α,2)γ²(1−γ)^(α−2)e^ε(2) + 3 Σ_{l=3}^α C(α,l)(1−γ)^(α−l)γ^l e^((l−1)ε(l))\]/(α−1).
fn sampled(unsampled: &[f64], order: u32, rate: f64) -> f64 {
    let at = |order: u32| unsampled.get(order as usize - 2).copied().unwrap_or(f64::INFINITY);
    let whole = at(order);
    if rate == 1.0 {
        return whole;
    }
    if !(rate > 0.0 && rate < 1.0) {
        return if rate == 0.0 { 0.0 } else { f64::INFINITY };
    }
    let alpha = f64::from(order);
    let (ln_in, ln_out) = (rate.ln(), (-rate).ln_1p());
    let mut terms = vec![(alpha - 1.0) * ln_out + (alpha * rate - rate).ln_1p()];
    for l in 2..=order {
        let taken = f64::from(l);
        let ln_binomial =
            libm::lgamma(alpha + 1.0) - libm::lgamma(taken + 1.0) - libm::lgamma(alpha - taken + 1.0);
        let factor: f64 = if l == 2 { 1.0 } else { 3.0 };
        terms.push(
            factor.ln() + ln_binomial + (alpha - taken) * ln_out + taken * ln_in + (taken - 1.0) * at(l),
        );
    }
    let top = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !top.is_finite() {
        return whole;
    }
    let ln = top + terms.iter().map(|term| (term - top).exp()).sum::<f64>().ln();
    (ln.max(0.0) / (alpha - 1.0)).min(whole)
}

/// Rényi divergence of whole order `order` ≥ 2, in the worse direction, of one sum over a Poisson sample of rate `rate`
/// whose mechanism has the `unsampled` divergence of each whole order, if swapping the neighbours is a symmetry of it.
///
/// Noise that is as likely as its negative has that symmetry: x ↦ shift − x exchanges the two outputs. Then the mixture
/// from the unmixed output is the larger direction (Mironov, Talwar and Zhang 2019, arXiv 1908.10530, Theorem 5), and its
/// moment is a sum of unsampled moments with positive factors:
/// ln\[Σ_{l=0}^α C(α,l)(1−q)^(α−l)q^l·e^((l−1)ε(l))\]/(α−1), with ε = 0 at l = 0 and 1. Bounds may be put for each ε(l).
/// It is what Zhu and Wang's general bound becomes without its factor 3.
pub(super) fn sampled_symmetric(unsampled: impl Fn(u32) -> f64, order: u32, rate: f64) -> f64 {
    let whole = unsampled(order);
    if rate == 1.0 {
        return whole;
    }
    if !(rate > 0.0 && rate < 1.0) {
        return if rate == 0.0 { 0.0 } else { f64::INFINITY };
    }
    let alpha = f64::from(order);
    let (ln_in, ln_out) = (rate.ln(), (-rate).ln_1p());
    let ln_whole = libm::lgamma(alpha + 1.0);
    // With ε = 0 throughout the sum is 1: only what exceeds it is added up, so that a small divergence keeps its digits.
    let excess = |taken: u32| {
        let l = f64::from(taken);
        let ln_binomial = ln_whole - libm::lgamma(l + 1.0) - libm::lgamma(alpha - l + 1.0);
        let cost = (l - 1.0) * unsampled(taken);
        // ln(e^cost − 1).
        let beyond = if cost > 30.0 { cost + (-(-cost).exp()).ln_1p() } else { cost.exp_m1().ln() };
        ln_binomial + (alpha - l) * ln_out + l * ln_in + beyond
    };
    let terms: Vec<f64> = (2..=order).map(excess).collect();
    let top = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if top == f64::NEG_INFINITY {
        return 0.0;
    }
    if !top.is_finite() {
        return whole;
    }
    let ln = top + terms.iter().map(|term| (term - top).exp()).sum::<f64>().ln();
    // ln(1 + e^ln).
    let moment = if ln > 30.0 { ln + (-ln).exp().ln_1p() } else { ln.exp().ln_1p() };
    (moment / (alpha - 1.0)).min(whole)
}

impl Event {
    /// The shares of noise in an event, for their accountant; `None` for noise that one party adds.
    pub fn shares(&self) -> Option<Shares> {
        let Noise::Skellam(shares) = self.noise else { return None };
        Some(Shares {
            noise: ShareNoise::Skellam,
            honest: shares.honest(),
            share_standard_deviation: self.noise_standard_deviation / f64::from(shares.honest()).sqrt(),
            sensitivity: self.sensitivity,
            dimension: shares.dimension as usize,
        })
    }
}

/// What is paid into delta beside the accountants' own: the two ways in which noise in shares is not what is accounted for.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Failures {
    /// Probability that some rounding exceeds its sensitivity: added to delta.
    pub rounding: f64,
    /// Total variation distance of all noise from exact noise: (1 + e^ε) times it is added to delta.
    pub distance: f64,
}

impl Failures {
    /// Those of all `events` together.
    pub fn of(events: &[Event]) -> Self {
        let mut failures = Self::default();
        for event in events {
            if let Noise::Skellam(SkellamShares { rounding_failure, sampler_distance, .. }) = event.noise {
                failures.rounding += event.count as f64 * rounding_failure;
                failures.distance += event.count as f64 * sampler_distance;
            }
        }
        failures
    }

    /// Whether there are none.
    pub fn are_none(&self) -> bool {
        *self == Self::default()
    }

    /// What they add to the delta that goes with `epsilon`.
    ///
    /// Let M have a distance η from M*, which is (ε, δ)-private, on both neighbours: then M is private with
    /// δ + (1 + e^ε)·η. A rounding that exceeds the sensitivity counts on one of the two only, as the other's can be taken
    /// for it.
    pub fn delta(&self, epsilon: f64) -> f64 {
        // Nothing times an infinite number is nothing here.
        let factor = if self.distance == 0.0 { 0.0 } else { 1.0 + epsilon.exp() };
        self.rounding + factor * self.distance
    }

    /// The least epsilon, up to rounding, that is at least `at` of what is left of `delta` once these are paid; infinite
    /// where nothing is left. `at` falls in delta.
    pub(super) fn epsilon(&self, delta: f64, at: impl Fn(f64) -> Bound) -> Bound {
        let none = Bound { value: f64::INFINITY, order: 2.0 };
        let mut value = 0.0;
        // What is left falls with epsilon, so the figures rise to the answer. Where the distance is not tiny the steps
        // end only by running out of delta, or by the count.
        for _ in 0..64 {
            let left = delta - self.delta(value);
            if left <= 0.0 || left.is_nan() {
                return none;
            }
            let bound = at(left);
            if bound.value <= value {
                return bound;
            }
            // A little more, so that the next step finds it enough.
            value = bound.value * (1.0 + 1e-9);
            if at(delta - self.delta(value)).value <= value && self.delta(value) < delta {
                return Bound { value, ..bound };
            }
        }
        none
    }
}
