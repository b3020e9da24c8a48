//! What a round costs beside its SGD steps: the simulator, and the same steps in a plain libtorch loop, in one run.
//!
//! `cargo bench --workspace --bench efficiency [-- MODEL…] [-- --clients N…]`. Each line: seconds per round of the
//! plain loop on one thread divided by the workers, of the simulator, and their quotient, medians of seven alternated
//! repeats. Above one, the engine saves more than the federation costs. Evaluation is off; the loop loads the model
//! and gathers the batches of each client. A spin probe tells whether the machine was quiet.

#![allow(clippy::expect_used)]

#[path = "../../client/benches/plain/mod.rs"]
mod plain;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use plain::Plain;
use tributary_client::shard::Shard;
use tributary_client::trainer::{TorchTrainer, Trainer};
use tributary_common::record::RunEvent;
use tributary_simulations::engine::{Observation, Settings, simulate};
use tributary_simulations::scenario::{Overrides, Scenario};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const WORKERS: usize = 2;
const REPEATS: usize = 7;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let clients: Vec<usize> = words.iter().filter_map(|word| word.parse().ok()).collect();
    let models: Vec<&String> = words.iter().filter(|word| word.parse::<usize>().is_err()).collect();
    tch::set_num_threads(1);
    println!("spin probe before: {}", probe());
    println!(
        "{:12} {:>7} {:>12} {:>10} {:>10}   seconds per round, {WORKERS} workers",
        "model", "clients", "loop/workers", "simulator", "efficiency"
    );
    for model in ["small-cnn", "2nn", "mcmahan-cnn"] {
        let asked =
            if models.is_empty() { model != "mcmahan-cnn" } else { models.iter().any(|name| *name == model) };
        for cohort in if clients.is_empty() { &[10, 1000][..] } else { clients.as_slice() } {
            if asked {
                compare(model, *cohort);
            }
        }
    }
    println!("spin probe after: {}", probe());
}

fn compare(model: &str, cohort: usize) {
    // Enough rounds that a repeat lasts some tenths of a second.
    let rounds = (1000 / cohort).clamp(2, 40) + 1;
    let scenario = scenario(model, cohort, rounds);
    let layout = scenario.job.layout().expect("a built-in layout");
    let initial = layout.initial(1);
    let federation = scenario.federation().expect("synthetic data");
    let mut plain = Plain::new(&scenario.job, &layout, &federation.dataset.train);
    let shards: Vec<Shard> = federation
        .shares
        .iter()
        .take(cohort)
        .map(|share| Shard { indices: share.train.clone(), ..Shard::whole(federation.dataset.train.clone()) })
        .collect();
    drop(federation);
    let (mut of_loop, mut of_simulator) = (Vec::new(), Vec::new());
    for repeat in 0..=REPEATS {
        let start = Instant::now();
        for _ in 1..rounds {
            shards.iter().for_each(|shard| plain.train(&initial, shard));
        }
        let a_loop = start.elapsed() / (rounds as u32 - 1) / WORKERS as u32;
        let simulated = simulated(&scenario);
        // The first repeat warms up.
        if repeat > 0 {
            of_loop.push(a_loop);
            of_simulator.push(simulated);
        }
    }
    let (a_loop, simulator) = (median(&mut of_loop), median(&mut of_simulator));
    let efficiency = a_loop.as_secs_f64() / simulator.as_secs_f64();
    println!(
        "{model:12} {cohort:7} {:12.4} {:10.4} {efficiency:10.2}",
        a_loop.as_secs_f64(),
        simulator.as_secs_f64()
    );
}

/// Wall time of a round: from the end of the first to the end of the last, divided by the rounds between.
fn simulated(scenario: &Scenario) -> Duration {
    let federation = scenario.federation().expect("synthetic data");
    let trainer = Arc::new(|| Ok(Box::new(TorchTrainer::new()) as Box<dyn Trainer>));
    let settings = Settings::new(WORKERS, trainer);
    let mut ends = Vec::new();
    let finished = simulate(scenario, federation, settings, &AtomicBool::new(false), &mut |observation| {
        if matches!(observation, Observation::Event(RunEvent::RoundEnded { .. })) {
            ends.push(Instant::now());
        }
    });
    finished.expect("the run finishes");
    let (first, last) = (ends[0], ends[ends.len() - 1]);
    last.duration_since(first) / (ends.len() as u32 - 1)
}

fn scenario(model: &str, cohort: usize, rounds: usize) -> Scenario {
    let folder = std::env::temp_dir().join(format!("tributary-efficiency-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    let path = folder.join("scenario.toml");
    let text = format!(
        "[job]\nname = 'efficiency'\nseed = 1\nrounds = {rounds}\n[job.model]\narchitecture = '{model}'\n\
         inputs = [1, 28, 28]\nclasses = 10\n[job.train]\nalgorithm = 'fedavg'\nlearning_rate = 0.05\n\
         local_epochs = 1\nbatch_size = 10\n[job.cohort]\nsize = {cohort}\n[job.evaluation]\nevery_rounds = 0\n\
         [population]\nclients = 1000\nsamples_per_client = 60\n\
         [data]\nsource = 'synthetic'\nexamples = 6000\ntest_examples = 10\n[partition]\nscheme = 'iid'\n"
    );
    std::fs::write(&path, text).expect("a temporary file");
    let scenario = Scenario::read(&path, &Overrides::default()).expect("a valid scenario");
    std::fs::remove_dir_all(&folder).expect("the temporary folder is ours");
    scenario
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// How long the same arithmetic takes on one thread, and on two at once: equal on a quiet machine.
fn probe() -> String {
    let spin = || {
        let start = Instant::now();
        let sum =
            (0..60_000_000u64).fold(1u64, |sum, step| std::hint::black_box(sum.wrapping_mul(31) ^ step));
        std::hint::black_box(sum);
        start.elapsed().as_secs_f64()
    };
    let one = spin();
    let two = std::thread::scope(|scope| {
        let other = scope.spawn(spin);
        spin().max(other.join().unwrap_or_default())
    });
    format!("{one:.3} s on one thread, {two:.3} s on two")
}
