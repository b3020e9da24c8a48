//! Times a question to each accountant: `cargo bench --workspace --bench accounting`.
//!
//! Milliseconds per question, the best of several runs, for ordinary and for extreme lengths.

use std::hint::black_box;
use std::time::Instant;

use tributary_common::privacy::Event;
use tributary_common::privacy::accounting::{pld, rdp};

const RUNS: usize = 5;
const DELTA: f64 = 1e-5;

fn main() {
    println!("{:>32} {:>10} {:>10} {:>9} {:>9}", "events", "rdp", "pld", "rdp ms", "pld ms");
    let noises = (0..20).map(|i| Event::gaussian(0.02, 1.0 + 0.05 * f64::from(i), 50)).collect();
    let questions: [(&str, Vec<Event>); 7] = [
        ("q 0.05, sigma 1.6, 300 steps", vec![Event::gaussian(0.05, 1.6, 300)]),
        ("q 0.01, sigma 1, 1000 steps", vec![Event::gaussian(0.01, 1.0, 1000)]),
        ("q 1, sigma 8, 100 steps", vec![Event::gaussian(1.0, 8.0, 100)]),
        ("q 0.0001, sigma 0.5, 100000", vec![Event::gaussian(1e-4, 0.5, 100_000)]),
        ("q 0.001, sigma 1, 10^6", vec![Event::gaussian(1e-3, 1.0, 1_000_000)]),
        ("q 0.01, sigma 8, 10^6", vec![Event::gaussian(0.01, 8.0, 1_000_000)]),
        ("20 noise multipliers, 1000", noises),
    ];
    for (name, events) in &questions {
        let (rdp, rdp_time) = best(|| rdp::epsilon(black_box(events), DELTA).value);
        let (pld, pld_time) = best(|| pld::epsilon(black_box(events), DELTA).map_or(f64::NAN, |b| b.value));
        println!("{name:>32} {rdp:>10.5} {pld:>10.5} {rdp_time:>9.2} {pld_time:>9.2}");
    }
}

fn best(question: impl Fn() -> f64) -> (f64, f64) {
    let run = |_| {
        let start = Instant::now();
        let answer = question();
        (answer, start.elapsed().as_secs_f64() * 1e3)
    };
    (0..RUNS).map(run).fold((f64::NAN, f64::INFINITY), |best, run| if run.1 < best.1 { run } else { best })
}
