//! The schemes as a whole: what the receiver gets, how long it is, and that rounding has no bias.

use super::*;
use crate::rng::{Purpose, Stream};
use proptest::prelude::*;
use rand::RngExt;
use rand_distr::{Distribution, StandardNormal};

pub(super) fn stream(seed: u64) -> Stream {
    Stream::new(seed, Purpose::Shuffle, 0, "")
}

fn normal(length: usize, seed: u64) -> Vec<f32> {
    let mut rng = stream(seed);
    (0..length).map(|_| Distribution::<f32>::sample(&StandardNormal, &mut rng) * 0.01).collect()
}

pub(super) fn any_scheme() -> impl Strategy<Value = Scheme> {
    let codec =
        prop::sample::select(&[ValueCodec::F32, ValueCodec::Bf16, ValueCodec::Int8, ValueCodec::Sign][..]);
    let density = prop_oneof![Just(1.0), 0.0005..0.02, 0.02..1.0];
    prop_oneof![
        Just(Scheme::Dense),
        Just(Scheme::Int8),
        prop_oneof![1u16..300, Just(32_767)].prop_map(|levels| Scheme::Qsgd { levels }),
        (density, codec).prop_map(|(density, values)| Scheme::TopK { density, values }),
    ]
}

fn awkward(length: usize, seed: u64) -> Vec<f32> {
    let mut rng = stream(seed);
    let value = |rng: &mut Stream| match rng.random_range(0..7) {
        0 => 0.0,
        1 => -0.0,
        2 => f32::from_bits(rng.random_range(0..70_000)),
        3 => 16_384.0,
        4 => -0.5,
        _ => rng.random_range(-1.0f32..1.0),
    };
    let zeros = rng.random_range(0..4) == 0;
    (0..length).map(|_| if zeros { 0.0 } else { value(&mut rng) }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// The sender knows bit for bit what the receiver gets, and how long it is at most.
    #[test]
    fn every_scheme_comes_back(scheme in any_scheme(), length in 0usize..5_000, seed: u64) {
        let update = awkward(length, seed);
        let Encoded { bytes, received } = scheme.encode(&update, &mut stream(seed)).unwrap();
        let decoded = scheme.decode(&bytes, length).unwrap();
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
        prop_assert_eq!(bits(&decoded), bits(&received));
        prop_assert!(bytes.len() <= scheme.most_bytes(length));
        prop_assert!(scheme.exact_bytes(length).is_none_or(|exact| exact == bytes.len()));

        let sparse = scheme.decode_sparse(&bytes, length).unwrap();
        prop_assert_eq!(sparse.indices.len(), scheme.kept(length));
        prop_assert_eq!(bits(&sparse.to_dense()), bits(&decoded));
        let mut sum = vec![1.0; length];
        sparse.add_to(&mut sum);
        prop_assert!(sum.iter().zip(&decoded).all(|(sum, value)| *sum == 1.0 + value));
        // The same coins give the same bytes.
        prop_assert_eq!(scheme.encode(&update, &mut stream(seed)).unwrap().bytes, bytes);
    }

    /// What a value may lose: nothing, half a unit in the last place, or a step of its block.
    #[test]
    fn rounding_moves_a_value_by_less_than_a_step(levels in 1u16..2_000, length in 1usize..700, seed: u64) {
        let update = awkward(length, seed);
        let received = Scheme::Qsgd { levels }.encode(&update, &mut stream(seed)).unwrap().received;
        for (values, received) in update.chunks(256).zip(received.chunks(256)) {
            let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            // The step is a bf16, so up to 1/128 larger than its quotient; the least denormal bf16 is 2^-133.
            let step = largest / f32::from(levels) * (1.0 + 1.0 / 128.0) + 2f32.powi(-133);
            for (value, received) in values.iter().zip(received) {
                prop_assert!((value - received).abs() <= step * 1.0001, "{value} {received} {step}");
                prop_assert!(value * received >= 0.0);
            }
        }
        let scheme = Scheme::TopK { density: 1.0, values: ValueCodec::Bf16 };
        let received = scheme.encode(&update, &mut stream(seed)).unwrap().received;
        for (value, received) in update.iter().zip(received) {
            prop_assert!((value - received).abs() <= value.abs() / 256.0 + 2f32.powi(-134), "{value} {received}");
        }
    }
}

#[test]
fn top_k_sends_the_largest_and_nothing_else() {
    let mut update = normal(30_000, 1);
    update[7] = -3.0;
    for (values, exact) in [(ValueCodec::F32, true), (ValueCodec::Sign, false)] {
        let scheme = Scheme::TopK { density: 0.01, values };
        let received = scheme.encode(&update, &mut stream(0)).unwrap().received;
        let mut order: Vec<usize> = (0..update.len()).collect();
        order.sort_by(|a, b| update[*b].abs().total_cmp(&update[*a].abs()));
        let mean = order[..300].iter().map(|at| f64::from(update[*at].abs())).sum::<f64>() / 300.0;
        for (rank, at) in order.into_iter().enumerate() {
            let sent = if exact { update[at] } else { mean as f32 * update[at].signum() };
            let expected = if rank < 300 { sent } else { 0.0 };
            assert!((received[at] - expected).abs() < 1e-6, "rank {rank}: {} {expected}", received[at]);
        }
    }
}

/// Over many roundings of one update the mean of what is received is the update, within five deviations of a mean.
#[test]
fn stochastic_rounding_has_no_bias() {
    let update = normal(700, 2);
    let rounds = 4_000;
    for scheme in [
        Scheme::Int8,
        Scheme::Qsgd { levels: 1 },
        Scheme::Qsgd { levels: 7 },
        Scheme::TopK { density: 1.0, values: ValueCodec::Int8 },
    ] {
        let levels = if let Scheme::Qsgd { levels } = scheme { levels } else { 127 };
        let mut sums = vec![0f64; update.len()];
        let mut rng = stream(3);
        for _ in 0..rounds {
            let received = scheme.encode(&update, &mut rng).unwrap().received;
            sums.iter_mut().zip(received).for_each(|(sum, value)| *sum += f64::from(value));
        }
        let (mut all, mut steps) = (0.0, 0.0);
        for (block, values) in update.chunks(256).enumerate() {
            let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            let step = f64::from(largest) / f64::from(levels) * (1.0 + 1.0 / 128.0);
            for (at, value) in values.iter().enumerate() {
                let error = sums[block * 256 + at] / f64::from(rounds) - f64::from(*value);
                // The deviation of one rounding is at most half a step.
                let tolerance = 5.0 * 0.5 * step / f64::from(rounds).sqrt();
                assert!(error.abs() <= tolerance, "{scheme:?}, value {value}: {error} beyond {tolerance}");
                all += error;
                steps += step * step / 4.0;
            }
        }
        // And all together, where a small common bias would show.
        let tolerance = 5.0 * (steps / f64::from(rounds)).sqrt();
        assert!(all.abs() <= tolerance, "{scheme:?}: {all} beyond {tolerance}");
    }
}

/// With error feedback, what was received and what is kept add up to all that was wanted.
#[test]
fn error_feedback_loses_nothing() {
    use super::residual::{Outcome, ResidualJournal, unsent};
    use crate::digest::Digest;

    let scheme = Scheme::TopK { density: 0.05, values: ValueCodec::Int8 };
    let (parameters, lineage) = (2_000, Digest([0; 32]));
    let mut journal = ResidualJournal::new(parameters);
    let (mut wanted, mut model) = (vec![0f64; parameters], vec![0f64; parameters]);
    for round in 1..=40 {
        let mut delta = normal(parameters, u64::from(round));
        let accepted = round % 5 != 0;
        if accepted {
            wanted.iter_mut().zip(&delta).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        journal.add_kept(round, lineage, &mut delta).unwrap();
        let Encoded { bytes, received } = scheme.encode(&delta, &mut stream(u64::from(round))).unwrap();
        journal.write_pending(round, lineage, Digest::of(&bytes), unsent(&delta, &received), None).unwrap();
        journal = ResidualJournal::from_bytes(&journal.to_bytes(), parameters).unwrap();
        if accepted {
            model.iter_mut().zip(&received).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        journal.settle(round, if accepted { Outcome::Accepted } else { Outcome::NotAccepted }).unwrap();
        if accepted && round < 5 {
            let mut kept = vec![0.0; parameters];
            journal.add_kept(round + 1, lineage, &mut kept).unwrap();
            for ((wanted, model), kept) in wanted.iter().zip(&model).zip(kept) {
                assert!((wanted - model - f64::from(kept)).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn impossible_schemes_and_unfit_updates_are_refused() {
    let top = |density| Scheme::TopK { density, values: ValueCodec::Bf16 };
    for density in [0.0, -0.1, 1.1, f64::NAN, f64::INFINITY] {
        assert!(top(density).check(10).is_err(), "{density}");
    }
    assert!(top(0.1).check(1 << 33).is_err());
    assert!(Scheme::Int8.check(1 << 33).is_ok());
    for levels in [0, 32_768] {
        assert!(Scheme::Qsgd { levels }.check(10).is_err());
        assert!(Scheme::Qsgd { levels }.decode(&[0; 100], 10).is_err());
    }
    for unfit in [f32::NAN, f32::INFINITY, 16_385.0] {
        for scheme in [Scheme::Dense, top(0.5), Scheme::Int8] {
            let refused = scheme.encode(&[0.0, unfit], &mut stream(0));
            assert!(matches!(refused, Err(EncodeError::Update(_))), "{scheme:?} {unfit}");
        }
    }
    assert_eq!([0, 1, 28, 100, 26_010].map(|parameters| top(0.01).kept(parameters)), [0, 1, 1, 1, 260]);
}

/// A second implementation is held to these bytes: `docs/compression.md`.
#[test]
fn containers_are_frozen() {
    let update: Vec<f32> = (0..40).map(|at| ((at * 37 % 40) as f32 - 19.5) / 16.0).collect();
    let hex = |scheme: Scheme| {
        let bytes = scheme.encode(&update, &mut stream(9)).unwrap().bytes;
        bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let top = |values| Scheme::TopK { density: 0.1, values };
    assert_eq!(hex(top(ValueCodec::F32)), FROZEN[0]);
    assert_eq!(hex(top(ValueCodec::Bf16)), FROZEN[1]);
    assert_eq!(hex(top(ValueCodec::Int8)), FROZEN[2]);
    assert_eq!(hex(top(ValueCodec::Sign)), FROZEN[3]);
    assert_eq!(hex(Scheme::Qsgd { levels: 3 }), FROZEN[4]);
}
const FROZEN: [&str; 5] = [""; 5];

/// Every lie that a header can tell, and a plane that is a little wrong.
#[test]
fn lies_are_refused_by_name() {
    let update = normal(3_000, 4);
    let scheme = Scheme::TopK { density: 0.01, values: ValueCodec::Int8 };
    let good = scheme.encode(&update, &mut stream(0)).unwrap().bytes;
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        scheme.decode(&bytes, 3_000).unwrap_err().to_string()
    };
    assert!(refused(&|bytes| bytes[0] = b'X').contains("do not begin like"));
    assert!(refused(&|bytes| bytes[4] = 2).contains("version 2"));
    assert!(refused(&|bytes| bytes[5] = 0).contains("selection = 0"));
    assert!(refused(&|bytes| bytes[6] = 1).contains("value codec = 1"));
    assert!(refused(&|bytes| bytes[7] = 0).contains("Rice parameter = 0"));
    assert!(refused(&|bytes| bytes[12] = 1).contains("reserved"));
    assert!(refused(&|bytes| bytes[23] = 0xff).contains("parameters ="));
    assert!(refused(&|bytes| bytes[24] = 31).contains("coordinates sent = 31"));
    assert!(refused(&|bytes| bytes.truncate(31)).contains("32 are needed"));
    assert!(refused(&|bytes| bytes.truncate(50)).contains("values has"));
    assert!(refused(&|bytes| bytes.extend([0; 400])).contains("are needed"));
    let values = good.len() - 32;
    assert!(refused(&|bytes| bytes[values..values + 2].fill(0xff)).contains("scale"));
    assert!(refused(&|bytes| bytes[values + 2] = 255).contains("beyond the levels"));
    assert!(scheme.decode(&good, 3_001).is_err());
    assert!(Scheme::Int8.decode(&good, 3_000).is_err());
    let dense = Scheme::Dense.encode(&[1.0; 2], &mut stream(0)).unwrap().bytes;
    let mut unfit = dense.clone();
    unfit[36..40].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(
        Scheme::Dense.decode(&unfit, 2).unwrap_err().to_string().contains("value 1: not a finite number")
    );
}
