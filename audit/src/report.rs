//! A report for people who answer for data: what was promised, what was spent, by whom, until when.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use askama::Template;
use plotters::prelude::*;
use plotters::style::TRANSPARENT;
use serde_json::{Value, json};
use tributary_common::ledger::account::{NodeLedger, Reading};
use tributary_common::ledger::record::{AccountId, Body, Claim, Hour, JobKey};
use tributary_common::ledger::verify::{State, Weight};
use tributary_common::privacy::accounting::Basis;
use tributary_common::privacy::{Adjacency, Event, Noise, SkellamShares, Unit};

use crate::verify::{Audited, LIMITS, alone};

/// Stands for the page's own text colour until the picture is finished.
const INK: RGBColor = RGBColor(0x7f, 0x7f, 0x7e);
const INK_TEXT: &str = "#7F7F7E";
const COMMITTED: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const SPENT: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
const SIZE: (u32, u32) = (720, 260);
/// Most points of one curve.
const POINTS: usize = 1000;

/// An epsilon for people: infinite where there is none.
fn epsilon_words(epsilon: f64) -> String {
    if epsilon.is_finite() { format!("{epsilon:.3}") } else { "∞".to_owned() }
}

/// An epsilon for JSON: a number, or the text `infinite`.
fn epsilon_json(epsilon: f64) -> Value {
    if epsilon.is_finite() { json!(epsilon) } else { json!("infinite") }
}

fn unit_words(unit: Unit) -> &'static str {
    match unit {
        Unit::Example => "one row (a person with m rows: about m times the epsilon)",
        Unit::Group => "one group of rows, such as a patient",
        Unit::Client => "one client's whole contribution",
    }
}

fn adjacency_words(adjacency: Adjacency) -> &'static str {
    match adjacency {
        Adjacency::AddOrRemoveOne => "with and without it",
        Adjacency::ZeroOut => "its content or zeros; that it took part is public",
    }
}

fn basis_words(basis: Basis) -> String {
    match basis {
        Basis::Pld { grid_step } => format!("privacy loss distributions, grid {grid_step:.1e}"),
        Basis::Rdp { order } => format!("Rényi divergences, order {order:.3}"),
    }
}

/// A job's promise, and for noise in shares what is left of it if all others are dishonest.
fn claim_words(claim: &Claim, events: &[Event], rounds: u32, unit: Unit) -> (String, Option<f64>) {
    let alone = alone(events, rounds, claim.delta, unit);
    let mut words = format!("epsilon {} at delta {:e}", epsilon_words(claim.epsilon), claim.delta);
    if let Some((colluders, survivors, epsilon)) = alone {
        words.push_str(&format!(
            " with at most {colluders} of {survivors} survivors dishonest; {} if all others are",
            epsilon_words(epsilon)
        ));
    }
    (words, alone.map(|(_, _, epsilon)| epsilon))
}

fn event_words(event: &Event) -> String {
    let noise = match event.noise {
        Noise::Gaussian => "Gaussian noise",
        Noise::DiscreteGaussian => "discrete Gaussian noise",
        Noise::Skellam(_) => "Skellam noise",
    };
    let sampled = match event.sampling_rate {
        rate if rate < 1.0 => format!("Poisson samples at rate {rate}"),
        _ => "everybody, unsampled".to_owned(),
    };
    let (deviation, sensitivity) = (event.noise_standard_deviation, event.sensitivity);
    let shares = match event.noise {
        Noise::Gaussian | Noise::DiscreteGaussian => String::new(),
        Noise::Skellam(SkellamShares { survivors, colluders, share_variance, scale, dimension, .. }) => {
            let share = share_variance.sqrt();
            format!(
                " (grid steps, {scale:.4} per unit; {dimension} coordinates; shares of {share:.4} each, of {survivors} \
                 survivors less {colluders} dishonest)"
            )
        }
    };
    format!("{} × {noise} of {deviation} for sensitivity {sensitivity}{shares}, {sampled}", event.count)
}

/// One run on one data set.
#[derive(Debug)]
struct JobLine {
    run: String,
    coordinator: String,
    mechanism: String,
    claim: String,
    /// For noise in shares: epsilon if all others are dishonest.
    alone: Option<f64>,
    basis: String,
    events: String,
    reserved: u32,
    charged: u32,
    state: &'static str,
    from: Hour,
    until: Hour,
}

/// One data set.
#[derive(Debug)]
struct AccountPage {
    hospital: String,
    name: String,
    promise: String,
    spent: String,
    unit: &'static str,
    adjacency: &'static str,
    accounting: String,
    warnings: Vec<String>,
    picture: String,
    jobs: Vec<JobLine>,
    reading: Reading,
    until: Hour,
}

/// One run as its coordinator recorded it.
#[derive(Debug)]
struct RunPage {
    coordinator: String,
    run: String,
    claim: String,
    /// For noise in shares: epsilon if all others are dishonest.
    alone: Option<f64>,
    basis: String,
    unit: String,
    events: String,
    planned: u32,
    published: u32,
    until: Hour,
}

/// One file's verdict.
#[derive(Debug)]
struct FilePage {
    title: String,
    path: String,
    findings: Vec<String>,
    notes: Vec<String>,
}

/// The report over several ledgers.
#[derive(Debug, Template)]
#[template(path = "report.html")]
pub struct Report {
    headline: Vec<String>,
    accounts: Vec<AccountPage>,
    runs: Vec<RunPage>,
    files: Vec<FilePage>,
    limits: &'static str,
}

impl Report {
    /// The report over ledgers that were verified together.
    pub fn of(audited: &[Audited]) -> Self {
        let mut accounts = Vec::new();
        let mut runs = Vec::new();
        for one in audited {
            match &one.verified.state {
                Some(State::Node(_)) => accounts.extend(account_pages(one)),
                Some(State::Run(_)) => runs.extend(run_page(one)),
                None => {}
            }
        }
        let files: Vec<_> = audited
            .iter()
            .map(|one| FilePage {
                title: one.title(),
                path: one.path.display().to_string(),
                findings: one.lines(Weight::Finding),
                notes: one.lines(Weight::Note),
            })
            .collect();
        let headline = headline(&accounts, files.iter().map(|file| file.findings.len()).sum());
        Self { headline, accounts, runs, files, limits: LIMITS }
    }

    /// Writes `report.html` and `report.json` into a folder, which is made if need be.
    ///
    /// # Errors
    /// The file that cannot be written, in one line.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let failed = |path: &Path| format!("{}: cannot be written", path.display());
        fs::create_dir_all(folder).with_context(|| failed(folder))?;
        let page = self.render().context("the report's page cannot be made")?;
        let data = format!("{:#}\n", self.to_json());
        for (name, content) in [("report.html", page), ("report.json", data)] {
            let path = folder.join(name);
            fs::write(&path, content).with_context(|| failed(&path))?;
        }
        Ok(())
    }

    /// The plain words at the top of the report, a paragraph each.
    pub fn headline(&self) -> &[String] {
        &self.headline
    }

    /// Everything in the report as a JSON object.
    pub fn to_json(&self) -> Value {
        let alone = |alone: Option<f64>| alone.map(epsilon_json);
        let job = |job: &JobLine| {
            json!({
                "epsilon_if_all_others_are_dishonest": alone(job.alone),
                "run": job.run, "coordinator": job.coordinator, "mechanism": job.mechanism, "claim": job.claim,
                "accountant": job.basis, "sampling_and_noise": job.events, "rounds_reserved": job.reserved,
                "rounds_charged": job.charged, "state": job.state, "from": job.from.to_string(),
                "until": job.until.to_string(),
            })
        };
        let account = |page: &AccountPage| {
            let reading = &page.reading;
            json!({
                "hospital": page.hospital,
                "dataset": page.name,
                "account": reading.account.to_string(),
                "unit": reading.unit,
                "adjacency": reading.adjacency,
                "delta": reading.delta,
                "accountant": page.accounting,
                "cap_epsilon": reading.cap_epsilon,
                "epsilon_spent": epsilon_json(reading.epsilon_spent),
                "epsilon_spent_and_set_aside": epsilon_json(reading.epsilon_committed),
                "unbounded_release": reading.unbounded,
                "records_were_lost": reading.restored,
                "until": page.until.to_string(),
                "jobs": page.jobs.iter().map(job).collect::<Vec<_>>(),
            })
        };
        let run = |page: &RunPage| {
            json!({
                "epsilon_if_all_others_are_dishonest": alone(page.alone),
                "coordinator": page.coordinator, "run": page.run, "claim": page.claim, "accountant": page.basis,
                "unit": page.unit, "sampling_and_noise": page.events, "rounds_planned": page.planned,
                "rounds_published": page.published, "until": page.until.to_string(),
            })
        };
        let file = |file: &FilePage| json!({ "file": file.path, "ledger": file.title, "findings": file.findings, "notes": file.notes });
        let (most, sum) = over_hospitals(&self.accounts);
        json!({
            "summary": self.headline,
            "epsilon_of_a_person_in_one_data_set_at_most": epsilon_json(most),
            "epsilon_of_a_person_in_all_data_sets_at_most": epsilon_json(sum),
            "accounts": self.accounts.iter().map(account).collect::<Vec<_>>(),
            "runs": self.runs.iter().map(run).collect::<Vec<_>>(),
            "files": self.files.iter().map(file).collect::<Vec<_>>(),
            "limits": self.limits,
        })
    }
}

/// What holds for an account from now on: the cap, or without one what is spent and set aside.
fn promised(reading: &Reading) -> f64 {
    if reading.unbounded { f64::INFINITY } else { reading.cap_epsilon.unwrap_or(reading.epsilon_committed) }
}

fn over_hospitals(accounts: &[AccountPage]) -> (f64, f64) {
    let promises = || accounts.iter().map(|page| promised(&page.reading));
    (promises().fold(0.0, f64::max), promises().sum())
}

fn headline(accounts: &[AccountPage], findings: usize) -> Vec<String> {
    let mut lines = Vec::new();
    match findings {
        0 => lines
            .push("The ledgers hold together: nothing in them contradicts anything else in them.".to_owned()),
        1 => {
            lines.push("There is 1 finding: do not rely on these figures before it is explained.".to_owned())
        }
        _ => lines.push(format!(
            "There are {findings} findings: do not rely on these figures before they are explained."
        )),
    }
    if accounts.is_empty() {
        return lines;
    }
    let (most, sum) = over_hospitals(accounts);
    lines.push(format!(
        "A person in one of the {} data sets is promised epsilon {} at most.",
        accounts.len(),
        epsilon_words(most)
    ));
    if accounts.len() > 1 {
        let delta: f64 = accounts.iter().map(|page| page.reading.delta).sum();
        lines.push(format!(
            "For a person known to all of them the promises add up: epsilon {} at delta {delta:e}. For one known to some, \
             add those.",
            epsilon_words(sum)
        ));
    }
    let unbounded = accounts.iter().filter(|page| page.reading.unbounded);
    for page in unbounded {
        lines.push(format!(
            "{} at {}: a job without a guarantee was run on this data set, so its epsilon is ∞, for good.",
            page.name, page.hospital
        ));
    }
    if accounts.iter().any(|page| page.reading.unit == Unit::Example) {
        lines.push(
            "Where the unit is one row, a person with m rows has about m times the epsilon.".to_owned(),
        );
    }
    lines
}

/// A data set's history while its ledger is read.
#[derive(Default)]
struct History {
    /// Hour, spent, and spent and set aside.
    points: Vec<(Hour, f64, f64)>,
    jobs: BTreeMap<JobKey, JobLine>,
}

fn account_pages(audited: &Audited) -> Vec<AccountPage> {
    let verified = &audited.verified;
    let (Some(opening), Some(first)) = (&verified.opening, verified.records.first()) else {
        return Vec::new();
    };
    let Ok(mut ledger) = NodeLedger::begin(first) else { return Vec::new() };
    let mut histories: BTreeMap<AccountId, History> = BTreeMap::new();
    let mut until = first.hour();
    for record in verified.records.iter().skip(1) {
        // What contradicts is among the findings; it counts as far as it can.
        let _ = ledger.count(record.body());
        until = record.hour();
        let accounts: Vec<AccountId> = match record.body() {
            Body::AccountOpened { account, .. }
            | Body::JobReserved { account, .. }
            | Body::UnboundedRelease { account, .. }
            | Body::RoundCharged { account, .. }
            | Body::RoundsReturned { account, .. } => vec![*account],
            Body::RestoreAccepted { charges, .. } => charges.iter().map(|charge| charge.account).collect(),
            _ => Vec::new(),
        };
        for account in accounts {
            let Ok(reading) = ledger.reading(account) else { continue };
            let history = histories.entry(account).or_default();
            history.points.push((until, reading.epsilon_spent, reading.epsilon_committed));
            history.take(record.body(), until);
        }
    }
    let page = |reading: Reading| {
        let history = histories.remove(&reading.account).unwrap_or_default();
        account_page(opening.name.to_string(), reading, history, until)
    };
    ledger.readings().into_iter().map(page).collect()
}

impl History {
    fn take(&mut self, body: &Body, hour: Hour) {
        let line = |key: &JobKey, rounds: u32| JobLine {
            run: key.run.to_string(),
            coordinator: key.coordinator.0.short(),
            mechanism: "none".to_owned(),
            claim: "none: epsilon ∞".to_owned(),
            alone: None,
            basis: "none".to_owned(),
            events: "no noise".to_owned(),
            reserved: rounds,
            charged: 0,
            state: "open",
            from: hour,
            until: hour,
        };
        match body {
            Body::JobReserved { key, unit, mechanism, rounds, events, claim, .. } => {
                let (words, alone) = claim_words(claim, events, *rounds, *unit);
                let job = JobLine {
                    mechanism: mechanism.clone(),
                    claim: words,
                    alone,
                    basis: basis_words(claim.basis),
                    events: events.iter().map(event_words).collect::<Vec<_>>().join("; "),
                    ..line(key, *rounds)
                };
                self.jobs.insert(*key, job);
            }
            Body::UnboundedRelease { key, rounds, .. } => {
                self.jobs.insert(*key, line(key, *rounds));
            }
            Body::RoundCharged { key, .. } => {
                if let Some(job) = self.jobs.get_mut(key) {
                    job.charged += 1;
                    job.until = hour;
                }
            }
            Body::RoundsReturned { key, .. } => {
                if let Some(job) = self.jobs.get_mut(key) {
                    job.state = "over";
                    job.until = hour;
                }
            }
            _ => {}
        }
    }
}

fn account_page(hospital: String, reading: Reading, history: History, until: Hour) -> AccountPage {
    let (delta, spent) = (reading.delta, epsilon_words(reading.epsilon_spent));
    let promise = match (reading.unbounded, reading.cap_epsilon) {
        (true, _) => "Nothing any more: epsilon ∞.".to_owned(),
        (false, Some(cap)) => {
            format!("Epsilon {} at delta {delta:e}, over all jobs together.", epsilon_words(cap))
        }
        (false, None) => format!(
            "No cap. What is spent and set aside comes to epsilon {} at delta {delta:e}.",
            epsilon_words(reading.epsilon_committed)
        ),
    };
    let spent = format!(
        "Epsilon {spent} so far (an odometer's reading, no promise of its own); with what is set aside, {}.",
        epsilon_words(reading.epsilon_committed)
    );
    let mut warnings = Vec::new();
    if reading.unbounded {
        warnings.push("A job without a guarantee was run on this data set: its epsilon is ∞.".to_owned());
    }
    if reading.restored {
        warnings.push(
            "Records of this ledger were lost and the operator accepted it: what is spent is a lower bound unless \
             the loss was charged in full (see the notes)."
                .to_owned(),
        );
    }
    AccountPage {
        hospital,
        name: reading.name.to_string(),
        promise,
        spent,
        unit: unit_words(reading.unit),
        adjacency: adjacency_words(reading.adjacency),
        accounting: format!("a Rényi filter at order {}", reading.order),
        warnings,
        picture: picture(&history.points, reading.cap_epsilon).unwrap_or_default(),
        jobs: history.jobs.into_values().collect(),
        reading,
        until,
    }
}

fn run_page(audited: &Audited) -> Option<RunPage> {
    let (Some(State::Run(ledger)), Some(opening)) = (&audited.verified.state, &audited.verified.opening)
    else {
        return None;
    };
    let run = ledger.run()?;
    let promise = run.claim.as_ref().zip(run.unit);
    let (claim, alone) = promise.map_or(("none: epsilon ∞".to_owned(), None), |(claim, unit)| {
        claim_words(claim, &run.events, run.rounds, unit)
    });
    Some(RunPage {
        coordinator: opening.name.to_string(),
        run: run.key.run.to_string(),
        claim,
        alone,
        basis: run.claim.map_or("none".to_owned(), |claim| basis_words(claim.basis)),
        unit: run.unit.map_or("nobody".to_owned(), |unit| {
            format!("{}; neighbours: {}", unit_words(unit), adjacency_words(unit.adjacency()))
        }),
        events: run.events.iter().map(event_words).collect::<Vec<_>>().join("; "),
        planned: run.rounds,
        published: ledger.published(),
        until: audited.verified.records.last()?.hour(),
    })
}

/// Epsilon over time as one `<svg>` element: spent, spent and set aside, and the cap; `None` where nothing is
/// finite.
fn picture(points: &[(Hour, f64, f64)], cap: Option<f64>) -> Option<String> {
    let finite: Vec<_> = points.iter().filter(|(_, a, b)| a.is_finite() && b.is_finite()).collect();
    let every = finite.len().div_ceil(POINTS).max(1);
    let last = finite.len().checked_sub(1)?;
    let kept: Vec<_> = finite
        .iter()
        .enumerate()
        .filter(|(at, _)| at % every == 0 || *at == last)
        .map(|(_, p)| **p)
        .collect();
    let from = kept.first()?.0;
    let days = |hour: Hour| hour.0.saturating_sub(from.0) as f64 / 24.0;
    let to = kept.iter().map(|(hour, ..)| days(*hour)).fold(1.0 / 24.0, f64::max);
    let top = kept.iter().map(|(.., committed)| *committed).chain(cap).fold(0.0, f64::max);
    let top = if top > 0.0 { top * 1.08 } else { 1.0 };
    let steps = |value: &dyn Fn(&(Hour, f64, f64)) -> f64| {
        let mut curve: Vec<(f64, f64)> = Vec::new();
        for point in &kept {
            // A step: what held until now, then what holds.
            curve.extend(curve.last().map(|(_, before)| (days(point.0), *before)));
            curve.push((days(point.0), value(point)));
        }
        curve.extend(curve.last().map(|(_, before)| (to, *before)));
        curve
    };
    let curves = [(steps(&|point| point.2), COMMITTED), (steps(&|point| point.1), SPENT)];
    draw(from, to, top, cap, &curves).ok()
}

fn draw(
    from: Hour,
    to: f64,
    top: f64,
    cap: Option<f64>,
    curves: &[(Vec<(f64, f64)>, RGBColor)],
) -> Result<String, Box<dyn std::error::Error>> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(38)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..to, 0.0..top)?;
        let text = ("sans-serif", 13).into_font().color(&INK);
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(INK.mix(0.25))
            .axis_style(INK)
            .label_style(text.clone())
            .axis_desc_style(text)
            .x_desc(format!("days from {from}"))
            .y_desc("epsilon")
            .draw()?;
        if let Some(cap) = cap {
            let style = ShapeStyle { color: INK.into(), filled: true, stroke_width: 1 };
            chart.draw_series(LineSeries::new([(0.0, cap), (to, cap)], style))?;
        }
        for (curve, colour) in curves {
            let style = ShapeStyle { color: (*colour).into(), filled: true, stroke_width: 2 };
            chart.draw_series(LineSeries::new(curve.iter().copied(), style))?;
        }
        area.present()?;
    }
    let named = "<svg role=\"img\" aria-label=\"epsilon spent and set aside over time\" ";
    Ok(svg.replace(INK_TEXT, "currentColor").replacen("<svg ", named, 1))
}
