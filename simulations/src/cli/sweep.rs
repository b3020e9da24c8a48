//! `tributary-sim sweep`: its arguments, and what it prints.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{End, ScenarioArguments, TrainerKind, cores, failed, interruptible, trainer, unusable};
use crate::follow::Format;
use crate::sweep::{Figures, Grid, Outcome, Point, Sweep, SweepEvent, SweepSettings, value};

/// Failed points that the last line names.
const NAMED: usize = 3;

#[derive(Debug, Args)]
pub(super) struct SweepArguments {
    #[command(flatten)]
    scenario: ScenarioArguments,
    /// A setting and its values, which are combined with those of every other --vary. Keys and values as --set takes
    /// them; commas in brackets and quotes belong to a value: train.learning_rate=0.05,0.1, model.hidden=[16],[32,16].
    #[arg(long, value_name = "KEY=A,B,…")]
    vary: Vec<String>,
    /// Seeds: every combination is run with each, and the table has mean and standard deviation over them.
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', conflicts_with = "seed")]
    seeds: Vec<u64>,
    /// The sweep's folder, with a run's folder for each point. The same sweep goes on there where it broke. Without
    /// it: runs/NAME-sweep.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Points that run at once; without it, as many as there are workers.
    #[arg(long, value_name = "N")]
    parallel: Option<NonZeroUsize>,
    /// Worker threads, shared evenly among the points that run at once; without it, as many as the machine has cores.
    #[arg(long, value_name = "N")]
    workers: Option<NonZeroUsize>,
    /// How to print progress.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// What trains: for tests of everything else.
    #[arg(long, value_enum, default_value_t, hide = true)]
    trainer: TrainerKind,
}

/// One JSON line.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Line<'a> {
    Point {
        point: &'a str,
        settings: BTreeMap<&'a str, toml::Value>,
        seed: Option<u64>,
        status: &'static str,
        #[serde(flatten)]
        figures: Option<&'a Figures>,
        problem: Option<&'a str>,
    },
    Finished {
        points: usize,
        skipped: usize,
        failed: usize,
        seconds: f64,
    },
}

impl Line<'_> {
    fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() // every key is a string, so this cannot fail
    }
}

/// Runs a sweep, prints a line per point and at the end its table.
pub(super) fn sweep(arguments: &SweepArguments, out: &mut dyn Write) -> Result<(), End> {
    let start = Instant::now();
    let grid = Grid::parse(&arguments.vary, &arguments.seeds).map_err(unusable)?;
    let (trainer, trainer_name) = trainer(arguments.trainer);
    let overrides = arguments.scenario.overrides();
    let folder = arguments.out.as_deref();
    let sweep = Sweep::open(&arguments.scenario.file, &overrides, grid, folder, trainer_name);
    let mut sweep = sweep.map_err(unusable)?;
    let workers = arguments.workers.map_or_else(cores, NonZeroUsize::get);
    let parallel = arguments.parallel.map_or(workers, NonZeroUsize::get);
    let trainer_name = trainer_name.to_owned();
    let settings = SweepSettings { parallel, workers, trainer, trainer_name };
    let stop = interruptible().map_err(failed)?;

    let total = sweep.outcomes().count();
    let mut teller =
        Teller::new(arguments.format, sweep.grid().clone(), total, sweep.remaining_rounds(), out);
    let at_once = parallel.min(sweep.remaining()).max(1);
    teller.human(&format!(
        "{total} points, {at_once} at a time with {} workers each",
        (workers / at_once).max(1)
    ));
    let skipped = total - sweep.remaining();
    if skipped > 0 {
        teller.human(&format!("{skipped} of {total} points are done already: only the rest is run"));
    }
    for (point, outcome) in sweep.outcomes().filter(|(_, outcome)| outcome.figures().is_some()) {
        teller.point(point, outcome);
    }
    sweep.run(&settings, &stop, &mut |event| match event {
        SweepEvent::Round => teller.bar.inc(1),
        SweepEvent::Point { point, outcome } => teller.point(point, outcome),
    });
    teller.bar.finish_and_clear();
    if stop.load(Ordering::Relaxed) && sweep.outcomes().any(|(_, outcome)| *outcome == Outcome::NotReached) {
        let done = total - sweep.remaining();
        let words = format!("interrupted after {done} of {total} points; the same command runs the rest");
        return Err(End::Interrupted(words));
    }

    let table = sweep.table();
    let (csv, html) = sweep.write(&table).map_err(failed)?;
    let problems: Vec<String> = sweep
        .outcomes()
        .filter_map(|(point, outcome)| match outcome {
            Outcome::Failed(problem) => Some(format!("{}: {problem}", point.name)),
            _ => None,
        })
        .collect();
    let seconds = start.elapsed().as_secs_f64();
    teller.human(&format!("\n{table}\n\ntable: {}\nreport: {}", csv.display(), html.display()));
    teller.json(&Line::Finished { points: total, skipped, failed: problems.len(), seconds }.to_json());
    if problems.is_empty() {
        return Ok(());
    }
    let named = problems.iter().take(NAMED).cloned().collect::<Vec<_>>().join("; ");
    let more = if problems.len() > NAMED { "; …" } else { "" };
    Err(failed(format!("{} of {total} points failed: {named}{more}", problems.len())))
}

/// Prints a line per point; the bar counts the rounds of all of them.
struct Teller<'a> {
    format: Format,
    grid: Grid,
    bar: ProgressBar,
    out: &'a mut dyn Write,
    told: usize,
    total: usize,
}

impl<'a> Teller<'a> {
    fn new(format: Format, grid: Grid, total: usize, rounds: u64, out: &'a mut dyn Write) -> Self {
        let bar = ProgressBar::new(rounds);
        let style =
            ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} rounds  {elapsed} (left: {eta})");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(format!("0 of {total} points"));
        Self { format, grid, bar, out, told: 0, total }
    }

    fn point(&mut self, point: &Point, outcome: &Outcome) {
        let (status, problem) = match outcome {
            Outcome::Skipped(_) => ("skipped", None),
            Outcome::Finished(_) => ("finished", None),
            Outcome::Failed(problem) => ("failed", Some(problem.as_str())),
            Outcome::NotReached => return,
        };
        self.told += 1;
        self.bar.set_message(format!("{} of {} points", self.told, self.total));
        let (name, figures) = (point.name.as_str(), outcome.figures());
        match (outcome, figures) {
            (Outcome::Finished(_), Some(figures)) => {
                let accuracy = figures.accuracy.map(|accuracy| format!("accuracy {accuracy:.4} after "));
                self.human(&format!(
                    "{name}: {}{} rounds, {:.1} s",
                    accuracy.unwrap_or_default(),
                    figures.rounds,
                    figures.seconds
                ));
            }
            (Outcome::Failed(problem), _) => self.human(&format!("{name}: failed: {problem}")),
            _ => {}
        }
        let keys = self.grid.varied.iter().map(|one| one.key.as_str());
        let settings = keys.zip(self.grid.values(&point.choices).into_iter().map(value)).collect();
        let line = Line::Point { point: name, settings, seed: point.seed, status, figures, problem };
        let text = line.to_json();
        self.json(&text);
    }

    fn human(&mut self, text: &str) {
        if self.format == Format::Human {
            self.print(text);
        }
    }

    fn json(&mut self, text: &str) {
        if self.format == Format::Json {
            self.print(text);
        }
    }

    /// Prints a line; the bar stands aside. A reader that went away has seen enough.
    fn print(&mut self, text: &str) {
        let (bar, out) = (&self.bar, &mut self.out);
        let _ = bar.suspend(|| writeln!(out, "{text}").and_then(|()| out.flush()));
    }
}
