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
