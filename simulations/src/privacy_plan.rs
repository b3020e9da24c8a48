//! What a job's `[privacy]` costs and promises, before anything runs.

use std::fmt;

use serde::Serialize;
use tributary_common::job::{Job, JobError, PrivacyUnit};
use tributary_common::privacy::accounting::filter::default_order;
use tributary_common::privacy::accounting::{self, Accountant};
use tributary_common::privacy::distributed;

/// Noise per update coordinate above this share of a clip norm's makes a model of noise.
const CLIENT_NOISE_SHARE: f64 = 0.5;

/// The two accounts of a job, and what would change them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrivacyPlan {
    /// The promise in one line.
    pub promise: String,
    /// ε of the whole job: what is checked against `max_epsilon`, the smaller of both accountants.
    pub epsilon: f64,
    /// The same by the Rényi accountant.
    pub epsilon_rdp: f64,
    /// Noise in shares: ε if every other participant is dishonest; absent where each client's noise is its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon_alone: Option<f64>,
    /// Noise in shares: how many of the survivors may be dishonest for `epsilon` to hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub colluders: Option<u32>,
    /// The job's `max_epsilon`.
    pub max_epsilon: f64,
    /// What a node's account charges for the whole job: the cap, at the account's order, that has just room for it.
    /// Jobs chosen one after another add up there, so it is above the job's own figure.
    pub account_epsilon: f64,
    /// The Rényi order of that account.
    pub account_order: f64,
    /// The smallest noise multiplier with which the job stays within `max_epsilon`; absent if it cannot be said.
    pub noise_multiplier_for_max_epsilon: Option<f64>,
    /// How many more rounds `max_epsilon` would allow.
    pub rounds_left: u32,
    /// Client level: standard deviation of the noise on the mean update, per clip norm.
    pub noise_on_the_mean: Option<f64>,
}

impl PrivacyPlan {
    /// The plan of a job; `None` without `[privacy]`.
    ///
    /// # Errors
    /// A job that costs more than its `max_epsilon`: one line that says how much.
    pub fn of(job: &Job) -> Result<Option<Self>, JobError> {
        let Some(privacy) = &job.privacy else { return Ok(None) };
        let invalid = |error: &dyn fmt::Display| JobError::Invalid(format!("[privacy] {error}"));
        let (delta, unit, most) = (privacy.delta, privacy.unit(false), privacy.max_epsilon);
        let at = |rounds: u32, accountant| {
            let epsilon = accounting::epsilon(&job.events(rounds), delta, unit, accountant);
            epsilon.map(|guarantee| guarantee.epsilon).map_err(|error| invalid(&error))
        };
        let epsilon = at(job.rounds, Accountant::Best)?;
        let (sampling_rate, steps) = match job.round_events().first() {
            Some(event) => (event.sampling_rate, event.count.saturating_mul(u64::from(job.rounds))),
            None => return Ok(None),
        };
        // Noised metrics take a part of the budget that this figure does not know.
        let enough = if privacy.metrics_noise.is_some() {
            None
        } else if let Some(plan) = job.noise_plan()? {
            let rounds = u64::from(job.rounds);
            distributed::noise_multiplier_for(most, delta, sampling_rate, rounds, &plan.requirements).ok()
        } else {
            accounting::noise_multiplier_for(most, delta, sampling_rate, steps, unit, Accountant::Best).ok()
        };
        if epsilon > most {
            let advice = match enough {
                Some(noise) => format!("noise_multiplier = {noise:.4} would do"),
                None => "raise noise_multiplier or metrics_noise".to_owned(),
            };
            let fewer = rounds_within(job, most, &at)?;
            return Err(invalid(&format!(
                "{} rounds cost ε = {epsilon:.4} at δ = {delta}, more than max_epsilon = {most}: {advice}, or rounds = {fewer}",
                job.rounds
            )));
        }
        let Some(promise) = job.promise()? else { return Ok(None) };
        let epsilon_rdp = at(job.rounds, Accountant::Rdp)?;
        let account_order = default_order(epsilon_rdp.max(0.01), delta).map_err(|error| invalid(&error))?;
        let spent = accounting::rdp::composed(&job.events(job.rounds), account_order);
        let colluders =
            job.secure_aggregation.as_ref().filter(|_| job.is_distributed()).map(|masks| masks.colluders);
        let alone = colluders.map(|_| distributed::guarantees(&job.events(job.rounds), delta, unit));
        let alone = alone.transpose().map_err(|error| invalid(&error))?;
        Ok(Some(Self {
            promise,
            epsilon,
            epsilon_rdp,
            epsilon_alone: alone.map(|(_, alone)| alone.epsilon),
            colluders,
            max_epsilon: most,
            account_epsilon: accounting::rdp::epsilon_at(spent, delta, account_order),
            account_order,
            noise_multiplier_for_max_epsilon: enough,
            rounds_left: rounds_within(job, most, &at)?.saturating_sub(job.rounds),
            noise_on_the_mean: noise_on_the_mean(job),
        }))
    }
}

/// What will not go as one might expect of a job's `[privacy]`; asks no accountant.
pub fn warnings(job: &Job) -> Vec<String> {
    let Some(noise) = noise_on_the_mean(job).filter(|noise| *noise > CLIENT_NOISE_SHARE) else {
        return Vec::new();
    };
    vec![format!(
        "the cohort is too small for this noise: each coordinate of the mean update gets noise of {noise:.2} clip \
         norms, where the whole update has at most one; expect a model of noise. With few hospitals protect examples \
         (unit = \"example\") instead"
    )]
}

/// Client level: standard deviation of the noise on the mean update, per clip norm.
fn noise_on_the_mean(job: &Job) -> Option<f64> {
    let privacy = job.privacy.as_ref().filter(|privacy| privacy.unit == PrivacyUnit::Client)?;
    Some(privacy.noise_multiplier / f64::from(job.cohort.size.max(1)))
}

/// Most rounds of the job that cost at most `most`.
fn rounds_within(
    job: &Job,
    most: f64,
    at: &impl Fn(u32, Accountant) -> Result<f64, JobError>,
) -> Result<u32, JobError> {
    let fits = |rounds: u32| at(rounds, Accountant::Best).map(|epsilon| epsilon <= most);
    let (mut low, mut high) = (0, job.rounds.max(1));
    while fits(high)? {
        if high >= tributary_common::limits::ROUNDS {
            return Ok(high);
        }
        (low, high) = (high, high.saturating_mul(2).min(tributary_common::limits::ROUNDS));
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(low)
}

impl fmt::Display for PrivacyPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "privacy              {}", self.promise)?;
        write!(
            f,
            "                     the job's own limit: ε = {:.4} of max_epsilon = {} ({:.4} by the Rényi accountant alone); {} \
             more rounds would fit",
            self.epsilon, self.max_epsilon, self.epsilon_rdp, self.rounds_left
        )?;
        if let (Some(alone), Some(colluders)) = (self.epsilon_alone, self.colluders) {
            write!(
                f,
                "\n                     noise in shares: ε = {:.4} with at most {colluders} dishonest survivors; if everybody else is \
                 dishonest, ε = {alone:.4}: the figure to name where peers are not pinned",
                self.epsilon
            )?;
        }
        if let Some(noise) = self.noise_multiplier_for_max_epsilon {
            write!(f, "\n                     noise_multiplier = {noise:.4} is the least for max_epsilon")?;
        }
        write!(
            f,
            "\n                     a node's account is charged as for ε = {:.4} at order {:.2}: jobs add up there, and an account \
             with a smaller cap refuses this one",
            self.account_epsilon, self.account_order
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "name = 'heart'\nseed = 1\nrounds = 30\n\
        [model]\narchitecture = 'logistic'\ninputs = [13]\nclasses = 2\n\
        [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_steps = 10\nsampling_rate = 0.05\n\
        [cohort]\nsize = 4\nminimum = 3\n\
        [privacy]\nunit = 'example'\nmechanism = 'dp-sgd'\nnoise_multiplier = 1.6\nclip_norm = 1.0\ndelta = 1e-5\n\
        max_epsilon = 3.0\n";

    /// The sample job of correction 1: ε = 2.9 by RDP, 2.6 by PLD; and pitfall 14: no ε without what it means.
    #[test]
    fn a_plan_says_both_figures_and_what_they_mean() {
        let plan = PrivacyPlan::of(&Job::parse(JOB).unwrap()).unwrap().unwrap();
        assert!((plan.epsilon - 2.6).abs() < 0.1 && (plan.epsilon_rdp - 2.9).abs() < 0.1, "{plan:?}");
        assert!(plan.account_epsilon >= plan.epsilon_rdp - 1e-9 && plan.account_epsilon < 3.1);
        let noise = plan.noise_multiplier_for_max_epsilon.unwrap();
        assert!((1.4..1.6).contains(&noise), "{noise}");
        assert!(plan.rounds_left > 0);
        let text = plan.to_string();
        for word in
            ["δ = 0.00001", "one example", "more or less", "sampling rate 0.05", "300 steps", "grid step"]
        {
            assert!(text.contains(word), "{word}: {text}");
        }
        let more = JOB.replace("rounds = 30", &format!("rounds = {}", 30 + plan.rounds_left + 1));
        let error = PrivacyPlan::of(&Job::parse(&more).unwrap()).unwrap_err().to_string();
        assert!(
            error.contains("would do") && error.contains(&format!("rounds = {}", 30 + plan.rounds_left)),
            "{error}"
        );
    }

    #[test]
    fn a_cohort_that_is_too_small_for_its_noise_is_told_before_the_run() {
        let client = JOB
            .replace("'example'", "'client'")
            .replace("'dp-sgd'", "'gaussian'")
            .replace("sampling_rate = 0.05", "batch_size = 10")
            .replace("noise_multiplier = 1.6", "noise_multiplier = 12.0");
        let told = |job: &str| warnings(&Job::parse(job).unwrap());
        assert!(told(&client)[0].contains("cohort is too small"));
        let plan = PrivacyPlan::of(&Job::parse(&client).unwrap()).unwrap().unwrap();
        assert_eq!(plan.noise_on_the_mean, Some(3.0));
        let large = client.replace("size = 4", "size = 1000");
        assert!(told(&large).is_empty());
    }
}
