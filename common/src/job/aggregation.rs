//! `[aggregation]`: how the coordinator makes one model of the updates, where it sees each.

use serde::{Deserialize, Serialize};

use super::{Job, JobError, Mechanism};
use crate::document::Schema;

/// Most bytes of updates that a coordinator holds for a rule that needs all of them at once.
const HELD_BYTES: u64 = 16 << 30;

/// How updates become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combination {
    /// The mean, weighted by examples: one update can move it anywhere.
    #[default]
    Mean,
    /// The weighted mean of updates that are shortened to a norm (Sun et al. 2019).
    NormBound,
    /// Of each coordinate the median (Yin et al. 2018).
    Median,
    /// Of each coordinate the mean without the largest and the smallest values (Yin et al. 2018).
    TrimmedMean,
    /// The one update that is nearest to the others (Blanchard et al. 2017).
    Krum,
    /// The mean of the updates that are nearest to the others (Blanchard et al. 2017).
    MultiKrum,
}

impl Combination {
    /// Its name in a job file.
    pub fn name(self) -> &'static str {
        match self {
            Combination::Mean => "mean",
            Combination::NormBound => "norm-bound",
            Combination::Median => "median",
            Combination::TrimmedMean => "trimmed-mean",
            Combination::Krum => "krum",
            Combination::MultiKrum => "multi-krum",
        }
    }

    /// Whether all updates of a round are held at once.
    pub fn holds_all(self) -> bool {
        !matches!(self, Combination::Mean | Combination::NormBound)
    }
}

/// The `[aggregation]` table.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Aggregation {
    /// How updates become one.
    pub rule: Combination,
    /// `norm-bound`: largest Euclidean norm of an update, above 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm_bound: Option<f64>,
    /// `trimmed-mean`, `krum`, `multi-krum`: how many of a round's clients may be hostile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attackers: Option<u32>,
    /// `multi-krum`: how many updates are averaged; default: all but `attackers`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selected: Option<u32>,
}

/// The keys of `[aggregation]`.
pub(super) const SCHEMA: Schema =
    Schema { keys: &["rule", "norm_bound", "attackers", "selected"], tables: &[] };

impl Aggregation {
    pub(super) fn check(&self, job: &Job) -> Result<(), JobError> {
        let invalid = |message: String| Err(JobError::Invalid(format!("[aggregation] {message}")));
        let (rule, name, least) = (self.rule, self.rule.name(), job.cohort.minimum);
        let counts = matches!(rule, Combination::TrimmedMean | Combination::Krum | Combination::MultiKrum);
        match (self.norm_bound, rule) {
            (None, Combination::NormBound) => return invalid(format!("rule = \"{name}\" needs norm_bound")),
            (Some(_), other) if other != Combination::NormBound => {
                return invalid(format!("norm_bound belongs to rule = \"norm-bound\", not to \"{name}\""));
            }
            (Some(bound), _) if !(bound.is_finite() && bound > 0.0) => {
                return invalid(format!("norm_bound = {bound}: a number above 0 is needed"));
            }
            _ => {}
        }
        let attackers = match self.attackers {
            None if counts => {
                return invalid(format!(
                    "rule = \"{name}\" needs attackers: how many clients may be hostile"
                ));
            }
            Some(_) if !counts => return invalid(format!("attackers does not belong to rule = \"{name}\"")),
            attackers => u64::from(attackers.unwrap_or_default()),
        };
        let needed = match rule {
            Combination::TrimmedMean => 2 * attackers + 1,
            Combination::Krum | Combination::MultiKrum => 2 * attackers + 3,
            _ => 0,
        };
        if u64::from(least) < needed {
            return invalid(format!(
                "rule = \"{name}\" with attackers = {attackers} needs [cohort] minimum = {needed} or more, not {least}"
            ));
        }
        match self.selected {
            Some(_) if rule != Combination::MultiKrum => {
                return invalid(format!("selected belongs to rule = \"multi-krum\", not to \"{name}\""));
            }
            Some(selected) if selected == 0 || u64::from(selected) + attackers > u64::from(least) => {
                return invalid(format!(
                    "selected = {selected}: 1 to [cohort] minimum less attackers, {}, are possible",
                    u64::from(least).saturating_sub(attackers)
                ));
            }
            _ => {}
        }
        if rule == Combination::Mean {
            return Ok(());
        }
        if job.secure_aggregation.is_some() {
            return invalid(format!(
                "rule = \"{name}\" has to see each update, and under [secure_aggregation] nobody does: leave one of them out"
            ));
        }
        if job.privacy.as_ref().is_some_and(|privacy| privacy.mechanism == Mechanism::Gaussian) {
            return invalid(format!(
                "rule = \"{name}\" with [privacy] mechanism = \"gaussian\": its noise is for a sum of clipped updates, whose \
                 clip_norm bounds each already"
            ));
        }
        let bytes = (job.layout()?.parameters() as u64).saturating_mul(4 * u64::from(job.invited()));
        if rule.holds_all() && bytes > HELD_BYTES {
            return invalid(format!(
                "rule = \"{name}\" holds all updates of a round at once, {} GB: at most {} GB are",
                bytes >> 30,
                HELD_BYTES >> 30
            ));
        }
        Ok(())
    }
}
