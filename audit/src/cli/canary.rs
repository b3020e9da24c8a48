//! `canary`: the empirical lower bounds of an audit run beside the claim.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::{Format, Outcome};
use crate::canary::file::{NoiseCheck, Verdict, read};

/// Arguments of `canary`.
#[derive(Debug, Args)]
pub(super) struct CanaryArguments {
    /// The record that an audit run left.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Prints the verdict on an audit run.
pub(super) fn canary(arguments: &CanaryArguments) -> anyhow::Result<Outcome> {
    let verdict = Verdict::of(&read(&arguments.file)?)?;
    match arguments.format {
        Format::Text => text(&verdict),
        Format::Json => println!("{}", json(&verdict)),
    }
    Ok(if verdict.is_sound() { Outcome::Sound } else { Outcome::Findings })
}

fn text(verdict: &Verdict) {
    let claim = verdict.claim;
    let guesses = verdict.guesses;
    println!("claim: epsilon at most {:.4} at delta {:e}", claim.epsilon, claim.delta);
    println!("{} of {} guesses right, {} canaries", guesses.correct, guesses.made, guesses.canaries);
    println!("lower bounds at 95 % confidence:");
    println!("  {:>8.4}  by guesses alone", verdict.one_run);
    match verdict.trade_off {
        Some(found) if found.epsilon.is_finite() => {
            println!("  {:>8.4}  by the mechanism's trade-off curve", found.epsilon);
        }
        Some(_) => println!("  no noise that can be accounted for explains so many right guesses"),
        None => println!("         -  the mechanism's trade-off curve is not available for this claim"),
    }
    if let Some(estimate) = verdict.one_shot {
        println!("  {estimate:>8.4}  client level: an estimate, not a bound");
    }
    if verdict.is_refuted() {
        println!("FINDING: the claim is refuted: a lower bound is above it");
    } else {
        println!("no bound is above the claim; that does not show that it holds");
    }
    for check in &verdict.noise {
        let what =
            check.record.map_or("all recorded noise".to_owned(), |record| format!("noise record {record}"));
        let NoiseCheck { ratio, margin, .. } = *check;
        if check.is_short() {
            println!(
                "FINDING: {what} has {ratio:.4} of the declared standard deviation (margin {margin:.4})"
            );
        } else if check.is_excessive() {
            println!("note: {what} has {ratio:.4} of the declared standard deviation (margin {margin:.4})");
        } else if check.record.is_none() {
            println!("{what}: {ratio:.4} of the declared standard deviation (margin {margin:.4})");
        }
    }
    if verdict.noise.is_empty() {
        println!("note: no noise was recorded, so its standard deviation is not checked");
    }
}

/// Infinite figures are `null`.
fn json(verdict: &Verdict) -> Value {
    let curve = |found: &crate::canary::trade_off::Finding| {
        json!({
            "epsilon": found.epsilon,
            "noise_factor": found.noise_factor,
            "claim_refuted": found.claim_refuted,
        })
    };
    let check = |check: &NoiseCheck| {
        json!({
            "record": check.record,
            "ratio": check.ratio,
            "margin": check.margin,
            "short": check.is_short(),
        })
    };
    json!({
        "event": "canary",
        "claim": verdict.claim,
        "canaries": verdict.guesses.canaries,
        "guesses": verdict.guesses.made,
        "correct": verdict.guesses.correct,
        "confidence": 1.0 - crate::canary::ERROR_PROBABILITY,
        "lower_bound_by_guesses": verdict.one_run,
        "lower_bound_by_trade_off": verdict.trade_off.as_ref().map(curve),
        "client_level_estimate": verdict.one_shot,
        "noise": verdict.noise.iter().map(check).collect::<Vec<_>>(),
        "refuted": verdict.is_refuted(),
        "sound": verdict.is_sound(),
    })
}
