//! Noise in shares.

use super::{number, vectors};
use crate::privacy::accounting::distributed::{ShareNoise, Shares, rounded_norm, sampled_symmetric};
use crate::privacy::accounting::filter::{self, Cap, Filter};
use crate::privacy::accounting::{self, Accountant, Basis, noise_multiplier_for, rdp};
use crate::privacy::distributed::guarantees;
use crate::privacy::{Event, Noise, SkellamShares, Unit};

#[test]
fn every_reference_row_is_met() {
    let Some(rows) = vectors("dp_reference_distributed.csv") else { return };
    let mut worst = 0f64;
    for row in &rows {
        assert_eq!(row["beta"], "exp(-0.5)");
        let grid = number(row, "gamma_grid");
        let dimension = number(row, "dim") as usize;
        let sensitivity = rounded_norm(number(row, "l2_clip") / grid, dimension, Some((-0.5f64).exp()));
        let mut compare = |found: f64, column: &str| {
            let expected = number(row, column);
            let off = (found - expected).abs() / expected.max(1e-9);
            worst = worst.max(off);
            assert!(off < 1e-9, "{column} of {row:?}: {found}");
        };
        compare(sensitivity, "rounded_l2_grid");
        for (noise, epsilon, order) in [
            (ShareNoise::DiscreteGaussian, "eps_ddgauss", "order_ddgauss"),
            (ShareNoise::Skellam, "eps_skellam", "order_skellam"),
        ] {
            let shares = Shares {
                noise,
                honest: number(row, "n_clients") as u32,
                share_standard_deviation: number(row, "local_stddev_unscaled") / grid,
                sensitivity,
                dimension,
            };
            let bound = shares.epsilon(number(row, "q"), number(row, "rounds") as u64, number(row, "delta"));
            compare(bound.value, epsilon);
            compare(bound.order, order);
            assert_eq!(shares.excess() == 0.0 || shares.excess() < 1e-100, number(row, "tau") == 0.0);
        }
    }
    println!("{} rows, worst relative deviation {worst:.1e}", rows.len());
}

#[test]
fn shares_that_do_not_count() {
    let shares = Shares {
        noise: ShareNoise::Skellam,
        honest: 4,
        share_standard_deviation: 2000.0,
        sensitivity: rounded_norm(1000.0, 4096, Some(1e-12)),
        dimension: 4096,
    };
    let at = |honest| Shares { honest, ..shares }.epsilon(1.0, 10, 1e-5).value;
    assert!(at(1) > at(3) && at(3) > at(4));
    assert_eq!(at(0), f64::INFINITY);
    assert_eq!(shares.epsilon(1.5, 10, 1e-5).value, f64::INFINITY);
    // Few grid steps of noise: sums of discrete Gaussians are no longer nearly one, and the bound says so.
    let coarse = Shares { noise: ShareNoise::DiscreteGaussian, share_standard_deviation: 0.4, ..shares };
    assert!(coarse.excess() > 1.0);
}

/// A bound that always holds, and a smaller one that a failure probability pays for.
#[test]
fn the_rounded_norm() {
    assert_eq!(rounded_norm(100.0, 64, None), 108.0);
    assert!(rounded_norm(100.0, 64, Some(1e-12)) < 108.0);
    assert!(rounded_norm(100.0, 64, Some(1e-300)) <= 108.0);
    assert_eq!(rounded_norm(100.0, 64, Some(0.0)), 108.0);
    assert_eq!(rounded_norm(100.0, 64, Some(f64::NAN)), 108.0);
}

/// Probabilities of Skellam noise by the Bessel function's series, for small variances: index i is i − `reach`.
fn skellam(variance: f64, reach: i32) -> Vec<f64> {
    let one = |k: i32| {
        let k = f64::from(k.abs());
        let ln_first = k * (variance / 2.0).ln() - libm::lgamma(k + 1.0) - variance;
        let (mut term, mut sum) = (1.0f64, 1.0f64);
        for j in 1..500 {
            let j = f64::from(j);
            term *= variance * variance / 4.0 / (j * (j + k));
            sum += term;
        }
        ln_first.exp() * sum
    };
    (-reach..=reach).map(one).collect()
}

/// ln E_b[(a/b)^α]/(α − 1).
fn renyi(a: &[f64], b: &[f64], order: u32) -> f64 {
    let alpha = f64::from(order);
    let term = |(a, b): (&f64, &f64)| (alpha * a.ln() - (alpha - 1.0) * b.ln()).exp();
    a.iter().zip(b).filter(|(a, b)| **a > 0.0 && **b > 0.0).map(term).sum::<f64>().ln() / (alpha - 1.0)
}

/// The divergence bound against the divergence itself, summed over the integers, with shifts, orders and variances where
/// noise is little or much; sampled, in both directions.
#[test]
fn the_bound_is_above_the_exact_divergence_of_shifted_noise() {
    let reach = 220;
    let (mut close, mut cases) = (0, 0);
    for variance in [0.5, 2.0, 9.0, 60.0] {
        let noise = skellam(variance, reach);
        assert!((noise.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        for shift in [1usize, 2, 5] {
            // Both without the ends that the shift takes out of the range: their mass is nothing.
            let (unmoved, moved) = (&noise[shift..], &noise[..noise.len() - shift]);
            let shares = Shares {
                noise: ShareNoise::Skellam,
                honest: 1,
                share_standard_deviation: variance.sqrt(),
                sensitivity: shift as f64,
                dimension: 1,
            };
            for order in [2, 3, 5, 9, 20] {
                let (exact, bound) = (renyi(moved, unmoved, order), shares.divergence(order));
                assert!(exact <= bound * (1.0 + 1e-9), "{variance} {shift} {order}: {exact} {bound}");
                close += u32::from(bound < 1.1 * exact);
                for rate in [0.01, 0.2, 0.7] {
                    let mixture: Vec<f64> =
                        unmoved.iter().zip(moved).map(|(p, q)| (1.0 - rate) * p + rate * q).collect();
                    let larger = renyi(&mixture, unmoved, order);
                    let smaller = renyi(unmoved, &mixture, order);
                    let bound = sampled_symmetric(|order| shares.divergence(order), order, rate);
                    assert!(smaller <= larger * (1.0 + 1e-9) + 1e-13, "{variance} {shift} {order} {rate}");
                    assert!(larger <= bound * (1.0 + 1e-9) + 1e-13, "{larger} {bound}");
                    // And with the exact divergences for the bounds it is exact.
                    let sum = sampled_symmetric(|order| renyi(moved, unmoved, order), order, rate);
                    assert!((sum / larger - 1.0).abs() < 1e-6, "{sum} {larger}");
                    cases += 1;
                }
            }
        }
    }
    assert!(cases == 180 && close > 10, "{close}");
}

/// Zhu and Wang's bound for all mechanisms is never below the one for symmetric noise, which is never below the Gaussian's.
#[test]
fn symmetric_noise_costs_less_than_the_general_bound() {
    for (deviation, rate) in [(3000.0, 0.05), (4000.0, 0.2), (1534.0, 256.0 / 6000.0)] {
        let shares = Shares {
            noise: ShareNoise::Skellam,
            honest: 1,
            share_standard_deviation: deviation,
            sensitivity: 1000.0,
            dimension: 4096,
        };
        let general = shares.epsilon(rate, 480, 1e-5).value;
        let event = event(deviation, 1, 1000.0, rate, 480);
        let symmetric = rdp::epsilon(&[event], 1e-5).value;
        let gaussian = rdp::epsilon(&[Event { noise: Noise::Gaussian, ..event }], 1e-5).value;
        println!("general {general:.4}, symmetric {symmetric:.4}, Gaussian {gaussian:.4}");
        assert!(general > symmetric && symmetric > gaussian && symmetric < 1.01 * gaussian);
    }
}

fn event(deviation: f64, shares: u32, sensitivity: f64, sampling_rate: f64, count: u64) -> Event {
    let noise = SkellamShares {
        survivors: shares + 1,
        colluders: 1,
        share_variance: deviation * deviation,
        dimension: 4096,
        scale: sensitivity,
        clip_norm: 1.0,
        rounding_failure: 0.0,
        sampler_distance: 0.0,
    };
    Event {
        noise: Noise::Skellam(noise),
        sampling_rate,
        sensitivity,
        noise_standard_deviation: f64::from(shares).sqrt() * deviation,
        count,
    }
}

/// The reference rows again, as a ledger records them.
#[test]
fn events_meet_the_reference_rows() {
    let Some(rows) = vectors("dp_reference_distributed.csv") else { return };
    for row in rows.iter().filter(|row| row["q"] == "1") {
        let grid = number(row, "gamma_grid");
        let dimension = number(row, "dim") as usize;
        let clip = number(row, "l2_clip") / grid;
        let sensitivity = rounded_norm(clip, dimension, Some((-0.5f64).exp()));
        let deviation = number(row, "local_stddev_unscaled") / grid;
        let mut event =
            event(deviation, number(row, "n_clients") as u32, sensitivity, 1.0, number(row, "rounds") as u64);
        let Noise::Skellam(shares) = &mut event.noise else { unreachable!() };
        shares.dimension = dimension as u32;
        let guarantee =
            accounting::epsilon(&[event], number(row, "delta"), Unit::Client, Accountant::Best).unwrap();
        let expected = number(row, "eps_skellam");
        assert!((guarantee.epsilon - expected).abs() < 1e-9 * expected, "{row:?}: {guarantee:?}");
        assert_eq!(guarantee.basis, Basis::Rdp { order: number(row, "order_skellam") });
        let bracket = accounting::bracket(&[event], number(row, "delta"), Unit::Client).unwrap();
        assert!(bracket.lower < expected && bracket.pld.is_none(), "{bracket:?}");
        assert!((bracket.rdp.value - expected).abs() < 1e-9 * expected);
    }
}

/// Correction 18: a hospital whose peers are all dishonest has its own share alone. Two and six shares that count.
#[test]
fn an_own_share_alone_is_worth_much_less() {
    let noise = noise_multiplier_for(2.75, 1e-5, 0.05, 300, Unit::Example, Accountant::Pld).unwrap();
    for shares in [2, 6] {
        let event = event(1000.0 * noise / f64::from(shares).sqrt(), shares, 1000.0, 0.05, 300);
        let (planned, own) = guarantees(&[event], 1e-5, Unit::Example).unwrap();
        assert!(planned.epsilon > 2.75 && planned.epsilon < 1.12 * 2.75, "{planned:?}");
        // The privacy-loss accountant's figure for Gaussian noise of the same variance is below ours, which has whole
        // orders alone to choose from: at order 2 it is half as much again.
        let gaussian = [Event { noise: Noise::Gaussian, ..event.alone() }];
        let pld = accounting::pld::epsilon(&gaussian, 1e-5).unwrap().value;
        println!("{shares} shares: {:.3}, alone {:.3} (Gaussian {pld:.3})", planned.epsilon, own.epsilon);
        assert!(own.epsilon > pld && own.epsilon < 1.6 * pld && pld > 1.6 * 2.75, "{own:?}");
        assert_eq!((own.delta, own.unit), (planned.delta, planned.unit));
    }
}

/// What fails besides is paid: for failures that are no part of delta nothing changes, for others epsilon rises to
/// that of the delta that is left, and there is none where nothing is left.
#[test]
fn failures_are_paid_from_delta() {
    let plain = event(2000.0, 3, 1000.0, 0.1, 100);
    let with = |rounding_failure: f64, sampler_distance: f64| {
        let Noise::Skellam(shares) = plain.noise else { unreachable!() };
        [Event {
            noise: Noise::Skellam(SkellamShares { rounding_failure, sampler_distance, ..shares }),
            ..plain
        }]
    };
    let at = |delta: f64| rdp::epsilon(&[plain], delta).value;
    let epsilon = |events: &[Event]| rdp::epsilon(events, 1e-5).value;
    assert!((epsilon(&with(2f64.powi(-40), 1e-30)) / at(1e-5) - 1.0).abs() < 1e-5);
    // A hundred roundings of 5e-8 are half of delta.
    assert!((epsilon(&with(5e-8, 0.0)) / at(5e-6) - 1.0).abs() < 1e-8);
    assert_eq!(epsilon(&with(2e-7, 0.0)), f64::INFINITY);
    let distance = epsilon(&with(0.0, 1e-8));
    assert!(distance > at(1e-5), "{distance}");
    let left = 1e-5 - 1e-6 * (1.0 + distance.exp());
    assert!(left > 0.0 && (distance / at(left) - 1.0).abs() < 1e-6, "{distance}");
    // Delta and epsilon are each other's inverse, failures included.
    for events in [with(5e-8, 0.0), with(0.0, 1e-8)] {
        let back = rdp::delta(&events, epsilon(&events)).value;
        assert!((back / 1e-5 - 1.0).abs() < 1e-4, "{back}");
    }
    assert_eq!(epsilon(&with(0.0, 1e-4)), f64::INFINITY);
    // An account cannot pay more failures than half of its delta, however little divergence it is charged.
    let cap = Cap::new(3.0, 1e-5).unwrap();
    let mut account = Filter::open(cap).unwrap();
    let tiny = with(1e-8, 0.0).map(|event| Event { sensitivity: 1e-3, count: 1, ..event });
    let mut charged = 0;
    while account.charge(&tiny).is_ok() {
        charged += 1;
    }
    assert!(charged > 100 && f64::from(charged) * 1e-8 <= 0.5e-5, "{charged}");
    // And what usual plans pay is hardly seen.
    let (usual, none) = (with(2f64.powi(-40), 1e-28), with(0.0, 0.0));
    let ratio = filter::cost(&usual, cap.order, cap.delta, Some(3.0))
        / filter::cost(&none, cap.order, cap.delta, None);
    assert!(ratio > 1.0 && ratio < 1.001, "{ratio}");
}

/// An account's order need not be whole: the next whole one's divergence is charged.
#[test]
fn orders_between_are_charged_as_the_next_whole_one() {
    for rate in [1.0, 0.1] {
        let event = event(2000.0, 3, 1000.0, rate, 1);
        let at = |order: f64| rdp::divergence(&event, order);
        assert_eq!(at(6.2), at(7.0));
        assert_eq!(at(1.1), at(2.0));
        assert!(at(7.0) > at(6.0));
        assert_eq!(at(1e9), f64::INFINITY);
        assert_eq!(at(1.0), f64::INFINITY);
    }
}
