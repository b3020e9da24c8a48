//! Shamir's secret sharing, byte by byte over GF(2^8) modulo x^8 + x^4 + x^3 + x + 1.
//!
//! Indices, thresholds and Lagrange weights are public and may decide branches and table look-ups. Secrets, shares and
//! coefficients do not: they are only shifted and XORed, eight bytes to a word.

use std::collections::BTreeMap;

use zeroize::{Zeroize as _, ZeroizeOnDrop, Zeroizing};

/// Exponentials and logarithms to base 3, for public numbers only.
struct Tables {
    exp: [u8; 255],
    log: [u8; 256],
}

const TABLES: Tables = {
    let (mut exp, mut log) = ([0; 255], [0; 256]);
    let (mut power, mut value) = (0, 1u8);
    while power < 255 {
        exp[power] = value;
        log[value as usize] = power as u8;
        let doubled = (value << 1) ^ (0x1b * (value >> 7));
        value ^= doubled;
        power += 1;
    }
    Tables { exp, log }
};

/// Logarithm of a public number that is not zero.
fn log(value: u8) -> u32 {
    u32::from(TABLES.log[usize::from(value)])
}

/// 3 to a public power.
fn exp(power: u32) -> u8 {
    TABLES.exp[(power % 255) as usize]
}

/// Doubles the eight bytes of a word, each in GF(2^8).
#[inline(always)]
fn double(word: u64) -> u64 {
    let carried = word >> 7 & 0x0101_0101_0101_0101;
    // 0x1b is less than 256, so no product of a byte reaches the next.
    ((word & 0x7f7f_7f7f_7f7f_7f7f) << 1) ^ (carried * 0x1b)
}

/// The eight doublings of a row of words: row · x^0 … row · x^7.
#[inline(always)]
fn doublings<const W: usize>(row: &[u64; W]) -> [[u64; W]; 8] {
    let mut all = [*row; 8];
    for step in 1..8 {
        all[step] = all[step - 1].map(double);
    }
    all
}

#[inline(always)]
fn xor<const W: usize>(into: &mut [u64; W], row: &[u64; W]) {
    into.iter_mut().zip(row).for_each(|(into, word)| *into ^= word);
}

fn words<const W: usize>(bytes: &[u8]) -> [u64; W] {
    let (chunks, _) = bytes.as_chunks::<8>();
    let mut words = [0; W];
    words.iter_mut().zip(chunks).for_each(|(word, chunk)| *word = u64::from_le_bytes(*chunk));
    words
}

fn bytes<const N: usize>(words: &[u64]) -> [u8; N] {
    let mut bytes = [0; N];
    let (chunks, _) = bytes.as_chunks_mut::<8>();
    chunks.iter_mut().zip(words).for_each(|(chunk, word)| *chunk = word.to_le_bytes());
    bytes
}

/// Shares of a 64-byte secret at x = 1, 2, …, `holders`; any `threshold` of them tell it and fewer tell nothing.
///
/// Each coefficient is uniform, zero included: excluding zero would tell something about the secret.
/// `threshold` is at least 1 and `holders` at most 255 (more get no share).
pub(crate) fn split(
    secret: &[u8; 64],
    threshold: u16,
    holders: u16,
    rng: &mut impl rand::CryptoRng,
) -> Zeroizing<Vec<[u8; 64]>> {
    let holders = holders.min(255) as u8;
    let mut sums = Zeroizing::new(vec![words::<8>(secret); usize::from(holders)]);
    let logs: Vec<u32> = (1..=holders).map(log).collect();
    let mut powers = vec![0u32; usize::from(holders)];
    // Multiples of one coefficient by 0 … 15 and by 16 times these.
    let mut multiples = Zeroizing::new([[[0u64; 8]; 16]; 2]);
    for _ in 1..threshold {
        let mut coefficient = Zeroizing::new([0; 64]);
        rng.fill_bytes(coefficient.as_mut_slice());
        let mut doubled = doublings(&words::<8>(coefficient.as_slice()));
        for (table, doubled) in multiples.iter_mut().zip(doubled.as_chunks::<4>().0) {
            for factor in 1..16usize {
                let mut row = table[factor & (factor - 1)];
                xor(&mut row, &doubled[(factor.trailing_zeros() & 3) as usize]);
                table[factor] = row;
            }
        }
        doubled.as_flattened_mut().zeroize();
        let [low, high] = &*multiples;
        for ((sum, power), log) in sums.iter_mut().zip(&mut powers).zip(&logs) {
            *power = (*power + log) % 255;
            let factor = usize::from(exp(*power));
            xor(sum, &low[factor & 15]);
            xor(sum, &high[factor >> 4]);
        }
    }
    Zeroizing::new(sums.iter().map(|sum| bytes(sum)).collect())
}

/// Lagrange weights of a set of holders: what each share is multiplied by to get the polynomial's value at one point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Weights(Vec<u8>);

impl Weights {
    /// Weights for shares at these indices and the value at `point` (0 for the secret); none if an index is zero,
    /// is there twice, or is `point`.
    pub(crate) fn new(indices: &[u8], point: u8) -> Option<Self> {
        // Π (point − x_m) / Π (x_j − x_m), m ≠ j, in logarithms.
        let mut seen = [false; 256];
        for &index in indices {
            if index == 0 || index == point || std::mem::replace(&mut seen[usize::from(index)], true) {
                return None;
            }
        }
        let all: u32 = indices.iter().map(|&index| log(index ^ point)).sum();
        let weight = |&own: &u8| {
            let others = indices.iter().filter(|&&other| other != own);
            let below: u32 = others.map(|&other| log(own ^ other)).sum();
            // At most 255 terms below 255 each.
            exp(all + 255 * 255 - log(own ^ point) - below)
        };
        Some(Self(indices.iter().map(weight).collect()))
    }

    /// The value at the point from shares in the order of the indices.
    pub(crate) fn combine<'a>(&self, shares: impl Iterator<Item = &'a [u8; 32]>) -> Zeroizing<[u8; 32]> {
        let mut sum = Zeroizing::new([0u64; 4]);
        for (weight, share) in self.0.iter().zip(shares) {
            let mut doubled = doublings(&words::<4>(share));
            for (bit, row) in doubled.iter().enumerate() {
                if weight >> bit & 1 == 1 {
                    xor(&mut sum, row);
                }
            }
            doubled.as_flattened_mut().zeroize();
        }
        Zeroizing::new(bytes(sum.as_slice()))
    }
}

/// Weights at zero by set of holders: on a complete graph most secrets are recovered from few different sets.
#[derive(Debug, Default)]
pub(crate) struct WeightCache(BTreeMap<Vec<u8>, Weights>);

impl WeightCache {
    /// The weights of this set, see [`Weights::new`].
    pub(crate) fn at_zero(&mut self, indices: &[u8]) -> Option<&Weights> {
        if !self.0.contains_key(indices) {
            // Sets differ much on a ring; the cache is for those that come again and stays small.
            if self.0.len() >= 1024 {
                self.0.clear();
            }
            self.0.insert(indices.to_vec(), Weights::new(indices, 0)?);
        }
        self.0.get(indices)
    }
}

/// A share that came, with its index; wiped when it is dropped.
#[derive(Clone, zeroize::Zeroize, ZeroizeOnDrop)]
pub(crate) struct HeldShare {
    /// Where it was evaluated.
    #[zeroize(skip)]
    pub(crate) x: u8,
    /// The share.
    pub(crate) value: [u8; 32],
}

/// How many sets of shares are tried before a secret is given up.
const MOST_TRIES: usize = 4096;

/// A recovered secret and the places, in the shares given, of those that do not lie on its polynomial.
pub(crate) struct Recovered {
    pub(crate) secret: Zeroizing<[u8; 32]>,
    pub(crate) wrong: Vec<usize>,
}

/// The secret that satisfies `is_right`, from any `threshold` of these shares, or none.
///
/// If the first shares fail, sets that leave out one share, then two, … are tried: each wrong share is then found.
pub(crate) fn recover(
    cache: &mut WeightCache,
    shares: &[HeldShare],
    threshold: u16,
    is_right: impl Fn(&Zeroizing<[u8; 32]>) -> bool,
) -> Option<Recovered> {
    let threshold = usize::from(threshold);
    let spare = shares.len().checked_sub(threshold)?;
    let mut tries = 0;
    for left_out in 0..=spare {
        let mut omitted: Vec<usize> = (0..left_out).collect();
        loop {
            tries += 1;
            if tries > MOST_TRIES {
                return None;
            }
            let chosen: Vec<&HeldShare> = shares
                .iter()
                .enumerate()
                .filter(|(place, _)| !omitted.contains(place))
                .map(|(_, share)| share)
                .take(threshold)
                .collect();
            let indices: Vec<u8> = chosen.iter().map(|share| share.x).collect();
            let secret = cache.at_zero(&indices)?.combine(chosen.iter().map(|share| &share.value));
            if is_right(&secret) {
                let wrong = (0..shares.len()).filter(|&place| !lies_on(&chosen, &indices, shares.get(place)));
                return Some(Recovered { wrong: wrong.collect(), secret });
            }
            if !next_combination(&mut omitted, shares.len()) {
                break;
            }
        }
    }
    None
}

/// Whether a share lies on the polynomial through the chosen ones.
fn lies_on(chosen: &[&HeldShare], indices: &[u8], share: Option<&HeldShare>) -> bool {
    let Some(share) = share else { return false };
    // A chosen share lies on it by definition, and has no weights.
    Weights::new(indices, share.x)
        .is_none_or(|weights| *weights.combine(chosen.iter().map(|share| &share.value)) == share.value)
}

/// The next combination of places below `count` in lexicographic order; false after the last.
fn next_combination(places: &mut [usize], count: usize) -> bool {
    let size = places.len();
    let Some(moved) =
        (0..size).rev().find(|&at| places.get(at).is_some_and(|place| place + size - at < count))
    else {
        return false;
    };
    let start = places.get(moved).map_or(0, |place| place + 1);
    places.iter_mut().skip(moved).enumerate().for_each(|(step, place)| *place = start + step);
    true
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::privacy::noise::SecretRng;

    /// Multiplication as the field is defined: schoolbook, then reduced.
    fn multiply(a: u8, b: u8) -> u8 {
        let mut product =
            (0..8).filter(|bit| b >> bit & 1 == 1).fold(0u16, |sum, bit| sum ^ u16::from(a) << bit);
        for bit in (8..16).rev() {
            if product >> bit & 1 == 1 {
                product ^= 0x11b << (bit - 8);
            }
        }
        product as u8
    }

    /// Gives the bytes that it holds, as if they were random.
    struct Fixed(Vec<u8>);

    impl rand::TryRng for Fixed {
        type Error = std::convert::Infallible;

        fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
            unreachable!()
        }

        fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
            unreachable!()
        }

        fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
            bytes.copy_from_slice(&self.0[..bytes.len()]);
            self.0.drain(..bytes.len());
            Ok(())
        }
    }

    impl rand::TryCryptoRng for Fixed {}

    fn half(share: &[u8; 64], x: u8) -> HeldShare {
        HeldShare { x, value: share[..32].try_into().unwrap() }
    }

    #[test]
    fn the_field_is_that_of_the_polynomial_0x11b() {
        for a in 0..=255u8 {
            assert_eq!(double(u64::from_le_bytes([a; 8])), u64::from_le_bytes([multiply(a, 2); 8]));
            for b in 1..=255u8 {
                let by_logs = if a == 0 { 0 } else { exp(log(a) + log(b)) };
                assert_eq!(by_logs, multiply(a, b));
            }
        }
        assert_eq!(multiply(0x57, 0x83), 0xc1);
    }

    #[test]
    fn shares_are_those_of_the_vectors() {
        let vectors = super::super::tests::vectors();
        let four = |name: &str| super::super::tests::bytes(&vectors[name]);
        let fill = |four: Vec<u8>| four.repeat(16);
        let coefficients = [fill(four("shamir_c1")), fill(four("shamir_c2"))].concat();
        let secret: [u8; 64] = fill(four("shamir_t3_secret")).try_into().unwrap();
        let shares = split(&secret, 3, 254, &mut Fixed(coefficients));
        for (x, share) in vectors["shamir_shares"].as_object().unwrap() {
            let x: usize = x.parse().unwrap();
            assert_eq!(shares[x - 1].to_vec(), fill(super::super::tests::bytes(share)), "{x}");
        }
    }

    /// Every secret is equally likely for who sees t − 1 shares: over all coefficients, each value of these shares
    /// comes up once for each secret. A polynomial of lower degree (leading coefficient zero) is one of them.
    #[test]
    fn fewer_shares_than_the_threshold_tell_nothing() {
        for secret in [0u8, 1, 77, 255] {
            let mut seen = [false; 256];
            for coefficient in 0..=255 {
                let share = split(&[secret; 64], 2, 5, &mut Fixed(vec![coefficient; 64]))[4][0];
                assert!(!std::mem::replace(&mut seen[usize::from(share)], true));
            }
        }
        // Two of three: every pair of values once for each secret.
        for secret in [3u8, 200] {
            let mut seen = vec![false; 65_536];
            for first in 0..=255 {
                for second in 0..=255 {
                    let coefficients = [[first; 64], [second; 64]].concat();
                    let shares = split(&[secret; 64], 3, 2, &mut Fixed(coefficients));
                    let pair = usize::from(shares[0][0]) << 8 | usize::from(shares[1][0]);
                    assert!(!std::mem::replace(&mut seen[pair], true));
                }
            }
        }
    }

    #[test]
    fn leading_coefficients_may_be_zero() {
        let mut rng = SecretRng::new().unwrap();
        let mut zeros = 0;
        for _ in 0..200 {
            // With secret zero and t = 2, the share at x is x times the coefficient: it is zero iff that is.
            zeros += split(&[0; 64], 2, 1, &mut rng)[0].iter().filter(|&&byte| byte == 0).count();
        }
        // 12,800 bytes, 50 expected: a sampler that excludes zero has none.
        assert!((15..120).contains(&zeros), "{zeros}");
    }

    proptest! {
        #[test]
        fn any_threshold_of_shares_recovers(
            seed in any::<u64>(), holders in 2u16..=254, part in 0.0..1.0f64, secret in any::<[u8; 32]>(),
        ) {
            let threshold = 1 + (f64::from(holders - 1) * part) as u16;
            let mut rng = SecretRng::seeded(seed);
            let mut both = [7; 64];
            both[..32].copy_from_slice(&secret);
            let shares = split(&both, threshold, holders, &mut rng);
            let mut order: Vec<u8> = (1..=holders as u8).collect();
            rand::seq::SliceRandom::shuffle(order.as_mut_slice(), &mut rng);
            order.truncate(usize::from(threshold));
            let held: Vec<HeldShare> = order.iter().map(|&x| half(&shares[usize::from(x) - 1], x)).collect();
            let weights = Weights::new(&order, 0).unwrap();
            prop_assert_eq!(*weights.combine(held.iter().map(|share| &share.value)), secret);
            if threshold > 1 {
                let fewer = Weights::new(&order[1..], 0).unwrap();
                prop_assert_ne!(*fewer.combine(held[1..].iter().map(|share| &share.value)), secret);
            }
        }
    }

    #[test]
    fn wrong_shares_are_found_and_named() {
        let mut rng = SecretRng::seeded(5);
        let shares = split(&[9; 64], 4, 8, &mut rng);
        let mut cache = WeightCache::default();
        for wrong in [vec![], vec![0], vec![7], vec![0, 3], vec![1, 2, 6], vec![0, 1, 2, 3]] {
            let mut held: Vec<HeldShare> = (1..=8).map(|x| half(&shares[usize::from(x) - 1], x)).collect();
            wrong.iter().for_each(|&place: &usize| held[place].value[31] ^= 1);
            let found = recover(&mut cache, &held, 4, |secret| **secret == [9; 32]).unwrap();
            assert_eq!(found.wrong, wrong);
        }
        let held: Vec<HeldShare> = (1..=3).map(|x| half(&shares[usize::from(x) - 1], x)).collect();
        assert!(recover(&mut cache, &held, 4, |_| true).is_none(), "three shares are too few");
        let held: Vec<HeldShare> = [1, 1, 2, 3].map(|x| half(&shares[usize::from(x) - 1], x)).to_vec();
        assert!(recover(&mut cache, &held, 4, |_| true).is_none(), "one share twice is no fourth");
    }

    /// Figures for the report: `cargo test --release … -- --ignored --nocapture shamir_figures`.
    #[test]
    #[ignore = "prints timings"]
    fn shamir_figures() {
        // The best of many: the machine may have other work.
        fn best(name: &str, mut work: impl FnMut()) {
            let times = (0..2000).map(|_| {
                let start = Instant::now();
                work();
                start.elapsed()
            });
            println!("{name}: {:.1} µs", times.min().unwrap_or_default().as_secs_f64() * 1e6);
        }
        let mut rng = SecretRng::new().unwrap();
        let secret = std::hint::black_box([9; 64]);
        best("split, 51 of 101, 64 bytes", || drop(split(&secret, 51, 101, &mut rng)));
        let shares = split(&secret, 51, 101, &mut rng);
        let held: Vec<HeldShare> = (1..=51).map(|x| half(&shares[usize::from(x) - 1], x)).collect();
        let indices: Vec<u8> = std::hint::black_box(held.iter().map(|share| share.x).collect());
        best("Lagrange weights of 51", || drop(std::hint::black_box(Weights::new(&indices, 0))));
        let weights = Weights::new(&indices, 0).unwrap();
        best("combine 51 of 32 bytes", || {
            std::hint::black_box(weights.combine(held.iter().map(|share| &share.value)));
        });
    }
}
