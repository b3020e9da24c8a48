//! b bits per integer: the wire's form.
//!
//! Lanes are joined to units of up to 64 bits, as many as always fit: four lanes of 16 bits, two of 32, one of 64. A
//! group of 64 units of B bits fills exactly B words, and which bits of which unit a word has depends on B alone, so
//! there is one function without a branch for each B.

use super::super::mask::{Vectorised, vectorised};
use super::{Lane, RingError, Width};

/// Units of one group.
const UNITS: usize = 64;
/// Words of the largest group.
const WORDS: usize = 64;

/// Whether `packed` is the packed form of `coordinates` integers.
pub(super) fn check(width: Width, coordinates: usize, packed: &[u8]) -> Result<(), RingError> {
    let expected = width.packed_bytes(coordinates)?;
    if packed.len() != expected {
        return Err(RingError::Length { what: "bytes", found: packed.len(), expected });
    }
    // Less than a byte is left over, so it is in the last one.
    let over = (expected * 8 - coordinates * width.bits() as usize) as u32;
    let last = packed.last().copied().unwrap_or_default();
    if u32::from(last) >> (8 - over) != 0 { Err(RingError::Trailing) } else { Ok(()) }
}

/// Puts the packed form, which has as many bytes as `packed`, there. The next integers begin a new byte if there are a
/// multiple of eight.
pub(super) fn pack<L: Lane>(width: Width, lanes: &[L], packed: &mut [u8]) {
    let joined = 8 / L::BYTES;
    let unit = width.bits() * joined as u32;
    let (mut units, mut words) = ([0; UNITS], [0; WORDS]);
    for (lanes, place) in lanes.chunks(UNITS * joined).zip(packed.chunks_mut(UNITS / 8 * unit as usize)) {
        if lanes.len() < UNITS * joined {
            units.fill(0);
        }
        vectorised(Join { width, lanes, units: &mut units });
        units_to_words(unit, &units, &mut words);
        put(&words, place);
    }
}

/// Adds packed integers, which [`check`] has seen, to lanes.
pub(super) fn add<L: Lane>(width: Width, packed: &[u8], lanes: &mut [L]) {
    let joined = 8 / L::BYTES;
    let unit = width.bits() * joined as u32;
    let (mut units, mut words) = ([0; UNITS], [0; WORDS]);
    for (lanes, bytes) in lanes.chunks_mut(UNITS * joined).zip(packed.chunks(UNITS / 8 * unit as usize)) {
        take(bytes, &mut words);
        words_to_units(unit, &words, &mut units);
        vectorised(Split { width, units: &units, lanes });
    }
}

fn put(words: &[u64; WORDS], place: &mut [u8]) {
    let (whole, rest) = place.as_chunks_mut::<8>();
    whole.iter_mut().zip(words).for_each(|(bytes, word)| *bytes = word.to_le_bytes());
    let last = words.get(whole.len()).copied().unwrap_or_default().to_le_bytes();
    rest.iter_mut().zip(last).for_each(|(to, from)| *to = from);
}

/// What lies behind the bytes is left as it was: no integer has it.
fn take(bytes: &[u8], words: &mut [u64; WORDS]) {
    let (whole, rest) = bytes.as_chunks::<8>();
    words.iter_mut().zip(whole).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
    let mut last = [0; 8];
    last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    if let Some(word) = words.get_mut(whole.len()) {
        *word = u64::from_le_bytes(last);
    }
}

/// Lanes to units.
struct Join<'a, L> {
    width: Width,
    lanes: &'a [L],
    units: &'a mut [u64; UNITS],
}

impl<L: Lane> Vectorised for Join<'_, L> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (bits, mask) = (self.width.bits(), self.width.mask());
        let low = |lane: &L| lane.wide() & mask;
        let (quadruples, pairs, rest) =
            (self.lanes.as_chunks::<4>(), self.lanes.as_chunks::<2>(), self.lanes);
        match L::BYTES {
            2 => {
                for (unit, [a, b, c, d]) in self.units.iter_mut().zip(quadruples.0) {
                    *unit = low(a) | low(b) << bits | low(c) << (2 * bits) | low(d) << (3 * bits);
                }
                let behind = quadruples.1.iter().zip(0..).map(|(lane, at)| low(lane) << (at * bits));
                if let Some(unit) = self.units.get_mut(quadruples.0.len()) {
                    *unit = behind.fold(0, |unit, lane| unit | lane);
                }
            }
            4 => {
                for (unit, [a, b]) in self.units.iter_mut().zip(pairs.0) {
                    *unit = low(a) | low(b) << bits;
                }
                if let (Some(unit), [lane]) = (self.units.get_mut(pairs.0.len()), pairs.1) {
                    *unit = low(lane);
                }
            }
            _ => self.units.iter_mut().zip(rest).for_each(|(unit, lane)| *unit = low(lane)),
        }
    }
}

/// Units to lanes, to which they are added.
struct Split<'a, L> {
    width: Width,
    units: &'a [u64; UNITS],
    lanes: &'a mut [L],
}

impl<L: Lane> Vectorised for Split<'_, L> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (bits, mask) = (self.width.bits(), self.width.mask());
        let add = |lane: &mut L, unit: u64, at: u32| {
            *lane = lane.wrapping_add(L::from_low(unit >> (at * bits) & mask));
        };
        match L::BYTES {
            2 => {
                let (whole, rest) = self.lanes.as_chunks_mut::<4>();
                for ([a, b, c, d], unit) in whole.iter_mut().zip(self.units) {
                    add(a, *unit, 0);
                    add(b, *unit, 1);
                    add(c, *unit, 2);
                    add(d, *unit, 3);
                }
                let last = self.units.get(whole.len()).copied().unwrap_or_default();
                rest.iter_mut().zip(0..).for_each(|(lane, at)| add(lane, last, at));
            }
            4 => {
                let (whole, rest) = self.lanes.as_chunks_mut::<2>();
                for ([a, b], unit) in whole.iter_mut().zip(self.units) {
                    add(a, *unit, 0);
                    add(b, *unit, 1);
                }
                let last = self.units.get(whole.len()).copied().unwrap_or_default();
                rest.iter_mut().for_each(|lane| add(lane, last, 0));
            }
            _ => self.lanes.iter_mut().zip(self.units).for_each(|(lane, unit)| add(lane, *unit, 0)),
        }
    }
}

/// `$step` for each unit of a group, written out: the compiler does not unroll so much by itself.
macro_rules! each_unit {
    ($step:ident) => {
        each_unit!($step: 0 8 16 24 32 40 48 56);
    };
    ($step:ident: $($from:literal)*) => {$(
        $step!($from);
        $step!($from + 1);
        $step!($from + 2);
        $step!($from + 3);
        $step!($from + 4);
        $step!($from + 5);
        $step!($from + 6);
        $step!($from + 7);
    )*};
}

/// The first `B` words of `words` from units of `B` bits.
fn join<const B: usize>(units: &[u64; UNITS], words: &mut [u64; WORDS]) {
    let mut word = 0u64;
    macro_rules! step {
        ($at:expr) => {
            let (place, shift) = ($at * B / 64, $at * B % 64);
            word |= units[$at] << shift;
            if shift + B >= 64 {
                words[place] = word;
                // What did not fit; a shift by 64 is two.
                word = units[$at] >> (63 - shift) >> 1;
            }
        };
    }
    each_unit!(step);
    let _ = word;
}

/// Units of `B` bits, with what follows above them, from the first `B` words of `words`.
fn split<const B: usize>(words: &[u64; WORDS], units: &mut [u64; UNITS]) {
    macro_rules! step {
        ($at:expr) => {
            let (place, shift) = ($at * B / 64, $at * B % 64);
            let mut unit = words[place] >> shift;
            if shift + B > 64 {
                unit |= words[place + 1] << 1 << (63 - shift);
            }
            units[$at] = unit;
        };
    }
    each_unit!(step);
}

/// Calls a function for the number of bits in a unit.
macro_rules! by_bits {
    ($bits:expr, $function:ident($from:expr, $to:expr): $($each:literal)*) => {
        match $bits {
            $($each => $function::<$each>($from, $to),)*
            // A unit has 4b bits for b up to 16, 2b bits up to 32, b bits above.
            _ => {}
        }
    };
    ($bits:expr, $function:ident($from:expr, $to:expr)) => {
        by_bits!($bits, $function($from, $to):
            8 12 16 20 24 28 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48
            49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64)
    };
}

fn units_to_words(bits: u32, units: &[u64; UNITS], words: &mut [u64; WORDS]) {
    by_bits!(bits, join(units, words));
}

fn words_to_units(bits: u32, words: &[u64; WORDS], units: &mut [u64; UNITS]) {
    by_bits!(bits, split(words, units));
}
