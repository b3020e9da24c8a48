//! Real nodes and a real coordinator end in the simulator's model, whatever is killed.

use std::path::{Path, PathBuf};

use tributary_tests::{Coordinator, Process, json_lines, run, shared_data, workspace};

/// A small job on generated images, with dropout: four clients, all wanted, three suffice.
const JOB: &str = r#"
name = "first-light"
seed = 11
rounds = 4
[model]
architecture = "sequential"
inputs = [1, 28, 28]
classes = 10
layers = [
    { convolution = { channels = 16, size = 8, stride = 2, padding = 2 } }, "relu", { max_pool = { size = 2, stride = 1 } },
    { convolution = { channels = 32, size = 4, stride = 2 } }, "relu", { max_pool = { size = 2, stride = 1 } },
    "flatten", { dropout = 0.3 }, { linear = 32 }, "relu", { dropout = 0.2 }, { linear = 10 },
]
[train]
algorithm = "fedprox"
proximal_mu = 0.01
learning_rate = 0.1
momentum = 0.5
local_epochs = 1
batch_size = 10
[cohort]
size = 4
minimum = 3
deadline_seconds = 120
reconnect_seconds = 4
settle_seconds = 2
"#;
const DATA: &str = "[data]\nsource = \"synthetic\"\nexamples = 240\ntest_examples = 100\nseed = 3\n";

/// The last line of `tributary-sim run` for a scenario.
fn simulate(scenario: &Path, out: &Path, more: &[&str]) -> serde_json::Value {
    let arguments = ["run", scenario.to_str().unwrap(), "--format", "json", "--out", out.to_str().unwrap()];
    json_lines(&run("tributary-sim", &[&arguments, more].concat(), 0).stdout).pop().unwrap()
}

/// Writes the job and its scenario beside the coordinator.
fn files(coordinator: &Coordinator) -> (PathBuf, PathBuf) {
    let (job, scenario) = (coordinator.scratch("job.toml"), coordinator.scratch("scenario.toml"));
    std::fs::write(&job, JOB).unwrap();
    let text =
        format!("job = \"job.toml\"\n[population]\nclients = 4\n{DATA}\n[partition]\nscheme = \"iid\"\n");
    std::fs::write(&scenario, text).unwrap();
    (job, scenario)
}

/// Joins `client-0` to `client-3`, each with its share of the generated images.
fn join_four(coordinator: &Coordinator) -> Vec<PathBuf> {
    let share =
        |index| format!("{DATA}\n[share]\nscheme = \"iid\"\nclients = 4\nindex = {index}\nseed = 11\n");
    (0..4).map(|index| coordinator.join(&format!("client-{index}"), &share(index))).collect()
}

/// The records of the run's rounds.
fn records(coordinator: &Coordinator, run: &str) -> Vec<serde_json::Value> {
    let shown = json_lines(&coordinator.admin(&["run", "show", run, "--format", "json"]).stdout);
    shown[0]["rounds_ended"].as_array().unwrap().clone()
}

#[test]
fn a_federation_ends_in_the_simulators_model_for_any_number_of_workers() {
    let coordinator = Coordinator::start();
    let (job, scenario) = files(&coordinator);
    let nodes: Vec<Process> =
        join_four(&coordinator).iter().map(|config| Process::node(config, &[])).collect();
    let id = coordinator.submit(&job);
    let real = coordinator.finished(&id);
    assert_eq!((real["event"].as_str(), real["rounds"].as_u64()), (Some("finished"), Some(4)), "{real}");
    for workers in ["1", "2", "4"] {
        let out = coordinator.scratch(&format!("sim-{workers}"));
        let simulated = simulate(&scenario, &out, &["--workers", workers]);
        assert_eq!(simulated["model_digest"], real["model_digest"], "--workers {workers}");
    }
    let records = records(&coordinator, &id);
    assert_eq!(records.len(), 4);
    assert!(records.iter().all(|record| record["cohort"].as_object().unwrap().len() == 4), "{records:?}");
    for mut node in nodes {
        node.terminate();
        assert_eq!(node.wait(), Some(0), "{}", node.output());
    }
}

#[test]
fn a_killed_hospital_is_recorded_and_rejoins_and_the_record_replays() {
    let coordinator = Coordinator::start();
    let (job, scenario) = files(&coordinator);
    let configs = join_four(&coordinator);
    // The others take their time, so that rounds are left when the victim is back.
    let slowly = |config: &PathBuf| Process::node(config, &["--pause-before-upload-seconds", "1"]);
    let mut others: Vec<Process> = configs[..3].iter().map(slowly).collect();
    let mut victim = Process::node(&configs[3], &["--pause-before-upload-seconds", "60"]);
    let id = coordinator.submit(&job);
    victim.wait_for("round 1: training", 1);
    others.iter_mut().for_each(|node| node.wait_for("round 1: uploaded", 1));
    victim.kill();
    others[0].wait_for("round 2: training", 1);
    let _victim = Process::node(&configs[3], &[]);
    let real = coordinator.finished(&id);
    assert_eq!(real["event"], "finished");

    let records = records(&coordinator, &id);
    assert_eq!(records[0]["cohort"]["client-3"]["outcome"], "disconnected", "{}", records[0]);
    assert_eq!(records[0]["result"], "published");
    let back = records.iter().filter(|record| record["cohort"]["client-3"]["outcome"] == "accepted").count();
    assert!(back >= 1, "client-3 rejoins: {records:?}");

    let record = coordinator.scratch("rounds.jsonl");
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    std::fs::write(&record, lines).unwrap();
    let replayed =
        simulate(&scenario, &coordinator.scratch("replay"), &["--replay", record.to_str().unwrap()]);
    assert_eq!(replayed["model_digest"], real["model_digest"]);
}

#[test]
fn a_killed_coordinator_finishes_with_the_undisturbed_model() {
    let mut coordinator = Coordinator::start();
    let (job, scenario) = files(&coordinator);
    // Nodes need a while to find a coordinator again.
    std::fs::write(&job, JOB.replace("reconnect_seconds = 4", "reconnect_seconds = 60")).unwrap();
    let configs = join_four(&coordinator);
    let mut nodes: Vec<Process> = configs[..3].iter().map(|config| Process::node(config, &[])).collect();
    // One slow node keeps the round open while the coordinator dies.
    nodes.push(Process::node(&configs[3], &["--pause-before-upload-seconds", "3"]));
    let id = coordinator.submit(&job);
    nodes[3].wait_for("round 2: training", 1);
    nodes[..3].iter_mut().for_each(|node| node.wait_for("round 2: uploaded", 1));
    coordinator.process().kill();
    coordinator.serve();
    let real = coordinator.finished(&id);
    assert_eq!(real["event"], "finished", "{real}");
    let undisturbed = simulate(&scenario, &coordinator.scratch("sim"), &[]);
    assert_eq!(real["model_digest"], undisturbed["model_digest"]);
    let records = records(&coordinator, &id);
    assert_eq!(records.len(), 4, "the round went on, it was not drawn anew: {records:?}");
    assert!(records.iter().all(|record| record["attempt"] == 1));
}

#[test]
fn four_hospitals_end_in_the_simulators_model() {
    let Some(data) = shared_data("heart-disease") else { return };
    let coordinator = Coordinator::start();
    let (job, scenario) =
        (workspace().join("jobs/heart-disease.toml"), workspace().join("jobs/heart-disease-sim.toml"));
    // Each hospital reads its own file, as the scenario's `[data]` table says it.
    let text = std::fs::read_to_string(&scenario).unwrap();
    let table = text.parse::<toml::Table>().unwrap().remove("data").unwrap();
    let configs: Vec<PathBuf> = ["cleveland", "hungarian", "switzerland", "va"]
        .iter()
        .map(|site| {
            let mut table = table.as_table().unwrap().clone();
            table.insert("site".into(), (*site).into());
            let path = data.join(table["path"].as_str().unwrap());
            table.insert("path".into(), path.to_str().unwrap().into());
            let wrapped = toml::Table::from_iter([("data".to_owned(), toml::Value::Table(table))]);
            coordinator.join(site, &toml::to_string(&wrapped).unwrap())
        })
        .collect();
    let _nodes: Vec<Process> = configs.iter().map(|config| Process::node(config, &[])).collect();
    let id = coordinator.submit(&job);
    let real = coordinator.finished(&id);
    for workers in ["1", "2"] {
        let out = coordinator.scratch(&format!("sim-{workers}"));
        let data = data.to_str().unwrap();
        let simulated = simulate(&scenario, &out, &["--data", data, "--workers", workers]);
        println!(
            "coordinator {} simulator --workers {workers} {}",
            real["model_digest"], simulated["model_digest"]
        );
        assert_eq!(simulated["model_digest"], real["model_digest"], "--workers {workers}");
    }
}
