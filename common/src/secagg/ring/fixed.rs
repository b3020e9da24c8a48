//! Updates as integers, by stochastic rounding to fixed point, and sums as updates again.

use zeroize::{Zeroize, Zeroizing};

use super::super::keys::{MaskKey, Sign};
use super::super::mask::{self, Backend, KeyStream, Masks, Vectorised, vectorised};
use super::{Lane, Lanes, RingError, RingVector, Width, packing};

/// Coordinates whose coins are drawn at a time.
const PART: usize = 2048;
/// 1.5·2²³: near it `f32` has integers only, so adding it rounds to one, and the sum's low bits are that integer.
const ROUNDING: f32 = 12_582_912.0;
/// Most value bits: Q and the integers next to it lie in the range in which [`ROUNDING`] rounds.
const MOST_VALUE_BITS: u32 = 22;

/// A client's weight: a whole number of parts of the largest weight. It only travels masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight {
    parts: u32,
    most: u32,
}

impl Weight {
    /// All clients weigh the same.
    pub const ONE: Self = Self { parts: 1, most: 1 };

    /// `parts` of `most`.
    ///
    /// # Errors
    /// [`RingError::Encoding`] unless `parts` is from 1 to `most`.
    pub fn new(parts: u32, most: u32) -> Result<Self, RingError> {
        if (1..=most).contains(&parts) {
            return Ok(Self { parts, most });
        }
        let needed = "a whole number from 1 to the largest weight";
        Err(RingError::Encoding { name: "weight", value: f64::from(parts), needed })
    }

    /// The number of parts: w. The sum of the clients' is what the sum of their updates is divided by.
    pub fn parts(self) -> u32 {
        self.parts
    }

    /// The largest number of parts: W.
    pub fn most(self) -> u32 {
        self.most
    }
}

/// A client's update as integers.
pub struct Encoded {
    /// The integers, from −Q to Q.
    pub vector: RingVector,
    /// How many coordinates lay outside of ± `coordinate_limit` and were brought there.
    pub clipped: usize,
}

/// A client's update as it travels.
pub struct Upload {
    /// The masked integers, packed as [`RingVector::pack`] does.
    pub packed: Vec<u8>,
    /// How many coordinates lay outside of ± `coordinate_limit` and were brought there.
    pub clipped: usize,
}

/// Fixed point: a coordinate x within ± `coordinate_limit` becomes ⌊x·s + u⌋, from −Q to Q, with Q = 2^(v−1) − 1 for v
/// value bits, s = Q / `coordinate_limit`, and u uniform from the 2²⁴ multiples of 2⁻²⁴ in [0, 1): right on average.
/// The product is rounded to `f32`, which is as fine as x itself; the rest is exact, but for less than 2⁻²⁴ steps where
/// x·s is next to zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fixed {
    bound: u32,
    scale: f32,
    coordinate_limit: f32,
}

impl Fixed {
    /// Integers of `value_bits` bits, from 2 to 22 (an `f32` has 24), for coordinates of up to `coordinate_limit`, from
    /// 1e-30 to 1e30.
    ///
    /// # Errors
    /// [`RingError::Encoding`] outside of these.
    pub fn new(value_bits: u32, coordinate_limit: f32) -> Result<Self, RingError> {
        let error = |name, value, needed| Err(RingError::Encoding { name, value, needed });
        if !(2..=MOST_VALUE_BITS).contains(&value_bits) {
            return error("value_bits", f64::from(value_bits), "a whole number from 2 to 22");
        }
        if !(1e-30..=1e30).contains(&coordinate_limit) {
            return error("coordinate_limit", f64::from(coordinate_limit), "a number from 1e-30 to 1e30");
        }
        let bound: u32 = (1 << (value_bits - 1)) - 1;
        let scale = (f64::from(bound) / f64::from(coordinate_limit)) as f32;
        Ok(Self { bound, scale, coordinate_limit })
    }

    /// Q: the largest absolute value of a client's integer.
    pub fn bound(&self) -> u32 {
        self.bound
    }

    /// Largest absolute value of a coordinate.
    pub fn coordinate_limit(&self) -> f32 {
        self.coordinate_limit
    }

    /// s: integer steps per unit.
    pub fn scale(&self) -> f64 {
        f64::from(self.scale)
    }

    /// The smallest width in which no sum of up to `clients` updates wraps: n·Q ≤ 2^(b−1) − 1.
    ///
    /// # Errors
    /// [`RingError::TooWide`] if there is none.
    pub fn width(&self, clients: u64) -> Result<Width, RingError> {
        Width::of_sum(clients, u64::from(self.bound))
    }

    /// The integers of (w/W)·x for each coordinate x; the coin of coordinate j is the top 24 bits of word j that is
    /// drawn from `coins`. Whoever knows the coins learns a little more of a client's coordinate from what is released
    /// about it: the caller decides whether they are secret.
    ///
    /// # Errors
    /// [`RingError`] for a coordinate that is no finite number, a width that Q does not fit, or coins at their end.
    pub fn encode(
        &self,
        width: Width,
        values: &[f32],
        weight: Weight,
        coins: &mut KeyStream,
    ) -> Result<Encoded, RingError> {
        width.check_sum(1, u64::from(self.bound))?;
        let mut vector = RingVector::zeros(width, values.len());
        let mut rounding = Rounding::new(self, values, weight, coins);
        each_lane!(&mut vector.lanes, lanes => {
            lanes.chunks_mut(PART).try_for_each(|lanes| rounding.next(lanes))?;
        });
        Ok(Encoded { vector, clipped: rounding.clipped })
    }

    /// [`Fixed::encode`], [`RingVector::mask`] and [`RingVector::pack`] in one pass over the update, on one thread and
    /// with the same bits. The integers themselves are never in memory but for a few thousand, which are wiped.
    ///
    /// # Errors
    /// [`RingError`] as these.
    pub fn encode_masked<'a>(
        &self,
        width: Width,
        values: &[f32],
        weight: Weight,
        coins: &mut KeyStream,
        terms: impl IntoIterator<Item = (&'a MaskKey, Sign)>,
    ) -> Result<Upload, RingError> {
        self.encode_masked_by(Backend::best(), width, values, weight, coins, terms)
    }

    /// The same by a given back end, whose choice changes no bit.
    ///
    /// # Errors
    /// As [`Fixed::encode_masked`].
    pub fn encode_masked_by<'a>(
        &self,
        backend: Backend,
        width: Width,
        values: &[f32],
        weight: Weight,
        coins: &mut KeyStream,
        terms: impl IntoIterator<Item = (&'a MaskKey, Sign)>,
    ) -> Result<Upload, RingError> {
        width.check_sum(1, u64::from(self.bound))?;
        let masks = Masks::new(backend, terms);
        let rounding = Rounding::new(self, values, weight, coins);
        match width.lane_bytes() {
            2 => rounding.masked::<u16>(width, &masks),
            4 => rounding.masked::<u32>(width, &masks),
            _ => rounding.masked::<u64>(width, &masks),
        }
    }

    /// The mean that a sum of integers stands for: each divided by s and by `divisor`, which is the sum of w/W of the
    /// clients in the sum, or their number where they weigh the same.
    pub fn decode(&self, sum: impl Iterator<Item = i64>, divisor: f64) -> impl Iterator<Item = f32> {
        let unit = 1.0 / (self.scale() * divisor);
        sum.map(move |value| (value as f64 * unit) as f32)
    }
}

/// An update that is being rounded, part by part.
struct Rounding<'a> {
    values: &'a [f32],
    limit: f32,
    scale: f32,
    bound: f32,
    coins: &'a mut KeyStream,
    words: Zeroizing<[u32; PART]>,
    /// How many coordinates were rounded.
    done: usize,
    clipped: usize,
}

impl<'a> Rounding<'a> {
    fn new(fixed: &Fixed, values: &'a [f32], weight: Weight, coins: &'a mut KeyStream) -> Self {
        let scale = (fixed.scale() * f64::from(weight.parts) / f64::from(weight.most)) as f32;
        // Exact: it has at most 22 bits.
        let bound = fixed.bound as f32;
        let words = Zeroizing::new([0; PART]);
        Self { values, limit: fixed.coordinate_limit, scale, bound, coins, words, done: 0, clipped: 0 }
    }

    /// Rounds the next coordinates, as many as there are lanes and at most [`PART`].
    fn next<L: Lane>(&mut self, lanes: &mut [L]) -> Result<(), RingError> {
        let coins = self.words.get_mut(..lanes.len()).unwrap_or_default();
        let (values, rest) = self.values.split_at(coins.len().min(self.values.len()));
        self.coins.fill(coins)?;
        let &mut Self { limit, scale, bound, .. } = self;
        let rounded = vectorised(Round { values, coins, limit, scale, bound, lanes });
        if rounded.strange > 0 {
            let inside = values.iter().position(|value| !value.is_finite()).unwrap_or_default();
            return Err(RingError::NotFinite(self.done + inside));
        }
        self.values = rest;
        self.done += values.len();
        self.clipped += rounded.clipped as usize;
        Ok(())
    }

    /// Rounds, masks and packs the whole update.
    fn masked<L: Lane + Zeroize>(mut self, width: Width, masks: &Masks) -> Result<Upload, RingError> {
        let mut packed = vec![0; width.packed_bytes(self.values.len())?];
        // As many lanes as masks pass over at a time; a multiple of what is packed at a time.
        let mut lanes = Zeroizing::new(vec![L::default(); mask::PART / L::BYTES]);
        for place in packed.chunks_mut(mask::PART / L::BYTES / 8 * width.bits() as usize) {
            let Some(lanes) = lanes.get_mut(..self.values.len().min(mask::PART / L::BYTES)) else { break };
            let offset = self.done as u64;
            lanes.chunks_mut(PART).try_for_each(|lanes| self.next(lanes))?;
            masks.apply(lanes, offset)?;
            packing::pack(width, lanes, place);
        }
        Ok(Upload { packed, clipped: self.clipped })
    }
}

/// One part of an update to round.
struct Round<'a, L> {
    values: &'a [f32],
    coins: &'a [u32],
    limit: f32,
    scale: f32,
    bound: f32,
    lanes: &'a mut [L],
}

/// What was seen on the way.
struct Rounded {
    /// Coordinates beyond the limit.
    clipped: u32,
    /// Coordinates that are no finite numbers.
    strange: u32,
}

impl<L: Lane> Vectorised for Round<'_, L> {
    type Output = Rounded;

    /// Additions, multiplications and comparisons only: every processor has vectors for them and rounds alike.
    #[inline(always)]
    fn run(self) -> Rounded {
        let Self { limit, scale, bound, .. } = self;
        let mut rounded = Rounded { clipped: 0, strange: 0 };
        for ((value, coin), lane) in self.values.iter().zip(self.coins).zip(self.lanes) {
            rounded.clipped += u32::from(value.abs() > limit);
            rounded.strange += u32::from(!value.is_finite());
            let value = if *value > limit { limit } else { *value };
            let value = if value < -limit { -limit } else { value };
            let exact = value * scale;
            let nearest = (exact + ROUNDING) - ROUNDING;
            let floor = nearest - if nearest > exact { 1.0 } else { 0.0 };
            // ⌊exact + coin⌋ without a sum that would be rounded.
            let up = 1.0 - (exact - floor);
            let coin = ((coin >> 8) as i32) as f32 * (1.0 / 16_777_216.0);
            let integer = floor + if coin >= up { 1.0 } else { 0.0 };
            let integer = if integer > bound { bound } else { integer };
            let integer = if integer < -bound { -bound } else { integer };
            let bits = (integer + ROUNDING).to_bits().wrapping_sub(ROUNDING.to_bits());
            *lane = L::from_low(i64::from(bits as i32) as u64);
        }
        rounded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where x·s + u is an integer to the last bit, or just below it.
    #[test]
    fn coins_decide_to_the_last_bit() {
        let values = [0.25, 0.25, -0.25, -0.25, 1.0, 1.0, -1.0, 2.5, 0.0, 9.0, -9.0, f32::NAN];
        let quarter = 1 << 30;
        let coins = [3 * quarter, 3 * quarter - 1, quarter, quarter - 1, 0, !0, !0, !0, !0, !0, 0, 0u32];
        let expected = [1, 0, 0, -1, 1, 1, -1, 3, 0, 3, -3];
        let (mut by_vectors, mut plain) = ([0u64; 12], [0u64; 12]);
        let round =
            |lanes| Round { values: &values, coins: &coins, limit: 3.0, scale: 1.0, bound: 3.0, lanes };
        let work = round(&mut by_vectors);
        let first = vectorised(work);
        let work = round(&mut plain);
        let second = work.run();
        assert_eq!([first.clipped, first.strange, second.clipped, second.strange], [2, 1, 2, 1]);
        let integers = |lanes: [u64; 12]| lanes.map(|lane| lane as i64)[..11].to_vec();
        assert_eq!(integers(by_vectors), expected);
        assert_eq!(integers(plain), expected);
    }
}
