//! What a report needs of all rounds, small enough for any number of them: taken from the events as they come.

use tributary_common::progress::{bytes_words, dropped};
use tributary_common::record::{
    EvaluationRecord, Metrics, Participation, RoundOutcome, RoundRecord, RunEvent,
};

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
    /// Bytes received, in all attempts: updates, and messages of secure-aggregation sessions.
    pub bytes_up: u64,
    /// Those of accepted updates.
    pub update_bytes: u64,
    /// Bytes sent, in all attempts: models, and messages of sessions.
    pub bytes_down: u64,
    /// Accepted updates.
    pub updates: u64,
    /// Abandoned rounds that were not tried again, for masked updates had been sent.
    pub lost: Vec<u32>,
    /// Mean training loss of each round that tells one: what was summed under the masks.
    pub training_loss: Vec<(u32, f64)>,
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
        for part in record.cohort.values() {
            if let Participation::Accepted { bytes, .. } = part {
                (self.updates, self.update_bytes) = (self.updates + 1, self.update_bytes + bytes);
            }
        }
        let loss = record.summed.and_then(|summed| summed.loss());
        self.training_loss.extend(loss.map(|loss| (record.round, loss)));
        if record.spent {
            self.lost.push(record.round);
        }
        let RoundOutcome::Abandoned { reason } = &record.outcome else { return };
        if self.abandoned.len() == ABANDONED_SHOWN {
            self.abandoned_more += 1;
            return;
        }
        let out = dropped(record).into_iter().take(DROPPED_SHOWN);
        let out: Vec<String> = out.map(|drop| format!("{} {}", drop.client, drop.why)).collect();
        let out = if out.is_empty() { String::new() } else { format!(" ({})", out.join(", ")) };
        let lost = if record.spent { "; the round is lost" } else { "" };
        let (round, attempt) = (record.round, record.attempt);
        self.abandoned.push(format!("round {round}, attempt {attempt}: {reason}{out}{lost}"));
    }

    /// What went over the network, and what was lost of it, in lines.
    pub fn traffic(&self) -> String {
        let mean = self.update_bytes as f64 / self.updates.max(1) as f64;
        let rest = self.bytes_up.saturating_sub(self.update_bytes);
        let mut text = format!(
            "bytes: {} up, of which {} are {} updates of {} on average",
            bytes_words(self.bytes_up),
            bytes_words(self.update_bytes),
            self.updates,
            bytes_words(mean.round() as u64)
        );
        if rest > 0 {
            text.push_str(&format!(" and {} all else", bytes_words(rest)));
        }
        text.push_str(&format!("; {} down", bytes_words(self.bytes_down)));
        if let Some((round, loss)) = self.training_loss.last() {
            text.push_str(&format!("\ntraining loss: {loss:.4} in round {round}, summed under the masks"));
        }
        if !self.lost.is_empty() {
            let rounds: Vec<String> = self.lost.iter().map(u32::to_string).collect();
            text.push_str(&format!(
                "\nrounds lost: {}: masked updates were sent, and their sum could not be opened",
                rounds.join(", ")
            ));
        }
        text
    }
}
