//! Times masking against the rate of its cipher: `cargo bench --workspace --bench secagg -- [DIMENSION…]`.
//!
//! The floor of a piece of work is its bytes of key stream at the rate at which the same back end writes key stream
//! into a part of the first cache, measured before and after each repeat. A ratio is the median over the repeats;
//! `best`, the shortest time over the shortest floor, tells more on a machine that others use too.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::Instant;

use tributary_common::privacy::noise::SecretRng;
use tributary_common::secagg::keys::{MaskKey, MaskTerm, Sign};
use tributary_common::secagg::mask::{Backend, KeyStream, apply_all};
use tributary_common::secagg::ring::{Fixed, Lane, Weight};
use tributary_common::secagg::sum::MaskedSum;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const DIMENSIONS: [usize; 3] = [100_000, 1_000_000, 10_000_000];
/// Clients, neighbours of each, bits of a value.
const COHORTS: [(usize, usize, u32); 4] = [(100, 99, 8), (100, 99, 16), (500, 116, 16), (1000, 148, 16)];
const REPEATS: usize = 7;
/// Words of the part of the first cache that the floor is measured on.
const PART: usize = 4096;
/// Bytes of one measurement of the floor: as many as the work has, within these. Short ones fall between two slices of a
/// busy machine's time, and long ones do not.
const FLOOR_BYTES: std::ops::RangeInclusive<usize> = 1 << 26..=1 << 30;
/// Most bytes of key stream in one measurement of the coordinator's part; larger sums are measured with fewer masks.
const MOST_BYTES: usize = 40_000_000_000;

fn main() -> Outcome<()> {
    let asked: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let dimensions = if asked.is_empty() { DIMENSIONS.to_vec() } else { asked };
    let mut rng = SecretRng::new()?;
    back_ends(&mut rng)?;
    // The portable one is for processors without the others; it would take minutes here.
    let mut measured = Backend::available();
    if measured.len() > 1 {
        measured.pop();
    }
    clients(&mut rng, &measured, &dimensions)?;
    coordinator(&mut rng, &measured, &dimensions)
}

fn back_ends(rng: &mut SecretRng) -> Outcome<()> {
    println!(
        "backend     stream  16 bits  32 bits  64 bits  GB/s on one thread: written, and added to lanes"
    );
    let keys = keys(rng, 64);
    for backend in Backend::available() {
        let stream = best(|| rate(backend, &keys, 0));
        let added = [
            best(|| added::<u16>(backend, &keys)),
            best(|| added::<u32>(backend, &keys)),
            best(|| added::<u64>(backend, &keys)),
        ];
        let [short, middle, long] = added;
        println!("{:10} {stream:7.2}  {short:7.2}  {middle:7.2}  {long:7.2}", backend.name());
    }
    println!();
    Ok(())
}

/// The masked stage of a client: rounding, masks, packing.
fn clients(rng: &mut SecretRng, backends: &[Backend], dimensions: &[usize]) -> Outcome<()> {
    println!(
        "client: clients  neighbours  parameters  bits  backend     floor    stage  stage / floor   best  rounding    masks  \
         packing  ms"
    );
    let keys = keys(rng, 1 + COHORTS.iter().map(|(_, neighbours, _)| neighbours).max().unwrap_or(&0));
    let mut pieces = Vec::new();
    for &dimension in dimensions {
        let mut piece = [f64::NAN; 2];
        let values: Vec<f32> = (0..dimension).map(|at| ((at * 7919) % 2003) as f32 * 1e-3 - 1.0).collect();
        for (clients, neighbours, value_bits) in COHORTS {
            let fixed = Fixed::new(value_bits, 1.0)?;
            let width = fixed.width(clients as u64)?;
            for &backend in backends {
                let bytes = (neighbours + 1) * dimension * width.lane_bytes();
                let mut repeats = Vec::new();
                // The first one pays for memory that is fresh.
                for repeat in 0..=REPEATS {
                    let before = rate(backend, &keys, bytes);
                    let start = Instant::now();
                    let mut coins = KeyStream::from_rng(rng);
                    let masks = terms(&keys, neighbours + 1);
                    let one = Weight::ONE;
                    let values = black_box(&values);
                    black_box(fixed.encode_masked_by(backend, width, values, one, &mut coins, masks)?);
                    let stage = start.elapsed().as_secs_f64();
                    let floor = bytes as f64 / f64::midpoint(before, rate(backend, &keys, bytes)) / 1e9;
                    let start = Instant::now();
                    let mut vector = fixed.encode(width, values, Weight::ONE, &mut coins)?.vector;
                    let rounded = start.elapsed().as_secs_f64();
                    vector.mask_by(backend, terms(&keys, neighbours + 1), NonZeroUsize::MIN)?;
                    let masked = start.elapsed().as_secs_f64();
                    black_box(vector.pack()?);
                    let whole = start.elapsed().as_secs_f64();
                    if repeat > 0 {
                        let steps = [rounded, masked - rounded, whole - masked];
                        let [rounding, masks, packing] = steps;
                        repeats.push([floor, stage, stage / floor, rounding, masks, packing]);
                    }
                }
                let [floor, stage, ratio, rounding, masks, packing] = medians(&repeats);
                let [least_floor, least_stage, ..] = least(&repeats);
                println!(
                    "        {clients:>7}  {neighbours:>10}  {dimension:>10}  {:>4}  {:10} {:7.2}  {:7.2}  {ratio:13.3}  {:5.3}  {:8.2}  \
                     {:7.2}  {:7.2}",
                    width.bits(),
                    backend.name(),
                    floor * 1e3,
                    stage * 1e3,
                    least_stage / least_floor,
                    rounding * 1e3,
                    masks * 1e3,
                    packing * 1e3
                );
                if backend == Backend::best() && (clients, value_bits) == (100, 16) {
                    piece = [masks / (neighbours + 1) as f64, rounding];
                }
            }
        }
        pieces.push((dimension, piece));
    }
    println!(
        "`stage` is rounding, masks and packing in one pass; behind it the three as steps of their own, which take longer.\n"
    );
    for (dimension, [mask, round]) in pieces {
        println!("piece: {dimension} parameters: mask {:.4} ms, round {:.4} ms", mask * 1e3, round * 1e3);
    }
    println!();
    Ok(())
}

/// Taking the masks out of a sum of which a tenth of the clients dropped out late.
fn coordinator(rng: &mut SecretRng, backends: &[Backend], dimensions: &[usize]) -> Outcome<()> {
    println!(
        "coordinator: clients  masks   parameters  bits  backend    measured   floor  unmasking  s  unmasking / floor   best  two \
         threads"
    );
    for &dimension in dimensions {
        for (clients, neighbours, value_bits) in COHORTS {
            let width = Fixed::new(value_bits, 1.0)?.width(clients as u64)?;
            // Each survivor's own mask, and those of a tenth of the clients with their surviving neighbours.
            let masks = clients * 9 / 10 + clients / 10 * neighbours * 9 / 10;
            let measured = masks.min(MOST_BYTES / (dimension * width.lane_bytes()));
            let keys = keys(rng, measured);
            let terms: Vec<MaskTerm> = terms(&keys, measured)
                .map(|(key, sign)| MaskTerm { key: key.clone(), sign, segment: 0 })
                .collect();
            let mut sum = MaskedSum::new(width, dimension);
            for &backend in backends {
                let bytes = measured * dimension * width.lane_bytes();
                let mut repeats = Vec::new();
                let mut unmask = |threads| -> Outcome<f64> {
                    let start = Instant::now();
                    sum.unmask_by(backend, &terms, 0, threads)?;
                    Ok(start.elapsed().as_secs_f64())
                };
                // Long pieces of work need fewer repeats.
                for _ in 0..if bytes > MOST_BYTES / 8 { 3 } else { REPEATS } {
                    let before = rate(backend, &keys, bytes);
                    let one = unmask(NonZeroUsize::MIN)?;
                    let floor = bytes as f64 / f64::midpoint(before, rate(backend, &keys, bytes)) / 1e9;
                    let two = unmask(NonZeroUsize::MIN.saturating_add(1))?;
                    repeats.push([floor, one, one / floor, one / two]);
                }
                let [floor, one, ratio, speed_up] = medians(&repeats);
                let [least_floor, least_one, ..] = least(&repeats);
                let whole = masks as f64 / measured as f64;
                println!(
                    "             {clients:>7}  {masks:>5}  {dimension:>11}  {:>4}  {:10} {measured:>8}  {:6.3}  {:9.3}  \
                     {ratio:20.3}  {:5.3}  {speed_up:10.2}x",
                    width.bits(),
                    backend.name(),
                    floor * whole,
                    one * whole,
                    least_one / least_floor
                );
            }
        }
    }
    println!(
        "\n`measured` is the number of masks that were measured; floor and time are theirs, scaled to all. Bits decide on \
         lanes: 16 up to 16, 32 up to 32."
    );
    Ok(())
}

/// GB/s at which key stream is written into a part of the first cache, for work of `bytes` bytes.
fn rate(backend: Backend, keys: &[MaskKey], bytes: usize) -> f64 {
    let mut words = [0u32; PART];
    let Some(key) = keys.first() else { return f64::NAN };
    let start = Instant::now();
    let mut stream = KeyStream::new(backend, key);
    let parts = bytes.clamp(*FLOOR_BYTES.start(), *FLOOR_BYTES.end()) / size_of_val(&words);
    for _ in 0..parts {
        let _ = stream.fill(black_box(&mut words));
    }
    (parts * size_of_val(&words)) as f64 / start.elapsed().as_secs_f64() / 1e9
}

/// GB/s at which key streams are added to lanes.
fn added<L: Lane>(backend: Backend, keys: &[MaskKey]) -> f64 {
    // Several parts, so that expanding the keys does not count.
    let mut lanes = vec![L::default(); 16 * PART];
    let repeats = if backend == Backend::PORTABLE { 1 } else { 4 };
    let start = Instant::now();
    for _ in 0..repeats {
        let _ =
            apply_all(backend, black_box(lanes.as_mut_slice()), terms(keys, keys.len()), NonZeroUsize::MIN);
    }
    (repeats * keys.len() * size_of_val(lanes.as_slice())) as f64 / start.elapsed().as_secs_f64() / 1e9
}

/// Keys of nobody.
fn keys(rng: &mut SecretRng, count: usize) -> Vec<MaskKey> {
    use rand::Rng as _;
    let mut key = || {
        let mut key = MaskKey { key: [0; 16], iv: [0; 12] };
        rng.fill_bytes(&mut key.key);
        rng.fill_bytes(&mut key.iv);
        key
    };
    (0..count).map(|_| key()).collect()
}

fn terms(keys: &[MaskKey], count: usize) -> impl Iterator<Item = (&MaskKey, Sign)> {
    keys.iter().zip([Sign::Add, Sign::Subtract].into_iter().cycle()).take(count)
}

fn best(mut rate: impl FnMut() -> f64) -> f64 {
    (0..REPEATS).map(|_| rate()).fold(0.0, f64::max)
}

/// The smallest of each figure.
fn least<const N: usize>(repeats: &[[f64; N]]) -> [f64; N] {
    std::array::from_fn(|figure| {
        repeats.iter().filter_map(|repeat| repeat.get(figure).copied()).fold(f64::INFINITY, f64::min)
    })
}

/// The median of each figure.
fn medians<const N: usize>(repeats: &[[f64; N]]) -> [f64; N] {
    std::array::from_fn(|figure| {
        let mut values: Vec<f64> = repeats.iter().filter_map(|repeat| repeat.get(figure).copied()).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    })
}
