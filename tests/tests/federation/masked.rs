//! Masked rounds between whole processes over real TLS: nobody sees an update, and a kill at the worst moment loses none.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tributary_common::job::Job;
use tributary_tests::{Coordinator, Process, json_lines, run};

/// Four hospitals: masks, a shared support of a tenth of the coordinates, and noise in shares for examples, in three rounds.
const JOB: &str = r#"
name = "everything"
seed = 5
rounds = 3
[model]
architecture = "logistic"
inputs = [784]
classes = 10
[train]
algorithm = "fedavg"
learning_rate = 0.5
local_steps = 1
sampling_rate = 0.25
[cohort]
size = 4
minimum = 3
settle_seconds = 2
reconnect_seconds = 6
deadline_seconds = 150
[privacy]
unit = "example"
mechanism = "distributed"
noise_multiplier = 2.0
clip_norm = 1.0
expected_batch_size = 60.0
delta = 1e-5
max_epsilon = 8.0
[secure_aggregation]
enabled = true
step_seconds = 20
[compression]
scheme = "top-k"
density = 0.1
"#;

/// Without noise: what the masked sum is can be said to the last bit.
const OPEN: &str = r#"
name = "masked"
seed = 5
rounds = 2
[model]
architecture = "logistic"
inputs = [784]
classes = 10
[train]
algorithm = "fedavg"
learning_rate = 0.1
local_steps = 2
batch_size = 10
[cohort]
size = 4
minimum = 3
settle_seconds = 2
reconnect_seconds = 6
deadline_seconds = 150
[secure_aggregation]
enabled = true
step_seconds = 20
"#;

const HOSPITALS: [&str; 4] = ["north", "east", "south", "west"];

fn data(seed: usize) -> String {
    format!(
        "[data]\nsource = \"synthetic\"\nexamples = 60\ntest_examples = 30\nseed = {seed}\ndeclared_examples = 60\n\
         public_test = true\n[account]\nname = \"images\"\nmax_epsilon = 20.0\ndelta = 1e-5\n\
         [policy]\nfixed_cohort = false\n"
    )
}

fn open_data(seed: usize) -> String {
    format!(
        "[data]\nsource = \"synthetic\"\nexamples = 60\ntest_examples = 30\nseed = {seed}\n\
         [policy]\nfixed_cohort = false\n"
    )
}

fn join_all(coordinator: &Coordinator, data: fn(usize) -> String) -> Vec<PathBuf> {
    (3..).zip(HOSPITALS).map(|(seed, name)| coordinator.join(name, &data(seed))).collect()
}

/// Exports of a node's ledger and of the run's, found sound and in agreement.
fn audited(coordinator: &Coordinator, config: &Path, id: &str) -> PathBuf {
    let (node, server) = (coordinator.scratch("node.jsonl"), coordinator.scratch("run.jsonl"));
    let arguments =
        ["ledger", "export", "--config", config.to_str().unwrap(), "--out", node.to_str().unwrap()];
    run("tributary-client", &arguments, 0);
    coordinator.admin(&["ledger", "export", id, "--out", server.to_str().unwrap()]);
    let both = [node.to_str().unwrap(), server.to_str().unwrap()];
    run("tributary-audit", &[&["verify"], &both[..]].concat(), 0);
    run("tributary-audit", &[&["compare"], &both[..]].concat(), 0);
    node
}

fn rounds(coordinator: &Coordinator, id: &str) -> Vec<Value> {
    let output = coordinator.admin(&["run", "watch", id, "--format", "json"]);
    json_lines(&output.stdout).into_iter().filter(|line| line["event"] == "round").collect()
}

/// What the job promises, from the accountant that the ledger's auditor uses too.
fn promised(job: &str) -> f64 {
    Job::parse(job).unwrap().guarantee().unwrap().unwrap().epsilon
}

#[test]
fn masks_top_k_and_noise_together_survive_a_hospital_that_is_killed_after_its_shares() {
    let coordinator = Coordinator::start();
    let configs = join_all(&coordinator, data);
    let _three: Vec<Process> = configs[..3].iter().map(|config| Process::node(config, &[])).collect();
    let mut victim = Process::node(&configs[3], &["--pause-at", "keyed"]);
    let id = coordinator.submit_text(JOB);
    victim.wait_for("drill: stands still", 1);
    victim.kill();
    let finished = coordinator.finished(&id);
    assert_eq!(finished["event"], "finished", "{finished}");
    let (epsilon, promise) = (finished["epsilon"].as_f64().unwrap(), promised(JOB));
    assert!((epsilon - promise).abs() < 1e-9 * promise, "{epsilon} and {promise}");
    let rounds = rounds(&coordinator, &id);
    assert_eq!(rounds.len(), 3, "{rounds:?}");
    assert!(rounds.iter().all(|round| round["completed"] == 3), "{rounds:?}");
    for config in &configs[..3] {
        let export = std::fs::read_to_string(audited(&coordinator, config, &id)).unwrap();
        assert_eq!(export.matches("\"record\":\"round-charged\"").count(), 3);
        assert_eq!(export.matches("\"record\":\"payload-sealed\"").count(), 3);
        assert!(export.contains("skellam"), "the ledger names the mechanism");
    }
}

#[test]
fn a_coordinator_killed_between_uploads_and_unmasking_loses_no_round() {
    let mut coordinator = Coordinator::start();
    let configs = join_all(&coordinator, data);
    coordinator.process().kill();
    coordinator.serve_with(&["--pause-at", "survivors"]);
    let _nodes: Vec<Process> = configs.iter().map(|config| Process::node(config, &[])).collect();
    let id = coordinator.submit_text(JOB);
    coordinator.process().wait_for("drill: stands still", 1);
    coordinator.process().kill();
    coordinator.serve();
    let finished = coordinator.finished(&id);
    assert_eq!(finished["event"], "finished", "{finished}");
    let rounds = rounds(&coordinator, &id);
    assert_eq!(rounds.len(), 3, "no round was lost: {rounds:?}");
    assert!(rounds.iter().all(|round| round["completed"] == 4), "{rounds:?}");
    for config in &configs {
        let export = std::fs::read_to_string(audited(&coordinator, config, &id)).unwrap();
        assert_eq!(export.matches("\"record\":\"payload-sealed\"").count(), 3, "one payload per charge");
    }
}

/// Masked, with a kill or without: the model is the same to the last bit, for the sum is.
#[test]
fn a_masked_model_is_the_same_after_a_kill() {
    let digest = |kill: bool| {
        let mut coordinator = Coordinator::start();
        let configs = join_all(&coordinator, open_data);
        if kill {
            coordinator.process().kill();
            coordinator.serve_with(&["--pause-at", "shares"]);
        }
        let _nodes: Vec<Process> = configs.iter().map(|config| Process::node(config, &[])).collect();
        let id = coordinator.submit_text(OPEN);
        if kill {
            coordinator.process().wait_for("drill: stands still", 1);
            coordinator.process().kill();
            coordinator.serve();
        }
        let finished = coordinator.finished(&id);
        assert_eq!(finished["event"], "finished", "{finished}");
        finished["model_digest"].as_str().unwrap().to_owned()
    };
    assert_eq!(digest(false), digest(true));
}
