//! `[compression]`: what an update is reduced to before it leaves a client.

use serde::{Deserialize, Serialize};

use super::{Job, JobError, Mechanism};
use crate::document::Schema;

/// What is sent of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompressionScheme {
    /// The largest coordinates. Without masks each client chooses its own; with them all clients of a round send the
    /// same ones, its support.
    TopK,
    /// Every coordinate in 8 bits, rounded stochastically, with a scale per block.
    Int8,
    /// Every coordinate at one of a few levels, rounded stochastically (Alistarh et al. 2017).
    Qsgd,
}

impl CompressionScheme {
    /// Its name in a job file.
    pub fn name(self) -> &'static str {
        match self {
            CompressionScheme::TopK => "top-k",
            CompressionScheme::Int8 => "int8",
            CompressionScheme::Qsgd => "qsgd",
        }
    }
}

/// How the support of a masked round is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SupportRule {
    /// By counts, summed under the masks of the round before, of how many clients rank a coordinate among their largest.
    DelayedVote,
    /// By the magnitudes of past aggregates, and some coordinates at random.
    Track,
    /// At random, anew in each round.
    Random,
}

/// The `[compression]` table of a job whose `scheme` is not `none`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compression {
    /// What is sent.
    pub scheme: CompressionScheme,
    /// `top-k`: share of the coordinates that is sent, above 0 and at most 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// `top-k` without masks: bits of a value, 32 (`f32`), 16 (`bf16`), 8 or 1 (its sign, and one mean); default 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_bits: Option<u32>,
    /// `qsgd`: levels above zero, 1 to 127; default 7.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub levels: Option<u32>,
    /// Whether a client keeps what it did not send and adds it to its next update; default: with `top-k`, where
    /// `[privacy]` allows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_feedback: Option<bool>,
    /// `top-k` with masks: how the support is chosen; default `delayed-vote`, with distributed noise `track`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub support: Option<SupportRule>,
    /// `top-k` with masks: share of the support that is drawn at random; default 0.05, of `track` 0.25.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exploration: Option<f64>,
}

/// The keys of `[compression]`.
pub(super) const SCHEMA: Schema = Schema {
    keys: &["scheme", "density", "value_bits", "levels", "error_feedback", "support", "exploration"],
    tables: &[],
};

impl Compression {
    pub(super) fn check(&self, job: &Job) -> Result<(), JobError> {
        let invalid = |message: String| Err(JobError::Invalid(format!("[compression] {message}")));
        let top_k = self.scheme == CompressionScheme::TopK;
        let masked = job.secure_aggregation.is_some();
        match self.density {
            None if top_k => return invalid("scheme = \"top-k\" needs density, such as 0.01".into()),
            Some(_) if !top_k => return invalid("density belongs to scheme = \"top-k\"".into()),
            Some(density) if !(density > 0.0 && density <= 1.0) => {
                return invalid(format!("density = {density}: above 0 and at most 1 is needed"));
            }
            Some(density) => {
                let parameters = job.layout()?.parameters();
                if density * (parameters as f64) < 1.0 {
                    return invalid(format!(
                        "density = {density} of {parameters} parameters is less than one coordinate"
                    ));
                }
            }
            None => {}
        }
        match self.value_bits {
            Some(_) if !top_k || masked => {
                return invalid(
                    "value_bits belongs to scheme = \"top-k\" without masks; with them, see [secure_aggregation]".into(),
                );
            }
            Some(bits) if !matches!(bits, 1 | 8 | 16 | 32) => {
                return invalid(format!("value_bits = {bits}: 1, 8, 16 or 32 are possible"));
            }
            _ => {}
        }
        match self.levels {
            Some(_) if self.scheme != CompressionScheme::Qsgd => {
                return invalid("levels belongs to scheme = \"qsgd\"".into());
            }
            Some(levels) if !(1..=127).contains(&levels) => {
                return invalid(format!("levels = {levels}: 1 to 127 are possible"));
            }
            _ => {}
        }
        if masked && !top_k {
            return invalid(format!(
                "scheme = \"{}\" cannot be summed under masks: [secure_aggregation] value_bits says how many bits a value \
                 has there",
                self.scheme.name()
            ));
        }
        if (self.support.is_some() || self.exploration.is_some()) && !(masked && top_k) {
            return invalid(
                "support and exploration belong to scheme = \"top-k\" with [secure_aggregation]".into(),
            );
        }
        if let Some(share) = self.exploration.filter(|share| !(0.0..=1.0).contains(share)) {
            return invalid(format!("exploration = {share}: 0 to 1 is possible"));
        }
        if self.support == Some(SupportRule::DelayedVote) && job.privacy.is_some() {
            return invalid(
                "support = \"delayed-vote\" tells how clients vote, without noise: with [privacy] use \"track\"".into(),
            );
        }
        // Corrections 4: state that outlives a round must come from what was noised already.
        let before_noise = job.privacy.as_ref().is_some_and(|privacy| privacy.mechanism != Mechanism::DpSgd);
        if self.error_feedback == Some(true) && before_noise {
            return invalid(
                "error_feedback keeps what was not noised: it needs a job without [privacy], or mechanism = \"dp-sgd\""
                    .into(),
            );
        }
        if job.privacy.as_ref().is_some_and(|privacy| privacy.mechanism == Mechanism::Gaussian) {
            return invalid(
                "[privacy] mechanism = \"gaussian\" sums whole updates: set scheme = \"none\"".into(),
            );
        }
        Ok(())
    }
}

impl Job {
    /// Whether clients keep what they did not send and add it to their next update.
    pub fn has_error_feedback(&self) -> bool {
        let noised_first = self.privacy.as_ref().is_none_or(|privacy| privacy.mechanism == Mechanism::DpSgd);
        self.compression.as_ref().is_some_and(|compression| {
            compression.error_feedback.unwrap_or(compression.scheme == CompressionScheme::TopK)
                && noised_first
        })
    }

    /// Coordinates that one masked update has: all, or those of the round's support.
    ///
    /// # Errors
    /// As [`Job::layout`].
    pub fn masked_coordinates(&self) -> Result<usize, JobError> {
        let parameters = self.layout()?.parameters();
        let density = self.compression.as_ref().and_then(|compression| compression.density);
        Ok(density.map_or(parameters, |density| {
            ((density * parameters as f64).round() as usize).clamp(1, parameters.max(1))
        }))
    }

    /// How the support of each round is chosen; `None` where every coordinate is sent, or there are no masks.
    pub fn support_rule(&self) -> Option<SupportRule> {
        self.secure_aggregation.as_ref()?;
        let compression = self.compression.as_ref()?;
        let default = if self.privacy.is_some() { SupportRule::Track } else { SupportRule::DelayedVote };
        (compression.scheme == CompressionScheme::TopK).then(|| compression.support.unwrap_or(default))
    }
}
