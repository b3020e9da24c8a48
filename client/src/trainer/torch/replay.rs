//! Tests by replay on neighbouring data (Cebere et al. 2026): the same batches and the same noised results, one unit
//! more or less. Nothing may differ but the sums before the noise, and these by no more than was declared.

use std::sync::{Arc, Mutex};

use tributary_common::job::{Clipping, Job, Privacy, Sampler};

use super::private::tests::{declaring, privacy, private};
use super::reference::GO;
use super::tests::{bits, sequences};
use super::*;
use crate::trainer::tests::{blobs, job};
use crate::trainer::{Recorder, Release};

const STEPS: usize = 4;

/// What one release was asked to hide, and how.
#[derive(Clone, Default)]
struct Point {
    sum: Vec<f32>,
    released: Vec<f32>,
    /// Clip norm, sensitivity, standard deviation.
    declared: [f64; 3],
    /// The count and the same with noise.
    count: Option<(f64, f64)>,
}

/// Runs with batches that are given and, on the second data set, with results that are.
#[derive(Default)]
struct Tape {
    batches: Vec<Vec<u32>>,
    frozen: Vec<Point>,
    found: Vec<Point>,
}

struct Player(Arc<Mutex<Tape>>);

impl Recorder for Player {
    fn sampled(&mut self, step: u64, units: &mut Vec<u32>) {
        *units = self.0.lock().unwrap().batches[step as usize - 1].clone();
    }

    fn released(&mut self, release: Release<'_>) {
        let mut tape = self.0.lock().unwrap();
        let mut count = release.count;
        if let Some(point) = tape.frozen.get(release.step as usize - 1) {
            release.released.copy_from_slice(&point.released);
            if let (Some(count), Some((_, noised))) = (&mut count, point.count) {
                *count.released = noised;
            }
        }
        tape.found.push(Point {
            sum: release.sum.to_vec(),
            released: release.released.to_vec(),
            declared: [release.clip_norm, release.sensitivity, release.noise_standard_deviation],
            count: count.map(|count| (count.sum, *count.released)),
        });
    }
}

fn play(
    task: &Task,
    shard: &Shard,
    batches: Vec<Vec<u32>>,
    frozen: Vec<Point>,
) -> (Result<ClientUpdate, TrainError>, Vec<Point>) {
    let tape = Arc::new(Mutex::new(Tape { batches, frozen, found: Vec::new() }));
    let mut trainer = TorchTrainer::with_recorder(Box::new(Player(tape.clone())));
    let update = trainer.train(task, shard, &GO);
    drop(trainer);
    (update, Arc::into_inner(tape).unwrap().into_inner().unwrap().found)
}

/// The shard of `rows` good rows, with one unit more at its end: `spoil` makes its rows what it likes.
fn neighbours(task: &Task, rows: usize, grouped: bool, spoil: &dyn Fn(&mut [f32], &mut [i64])) -> [Shard; 2] {
    let more = if grouped { 3 } else { 1 };
    let mut split = Split::clone(&blobs(&task.job.model, rows + more, 0.8).examples);
    let width = task.job.model.inputs.iter().product::<usize>();
    spoil(&mut split.features[rows * width..], &mut split.labels[rows..]);
    if grouped {
        split.groups = (0..rows + more).map(|row| if row < rows { row as u32 / 2 } else { 1_000 }).collect();
    }
    let with = Shard::whole(Arc::new(split));
    [Shard { indices: (0..rows as u32).collect(), ..with.clone() }, with]
}

type Spoil = (&'static str, fn(&mut [f32], &mut [i64]));

const UNITS: [Spoil; 6] = [
    ("as it is", |_, _| {}),
    ("without a number", |features, _| features[0] = f32::NAN),
    ("infinite", |features, _| features.fill(f32::INFINITY)),
    ("huge", |features, _| features.fill(1e30)),
    ("large", |features, _| features.iter_mut().for_each(|value| *value *= 1e4)),
    ("of no class", |_, labels| labels[0] = 1_000_000),
];

/// correction 3: what is compared are rows as they come, not gradients. The mechanism is replayed with one unit more,
/// and with one less, in every batch; also where there is no other unit at all.
fn assert_declared(job: Job, privacy: Privacy, grouped: bool) {
    let name = format!("{:?} {:?} {:?}", job.model.architecture.name(), privacy.clipping, privacy.sampler);
    let task = declaring(private(job, privacy, STEPS as u32, 0.5), 10);
    for (what, spoil) in UNITS {
        for rows in [0, 12] {
            let [without, with] = neighbours(&task, rows, grouped, &spoil);
            let units = if grouped { rows / 2 } else { rows } as u32;
            let few: Vec<Vec<u32>> = (0..STEPS as u32).map(|step| (step..units).collect()).collect();
            let many: Vec<Vec<u32>> =
                few.iter().map(|batch| batch.iter().copied().chain([units]).collect()).collect();
            for (first, second) in [((&without, &few), (&with, &many)), ((&with, &many), (&without, &few))] {
                let (update, points) = play(&task, first.0, first.1.clone(), Vec::new());
                let (again, replayed) = play(&task, second.0, second.1.clone(), points.clone());
                let (update, again) = (update.unwrap(), again.unwrap());
                assert_eq!(bits(&update.delta), bits(&again.delta), "{name}, {what}");
                assert_eq!((update.examples, update.loss), (again.examples, again.loss));
                assert_eq!((points.len(), replayed.len()), (STEPS, STEPS), "{name}, {what}");
                for (point, other) in points.iter().zip(&replayed) {
                    assert_eq!(point.declared, other.declared, "{name}, {what}");
                    let square =
                        |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
                    let sums = point.sum.iter().zip(&other.sum);
                    let distance = square(&mut sums.map(|(a, b)| f64::from(*a) - f64::from(*b)));
                    let length = square(&mut point.sum.iter().map(|value| f64::from(*value)));
                    // The sums themselves are rounded to f32.
                    let most = point.declared[1] + 3e-7 * length;
                    assert!(distance <= most, "{name}, {what}: {distance} {most}");
                    if what == "as it is" && rows == 0 {
                        assert!(distance > 0.0, "{name}");
                    }
                    if let (Some(of), Some(other)) = (point.count, other.count) {
                        assert!((of.0 - other.0).abs() <= 0.5, "{name}, {what}");
                    }
                }
            }
        }
    }
}

#[test]
fn neighbours_differ_by_what_is_declared_with_every_clipping_and_sampler() {
    for clipping in [Clipping::Flat, Clipping::Automatic, Clipping::Adaptive] {
        for sampler in [Sampler::Gaussian, Sampler::DiscreteGaussian] {
            if clipping == Clipping::Adaptive && sampler == Sampler::DiscreteGaussian {
                continue;
            }
            for grouped in [false, true] {
                let privacy = Privacy { clipping, sampler, clip_norm: 0.3, ..privacy() };
                assert_declared(job("mlp", &[6], 3), privacy, grouped);
            }
        }
    }
}

#[test]
fn neighbours_differ_by_what_is_declared_in_every_kind_of_network() {
    let mut jobs = sequences();
    jobs.push(job("small-cnn", &[1, 20, 20], 4));
    jobs.push(job("resnet8-gn", &[3, 16, 16], 7));
    for job in jobs {
        assert_declared(job, Privacy { clip_norm: 0.5, ..privacy() }, false);
    }
}
