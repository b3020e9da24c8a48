//! The report of one run, and the comparison of several, as self-contained HTML.

use std::collections::BTreeMap;

use askama::Template;
use tributary_common::job::Job;
use tributary_common::progress::bytes_words;
use tributary_common::record::{EvaluationRecord, Metrics};

use super::chart::{self, Axis, Curve};
use super::crossing::Crossing;
use super::folder::{Loaded, Row};
use super::history::{History, Point};
use crate::engine::{Timing, duration};
use crate::population::{Quantiles, SHOWN, Spread};

/// Most classes for which the whole confusion matrix is shown.
const MATRIX_CLASSES: usize = 30;

/// What computed a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The processor's model.
    pub processor: String,
    /// The instruction sets that libtorch's kernels choose by.
    pub instruction_sets: String,
    /// What trained: libtorch with its version, or the arithmetic stand-in.
    pub trainer: String,
    /// Worker threads.
    pub workers: usize,
    /// Whether a job's noise is drawn from secret bits.
    pub has_secret_noise: bool,
}

/// What a report tells about one run.
#[derive(Debug, Clone)]
pub struct RunReport<'a> {
    /// The job as resolved.
    pub job: &'a Job,
    /// The scenario as resolved.
    pub scenario_toml: &'a str,
    /// Why the run is not what was asked for: stopped, failed, interrupted.
    pub warning: Option<String>,
    /// A row per published round.
    pub rows: &'a [Row],
    /// When the accuracy that was asked about was reached.
    pub crossing: Option<Crossing>,
    /// All attempts and evaluations, summed up.
    pub history: &'a History,
    /// How long the real federation would have taken.
    pub timing: &'a Timing,
    /// How the data are spread.
    pub spread: &'a Spread,
    /// Digest of the last published model, or of the initial one.
    pub digest: String,
    /// Wall time of the run.
    pub seconds: f64,
    /// What computed it.
    pub machine: &'a Machine,
}

pub(super) struct Picture {
    pub(super) svg: String,
    pub(super) caption: &'static str,
}

pub(super) struct LegendEntry {
    pub(super) colour: String,
    pub(super) name: String,
}

struct Confusion {
    caption: String,
    classes: Vec<usize>,
    rows: Vec<ConfusionRow>,
}

struct ConfusionRow {
    class: usize,
    cells: Vec<ConfusionCell>,
}

struct ConfusionCell {
    count: String,
    shade: String,
}

struct ClientRow {
    client: String,
    examples: u64,
    accuracy: String,
    loss: String,
}

#[derive(Default)]
struct Heat {
    width: usize,
    height: usize,
    cell_width: usize,
    cell_height: usize,
    texts: Vec<HeatText>,
    cells: Vec<HeatCell>,
    bars: Vec<HeatBar>,
    caption: String,
}

struct HeatText {
    x: usize,
    y: usize,
    anchor: &'static str,
    text: String,
}

struct HeatCell {
    x: usize,
    y: usize,
    shade: String,
    title: String,
}

struct HeatBar {
    x: usize,
    y: usize,
    width: usize,
}

#[derive(Template)]
#[template(path = "report.html")]
struct ReportPage<'a> {
    name: &'a str,
    warning: Option<&'a str>,
    summary: Vec<(&'static str, String)>,
    digest: &'a str,
    curves: Vec<Picture>,
    legend: Vec<LegendEntry>,
    confusion: Option<Confusion>,
    by_client: Vec<ClientRow>,
    spread_words: String,
    quantiles: Vec<(&'static str, Quantiles)>,
    heat: Heat,
    abandoned: &'a [String],
    abandoned_more: usize,
    machine: Vec<(&'static str, String)>,
    timing: Vec<(&'static str, String)>,
    job_toml: &'a str,
    scenario_toml: &'a str,
}

struct ComparedRun {
    name: String,
    job: String,
    algorithm: String,
    seed: u64,
    rounds: usize,
    accuracy: String,
    best: String,
    loss: String,
    bytes: String,
    seconds: String,
    digest: String,
    short_digest: String,
}

#[derive(Template)]
#[template(path = "comparison.html")]
struct ComparisonPage {
    runs: Vec<ComparedRun>,
    curves: Vec<Picture>,
    legend: Vec<LegendEntry>,
    differences: Vec<(String, Vec<String>)>,
}

fn figure(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.4}"))
}

pub(super) fn pictures(accuracy: &[Curve], loss: &[Curve]) -> Vec<Picture> {
    let accuracy = chart::curves(Axis::Share("accuracy (share correct)"), accuracy);
    let loss = chart::curves(Axis::FromZero("mean loss (nats)"), loss);
    let captions =
        [(accuracy, "Accuracy of the published model after each round."), (loss, "Mean cross-entropy loss.")];
    captions.into_iter().filter_map(|(svg, caption)| Some(Picture { svg: svg?, caption })).collect()
}

pub(super) fn legend(names: impl IntoIterator<Item = String>) -> Vec<LegendEntry> {
    let entry = |(index, name)| LegendEntry { colour: chart::colour(index), name };
    names.into_iter().enumerate().map(entry).collect()
}

/// The report of one run.
///
/// # Errors
/// What the template engine or the job's TOML says, in one line; neither is expected to fail.
pub fn render(report: &RunReport<'_>) -> Result<String, String> {
    let job = report.job;
    let job_toml = job.to_toml().map_err(|error| error.to_string())?;
    let history = report.history;
    let of = [
        ("held-out examples", &history.held_out),
        ("clients' own test examples together", &history.federated),
    ];
    let present: Vec<_> = of.into_iter().filter(|(_, points)| !points.is_empty()).collect();
    let curve = |points: &[Point], value: fn(&Point) -> Option<f64>| -> Curve {
        points.iter().filter_map(|point| Some((f64::from(point.round), value(point)?))).collect()
    };
    let accuracy: Vec<Curve> = present.iter().map(|(_, of)| curve(of, |point| point.accuracy)).collect();
    let loss: Vec<Curve> = present.iter().map(|(_, of)| curve(of, |point| point.loss)).collect();

    let last = history.last.as_ref();
    let headline = last.and_then(EvaluationRecord::headline);
    let per_round = report.seconds / report.rows.len().max(1) as f64;
    let mut summary = vec![
        ("rounds", format!("{} of {}", report.rows.len(), job.rounds)),
        ("final accuracy", figure(headline.as_ref().and_then(Metrics::accuracy))),
        ("final loss", figure(headline.as_ref().and_then(Metrics::loss))),
        ("algorithm", algorithm(job)),
        (
            "model",
            format!(
                "{}, inputs {:?}, {} classes",
                job.model.architecture.name(),
                job.model.inputs,
                job.model.classes
            ),
        ),
        ("bytes up, down", format!("{}, {}", bytes_words(history.bytes_up), bytes_words(history.bytes_down))),
        (
            "updates",
            format!(
                "{}, together {}, {} each on average",
                history.updates,
                bytes_words(history.update_bytes),
                bytes_words(history.update_bytes / history.updates.max(1))
            ),
        ),
        ("drop-outs", history.dropped.to_string()),
        ("wall time", format!("{:.1} s, {per_round:.2} s per round", report.seconds)),
        ("seed", job.seed.to_string()),
    ];
    if let Some(crossing) = &report.crossing {
        summary.insert(3, ("target", crossing.to_string()));
    }
    if let Some((round, loss)) = history.training_loss.last() {
        summary.push(("training loss", format!("{loss:.4} in round {round}, summed under the masks")));
    }
    if !history.lost.is_empty() {
        let rounds: Vec<String> = history.lost.iter().map(u32::to_string).collect();
        summary.push(("rounds lost", format!("{}: their sums could not be opened", rounds.join(", "))));
    }
    if let Ok(Some(promise)) = job.promise() {
        let what =
            if report.machine.has_secret_noise { promise } else { "none: no secret noise was added".into() };
        summary.push(("privacy", what));
    }
    let spread = report.spread;
    let machine = report.machine;
    ReportPage {
        name: &job.name,
        warning: report.warning.as_deref(),
        summary,
        digest: &report.digest,
        curves: pictures(&accuracy, &loss),
        legend: if present.len() > 1 { legend(present.iter().map(|(name, _)| (*name).to_owned())) } else { Vec::new() },
        confusion: headline.as_ref().and_then(|metrics| confusion(metrics, job.model.classes, last.map_or(0, |l| l.round))),
        by_client: last.map(by_client).unwrap_or_default(),
        spread_words: format!(
            "{} clients; label skew {:.2} (mean total variation distance between a client's labels and everybody's: \
             0 is even, towards 1 each client has labels of its own).",
            spread.clients, spread.label_skew
        ),
        quantiles: vec![("training examples", spread.examples), ("different labels", spread.labels)],
        heat: heat(spread),
        abandoned: &history.abandoned,
        abandoned_more: history.abandoned_more,
        machine: vec![
            ("processor", machine.processor.clone()),
            ("instruction sets", machine.instruction_sets.clone()),
            ("trainer", machine.trainer.clone()),
            ("workers", machine.workers.to_string()),
            ("tributary", env!("CARGO_PKG_VERSION").to_owned()),
        ],
        timing: timing(report.timing),
        job_toml: &job_toml,
        scenario_toml: report.scenario_toml,
    }
    .render()
    .map_err(|error| error.to_string())
}

fn algorithm(job: &Job) -> String {
    match job.train.proximal_mu {
        Some(mu) => format!("FedProx, µ = {mu}"),
        None => "FedAvg".to_owned(),
    }
}

fn confusion(metrics: &Metrics, classes: usize, round: u32) -> Option<Confusion> {
    if metrics.confusion.is_empty()
        || metrics.confusion.len() != classes * classes
        || classes > MATRIX_CLASSES
    {
        return None;
    }
    let row = |(class, counts): (usize, &[Option<u64>])| {
        let sum = counts.iter().flatten().sum::<u64>().max(1) as f64;
        let cell = |count: &Option<u64>| ConfusionCell {
            count: count.map_or_else(|| "hidden".to_owned(), |count| count.to_string()),
            shade: format!("{:.2}", 0.75 * count.unwrap_or(0) as f64 / sum),
        };
        ConfusionRow { class, cells: counts.iter().map(cell).collect() }
    };
    Some(Confusion {
        caption: format!(
            "{} examples after round {round}. Rows: label; columns: predicted class; shade: share of the row.",
            metrics.examples
        ),
        classes: (0..classes).collect(),
        rows: metrics.confusion.chunks(classes).enumerate().map(row).collect(),
    })
}

fn by_client(record: &EvaluationRecord) -> Vec<ClientRow> {
    let row = |client: String, metrics: &Metrics| ClientRow {
        client,
        examples: metrics.examples,
        accuracy: figure(metrics.accuracy()),
        loss: figure(metrics.loss()),
    };
    let mut rows: Vec<ClientRow> = record
        .by_client
        .iter()
        .take(SHOWN)
        .map(|(client, metrics)| row(client.to_string(), metrics))
        .collect();
    let accuracies: Vec<f64> = record.by_client.values().filter_map(Metrics::accuracy).collect();
    if !accuracies.is_empty() {
        let losses: Vec<f64> = record.by_client.values().filter_map(Metrics::loss).collect();
        let mean = |values: &[f64]| figure(Some(values.iter().sum::<f64>() / values.len() as f64));
        rows.push(ClientRow {
            client: format!("mean of {} clients", accuracies.len()),
            examples: record.by_client.values().map(|metrics| metrics.examples).sum(),
            accuracy: mean(&accuracies),
            loss: mean(&losses),
        });
    }
    rows.extend(record.federated().map(|pooled| row("pooled".to_owned(), &pooled)));
    rows
}

fn timing(timing: &Timing) -> Vec<(&'static str, String)> {
    let of = &timing.round_milliseconds;
    let per_cent = |share: f64| format!("{:.1} %", share * 100.0);
    vec![
        ("whole run", duration(timing.total_milliseconds)),
        (
            "a published round",
            format!(
                "{} (median), {} (a tenth), {} (nine tenths), {} (longest)",
                duration(of.median),
                duration(of.tenth),
                duration(of.ninetieth),
                duration(of.maximum)
            ),
        ),
        ("rounds that ended by their deadline", per_cent(timing.ended_by_deadline)),
        ("a client's wait for others, of its round", per_cent(timing.idle_share)),
    ]
}

fn heat(spread: &Spread) -> Heat {
    const LEFT: usize = 150;
    const TOP: usize = 34;
    const GAP: usize = 10;
    const BAR: u64 = 140;
    let classes = spread.shown.iter().map(|client| client.counts.len()).max().unwrap_or(0).min(SHOWN);
    let cell_width = (560 / classes.max(1)).clamp(5, 48);
    let cell_height = if spread.shown.len() > 30 { 9 } else { 18 };
    let bars = LEFT + classes * cell_width + GAP;
    let mut heat = Heat {
        width: bars + BAR as usize + 70,
        height: TOP + spread.shown.len() * cell_height + 4,
        cell_width: cell_width - 1,
        cell_height: cell_height - 1,
        caption: format!(
            "Training examples of {} by label. Shade: share of the client's examples. Bars: how many it has, beside the \
             largest client's {}.",
            if spread.clients > spread.shown.len() {
                format!(
                    "{} of {} clients, evenly spaced from the largest to the smallest",
                    spread.shown.len(),
                    spread.clients
                )
            } else {
                "each client".to_owned()
            },
            spread.examples.maximum
        ),
        ..Heat::default()
    };
    let mut text = |x, y, anchor, text: String| heat.texts.push(HeatText { x, y, anchor, text });
    text(LEFT - 8, 12, "end", "client".to_owned());
    text(LEFT, 12, "start", "label".to_owned());
    text(bars, 12, "start", "examples".to_owned());
    let every = 20usize.div_ceil(cell_width);
    for class in (0..classes).step_by(every) {
        text(LEFT + class * cell_width + cell_width / 2, TOP - 6, "middle", class.to_string());
    }
    for (row, client) in spread.shown.iter().enumerate() {
        let y = TOP + row * cell_height;
        let bar = (BAR * client.examples / spread.examples.maximum.max(1)).clamp(1, BAR) as usize;
        if cell_height > 12 || row % 2 == 0 {
            let name: String = client.client.chars().take(22).collect();
            text(LEFT - 8, y + cell_height - cell_height / 4, "end", name);
            text(bars + bar + 6, y + cell_height - cell_height / 4, "start", client.examples.to_string());
        }
        heat.bars.push(HeatBar { x: bars, y, width: bar });
        for (class, count) in client.counts.iter().take(classes).enumerate().filter(|(_, count)| **count > 0)
        {
            heat.cells.push(HeatCell {
                x: LEFT + class * cell_width,
                y,
                shade: format!("{:.2}", 0.08 + 0.92 * *count as f64 / client.examples.max(1) as f64),
                title: format!("{}, label {class}: {count} of {}", client.client, client.examples),
            });
        }
    }
    heat
}

/// The comparison of several runs' folders: their curves in one picture, their figures and what differs.
///
/// # Errors
/// What the template engine says, in one line; it is not expected to fail.
pub fn compare(runs: &[Loaded]) -> Result<String, String> {
    let curve = |run: &Loaded, value: fn(&Row) -> Option<f64>| -> Curve {
        run.rows.iter().filter_map(|row| Some((f64::from(row.round), value(row)?))).collect()
    };
    let accuracy: Vec<Curve> = runs.iter().map(|run| curve(run, |row| row.accuracy)).collect();
    let loss: Vec<Curve> = runs.iter().map(|run| curve(run, |row| row.loss)).collect();
    let compared = |run: &Loaded| {
        let last = run.rows.last();
        let best = run
            .rows
            .iter()
            .filter_map(|row| row.accuracy)
            .fold(None, |best: Option<f64>, value| Some(best.map_or(value, |best| best.max(value))));
        ComparedRun {
            name: run.name.clone(),
            job: run.job.name.clone(),
            algorithm: algorithm(&run.job),
            seed: run.job.seed,
            rounds: run.rows.len(),
            accuracy: figure(last.and_then(|row| row.accuracy)),
            best: figure(best),
            loss: figure(last.and_then(|row| row.loss)),
            bytes: bytes_words(run.rows.iter().map(|row| row.bytes_up + row.bytes_down).sum()),
            seconds: format!("{:.1}", run.rows.iter().map(|row| row.seconds).sum::<f64>()),
            digest: run.digest.map(|digest| digest.to_string()).unwrap_or_default(),
            short_digest: run.digest.map_or_else(|| "–".to_owned(), |digest| digest.short()),
        }
    };
    ComparisonPage {
        runs: runs.iter().map(compared).collect(),
        curves: pictures(&accuracy, &loss),
        legend: legend(runs.iter().map(|run| format!("{} ({})", run.name, algorithm(&run.job)))),
        differences: differences(runs)?,
    }
    .render()
    .map_err(|error| error.to_string())
}

/// The settings that are not the same in all jobs, with each job's value.
fn differences(runs: &[Loaded]) -> Result<Vec<(String, Vec<String>)>, String> {
    let mut settings: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (index, run) in runs.iter().enumerate() {
        let table = toml::Table::try_from(&run.job).map_err(|error| error.to_string())?;
        for (key, value) in flatten(&table, "") {
            let values = settings.entry(key).or_insert_with(|| vec!["–".to_owned(); runs.len()]);
            values.get_mut(index).into_iter().for_each(|here| here.clone_from(&value));
        }
    }
    let differ = |values: &Vec<String>| values.windows(2).any(|pair| pair.first() != pair.last());
    Ok(settings.into_iter().filter(|(_, values)| differ(values)).collect())
}

fn flatten(table: &toml::Table, prefix: &str) -> Vec<(String, String)> {
    let entry = |(key, value): (&String, &toml::Value)| match value {
        toml::Value::Table(inner) => flatten(inner, &format!("{prefix}{key}.")),
        value => vec![(format!("{prefix}{key}"), value.to_string())],
    };
    table.iter().flat_map(entry).collect()
}

#[cfg(test)]
mod tests;
