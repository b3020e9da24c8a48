//! What a researcher relies on: the same bits for any number of workers, drop-outs that are told, replays that agree.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tributary_client::shard::Shard;
use tributary_client::trainer::{ArithmeticTrainer, ClientUpdate, Task, TorchTrainer, TrainError, Trainer};
use tributary_common::job::Job;
use tributary_common::model;
use tributary_common::record::{
    EvaluationRecord, Metrics, Participation, Reason, RoundOutcome, RoundRecord, RunEvent, RunState,
};
use tributary_server::round::ImposedSets;

use crate::engine::{
    Finished, HELD_UPDATES_BYTES, Observation, Settings, SimulationError, Transport, simulate,
};
use crate::plan::Plan;
use crate::scenario::{Overrides, Scenario};
use crate::workers::MakeTrainer;

mod conditions;
mod masked;

const SCENARIO: &str = r#"
[job]
name = "t"
seed = 3
rounds = 3
[job.model]
architecture = "logistic"
inputs = [1, 28, 28]
classes = 10
[job.train]
algorithm = "fedavg"
learning_rate = 0.1
local_epochs = 1
batch_size = 8
[job.cohort]
size = 6
minimum = 3
[population]
clients = 12
[data]
source = "synthetic"
examples = 240
test_examples = 40
[partition]
scheme = "dirichlet"
alpha = 0.5
"#;

fn scenario(set: &[&str]) -> Scenario {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scenario.toml");
    std::fs::write(&path, SCENARIO).unwrap();
    let set = set.iter().map(|assignment| (*assignment).to_owned()).collect();
    Scenario::read(&path, &Overrides { set, ..Overrides::default() }).unwrap()
}

fn arithmetic() -> MakeTrainer {
    Arc::new(|| Ok(Box::new(ArithmeticTrainer)))
}

fn torch() -> MakeTrainer {
    Arc::new(|| Ok(Box::new(TorchTrainer::new())))
}

fn settings(workers: usize, trainer: MakeTrainer) -> Settings {
    Settings::new(workers, trainer)
}

/// A run that ended, with the records that it told.
struct Told {
    finished: Finished,
    rounds: Vec<RoundRecord>,
    evaluations: Vec<EvaluationRecord>,
}

impl std::ops::Deref for Told {
    type Target = Finished;

    fn deref(&self) -> &Finished {
        &self.finished
    }
}

fn follow(
    scenario: &Scenario,
    settings: Settings,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(&Observation<'_>),
) -> Result<Told, SimulationError> {
    let federation = scenario.federation().unwrap();
    let (mut rounds, mut evaluations) = (Vec::new(), Vec::new());
    let finished = simulate(scenario, federation, settings, stop, &mut |observation| {
        match &observation {
            Observation::Event(RunEvent::RoundEnded { record }) => rounds.push(record.clone()),
            Observation::Event(RunEvent::Evaluated { record }) => evaluations.push(record.clone()),
            _ => {}
        }
        observe(&observation);
    })?;
    Ok(Told { finished, rounds, evaluations })
}

fn run_with(scenario: &Scenario, settings: Settings) -> Result<Told, SimulationError> {
    follow(scenario, settings, &AtomicBool::new(false), &mut |_| {})
}

fn run(scenario: &Scenario, workers: usize, trainer: MakeTrainer) -> Told {
    run_with(scenario, settings(workers, trainer)).unwrap()
}

fn assert_same(a: &Told, b: &Told) {
    assert_eq!(model::digest(&a.model), model::digest(&b.model));
    assert_eq!((&a.state, a.published, &a.timing), (&b.state, b.published, &b.timing));
    assert_eq!(a.rounds, b.rounds);
    assert_eq!(a.evaluations, b.evaluations);
}

/// Clients that take very different real times, in an order of their own.
struct Uneven<T>(T);

impl<T: Trainer> Trainer for Uneven<T> {
    fn train(&mut self, task: &Task, shard: &Shard, stop: &AtomicBool) -> Result<ClientUpdate, TrainError> {
        let client: u64 = task.client.as_str().bytes().map(u64::from).sum();
        std::thread::sleep(Duration::from_micros((client * 7919 + u64::from(task.round) * 104_729) % 3000));
        self.0.train(task, shard, stop)
    }

    fn evaluate(&mut self, job: &Job, model: &[f32], shard: &Shard) -> Result<Metrics, TrainError> {
        self.0.evaluate(job, model, shard)
    }
}

#[test]
fn workers_decide_no_bit_and_no_record() {
    for set in [&[][..], &["cohort.over_selection=1.7"], &["population.samples_per_client=17"]] {
        let scenario = scenario(set);
        let one = run(&scenario, 1, arithmetic());
        assert_eq!((one.state.clone(), one.published, one.evaluations.len()), (RunState::Finished, 3, 3));
        for workers in [2, 4, 16] {
            let uneven: MakeTrainer = Arc::new(|| Ok(Box::new(Uneven(ArithmeticTrainer))));
            assert_same(&one, &run(&scenario, workers, uneven));
        }
    }
}

#[test]
fn libtorch_gives_the_same_bits_on_any_number_of_workers() {
    let scenario = scenario(&["cohort.over_selection=1.5", "model.architecture=small-cnn", "rounds=2"]);
    let one = run(&scenario, 1, torch());
    let surplus = |finished: &Told| {
        finished
            .rounds
            .iter()
            .flat_map(|round| round.cohort.values())
            .filter(|p| **p == Participation::Surplus)
            .count()
    };
    assert_eq!(surplus(&one), 2 * 3, "nine are invited, six waited for");
    assert_same(&one, &run(&scenario, 3, torch()));
}

#[test]
fn dropout_is_the_same_whoever_computes_it_and_whenever_it_ends() {
    let layers = r#"model.layers=["flatten", { linear = 32 }, "relu", { dropout = 0.5 }, { linear = 10 }]"#;
    let scenario = scenario(&["cohort.size=10", "model.architecture=sequential", layers, "rounds=2"]);
    let one = run(&scenario, 1, torch());
    for workers in [2, 4] {
        let shuffled: MakeTrainer = Arc::new(|| Ok(Box::new(Uneven(TorchTrainer::new()))));
        assert_same(&one, &run(&scenario, workers, shuffled));
    }
    let mut without = scenario.clone();
    without.job.model.layers.remove(3);
    assert_ne!(model::digest(&run(&without, 1, torch()).model), model::digest(&one.model));
}

/// Counts the trainings that began and writes down in which order; its updates are zeros.
struct Counting {
    began: Arc<Mutex<Vec<String>>>,
}

impl Trainer for Counting {
    fn train(&mut self, task: &Task, shard: &Shard, _: &AtomicBool) -> Result<ClientUpdate, TrainError> {
        self.began.lock().unwrap().push(task.client.to_string());
        Ok(ClientUpdate { delta: vec![0.0; task.model.len()], examples: shard.len() as u64, loss: Some(0.0) })
    }

    fn evaluate(&mut self, _: &Job, _: &[f32], _: &Shard) -> Result<Metrics, TrainError> {
        Ok(Metrics::default())
    }
}

fn counting(began: &Arc<Mutex<Vec<String>>>) -> MakeTrainer {
    let began = began.clone();
    Arc::new(move || Ok(Box::new(Counting { began: began.clone() })))
}

#[test]
fn the_wire_changes_nothing_but_the_digests_in_the_records() {
    // 199,210 parameters are one chunk, 1,199,882 are several.
    let several = ["model.architecture=mlp", "model.hidden=[1024, 384]", "rounds=2"];
    let sites = ["evaluation.every_rounds=2", "cohort.over_selection=1.5", "policy.minimum_cell=5"];
    let conditions = [
        "rounds=4",
        "devices.upload_megabits_per_second=1",
        "faults.dropout_probability=0.1",
        "faults.corrupt_upload_probability=0.3",
        "faults.duplicate_upload_probability=0.3",
    ];
    for set in [&[][..], &several, &sites, &conditions] {
        let scenario = scenario(set);
        let memory = run(&scenario, 2, arithmetic());
        assert!(
            memory
                .rounds
                .iter()
                .flat_map(|round| round.cohort.values())
                .all(|part| { !matches!(part, Participation::Accepted { digest: Some(_), .. }) })
        );
        for workers in [1, 3] {
            let settings = Settings { transport: Transport::Wire, ..settings(workers, arithmetic()) };
            let mut wire = run_with(&scenario, settings).unwrap();
            let parts = wire.rounds.iter_mut().flat_map(|round| round.cohort.values_mut());
            for part in parts {
                if let Participation::Accepted { digest, .. } = part {
                    assert!(digest.take().is_some(), "what crossed the wire has its digest");
                }
            }
            assert_same(&memory, &wire);
        }
    }
}

#[test]
fn few_updates_are_in_memory_whatever_the_cohort() {
    // 5 million parameters: three updates fit into what may be held, fewer than two for each of two workers.
    let model = ["model.architecture=mlp", "model.hidden=[6300]", "rounds=1"];
    let base = [&model[..], &["cohort.size=24", "population.clients=24"]].concat();
    few_updates_are_in_memory(&scenario(&base));
    // Virtually, all updates are under way at the same time.
    let slow = ["devices.upload_megabits_per_second={uniform={from=1,to=2}}", "devices.step_milliseconds=3"];
    few_updates_are_in_memory(&scenario(&[&base[..], &slow].concat()));
}

fn few_updates_are_in_memory(scenario: &Scenario) {
    assert!(scenario.job.layout().unwrap().parameters() as u64 * 4 * 4 > HELD_UPDATES_BYTES);
    let began = Arc::default();
    let (mut delivered, mut most) = (0usize, 0usize);
    let stop = AtomicBool::new(false);
    let told = follow(scenario, settings(2, counting(&began)), &stop, &mut |observation| {
        if let Observation::Event(RunEvent::Progress { .. }) = observation {
            delivered += 1;
            most = most.max(began.lock().unwrap().len().saturating_sub(delivered));
        }
    });
    assert_eq!((told.unwrap().published, delivered), (1, 24));
    assert!((2..=4).contains(&most), "{most} updates were made and not delivered");
}

#[test]
fn the_longest_training_begins_first_and_what_the_round_leaves_out_is_not_begun() {
    let order = |set: &[&str]| {
        let scenario = scenario(&[&["rounds=1", "population.clients=9"], set].concat());
        let federation = scenario.federation().unwrap();
        let steps: BTreeMap<String, u64> = (federation.shares.iter())
            .map(|share| (share.name.to_string(), scenario.job.train.steps(share.train.len() as u64)))
            .collect();
        let began = Arc::default();
        run(&scenario, 1, counting(&began));
        let began = began.lock().unwrap().clone();
        (began.iter().map(|client| steps[client]).collect::<Vec<u64>>(), steps)
    };
    let (began, steps) = order(&["cohort.size=9"]);
    let mut sorted: Vec<u64> = steps.into_values().collect();
    sorted.sort_by_key(|steps| std::cmp::Reverse(*steps));
    assert!(sorted[0] > sorted[8], "the clients differ");
    // Examples decide, so two clients with equally many steps may come in either order.
    assert_eq!(began, sorted);

    // Six are waited for, nine invited: the three that take longest are surplus.
    let (began, _) = order(&["cohort.size=6", "cohort.over_selection=1.5"]);
    assert_eq!(began, sorted[3..]);
}

#[test]
fn an_evaluation_in_parts_has_the_bits_of_the_whole() {
    let set = ["data.test_examples=1700", "rounds=1", "model.architecture=small-cnn"];
    let scenario = scenario(&set);
    let told = run(&scenario, 3, torch());
    let test = scenario.federation().unwrap().dataset.test;
    let whole = TorchTrainer::new().evaluate(&scenario.job, &told.model, &Shard::whole(test)).unwrap();
    assert_eq!(whole.examples, 1700);
    assert_eq!(told.evaluations[0].held_out, Some(whole));
}

#[test]
fn a_client_that_cannot_train_drops_out_and_is_named() {
    struct Broken;
    impl Trainer for Broken {
        fn train(
            &mut self,
            task: &Task,
            shard: &Shard,
            stop: &AtomicBool,
        ) -> Result<ClientUpdate, TrainError> {
            match task.client.as_str() {
                "client-04" => Err(TrainError::Diverged { step: 9 }),
                "client-05" => panic!("a bug"),
                _ => ArithmeticTrainer.train(task, shard, stop),
            }
        }
        fn evaluate(&mut self, job: &Job, model: &[f32], shard: &Shard) -> Result<Metrics, TrainError> {
            ArithmeticTrainer.evaluate(job, model, shard)
        }
    }
    let broken = || -> MakeTrainer { Arc::new(|| Ok(Box::new(Broken))) };
    let everybody = scenario(&["cohort.size=12", "cohort.minimum=10"]);
    let mut details = BTreeSet::new();
    let stop = AtomicBool::new(false);
    let finished = follow(&everybody, settings(2, broken()), &stop, &mut |observation| {
        if let Observation::Declined { client, detail, .. } = observation {
            details.insert(format!("{client}: {detail}"));
        }
    });
    let finished = finished.unwrap();
    assert_eq!((finished.published, &finished.state), (3, &RunState::Finished));
    let declined = Participation::Declined { reason: Reason::Training };
    assert!(finished.rounds.iter().all(|round| round.cohort[&"client-04".parse().unwrap()] == declined));
    let details: Vec<_> = details.into_iter().collect();
    assert!(
        details[0].starts_with("client-04: training diverged") && details[0].contains("step 9"),
        "{details:?}"
    );
    assert!(details[1].contains("this is a bug"), "{details:?}");

    let all_needed = scenario(&["cohort.size=12", "cohort.minimum=12", "cohort.attempts=2"]);
    let failed = run(&all_needed, 2, broken());
    assert!(matches!(failed.state, RunState::Failed { .. }), "{:?}", failed.state);
    assert_eq!((failed.published, failed.rounds.len(), failed.evaluations.len()), (0, 2, 0));
}

#[test]
fn a_policy_refuses_before_anything_is_trained() {
    let finished = run(&scenario(&["policy.minimum_cohort=4"]), 1, arithmetic());
    assert!(matches!(finished.state, RunState::Failed { .. }));
    let declined = Participation::Declined { reason: Reason::Policy };
    let parts = || finished.rounds.iter().flat_map(|round| round.cohort.values());
    assert!(parts().filter(|part| **part == declined).count() >= 4);
    assert!(parts().all(|part| !matches!(part, Participation::Accepted { .. })));

    // Nobody is left who has not declined: they are asked again, until the attempts are used up.
    let refused = run(&scenario(&["policy.minimum_cohort=4", "cohort.attempts=20"]), 1, arithmetic());
    assert!(matches!(refused.state, RunState::Failed { .. }), "{:?}", refused.state);
    assert_eq!((refused.rounds.len(), refused.published), (20, 0));
}

#[test]
fn a_replay_imposes_the_accepted_sets() {
    let over = run(&scenario(&["cohort.over_selection=1.8"]), 2, arithmetic());
    let accepted = |finished: &Told| -> ImposedSets {
        finished.rounds.iter().map(|round| (round.round, round.accepted().cloned().collect())).collect()
    };
    // Without the over-selection other cohorts would be drawn; imposed, the same clients train, and no more.
    let plain = scenario(&[]);
    let replayed =
        run_with(&plain, Settings { imposed: Some(accepted(&over)), ..settings(2, arithmetic()) }).unwrap();
    assert_eq!(accepted(&replayed), accepted(&over));
    assert_eq!(model::digest(&replayed.model), model::digest(&over.model));
    assert_ne!(accepted(&run(&plain, 2, arithmetic())), accepted(&over));
}

#[test]
fn a_run_starts_from_the_model_it_is_given() {
    let scenario = scenario(&["rounds=1"]);
    let first = run(&scenario, 1, arithmetic());
    let layout = scenario.job.layout().unwrap();
    let drawn = Some(layout.initial(scenario.job.seed));
    assert_same(
        &first,
        &run_with(&scenario, Settings { initial: drawn, ..settings(1, arithmetic()) }).unwrap(),
    );
    let zeros = Some(vec![0.0; layout.parameters()]);
    let other = run_with(&scenario, Settings { initial: zeros, ..settings(1, arithmetic()) }).unwrap();
    assert_ne!(model::digest(&first.model), model::digest(&other.model));
}

#[test]
fn a_stopped_run_keeps_what_it_published() {
    let scenario = scenario(&["rounds=1000"]);
    let stop = AtomicBool::new(false);
    let finished = follow(&scenario, settings(2, arithmetic()), &stop, &mut |observation| {
        if let Observation::Event(RunEvent::RoundStarted { round: 4, .. }) = observation {
            stop.store(true, Ordering::Relaxed);
        }
    });
    let finished = finished.unwrap();
    assert_eq!((&finished.state, finished.published), (&RunState::Stopped, 3));
    assert_eq!((finished.rounds.len(), finished.evaluations.len()), (4, 3));
}

#[test]
fn the_first_cohort_is_drawn_from_everybody() {
    let finished = run(&scenario(&["cohort.size=3", "rounds=8"]), 1, arithmetic());
    assert!(finished.rounds.iter().all(|round| round.eligible == 12));
    let members: BTreeSet<_> = finished.rounds.iter().flat_map(|round| round.cohort.keys()).collect();
    assert!(members.len() > 8, "{members:?}");
}

#[test]
fn sites_evaluate_on_their_own_rows_and_hide_small_cells() {
    let folder = tempfile::tempdir().unwrap();
    let mut csv = String::from("hospital,a,b,y\n");
    for row in 0..120 {
        let site = ["north", "south", "west"][row % 3];
        csv.push_str(&format!("{site},{},{},{}\n", row % 7, row % 5, u8::from(row % 7 > 3)));
    }
    std::fs::write(folder.path().join("rows.csv"), csv).unwrap();
    let text = SCENARIO
        .split("[population]")
        .next()
        .unwrap()
        .replace("[1, 28, 28]", "[2]")
        .replace("= 10\n", "= 2\n")
        .replace("size = 6", "size = 3")
        + "[job.evaluation]\nfederated = true\n[data]\nsource = 'csv'\npath = 'rows.csv'\nlabel = 'y'\n\
           sites = { column = 'hospital' }\nsplit = { test_fraction = 0.3 }\n";
    let path = folder.path().join("sites.toml");
    std::fs::write(&path, text).unwrap();
    let read = |set: &[&str]| {
        let set = set.iter().map(|assignment| (*assignment).to_owned()).collect();
        Scenario::read(&path, &Overrides { set, ..Overrides::default() }).unwrap()
    };
    let open = run(&read(&[]), 2, torch());
    let last = open.evaluations.last().unwrap();
    let names: Vec<&str> = last.by_client.keys().map(|name| name.as_str()).collect();
    assert_eq!(names, ["north", "south", "west"]);
    let (held_out, federated) = (last.held_out.clone().unwrap(), last.federated().unwrap());
    assert_eq!((held_out.examples, held_out.correct), (federated.examples, federated.correct));
    assert!(last.by_client.values().all(|metrics| metrics.confusion.iter().all(Option::is_some)));
    let hidden = run(&read(&["policy.minimum_cell=1000"]), 2, torch());
    assert!(hidden.evaluations.iter().all(|record| record.headline().is_none()));
    assert_eq!(model::digest(&hidden.model), model::digest(&open.model));
}

#[test]
fn every_file_in_jobs_is_understood() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../jobs");
    let mut kinds = BTreeMap::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let is_job = text.lines().any(|line| line == "[model]");
        if is_job {
            Job::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        } else {
            Scenario::read(&path, &Overrides::default()).unwrap_or_else(|error| panic!("{error}"));
        }
        *kinds.entry(is_job).or_insert(0) += 1;
    }
    assert!(kinds[&true] >= 1 && kinds[&false] >= 7, "{kinds:?}");
    let read = |name: &str| Scenario::read(&folder.join(name), &Overrides::default()).unwrap().job;
    let (mut avg, prox) = (read("mnist-shards-fedavg.toml"), read("mnist-shards-fedprox.toml"));
    (avg.name, avg.train.algorithm, avg.train.proximal_mu) =
        (prox.name.clone(), prox.train.algorithm, prox.train.proximal_mu);
    assert_eq!(avg, prox, "the two differ in the algorithm alone");
}

#[test]
fn every_paper_is_documented_resolves_and_has_a_plan() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../jobs/papers");
    let page = std::fs::read_to_string(folder.join("../../docs/papers.md")).unwrap();
    let base = std::env::var_os("TRIBUTARY_DATA").map(PathBuf::from);
    let overrides = Overrides { data: base.clone(), ..Overrides::default() };
    let mut scenarios = BTreeMap::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        for part in ["# Source: ", "# Published: ", "# Tolerance: ", "# ours: see docs/papers.md"] {
            assert!(text.lines().any(|line| line.starts_with(part)), "{name}: {part}");
        }
        assert!(page.contains(&format!("jobs/papers/{name}.toml")), "{name} is not in docs/papers.md");
        let scenario = Scenario::read(&path, &overrides).unwrap_or_else(|error| panic!("{error}"));
        scenarios.insert(name, scenario);
    }
    assert!(scenarios.len() >= 13, "{:?}", scenarios.keys());
    for (name, scenario) in &scenarios {
        assert_eq!(&scenario.job.name, name);
        scenario.to_toml().unwrap();
        if scenario.data.path.is_some() && base.is_none() {
            eprintln!("skipped the plan of {name}: TRIBUTARY_DATA is not set");
            continue;
        }
        let plan = Plan::of(scenario, &scenario.federation().unwrap()).unwrap();
        assert!(plan.steps.minimum > 0 && plan.held_out > 0 && plan.warnings.is_empty(), "{plan}");
    }
    let pairs =
        scenarios.keys().filter_map(|name| name.strip_prefix("fedprox-").or(name.strip_suffix("fedprox")));
    for rest in pairs.map(str::to_owned) {
        let find = |algorithm: &str| {
            let name = format!("{algorithm}-{rest}");
            scenarios.get(&name).or(scenarios.get(&format!("{rest}{algorithm}"))).unwrap()
        };
        let (mut avg, prox) = (find("fedavg").job.clone(), &find("fedprox").job);
        (avg.name, avg.train.algorithm, avg.train.proximal_mu) =
            (prox.name.clone(), prox.train.algorithm, prox.train.proximal_mu);
        assert_eq!(&avg, prox, "the two differ in the algorithm alone");
    }
}

#[test]
fn a_shifted_client_trains_on_what_it_sees() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scenario.toml");
    let with = |partition: &str| {
        let head = SCENARIO.split("[partition]").next().unwrap();
        std::fs::write(&path, format!("{head}[partition]\n{partition}\n")).unwrap();
        Scenario::read(&path, &Overrides::default()).unwrap()
    };
    let shifted = with("scheme = 'feature-shift'\nnoise = 0.5\nrotation_degrees = 30.0\nintensity = 0.3");
    let (one, three) = (run(&shifted, 1, torch()), run(&shifted, 3, torch()));
    assert_same(&one, &three);
    let plain = run(&with("scheme = 'iid'"), 2, torch());
    assert_ne!(model::digest(&one.model), model::digest(&plain.model));
    let examples = |finished: &Told| finished.evaluations[0].held_out.clone().unwrap().examples;
    assert_eq!(examples(&one), examples(&plain), "the held-out examples are as they are");
}

#[test]
fn real_data_load_as_the_jobs_say() {
    let Some(base) = std::env::var_os("TRIBUTARY_DATA").map(PathBuf::from) else {
        eprintln!("skipped: TRIBUTARY_DATA is not set (a folder with mnist/, heart-disease/ and pneumonia/)");
        return;
    };
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../jobs");
    let overrides = Overrides { data: Some(base), ..Overrides::default() };
    for (name, clients) in [("mnist.toml", 100), ("heart-disease-sim.toml", 4), ("pneumonia.toml", 20)] {
        let scenario = Scenario::read(&folder.join(name), &overrides).unwrap();
        assert_eq!(scenario.federation().unwrap().shares.len(), clients, "{name}");
    }
}
