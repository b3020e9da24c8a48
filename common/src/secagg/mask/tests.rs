//! Streams against published vectors, and every back end against the definition.

use std::num::NonZeroUsize;

use aes::Aes128;
use aes::cipher::{BlockCipherEncrypt as _, KeyInit as _};
use proptest::prelude::*;

use super::*;

fn key(key: [u8; 16], iv: [u8; 12]) -> MaskKey {
    MaskKey { key, iv }
}

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

/// Bytes `from` to `from + count` of a stream, block by block as it is defined.
fn stream(key: &MaskKey, from: u64, count: usize) -> Vec<u8> {
    let cipher = Aes128::new(&key.key.into());
    let block = |counter: u64| {
        let mut block = [0; 16];
        block[..12].copy_from_slice(&key.iv);
        block[12..].copy_from_slice(&u32::try_from(counter).unwrap().to_be_bytes());
        let mut block = block.into();
        cipher.encrypt_block(&mut block);
        block
    };
    let skipped = (from % 16) as usize;
    let blocks = from / 16..(from + count as u64).div_ceil(16);
    blocks.flat_map(block).skip(skipped).take(count).collect()
}

/// What masking `lanes` from lane `offset` on yields.
fn expected<L: Lane>(lanes: &[L], offset: u64, key: &MaskKey, sign: Sign) -> Vec<L> {
    let words = stream(key, offset * L::BYTES as u64, lanes.len() * L::BYTES);
    let combine = |(lane, word): (&L, &[u8])| match sign {
        Sign::Add => lane.wrapping_add(L::from_le_bytes(word)),
        Sign::Subtract => lane.wrapping_sub(L::from_le_bytes(word)),
    };
    lanes.iter().zip(words.chunks_exact(L::BYTES)).map(combine).collect()
}

fn hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
    digits.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}

/// NIST SP 800-38A, F.5.1: CTR-AES128, whose first counter is block 0xfcfdfeff.
#[test]
fn the_published_counter_mode() {
    let nist = key(
        hex("2b7e151628aed2a6abf7158809cf4f3c").try_into().unwrap(),
        hex("f0f1f2f3f4f5f6f7f8f9fafb").try_into().unwrap(),
    );
    let plain = hex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52ef\
         f69f2445df4f9b17ad2b417be66c3710",
    );
    let cipher = hex(
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff5ae4df3edbd5d35e5b4f09020db03eab\
         1e031dda2fbe03d1792170a0f3009cee",
    );
    for backend in Backend::available() {
        let mut lanes = [0u32; 16];
        apply(backend, &mut lanes, 0xfcfd_feff * 4, &nist, Sign::Add).unwrap();
        let words = lanes.iter().flat_map(|lane| lane.to_le_bytes());
        let encrypted: Vec<u8> = words.zip(&plain).map(|(word, plain)| word ^ plain).collect();
        assert_eq!(encrypted, cipher, "{}", backend.name());
    }
}

/// The known answers of the protocol, made by another implementation.
#[test]
fn the_protocols_known_answers() {
    let okm = |text: &str| {
        let bytes = hex(text);
        key(bytes[..16].try_into().unwrap(), bytes[16..].try_into().unwrap())
    };
    let pair = okm("861f4cf6612fa10af57ace1142ab8271fc05dd15fd8b813033577fe0");
    let own = okm("d5d5764c87c2023312abfbcdd7f443832871d55cc5ce41d993d3e95f");
    let pair_words = [
        0xbb9c_95c6,
        0x530b_d156,
        0x1980_21fa,
        0x59ed_6f2b,
        0xe330_4718,
        0xc0c7_5d23,
        0x806a_c58c,
        0x3901_a588u32,
    ];
    let own_words = [
        0x9885_e1b2,
        0x8c07_4f37,
        0xcb0f_0b97,
        0x0b0f_64fb,
        0x1ce6_fa9c,
        0x1855_bc4e,
        0xebcb_caa7,
        0xbaa1_13e9u32,
    ];
    for backend in Backend::available() {
        for (key, words) in [(&pair, pair_words), (&own, own_words)] {
            let mut lanes = [0u32; 8];
            apply(backend, &mut lanes, 0, key, Sign::Add).unwrap();
            assert_eq!(lanes, words, "{}", backend.name());
            let mut halves = [0u16; 16];
            apply(backend, &mut halves, 0, key, Sign::Add).unwrap();
            let joined =
                halves.as_chunks().0.iter().map(|&[low, high]| u32::from(low) | u32::from(high) << 16);
            assert!(joined.eq(words), "{}", backend.name());
        }
    }
}

fn agree<L: Lane + std::fmt::Debug>(
    lanes: &[L],
    offset: u64,
    key: &MaskKey,
    sign: Sign,
) -> Result<(), TestCaseError> {
    let expected = expected(lanes, offset, key, sign);
    for backend in Backend::available() {
        let mut masked = lanes.to_vec();
        apply(backend, &mut masked, offset, key, sign).unwrap();
        prop_assert_eq!(&masked, &expected, "{}", backend.name());
    }
    Ok(())
}

/// Numbers of lanes around the sizes at which a kernel changes its step, and any others.
fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![0..40usize, 0..1200usize, prop::sample::select(vec![127, 128, 129, 255, 256, 257, 511, 512])]
}

/// Offsets at the start, in the middle, and where the block counter has carries and its largest values.
fn offsets(lane_bytes: u64) -> impl Strategy<Value = u64> {
    let blocks = prop_oneof![
        Just(0u64),
        0..3000u64,
        (8..32u32, 0..64u64).prop_map(|(bits, back)| (1u64 << bits).saturating_sub(back)),
    ];
    let per_block = 16 / lane_bytes;
    (blocks, 0..per_block).prop_map(move |(blocks, inside)| blocks * per_block + inside)
}

fn signs() -> impl Strategy<Value = Sign> {
    prop::sample::select(vec![Sign::Add, Sign::Subtract])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn all_back_ends_agree_on_16_bits(
        bytes in any::<([u8; 16], [u8; 12])>(), length in lengths(), offset in offsets(2), sign in signs(),
    ) {
        let lanes: Vec<u16> = (0..length as u16).map(|at| at.wrapping_mul(40_503)).collect();
        agree(&lanes, offset, &key(bytes.0, bytes.1), sign)?;
    }

    #[test]
    fn all_back_ends_agree_on_32_bits(
        bytes in any::<([u8; 16], [u8; 12])>(), length in lengths(), offset in offsets(4), sign in signs(),
    ) {
        let lanes: Vec<u32> = (0..length as u32).map(|at| at.wrapping_mul(2_654_435_761)).collect();
        agree(&lanes, offset, &key(bytes.0, bytes.1), sign)?;
    }

    #[test]
    fn all_back_ends_agree_on_64_bits(
        bytes in any::<([u8; 16], [u8; 12])>(), length in lengths(), offset in offsets(8), sign in signs(),
    ) {
        let lanes: Vec<u64> = (0..length as u64).map(|at| at.wrapping_mul(11_400_714_819_323_198_485)).collect();
        agree(&lanes, offset, &key(bytes.0, bytes.1), sign)?;
    }

    #[test]
    fn masking_in_pieces_is_masking_at_once(
        bytes in any::<([u8; 16], [u8; 12])>(), length in 1..600usize, cut in any::<prop::sample::Index>(),
    ) {
        let key = key(bytes.0, bytes.1);
        let cut = cut.index(length);
        for backend in Backend::available() {
            let mut whole = vec![7u32; length];
            apply(backend, &mut whole, 0, &key, Sign::Subtract).unwrap();
            let mut pieces = vec![7u32; length];
            let (head, tail) = pieces.split_at_mut(cut);
            apply(backend, tail, cut as u64, &key, Sign::Subtract).unwrap();
            apply(backend, head, 0, &key, Sign::Subtract).unwrap();
            prop_assert_eq!(&whole, &pieces);

            let mut words = vec![0u32; length];
            let mut stream = KeyStream::new(backend, &key);
            stream.fill(&mut words[..cut]).unwrap();
            stream.fill(&mut words[cut..]).unwrap();
            prop_assert!(words.iter().zip(&whole).all(|(word, masked)| 7u32.wrapping_sub(*word) == *masked));
        }
    }
}

/// Many keys over several parts: no order, no back end and no number of threads changes a bit.
#[test]
fn all_masks_at_once_are_one_after_the_other() {
    let keys: Vec<MaskKey> = (0..9).map(|at| key([at; 16], [at + 100; 12])).collect();
    let terms: Vec<(&MaskKey, Sign)> = keys
        .iter()
        .enumerate()
        .map(|(at, key)| (key, if at % 3 == 0 { Sign::Subtract } else { Sign::Add }))
        .collect();
    // Three parts and a bit, the last with half a block.
    let lanes: Vec<u32> = (0..3 * 4096 + 57).collect();
    let mut expected_lanes = lanes.clone();
    for (key, sign) in &terms {
        expected_lanes = expected(&expected_lanes, 0, key, *sign);
    }
    for backend in Backend::available() {
        for count in [1, 2, 3, 64] {
            let mut masked = lanes.clone();
            apply_all(backend, &mut masked, terms.iter().rev().copied(), threads(count)).unwrap();
            assert_eq!(masked, expected_lanes, "{}, {count} threads", backend.name());
            let back = terms.iter().map(|(key, sign)| (*key, sign.opposite()));
            apply_all(backend, &mut masked, back, threads(count)).unwrap();
            assert_eq!(masked, lanes, "{}, {count} threads", backend.name());
        }
    }
    assert_eq!(apply_all(Backend::best(), &mut [0u32; 0], terms, threads(4)), Ok(()));
}

#[test]
fn a_stream_ends_where_its_counter_would_wrap() {
    fn ends<L: Lane + std::fmt::Debug>() {
        let lanes = STREAM_BYTES / L::BYTES as u64;
        let key = key([3; 16], [4; 12]);
        for backend in Backend::available() {
            let mut last = [L::default(); 3];
            assert_eq!(apply(backend, &mut last, lanes - 3, &key, Sign::Add), Ok(()));
            assert_eq!(last.to_vec(), expected(&[L::default(); 3], lanes - 3, &key, Sign::Add));
            for offset in [lanes - 2, lanes, u64::MAX] {
                let refused = Err(MaskError::TooLong { offset, lanes: 3 });
                assert_eq!(apply(backend, &mut last, offset, &key, Sign::Add), refused);
            }
        }
    }
    ends::<u16>();
    ends::<u32>();
    ends::<u64>();
}

/// χ² of the low `bits` bits of masked lanes, in standard deviations from its mean.
fn deviation<L: Lane>(masked: &[L], bits: u32) -> f64 {
    let cells = 1usize << bits;
    let mut counts = vec![0u32; cells];
    masked.iter().for_each(|lane| counts[(lane.wide() & (cells as u64 - 1)) as usize] += 1);
    let mean = masked.len() as f64 / cells as f64;
    let square: f64 = counts.iter().map(|count| (f64::from(*count) - mean).powi(2) / mean).sum();
    (square - (cells - 1) as f64) / (2.0 * (cells - 1) as f64).sqrt()
}

/// What a coordinator receives says nothing about an update: its coordinates are uniform, whatever the update is.
#[test]
fn masked_updates_are_uniform() {
    fn check<L: Lane>(constant: u64, bits: u32) {
        let keys: Vec<MaskKey> = (0..5).map(|at| key([at ^ 0x5a; 16], [at; 12])).collect();
        let terms = || {
            keys.iter().enumerate().map(|(at, key)| (key, if at < 3 { Sign::Add } else { Sign::Subtract }))
        };
        let mut lanes = vec![L::from_low(constant); 1 << 18];
        // A constant is as far from uniform as can be: the test can tell.
        assert!(deviation(&lanes, bits) > 1e4);
        apply_all(Backend::best(), &mut lanes, terms(), threads(1)).unwrap();
        let found = deviation(&lanes, bits);
        assert!(found.abs() < 4.0, "{bits} bits, constant {constant}: {found} standard deviations");
    }
    for constant in [0, 1, 12_345, u64::MAX] {
        for bits in [1, 2, 5, 8, 11, 12] {
            check::<u16>(constant, bits);
            check::<u32>(constant, bits);
            check::<u64>(constant, bits);
        }
    }
}
