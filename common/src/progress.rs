//! A run's progress as lines: one per round and a last one, for people and for machines.
//!
//! The coordinator's `run watch` and the simulator print the same lines.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::digest::Digest;
use crate::ids::NodeName;
use crate::job::Job;
use crate::privacy::accounting::{self, Accountant};
use crate::record::{EvaluationRecord, Participation, Reason, RoundOutcome, RoundRecord, RunEvent, RunState};
use crate::time::Time;

/// A client that was invited and is not in the sum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// The client.
    pub client: NodeName,
    /// Why, in words.
    pub why: String,
}

/// One line. Serialised, it is the JSON object of `--format json`; displayed, the line for people.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Line {
    /// A round was published and, where that was asked for, evaluated.
    Round {
        /// The round, from 1.
        round: u32,
        /// Share of correct examples, 0 to 1; `None` where nothing was evaluated.
        accuracy: Option<f64>,
        /// Mean loss; `None` where nothing was evaluated.
        loss: Option<f64>,
        /// Privacy spent so far, had the job been planned to end here (an odometer, not a guarantee); `None` without a
        /// privacy mechanism.
        epsilon: Option<f64>,
        /// Bytes of updates received, used or not.
        bytes_up: u64,
        /// Bytes of models sent.
        bytes_down: u64,
        /// Clients in the sum.
        completed: u32,
        /// Clients that were invited and dropped out; surplus ones are not counted.
        dropped: u32,
        /// From the invitation to the published model.
        seconds: f64,
        /// Who dropped out.
        #[serde(skip)]
        out: Vec<Dropped>,
        /// Rounds of the job.
        #[serde(skip)]
        of: u32,
    },
    /// An attempt at a round was abandoned; the model stays as it was.
    Abandoned {
        /// The round, from 1.
        round: u32,
        /// The attempt at it, from 1.
        attempt: u32,
        /// Why, in words.
        reason: String,
        /// Who dropped out.
        dropped: Vec<Dropped>,
    },
    /// All rounds are published: the last line.
    Finished(Summary),
    /// The operator stopped the run: the last line.
    Stopped(Summary),
    /// The run could not go on: the last line.
    Failed {
        /// Why, in words.
        reason: String,
        /// Where it stood.
        #[serde(flatten)]
        summary: Summary,
    },
}

/// What the last line says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Rounds published.
    pub rounds: u32,
    /// Share of correct examples of the last published model, 0 to 1; `None` where it was not evaluated.
    pub accuracy: Option<f64>,
    /// What the job's whole length promises, even if it ended before; `None` without a privacy mechanism.
    pub epsilon: Option<f64>,
    /// Whether the job asked for privacy and did not get it: noise that can be repeated, or none.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub not_private: bool,
    /// Digest of the last published model, or of the initial one.
    pub model_digest: Digest,
    /// From the first invitation to the end.
    pub seconds: f64,
}

impl Line {
    /// The JSON object, without a line break.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() // every key is a string, so this cannot fail
    }

    /// Whether this is the last line of a run.
    pub fn is_last(&self) -> bool {
        matches!(self, Line::Finished(_) | Line::Stopped(_) | Line::Failed { .. })
    }
}

/// Turns a run's events into lines. Feed it every event, in order.
#[derive(Debug)]
pub struct Progress {
    rounds: u32,
    /// A published round that may still be evaluated: the next event tells.
    pending: Option<RoundRecord>,
    /// The last published round, and its accuracy if it was evaluated.
    published: u32,
    accuracy: Option<(u32, f64)>,
    started: Option<Time>,
    ended: Option<Time>,
    /// The job, if it has a privacy mechanism that works.
    private: Option<Arc<Job>>,
    not_private: bool,
}

impl Progress {
    /// Nothing happened yet in a run of `rounds` rounds.
    pub fn new(rounds: u32) -> Self {
        Self {
            rounds,
            pending: None,
            published: 0,
            accuracy: None,
            started: None,
            ended: None,
            private: None,
            not_private: false,
        }
    }

    /// Nothing happened yet in a run of `job`; with `[privacy]` the lines say what was spent.
    pub fn of(job: &Arc<Job>) -> Self {
        let private = job.privacy.is_some().then(|| job.clone());
        Self { private, ..Self::new(job.rounds) }
    }

    /// The same, where noise can be repeated or is none at all: a job with `[privacy]` has no epsilon then.
    pub fn without_noise(job: &Arc<Job>) -> Self {
        Self { not_private: job.privacy.is_some(), ..Self::new(job.rounds) }
    }

    fn epsilon(&self, rounds: u32) -> Option<f64> {
        let job = self.private.as_ref()?;
        let privacy = job.privacy.as_ref()?;
        let unit = privacy.unit(false);
        let guarantee = accounting::epsilon(&job.events(rounds), privacy.delta, unit, Accountant::Best);
        guarantee.ok().map(|guarantee| guarantee.epsilon).filter(|epsilon| epsilon.is_finite())
    }

    /// Takes an event and returns the lines that are complete with it, none to two of them.
    ///
    /// `at` is when it happened, where that is known: the records know their own times, so it makes the
    /// last line's seconds include the last evaluation and nothing else. A published round's line waits for
    /// its evaluation, or for the event that shows that there was none.
    pub fn take(&mut self, at: Option<Time>, event: &RunEvent) -> Vec<Line> {
        self.ended = self.ended.max(at);
        let mut lines = Vec::new();
        match event {
            RunEvent::Progress { .. } => {}
            RunEvent::Waiting { .. } | RunEvent::RoundStarted { .. } => lines.extend(self.flush(None)),
            RunEvent::RoundEnded { record } => {
                lines.extend(self.flush(None));
                self.started = self.started.or(Some(record.started));
                self.ended = self.ended.max(Some(record.ended));
                match &record.outcome {
                    RoundOutcome::Published { .. } => {
                        self.published = record.round;
                        self.pending = Some(record.clone());
                    }
                    RoundOutcome::Abandoned { reason } => lines.push(Line::Abandoned {
                        round: record.round,
                        attempt: record.attempt,
                        reason: reason.to_string(),
                        dropped: dropped(record),
                    }),
                }
            }
            RunEvent::Evaluated { record } => {
                let headline = record.headline();
                if let Some(accuracy) = headline.as_ref().and_then(|metrics| metrics.accuracy()) {
                    self.accuracy = Some((record.round, accuracy));
                }
                let of_pending = self.pending.as_ref().is_some_and(|pending| pending.round == record.round);
                let figures = headline.filter(|_| of_pending).map(|m| (m.accuracy(), m.loss()));
                lines.extend(self.flush(figures));
            }
            RunEvent::Ended { state, rounds, model } => {
                lines.extend(self.flush(None));
                let accuracy = self.accuracy.filter(|(round, _)| round == rounds).map(|(_, value)| value);
                let seconds = match (self.started, self.ended) {
                    (Some(started), Some(ended)) => ended.seconds_since(started),
                    _ => 0.0,
                };
                let summary = Summary {
                    rounds: *rounds,
                    accuracy,
                    epsilon: self.epsilon(self.rounds),
                    not_private: self.not_private,
                    model_digest: *model,
                    seconds,
                };
                lines.push(match state {
                    RunState::Finished => Line::Finished(summary),
                    RunState::Failed { reason } => Line::Failed { reason: reason.to_string(), summary },
                    RunState::Queued | RunState::Running | RunState::Stopped => Line::Stopped(summary),
                });
            }
        }
        lines
    }

    /// What is going on, for a status line that the next one replaces; `None` for events that make lines.
    pub fn status(&self, event: &RunEvent) -> Option<String> {
        match event {
            RunEvent::Waiting { round, connected, wanted } => Some(format!(
                "round {round}/{}: waiting for clients, {connected} of {wanted} connected",
                self.rounds
            )),
            RunEvent::RoundStarted { round, attempt: 1, invited } => {
                Some(format!("round {round}/{}: {invited} clients invited", self.rounds))
            }
            RunEvent::RoundStarted { round, attempt, invited } => {
                Some(format!("round {round}/{}: attempt {attempt}, {invited} clients invited", self.rounds))
            }
            RunEvent::Progress { round, decided, invited } => {
                Some(format!("round {round}/{}: {decided} of {invited} clients", self.rounds))
            }
            RunEvent::RoundEnded { .. } | RunEvent::Evaluated { .. } | RunEvent::Ended { .. } => None,
        }
    }

    fn flush(&mut self, figures: Option<(Option<f64>, Option<f64>)>) -> Option<Line> {
        let record = self.pending.take()?;
        let (accuracy, loss) = figures.unwrap_or_default();
        let out = dropped(&record);
        Some(Line::Round {
            round: record.round,
            accuracy,
            loss,
            epsilon: self.epsilon(record.round),
            bytes_up: record.bytes_up,
            bytes_down: record.bytes_down,
            completed: count(record.accepted().count()),
            dropped: count(out.len()),
            seconds: record.ended.seconds_since(record.started),
            out,
            of: self.rounds,
        })
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Who dropped out of an attempt, and why.
pub fn dropped(record: &RoundRecord) -> Vec<Dropped> {
    let dropped = record.dropped();
    dropped.map(|(client, part)| Dropped { client: client.clone(), why: why(part) }).collect()
}

/// What became of an invited client, in words.
pub fn why(part: &Participation) -> String {
    match part {
        Participation::Accepted { .. } => "accepted".to_owned(),
        Participation::Declined { reason } => format!("declined ({})", reason_words(*reason)),
        Participation::Refused { detail } => format!("refused: {detail}"),
        Participation::Disconnected => "disconnected".to_owned(),
        Participation::Late => "late".to_owned(),
        Participation::Surplus => "not needed".to_owned(),
    }
}

fn reason_words(reason: Reason) -> &'static str {
    match reason {
        Reason::Policy => "its policy does not allow the job",
        Reason::Busy => "busy with another round",
        Reason::Data => "its data do not fit the model",
        Reason::Training => "training failed",
        Reason::Budget => "privacy budget",
        Reason::ShuttingDown => "shutting down",
        Reason::Unsupported => "it does not understand the job",
    }
}

/// The events that a run's records tell, in the order in which they happened.
pub fn history(rounds: Vec<RoundRecord>, evaluations: Vec<EvaluationRecord>) -> Vec<RunEvent> {
    let mut events = Vec::with_capacity(rounds.len() + evaluations.len());
    let mut evaluations = evaluations.into_iter().peekable();
    let evaluated = |record: EvaluationRecord| RunEvent::Evaluated { record };
    for record in rounds {
        let published = matches!(record.outcome, RoundOutcome::Published { .. }).then_some(record.round);
        events.push(RunEvent::RoundEnded { record });
        while let Some(record) = evaluations.next_if(|evaluation| Some(evaluation.round) <= published) {
            events.push(evaluated(record));
        }
    }
    events.extend(evaluations.map(evaluated));
    events
}

/// A number of bytes for people: `812 B`, `1.3 MB`.
pub fn bytes_words(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for larger in ["kB", "MB", "GB", "TB", "PB"] {
        if value < 999.95 {
            break;
        }
        value /= 1000.0;
        unit = larger;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

struct Figure(Option<f64>, usize);

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => write!(f, "{value:.*}", self.1),
            None => f.write_str("–"),
        }
    }
}

fn names(f: &mut fmt::Formatter<'_>, out: &[Dropped]) -> fmt::Result {
    /// More names than these make a line that nobody reads.
    const SHOWN: usize = 8;
    for (index, Dropped { client, why }) in out.iter().take(SHOWN).enumerate() {
        write!(f, "{}{client} {why}", if index == 0 { "; out: " } else { ", " })?;
    }
    if out.len() > SHOWN {
        write!(f, " and {} more", out.len() - SHOWN)?;
    }
    Ok(())
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::Round {
                round,
                accuracy,
                loss,
                epsilon,
                bytes_up,
                bytes_down,
                completed,
                dropped,
                seconds,
                out,
                of,
                ..
            } => {
                let width = of.to_string().len();
                write!(
                    f,
                    "round {round:>width$}/{of}  accuracy {}  loss {}{}  up {}  down {}  {completed} in, {dropped} out  {seconds:.1} s",
                    Figure(*accuracy, 4),
                    Figure(*loss, 4),
                    epsilon.map_or(String::new(), |epsilon| format!("  ε {epsilon:.3}")),
                    bytes_words(*bytes_up),
                    bytes_words(*bytes_down),
                )?;
                names(f, out)
            }
            Line::Abandoned { round, attempt, reason, dropped } => {
                write!(f, "round {round} abandoned (attempt {attempt}): {reason}")?;
                names(f, dropped)
            }
            Line::Finished(summary) => write!(f, "finished: {summary}"),
            Line::Stopped(summary) => write!(f, "stopped: {summary}"),
            Line::Failed { reason, summary } => write!(f, "failed: {reason}; {summary}"),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { rounds, accuracy, epsilon, not_private, model_digest, seconds } = self;
        let accuracy = Figure(*accuracy, 4);
        write!(f, "{rounds} rounds, accuracy {accuracy}, ")?;
        if let Some(epsilon) = epsilon {
            write!(f, "ε {epsilon:.3}, ")?;
        }
        if *not_private {
            f.write_str("NOT PRIVATE (no secret noise), ")?;
        }
        write!(f, "{seconds:.1} s, model {model_digest}")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::record::{Abandonment, Metrics};

    fn record(round: u32, outcome: RoundOutcome) -> RoundRecord {
        let accepted = Participation::Accepted { digest: None, examples: 3, bytes: 12 };
        let declined = Participation::Declined { reason: Reason::Policy };
        let parts =
            [("a", accepted), ("b", Participation::Surplus), ("c", declined), ("d", Participation::Late)];
        RoundRecord {
            round,
            attempt: 1,
            started: Time(1000 * u64::from(round)),
            ended: Time(1000 * u64::from(round) + 500),
            eligible: 4,
            cohort: parts.into_iter().map(|(name, part)| (name.parse().unwrap(), part)).collect(),
            bytes_down: 1_300_000,
            bytes_up: 12,
            outcome,
            spent: false,
            summed: None,
        }
    }

    fn published(round: u32) -> RunEvent {
        RunEvent::RoundEnded { record: record(round, RoundOutcome::Published { model: Digest::of(b"m") }) }
    }

    fn evaluated(round: u32) -> RunEvent {
        let metrics = Metrics { examples: 4, loss_sum: 2.0, correct: 3, confusion: Vec::new() };
        let record = EvaluationRecord { round, held_out: Some(metrics), by_client: BTreeMap::new() };
        RunEvent::Evaluated { record }
    }

    fn ended(state: RunState, rounds: u32) -> RunEvent {
        RunEvent::Ended { state, rounds, model: Digest::of(b"m") }
    }

    #[test]
    fn a_line_per_round_and_a_last_one() {
        let mut progress = Progress::new(12);
        let waiting = RunEvent::Waiting { round: 1, connected: 1, wanted: 3 };
        assert!(progress.take(Some(Time(0)), &waiting).is_empty());
        assert_eq!(progress.status(&waiting).unwrap(), "round 1/12: waiting for clients, 1 of 3 connected");
        assert!(progress.take(Some(Time(1500)), &published(1)).is_empty());
        let lines = progress.take(Some(Time(1700)), &evaluated(1));
        assert_eq!(
            lines[0].to_json(),
            r#"{"event":"round","round":1,"accuracy":0.75,"loss":0.5,"epsilon":null,"bytes_up":12,"bytes_down":1300000,"completed":1,"dropped":2,"seconds":0.5}"#
        );
        assert_eq!(
            lines[0].to_string(),
            "round  1/12  accuracy 0.7500  loss 0.5000  up 12 B  down 1.3 MB  1 in, 2 out  0.5 s; \
             out: c declined (its policy does not allow the job), d late"
        );
        assert!(progress.take(Some(Time(2500)), &published(2)).is_empty());
        let lines = progress.take(Some(Time(4000)), &ended(RunState::Finished, 2));
        assert!(matches!(lines[0], Line::Round { round: 2, accuracy: None, .. }));
        let digest = Digest::of(b"m");
        assert_eq!(
            lines[1].to_json(),
            format!(
                r#"{{"event":"finished","rounds":2,"accuracy":null,"epsilon":null,"model_digest":"{digest}","seconds":3.0}}"#
            ),
            "the accuracy of an earlier model is not the last one's"
        );
        assert!(lines[1].is_last() && !lines[0].is_last());
    }

    #[test]
    fn a_round_that_nobody_evaluates_is_told_when_that_is_clear() {
        let mut progress = Progress::new(3);
        assert!(progress.take(None, &published(1)).is_empty());
        let started = RunEvent::RoundStarted { round: 2, attempt: 1, invited: 3 };
        assert!(matches!(progress.take(None, &started)[..], [Line::Round { round: 1, loss: None, .. }]));
        assert!(progress.take(None, &published(2)).is_empty());
        let waiting = RunEvent::Waiting { round: 3, connected: 0, wanted: 3 };
        assert_eq!(progress.take(None, &waiting).len(), 1);
        // A replay of records has no other events in between.
        progress.take(None, &published(3));
        assert_eq!(progress.take(None, &published(4)).len(), 1);
    }

    #[test]
    fn what_failed_is_not_reported_as_success() {
        let reason = Abandonment::BelowMinimum { accepted: 1, minimum: 2 };
        let mut progress = Progress::new(3);
        let abandoned = record(1, RoundOutcome::Abandoned { reason: reason.clone() });
        let lines = progress.take(None, &RunEvent::RoundEnded { record: abandoned });
        assert_eq!(
            lines[0].to_json(),
            r#"{"event":"abandoned","round":1,"attempt":1,"reason":"1 of at least 2 updates arrived","dropped":[{"client":"c","why":"declined (its policy does not allow the job)"},{"client":"d","why":"late"}]}"#
        );
        let lines = progress.take(None, &ended(RunState::Failed { reason }, 0));
        let json: serde_json::Value = serde_json::from_str(&lines[0].to_json()).unwrap();
        assert_eq!((&json["event"], &json["rounds"]), (&"failed".into(), &0.into()));
        assert_eq!(json["reason"], "1 of at least 2 updates arrived");
        assert!(lines[0].to_string().starts_with("failed: 1 of at least 2"));
        let stopped = Progress::new(3).take(None, &ended(RunState::Stopped, 0));
        assert!(stopped[0].to_json().starts_with(r#"{"event":"stopped","#));
    }

    #[test]
    fn records_tell_the_story_again() {
        let reason = Abandonment::BelowMinimum { accepted: 1, minimum: 2 };
        let (RunEvent::RoundEnded { record: first }, RunEvent::Evaluated { record: evaluation }) =
            (published(1), evaluated(1))
        else {
            unreachable!("made above");
        };
        let abandoned = record(2, RoundOutcome::Abandoned { reason });
        let mut progress = Progress::new(2);
        let events = history(vec![first, abandoned], vec![evaluation]);
        let lines: Vec<Line> = events.iter().flat_map(|event| progress.take(None, event)).collect();
        assert!(
            matches!(lines[..], [Line::Round { accuracy: Some(0.75), .. }, Line::Abandoned { round: 2, .. }]),
            "{lines:?}"
        );
    }

    #[test]
    fn bytes_for_people() {
        for (bytes, words) in
            [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_950, "1.0 MB"), (u64::MAX, "18446.7 PB")]
        {
            assert_eq!(bytes_words(bytes), words);
        }
    }
}
