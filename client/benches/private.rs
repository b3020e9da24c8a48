//! One step of private training: clipped sum and noise, beside the same step without privacy, in one run.
//!
//! `cargo bench --workspace --bench private [-- MODEL…]`. Each line: milliseconds per SGD step, medians of alternated
//! repeats, for a plain libtorch loop (autograd), the engine without privacy and the engine with it (`whole`, default
//! noise); what of that is noise; the rest (`clipped`), and its ratio to the plain loop. All batches are full ones.
//!
//! `-- memory loop|engine|private MODEL BATCH` trains a few steps in one of the three ways and prints the process's peak
//! resident memory. `-- audit` times an audit by 3000 canaries over 480 steps of `small-cnn`.

#![allow(clippy::expect_used)]

mod plain;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use rand::RngExt;
use tributary_client::data::Split;
use tributary_client::shard::Shard;
use tributary_client::trainer::{Sabotage, Task, TorchTrainer, Trainer, run_canaries};
use tributary_common::job::Job;
use tributary_common::privacy::noise::{Gaussian, SecretRng};
use tributary_common::rng::{Purpose, Stream};

use plain::Plain;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const REPEATS: usize = 11;

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    match chosen.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["memory", way, model, batch] => return memory(way, model, batch.parse().expect("a batch size")),
        ["audit"] => return audit(),
        _ => {}
    }
    println!(
        "{:12} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9} {:>15}   milliseconds per step",
        "model", "batch", "loop", "engine", "whole", "noise", "clipped", "clipped / loop"
    );
    for (model, steps) in
        [("2nn", 20), ("small-cnn", 10), ("mcmahan-cnn", 2), ("lenet", 6), ("resnet8-gn", 2)]
    {
        if chosen.is_empty() || chosen.iter().any(|name| name == model) {
            for batch in [64, 256] {
                compare(model, batch, steps);
            }
        }
    }
}

/// The job without and with privacy.
fn jobs(model: &str, batch: usize, steps: usize) -> [Job; 2] {
    let open = job(model, &format!("batch_size = {batch}\nlocal_steps = {steps}"), "");
    [open, private_job(model, 1.0, steps)]
}

fn private_job(model: &str, sampling_rate: f64, steps: usize) -> Job {
    job(
        model,
        &format!("sampling_rate = {sampling_rate:?}\nlocal_steps = {steps}"),
        "[privacy]\nunit = 'example'\nmechanism = 'dp-sgd'\nnoise_multiplier = 1.534\nclip_norm = 1.0\ndelta = 1e-5\n\
         max_epsilon = 1e6\n",
    )
}

/// The first round of a client that declares `declared` examples.
fn task(job: Job, declared: usize) -> Task {
    Task {
        model: Arc::new(job.layout().expect("a built-in layout").initial(1)),
        job: Arc::new(job),
        round: 1,
        client: "client".parse().expect("a valid name"),
        declared_examples: Some(declared as u64),
        max_steps: None,
    }
}

fn memory(way: &str, model: &str, batch: usize) {
    let [open, private] = jobs(model, batch, 3);
    let data = Arc::new(data(batch));
    let (shard, go) = (Shard::whole(data.clone()), AtomicBool::new(false));
    if way == "loop" {
        let layout = open.layout().expect("a built-in layout");
        let mut plain = Plain::new(&open, &layout, &data);
        (0..3).for_each(|_| plain.train(&layout.initial(1), &shard));
    } else {
        let task = task(if way == "private" { private } else { open }, batch);
        TorchTrainer::new().train(&task, &shard, &go).expect("training works");
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("no /proc here");
    println!("{way:8} {model:12} {batch:5} {peak}");
}

fn audit() {
    let shard = Shard::whole(Arc::new(data(6_000)));
    let task = task(private_job("small-cnn", 256.0 / 6_000.0, 480), 6_000);
    for sabotage in [Sabotage::Nothing, Sabotage::HalfNoise, Sabotage::NoClipping] {
        let start = Instant::now();
        let go = AtomicBool::new(false);
        let record = run_canaries(&task, &shard, 3_000, sabotage, &go).expect("an audit");
        let mean = |which: bool| {
            let scores = record.scores.iter().zip(&record.included).filter(|(_, is)| **is == which);
            let scores: Vec<f64> = scores.map(|(score, _)| *score).collect();
            scores.iter().sum::<f64>() / scores.len().max(1) as f64
        };
        println!(
            "{sabotage:?}: {:.1} s, noise ratio {:.4}, mean score {:.3} in the data, {:.3} out of it",
            start.elapsed().as_secs_f64(),
            record.noise_ratio,
            mean(true),
            mean(false)
        );
    }
}

fn compare(model: &str, batch: usize, steps: usize) {
    let [open, private] = jobs(model, batch, steps);
    let layout = open.layout().expect("a built-in layout");
    let initial = Arc::new(layout.initial(1));
    let data = Arc::new(data(batch));
    let shard = Shard::whole(data.clone());
    // The loop takes one epoch over what it is given.
    let repeated = Shard {
        indices: (0..steps).flat_map(|_| 0..batch as u32).collect::<Vec<_>>().into(),
        ..shard.clone()
    };
    let mut plain = Plain::new(&open, &layout, &data);
    let (mut engine, mut trainer) = (TorchTrainer::new(), TorchTrainer::new());
    let (open, private) = (task(open, batch), task(private, batch));
    let go = AtomicBool::new(false);
    let gaussian = Gaussian::new(1.0).expect("a possible deviation");
    let mut rng = SecretRng::new().expect("entropy");
    let mut values = vec![0.5f32; layout.parameters()];
    let mut times: [Vec<f64>; 4] = Default::default();
    for _ in 0..=REPEATS {
        let start = Instant::now();
        plain.train(&initial, &repeated);
        times[0].push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        engine.train(&open, &shard, &go).expect("training works");
        times[1].push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        trainer.train(&private, &shard, &go).expect("training works");
        times[2].push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        (0..steps).for_each(|_| gaussian.add(&mut rng, &mut values));
        times[3].push(start.elapsed().as_secs_f64());
    }
    let [of_loop, engine, whole, noise] = times.map(|mut times| {
        // The first warms up.
        times.remove(0);
        times.sort_unstable_by(f64::total_cmp);
        times[times.len() / 2] * 1e3 / steps as f64
    });
    let clipped = whole - noise;
    println!(
        "{model:12} {batch:5} {of_loop:9.3} {engine:9.3} {whole:9.3} {noise:9.3} {clipped:9.3} {:15.2}",
        clipped / of_loop
    );
}

fn job(model: &str, train: &str, more: &str) -> Job {
    let text = format!(
        "name = 'bench'\nseed = 1\nrounds = 1\n[model]\narchitecture = '{model}'\ninputs = [1, 28, 28]\nclasses = 10\n\
         [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\n{train}\n[cohort]\nsize = 1\n{more}"
    );
    Job::parse(&text).expect("a valid job")
}

fn data(examples: usize) -> Split {
    let mut stream = Stream::new(1, Purpose::Synthetic, 0, "bench");
    Split {
        features: (0..examples * 784).map(|_| stream.random::<f32>()).collect(),
        labels: (0..examples).map(|_| stream.random_range(0..10)).collect(),
        groups: Vec::new(),
    }
}
