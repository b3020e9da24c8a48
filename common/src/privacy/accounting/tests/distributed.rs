//! Noise in shares.

use super::{number, vectors};
use crate::privacy::accounting::distributed::{ShareNoise, Shares, rounded_norm};

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
