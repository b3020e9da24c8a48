//! Following a run: its lines on standard output, a bar on a terminal, and the rows of `metrics.csv`.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use tributary_common::progress::Progress;
use tributary_common::record::RunEvent;
use tributary_common::time::Time;

use crate::engine::Observation;
use crate::report::{Crossing, Row};

/// Most notes about single clients that are printed: a broken scenario would print one per client and round.
const NOTES: usize = 10;

/// How lines are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

/// Turns observations into lines and rows.
pub(crate) struct Follower<'a> {
    format: Format,
    progress: Progress,
    bar: ProgressBar,
    out: &'a mut dyn Write,
    start: Instant,
    round_started: Time,
    rows: Vec<Row>,
    /// The accuracy whose first round is told before the last line.
    target: Option<f64>,
    notes: BTreeSet<String>,
    /// Nobody reads any more: a closed pipe is no reason to lose the run.
    deaf: bool,
    /// Nobody is to be told anything.
    silent: bool,
}

impl<'a> Follower<'a> {
    /// Follows a run. The bar appears where standard error is a terminal.
    pub(crate) fn new(format: Format, progress: Progress, out: &'a mut dyn Write) -> Self {
        let bar = ProgressBar::no_length();
        let style = ProgressStyle::with_template("{msg} {wide_bar} {elapsed}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            format,
            progress,
            bar,
            out,
            start: Instant::now(),
            round_started: Time(0),
            rows: Vec::new(),
            target: None,
            notes: BTreeSet::new(),
            deaf: false,
            silent: false,
        }
    }

    /// Follows a run and tells nobody: its rows alone are wanted.
    pub(crate) fn silent(progress: Progress, out: &'a mut std::io::Sink) -> Self {
        Self {
            bar: ProgressBar::hidden(),
            deaf: true,
            silent: true,
            ..Self::new(Format::Human, progress, out)
        }
    }

    /// Tells, before the last line, when `accuracy` was first reached.
    pub(crate) fn watch_for(&mut self, accuracy: Option<f64>) {
        self.target = accuracy;
    }

    /// Takes what the engine tells.
    pub(crate) fn observe(&mut self, observation: Observation<'_>) {
        match observation {
            Observation::Event(event) => self.event(event),
            Observation::Declined { client, detail, .. } => self.note(format!("{client} declined: {detail}")),
            Observation::EvaluationFailed { client, detail } => {
                self.note(format!("{client} could not evaluate: {detail}"));
            }
        }
    }

    /// When the watched accuracy was first reached, if one is watched.
    pub(crate) fn crossing(&self) -> Option<Crossing> {
        self.target.map(|accuracy| Crossing::of(&self.rows, accuracy))
    }

    /// The rows so far, and the wall time in seconds.
    pub(crate) fn finish(self) -> (Vec<Row>, f64) {
        self.bar.finish_and_clear();
        (self.rows, self.start.elapsed().as_secs_f64())
    }

    /// Wall time since the start.
    fn wall(&self) -> Time {
        Time(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    fn event(&mut self, event: &RunEvent) {
        let now = self.wall();
        match event {
            RunEvent::RoundStarted { invited, .. } => {
                self.round_started = now;
                self.bar.set_length(u64::from(*invited));
                self.bar.set_position(0);
            }
            RunEvent::Progress { decided, .. } => self.bar.set_position(u64::from(*decided)),
            _ => {}
        }
        if let Some(status) = self.progress.status(event) {
            self.bar.set_message(status);
        }
        // The records have virtual times; a person wants to know how long it took.
        let lines = match event {
            RunEvent::RoundEnded { record } => {
                let mut record = record.clone();
                (record.started, record.ended) = (self.round_started, now);
                self.progress.take(Some(now), &RunEvent::RoundEnded { record })
            }
            other => self.progress.take(Some(now), other),
        };
        for line in lines {
            self.rows.extend(Row::of(&line));
            if let Some(crossing) = self.crossing().filter(|_| line.is_last()) {
                match self.format {
                    Format::Human => self.print(&crossing.to_string()),
                    Format::Json => self.print(&crossing.to_json()),
                }
            }
            let text = match self.format {
                Format::Human => line.to_string(),
                Format::Json => line.to_json(),
            };
            self.print(&text);
        }
    }

    /// Prints a line; the bar stands aside.
    pub(crate) fn print(&mut self, text: &str) {
        if !self.deaf {
            let (bar, out) = (&self.bar, &mut self.out);
            self.deaf = bar.suspend(|| writeln!(out, "{text}").and_then(|()| out.flush())).is_err();
        }
    }

    fn note(&mut self, note: String) {
        if self.silent {
            return;
        }
        let shown = self.notes.len();
        if shown <= NOTES && self.notes.insert(note.clone()) {
            let note = if shown == NOTES { "further notes about clients are left out" } else { &note };
            self.bar.suspend(|| eprintln!("note: {note}"));
        }
    }
}
