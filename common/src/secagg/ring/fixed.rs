//! Updates as integers, by stochastic rounding to fixed point, and sums as updates again.

use super::super::mask::KeyStream;
use super::{Lane, Lanes, RingError, RingVector, Width};

/// Coordinates whose coins are drawn at a time.
const PART: usize = 2048;
/// 1.5·2⁵²: near it `f64` has integers only, so adding it rounds, and the sum's low bits are the integer.
const ROUNDING: f64 = 6_755_399_441_055_744.0;

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

/// Fixed point: a coordinate x within ± `coordinate_limit` becomes ⌊x·s + u⌋, from −Q to Q, with Q = 2^(v−1) − 1 for v
/// value bits, s = Q / `coordinate_limit`, and u uniform from the 2²⁴ multiples of 2⁻²⁴ in [0, 1): right on average.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fixed {
    bound: u32,
    scale: f64,
    coordinate_limit: f32,
}

impl Fixed {
    /// Integers of `value_bits` bits, from 2 to 28 (an `f32` has 24), for coordinates of up to `coordinate_limit`, from
    /// 1e-30 to 1e30.
    ///
    /// # Errors
    /// [`RingError::Encoding`] outside of these.
    pub fn new(value_bits: u32, coordinate_limit: f32) -> Result<Self, RingError> {
        let error = |name, value, needed| Err(RingError::Encoding { name, value, needed });
        if !(2..=28).contains(&value_bits) {
            return error("value_bits", f64::from(value_bits), "a whole number from 2 to 28");
        }
        if !(1e-30..=1e30).contains(&coordinate_limit) {
            return error("coordinate_limit", f64::from(coordinate_limit), "a number from 1e-30 to 1e30");
        }
        let bound = (1 << (value_bits - 1)) - 1;
        Ok(Self { bound, scale: f64::from(bound) / f64::from(coordinate_limit), coordinate_limit })
    }

    /// Q: the largest absolute value of a client's integer.
    pub fn bound(&self) -> u32 {
        self.bound
    }

    /// s: integer steps per unit.
    pub fn scale(&self) -> f64 {
        self.scale
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
        let clipped = match &mut vector.lanes {
            Lanes::U16(lanes) => self.encode_into(values, weight, coins, lanes)?,
            Lanes::U32(lanes) => self.encode_into(values, weight, coins, lanes)?,
            Lanes::U64(lanes) => self.encode_into(values, weight, coins, lanes)?,
        };
        Ok(Encoded { vector, clipped })
    }

    fn encode_into<L: Lane>(
        &self,
        values: &[f32],
        weight: Weight,
        coins: &mut KeyStream,
        lanes: &mut [L],
    ) -> Result<usize, RingError> {
        let scale = self.scale * f64::from(weight.parts) / f64::from(weight.most);
        let mut words = [0; PART];
        let mut clipped = 0;
        for (at, (values, lanes)) in values.chunks(PART).zip(lanes.chunks_mut(PART)).enumerate() {
            let words = words.get_mut(..values.len()).unwrap_or_default();
            coins.fill(words)?;
            let outcome = self.round(values, words, scale, lanes);
            if !outcome.finite {
                let inside = values.iter().position(|value| !value.is_finite()).unwrap_or_default();
                return Err(RingError::NotFinite(at * PART + inside));
            }
            clipped += outcome.clipped as usize;
        }
        Ok(clipped)
    }

    /// Only additions, multiplications and comparisons, which every processor's vectors have and round alike.
    #[inline]
    fn round<L: Lane>(&self, values: &[f32], coins: &[u32], scale: f64, lanes: &mut [L]) -> Outcome {
        let (limit, bound) = (self.coordinate_limit, f64::from(self.bound));
        let (mut clipped, mut strange) = (0u32, 0u32);
        for ((value, coin), lane) in values.iter().zip(coins).zip(lanes) {
            let size = value.abs();
            clipped += u32::from(size > limit);
            strange += u32::from(!(size < f32::INFINITY));
            let value = if *value > limit { limit } else { *value };
            let value = if value < -limit { -limit } else { value };
            let coin = f64::from((coin >> 8) as i32) * (1.0 / 16_777_216.0);
            let exact = f64::from(value) * scale + coin;
            let nearest = (exact + ROUNDING) - ROUNDING;
            let floor = nearest - if nearest > exact { 1.0 } else { 0.0 };
            let floor = if floor > bound { bound } else { floor };
            let floor = if floor < -bound { -bound } else { floor };
            *lane = L::from_low((floor + ROUNDING).to_bits().wrapping_sub(ROUNDING.to_bits()));
        }
        Outcome { clipped, finite: strange == 0 }
    }

    /// The mean that a sum of integers stands for: each divided by s and by `divisor`, which is the sum of w/W of the
    /// clients in the sum, or their number where they weigh the same.
    pub fn decode(&self, sum: impl Iterator<Item = i64>, divisor: f64) -> impl Iterator<Item = f32> {
        let unit = 1.0 / (self.scale * divisor);
        sum.map(move |value| (value as f64 * unit) as f32)
    }
}

struct Outcome {
    clipped: u32,
    finite: bool,
}
