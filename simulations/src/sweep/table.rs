//! What a sweep found: the figures of each run, and one row per combination, with mean and deviation over seeds.

use serde::Serialize;
use tributary_common::digest::Digest;
use tributary_common::progress::bytes_words;

use super::Outcome;
use super::grid::{Grid, Point};
use crate::report::Loaded;

/// The figures of one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Share of correct examples after the last round, 0 to 1; absent where nothing was evaluated.
    pub accuracy: Option<f64>,
    /// The best accuracy of any round.
    pub best_accuracy: Option<f64>,
    /// The first round that reached it.
    pub best_round: Option<u32>,
    /// Mean loss after the last round.
    pub loss: Option<f64>,
    /// Published rounds.
    pub rounds: u32,
    /// Bytes of updates.
    pub bytes_up: u64,
    /// Bytes of models.
    pub bytes_down: u64,
    /// Wall time of its rounds.
    pub seconds: f64,
    /// Digest of the model.
    pub model_digest: Option<Digest>,
}

impl Figures {
    /// Of a run's folder.
    pub(crate) fn of(run: &Loaded) -> Self {
        let last = run.rows.last();
        let mut best: Option<(f64, u32)> = None;
        for (accuracy, round) in run.rows.iter().filter_map(|row| Some((row.accuracy?, row.round))) {
            if best.is_none_or(|(best, _)| accuracy > best) {
                best = Some((accuracy, round));
            }
        }
        Self {
            accuracy: last.and_then(|row| row.accuracy),
            best_accuracy: best.map(|(accuracy, _)| accuracy),
            best_round: best.map(|(_, round)| round),
            loss: last.and_then(|row| row.loss),
            rounds: last.map_or(0, |row| row.round),
            bytes_up: run.rows.iter().map(|row| row.bytes_up).sum(),
            bytes_down: run.rows.iter().map(|row| row.bytes_down).sum(),
            seconds: run.rows.iter().map(|row| row.seconds).sum(),
            model_digest: run.digest,
        }
    }
}

/// Mean and sample standard deviation of a figure over seeds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// The mean.
    pub mean: f64,
    /// The sample standard deviation (divided by n − 1); absent for one value.
    pub deviation: Option<f64>,
}

impl Summary {
    /// Of these values; `None` without any.
    pub fn of(values: &[f64]) -> Option<Self> {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt());
        (!values.is_empty()).then_some(Self { mean, deviation })
    }
}

/// One figure's column.
struct Column {
    name: &'static str,
    heading: &'static str,
    figure: fn(&Figures) -> Option<f64>,
    words: fn(f64) -> String,
}

const COLUMNS: [Column; 7] = [
    Column {
        name: "accuracy",
        heading: "accuracy",
        figure: |of| of.accuracy,
        words: |value| format!("{value:.4}"),
    },
    Column {
        name: "best_accuracy",
        heading: "best",
        figure: |of| of.best_accuracy,
        words: |value| format!("{value:.4}"),
    },
    Column {
        name: "best_round",
        heading: "in round",
        figure: |of| of.best_round.map(f64::from),
        words: whole,
    },
    Column { name: "loss", heading: "loss", figure: |of| of.loss, words: |value| format!("{value:.4}") },
    Column { name: "rounds", heading: "rounds", figure: |of| Some(f64::from(of.rounds)), words: whole },
    Column {
        name: "bytes",
        heading: "bytes",
        figure: |of| Some((of.bytes_up + of.bytes_down) as f64),
        words: |value| bytes_words(value as u64),
    },
    Column {
        name: "seconds",
        heading: "seconds",
        figure: |of| Some(of.seconds),
        words: |value| format!("{value:.1}"),
    },
];

fn whole(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

/// One combination of values.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Which.
    pub combination: usize,
    /// The values, as they were written.
    pub values: Vec<String>,
    /// Runs that are there, and runs that there should be.
    pub runs: (usize, usize),
    /// Each column's figure over the runs that are there.
    figures: Vec<Option<Summary>>,
}

impl Row {
    /// The final accuracy.
    pub fn accuracy(&self) -> Option<Summary> {
        self.figures.first().copied().flatten()
    }
}

/// A sweep's table.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    labels: Vec<String>,
    keys: Vec<String>,
    seeded: bool,
    /// A row per combination, in the grid's order.
    pub rows: Vec<Row>,
}

impl Table {
    pub(crate) fn new<'a>(grid: &Grid, outcomes: impl Iterator<Item = (&'a Point, &'a Outcome)>) -> Self {
        let mut runs: Vec<Vec<&Figures>> = vec![Vec::new(); grid.combinations()];
        for (point, outcome) in outcomes {
            if let (Some(figures), Some(place)) = (outcome.figures(), runs.get_mut(point.combination)) {
                place.push(figures);
            }
        }
        let row = |(combination, runs): (usize, Vec<&Figures>)| {
            let figure = |column: &Column| {
                let values: Vec<f64> = runs.iter().filter_map(|figures| (column.figure)(figures)).collect();
                Summary::of(&values)
            };
            let values = grid.values(&grid.choices(combination)).into_iter().map(str::to_owned).collect();
            let runs = (runs.len(), grid.seeds.len().max(1));
            Row { combination, values, runs, figures: COLUMNS.iter().map(figure).collect() }
        };
        // `figure` borrows a row's runs, so each row is made in one go.
        let rows = runs.into_iter().enumerate().map(row).collect();
        Self {
            labels: grid.labels().into_iter().map(str::to_owned).collect(),
            keys: grid.varied.iter().map(|one| one.key.clone()).collect(),
            seeded: !grid.seeds.is_empty(),
            rows,
        }
    }

    /// The combinations with the highest final accuracy, at most `most`, in the grid's order; those without a run
    /// are left out.
    pub fn best(&self, most: usize) -> Vec<usize> {
        let mut rows: Vec<&Row> = self.rows.iter().filter(|row| row.runs.0 > 0).collect();
        let accuracy = |row: &Row| row.accuracy().map_or(f64::NEG_INFINITY, |accuracy| accuracy.mean);
        rows.sort_by(|a, b| accuracy(b).total_cmp(&accuracy(a)));
        let mut best: Vec<usize> = rows.into_iter().take(most).map(|row| row.combination).collect();
        best.sort_unstable();
        best
    }

    /// For people: the headings, and a line of cells per combination.
    pub fn cells(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let mut headings = self.labels.clone();
        headings.extend(self.seeded.then(|| "seeds".to_owned()));
        headings.extend(COLUMNS.iter().map(|column| column.heading.to_owned()));
        let line = |row: &Row| {
            let mut cells = row.values.clone();
            let (there, of) = row.runs;
            cells.extend(
                self.seeded.then(|| if there == of { of.to_string() } else { format!("{there} of {of}") }),
            );
            cells.extend(COLUMNS.iter().zip(&row.figures).map(|(column, summary)| match summary {
                None => "–".to_owned(),
                Some(Summary { mean, deviation: Some(deviation) })
                    if !["rounds", "bytes"].contains(&column.name) =>
                {
                    format!("{} ± {}", (column.words)(*mean), (column.words)(*deviation))
                }
                Some(Summary { mean, .. }) => (column.words)(*mean),
            }));
            cells
        };
        (headings, self.rows.iter().map(line).collect())
    }

    /// For programs: a column per key and figure, and with seeds one more per figure for its deviation.
    pub(crate) fn to_csv(&self) -> Result<Vec<u8>, csv::Error> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let mut headings = self.keys.clone();
        headings.extend(self.seeded.then(|| "seeds".to_owned()));
        for column in &COLUMNS {
            headings.push(column.name.to_owned());
            headings.extend(self.seeded.then(|| format!("{}_sd", column.name)));
        }
        writer.write_record(&headings)?;
        let text = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
        for row in &self.rows {
            let mut cells = row.values.clone();
            cells.extend(self.seeded.then(|| row.runs.0.to_string()));
            for summary in &row.figures {
                cells.push(text(summary.map(|summary| summary.mean)));
                cells.extend(self.seeded.then(|| text(summary.and_then(|summary| summary.deviation))));
            }
            writer.write_record(&cells)?;
        }
        writer.into_inner().map_err(|error| error.into_error().into())
    }
}

impl std::fmt::Display for Table {
    /// Aligned columns: values to the left, figures to the right.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (headings, lines) = self.cells();
        let width = |text: &String| text.chars().count();
        let all = || std::iter::once(&headings).chain(&lines);
        let widths: Vec<usize> = (0..headings.len())
            .map(|at| all().filter_map(|line| line.get(at)).map(width).max().unwrap_or(0))
            .collect();
        for (index, line) in all().enumerate() {
            let mut text = String::new();
            for (at, (cell, width)) in line.iter().zip(&widths).enumerate() {
                let gap = if at == 0 { "" } else { "  " };
                if at < self.labels.len() {
                    text += &format!("{gap}{cell:<width$}");
                } else {
                    text += &format!("{gap}{cell:>width$}");
                }
            }
            let end = if index == 0 { "" } else { "\n" };
            write!(f, "{end}{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviation_is_that_of_a_sample() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[0.5]), Some(Summary { mean: 0.5, deviation: None }));
        assert_eq!(Summary::of(&[1.0, 3.0, 5.0]), Some(Summary { mean: 3.0, deviation: Some(2.0) }));
    }
}
