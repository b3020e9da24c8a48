//! The coordinator's privacy ledgers, a file per run: what each run promised, and which payloads are in its models.

use std::fs;
use std::io;
use std::path::PathBuf;

use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::{Job, JobError, Mechanism};
use tributary_common::ledger::book::{BookError, RunBook};
use tributary_common::ledger::head::{LedgerKey, SignedHead};
use tributary_common::ledger::hex::Hex;
use tributary_common::ledger::record::{Claim, CoordinatorId, JobKey, Participant};
use tributary_common::ledger::run::RunOpening;
use tributary_common::record::{EvaluationRecord, Metrics, Participation, RoundOutcome, RoundRecord};
use tributary_common::time::Time;

/// Why a run's ledger cannot be used. After it the run must not go on.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The ledger.
    #[error("the run's ledger: {0}")]
    Book(#[from] BookError),
    /// The folder.
    #[error("{path}: {error}")]
    Folder {
        /// The folder.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// The job promises what it does not keep.
    #[error(transparent)]
    Job(#[from] JobError),
}

/// Opens the ledgers of a coordinator's runs.
#[derive(Debug, Clone)]
pub struct Ledgers {
    dir: PathBuf,
    key: LedgerKey,
    coordinator: CoordinatorId,
    name: NodeName,
}

impl Ledgers {
    /// Ledgers in `dir`, signed with the authority's `key`; `authority_der` is its certificate.
    ///
    /// # Errors
    /// [`LedgerError::Folder`].
    pub fn new(dir: PathBuf, key: LedgerKey, authority_der: &[u8]) -> Result<Self, LedgerError> {
        fs::create_dir_all(&dir)
            .map_err(|error| LedgerError::Folder { path: dir.display().to_string(), error })?;
        let coordinator = CoordinatorId::of(authority_der);
        Ok(Self { dir, key, coordinator, name: NodeName::literal("coordinator") })
    }

    /// Who the coordinator is.
    pub fn coordinator(&self) -> CoordinatorId {
        self.coordinator
    }

    /// The ledger of a run, begun if there is none.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn open(&self, run: RunId, job: &Job, job_toml: &str, now: Time) -> Result<Ledger, LedgerError> {
        Ledger::begin(self.book(run, now)?, self.coordinator, run, job, job_toml, now)
    }

    fn book(&self, run: RunId, now: Time) -> Result<RunBook, LedgerError> {
        let path = self.dir.join(format!("{run}.jsonl"));
        let (book, torn) = RunBook::open(&path, &self.name, self.key.clone(), now)?;
        if let Some(torn) = torn {
            tracing::warn!(%run, "the run's ledger ended in a record that a crash tore: {} bytes were cut off", torn.bytes);
        }
        Ok(book)
    }

    /// The export of a run's ledger that is not open.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn export(&self, run: RunId, now: Time) -> Result<String, LedgerError> {
        Ok(self.book(run, now)?.export()?)
    }
}

/// The ledger of a run in use.
#[derive(Debug)]
pub struct Ledger(RunBook);

impl Ledger {
    /// The ledger of a simulated run, in memory: what a coordinator's would say. Its key is made for it and forgotten.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn in_memory(run: RunId, job: &Job, job_toml: &str, now: Time) -> Result<Self, LedgerError> {
        let seed = Hex::random().map_err(BookError::Random)?;
        let key = LedgerKey::from_seed(seed.0);
        let coordinator = CoordinatorId::of(&key.public().0.0);
        let book = RunBook::in_memory(&NodeName::literal("simulator"), key, now)?;
        Self::begin(book, coordinator, run, job, job_toml, now)
    }

    fn begin(
        mut book: RunBook,
        coordinator: CoordinatorId,
        run: RunId,
        job: &Job,
        job_toml: &str,
        now: Time,
    ) -> Result<Self, LedgerError> {
        let guarantee = job.guarantee()?;
        let privacy = job.privacy.as_ref();
        let opening = RunOpening {
            key: JobKey { coordinator, run },
            job: Digest::of(job_toml.as_bytes()),
            // A node's rows may be grouped: that is its own account's affair.
            unit: privacy.map(|privacy| privacy.unit(false)),
            mechanism: privacy.map_or("none", |privacy| privacy.mechanism.name()).into(),
            rounds: job.rounds,
            events: job.round_events(),
            claim: guarantee.map(Claim::from),
        };
        book.open_run(opening, now)?;
        Ok(Ledger(book))
    }

    /// Takes what the store has and the ledger has not: a crash came between the two. Abandoned attempts too, for a
    /// masked round that was lost is followed by the next.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn catch_up(&mut self, rounds: &[RoundRecord], now: Time) -> Result<(), LedgerError> {
        let known = self.0.core().last_attempt();
        rounds
            .iter()
            .filter(|record| (record.round, record.attempt) > known)
            .try_for_each(|record| self.ended(record, now))
    }

    /// Pays for noise that the coordinator adds to the sum of `round`: before the model is stored.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn noised(&mut self, round: u32, job: &Job, now: Time) -> Result<(), LedgerError> {
        Ok(self.0.noise_round(round, job.round_events(), now)?)
    }

    /// An attempt ended, and the store has its record.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn ended(&mut self, record: &RoundRecord, now: Time) -> Result<(), LedgerError> {
        // Without noise of the node's own, a payload's digest would tell of what is in it.
        let noised = |run: &RunOpening| {
            [Mechanism::DpSgd, Mechanism::Distributed].iter().any(|own| own.name() == run.mechanism)
        };
        let noised = self.0.core().run().is_some_and(noised);
        let participants = record.cohort.iter().filter_map(|(node, part)| match part {
            Participation::Accepted { digest, .. } => {
                Some(Participant { node: node.clone(), payload: digest.filter(|_| noised) })
            }
            _ => None,
        });
        let participants = participants.collect();
        let RoundRecord { round, attempt, .. } = *record;
        match &record.outcome {
            RoundOutcome::Published { model } => {
                self.0.publish_round(round, attempt, *model, participants, now)?;
            }
            RoundOutcome::Abandoned { .. } => self.0.abandon_round(round, attempt, participants, now)?,
        }
        Ok(())
    }

    /// The payload that a node sent for `round` in an earlier attempt: a second one is not paid for.
    pub fn payload_of(&self, node: &NodeName, round: u32) -> Option<Digest> {
        self.0.core().payload_of(node, round)
    }

    /// Noised metrics arrived from nodes.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn evaluated(&mut self, record: &EvaluationRecord, now: Time) -> Result<(), LedgerError> {
        let digest = |metrics: &Metrics| Some(Digest::of(&metrics.to_json()));
        let participant = |(node, metrics): (&NodeName, &Metrics)| Participant {
            node: node.clone(),
            payload: digest(metrics),
        };
        let participants: Vec<Participant> =
            record.by_client.iter().filter(|(_, metrics)| metrics.examples > 0).map(participant).collect();
        if participants.is_empty() {
            return Ok(());
        }
        Ok(self.0.receive_metrics(record.round, participants, now)?)
    }

    /// Keeps a head of a node's ledger; `false` if its signature is false.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn witness(&mut self, node: NodeName, head: SignedHead, now: Time) -> Result<bool, LedgerError> {
        Ok(self.0.witness(node, head, now)?)
    }

    /// The run is over.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn over(&mut self, now: Time) -> Result<(), LedgerError> {
        Ok(self.0.end_run(now)?)
    }

    /// The head to show the nodes.
    pub fn head(&self) -> SignedHead {
        self.0.head(tributary_common::ledger::head::View::Whole)
    }

    /// The export.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn export(&self) -> Result<String, LedgerError> {
        Ok(self.0.export()?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use tributary_common::record::Abandonment;

    const JOB: &str = "name = 'j'\nseed = 1\nrounds = 3\n[model]\narchitecture = 'logistic'\ninputs = [4]\nclasses = 2\n\
        [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_steps = 1\nbatch_size = 4\n[cohort]\nsize = 4\n\
        minimum = 3\n[secure_aggregation]\nenabled = true\n";

    fn record(round: u32, attempt: u32, outcome: RoundOutcome) -> RoundRecord {
        let spent = matches!(outcome, RoundOutcome::Abandoned { .. });
        RoundRecord {
            round,
            attempt,
            started: Time(0),
            ended: Time(0),
            eligible: 4,
            cohort: BTreeMap::new(),
            bytes_down: 0,
            bytes_up: 0,
            outcome,
            spent,
            summed: None,
        }
    }

    /// Found by fault simulation: the coordinator died after a lost masked round was in its store and not in its ledger,
    /// and could not publish another round, nor start.
    #[test]
    fn a_lost_round_that_a_crash_kept_from_the_ledger_is_caught_up() {
        let job = Job::parse(JOB).unwrap();
        let mut ledger = Ledger::in_memory(RunId(1), &job, JOB, Time(0)).unwrap();
        let reason = Abandonment::SecureAggregation { detail: "too few".into() };
        let lost = RoundOutcome::Abandoned { reason };
        let published = RoundOutcome::Published { model: Digest([1; 32]) };
        let records = [record(1, 1, lost.clone()), record(2, 2, lost), record(3, 3, published.clone())];
        assert!(ledger.ended(&records[2], Time(0)).is_err(), "a round cannot be left out");
        ledger.catch_up(&records[..2], Time(0)).unwrap();
        ledger.catch_up(&records[..2], Time(0)).unwrap();
        ledger.ended(&records[2], Time(0)).unwrap();
        assert_eq!(ledger.0.core().published(), 3);
        let before = ledger.export().unwrap().lines().count();
        ledger.catch_up(&records, Time(0)).unwrap();
        assert_eq!(ledger.export().unwrap().lines().count(), before, "what is there is not written twice");
    }
}
