//! What a node's operator allows: checked against the job file before anything is fetched or trained.

use serde::{Deserialize, Serialize};
use tributary_common::document::Schema;
use tributary_common::job::{Job, Mechanism, PrivacyUnit};
use tributary_common::model::Architecture;

/// Whom a job protects, as a policy names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PermittedUnit {
    /// Nobody: a job without `[privacy]`.
    None,
    /// Rows, or persons where the data are grouped.
    Example,
    /// Whole clients.
    Client,
}

impl PermittedUnit {
    fn of(job: &Job) -> Self {
        match job.privacy.as_ref().map(|privacy| privacy.unit) {
            None => PermittedUnit::None,
            Some(PrivacyUnit::Example) => PermittedUnit::Example,
            Some(PrivacyUnit::Client) => PermittedUnit::Client,
        }
    }

    fn name(self) -> &'static str {
        match self {
            PermittedUnit::None => "none",
            PermittedUnit::Example => "example",
            PermittedUnit::Client => "client",
        }
    }
}

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
    /// Units of privacy that a job may have; absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_units: Option<Vec<PermittedUnit>>,
    /// Mechanisms that a job may have; absent: all, `gaussian` only with `trust_coordinator_noise`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_mechanisms: Option<Vec<Mechanism>>,
    /// Smallest noise multiplier of a job with `[privacy]`.
    pub minimum_noise_multiplier: f64,
    /// Largest ε that a whole job may cost; absent: the account's cap alone decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum_job_epsilon: Option<f64>,
    /// Largest δ of a job's claim.
    pub maximum_delta: f64,
    /// Whether the coordinator is believed to add the noise of `mechanism = "gaussian"`: against it there is none.
    pub trust_coordinator_noise: bool,
    /// Whether a job without `[privacy]` may use data whose account has a cap: it is then written down, and every
    /// later report says ε = ∞.
    pub allow_unbounded_release: bool,
    /// Most rounds of one job that may be paid for and then abandoned; absent: any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum_abandoned_rounds: Option<u32>,
}

/// The keys of `[policy]`.
pub const SCHEMA: Schema = Schema {
    keys: &[
        "minimum_cell",
        "minimum_cohort",
        "maximum_local_steps",
        "allowed_architectures",
        "allowed_units",
        "allowed_mechanisms",
        "minimum_noise_multiplier",
        "maximum_job_epsilon",
        "maximum_delta",
        "trust_coordinator_noise",
        "allow_unbounded_release",
        "maximum_abandoned_rounds",
    ],
    tables: &[],
};

impl Default for Policy {
    fn default() -> Self {
        Self {
            minimum_cell: 10,
            minimum_cohort: 1,
            maximum_local_steps: None,
            allowed_architectures: None,
            allowed_units: None,
            allowed_mechanisms: None,
            minimum_noise_multiplier: 0.0,
            maximum_job_epsilon: None,
            maximum_delta: 1.0,
            trust_coordinator_noise: false,
            allow_unbounded_release: false,
            maximum_abandoned_rounds: None,
        }
    }
}

/// Why a job is against the policy. Stays in the node's log; the coordinator sees the closed reason alone.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
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
    /// A unit that is not on the list.
    #[error("[privacy] unit = \"{0}\" is not in this node's allowed_units")]
    Unit(&'static str),
    /// A mechanism that is not on the list.
    #[error("[privacy] mechanism = \"{0}\" is not in this node's allowed_mechanisms")]
    Mechanism(&'static str),
    /// Noise that somebody else is to add.
    #[error(
        "[privacy] mechanism = \"gaussian\" leaves the noise to the coordinator, which sees the updates: allow it with \
         trust_coordinator_noise = true"
    )]
    CoordinatorNoise,
    /// Too little noise.
    #[error("[privacy] noise_multiplier = {asked} is below this node's minimum_noise_multiplier = {least}")]
    Noise {
        /// The job's.
        asked: f64,
        /// The policy's.
        least: f64,
    },
    /// A claim that fails too often.
    #[error("[privacy] delta = {asked} is above this node's maximum_delta = {most}")]
    Delta {
        /// The job's.
        asked: f64,
        /// The policy's.
        most: f64,
    },
    /// A job that costs too much.
    #[error("the job's [privacy] max_epsilon = {asked} is above this node's maximum_job_epsilon = {most}")]
    JobEpsilon {
        /// The job's.
        asked: f64,
        /// The policy's.
        most: f64,
    },
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
        self.check_privacy(job)
    }

    fn check_privacy(&self, job: &Job) -> Result<(), Violation> {
        let unit = PermittedUnit::of(job);
        if self.allowed_units.as_ref().is_some_and(|allowed| !allowed.contains(&unit)) {
            return Err(Violation::Unit(unit.name()));
        }
        let Some(privacy) = &job.privacy else { return Ok(()) };
        if self.allowed_mechanisms.as_ref().is_some_and(|allowed| !allowed.contains(&privacy.mechanism)) {
            return Err(Violation::Mechanism(privacy.mechanism.name()));
        }
        if privacy.mechanism == Mechanism::Gaussian && !self.trust_coordinator_noise {
            return Err(Violation::CoordinatorNoise);
        }
        let (asked, least) = (privacy.noise_multiplier, self.minimum_noise_multiplier);
        if asked < least {
            return Err(Violation::Noise { asked, least });
        }
        let (asked, most) = (privacy.delta, self.maximum_delta);
        if asked > most {
            return Err(Violation::Delta { asked, most });
        }
        let asked = privacy.max_epsilon;
        if let Some(most) = self.maximum_job_epsilon.filter(|most| asked > *most) {
            return Err(Violation::JobEpsilon { asked, most });
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
        assert!(check("allowed_units = ['example']", 5).unwrap_err().contains("unit = \"none\""));
        let example = "[privacy]\nunit = 'example'\nmechanism = 'dp-sgd'\nnoise_multiplier = 1.2\nclip_norm = 1.0\n\
                       delta = 1e-5\nmax_epsilon = 3.0\n";
        let client = example.replace("'example'", "'client'").replace("'dp-sgd'", "'gaussian'");
        let steps = JOB.replace("local_epochs = 2\nbatch_size = 10", "local_steps = 4\nsampling_rate = 0.1");
        let (example, client) = (format!("{steps}{example}"), format!("{JOB}{client}"));
        for (job, policy, words) in [
            (&example, "", None),
            (&example, "maximum_local_steps = 3", Some("4 SGD steps")),
            (&example, "allowed_units = ['client', 'none']", Some("allowed_units")),
            (&example, "allowed_mechanisms = ['gaussian']", Some("\"dp-sgd\" is not")),
            (&example, "minimum_noise_multiplier = 1.3", Some("noise_multiplier = 1.2 is below")),
            (&example, "maximum_delta = 1e-6", Some("delta = 0.00001 is above")),
            (&example, "maximum_job_epsilon = 2.0", Some("max_epsilon = 3 is above")),
            (&client, "", Some("trust_coordinator_noise")),
            (&client, "trust_coordinator_noise = true", None),
            (&client, "trust_coordinator_noise = true\nallowed_mechanisms = ['dp-sgd']", Some("gaussian")),
        ] {
            let job = Job::parse(job).unwrap();
            let found = toml::from_str::<Policy>(policy).unwrap().check(&job, 40);
            match words {
                None => assert_eq!(found, Ok(()), "{policy}"),
                Some(words) => assert!(found.unwrap_err().to_string().contains(words), "{policy}"),
            }
        }
    }
}
