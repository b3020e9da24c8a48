//! How the values of an update are written: `f32`, `bf16`, levels of a scale, or a sign.

use rand::Rng;

use super::bits::{BitReader, BitWriter};
use super::container::DecodeError;

/// Values that share a scale.
pub(super) const VALUES_PER_SCALE: usize = 256;
/// Levels of `int8`: its codes fill a byte but for one.
const INT8_LEVELS: u16 = 127;
/// Most levels: a code has 16 bits.
pub(super) const MOST_LEVELS: u16 = 32_767;

/// How the values of a sparse update are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ValueCodec {
    /// 32 bits, exact.
    F32,
    /// 16 bits: `f32` with an 8-bit significand, rounded to nearest, ties to even.
    Bf16,
    /// 8 bits, rounded at random without bias, 256 values to a scale.
    Int8,
    /// One bit: the sign of the mean magnitude of all sent values (sparse ternary compression, Sattler et al. 2019).
    Sign,
}

impl From<ValueCodec> for Plane {
    fn from(codec: ValueCodec) -> Self {
        match codec {
            ValueCodec::F32 => Plane::F32,
            ValueCodec::Bf16 => Plane::Bf16,
            ValueCodec::Int8 => Plane::INT8,
            ValueCodec::Sign => Plane::Sign,
        }
    }
}

/// The layout of values in a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plane {
    F32,
    Bf16,
    /// Integers from -levels to levels, times the step of their 256: QSGD's buckets, scaled by their largest magnitude.
    Levels(u16),
    Sign,
    /// No values: the positions are all that is told.
    Nothing,
}

impl Plane {
    pub(super) const INT8: Self = Self::Levels(INT8_LEVELS);

    /// The number in the container's header.
    pub(super) fn number(self) -> u8 {
        match self {
            Plane::F32 => 0,
            Plane::Bf16 => 1,
            Plane::Levels(_) => 2,
            Plane::Sign => 3,
            Plane::Nothing => 4,
        }
    }

    /// The levels in the container's header; 0 where there are none.
    pub(super) fn levels(self) -> u16 {
        if let Plane::Levels(levels) = self { levels } else { 0 }
    }

    /// Bytes of `count` values.
    pub(super) fn bytes(self, count: usize) -> usize {
        match self {
            Plane::F32 => count * 4,
            Plane::Bf16 => count * 2,
            Plane::Levels(levels) => {
                count.div_ceil(VALUES_PER_SCALE) * 2 + (count * code_bits(levels) as usize).div_ceil(8)
            }
            Plane::Sign => 4 + count.div_ceil(8),
            Plane::Nothing => 0,
        }
    }

    /// Appends `values`, which are finite and moderate, and returns what they are at the receiver.
    pub(super) fn encode<R: Rng + ?Sized>(self, values: &[f32], rng: &mut R, out: &mut Vec<u8>) -> Vec<f32> {
        out.reserve(self.bytes(values.len()));
        match self {
            Plane::F32 => {
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                values.to_vec()
            }
            Plane::Bf16 => {
                let rounded = values.iter().map(|value| nearest_bf16(*value));
                out.extend(rounded.clone().flat_map(u16::to_le_bytes));
                rounded.map(bf16).collect()
            }
            Plane::Levels(levels) => encode_levels(values, levels, rng, out),
            Plane::Sign => {
                let sum: f64 = values.iter().map(|value| f64::from(value.abs())).sum();
                let mean = if values.is_empty() { 0.0 } else { (sum / values.len() as f64) as f32 };
                out.extend(mean.to_le_bytes());
                let mut writer = BitWriter::new(out);
                values.iter().for_each(|value| writer.put(u32::from(*value < 0.0), 1));
                writer.finish();
                values.iter().map(|value| if *value < 0.0 { -mean } else { mean }).collect()
            }
            Plane::Nothing => Vec::new(),
        }
    }

    /// The `count` values that `bytes` hold; all are finite.
    ///
    /// Nothing is allocated before the number of bytes is right.
    pub(super) fn decode(self, bytes: &[u8], count: usize) -> Result<Vec<f32>, DecodeError> {
        let expected = self.bytes(count);
        if bytes.len() != expected {
            return Err(DecodeError::Length { what: "values", found: bytes.len(), expected });
        }
        match self {
            Plane::F32 => {
                let (words, _) = bytes.as_chunks();
                all_finite(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
            }
            Plane::Bf16 => {
                let (words, _) = bytes.as_chunks();
                all_finite(words.iter().map(|word| bf16(u16::from_le_bytes(*word))).collect())
            }
            Plane::Levels(levels) => decode_levels(bytes, count, levels),
            Plane::Sign => {
                let (mean, signs) = bytes.split_first_chunk().unwrap_or((&[0; 4], &[]));
                let mean = f32::from_le_bytes(*mean);
                if !mean.is_finite() || mean.is_sign_negative() {
                    return Err(DecodeError::Value {
                        at: 0,
                        reason: "a mean magnitude is finite and not negative",
                    });
                }
                let mut reader = BitReader::new(signs);
                let values = (0..count).map(|_| if reader.take(1) == 1 { -mean } else { mean }).collect();
                if !reader.end() {
                    return Err(DecodeError::Value {
                        at: count,
                        reason: "the bits after the last sign are not zeros",
                    });
                }
                Ok(values)
            }
            Plane::Nothing => Ok(Vec::new()),
        }
    }
}

fn all_finite(values: Vec<f32>) -> Result<Vec<f32>, DecodeError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(DecodeError::Value { at, reason: "not a finite number" }),
        None => Ok(values),
    }
}

fn bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bf16 of a finite value below its range's end, ties to even.
fn nearest_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The least bf16 whose `levels`-fold is at least `largest`: 0 for 0.
fn step(largest: f32, levels: u16) -> u16 {
    let reaches = |bits: u16| f64::from(bf16(bits)) * f64::from(levels) >= f64::from(largest);
    let cut = ((largest / f32::from(levels)).to_bits() >> 16) as u16;
    // The quotient is rounded, then cut: the answer is one or two steps further.
    (cut..cut.saturating_add(3)).find(|bits| reaches(*bits)).unwrap_or(cut)
}

/// Bits of a code, 0 to 2·levels.
fn code_bits(levels: u16) -> u32 {
    32 - (u32::from(levels) * 2).leading_zeros()
}

/// Unbiased rounding to multiples of a step: of x/step, the fraction is the probability of rounding away from zero.
/// Alistarh et al. 2017, §3.1, in the variant of their experiments: buckets, scaled by the largest magnitude.
fn encode_levels<R: Rng + ?Sized>(values: &[f32], levels: u16, rng: &mut R, out: &mut Vec<u8>) -> Vec<f32> {
    let most = i32::from(levels);
    let mut received = Vec::with_capacity(values.len());
    let mut codes: Vec<u16> = Vec::with_capacity(values.len());
    let mut random = [0u8; 4 * VALUES_PER_SCALE];
    for block in values.chunks(VALUES_PER_SCALE) {
        let largest = block
            .iter()
            .fold(0f32, |largest, value| if value.abs() > largest { value.abs() } else { largest });
        let bits = step(largest, levels);
        out.extend(bits.to_le_bytes());
        let step = bf16(bits);
        let divisor = if step == 0.0 { 1.0 } else { step };
        let (coins, _) = random.as_chunks_mut::<4>();
        let coins = coins.get_mut(..block.len()).unwrap_or_default();
        rng.fill_bytes(coins.as_flattened_mut());
        for (value, coin) in block.iter().zip(coins) {
            let magnitude = value.abs() / divisor;
            let whole = magnitude as i32;
            // 24 random bits are a float's worth: a fraction's error is at most 2^-24 of a step.
            let coin = (u32::from_le_bytes(*coin) >> 8) as f32 * (1.0 / 16_777_216.0);
            let level = (whole + i32::from(coin < magnitude - whole as f32)).min(most);
            let level = if *value < 0.0 { -level } else { level };
            codes.push((level + most) as u16);
            received.push(level as f32 * step);
        }
    }
    if code_bits(levels) == 8 {
        out.extend(codes.iter().map(|code| *code as u8));
    } else {
        let mut writer = BitWriter::new(out);
        codes.iter().for_each(|code| writer.put(u32::from(*code), code_bits(levels)));
        writer.finish();
    }
    received
}

fn decode_levels(bytes: &[u8], count: usize, levels: u16) -> Result<Vec<f32>, DecodeError> {
    let most = i32::from(levels);
    let (steps, codes) = bytes.split_at_checked(count.div_ceil(VALUES_PER_SCALE) * 2).unwrap_or_default();
    let (steps, _) = steps.as_chunks();
    let mut values: Vec<f32> = Vec::with_capacity(count);
    let mut reader = BitReader::new(codes);
    for (block, bits) in steps.iter().enumerate() {
        let refuse = |at, reason| Err(DecodeError::Value { at, reason });
        let at = block * VALUES_PER_SCALE;
        let step = bf16(u16::from_le_bytes(*bits));
        if step.is_sign_negative() || !(step * f32::from(levels)).is_finite() {
            return refuse(at, "a scale is finite and not negative");
        }
        let here = VALUES_PER_SCALE.min(count - at);
        let mut largest = 0;
        let mut push = |code: u32| {
            largest = largest.max(code);
            values.push((code as i32 - most) as f32 * step);
        };
        if code_bits(levels) == 8 {
            codes.iter().skip(at).take(here).for_each(|code| push(u32::from(*code)));
        } else {
            (0..here).for_each(|_| push(reader.take(code_bits(levels))));
        }
        if largest > u32::from(levels) * 2 {
            return refuse(at, "a code among this and the next 255 is beyond the levels");
        }
    }
    if code_bits(levels) != 8 && !reader.end() {
        return Err(DecodeError::Value { at: count, reason: "the bits after the last code are not zeros" });
    }
    Ok(values)
}
