//! What a run leaves behind: the record of each round and of each evaluation, and the events that tell of them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::ids::{NodeName, RunId};
use crate::limits::REASON_BYTES;
use crate::time::Time;

/// What a connected node is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Trains on its own data.
    #[default]
    Trainer,
    /// Holds a held-out set and is in no cohort.
    Evaluator,
}

/// Why a node may forget the update that it kept for an attempt at a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dismissal {
    /// The update is in a committed round.
    Published,
    /// The round ended without it.
    NotUsed,
    /// The attempt was abandoned.
    Abandoned,
}

/// Why a node did not contribute: a closed list, so that a reason tells nothing about data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The node's own policy does not allow the job.
    Policy,
    /// The node is at work for another round.
    Busy,
    /// The node's data do not fit the job's model.
    Data,
    /// Local training failed or diverged.
    Training,
    /// The data set's privacy budget, or the job's own limit, does not allow it.
    Budget,
    /// The node is shutting down.
    ShuttingDown,
    /// The node does not understand the job.
    Unsupported,
}

/// What became of one invited client in one attempt at a round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Participation {
    /// Its update is in the sum.
    Accepted {
        /// Digest of the update's bytes as they were received; in a simulation no bytes are.
        digest: Option<Digest>,
        /// Training examples: the update's weight.
        examples: u64,
        /// Bytes of the update.
        bytes: u64,
    },
    /// It declined, with a reason.
    Declined {
        /// Why.
        reason: Reason,
    },
    /// Its update was refused by the coordinator.
    Refused {
        /// Why, in one line.
        detail: String,
    },
    /// It lost its connection and did not come back in time.
    Disconnected,
    /// It was connected, but its update was not there at the deadline.
    Late,
    /// The round had enough updates without it.
    Surplus,
}

/// Why an attempt at a round was abandoned, or a run failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "why", rename_all = "kebab-case")]
pub enum Abandonment {
    /// Fewer updates than the minimum.
    #[error("{accepted} of at least {minimum} updates arrived")]
    BelowMinimum {
        /// Updates accepted.
        accepted: u32,
        /// The job's `cohort.minimum`.
        minimum: u32,
    },
    /// The aggregate cannot be published.
    #[error("the aggregate was not published: {detail}")]
    UnfitModel {
        /// What is wrong with it.
        detail: String,
    },
    /// Masked updates arrived, or keys, and their sum could not be unmasked.
    #[error("secure aggregation did not complete: {detail}")]
    SecureAggregation {
        /// Why.
        detail: String,
    },
    /// The operator stopped the run.
    #[error("the run was stopped")]
    Stopped,
}

/// How an attempt at a round ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum RoundOutcome {
    /// A new model was committed and published.
    Published {
        /// Digest of the new model.
        model: Digest,
    },
    /// The model stayed as it was.
    Abandoned {
        /// Why.
        reason: Abandonment,
    },
}

/// One attempt at one round: who was invited, what came of each, and what came of all.
///
/// With the job, the data and the seed, the accepted sets decide every bit of the models.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundRecord {
    /// The round, from 1.
    pub round: u32,
    /// The attempt at it, from 1.
    pub attempt: u32,
    /// When the cohort was invited.
    pub started: Time,
    /// When the outcome was decided.
    pub ended: Time,
    /// How many clients were eligible.
    pub eligible: u32,
    /// Every invited client.
    pub cohort: BTreeMap<NodeName, Participation>,
    /// Bytes of models sent to the cohort.
    pub bytes_down: u64,
    /// Bytes of updates received, used or not.
    pub bytes_up: u64,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: RoundOutcome,
    /// Whether an abandoned round is not tried again: masked updates were sent for it, and a client sends one alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spent: bool,
    /// What came with the sum of masked updates; absent without masks, and with `[privacy]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summed: Option<Summed>,
}

/// Counts that were summed under the masks with the updates: nobody's own are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summed {
    /// Sum of the weights.
    pub weight: u64,
    /// Training examples.
    pub examples: u64,
    /// Training losses of all examples together, in millionths.
    pub loss_millionths: u64,
}

impl Summed {
    /// Mean training loss per example; `None` without examples.
    pub fn loss(&self) -> Option<f64> {
        (self.examples > 0).then(|| self.loss_millionths as f64 / 1e6 / self.examples as f64)
    }
}

impl RoundRecord {
    /// The clients whose updates are in the sum, by name.
    pub fn accepted(&self) -> impl Iterator<Item = &NodeName> {
        let accepted = |what: &Participation| matches!(what, Participation::Accepted { .. });
        self.cohort.iter().filter(move |(_, what)| accepted(what)).map(|(name, _)| name)
    }

    /// The invited clients whose updates are not in the sum, surplus ones left out.
    pub fn dropped(&self) -> impl Iterator<Item = (&NodeName, &Participation)> {
        let kept =
            |what: &Participation| matches!(what, Participation::Accepted { .. } | Participation::Surplus);
        self.cohort.iter().filter(move |(_, what)| !kept(what))
    }
}

/// Counts of one evaluation over a set of examples.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Metrics {
    /// Examples evaluated.
    pub examples: u64,
    /// Sum of the cross-entropy losses; 0 where losses are not told.
    pub loss_sum: f64,
    /// Examples whose most probable class is their label.
    pub correct: u64,
    /// Confusion counts, `classes × classes`, row = label, column = predicted class, row by row.
    /// `None` where a node's policy hides a small cell; empty where nothing is reported.
    pub confusion: Vec<Option<u64>>,
}

impl Metrics {
    /// Mean loss; `None` without examples, or where losses are not told.
    pub fn loss(&self) -> Option<f64> {
        (self.examples > 0 && self.loss_sum != 0.0).then(|| self.loss_sum / self.examples as f64)
    }

    /// The one form whose digest stands for these counts in a ledger.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default() // numbers alone, so this cannot fail
    }

    /// Share of correct examples, 0 to 1; `None` without examples.
    pub fn accuracy(&self) -> Option<f64> {
        (self.examples > 0).then(|| self.correct as f64 / self.examples as f64)
    }

    /// Adds the counts of another set. Loss sums are floating point: add in the order of the names.
    pub fn add(&mut self, other: &Metrics) {
        self.examples += other.examples;
        self.loss_sum += other.loss_sum;
        self.correct += other.correct;
        if self.confusion.is_empty() {
            self.confusion = other.confusion.clone();
        } else if self.confusion.len() == other.confusion.len() {
            for (cell, more) in self.confusion.iter_mut().zip(&other.confusion) {
                *cell = cell.zip(*more).map(|(a, b)| a + b);
            }
        }
    }

    /// Hides what a small count would tell about single examples: every cell from 1 to below `minimum_cell`,
    /// and the whole report when there are fewer than `minimum_cell` examples.
    pub fn hide_small_cells(&mut self, minimum_cell: u64) {
        if self.examples < minimum_cell {
            *self = Metrics::default();
        }
        for cell in &mut self.confusion {
            *cell = cell.filter(|count| *count == 0 || *count >= minimum_cell);
        }
    }
}

/// What was evaluated after a round.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// The round whose model was evaluated; 0 is the initial model.
    pub round: u32,
    /// On the held-out set, by the nodes in the evaluator role together.
    pub held_out: Option<Metrics>,
    /// On the clients' own test examples, by client; those that reported.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub by_client: BTreeMap<NodeName, Metrics>,
}

impl EvaluationRecord {
    /// The clients' counts together, in the order of their names; `None` when nobody reported.
    pub fn federated(&self) -> Option<Metrics> {
        let mut clients = self.by_client.values().filter(|metrics| metrics.examples > 0);
        let mut sum = clients.next()?.clone();
        clients.for_each(|metrics| sum.add(metrics));
        Some(sum)
    }

    /// The figures for a line of progress: held-out if there are any, else the clients' together.
    pub fn headline(&self) -> Option<Metrics> {
        self.held_out.clone().filter(|metrics| metrics.examples > 0).or_else(|| self.federated())
    }
}

/// How a run stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum RunState {
    /// Waits for the runs before it.
    Queued,
    /// Rounds are running, or wait for clients.
    Running,
    /// All rounds are published.
    Finished,
    /// The operator stopped it.
    Stopped,
    /// It could not go on.
    Failed {
        /// Why.
        reason: Abandonment,
    },
}

impl RunState {
    /// Whether nothing more will happen.
    pub fn is_over(&self) -> bool {
        matches!(self, RunState::Finished | RunState::Stopped | RunState::Failed { .. })
    }
}

/// One thing that happened in a run, for whoever watches it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum RunEvent {
    /// Too few clients are connected for the next round.
    Waiting {
        /// The round that waits, from 1.
        round: u32,
        /// Clients connected.
        connected: u32,
        /// Clients wanted.
        wanted: u32,
    },
    /// A cohort was invited.
    RoundStarted {
        /// The round, from 1.
        round: u32,
        /// The attempt at it, from 1.
        attempt: u32,
        /// Clients invited.
        invited: u32,
    },
    /// An invited client's part is decided: its update arrived, or it dropped out.
    Progress {
        /// The round, from 1.
        round: u32,
        /// Clients whose part is decided.
        decided: u32,
        /// Clients invited.
        invited: u32,
    },
    /// An attempt at a round ended.
    RoundEnded {
        /// Its record.
        record: RoundRecord,
    },
    /// A published model was evaluated.
    Evaluated {
        /// What was measured.
        record: EvaluationRecord,
    },
    /// The run is over.
    Ended {
        /// How it stands.
        state: RunState,
        /// Rounds published.
        rounds: u32,
        /// Digest of the last published model.
        model: Digest,
    },
}

/// What identifies one upload: the same key with the same bytes is the same upload.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct UploadKey {
    /// The run.
    pub run: RunId,
    /// The round, from 1.
    pub round: u32,
    /// The client.
    pub node: NodeName,
}

/// Cuts a free text to [`REASON_BYTES`] and one line, at a character boundary.
pub fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    while line.len() > REASON_BYTES {
        line.pop();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(examples: u64, correct: u64, confusion: &[u64]) -> Metrics {
        Metrics { examples, loss_sum: 1.0, correct, confusion: confusion.iter().map(|c| Some(*c)).collect() }
    }

    #[test]
    fn counts_add_up_and_hidden_cells_stay_hidden() {
        let mut sum = metrics(30, 20, &[15, 5, 5, 5]);
        let mut other = metrics(40, 36, &[20, 3, 0, 17]);
        other.hide_small_cells(10);
        assert_eq!(other.confusion, [Some(20), None, Some(0), Some(17)]);
        sum.add(&other);
        assert_eq!((sum.examples, sum.correct, sum.loss()), (70, 56, Some(2.0 / 70.0)));
        assert_eq!(sum.confusion, [Some(35), None, Some(5), Some(22)]);
        let mut few = metrics(9, 9, &[9, 0, 0, 0]);
        few.hide_small_cells(10);
        assert_eq!(few, Metrics::default());
        assert_eq!(few.accuracy(), None);
    }

    #[test]
    fn a_record_reads_back_and_tells_who_was_in() {
        let accepted = Participation::Accepted { digest: Some(Digest::of(b"u")), examples: 3, bytes: 12 };
        let cohort = [("a", accepted), ("b", Participation::Disconnected), ("c", Participation::Surplus)];
        let record = RoundRecord {
            round: 1,
            attempt: 2,
            started: Time(5),
            ended: Time(9),
            eligible: 3,
            cohort: cohort.into_iter().map(|(name, what)| (name.parse().unwrap(), what)).collect(),
            bytes_down: 36,
            bytes_up: 12,
            outcome: RoundOutcome::Published { model: Digest::of(b"m") },
            spent: false,
            summed: Some(Summed { weight: 3, examples: 4, loss_millionths: 2_000_000 }),
        };
        assert_eq!(record.summed.and_then(|summed| summed.loss()), Some(0.5));
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<RoundRecord>(&json).unwrap(), record);
        assert_eq!(record.accepted().map(NodeName::as_str).collect::<Vec<_>>(), ["a"]);
        assert_eq!(record.dropped().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn a_reason_is_one_short_line() {
        assert_eq!(one_line("a\nb"), "a b");
        assert!(one_line(&"é".repeat(1000)).len() <= REASON_BYTES);
    }
}
