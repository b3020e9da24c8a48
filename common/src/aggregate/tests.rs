//! What a round relies on: the exact mean whatever the order, and no trace of an update that is not fit.

use proptest::prelude::*;

use super::*;

fn contribution(client: usize, delta: &[f32], examples: u64) -> Contribution {
    let client = format!("client-{client}").parse().unwrap();
    Contribution::new(client, examples, Arc::new(delta.to_vec()), delta.len()).unwrap()
}

#[test]
fn fixed_point_rounds_ties_to_even() {
    let unit = 2f32.powi(-32);
    for (value, expected) in [
        (unit, 1),
        (unit * 0.5, 0),
        (unit * 1.5, 2),
        (unit * 2.5, 2),
        (-unit * 1.5, -2),
        (16_384.0, 1 << 46),
        (-16_384.0, -(1 << 46)),
    ] {
        assert_eq!(kernel::fixed_point(value), expected);
    }
}

#[test]
fn an_average_is_the_weighted_mean() {
    let mut sum = Accumulator::new(2);
    sum.add(&[1.0, -2.0], 1).unwrap();
    sum.add(&[4.0, 1.0], 2).unwrap();
    assert_eq!(sum.average_onto(&[10.0, 10.0]).unwrap(), [13.0, 10.0]);
}

#[test]
fn unfit_updates_are_refused_and_leave_no_trace() {
    let mut sum = Accumulator::new(2);
    sum.add(&[0.5, 0.5], 3).unwrap();
    for (bad, weight) in [
        (vec![0.0, f32::NAN], 1),
        (vec![f32::INFINITY, 0.0], 1),
        (vec![0.0, 16_385.0], 1),
        (vec![0.0], 1),
        (vec![0.0, 0.0], 0),
        (vec![0.0, 0.0], EXAMPLES_PER_UPDATE + 1),
    ] {
        assert!(sum.add(&bad, weight).is_err(), "{bad:?} {weight}");
        let client = "a".parse().unwrap();
        assert!(Contribution::new(client, weight, Arc::new(bad.clone()), 2).is_err(), "{bad:?} {weight}");
    }
    let good = contribution(0, &[1.0, 1.0], 1);
    assert!(sum.add_all(&[good, contribution(1, &[1.0], 1)]).is_err());
    assert_eq!(sum.updates(), 1);
    assert_eq!(sum.average_onto(&[0.0, 0.0]).unwrap(), [0.5, 0.5]);
    assert_eq!(Accumulator::new(1).average_onto(&[0.0]), Err(AggregateError::Empty));
}

/// One bad value anywhere in a vector of any length, in whatever way it is walked through.
#[test]
fn a_bad_coordinate_is_found_wherever_it_stands() {
    for length in [1, 15, 16, 17, 40] {
        let good: Vec<f32> = (0..length).map(|at| at as f32 - 7.5).collect();
        let expected = good.iter().map(|value| value.abs()).fold(0.0, f32::max);
        assert_eq!(check(&good), Ok(expected));
        for at in 0..length {
            for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut bad = good.clone();
                bad[at] = value;
                let error = check(&bad).unwrap_err();
                assert!(matches!(error, AggregateError::NotFinite { index, .. } if index == at), "{error}");
            }
            let mut bad = good.clone();
            bad[at] = -16_385.0;
            assert_eq!(check(&bad), Err(AggregateError::TooLarge { index: at, value: -16_385.0 }));
        }
    }
}

#[test]
fn an_absurd_model_is_not_published() {
    for model in [f32::NAN, f32::INFINITY, 2e8] {
        assert!(matches!(check_model(&[model], 1), Err(AggregateError::ModelNorm(_))));
    }
    assert_eq!(check_model(&[1.0], 2), Err(AggregateError::WrongLength { expected: 2, found: 1 }));
    assert_eq!(check_model(&[1.0, 2.0], 2), Ok(()));
}

#[test]
fn the_mean_forgets_an_attempt_that_came_to_nothing() {
    let mut rule = WeightedMean::default();
    rule.begin(1, 1);
    // More than it holds back, so that some were summed and some were not.
    for client in 0..21 {
        rule.add(contribution(client, &[5.0], 9));
    }
    rule.begin(1, 1);
    rule.add(contribution(0, &[1.0], 1));
    assert_eq!(rule.finish(&[1.0]), Ok(vec![2.0]));
    rule.begin(2, 1);
    assert_eq!(rule.finish(&[1.0]), Err(AggregateError::Empty));
    rule.begin(3, 2);
    rule.add(contribution(0, &[1.0], 1));
    assert_eq!(rule.finish(&[1.0, 1.0]), Err(AggregateError::WrongLength { expected: 2, found: 1 }));
}

/// The sum as its definition says: one wide integer per coordinate.
fn plainly(updates: &[(Vec<f32>, u64)], model: &[f32]) -> Vec<f32> {
    let weight: u128 = updates.iter().map(|(_, weight)| u128::from(*weight)).sum();
    let fixed = |value: f32| (f64::from(value) * 2f64.powi(32)).round_ties_even() as i128;
    let sum = |at: usize| updates.iter().map(|(delta, weight)| fixed(delta[at]) * i128::from(*weight)).sum();
    let step = |(at, old): (usize, &f32)| {
        let sum: i128 = sum(at);
        (f64::from(*old) + sum as f64 / (weight as f64 * 2f64.powi(32))) as f32
    };
    model.iter().enumerate().map(step).collect()
}

/// Weights and coordinates of every size: those that are summed in `f64`, in 64 and in 128 bits.
fn updates() -> impl Strategy<Value = Vec<(Vec<f32>, u64)>> {
    let weight = prop_oneof![1u64..2000, 1u64..=EXAMPLES_PER_UPDATE, Just(EXAMPLES_PER_UPDATE)];
    let scale = prop_oneof![Just(1e-9f32), Just(1e-3), Just(1.0), Just(16_384.0)];
    let delta = (prop::collection::vec(-1f32..=1.0, 5), scale)
        .prop_map(|(delta, scale)| delta.into_iter().map(|value| value * scale).collect::<Vec<f32>>());
    prop::collection::vec((delta, weight), 1..24)
}

proptest! {
    #[test]
    fn any_order_and_any_split_gives_the_same_bits(updates in updates(), cut in 0usize..24) {
        let model = [0.25f32; 5];
        let expected = plainly(&updates, &model);
        let (mut forward, mut together, mut rule) = (Accumulator::new(5), Accumulator::new(5), WeightedMean::default());
        let (mut left, mut right) = (Accumulator::new(5), Accumulator::new(5));
        rule.begin(1, 5);
        let contributions: Vec<Contribution> =
            updates.iter().enumerate().map(|(index, (delta, weight))| contribution(index, delta, *weight)).collect();
        for (index, (delta, weight)) in updates.iter().enumerate() {
            forward.add(delta, *weight).unwrap();
            if index < cut { left.add(delta, *weight).unwrap() } else { right.add(delta, *weight).unwrap() }
        }
        let (first, second) = contributions.split_at(cut.min(contributions.len()));
        together.add_all(second).unwrap();
        together.add_all(first).unwrap();
        for contribution in contributions.iter().rev() {
            rule.add(contribution.clone());
        }
        left.merge(&right).unwrap();
        prop_assert_eq!(&expected, &forward.average_onto(&model).unwrap());
        prop_assert_eq!(&expected, &together.average_onto(&model).unwrap());
        prop_assert_eq!(&expected, &left.average_onto(&model).unwrap());
        prop_assert_eq!(&expected, &rule.finish(&model).unwrap());
        prop_assert_eq!(left.updates() as usize, updates.len());
    }

    /// Longer than a block, and not a whole number of them.
    #[test]
    fn long_updates_add_as_short_ones(seed in 0u32..1000, count in 1usize..8) {
        let length = 5000;
        let value = |at: usize, client: usize| {
            let mixed = (at as u32 * 7 + client as u32 * 13).wrapping_mul(2_654_435_761 ^ seed);
            mixed as f32 / u32::MAX as f32 - 0.5
        };
        let updates: Vec<(Vec<f32>, u64)> = (0..count)
            .map(|client| ((0..length).map(|at| value(at, client)).collect(), client as u64 * 600 + 1))
            .collect();
        let mut sum = Accumulator::new(length);
        let contributions: Vec<Contribution> =
            updates.iter().enumerate().map(|(index, (delta, weight))| contribution(index, delta, *weight)).collect();
        sum.add_all(&contributions).unwrap();
        let model = vec![0.1; length];
        prop_assert_eq!(sum.average_onto(&model).unwrap(), plainly(&updates, &model));
    }
}
