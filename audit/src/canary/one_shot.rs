//! The client-level estimate of Andrew et al. 2024 (arXiv 2302.03098): a point estimate from one run, not a bound.

use tributary_common::privacy::accounting::normal;

use super::last_true;

/// Fewest coordinates for which the cosine of a random direction is taken as normal.
pub const LEAST_DIMENSION: u64 = 1000;
/// No epsilon above this is looked for.
const LARGEST: f64 = 200.0;

/// A normal distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normal {
    /// Its mean.
    pub mean: f64,
    /// Its standard deviation, above 0.
    pub deviation: f64,
}

impl Normal {
    fn mass(&self, low: f64, high: f64) -> f64 {
        let at = |x: f64| (x - self.mean) / self.deviation;
        let (low, high) = (at(low), at(high));
        if low > 0.0 { normal::cdf(-low) - normal::cdf(-high) } else { normal::cdf(high) - normal::cdf(low) }
    }
}

/// The epsilon at `delta` between the cosines of canary clients that took part and those of directions nobody sent.
///
/// The latter are N(0, 1/d), known exactly; the former are fitted. None with fewer than 2 cosines, fewer than 1000
/// coordinates, or cosines that do not vary.
pub fn estimate(cosines: &[f64], dimension: u64, delta: f64) -> Option<f64> {
    let count = cosines.len() as f64;
    if cosines.len() < 2 || dimension < LEAST_DIMENSION || !cosines.iter().all(|cosine| cosine.is_finite()) {
        return None;
    }
    let mean = cosines.iter().sum::<f64>() / count;
    let variance = cosines.iter().map(|cosine| (cosine - mean).powi(2)).sum::<f64>() / (count - 1.0);
    if variance <= 0.0 {
        return None;
    }
    let seen = Normal { mean, deviation: variance.sqrt() };
    let unseen = Normal { mean: 0.0, deviation: (1.0 / dimension as f64).sqrt() };
    Some(epsilon(seen, unseen, delta).max(epsilon(unseen, seen, delta)))
}

/// The least epsilon with P(A) ≤ e^ε·Q(A) + `delta` for every set A.
fn epsilon(first: Normal, second: Normal, delta: f64) -> f64 {
    let exceeded = |epsilon: f64| excess(first, second, epsilon) > delta;
    if exceeded(0.0) { last_true(0.0, LARGEST, 60, exceeded) } else { 0.0 }
}

/// P(A) − e^ε·Q(A) for the set A where the ln of the ratio of densities, a quadratic, exceeds ε.
fn excess(first: Normal, second: Normal, epsilon: f64) -> f64 {
    let (p, q) = (1.0 / first.deviation.powi(2), 1.0 / second.deviation.powi(2));
    // a·x² + b·x + c > 0 on A.
    let a = 0.5 * (q - p);
    let b = first.mean * p - second.mean * q;
    let c = 0.5 * (second.mean.powi(2) * q - first.mean.powi(2) * p)
        + (second.deviation / first.deviation).ln()
        - epsilon;
    let on = |low: f64, high: f64| first.mass(low, high) - epsilon.exp() * second.mass(low, high);
    let (below, above) = (f64::NEG_INFINITY, f64::INFINITY);
    if a.abs() < 1e-12 * (p + q) {
        return if b > 0.0 {
            on(-c / b, above)
        } else if b < 0.0 {
            on(below, -c / b)
        } else {
            0.0
        };
    }
    let discriminant = b * b - 4.0 * a * c;
    if discriminant <= 0.0 {
        return if a > 0.0 { on(below, above) } else { 0.0 };
    }
    // Without cancellation.
    let half = -0.5 * (b + discriminant.sqrt().copysign(b));
    let (x, y) = (half / a, if half == 0.0 { 0.0 } else { c / half });
    let (low, high) = (x.min(y), x.max(y));
    if a > 0.0 { on(below, low) + on(high, above) } else { on(low, high) }
}
