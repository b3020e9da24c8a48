use std::sync::Arc;
use std::time::Duration;

use tributary_common::job::Algorithm;

use super::super::tests::{blobs, every_architecture, job, task};
use super::network::Layer;
use super::*;
use crate::data::Split;

fn train(task: &Task, shard: &Shard) -> ClientUpdate {
    TorchTrainer::new().train(task, shard, &AtomicBool::new(false)).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_network_uses_each_tensor_of_its_layout_once() {
    fn collect(layers: &[Layer], into: &mut Vec<usize>) {
        for layer in layers {
            match layer {
                Layer::Linear { weight, bias }
                | Layer::Convolution { weight, bias, .. }
                | Layer::GroupNorm { weight, bias, .. } => into.extend([*weight, *bias]),
                Layer::Residual { body, shortcut } => {
                    collect(body, into);
                    collect(shortcut, into);
                }
                _ => {}
            }
        }
    }
    threads::one_intra_op_thread();
    for job in every_architecture() {
        let layout = job.layout().unwrap();
        let network = Network::new(&job.model, &layout).unwrap();
        let mut used = Vec::new();
        collect(network.layers(), &mut used);
        used.sort_unstable();
        assert_eq!(
            used,
            (0..layout.tensors().len()).collect::<Vec<_>>(),
            "{}",
            job.model.architecture.name()
        );

        let parameters = Parameters::new(&layout).unwrap();
        let elements: usize = parameters.leaves().iter().map(Tensor::numel).sum();
        assert_eq!(elements, layout.parameters());
        let shard = blobs(&job.model, 3, 0.5);
        let (features, _) =
            Batch::default().gather(&shard.examples, &job.model.inputs, shard.indices.iter()).unwrap();
        let logits = network.forward(parameters.leaves(), features).unwrap();
        assert_eq!(logits.size(), [3, job.model.classes as i64], "{}", job.model.architecture.name());
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
        assert!((update.loss - loss(&task.model)).abs() < 1e-6 * update.loss, "{name}");
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
        assert!((update.loss - loss).abs() < 1e-6, "{name}: {} {loss}", update.loss);
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
