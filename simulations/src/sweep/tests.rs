//! Sweeps from their command to what they leave: grids, resuming, refusals, failures, seeds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cli::tests::{DEMO, command};

/// A sweep over the demo that runs in a moment: its JSON lines, or exit code and message.
fn sweep(out: &Path, more: &[&str]) -> Result<Vec<Value>, (u8, String)> {
    let out = out.to_str().unwrap();
    let small = ["rounds=2", "data.examples=120", "data.test_examples=40", "population.clients=10"];
    let set: Vec<&str> = small.into_iter().flat_map(|assignment| ["--set", assignment]).collect();
    let fixed = ["sweep", DEMO, "--out", out, "--format", "json", "--trainer", "arithmetic"];
    let printed = command(&[&fixed[..], &set[..], more].concat())?;
    Ok(printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

fn with_status<'a>(lines: &'a [Value], status: &str) -> Vec<&'a str> {
    let points = lines.iter().filter(|line| line["event"] == "point" && line["status"] == status);
    let mut names: Vec<&str> = points.map(|line| line["point"].as_str().unwrap()).collect();
    names.sort_unstable();
    names
}

fn digests(lines: &[Value]) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let points = lines.iter().filter(|line| line["event"] == "point");
    points.map(|line| (text(&line["point"]), text(&line["model_digest"]))).collect()
}

const RATES: [&str; 4] = ["--vary", "train.learning_rate=0.05,0.1,0.5", "--seeds", "3,4"];

#[test]
fn a_grid_leaves_a_run_per_point_a_table_over_seeds_and_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sweep");
    let lines = sweep(&out, &RATES).unwrap();
    assert_eq!(with_status(&lines, "finished").len(), 6);
    let last = lines.last().unwrap();
    assert_eq!(
        (&last["event"], &last["points"], &last["failed"]),
        (&"finished".into(), &6.into(), &0.into())
    );
    let first = &lines.iter().find(|line| line["point"] == "1-learning_rate=0.05-seed=3").unwrap();
    assert_eq!((&first["settings"]["train.learning_rate"], &first["seed"]), (&0.05.into(), &3.into()));
    let job = fs::read_to_string(out.join("6-learning_rate=0.5-seed=4/job.toml")).unwrap();
    assert!(job.contains("learning_rate = 0.5") && job.contains("seed = 4"), "{job}");

    let mut table = csv::Reader::from_path(out.join("sweep.csv")).unwrap();
    let rows: Vec<BTreeMap<String, String>> = table.deserialize().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 3);
    let losses: Vec<f64> = lines
        .iter()
        .filter(|line| line["settings"]["train.learning_rate"] == 0.1)
        .map(|line| line["loss"].as_f64().unwrap())
        .collect();
    let (mean, deviation) = ((losses[0] + losses[1]) / 2.0, (losses[0] - losses[1]).abs() / 2f64.sqrt());
    let number = |key: &str| rows[1][key].parse::<f64>().unwrap();
    assert!((number("loss") - mean).abs() < 1e-12 && (number("loss_sd") - deviation).abs() < 1e-12);
    assert_eq!((rows[1]["train.learning_rate"].as_str(), rows[1]["seeds"].as_str()), ("0.1", "2"));

    let report = fs::read_to_string(out.join("sweep.html")).unwrap();
    assert_eq!(report.matches("<svg").count(), 3, "accuracy, loss, and accuracy against the rate");
    for part in ["learning_rate = 0.05", "Final accuracy against", "seeds: 3, 4", "±"] {
        assert!(report.contains(part), "{part}");
    }
    for outside in ["src=", "<link", "<script", "url("] {
        assert!(!report.contains(outside), "{outside}: the report is self-contained");
    }
}

#[test]
fn the_same_command_runs_what_is_missing_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sweep");
    let first = sweep(&out, &RATES).unwrap();
    let name = |at: usize| with_status(&first, "finished")[at].to_owned();
    // One point is gone, one is cut off, one was being written when the process was killed.
    fs::remove_dir_all(out.join(name(0))).unwrap();
    fs::remove_file(out.join(name(2)).join("model.safetensors")).unwrap();
    fs::rename(out.join(name(4)), out.join(format!(".{}.new-1", name(4)))).unwrap();
    // One has too few rounds, as an interrupted run of its own would.
    let metrics = out.join(name(5)).join("metrics.csv");
    let text = fs::read_to_string(&metrics).unwrap();
    fs::write(&metrics, text.lines().take(2).map(|line| format!("{line}\n")).collect::<String>()).unwrap();

    let again = sweep(&out, &RATES).unwrap();
    assert_eq!(with_status(&again, "skipped"), [name(1), name(3)]);
    assert_eq!(with_status(&again, "finished"), [name(0), name(2), name(4), name(5)]);
    assert_eq!(digests(&again), digests(&first));
    let hidden = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with('.');
    let left: Vec<PathBuf> =
        fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path()).filter(hidden).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(with_status(&sweep(&out, &RATES).unwrap(), "skipped").len(), 6);
}

#[test]
fn another_sweeps_folder_and_anybody_elses_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sweep");
    let vary = ["--vary", "train.momentum=0.0,0.5"];
    let first = sweep(&out, &vary).unwrap();
    for (other, words) in [
        (vec!["--vary", "train.momentum=0.0,0.9"], "holds another sweep (demo over train.momentum=0.0,0.5)"),
        (vec!["--vary", "train.momentum=0.0,0.5", "--set", "train.batch_size=5"], "with other settings"),
        (vec!["--vary", "train.momentum=0.0,0.5", "--seeds", "1,2"], "holds another sweep"),
    ] {
        let (code, message) = sweep(&out, &other).unwrap_err();
        assert_eq!(code, 2);
        assert!(message.contains(words) && !message.contains('\n'), "{message}");
    }
    assert_eq!(digests(&sweep(&out, &vary).unwrap()), digests(&first));
    fs::write(out.join("sweep.json"), "{").unwrap();
    assert!(sweep(&out, &vary).unwrap_err().1.contains("sweep.json: "));

    let mine = folder.path().join("mine");
    fs::create_dir(&mine).unwrap();
    fs::write(mine.join("thesis.txt"), "years of work").unwrap();
    assert!(sweep(&mine, &vary).unwrap_err().1.contains("is not a sweep's folder: nothing was changed"));
    assert_eq!(fs::read_dir(&mine).unwrap().count(), 1);
}

#[test]
fn a_point_that_fails_does_not_lose_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sweep");
    // The second fails in its rounds, the third before them.
    let vary = ["--vary", "policy.minimum_cohort=1,100", "--vary", "population.clients=10,200"];
    let (code, message) = sweep(&out, &vary).unwrap_err();
    assert_eq!(code, 1);
    assert!(message.starts_with("3 of 4 points failed: ") && !message.contains('\n'), "{message}");
    assert!(message.contains("200 clients need") && message.contains("declined: "), "{message}");
    let table = fs::read_to_string(out.join("sweep.csv")).unwrap();
    let filled = |row: usize| !table.lines().nth(row).unwrap().ends_with(",,,,,,,");
    assert_eq!([filled(1), filled(2), filled(3), filled(4)], [true, false, false, false], "{table}");
    let (_, again) = sweep(&out, &vary).unwrap_err();
    assert_eq!(again, message);
}

#[test]
fn what_runs_beside_a_point_decides_none_of_its_bits() {
    let folder = tempfile::tempdir().unwrap();
    let vary = ["--vary", "partition.alpha=0.1,1.0,10.0", "--vary", "data.seed=1,2"];
    let with = |name: &str, more: &[&str]| {
        digests(&sweep(&folder.path().join(name), &[&vary[..], more].concat()).unwrap())
    };
    let one = with("one", &["--parallel", "1", "--workers", "3"]);
    let many = with("many", &["--parallel", "4", "--workers", "4"]);
    assert_eq!(one, many);
    let different: std::collections::BTreeSet<_> = one.values().collect();
    assert_eq!((one.len(), different.len()), (6, 6));
}

#[test]
fn bad_usage_is_one_line_before_anything_runs() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sweep");
    for (more, words) in [
        (vec!["--vary", "train.learning_rat=0.1,0.2"], "did you mean `train.learning_rate`?"),
        (vec!["--vary", "trian.momentum=0.1,0.2"], "did you mean `train`?"),
        (vec!["--vary", "train.learning_rate=0.1,"], "value 2 is empty"),
        (vec!["--vary", "train.learning_rate=0.1,-1"], "point 2-learning_rate=-1: "),
        (vec!["--seeds", "1,2", "--seed", "3"], "cannot be used with"),
        (vec!["--seeds", "1,x"], "--seeds"),
    ] {
        let (code, message) = sweep(&out, &more).unwrap_err();
        assert_eq!(code, 2, "{more:?}");
        assert!(message.contains(words), "{more:?}: {message}");
    }
    assert!(!out.exists());
}
