//! Times the noise: `cargo bench --workspace --bench noise`. Nanoseconds per coordinate, the best of several runs.

use std::hint::black_box;
use std::time::Instant;

use tributary_common::privacy::distributed::skellam::{Skellam, variance_at_least};
use tributary_common::privacy::distributed::{
    Level, Plan, Requirements, Scale, decode, encode, rotation, rounding,
};
use tributary_common::privacy::noise::{DiscreteGaussian, Gaussian, SecretRng, alternatives};

const VALUES: usize = 199_210;
const RUNS: usize = 15;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut rng = SecretRng::new()?;
    let mut floats = vec![0.5f32; VALUES];
    let mut integers = vec![5i64; VALUES];
    let gaussian = Gaussian::new(1.1)?;
    let discrete = DiscreteGaussian::new(1_330_000_000_000)?;
    best("plain ziggurat, f32", || alternatives::plain(&mut rng, 1.1, black_box(&mut floats)));
    best("four summed, f32", || alternatives::four_summed(&mut rng, 1.1, black_box(&mut floats)));
    best("gaussian on a grid (default)", || gaussian.add(&mut rng, black_box(&mut floats)));
    best("discrete gaussian, exact", || discrete.add(&mut rng, black_box(&mut integers)));
    for deviation in [10.0, 100.0, 1000.0, 4000.0, 16_000.0] {
        let variance = variance_at_least(deviation * deviation).unwrap_or(1.0);
        let noise = Skellam::new(variance)?;
        best(&format!("skellam of {deviation} grid steps"), || noise.add(&mut rng, black_box(&mut integers)));
        best("  its table, per coordinate", || drop(black_box(Skellam::new(variance))));
    }
    let mut values = vec![0.5f64; rotation::padded(VALUES)];
    best("hadamard rotation", || rotation::rotate(black_box(&mut values), &[1; 32]));
    let mut rounded = Vec::new();
    best("stochastic rounding", || rounding::round(&mut rng, black_box(&values), &mut rounded));
    let plan = Plan::new(&Requirements {
        level: Level::Client,
        noise_multiplier: 1.0,
        clip_norm: 1.0,
        dimension: VALUES,
        fewest_survivors: 10,
        colluders: 1,
        most_clients: 12,
        scale: Scale::Inflation(0.01),
    })?;
    let mut encoded = Vec::new();
    best("clip, rotate, round, noise", || {
        encoded = encode(black_box(&floats), &plan, &[1; 32], &mut rng).unwrap_or_default();
    });
    best("decode", || drop(black_box(decode(&encoded, &plan, &[1; 32]))));
    Ok(())
}

fn best(name: &str, mut run: impl FnMut()) {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64() * 1e9 / VALUES as f64
    };
    let best = (0..RUNS).map(time).fold(f64::INFINITY, f64::min);
    println!("{name:30} {best:8.2} ns");
}
