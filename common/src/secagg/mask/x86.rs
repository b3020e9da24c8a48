//! Key streams by the AES instructions of x86-64 processors, one block, two or four at a time.
//!
//! The one module of this crate with `unsafe`: loads, stores, and calls of functions that need instructions which were
//! looked for at run time ([`Kernel::available`]).

use std::arch::x86_64::*;

use zeroize::ZeroizeOnDrop;

use super::super::keys::MaskKey;
use super::super::ring::Lane;
use super::{BLOCK, Operation, Vectorised};

/// Round keys of AES-128.
const ROUND_KEYS: usize = 11;
/// Vectors in flight: enough for the latency of a round on every processor with these instructions.
const FLIGHT: usize = 8;

const ADD: u8 = 0;
const SUBTRACT: u8 = 1;
const SET: u8 = 2;

/// Which byte of a block goes where: the last four are turned round.
const TURNED: [u8; BLOCK] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 14, 13, 12];

/// A kernel. A value exists only on a processor that has its instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel(Width);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    /// VAES on AVX-512: four blocks in a vector.
    Four,
    /// VAES on AVX2: two blocks in a vector.
    Two,
    /// AES-NI: a block in a vector.
    One,
}

impl Kernel {
    /// The kernels of this processor, the fastest first.
    pub(super) fn available() -> impl Iterator<Item = Self> {
        let one = is_x86_feature_detected!("aes") && is_x86_feature_detected!("ssse3");
        let two = one && is_x86_feature_detected!("vaes") && is_x86_feature_detected!("avx2");
        let four = two && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        let all = [(four, Width::Four), (two, Width::Two), (one, Width::One)];
        all.into_iter().filter(|(has, _)| *has).map(|(_, width)| Self(width))
    }

    pub(super) fn name(self) -> &'static str {
        match self.0 {
            Width::Four => "vaes-512",
            Width::Two => "vaes-256",
            Width::One => "aes-ni",
        }
    }
}

/// A key's round keys and the first 12 bytes of its blocks.
#[derive(ZeroizeOnDrop)]
#[repr(align(16))]
pub(super) struct Schedule {
    round_keys: [[u8; BLOCK]; ROUND_KEYS],
    /// `iv` and four bytes for the counter.
    iv: [u8; BLOCK],
    #[zeroize(skip)]
    kernel: Kernel,
}

impl Schedule {
    pub(super) fn new(kernel: Kernel, key: &MaskKey) -> Self {
        let mut schedule = Self { round_keys: [[0; BLOCK]; ROUND_KEYS], iv: [0; BLOCK], kernel };
        schedule.iv.iter_mut().zip(&key.iv).for_each(|(to, from)| *to = *from);
        // SAFETY: every `Kernel` stands for a processor with AES-NI (`Kernel::available`).
        unsafe { expand(&key.key, &mut schedule.round_keys) };
        schedule
    }

    /// Whole blocks from block `counter`.
    pub(super) fn blocks<L: Lane>(&self, operation: Operation, counter: u32, lanes: &mut [L]) {
        match operation {
            Operation::Add => self.with::<L, ADD>(counter, lanes),
            Operation::Subtract => self.with::<L, SUBTRACT>(counter, lanes),
            Operation::Set => self.with::<L, SET>(counter, lanes),
        }
    }

    #[inline]
    fn with<L: Lane, const OPERATION: u8>(&self, counter: u32, lanes: &mut [L]) {
        match self.kernel.0 {
            // SAFETY: this kernel's instructions were found (`Kernel::available`).
            Width::Four => unsafe { four::blocks::<L, OPERATION>(self, counter, lanes) },
            // SAFETY: as above.
            Width::Two => unsafe { two::blocks::<L, OPERATION>(self, counter, lanes) },
            // SAFETY: as above.
            Width::One => unsafe { one::blocks::<L, OPERATION>(self, counter, lanes) },
        }
    }
}

/// Runs `work`, compiled for the widest vectors of this processor.
pub(super) fn vectorised<W: Vectorised>(work: W) -> W::Output {
    if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
    {
        // SAFETY: the processor has these instructions.
        unsafe { on_avx512(work) }
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: as above.
        unsafe { on_avx2(work) }
    } else {
        work.run()
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn on_avx512<W: Vectorised>(work: W) -> W::Output {
    work.run()
}

#[target_feature(enable = "avx2")]
fn on_avx2<W: Vectorised>(work: W) -> W::Output {
    work.run()
}

/// The key schedule of AES-128 (FIPS 197, section 5.2).
#[target_feature(enable = "aes")]
fn expand(key: &[u8; BLOCK], round_keys: &mut [[u8; BLOCK]; ROUND_KEYS]) {
    #[inline]
    #[target_feature(enable = "aes")]
    fn next<const CONSTANT: i32>(key: __m128i) -> __m128i {
        let word = _mm_shuffle_epi32::<0xff>(_mm_aeskeygenassist_si128::<CONSTANT>(key));
        let key = _mm_xor_si128(key, _mm_slli_si128::<4>(key));
        let key = _mm_xor_si128(key, _mm_slli_si128::<8>(key));
        _mm_xor_si128(key, word)
    }
    // SAFETY: the key has 16 bytes; the load needs no alignment.
    let k0 = unsafe { _mm_loadu_si128(key.as_ptr().cast()) };
    let k1 = next::<0x01>(k0);
    let k2 = next::<0x02>(k1);
    let k3 = next::<0x04>(k2);
    let k4 = next::<0x08>(k3);
    let k5 = next::<0x10>(k4);
    let k6 = next::<0x20>(k5);
    let k7 = next::<0x40>(k6);
    let k8 = next::<0x80>(k7);
    let k9 = next::<0x1b>(k8);
    let k10 = next::<0x36>(k9);
    for (bytes, key) in round_keys.iter_mut().zip([k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10]) {
        // SAFETY: a round key has 16 bytes; the store needs no alignment.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), key) };
    }
}

/// The kernel for vectors of `$blocks` blocks: whole blocks from block `counter` on, [`FLIGHT`] vectors at a time, then
/// one by one; what is less than a vector is left to the `$narrower` kernel.
macro_rules! kernel {
    ($features:literal, $blocks:literal, $narrower:path) => {
        #[target_feature(enable = $features)]
        pub(super) fn blocks<L: Lane, const OPERATION: u8>(
            schedule: &Schedule,
            counter: u32,
            lanes: &mut [L],
        ) {
            let keys: [Vector; ROUND_KEYS] =
                std::array::from_fn(|round| broadcast(&schedule.round_keys[round]));
            let [whitening, middle @ .., last] = keys;
            // The counter stays little-endian in the fourth word of each block, and is turned round for each block.
            let mut next = add::<u32>(broadcast(&schedule.iv), first(counter));
            let step = every_fourth($blocks);
            let per_vector = $blocks * BLOCK / L::BYTES;
            let total = lanes.len();
            let mut flights = lanes.chunks_exact_mut(FLIGHT * per_vector);
            for lanes in &mut flights {
                let mut states = [whitening; FLIGHT];
                for state in &mut states {
                    *state = xor(big_endian(next), whitening);
                    next = add::<u32>(next, step);
                }
                for key in middle {
                    for state in &mut states {
                        *state = round(*state, key);
                    }
                }
                for (state, lanes) in states.into_iter().zip(lanes.chunks_exact_mut(per_vector)) {
                    combine::<L, OPERATION>(last_round(state, last), lanes);
                }
            }
            let mut vectors = flights.into_remainder().chunks_exact_mut(per_vector);
            for lanes in &mut vectors {
                let mut state = xor(big_endian(next), whitening);
                next = add::<u32>(next, step);
                for key in middle {
                    state = round(state, key);
                }
                combine::<L, OPERATION>(last_round(state, last), lanes);
            }
            let rest = vectors.into_remainder();
            if !rest.is_empty() {
                let done = (total - rest.len()) * L::BYTES / BLOCK;
                $narrower(schedule, counter.wrapping_add(done as u32), rest);
            }
        }

        /// Adds the words to the lanes, subtracts them, or puts them there. `lanes` has the size of a vector.
        #[inline]
        #[target_feature(enable = $features)]
        fn combine<L: Lane, const OPERATION: u8>(words: Vector, lanes: &mut [L]) {
            assert!(size_of_val(lanes) == size_of::<Vector>());
            let place: *mut Vector = lanes.as_mut_ptr().cast();
            let result = match OPERATION {
                // SAFETY: as many bytes as a vector has can be read there (asserted); no alignment is needed.
                ADD => add::<L>(unsafe { load(place) }, words),
                // SAFETY: as above.
                SUBTRACT => subtract::<L>(unsafe { load(place) }, words),
                _ => words,
            };
            // SAFETY: as many bytes as a vector has can be written there, and any bits make a lane.
            unsafe { store(place, result) };
        }
    };
}

/// VAES on AVX-512.
mod four {
    use super::*;

    type Vector = __m512i;

    kernel!("aes,vaes,avx2,avx512f,avx512bw", 4, super::two::blocks::<L, OPERATION>);

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn broadcast(block: &[u8; BLOCK]) -> Vector {
        // SAFETY: a block has 16 bytes; the load needs no alignment.
        _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(block.as_ptr().cast()) })
    }

    /// The counters of the first four blocks.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn first(counter: u32) -> Vector {
        let [a, b, c, d] = [0, 1, 2, 3].map(|at| counter.wrapping_add(at) as i32);
        _mm512_setr_epi32(0, 0, 0, a, 0, 0, 0, b, 0, 0, 0, c, 0, 0, 0, d)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn every_fourth(count: i32) -> Vector {
        _mm512_setr_epi32(0, 0, 0, count, 0, 0, 0, count, 0, 0, 0, count, 0, 0, 0, count)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn big_endian(counters: Vector) -> Vector {
        _mm512_shuffle_epi8(counters, broadcast(&TURNED))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn xor(one: Vector, other: Vector) -> Vector {
        _mm512_xor_si512(one, other)
    }

    #[inline]
    #[target_feature(enable = "vaes,avx512f")]
    fn round(state: Vector, key: Vector) -> Vector {
        _mm512_aesenc_epi128(state, key)
    }

    #[inline]
    #[target_feature(enable = "vaes,avx512f")]
    fn last_round(state: Vector, key: Vector) -> Vector {
        _mm512_aesenclast_epi128(state, key)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn add<L: Lane>(one: Vector, other: Vector) -> Vector {
        match L::BYTES {
            2 => _mm512_add_epi16(one, other),
            4 => _mm512_add_epi32(one, other),
            _ => _mm512_add_epi64(one, other),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn subtract<L: Lane>(one: Vector, other: Vector) -> Vector {
        match L::BYTES {
            2 => _mm512_sub_epi16(one, other),
            4 => _mm512_sub_epi32(one, other),
            _ => _mm512_sub_epi64(one, other),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(place: *const Vector) -> Vector {
        // SAFETY: the caller vouches for 64 readable bytes.
        unsafe { _mm512_loadu_si512(place) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(place: *mut Vector, vector: Vector) {
        // SAFETY: the caller vouches for 64 writable bytes.
        unsafe { _mm512_storeu_si512(place, vector) };
    }
}

/// VAES on AVX2.
mod two {
    use super::*;

    type Vector = __m256i;

    kernel!("aes,vaes,avx2", 2, super::one::blocks::<L, OPERATION>);

    #[inline]
    #[target_feature(enable = "avx2")]
    fn broadcast(block: &[u8; BLOCK]) -> Vector {
        // SAFETY: a block has 16 bytes; the load needs no alignment.
        _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(block.as_ptr().cast()) })
    }

    /// The counters of the first two blocks.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn first(counter: u32) -> Vector {
        let [a, b] = [0, 1].map(|at| counter.wrapping_add(at) as i32);
        _mm256_setr_epi32(0, 0, 0, a, 0, 0, 0, b)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn every_fourth(count: i32) -> Vector {
        _mm256_setr_epi32(0, 0, 0, count, 0, 0, 0, count)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn big_endian(counters: Vector) -> Vector {
        _mm256_shuffle_epi8(counters, broadcast(&TURNED))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn xor(one: Vector, other: Vector) -> Vector {
        _mm256_xor_si256(one, other)
    }

    #[inline]
    #[target_feature(enable = "vaes,avx2")]
    fn round(state: Vector, key: Vector) -> Vector {
        _mm256_aesenc_epi128(state, key)
    }

    #[inline]
    #[target_feature(enable = "vaes,avx2")]
    fn last_round(state: Vector, key: Vector) -> Vector {
        _mm256_aesenclast_epi128(state, key)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn add<L: Lane>(one: Vector, other: Vector) -> Vector {
        match L::BYTES {
            2 => _mm256_add_epi16(one, other),
            4 => _mm256_add_epi32(one, other),
            _ => _mm256_add_epi64(one, other),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn subtract<L: Lane>(one: Vector, other: Vector) -> Vector {
        match L::BYTES {
            2 => _mm256_sub_epi16(one, other),
            4 => _mm256_sub_epi32(one, other),
            _ => _mm256_sub_epi64(one, other),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(place: *const Vector) -> Vector {
        // SAFETY: the caller vouches for 32 readable bytes.
        unsafe { _mm256_loadu_si256(place) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store(place: *mut Vector, vector: Vector) {
        // SAFETY: the caller vouches for 32 writable bytes.
        unsafe { _mm256_storeu_si256(place, vector) };
    }
}

/// AES-NI.
mod one {
    use super::*;

    type Vector = __m128i;

    kernel!("aes,ssse3", 1, nothing_is_left);

    /// Less than one block is never left.
    fn nothing_is_left<L: Lane>(_: &Schedule, _: u32, _: &mut [L]) {}

    #[inline]
    #[target_feature(enable = "sse2")]
    fn broadcast(block: &[u8; BLOCK]) -> Vector {
        // SAFETY: a block has 16 bytes; the load needs no alignment.
        unsafe { _mm_loadu_si128(block.as_ptr().cast()) }
    }

    /// The counter of the first block.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn first(counter: u32) -> Vector {
        _mm_setr_epi32(0, 0, 0, counter as i32)
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn every_fourth(count: i32) -> Vector {
        _mm_setr_epi32(0, 0, 0, count)
    }

    #[inline]
    #[target_feature(enable = "ssse3")]
    fn big_endian(counters: Vector) -> Vector {
        _mm_shuffle_epi8(counters, broadcast(&TURNED))
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn xor(one: Vector, other: Vector) -> Vector {
        _mm_xor_si128(one, other)
    }

    #[inline]
    #[target_feature(enable = "aes")]
    fn round(state: Vector, key: Vector) -> Vector {
        _mm_aesenc_si128(state, key)
    }

    #[inline]
    #[target_feature(enable = "aes")]
    fn last_round(state: Vector, key: Vector) -> Vector {
        _mm_aesenclast_si128(state, key)
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn add<L: Lane>(one: Vector, other: Vector) -> Vector {
        match L::BYTES {
            2 => _mm_add_epi16(one, other),
            4 => _mm_add_epi32(one, other),
            _ => _mm_add_epi64(one, other),
        }
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn subtract<L: Lane>(one: Vector, other: Vector) -> Vector {
        match L::BYTES {
            2 => _mm_sub_epi16(one, other),
            4 => _mm_sub_epi32(one, other),
            _ => _mm_sub_epi64(one, other),
        }
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    unsafe fn load(place: *const Vector) -> Vector {
        // SAFETY: the caller vouches for 16 readable bytes.
        unsafe { _mm_loadu_si128(place) }
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    unsafe fn store(place: *mut Vector, vector: Vector) {
        // SAFETY: the caller vouches for 16 writable bytes.
        unsafe { _mm_storeu_si128(place, vector) };
    }
}
