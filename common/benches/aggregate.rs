//! Times the exact sum: `cargo bench --workspace --bench aggregate`.
//!
//! Nanoseconds per coordinate and update, the best of several runs, for models of three sizes; beside them what no sum
//! can beat much: reading an update and adding it to `f32`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use tributary_common::aggregate::{AggregateError, AggregationRule, Contribution, WeightedMean, check};

const UPDATES: usize = 16;
const RUNS: usize = 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "{:>10} {:>8} {:>8} {:>8} {:>8}  ns per coordinate",
        "parameters", "floor", "check", "add", "both"
    );
    for parameters in [26_010, 199_210, 1_663_370] {
        let value = |at: usize, client: usize| ((at * 7 + client * 13) % 1000) as f32 * 1e-5 - 0.005;
        let delta =
            |client: usize| Arc::new((0..parameters).map(|at| value(at, client)).collect::<Vec<f32>>());
        let deltas: Vec<Arc<Vec<f32>>> = (0..UPDATES).map(delta).collect();
        let name = "client".parse()?;
        let contribution = |delta: &Arc<Vec<f32>>| {
            Contribution::new(Clone::clone(&name), 600, Arc::clone(delta), parameters)
        };
        let contributions = deltas.iter().map(contribution).collect::<Result<Vec<_>, AggregateError>>()?;

        let mut plain = vec![0f32; parameters];
        let floor = best(parameters, || {
            for delta in &deltas {
                for (sum, value) in black_box(&mut plain).iter_mut().zip(delta.iter()) {
                    *sum += value;
                }
            }
        });
        let checked = best(parameters, || {
            for delta in &deltas {
                let _ = black_box(check(black_box(delta)));
            }
        });
        let mut rule = WeightedMean::default();
        rule.begin(1, parameters);
        let added = best(parameters, || {
            for contribution in &contributions {
                rule.add(black_box(contribution).clone());
            }
        });
        println!("{parameters:>10} {floor:>8.3} {checked:>8.3} {added:>8.3} {:>8.3}", checked + added);
    }
    Ok(())
}

fn best(parameters: usize, mut work: impl FnMut()) -> f64 {
    let repeats = (20_000_000 / parameters / UPDATES).max(1);
    let mut run = || {
        let start = Instant::now();
        (0..repeats).for_each(|_| work());
        start.elapsed().as_nanos() as f64 / (repeats * parameters * UPDATES) as f64
    };
    (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min)
}
