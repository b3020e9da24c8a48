//! The report of a sweep: every combination's learning curve, the table, and accuracy against the varied number.

use askama::Template;

use super::chart::{self, Axis, Curve};
use super::folder::{Loaded, Row};
use super::page::{LegendEntry, Picture, legend, pictures};
use crate::sweep::{Grid, Table, Varied, mean_curve};

#[derive(Template)]
#[template(path = "sweep.html")]
struct SweepPage<'a> {
    name: &'a str,
    varied: &'a [Varied],
    seeds: String,
    left_out: usize,
    curves: Vec<Picture>,
    legend: Vec<LegendEntry>,
    against: Option<String>,
    against_key: &'a str,
    headings: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// The report of a sweep over `grid` of the job `name`. `curves` has, for each combination that is drawn, its runs.
///
/// # Errors
/// What the template engine says, in one line; it is not expected to fail.
pub fn sweep(
    name: &str,
    grid: &Grid,
    table: &Table,
    curves: &[(usize, Vec<Loaded>)],
) -> Result<String, String> {
    let mean = |value: fn(&Row) -> Option<f64>| -> Vec<Curve> {
        curves.iter().map(|(_, runs)| mean_curve(runs, value)).collect()
    };
    let labels = grid.labels();
    let called = |combination: usize| {
        let values = labels.iter().zip(grid.values(&grid.choices(combination)));
        values.map(|(label, value)| format!("{label} = {value}")).collect::<Vec<_>>().join(", ")
    };
    let numbers = match grid.varied.as_slice() {
        [one] => one.numbers().map(|numbers| (one.key.as_str(), numbers)),
        _ => None,
    };
    let against = numbers.as_ref().and_then(|(key, numbers)| {
        let points = numbers.iter().zip(&table.rows);
        let points = points.filter_map(|(number, row)| Some((*number, row.accuracy()?.mean)));
        chart::against(Axis::Share("final accuracy (share correct)"), key, &points.collect())
    });
    let (headings, rows) = table.cells();
    SweepPage {
        name,
        varied: &grid.varied,
        seeds: grid.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
        left_out: table.rows.iter().filter(|row| row.runs.0 > 0).count().saturating_sub(curves.len()),
        curves: pictures(&mean(|row| row.accuracy), &mean(|row| row.loss)),
        legend: if grid.varied.is_empty() {
            Vec::new()
        } else {
            legend(curves.iter().map(|(combination, _)| called(*combination)))
        },
        against,
        against_key: numbers.as_ref().map_or("", |(key, _)| key),
        headings,
        rows,
    }
    .render()
    .map_err(|error| error.to_string())
}
