//! A sweep: one scenario run at every point of a grid, each run in a folder of its own, resumed where it broke.

mod folder;
mod grid;
mod table;
#[cfg(test)]
mod tests;

pub use folder::SweepFolderError;
pub use grid::{Grid, GridError, POINTS, Point, Varied};
pub use table::{Figures, Summary, Table};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tributary_client::data::Dataset;
use tributary_common::digest::Digest;
use tributary_common::progress::Progress;
use tributary_common::record::{RoundOutcome, RunEvent};

use crate::engine::{Observation, Settings};
use crate::follow::Follower;
use crate::report::{self, FolderError, Loaded, Target};
use crate::scenario::{Overrides, Scenario, ScenarioError};
use crate::session::Session;
use crate::workers::MakeTrainer;
use folder::{Manifest, SweepFolder, resolved};

pub(crate) use grid::value;

/// Combinations whose curves one picture shows at most: more cannot be told apart.
pub const CURVES: usize = 40;

/// How often a waiting sweep looks whether it is to stop.
const PATIENCE: Duration = Duration::from_millis(100);

/// Why a sweep cannot start. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// A point's scenario is refused; nothing ran.
    #[error("point {point}: {error}")]
    Scenario {
        /// The point's name.
        point: String,
        /// What is wrong with it.
        error: ScenarioError,
    },
    /// Its folder cannot be used.
    #[error(transparent)]
    Folder(#[from] SweepFolderError),
    /// A finished point cannot be read again.
    #[error(transparent)]
    Run(#[from] FolderError),
    /// The table or the report cannot be made.
    #[error("the sweep's report cannot be made: {0}")]
    Report(String),
}

/// One point with its scenario.
#[derive(Debug)]
struct Planned {
    point: Point,
    scenario: Scenario,
    digest: Digest,
}

/// What became of a point.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// An earlier process finished it.
    Skipped(Figures),
    /// It was run to its end.
    Finished(Figures),
    /// It was not; one line.
    Failed(String),
    /// The sweep was interrupted before its end.
    NotReached,
}

impl Outcome {
    /// The figures of a run that is there.
    pub fn figures(&self) -> Option<&Figures> {
        match self {
            Self::Skipped(figures) | Self::Finished(figures) => Some(figures),
            Self::Failed(_) | Self::NotReached => None,
        }
    }
}

/// What happens in a sweep.
#[derive(Debug)]
pub enum SweepEvent<'a> {
    /// A round of some point was published.
    Round,
    /// A point is done, or failed.
    Point {
        /// The point.
        point: &'a Point,
        /// What became of it.
        outcome: &'a Outcome,
    },
}

/// How a sweep runs.
#[derive(Clone)]
pub struct SweepSettings {
    /// Points that run at once, from 1.
    pub parallel: usize,
    /// Worker threads of all points together, from 1.
    pub workers: usize,
    /// Makes a worker's trainer.
    pub trainer: MakeTrainer,
    /// What the trainer is called.
    pub trainer_name: String,
}

/// A sweep whose points are all understood and whose folder is ready.
#[derive(Debug)]
pub struct Sweep {
    grid: Grid,
    points: Vec<Planned>,
    folder: SweepFolder,
    outcomes: Vec<Outcome>,
}

/// Data that several points use: loaded by the first, freed with the last.
type SharedData = Arc<Mutex<Option<Dataset>>>;

struct Task<'a> {
    index: usize,
    planned: &'a Planned,
    data: SharedData,
}

enum News {
    Round,
    Done(usize, Outcome),
}

impl Sweep {
    /// Reads the scenario in `file` for every point of `grid`, and opens the folder `out`, where points that an
    /// earlier process finished are kept. Without `out` the folder is `runs/NAME-sweep`.
    ///
    /// # Errors
    /// The first scenario that is refused; a folder that is somebody else's, or another sweep's.
    pub fn open(
        file: &Path,
        overrides: &Overrides,
        grid: Grid,
        out: Option<&Path>,
        trainer_name: &str,
    ) -> Result<Self, SweepError> {
        let mut points = Vec::new();
        for point in grid.points() {
            let mut of_point = overrides.clone();
            of_point.set.extend(grid.assignments(&point));
            of_point.seed = point.seed.or(overrides.seed);
            let read = Scenario::read(file, &of_point).and_then(|read| Ok((resolved(&read)?, read)));
            match read {
                Ok((digest, scenario)) => points.push(Planned { point, scenario, digest }),
                Err(error) => return Err(SweepError::Scenario { point: point.name, error }),
            }
        }
        let name = points.first().map_or("", |first| first.scenario.job.name.as_str());
        let digests: Vec<_> =
            points.iter().map(|planned| (planned.point.name.clone(), planned.digest)).collect();
        let manifest = Manifest::new(name, trainer_name, &grid, &digests);
        let out = out.map_or_else(
            || PathBuf::from("runs").join(format!("{}-sweep", name.replace(' ', "-"))),
            Path::to_path_buf,
        );
        let folder = SweepFolder::open(&out, &manifest)?;
        let done = |planned: &Planned| folder.done(&planned.point.name, planned.digest);
        let outcomes = points.iter().map(|planned| {
            done(planned).map_or(Outcome::NotReached, |loaded| Outcome::Skipped(Figures::of(&loaded)))
        });
        let outcomes = outcomes.collect();
        Ok(Self { grid, points, folder, outcomes })
    }

    /// What is varied.
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// The points with what became of them, in the grid's order.
    pub fn outcomes(&self) -> impl Iterator<Item = (&Point, &Outcome)> {
        self.points.iter().map(|planned| &planned.point).zip(&self.outcomes)
    }

    /// Points that are still to be run.
    pub fn remaining(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.figures().is_none()).count()
    }

    /// Rounds that are still to be run.
    pub fn remaining_rounds(&self) -> u64 {
        let left = self.points.iter().zip(&self.outcomes).filter(|(_, outcome)| outcome.figures().is_none());
        left.map(|(planned, _)| u64::from(planned.scenario.job.rounds)).sum()
    }

    /// Runs the points that are left, until all are done or `stop` is set. A point that fails does not stop the
    /// others. Points that were interrupted leave nothing, and the next call of the same sweep runs them.
    pub fn run(&mut self, settings: &SweepSettings, stop: &AtomicBool, tell: &mut dyn FnMut(SweepEvent<'_>)) {
        let mut by_table: BTreeMap<String, SharedData> = BTreeMap::new();
        let mut tasks = Vec::new();
        for (index, planned) in self.points.iter().enumerate() {
            if self.outcomes.get(index).is_some_and(|outcome| outcome.figures().is_none()) {
                let data = by_table.entry(data_key(&planned.scenario)).or_default().clone();
                tasks.push(Task { index, planned, data });
            }
        }
        drop(by_table);
        let threads = settings.parallel.min(tasks.len());
        let workers = (settings.workers / threads.max(1)).max(1);
        let queue = Mutex::new(tasks.into_iter());
        // Each has a flag of its own: a point whose records cannot be written stops, and the others go on.
        let stops: Vec<AtomicBool> = (0..threads).map(|_| AtomicBool::new(false)).collect();
        let (points, folder, outcomes) = (&self.points, &self.folder, &mut self.outcomes);
        std::thread::scope(|scope| {
            let (sender, news) = mpsc::channel();
            for own in &stops {
                let (queue, sender) = (&queue, sender.clone());
                scope.spawn(move || {
                    loop {
                        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                        let Some(task) = next.filter(|_| !stop.load(Ordering::Relaxed)) else { return };
                        own.store(stop.load(Ordering::Relaxed), Ordering::Relaxed);
                        let index = task.index;
                        let mut round = || drop(sender.send(News::Round));
                        let outcome = match run_point(task, folder, settings, workers, own, &mut round) {
                            Ok(Some(figures)) => Outcome::Finished(figures),
                            Ok(None) => Outcome::NotReached,
                            Err(problem) => Outcome::Failed(problem),
                        };
                        drop(sender.send(News::Done(index, outcome)));
                    }
                });
            }
            drop(sender);
            loop {
                let news = news.recv_timeout(PATIENCE);
                if stop.load(Ordering::Relaxed) {
                    stops.iter().for_each(|own| own.store(true, Ordering::Relaxed));
                }
                match news {
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                    Ok(News::Round) => tell(SweepEvent::Round),
                    Ok(News::Done(index, outcome)) => {
                        if let Some(Planned { point, .. }) = points.get(index) {
                            tell(SweepEvent::Point { point, outcome: &outcome });
                        }
                        outcomes.get_mut(index).into_iter().for_each(|place| *place = outcome.clone());
                    }
                }
            }
        });
    }

    /// A row per combination.
    pub fn table(&self) -> Table {
        Table::new(&self.grid, self.outcomes())
    }

    /// Writes `sweep.csv` and `sweep.html` and returns where they are.
    ///
    /// # Errors
    /// [`SweepError::Folder`], [`SweepError::Run`] or [`SweepError::Report`].
    pub fn write(&self, table: &Table) -> Result<(PathBuf, PathBuf), SweepError> {
        let csv = table.to_csv().map_err(|error| SweepError::Report(error.to_string()))?;
        let csv = self.folder.write("sweep.csv", &csv)?;
        let mut curves = Vec::new();
        for combination in table.best(CURVES) {
            let mut runs = Vec::new();
            for (point, outcome) in self.outcomes().filter(|(point, _)| point.combination == combination) {
                if outcome.figures().is_some() {
                    runs.push(report::load(&self.folder.point(&point.name))?);
                }
            }
            curves.push((combination, runs));
        }
        let name = self.points.first().map_or("", |first| first.scenario.job.name.as_str());
        let html = report::sweep(name, &self.grid, table, &curves).map_err(SweepError::Report)?;
        Ok((csv, self.folder.write("sweep.html", html.as_bytes())?))
    }
}

/// Equal keys mean equal data.
fn data_key(scenario: &Scenario) -> String {
    let model = &scenario.job.model;
    format!("{:?} {:?} {:?} {}", scenario.data, scenario.base, model.inputs, model.classes)
}

/// Runs one point into its folder; nothing if it was interrupted, one line if it failed.
fn run_point(
    task: Task<'_>,
    folder: &SweepFolder,
    settings: &SweepSettings,
    workers: usize,
    stop: &AtomicBool,
    round: &mut dyn FnMut(),
) -> Result<Option<Figures>, String> {
    let Planned { point, scenario, digest } = task.planned;
    let line = |error: &dyn std::fmt::Display| error.to_string();
    folder.clear(&point.name).map_err(|error| line(&error))?;
    let target =
        Target::choose(Some(&folder.point(&point.name)), &scenario.job).map_err(|error| line(&error))?;
    let dataset = {
        let mut shared = task.data.lock().unwrap_or_else(PoisonError::into_inner);
        match &*shared {
            Some(loaded) => loaded.clone(),
            None => shared.insert(scenario.load().map_err(|error| line(&error))?).clone(),
        }
    };
    let federation = scenario.share(dataset).map_err(|error| line(&error))?;
    let session = Session::new(scenario, federation).map_err(|error| line(&error))?;
    let run = Settings::new(workers, settings.trainer.clone());
    let mut nowhere = std::io::sink();
    let follower = Follower::silent(Progress::of(&Arc::new(scenario.job.clone())), &mut nowhere);
    // Why clients did not take part: the first reason explains a run that failed for want of them.
    let mut declined = None;
    let mut also = |observation: &Observation<'_>| match observation {
        Observation::Event(RunEvent::RoundEnded { record }) => {
            if matches!(record.outcome, RoundOutcome::Published { .. }) {
                round();
            }
        }
        Observation::Declined { client, detail, .. } if declined.is_none() => {
            declined = Some(format!("{client} declined: {detail}"));
        }
        _ => {}
    };
    let ended = session.run(run, &settings.trainer_name, target, follower, stop, &mut also);
    let ended = ended.map_err(|error| line(&error))?;
    if ended.interrupted() {
        return Ok(None);
    }
    let problem = ended.problem();
    ended.write().map_err(|error| line(&error))?;
    match (problem, declined) {
        (None, _) => {}
        (Some(problem), None) => return Err(problem),
        (Some(problem), Some(declined)) => return Err(format!("{problem} ({declined})")),
    }
    let loaded = folder.done(&point.name, *digest);
    loaded
        .map(|loaded| Some(Figures::of(&loaded)))
        .ok_or_else(|| "its folder was changed while it was written".into())
}

/// The mean learning curve of the runs of one combination, with the rounds that all of them evaluated.
pub(crate) fn mean_curve(runs: &[Loaded], value: fn(&report::Row) -> Option<f64>) -> Vec<(f64, f64)> {
    let mut sums: BTreeMap<u32, (f64, usize)> = BTreeMap::new();
    for row in runs.iter().flat_map(|run| &run.rows) {
        if let Some(value) = value(row) {
            let (sum, count) = sums.entry(row.round).or_default();
            (*sum, *count) = (*sum + value, *count + 1);
        }
    }
    let whole = sums.into_iter().filter(|(_, (_, count))| *count == runs.len());
    whole.map(|(round, (sum, count))| (f64::from(round), sum / count as f64)).collect()
}
