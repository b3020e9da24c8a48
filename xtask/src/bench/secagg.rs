//! `cargo xtask bench secagg`: masking against the rate of its cipher, and beside Flower's SecAgg+ primitives.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::Context;

use super::options::Secagg;
use super::peers::{folder, python};
use super::print_table;
use super::probe::Probe;
use crate::cargo;

/// The peers' script.
const SCRIPT: &str = "flower_secagg.py";
/// The test that prints the time of secret sharing.
const SHAMIR: &str = "shamir_figures";

/// Runs the bench and, where the script and its Python are there, Flower's primitives after it. What is missing is said
/// in one line; the bench needs nothing.
pub(super) fn run(repository: &Path, options: &Secagg) -> anyhow::Result<ExitCode> {
    let before = Probe::take();
    println!("before: {before}\n");
    let mut command = cargo::cargo(repository);
    // The library alone: it needs no libtorch.
    command.args(["bench", "--package", "tributary-common", "--bench", "secagg", "--"]);
    command.args(&options.dimensions);
    let ours = cargo::output(&mut command).context("the bench `secagg` failed")?;
    print!("{ours}");
    let mut command = cargo::cargo(repository);
    command.args(["test", "--release", "--package", "tributary-common", "--lib", "--"]);
    command.args(["--ignored", "--nocapture", SHAMIR]);
    let shamir = cargo::output(&mut command).with_context(|| format!("the test `{SHAMIR}` failed"))?;
    let theirs = match find(options.python.as_deref()) {
        Ok((scripts, python)) => {
            let mut script = Command::new(python);
            script.arg(scripts.join(SCRIPT)).env("PYTHONDONTWRITEBYTECODE", "1");
            Some(cargo::output(&mut script).with_context(|| format!("{SCRIPT} failed"))?)
        }
        Err(reason) => {
            eprintln!("SKIPPED Flower: {reason}");
            None
        }
    };
    let after = Probe::take();
    println!("\nafter: {after}\n");
    let head = ["primitive", "ours, ms", "Flower, ms", "Flower / ours"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for primitive in primitives(&ours, &shamir, theirs.as_deref().unwrap_or_default()) {
        let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
        let ratio =
            primitive.ours.zip(primitive.theirs).map(|(ours, theirs)| format!("{:.0}", theirs / ours));
        let ratio = ratio.unwrap_or_else(|| "-".to_owned());
        rows.push(vec![primitive.name, figure(primitive.ours), figure(primitive.theirs), ratio]);
    }
    print_table(&rows);
    println!(
        "\nOne thread. Sharing: Flower splits one secret of 32 bytes, we split two at once; combining is of one, Lagrange \
         weights included."
    );
    if !(before.is_quiet() && after.is_quiet()) {
        println!("The machine was not quiet.");
    }
    Ok(ExitCode::SUCCESS)
}

fn find(option: Option<&Path>) -> Result<(PathBuf, PathBuf), String> {
    let scripts = folder("TRIBUTARY_PEERS", "folder with the peers' scripts")?;
    let python = python(option)?;
    if !scripts.join(SCRIPT).is_file() {
        return Err(format!("{SCRIPT} is not in {}", scripts.display()));
    }
    if !cargo::answers(&python.to_string_lossy(), &["-c", "import numpy, flwr"]) {
        return Err(format!("{} cannot import numpy and flwr", python.display()));
    }
    Ok((scripts, python))
}

/// Milliseconds of one piece of work on each side.
#[derive(Debug, PartialEq)]
struct Primitive {
    name: String,
    ours: Option<f64>,
    theirs: Option<f64>,
}

/// All that either side printed.
fn primitives(ours: &str, shamir: &str, theirs: &str) -> Vec<Primitive> {
    let mut found = Vec::new();
    for line in ours.lines() {
        // `piece: 1000000 parameters: mask 0.1512 ms, round 0.5160 ms`
        let Some(line) = line.strip_prefix("piece: ") else { continue };
        let Some((dimension, figures)) = line.split_once(" parameters: ") else { continue };
        // `d=1000000: mask per neighbour 1.890 ms, quantize 16.40 ms`
        let start = format!("d={dimension}: ");
        let other = theirs.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_default();
        for (name, own, other_name) in
            [("one mask", "mask ", "mask per neighbour "), ("rounding", "round ", "quantize ")]
        {
            found.push(Primitive {
                name: format!("{name}, {dimension} parameters"),
                ours: milliseconds(figures, own),
                theirs: milliseconds(other, other_name),
            });
        }
    }
    let micro = |name| after(shamir, name).map(|value| value / 1e3);
    let sharing = theirs.lines().find(|line| line.starts_with("shamir 51 of 101")).unwrap_or_default();
    found.push(Primitive {
        name: "sharing, 51 of 101".to_owned(),
        ours: micro("split, 51 of 101, 64 bytes: "),
        theirs: milliseconds(sharing, "split "),
    });
    let weights = micro("Lagrange weights of 51: ");
    found.push(Primitive {
        name: "combining 51 shares".to_owned(),
        ours: weights.zip(micro("combine 51 of 32 bytes: ")).map(|(weights, combined)| weights + combined),
        theirs: milliseconds(sharing, "combine "),
    });
    found
}

/// The number between `name` and ` ms`.
fn milliseconds(printed: &str, name: &str) -> Option<f64> {
    let (number, _) = printed.split_once(name)?.1.split_once(" ms")?;
    number.trim().parse().ok()
}

/// The number behind `name`.
fn after(printed: &str, name: &str) -> Option<f64> {
    printed.split_once(name)?.1.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_are_read() {
        let ours =
            "client: …\npiece: 1000000 parameters: mask 0.1500 ms, round 0.5000 ms\n\ncoordinator: …\n";
        let shamir = "split, 51 of 101, 64 bytes: 40.0 µs\nLagrange weights of 51: 30.0 µs\n\
                      combine 51 of 32 bytes: 2.0 µs\n";
        let theirs = "d=100000: mask per neighbour 0.270 ms, quantize 2.47 ms\n\
                      d=1000000: mask per neighbour 1.890 ms, quantize 16.40 ms\n\
                      shamir 51 of 101: split 140.0 ms, combine 163.0 ms\n";
        let primitive = |name: &str, ours, theirs| Primitive {
            name: name.to_owned(),
            ours: Some(ours),
            theirs: Some(theirs),
        };
        let expected = [
            primitive("one mask, 1000000 parameters", 0.15, 1.89),
            primitive("rounding, 1000000 parameters", 0.5, 16.4),
            primitive("sharing, 51 of 101", 0.04, 140.0),
            primitive("combining 51 shares", 0.032, 163.0),
        ];
        assert_eq!(primitives(ours, shamir, theirs), expected);
        let alone = primitives(ours, "", "");
        assert!(alone.iter().all(|primitive| primitive.theirs.is_none()));
        assert_eq!(alone.iter().filter(|primitive| primitive.ours.is_some()).count(), 2);
    }
}
