//! DP-SGD (Abadi et al. 2016): Poisson batches, every unit's gradient clipped, noise on the sum, a public divisor.
//!
//! What one unit, an example or all rows of one person, can change is bounded before noise is drawn: the batch is
//! drawn from secret bits, each unit's gradient has norm at most C, and everything else that leaves depends on the
//! noised sums alone. Where clients add their noise in shares ([`TorchTrainer::sum_gradients`]) the sum is what is
//! produced, and whoever encodes it adds the share. The number of examples, a batch's size and what is in a row decide
//! no control flow that shows, no error and no weight.

use std::sync::atomic::{AtomicBool, Ordering};

use tributary_common::job::{AdaptiveClipping, Clipping, Privacy, Sampler};
use tributary_common::privacy::noise::{Gaussian, Lattice, NoiseError, SecretRng};
use zeroize::Zeroize as _;

use super::linear::{Target, square_norm};
use super::network::Network;
use super::parameters::Parameters;
use super::{TorchTrainer, all_finite, descend};
use crate::data::Split;
use crate::shard::Shard;
use crate::trainer::recorder::{CountRelease, Release};
use crate::trainer::units::Units;
use crate::trainer::{ClientUpdate, Task, TrainError};

/// Clipped gradients are this much shorter than C, so that rounding in single precision makes none longer.
const MARGIN: f64 = 1e-6;
/// Added to the noise of a sum in single precision, in parts of it: two sums that differ by one gradient also differ in
/// how they were rounded. For 256 gradients of norm C that is about 10⁻⁵ of C; this covers fifty times as much.
const ROUNDING: f64 = 1.0 / 1024.0;
/// γ of automatic clipping (Bu et al. 2022).
const AUTOMATIC: f64 = 0.01;
/// An adaptive clip norm stays within this factor of the first one: beyond, floating-point numbers would end.
const CLIP_RANGE: f64 = 1e9;
/// Most examples that go through a network at a time: with convolutions, whose gradients lie in memory example by
/// example, and without.
const PHYSICAL: [usize; 2] = [32, 256];

impl From<NoiseError> for TrainError {
    fn from(error: NoiseError) -> Self {
        TrainError::Noise(error.to_string())
    }
}

/// Brings gradients down to the clip norm.
#[derive(Debug, Clone, Copy)]
struct Clip {
    norm: f64,
    clipping: Clipping,
}

impl Clip {
    /// What a gradient of norm `norm` is multiplied by: 0 where that is no number or out of range.
    fn factor(self, norm: f64) -> f32 {
        // pitfall 5: what is no number adds nothing, and nothing is longer than C by rounding.
        let most = self.norm * (1.0 - MARGIN);
        let factor = match self.clipping {
            Clipping::Automatic => most / (norm + AUTOMATIC),
            Clipping::Flat | Clipping::Adaptive if norm <= most => 1.0,
            Clipping::Flat | Clipping::Adaptive => most / norm,
        };
        let factor = factor as f32;
        if norm.is_finite() && factor.is_normal() { factor } else { 0.0 }
    }
}

/// Where the clipped gradients of a step are added up.
enum Sum {
    /// In the gradient itself, by the network: examples, Gaussian noise.
    Gradient,
    /// Unit by unit: the gradient holds one unit's at a time.
    Wide(Vec<f64>),
    /// Unit by unit, in exact integers: discrete noise.
    Integers(Vec<i64>, Lattice),
}

/// The mechanism of one client's training in one round.
struct Mechanism {
    clip: Clip,
    first_clip_norm: f64,
    noise_multiplier: f64,
    /// Constants, noise on the count, and the public expected batch.
    adaptive: Option<(AdaptiveClipping, Gaussian, f64)>,
    sum: Sum,
    /// Most examples that go through the network at a time.
    physical: usize,
    /// Σ (b − ½) over the units of this step.
    count: f64,
    squares: Vec<f64>,
    factors: Vec<f32>,
    labels: Vec<usize>,
}

impl Mechanism {
    fn new(
        privacy: &Privacy,
        expected_batch: f64,
        (network, parameters): (&Network, usize),
        by_row: bool,
    ) -> Result<Self, TrainError> {
        let clip = Clip { norm: privacy.clip_norm, clipping: privacy.clipping };
        let adaptive = privacy.adaptive(expected_batch);
        let noise_multiplier = adaptive.map_or(privacy.noise_multiplier, |of| of.sum_noise_multiplier);
        let adaptive = match adaptive {
            Some(of) => Some((of, Gaussian::new(of.count_noise)?, expected_batch)),
            None => None,
        };
        let sum = match privacy.sampler {
            Sampler::Gaussian if by_row => Sum::Gradient,
            Sampler::Gaussian => Sum::Wide(vec![0.0; parameters]),
            Sampler::DiscreteGaussian => {
                Sum::Integers(vec![0; parameters], Lattice::new(privacy.clip_norm, noise_multiplier)?)
            }
        };
        Ok(Self {
            clip,
            first_clip_norm: privacy.clip_norm,
            noise_multiplier,
            adaptive,
            sum,
            physical: PHYSICAL[usize::from(!network.has_convolutions())],
            count: 0.0,
            squares: Vec::new(),
            factors: Vec::new(),
            labels: Vec::new(),
        })
    }

    /// Starts a step: sums and count are zero.
    fn clear(&mut self, parameters: &mut Parameters) {
        parameters.gradient.values_mut().fill(0.0);
        self.count = 0.0;
        match &mut self.sum {
            Sum::Gradient => {}
            Sum::Wide(sum) => sum.fill(0.0),
            Sum::Integers(sum, _) => sum.fill(0),
        }
    }

    /// Leaves no sum in memory.
    fn wipe(&mut self, parameters: &mut Parameters) {
        parameters.gradient.values_mut().zeroize();
        if let Sum::Wide(sum) = &mut self.sum {
            sum.zeroize();
        }
    }

    /// Adds the clipped gradient of each of `units`.
    fn add_units(
        &mut self,
        network: &mut Network,
        parameters: &mut Parameters,
        rng: &mut SecretRng,
        (examples, units, chosen): (&Split, &Units, &[u32]),
    ) -> Result<(), TrainError> {
        let most = self.physical;
        if matches!(self.sum, Sum::Gradient) {
            for chosen in chosen.chunks(most) {
                let rows = chosen.iter().filter_map(|unit| units.rows(*unit).first());
                self.measure(network, parameters, rng, examples, rows)?;
                for (square, factor) in self.squares.iter().zip(&mut self.factors).take(chosen.len()) {
                    let norm = square.sqrt();
                    *factor = self.clip.factor(norm);
                    self.count += if norm <= self.clip.norm { 0.5 } else { -0.5 };
                }
                self.factors.iter_mut().skip(chosen.len()).for_each(|factor| *factor = 0.0);
                network.add_clipped(parameters, &self.factors)?;
            }
            return Ok(());
        }
        for unit in chosen {
            let rows = units.rows(*unit);
            parameters.gradient.values_mut().fill(0.0);
            for part in rows.chunks(most) {
                self.measure(network, parameters, rng, examples, part.iter())?;
                // pitfall 4: one unit's gradient is the mean over its own rows, and over nothing else.
                let share = 1.0 / rows.len() as f32;
                for (at, (square, factor)) in self.squares.iter().zip(&mut self.factors).enumerate() {
                    // A label that is no class leaves the norm without a number: so must be the unit's gradient.
                    *factor = match at < part.len() {
                        true if square.is_nan() => f32::NAN,
                        true => share,
                        false => 0.0,
                    };
                }
                network.add_clipped(parameters, &self.factors)?;
            }
            let norm = self.add_unit(parameters.gradient.values_mut());
            self.count += if norm <= self.clip.norm { 0.5 } else { -0.5 };
        }
        Ok(())
    }

    /// Carries `rows` through the network and back, and finds their squared norms; the gradient stays as it is.
    fn measure<'a>(
        &mut self,
        network: &mut Network,
        parameters: &mut Parameters,
        rng: &mut SecretRng,
        examples: &Split,
        rows: impl Iterator<Item = &'a u32> + Clone,
    ) -> Result<(), TrainError> {
        let count = rows.clone().count();
        let room = room(count, self.physical);
        network.bind(parameters, room)?;
        self.labels.clear();
        let width = examples.features.len().checked_div(examples.labels.len()).unwrap_or_default();
        for (at, row) in rows.enumerate() {
            let row = *row as usize;
            network.take(at, examples.features.get(row * width..(row + 1) * width).unwrap_or_default());
            let label = examples.labels.get(row).and_then(|label| usize::try_from(*label).ok());
            self.labels.push(label.unwrap_or(usize::MAX));
        }
        // Batches of few sizes: what is missing is filled up, and its factor is zero.
        (count..room).for_each(|at| network.take_nothing(at));
        self.labels.resize(room, 0);
        let classes = network.forward(parameters, room, Some(rng))?.len() / room.max(1);
        // pitfall 3: the slopes of the sum, not of the mean, or each gradient would be clipped as a small part of itself.
        let _loss = network.loss(&self.labels, 1.0);
        network.backward(parameters, room)?;
        network.squares(room, &mut self.squares);
        for (square, label) in self.squares.iter_mut().zip(&self.labels) {
            if *label >= classes {
                *square = f64::NAN;
            }
        }
        self.factors.clear();
        self.factors.resize(room, 0.0);
        Ok(())
    }

    /// Clips one unit's gradient and adds it to the sum, in the engine's order. Returns its norm.
    fn add_unit(&mut self, gradient: &mut [f32]) -> f64 {
        let norm = square_norm(gradient).sqrt();
        let factor = self.clip.factor(norm);
        if factor == 0.0 {
            gradient.fill(0.0);
        }
        match &mut self.sum {
            Sum::Gradient => {}
            Sum::Wide(sum) => {
                let factor = f64::from(factor);
                sum.iter_mut().zip(&*gradient).for_each(|(sum, value)| *sum += factor * f64::from(*value));
            }
            Sum::Integers(sum, lattice) => {
                lattice.add(gradient, f64::from(factor), sum);
            }
        }
        norm
    }

    /// The same for a gradient that did not come from the network.
    fn add_planted(&mut self, parameters: &mut Parameters, gradient: &mut [f32]) {
        let factor = self.clip.factor(square_norm(gradient).sqrt());
        match self.sum {
            Sum::Gradient if factor == 0.0 => {}
            Sum::Gradient => {
                let sum = parameters.gradient.values_mut().iter_mut().zip(gradient);
                sum.for_each(|(sum, value)| *sum += factor * *value);
            }
            Sum::Wide(_) | Sum::Integers(..) => {
                self.add_unit(gradient);
            }
        }
    }

    /// The sum as it stands, in the engine's order.
    fn present(&self, parameters: &Parameters) -> Vec<f32> {
        match &self.sum {
            Sum::Gradient => parameters.gradient.values().to_vec(),
            Sum::Wide(sum) => sum.iter().map(|value| *value as f32).collect(),
            Sum::Integers(sum, lattice) => {
                sum.iter().map(|value| (*value as f64 * lattice.unit()) as f32).collect()
            }
        }
    }

    /// Standard deviation of the noise on the sum, per coordinate, and the norm that one unit adds at most.
    fn declared(&self) -> (f64, f64) {
        match &self.sum {
            Sum::Gradient | Sum::Wide(_) => (self.noise_multiplier * self.clip.norm, self.clip.norm),
            Sum::Integers(_, lattice) => (
                (lattice.noise().variance() as f64).sqrt() * lattice.unit(),
                lattice.sensitivity() as f64 * lattice.unit(),
            ),
        }
    }

    /// Adds the step's noise, once, and leaves the noised sum in the gradient.
    fn release(&mut self, rng: &mut SecretRng, parameters: &mut Parameters) -> Result<(), TrainError> {
        let deviation = self.declared().0;
        let released = parameters.gradient.values_mut();
        match &mut self.sum {
            Sum::Gradient => Gaussian::new(deviation * (1.0 + ROUNDING))?.add(rng, released),
            Sum::Wide(sum) => {
                let gaussian = Gaussian::new(deviation)?;
                let noised = sum.iter().map(|value| gaussian.noised(rng, *value) as f32);
                released.iter_mut().zip(noised).for_each(|(into, value)| *into = value);
            }
            Sum::Integers(sum, lattice) => {
                lattice.noise().add(rng, sum);
                let unit = lattice.unit();
                released.iter_mut().zip(sum).for_each(|(into, value)| *into = (*value as f64 * unit) as f32);
            }
        }
        Ok(())
    }

    /// Moves an adaptive clip norm by the noised count of this step (Andrew et al. 2021, algorithm 1).
    fn adapt(&mut self, noised_count: f64) {
        let Some((of, _, expected)) = self.adaptive else { return };
        let fraction = 0.5 + noised_count / expected;
        let moved = self.clip.norm * (-of.learning_rate * (fraction - of.target_quantile)).exp();
        let (least, most) = (self.first_clip_norm / CLIP_RANGE, self.first_clip_norm * CLIP_RANGE);
        self.clip.norm = moved.clamp(least, most);
    }
}

/// Places of a batch that takes `count` examples: few sizes, because a network is bound to each.
fn room(count: usize, most: usize) -> usize {
    let step = if count <= 64 { 8 } else { 16 };
    if count <= 8 { count.next_power_of_two() } else { count.next_multiple_of(step) }.min(most.max(count))
}

impl TorchTrainer {
    /// Trains with a guarantee for every unit of the shard. What leaves is the noised model alone: neither the number of
    /// examples nor a loss.
    pub(super) fn train_private(
        &mut self,
        task: &Task,
        shard: &Shard,
        privacy: &Privacy,
        stop: &AtomicBool,
    ) -> Result<ClientUpdate, TrainError> {
        let job = &task.job;
        let declared = task.declared_examples.filter(|declared| *declared > 0);
        let declared = declared.ok_or(TrainError::DeclaredExamples)?;
        let rate = job.train.sampling_rate.unwrap_or(1.0);
        let units = Units::of(shard)?;
        let mut rng = self.secret(task)?;
        let prepared = Self::prepare(&mut self.prepared, job)?;
        prepared.sgd.start(job, task.round, task.model.len());
        let (network, parameters, sgd) = prepared.network(Some(Target::Clipped))?;
        parameters.load(&task.model);
        parameters.keep_start();
        // pitfall 1, correction 1: a public constant, not the batch that was drawn, nor q times the true number.
        let expected_batch = rate * declared as f64;
        let mut mechanism =
            Mechanism::new(privacy, expected_batch, (network, parameters.len()), units.by_row())?;
        if let Some(objective) = &mut self.objective {
            objective.begin(task, declared);
        }
        let mut chosen = Vec::new();
        let steps = task.steps(declared);
        for step in 1..=steps {
            if stop.load(Ordering::Relaxed) {
                return Err(TrainError::Cancelled);
            }
            // pitfalls 2 and 8: each unit on its own with probability q, whatever there is; an empty batch is a step.
            rng.poisson_sample(units.len(), rate, &mut chosen);
            if let Some(recorder) = &mut self.recorder {
                recorder.sampled(step, &mut chosen);
            }
            mechanism.clear(parameters);
            mechanism.add_units(network, parameters, &mut rng, (&shard.examples, &units, &chosen))?;
            let count_noise = mechanism.adaptive.map(|(_, noise, _)| noise);
            let mut noised_count = count_noise.map_or(0.0, |noise| noise.noised(&mut rng, mechanism.count));
            match &mut self.recorder {
                None => mechanism.release(&mut rng, parameters)?,
                Some(recorder) => {
                    let [own, released] = &mut self.for_objective;
                    parameters.to_layout(&mechanism.present(parameters), own);
                    let mut planted = vec![0.0; parameters.len()];
                    recorder.inject(step, &mut |gradient| {
                        parameters.to_engine(gradient, &mut planted);
                        mechanism.add_planted(parameters, &mut planted);
                    });
                    let before = mechanism.present(parameters);
                    let (noise_standard_deviation, sensitivity) = mechanism.declared();
                    mechanism.release(&mut rng, parameters)?;
                    let noise = parameters.gradient.values().iter().zip(&before);
                    let noise_squares = noise.map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
                    parameters.to_layout(parameters.gradient.values(), released);
                    let count = count_noise.map(|noise| CountRelease {
                        sum: mechanism.count,
                        released: &mut noised_count,
                        sensitivity: 0.5,
                        noise_standard_deviation: noise.standard_deviation(),
                    });
                    recorder.released(Release {
                        step,
                        sum: own,
                        released,
                        noise_squares,
                        clip_norm: mechanism.clip.norm,
                        sensitivity,
                        noise_standard_deviation,
                        count,
                    });
                    parameters.set_gradient(released);
                }
            }
            mechanism.adapt(noised_count);
            let divisor = (1.0 / expected_batch) as f32;
            parameters.gradient.values_mut().iter_mut().for_each(|value| *value *= divisor);
            descend(parameters, sgd, step, &mut self.objective, &mut self.for_objective);
            // Of noised values alone, as all that follows.
            if !all_finite(parameters.values.values()) {
                return Err(TrainError::Diverged { step });
            }
        }
        let delta = parameters.change_since(&task.model);
        if !all_finite(&delta) {
            return Err(TrainError::Diverged { step: steps });
        }
        if let Some(objective) = &mut self.objective {
            objective.finish(task, steps, &delta);
        }
        Ok(ClientUpdate { delta, examples: declared, loss: None })
    }

    /// One Poisson batch's clipped gradients, summed: no noise, no divisor and no step. Units are clipped as in private
    /// training. One unit more or less changes the sum by at most the clip norm, and by what single precision rounds
    /// away of it. Whatever the data are there is a sum, of nothing perhaps.
    pub(super) fn sum_gradients(
        &mut self,
        task: &Task,
        shard: &Shard,
        privacy: &Privacy,
        stop: &AtomicBool,
    ) -> Result<ClientUpdate, TrainError> {
        let job = &task.job;
        let units = Units::of(shard)?;
        let mut rng = self.secret(task)?;
        let prepared = Self::prepare(&mut self.prepared, job)?;
        let (network, parameters, _) = prepared.network(Some(Target::Clipped))?;
        parameters.load(&task.model);
        let rate = job.train.sampling_rate.unwrap_or(1.0);
        // The batch matters to adaptive clipping alone, which these jobs do not have.
        let expected_batch = privacy.expected_batch_size.unwrap_or(1.0);
        let mut mechanism =
            Mechanism::new(privacy, expected_batch, (network, parameters.len()), units.by_row())?;
        if stop.load(Ordering::Relaxed) {
            return Err(TrainError::Cancelled);
        }
        let mut chosen = Vec::new();
        rng.poisson_sample(units.len(), rate, &mut chosen);
        mechanism.clear(parameters);
        let added = mechanism.add_units(network, parameters, &mut rng, (&shard.examples, &units, &chosen));
        let mut delta = Vec::with_capacity(parameters.len());
        if added.is_ok() {
            let mut sum = mechanism.present(parameters);
            parameters.to_layout(&sum, &mut delta);
            sum.zeroize();
        }
        // The sum without noise is the caller's alone.
        mechanism.wipe(parameters);
        added?;
        Ok(ClientUpdate { delta, examples: 1, loss: None })
    }

    /// Secret bits for one training.
    #[cfg_attr(not(feature = "seeded-noise"), allow(unused_variables))]
    fn secret(&self, task: &Task) -> Result<SecretRng, TrainError> {
        #[cfg(feature = "seeded-noise")]
        if let Some(seed) = self.seed {
            // pitfall 11: of each round and client its own.
            let name = format!("{seed} {} {}", task.round, task.client);
            let [a, b, c, d, e, f, g, h, ..] = tributary_common::digest::Digest::of(name.as_bytes()).0;
            return Ok(SecretRng::seeded(u64::from_le_bytes([a, b, c, d, e, f, g, h])));
        }
        // pitfall 11: a key from the operating system for each training, so a restart repeats no noise.
        Ok(SecretRng::new()?)
    }
}

#[cfg(test)]
#[path = "private_tests.rs"]
pub(super) mod tests;
