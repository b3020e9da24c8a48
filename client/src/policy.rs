//! What a node's operator allows: checked against the job file before anything is fetched or trained.

use serde::{Deserialize, Serialize};
use tributary_common::job::Job;
use tributary_common::model::Architecture;

/// The `[policy]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Counts in an evaluation from 1 to below this are hidden, and so is a whole report of fewer examples.
    pub minimum_cell: u64,
    /// Smallest quorum (`[cohort] minimum`) of a job that the node takes part in.
    pub minimum_cohort: u32,
    /// Most SGD steps that one round may ask for; absent: any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum_local_steps: Option<u64>,
    /// Architectures that may be trained; absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_architectures: Option<Vec<Architecture>>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { minimum_cell: 10, minimum_cohort: 1, maximum_local_steps: None, allowed_architectures: None }
    }
}

/// Why a job is against the policy. Stays in the node's log; the coordinator sees the closed reason alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The quorum is too small to hide in.
    #[error("[cohort] minimum = {asked} is below this node's minimum_cohort = {least}")]
    Cohort {
        /// The job's quorum.
        asked: u32,
        /// The policy's.
        least: u32,
    },
    /// Too much work.
    #[error("a round of {asked} SGD steps is above this node's maximum_local_steps = {most}")]
    Steps {
        /// Steps of one round with this node's examples.
        asked: u64,
        /// The policy's limit.
        most: u64,
    },
    /// An architecture that is not on the list.
    #[error("architecture `{}` is not in this node's allowed_architectures", .0.name())]
    Architecture(Architecture),
}

impl Policy {
    /// Checks a job for a node with `examples` training examples.
    ///
    /// # Errors
    /// The first [`Violation`].
    pub fn check(&self, job: &Job, examples: u64) -> Result<(), Violation> {
        if job.cohort.minimum < self.minimum_cohort {
            return Err(Violation::Cohort { asked: job.cohort.minimum, least: self.minimum_cohort });
        }
        let asked = job.train.steps(examples);
        if let Some(most) = self.maximum_local_steps.filter(|most| asked > *most) {
            return Err(Violation::Steps { asked, most });
        }
        let architecture = job.model.architecture;
        if self.allowed_architectures.as_ref().is_some_and(|allowed| !allowed.contains(&architecture)) {
            return Err(Violation::Architecture(architecture));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "name = 'j'\nseed = 1\nrounds = 2\n\
        [model]\narchitecture = 'logistic'\ninputs = [2]\nclasses = 2\n\
        [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_epochs = 2\nbatch_size = 10\n\
        [cohort]\nsize = 4\nminimum = 3\n";

    #[test]
    fn each_rule_refuses_and_says_which() {
        let job = Job::parse(JOB).unwrap();
        let check = |toml: &str, examples| {
            let policy: Policy = toml::from_str(toml).unwrap();
            policy.check(&job, examples).map_err(|violation| violation.to_string())
        };
        assert_eq!(check("", 1_000_000), Ok(()));
        assert_eq!(check("minimum_cohort = 3", 5), Ok(()));
        assert!(check("minimum_cohort = 4", 5).unwrap_err().contains("minimum = 3 is below"));
        assert_eq!(check("maximum_local_steps = 4", 20), Ok(()));
        assert!(check("maximum_local_steps = 4", 21).unwrap_err().contains("6 SGD steps"));
        assert_eq!(check("allowed_architectures = ['2nn', 'logistic']", 5), Ok(()));
        assert!(check("allowed_architectures = []", 5).unwrap_err().contains("allowed_architectures"));
        assert!(
            check("allowed_architectures = ['sequential']", 5).unwrap_err().contains("`logistic` is not")
        );
    }
}
