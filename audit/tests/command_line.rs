//! The program as a privacy officer meets it: what it prints and how it ends.
#![allow(clippy::unwrap_used)] // a test

use std::process::{Command, Output};

fn audit(arguments: &str) -> Output {
    let program = env!("CARGO_BIN_EXE_tributary-audit");
    Command::new(program).args(arguments.split_whitespace()).output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

const RUN: &str = "--sampling-rate 0.05 --steps 300 --delta 1e-5";

#[test]
fn epsilon_prints_both_figures_and_what_they_rest_on() {
    let output = audit(&format!("epsilon {RUN} --noise-multiplier 1.6"));
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in
        ["* pld  epsilon 2.62", "  rdp  epsilon 2.89", "grid step", "order", "delta 1e-5", "unit example"]
    {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let object =
        json(&audit(&format!("epsilon {RUN} --noise-multiplier 1.6 --format json --accountant rdp")));
    assert_eq!(object["accountant"], "rdp");
    assert_eq!(object["epsilon"], object["rdp"]["epsilon"]);
    assert_eq!(object["adjacency"], "add-or-remove-one");
    assert!(object["pld"]["grid_step"].as_f64().unwrap() > 0.0);
}

#[test]
fn noise_inverts_epsilon() {
    let object = json(&audit(&format!("noise {RUN} --target-epsilon 3 --format json")));
    let epsilon = object["epsilon"].as_f64().unwrap();
    assert!(epsilon <= 3.0 && epsilon > 2.999, "{object}");
    assert!(audit(&format!("noise {RUN} --target-epsilon 3")).status.success());
}

/// The reference rows of dp_accounting 0.6.0 for noise in shares, as they are asked for on the command line.
#[test]
fn noise_in_shares_meets_the_reference() {
    let Ok(folder) = std::env::var("TRIBUTARY_VECTORS") else {
        eprintln!("SKIPPED: TRIBUTARY_VECTORS does not name the folder with dp_reference_distributed.csv");
        return;
    };
    let text = std::fs::read_to_string(format!("{folder}/dp_reference_distributed.csv")).unwrap();
    let mut rows = 0;
    for line in text.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        let number = |at: usize| cells[at].parse::<f64>().unwrap();
        let (clip, grid, local, clients) = (number(0), number(1), number(2), number(3));
        let (rate, expected) = (number(6), number(12));
        let multiplier = local * clients.sqrt() / clip;
        let asked = format!(
            "epsilon --mechanism skellam --unit {} --noise-multiplier {multiplier} --clip-norm {clip} --scale {} \
             --dimension {} --survivors {clients} --sampling-rate {rate} --steps {} --delta {} --format json",
            if rate == 1.0 { "client" } else { "example" },
            1.0 / grid,
            cells[4],
            cells[7],
            cells[8],
        );
        let object = json(&audit(&asked));
        let found = object["epsilon"].as_f64().unwrap();
        if rate == 1.0 {
            // Where e^ε is 10¹⁸ even the sampler's distance of 10⁻²⁵ costs something.
            let tolerance = if expected < 30.0 { 1e-7 } else { 1e-3 };
            assert!((found / expected - 1.0).abs() < tolerance, "{line}: {found}");
            assert_eq!(object["rdp"]["order"].as_f64(), Some(number(13)));
        } else {
            // The reference samples by the general bound; ours, for symmetric noise, is below it.
            assert!(found < 1.01 * expected, "{line}: {found}");
        }
        // Beyond some 50 it is infinite, and null.
        let alone = object["shares"]["epsilon_if_all_others_are_dishonest"].as_f64().unwrap_or(f64::INFINITY);
        assert!(alone > found, "{line}");
        rows += 1;
    }
    assert_eq!(rows, 12);
}

#[test]
fn noise_in_shares_is_printed_with_both_figures_and_its_grid() {
    let shares = "--mechanism skellam --dimension 26010 --survivors 7 --colluders 1";
    let output = audit(&format!("epsilon {RUN} {shares} --noise-multiplier 1.6"));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "* rdp  epsilon 2.9",
        "with at most 1 of 7 survivors dishonest; epsilon 17.",
        "if all others are",
        "26624 coordinates",
        "share ",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let object = json(&audit(&format!("noise {RUN} {shares} --target-epsilon 3 --format json")));
    let epsilon = object["epsilon"].as_f64().unwrap();
    assert!(epsilon <= 3.0 && epsilon > 2.999, "{object}");
    assert!(object["pld"].is_null());
    for bad in [
        format!("epsilon {RUN} --mechanism skellam --noise-multiplier 1"),
        format!("epsilon {RUN} {shares} --noise-multiplier 1 --colluders 7"),
        format!("epsilon {RUN} {shares} --noise-multiplier 1 --accountant pld"),
        format!("epsilon {RUN} {shares} --noise-multiplier 0"),
        format!("noise {RUN} {shares} --target-epsilon 0.0001"),
    ] {
        let output = audit(&bad);
        assert_eq!(output.status.code(), Some(2), "{bad}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty(), "{bad}");
    }
}

#[test]
fn no_noise_is_no_number() {
    let object = json(&audit(&format!("epsilon {RUN} --noise-multiplier 0 --format json")));
    assert!(object["epsilon"].is_null());
    let text = String::from_utf8(audit(&format!("epsilon {RUN} --noise-multiplier 0")).stdout).unwrap();
    assert!(text.contains("epsilon inf"), "{text}");
}

#[test]
fn bad_usage_ends_with_two_and_a_line() {
    for arguments in [
        "epsilon --sampling-rate 2 --noise-multiplier 1 --steps 1 --delta 1e-5",
        "epsilon --sampling-rate 0.1 --noise-multiplier 1 --steps 1 --delta 1",
        "epsilon --sampling-rate 0.1 --noise-multiplier 1 --steps 1 --delta 1e-5 --unit client",
        "epsilon --sampling-rate 0.1",
        "nonsense",
    ] {
        let output = audit(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty(), "{arguments}");
    }
}

/// 40 canaries that are told apart perfectly, and noise of the declared deviation: a claim of epsilon 0.4 falls, a claim of
/// epsilon 40 stands; short noise is a finding by itself.
#[test]
fn canary_ends_with_one_when_the_claim_falls() {
    let record = |noise_multiplier: f64, squares: f64| {
        let canaries: Vec<_> = (0..400)
            .map(|i| serde_json::json!({ "included": i % 2 == 0, "score": if i % 2 == 0 { 1.0 } else { -1.0 } }))
            .collect();
        let event = serde_json::json!({
            "noise": "gaussian",
            "sampling_rate": 1.0,
            "sensitivity": 1.0,
            "noise_standard_deviation": noise_multiplier,
            "count": 1,
        });
        let run = serde_json::json!({
            "claim": { "events": [event], "delta": 1e-5, "unit": "example" },
            "canaries": canaries,
            "guesses_per_side": 40,
            "noise": [{
                "declared_standard_deviation": 1.0,
                "coordinates": 10_000,
                "sum_of_squares": squares,
            }],
        });
        let name = format!("audit-{noise_multiplier}-{squares}.json");
        let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::write(&path, run.to_string()).unwrap();
        path.display().to_string()
    };
    let fallen = audit(&format!("canary {}", record(8.0, 10_000.0)));
    assert_eq!(fallen.status.code(), Some(1));
    assert!(String::from_utf8(fallen.stdout).unwrap().contains("FINDING: the claim is refuted"));
    let sound = audit(&format!("canary {} --format json", record(0.3, 10_050.0)));
    assert_eq!(sound.status.code(), Some(0), "{sound:?}");
    let object = json(&sound);
    assert_eq!(object["correct"], 80);
    assert!(
        object["lower_bound_by_trade_off"]["epsilon"].as_f64() > object["lower_bound_by_guesses"].as_f64()
    );
    let short = audit(&format!("canary {}", record(0.3, 8_000.0)));
    assert_eq!(short.status.code(), Some(1));
    assert!(String::from_utf8(short.stdout).unwrap().contains("FINDING: noise record 0"));
    assert_eq!(audit("canary no-such-file.json").status.code(), Some(2));
}
