//! The commands from their arguments to what they print and leave.

use std::io::{Read as _, Write as _};
use std::path::Path;

use serde_json::Value;

use super::*;

pub(crate) const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../jobs/demo.toml");

/// What the command printed, or its exit code and message.
pub(crate) fn command(arguments: &[&str]) -> Result<String, (u8, String)> {
    let cli = Cli::try_parse_from(["tributary-sim"].iter().chain(arguments));
    let cli = cli.map_err(|error| (2, error.to_string()))?;
    let mut out = Vec::new();
    match perform(cli.command, &mut out) {
        Ok(()) => Ok(String::from_utf8(out).unwrap()),
        Err(End::Failed(message)) => Err((1, message)),
        Err(End::Unusable(message)) => Err((2, message)),
        Err(End::Interrupted(message)) => Err((130, message)),
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[test]
fn the_demo_learns_and_leaves_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = text(&folder.path().join("first"));
    let set = [
        "rounds=3",
        "data.examples=2000",
        "data.test_examples=300",
        "partition.alpha=10",
        "train.batch_size=5",
    ];
    let set: Vec<&str> = set.into_iter().flat_map(|assignment| ["--set", assignment]).collect();
    let run = |more: &[&str]| command(&[&["run", DEMO][..], &set[..], more].concat());

    let printed = run(&["--out", &out, "--format", "json", "--workers", "2"]).unwrap();
    let lines: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        lines.iter().map(|line| &line["event"]).collect::<Vec<_>>(),
        ["round", "round", "round", "finished"]
    );
    let (last, finished) = (&lines[2], &lines[3]);
    assert!(last["accuracy"].as_f64().unwrap() > 0.5, "{last}");
    assert_eq!(
        (&last["completed"], &last["dropped"], &last["epsilon"]),
        (&8.into(), &0.into(), &Value::Null)
    );
    assert_eq!(last["bytes_up"].as_u64().unwrap(), 8 * 26_010 * 4);
    assert_eq!(finished["rounds"], 3);

    let read = |name: &str| std::fs::read_to_string(Path::new(&out).join(name)).unwrap();
    assert_eq!(
        read("metrics.csv").lines().next(),
        Some("round,accuracy,loss,epsilon,bytes_up,bytes_down,completed,dropped,seconds")
    );
    assert_eq!((read("metrics.csv").lines().count(), read("rounds.jsonl").lines().count()), (4, 3));
    assert_eq!(read("evaluations.jsonl").lines().count(), 3);
    let report = read("report.html");
    assert!(report.contains(finished["model_digest"].as_str().unwrap()));
    for part in ["<svg", "Learning curve", "Confusion of the final model", "client-19", "libtorch 2.13.0"] {
        assert!(report.contains(part), "{part}");
    }
    for outside in ["src=", "<link", "<script", "url("] {
        assert!(!report.contains(outside), "{outside}: the report is self-contained");
    }
    let layout = tributary_common::job::Job::parse(&read("job.toml")).unwrap().layout().unwrap();
    let bytes = std::fs::read(Path::new(&out).join("model.safetensors")).unwrap();
    let model = model::import(&layout, &bytes).unwrap();
    assert_eq!(model::digest(&model).to_string(), finished["model_digest"]);

    // From the folder alone, on another number of workers, imposing its record, in place of itself: the same.
    let scenario = text(&Path::new(&out).join("scenario.toml"));
    let again = command(
        &[
            &["run", &scenario, "--out", &out, "--replay", &out, "--workers", "1"][..],
            &["--target-accuracy", "0.2"],
        ]
        .concat(),
    )
    .unwrap();
    assert!(again.starts_with("demo: 20 clients (dirichlet)"), "{again}");
    assert!(again.contains("round 3/3  accuracy 0."), "{again}");
    assert!(again.contains(finished["model_digest"].as_str().unwrap()), "{again}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside");
    assert!(again.contains("virtual time: ") && read("report.html").contains("<h2>Virtual time</h2>"));
    let told = again.lines().find(|line| line.starts_with("20 % first reached at round ")).unwrap();
    assert!(read("report.html").contains(told) && again.lines().count() == 9, "{again}");

    let other = text(&folder.path().join("second"));
    let prox =
        ["--set", "train.algorithm=fedprox", "--set", "train.proximal_mu=0.1", "--trainer", "arithmetic"];
    let target = ["--out", &other, "--target-accuracy", "0.99", "--format", "json"];
    let printed = run(&[&prox[..], &target].concat()).unwrap();
    let lines: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[3]["event"], &lines[3]["round"]), (&"target".into(), &Value::Null));
    assert_eq!((lines.len(), &lines[4]["event"]), (5, &"finished".into()));
    let both = folder.path().join("both.html");
    command(&["report", &out, &other, "--out", &text(&both)]).unwrap();
    let both = std::fs::read_to_string(both).unwrap();
    assert!(both.contains("first (FedAvg)") && both.contains("second (FedProx, µ = 0.1)"));
    assert!(both.contains("<code>train.proximal_mu</code>"));
}

#[test]
fn a_failed_run_is_reported_as_failed() {
    let folder = tempfile::tempdir().unwrap();
    let out = text(&folder.path().join("run"));
    let set = ["--set", "policy.minimum_cohort=100", "--set", "data.examples=100", "--trainer", "arithmetic"];
    let (code, message) = command(&[&["run", DEMO, "--out", &out][..], &set].concat()).unwrap_err();
    assert_eq!(code, 1);
    assert!(
        message.contains("the run failed after 0 of 12 rounds: 0 of at least 8 updates arrived"),
        "{message}"
    );
    let report = std::fs::read_to_string(Path::new(&out).join("report.html")).unwrap();
    assert!(report.contains("The run failed after 0 of 12 rounds"));
    assert!(report.contains("Abandoned attempts"));
}

#[test]
fn bad_usage_is_one_line_and_exit_code_two() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&folder.path().join(name));
    std::fs::create_dir(path("mine")).unwrap();
    std::fs::write(path("mine/thesis.txt"), "years of work").unwrap();
    std::fs::write(path("not-a-model"), "abc").unwrap();
    for (arguments, words) in [
        (vec!["run", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (vec!["run", DEMO, "--set", "train.learning_rat=1"], "did you mean `train.learning_rate`?"),
        (vec!["run", DEMO, "--transport", "pigeon"], "--transport"),
        (vec!["run", DEMO, "--out", &path("mine")], "is not a run's folder: nothing was changed"),
        (vec!["run", DEMO, "--replay", &path("gone")], "give a run's folder or its rounds.jsonl"),
        (vec!["run", DEMO, "--initial-model", &path("not-a-model")], "not a .safetensors file"),
        (vec!["run", DEMO, "--workers", "0"], "--workers"),
        (vec!["run", DEMO, "--target-accuracy", "97"], "a share above 0 and at most 1, such as 0.97"),
        (vec!["plan", DEMO, "--set", "population.clients=0"], "clients = 0"),
        (vec!["report", &path("mine"), "--out", &path("r.html")], "is this a run's folder?"),
        (vec!["sweep", DEMO], "a sweep varies something"),
    ] {
        let out = path("run");
        let mut arguments = arguments;
        if arguments[0] == "run" && !arguments.contains(&"--out") {
            arguments.extend(["--out", &out]);
        }
        let (code, message) = command(&arguments).unwrap_err();
        assert_eq!(code, 2, "{arguments:?}");
        assert!(message.contains(words), "{arguments:?}: {message}");
    }
    assert_eq!(std::fs::read_to_string(path("mine/thesis.txt")).unwrap(), "years of work");
}

#[test]
fn a_plan_tells_the_costs() {
    let printed = command(&["plan", DEMO, "--format", "json"]).unwrap();
    let plan: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(
        (&plan["parameters"], &plan["clients"], &plan["cohort"]),
        (&26_010.into(), &20.into(), &8.into())
    );
    assert_eq!(plan["bytes_down_per_round"].as_u64().unwrap(), 8 * 26_010 * 4);
    assert_eq!(plan["bytes_in_all"].as_u64().unwrap(), 12 * 2 * 8 * 26_010 * 4);
    assert!(plan["label_skew"].as_f64().unwrap() > 0.3);
    let printed = command(&[
        "plan",
        DEMO,
        "--set",
        "cohort.size=30",
        "--set",
        "cohort.minimum=8",
        "--set",
        "cohort.deadline_seconds=1",
        "--set",
        "train.local_epochs=1000",
    ])
    .unwrap();
    assert!(printed.contains("note: a round wants 30 clients, but there are 20"), "{printed}");
    assert!(printed.contains("20 of 20 clients take longer for a round than"), "{printed}");
    assert!(printed.contains("100 % of rounds ended by their deadline"), "{printed}");
}

#[test]
fn the_benchmarks_scenarios_are_the_same_work_and_evaluate_nothing_before_their_end() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jobs/bench");
    let read = |name: &str| Scenario::read(&folder.join(name), &Overrides::default()).unwrap();
    let (cnn, two, scale) = (read("mnist-1000.toml"), read("mnist-1000-2nn.toml"), read("scale.toml"));
    for scenario in [&cnn, &two, &scale] {
        let job = &scenario.job;
        assert_eq!((job.train.batch_size, job.train.local_epochs, job.cohort.size), (10, Some(1), 100));
        assert!((1..job.rounds).all(|round| !job.evaluates(round)) && job.evaluates(job.rounds));
    }
    assert_eq!((&cnn.job.train, &cnn.data, &cnn.partition), (&two.job.train, &two.data, &two.partition));
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 3, "every scenario is read here");
}

#[test]
fn a_download_that_cannot_be_had_is_a_failure_in_one_line() {
    // A mirror that has nothing.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten().take(1) {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 1024]);
            let _ =
                stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let (into, mirror) = (text(folder.path()), format!("http://{address}/"));
    let (code, message) =
        command(&["data", "fetch", "mnist", "--into", &into, "--mirror", &mirror]).unwrap_err();
    assert_eq!(code, 1);
    assert!(message.contains("the mirror answers 404") && !message.contains('\n'), "{message}");
}

#[test]
fn the_command_line_is_consistent() {
    use clap::CommandFactory as _;
    Cli::command().debug_assert();
}

#[test]
fn a_private_run_says_its_epsilon_and_leaves_a_ledger_that_an_auditor_finds_sound() {
    let folder = tempfile::tempdir().unwrap();
    let scenario = folder.path().join("private.toml");
    let text_of = "[job]\nname = 'private'\nseed = 1\nrounds = 2\n\
        [job.model]\narchitecture = 'logistic'\ninputs = [784]\nclasses = 10\n\
        [job.train]\nalgorithm = 'fedavg'\nlearning_rate = 0.5\nlocal_steps = 3\nsampling_rate = 0.2\n\
        [job.cohort]\nsize = 3\n\
        [job.privacy]\nunit = 'example'\nmechanism = 'dp-sgd'\nnoise_multiplier = 2.0\nclip_norm = 1.0\ndelta = 1e-5\n\
        max_epsilon = 3.0\n\
        [population]\nclients = 3\n\
        [data]\nsource = 'synthetic'\nexamples = 90\ntest_examples = 30\ndeclared_examples = 30\npublic_test = true\n";
    std::fs::write(&scenario, text_of).unwrap();
    let (scenario, out) = (text(&scenario), text(&folder.path().join("out")));
    let run = |more: &[&str]| {
        let printed = command(&[&["run", &scenario, "--format", "json", "--out", &out], more].concat())?;
        Ok(printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>())
    };
    let lines: Vec<Value> = run(&[]).unwrap();
    let epsilon = |line: &Value| line["epsilon"].as_f64().unwrap();
    assert!(epsilon(&lines[0]) > 0.1 && epsilon(&lines[1]) > epsilon(&lines[0]));
    assert_eq!(epsilon(&lines[2]), epsilon(&lines[1]), "{lines:?}");
    assert!(lines[1]["accuracy"].is_number(), "the test images are public: {lines:?}");
    assert_eq!(lines[2].get("not_private"), None);
    let ledger = std::fs::read(Path::new(&out).join("ledger.jsonl")).unwrap();
    let verified = tributary_common::ledger::verify::verify(&ledger, &Default::default());
    assert!(verified.is_sound(), "{:?}", verified.findings().collect::<Vec<_>>());
    let report = std::fs::read_to_string(Path::new(&out).join("report.html")).unwrap();
    assert!(report.contains("one example") && report.contains("noise multiplier 2"));

    // Two runs are never the same: their noise is secret.
    let again: Vec<Value> = run(&[]).unwrap();
    assert_ne!(again[2]["model_digest"], lines[2]["model_digest"]);
    // The stand-in adds no noise, and says so.
    let stand_in: Vec<Value> = run(&["--trainer", "arithmetic"]).unwrap();
    assert_eq!((&stand_in[2]["epsilon"], &stand_in[2]["not_private"]), (&Value::Null, &Value::Bool(true)));
    assert!(!Path::new(&out).join("ledger.jsonl").exists());

    // Correction 2: without a public split, nothing is told of anybody's examples.
    let silent: Vec<Value> = run(&["--set", "data.public_test=false"]).unwrap();
    assert!(silent[1]["accuracy"].is_null() && silent[1]["loss"].is_null(), "{silent:?}");

    let refused = |more: &[&str], words: &str| {
        let (code, message): (u8, String) = run(more).unwrap_err();
        assert!(code == 2 && message.contains(words), "{message}");
    };
    refused(&["--set", "privacy.max_epsilon=0.5"], "more than max_epsilon = 0.5");
    refused(&["--set", "population.samples_per_client=10"], "twice");
    let undeclared = std::fs::read_to_string(&scenario).unwrap().replace("declared_examples = 30\n", "");
    std::fs::write(&scenario, undeclared).unwrap();
    refused(&[], "declared_examples");
}
