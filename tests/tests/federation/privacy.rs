//! What data may spend holds across jobs, crashes and restores, and an auditor can check it.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;
use tributary_tests::{Coordinator, Process, json_lines, run};

/// Two rounds of two private steps on generated images; one client is enough.
const JOB: &str = r#"
name = "private"
seed = 5
rounds = 2
[model]
architecture = "logistic"
inputs = [784]
classes = 10
[train]
algorithm = "fedavg"
learning_rate = 0.5
local_steps = 2
sampling_rate = 0.25
[cohort]
size = 1
settle_seconds = 1
reconnect_seconds = 120
deadline_seconds = 150
[privacy]
unit = "example"
mechanism = "dp-sgd"
noise_multiplier = 2.0
clip_norm = 1.0
delta = 1e-5
max_epsilon = 3.0
"#;
const DATA: &str = "[data]\nsource = \"synthetic\"\nexamples = 60\ntest_examples = 30\nseed = 3\n\
    declared_examples = 60\npublic_test = true\n";

fn account(cap: f64) -> String {
    format!("{DATA}[account]\nname = \"images\"\nmax_epsilon = {cap:?}\ndelta = 1e-5\n")
}

/// The node's account, whether it runs or not.
fn reading(config: &Path) -> Value {
    let arguments = ["ledger", "show", "--config", config.to_str().unwrap(), "--format", "json"];
    let output = run("tributary-client", &arguments, 0);
    json_lines(&output.stdout).pop().unwrap()
}

fn spent(config: &Path) -> f64 {
    reading(config)["epsilon_spent"].as_f64().unwrap()
}

/// Exports of a node's ledger and of a run's at the coordinator.
fn exports(coordinator: &Coordinator, config: &Path, id: &str) -> (PathBuf, PathBuf) {
    let (node, server) = (coordinator.scratch("node.jsonl"), coordinator.scratch(&format!("{id}.jsonl")));
    let arguments =
        ["ledger", "export", "--config", config.to_str().unwrap(), "--out", node.to_str().unwrap()];
    run("tributary-client", &arguments, 0);
    coordinator.admin(&["ledger", "export", id, "--out", server.to_str().unwrap()]);
    (node, server)
}

fn audit(command: &str, files: &[&Path], code: i32) -> Output {
    let files: Vec<&str> = files.iter().map(|file| file.to_str().unwrap()).collect();
    run("tributary-audit", &[&[command], &files[..]].concat(), code)
}

/// How many records of the export are of a kind.
fn count(export: &Path, kind: &str) -> usize {
    let text = std::fs::read_to_string(export).unwrap();
    text.matches(&format!("\"record\":\"{kind}\"")).count()
}

#[test]
fn an_auditor_finds_a_private_run_sound_and_a_changed_ledger_not() {
    let coordinator = Coordinator::start();
    let configs: Vec<PathBuf> =
        ["a", "b", "c"].iter().map(|name| coordinator.join(name, &account(8.0))).collect();
    let _nodes: Vec<Process> = configs.iter().map(|config| Process::node(config, &[])).collect();
    let job = JOB.replace("size = 1", "size = 3\nminimum = 3");
    let id = coordinator.submit_text(&job);
    let finished = coordinator.finished(&id);
    assert_eq!(finished["event"], "finished", "{finished}");
    let epsilon = finished["epsilon"].as_f64().unwrap();
    assert!(epsilon > 0.1 && epsilon <= 3.0, "{finished}");
    for config in &configs {
        let (node, server) = exports(&coordinator, config, &id);
        audit("verify", &[&node, &server], 0);
        audit("compare", &[&node, &server], 0);
        assert_eq!((count(&node, "round-charged"), count(&node, "payload-sealed")), (2, 2));
        assert!(count(&node, "head-witnessed") >= 1, "the coordinator shows its heads");
        assert_eq!(count(&server, "round-published"), 2);
        assert!(count(&server, "head-witnessed") >= 3, "the nodes show theirs");
    }
    // The account is charged by Rényi divergence at one order: at least what the job's own accountant says.
    assert!(spent(&configs[0]) >= epsilon - 1e-9);

    let (node, _) = exports(&coordinator, &configs[0], &id);
    let honest = std::fs::read(&node).unwrap();
    let mut flipped = honest.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    std::fs::write(&node, &flipped).unwrap();
    let output = audit("verify", &[&node], 1);
    assert!(String::from_utf8_lossy(&output.stdout).contains("record"), "{output:?}");
    let text = String::from_utf8(honest).unwrap();
    let without: Vec<&str> =
        text.lines().enumerate().filter(|(at, _)| *at != 3).map(|(_, line)| line).collect();
    std::fs::write(&node, format!("{}\n", without.join("\n"))).unwrap();
    audit("verify", &[&node], 1);
}

/// Spend before release: whatever step a `kill -9` hits, the round is counted, and counted once.
#[test]
fn a_node_killed_at_any_step_of_a_round_counts_it_and_counts_it_once() {
    for step in ["charged", "trained", "stored", "sealed", "uploaded"] {
        let coordinator = Coordinator::start();
        let config = coordinator.join("victim", &account(8.0));
        let mut victim = Process::node(&config, &["--pause-at", step]);
        let id = coordinator.submit_text(JOB);
        victim.wait_for("drill: stands still", 1);
        victim.kill();
        let after_kill = spent(&config);
        assert!(after_kill > 0.0, "{step}: the round that may have been released is not counted");
        let _again = Process::node(&config, &[]);
        let finished = coordinator.finished(&id);
        assert_eq!(finished["event"], "finished", "{step}: {finished}");
        let (node, server) = exports(&coordinator, &config, &id);
        assert_eq!(
            (count(&node, "round-charged"), count(&node, "payload-sealed")),
            (2, 2),
            "{step}: one charge and one payload for each round"
        );
        audit("verify", &[&node, &server], 0);
        audit("compare", &[&node, &server], 0);
        assert!(spent(&config) > after_kill, "{step}");
        println!("{step}: spent {after_kill:.6} after the kill, {:.6} at the end", spent(&config));
    }
}

#[test]
fn a_node_whose_cap_is_reached_refuses_before_training_and_the_submitter_sees_why() {
    let coordinator = Coordinator::start();
    // Room for one such job, not for two.
    let config = coordinator.join("capped", &account(1.0));
    let mut node = Process::node(&config, &[]);
    let job = JOB.replace("noise_multiplier = 2.0", "noise_multiplier = 3.0");
    let first = coordinator.submit_text(&job);
    assert_eq!(coordinator.finished(&first)["event"], "finished", "{}", node.output());
    let before = spent(&config);

    let file = coordinator.scratch("job.toml");
    let check = ["policy", "check", file.to_str().unwrap(), "--config", config.to_str().unwrap()];
    let refused = run("tributary-client", &check, 1);
    let words = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(words.starts_with("REFUSED: the job costs") && words.contains("left of"), "{words}");

    let second = coordinator.submit_text(&job.replace("seed = 5", "seed = 6"));
    node.wait_for("declined", 1);
    assert_eq!(node.output().matches("round 1: training").count(), 1, "{}", node.output());
    assert_eq!(spent(&config), before);
    coordinator.admin(&["run", "stop", &second]);
    let shown = json_lines(&coordinator.admin(&["run", "show", &second, "--format", "json"]).stdout);
    let outcome = &shown[0]["rounds_ended"][0]["cohort"]["capped"];
    assert_eq!(
        (&outcome["outcome"], &outcome["reason"]),
        (&"declined".into(), &"budget".into()),
        "{shown:?}"
    );

    // A job that promises nothing is refused too: after it the cap would mean nothing.
    let open = job.split("[privacy]").next().unwrap().replace("sampling_rate = 0.25", "batch_size = 10");
    let third = coordinator.submit_text(&open);
    node.wait_for("declined", 2);
    coordinator.admin(&["run", "stop", &third]);
    assert_eq!(spent(&config), before);
}

/// Pitfall 12: a backup of the node does not restore spent budget unseen, as long as the coordinator still has a head.
#[test]
fn a_restored_backup_of_a_node_is_detected_and_halts_its_account() {
    let coordinator = Coordinator::start();
    let config = coordinator.join("restored", &account(8.0));
    let dir = config.parent().unwrap();
    let mut node = Process::node(&config, &[]);
    let first = coordinator.submit_text(JOB);
    assert_eq!(coordinator.finished(&first)["event"], "finished");
    node.terminate();
    node.wait();
    let ledger = |file: &PathBuf| file.file_name().unwrap().to_str().unwrap().starts_with("ledger");
    let files: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(ledger).collect();
    assert!(files.len() >= 2, "{files:?}");
    let backup: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    let mut node = Process::node(&config, &[]);
    let second = coordinator.submit_text(&JOB.replace("seed = 5", "seed = 6"));
    assert_eq!(coordinator.finished(&second)["event"], "finished");
    let truth = spent(&config);
    node.terminate();
    node.wait();

    for (file, bytes) in files.iter().zip(&backup) {
        std::fs::write(file, bytes).unwrap();
    }
    assert!(spent(&config) < truth, "the old copy knows of one job");
    let mut node = Process::node(&config, &[]);
    node.wait_for("this ledger was longer once", 1);
    let third = coordinator.submit_text(&JOB.replace("seed = 5", "seed = 7"));
    node.wait_for("declined", 1);
    coordinator.admin(&["run", "stop", &third]);
    node.terminate();
    node.wait();
    let config_path = config.to_str().unwrap();
    let shown = run("tributary-client", &["ledger", "show", "--config", config_path], 0);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("HALTED"), "{shown:?}");

    // The operator's word ends the halt; without a figure the whole cap counts as spent.
    let accept = ["ledger", "accept-restore", "--config", config_path, "--reason", "disk failed"];
    run("tributary-client", &accept, 0);
    let restored = reading(&config);
    assert!(restored["epsilon_spent"].as_f64().unwrap() >= truth, "{restored}");
    assert_eq!(restored["restored"], true);

    // The coordinator does not take the shorter ledger by itself either.
    let mut node = Process::node(&config, &[]);
    assert_eq!(node.wait(), Some(1), "{}", node.output());
    assert!(node.output().contains("does not continue the head"), "{}", node.output());
    coordinator.admin(&["nodes", "accept-ledger", "restored"]);
    let mut node = Process::node(&config, &[]);
    node.wait_for("connected to", 1);
    node.terminate();
    assert_eq!(node.wait(), Some(0), "{}", node.output());
}

#[test]
fn a_trusted_coordinators_noise_is_charged_before_it_is_published() {
    let coordinator = Coordinator::start();
    let trusting = format!("{DATA}[policy]\ntrust_coordinator_noise = true\n");
    let configs: Vec<PathBuf> = ["a", "b"].iter().map(|name| coordinator.join(name, &trusting)).collect();
    let doubting = coordinator.join("doubting", DATA);
    let nodes: Vec<Process> = configs.iter().map(|config| Process::node(config, &[])).collect();
    let job = JOB
        .replace("unit = \"example\"", "unit = \"client\"")
        .replace("\"dp-sgd\"", "\"gaussian\"")
        .replace("sampling_rate = 0.25", "batch_size = 10")
        .replace("noise_multiplier = 2.0", "noise_multiplier = 5.0")
        .replace("size = 1", "size = 2");
    let file = coordinator.scratch("client-level.toml");
    std::fs::write(&file, &job).unwrap();
    let check = ["policy", "check", file.to_str().unwrap(), "--config", doubting.to_str().unwrap()];
    let refused = run("tributary-client", &check, 1);
    assert!(String::from_utf8_lossy(&refused.stdout).contains("trust_coordinator_noise"), "{refused:?}");

    let id = coordinator.submit(&file);
    let finished = coordinator.finished(&id);
    assert_eq!(finished["event"], "finished", "{}", nodes[0].output());
    let (node, server) = exports(&coordinator, &configs[0], &id);
    assert_eq!((count(&server, "round-noised"), count(&server, "round-published")), (2, 2));
    audit("verify", &[&node, &server], 0);
    audit("compare", &[&node, &server], 0);
}
