//! `[secure_aggregation]`: whether updates are masked, against whom, and in which integers they are summed.

use serde::{Deserialize, Serialize};

use super::{Job, JobError, Mechanism};
use crate::document::Schema;
use crate::limits;

/// Most bits of one client's value: with the largest cohort a sum still fits into 64 bits.
const MOST_VALUE_BITS: u32 = 32;
/// Fewest members of a cohort, and fewest survivors: fewer would hide nobody.
pub const MINIMUM_SURVIVORS: u32 = 3;

/// What the coordinator may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// It follows the protocol and looks at everything: it is believed about who the other clients are.
    #[default]
    Semi,
    /// It may do anything: the clients know each other's identities from elsewhere (pinned peers).
    Strict,
}

impl Level {
    /// Its name in a job file.
    pub fn name(self) -> &'static str {
        match self {
            Level::Semi => "semi",
            Level::Strict => "strict",
        }
    }
}

/// The `[secure_aggregation]` table of a job whose updates are masked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecureAggregation {
    /// `true`: a table that says `false` is as none.
    pub enabled: bool,
    /// What the coordinator may do.
    #[serde(default)]
    pub level: Level,
    /// Bits of one client's value, sign included, 2 to 32. Not with `mechanism = "distributed"`, whose grid follows
    /// from its noise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_bits: Option<u32>,
    /// Largest magnitude of one coordinate of an update, above 0: what is larger is cut, and kept in the residual
    /// where there is one. Not with `mechanism = "distributed"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coordinate_limit: Option<f64>,
    /// Without `[privacy]`: a client with more training examples weighs as if it had so many, 1 to 1,000,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_limit: Option<u32>,
    /// Share of a cohort that may drop out after its keys are shared, 0 to below 1: cohorts above 255 choose their graph by
    /// it, and clients refuse to unmask where more are said to be missing. Default 0.34, above 255 clients 0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum_dropout: Option<f64>,
    /// Share of a large cohort (above 255) that may collude with the coordinator, 0 to below 1.
    #[serde(default)]
    pub corrupt: f64,
    /// `mechanism = "distributed"`: survivors that may tell the coordinator their own noise; the promise counts the
    /// others' alone.
    #[serde(default)]
    pub colluders: u32,
    /// Longest time for one step of the protocol before and after the upload.
    #[serde(default = "default_step_seconds")]
    pub step_seconds: u32,
}

fn default_step_seconds() -> u32 {
    60
}

/// The keys of `[secure_aggregation]`.
pub(super) const SCHEMA: Schema = Schema {
    keys: &[
        "enabled",
        "level",
        "value_bits",
        "coordinate_limit",
        "weight_limit",
        "maximum_dropout",
        "corrupt",
        "colluders",
        "step_seconds",
    ],
    tables: &[],
};

impl SecureAggregation {
    /// Bits of one client's value, sign included.
    pub fn value_bits(&self) -> u32 {
        self.value_bits.unwrap_or(20)
    }

    /// Largest magnitude of a coordinate.
    pub fn coordinate_limit(&self) -> f64 {
        self.coordinate_limit.unwrap_or(1.0)
    }

    /// Share of a cohort of `clients` that may drop out.
    pub fn maximum_dropout(&self, clients: u32) -> f64 {
        self.maximum_dropout.unwrap_or(if clients > 255 { 0.1 } else { 0.34 })
    }

    /// The weight that a client with `examples` training examples has in a sum, 1 to [`Self::weight_limit`].
    pub fn weight(&self, examples: u64) -> u64 {
        examples.clamp(1, u64::from(self.weight_limit()))
    }

    /// The largest weight.
    pub fn weight_limit(&self) -> u32 {
        self.weight_limit.unwrap_or(10_000)
    }

    pub(super) fn check(&self, job: &Job) -> Result<(), JobError> {
        let invalid = |message: String| Err(JobError::Invalid(format!("[secure_aggregation] {message}")));
        let invited = job.invited();
        if job.cohort.minimum < MINIMUM_SURVIVORS {
            return invalid(format!(
                "[cohort] minimum = {}: a sum of fewer than {MINIMUM_SURVIVORS} survivors hides nobody",
                job.cohort.minimum
            ));
        }
        if invited > limits::MASKED_COHORT_MEMBERS {
            return invalid(format!(
                "{invited} clients are invited to a round; at most {} can share masks",
                limits::MASKED_COHORT_MEMBERS
            ));
        }
        if let Some(bits) = self.value_bits.filter(|bits| !(2..=MOST_VALUE_BITS).contains(bits)) {
            return invalid(format!("value_bits = {bits}: 2 to {MOST_VALUE_BITS} are possible"));
        }
        if let Some(limit) =
            self.coordinate_limit.filter(|limit| !(limit.is_finite() && *limit > 0.0 && *limit <= 16_384.0))
        {
            return invalid(format!("coordinate_limit = {limit}: above 0 and at most 16384 is needed"));
        }
        if let Some(limit) = self.weight_limit.filter(|limit| !(1..=1_000_000).contains(limit)) {
            return invalid(format!("weight_limit = {limit}: 1 to 1000000 are possible"));
        }
        let dropout = self.maximum_dropout(invited);
        for (key, share) in [("maximum_dropout", dropout), ("corrupt", self.corrupt)] {
            if !(0.0..1.0).contains(&share) {
                return invalid(format!("{key} = {share}: 0 to below 1 is possible"));
            }
        }
        if !(1..=86_400).contains(&self.step_seconds) {
            return invalid(format!("step_seconds = {}: 1 to 86400 are possible", self.step_seconds));
        }
        if job.privacy.as_ref().is_some_and(|privacy| privacy.mechanism == Mechanism::Gaussian) {
            return invalid(
                "[privacy] mechanism = \"gaussian\" clips each update at the coordinator, which must see it: use \
                 \"distributed\""
                    .into(),
            );
        }
        if self.weight_limit.is_some() && job.privacy.is_some() {
            return invalid("weight_limit: with [privacy] every client weighs the same".into());
        }
        if job.is_distributed() {
            if self.value_bits.is_some() || self.coordinate_limit.is_some() {
                return invalid(
                    "value_bits and coordinate_limit follow from the noise of mechanism = \"distributed\": remove them"
                        .into(),
                );
            }
            if self.colluders + 1 > job.cohort.minimum {
                return invalid(format!(
                    "colluders = {}: fewer than [cohort] minimum = {} are possible, for somebody must add noise",
                    self.colluders, job.cohort.minimum
                ));
            }
        } else if self.colluders != 0 {
            return invalid("colluders belongs to [privacy] mechanism = \"distributed\"".into());
        }
        Ok(())
    }
}
