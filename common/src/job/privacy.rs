//! `[privacy]`: what a job promises about the people in the data, and the mechanism that keeps the promise.

use serde::{Deserialize, Serialize};

use super::{Job, JobError};
use crate::document::Schema;
use crate::privacy::accounting::{self, Accountant, Basis, Guarantee};
use crate::privacy::distributed::{Level, Plan, Requirements, Scale};
use crate::privacy::{Event, Noise, Unit};

/// Part of itself by which rounding to the grid of noise shares makes a sensitivity larger.
const INFLATION: f64 = 0.01;
/// Part of the clip norm by which two sums of gradients differ more than the gradients, for they were rounded as they were
/// added: for 256 gradients in single precision that is about 10⁻⁵; this covers fifty times as much.
const SUMMATION_MARGIN: f64 = 1.0 / 1024.0;
/// Most classes of which confusions are counted.
const NOISED_CLASSES: usize = 100;

/// Whom the job protects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrivacyUnit {
    /// A row of a node's data or, where the node's `[data] group` says so, all rows of one person.
    Example,
    /// Everything that one client holds.
    Client,
}

/// Where and how noise is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mechanism {
    /// At each client: Poisson batches, gradients clipped per unit, noise on every step (Abadi et al. 2016).
    DpSgd,
    /// At a trusted coordinator: clipped client updates, noise on their sum (McMahan et al. 2018).
    Gaussian,
    /// At each client in shares on an integer grid, under masks: nobody sees less noise than all shares together
    /// (Agarwal, Kairouz and Liu 2021).
    Distributed,
}

impl Mechanism {
    /// Its name in a job file.
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::DpSgd => "dp-sgd",
            Mechanism::Gaussian => "gaussian",
            Mechanism::Distributed => "distributed",
        }
    }
}

/// How a gradient or an update is brought down to the clip norm C.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clipping {
    /// Times `min(1, C/‖g‖)` (Abadi et al. 2016).
    #[default]
    Flat,
    /// Times `C/(‖g‖ + 0.01)` (Bu et al. 2022, AUTO-S): the clip norm is then a part of the learning rate.
    Automatic,
    /// As `flat`, with a C that follows a quantile of the norms, from noised counts (Andrew et al. 2021).
    Adaptive,
}

/// How noise is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampler {
    /// Gaussian, hardened against attacks on floating-point numbers.
    #[default]
    Gaussian,
    /// The exact discrete Gaussian on an integer grid: slower, and exact.
    DiscreteGaussian,
}

/// What nodes tell about their own data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetricsRelease {
    /// Nothing.
    #[default]
    None,
    /// Confusion counts with noise, charged like a round's training.
    Noised,
}

/// The `[privacy]` table of a job whose `unit` is not `none`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Privacy {
    /// Whom the job protects.
    pub unit: PrivacyUnit,
    /// Where and how noise is added.
    pub mechanism: Mechanism,
    /// Standard deviation of the noise per clip norm, above 0.
    pub noise_multiplier: f64,
    /// Clip norm C: largest Euclidean norm of one unit's gradient, or of one client's update. With `adaptive`
    /// clipping it is the first one.
    pub clip_norm: f64,
    /// `unit = "example"`, `mechanism = "distributed"`: the public number by which the sum of a whole cohort's clipped
    /// gradients is divided; about `sampling_rate` times everybody's examples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_batch_size: Option<f64>,
    /// How gradients or updates are clipped.
    #[serde(default)]
    pub clipping: Clipping,
    /// `adaptive`: the quantile of the norms that C follows; default 0.5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_quantile: Option<f64>,
    /// `adaptive`: how fast C moves per step; default 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_learning_rate: Option<f64>,
    /// `adaptive`: standard deviation σ_b of the noise on the count of norms at most C; above half the noise
    /// multiplier. The default is a twentieth of the expected batch or cohort, and at least the noise multiplier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count_noise: Option<f64>,
    /// How noise is drawn.
    #[serde(default)]
    pub sampler: Sampler,
    /// δ of the claim, above 0 and below 1; well below one over the number of people is meaningful.
    pub delta: f64,
    /// The job is not run if its whole length costs a unit more than this ε.
    pub max_epsilon: f64,
    /// What nodes tell about their own data.
    #[serde(default)]
    pub metrics: MetricsRelease,
    /// `metrics = "noised"`: standard deviation of the noise on each confusion count, above 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_noise: Option<f64>,
}

/// The keys of `[privacy]`.
pub(super) const SCHEMA: Schema = Schema {
    keys: &[
        "unit",
        "mechanism",
        "noise_multiplier",
        "clip_norm",
        "expected_batch_size",
        "clipping",
        "target_quantile",
        "clip_learning_rate",
        "count_noise",
        "sampler",
        "delta",
        "max_epsilon",
        "metrics",
        "metrics_noise",
    ],
    tables: &[],
};

/// Adaptive clipping's constants (Andrew et al. 2021, algorithm 1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdaptiveClipping {
    /// Quantile γ of the norms that C follows.
    pub target_quantile: f64,
    /// η_C: C is multiplied by `exp(−η_C · (noised fraction − γ))`.
    pub learning_rate: f64,
    /// σ_b: standard deviation of the noise on the centred count, whose sensitivity is ½.
    pub count_noise: f64,
    /// Noise multiplier z_Δ of the sum, so that sum and count together cost the job's noise multiplier:
    /// `z_Δ = (z⁻² − (2σ_b)⁻²)^(−½)` (theorem 1).
    pub sum_noise_multiplier: f64,
}

impl Privacy {
    /// Whether clients draw Poisson batches and clip each example's gradient.
    pub fn samples_examples(&self) -> bool {
        match self.mechanism {
            Mechanism::DpSgd => true,
            Mechanism::Gaussian => false,
            Mechanism::Distributed => self.unit == PrivacyUnit::Example,
        }
    }

    /// What the guarantee protects at a node whose rows are grouped by person, or not.
    pub fn unit(&self, grouped: bool) -> Unit {
        match self.unit {
            PrivacyUnit::Client => Unit::Client,
            PrivacyUnit::Example if grouped => Unit::Group,
            PrivacyUnit::Example => Unit::Example,
        }
    }

    /// Adaptive clipping's constants for an expected batch, or cohort, of `expected` units; `None` where the clip
    /// norm stays as it is.
    pub fn adaptive(&self, expected: f64) -> Option<AdaptiveClipping> {
        if self.clipping != Clipping::Adaptive {
            return None;
        }
        let count_noise = self.count_noise.unwrap_or((expected / 20.0).max(self.noise_multiplier));
        let left = self.noise_multiplier.powi(-2) - (2.0 * count_noise).powi(-2);
        Some(AdaptiveClipping {
            target_quantile: self.target_quantile.unwrap_or(0.5),
            learning_rate: self.clip_learning_rate.unwrap_or(0.2),
            count_noise,
            sum_noise_multiplier: left.powf(-0.5),
        })
    }

    pub(super) fn check(&self, job: &Job) -> Result<(), JobError> {
        let invalid = |message: String| Err(JobError::Invalid(format!("[privacy] {message}")));
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let pair = (self.unit, self.mechanism);
        if pair == (PrivacyUnit::Example, Mechanism::Gaussian) {
            return invalid("mechanism = \"gaussian\" protects clients: set unit = \"client\"".into());
        }
        if pair == (PrivacyUnit::Client, Mechanism::DpSgd) {
            return invalid("mechanism = \"dp-sgd\" protects examples: set unit = \"example\"".into());
        }
        for (key, value) in [
            ("noise_multiplier", self.noise_multiplier),
            ("clip_norm", self.clip_norm),
            ("max_epsilon", self.max_epsilon),
        ] {
            if !positive(value) || value > 1e9 {
                return invalid(format!("{key} = {value}: a number above 0 is needed"));
            }
        }
        if !(self.delta > 0.0 && self.delta < 1.0) {
            return invalid(format!("delta = {}: above 0 and below 1 is needed", self.delta));
        }
        let distributed = self.mechanism == Mechanism::Distributed;
        if distributed && job.secure_aggregation.is_none() {
            return invalid(
                "mechanism = \"distributed\" hides each share of noise under masks: set [secure_aggregation] enabled = true"
                    .into(),
            );
        }
        match self.expected_batch_size {
            None if distributed && self.unit == PrivacyUnit::Example => {
                return invalid("mechanism = \"distributed\" for examples needs expected_batch_size".into());
            }
            Some(_) if !distributed || self.unit == PrivacyUnit::Client => {
                return invalid(
                    "expected_batch_size belongs to unit = \"example\", mechanism = \"distributed\"".into(),
                );
            }
            Some(size) if !positive(size) || size > 1e9 => {
                return invalid(format!("expected_batch_size = {size}: a number above 0 is needed"));
            }
            _ => {}
        }
        if distributed && (self.clipping == Clipping::Adaptive || self.sampler != Sampler::Gaussian) {
            return invalid(
                "mechanism = \"distributed\" has a fixed clip norm and its own sampler: remove clipping = \"adaptive\" and \
                 sampler"
                    .into(),
            );
        }
        let adaptive = self.clipping == Clipping::Adaptive;
        let settings = [
            ("target_quantile", self.target_quantile),
            ("clip_learning_rate", self.clip_learning_rate),
            ("count_noise", self.count_noise),
        ];
        for (key, value) in settings {
            match value {
                Some(_) if !adaptive => {
                    return invalid(format!("{key} belongs to clipping = \"adaptive\""));
                }
                Some(value) if !positive(value) => {
                    return invalid(format!("{key} = {value}: a number above 0 is needed"));
                }
                _ => {}
            }
        }
        if self.target_quantile.is_some_and(|quantile| quantile >= 1.0) {
            return invalid("target_quantile: below 1 is needed".into());
        }
        if self.count_noise.is_some_and(|noise| 2.0 * noise <= self.noise_multiplier) {
            return invalid(format!(
                "count_noise must be above half of noise_multiplier = {}: the count would cost more than the job",
                self.noise_multiplier
            ));
        }
        match (self.metrics, self.metrics_noise) {
            (MetricsRelease::None, Some(_)) => {
                return invalid("metrics_noise belongs to metrics = \"noised\"".into());
            }
            (MetricsRelease::Noised, noise)
                if !noise.is_some_and(|noise| positive(noise) && noise <= 1e9) =>
            {
                return invalid("metrics = \"noised\" needs metrics_noise, a number above 0".into());
            }
            (MetricsRelease::Noised, _) if job.model.classes > NOISED_CLASSES => {
                return invalid(format!(
                    "metrics = \"noised\": at most {NOISED_CLASSES} classes are counted"
                ));
            }
            (MetricsRelease::Noised, _) if self.unit == PrivacyUnit::Client => {
                return invalid("metrics = \"noised\" counts examples: it needs unit = \"example\"".into());
            }
            (MetricsRelease::Noised, _) if !job.evaluation.federated || job.evaluation.every_rounds != 1 => {
                // Every round costs the same, so that a node can set a job's whole cost aside.
                return invalid(
                    "metrics = \"noised\" needs [evaluation] federated = true and every_rounds = 1".into(),
                );
            }
            (MetricsRelease::None, _) | (MetricsRelease::Noised, _) => {}
        }
        if self.unit == PrivacyUnit::Client && job.cohort.over_selection > 1.0 {
            // The denominator is public and fixed; surplus updates would be spent for nothing.
            return invalid("unit = \"client\" needs [cohort] over_selection = 1".into());
        }
        if self.unit == PrivacyUnit::Client && self.sampler == Sampler::DiscreteGaussian {
            return invalid("sampler = \"discrete-gaussian\" belongs to mechanism = \"dp-sgd\"".into());
        }
        if adaptive && self.sampler == Sampler::DiscreteGaussian {
            return invalid("sampler = \"discrete-gaussian\" needs a fixed clip norm".into());
        }
        Ok(())
    }
}

impl Job {
    /// The grid, shares and width of a job whose clients add noise in shares; `None` without them.
    ///
    /// # Errors
    /// One line, if sums or shares do not fit.
    pub fn noise_plan(&self) -> Result<Option<Plan>, JobError> {
        let (Some(privacy), Some(masks)) = (&self.privacy, &self.secure_aggregation) else { return Ok(None) };
        if privacy.mechanism != Mechanism::Distributed {
            return Ok(None);
        }
        let (level, clip_norm) = match privacy.unit {
            PrivacyUnit::Client => (Level::Client, privacy.clip_norm),
            PrivacyUnit::Example => {
                // Whatever share of everybody's examples one client has, and six deviations more.
                let expected = privacy.expected_batch_size.unwrap_or(1.0);
                let batch_norm = expected + 6.0 * expected.sqrt() + 6.0;
                (Level::Example { batch_norm }, privacy.clip_norm * (1.0 + SUMMATION_MARGIN))
            }
        };
        let requirements = Requirements {
            level,
            noise_multiplier: privacy.noise_multiplier,
            clip_norm,
            dimension: self.masked_coordinates()?,
            fewest_survivors: self.cohort.minimum,
            colluders: masks.colluders,
            most_clients: self.invited(),
            scale: Scale::Inflation(INFLATION),
        };
        let plan = Plan::new(&requirements);
        plan.map(Some).map_err(|error| JobError::Invalid(format!("[privacy] {error}")))
    }

    /// What one round does to one unit's data: public, and the same in every round whatever the data are. Empty
    /// without `[privacy]`.
    ///
    /// A client may be in every round, and cohorts are not secret: amplification by sampling clients is not claimed.
    pub fn round_events(&self) -> Vec<Event> {
        let Some(privacy) = &self.privacy else { return Vec::new() };
        if privacy.mechanism == Mechanism::Distributed {
            // A job that was read has a plan.
            let plan = self.noise_plan().ok().flatten();
            let sampling_rate = match privacy.unit {
                PrivacyUnit::Client => 1.0,
                PrivacyUnit::Example => self.train.sampling_rate.unwrap_or(1.0),
            };
            let mut events: Vec<Event> = plan.iter().map(|plan| plan.event(sampling_rate, 1)).collect();
            events.extend(self.metrics_event());
            return events;
        }
        let noise = match privacy.sampler {
            Sampler::Gaussian => Noise::Gaussian,
            Sampler::DiscreteGaussian => Noise::DiscreteGaussian,
        };
        let (sampling_rate, count) = match privacy.unit {
            PrivacyUnit::Client => (1.0, 1),
            PrivacyUnit::Example => {
                (self.train.sampling_rate.unwrap_or(1.0), u64::from(self.train.local_steps.unwrap_or(1)))
            }
        };
        // An adaptive clip norm changes sensitivity and noise alike, from noised values alone.
        let sensitivity = if privacy.clipping == Clipping::Adaptive { 1.0 } else { privacy.clip_norm };
        let noise_standard_deviation = privacy.noise_multiplier * sensitivity;
        let mut events = vec![Event { noise, sampling_rate, sensitivity, noise_standard_deviation, count }];
        events.extend(self.metrics_event());
        events
    }

    /// One example changes one confusion count by one.
    fn metrics_event(&self) -> Option<Event> {
        let noise_standard_deviation = self.privacy.as_ref()?.metrics_noise?;
        let (sampling_rate, sensitivity, count) = (1.0, 1.0, 1);
        let noise = Noise::DiscreteGaussian;
        Some(Event { noise, sampling_rate, sensitivity, noise_standard_deviation, count })
    }

    /// What `rounds` rounds do to one unit's data.
    pub fn events(&self, rounds: u32) -> Vec<Event> {
        let times = |event: Event| event.times(event.count.saturating_mul(u64::from(rounds)));
        self.round_events().into_iter().map(times).collect()
    }
}

impl Job {
    /// The job's promise in one line, with everything that an epsilon means nothing without; `None` without `[privacy]`.
    ///
    /// # Errors
    /// As [`Job::guarantee`].
    pub fn promise(&self) -> Result<Option<String>, JobError> {
        let (Some(privacy), Some(guarantee)) = (&self.privacy, self.guarantee()?) else { return Ok(None) };
        let whom = match privacy.unit {
            PrivacyUnit::Example => "one example (or person, where a node's rows are grouped) more or less",
            PrivacyUnit::Client => "one client's contribution or none (that it took part is public)",
        };
        let basis = match guarantee.basis {
            Basis::Pld { grid_step } => format!("privacy loss distributions, grid step {grid_step:.1e}"),
            Basis::Rdp { order } => format!("Rényi divergence of order {order:.2}"),
        };
        let sampling = match privacy.unit {
            PrivacyUnit::Example => format!(
                "Poisson sampling rate {}, {} steps",
                self.train.sampling_rate.unwrap_or(1.0),
                u64::from(self.train.local_steps.unwrap_or(1)) * u64::from(self.rounds)
            ),
            PrivacyUnit::Client => format!("everybody, {} rounds", self.rounds),
        };
        Ok(Some(format!(
            "ε = {:.4} at δ = {} against {whom}; {basis}; {}, noise multiplier {}, clip norm {}, {sampling}",
            guarantee.epsilon,
            guarantee.delta,
            privacy.mechanism.name(),
            privacy.noise_multiplier,
            privacy.clip_norm
        )))
    }

    /// What the job's whole length promises; `None` without `[privacy]`. The smaller of two accountants.
    ///
    /// # Errors
    /// One line, if that is more than `max_epsilon`.
    pub fn guarantee(&self) -> Result<Option<Guarantee>, JobError> {
        let Some(privacy) = &self.privacy else { return Ok(None) };
        let events = self.events(self.rounds);
        let guarantee = accounting::epsilon(&events, privacy.delta, privacy.unit(false), Accountant::Best)
            .map_err(|error| JobError::Invalid(format!("[privacy] {error}")))?;
        let (epsilon, most) = (guarantee.epsilon, privacy.max_epsilon);
        if epsilon > most {
            return Err(JobError::Invalid(format!(
                "[privacy] {} rounds cost ε = {epsilon:.4} at δ = {}, more than max_epsilon = {most}: raise \
                 noise_multiplier, or lower rounds, local_steps or sampling_rate (`tributary-sim plan` says by how much)",
                self.rounds, privacy.delta
            )));
        }
        Ok(Some(guarantee))
    }
}
