//! One step of Poisson-sampled Gaussian noise: the likelihood ratio of its two outputs, and that ratio's moments.
//!
//! With sensitivity one and noise multiplier σ the outputs on neighbouring data are N = N(0, σ²) and the mixture
//! (1 − q)·N(0, σ²) + q·N(1, σ²) (Mironov, Talwar and Zhang 2019, arXiv 1908.10530, section 3). Everything an
//! accountant needs is a function of r(z) = mixture(z)/N(z) = 1 − q + q·exp((2z − 1)/(2σ²)).

use std::f64::consts::PI;

/// Standard deviations beyond which a normal integrand is below 1e−31 of its peak.
const REACH: f64 = 12.0;
/// Largest number of nodes of a quadrature; beyond it a bound takes its place.
const MAX_NODES: f64 = 4e6;

/// The pair of outputs of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::privacy) struct SampledGaussian {
    /// Probability of being sampled, above 0 and at most 1.
    rate: f64,
    /// Standard deviation of the noise per sensitivity, above 0.
    sigma: f64,
}

/// E\[r^a\] under N, and mean and variance of ln r under the law with density r^a·N / E\[r^a\].
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    /// ln E\[r^a\].
    pub(super) ln: f64,
    /// Mean of ln r.
    pub(super) mean: f64,
    /// Variance of ln r.
    pub(super) variance: f64,
}

impl SampledGaussian {
    /// None unless 0 < `rate` ≤ 1 and 0 < `sigma` < ∞.
    pub(in crate::privacy) fn new(rate: f64, sigma: f64) -> Option<Self> {
        (rate > 0.0 && rate <= 1.0 && sigma > 0.0 && sigma.is_finite()).then_some(Self { rate, sigma })
    }

    pub(super) fn rate(&self) -> f64 {
        self.rate
    }

    pub(super) fn sigma(&self) -> f64 {
        self.sigma
    }

    /// (2z − 1)/(2σ²), the ratio's exponent for a unit that was sampled.
    fn exponent(&self, z: f64) -> f64 {
        (z - 0.5) / (self.sigma * self.sigma)
    }

    /// ln r(z), accurate where r is near 1 and where its exponential overflows.
    pub(in crate::privacy) fn ln_ratio(&self, z: f64) -> f64 {
        let Self { rate: q, .. } = *self;
        let u = self.exponent(z);
        if q == 1.0 {
            u
        } else if u > 40.0 {
            q.ln() + u + ((1.0 - q) / q * (-u).exp()).ln_1p()
        } else {
            let change = q * u.exp_m1();
            // Near −1 the sum 1 + change would cancel.
            if change < -0.5 { (1.0 - q + q * u.exp()).ln() } else { change.ln_1p() }
        }
    }

    /// The z at which ln r(z) = `loss`; −∞ where no z is that low.
    pub(super) fn position(&self, loss: f64) -> f64 {
        let Self { rate: q, sigma } = *self;
        if q == 1.0 {
            return 0.5 + sigma * sigma * loss;
        }
        let exponent = if loss > 40.0 {
            loss - q.ln() + (-(1.0 - q) * (-loss).exp()).ln_1p()
        } else {
            let change = loss.exp_m1() / q;
            if change <= -1.0 {
                return f64::NEG_INFINITY;
            }
            change.ln_1p()
        };
        0.5 + sigma * sigma * exponent
    }

    /// Spacing and number of the nodes of the trapezoid rule for N·r^a and where they begin.
    ///
    /// The rule converges exponentially: the integrand is analytic in the strip |Im z| < πσ², where r has its zeros,
    /// so a spacing of σ²/2 leaves e^(−4π²), and one of σ/2 leaves e^(−8π²) of the Gaussian itself.
    fn nodes(&self, a: f64) -> Option<(f64, f64, usize)> {
        let sigma = self.sigma;
        let spacing = (sigma / 2.0).min(sigma * sigma / 2.0);
        let (low, high) = (a.min(0.0) - REACH * sigma - 1.0, a.max(0.0) + REACH * sigma + 1.0);
        let count = ((high - low) / spacing).ceil() + 1.0;
        (count <= MAX_NODES).then_some((low, spacing, count as usize))
    }

    /// ln of N's density at z times `spacing`, a trapezoid's weight.
    fn ln_weight(&self, z: f64, spacing: f64) -> f64 {
        let scaled = z / self.sigma;
        -0.5 * scaled * scaled + (spacing / self.sigma).ln() - 0.5 * (2.0 * PI).ln()
    }

    /// ln E\[r^a\], and the mean and variance of ln r under that tilt, for any real `a`. None where the quadrature would
    /// need more than [`MAX_NODES`] nodes.
    pub(super) fn moment(&self, a: f64) -> Option<Moment> {
        let (low, spacing, count) = self.nodes(a)?;
        // Sums are kept relative to the largest weight so far and its ln r.
        let (mut top, mut origin) = (f64::NEG_INFINITY, 0.0);
        let (mut sum, mut first, mut second) = (0.0f64, 0.0f64, 0.0f64);
        for i in 0..count {
            let z = low + i as f64 * spacing;
            let ln_ratio = self.ln_ratio(z);
            let ln_weight = self.ln_weight(z, spacing) + a * ln_ratio;
            if ln_weight > top {
                let shift = origin - ln_ratio;
                let scale = (top - ln_weight).exp();
                second = scale * (second + 2.0 * shift * first + shift * shift * sum);
                first = scale * (first + shift * sum);
                sum *= scale;
                (top, origin) = (ln_weight, ln_ratio);
                sum += 1.0;
            } else {
                let weight = (ln_weight - top).exp();
                let away = ln_ratio - origin;
                sum += weight;
                first += weight * away;
                second += weight * away * away;
            }
        }
        let away = first / sum;
        let variance = (second / sum - away * away).max(0.0);
        Some(Moment { ln: top + sum.ln(), mean: origin + away, variance })
    }

    /// Rényi divergence of order α > 1 of the mixture from N, the larger of the two directions: ln E\[r^α\]/(α − 1).
    ///
    /// Relative accuracy holds however small it is: near 1 the moment is taken as 1 + E\[r^α − 1 − α(r − 1)\], which is
    /// the same because E\[r\] = 1, and every term of which is at least zero. Where the quadrature would be too long the
    /// divergence of the unsampled Gaussian α/(2σ²) is given, which bounds it (quasi-convexity).
    pub(super) fn divergence(&self, order: f64) -> f64 {
        let unsampled = order / (2.0 * self.sigma * self.sigma);
        if self.rate == 1.0 {
            return unsampled;
        }
        let Some(Moment { ln, .. }) = self.moment(order) else { return unsampled };
        let ln = if ln < 0.5 { self.excess(order).map_or(ln, f64::ln_1p) } else { ln };
        (ln.max(0.0) / (order - 1.0)).min(unsampled)
    }

    /// E\[r^α\] − 1.
    fn excess(&self, order: f64) -> Option<f64> {
        let (low, spacing, count) = self.nodes(order)?;
        let q = self.rate;
        let mut sum = 0.0;
        for i in 0..count {
            let z = low + i as f64 * spacing;
            let ln_weight = self.ln_weight(z, spacing);
            let u = self.exponent(z);
            let change = if u < 40.0 { q * u.exp_m1() } else { f64::INFINITY };
            sum += if order.max(1.0) * change.abs() < 0.05 {
                ln_weight.exp() * convexity(order, change)
            } else {
                let ln_change = if u < 40.0 { change.abs().ln() } else { q.ln() + u };
                (ln_weight + order * self.ln_ratio(z)).exp()
                    - ln_weight.exp()
                    - order * (ln_weight + ln_change).exp().copysign(change)
            };
        }
        Some(sum)
    }
}

/// (1 + x)^α − 1 − αx by its binomial series, for α|x| < 0.05.
fn convexity(order: f64, x: f64) -> f64 {
    let mut term = order * (order - 1.0) / 2.0 * x * x;
    let mut sum = term;
    for k in 2..14 {
        let k = f64::from(k);
        term *= (order - k) / (k + 1.0) * x;
        sum += term;
    }
    sum
}
