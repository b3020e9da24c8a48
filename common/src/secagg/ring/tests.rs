//! Widths, packing, fixed point.

use proptest::prelude::*;

use super::*;
use crate::secagg::mask::KeyStream;

fn width(bits: u32) -> Width {
    Width::new(bits).unwrap()
}

/// Integers that fit, the largest and smallest among them.
fn integers(width: Width, count: usize, seed: u64) -> Vec<i64> {
    let mix = |at: u64| {
        let mut word = at.wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word ^= word >> 29;
        word.wrapping_mul(0xbf58_476d_1ce4_e5b9)
    };
    let value = |at: u64| match mix(at) % 9 {
        0 => width.largest(),
        1 => -width.largest(),
        2 => -1,
        _ => (mix(at ^ 77) as i64) >> (64 - width.bits()),
    };
    (0..count as u64).map(value).map(|value| value.max(-width.largest())).collect()
}

/// The packed form, bit by bit.
fn bits(width: Width, values: &[i64]) -> Vec<u8> {
    let mut packed = vec![0u8; (values.len() * width.bits() as usize).div_ceil(8)];
    for (at, value) in values.iter().enumerate() {
        for bit in 0..width.bits() as usize {
            let place = at * width.bits() as usize + bit;
            packed[place / 8] |= ((value >> bit & 1) as u8) << (place % 8);
        }
    }
    packed
}

#[test]
fn every_width_is_packed_and_read_back() {
    for bits_each in 2..=64 {
        let width = width(bits_each);
        // Around one and two groups of 256, 128 and 64 integers, and next to nothing.
        for count in [0, 1, 2, 3, 5, 7, 8, 31, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513, 700] {
            let values = integers(width, count, u64::from(bits_each));
            let vector = RingVector::from_signed(width, &values).unwrap();
            let packed = vector.pack().unwrap();
            assert_eq!(packed, bits(width, &values), "{bits_each} bits, {count} integers");
            let read = RingVector::unpack(width, count, &packed).unwrap();
            assert!(read.signed().eq(values.iter().copied()), "{bits_each} bits, {count} integers");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_integers_are_packed_and_read_back(bits_each in 2..=64u32, count in 0..900usize, seed in any::<u64>()) {
        let width = width(bits_each);
        let values = integers(width, count, seed);
        let packed = RingVector::from_signed(width, &values).unwrap().pack().unwrap();
        prop_assert_eq!(&packed, &bits(width, &values));
        let mut sum = RingVector::from_signed(width, &values).unwrap();
        sum.add_packed(&packed).unwrap();
        let twice = values.iter().map(|value| width.signed(value.wrapping_mul(2) as u64));
        prop_assert!(sum.signed().eq(twice));
    }

    /// What an unfriendly client sends is refused or read, and what is read packs to the same bytes.
    #[test]
    fn any_bytes_are_refused_or_are_a_packed_form(
        bits_each in 2..=64u32, count in 0..300usize, bytes in prop::collection::vec(any::<u8>(), 0..400), fit in any::<bool>(),
    ) {
        let width = width(bits_each);
        let needed = width.packed_bytes(count).unwrap();
        let mut bytes = bytes;
        if fit {
            bytes.resize(needed, 0xff);
        }
        match RingVector::unpack(width, count, &bytes) {
            Ok(vector) => prop_assert_eq!(vector.pack().unwrap(), bytes),
            Err(RingError::Length { found, expected, .. }) => {
                prop_assert!(found == bytes.len() && expected == needed && found != expected);
            }
            Err(RingError::Trailing) => {
                let over = needed * 8 - count * bits_each as usize;
                prop_assert!(bytes.len() == needed && over > 0 && bytes.last().unwrap() >> (8 - over) != 0);
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}

#[test]
fn hostile_lengths_and_trailing_bits_are_refused() {
    let width = width(11);
    let vector = RingVector::from_signed(width, &[1, -2, 3]).unwrap();
    let packed = vector.pack().unwrap();
    assert_eq!(packed.len(), 5);
    let mut sum = RingVector::zeros(width, 3);
    for wrong in [&packed[..4], &[packed.as_slice(), &[0]].concat(), &[]] {
        assert!(matches!(sum.add_packed(wrong), Err(RingError::Length { expected: 5, .. })));
    }
    for bit in 1..8 {
        let mut wrong = packed.clone();
        wrong[4] |= 1 << bit;
        assert_eq!(sum.add_packed(&wrong), Err(RingError::Trailing));
    }
    assert!(sum.signed().all(|value| value == 0), "nothing was added");
    assert!(matches!(RingVector::unpack(width, usize::MAX, &packed), Err(RingError::TooLong { .. })));
}

/// The table of value bits and clients: b = v + ⌈log₂ n⌉.
#[test]
fn the_smallest_width_that_never_wraps() {
    let bits = |clients, value_bits| Fixed::new(value_bits, 1.0).unwrap().width(clients).unwrap().bits();
    for (clients, expected) in [
        (10, [8, 10, 12, 14, 16, 20, 24, 26]),
        (100, [11, 13, 15, 17, 19, 23, 27, 29]),
        (1000, [14, 16, 18, 20, 22, 26, 30, 32]),
        (10_000, [18, 20, 22, 24, 26, 30, 34, 36]),
    ] {
        assert_eq!([4, 6, 8, 10, 12, 16, 20, 22].map(|value_bits| bits(clients, value_bits)), expected);
    }
    for (clients, bound) in [(1, 1), (3, 7), (9, 127), (10, 12_345), (4096, 2_097_151), (65_537, 65_535)] {
        let width = Width::of_sum(clients, bound).unwrap();
        assert!(width.check_sum(clients, bound).is_ok());
        let narrower = Width::new(width.bits() - 1).and_then(|width| width.check_sum(clients, bound));
        assert!(narrower.is_err(), "{clients} clients, {bound}");
    }
    assert_eq!(Width::of_sum(1, i64::MAX as u64).map(Width::bits), Ok(64));
    assert!(matches!(Width::of_sum(2, i64::MAX as u64), Err(RingError::TooWide { .. })));
    assert!(matches!(Width::of_sum(u64::MAX, u64::MAX), Err(RingError::TooWide { .. })));
    assert_eq!([1, 65, 0].map(|bits| Width::new(bits).is_err()), [true; 3]);
}

/// At the very edge sums are right; one client more is refused.
#[test]
fn sums_of_extremes_never_wrap() {
    for value_bits in [2, 8, 12, 16, 22] {
        let fixed = Fixed::new(value_bits, 1.0).unwrap();
        let bound = u64::from(fixed.bound());
        for bits in 2..=40 {
            let width = width(bits);
            let Some(clients) = (width.largest() as u64).checked_div(bound).filter(|clients| *clients > 0)
            else {
                continue;
            };
            assert!(width.check_sum(clients, bound).is_ok());
            assert!(width.check_sum(clients + 1, bound).is_err());
            let sum = (clients * bound) as i64;
            let lanes = RingVector::from_signed(width, &[sum, -sum]).unwrap();
            assert!(lanes.signed().eq([sum, -sum]));
        }
    }
    let width = width(8);
    assert!(RingVector::from_signed(width, &[127, -127]).is_ok());
    assert_eq!(
        RingVector::from_signed(width, &[0, -128]).err(),
        Some(RingError::Range { at: 1, value: -128, bits: 8 })
    );
    assert!(RingVector::from_signed(width, &[i64::MIN]).is_err());
}

fn coins(seed: u8) -> KeyStream {
    KeyStream::new(Backend::best(), &MaskKey { key: [seed; 16], iv: [9; 12] })
}

/// ⌊(w/W)·x·s + u⌋ in integers of 128 bits.
fn rounded(fixed: &Fixed, weight: Weight, value: f32, coin: u32) -> i64 {
    let limit = fixed.coordinate_limit();
    let scale = (fixed.scale() * f64::from(weight.parts()) / f64::from(weight.most())) as f32;
    let exact = f64::from(value.clamp(-limit, limit) * scale);
    // A float of at most 22 bits before the point, in units of 2^-80.
    let units = (exact * 2f64.powi(80)) as i128;
    let coin = i128::from(coin >> 8) << (80 - 24);
    let bound = i64::from(fixed.bound());
    (((units + coin) >> 80) as i64).clamp(-bound, bound)
}

#[test]
fn updates_are_rounded_as_defined() {
    let weights = [Weight::ONE, Weight::new(1, 1024).unwrap(), Weight::new(777, 1024).unwrap()];
    for value_bits in [2, 3, 8, 12, 16, 22] {
        for (limit, weight) in [1.0f32, 0.37, 1e-3, 250.0].into_iter().zip(weights.into_iter().cycle()) {
            let fixed = Fixed::new(value_bits, limit).unwrap();
            // Within the limit, beyond it, at it, on integers, next to nothing. A step next to zero is below 2^-24.
            let value = |at: usize| match at % 11 {
                0 => limit,
                1 => -limit,
                2 => limit * 1.5,
                3 => -limit * 1.01,
                4 => 0.0,
                5 => (at as f64 / fixed.scale()) as f32 % limit,
                _ => limit * (at as f32 * 0.618_034).sin(),
            };
            let values: Vec<f32> = (0..5000).map(value).collect();
            let width = fixed.width(10).unwrap();
            let encoded = fixed.encode(width, &values, weight, &mut coins(3)).unwrap();
            assert_eq!(encoded.clipped, values.iter().filter(|value| value.abs() > limit).count());
            let mut words = vec![0; values.len()];
            coins(3).fill(&mut words).unwrap();
            for ((value, coin), integer) in values.iter().zip(words).zip(encoded.vector.signed()) {
                assert_eq!(
                    integer,
                    rounded(&fixed, weight, *value, coin),
                    "{value} at {value_bits} bits, {limit}, coin {coin}"
                );
            }
        }
    }
}

/// The mean over many coins is x·s, also where a careless sum in `f32` would shift it.
#[test]
fn rounding_is_right_on_average() {
    const DRAWS: usize = 1 << 20;
    for (value_bits, value) in
        [(8u32, 0.3003f32), (8, -0.7), (16, 0.9), (16, -0.123_4), (20, 0.77), (22, -0.501)]
    {
        let fixed = Fixed::new(value_bits, 1.0).unwrap();
        let exact = f64::from(value * fixed.scale() as f32);
        let width = fixed.width(1).unwrap();
        let encoded =
            fixed.encode(width, &vec![value; DRAWS], Weight::ONE, &mut coins(value_bits as u8)).unwrap();
        let mean = encoded.vector.signed().map(|q| q as f64 - exact).sum::<f64>() / DRAWS as f64;
        // A coin's standard deviation is at most a half.
        assert!(mean.abs() < 4.0 * 0.5 / (DRAWS as f64).sqrt(), "{value} at {value_bits} bits: {mean} off");
    }
}

/// In one pass or step by step, by any back end: the same bytes.
#[test]
fn one_pass_is_three_steps() {
    let keys: Vec<MaskKey> = (0..5).map(|at| MaskKey { key: [at; 16], iv: [at + 9; 12] }).collect();
    let terms = || keys.iter().zip([Sign::Add, Sign::Subtract, Sign::Subtract].into_iter().cycle());
    let weight = Weight::new(3, 4).unwrap();
    let fixed = Fixed::new(9, 0.5).unwrap();
    for bits in [9, 15, 16, 17, 23, 32, 33, 50, 64] {
        let width = width(bits);
        for count in [0, 1, 9, 2047, 2048, 2049, 4096, 8192, 8193, 20_011] {
            let values: Vec<f32> = (0..count).map(|at| (at as f32 * 0.7).sin()).collect();
            let steps = fixed.encode(width, &values, weight, &mut coins(1)).unwrap();
            let mut vector = steps.vector;
            vector.mask(terms(), NonZeroUsize::MIN).unwrap();
            for backend in Backend::available() {
                let pass = fixed.encode_masked_by(backend, width, &values, weight, &mut coins(1), terms());
                let pass = pass.unwrap();
                assert!(pass.packed == vector.pack().unwrap(), "{bits} bits, {count}, {}", backend.name());
                assert_eq!(pass.clipped, steps.clipped);
            }
        }
    }
    let mut strange = vec![0.25; 9000];
    strange[8999] = f32::NAN;
    let refused = fixed.encode_masked(width(16), &strange, weight, &mut coins(1), terms());
    assert_eq!(refused.err(), Some(RingError::NotFinite(8999)));
}

#[test]
fn sums_become_means() {
    let fixed = Fixed::new(16, 2.0).unwrap();
    let width = fixed.width(3).unwrap();
    let values = [[1.5f32, -0.25, 0.0], [0.5, 2.0, -2.0], [-1.0, 1.0, 0.001]];
    let parts = [1024, 512, 256];
    let mut sum = RingVector::zeros(width, 3);
    for (at, (values, parts)) in values.iter().zip(parts).enumerate() {
        let weight = Weight::new(parts, 1024).unwrap();
        let encoded = fixed.encode(width, values, weight, &mut coins(at as u8)).unwrap();
        sum.add(&encoded.vector).unwrap();
    }
    let total = parts.iter().sum::<u32>();
    let divisor = f64::from(total) / 1024.0;
    for (at, mean) in fixed.decode(sum.signed(), divisor).enumerate() {
        let exact: f32 = values.iter().zip(parts).map(|(values, parts)| values[at] * parts as f32).sum();
        assert!((mean - exact / total as f32).abs() < 3.0 / (fixed.scale() * divisor) as f32, "{at}: {mean}");
    }
}

#[test]
fn what_cannot_be_encoded_is_refused() {
    let fixed = Fixed::new(8, 1.0).unwrap();
    let width8 = width(8);
    for (strange, at) in [(f32::NAN, 0), (f32::INFINITY, 17), (f32::NEG_INFINITY, 4000)] {
        let mut values = vec![0.5; 4001];
        values[at] = strange;
        let refused = fixed.encode(width8, &values, Weight::ONE, &mut coins(1));
        assert_eq!(refused.err(), Some(RingError::NotFinite(at)));
    }
    assert!(matches!(
        fixed.encode(width(7), &[0.0], Weight::ONE, &mut coins(1)).err(),
        Some(RingError::Wraps { clients: 1, bound: 127, bits: 7 })
    ));
    for wrong in [Fixed::new(1, 1.0), Fixed::new(23, 1.0), Fixed::new(8, 0.0), Fixed::new(8, f32::NAN)] {
        assert!(matches!(wrong, Err(RingError::Encoding { .. })));
    }
    assert!(Weight::new(0, 4).is_err() && Weight::new(5, 4).is_err() && Weight::new(4, 4).is_ok());
}

#[test]
fn unlike_vectors_are_not_added() {
    let mut sum = RingVector::zeros(width(12), 3);
    assert_eq!(
        sum.add(&RingVector::zeros(width(13), 3)),
        Err(RingError::OtherWidth { found: 13, expected: 12 })
    );
    assert!(matches!(sum.add(&RingVector::zeros(width(12), 4)), Err(RingError::Length { found: 4, .. })));
}
