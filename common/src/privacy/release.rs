//! The closed list of what leaves a node about its data, and what protects each: nothing else may be sent.

use crate::job::{Job, Mechanism, MetricsRelease};

/// A kind of value that leaves a node. Whoever adds a message to the protocol adds a line here, and says what
/// protects it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// The change of the model.
    Update,
    /// The update's weight in the average.
    Weight,
    /// Counts over the node's own test examples.
    Metrics,
    /// Why the node does not take part: one of a closed list of constants.
    Reason,
    /// The signed head of its ledger, as far as it concerns the coordinator: a hash over salted records, none of
    /// which depends on data.
    LedgerHead,
}

/// What stands between a release and the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Nothing: the job promises nothing.
    Nothing,
    /// The node's own noise, which the job's events pay for.
    Noise,
    /// Nothing against the coordinator, which is trusted to add noise before anybody else sees what follows from it.
    TrustedCoordinator,
    /// It is a constant that was public before: declared by the operator, or of a closed list.
    PublicConstant,
    /// It is computed from examples that the operator declared public.
    PublicData,
    /// It is not sent.
    Withheld,
}

impl Release {
    /// What protects the release in a job, at a node whose test examples are declared public, or not.
    pub fn protection(self, job: &Job, public_test: bool) -> Protection {
        let Some(privacy) = &job.privacy else { return Protection::Nothing };
        match (self, privacy.mechanism, privacy.metrics) {
            (Release::Update, Mechanism::DpSgd | Mechanism::Distributed, _) => Protection::Noise,
            (Release::Update, Mechanism::Gaussian, _) => Protection::TrustedCoordinator,
            (Release::Weight | Release::Reason | Release::LedgerHead, _, _) => Protection::PublicConstant,
            (Release::Metrics, _, _) if public_test => Protection::PublicData,
            (Release::Metrics, _, MetricsRelease::Noised) => Protection::Noise,
            (Release::Metrics, _, MetricsRelease::None) => Protection::Withheld,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "name = 'j'\nseed = 1\nrounds = 2\n\
        [model]\narchitecture = 'logistic'\ninputs = [1]\nclasses = 2\n\
        [cohort]\nsize = 4\nminimum = 2\n[evaluation]\nfederated = true\n\
        [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_steps = 2\n";
    const EXAMPLE: &str = "sampling_rate = 0.1\n[privacy]\nunit = 'example'\nmechanism = 'dp-sgd'\n\
        noise_multiplier = 2.0\nclip_norm = 5.0\ndelta = 1e-5\nmax_epsilon = 100.0\n";

    /// Correction 2: with privacy no metric over a node's data leaves it as it is.
    #[test]
    fn every_release_is_protected_where_the_job_promises_something() {
        let of = |end: &str, public_test| {
            let job = Job::parse(&format!("{JOB}{end}")).unwrap();
            [Release::Update, Release::Weight, Release::Metrics, Release::Reason, Release::LedgerHead]
                .map(|release| release.protection(&job, public_test))
        };
        use Protection::*;
        let constant = PublicConstant;
        assert_eq!(of("batch_size = 4\n", false), [Nothing; 5]);
        assert_eq!(of(EXAMPLE, false), [Noise, constant, Withheld, constant, constant]);
        assert_eq!(of(EXAMPLE, true), [Noise, constant, PublicData, constant, constant]);
        let noised = format!("{EXAMPLE}metrics = 'noised'\nmetrics_noise = 20.0\n");
        assert_eq!(of(&noised, false), [Noise, constant, Noise, constant, constant]);
        let client = EXAMPLE.replace("sampling_rate = 0.1", "batch_size = 4");
        let client = client.replace("'example'", "'client'").replace("'dp-sgd'", "'gaussian'");
        assert_eq!(of(&client, false), [TrustedCoordinator, constant, Withheld, constant, constant]);
    }
}
