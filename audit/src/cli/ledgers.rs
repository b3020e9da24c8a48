//! `verify`, `report` and `compare`: what ledgers show.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tributary_common::ledger::record::PublicKey;
use tributary_common::ledger::verify::Weight;

use super::{Format, Outcome};
use crate::compare;
use crate::report::Report;
use crate::verify::{Audited, LIMITS, audit};

/// What stands below the help of every command here.
pub(super) const HELP: &str = LIMITS;

/// Arguments of `verify`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct VerifyArguments {
    /// Exports of ledgers; each is a witness for the others too.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// A file with heads that somebody else kept: another party's export, or lines that are heads.
    #[arg(long, value_name = "FILE")]
    witness: Vec<PathBuf>,
    /// The key that must have signed, as its owner told it: 64 hexadecimal digits.
    #[arg(long, value_name = "HEX")]
    key: Option<PublicKey>,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Arguments of `report`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct ReportArguments {
    /// Exports of ledgers; each is a witness for the others too.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The folder for report.html and report.json.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Arguments of `compare`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct CompareArguments {
    /// The export of a node's ledger.
    #[arg(value_name = "NODE")]
    node: PathBuf,
    /// The export of a coordinator's ledger of one run.
    #[arg(value_name = "COORDINATOR")]
    coordinator: PathBuf,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

fn outcome(sound: bool) -> Outcome {
    if sound { Outcome::Sound } else { Outcome::Findings }
}

/// Prints what is wrong with ledgers.
pub(super) fn verify(arguments: &VerifyArguments) -> anyhow::Result<Outcome> {
    let audited = audit(&arguments.files, &arguments.witness, arguments.key)?;
    for one in &audited {
        match arguments.format {
            Format::Text => text(one),
            Format::Json => println!("{}", one.to_json()),
        }
    }
    Ok(outcome(audited.iter().all(|one| one.verified.is_sound())))
}

fn text(audited: &Audited) {
    println!("{}: {}", audited.path.display(), audited.title());
    for line in audited.lines(Weight::Finding) {
        println!("  FINDING  {line}");
    }
    for line in audited.lines(Weight::Note) {
        println!("  note     {line}");
    }
    if let Some(opening) = &audited.verified.opening {
        println!("  signed by {}", opening.public_key);
    }
    let (records, findings) = (audited.verified.records.len(), audited.verified.findings().count());
    match findings {
        0 => println!("  {records} records, nothing to object to"),
        _ => println!("  {records} records, {findings} findings"),
    }
}

/// Writes the report over ledgers.
pub(super) fn report(arguments: &ReportArguments) -> anyhow::Result<Outcome> {
    let audited = audit(&arguments.files, &[], None)?;
    let report = Report::of(&audited);
    report.write(&arguments.out)?;
    report.headline().iter().for_each(|line| println!("{line}"));
    println!("{}", arguments.out.join("report.html").display());
    Ok(outcome(audited.iter().all(|one| one.verified.is_sound())))
}

/// Prints what a node's ledger and a coordinator's say differently.
pub(super) fn compare(arguments: &CompareArguments) -> anyhow::Result<Outcome> {
    let audited = audit(&[arguments.node.clone(), arguments.coordinator.clone()], &[], None)?;
    let [node, coordinator] = audited.as_slice() else { anyhow::bail!("two ledgers are compared") };
    let found = compare::compare(node, coordinator)?;
    match arguments.format {
        Format::Text => {
            println!("{} and node {}: {} payloads agree", found.run, found.node, found.agreed);
            found.findings.iter().for_each(|line| println!("  FINDING  {line}"));
            found.notes.iter().for_each(|line| println!("  note     {line}"));
        }
        Format::Json => println!(
            "{}",
            json!({
                "run": found.run.run, "coordinator": found.run.coordinator, "node": found.node,
                "agreed": found.agreed, "findings": found.findings, "notes": found.notes,
            })
        ),
    }
    Ok(outcome(found.is_sound()))
}
