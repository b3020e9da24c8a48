//! The masks' key stream: AES-128 in counter mode, added to or subtracted from lanes as it is made.
//!
//! A stream's block `i` is AES-128 of `iv` (12 bytes) ‖ `i` (big-endian u32), from 0, as `Ctr32BE<Aes128>` of NIST
//! SP 800-38A yields it; its word `j` is the little-endian lane `j`. Word and block numbers count from the start of the
//! segment, so any part of a segment can be masked on its own.
//!
//! The kernels for processors with AES instructions are in `x86`, the one module here that is allowed `unsafe`. All
//! of them give the bits of the portable twin, which is the crate `aes`. Each key's stream is added to a part of the
//! lanes that stays in the first cache while all keys take their turn: a mask is never written to memory.

mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::keys::{MaskKey, Sign};
use super::ring::Lane;

/// Bytes of a cipher's block.
const BLOCK: usize = 16;
/// Bytes of one stream: its block counter has 32 bits and must not wrap, which would repeat the stream.
pub const STREAM_BYTES: u64 = (1 << 32) * BLOCK as u64;
/// Bytes of the part of the lanes that all keys pass over in turn: a third of a first cache of 48 KiB, half of one of
/// 32 KiB.
pub(super) const PART: usize = 16 * 1024;

/// Why a mask cannot be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MaskError {
    /// The stream is shorter than what it has to cover.
    #[error("a mask cannot cover lanes {offset} to {offset} + {lanes}: one stream has {STREAM_BYTES} bytes")]
    TooLong {
        /// First lane, from the start of the segment.
        offset: u64,
        /// Number of lanes.
        lanes: usize,
    },
}

/// What happens to a lane and the stream's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Add,
    Subtract,
    /// The lane becomes the word.
    Set,
}

impl From<Sign> for Operation {
    fn from(sign: Sign) -> Self {
        match sign {
            Sign::Add => Self::Add,
            Sign::Subtract => Self::Subtract,
        }
    }
}

/// A way to compute key streams, which this processor has. All give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backend(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    X86(x86::Kernel),
    Portable,
}

impl Backend {
    /// The crate `aes`, which every processor runs.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// All that this processor has, the fastest first, the portable one last.
    pub fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        all.extend(x86::Kernel::available().map(|kernel| Self(Kind::X86(kernel))));
        all.push(Self::PORTABLE);
        all
    }

    /// The fastest that this processor has.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = x86::Kernel::available().next() {
            return Self(Kind::X86(kernel));
        }
        Self::PORTABLE
    }

    /// Its name, for reports.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::X86(kernel) => kernel.name(),
            Kind::Portable => "portable",
        }
    }

    fn prepare(self, key: &MaskKey) -> Prepared {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::X86(kernel) => Prepared::X86(x86::Schedule::new(kernel, key)),
            Kind::Portable => Prepared::Portable(portable::Cipher::new(key)),
        }
    }
}

/// A key with its round keys, for one back end. Wiped when it is dropped.
enum Prepared {
    #[cfg(target_arch = "x86_64")]
    X86(x86::Schedule),
    Portable(portable::Cipher),
}

impl Prepared {
    /// Whole blocks from block `counter`; `lanes` is a multiple of a block, and the counter does not wrap.
    fn blocks<L: Lane>(&self, operation: Operation, counter: u32, lanes: &mut [L]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::X86(schedule) => schedule.blocks(operation, counter, lanes),
            Self::Portable(cipher) => cipher.blocks(operation, counter, lanes),
        }
    }

    /// Any number of lanes from lane `offset` of the stream. The caller has checked that the stream reaches so far.
    fn lanes<L: Lane>(&self, operation: Operation, offset: u64, lanes: &mut [L]) {
        let per_block = BLOCK / L::BYTES;
        let inside = (offset % per_block as u64) as usize;
        // Below 2^32, as the stream reaches past it.
        let mut counter = (offset / per_block as u64) as u32;
        let mut rest = lanes;
        if inside != 0 {
            let (head, behind) = rest.split_at_mut(rest.len().min(per_block - inside));
            self.partial(operation, counter, inside, head);
            counter = counter.wrapping_add(1);
            rest = behind;
        }
        let (whole, tail) = rest.split_at_mut(rest.len() / per_block * per_block);
        if !whole.is_empty() {
            self.blocks(operation, counter, whole);
        }
        if !tail.is_empty() {
            counter = counter.wrapping_add((whole.len() / per_block) as u32);
            self.partial(operation, counter, 0, tail);
        }
    }

    /// Lanes of one block, from its lane `inside`.
    fn partial<L: Lane>(&self, operation: Operation, counter: u32, inside: usize, lanes: &mut [L]) {
        // A block has at most eight lanes.
        let mut block = [L::default(); BLOCK / 2];
        let copy = |from: &[L], to: &mut [L]| from.iter().zip(to).for_each(|(from, to)| *to = *from);
        let Some(block) = block.get_mut(..BLOCK / L::BYTES) else { return };
        if let Some(place) = block.get_mut(inside..) {
            copy(lanes, place);
        }
        self.blocks(operation, counter, block);
        if let Some(place) = block.get(inside..) {
            copy(place, lanes);
        }
    }
}

/// Arithmetic on lanes that the compiler turns into vector instructions. Every instruction set gives the same bits.
pub(super) trait Vectorised {
    /// What it returns.
    type Output;
    /// Does it. It and all it calls is `inline(always)`: what is inlined is compiled for its caller's instructions.
    fn run(self) -> Self::Output;
}

/// Does `work` with the widest vectors of this processor.
pub(super) fn vectorised<W: Vectorised>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    return x86::vectorised(work);
    #[cfg(not(target_arch = "x86_64"))]
    work.run()
}

/// Whether one stream reaches over `lanes` lanes from lane `offset`.
fn check<L: Lane>(offset: u64, lanes: usize) -> Result<(), MaskError> {
    let end = offset.checked_add(lanes as u64).and_then(|end| end.checked_mul(L::BYTES as u64));
    match end {
        Some(end) if end <= STREAM_BYTES => Ok(()),
        _ => Err(MaskError::TooLong { offset, lanes }),
    }
}

/// Applies one mask to `lanes`, which begin at lane `offset` of their segment, modulo 2^lane.
///
/// # Errors
/// [`MaskError::TooLong`] beyond lane 2^36 / lane bytes.
pub fn apply<L: Lane>(
    backend: Backend,
    lanes: &mut [L],
    offset: u64,
    key: &MaskKey,
    sign: Sign,
) -> Result<(), MaskError> {
    check::<L>(offset, lanes.len())?;
    backend.prepare(key).lanes(sign.into(), offset, lanes);
    Ok(())
}

/// All masks of one segment, ready to be applied to any part of it.
pub(super) struct Masks(Vec<(Prepared, Operation)>);

impl Masks {
    pub(super) fn new<'a>(backend: Backend, terms: impl IntoIterator<Item = (&'a MaskKey, Sign)>) -> Self {
        Self(terms.into_iter().map(|(key, sign)| (backend.prepare(key), sign.into())).collect())
    }

    /// To the lanes from lane `offset` on; best no more than [`PART`] bytes at a time.
    ///
    /// # Errors
    /// [`MaskError::TooLong`] beyond lane 2^36 / lane bytes.
    pub(super) fn apply<L: Lane>(&self, lanes: &mut [L], offset: u64) -> Result<(), MaskError> {
        check::<L>(offset, lanes.len())?;
        self.0.iter().for_each(|(key, operation)| key.lanes(*operation, offset, lanes));
        Ok(())
    }
}

/// Applies all masks of one segment to its lanes, on up to `threads` threads, modulo 2^lane.
///
/// The result does not depend on the back end, on the number of threads or on the order of `terms`.
///
/// # Errors
/// [`MaskError::TooLong`] for more lanes than 2^36 / lane bytes. No lane has changed then.
pub fn apply_all<'a, L: Lane>(
    backend: Backend,
    lanes: &mut [L],
    terms: impl IntoIterator<Item = (&'a MaskKey, Sign)>,
    threads: NonZeroUsize,
) -> Result<(), MaskError> {
    check::<L>(0, lanes.len())?;
    let masks = Masks::new(backend, terms);
    let part = PART / L::BYTES;
    let parts = lanes.len().div_ceil(part);
    // Threads take part after part, so that one which is held up does not hold up all. A part is microseconds of work
    // for each key, and the lock is held for the step of an iterator.
    let queue = Mutex::new(lanes.chunks_mut(part).zip((0u64..).step_by(part)));
    let work = || -> Result<(), MaskError> {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((lanes, offset)) = next else { return Ok(()) };
            masks.apply(lanes, offset)?;
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.get().min(parts) {
            scope.spawn(work);
        }
        work()
    })
}

/// A fast stream of random words: a key stream whose key comes from a generator of the caller's choice.
///
/// It is as secret as that generator: with the operating system's it is a cryptographic generator, with a named stream
/// ([`crate::rng`]) anybody who knows the run's seed can repeat it.
pub struct KeyStream {
    key: Prepared,
    /// Words that were drawn.
    drawn: u64,
}

impl KeyStream {
    /// The stream of a key: the words that it would mask 32-bit lanes with.
    pub fn new(backend: Backend, key: &MaskKey) -> Self {
        Self { key: backend.prepare(key), drawn: 0 }
    }

    /// A stream whose key is the next 28 bytes of `rng`.
    pub fn from_rng(rng: &mut (impl rand::Rng + ?Sized)) -> Self {
        let mut key = MaskKey { key: [0; 16], iv: [0; 12] };
        rng.fill_bytes(&mut key.key);
        rng.fill_bytes(&mut key.iv);
        Self::new(Backend::best(), &key)
    }

    /// The next words. Filling in pieces gives the same words as at once.
    ///
    /// # Errors
    /// [`MaskError::TooLong`] past 2^34 words.
    pub fn fill(&mut self, words: &mut [u32]) -> Result<(), MaskError> {
        check::<u32>(self.drawn, words.len())?;
        self.key.lanes(Operation::Set, self.drawn, words);
        self.drawn += words.len() as u64;
        Ok(())
    }
}
