//! What a report needs of all rounds, small enough for any number of them: taken from the events as they come.

use tributary_common::progress::dropped;
use tributary_common::record::{EvaluationRecord, Metrics, RoundOutcome, RoundRecord, RunEvent};

/// Abandoned attempts that are named at most.
const ABANDONED_SHOWN: usize = 100;
/// Clients that the line of an abandoned attempt names at most.
const DROPPED_SHOWN: usize = 8;

/// The figures of one evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// The round whose model was evaluated.
    pub round: u32,
    /// Share of correct examples, 0 to 1.
    pub accuracy: Option<f64>,
    /// Mean loss.
    pub loss: Option<f64>,
}

/// A run's rounds and evaluations, summed up.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Evaluations on held-out examples.
    pub held_out: Vec<Point>,
    /// Evaluations on the clients' own test examples together.
    pub federated: Vec<Point>,
    /// The last evaluation, whole.
    pub last: Option<EvaluationRecord>,
    /// Bytes of updates received, in all attempts.
    pub bytes_up: u64,
    /// Bytes of models sent, in all attempts.
    pub bytes_down: u64,
    /// Invited clients that dropped out, in all attempts.
    pub dropped: u64,
    /// A line for each of the first abandoned attempts.
    pub abandoned: Vec<String>,
    /// Abandoned attempts that have no line.
    pub abandoned_more: usize,
}

impl History {
    /// Takes what the next event tells.
    pub fn take(&mut self, event: &RunEvent) {
        match event {
            RunEvent::RoundEnded { record } => self.round(record),
            RunEvent::Evaluated { record } => {
                let point = |metrics: Metrics| Point {
                    round: record.round,
                    accuracy: metrics.accuracy(),
                    loss: metrics.loss(),
                };
                self.held_out.extend(record.held_out.clone().map(point));
                self.federated.extend(record.federated().map(point));
                self.last = Some(record.clone());
            }
            _ => {}
        }
    }

    fn round(&mut self, record: &RoundRecord) {
        self.bytes_up += record.bytes_up;
        self.bytes_down += record.bytes_down;
        self.dropped += record.dropped().count() as u64;
        let RoundOutcome::Abandoned { reason } = &record.outcome else { return };
        if self.abandoned.len() == ABANDONED_SHOWN {
            self.abandoned_more += 1;
            return;
        }
        let out = dropped(record).into_iter().take(DROPPED_SHOWN);
        let out: Vec<String> = out.map(|drop| format!("{} {}", drop.client, drop.why)).collect();
        let out = if out.is_empty() { String::new() } else { format!(" ({})", out.join(", ")) };
        self.abandoned.push(format!("round {}, attempt {}: {reason}{out}", record.round, record.attempt));
    }
}
