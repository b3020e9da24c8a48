//! The privacy-loss-distribution accountant.

use super::{number, parts, vectors};
use crate::privacy::accounting::{normal, pld, rdp};
use crate::privacy::{Event, Noise};

/// Every reference row: within 1e-3 relative and 1e-4, and never above the reference's Rényi figure.
#[test]
fn every_reference_row_is_met() {
    let Some(rows) = vectors("dp_reference.csv") else { return };
    let (mut worst, mut lowest, mut highest) = (0f64, f64::INFINITY, f64::NEG_INFINITY);
    for row in &rows {
        let event = Event::gaussian(number(row, "q"), number(row, "sigma"), number(row, "steps") as u64);
        let reference = number(row, "eps_pld_dpaccounting");
        let found = pld::epsilon(&[event], number(row, "delta")).unwrap().value;
        worst = worst.max((found - reference).abs() / (1e-3 * reference + 1e-4));
        (lowest, highest) = (lowest.min(found / reference - 1.0), highest.max(found / reference - 1.0));
        assert!((found - reference).abs() <= 1e-3 * reference + 1e-4, "{row:?}: {found}");
        assert!(found <= number(row, "eps_rdp_dpaccounting"), "{row:?}: {found}");
    }
    println!("{} rows, {worst:.3} of the tolerance, relative {lowest:.2e} to {highest:.2e}", rows.len());
}

#[test]
fn every_reference_composition_is_met() {
    let Some(rows) = vectors("dp_reference_compositions.csv") else { return };
    let mut worst = 0f64;
    for row in &rows {
        let events = parts(row);
        let reference = number(row, "eps_pld_dpaccounting");
        let found = pld::epsilon(&events, number(row, "delta")).unwrap().value;
        worst = worst.max((found - reference).abs() / (1e-3 * reference + 1e-4));
        assert!((found - reference).abs() <= 1e-3 * reference + 1e-4, "{row:?}: {found}");
        assert!(found <= number(row, "eps_rdp_dpaccounting"), "{row:?}: {found}");
    }
    println!("{} compositions, {worst:.3} of the tolerance", rows.len());
}

/// delta of n unsampled Gaussians (Balle and Wang 2018, arXiv 1805.06530, Theorem 8), μ = √n/σ.
fn exact_gaussian(mu: f64, epsilon: f64) -> f64 {
    let upper = normal::ln_cdf(mu / 2.0 - epsilon / mu);
    upper.exp() - (epsilon + normal::ln_cdf(-mu / 2.0 - epsilon / mu)).exp()
}

/// Everybody sampled has a closed form, met from above, down to a delta that no plain transform could resolve.
#[test]
fn unsampled_noise_meets_its_closed_form_from_above() {
    for (sigma, count) in [(1.0, 1), (2.0, 10), (30.0, 1000), (0.7, 3), (100.0, 20_000)] {
        for delta in [1e-2, 1e-5, 1e-10, 1e-15, 1e-25] {
            let mu = f64::sqrt(count as f64) / sigma;
            let found = pld::epsilon(&[Event::gaussian(1.0, sigma, count)], delta).unwrap().value;
            let (mut low, mut high) = (0.0, 200.0);
            for _ in 0..100 {
                let middle = 0.5 * (low + high);
                if exact_gaussian(mu, middle) > delta { low = middle } else { high = middle }
            }
            assert!(found >= high * (1.0 - 1e-9), "{sigma} {count} {delta}: {found} < {high}");
            assert!(found <= high * 1.0003 + 1e-6, "{sigma} {count} {delta}: {found} > {high}");
        }
    }
}

#[test]
fn delta_inverts_epsilon() {
    let events =
        [Event::gaussian(0.01, 1.0, 500), Event::gaussian(0.1, 3.0, 20), Event::gaussian(1.0, 20.0, 1)];
    for delta in [1e-9, 1e-6, 1e-3] {
        let epsilon = pld::epsilon(&events, delta).unwrap().value;
        let back = pld::delta(&events, epsilon).unwrap().value;
        assert!((back / delta - 1.0).abs() < 5e-3, "{delta:e} {back:e}");
    }
}

/// Splitting an event, or the order of events, changes nothing that matters.
#[test]
fn a_composition_is_one_whole() {
    let (a, b) = (Event::gaussian(0.02, 1.1, 60), Event::gaussian(1.0, 15.0, 4));
    let whole = pld::epsilon(&[a, b], 1e-5).unwrap().value;
    let parts = [b.times(1), a.times(10), b.times(3), a.times(50)];
    assert!((pld::epsilon(&parts, 1e-5).unwrap().value / whole - 1.0).abs() < 1e-9);
    assert!(whole < rdp::epsilon(&[a, b], 1e-5).value);
    assert!(pld::epsilon(&[a], 1e-5).unwrap().value < whole);
}

/// The curve agrees with the closed form Φ(Φ⁻¹(1 − x) − μ) from below and with delta's, and inverts itself.
#[test]
fn the_trade_off_of_unsampled_noise() {
    let curve = pld::trade_off(&[Event::gaussian(1.0, 10.0, 100)]).unwrap();
    for x in [1e-6, 1e-3, 0.05, 0.3, 0.5, 0.9] {
        let exact = normal::cdf(normal::quantile(1.0 - x) - 1.0);
        let found = curve.misses(x);
        assert!(found <= exact + 1e-12 && found > exact - 2e-4, "{x}: {found} {exact}");
        let back = curve.false_alarms(found);
        assert!((back - x).abs() < 1e-6 + 1e-3 * x, "{x} {back}");
    }
    assert_eq!(curve.misses(1.0), 0.0);
    assert!(pld::trade_off(&[]).unwrap().misses(0.25) == 0.75);
}

#[test]
fn what_is_not_covered_says_so() {
    let discrete = Event { noise: Noise::DiscreteGaussian, ..Event::gaussian(0.1, 1.0, 1) };
    assert_eq!(pld::epsilon(&[discrete], 1e-5), None);
    // More than 600 nats in one step, no noise, no rate, no delta.
    assert_eq!(pld::epsilon(&[Event::gaussian(1.0, 0.01, 1)], 1e-5), None);
    assert_eq!(pld::epsilon(&[Event::gaussian(0.1, 0.0, 1)], 1e-5), None);
    assert_eq!(pld::epsilon(&[Event::gaussian(1.1, 1.0, 1)], 1e-5), None);
    assert_eq!(pld::epsilon(&[Event::gaussian(0.1, 1.0, 1 << 41)], 1e-5), None);
    for delta in [0.0, 1.0, -1.0, f64::NAN] {
        assert_eq!(pld::epsilon(&[Event::gaussian(0.1, 1.0, 1)], delta), None);
    }
    assert_eq!(pld::epsilon(&[], 1e-5).unwrap().value, 0.0);
}
