//! One client's local training: the engine beside the same steps in a plain libtorch loop, in one run.
//!
//! `cargo bench --workspace --bench engine [-- MODEL…]`. Each line: milliseconds per SGD step of ten examples for the
//! plain loop (autograd, with its pooling in channels-last order, batches gathered and the model loaded per client)
//! and for the engine, medians of alternated repeats, and their ratio.

#![allow(clippy::expect_used)]

mod plain;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rand::RngExt;
use tributary_client::data::Split;
use tributary_client::shard::Shard;
use tributary_client::trainer::{Task, TorchTrainer, Trainer};
use tributary_common::job::Job;
use tributary_common::rng::{Purpose, Stream};

use plain::Plain;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EXAMPLES: usize = 60;
const BATCH: usize = 10;
const REPEATS: usize = 9;
const RATE: f64 = 0.1;

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    println!(
        "{:12} {:>10} {:>10} {:>7}   milliseconds per step of {BATCH}",
        "model", "plain loop", "engine", "ratio"
    );
    for (model, clients) in
        [("2nn", 60), ("small-cnn", 40), ("mcmahan-cnn", 4), ("lenet", 30), ("resnet8-gn", 2)]
    {
        if chosen.is_empty() || chosen.iter().any(|name| name == model) {
            compare(model, clients);
        }
    }
}

fn compare(model: &str, clients: usize) {
    let job = job(model);
    let layout = job.layout().expect("a built-in layout");
    let initial = Arc::new(layout.initial(1));
    let data = Arc::new(data());
    let shards: Vec<Shard> = (0..clients)
        .map(|client| {
            let first = (client * EXAMPLES % 5_000) as u32;
            Shard { indices: (first..first + EXAMPLES as u32).collect(), ..Shard::whole(data.clone()) }
        })
        .collect();
    let mut trainer = TorchTrainer::new();
    let mut plain = Plain::new(&job, &layout, &data);
    let job = Arc::new(job);
    let go = AtomicBool::new(false);
    let (mut of_plain, mut of_engine) = (Vec::new(), Vec::new());
    for _ in 0..=REPEATS {
        let start = Instant::now();
        for shard in &shards {
            plain.train(&initial, shard);
        }
        of_plain.push(start.elapsed());
        let start = Instant::now();
        for (client, shard) in shards.iter().enumerate() {
            let client = format!("client-{client}").parse().expect("a valid name");
            let task = Task {
                job: job.clone(),
                round: 1,
                client,
                model: initial.clone(),
                declared_examples: None,
                max_steps: None,
            };
            trainer.train(&task, shard, &go).expect("training works");
        }
        of_engine.push(start.elapsed());
    }
    let per_step = |times: &mut Vec<Duration>| {
        // The first warms up.
        times.remove(0);
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e3 / (clients * EXAMPLES / BATCH) as f64
    };
    let (plain, engine) = (per_step(&mut of_plain), per_step(&mut of_engine));
    println!("{model:12} {plain:10.3} {engine:10.3} {:6.2}×", plain / engine);
}

fn job(model: &str) -> Job {
    let text = format!(
        "name = 'bench'\nseed = 1\nrounds = 1\n[model]\narchitecture = '{model}'\ninputs = [1, 28, 28]\nclasses = 10\n\
         [train]\nalgorithm = 'fedavg'\nlearning_rate = {RATE}\nlocal_epochs = 1\nbatch_size = {BATCH}\n[cohort]\nsize = 1\n"
    );
    Job::parse(&text).expect("a valid job")
}

fn data() -> Split {
    let mut stream = Stream::new(1, Purpose::Synthetic, 0, "bench");
    let examples = 6_000;
    Split {
        features: (0..examples * 784).map(|_| stream.random::<f32>()).collect(),
        labels: (0..examples).map(|_| stream.random_range(0..10)).collect(),
        groups: Vec::new(),
    }
}
