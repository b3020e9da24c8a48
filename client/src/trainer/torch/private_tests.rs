//! Tests of private training against a naive loop over examples in double precision, and of each known pitfall.

use std::sync::{Arc, Mutex};

use tributary_common::job::{Algorithm, Job, Mechanism as Where, MetricsRelease, PrivacyUnit};

use super::super::reference::{self, GO};
use super::super::tests::{bits, relative_error, sequences, sequential, words};
use super::super::threads;
use super::*;
use crate::trainer::tests::{blobs, every_architecture, job, task};
use crate::trainer::{Recorder, Trainer};

/// A `[privacy]` table for examples.
pub(in crate::trainer) fn privacy() -> Privacy {
    Privacy {
        unit: PrivacyUnit::Example,
        mechanism: Where::DpSgd,
        noise_multiplier: 1.0,
        clip_norm: 1.0,
        clipping: Clipping::Flat,
        target_quantile: None,
        clip_learning_rate: None,
        count_noise: None,
        sampler: Sampler::Gaussian,
        delta: 1e-5,
        max_epsilon: 100.0,
        metrics: MetricsRelease::None,
        metrics_noise: None,
        expected_batch_size: None,
    }
}

/// `job` with privacy for examples, so many steps and this sampling rate.
pub(in crate::trainer) fn private(mut job: Job, privacy: Privacy, steps: u32, rate: f64) -> Job {
    job.privacy = Some(privacy);
    (job.train.local_epochs, job.train.batch_size) = (None, 0);
    (job.train.local_steps, job.train.sampling_rate) = (Some(steps), Some(rate));
    job
}

pub(in crate::trainer) fn declaring(job: Job, declared: u64) -> Task {
    Task { declared_examples: Some(declared), ..task(job, "a") }
}

fn train(task: &Task, shard: &Shard) -> ClientUpdate {
    TorchTrainer::new().train(task, shard, &GO).unwrap()
}

/// How a sum is computed: norms by ghost or directly, examples at a time.
#[derive(Clone, Copy, Default)]
struct How {
    ghost: Option<bool>,
    physical: Option<usize>,
}

/// The clipped sum over `chosen` of the shard's units, in the order of the layout, and the centred count.
fn clipped_sum(task: &Task, privacy: &Privacy, shard: &Shard, chosen: &[u32], how: How) -> (Vec<f64>, f64) {
    threads::one_intra_op_thread();
    let _no_graph = tch::no_grad_guard();
    let mut trainer = TorchTrainer::new();
    let prepared = TorchTrainer::prepare(&mut trainer.prepared, &task.job).unwrap();
    let (network, parameters, _) = prepared.network(Some(Target::Clipped)).unwrap();
    if let Some(ghost) = how.ghost {
        network.force_ghost(ghost);
    }
    parameters.load(&task.model);
    let units = Units::of(shard).unwrap();
    let size = (&*network, parameters.len());
    let mut mechanism = Mechanism::new(privacy, 10.0, size, units.by_row()).unwrap();
    mechanism.physical = how.physical.unwrap_or(mechanism.physical);
    let mut rng = SecretRng::new().unwrap();
    // What an earlier batch left must not matter.
    for chosen in [&[0][..], chosen] {
        mechanism.clear(parameters);
        mechanism.add_units(network, parameters, &mut rng, (&shard.examples, &units, chosen)).unwrap();
    }
    let mut sum = Vec::new();
    parameters.to_layout(&mechanism.present(parameters), &mut sum);
    (sum.into_iter().map(f64::from).collect(), mechanism.count)
}

/// The gradient of each row of the shard by autograd, in double precision.
fn single_gradients(task: &Task, shard: &Shard) -> Vec<Vec<f64>> {
    let (layout, network) = (task.job.layout().unwrap(), task.job.model.network().unwrap());
    let width = task.job.model.inputs.iter().product::<usize>();
    let gradient = |row: &u32| {
        let at = *row as usize;
        let features = &shard.examples.features[at * width..(at + 1) * width];
        let labels = &shard.examples.labels[at..=at];
        let inputs = &task.job.model.inputs;
        reference::gradient(network.layers(), inputs, &layout, &task.model, features, labels, None).1
    };
    shard.indices.iter().map(gradient).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// Σ min(1, C/‖g‖)·g over the gradients, and how many are at most C.
fn naive(gradients: &[Vec<f64>], clip: f64) -> (Vec<f64>, usize) {
    let mut sum = vec![0.0; gradients[0].len()];
    for gradient in gradients {
        let factor = (clip / norm(gradient)).min(1.0);
        sum.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += factor * value);
    }
    (sum, gradients.iter().filter(|gradient| norm(gradient) <= clip).count())
}

/// A clip norm between the smaller and the larger half of the norms.
fn middle(gradients: &[Vec<f64>]) -> f64 {
    let mut norms: Vec<f64> = gradients.iter().map(|gradient| norm(gradient)).collect();
    norms.sort_unstable_by(f64::total_cmp);
    (norms[norms.len() / 2 - 1] + norms[norms.len() / 2]) / 2.0
}

/// pitfall 3: a mean's slopes would clip nothing here, and the sum would be too small.
#[test]
fn clipped_sums_are_those_of_a_naive_loop_in_every_network_and_way() {
    let with_blobs = |job: Job| (blobs(&job.model, 9, 0.8), job);
    let jobs = every_architecture().into_iter().chain(sequences()).map(with_blobs);
    let (job, shard) = words();
    for (shard, job) in jobs.chain([(shard, job)]) {
        let name = format!("{:?}", job.model);
        let task = task(job, "a");
        let gradients = single_gradients(&task, &shard);
        let clip_norm = middle(&gradients);
        let (expected, below) = naive(&gradients, clip_norm);
        let chosen: Vec<u32> = (0..9).collect();
        for ghost in [None, Some(true), Some(false)] {
            let how = How { ghost, ..How::default() };
            let privacy = Privacy { clip_norm, ..privacy() };
            let (found, count) = clipped_sum(&task, &privacy, &shard, &chosen, how);
            let error = relative_error(&found, &expected);
            assert!(error < 1e-5, "{name}, ghost {ghost:?}: {error}");
            assert_eq!(count, below as f64 - 4.5, "{name}");
        }
        // Exact integers, and persons of one row each.
        let mut alone = Split::clone(&shard.examples);
        alone.groups = (10..19).collect();
        let alone = Shard::whole(Arc::new(alone));
        for (sampler, shard) in [(Sampler::DiscreteGaussian, &shard), (Sampler::Gaussian, &alone)] {
            let privacy = Privacy { clip_norm, sampler, ..privacy() };
            let (found, count) = clipped_sum(&task, &privacy, shard, &chosen, How::default());
            let error = relative_error(&found, &expected);
            // Rounding towards zero costs up to 2⁻²⁰ of C per coordinate.
            let most = if sampler == Sampler::Gaussian { 1e-5 } else { 2e-3 };
            assert!(error < most, "{name}, {sampler:?}: {error}");
            assert_eq!(count, below as f64 - 4.5, "{name}");
        }
    }
}

#[test]
fn every_single_gradient_is_at_most_as_long_as_the_clip_norm() {
    for architecture in ["2nn", "small-cnn", "resnet8-gn"] {
        let job = job(architecture, &[1, 28, 28], 10);
        let shard = blobs(&job.model, 6, 0.8);
        let task = task(job, "a");
        for clipping in [Clipping::Flat, Clipping::Automatic] {
            for clip_norm in [1e-3, 0.5] {
                let privacy = Privacy { clip_norm, clipping, ..privacy() };
                for example in 0..6 {
                    let (found, _) = clipped_sum(&task, &privacy, &shard, &[example], How::default());
                    // pitfall 5: not one unit in the last place above.
                    assert!(norm(&found) <= clip_norm, "{architecture}: {}", norm(&found));
                    let least = if clipping == Clipping::Flat { 1.0 - 4e-6 } else { 0.9 };
                    assert!(norm(&found) >= clip_norm * least, "{architecture}: {}", norm(&found));
                }
            }
        }
    }
}

#[test]
fn automatic_clipping_scales_every_gradient() {
    let job = job("mlp", &[6], 3);
    let shard = blobs(&job.model, 8, 0.8);
    let task = task(job, "a");
    let gradients = single_gradients(&task, &shard);
    let mut expected = vec![0.0; gradients[0].len()];
    for gradient in &gradients {
        let factor = 0.7 / (norm(gradient) + 0.01);
        expected.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += factor * value);
    }
    let privacy = Privacy { clip_norm: 0.7, clipping: Clipping::Automatic, ..privacy() };
    let (found, _) = clipped_sum(&task, &privacy, &shard, &[0, 1, 2, 3, 4, 5, 6, 7], How::default());
    assert!(relative_error(&found, &expected) < 1e-5);
}

/// pitfall 2: how a batch is split for memory's sake changes neither the sum nor, elsewhere, the noise.
#[test]
fn the_split_into_physical_batches_does_not_change_the_sum() {
    for architecture in ["2nn", "small-cnn"] {
        let job = job(architecture, &[1, 28, 28], 10);
        let shard = blobs(&job.model, 45, 0.8);
        let task = task(job, "a");
        let chosen: Vec<u32> = (0..41).collect();
        let privacy = Privacy { clip_norm: 0.5, ..privacy() };
        let with = |physical| {
            let how = How { physical: Some(physical), ..How::default() };
            clipped_sum(&task, &privacy, &shard, &chosen, how)
        };
        let (whole, count) = with(64);
        for physical in [1, 7, 8, 16, 40] {
            let (found, of_parts) = with(physical);
            assert!(relative_error(&found, &whole) < 2e-6, "{architecture} {physical}");
            assert_eq!(of_parts, count);
        }
    }
}

/// pitfall 5: what is no number adds nothing, takes nothing away and is not told.
#[test]
fn rows_without_numbers_and_labels_without_class_add_nothing() {
    for (architecture, ghost) in
        [("logistic", None), ("small-cnn", Some(true)), ("small-cnn", Some(false)), ("resnet8-gn", None)]
    {
        let job = job(architecture, &[1, 20, 20], 4);
        let shard = blobs(&job.model, 12, 0.8);
        let task = task(job, "a");
        let how = How { ghost, ..How::default() };
        let mut spoilt = Split::clone(&shard.examples);
        spoilt.features[2 * 400 + 200] = f32::NAN;
        spoilt.features[5 * 400..6 * 400].fill(f32::INFINITY);
        spoilt.features[7 * 400..8 * 400].fill(f32::MAX);
        (spoilt.labels[8], spoilt.labels[9]) = (-1, 4);
        let spoilt = Shard { examples: Arc::new(spoilt), ..shard.clone() };
        let privacy = Privacy { clip_norm: 0.5, ..privacy() };
        let good = [0, 1, 3, 4, 6, 10, 11];
        let (expected, _) = clipped_sum(&task, &privacy, &shard, &good, how);
        let all: Vec<u32> = (0..12).collect();
        let (found, count) = clipped_sum(&task, &privacy, &spoilt, &all, how);
        assert!(relative_error(&found, &expected) < 1e-6, "{architecture} {ghost:?}");
        assert!(count.abs() <= 6.0);
        // Row by row as a person, and in integers: the same.
        let mut alone = Split::clone(&spoilt.examples);
        alone.groups = (0..12).collect();
        for (sampler, split) in
            [(Sampler::Gaussian, Arc::new(alone)), (Sampler::DiscreteGaussian, spoilt.examples.clone())]
        {
            let privacy = Privacy { sampler, ..privacy.clone() };
            let (found, _) = clipped_sum(&task, &privacy, &Shard::whole(split), &all, how);
            assert!(relative_error(&found, &expected) < 2e-3, "{architecture} {sampler:?}");
        }
        // Trained on nothing but these, there is a finite update all the same.
        let bad = Shard { indices: Arc::new([2, 5, 7, 8, 9]), ..spoilt };
        let job = private(Job::clone(&task.job), privacy, 3, 0.5);
        let update = train(&declaring(job, 12), &bad);
        assert!(all_finite(&update.delta));
        assert_eq!((update.examples, update.loss), (12, None));
    }
}

#[test]
fn a_word_that_is_none_adds_nothing_in_private_and_shows_without() {
    let (job, shard) = words();
    let task = task(job, "a");
    for word in [20.0, -1.0, 0.5, f32::NAN, f32::INFINITY] {
        let mut spoilt = Split::clone(&shard.examples);
        spoilt.features[9 * 3 + 4] = word;
        let spoilt = Shard::whole(Arc::new(spoilt));
        let (expected, _) = clipped_sum(&task, &privacy(), &shard, &[0, 2, 4], How::default());
        let (found, _) = clipped_sum(&task, &privacy(), &spoilt, &[0, 2, 3, 4], How::default());
        assert!(relative_error(&found, &expected) < 1e-6);
        let refused = TorchTrainer::new().train(&task, &spoilt, &GO).unwrap_err();
        assert!(matches!(refused, TrainError::Diverged { .. }), "{refused:?}");
    }
}

/// `job` whose clients send sums of clipped gradients of one batch.
fn summing(job: Job, clip_norm: f64, rate: f64) -> Job {
    let shared = Privacy { mechanism: Where::Distributed, expected_batch_size: Some(40.0), ..privacy() };
    private(job, Privacy { clip_norm, ..shared }, 1, rate)
}

/// Whatever noise it will get is added by whoever encodes it: here it is the plain sum, of nothing perhaps.
#[test]
fn with_noise_in_shares_what_is_produced_is_the_clipped_sum() {
    let images = [job("2nn", &[1, 28, 28], 10), job("small-cnn", &[1, 28, 28], 10)];
    let images = images.map(|job| (blobs(&job.model, 41, 0.8), job));
    let (of_words, words) = words();
    for (shard, job) in images.into_iter().chain([(words, of_words)]) {
        let plain = task(job.clone(), "a");
        let gradients = single_gradients(&plain, &shard);
        let clip_norm = middle(&gradients);
        let (expected, _) = naive(&gradients, clip_norm);
        // Nobody declares how many examples there are.
        let task = task(summing(job, clip_norm, 1.0), "a");
        let mut trainer = TorchTrainer::new();
        let update = trainer.train(&task, &shard, &GO).unwrap();
        let found: Vec<f64> = update.delta.iter().map(|value| f64::from(*value)).collect();
        assert!(relative_error(&found, &expected) < 1e-5);
        assert_eq!((update.examples, update.loss), (1, None));
        let prepared = trainer.prepared.as_ref().unwrap();
        assert!(prepared.parameters.gradient.values().iter().all(|value| *value == 0.0), "left in memory");
        let nothing = Shard { indices: Arc::new([]), ..shard };
        let update = trainer.train(&task, &nothing, &GO).unwrap();
        assert!(update.delta.iter().all(|value| *value == 0.0), "no error, and nothing of the batch before");
    }
}

/// Each unit is in the batch on its own: sums of batches of half the rows vary, and are half of all on average.
#[test]
fn summed_batches_are_poisson() {
    let job = job("logistic", &[3], 2);
    let shard = blobs(&job.model, 40, 0.8);
    let all = train(&task(summing(job.clone(), 0.5, 1.0), "a"), &shard).delta;
    let half = task(summing(job, 0.5, 0.5), "a");
    let along = |delta: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        dot(delta, &all) / dot(&all, &all)
    };
    let shares: Vec<f64> = (0..200).map(|_| along(&train(&half, &shard).delta)).collect();
    let mean = shares.iter().sum::<f64>() / 200.0;
    // The deviation of the mean is below 0.02.
    assert!((mean - 0.5).abs() < 0.1, "{mean}");
    assert!(shares.iter().any(|share| (share - mean).abs() > 0.02), "always the same batch");
}

/// Corrections 4.8: neighbours differ by one unit, and their sums by at most the clip norm and what is rounded away.
#[test]
fn sums_of_neighbours_differ_by_the_clip_norm_at_most() {
    for (architecture, clip_norm) in [("2nn", 0.3), ("small-cnn", 0.01), ("resnet8-gn", 1.0)] {
        let job = job(architecture, &[1, 28, 28], 10);
        let mut split = Split::clone(&blobs(&job.model, 60, 0.8).examples);
        // An outlier, a row without numbers, a label that is none; and rows of three persons.
        split.features[7 * 784..8 * 784].iter_mut().for_each(|value| *value *= 1e4);
        split.features[8 * 784] = f32::NAN;
        split.labels[9] = 10;
        let rows = Shard::whole(Arc::new(split.clone()));
        split.groups = (0..60).map(|row| row / 20).collect();
        let persons = Shard::whole(Arc::new(split));
        let task = task(summing(job, clip_norm, 1.0), "a");
        for (shard, units) in
            [(&rows, vec![vec![0], vec![7], vec![8], vec![9]]), (&persons, vec![(0..20).collect()])]
        {
            let whole = train(&task, shard).delta;
            for unit in units {
                let others: Vec<u32> = (0..60).filter(|row| !unit.contains(row)).collect();
                let without = train(&task, &Shard { indices: others.into(), ..shard.clone() }).delta;
                let change: Vec<f64> =
                    whole.iter().zip(&without).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
                assert!(norm(&change) <= clip_norm * 1.001, "{architecture} {unit:?}: {}", norm(&change));
            }
        }
    }
}

/// What a training released, step by step.
#[derive(Default)]
struct Seen {
    batches: Vec<Vec<u32>>,
    sums: Vec<Vec<f32>>,
    released: Vec<Vec<f32>>,
    squares: Vec<f64>,
    clip_norms: Vec<f64>,
    deviations: Vec<f64>,
    sensitivities: Vec<f64>,
    counts: Vec<(f64, f64)>,
}

struct Watch(Arc<Mutex<Seen>>);

impl Recorder for Watch {
    fn sampled(&mut self, step: u64, units: &mut Vec<u32>) {
        let mut seen = self.0.lock().unwrap();
        seen.batches.push(units.clone());
        assert_eq!(seen.batches.len() as u64, step);
    }

    fn released(&mut self, release: Release<'_>) {
        let mut seen = self.0.lock().unwrap();
        seen.sums.push(release.sum.to_vec());
        seen.released.push(release.released.to_vec());
        seen.squares.push(release.noise_squares);
        seen.clip_norms.push(release.clip_norm);
        seen.deviations.push(release.noise_standard_deviation);
        seen.sensitivities.push(release.sensitivity);
        seen.counts.extend(release.count.map(|count| {
            assert_eq!(count.sensitivity, 0.5);
            (count.sum, *count.released)
        }));
        assert_eq!(seen.sums.len() as u64, release.step);
    }
}

fn watched(task: &Task, shard: &Shard) -> (ClientUpdate, Seen) {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let mut trainer = TorchTrainer::with_recorder(Box::new(Watch(seen.clone())));
    let update = trainer.train(task, shard, &GO).unwrap();
    drop(trainer);
    (update, Arc::into_inner(seen).unwrap().into_inner().unwrap())
}

/// pitfall 1, correction 1: the divisor is public. Twice as many rows change nothing but the sum.
#[test]
fn a_step_is_the_clipped_sum_and_noise_over_a_public_constant() {
    for (architecture, sampler) in [
        ("2nn", Sampler::Gaussian),
        ("small-cnn", Sampler::Gaussian),
        ("small-cnn", Sampler::DiscreteGaussian),
    ] {
        let mut base = job(architecture, &[1, 28, 28], 10);
        base.train.learning_rate = 0.25;
        let privacy = Privacy { noise_multiplier: 1.3, clip_norm: 0.6, sampler, ..privacy() };
        for rows in [20, 40] {
            let job = private(base.clone(), privacy.clone(), 1, 0.3);
            let shard = blobs(&job.model, rows, 0.8);
            let task = declaring(job, 50);
            let (update, seen) = watched(&task, &shard);
            let (sum, _) = clipped_sum(&task, &privacy, &shard, &seen.batches[0], How::default());
            let own: Vec<f64> = seen.sums[0].iter().map(|value| f64::from(*value)).collect();
            assert!(norm(&sum) == 0.0 || relative_error(&own, &sum) < 1e-5);
            let divisor = 0.3 * 50.0;
            for (change, released) in update.delta.iter().zip(&seen.released[0]) {
                let expected = -0.25 * f64::from(*released) / divisor;
                assert!((f64::from(*change) - expected).abs() < 1e-6 * (1.0 + expected.abs()));
            }
            let d = update.delta.len() as f64;
            let noise: Vec<f64> =
                seen.released[0].iter().zip(&own).map(|(released, sum)| f64::from(*released) - sum).collect();
            // The noise of the step is z·C, and of what leaves z·C/(q·declared): six standard errors.
            let deviation = norm(&noise) / d.sqrt();
            assert!((deviation / (1.3 * 0.6) - 1.0).abs() < 6.0 / (2.0 * d).sqrt(), "{deviation}");
            assert!((seen.squares[0].sqrt() / norm(&noise) - 1.0).abs() < 1e-4);
            assert!((seen.deviations[0] / (1.3 * 0.6) - 1.0).abs() < 1e-6);
            assert!(seen.sensitivities[0] <= 0.6 && seen.sensitivities[0] > 0.599);
            let grid = if sampler == Sampler::Gaussian { 2f32.powi(-9) } else { 2f32.powi(-21) };
            assert!(seen.released[0].iter().all(|value| (value / grid).fract() == 0.0));
            assert_eq!((update.examples, update.loss), (50, None));
        }
    }
}

/// pitfalls 2 and 8: batches are Poisson samples, empty ones are steps, and noise comes once per step.
#[test]
fn batch_sizes_are_binomial_and_every_step_is_noised_once() {
    let base = job("logistic", &[3], 2);
    let steps = 2_000;
    for (rows, rate) in [(80, 0.9), (7, 0.1), (0, 0.5)] {
        let shard = blobs(&base.model, rows, 0.5);
        let job = private(base.clone(), Privacy { noise_multiplier: 3.0, ..privacy() }, steps, rate);
        let (update, seen) = watched(&declaring(job, 100), &shard);
        assert_eq!((seen.released.len(), update.examples), (steps as usize, 100));
        let sizes: Vec<f64> = seen.batches.iter().map(|batch| batch.len() as f64).collect();
        let mean = sizes.iter().sum::<f64>() / f64::from(steps);
        let variance = rows as f64 * rate * (1.0 - rate);
        assert!((mean - rows as f64 * rate).abs() <= 6.0 * (variance / f64::from(steps)).sqrt());
        let found = sizes.iter().map(|size| (size - mean).powi(2)).sum::<f64>() / f64::from(steps);
        assert!((found - variance).abs() <= 0.25 * variance, "{found} {variance}");
        if rows == 7 {
            assert!(sizes.contains(&0.0));
        }
        // 80 rows go through the network in two parts, and still get one noise.
        let noise = seen.squares.iter().sum::<f64>() / f64::from(steps) / 8.0;
        assert!((noise / 9.0 - 1.0).abs() < 6.0 * (2.0 / (8.0 * f64::from(steps))).sqrt(), "{noise}");
        assert!(seen.released.iter().all(|released| released.iter().any(|value| *value != 0.0)));
    }
}

/// pitfall 11: the same task again, as after a restart, is other noise and other batches.
#[test]
fn the_same_training_again_has_other_noise() {
    let job = private(job("logistic", &[3], 2), privacy(), 1, 0.5);
    let shard = blobs(&job.model, 0, 0.5);
    let task = declaring(job, 10);
    let first = train(&task, &shard);
    assert_ne!(bits(&first.delta), bits(&train(&task, &shard).delta));
}

/// Repeatable noise exists for experiments alone.
#[cfg(feature = "seeded-noise")]
#[test]
fn seeded_noise_repeats_a_training() {
    let job = private(job("logistic", &[3], 2), privacy(), 5, 0.5);
    let shard = blobs(&job.model, 20, 0.5);
    let task = declaring(job, 20);
    let with = |seed| TorchTrainer::with_seeded_noise(seed).train(&task, &shard, &GO).unwrap().delta;
    assert_eq!(bits(&with(1)), bits(&with(1)));
    assert_ne!(bits(&with(1)), bits(&with(2)));
    // pitfall 11: no two clients and no two rounds have the same noise.
    let other = Task { round: 2, ..task.clone() };
    let again = TorchTrainer::with_seeded_noise(1).train(&other, &shard, &GO).unwrap().delta;
    assert_ne!(bits(&with(1)), bits(&again));
}

/// The update rule after the noise: momentum, decay and the proximal term see the noised gradient alone.
#[test]
fn momentum_decay_and_proximal_term_follow_the_noised_sums() {
    for (momentum, decay, mu) in [(0.9, 0.0, 0.0), (0.0, 0.1, 0.0), (0.5, 0.01, 0.3)] {
        let mut base = job("mlp", &[6], 3);
        (base.train.momentum, base.train.weight_decay) = (momentum, decay);
        (base.train.algorithm, base.train.proximal_mu) = (Algorithm::Fedprox, Some(mu));
        let shard = blobs(&base.model, 30, 0.5);
        let task = declaring(private(base, privacy(), 5, 0.4), 40);
        let (update, seen) = watched(&task, &shard);
        let start: Vec<f64> = task.model.iter().map(|value| f64::from(*value)).collect();
        let (mut model, mut velocity) = (start.clone(), vec![0.0; start.len()]);
        for released in &seen.released {
            for at in 0..model.len() {
                let slope = f64::from(released[at]) / 16.0 + decay * model[at] + mu * (model[at] - start[at]);
                velocity[at] = momentum * velocity[at] + slope;
                model[at] -= 0.1 * velocity[at];
            }
        }
        for (at, change) in update.delta.iter().enumerate() {
            assert!((f64::from(*change) - (model[at] - start[at])).abs() < 1e-5);
        }
    }
}

#[test]
fn an_adaptive_clip_norm_follows_the_noised_counts_and_starts_again_each_round() {
    let base = job("mlp", &[6], 3);
    let shard = blobs(&base.model, 200, 0.5);
    let clipping = Clipping::Adaptive;
    let privacy = Privacy { clipping, clip_norm: 0.01, clip_learning_rate: Some(0.5), ..privacy() };
    let task = declaring(private(base, privacy.clone(), 40, 0.5), 200);
    let (_, seen) = watched(&task, &shard);
    let constants = privacy.adaptive(100.0).unwrap();
    let mut clip = 0.01f64;
    let mut unmoved = 0;
    for step in 0..40 {
        assert!((seen.clip_norms[step] / clip - 1.0).abs() < 1e-9);
        assert!((seen.deviations[step] / (constants.sum_noise_multiplier * clip) - 1.0).abs() < 1e-9);
        let (sum, noised) = seen.counts[step];
        assert!(sum.abs() <= seen.batches[step].len() as f64 / 2.0);
        assert!((noised - sum).abs() < 8.0 * constants.count_noise);
        unmoved += usize::from(noised == sum);
        // pitfall 9: centred count, public denominator.
        clip *= (-0.5 * (0.5 + noised / 100.0 - 0.5)).exp();
    }
    // The noise lies on a grid, so it is zero now and then: with probability 0.00125, for 4 of 40 below 1e-6.
    assert!(unmoved < 4, "{unmoved} of 40 counts without noise");
    // Most norms are above it, so it has grown.
    assert!(seen.clip_norms[39] > 0.1, "{}", seen.clip_norms[39]);
    assert_eq!(watched(&task, &shard).1.clip_norms[0], 0.01);
}

/// correction 16: all rows of a person are one unit.
#[test]
fn a_person_is_clipped_as_one_and_kept_whole() {
    for architecture in ["mlp", "small-cnn"] {
        let inputs: &[usize] = if architecture == "mlp" { &[6] } else { &[1, 20, 20] };
        let job = job(architecture, inputs, 3);
        let rows = blobs(&job.model, 70, 0.8);
        let mut split = Split::clone(&rows.examples);
        // One person with 50 rows, more than go through the network at a time, and ten with two.
        split.groups = (0..70).map(|row| if row < 50 { 4 } else { 100 + row % 10 }).collect();
        let shard = Shard::whole(Arc::new(split));
        let task = task(job, "a");
        let singles = single_gradients(&task, &shard);
        let mut groups: std::collections::BTreeMap<u32, Vec<&Vec<f64>>> = Default::default();
        for (gradient, group) in singles.iter().zip(&shard.examples.groups) {
            groups.entry(*group).or_default().push(gradient);
        }
        let mean = |rows: &Vec<&Vec<f64>>| -> Vec<f64> {
            (0..rows[0].len())
                .map(|at| rows.iter().map(|row| row[at]).sum::<f64>() / rows.len() as f64)
                .collect()
        };
        let gradients: Vec<Vec<f64>> = groups.values().map(mean).collect();
        let clip_norm = middle(&gradients);
        let (expected, below) = naive(&gradients, clip_norm);
        let all: Vec<u32> = (0..11).collect();
        for (sampler, most) in [(Sampler::Gaussian, 1e-5), (Sampler::DiscreteGaussian, 2e-3)] {
            let privacy = Privacy { clip_norm, sampler, ..privacy() };
            let (found, count) = clipped_sum(&task, &privacy, &shard, &all, How::default());
            assert!(relative_error(&found, &expected) < most, "{}", relative_error(&found, &expected));
            assert_eq!(count, below as f64 - 5.5);
        }
        let (_, seen) = watched(&declaring(private(Job::clone(&task.job), privacy(), 200, 0.5), 20), &shard);
        assert!(seen.batches.iter().flatten().all(|unit| *unit < 11));
        let part = Shard { indices: (1..70).collect(), ..shard.clone() };
        let refused = TorchTrainer::new()
            .train(&declaring(private(Job::clone(&task.job), privacy(), 1, 0.5), 20), &part, &GO)
            .unwrap_err();
        assert!(refused.to_string().contains("49 of the 50 rows of group 4"), "{refused}");
    }
}

#[test]
fn what_stands_for_the_number_of_examples_must_be_declared() {
    let job = private(job("logistic", &[3], 2), privacy(), 1, 0.5);
    let shard = blobs(&job.model, 9, 0.5);
    for declared_examples in [None, Some(0)] {
        let task = Task { declared_examples, ..task(job.clone(), "a") };
        let trainers: [&mut dyn Trainer; 2] =
            [&mut TorchTrainer::new(), &mut crate::trainer::ArithmeticTrainer];
        for trainer in trainers {
            assert_eq!(trainer.train(&task, &shard, &GO), Err(TrainError::DeclaredExamples));
        }
    }
}

#[test]
fn a_client_as_the_unit_reports_weight_one_and_never_how_its_data_did() {
    let mut base = job("mlp", &[6], 3);
    let shard = blobs(&base.model, 12, 0.5);
    let open = train(&task(base.clone(), "a"), &shard);
    base.privacy = Some(Privacy { unit: PrivacyUnit::Client, mechanism: Where::Gaussian, ..privacy() });
    let closed = task(base, "a");
    let update = train(&closed, &shard);
    assert_eq!(bits(&update.delta), bits(&open.delta));
    assert_eq!((update.examples, update.loss), (1, None));
    let mut poisoned = Split::clone(&shard.examples);
    poisoned.features.fill(f32::NAN);
    let nothing = Shard { indices: Arc::new([]), ..shard.clone() };
    for shard in [Shard { examples: Arc::new(poisoned), ..shard.clone() }, nothing] {
        let update = train(&closed, &shard);
        assert!(update.delta.iter().all(|value| *value == 0.0));
        assert_eq!((update.examples, update.loss), (1, None));
    }
}

#[test]
fn dropout_is_drawn_from_secret_bits() {
    let base = sequential(&[12], 3, r#"[{ linear = 40 }, "relu", { dropout = 0.4 }, { linear = 3 }]"#);
    let privacy = Privacy { noise_multiplier: 1e-6, clip_norm: 1e-3, ..privacy() };
    let task = declaring(private(base, privacy, 1, 1.0), 12);
    let shard = blobs(&task.job.model, 12, 0.5);
    let (first, second) = (watched(&task, &shard).1, watched(&task, &shard).1);
    let [first, second] =
        [first, second].map(|seen| seen.sums[0].iter().map(|value| f64::from(*value)).collect::<Vec<_>>());
    assert!(relative_error(&first, &second) > 1e-2);
}

#[test]
fn separable_blobs_are_learnt_in_private() {
    let mut base = job("small-cnn", &[1, 20, 20], 4);
    base.train.learning_rate = 0.5;
    let all = blobs(&base.model, 900, 0.7);
    let part = |range: std::ops::Range<u32>| Shard { indices: range.collect(), ..all.clone() };
    let task = declaring(private(base, privacy(), 40, 0.2), 600);
    let update = train(&task, &part(0..600));
    let model: Vec<f32> = task.model.iter().zip(&update.delta).map(|(w, d)| w + d).collect();
    let after = TorchTrainer::new().evaluate(&task.job, &model, &part(600..900)).unwrap();
    assert!(after.accuracy().unwrap() > 0.9, "{:?}", after.accuracy());
}
