//! Integers modulo 2^b: their width, the lanes that hold them, how updates become them, how they travel.
//!
//! A client's update becomes integers between −Q and Q. Clients' integers are added modulo 2^b, with b so large that no
//! sum wraps: n·Q ≤ 2^(b−1) − 1 ([`Width::of_sum`]). In memory an integer has a lane of 16, 32 or 64 bits, of which the
//! low b bits count: 2^b divides 2^lane, so what happens above them does not matter. On the wire it has b bits.

/// Runs the same expression for each size of lanes.
macro_rules! each_lane {
    ($lanes:expr, $name:ident => $body:expr) => {
        match $lanes {
            Lanes::U16($name) => $body,
            Lanes::U32($name) => $body,
            Lanes::U64($name) => $body,
        }
    };
}

mod fixed;
mod packing;
#[cfg(test)]
mod tests;

use std::num::NonZeroUsize;

use super::keys::{MaskKey, Sign};
use super::mask::{self, Backend, MaskError};

pub use fixed::{Encoded, Fixed, Upload, Weight};

/// Why integers modulo 2^b cannot be made or read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RingError {
    /// There is no such width.
    #[error("{0} bits per coordinate are not possible: 2 to 64 are")]
    Bits(u32),
    /// The sum needs more than 64 bits.
    #[error("{clients} clients with integers up to {bound} need more than 64 bits per coordinate")]
    TooWide {
        /// Largest number of clients.
        clients: u64,
        /// Largest absolute value of a client's integer.
        bound: u64,
    },
    /// A sum could wrap.
    #[error("{clients} clients with integers up to {bound} do not fit {bits} bits per coordinate")]
    Wraps {
        /// Largest number of clients.
        clients: u64,
        /// Largest absolute value of a client's integer.
        bound: u64,
        /// Bits per coordinate.
        bits: u32,
    },
    /// An integer is outside of −(2^(b−1) − 1) to 2^(b−1) − 1.
    #[error("coordinate {at}: {value} does not fit {bits} bits")]
    Range {
        /// Its coordinate.
        at: usize,
        /// It.
        value: i64,
        /// Bits per coordinate.
        bits: u32,
    },
    /// Two vectors, or a vector and its bytes, differ in length.
    #[error("{found} {what} were given where {expected} are expected")]
    Length {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many are needed.
        expected: usize,
    },
    /// Two vectors differ in width.
    #[error("a vector of {found} bits per coordinate was given where one of {expected} is expected")]
    OtherWidth {
        /// Bits per coordinate of the given one.
        found: u32,
        /// Bits per coordinate of the expected one.
        expected: u32,
    },
    /// The last byte of packed integers has bits that belong to none.
    #[error("the bits behind the last coordinate are not zero")]
    Trailing,
    /// The length does not fit memory.
    #[error("{coordinates} coordinates of {bits} bits are too many")]
    TooLong {
        /// Number of coordinates.
        coordinates: usize,
        /// Bits per coordinate.
        bits: u32,
    },
    /// A value is not a number or infinite.
    #[error("coordinate {0} is no finite number")]
    NotFinite(usize),
    /// A fixed-point encoding is not possible.
    #[error("fixed point: {name} = {value}: {needed} is needed")]
    Encoding {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        needed: &'static str,
    },
    /// A key stream is at its end.
    #[error(transparent)]
    Stream(#[from] MaskError),
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for u16 {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}

/// An unsigned integer that holds one coordinate: `u16`, `u32` or `u64`, and nothing else ever.
pub trait Lane: sealed::Sealed + Copy + Default + Eq + Send + Sync + 'static {
    /// Its size.
    const BYTES: usize;
    /// The lane of its little-endian bytes; 0 if there are not [`Lane::BYTES`] of them.
    fn from_le_bytes(bytes: &[u8]) -> Self;
    /// Its low bits.
    fn from_low(bits: u64) -> Self;
    /// Zeros above.
    fn wide(self) -> u64;
    /// The sum modulo 2^lane.
    fn wrapping_add(self, other: Self) -> Self;
    /// The difference modulo 2^lane.
    fn wrapping_sub(self, other: Self) -> Self;
}

macro_rules! lane {
    ($($lane:ty),*) => {$(
        impl Lane for $lane {
            const BYTES: usize = size_of::<Self>();
            #[inline(always)]
            fn from_le_bytes(bytes: &[u8]) -> Self {
                bytes.try_into().map_or(0, Self::from_le_bytes)
            }
            #[inline(always)]
            fn from_low(bits: u64) -> Self {
                bits as Self
            }
            #[inline(always)]
            fn wide(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn wrapping_add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn wrapping_sub(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
        }
    )*};
}

lane!(u16, u32, u64);

/// Bits of a coordinate on the wire: b, from 2 to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Width(u32);

impl Width {
    /// b = `bits`.
    ///
    /// # Errors
    /// [`RingError::Bits`] outside of 2 to 64.
    pub fn new(bits: u32) -> Result<Self, RingError> {
        if (2..=64).contains(&bits) { Ok(Self(bits)) } else { Err(RingError::Bits(bits)) }
    }

    /// The smallest b with n·Q ≤ 2^(b−1) − 1: sums of up to `clients` integers from −`bound` to `bound` never wrap.
    ///
    /// Where the sum's bound is known as such, as with noise, it is `bound` and `clients` is 1.
    ///
    /// # Errors
    /// [`RingError::TooWide`] if that is more than 64.
    pub fn of_sum(clients: u64, bound: u64) -> Result<Self, RingError> {
        let largest = u128::from(clients) * u128::from(bound);
        let bits = (128 - largest.leading_zeros() + 1).max(2);
        Self::new(bits).map_err(|_| RingError::TooWide { clients, bound })
    }

    /// Checks n·Q ≤ 2^(b−1) − 1.
    ///
    /// # Errors
    /// [`RingError::Wraps`] if a sum of `clients` integers from −`bound` to `bound` could wrap.
    pub fn check_sum(self, clients: u64, bound: u64) -> Result<(), RingError> {
        let fits = u128::from(clients) * u128::from(bound) <= u128::from(self.largest().unsigned_abs());
        if fits { Ok(()) } else { Err(RingError::Wraps { clients, bound, bits: self.0 }) }
    }

    /// b.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Bytes of a lane in memory: 2, 4 or 8.
    pub fn lane_bytes(self) -> usize {
        match self.0 {
            ..=16 => 2,
            17..=32 => 4,
            _ => 8,
        }
    }

    /// 2^(b−1) − 1.
    pub fn largest(self) -> i64 {
        i64::MAX >> (64 - self.0)
    }

    /// Bytes of `coordinates` packed integers: ⌈coordinates·b / 8⌉.
    ///
    /// # Errors
    /// [`RingError::TooLong`] if it does not fit memory.
    pub fn packed_bytes(self, coordinates: usize) -> Result<usize, RingError> {
        let bits = coordinates.checked_mul(self.0 as usize);
        let bytes = bits.map(|bits| bits.div_ceil(8));
        bytes.ok_or(RingError::TooLong { coordinates, bits: self.0 })
    }

    /// The signed integer of a lane.
    #[inline]
    fn signed(self, lane: u64) -> i64 {
        let above = 64 - self.0;
        (lane << above) as i64 >> above
    }

    /// Ones in the low b bits.
    #[inline(always)]
    fn mask(self) -> u64 {
        u64::MAX >> (64 - self.0)
    }
}

/// Lanes of one of three sizes.
#[derive(Clone)]
enum Lanes {
    U16(Vec<u16>),
    U32(Vec<u32>),
    U64(Vec<u64>),
}

/// A vector of integers modulo 2^b: a client's update, masked or not, or a sum of them. It has no `Debug`: an update
/// that is not masked yet is private.
#[derive(Clone)]
pub struct RingVector {
    width: Width,
    lanes: Lanes,
}

impl RingVector {
    /// Zeros.
    pub fn zeros(width: Width, coordinates: usize) -> Self {
        let lanes = match width.lane_bytes() {
            2 => Lanes::U16(vec![0; coordinates]),
            4 => Lanes::U32(vec![0; coordinates]),
            _ => Lanes::U64(vec![0; coordinates]),
        };
        Self { width, lanes }
    }

    /// These integers.
    ///
    /// # Errors
    /// [`RingError::Range`] for one outside of −(2^(b−1) − 1) to 2^(b−1) − 1.
    pub fn from_signed(width: Width, values: &[i64]) -> Result<Self, RingError> {
        let largest = width.largest().unsigned_abs();
        if let Some((at, value)) = values.iter().enumerate().find(|(_, value)| value.unsigned_abs() > largest)
        {
            return Err(RingError::Range { at, value: *value, bits: width.0 });
        }
        let mut vector = Self::zeros(width, values.len());
        each_lane!(&mut vector.lanes, lanes => {
            lanes.iter_mut().zip(values).for_each(|(lane, value)| *lane = Lane::from_low(*value as u64));
        });
        Ok(vector)
    }

    /// The integers of exactly [`Width::packed_bytes`] bytes.
    ///
    /// # Errors
    /// [`RingError`] if there are more or fewer, or bits behind the last integer.
    pub fn unpack(width: Width, coordinates: usize, packed: &[u8]) -> Result<Self, RingError> {
        packing::check(width, coordinates, packed)?;
        let mut vector = Self::zeros(width, coordinates);
        each_lane!(&mut vector.lanes, lanes => packing::add(width, packed, lanes));
        Ok(vector)
    }

    /// b bits of each integer in turn, the lowest first, from the lowest bit of the first byte on; zeros behind them.
    ///
    /// # Errors
    /// [`RingError::TooLong`] if the bytes do not fit memory.
    pub fn pack(&self) -> Result<Vec<u8>, RingError> {
        let mut packed = vec![0; self.width.packed_bytes(self.len())?];
        each_lane!(&self.lanes, lanes => packing::pack(self.width, lanes, &mut packed));
        Ok(packed)
    }

    /// Adds the integers of a packed vector; nothing if there is an error.
    ///
    /// # Errors
    /// As [`RingVector::unpack`].
    pub fn add_packed(&mut self, packed: &[u8]) -> Result<(), RingError> {
        packing::check(self.width, self.len(), packed)?;
        each_lane!(&mut self.lanes, lanes => packing::add(self.width, packed, lanes));
        Ok(())
    }

    /// Adds a vector.
    ///
    /// # Errors
    /// [`RingError`] if it has another width or length.
    pub fn add(&mut self, other: &Self) -> Result<(), RingError> {
        let (expected, found) = (self.width.0, other.width.0);
        if found != expected {
            return Err(RingError::OtherWidth { found, expected });
        }
        let (expected, found) = (self.len(), other.len());
        if found != expected {
            return Err(RingError::Length { what: "coordinates", found, expected });
        }
        fn sum<L: Lane>(into: &mut [L], other: &[L]) {
            into.iter_mut().zip(other).for_each(|(into, other)| *into = into.wrapping_add(*other));
        }
        match (&mut self.lanes, &other.lanes) {
            (Lanes::U16(into), Lanes::U16(other)) => sum(into, other),
            (Lanes::U32(into), Lanes::U32(other)) => sum(into, other),
            (Lanes::U64(into), Lanes::U64(other)) => sum(into, other),
            // The width decides on the lane.
            _ => return Err(RingError::OtherWidth { found: other.width.0, expected: self.width.0 }),
        }
        Ok(())
    }

    /// Applies masks of this vector's segment, on up to `threads` threads, by the fastest back end.
    ///
    /// # Errors
    /// [`RingError::Stream`] if a stream is shorter than the vector.
    pub fn mask<'a>(
        &mut self,
        terms: impl IntoIterator<Item = (&'a MaskKey, Sign)>,
        threads: NonZeroUsize,
    ) -> Result<(), RingError> {
        self.mask_by(Backend::best(), terms, threads)
    }

    /// The same by a given back end, whose choice changes no bit.
    ///
    /// # Errors
    /// As [`RingVector::mask`].
    pub fn mask_by<'a>(
        &mut self,
        backend: Backend,
        terms: impl IntoIterator<Item = (&'a MaskKey, Sign)>,
        threads: NonZeroUsize,
    ) -> Result<(), RingError> {
        each_lane!(&mut self.lanes, lanes => mask::apply_all(backend, lanes, terms, threads))?;
        Ok(())
    }

    /// b.
    pub fn width(&self) -> Width {
        self.width
    }

    /// Number of coordinates.
    pub fn len(&self) -> usize {
        each_lane!(&self.lanes, lanes => lanes.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The integers, from −2^(b−1) to 2^(b−1) − 1.
    pub fn signed(&self) -> impl Iterator<Item = i64> + '_ {
        let (short, middle, long): (&[u16], &[u32], &[u64]) = match &self.lanes {
            Lanes::U16(lanes) => (lanes, &[], &[]),
            Lanes::U32(lanes) => (&[], lanes, &[]),
            Lanes::U64(lanes) => (&[], &[], lanes),
        };
        let narrow = short.iter().map(|lane| lane.wide()).chain(middle.iter().map(|lane| lane.wide()));
        narrow.chain(long.iter().copied()).map(|lane| self.width.signed(lane))
    }
}

/// Equal in width, length and every integer.
impl PartialEq for RingVector {
    fn eq(&self, other: &Self) -> bool {
        self.width == other.width && self.len() == other.len() && self.signed().eq(other.signed())
    }
}

impl Eq for RingVector {}
