//! What a scenario will cost, before anything runs.

use std::fmt;

use serde::Serialize;
use tributary_common::exchange::ExchangeError;
use tributary_common::job::JobError;
use tributary_common::progress::bytes_words;
use tributary_common::rng::{Purpose, Stream};

use crate::engine::{Timing, duration};
use crate::population::{Quantiles, Spread};
use crate::privacy_plan::{self, PrivacyPlan};
use crate::scenario::{Federation, Scenario, ScenarioError};
use crate::transfer_plan::TransferPlan;

/// The costs of a run. Bytes are those of models, updates and sessions; a real transport adds about one part in ten
/// thousand.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The job's name.
    pub name: String,
    /// The model's architecture.
    pub architecture: &'static str,
    /// Its parameters.
    pub parameters: u64,
    /// Rounds.
    pub rounds: u32,
    /// The partition's scheme.
    pub partition: &'static str,
    /// Clients.
    pub clients: u64,
    /// Clients invited to a round.
    pub invited: u64,
    /// Updates that a round waits for.
    pub cohort: u64,
    /// Training examples per client.
    pub examples: Quantiles,
    /// Different labels per client.
    pub labels: Quantiles,
    /// Mean total variation distance between a client's labels and everybody's, 0 to 1.
    pub label_skew: f64,
    /// Examples held out.
    pub held_out: u64,
    /// SGD steps of one client in one round.
    pub steps: Quantiles,
    /// SGD steps of all invited clients in one round, on average.
    pub steps_per_round: u64,
    /// What one client sends and gets in a round.
    pub transfers: TransferPlan,
    /// Bytes sent to clients in one round.
    pub bytes_down_per_round: u64,
    /// Bytes received from clients in one round, if all that are waited for arrive and no more.
    pub bytes_up_per_round: u64,
    /// Both, over all rounds.
    pub bytes_in_all: u64,
    /// How long the real federation would take, were everybody online and nothing to go wrong but
    /// stragglers that are dropped.
    pub timing: Timing,
    /// What the job promises about the people in the data; absent without `[privacy]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub privacy: Option<PrivacyPlan>,
    /// What will not go as one might expect.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Works a scenario's costs out.
    ///
    /// # Errors
    /// [`ScenarioError::Job`] if the job has no layout.
    pub fn of(scenario: &Scenario, federation: &Federation) -> Result<Self, ScenarioError> {
        let job = &scenario.job;
        let layout =
            job.layout().map_err(|error| ScenarioError::Job { path: scenario.path.clone(), error })?;
        let spread = Spread::of(federation);
        let parameters = layout.parameters() as u64;
        let clients = spread.clients as u64;
        let invited = u64::from(job.invited()).min(clients);
        let cohort = u64::from(job.cohort.size).min(invited);
        let transfers = TransferPlan::of(job).map_err(|error| {
            let error = match error {
                ExchangeError::Job(error) => error,
                other => JobError::Invalid(other.to_string()),
            };
            ScenarioError::Job { path: scenario.path.clone(), error }
        })?;
        let steps: Vec<u64> =
            federation.shares.iter().map(|share| job.train.steps(share.train.len() as u64)).collect();
        let times: Vec<u64> = (federation.shares.iter().zip(&steps).enumerate())
            .map(|(place, (share, steps))| {
                let device = federation.devices.of(&share.name, place);
                let moved = device.download(parameters * 4) + device.upload(transfers.update_bytes);
                device.message() + moved + device.training(*steps, 1.0)
            })
            .collect();
        let all_steps = steps.iter().fold(0u64, |sum, more| sum.saturating_add(*more));
        let steps = Quantiles::of(steps);
        let down = invited * (parameters * 4 + transfers.down());
        let up = cohort * transfers.up();

        let mut warnings = Vec::new();
        if clients < u64::from(job.invited()) {
            let wanted = job.invited();
            warnings.push(format!(
                "a round wants {wanted} clients, but there are {clients}: each round has them all"
            ));
        }
        let deadline = u64::from(job.cohort.deadline_seconds) * 1000;
        let late = times.iter().filter(|time| **time > deadline).count();
        if late > 0 {
            let longest = duration(times.iter().copied().max().unwrap_or_default());
            warnings.push(format!(
                "{late} of {clients} clients take longer for a round than [cohort] deadline_seconds = {} (the slowest \
                 {longest} of virtual time): they will be late",
                job.cohort.deadline_seconds
            ));
        }
        let privacy = PrivacyPlan::of(job)
            .map_err(|error| ScenarioError::Job { path: scenario.path.clone(), error })?;
        warnings.extend(privacy_plan::warnings(job));
        if federation.dataset.test.is_empty() {
            warnings.push("the data hold nothing out: there will be no accuracy on held-out examples".into());
        }
        Ok(Self {
            name: job.name.clone(),
            architecture: job.model.architecture.name(),
            parameters,
            rounds: job.rounds,
            partition: scenario.partition.scheme.name(),
            clients,
            invited,
            cohort,
            examples: spread.examples,
            labels: spread.labels,
            label_skew: spread.label_skew,
            held_out: federation.dataset.test.len() as u64,
            steps,
            steps_per_round: all_steps / clients.max(1) * invited
                + all_steps % clients.max(1) * invited / clients.max(1),
            transfers,
            bytes_down_per_round: down,
            bytes_up_per_round: up,
            bytes_in_all: (down + up).saturating_mul(u64::from(job.rounds)),
            timing: estimate(scenario, &times),
            privacy,
            warnings,
        })
    }
}

/// The rounds that the first cohorts would make, each over when enough of its clients, or the deadline, have passed.
fn estimate(scenario: &Scenario, times: &[u64]) -> Timing {
    /// Enough for the quantiles.
    const ROUNDS: u32 = 200;
    let job = &scenario.job;
    let invited = times.len().min(job.invited() as usize);
    let wanted = invited.min(job.cohort.size as usize);
    let answering =
        invited - scenario.faults.unanswering(u32::try_from(invited).unwrap_or(u32::MAX)) as usize;
    let deadline = u64::from(job.cohort.deadline_seconds) * 1000;
    let (mut rounds, mut by_deadline, mut waited, mut spans) = (Vec::new(), 0u64, 0u64, 0u64);
    for round in 1..=job.rounds.min(ROUNDS) {
        let mut stream = Stream::new(job.seed, Purpose::Cohort, round, "1");
        let cohort = rand::seq::index::sample(&mut stream, times.len(), invited);
        let answering = cohort.into_iter().take(answering).filter_map(|at| times.get(at).copied());
        let mut cohort: Vec<u64> = answering.collect();
        cohort.sort_unstable();
        let last = wanted.checked_sub(1).and_then(|last| cohort.get(last)).copied().unwrap_or(deadline);
        let span = last.min(deadline);
        by_deadline += u64::from(last >= deadline);
        for time in cohort.into_iter().take(wanted).filter(|time| *time <= span) {
            waited += span - time;
            spans += span;
        }
        rounds.push(span);
    }
    let simulated = rounds.len().max(1) as f64;
    let mean = rounds.iter().sum::<u64>() as f64 / simulated;
    Timing {
        total_milliseconds: (mean * f64::from(job.rounds)).round() as u64,
        round_milliseconds: Quantiles::of(rounds),
        ended_by_deadline: by_deadline as f64 / simulated,
        idle_share: waited as f64 / spans.max(1) as f64,
    }
}

struct Range(Quantiles);

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Quantiles { minimum, median, maximum, .. } = self.0;
        if minimum == maximum {
            write!(f, "{median}")
        } else {
            write!(f, "{minimum} to {maximum}, median {median}")
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {}, {} parameters, {} rounds",
            self.name, self.architecture, self.parameters, self.rounds
        )?;
        writeln!(
            f,
            "clients              {} ({}); {} invited to a round, {} waited for",
            self.clients, self.partition, self.invited, self.cohort
        )?;
        writeln!(f, "examples per client  {}; {} held out", Range(self.examples), self.held_out)?;
        writeln!(
            f,
            "labels per client    {}; label skew {:.2} (0 even, 1 apart)",
            Range(self.labels),
            self.label_skew
        )?;
        writeln!(
            f,
            "SGD steps            {} per client and round; about {} per round",
            Range(self.steps),
            self.steps_per_round
        )?;
        write!(
            f,
            "bytes                {} down and {} up per round; {} in all",
            bytes_words(self.bytes_down_per_round),
            bytes_words(self.bytes_up_per_round),
            bytes_words(self.bytes_in_all)
        )?;
        write!(f, "\n{}", self.transfers)?;
        write!(f, "\nvirtual time         about {}", self.timing)?;
        if let Some(privacy) = &self.privacy {
            write!(f, "\n{privacy}")?;
        }
        for warning in &self.warnings {
            write!(f, "\nnote: {warning}")?;
        }
        Ok(())
    }
}
