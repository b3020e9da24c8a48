//! Times the noise: `cargo bench --workspace --bench noise`. Nanoseconds per coordinate, the best of several runs.

use std::hint::black_box;
use std::time::Instant;

use tributary_common::privacy::noise::{DiscreteGaussian, Gaussian, NoiseError, SecretRng, alternatives};

const VALUES: usize = 199_210;
const RUNS: usize = 15;

fn main() -> Result<(), NoiseError> {
    let mut rng = SecretRng::new()?;
    let mut floats = vec![0.5f32; VALUES];
    let mut integers = vec![5i64; VALUES];
    let gaussian = Gaussian::new(1.1)?;
    let discrete = DiscreteGaussian::new(1_330_000_000_000)?;
    best("plain ziggurat, f32", || alternatives::plain(&mut rng, 1.1, black_box(&mut floats)));
    best("four summed, f32", || alternatives::four_summed(&mut rng, 1.1, black_box(&mut floats)));
    best("gaussian on a grid (default)", || gaussian.add(&mut rng, black_box(&mut floats)));
    best("discrete gaussian, exact", || discrete.add(&mut rng, black_box(&mut integers)));
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
