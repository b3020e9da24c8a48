//! b bits per integer: the wire's form, made and read 64 integers at a time, which fill exactly b words of 64 bits.

use super::{Lane, RingError, Width};

/// Integers of one group.
const GROUP: usize = 64;
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

/// The packed form, which has `bytes` bytes.
pub(super) fn pack<L: Lane>(width: Width, lanes: &[L], bytes: usize) -> Vec<u8> {
    let mut packed = vec![0; bytes];
    let mut words = [0u64; WORDS];
    let per_group = width.bits() as usize * 8;
    let (groups, rest) = lanes.as_chunks::<GROUP>();
    let (whole, tail) = packed.split_at_mut(groups.len() * per_group);
    for (group, place) in groups.iter().zip(whole.chunks_exact_mut(per_group)) {
        group_to_words(width, group, &mut words);
        put(&words, place);
    }
    if !rest.is_empty() {
        let mut group = [L::default(); GROUP];
        group.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        group_to_words(width, &group, &mut words);
        put(&words, tail);
    }
    packed
}

/// Adds packed integers, which [`check`] has seen, to lanes.
pub(super) fn add<L: Lane>(width: Width, packed: &[u8], lanes: &mut [L]) {
    let mut words = [0u64; WORDS + 1];
    let per_group = width.bits() as usize * 8;
    let (groups, rest) = lanes.as_chunks_mut::<GROUP>();
    let (whole, tail) = packed.split_at(groups.len() * per_group);
    for (group, bytes) in groups.iter_mut().zip(whole.chunks_exact(per_group)) {
        take(bytes, &mut words);
        add_words(width, &words, group);
    }
    if !rest.is_empty() {
        words.fill(0);
        take(tail, &mut words);
        let mut group = [L::default(); GROUP];
        add_words(width, &words, &mut group);
        rest.iter_mut().zip(group).for_each(|(lane, value)| *lane = lane.wrapping_add(value));
    }
}

fn put(words: &[u64; WORDS], place: &mut [u8]) {
    for (bytes, word) in place.chunks_mut(8).zip(words) {
        bytes.iter_mut().zip(word.to_le_bytes()).for_each(|(to, from)| *to = from);
    }
}

fn take(bytes: &[u8], words: &mut [u64; WORDS + 1]) {
    for (bytes, word) in bytes.chunks(8).zip(words) {
        let mut whole = [0; 8];
        whole.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        *word = u64::from_le_bytes(whole);
    }
}

/// The low b bits of 64 lanes, one behind the other.
#[inline]
fn group_to_words<L: Lane>(width: Width, group: &[L; GROUP], words: &mut [u64; WORDS]) {
    let (bits, mask) = (width.bits(), width.mask());
    // As many lanes as always fit 64 bits are joined first: the chain of shifts below is that much shorter.
    let joined = 8 / L::BYTES;
    let unit = bits * joined as u32;
    let (mut word, mut filled, mut at) = (0u64, 0u32, 0usize);
    for lanes in group.chunks_exact(joined) {
        let mut value = 0;
        for (place, lane) in lanes.iter().enumerate() {
            value |= (lane.wide() & mask) << (bits * place as u32);
        }
        word |= value << filled;
        // Written again until it is full: no branch that depends on b.
        if let Some(place) = words.get_mut(at) {
            *place = word;
        }
        filled += unit;
        if filled >= 64 {
            filled -= 64;
            at += 1;
            // What did not fit; a shift by 64 is two.
            word = value >> (unit - filled - 1) >> 1;
        }
    }
}

/// Adds the 64 integers of b words to lanes. The word behind them is not used but read.
#[inline]
fn add_words<L: Lane>(width: Width, words: &[u64; WORDS + 1], group: &mut [L; GROUP]) {
    let (bits, mask) = (width.bits(), width.mask());
    let joined = 8 / L::BYTES;
    let unit = bits * joined as u32;
    let mut from = 0u32;
    for lanes in group.chunks_exact_mut(joined) {
        let (at, shift) = ((from / 64) as usize, from % 64);
        let low = words.get(at).copied().unwrap_or_default();
        let high = words.get(at + 1).copied().unwrap_or_default();
        // A shift by 64 is two.
        let value = low >> shift | high << 1 << (63 - shift);
        for (place, lane) in lanes.iter_mut().enumerate() {
            *lane = lane.wrapping_add(L::from_low(value >> (bits * place as u32) & mask));
        }
        from += unit;
    }
}
