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
