//! The Rényi accountant and the filter.

use super::{number, parts, vectors};
use crate::privacy::accounting::filter::{Cap, Filter, FilterError, default_order};
use crate::privacy::accounting::rdp;
use crate::privacy::{Event, Noise};

/// ln A at a whole order by the binomial sum (Mironov, Talwar and Zhang 2019, section 3.3).
fn whole_order(q: f64, sigma: f64, order: u32) -> f64 {
    let alpha = f64::from(order);
    let terms: Vec<f64> = (0..=order)
        .map(|i| {
            let i = f64::from(i);
            let ln_binomial =
                libm::lgamma(alpha + 1.0) - libm::lgamma(i + 1.0) - libm::lgamma(alpha - i + 1.0);
            ln_binomial + i * q.ln() + (alpha - i) * (-q).ln_1p() + (i * i - i) / (2.0 * sigma * sigma)
        })
        .collect();
    let top = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (top + terms.iter().map(|term| (term - top).exp()).sum::<f64>().ln()) / (alpha - 1.0)
}

fn near(found: f64, expected: f64, relative: f64) {
    assert!((found - expected).abs() <= relative * expected.abs(), "{found:e} is not {expected:e}");
}

#[test]
fn every_reference_order_is_exact() {
    let Some(rows) = vectors("dp_reference_rdp_orders.csv") else { return };
    let mut worst = 0f64;
    for row in &rows {
        let event = Event::gaussian(number(row, "q"), number(row, "sigma"), 1);
        let expected = number(row, "rdp_exact_mpmath");
        let found = rdp::divergence(&event, number(row, "alpha"));
        worst = worst.max((found - expected).abs() / expected);
    }
    println!("{} orders, worst relative deviation {worst:.2e}", rows.len());
    assert!(worst < 1e-9, "{worst:e}");
}

/// Three rows that are always there: tiny, ordinary, and where the series of others diverges.
#[test]
fn orders_that_need_no_file() {
    let at = |q, sigma, order| rdp::divergence(&Event::gaussian(q, sigma, 1), order);
    near(at(0.0001, 0.5, 1.1), 2.80984406750060e-7, 1e-11);
    near(at(0.01, 1.0, 8.0), 0.000_893_643_907_606_032, 1e-11);
    near(at(0.05, 0.7, 1.4), 0.009_246_809_745_279_852, 1e-11);
}

#[test]
fn whole_orders_agree_with_the_binomial_sum() {
    for (q, sigma) in [(0.3, 0.8), (0.05, 1.5), (0.9, 3.0), (0.01, 0.6)] {
        for order in [2, 3, 5, 17, 64] {
            let found = rdp::divergence(&Event::gaussian(q, sigma, 1), f64::from(order));
            near(found, whole_order(q, sigma, order), 1e-10);
        }
    }
}

#[test]
fn edges_of_the_range() {
    assert_eq!(rdp::divergence(&Event::gaussian(1.0, 2.0, 3), 5.0), 3.0 * 5.0 / 8.0);
    assert_eq!(rdp::divergence(&Event::gaussian(0.0, 2.0, 3), 5.0), 0.0);
    assert_eq!(rdp::divergence(&Event::gaussian(0.5, 2.0, 0), 5.0), 0.0);
    for (q, sigma) in [(0.5, 0.0), (0.5, -1.0), (0.5, f64::NAN), (1.5, 1.0), (-0.1, 1.0), (f64::NAN, 1.0)] {
        assert_eq!(rdp::divergence(&Event::gaussian(q, sigma, 1), 5.0), f64::INFINITY);
        assert_eq!(rdp::epsilon(&[Event::gaussian(q, sigma, 1)], 1e-5).value, f64::INFINITY);
    }
    assert_eq!(rdp::divergence(&Event::gaussian(0.5, 2.0, 1), 1.0), f64::INFINITY);
    // Tiny noise: a finite bound, no endless quadrature.
    let tiny = rdp::divergence(&Event::gaussian(0.5, 1e-5, 1), 3.0);
    assert!(tiny.is_finite() && tiny <= 3.0 / (2.0 * 1e-10));
    assert_eq!(rdp::epsilon(&[], 1e-5).value, 0.0);
    // Tiny rates keep their relative accuracy: A - 1 is q² (e^(1/σ²) - 1) at order 2.
    let rate = 1e-7;
    near(rdp::divergence(&Event::gaussian(rate, 2.0, 1), 2.0), rate * rate * 0.25f64.exp_m1(), 1e-11);
}

#[test]
fn divergence_rises_with_the_order_and_falls_with_noise() {
    let orders = [1.01, 1.3, 2.0, 2.5, 7.0, 30.0, 500.0];
    for pair in orders.windows(2) {
        let event = Event::gaussian(0.02, 1.1, 1);
        assert!(rdp::divergence(&event, pair[0]) < rdp::divergence(&event, pair[1]));
    }
    let at = |sigma| rdp::divergence(&Event::gaussian(0.02, sigma, 1), 6.0);
    assert!(at(0.9) > at(1.0) && at(1.0) > at(1.1));
}

#[test]
fn discrete_noise_claims_whole_orders_only() {
    let gaussian = Event::gaussian(0.1, 1.3, 10);
    let discrete = Event { noise: Noise::DiscreteGaussian, ..gaussian };
    assert_eq!(rdp::divergence(&discrete, 4.0), rdp::divergence(&gaussian, 4.0));
    assert_eq!(rdp::divergence(&discrete, 3.2), rdp::divergence(&gaussian, 4.0));
    let bound = rdp::epsilon(&[discrete], 1e-5);
    assert_eq!(bound.order, bound.order.round());
    assert!(bound.value >= rdp::epsilon(&[gaussian], 1e-5).value);
    // Everybody sampled: concentrated differential privacy, every order.
    let everybody = Event { sampling_rate: 1.0, ..discrete };
    assert_eq!(rdp::divergence(&everybody, 3.2), 10.0 * 3.2 / (2.0 * 1.3 * 1.3));
}

/// The sampled discrete Gaussian's own divergences, summed over the integers, are below what is claimed, both ways.
#[test]
fn the_discrete_gaussian_is_within_its_claim() {
    for (q, sigma, shift) in [(0.1, 0.9, 1i64), (0.3, 2.5, 2), (0.02, 4.0, 7)] {
        let density = |x: i64| (-(x as f64).powi(2) / (2.0 * sigma * sigma)).exp();
        let support = -(36.0 * sigma) as i64..=(36.0 * sigma) as i64;
        let total: f64 = support.clone().map(density).sum();
        let ratio = |x: i64| {
            let exponent = (2 * x - shift) as f64 * shift as f64 / (2.0 * sigma * sigma);
            1.0 - q + q * exponent.exp()
        };
        for order in [2.0, 3.0, 5.0, 8.0] {
            let moment =
                |power: f64| support.clone().map(|x| density(x) / total * ratio(x).powf(power)).sum::<f64>();
            // The mixture from the plain noise, and the plain noise from the mixture.
            let (remove, add) = (moment(order), moment(1.0 - order));
            let event = Event {
                noise: Noise::DiscreteGaussian,
                sampling_rate: q,
                sensitivity: shift as f64,
                noise_standard_deviation: sigma,
                count: 1,
            };
            let claimed = rdp::divergence(&event, order);
            for found in [add, remove] {
                assert!(found.ln() / (order - 1.0) <= claimed * (1.0 + 1e-12), "{q} {sigma} {order}");
            }
        }
    }
}

#[test]
fn epsilon_is_never_above_the_reference() {
    let Some(rows) = vectors("dp_reference.csv") else { return };
    let mut largest = f64::NEG_INFINITY;
    for row in &rows {
        let event = Event::gaussian(number(row, "q"), number(row, "sigma"), number(row, "steps") as u64);
        let reference = number(row, "eps_rdp_dpaccounting");
        let bound = rdp::epsilon(&[event], number(row, "delta"));
        largest = largest.max(bound.value / reference - 1.0);
        // Orders between the reference's gain at most a third; the order is stated, so anyone can check it.
        assert!(bound.value > 0.6 * reference, "{row:?}: {bound:?}");
        let again = rdp::epsilon_at(rdp::composed(&[event], bound.order), number(row, "delta"), bound.order);
        near(again, bound.value, 1e-12);
    }
    println!("{} rows, largest excess over the reference {largest:.2e}", rows.len());
    assert!(largest < 1e-6, "{largest:e}");
}

#[test]
fn delta_inverts_epsilon() {
    let events = [Event::gaussian(0.01, 1.0, 1000), Event::gaussian(1.0, 20.0, 10)];
    for delta in [1e-9, 1e-5, 1e-2] {
        let epsilon = rdp::epsilon(&events, delta).value;
        near(rdp::delta(&events, epsilon).value, delta, 1e-5);
    }
    assert!(rdp::delta(&events, 0.0).value <= 1.0);
}

#[test]
fn composition_adds() {
    let (a, b) = (Event::gaussian(0.01, 1.0, 100), Event::gaussian(0.02, 1.3, 7));
    near(
        rdp::composed(&[a, b], 5.5),
        100.0 * rdp::divergence(&a.times(1), 5.5) + 7.0 * rdp::divergence(&b.times(1), 5.5),
        1e-14,
    );
    let Some(rows) = vectors("dp_reference_compositions.csv") else { return };
    for row in &rows {
        let events = parts(row);
        let found = rdp::epsilon(&events, number(row, "delta")).value;
        let reference = number(row, "eps_rdp_dpaccounting");
        assert!(found <= reference * (1.0 + 1e-9) && found > 0.97 * reference, "{found} {reference}");
    }
}

/// Order 7 is what an account with epsilon 3 and delta 1e-5 is opened at.
#[test]
fn the_default_order_is_a_fixed_rule() {
    assert_eq!(default_order(3.0, 1e-5), Ok(7.0));
    assert!(default_order(1.0, 1e-5).unwrap() > 7.0);
    assert!(default_order(8.0, 1e-5).unwrap() < 7.0);
    assert_eq!(default_order(f64::NAN, 1e-5).map_err(|e| matches!(e, FilterError::Epsilon(_))), Err(true));
    assert_eq!(default_order(3.0, 1.0), Err(FilterError::Delta(1.0)));
    assert!(matches!(default_order(1e-6, 1e-9), Err(FilterError::NoBudget { .. })));
}

#[test]
fn the_filter_keeps_its_cap() {
    let mut filter = Filter::open(Cap::new(3.0, 1e-5).unwrap()).unwrap();
    // 10 local steps a round at sampling rate 0.05 and noise multiplier 1.6.
    let round = Event::gaussian(0.05, 1.6, 10);
    let affordable = filter.affordable(&round);
    // All 300 steps cost 2.9 by the best order; at the account's order they fit as well.
    assert!((30..34).contains(&affordable), "{affordable}");
    for _ in 0..affordable {
        filter.charge(&[round]).unwrap();
    }
    assert!(filter.spent() <= filter.budget());
    assert!(filter.odometer() <= 3.0 && filter.odometer() > 2.8);
    assert!(!filter.admits(&[round]));
    let before = filter;
    assert!(matches!(filter.charge(&[round]), Err(FilterError::Exhausted { .. })));
    assert_eq!(filter, before);
    assert_eq!(filter.affordable(&round), 0);
    assert_eq!(filter.affordable(&Event::gaussian(0.0, 1.0, 1)), u64::MAX);
    assert!(!filter.admits(&[Event::gaussian(0.5, 0.0, 1)]));
    // A spent-up account is worth its cap and no more.
    assert!(rdp::epsilon_at(filter.budget(), 1e-5, 7.0) <= 3.0);
}

/// A single charge of the whole and one charge per round buy the same.
#[test]
fn reserving_at_once_equals_charging_by_round() {
    let cap = Cap { epsilon: 3.0, delta: 1e-5, order: 7.0 };
    let (mut whole, mut parts) = (Filter::open(cap).unwrap(), Filter::open(cap).unwrap());
    whole.charge(&[Event::gaussian(0.05, 1.6, 300)]).unwrap();
    for _ in 0..30 {
        parts.charge(&[Event::gaussian(0.05, 1.6, 10)]).unwrap();
    }
    near(parts.spent(), whole.spent(), 1e-12);
}
