//! One client's local training: the engine beside the same steps in a plain libtorch loop, in one run.
//!
//! `cargo bench --workspace --bench engine [-- MODEL…]`. Each line: milliseconds per SGD step of ten examples for the
//! plain loop (autograd, with its pooling in channels-last order, batches gathered and the model loaded per client)
//! and for the engine, medians of alternated repeats, and their ratio.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rand::RngExt;
use tch::{Kind, Reduction, Tensor};
use tributary_client::data::Split;
use tributary_client::shard::Shard;
use tributary_client::trainer::{Task, TorchTrainer, Trainer};
use tributary_common::job::Job;
use tributary_common::model::{Layer, Layout};
use tributary_common::rng::{Purpose, Stream};

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
            let task = Task { job: job.clone(), round: 1, client, model: initial.clone(), max_steps: None };
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
    }
}

/// Local SGD as one would write it with tch.
struct Plain {
    layers: Vec<Layer>,
    names: Vec<String>,
    leaves: Vec<Tensor>,
    ranges: Vec<std::ops::Range<usize>>,
    features: Tensor,
    labels: Tensor,
}

impl Plain {
    fn new(job: &Job, layout: &Layout, data: &Split) -> Self {
        let leaf = |tensor: &tributary_common::model::Tensor| {
            let shape: Vec<i64> = tensor.shape().iter().map(|size| *size as i64).collect();
            Tensor::zeros(shape.as_slice(), (Kind::Float, tch::Device::Cpu)).set_requires_grad(true)
        };
        Self {
            layers: job.model.network().expect("a built-in network").layers().to_vec(),
            names: layout.tensors().iter().map(|tensor| tensor.name().to_owned()).collect(),
            leaves: layout.tensors().iter().map(leaf).collect(),
            ranges: layout.tensors().iter().map(|tensor| tensor.range()).collect(),
            features: Tensor::from_slice(&data.features).view([data.len() as i64, 1, 28, 28]),
            labels: Tensor::from_slice(&data.labels),
        }
    }

    fn train(&mut self, model: &[f32], shard: &Shard) {
        {
            let _no_graph = tch::no_grad_guard();
            for (leaf, range) in self.leaves.iter_mut().zip(&self.ranges) {
                leaf.copy_(&Tensor::from_slice(&model[range.clone()]).view_as(leaf));
            }
        }
        for batch in shard.indices.chunks(BATCH) {
            let indices: Vec<i64> = batch.iter().map(|index| i64::from(*index)).collect();
            let indices = Tensor::from_slice(&indices);
            let (x, y) = (self.features.index_select(0, &indices), self.labels.index_select(0, &indices));
            let logits = self.forward(&self.layers, x);
            let loss = logits.cross_entropy_loss::<Tensor>(&y, None, Reduction::Mean, -100, 0.0);
            let gradients = Tensor::run_backward(&[loss], &self.leaves, false, false);
            let _no_graph = tch::no_grad_guard();
            for (leaf, mut gradient) in self.leaves.iter_mut().zip(gradients) {
                let _ = leaf.f_sub_(&gradient.g_mul_scalar_(RATE)).expect("equal shapes");
            }
        }
    }

    fn of(&self, name: &str, part: &str) -> &Tensor {
        let name = format!("{name}.{part}");
        let at = self.names.iter().position(|other| *other == name).expect("a tensor of the layout");
        &self.leaves[at]
    }

    fn forward(&self, layers: &[Layer], x: Tensor) -> Tensor {
        let mut rest = layers;
        let mut x = x;
        while let Some((layer, after)) = rest.split_first() {
            rest = after;
            // Pooling before ReLU, in channels-last order where that is faster.
            if let (Layer::Relu, Some((pool @ Layer::MaxPool { stride: 1, .. }, after))) =
                (layer, after.split_first())
            {
                let last = x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
                x = self.layer(pool, last).relu();
                rest = after;
            } else {
                x = self.layer(layer, x);
            }
        }
        x
    }

    fn layer(&self, layer: &Layer, x: Tensor) -> Tensor {
        let square = |size: usize| [size as i64, size as i64];
        match layer {
            Layer::Flatten => x.flatten(1, -1),
            Layer::Linear { name, .. } => x.linear(self.of(name, "weight"), Some(self.of(name, "bias"))),
            Layer::Convolution { name, stride, padding, .. } => {
                let (weight, bias) = (self.of(name, "weight"), self.of(name, "bias"));
                x.conv2d(weight, Some(bias), square(*stride), square(*padding), [1, 1], 1)
            }
            Layer::GroupNorm { name, groups, .. } => {
                let (weight, bias) = (self.of(name, "weight"), self.of(name, "bias"));
                x.group_norm(*groups as i64, Some(weight), Some(bias), 1e-5, false)
            }
            Layer::Relu => x.relu(),
            Layer::MaxPool { size, stride } => {
                x.max_pool2d(square(*size), square(*stride), [0, 0], [1, 1], false)
            }
            Layer::GlobalAveragePool => x.mean_dim([2i64, 3].as_slice(), false, None),
            Layer::Residual { body, shortcut } => {
                let other = self.forward(shortcut, x.shallow_clone());
                self.forward(body, x) + other
            }
            other => unreachable!("no benchmarked network has {other:?}"),
        }
    }
}
