//! Neighbours from the raw file on: one row more, less or other changes no other row's features, label, half or group,
//! unless a setting is fitted to the data.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// A table in which everything is a public constant; its first feature, `tag`, tells rows apart.
pub(super) const PRIVATE: &str = r#"
source = "csv"
path = "table.csv"
label = "y"
classes = 3
group = "patient"
drop = ["id"]
missing = "?"
missing_rows = "drop"
missing_value = { age = 54 }
standardise = { age = [54, 9] }
one_hot = { cp = ["1", "2", "3"] }
split = { test_fraction = 0.3 }
"#;

/// The same without groups: the split goes by the row's own id.
const UNGROUPED: &str = r#"
source = "csv"
path = "table.csv"
label = "y"
classes = 3
drop = ["patient"]
missing = "?"
missing_rows = "drop"
missing_value = { age = 54 }
standardise = { age = [54, 9] }
one_hot = { cp = ["1", "2", "3"] }
split = { test_fraction = 0.3, id = "id" }
"#;

/// What preprocessing makes of one row.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    held_out: bool,
    /// The features' bits.
    features: Vec<u32>,
    label: i64,
    /// The tags of the rows of its group, its own among them.
    group: BTreeSet<u32>,
}

/// Every row by its tag.
fn seen(dataset: &Dataset) -> BTreeMap<u32, Seen> {
    let width: usize = dataset.example_shape.iter().product();
    let mut rows = BTreeMap::new();
    for (held_out, split) in [(false, &dataset.train), (true, &dataset.test)] {
        let tags: Vec<u32> = split.features.chunks(width).map(|row| row[0] as u32).collect();
        for (at, row) in split.features.chunks(width).enumerate() {
            let same = |other: &usize| match split.groups.get(at) {
                Some(group) => split.groups[*other] == *group,
                None => *other == at,
            };
            let group = (0..tags.len()).filter(same).map(|other| tags[other]).collect();
            let features = row.iter().map(|value| value.to_bits()).collect();
            let before = rows.insert(tags[at], Seen { held_out, features, label: split.labels[at], group });
            assert_eq!(before, None, "tag {}", tags[at]);
        }
    }
    rows
}

/// Rows 1 to `count` of four columns of data: `tag,id,patient,age,cp,y`, three rows per patient.
fn rows(count: usize) -> Vec<String> {
    let row = |k: usize| {
        let age = if k.is_multiple_of(11) { "?".to_owned() } else { format!("{}", 30 + k * 7 % 50) };
        format!("{k},row-{k},P{},{age},{},{}", k % (count / 3), k % 3 + 1, k % 3)
    };
    (1..=count).map(row).collect()
}

fn table(rows: &[String]) -> String {
    format!("tag,id,patient,age,cp,y\n{}\n", rows.join("\n"))
}

fn read(config: &str, rows: &[String]) -> Result<Dataset, DataError> {
    let config: DataConfig = toml::from_str(config).unwrap();
    config.validate()?;
    csv::from_bytes(&config, table(rows).as_bytes())
}

/// Asserts that rows but `tag` are the same bit for bit in both, and in the same groups but for it.
fn same_but_for(tag: u32, a: &Dataset, b: &Dataset, what: &str) {
    let others = |dataset: &Dataset| {
        let mut rows = seen(dataset);
        rows.remove(&tag);
        rows.values_mut().for_each(|row| {
            row.group.remove(&tag);
        });
        rows
    };
    let (a, b) = (others(a), others(b));
    assert!(!a.is_empty() && a == b, "{what}");
}

const TAG: u32 = 9999;

/// A row of a kind that is rare, or wrong: everything about it but its tag.
const STRANGERS: [(&str, &str); 8] = [
    ("like others", "row-x,P3,40,1,0"),
    ("a new patient", "row-x,P-new,40,1,0"),
    ("another row's id", "row-5,P3,40,1,0"),
    ("a value missing, with a constant", "row-x,P3,?,1,0"),
    ("a value missing, without one", "row-x,P3,40,?,0"),
    ("a category never seen", "row-x,P3,40,77,0"),
    ("huge values", "row-x,P3,-3e38,1,0"),
    ("a class that nobody else has", "row-x,P3,40,1,2"),
];

// correction 3
#[test]
fn a_row_more_or_less_changes_no_other_row() {
    for config in [PRIVATE, UNGROUPED] {
        let rows = rows(90);
        let base = read(config, &rows).unwrap();
        assert_eq!(seen(&base).len(), 90);
        assert!(base.train.len() > 40 && base.test.len() > 10, "both halves are tried");
        for (what, stranger) in STRANGERS {
            for place in [0, 45, 90] {
                let mut more = rows.clone();
                more.insert(place, format!("{TAG},{stranger}"));
                same_but_for(TAG, &base, &read(config, &more).unwrap(), what);
            }
        }
        for gone in [0, 31, 89] {
            let mut less = rows.clone();
            less.remove(gone);
            same_but_for(gone as u32 + 1, &base, &read(config, &less).unwrap(), "a row less");
        }
    }
}

// correction 3, correction 16
#[test]
fn a_patient_more_or_less_changes_no_other_patients_row() {
    let rows = rows(90);
    let base = read(PRIVATE, &rows).unwrap();
    let of_patient = |row: &String| row.contains(",P7,");
    let without: Vec<String> = rows.iter().filter(|row| !of_patient(row)).cloned().collect();
    assert_eq!(without.len(), 87);
    let left = seen(&read(PRIVATE, &without).unwrap());
    let mut all = seen(&base);
    let patient: BTreeSet<u32> = [7, 37, 67].into();
    assert!(patient.iter().all(|tag| all.get(tag).is_some_and(|row| row.group == patient)));
    all.retain(|tag, _| !patient.contains(tag));
    assert_eq!(all, left);
}

/// A value that is no number stops the node at its start, where only the operator sees it; it never shows in a job.
// correction 3
#[test]
fn a_row_that_is_no_data_is_refused_before_any_job() {
    let with = |stranger: &str, config: &str| {
        let mut rows = rows(90);
        rows.push(format!("{TAG},{stranger}"));
        read(config, &rows)
    };
    for (stranger, words) in [
        ("row-x,P3,NaN,1,0", "not a finite"),
        ("row-x,P3,inf,1,0", "not a finite"),
        ("row-x,P3,1e39,1,0", "not a finite"),
        ("row-x,P3,40,1,7", "7 is not a class"),
        ("row-x,?,40,1,0", ""),
    ] {
        match with(stranger, PRIVATE) {
            Err(error) => assert!(error.to_string().contains(words) && error.to_string().contains("line 92")),
            // `missing_rows = "drop"` leaves out the row of nobody.
            Ok(dataset) => same_but_for(TAG, &dataset, &read(PRIVATE, &rows(90)).unwrap(), stranger),
        }
    }
    // Where the file writes NaN for a missing value, it is one.
    let config =
        PRIVATE.replace("missing = \"?\"", "missing = \"NaN\"").replace("age = 54", "age = 54, cp = 1");
    let cleaned: Vec<String> = rows(90).into_iter().map(|row| row.replace('?', "")).collect();
    let base = read(&config, &cleaned).unwrap();
    let more = [cleaned, vec![format!("{TAG},row-x,P3,NaN,NaN,0")]].concat();
    same_but_for(TAG, &base, &read(&config, &more).unwrap(), "NaN for a missing value");
}

/// What [`DataConfig::fitted`] lists does change other rows: the test above would see it.
// correction 3
#[test]
fn every_fitted_setting_changes_other_rows() {
    let rows = rows(90);
    let constants = UNGROUPED.replace("split = { test_fraction = 0.3, id = \"id\" }\n", "");
    let constants = constants.replace("[\"patient\"]", "[\"patient\", \"id\"]");
    let changes = |config: &str, stranger: &str| {
        let parsed: DataConfig = toml::from_str(config).unwrap();
        let mut more = rows.clone();
        more.insert(0, format!("{TAG},{stranger}"));
        let folder = TempDir::new().unwrap();
        let load = |rows: &[String]| {
            write(&folder, "table.csv", table(rows).as_bytes());
            load(&parsed, folder.path()).unwrap()
        };
        write(&folder, "split.json", br#"{"train": [1, 2, 3], "test": [4, 5]}"#);
        let (base, more) = (load(&rows), load(&more));
        let mut others = seen(&more);
        others.remove(&TAG);
        (parsed.fitted().len(), seen(&base) != others || base.classes != more.classes)
    };
    assert_eq!(changes(&constants, "row-x,P3,40,1,0"), (0, false));
    // Standardised, not even the tag stays: all features are compared as they are.
    let standardised = constants.replace("standardise = { age = [54, 9] }", "standardise = true");
    let standardised: DataConfig = toml::from_str(&standardised).unwrap();
    let features = |rows: &[String]| {
        csv::from_bytes(&standardised, table(rows).as_bytes()).unwrap().train.features.clone()
    };
    let mut more = rows.clone();
    more.push(format!("{TAG},row-x,P3,400,1,0"));
    assert_eq!(standardised.fitted().len(), 1);
    assert_ne!(features(&rows), features(&more)[..features(&rows).len()]);
    let one_hot = constants.replace("{ cp = [\"1\", \"2\", \"3\"] }", "[\"cp\"]");
    assert_eq!(changes(&one_hot, "row-x,P3,40,0,0"), (1, true));
    let split = format!("{constants}\nsplit = \"split.json\"");
    assert_eq!(changes(&split, "row-x,P3,40,1,0"), (1, true));
    let classes = constants.replace("classes = 3\n", "");
    assert_eq!(changes(&classes, "row-x,P3,40,1,5"), (1, true));
}

// correction 3
#[test]
fn an_image_more_changes_no_other_image() {
    let keys = "mean = 0.3\nstandard_deviation = 0.2\nclasses = 3";
    let idx = |pixels: &[u8], labels: &[u8]| {
        let folder = idx_folder(
            &super::idx(0x803, &[labels.len() as u32, 2, 2], pixels),
            &super::idx(0x801, &[labels.len() as u32], labels),
        );
        load(&config(&format!("{IDX}\n{keys}")), folder.path()).unwrap()
    };
    let pixels: Vec<u8> = (0..12).map(|k| k * 20).collect();
    let (base, more) = (idx(&pixels, &[0, 2, 1]), idx(&[&pixels[..], &[255; 4]].concat(), &[0, 2, 1, 2]));
    assert_eq!((&base.train.features[..], base.classes), (&more.train.features[..12], more.classes));

    let npz = |values: &[f32], people: &[u8]| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let count = people.len();
        let archive = npz(&[
            ("train_images.npy", npy("<f4", &format!("({count}, 1)"), &bytes)),
            ("train_labels.npy", labels_of(count as u8)),
            ("train_patient.npy", npy("|u1", &format!("({count},)"), people)),
        ]);
        read_npz(&format!("{NPZ}\ngroup = \"patient\"\n{keys}"), &archive).unwrap()
    };
    let (base, more) = (npz(&[0.1, 0.2, 0.3], &[4, 9, 4]), npz(&[0.1, 0.2, 0.3, 3e37], &[4, 9, 4, 1]));
    assert_eq!((&base.train.features[..], base.classes), (&more.train.features[..3], more.classes));
    assert_eq!((&base.train.groups[..], more.train.groups[3]), (&more.train.groups[..3], 2));
}
