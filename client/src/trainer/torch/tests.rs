use std::sync::Arc;
use std::time::Duration;

use tributary_common::job::Algorithm;

use super::super::tests::{blobs, every_architecture, job, task};
use super::*;

fn train(task: &Task, shard: &Shard) -> ClientUpdate {
    TorchTrainer::new().train(task, shard, &AtomicBool::new(false)).unwrap()
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Jobs whose networks have every kind of layer, in places where one could spoil another's values.
pub(super) fn sequences() -> Vec<Job> {
    let residual = r#"{ residual = { body = [BODY], shortcut = [SHORTCUT] } }"#;
    let mut jobs = Vec::new();
    for (body, shortcut) in [
        ("", ""),
        (r#""relu""#, ""),
        (r#""tanh", "relu""#, r#""tanh""#),
        (r#"{ convolution = { channels = 4, size = 3, padding = 1 } }, "relu""#, ""),
        (
            r#"{ group_norm = { groups = 2 } }, "relu", { convolution = { channels = 6, size = 3, stride = 2, padding = 1 } }"#,
            r#"{ convolution = { channels = 6, size = 1, stride = 2 } }, "tanh""#,
        ),
    ] {
        let residual = residual.replace("BODY", body).replace("SHORTCUT", shortcut);
        let layers = format!(
            r#"[{{ convolution = {{ channels = 4, size = 3, stride = 1, padding = 1 }} }}, "tanh", "relu", {residual}, "relu",
                {{ average_pool = {{ size = 2, stride = 2 }} }}, {{ max_pool = {{ size = 2, stride = 1 }} }}, "flatten",
                {{ linear = 9 }}, "tanh", {{ linear = 5 }}]"#
        );
        jobs.push(sequential(&[2, 9, 8], 5, &layers));
    }
    jobs.push(sequential(&[3], 2, r#"["relu", { linear = 4 }, "tanh", "tanh", { linear = 2 }]"#));
    jobs.push(sequential(&[7], 3, r#"["layer-norm", { linear = 6 }, "layer-norm", "tanh", { linear = 3 }]"#));
    jobs
}

/// A network over words, and 9 examples of nine out of 20 words, some of them twice.
pub(super) fn words() -> (Job, Shard) {
    let layers = r#"[{ embedding = { vocabulary = 20, width = 4 } }, "layer-norm", { linear = 5 }, "relu", { linear = 3 }]"#;
    let job = sequential(&[9], 3, layers);
    let mut split = Split::clone(&blobs(&job.model, 9, 0.5).examples);
    split.features.iter_mut().enumerate().for_each(|(at, word)| *word = (at * at % 19 + at % 2) as f32);
    (job, Shard::whole(Arc::new(split)))
}

pub(super) fn sequential(inputs: &[usize], classes: usize, layers: &str) -> Job {
    let text = job("logistic", inputs, classes).to_toml().unwrap();
    let text = text
        .replace("architecture = \"logistic\"", &format!("architecture = \"sequential\"\nlayers = {layers}"));
    Job::parse(&text).unwrap()
}

/// The gradient of the first batch of `task`, as the change of one step of rate 1.
fn first_gradient(mut task: Task, shard: &Shard, momentum: f64) -> Vec<f64> {
    let mut job = Job::clone(&task.job);
    job.train.local_epochs = None;
    (job.train.local_steps, job.train.batch_size) = (Some(1), shard.len() as u32);
    (job.train.learning_rate, job.train.momentum) = (1.0, momentum);
    task.job = Arc::new(job);
    train(&task, shard).delta.iter().map(|change| -f64::from(*change)).collect()
}

pub(super) fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

#[test]
fn every_gradient_is_autograds() {
    threads::one_intra_op_thread();
    let with_blobs = |job: Job| (blobs(&job.model, 7, 0.5), job);
    let jobs = every_architecture().into_iter().chain(sequences()).map(with_blobs);
    let (job, shard) = words();
    for (shard, job) in jobs.chain([(shard, job)]) {
        let name = format!("{:?}", job.model);
        let task = task(job, "a");
        let (layout, network) = (task.job.layout().unwrap(), task.job.model.network().unwrap());
        let labels = &shard.examples.labels;
        let features = &shard.examples.features;
        let inputs = &task.job.model.inputs;
        let (loss, expected) =
            reference::gradient(network.layers(), inputs, &layout, &task.model, features, labels, None);
        // Once within the products, once through the update rule.
        for momentum in [0.0, 0.5] {
            let found = first_gradient(task.clone(), &shard, momentum);
            let error = relative_error(&found, &expected);
            assert!(error < 1e-5, "{name}: {error}");
            for tensor in layout.tensors() {
                let error = relative_error(&found[tensor.range()], &expected[tensor.range()]);
                assert!(error < 1e-4, "{name}, {}: {error}", tensor.name());
            }
        }
        let metrics = TorchTrainer::new().evaluate(&task.job, &task.model, &shard).unwrap();
        assert!((metrics.loss().unwrap() - loss).abs() < 1e-5, "{name}");
    }
}

#[test]
fn dropout_drops_what_its_stream_says_in_training_and_nothing_in_evaluation() {
    let layers = r#"["flatten", { linear = 40 }, "relu", { dropout = 0.4 }, { linear = 30 }, { dropout = 0.2 }, { linear = 3 }]"#;
    let job = sequential(&[12], 3, layers);
    let shard = blobs(&job.model, 6, 0.5);
    let task = task(job, "a");
    let (layout, network) = (task.job.layout().unwrap(), task.job.model.network().unwrap());
    let Split { features, labels, .. } = &*shard.examples;
    let mut order = Batches::new(&first_step(&task, &shard), shard.len());
    let order = order.next().to_vec();
    let features: Vec<f32> =
        order.iter().flat_map(|at| &features[*at as usize * 12..][..12]).copied().collect();
    let labels: Vec<i64> = order.iter().map(|at| labels[*at as usize]).collect();
    let reference = |stream: Option<&mut Stream>| {
        reference::gradient(network.layers(), &[12], &layout, &task.model, &features, &labels, stream)
    };
    let mut stream = Stream::new(task.job.seed, Purpose::Dropout, 1, "a");
    let (_, expected) = reference(Some(&mut stream));
    let found = first_gradient(task.clone(), &shard, 0.0);
    assert!(relative_error(&found, &expected) < 1e-5, "{}", relative_error(&found, &expected));
    let (loss, without) = reference(None);
    assert!(relative_error(&without, &expected) > 0.1);
    let metrics = TorchTrainer::new().evaluate(&task.job, &task.model, &shard).unwrap();
    assert!((metrics.loss().unwrap() - loss).abs() < 1e-6);
    for other in [Task { round: 2, ..task.clone() }, Task { client: "b".parse().unwrap(), ..task.clone() }] {
        assert!(relative_error(&first_gradient(other, &shard, 0.0), &expected) > 0.1);
    }
}

/// `task` with one step over the whole of `shard`.
fn first_step(task: &Task, shard: &Shard) -> Task {
    let mut job = Job::clone(&task.job);
    job.train.batch_size = shard.len() as u32;
    Task { job: Arc::new(job), ..task.clone() }
}

#[test]
fn parts_of_an_evaluation_add_up_to_the_bits_of_the_whole() {
    let job = job("mlp", &[6], 3);
    let shard = blobs(&job.model, 1234, 0.5);
    let model = task(job.clone(), "a").model;
    let mut trainer = TorchTrainer::new();
    let whole = trainer.evaluate(&job, &model, &shard).unwrap();
    let mut sum = Metrics::default();
    for part in shard.indices.chunks(EVALUATION_BATCH) {
        sum.add(&trainer.evaluate(&job, &model, &Shard { indices: part.into(), ..shard.clone() }).unwrap());
    }
    assert_eq!(sum, whole);
}

#[test]
fn a_straggler_takes_the_first_of_its_steps() {
    let job = job("mlp", &[6], 3);
    let shard = blobs(&job.model, 30, 0.5);
    let whole = task(job, "a");
    let part = Task { max_steps: Some(3), ..whole.clone() };
    let mut three = Job::clone(&whole.job);
    (three.train.local_epochs, three.train.local_steps) = (None, Some(3));
    let three = Task { job: Arc::new(three), ..whole.clone() };
    assert_eq!(train(&part, &shard), train(&three, &shard));
    assert_ne!(train(&part, &shard), train(&whole, &shard));
    assert_eq!(train(&Task { max_steps: Some(99), ..whole.clone() }, &shard), train(&whole, &shard));
}

/// The proximal term as an objective of one's own.
struct Proximal {
    mu: f32,
    start: Vec<f32>,
    steps: u64,
}

impl Objective for Proximal {
    fn begin(&mut self, task: &Task, _: u64) {
        self.start = task.model.to_vec();
    }

    fn gradient(&mut self, step: u64, model: &[f32], gradient: &mut [f32]) {
        self.steps = step;
        for ((slope, value), start) in gradient.iter_mut().zip(model).zip(&self.start) {
            *slope += self.mu * (value - start);
        }
    }

    fn finish(&mut self, task: &Task, steps: u64, delta: &[f32]) {
        assert_eq!((self.steps, delta.len()), (steps, task.model.len()));
    }
}

#[test]
fn an_objective_of_ones_own_sees_the_layouts_order() {
    for architecture in ["mlp", "small-cnn"] {
        let inputs: &[usize] = if architecture == "mlp" { &[6] } else { &[2, 20, 20] };
        let mut prox = job(architecture, inputs, 3);
        prox.train.local_epochs = Some(3);
        let shard = blobs(&prox.model, 20, 0.5);
        let plain = task(prox.clone(), "a");
        (prox.train.algorithm, prox.train.proximal_mu) = (Algorithm::Fedprox, Some(1.5));
        let expected = train(&task(prox, "a"), &shard).delta;
        let objective = Proximal { mu: 1.5, start: Vec::new(), steps: 0 };
        let mut trainer = TorchTrainer::with_objective(Box::new(objective));
        let found = trainer.train(&plain, &shard, &reference::GO).unwrap().delta;
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{architecture}: {worst}");
        assert_ne!(bits(&found), bits(&train(&plain, &shard).delta));
    }
}

/// One step with the whole client as its batch changes the loss by −‖δ‖²/η to first order: the gradient is that
/// of the loss which evaluation reports, in every layer.
#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    for mut job in every_architecture() {
        let name = job.model.architecture.name();
        job.train.batch_size = 12;
        job.train.learning_rate = 1e-3;
        let shard = blobs(&job.model, 12, 0.5);
        let task = task(job, "a");
        let update = train(&task, &shard);
        let mut trainer = TorchTrainer::new();
        let mut loss = |model: &[f32]| trainer.evaluate(&task.job, model, &shard).unwrap().loss().unwrap();
        let moved: Vec<f32> = task.model.iter().zip(&update.delta).map(|(w, d)| w + d).collect();
        let squares: f64 = update.delta.iter().map(|d| f64::from(*d).powi(2)).sum();
        let (actual, predicted) = (loss(&moved) - loss(&task.model), -squares / 1e-3);
        assert!(predicted < 0.0 && (actual / predicted - 1.0).abs() < 0.05, "{name}: {actual} {predicted}");
        assert!((update.loss.unwrap() - loss(&task.model)).abs() < 1e-6 * update.loss.unwrap(), "{name}");
    }
}

/// Logistic regression by hand in f64: the same batches, softmax, and the update rule as the papers write it.
/// Returns the change and the mean loss.
fn by_hand(task: &Task, shard: &Shard, steps: usize) -> (Vec<f64>, f64) {
    let train = &task.job.train;
    let (features, classes) = (task.job.model.inputs[0], task.job.model.classes);
    let rate = train.learning_rate(task.round, task.job.rounds);
    let start: Vec<f64> = task.model.iter().map(|value| f64::from(*value)).collect();
    let mut model = start.clone();
    let mut velocity = vec![0.0; model.len()];
    let mut batches = Batches::new(task, shard.len());
    let (mut loss, mut seen) = (0.0, 0.0);
    for _ in 0..steps {
        let batch = batches.next().to_vec();
        // The layout sorts by name: `linear.bias` lies before `linear.weight`.
        let mut gradient = vec![0.0; model.len()];
        for position in &batch {
            let example = shard.indices[*position as usize] as usize;
            let x = &shard.examples.features[example * features..(example + 1) * features];
            let label = shard.examples.labels[example] as usize;
            let logit = |class: usize| {
                let weights = &model[classes + class * features..classes + (class + 1) * features];
                model[class] + weights.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum::<f64>()
            };
            let powers: Vec<f64> = (0..classes).map(|class| logit(class).exp()).collect();
            let sum: f64 = powers.iter().sum();
            loss -= (powers[label] / sum).ln();
            seen += 1.0;
            for class in 0..classes {
                let slope = powers[class] / sum - f64::from(u8::from(class == label));
                gradient[class] += slope / batch.len() as f64;
                for (feature, x) in x.iter().enumerate() {
                    gradient[classes + class * features + feature] +=
                        slope * f64::from(*x) / batch.len() as f64;
                }
            }
        }
        for (index, slope) in gradient.iter().enumerate() {
            let proximal = train.proximal_mu.unwrap_or(0.0) * (model[index] - start[index]);
            velocity[index] =
                train.momentum * velocity[index] + slope + train.weight_decay * model[index] + proximal;
            model[index] -= rate * velocity[index];
        }
    }
    (model.iter().zip(start).map(|(w, s)| w - s).collect(), loss / seen)
}

#[test]
fn logistic_regression_agrees_with_the_rule_worked_out_by_hand() {
    type Change = fn(&mut Job);
    let cases: [(&str, usize, Change); 7] = [
        ("one epoch: 4 + 4 + 2", 3, |_| {}),
        ("three epochs", 9, |job| job.train.local_epochs = Some(3)),
        ("seven steps", 7, |job| (job.train.local_epochs, job.train.local_steps) = (None, Some(7))),
        ("momentum", 9, |job| (job.train.local_epochs, job.train.momentum) = (Some(3), 0.9)),
        ("weight decay", 9, |job| (job.train.local_epochs, job.train.weight_decay) = (Some(3), 0.3)),
        ("proximal", 9, |job| {
            job.train.algorithm = Algorithm::Fedprox;
            (job.train.local_epochs, job.train.proximal_mu) = (Some(3), Some(2.0));
        }),
        ("everything", 15, |job| {
            job.train.algorithm = Algorithm::Fedprox;
            job.train.schedule = tributary_common::job::Schedule::Exponential;
            job.train.decay = Some(0.5);
            (job.train.local_epochs, job.train.proximal_mu) = (Some(5), Some(0.5));
            (job.train.momentum, job.train.weight_decay) = (0.5, 0.1);
        }),
    ];
    for (name, steps, change) in cases {
        let mut job = job("logistic", &[5], 3);
        change(&mut job);
        let shard = blobs(&job.model, 20, 0.5);
        // A client in the middle of the buffer, in an order of its own.
        let shard = Shard { indices: (5..15).rev().collect(), ..shard };
        let task = Task { round: 2, ..task(job, "a") };
        let update = train(&task, &shard);
        let (delta, loss) = by_hand(&task, &shard, steps);
        let worst =
            update.delta.iter().zip(&delta).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(worst < 2e-6, "{name}: {worst}");
        assert!((update.loss.unwrap() - loss).abs() < 1e-6, "{name}: {:?} {loss}", update.loss);
        assert_eq!(update.examples, 10, "{name}");
        // The comparison can tell one step more from none.
        let (other, _) = by_hand(&task, &shard, steps + 1);
        assert!(other.iter().zip(&delta).any(|(a, b)| (a - b).abs() > 1e-3), "{name}");
    }
}

#[test]
fn fedprox_is_fedavg_without_mu_and_stays_nearer_with_it() {
    for momentum in [0.0, 0.9] {
        let mut job = job("mlp", &[6], 3);
        job.train.momentum = momentum;
        job.train.local_epochs = Some(4);
        let shard = blobs(&job.model, 30, 0.5);
        let with_mu = |mu: f64| {
            let mut job = job.clone();
            (job.train.algorithm, job.train.proximal_mu) = (Algorithm::Fedprox, Some(mu));
            train(&task(job, "a"), &shard).delta
        };
        let fedavg = train(&task(job.clone(), "a"), &shard).delta;
        assert_eq!(bits(&with_mu(0.0)), bits(&fedavg));
        let length = |delta: &[f32]| delta.iter().map(|d| d * d).sum::<f32>().sqrt();
        let (free, held, tight) = (length(&fedavg), length(&with_mu(0.5)), length(&with_mu(2.0)));
        assert!(tight < held && held < free, "{tight} {held} {free}");
    }
}

#[test]
fn the_same_task_gives_the_same_bits_on_any_thread_and_after_any_other_task() {
    let tasks: Vec<(Task, Shard)> = ["2nn", "small-cnn", "lenet", "resnet8-gn"]
        .into_iter()
        .map(|architecture| {
            let mut job = job(architecture, &[1, 28, 28], 10);
            job.train.momentum = 0.5;
            let shard = blobs(&job.model, 14, 0.5);
            (task(job, "a"), shard)
        })
        .collect();
    let alone: Vec<ClientUpdate> = tasks.iter().map(|(task, shard)| train(task, shard)).collect();
    let evaluated: Vec<Metrics> = tasks
        .iter()
        .map(|(task, shard)| TorchTrainer::new().evaluate(&task.job, &task.model, shard).unwrap())
        .collect();
    std::thread::scope(|scope| {
        for turn in 0..4 {
            let (tasks, alone, evaluated) = (&tasks, &alone, &evaluated);
            scope.spawn(move || {
                let mut trainer = TorchTrainer::new();
                for index in 0..tasks.len() {
                    let index = (index + turn) % tasks.len();
                    let (task, shard) = &tasks[index];
                    // Another client, cut short, on the same model; then the task twice.
                    let other = Task { client: "b".parse().unwrap(), round: 3, ..task.clone() };
                    trainer.train(&other, shard, &AtomicBool::new(false)).unwrap();
                    trainer.train(&other, shard, &AtomicBool::new(true)).unwrap_err();
                    for _ in 0..2 {
                        let update = trainer.train(task, shard, &AtomicBool::new(false)).unwrap();
                        assert_eq!(bits(&update.delta), bits(&alone[index].delta));
                        assert_eq!(update, alone[index]);
                        let metrics = trainer.evaluate(&task.job, &task.model, shard).unwrap();
                        assert_eq!(metrics, evaluated[index]);
                    }
                }
            });
        }
    });
}

#[test]
fn round_and_client_decide_the_order_and_nothing_of_torch_does() {
    let job = job("mlp", &[6], 3);
    let shard = blobs(&job.model, 30, 0.5);
    let base = task(job, "a");
    let update = train(&base, &shard);
    // A draw from libtorch's own generator would differ the second time.
    assert_eq!(train(&base, &shard), update);
    assert_ne!(train(&Task { round: 2, ..base.clone() }, &shard).delta, update.delta);
    assert_ne!(train(&Task { client: "b".parse().unwrap(), ..base.clone() }, &shard).delta, update.delta);
}

#[test]
fn a_stop_from_another_thread_ends_a_long_training() {
    let mut job = job("logistic", &[4], 3);
    (job.train.local_epochs, job.train.local_steps) = (None, Some(1_000_000));
    let shard = blobs(&job.model, 9, 0.1);
    let task = task(job, "a");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let trained = scope.spawn(|| TorchTrainer::new().train(&task, &shard, &stop));
        std::thread::sleep(Duration::from_millis(20));
        stop.store(true, Ordering::Relaxed);
        assert_eq!(trained.join().unwrap(), Err(TrainError::Cancelled));
    });
}

#[test]
fn divergence_is_named_with_its_step() {
    let mut wild = job("mlp", &[6], 3);
    wild.train.learning_rate = 1e6;
    wild.train.local_epochs = Some(20);
    let shard = blobs(&wild.model, 30, 0.5);
    let task_of = task(wild.clone(), "a");
    let mut trainer = TorchTrainer::new();
    let refused = trainer.train(&task_of, &shard, &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(refused, TrainError::Diverged { step } if step > 1), "{refused:?}");
    assert!(refused.to_string().contains("lower [train] learning_rate"));

    let mut poisoned = Split::clone(&shard.examples);
    poisoned.features.fill(f32::NAN);
    let poisoned = Shard { examples: Arc::new(poisoned), ..shard.clone() };
    let calm = task(job("mlp", &[6], 3), "a");
    let trained = trainer.train(&calm, &poisoned, &AtomicBool::new(false));
    assert_eq!(trained, Err(TrainError::Diverged { step: 1 }));
    assert_eq!(trainer.evaluate(&calm.job, &calm.model, &poisoned), Err(TrainError::LossNotFinite));
    trainer.train(&calm, &shard, &AtomicBool::new(false)).unwrap();
}

#[test]
fn separable_blobs_are_learnt_and_the_counts_fit_together() {
    for architecture in ["mlp", "small-cnn", "resnet8-gn"] {
        let inputs: &[usize] = if architecture == "mlp" { &[20] } else { &[1, 20, 20] };
        let mut job = job(architecture, inputs, 4);
        (job.train.local_epochs, job.train.batch_size) = (Some(6), 10);
        let all = blobs(&job.model, 720, 0.7);
        let part = |range: std::ops::Range<u32>| Shard { indices: range.collect(), ..all.clone() };
        let task = task(job.clone(), "a");
        let mut trainer = TorchTrainer::new();
        let update = trainer.train(&task, &part(0..120), &AtomicBool::new(false)).unwrap();
        let model: Vec<f32> = task.model.iter().zip(&update.delta).map(|(w, d)| w + d).collect();
        // 600 examples: more than one evaluation batch, the last one smaller.
        let before = trainer.evaluate(&job, &task.model, &part(120..720)).unwrap();
        let after = trainer.evaluate(&job, &model, &part(120..720)).unwrap();
        assert!(after.accuracy().unwrap() > 0.95, "{architecture}: {after:?}");
        assert!(
            after.loss() < before.loss() && before.accuracy().unwrap() < 0.9,
            "{architecture}: {before:?}"
        );
        assert_eq!((after.examples, after.confusion.len()), (600, 16));
        for class in 0..4 {
            assert_eq!(after.confusion[class * 4..][..4].iter().flatten().sum::<u64>(), 150);
        }
        assert_eq!((0..4).map(|class| after.confusion[class * 5].unwrap()).sum::<u64>(), after.correct);
    }
}

#[test]
fn many_classes_are_evaluated_without_confusion_counts() {
    for (classes, cells) in [(100, 10_000), (101, 0)] {
        let job = job("logistic", &[4], classes);
        let shard = blobs(&job.model, 202, 0.1);
        let metrics = TorchTrainer::new().evaluate(&job, &task(job.clone(), "a").model, &shard).unwrap();
        assert_eq!((metrics.examples, metrics.confusion.len()), (202, cells));
    }
}
