//! `tributary-sim faults`: many seeds of the world in which everything goes wrong.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum as _};
use indicatif::{ProgressBar, ProgressStyle};

use crate::world::{self, Plant, Report, Settings, Tally, WorldError};

/// What is run.
#[derive(Debug, Args)]
pub(super) struct FaultsArguments {
    /// How many seeds.
    #[arg(long, value_name = "N", default_value_t = 200, conflicts_with = "seed")]
    seeds: u64,
    /// The first of them.
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "seed")]
    start: u64,
    /// One seed alone.
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Print what happens in it on standard error, a line each.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Put a bug into the world, to see whether it is found.
    #[arg(long, value_enum, value_name = "BUG")]
    plant: Option<Plant>,
    /// For each bug that can be planted: how many seeds pass until it is found.
    #[arg(long, conflicts_with_all = ["seed", "plant"])]
    planted: bool,
    /// Worlds at once; by default one for each processor.
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
}

/// Why seeds cannot be run.
#[derive(Debug, thiserror::Error)]
pub(super) enum FaultsError {
    /// A world cannot be set up.
    #[error(transparent)]
    World(#[from] WorldError),
    /// Nobody reads.
    #[error("cannot write what was found: {0}")]
    Output(#[from] io::Error),
}

/// Violations that are printed; of further seeds only the number is.
const SHOWN: usize = 20;

struct Outcome {
    seeds: u64,
    violating: Vec<(u64, Vec<String>)>,
    tally: Tally,
    ended: BTreeMap<String, u64>,
    time: Duration,
}

/// Runs what the arguments say, prints what came of it, and tells whether nothing was violated.
///
/// # Errors
/// [`FaultsError`].
pub(super) fn run(arguments: &FaultsArguments, out: &mut dyn Write) -> Result<bool, FaultsError> {
    if arguments.planted {
        return planted(arguments, out);
    }
    if let Some(seed) = arguments.seed {
        let report = world::run(Settings { seed, plant: arguments.plant, trace: arguments.trace })?;
        writeln!(out, "the run {}", report.ended)?;
        out.write_all(tally(&report.tally).as_bytes())?;
        for violation in &report.violations {
            writeln!(out, "VIOLATION: {violation}")?;
        }
        writeln!(out, "1 seed, {} violations", report.violations.len())?;
        return Ok(report.violations.is_empty());
    }
    let outcome = many(arguments, arguments.plant)?;
    out.write_all(tally(&outcome.tally).as_bytes())?;
    for (reason, count) in &outcome.ended {
        writeln!(out, "{count:>9}  runs {reason}")?;
    }
    for (seed, violations) in outcome.violating.iter().take(SHOWN) {
        for violation in violations {
            writeln!(out, "seed {seed}: VIOLATION: {violation}")?;
        }
        writeln!(out, "seed {seed}: replay it with `tributary-sim faults --seed {seed} --trace`")?;
    }
    writeln!(
        out,
        "{} seeds, {} violations, {:.0} s",
        outcome.seeds,
        outcome.violating.len(),
        outcome.time.as_secs_f64()
    )?;
    Ok(outcome.violating.is_empty())
}

fn planted(arguments: &FaultsArguments, out: &mut dyn Write) -> Result<bool, FaultsError> {
    let mut all = true;
    writeln!(out, "planted bug          seeds until it was found")?;
    for plant in Plant::value_variants() {
        let name = plant.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        let mut found = None;
        for count in 1..=arguments.seeds.max(1) {
            let seed = arguments.start + count - 1;
            let report = world::run(Settings { seed, plant: Some(*plant), trace: false })?;
            if let Some(violation) = report.violations.first() {
                found = Some((count, violation.clone()));
                break;
            }
        }
        match found {
            Some((count, violation)) => writeln!(out, "{name:20} {count:>6}   {violation}")?,
            None => {
                all = false;
                writeln!(out, "{name:20} not in {} seeds", arguments.seeds)?;
            }
        }
    }
    Ok(all)
}

/// Runs the seeds on several threads. What is found does not depend on how many.
fn many(arguments: &FaultsArguments, plant: Option<Plant>) -> Result<Outcome, WorldError> {
    let begun = Instant::now();
    let workers = arguments
        .workers
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get));
    let next = AtomicU64::new(0);
    let reports: Mutex<Vec<(u64, Result<Report, WorldError>)>> = Mutex::default();
    let bar = ProgressBar::new(arguments.seeds);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} seeds, {per_sec}, {msg}") {
        bar.set_style(style);
    }
    let mut outcome = Outcome {
        seeds: 0,
        violating: Vec::new(),
        tally: Tally::new(),
        ended: BTreeMap::new(),
        time: Duration::ZERO,
    };
    std::thread::scope(|scope| {
        for _ in 0..workers.max(1) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= arguments.seeds {
                        return;
                    }
                    let seed = arguments.start + at;
                    let report = world::run(Settings { seed, plant, trace: false });
                    bar.inc(1);
                    let mut reports = reports.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    reports.push((seed, report));
                }
            });
        }
    });
    bar.finish_and_clear();
    let mut reports = reports.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    reports.sort_by_key(|(seed, _)| *seed);
    for (seed, report) in reports {
        let report = report?;
        outcome.seeds += 1;
        for (what, count) in report.tally {
            *outcome.tally.entry(what).or_default() += count;
        }
        // The words after the reason's kind name nodes and numbers.
        let ended = report.ended.split(':').take(2).collect::<Vec<_>>().join(":");
        *outcome.ended.entry(ended).or_default() += 1;
        if !report.violations.is_empty() {
            outcome.violating.push((seed, report.violations));
        }
    }
    outcome.time = begun.elapsed();
    Ok(outcome)
}

fn tally(tally: &Tally) -> String {
    tally.iter().map(|(what, count)| format!("{count:>9}  {what}\n")).collect()
}
