//! Hostile bytes: valid encodings bent in the ways that a decoder must survive, from one seed.
//!
//! `TRIBUTARY_FUZZ_SECONDS=600 cargo test -p tributary-common --lib compression::fuzz -- --nocapture` goes on for that
//! long; `TRIBUTARY_FUZZ_SEED` starts elsewhere.

use std::time::{Duration, Instant};

use rand::RngExt;

use super::residual::{Outcome, ResidualJournal};
use super::support::{DelayedVote, SeededRandom, Support, SupportState, Track};
use super::tests::stream;
use super::*;
use crate::digest::Digest;
use crate::rng::Stream;

const CASES: u64 = 20_000;
/// What the decoders may add to the process's memory, other tests included: a lie of 2^32 would show.
const MOST_MEBIBYTES: u64 = 512;

/// One decoder, what it accepts, and a valid encoding.
#[derive(Debug, Clone)]
enum Target {
    Update(Scheme, usize),
    Support(usize, usize),
    State(usize),
    Journal(usize),
}

impl Target {
    /// Decodes; what comes out is as long as it must be, and writes to bytes that decode to the same.
    fn decode(&self, bytes: &[u8]) -> bool {
        match *self {
            Target::Update(scheme, parameters) => {
                let dense = scheme.decode(bytes, parameters);
                let sparse = scheme.decode_sparse(bytes, parameters);
                assert_eq!(dense.is_ok(), sparse.is_ok());
                let (Ok(dense), Ok(sparse)) = (dense, sparse) else { return false };
                assert_eq!((dense.len(), sparse.indices.len()), (parameters, scheme.kept(parameters)));
                assert!(sparse.indices.is_sorted_by(|a, b| a < b));
                assert!(sparse.indices.last().is_none_or(|last| (*last as usize) < parameters));
                assert!(sparse.indices.capacity().max(sparse.values.capacity()) <= parameters + 8);
                assert!(dense.iter().all(|value| value.is_finite()));
                assert!(bytes.len() <= scheme.most_bytes(parameters));
                true
            }
            Target::Support(parameters, size) => match Support::from_bytes(bytes, parameters, size) {
                // One support has one encoding: what is accepted is what would have been written.
                Ok(support) => {
                    assert_eq!(support.to_bytes(), bytes);
                    true
                }
                Err(_) => false,
            },
            Target::State(parameters) => match SupportState::from_bytes(bytes, parameters) {
                Ok(state) => {
                    assert_eq!(SupportState::from_bytes(&state.to_bytes(), parameters).ok(), Some(state));
                    true
                }
                Err(_) => false,
            },
            Target::Journal(parameters) => match ResidualJournal::from_bytes(bytes, parameters) {
                Ok(journal) => {
                    assert_eq!(journal.to_bytes(), bytes);
                    true
                }
                Err(_) => false,
            },
        }
    }

    /// Whether its bytes end with a digest, which mutations must mend to get anywhere.
    fn sealed(&self) -> bool {
        matches!(self, Target::State(_) | Target::Journal(_))
    }
}

fn corpus(rng: &mut Stream) -> Vec<(Target, Vec<u8>)> {
    let mut corpus = Vec::new();
    let codecs = [ValueCodec::F32, ValueCodec::Bf16, ValueCodec::Int8, ValueCodec::Sign];
    for parameters in [0usize, 1, 28, 700, 140_000] {
        let update: Vec<f32> = (0..parameters).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        let mut schemes = vec![Scheme::Dense, Scheme::Int8];
        schemes.extend([1, 3, 100, 300, 32_767].map(|levels| Scheme::Qsgd { levels }));
        for density in [0.001, 0.01, 0.3, 1.0] {
            schemes.extend(codecs.map(|values| Scheme::TopK { density, values }));
        }
        // Long dense updates are slow to bend and have nothing that short ones have not.
        schemes.retain(|scheme| {
            parameters < 1_000 || matches!(scheme, Scheme::TopK { density, .. } if *density < 0.1)
        });
        for scheme in schemes {
            let bytes = scheme.encode(&update, rng).unwrap().bytes;
            corpus.push((Target::Update(scheme, parameters), bytes));
        }
        for size in [parameters / 100, parameters / 7, parameters] {
            let random = SeededRandom::first(parameters, size, rng).unwrap();
            corpus.push((Target::Support(parameters, size), random.support().to_bytes()));
            if parameters > 1_000 {
                continue;
            }
            let mut track = Track::first(parameters, size, 0.3, rng).unwrap();
            track.advance(&vec![1.0; size], rng).unwrap();
            let vote = DelayedVote::first(parameters, size, rng).unwrap();
            for state in [
                SupportState::SeededRandom(random),
                SupportState::Track(track),
                SupportState::DelayedVote(vote),
            ] {
                corpus.push((Target::State(parameters), state.to_bytes()));
            }
        }
        if parameters < 1_000 {
            let mut journal = ResidualJournal::new(parameters);
            journal.write_pending(1, Digest([1; 32]), Digest([2; 32]), update.clone(), None).unwrap();
            corpus.push((Target::Journal(parameters), journal.to_bytes()));
            journal.settle(1, Outcome::Accepted).unwrap();
            journal.write_pending(2, Digest([1; 32]), Digest([2; 32]), update, None).unwrap();
            corpus.push((Target::Journal(parameters), journal.to_bytes()));
        }
    }
    corpus
}

/// A place in `bytes`, more often near the beginning, where headers and tables are.
fn place(bytes: &[u8], rng: &mut Stream) -> usize {
    let within = if rng.random_bool(0.5) { bytes.len().min(64) } else { bytes.len() };
    if within == 0 { 0 } else { rng.random_range(0..within) }
}

fn bend(bytes: &mut Vec<u8>, other: &[u8], rng: &mut Stream) {
    let at = place(bytes, rng);
    let lies = [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x10000, 0x7fff_ffff, 0xffff_ffff, u64::MAX, 1 << 33];
    match rng.random_range(0..9) {
        0 | 1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << rng.random_range(0..8)),
        2 => bytes.truncate(at),
        3 => bytes.extend((0..rng.random_range(1..40)).map(|_| rng.random_range(0..3u8))),
        // A splice: this beginning, another's end.
        4 => {
            bytes.truncate(at);
            bytes.extend(other.iter().skip(at));
        }
        // A length that lies, or one that is off by one.
        5 => {
            let lie = lies[rng.random_range(0..lies.len())].to_le_bytes();
            let width = [1, 2, 4, 8][rng.random_range(0..4)];
            bytes.iter_mut().skip(at & !3).take(width).zip(lie).for_each(|(byte, lie)| *byte = lie);
        }
        6 => bytes.iter_mut().skip(at).take(1).for_each(|byte| {
            *byte = if rng.random_bool(0.5) { byte.wrapping_add(1) } else { byte.wrapping_sub(1) };
        }),
        // Runs of zeros or ones: what a unary code could run away on.
        7 => {
            let (fill, length) = ([0, 0xff][rng.random_range(0..2)], rng.random_range(1..200));
            bytes.iter_mut().skip(at).take(length).for_each(|byte| *byte = fill);
        }
        _ => {
            let length = rng.random_range(1..20usize).min(bytes.len() - at.min(bytes.len()));
            bytes.drain(at.min(bytes.len())..at.min(bytes.len()) + length);
        }
    }
}

/// The process's largest memory so far; `None` where /proc is not.
fn peak_mebibytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok().map(|kibibytes: u64| kibibytes / 1024)
}

#[test]
fn decoders_survive_mutated_containers() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seed = number("TRIBUTARY_FUZZ_SEED").unwrap_or(1);
    let long = number("TRIBUTARY_FUZZ_SECONDS").map(Duration::from_secs);
    let mut rng = stream(seed);
    let corpus = corpus(&mut rng);
    for (target, bytes) in &corpus {
        assert!(target.decode(bytes), "{target:?}");
    }
    let before = peak_mebibytes();
    let start = Instant::now();
    let (mut cases, mut accepted) = (0u64, 0u64);
    while long.map_or(cases < CASES, |long| start.elapsed() < long) {
        let (target, bytes) = &corpus[rng.random_range(0..corpus.len())];
        let (_, other) = &corpus[rng.random_range(0..corpus.len())];
        let mut bytes = bytes.clone();
        if target.sealed() {
            bytes.truncate(bytes.len() - 32);
        }
        for _ in 0..rng.random_range(1..4) {
            bend(&mut bytes, other, &mut rng);
        }
        if target.sealed() && rng.random_bool(0.9) {
            bytes.extend(Digest::of(&bytes).0);
        }
        accepted += u64::from(target.decode(&bytes));
        cases += 1;
    }
    assert!(
        accepted > cases / 200 && accepted < cases,
        "{accepted} of {cases} accepted: not near the border"
    );
    let grown = peak_mebibytes().zip(before).map_or(0, |(after, before)| after - before);
    if long.is_some() {
        let per_second = cases as f64 / start.elapsed().as_secs_f64();
        println!(
            "seed {seed}: {cases} cases, {per_second:.0} a second, {accepted} accepted, {grown} MiB more memory"
        );
        assert!(grown < MOST_MEBIBYTES, "{grown} MiB more memory");
    }
}
