//! What malformed input prints: one line that names the file and the record, and a documented exit code.

use std::fs;
use std::path::Path;

use tributary_tests::run;

/// A scenario whose `[data]` table is `data`, for examples of shape `inputs`.
fn scenario(data: &str, inputs: &str) -> String {
    format!(
        "[job]\nname = \"bad\"\nseed = 1\nrounds = 1\n\
         [job.model]\narchitecture = \"logistic\"\ninputs = {inputs}\nclasses = 2\n\
         [job.train]\nalgorithm = \"fedavg\"\nlearning_rate = 0.1\nlocal_epochs = 1\nbatch_size = 1\n\
         [job.cohort]\nsize = 1\n[population]\nclients = 1\n[partition]\nscheme = \"iid\"\n[data]\n{data}\n"
    )
}

/// An IDX file: the magic number's last byte gives the dimensions.
fn idx(sizes: &[u32], bytes: &[u8]) -> Vec<u8> {
    let mut file = vec![0, 0, 8, u8::try_from(sizes.len()).unwrap()];
    sizes.iter().for_each(|size| file.extend(size.to_be_bytes()));
    file.extend(bytes);
    file
}

/// Writes two 2×2 images and their labels, damaged by `damage`.
fn images(folder: &Path, damage: impl Fn(&mut Vec<u8>, &mut Vec<u8>)) {
    let (mut images, mut labels) = (idx(&[2, 2, 2], &[9; 8]), idx(&[2], &[0, 1]));
    damage(&mut images, &mut labels);
    fs::write(folder.join("train-images-idx3-ubyte"), images).unwrap();
    fs::write(folder.join("train-labels-idx1-ubyte"), labels).unwrap();
}

#[test]
fn every_malformed_input_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let (csv, pixels) = ("source = \"csv\"\npath = \"table.csv\"\nheader = true\nlabel = \"y\"", "[1, 2, 2]");
    let idx_data = "source = \"idx\"\npath = \".\"\nclasses = 2";
    let table = |text: &str| fs::write(path.join("table.csv"), text).unwrap();
    let mut printed = String::new();
    let mut check = |case: &str, scenario: String, code: i32, words: &[&str]| {
        let file = path.join("scenario.toml");
        fs::write(&file, scenario).unwrap();
        let out = path.join("out");
        let [file, data, out_arg] = [&file, path, &out].map(|path| path.to_str().unwrap());
        let output = run("tributary-sim", &["run", file, "--data", data, "--out", out_arg], code);
        let line = String::from_utf8_lossy(&output.stderr).replace(&path.display().to_string(), "…");
        assert_eq!(line.trim().lines().count(), 1, "{case}: {line}");
        assert!(words.iter().all(|word| line.contains(word)), "{case}: {line}");
        assert!(!out.exists(), "{case}: nothing is left behind");
        printed.push_str(&format!("| {case} | {} |\n", line.trim()));
    };

    images(path, |images, _| images.truncate(12));
    check("IDX, truncated", scenario(idx_data, pixels), 2, &["train-images", "truncated"]);
    images(path, |images, _| images.push(1));
    check("IDX, oversized", scenario(idx_data, pixels), 2, &["train-images", "too long"]);
    images(path, |images, _| images[4..8].fill(255));
    check("IDX, absurd header", scenario(idx_data, pixels), 2, &["train-images"]);
    images(path, |_, labels| labels[9] = 7);
    check(
        "IDX, mis-labelled",
        scenario(idx_data, pixels),
        2,
        &["train-labels", "label 1", "7 is not a class"],
    );
    images(path, |_, labels| *labels = idx(&[1], &[0]));
    check("IDX, a label missing", scenario(idx_data, pixels), 2, &["train-labels"]);
    images(path, |images, _| *images = b"hello".to_vec());
    check("IDX, not IDX", scenario(idx_data, pixels), 2, &["train-images"]);
    fs::write(path.join("scans.npz"), b"PK\x03\x04 not really").unwrap();
    check(
        "NPZ, not an archive",
        scenario("source = \"npz\"\npath = \"scans.npz\"", pixels),
        2,
        &["scans.npz"],
    );
    table("x,y\n1,0\nold,1\n");
    check("CSV, text in a number", scenario(csv, "[1]"), 2, &["table.csv", "line 3", "\"old\""]);
    table("x,y\n1,0\nNaN,1\n");
    check("CSV, NaN", scenario(csv, "[1]"), 2, &["table.csv", "line 3", "NaN"]);
    table("x,y\n1,0\n2\n");
    check("CSV, ragged", scenario(csv, "[1]"), 2, &["table.csv", "line 3"]);
    table("x,y\n1,0\n2,5\n");
    check("CSV, mis-labelled", scenario(csv, "[1]"), 2, &["table.csv"]);
    table("");
    check("CSV, empty", scenario(csv, "[1]"), 2, &["table.csv"]);
    table("x,y\n1,0\n2,1\n");
    check("data of another shape", scenario(csv, "[3]"), 2, &["inputs"]);
    check("no such file", scenario("source = \"npz\"\npath = \"gone.npz\"", "[1]"), 2, &["gone.npz"]);
    check(
        "misspelt key",
        scenario(csv, "[1]").replace("learning_rate", "learning_rte"),
        2,
        &["did you mean"],
    );
    check("not TOML", scenario(csv, "[1]").replace("seed = 1", "seed = = 1"), 2, &["line 3"]);
    check(
        "secure aggregation asked for",
        scenario(csv, "[1]") + "[job.secure_aggregation]\nenabled = true\n",
        2,
        &["[secure_aggregation]"],
    );
    println!("{printed}");
}
