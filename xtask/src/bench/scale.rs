//! `cargo xtask bench scale`: a round's time against its cohort, and memory against population and cohort.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Context;

use super::options::Scale;
use super::probe::Probe;
use super::{Measured, Simulator, median, print_table};
use crate::files;

const SCENARIO: &str = "jobs/bench/scale.toml";
const COHORTS: [u32; 7] = [10, 30, 100, 300, 1_000, 3_000, 10_000];
/// The line is fitted from here up: below, what a round costs whatever its cohort is most of it.
const FITTED_FROM: u32 = 100;

/// Prints the table of times with its line, and the memory.
pub(super) fn run(repository: &Path, options: &Scale) -> anyhow::Result<()> {
    let simulator = Simulator::new(repository, options.program.as_deref())?;
    println!("before: {}", Probe::take());
    let mut times = Vec::new();
    for cohort in COHORTS.into_iter().filter(|cohort| *cohort <= options.largest) {
        eprintln!("cohort {cohort}");
        // The first round is left out.
        let rounds = (3_000 / cohort).clamp(2, 20) + 1;
        let measured = measure(&simulator, &options.model, 10_000, cohort, rounds)?;
        let rest = measured.round_seconds.get(1..).context("the run has too few rounds")?;
        times.push((f64::from(cohort), median(rest)));
    }
    let fitted: Vec<(f64, f64)> =
        times.iter().copied().filter(|(cohort, _)| *cohort >= f64::from(FITTED_FROM)).collect();
    let line = Line::fit(&fitted).context("too few cohorts for a line")?;
    let mut rows = vec![["cohort", "s/round", "ms/client", "off the line"].map(str::to_owned).to_vec()];
    for (cohort, seconds) in &times {
        let off = if *cohort < f64::from(FITTED_FROM) {
            "–".to_owned()
        } else {
            format!("{:+.1} %", line.off((*cohort, *seconds)) * 100.0)
        };
        rows.push(vec![
            cohort.to_string(),
            format!("{seconds:.4}"),
            format!("{:.3}", seconds / cohort * 1000.0),
            off,
        ]);
    }
    println!(
        "\n{}, population 10,000 of 60 samples, medians of the rounds after the first:\n",
        options.model
    );
    print_table(&rows);
    let largest = fitted.iter().map(|point| line.off(*point).abs()).fold(0.0, f64::max);
    println!(
        "\nline from {FITTED_FROM} clients up: {:.4} s + {:.4} ms per client; largest deviation {:.1} %",
        line.constant,
        line.slope * 1000.0,
        largest * 100.0
    );

    let mut rows = vec![["model", "population", "cohort", "peak memory"].map(str::to_owned).to_vec()];
    for (model, population, cohort) in [
        ("small-cnn", 1_000, 100),
        ("small-cnn", 100_000, 100),
        ("mcmahan-cnn", 10_000, 10),
        ("mcmahan-cnn", 10_000, 1_000.min(options.largest)),
    ] {
        eprintln!("memory: {model}, {population} clients, cohort {cohort}");
        let measured = measure(&simulator, model, population, cohort, 1)?;
        let memory = files::megabytes(measured.peak_bytes);
        rows.push(vec![model.to_owned(), population.to_string(), cohort.to_string(), memory]);
    }
    println!();
    print_table(&rows);
    println!("\nafter: {}", Probe::take());
    Ok(())
}

fn measure(
    simulator: &Simulator,
    model: &str,
    population: u32,
    cohort: u32,
    rounds: u32,
) -> anyhow::Result<Measured> {
    let mut arguments = Vec::<OsString>::new();
    for set in [
        format!("model.architecture={model}"),
        format!("population.clients={population}"),
        format!("cohort.size={cohort}"),
        format!("rounds={rounds}"),
    ] {
        arguments.extend(["--set".into(), set.into()]);
    }
    simulator.measure(SCENARIO, &format!("scale-{model}-{population}-{cohort}"), &arguments)
}

/// `constant + slope · x`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Line {
    constant: f64,
    slope: f64,
}

impl Line {
    /// The line with the least sum of squared relative deviations; `None` with fewer than two positions.
    fn fit(points: &[(f64, f64)]) -> Option<Self> {
        let sum = |term: fn(f64, f64) -> f64| points.iter().map(|(x, y)| term(*x, *y) / (y * y)).sum::<f64>();
        let (weight, x, y) = (sum(|_, _| 1.0), sum(|x, _| x), sum(|_, y| y));
        let (xx, xy) = (sum(|x, _| x * x), sum(|x, y| x * y));
        let slope = (weight * xy - x * y) / (weight * xx - x * x);
        let constant = (y - slope * x) / weight;
        (points.len() > 1 && slope.is_finite() && constant.is_finite()).then_some(Self { constant, slope })
    }

    /// How far a point is above the line, as a share of the line.
    fn off(&self, (x, y): (f64, f64)) -> f64 {
        y / (self.constant + self.slope * x) - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_and_deviations_are_relative() {
        let line = Line::fit(&[(100.0, 0.3), (300.0, 0.7), (1000.0, 2.1)]).unwrap();
        assert!((line.constant - 0.1).abs() < 1e-9 && (line.slope - 0.002).abs() < 1e-12, "{line:?}");
        assert!((line.off((100.0, 0.33)) - 0.1).abs() < 1e-6);
        assert!(Line::fit(&[(1.0, 1.0)]).is_none());
        assert!(Line::fit(&[(1.0, 1.0), (1.0, 2.0)]).is_none());
    }
}
