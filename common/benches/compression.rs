//! Times the selection and the encodings: `cargo bench --workspace --bench compression`.
//!
//! One core, the best of several runs, an update of 10 million coordinates. Beside the selection: the same by
//! `select_nth_unstable` of the standard library, and one pass that only reads.

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use rand_distr::{Distribution, StandardNormal};
use tributary_common::compression::select::{Backend, top_k_with};
use tributary_common::compression::support::Support;
use tributary_common::compression::{Encoded, Scheme, ValueCodec};
use tributary_common::rng::{Purpose, Stream};

const PARAMETERS: usize = 10_000_000;
const RUNS: usize = 9;
const DENSITIES: [f64; 3] = [0.001, 0.01, 0.1];

fn main() -> Result<(), Box<dyn Error>> {
    let mut rng = Stream::new(1, Purpose::Shuffle, 0, "");
    let update: Vec<f32> =
        (0..PARAMETERS).map(|_| Distribution::<f32>::sample(&StandardNormal, &mut rng) * 1e-3).collect();
    select(&update)?;
    positions(&update)?;
    schemes(&update, &mut rng)
}

fn select(update: &[f32]) -> Result<(), Box<dyn Error>> {
    println!("selection of {PARAMETERS} coordinates   0.1 %      1 %     10 %   GB/s read");
    let row = |name: &str, seconds: [f64; 3]| {
        let rates = seconds.map(|seconds| format!("{:9.1}", 4.0 * PARAMETERS as f64 / seconds / 1e9));
        println!("{name:32}{}", rates.concat());
    };
    let read = best(|| {
        black_box(black_box(update).iter().fold([0u32; 1], |[sum], value| [sum ^ value.to_bits()]));
    });
    row("plain read", [read; 3]);
    for backend in Backend::available() {
        let time = |density: f64| {
            let k = (density * PARAMETERS as f64) as usize;
            best(|| drop(black_box(top_k_with(backend, black_box(update), k))))
        };
        row(&format!("top_k, {backend:?}"), DENSITIES.map(time));
    }
    let standard = |density: f64| {
        let k = (density * PARAMETERS as f64) as usize;
        best(|| {
            let mut keys: Vec<u32> = update.iter().map(|value| value.to_bits() & 0x7fff_ffff).collect();
            let (_, threshold, _) = keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
            let threshold = *threshold;
            let kept = |(_, value): &(u32, &f32)| value.to_bits() & 0x7fff_ffff >= threshold;
            black_box((0u32..).zip(update).filter(kept).map(|(index, _)| index).collect::<Vec<u32>>());
        })
    };
    row("select_nth_unstable", DENSITIES.map(standard));
    Ok(())
}

fn positions(update: &[f32]) -> Result<(), Box<dyn Error>> {
    println!("\npositions     bits each   entropy   above   encode   decode   million/s");
    for density in DENSITIES {
        let k = (density * PARAMETERS as f64) as usize;
        let support = Support::new(PARAMETERS, top_k_with(Backend::best(), update, k)?)?;
        let bytes = support.to_bytes();
        let bits = 8.0 * (bytes.len() - 32) as f64 / k as f64;
        let entropy = -(density.log2() + (1.0 - density) / density * (1.0 - density).log2());
        let encode = best(|| drop(black_box(support.to_bytes())));
        let decode = best(|| drop(black_box(Support::from_bytes(black_box(&bytes), PARAMETERS, k))));
        let above = (bits / entropy - 1.0) * 100.0;
        let rate = |seconds: f64| k as f64 / seconds / 1e6;
        println!(
            "{:6} %   {bits:11.3} {entropy:9.3} {above:6.2}% {:8.0} {:8.0}",
            density * 100.0,
            rate(encode),
            rate(decode)
        );
    }
    Ok(())
}

fn schemes(update: &[f32], rng: &mut Stream) -> Result<(), Box<dyn Error>> {
    println!("\nscheme                                bits/coord.  factor   encode   decode   MB/s of f32");
    let top = |density, values| Scheme::TopK { density, values };
    for scheme in [
        Scheme::Dense,
        Scheme::Int8,
        Scheme::Qsgd { levels: 127 },
        Scheme::Qsgd { levels: 7 },
        Scheme::Qsgd { levels: 1 },
        top(0.01, ValueCodec::F32),
        top(0.01, ValueCodec::Bf16),
        top(0.01, ValueCodec::Int8),
        top(0.01, ValueCodec::Sign),
        top(0.1, ValueCodec::Int8),
        top(0.001, ValueCodec::Int8),
    ] {
        let Encoded { bytes, .. } = scheme.encode(update, rng)?;
        let bits = 8.0 * bytes.len() as f64 / PARAMETERS as f64;
        let encode = best(|| drop(black_box(scheme.encode(black_box(update), rng))));
        let decode = best(|| match scheme {
            Scheme::TopK { .. } => drop(black_box(scheme.decode_sparse(black_box(&bytes), PARAMETERS))),
            _ => drop(black_box(scheme.decode(black_box(&bytes), PARAMETERS))),
        });
        let rate = |seconds: f64| 4.0 * PARAMETERS as f64 / seconds / 1e6;
        let name = format!("{scheme:?}");
        println!("{name:40} {bits:8.4} {:7.1} {:8.0} {:8.0}", 32.0 / bits, rate(encode), rate(decode));
    }
    Ok(())
}

fn best(mut work: impl FnMut()) -> f64 {
    let mut run = || {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min)
}
