//! The Rényi accountant: divergences of every order, their sum, and what they say of epsilon and delta.
//!
//! Rényi differential privacy of order α adds up under composition (Mironov 2017, arXiv 1702.07476, Proposition 1), so
//! an account is one number per order. Orders are real and above 1.

use super::distributed::{Failures, sampled_symmetric};
use super::sampled_gaussian::SampledGaussian;
use crate::privacy::{Event, Noise};

/// Orders that are tried first: this many, spaced evenly in ln(α − 1).
const ORDERS: usize = 60;
/// The lowest of them less one.
const LOWEST: f64 = 0.02;
/// The highest of them less one.
const HIGHEST: f64 = 3e4;
/// Golden-section steps between the neighbours of the best of them: to 1e−6 of ln(α − 1).
const REFINEMENTS: usize = 24;
/// Whole orders that are all tried where only whole orders are claimed.
const WHOLE_ORDERS: u32 = 64;
/// The highest order that is claimed for noise in shares: its cost is a sum over all orders up to it.
const HIGHEST_SHARED: u32 = 4096;

/// A figure and the order that gave it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Epsilon or delta.
    pub value: f64,
    /// The order α.
    pub order: f64,
}

/// Rényi divergence of order `order` > 1 between the outputs on neighbouring data of all `event.count` steps, in the
/// worse of the two directions.
///
/// - Gaussian: exact at every order, as the larger direction, the mixture from the Gaussian, is for each order (Mironov,
///   Talwar and Zhang 2019, arXiv 1908.10530, Theorem 5); α·s²/(2σ²) when everybody is sampled.
/// - Discrete Gaussian: the same number at whole orders, of which α that is not whole takes the next. The moment of the
///   sampled mechanism is a sum of its unsampled moments of orders 0 to α with positive factors, and each of those is
///   at most the Gaussian's (Canonne, Kamath and Steinke 2020, arXiv 2004.00010, Proposition 5). The other direction is
///   the smaller by the same theorem, as x ↦ shift − x exchanges the two outputs.
/// - Skellam: an upper bound at whole orders, [`Shares::divergence`](super::distributed::Shares::divergence) and for a
///   sample the sum over its orders 2 to α; α that is not whole takes the next, as divergences rise with the order. What
///   is paid into delta besides is not in it: [`epsilon`] and [`delta`] count that.
///
/// An event that is no mechanism (a rate outside \[0, 1\], noise that is not positive) costs infinity; nobody sampled
/// costs nothing.
pub fn divergence(event: &Event, order: f64) -> f64 {
    if event.count == 0 || event.sampling_rate == 0.0 {
        return 0.0;
    }
    let Some(step) = SampledGaussian::new(event.sampling_rate, event.noise_multiplier()) else {
        return f64::INFINITY;
    };
    if order.is_nan() || order <= 1.0 {
        return f64::INFINITY;
    }
    let order = if claims_whole_orders(event) { order.ceil() } else { order };
    if let Some(shares) = event.shares() {
        // An order beyond what can be summed is not claimed; its float may not be a count either.
        if order > f64::from(HIGHEST_SHARED) {
            return f64::INFINITY;
        }
        let at = |order| shares.divergence(order);
        return event.count as f64 * sampled_symmetric(at, order as u32, event.sampling_rate);
    }
    event.count as f64 * step.divergence(order)
}

/// The divergence of all `events` together.
pub fn composed(events: &[Event], order: f64) -> f64 {
    events.iter().map(|event| divergence(event, order)).sum()
}

/// The epsilon at `delta` of a mechanism whose divergence of order `order` is `divergence`, at least 0.
///
/// Balle, Barthe, Gaboardi, Hsu and Sato 2020 (arXiv 1905.09982, Theorem 21); zero where already the total variation,
/// at most √(1 − e^−ρ) (Bretagnolle and Huber), is below delta.
pub fn epsilon_at(divergence: f64, delta: f64, order: f64) -> f64 {
    if delta * delta + (-divergence).exp_m1() > 0.0 {
        return 0.0;
    }
    (divergence + surcharge(delta, order)).max(0.0)
}

/// What the conversion of [`epsilon_at`] adds to a divergence.
pub(super) fn surcharge(delta: f64, order: f64) -> f64 {
    (-1.0 / order).ln_1p() - (delta.ln() + order.ln()) / (order - 1.0)
}

/// The delta at `epsilon`, the inverse of [`epsilon_at`], at most 1.
pub fn delta_at(divergence: f64, epsilon: f64, order: f64) -> f64 {
    let ln = (order - 1.0) * (divergence - epsilon + (-1.0 / order).ln_1p()) - order.ln();
    let total_variation = (-(-divergence).exp_m1()).max(0.0).sqrt();
    ln.exp().min(total_variation).min(1.0)
}

/// The smallest epsilon at `delta` that any order gives for `events`; infinite where none gives one.
///
/// What events pay into delta is taken from it first.
pub fn epsilon(events: &[Event], delta: f64) -> Bound {
    let failures = Failures::of(events);
    if failures.are_none() {
        return epsilon_without_failures(events, delta);
    }
    failures.epsilon(delta, |left| epsilon_without_failures(events, left))
}

fn epsilon_without_failures(events: &[Event], delta: f64) -> Bound {
    let at = |order: f64| {
        let divergence = composed(events, order);
        // A higher order has no smaller divergence, and of what the conversion adds only −ln δ/(α − 1) falls.
        let floor = divergence + (-1.0 / order).ln_1p() - order.ln() / (order - 1.0);
        (epsilon_at(divergence, delta, order), floor)
    };
    minimise(events, at)
}

/// The smallest delta at `epsilon` that any order gives for `events`, at most 1, with what they pay into it.
pub fn delta(events: &[Event], epsilon: f64) -> Bound {
    let at = |order: f64| {
        let divergence = composed(events, order);
        let delta = delta_at(divergence, epsilon, order);
        // Once the bound says nothing, a higher order, with its larger divergence, says nothing either.
        let hopeless = (order - 1.0) * (divergence - epsilon) > 1.0 + order.ln();
        (delta, if hopeless { f64::INFINITY } else { f64::NEG_INFINITY })
    };
    let bound = minimise(events, at);
    Bound { value: (bound.value + Failures::of(events).delta(epsilon)).min(1.0), ..bound }
}

/// Minimises over the order what `at` gives: a figure, and what no higher order can go below.
fn minimise(events: &[Event], at: impl Fn(f64) -> (f64, f64)) -> Bound {
    let whole = events.iter().any(claims_whole_orders);
    let spaced = (0..ORDERS).map(|i| {
        let part = i as f64 / (ORDERS - 1) as f64;
        1.0 + LOWEST * (HIGHEST / LOWEST).powf(part)
    });
    let orders: Vec<f64> = if whole {
        let mut orders: Vec<f64> = (2..=WHOLE_ORDERS).map(f64::from).collect();
        orders.extend(spaced.map(f64::ceil).filter(|order| *order > f64::from(WHOLE_ORDERS)));
        if events.iter().any(|event| event.shares().is_some()) {
            orders.retain(|order| *order <= f64::from(HIGHEST_SHARED));
        }
        orders
    } else {
        spaced.collect()
    };
    let mut best = Bound { value: f64::INFINITY, order: orders.first().copied().unwrap_or(2.0) };
    let mut best_at = 0;
    for (i, order) in orders.iter().enumerate() {
        let (value, floor) = at(*order);
        if value < best.value {
            best = Bound { value, order: *order };
            best_at = i;
        }
        if floor > best.value {
            break;
        }
    }
    if !best.value.is_finite() || best.value == 0.0 {
        return best;
    }
    let neighbour = |i: usize| orders.get(i).copied().unwrap_or(best.order);
    let (low, high) = (neighbour(best_at.saturating_sub(1)), neighbour(best_at + 1));
    refine(best, low, high, whole, |order| at(order).0)
}

/// Golden-section search between `low` and `high` in ln(α − 1), or over whole orders.
fn refine(best: Bound, low: f64, high: f64, whole: bool, at: impl Fn(f64) -> f64) -> Bound {
    const GOLDEN: f64 = 0.618_033_988_749_894_9;
    let order = |x: f64| if whole { (1.0 + x.exp()).ceil() } else { 1.0 + x.exp() };
    let (mut a, mut b) = ((low - 1.0).ln(), (high - 1.0).ln());
    let (mut c, mut d) = (b - GOLDEN * (b - a), a + GOLDEN * (b - a));
    let (mut at_c, mut at_d) = (at(order(c)), at(order(d)));
    let mut best = best;
    let mut keep = |x: f64, value: f64| {
        if value < best.value {
            best = Bound { value, order: order(x) };
        }
    };
    for _ in 0..REFINEMENTS {
        keep(c, at_c);
        keep(d, at_d);
        if at_c < at_d {
            (b, d, at_d) = (d, c, at_c);
            c = b - GOLDEN * (b - a);
            at_c = at(order(c));
        } else {
            (a, c, at_c) = (c, d, at_d);
            d = a + GOLDEN * (b - a);
            at_d = at(order(d));
        }
    }
    best
}

/// Whether only whole orders are claimed: for discrete noise over a sample, and for noise in shares.
fn claims_whole_orders(event: &Event) -> bool {
    match event.noise {
        Noise::Gaussian => false,
        Noise::DiscreteGaussian => event.sampling_rate < 1.0,
        Noise::Skellam(_) => true,
    }
}
