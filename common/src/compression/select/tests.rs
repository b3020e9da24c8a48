//! The selection against a sort of everything.

use super::*;
use crate::rng::{Purpose, Stream};
use proptest::prelude::*;
use rand::RngExt;
use rand_distr::{Distribution, StandardNormal};

fn naive(values: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|a, b| values[*b as usize].abs().total_cmp(&values[*a as usize].abs()).then(a.cmp(b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

fn agree(values: &[f32], k: usize) {
    let expected = naive(values, k);
    for backend in Backend::available() {
        let found = top_k_with(backend, values, k).unwrap();
        assert!(found == expected, "{backend:?}, {} of {}", k, values.len());
    }
}

/// Values with many ties, zeros of both signs, denormal numbers and outliers.
fn awkward(rng: &mut Stream) -> f32 {
    match rng.random_range(0..8) {
        0 => 0.0,
        1 => -0.0,
        2 => f32::from_bits(rng.random_range(0..4)),
        3 => -f32::from_bits(rng.random_range(0..0x0080_0001)),
        4 => [0.5, -0.5, 1.0, -1.0][rng.random_range(0..4)],
        5 => f32::MAX * [1.0, -1.0, 0.5][rng.random_range(0..3)],
        _ => rng.random_range(-1.0f32..1.0),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn the_selection_is_that_of_a_sort(length in 0usize..20_000, share in 0.0f64..1.2, steep in 1i32..10, seed: u64) {
        let mut rng = Stream::new(seed, Purpose::Shuffle, 0, "");
        let values: Vec<f32> = (0..length).map(|_| awkward(&mut rng)).collect();
        agree(&values, (share.powi(steep) * length as f64) as usize);
    }
}

#[test]
fn extremes() {
    agree(&[], 0);
    agree(&[], 3);
    agree(&[-0.0], 1);
    agree(&[0.0, -0.0, f32::from_bits(1)], 1);
    agree(&[1.0, -1.0, 1.0, -1.0], 2);
    for length in [4095, 4096, 4097, 40_001] {
        for k in [0, 1, 2, 15, 16, 17, length / 2, length - 1, length, length + 1] {
            agree(&vec![-0.25; length], k);
            agree(&(0..length).map(|at| (at * 31 % 1000) as f32).collect::<Vec<_>>(), k);
        }
    }
}

/// A sample of a long vector, of each shape that a model's update may have.
#[test]
fn long_vectors() {
    let mut rng = Stream::new(3, Purpose::Shuffle, 0, "");
    let length = 1_200_000;
    let normal: Vec<f32> = (0..length).map(|_| StandardNormal.sample(&mut rng)).collect();
    let layers: Vec<f32> =
        normal.iter().enumerate().map(|(at, value)| value * 0.1f32.powi(at as i32 / 200_000)).collect();
    let embedding: Vec<f32> =
        normal.iter().enumerate().map(|(at, value)| if at % 977 < 3 { *value } else { 0.0 }).collect();
    for k in [1, 100, 1_200, 12_000, 120_000, 700_000, length - 1] {
        agree(&normal, k);
        agree(&layers, k);
        agree(&embedding, k);
    }
}

/// The sampled places all hold large values and no other does: the threshold keeps too few, and the margin widens.
#[test]
fn a_sample_that_misleads_costs_time_alone() {
    let length = 200_000;
    let size = length / SAMPLED_ONE_IN;
    let mut values: Vec<f32> = (0..length).map(|at| (at % 100) as f32 * 1e-3).collect();
    for part in 0..size {
        let (start, end) = (part * length / size, (part + 1) * length / size);
        let hash = (part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        values[start + ((hash * (end - start) as u64) >> 32) as usize] = 5.0;
    }
    let (low, _) = thresholds(&values, 20_000, MARGIN_DEVIATIONS);
    assert_eq!(low, key(5.0), "the test does not mislead");
    agree(&values, 20_000);
    // And the other way: none of the large ones is seen.
    let values: Vec<f32> = values.iter().map(|value| if *value == 5.0 { 0.0 } else { 1.0 + value }).collect();
    agree(&values, 20_000);
}

#[test]
fn the_first_value_that_is_no_number_is_named() {
    for length in [100, 5_000, 100_000] {
        for unfit in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for k in [0, 1, length / 10, length] {
                let mut values = vec![1.0; length];
                (values[length - 1], values[length / 3]) = (f32::INFINITY, unfit);
                for backend in Backend::available() {
                    assert_eq!(top_k_with(backend, &values, k).unwrap_err().index, length / 3);
                }
            }
        }
    }
}
