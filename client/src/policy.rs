//! What a node's operator allows: checked against the job file before anything is fetched or trained.

use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;
use tributary_common::document::Schema;
use tributary_common::job::{Job, Mechanism, PrivacyUnit};
use tributary_common::model::Architecture;
use tributary_common::secagg::parameters::MINIMUM_SURVIVORS;
use tributary_common::secagg::peers::ClientPolicy;

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
    /// Whether a job must have `[secure_aggregation]`.
    pub require_masks: bool,
    /// Fewest survivors of a masked round, 3 or more; 5 or more are recommended without `[privacy]`.
    pub minimum_survivors: u16,
    /// Fewest pinned peers among the survivors of a masked round, this node not counted. With 0 the coordinator, which
    /// enrolled everybody, could be everybody else.
    pub minimum_pinned_survivors: u16,
    /// Largest share of the clients that shared keys that may be said to have dropped out, from 0 to below 1.
    pub maximum_dropout: f64,
    /// Whether all clients that began a masked round must be in its sum, so that no two sums differ by one client; absent:
    /// where a job has no `[privacy]` and fewer than 10 began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fixed_cohort: Option<bool>,
    /// Fewest training examples that an update is made from.
    pub minimum_examples_per_update: u64,
    /// Smallest batch, with `[privacy]` smallest expected batch, that one gradient is taken over.
    pub minimum_local_batch: u32,
    /// BLAKE3 digests of the models that a run may start from; absent: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub approved_initial_models: Option<Vec<Digest>>,
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
        "require_masks",
        "minimum_survivors",
        "minimum_pinned_survivors",
        "maximum_dropout",
        "fixed_cohort",
        "minimum_examples_per_update",
        "minimum_local_batch",
        "approved_initial_models",
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
            require_masks: false,
            minimum_survivors: MINIMUM_SURVIVORS,
            minimum_pinned_survivors: 0,
            maximum_dropout: 0.34,
            fixed_cohort: None,
            minimum_examples_per_update: 0,
            minimum_local_batch: 0,
            approved_initial_models: None,
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
    /// Updates that the coordinator would see.
    #[error("the job has no [secure_aggregation], and this node's policy says require_masks = true")]
    Unmasked,
    /// A sum of too few.
    #[error("[cohort] minimum = {asked} is below this node's minimum_survivors = {least} of a masked round")]
    Survivors {
        /// The job's fewest survivors.
        asked: u32,
        /// The policy's.
        least: u16,
    },
    /// An update that few examples decide.
    #[error(
        "an update is made from {asked} training examples, below this node's minimum_examples_per_update = {least}"
    )]
    Examples {
        /// Examples that the job's steps see at most.
        asked: u64,
        /// The policy's.
        least: u64,
    },
    /// A gradient that few examples decide.
    #[error("a gradient is taken over {asked} examples, below this node's minimum_local_batch = {least}")]
    Batch {
        /// The job's batch.
        asked: u64,
        /// The policy's.
        least: u32,
    },
    /// Weights that somebody may have crafted.
    #[error("the run starts from model {0}, which is not in this node's approved_initial_models")]
    InitialModel(Digest),
}

impl Policy {
    /// Checks the values.
    ///
    /// # Errors
    /// One line that names the key.
    pub fn check_values(&self) -> Result<(), String> {
        if self.minimum_survivors < MINIMUM_SURVIVORS {
            return Err(format!(
                "[policy] minimum_survivors = {}: {MINIMUM_SURVIVORS} or more, for a sum of fewer hides nobody",
                self.minimum_survivors
            ));
        }
        if !(0.0..1.0).contains(&self.maximum_dropout) {
            return Err(format!(
                "[policy] maximum_dropout = {}: 0 to below 1 is possible",
                self.maximum_dropout
            ));
        }
        Ok(())
    }

    /// What a secure-aggregation session must keep to.
    pub fn of_sessions(&self) -> ClientPolicy {
        ClientPolicy {
            minimum_survivors: self.minimum_survivors,
            minimum_pinned_survivors: self.minimum_pinned_survivors,
            maximum_dropout_per_million: (self.maximum_dropout * 1e6).round() as u32,
            // Absent, it depends on the roster, which the session does not know when it begins.
            fixed_cohort: self.fixed_cohort == Some(true),
            ..ClientPolicy::default()
        }
    }

    /// Whether all `clients` that began a masked round of `job` must be in its sum.
    pub fn wants_fixed_cohort(&self, job: &Job, clients: u16) -> bool {
        self.fixed_cohort
            .unwrap_or_else(|| ClientPolicy::fixed_cohort_is_advised(clients, job.privacy.is_some()))
    }

    /// Checks the model that a run starts from. The models of later rounds follow from what clients sent: only the
    /// coordinator can say whether they do.
    ///
    /// # Errors
    /// [`Violation::InitialModel`].
    pub fn check_initial_model(&self, model: Digest) -> Result<(), Violation> {
        match &self.approved_initial_models {
            Some(approved) if !approved.contains(&model) => Err(Violation::InitialModel(model)),
            _ => Ok(()),
        }
    }

    /// Checks a job for a node with `examples` training examples: with privacy for examples, as many as are declared.
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
        match &job.secure_aggregation {
            None if self.require_masks => return Err(Violation::Unmasked),
            Some(_) if job.cohort.minimum < u32::from(self.minimum_survivors) => {
                let (asked, least) = (job.cohort.minimum, self.minimum_survivors);
                return Err(Violation::Survivors { asked, least });
            }
            _ => {}
        }
        self.check_batch(job, examples)?;
        self.check_privacy(job)
    }

    /// Whether what the job trains on is enough to hide one example in (a job that isolates a patient asks for one step
    /// of a batch of one).
    fn check_batch(&self, job: &Job, examples: u64) -> Result<(), Violation> {
        let expected = job.privacy.as_ref().and_then(|privacy| privacy.expected_batch_size);
        let batch = match (expected, job.train.sampling_rate) {
            // Of all clients together.
            (Some(expected), _) => (expected / f64::from(job.cohort.size.max(1))) as u64,
            (None, Some(rate)) => (rate * examples as f64) as u64,
            (None, None) => u64::from(job.train.batch_size),
        };
        let least = self.minimum_local_batch;
        if batch < u64::from(least) {
            return Err(Violation::Batch { asked: batch, least });
        }
        let seen = batch.saturating_mul(job.train.steps(examples));
        let asked = if expected.is_some() { seen } else { seen.min(examples) };
        let least = self.minimum_examples_per_update;
        if asked < least { Err(Violation::Examples { asked, least }) } else { Ok(()) }
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
    fn masked_jobs_and_small_batches_have_rules_of_their_own() {
        let check = |changes: &str, policy: &str, examples| {
            let text = JOB.replace("local_epochs = 2", "local_steps = 5");
            let mut table = tributary_common::document::parse(&text).unwrap();
            for change in changes.split_whitespace() {
                tributary_common::document::set(&mut table, change).unwrap();
            }
            let job = Job::from_table(table).unwrap();
            let policy: Policy = toml::from_str(policy).unwrap();
            policy.check(&job, examples).map_err(|violation| violation.to_string())
        };
        let masks = "secure_aggregation.enabled=true";
        let private = "train.local_steps=1 train.batch_size=0 train.sampling_rate=0.1 privacy.unit=example \
                       privacy.mechanism=dp-sgd privacy.noise_multiplier=1.0 privacy.clip_norm=1.0 \
                       privacy.delta=1e-5 privacy.max_epsilon=9.0";
        let steps = private.replace("train.local_steps=1", "train.local_steps=4");
        let distributed = private.replace("dp-sgd", "distributed");
        let distributed = format!("{distributed} {masks} privacy.expected_batch_size=40");
        let one = "train.local_steps=1 train.batch_size=1";
        for (changes, policy, examples, words) in [
            ("", "require_masks = true", 50, Some("require_masks")),
            (masks, "require_masks = true", 50, None),
            (
                masks,
                "minimum_survivors = 4",
                50,
                Some("minimum = 3 is below this node's minimum_survivors = 4"),
            ),
            ("", "minimum_survivors = 4", 50, None),
            (one, "minimum_local_batch = 10", 50, Some("over 1 examples")),
            ("", "minimum_local_batch = 10", 50, None),
            (
                "train.local_steps=2",
                "minimum_examples_per_update = 21",
                50,
                Some("from 20 training examples"),
            ),
            ("train.local_steps=3", "minimum_examples_per_update = 21", 50, None),
            ("", "minimum_examples_per_update = 21", 20, Some("from 20 training examples")),
            (private, "minimum_local_batch = 6", 50, Some("over 5 examples")),
            (private, "minimum_local_batch = 5", 50, None),
            (&steps, "minimum_examples_per_update = 21", 50, Some("from 20 training examples")),
            (&distributed, "minimum_local_batch = 11", 0, Some("over 10 examples")),
            (&distributed, "minimum_local_batch = 10\nminimum_examples_per_update = 10", 0, None),
        ] {
            let found = check(changes, policy, examples);
            match words {
                None => assert_eq!(found, Ok(()), "{changes}: {policy}"),
                Some(words) => assert!(found.clone().unwrap_err().contains(words), "{policy}: {found:?}"),
            }
        }
    }

    #[test]
    fn the_first_model_is_one_of_those_approved() {
        let (approved, other) = (Digest::of(b"approved"), Digest::of(b"crafted"));
        let policy: Policy = toml::from_str(&format!("approved_initial_models = ['{approved}']")).unwrap();
        assert_eq!(policy.check_initial_model(approved), Ok(()));
        assert_eq!(policy.check_initial_model(other), Err(Violation::InitialModel(other)));
        assert_eq!(Policy::default().check_initial_model(other), Ok(()));
    }

    #[test]
    fn sessions_keep_to_the_policy_and_small_open_cohorts_are_fixed() {
        let policy = |text: &str| toml::from_str::<Policy>(text).unwrap();
        let all = policy(
            "minimum_survivors = 5\nminimum_pinned_survivors = 2\nmaximum_dropout = 0.2\nfixed_cohort = true",
        );
        let found = all.of_sessions();
        assert_eq!((found.minimum_survivors, found.minimum_pinned_survivors), (5, 2));
        assert_eq!((found.maximum_dropout_per_million, found.fixed_cohort), (200_000, true));
        assert!(policy("minimum_survivors = 2").check_values().unwrap_err().contains("3 or more"));
        assert!(policy("maximum_dropout = 1.0").check_values().unwrap_err().contains("below 1"));
        assert_eq!(all.check_values(), Ok(()));
        let open = Job::parse(JOB).unwrap();
        let private = Job::parse(&format!(
            "{JOB}[privacy]\nunit = 'client'\nmechanism = 'gaussian'\nnoise_multiplier = 1.0\nclip_norm = 1.0\n\
             delta = 1e-5\nmax_epsilon = 9.0\n"
        ));
        let private = private.unwrap();
        assert!(policy("").wants_fixed_cohort(&open, 9) && !policy("").wants_fixed_cohort(&open, 10));
        assert!(!policy("").wants_fixed_cohort(&private, 4));
        assert!(!policy("fixed_cohort = false").wants_fixed_cohort(&open, 4));
        assert!(policy("fixed_cohort = true").wants_fixed_cohort(&private, 200));
    }

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
