//! The canary audit: units made up by the auditor in a private training, and how well they can be told afterwards.
//!
//! Each canary is a gradient in a random direction, ten times as long as the clip norm, and is in the data or not by a
//! fair secret coin. Those in it are drawn into batches like rows. The auditor is the adversary that differential
//! privacy allows: he knows every real gradient and sees every noised sum, and projects what is left onto each canary
//! (Nasr et al. 2023; Mahloujifar, Melis and Chaudhuri 2025).

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use rand_distr::{Distribution, StandardNormal};
use tch::TchError;

use tributary_common::job::{Clipping, PrivacyUnit};
use tributary_common::privacy::Event;
use tributary_common::privacy::canary::step_score;
use tributary_common::privacy::noise::SecretRng;

use super::TorchTrainer;
use super::linear::square_norm;
use super::memory::{Memory, Product, transposed};
use crate::shard::Shard;
use crate::trainer::{Recorder, Release, Task, TrainError, Trainer};

/// Length of a canary's raw gradient, in clip norms.
const LENGTH: f64 = 10.0;
/// Steps whose sums are projected by one matrix product.
const TOGETHER: usize = 32;

/// A fault that an audit plants to see that it would be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sabotage {
    /// None: the mechanism as it is.
    #[default]
    Nothing,
    /// The noise has half its standard deviation.
    HalfNoise,
    /// Canaries are not clipped.
    NoClipping,
}

/// What an audit of one training found.
#[derive(Debug, Clone, PartialEq)]
pub struct CanaryRecord {
    /// Whether each canary was in the data.
    pub included: Vec<bool>,
    /// How much each canary looks as if it was: log-likelihood ratio of its projections, summed over the steps.
    pub scores: Vec<f64>,
    /// Steps that released a noised sum.
    pub steps: u64,
    /// Values of noise that were measured: steps times parameters.
    pub noise_values: u64,
    /// Root mean square of these over the declared standard deviation: 1 ± 0.5 % in one step of 26,010 parameters.
    pub noise_ratio: f64,
}

/// Trains `task`, whose job has privacy for examples and flat clipping, on `shard` with `canaries` planted.
///
/// Memory for the directions: 4 bytes times canaries times parameters, 312 MB for 3000 of `small-cnn`.
///
/// # Errors
/// [`TrainError::Audit`] for another job, and what training refuses.
pub fn run_canaries(
    task: &Task,
    shard: &Shard,
    canaries: usize,
    sabotage: Sabotage,
    stop: &AtomicBool,
) -> Result<CanaryRecord, TrainError> {
    let refused = || TrainError::Audit("privacy for examples with clipping = \"flat\" is needed".into());
    let privacy = task.job.privacy.as_ref().ok_or_else(refused)?;
    let rate = task.job.train.sampling_rate.ok_or_else(refused)?;
    if privacy.unit != PrivacyUnit::Example || privacy.clipping != Clipping::Flat {
        return Err(refused());
    }
    super::threads::one_intra_op_thread();
    let audit = Audit::new(task.model.len(), canaries, (rate, privacy.noise_multiplier, privacy.clip_norm))?;
    let audit = Arc::new(Mutex::new(Audit { sabotage, ..audit }));
    let mut trainer = TorchTrainer::with_recorder(Box::new(Planting(audit.clone())));
    trainer.train(task, shard, stop)?;
    drop(trainer);
    let mut audit = audit.lock().unwrap_or_else(PoisonError::into_inner);
    audit.project()?;
    if let Some(error) = audit.error.take() {
        return Err(error);
    }
    let noise_ratio = (audit.noise_squares / audit.noise_variances).sqrt();
    let Audit { included, scores, steps, noise_values, .. } = &mut *audit;
    Ok(CanaryRecord {
        included: std::mem::take(included),
        scores: std::mem::take(scores),
        steps: *steps,
        noise_values: *noise_values,
        noise_ratio,
    })
}

struct Audit {
    rng: SecretRng,
    sabotage: Sabotage,
    parameters: usize,
    /// Sampling rate, noise multiplier, clip norm.
    mechanism: (f64, f64, f64),
    included: Vec<bool>,
    scores: Vec<f64>,
    /// Canary by canary its raw gradient, of norm [`LENGTH`] clip norms.
    raw: Memory,
    /// Sum of the clipped canaries of this step.
    planted: Vec<f32>,
    /// Noised sums less the sums of the real units, of the last steps.
    left: Memory,
    waiting: usize,
    projections: Memory,
    projecting: Product,
    steps: u64,
    noise_values: u64,
    noise_squares: f64,
    /// Sum of the declared variances of the same values.
    noise_variances: f64,
    error: Option<TrainError>,
}

impl Audit {
    fn new(parameters: usize, canaries: usize, mechanism: (f64, f64, f64)) -> Result<Self, TrainError> {
        let mut rng = SecretRng::new()?;
        let included = (0..canaries).map(|_| rng.coin(0.5)).collect();
        let mut raw = Memory::zeros(canaries * parameters)?;
        for row in raw.values_mut().chunks_exact_mut(parameters.max(1)) {
            row.iter_mut().for_each(|value| *value = StandardNormal.sample(&mut rng));
            let scale = (LENGTH * mechanism.2 / square_norm(row).sqrt()) as f32;
            row.iter_mut().for_each(|value| *value *= scale);
        }
        let left = Memory::zeros(TOGETHER * parameters)?;
        let projections = Memory::zeros(TOGETHER * canaries)?;
        let projecting = Product::set(
            projections.matrix(0, TOGETHER, canaries, canaries)?,
            left.matrix(0, TOGETHER, parameters, parameters)?,
            transposed(&raw.matrix(0, canaries, parameters, parameters)?)?,
        );
        Ok(Self {
            rng,
            sabotage: Sabotage::Nothing,
            parameters,
            mechanism,
            included,
            scores: vec![0.0; canaries],
            raw,
            planted: vec![0.0; parameters],
            left,
            waiting: 0,
            projections,
            projecting,
            steps: 0,
            noise_values: 0,
            noise_squares: 0.0,
            noise_variances: 0.0,
            error: None,
        })
    }

    /// Scores the steps that wait, from projections in clip norms.
    fn project(&mut self) -> Result<(), TchError> {
        let (rate, multiplier, clip_norm) = self.mechanism;
        let event = Event::gaussian(rate, multiplier, 1);
        self.projecting.run()?;
        let canaries = self.scores.len().max(1);
        for row in self.projections.values().chunks_exact(canaries).take(self.waiting) {
            for (score, value) in self.scores.iter_mut().zip(row) {
                let y = f64::from(*value) / (LENGTH * clip_norm * clip_norm);
                *score += step_score(&event, y).unwrap_or_default();
            }
        }
        self.waiting = 0;
        Ok(())
    }
}

struct Planting(Arc<Mutex<Audit>>);

impl Recorder for Planting {
    fn inject(&mut self, _: u64, add: &mut dyn FnMut(&[f32])) {
        let mut audit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Audit { rng, included, raw, planted, parameters, mechanism, .. } = &mut *audit;
        planted.fill(0.0);
        for (row, _) in raw.values().chunks_exact((*parameters).max(1)).zip(included).filter(|(_, is)| **is) {
            if rng.coin(mechanism.0) {
                add(row);
                let share = (1.0 / LENGTH) as f32;
                planted.iter_mut().zip(row).for_each(|(sum, value)| *sum += share * value);
            }
        }
    }

    fn released(&mut self, release: Release<'_>) {
        let mut audit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let audit = &mut *audit;
        let mut squares = 0.0;
        for ((value, sum), planted) in release.released.iter_mut().zip(release.sum).zip(&audit.planted) {
            match audit.sabotage {
                Sabotage::Nothing => {}
                Sabotage::HalfNoise => *value -= (*value - sum - planted) * 0.5,
                Sabotage::NoClipping => *value += (LENGTH - 1.0) as f32 * planted,
            }
            let of_canaries =
                if audit.sabotage == Sabotage::NoClipping { LENGTH as f32 * planted } else { *planted };
            squares += f64::from(*value - sum - of_canaries).powi(2);
        }
        audit.steps += 1;
        audit.noise_values += release.sum.len() as u64;
        audit.noise_squares += squares;
        audit.noise_variances += release.sum.len() as f64 * release.noise_standard_deviation.powi(2);
        let at = audit.waiting * audit.parameters;
        let left = audit.left.values_mut().iter_mut().skip(at);
        for (left, (value, sum)) in left.zip(release.released.iter().zip(release.sum)) {
            *left = value - sum;
        }
        audit.waiting += 1;
        if audit.waiting == TOGETHER
            && let Err(error) = audit.project()
        {
            audit.error.get_or_insert(error.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::private::tests::{declaring, privacy, private};
    use super::super::reference::GO;
    use super::*;
    use crate::trainer::tests::{blobs, job};

    fn audit(sabotage: Sabotage) -> CanaryRecord {
        let base = job("logistic", &[1, 28, 28], 10);
        let shard = blobs(&base.model, 200, 0.5);
        let privacy = tributary_common::job::Privacy { noise_multiplier: 0.8, ..privacy() };
        let task = declaring(private(base, privacy, 75, 0.1), 200);
        run_canaries(&task, &shard, 300, sabotage, &GO).unwrap()
    }

    /// Mean score of the canaries in the data less that of the others, in pooled standard deviations.
    fn separation(record: &CanaryRecord) -> f64 {
        let of = |which: bool| -> Vec<f64> {
            let scores = record.scores.iter().zip(&record.included);
            scores.filter(|(_, is)| **is == which).map(|(score, _)| *score).collect()
        };
        let moments = |values: &[f64]| {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (mean, values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64)
        };
        let ((mean_in, variance_in), (mean_out, variance_out)) = (moments(&of(true)), moments(&of(false)));
        (mean_in - mean_out) / ((variance_in + variance_out) / 2.0).sqrt()
    }

    #[test]
    fn canaries_show_as_much_as_the_mechanism_lets_them() {
        let sound = audit(Sabotage::Nothing);
        assert_eq!((sound.steps, sound.noise_values), (75, 75 * 7850));
        assert!((sound.noise_ratio - 1.0).abs() < 0.006, "{}", sound.noise_ratio);
        let planted = sound.included.iter().filter(|is| **is).count();
        assert!((98..=202).contains(&planted), "{planted}");
        let of_sound = separation(&sound);
        assert!(of_sound > 0.5, "{of_sound}");
        let half = audit(Sabotage::HalfNoise);
        assert!((half.noise_ratio - 0.5).abs() < 0.003, "{}", half.noise_ratio);
        assert!(separation(&half) > of_sound + 0.7, "{} {of_sound}", separation(&half));
        let unclipped = audit(Sabotage::NoClipping);
        assert!((unclipped.noise_ratio - 1.0).abs() < 0.006, "{}", unclipped.noise_ratio);
        assert!(separation(&unclipped) > of_sound + 0.7, "{} {of_sound}", separation(&unclipped));
    }

    #[test]
    fn a_job_without_flat_clipping_of_examples_is_not_audited() {
        let base = job("logistic", &[3], 2);
        let shard = blobs(&base.model, 9, 0.5);
        let mut automatic = private(base.clone(), privacy(), 1, 0.5);
        automatic.privacy = automatic
            .privacy
            .map(|of| tributary_common::job::Privacy { clipping: Clipping::Automatic, ..of });
        for job in [base, automatic] {
            let refused = run_canaries(&declaring(job, 9), &shard, 3, Sabotage::Nothing, &GO).unwrap_err();
            assert!(refused.to_string().contains("flat"), "{refused}");
        }
    }
}
