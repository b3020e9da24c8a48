//! The standard normal distribution, accurate in both tails.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Below this the asymptotic series of the tail is more accurate than `erfc`, which nears its underflow at −37.5.
const SERIES_BELOW: f64 = -20.0;

/// Φ(x), the probability of a value of at most `x`. Relative accuracy holds in the lower tail down to x = −37.
pub fn cdf(x: f64) -> f64 {
    0.5 * libm::erfc(-x * FRAC_1_SQRT_2)
}

/// ln Φ(x), finite for every finite `x` above −1e150.
///
/// The lower tail uses Φ(x) = φ(x)/|x| · (1 − 1/x² + 3/x⁴ − 15/x⁶ + …) (Abramowitz and Stegun 26.2.12).
pub fn ln_cdf(x: f64) -> f64 {
    if x > 0.0 {
        (-cdf(-x)).ln_1p()
    } else if x > SERIES_BELOW {
        cdf(x).ln()
    } else {
        let inverse_square = 1.0 / (x * x);
        let mut term = 1.0;
        let mut series = 1.0;
        for k in 0..8 {
            term *= -f64::from(2 * k + 1) * inverse_square;
            series += term;
        }
        -0.5 * x * x - (-x).ln() - 0.5 * (2.0 * PI).ln() + series.ln()
    }
}

/// Φ⁻¹(p): the value that is not exceeded with probability `p`, from 0 to 1 (−∞ and ∞ at the ends, NaN beyond).
///
/// Newton's steps on ln Φ, which is concave, so that they converge from the left of the root.
pub fn quantile(p: f64) -> f64 {
    if !(0.0..=1.0).contains(&p) {
        return f64::NAN;
    }
    if p > 0.5 {
        // 1 − p is exact here.
        return -quantile(1.0 - p);
    }
    if p == 0.0 {
        return f64::NEG_INFINITY;
    }
    if p == 0.5 {
        return 0.0;
    }
    let target = p.ln();
    // Φ(x) ≤ exp(−x²/2)/2 for x ≤ 0, so this start lies left of the root.
    let mut x = -(-2.0 * (target + std::f64::consts::LN_2)).max(0.0).sqrt();
    for _ in 0..60 {
        let value = ln_cdf(x);
        let slope = (-0.5 * x * x - 0.5 * (2.0 * PI).ln() - value).exp();
        let step = (target - value) / slope;
        x += step;
        if step.abs() <= 1e-15 * x.abs().max(1e-3) {
            break;
        }
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64, relative: f64) {
        assert!((found - expected).abs() <= relative * expected.abs(), "{found:e} is not {expected:e}");
    }

    /// Values from 40-digit arithmetic (mpmath `ncdf`).
    #[test]
    fn tails_are_accurate() {
        near(cdf(-1.0), 0.158_655_253_931_457_05, 1e-15);
        near(cdf(-10.0), 7.619_853_024_160_526e-24, 1e-14);
        near(ln_cdf(-19.999), -203.897_106_116_797_06, 1e-12);
        near(ln_cdf(-20.001), -203.937_205_622_934_2, 1e-12);
        near(ln_cdf(-40.0), -804.608_442_013_753_8, 1e-14);
        near(ln_cdf(3.0), -0.001_350_809_964_748_193_8, 1e-13);
    }

    #[test]
    fn the_quantile_inverts() {
        for p in [1e-300, 1e-30, 1e-9, 1e-3, 0.2, 0.499, 0.5, 0.7, 0.999] {
            near(cdf(quantile(p)), p, 1e-12);
        }
        assert_eq!(quantile(0.0), f64::NEG_INFINITY);
        assert_eq!(quantile(1.0), f64::INFINITY);
        assert!(quantile(-0.1).is_nan() && quantile(f64::NAN).is_nan());
    }
}
