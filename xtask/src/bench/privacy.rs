//! `cargo xtask bench privacy`: one step of private training beside Opacus', and what its noise costs.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context;

use super::peers::{folder, python};
use super::print_table;
use super::probe::Probe;
use crate::{cargo, libtorch};

/// The peers' script.
const SCRIPT: &str = "opacus_step.py";
/// Models and batch sizes that the script has too.
const STEPS: [(&str, &str); 4] = [("2nn", "64"), ("2nn", "256"), ("small-cnn", "64"), ("small-cnn", "256")];

/// Milliseconds of one step in each way.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Theirs {
    plain: f64,
    opacus: f64,
}

/// Runs the script and the bench in turn, and prints their ratios. Skips in one line, with exit code 2, where the
/// script or Python is not there.
pub(super) fn run(repository: &Path, option: Option<&Path>) -> anyhow::Result<ExitCode> {
    let place = folder("TRIBUTARY_PEERS", "folder with the peers' scripts").and_then(|scripts| {
        let python = python(option)?;
        if !scripts.join(SCRIPT).is_file() {
            return Err(format!("{SCRIPT} is not in {}", scripts.display()));
        }
        if !cargo::answers(&python.to_string_lossy(), &["-c", "import torch, opacus"]) {
            return Err(format!("{} cannot import torch and opacus", python.display()));
        }
        Ok((scripts, python))
    });
    let (scripts, python) = match place {
        Ok(place) => place,
        Err(reason) => {
            eprintln!("SKIPPED: {reason}");
            return Ok(ExitCode::from(2));
        }
    };
    libtorch::set_up(repository)?;
    let bench = |name: &str, arguments: &[&str]| {
        let mut command = cargo::cargo(repository);
        command.args(["bench", "--workspace", "--bench", name, "--"]).args(arguments);
        cargo::output(&mut command).with_context(|| format!("the bench `{name}` failed"))
    };
    print!("{}", bench("noise", &[])?);
    let before = Probe::take();
    println!("before: {before}");
    let mut script = Command::new(&python);
    script.arg(scripts.join(SCRIPT)).env("PYTHONDONTWRITEBYTECODE", "1");
    let theirs = cargo::output(&mut script).with_context(|| format!("{SCRIPT} failed"))?;
    let ours = bench("private", &["2nn", "small-cnn"])?;
    let after = Probe::take();
    println!("after: {after}\n");
    let head = ["model", "batch", "PyTorch", "Opacus, best", "clipped", "ratio", "whole", "Opacus / whole"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (model, batch) in STEPS {
        let theirs = of_script(&theirs, model, batch).context("the script printed another table")?;
        let (whole, clipped) = of_bench(&ours, model, batch).context("the bench printed another table")?;
        let figure = |value: f64| format!("{value:.2}");
        rows.push(vec![
            model.to_owned(),
            batch.to_owned(),
            figure(theirs.plain),
            figure(theirs.opacus),
            figure(clipped),
            figure(clipped / theirs.plain),
            figure(whole),
            figure(theirs.opacus / whole),
        ]);
    }
    print_table(&rows);
    println!(
        "\nMilliseconds per step on one thread; `clipped` is our step without its noise, `whole` with it."
    );
    if !(before.is_quiet() && after.is_quiet()) {
        println!("The machine was not quiet.");
    }
    Ok(ExitCode::SUCCESS)
}

/// Lines such as `2nn batch 64: plain 1.04 ms` and `2nn batch 64: opacus ghost 4.06 ms`.
fn of_script(printed: &str, model: &str, batch: &str) -> Option<Theirs> {
    let start = format!("{model} batch {batch}: ");
    let (mut plain, mut opacus) = (None, f64::INFINITY);
    for line in printed.lines().filter_map(|line| line.strip_prefix(&start)) {
        let milliseconds: f64 = line.strip_suffix(" ms")?.rsplit(' ').next()?.parse().ok()?;
        match line.starts_with("plain") {
            true => plain = Some(milliseconds),
            false => opacus = opacus.min(milliseconds),
        }
    }
    Some(Theirs { plain: plain?, opacus: Some(opacus).filter(|opacus| opacus.is_finite())? })
}

/// `whole` and `clipped` of a line of the bench: model, batch, loop, engine, whole, noise, clipped, ratio.
fn of_bench(printed: &str, model: &str, batch: &str) -> Option<(f64, f64)> {
    printed.lines().find_map(|line| {
        let cells: Vec<&str> = line.split_whitespace().collect();
        match cells.as_slice() {
            [name, size, _, _, whole, _, clipped, _] if (*name, *size) == (model, batch) => {
                Some((whole.parse().ok()?, clipped.parse().ok()?))
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tables_are_read() {
        let script = "2nn batch 64: plain 1.04 ms\n2nn batch 64: opacus ew 46.95 ms\n\
                      2nn batch 64: opacus ghost 4.06 ms\n2nn batch 256: plain 2.31 ms\n";
        assert_eq!(of_script(script, "2nn", "64"), Some(Theirs { plain: 1.04, opacus: 4.06 }));
        assert_eq!(of_script(script, "2nn", "256"), None);
        assert_eq!(of_script(script, "small-cnn", "64"), None);
        let bench = "model batch loop engine whole noise clipped clipped / loop   milliseconds per step\n\
                     2nn             64     1.151     0.633     2.428     1.556     0.872            0.76\n";
        assert_eq!(of_bench(bench, "2nn", "64"), Some((2.428, 0.872)));
        assert_eq!(of_bench(bench, "2nn", "256"), None);
    }
}
