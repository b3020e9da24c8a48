//! How long the real federation would take, from the virtual times of a simulation.

use std::fmt;

use serde::Serialize;
use tributary_common::record::{RoundOutcome, RoundRecord};
use tributary_common::time::Time;

use crate::population::Quantiles;

/// The virtual times of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Timing {
    /// Milliseconds from the run's start to its end.
    pub total_milliseconds: u64,
    /// Milliseconds of one published round's last attempt.
    pub round_milliseconds: Quantiles,
    /// Share of attempts, 0 to 1, that ended because their deadline was over.
    pub ended_by_deadline: f64,
    /// Mean share, 0 to 1, of its attempt's time that a client waited for others after its update was delivered.
    pub idle_share: f64,
}

impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total_milliseconds, round_milliseconds, ended_by_deadline, idle_share } = self;
        write!(
            f,
            "{} in all; a round {} (median), {} (nine tenths); {:.0} % of rounds ended by their deadline; clients \
             waited {:.0} % of a round for others",
            duration(*total_milliseconds),
            duration(round_milliseconds.median),
            duration(round_milliseconds.ninetieth),
            ended_by_deadline * 100.0,
            idle_share * 100.0
        )
    }
}

/// A time for people: `850 ms`, `12.5 s`, `7 min 30 s`, `3 h 5 min`, `2 d 4 h`.
pub fn duration(milliseconds: u64) -> String {
    let seconds = (milliseconds + 500) / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match milliseconds {
        0..1_000 => format!("{milliseconds} ms"),
        1_000..60_000 => format!("{:.1} s", milliseconds as f64 / 1000.0),
        60_000..3_600_000 => format!("{minutes} min {} s", seconds % 60),
        3_600_000..86_400_000 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// Adds a run's times up as it goes on.
#[derive(Debug, Default)]
pub(super) struct Clock {
    rounds: Vec<u64>,
    attempts: u64,
    by_deadline: u64,
    /// Updates of the open attempt, and the sum of their times of arrival.
    arrived: (u64, u64),
    /// Sums over all updates: waited for others, and lengths of their attempts.
    waited: u64,
    spans: u64,
}

impl Clock {
    /// An update was delivered.
    pub(super) fn arrival(&mut self, now: Time) {
        self.arrived.0 += 1;
        self.arrived.1 += now.0;
    }

    /// An attempt ended.
    pub(super) fn ended(&mut self, record: &RoundRecord, deadline_seconds: u32) {
        let span = record.ended.0.saturating_sub(record.started.0);
        self.attempts += 1;
        self.by_deadline += u64::from(record.ended >= record.started.plus_seconds(deadline_seconds));
        let (updates, times) = std::mem::take(&mut self.arrived);
        self.waited += updates.saturating_mul(record.ended.0).saturating_sub(times);
        self.spans += updates.saturating_mul(span);
        if matches!(record.outcome, RoundOutcome::Published { .. }) {
            self.rounds.push(span);
        }
    }

    pub(super) fn read(&self, now: Time) -> Timing {
        let share = |part: u64, all: u64| part as f64 / all.max(1) as f64;
        Timing {
            total_milliseconds: now.0,
            round_milliseconds: Quantiles::of(self.rounds.clone()),
            ended_by_deadline: share(self.by_deadline, self.attempts),
            idle_share: share(self.waited, self.spans),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_said_in_two_units() {
        for (milliseconds, words) in [
            (850, "850 ms"),
            (12_500, "12.5 s"),
            (450_000, "7 min 30 s"),
            (11_100_000, "3 h 5 min"),
            (187_200_000, "2 d 4 h"),
        ] {
            assert_eq!(duration(milliseconds), words);
        }
    }
}
