//! The bound that uses the mechanism's whole trade-off curve, not one point of it: Mahloujifar, Melis and Chaudhuri 2025,
//! arXiv 2410.22235. It sees much more of the truth than the bound of [`one_run`](super::one_run).

use tributary_common::privacy::Event;
use tributary_common::privacy::accounting::{normal, pld};

use super::{Guesses, last_true};

/// Factors of the claimed noise between which the smallest that is refuted is looked for.
const FACTORS: (f64, f64) = (0.05, 20.0);
/// Halvings of their ratio's ln: to 1e−4.
const HALVINGS: u32 = 16;

/// Whether so many correct guesses are too unlikely, at confidence 1 − `error`, for a mechanism with a trade-off curve.
///
/// `alarms_for` is, for a rate of hits, the least rate of false alarms of any test with it; it rises from 0 to 1.
/// The recursion of the paper, with its constants as in jax_privacy: starting from the most that `error` allows for v and more correct guesses, the shares of
/// the canaries that can be guessed right with v − 1, v − 2, … correct guesses are bounded in turn; if what is needed in
/// all exceeds the guesses that were made per canary, the curve is refuted.
pub fn refuted(guesses: Guesses, error: f64, alarms_for: impl Fn(f64) -> f64) -> bool {
    let Guesses { canaries, made, correct } = guesses;
    if made == 0 || correct > made || made > canaries {
        return false;
    }
    let (all, made_share) = (canaries as f64, made as f64);
    let mut right = error * correct as f64 / all;
    let mut wrong = error * (made - correct) as f64 / all;
    for i in (0..correct).rev() {
        let next = wrong.max(alarms_for(right));
        right = (right + i as f64 / (made - i) as f64 * (next - wrong)).min(1.0);
        wrong = next;
    }
    right + wrong > made_share / all
}

/// The largest epsilon at `delta` such that the Gaussian mechanism with it is refuted; 0 where none is.
pub fn gaussian_lower_bound(guesses: Guesses, delta: f64, error: f64) -> f64 {
    let too_little = |mu: f64| refuted(guesses, error, |hits| normal::cdf(normal::quantile(hits) - mu));
    let mu = last_true(0.0, 30.0, 60, too_little);
    gaussian_epsilon(mu, delta)
}

/// The epsilon at `delta` of the Gaussian mechanism whose two outputs are `mu` standard deviations apart (Balle and Wang
/// 2018, arXiv 1805.06530, Theorem 8).
pub fn gaussian_epsilon(mu: f64, delta: f64) -> f64 {
    let at = |epsilon: f64| {
        let low = (epsilon + normal::ln_cdf(-mu / 2.0 - epsilon / mu)).exp();
        normal::cdf(mu / 2.0 - epsilon / mu) - low
    };
    if mu <= 0.0 || at(0.0) <= delta {
        return 0.0;
    }
    // μ²/2 + μ·40 is beyond every delta that a float can hold.
    last_true(0.0, mu * mu / 2.0 + 40.0 * mu, 100, |epsilon| at(epsilon) > delta)
}

/// What a run says of the mechanism that it claims.
///
/// `noise_factor` is the smallest factor that is refuted: with that much of the claimed noise or more, guessing this well
/// is too unlikely.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Finding {
    /// Whether the claimed mechanism itself is refuted: with its noise, guessing this well is too unlikely.
    pub claim_refuted: bool,
    /// That factor; infinite where none is refuted, 0 where all that are covered are.
    pub noise_factor: f64,
    /// The epsilon at the claim's delta of the mechanism with that noise: an empirical lower bound.
    pub epsilon: f64,
}

/// Tests the claimed events with all noise multiplied by a factor, and finds the smallest that is refuted.
///
/// A larger factor is a smaller epsilon and refuted earlier. Both directions of the trade-off curve are used, the worse at
/// each point, from the accountant's bound, which only makes refutation harder. None where the accountant does not cover
/// the events (discrete noise among them).
pub fn lower_bound(guesses: Guesses, events: &[Event], delta: f64, error: f64) -> Option<Finding> {
    let scaled = |factor: f64| -> Vec<Event> {
        let scale = |event: &Event| Event {
            noise_standard_deviation: factor * event.noise_standard_deviation,
            ..*event
        };
        events.iter().map(scale).collect()
    };
    let too_noisy = |factor: f64| {
        let curve = pld::trade_off(&scaled(factor))?;
        // With y the rate of misses: false alarms of a test for "took part", or of one for "did not".
        let alarms_for = |hits: f64| curve.false_alarms(1.0 - hits).min(curve.misses(1.0 - hits));
        Some(refuted(guesses, error, alarms_for))
    };
    let claim_refuted = too_noisy(1.0)?;
    // Less noise explains more.
    let (mut explained, mut unexplained) = if claim_refuted {
        match too_noisy(FACTORS.0) {
            Some(false) => (FACTORS.0, 1.0),
            // Nothing that is covered explains the run.
            _ => return Some(Finding { claim_refuted, noise_factor: 0.0, epsilon: f64::INFINITY }),
        }
    } else if too_noisy(FACTORS.1)? {
        (1.0, FACTORS.1)
    } else {
        return Some(Finding { claim_refuted, noise_factor: f64::INFINITY, epsilon: 0.0 });
    };
    for _ in 0..HALVINGS {
        let middle = (explained * unexplained).sqrt();
        if too_noisy(middle).unwrap_or(false) { unexplained = middle } else { explained = middle }
    }
    let epsilon = pld::epsilon(&scaled(unexplained), delta)?.value;
    Some(Finding { claim_refuted, noise_factor: unexplained, epsilon })
}
