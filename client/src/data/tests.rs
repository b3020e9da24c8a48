//! What users of the readers rely on: good files load to the right numbers, bad ones end in one clear line.

use std::io::{Cursor, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::*;

mod neighbours;

fn config(text: &str) -> DataConfig {
    toml::from_str(text).unwrap()
}

/// Asserts that loading failed with one line that holds every part of `parts`, and shows the line.
fn refused(what: &str, result: Result<Dataset, DataError>, parts: &[&str]) {
    let line = result.expect_err(what).to_string();
    eprintln!("{what} | {line}");
    assert!(!line.contains('\n'), "{what}: {line}");
    assert!(line.len() < 400, "{what}: {line}");
    for part in parts {
        assert!(line.contains(part), "{what}: {line:?} does not say {part:?}");
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn write(folder: &TempDir, name: &str, bytes: &[u8]) {
    std::fs::write(folder.path().join(name), bytes).unwrap();
}

/// The folder with the shared data, or `None` with a word on standard error.
fn shared_data() -> Option<PathBuf> {
    let folder = std::env::var_os("TRIBUTARY_DATA").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: TRIBUTARY_DATA is not set (a folder with mnist/, heart-disease/ and pneumonia/)");
    }
    folder
}

// ---------------------------------------------------------------------------------------------- the table

#[test]
fn a_table_reads_back_as_it_was_written() {
    let tables = [
        "source = \"idx\"\npath = \"mnist\"\ndeclared_examples = 600\nmean = [0.1307]\nstandard_deviation = 0.3",
        "source = \"synthetic\"\nexamples = 10\ntest_examples = 0\nseed = 3\nnoise = 0.2",
        "source = \"npz\"\npath = \"a.npz\"\nheld_out = \"val\"\nclasses = 2",
        HEART,
        "source = \"csv\"\npath = \"a.csv\"\nlabel = \"y\"\nlabel_rule = [\"no\", \"yes\"]\nheader = true\n\
         delimiter = \";\"\none_hot = [\"a\"]\nsplit = { test_fraction = 0.25, key = \"k\" }\n\
         standardise = { b = [1.0, 2.0] }\nsites = { column = \"hospital\" }",
        "source = \"csv\"\npath = \"a.csv\"\nlabel = \"y\"\npublic_test = true\ngroup = \"patient\"\n\
         declared_examples = { north = 200, south = 40 }\nmissing_value = { b = 3, c = \"no\", d = 2.5 }\n\
         sites = { north = \"n.csv\", south = \"s.csv\" }\nsplit = { test_fraction = 0.25 }",
        "source = \"csv\"\npath = \"a.csv\"\nlabel = \"y\"\nsplit = { test_fraction = 0.25, id = \"row\" }",
    ];
    for table in tables {
        let read = config(table);
        read.validate().unwrap();
        assert_eq!(config(&toml::to_string(&read).unwrap()), read);
    }
}

#[test]
fn the_schema_knows_every_key() {
    let unknown = toml::from_str::<DataConfig>("source = \"idx\"\n\"\" = 1").unwrap_err().to_string();
    let listed = unknown.split("expected one of").nth(1).unwrap().split('`').skip(1).step_by(2);
    let mut expected: Vec<&str> = listed.collect();
    let mut known: Vec<&str> =
        SCHEMA.keys.iter().chain(SCHEMA.tables.iter().map(|(key, _)| key)).copied().collect();
    expected.sort_unstable();
    known.sort_unstable();
    assert_eq!(known, expected);
}

#[test]
fn wrong_tables_are_refused_by_key() {
    let at = |text: &str| load(&config(text), Path::new("."));
    refused(
        "source images",
        at("source = \"images\"\npath = \"x\""),
        &["[data] source", "not available yet"],
    );
    refused(
        "group",
        at("source = \"idx\"\npath = \"x\"\ngroup = \"patient\""),
        &["[data] group", "\"idx\" does not use it"],
    );
    refused("group of labels", at("source = \"npz\"\npath = \"x\"\ngroup = \"labels\""), &["[data] group"]);
    refused("no path", at("source = \"idx\""), &["[data] path", "missing"]);
    refused(
        "foreign key",
        at("source = \"idx\"\npath = \"x\"\nlabel = \"y\""),
        &["[data] label", "\"idx\" does not use it"],
    );
    refused("site of idx", at("source = \"idx\"\npath = \"x\"\nsite = \"a\""), &["[data] site"]);
    refused("csv without label", at("source = \"csv\"\npath = \"x\""), &["[data] label", "missing"]);
    refused("zero deviation", at("source = \"idx\"\npath = \"x\"\nstandard_deviation = 0.0"), &["above 0"]);
    refused("zero classes", at("source = \"idx\"\npath = \"x\"\nclasses = 0"), &["[data] classes"]);
    refused(
        "no declared example",
        at("source = \"idx\"\npath = \"x\"\ndeclared_examples = 0"),
        &["at least 1"],
    );
    refused("noise of 2", at("source = \"synthetic\"\nnoise = 2.0"), &["[data] noise", "0 to 1"]);
    refused("path of synthetic", at("source = \"synthetic\"\npath = \"x\""), &["[data] path"]);
    let csv = "source = \"csv\"\npath = \"x\"\nlabel = \"y\"\n";
    let bad = [
        ("header = false", "[data] columns"),
        ("header = true\ncolumns = [\"y\"]", "[data] columns"),
        ("delimiter = \"é\"", "[data] delimiter"),
        ("label_rule = []", "[data] label_rule"),
        ("label_rule = [\"a\", \"b\"]\nclasses = 3", "label_rule makes 2"),
        ("site = \"a\"", "[data] site"),
        ("site = \"a\"\nsites = { b = \"b.csv\" }", "no site \"a\""),
        ("site = \"a\"\nsites = { a = \"a.csv\" }\none_hot = [\"c\"]", "declare them"),
        ("one_hot = { c = [] }", "no categories"),
        ("standardise = { c = [0.0, 0.0] }", "above 0"),
        ("split = { test_fraction = 1.0 }", "test_fraction"),
        ("split = { test_fraction = 0.2, id = \"a\" }\ngroup = \"b\"", "remove id"),
        ("declared_examples = { a = 1 }", "no sites"),
        ("sites = { a = \"a.csv\" }\ndeclared_examples = { a = 0 }", "site \"a\": must be at least 1"),
        ("sites = { a = \"a.csv\" }\ndeclared_examples = { b = 1 }", "no site \"b\""),
        ("sites = { a = \"a\", b = \"b\" }\ndeclared_examples = { b = 1 }", "site \"a\" is missing"),
        ("site = \"a\"\nsites = { column = \"h\" }\ndeclared_examples = { b = 1 }", "site \"a\" is missing"),
    ];
    for (lines, part) in bad {
        refused(lines, at(&format!("{csv}{lines}")), &[part]);
    }
    let unknown = toml::from_str::<DataConfig>("source = \"idx\"\npth = \"mnist\"").unwrap_err().to_string();
    assert!(unknown.contains("unknown field `pth`") && unknown.contains("`path`"), "{unknown}");
    let rule =
        toml::from_str::<DataConfig>("source = \"csv\"\nlabel_rule = { positive = \"many\" }").unwrap_err();
    assert!(rule.to_string().contains("positive = \"nonzero\""), "{rule}");
}

// --------------------------------------------------------------------------------------------------- IDX

fn idx(magic: u32, sizes: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
    bytes.extend(data);
    bytes
}

/// Three 2 × 2 images with pixels 0, 20, 40, … and labels 0, 2, 1.
fn good_images() -> Vec<u8> {
    idx(0x803, &[3, 2, 2], &(0..12).map(|k| k * 20).collect::<Vec<u8>>())
}

fn good_labels() -> Vec<u8> {
    idx(0x801, &[3], &[0, 2, 1])
}

fn idx_folder(images: &[u8], labels: &[u8]) -> TempDir {
    let folder = TempDir::new().unwrap();
    write(&folder, "train-images-idx3-ubyte", images);
    write(&folder, "train-labels-idx1-ubyte", labels);
    folder
}

const IDX: &str = "source = \"idx\"\npath = \".\"";

#[test]
fn idx_loads_plain_and_gzip_alike() {
    let plain = idx_folder(&good_images(), &good_labels());
    let zipped = TempDir::new().unwrap();
    for (name, bytes) in [("images-idx3-ubyte.gz", good_images()), ("labels-idx1-ubyte.gz", good_labels())] {
        write(&zipped, &format!("train-{name}"), &gzip(&bytes));
        write(&zipped, &format!("t10k-{name}"), &gzip(&bytes));
    }
    let a = load(&config(IDX), plain.path()).unwrap();
    let b = load(&config(IDX), zipped.path()).unwrap();
    assert_eq!((a.example_shape.as_slice(), a.classes), ([1, 2, 2].as_slice(), 3));
    assert_eq!(a.train.labels, [0, 2, 1]);
    assert_eq!(a.train.features.get(..3).unwrap(), [0.0, (20.0 / 255.0) as f32, (40.0 / 255.0) as f32]);
    assert!(a.test.is_empty());
    assert_eq!(a.train, b.train);
    assert_eq!(b.test, b.train);
    assert_ne!(a.digest(), b.digest());
    assert_eq!(a.digest(), load(&config(IDX), plain.path()).unwrap().digest());
    assert!(a.sites.is_none());
}

#[test]
fn public_constants_normalise_pixels() {
    let folder = idx_folder(&good_images(), &good_labels());
    let table = format!("{IDX}\nmean = 0.5\nstandard_deviation = [0.25]");
    let dataset = load(&config(&table), folder.path()).unwrap();
    assert_eq!(dataset.train.features.get(..2).unwrap(), [-2.0, ((20.0 / 255.0 - 0.5) / 0.25) as f32]);
    let table = format!("{IDX}\nmean = [0.5, 0.5]");
    refused("two means, one channel", load(&config(&table), folder.path()), &["[data] mean", "1 channels"]);
}

#[test]
fn malformed_idx_is_refused_in_one_line() {
    let try_pair = |what: &str, images: &[u8], labels: &[u8], parts: &[&str]| {
        refused(what, load(&config(IDX), idx_folder(images, labels).path()), parts);
    };
    let (images, labels) = (good_images(), good_labels());
    let cut = |bytes: &[u8], by: usize| bytes.get(..bytes.len() - by).unwrap().to_vec();
    let longer = |bytes: &[u8]| [bytes, &[0]].concat();
    let name = "train-images-idx3-ubyte";
    try_pair("IDX: empty file", &[], &labels, &[name, "is empty"]);
    try_pair("IDX: header cut", &cut(&images, 20), &labels, &[name, "header is truncated"]);
    try_pair("IDX: truncated", &cut(&images, 1), &labels, &[name, "truncated", "12 bytes"]);
    try_pair("IDX: trailing bytes", &longer(&images), &labels, &[name, "too long", "12"]);
    try_pair("IDX: wrong magic", &labels, &labels, &[name, "magic number is 0x00000801, not 0x00000803"]);
    try_pair("IDX: labels swapped", &images, &images, &["train-labels", "magic number is 0x00000803"]);
    try_pair("IDX: promises 4 GB", &idx(0x803, &[4, 32_768, 32_768], &[]), &labels, &["cannot hold them"]);
    try_pair("IDX: promises 2^96 bytes", &idx(0x803, &[u32::MAX; 3], &[]), &labels, &["above the limit"]);
    try_pair("IDX: no images", &idx(0x803, &[0, 2, 2], &[]), &labels, &["empty: shape [0, 2, 2]"]);
    try_pair(
        "IDX: 2 labels, 3 images",
        &images,
        &idx(0x801, &[2], &[0, 1]),
        &["train-labels", "2 labels for 3 images"],
    );
    try_pair("IDX: gzip cut", &cut(&gzip(&images), 9), &labels, &[name, "truncated"]);
    try_pair(
        "IDX: gzip trailing bytes",
        &longer(&gzip(&images)),
        &labels,
        &[name, "bytes follow the gzip data"],
    );
    let mut flipped = gzip(&images);
    let middle = flipped.len() - 6;
    *flipped.get_mut(middle).unwrap() ^= 1;
    try_pair("IDX: gzip checksum wrong", &flipped, &labels, &[name, "damaged"]);
    let bomb = gzip(&[images.clone(), vec![0; 50_000_000]].concat());
    try_pair("IDX: gzip bomb", &bomb, &labels, &[name, "too long"]);
    let hollow = gzip(&idx(0x803, &[1000, 1000, 1000], &[]));
    try_pair("IDX: gzip promises 1 GB", &hollow, &labels, &["cannot hold them"]);

    let table = format!("{IDX}\nclasses = 2");
    let wrong = load(&config(&table), idx_folder(&images, &labels).path());
    refused("IDX: label out of range", wrong, &["train-labels-idx1-ubyte, label 1", "2 is not a class"]);
    let wrong = load_for(&config(IDX), idx_folder(&images, &labels).path(), &[1, 2, 2], 2);
    refused(
        "IDX: label out of the job's range",
        wrong,
        &["train-labels-idx1-ubyte, label 1", "2 is not a class"],
    );

    let empty = TempDir::new().unwrap();
    refused("IDX: no file", load(&config(IDX), empty.path()), &["train-images-idx3-ubyte.gz", "--data DIR"]);
    let lone = idx_folder(&images, &labels);
    write(&lone, "t10k-images-idx3-ubyte", &images);
    refused("IDX: test images alone", load(&config(IDX), lone.path()), &["t10k-labels-idx1-ubyte"]);
    write(&lone, "t10k-labels-idx1-ubyte", &labels);
    write(&lone, "t10k-images-idx3-ubyte", &idx(0x803, &[3, 1, 2], &[0; 6]));
    refused("IDX: test images of other size", load(&config(IDX), lone.path()), &["t10k-images", "[1, 1, 2]"]);
    std::fs::remove_file(lone.path().join(name)).unwrap();
    std::fs::create_dir(lone.path().join(name)).unwrap();
    refused("IDX: folder in place of file", load(&config(IDX), lone.path()), &[name, "not a regular file"]);
}

#[test]
fn a_dataset_says_whether_it_fits_the_job() {
    let dataset = load(&config(IDX), idx_folder(&good_images(), &good_labels()).path()).unwrap();
    for inputs in [&[1, 2, 2][..], &[4]] {
        dataset.check(inputs, 3).unwrap();
        dataset.check(inputs, 10).unwrap();
    }
    for (inputs, classes, part) in
        [(&[1, 28, 28][..], 3, "set inputs = [1, 2, 2]"), (&[5], 3, "inputs"), (&[4], 2, "set classes = 3")]
    {
        let line = dataset.check(inputs, classes).unwrap_err().to_string();
        eprintln!("misfit | {line}");
        assert!(line.contains(part), "{line}");
    }
}

// --------------------------------------------------------------------------------------------------- NPZ

fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
    npy_with(header.as_bytes(), data)
}

fn npy_with(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header);
    bytes.extend(data);
    bytes
}

fn npz(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    npz_by(CompressionMethod::Deflated, members)
}

fn npz_by(method: CompressionMethod, members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(method);
    for (name, bytes) in members {
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

const NPZ: &str = "source = \"npz\"\npath = \"scans.npz\"";

fn read_npz(text: &str, bytes: &[u8]) -> Result<Dataset, DataError> {
    npz::read(&config(text), Path::new("scans.npz"), Cursor::new(bytes))
}

fn labels_of(n: u8) -> Vec<u8> {
    npy("|u1", &format!("({n}, 1)"), &(0..n).map(|k| k % 2).collect::<Vec<u8>>())
}

#[test]
fn npz_loads_medmnist_grey_and_colour() {
    let pixels: Vec<u8> = (0..8).map(|k| k * 30).collect();
    let grey = npz(&[
        ("train_images.npy", npy("|u1", "(2, 2, 2)", &pixels)),
        ("train_labels.npy", labels_of(2)),
        ("val_images.npy", npy("|u1", "(1, 2, 2)", &[9; 4])),
        ("val_labels.npy", labels_of(1)),
        ("test_images.npy", npy("|u1", "(1, 2, 2)", &[255; 4])),
        ("test_labels.npy", npy(">i4", "(1,)", &[0, 0, 0, 1])),
    ]);
    let dataset = read_npz(NPZ, &grey).unwrap();
    assert_eq!((dataset.example_shape.as_slice(), dataset.classes), ([1, 2, 2].as_slice(), 2));
    assert_eq!((&dataset.train.labels[..], &dataset.test.labels[..]), (&[0, 1][..], &[1][..]));
    assert_eq!(dataset.test.features, [1.0; 4]);
    let val = read_npz(&format!("{NPZ}\nheld_out = \"val\""), &grey).unwrap();
    assert_eq!((&val.test.labels[..], val.test.features[0]), (&[0][..], (9.0 / 255.0) as f32));

    // Two images of 1 × 2 pixels and three channels: channels come first.
    let colour = npz(&[
        ("train_images.npy", npy("|u1", "(2, 1, 2, 3)", &[0, 51, 102, 153, 204, 255, 0, 0, 0, 0, 0, 255])),
        ("train_labels.npy", npy("<i8", "(2,)", &[[0; 8], [0; 8]].concat())),
    ]);
    let table = format!("{NPZ}\nmean = [0.0, 0.0, 0.2]\nstandard_deviation = [1.0, 2.0, 1.0]");
    let dataset = read_npz(&table, &colour).unwrap();
    assert_eq!(dataset.example_shape, [3, 1, 2]);
    let expected = [0.0, 0.6, 0.1, 0.4, 0.2, 0.8];
    assert!(dataset.train.features.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6), "{dataset:?}");
    assert!(dataset.test.is_empty());

    let numbers: Vec<u8> = [0.5f64, -1.5].iter().flat_map(|x| x.to_be_bytes()).collect();
    let floats =
        npz(&[("train_images.npy", npy(">f8", "(1, 2)", &numbers)), ("train_labels.npy", labels_of(1))]);
    let dataset = read_npz(NPZ, &floats).unwrap();
    assert_eq!(
        (dataset.example_shape.as_slice(), &dataset.train.features[..]),
        ([2].as_slice(), &[0.5, -1.5][..])
    );
}

#[test]
fn npz_groups_are_arrays_beside_the_images() {
    let with = |train: Vec<u8>, test: Vec<u8>| {
        let bytes = npz(&[
            ("train_images.npy", npy("|u1", "(3, 1, 1)", &[1, 2, 3])),
            ("train_labels.npy", labels_of(3)),
            ("train_patient.npy", train),
            ("test_images.npy", npy("|u1", "(1, 1, 1)", &[4])),
            ("test_labels.npy", labels_of(1)),
            ("test_patient.npy", test),
        ]);
        read_npz(&format!("{NPZ}\ngroup = \"patient\""), &bytes)
    };
    let test = || npy("|u1", "(1,)", &[5]);
    let dataset = with(npy("<i2", "(3, 1)", &[9, 0, 255, 255, 9, 0]), test()).unwrap();
    assert_eq!((&dataset.train.groups[..], &dataset.test.groups[..]), (&[0, 1, 0][..], &[0][..]));
    let torn = with(npy("|u1", "(3,)", &[9, 5, 9]), test());
    refused("NPZ: group torn apart", torn, &["test_patient.npy, row 0", "one half"]);
    let short = with(npy("|u1", "(2,)", &[9, 5]), test());
    refused("NPZ: 2 groups, 3 images", short, &["train_patient.npy holds 2 groups for 3 images"]);
    let floats = with(npy("<f4", "(3,)", &[0; 12]), test());
    refused("NPZ: groups of floats", floats, &["train_patient.npy", "groups of float32", "store integers"]);
    let square = with(npy("|u1", "(3, 2)", &[0; 6]), test());
    refused("NPZ: groups N×2", square, &["train_patient.npy", "one group per image"]);
    let bare =
        npz(&[("train_images.npy", npy("|u1", "(1, 1, 1)", &[1])), ("train_labels.npy", labels_of(1))]);
    refused(
        "NPZ: no groups",
        read_npz(&format!("{NPZ}\ngroup = \"patient\""), &bare),
        &["no train_patient.npy"],
    );
}

#[test]
fn malformed_npz_is_refused_in_one_line() {
    let images = || npy("|u1", "(2, 2, 2)", &[7; 8]);
    let pair = |what: &str, images: Vec<u8>, labels: Vec<u8>, parts: &[&str]| {
        let bytes = npz(&[("train_images.npy", images), ("train_labels.npy", labels)]);
        refused(what, read_npz(NPZ, &bytes), parts);
    };
    refused("NPZ: empty file", read_npz(NPZ, &[]), &["scans.npz", "not a readable NPZ"]);
    refused("NPZ: not a zip", read_npz(NPZ, b"hello hello hello hello hello"), &["not a readable NPZ"]);
    let good = npz(&[("train_images.npy", images()), ("train_labels.npy", labels_of(2))]);
    read_npz(NPZ, &good).unwrap();
    refused("NPZ: truncated", read_npz(NPZ, good.get(..good.len() / 2).unwrap()), &["not a readable NPZ"]);
    let lone = npz(&[("train_images.npy", images())]);
    refused("NPZ: member missing", read_npz(NPZ, &lone), &["has no train_labels.npy"]);
    pair("NPZ: member empty", vec![], labels_of(2), &["train_images.npy", "truncated"]);
    pair("NPZ: not an array", b"0123456789".to_vec(), labels_of(2), &["train_images.npy", "magic"]);
    pair("NPZ: data cut", npy("|u1", "(2, 2, 2)", &[7; 7]), labels_of(2), &["train_images.npy is truncated"]);
    pair(
        "NPZ: data too long",
        npy("|u1", "(2, 2, 2)", &[7; 9]),
        labels_of(2),
        &["train_images.npy is too long"],
    );
    pair("NPZ: zip bomb", npy("|u1", "(2, 2, 2)", &[0; 50_000_000]), labels_of(2), &["too long"]);
    pair(
        "NPZ: promises too much",
        npy("|u1", "(9999999999, 99999, 99999)", &[]),
        labels_of(2),
        &["above the limit"],
    );
    pair(
        "NPZ: shape overflows",
        npy("|u1", "(99999999999999999999, 2)", &[]),
        labels_of(2),
        &["unreadable .npy header"],
    );
    pair("NPZ: one dimension", npy("|u1", "(8,)", &[7; 8]), labels_of(2), &["shape [8]", "N×H×W"]);
    pair("NPZ: dtype of images", npy("<i4", "(1, 1, 1)", &[0; 4]), labels_of(1), &["images of int32"]);
    pair("NPZ: complex numbers", npy("<c8", "(1, 1, 1)", &[0; 8]), labels_of(1), &["dtype '<c8'"]);
    pair(
        "NPZ: dtype of labels",
        images(),
        npy("<f4", "(2, 1)", &[0; 8]),
        &["train_labels.npy", "labels of float32"],
    );
    pair(
        "NPZ: labels N×2",
        images(),
        npy("|u1", "(2, 2)", &[0; 4]),
        &["train_labels.npy", "one class per image"],
    );
    pair("NPZ: 3 labels, 2 images", images(), labels_of(3), &["3 labels for 2 images"]);
    pair(
        "NPZ: negative label",
        images(),
        npy("|i1", "(2,)", &[0, 255]),
        &["train_labels.npy, label 1", "-1 is not a class"],
    );
    let nan: Vec<u8> = [1.0f32, f32::NAN].iter().flat_map(|x| x.to_le_bytes()).collect();
    pair("NPZ: NaN", npy("<f4", "(2, 1, 1)", &nan), labels_of(2), &["train_images.npy, image 1", "NaN"]);
    let huge: Vec<u8> = [1e300f64, 0.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    pair("NPZ: beyond f32", npy("<f8", "(2, 1, 1)", &huge), labels_of(2), &["image 0", "infinite"]);
    let fortran = npy_with(b"{'descr': '|u1', 'fortran_order': True, 'shape': (1, 1, 1), }", &[0]);
    pair("NPZ: Fortran order", fortran, labels_of(1), &["Fortran order"]);
    let records = npy_with(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", &[0; 4]);
    pair("NPZ: records", records, labels_of(1), &["records or objects"]);
    let long = [b"\x93NUMPY\x02\x00".as_slice(), &u32::MAX.to_le_bytes()].concat();
    pair("NPZ: header of 4 GB", long, labels_of(1), &["header of 4294967295 bytes"]);
    let members = [("train_images.npy", images()), ("train_labels.npy", labels_of(2))];
    let mut flipped = npz_by(CompressionMethod::Stored, &members);
    let place = flipped.windows(8).position(|bytes| bytes == [7; 8]).unwrap();
    *flipped.get_mut(place).unwrap() ^= 0x55;
    refused("NPZ: damaged member", read_npz(NPZ, &flipped), &["train_images.npy is damaged"]);
    let table = format!("{NPZ}\nheld_out = \"val\"");
    refused("NPZ: no val half", read_npz(&table, &good), &["[data] held_out", "val_images.npy"]);
    let table = format!("{NPZ}\nclasses = 1");
    refused("NPZ: label out of range", read_npz(&table, &good), &["train_labels.npy, label 1"]);
}

// --------------------------------------------------------------------------------------------------- CSV

const CSV: &str = "source = \"csv\"\npath = \"table.csv\"\nlabel = \"y\"\n";

fn read_csv(lines: &str, table: &str) -> Result<Dataset, DataError> {
    let config = config(&format!("{CSV}{lines}"));
    config.validate()?;
    csv::from_bytes(&config, table.as_bytes())
}

#[test]
fn csv_columns_become_features_in_order() {
    let table = "a,colour,y,b,c\n1,red,0, 2.5 ,x\n-3,blue,1,.5,x\n4,red,2,1e1,x\n";
    let dataset = read_csv("drop = [\"c\"]\none_hot = [\"colour\"]", table).unwrap();
    assert_eq!((dataset.example_shape.as_slice(), dataset.classes), ([4].as_slice(), 3));
    let expected = [1.0, 2.5, 0.0, 1.0, -3.0, 0.5, 1.0, 0.0, 4.0, 10.0, 0.0, 1.0];
    assert_eq!(dataset.train.features, expected);
    assert_eq!(dataset.train.labels, [0, 1, 2]);
    let declared = "drop = [\"c\"]\ndrop_first = true\none_hot = { colour = [\"red\", \"green\", \"blue\"] }";
    let dataset = read_csv(declared, table).unwrap();
    assert_eq!(dataset.train.features.get(..8).unwrap(), [1.0, 2.5, 0.0, 0.0, -3.0, 0.5, 0.0, 1.0]);
    let headerless = "drop = [\"c\"]\none_hot = [\"colour\"]\ndelimiter = \";\"\n\
                      columns = [\"a\", \"colour\", \"y\", \"b\", \"c\"]";
    let same = read_csv(headerless, "1;red;0;2.5;x\n-3;blue;1;.5;x\n4;red;2;1e1;x").unwrap();
    assert_eq!(same.train.features, expected);
}

#[test]
fn csv_labels_follow_their_rule() {
    let table = "x,y\n1,3\n2,0\n3,1.0\n";
    assert_eq!(read_csv("label_rule = { positive = \"nonzero\" }", table).unwrap().train.labels, [1, 0, 1]);
    let listed = read_csv("label_rule = [\"3\", \"1\", \"0\", \"9\"]", table).unwrap();
    assert_eq!((&listed.train.labels[..], listed.classes), (&[0, 2, 1][..], 4));
    assert_eq!(read_csv("classes = 7", table).unwrap().classes, 7);
}

#[test]
fn standardisation_is_per_site_and_from_training_rows() {
    let folder = TempDir::new().unwrap();
    write(&folder, "b.csv", b"x,k,y\n1,5,0\n3,5,1\n100,5,1\n");
    write(&folder, "a.csv", b"x,k,y\n10,0,0\n20,0,1\n30,0,1\n");
    write(
        &folder,
        "split.json",
        br#"{"a": {"train": [2, 0, 1], "test": []}, "b": {"train": [0, 1], "test": [2]}}"#,
    );
    let table = format!(
        "{CSV}sites = {{ b = \"b.csv\", a = \"a.csv\" }}\nsplit = \"split.json\"\nstandardise = true"
    )
    .replace("table.csv", ".");
    let dataset = load(&config(&table), folder.path()).unwrap();
    let root = std::f32::consts::SQRT_2;
    let expected = [-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, -1.0 / root, 0.0, 1.0 / root, 0.0];
    assert!(
        dataset.train.features.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6),
        "{:?}",
        dataset.train.features
    );
    assert!((dataset.test.features[0] - 98.0 / root).abs() < 1e-4);
    let sites = dataset.sites.as_ref().unwrap();
    assert_eq!(sites.iter().map(|site| site.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((sites[0].train.clone(), sites[0].test.clone()), (0..3, 0..0));
    assert_eq!((sites[1].train.clone(), sites[1].test.clone()), (3..5, 0..1));

    // A node's own configuration sees the same numbers, and needs only its own file.
    std::fs::remove_file(folder.path().join("a.csv")).unwrap();
    let own = load(&config(&format!("{table}\nsite = \"b\"")), folder.path()).unwrap();
    assert_eq!(own.train.features, dataset.train.features.get(6..).unwrap());
    assert_eq!((own.test.clone(), own.sites.unwrap().len()), (dataset.test.clone(), 1));

    let constants = read_csv("standardise = { x = [10.0, 5.0] }", "x,k,y\n20,7,0\n").unwrap();
    assert_eq!(constants.train.features, [2.0, 7.0]);
    refused(
        "CSV: one row to standardise",
        read_csv("standardise = true", "x,y\n1,0\n"),
        &["table.csv", "one training row"],
    );
}

#[test]
fn a_column_can_name_the_site() {
    let table = "x,where,y\n1,north,0\n2,south,1\n3,north,1\n";
    let dataset = read_csv("sites = { column = \"where\" }", table).unwrap();
    assert_eq!(dataset.train.features, [1.0, 3.0, 2.0]);
    let sites = dataset.sites.unwrap();
    assert_eq!((sites[0].train.clone(), sites[1].train.clone()), (0..2, 2..3));
    let south = read_csv("sites = { column = \"where\" }\nsite = \"south\"", table).unwrap();
    assert_eq!(south.train.features, [2.0]);
    let line = ["[data] site", "no row of site \"east\""];
    refused("CSV: site absent", read_csv("sites = { column = \"where\" }\nsite = \"east\"", table), &line);
    let bad = read_csv("sites = { column = \"where\" }", "x,where,y\n1,St. Mary,0\n");
    refused("CSV: site name", bad, &["table.csv, line 2", "St. Mary"]);
}

#[test]
fn constants_stand_in_for_missing_values() {
    let table = "a,b,c,y\n?,1,x,0\n2,?,?,1\n,4,x,1\n5,6,,0\n7,?,x,?\n";
    let keys = "missing = \"?\"\nmissing_rows = \"drop\"\none_hot = { c = [\"x\", \"z\"] }";
    let dataset = read_csv(&format!("{keys}\nmissing_value = {{ a = 50, c = \"z\" }}"), table).unwrap();
    // The second row lacks b, which has no constant, and the last its label.
    assert_eq!(dataset.train.features, [50.0, 1.0, 1.0, 0.0, 50.0, 4.0, 1.0, 0.0, 5.0, 6.0, 0.0, 1.0]);
    let scaled = "missing_value = { a = 54 }\nstandardise = { a = [54, 9] }\ndrop = [\"b\", \"c\"]";
    let dataset = read_csv(scaled, "a,b,c,y\n,1,x,0\n72,,,1\n").unwrap();
    assert_eq!(dataset.train.features, [0.0, 2.0], "a constant is in the units of the file");
}

#[test]
fn an_undeclared_category_is_none_of_them() {
    let table = "c,y\n1,0\n1.0,1\n9,0\n2,1\n";
    let read = |lines: &str| read_csv(lines, table).unwrap().train.features.clone();
    let declared = "one_hot = { c = [\"1\", \"2\", \"3\"] }";
    assert_eq!(read(declared), [1., 0., 0., 1., 0., 0., 0., 0., 0., 0., 1., 0.]);
    assert_eq!(read(&format!("{declared}\ndrop_first = true")), [0., 0., 0., 0., 0., 0., 1., 0.]);
}

#[test]
fn an_id_decides_the_split_and_is_no_feature() {
    let rows = |tail: &str| {
        let row = |k: usize| format!("r{k},{},{}{tail}\n", k / 7, k % 2);
        std::iter::once("id,x,y\n".to_owned()).chain((0..2000).map(row)).collect::<String>()
    };
    let rule = "split = { test_fraction = 0.25, id = \"id\" }";
    let dataset = read_csv(rule, &rows("")).unwrap();
    assert_eq!(dataset.example_shape, [1]);
    // 500 expected; five standard deviations of a binomial are 97.
    assert!(dataset.test.len().abs_diff(500) < 97, "{}", dataset.test.len());
    let other_content = read_csv(rule, &rows(" ").replace(",0", ",1")).unwrap();
    assert_eq!(other_content.test.len(), dataset.test.len());
    let other_key = read_csv(&rule.replace("0.25", "0.25, key = \"b\""), &rows("")).unwrap();
    assert_ne!(other_key.test, dataset.test);
    // A group's name decides as an id of the same text does.
    let grouped = read_csv("group = \"id\"\nsplit = { test_fraction = 0.25 }", &rows("")).unwrap();
    assert_eq!(grouped.test.features, dataset.test.features);
    refused("CSV: id empty", read_csv(rule, "id,x,y\n,1,0\n"), &["line 2", "\"id\" has no value"]);
}

#[test]
fn what_is_fitted_to_the_data_is_named_with_what_to_write_instead() {
    let fitted = |text: &str| config(text).fitted().iter().map(Fitted::to_string).collect::<Vec<_>>();
    let heart = fitted(HEART);
    assert_eq!(heart.len(), 2);
    assert_eq!(
        heart[0],
        "[data] standardise = true is fitted to the data: with [privacy] give standardise = { COLUMN = [mean, \
         standard_deviation] }, public constants"
    );
    assert!(heart[1].starts_with("[data] split = \"FILE\" is fitted") && heart[1].contains("test_fraction"));
    let lists = fitted(&format!("{CSV}one_hot = [\"c\"]"));
    assert!(
        lists[0].starts_with("[data] one_hot = [COLUMN] is fitted") && lists[0].contains("all categories")
    );
    assert!(
        lists[1].starts_with("[data] the number of classes is fitted") && lists[1].contains("classes = 2")
    );
    assert_eq!(fitted("source = \"idx\"\npath = \"x\"\nmean = 0.1").len(), 1);
    for constant in [
        "source = \"idx\"\npath = \"x\"\nclasses = 10\nmean = 0.1\nstandard_deviation = 0.3",
        "source = \"npz\"\npath = \"x\"\nclasses = 2\ngroup = \"patient\"",
        "source = \"synthetic\"",
        "source = \"csv\"\npath = \"x\"\nlabel = \"y\"\nlabel_rule = { positive = \"nonzero\" }\nstandardise = false",
        neighbours::PRIVATE,
    ] {
        assert_eq!(fitted(constant), Vec::<String>::new(), "{constant}");
    }
}

#[test]
fn a_hashed_split_depends_on_content_alone() {
    let row = |k: usize| format!("{k},{}\n", k % 2);
    let rule = "split = { test_fraction = 0.25 }";
    let forward: String = std::iter::once("x,y\n".to_owned()).chain((0..2000).map(row)).collect();
    let backward: String = std::iter::once("x,y\n".to_owned()).chain((0..2000).rev().map(row)).collect();
    let sorted = |dataset: &Dataset| {
        let mut features = dataset.test.features.clone();
        features.sort_by(f32::total_cmp);
        features
    };
    let (a, b) = (read_csv(rule, &forward).unwrap(), read_csv(rule, &backward).unwrap());
    assert_eq!(sorted(&a), sorted(&b));
    assert_eq!(a.train.len() + a.test.len(), 2000);
    // 500 expected; five standard deviations of a binomial are 97.
    assert!(a.test.len().abs_diff(500) < 97, "{}", a.test.len());
    let other = read_csv("split = { test_fraction = 0.25, key = \"b\" }", &forward).unwrap();
    assert_ne!(sorted(&a), sorted(&other));
}

#[test]
fn a_group_is_no_feature_and_falls_on_one_side() {
    let table = "x,who,y\n1,ann,0\n2,Bob,1\n3,ann,1\n4,7,0\n5,7.0,0\n";
    let dataset = read_csv("group = \"who\"", table).unwrap();
    assert_eq!(dataset.example_shape, [1]);
    assert_eq!((&dataset.train.groups[..], dataset.train.units()), (&[0, 1, 0, 2, 3][..], 4));
    let plain = read_csv("drop = [\"who\"]", table).unwrap();
    assert_eq!((plain.train.groups.len(), plain.train.units()), (0, 5));
    assert_ne!(plain.digest(), dataset.digest());

    // One name at two sites is two groups, as for the two hospitals alone.
    let sited = "x,who,at,y\n1,7,b,0\n2,7,a,1\n3,8,a,1\n4,7,b,0\n";
    let dataset = read_csv("group = \"who\"\nsites = { column = \"at\" }", sited).unwrap();
    assert_eq!(
        (&dataset.train.features[..], &dataset.train.groups[..]),
        (&[2.0, 3.0, 1.0, 4.0][..], &[0, 1, 2, 2][..])
    );

    // A keyed hash of the group alone decides, wherever the group's rows stand.
    let rows = (0..3000).map(|k| format!("{k},p{},{}\n", k % 700, k % 2));
    let many: String = std::iter::once("x,who,y\n".to_owned()).chain(rows).collect();
    let dataset = read_csv("group = \"who\"\nsplit = { test_fraction = 0.25 }", &many).unwrap();
    assert_eq!(dataset.train.units() + dataset.test.units(), 700);
    // 175 groups expected; five standard deviations of a binomial are 57.
    assert!(dataset.test.units().abs_diff(175) < 57, "{}", dataset.test.units());
    for split in [&dataset.train, &dataset.test] {
        let mut first = std::collections::BTreeMap::new();
        for (x, group) in split.features.iter().zip(&split.groups) {
            assert_eq!(*first.entry(*group).or_insert(*x as u32 % 700), *x as u32 % 700);
        }
        assert!(first.keys().copied().eq(0..split.units() as u32), "ids are dense");
    }

    let label = read_csv("group = \"y\"", table);
    refused("CSV: group is the label", label, &["[data] group", "cannot be the group's"]);
    refused("CSV: no group column", read_csv("group = \"z\"", table), &["[data] group", "no column \"z\""]);
    let dropped = read_csv("group = \"who\"\ndrop = [\"who\"]", table);
    refused("CSV: group dropped", dropped, &["[data] drop", "group or id"]);
    let unnamed = read_csv("group = \"who\"", "x,who,y\n1,,0\n");
    refused("CSV: group empty", unnamed, &["line 2", "\"who\" has no value"]);
    let folder = TempDir::new().unwrap();
    write(&folder, "table.csv", table.as_bytes());
    write(&folder, "split.json", br#"{"train": [0, 1], "test": [2, 3, 4]}"#);
    let torn = load(&config(&format!("{CSV}group = \"who\"\nsplit = \"split.json\"")), folder.path());
    refused("CSV: group torn apart", torn, &["table.csv, line 4", "group \"ann\"", "one half"]);
}

#[test]
fn malformed_csv_is_refused_in_one_line() {
    let good = "x,y\n1,0\n2,1\n";
    let cases: &[(&str, &str, &str, &[&str])] = &[
        ("empty file", "", "", &["table.csv", "is empty"]),
        ("header only", "", "x,y\n", &["table.csv", "is empty: it has no row"]),
        (
            "ragged row",
            "",
            "x,y\n1,0\n1,2,3\n",
            &["table.csv, line 3", "has 3 cells, the table has 2 columns"],
        ),
        (
            "text in a number",
            "",
            "x,y\n1,0\nold,1\n",
            &["line 3", "column \"x\" holds \"old\", not a number"],
        ),
        ("NaN", "", "x,y\nNaN,0\n", &["line 2", "\"NaN\", not a finite"]),
        ("infinite", "", "x,y\n-inf,0\n", &["line 2", "not a finite"]),
        ("beyond f32", "", "x,y\n1e39,0\n", &["line 2", "not a finite 32-bit number"]),
        ("missing value", "missing = \"?\"", "x,y\n?,0\n", &["line 2", "\"x\" has no value", "missing_rows"]),
        ("empty cell", "", "x,y\n,0\n", &["line 2", "\"x\" has no value"]),
        (
            "all rows dropped",
            "missing = \"?\"\nmissing_rows = \"drop\"",
            "x,y\n?,0\n",
            &["no training row is left"],
        ),
        ("fractional label", "", "x,y\n1,0.5\n", &["line 2", "label 0.5"]),
        ("negative label", "", "x,y\n1,-1\n", &["line 2", "-1 is not a class"]),
        ("label out of range", "classes = 2", "x,y\n1,2\n", &["line 2", "2 is not a class"]),
        (
            "label not in rule",
            "label_rule = [\"no\", \"yes\"]",
            "x,y\n1,maybe\n",
            &["line 2", "\"maybe\"", "label_rule"],
        ),
        ("unknown column", "drop = [\"z\"]", good, &["[data] drop", "no column \"z\"", "it has x, y"]),
        ("unknown one-hot", "one_hot = [\"z\"]", good, &["[data] one_hot", "no column \"z\""]),
        (
            "unknown constant",
            "standardise = { z = [0.0, 1.0] }",
            good,
            &["[data] standardise", "no column \"z\""],
        ),
        (
            "constant of the label",
            "standardise = { y = [0.0, 1.0] }",
            good,
            &["\"y\" is not a numeric feature"],
        ),
        ("label dropped", "drop = [\"y\"]", good, &["[data] drop", "is the label"]),
        ("no feature left", "drop = [\"x\"]", good, &["no feature column"]),
        ("column twice", "", "x,x,y\n1,2,0\n", &["two columns named \"x\""]),
        ("rule lists a value twice", "label_rule = [\"1\", \"1.0\"]", good, &["[data] label_rule", "twice"]),
        (
            "unknown id",
            "split = { test_fraction = 0.5, id = \"z\" }",
            good,
            &["[data] split", "no column \"z\""],
        ),
        (
            "id is the label",
            "split = { test_fraction = 0.5, id = \"y\" }",
            good,
            &["[data] split", "cannot be the id"],
        ),
        ("unknown constant", "missing_value = { z = 1 }", good, &["[data] missing_value", "no column \"z\""]),
        ("constant for the label", "missing_value = { y = 1 }", good, &["\"y\" is not a feature"]),
        ("constant in words", "missing_value = { x = \"old\" }", good, &["\"x\" needs a finite number"]),
        ("constant too large", "missing_value = { x = 1e39 }", good, &["\"x\" needs a finite number"]),
        (
            "constant is no category",
            "one_hot = { x = [\"1\"] }\nmissing_value = { x = 2 }",
            good,
            &["[data] missing_value", "one of its categories"],
        ),
        (
            "constant too small",
            "standardise = { x = [0.0, 1e-300] }",
            good,
            &["line 2", "not finite once standardised"],
        ),
    ];
    for (what, lines, table, parts) in cases {
        refused(&format!("CSV: {what}"), read_csv(lines, table), parts);
    }
    let latin = csv::from_bytes(&config(CSV), b"x,y\n1,0\n\xff,1\n");
    refused("CSV: not UTF-8", latin, &["table.csv, line 3", "not UTF-8"]);
    let folder = TempDir::new().unwrap();
    refused("CSV: no file", load(&config(CSV), folder.path()), &["table.csv", "--data DIR"]);
    write(&folder, "a.csv", b"x,y\n1,0\n");
    write(&folder, "b.csv", b"x,z,y\n1,1,0\n");
    let table = CSV.replace("table.csv", ".") + "sites = { a = \"a.csv\", b = \"b.csv\" }";
    refused("CSV: sites differ", load(&config(&table), folder.path()), &["b.csv", "other columns"]);
}

#[test]
fn malformed_splits_are_refused_in_one_line() {
    let folder = TempDir::new().unwrap();
    write(&folder, "table.csv", b"x,y\n1,0\n2,1\n?,1\n");
    let table = format!("{CSV}split = \"split.json\"\nmissing = \"?\"\nmissing_rows = \"drop\"");
    let with = |split: &str| {
        write(&folder, "split.json", split.as_bytes());
        load(&config(&table), folder.path())
    };
    let good = with(r#"{"train": [1], "test": [0]}"#).unwrap();
    assert_eq!((&good.train.features[..], &good.test.features[..]), (&[2.0][..], &[1.0][..]));
    assert!(good.sites.is_none());
    let cases: &[(&str, &str, &[&str])] = &[
        ("not JSON", "train", &["split.json", "not a split file"]),
        ("no test list", r#"{"train": [0]}"#, &["split.json", "missing field `test`"]),
        ("negative row", r#"{"train": [-1], "test": []}"#, &["not a split file"]),
        ("row out of range", r#"{"train": [0], "test": [3]}"#, &["split.json, row 3", "rows 0 to 2"]),
        ("row in both halves", r#"{"train": [0, 1], "test": [1]}"#, &["split.json, row 1", "listed twice"]),
        (
            "row with a missing value",
            r#"{"train": [0], "test": [2]}"#,
            &["split.json, row 2", "lacks a value"],
        ),
        ("no training row", r#"{"train": [], "test": [0]}"#, &["no training row"]),
    ];
    for (what, split, parts) in cases {
        refused(&format!("split: {what}"), with(split), parts);
    }
    std::fs::remove_file(folder.path().join("split.json")).unwrap();
    refused("split: no file", load(&config(&table), folder.path()), &["split.json"]);

    write(&folder, "table.csv", b"x,y,at\n1,0,a\n2,1,b\n");
    let table = format!("{CSV}split = \"split.json\"\nsites = {{ column = \"at\" }}");
    let with = |split: &str| {
        write(&folder, "split.json", split.as_bytes());
        load(&config(&table), folder.path())
    };
    with(r#"{"a": {"train": [0], "test": []}, "b": {"train": [1], "test": []}}"#).unwrap();
    let parts = ["split.json", "no site \"b\""];
    refused("split: site missing", with(r#"{"a": {"train": [0], "test": []}}"#), &parts);
    let stolen = with(r#"{"a": {"train": [1], "test": []}, "b": {"train": [1], "test": []}}"#);
    refused("split: another site's row", stolen, &["split.json, site a, row 1", "another site"]);
}

// --------------------------------------------------------------------------------------- hostile bytes

/// A good file with some bytes changed and its end cut: deeper into a reader than noise gets.
fn spoil(mut bytes: Vec<u8>, changes: &[(usize, u8)], keep: usize) -> Vec<u8> {
    let length = bytes.len();
    for (place, value) in changes {
        if let Some(byte) = bytes.get_mut(place % length) {
            *byte = *value;
        }
    }
    bytes.truncate(length.min(keep));
    bytes
}

fn try_idx(images: &[u8], labels: &[u8]) {
    let pair = |bytes: &[u8]| bytes.len() as u64;
    let path = Path::new("file");
    let _ = idx::half(&config(IDX), (path, pair(images), images), (path, pair(labels), labels));
}

proptest! {
    #[test]
    fn no_bytes_make_a_reader_panic(
        noise in prop::collection::vec(any::<u8>(), 0..600),
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 0..6),
        keep in prop_oneof![Just(usize::MAX), 0usize..400],
    ) {
        try_idx(&noise, &good_labels());
        try_idx(&spoil(good_images(), &changes, keep), &good_labels());
        try_idx(&good_images(), &spoil(good_labels(), &changes, keep));
        try_idx(&spoil(gzip(&good_images()), &changes, keep), &good_labels());

        let _ = read_npz(NPZ, &noise);
        let array = npy("<f4", "(2, 1, 2, 1)", &[0; 16]);
        let spoiled = spoil(array.clone(), &changes, keep);
        let _ = read_npz(NPZ, &npz(&[("train_images.npy", spoiled), ("train_labels.npy", labels_of(2))]));
        let archive = npz(&[("train_images.npy", array), ("train_labels.npy", labels_of(2))]);
        let _ = read_npz(NPZ, &spoil(archive, &changes, keep));

        let rich = "missing = \"?\"\nmissing_rows = \"drop\"\none_hot = [\"c\"]\ndrop_first = true\n\
                    standardise = true\nsites = { column = \"s\" }\nsplit = { test_fraction = 0.3 }";
        let table = b"x,c,s,y\n1,a,n,0\n2,b,n,1\n3,a,m,0\n4,c,m,1\n5,\"a\",n,0\n".to_vec();
        for lines in ["", rich] {
            let config = config(&format!("{CSV}{lines}"));
            let _ = csv::from_bytes(&config, &noise);
            let _ = csv::from_bytes(&config, &spoil(table.clone(), &changes, keep));
        }
        let split = br#"{"a": {"train": [2, 0], "test": [1]}, "b": {"train": [0], "test": [2]}}"#.to_vec();
        for bytes in [&noise, &spoil(split, &changes, keep)] {
            let text = String::from_utf8_lossy(bytes);
            let _ = csv::split_from_text(&text, true);
            let _ = csv::split_from_text(&text, false);
        }
    }

    /// Whatever table of finite numbers: it loads, and to those numbers.
    #[test]
    fn finite_tables_load_to_their_numbers(rows in prop::collection::vec((-1e30f32..1e30, 0i64..50), 1..40)) {
        let table: String = std::iter::once("x,y\n".to_owned())
            .chain(rows.iter().map(|(x, y)| format!("{x},{y}\n")))
            .collect();
        let dataset = read_csv("", &table).unwrap();
        prop_assert_eq!(&dataset.train.features, &rows.iter().map(|(x, _)| *x).collect::<Vec<f32>>());
        prop_assert_eq!(&dataset.train.labels, &rows.iter().map(|(_, y)| *y).collect::<Vec<i64>>());
    }
}

// --------------------------------------------------------------------------------------------- synthetic

const SYNTHETIC: &str = "source = \"synthetic\"\n";

/// A change here changes every published result on these images.
#[test]
fn synthetic_images_are_frozen() {
    let dataset =
        load(&config(&format!("{SYNTHETIC}examples = 64\ntest_examples = 16")), Path::new("")).unwrap();
    assert_eq!(
        dataset.digest().to_string(),
        "3ac4834ee2b8fe1aa85957b72514c96c570e2739f1227f5d19ec11292b4f35f8"
    );
    let other =
        load(&config(&format!("{SYNTHETIC}examples = 64\ntest_examples = 16\nseed = 1")), Path::new(""));
    assert_ne!(dataset.digest(), other.unwrap().digest());
    let longer =
        load(&config(&format!("{SYNTHETIC}examples = 80\ntest_examples = 0")), Path::new("")).unwrap();
    assert_eq!(longer.train.labels.get(..64).unwrap(), dataset.train.labels);
    assert!(longer.train.features.starts_with(&dataset.train.features));
    assert!(longer.test.is_empty());
}

/// Multinomial logistic regression by plain gradient descent: accuracy on the test half.
fn linear_accuracy(dataset: &Dataset, epochs: usize, learning_rate: f32) -> f64 {
    let (width, classes) = (dataset.example_shape.iter().product::<usize>(), dataset.classes);
    let mut weights = vec![0f32; classes * (width + 1)];
    let scores = |weights: &[f32], x: &[f32]| -> Vec<f32> {
        let score = |w: &[f32]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>() + w[width];
        weights.chunks(width + 1).map(score).collect()
    };
    for _ in 0..epochs {
        for (x, label) in dataset.train.features.chunks(width).zip(&dataset.train.labels) {
            let scores = scores(&weights, x);
            let top = scores.iter().copied().fold(f32::MIN, f32::max);
            let odds: Vec<f32> = scores.iter().map(|score| (score - top).exp()).collect();
            let total: f32 = odds.iter().sum();
            for (class, w) in weights.chunks_mut(width + 1).enumerate() {
                let step =
                    learning_rate * (odds[class] / total - f32::from(u8::from(class as i64 == *label)));
                w.iter_mut().zip(x.iter().chain([&1.0])).for_each(|(w, x)| *w -= step * x);
            }
        }
    }
    let right = dataset.test.features.chunks(width).zip(&dataset.test.labels).filter(|(x, label)| {
        let scores = scores(&weights, x);
        (0..classes).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap() as i64 == **label
    });
    right.count() as f64 / dataset.test.len() as f64
}

#[test]
fn synthetic_images_are_worth_learning() {
    let dataset = load(&config(SYNTHETIC), Path::new("")).unwrap();
    assert_eq!((dataset.train.len(), dataset.test.len(), dataset.classes), (6000, 1000, 10));
    for class in 0..10 {
        let count = dataset.train.labels.iter().filter(|label| **label == class).count();
        assert!((450..750).contains(&count), "class {class}: {count}");
    }
    assert!(dataset.train.features.iter().all(|x| (0.0..=1.0).contains(x)));
    let accuracy = linear_accuracy(&dataset, 3, 0.01);
    eprintln!("linear model on the synthetic digits: {accuracy}");
    assert!((0.7..0.9).contains(&accuracy), "{accuracy}");
}

// ------------------------------------------------------------------------------------------- shared data

const HEART: &str = r#"
source = "csv"
path = "heart-disease"
columns = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"]
label = "num"
label_rule = { positive = "nonzero" }
drop = ["slope", "ca", "thal"]
missing = "?"
missing_rows = "drop"
one_hot = { cp = ["1", "2", "3", "4"], restecg = ["0", "1", "2"] }
drop_first = true
standardise = true
split = "flamby-split.json"

[sites]
cleveland = "processed.cleveland.data"
hungarian = "processed.hungarian.data"
switzerland = "processed.switzerland.data"
va = "processed.va.data"
"#;

#[test]
fn heart_disease_has_flambys_sizes_and_features() {
    let Some(base) = shared_data() else { return };
    let dataset = load(&config(HEART), &base).unwrap();
    dataset.check(&[13], 2).unwrap();
    assert_eq!(dataset.classes, 2);
    let sites = dataset.sites.clone().unwrap();
    let sizes: Vec<(&str, usize, usize)> =
        sites.iter().map(|site| (site.name.as_str(), site.train.len(), site.test.len())).collect();
    assert_eq!(
        sizes,
        [("cleveland", 199, 104), ("hungarian", 172, 89), ("switzerland", 30, 16), ("va", 85, 45)]
    );
    assert_eq!((dataset.train.len(), dataset.test.len()), (486, 254));

    // Fitted categories are the declared ones, and raw values show the order of the features.
    let fitted =
        HEART.replace(r#"{ cp = ["1", "2", "3", "4"], restecg = ["0", "1", "2"] }"#, r#"["restecg", "cp"]"#);
    assert_eq!(load(&config(&fitted), &base).unwrap().digest(), dataset.digest());
    let raw = HEART.replace("standardise = true\n", "").replace("split = \"flamby-split.json\"\n", "");
    let raw = load(&config(&raw), &base).unwrap();
    // Cleveland's first row: 63, male, cp 1, 145, 233, 1, restecg 2, 150, 0, 2.3.
    let first = [63.0, 1.0, 145.0, 233.0, 1.0, 150.0, 0.0, 2.3, 0.0, 0.0, 0.0, 0.0, 1.0];
    assert_eq!(raw.train.features.get(..13).unwrap(), first);
    let sizes: Vec<usize> = raw.sites.unwrap().iter().map(|site| site.train.len()).collect();
    assert_eq!(sizes, [303, 261, 46, 130]);

    // Every feature of every site: mean 0 and unbiased standard deviation 1 over its training rows.
    for site in &sites {
        let rows = dataset.train.features.get(site.train.start * 13..site.train.end * 13).unwrap();
        for feature in 0..13 {
            let column = || rows.iter().skip(feature).step_by(13).map(|x| f64::from(*x));
            let count = site.train.len() as f64;
            let mean = column().sum::<f64>() / count;
            let variance = column().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (count - 1.0);
            assert!(mean.abs() < 1e-5, "{} {feature}: {mean}", site.name);
            assert!((variance - 1.0).abs() < 1e-4 || variance == 0.0, "{} {feature}: {variance}", site.name);
        }
    }

    // A hospital's own configuration: the same rows as in the simulation, bit for bit.
    for site in &sites {
        let own = HEART.replace("[sites]", &format!("site = \"{}\"\n[sites]", site.name));
        let own = load(&config(&own), &base).unwrap();
        let (train, test) =
            (site.train.start * 13..site.train.end * 13, site.test.start * 13..site.test.end * 13);
        assert_eq!(own.train.features, dataset.train.features.get(train).unwrap());
        assert_eq!(own.test.features, dataset.test.features.get(test).unwrap());
        assert_eq!(own.train.labels, dataset.train.labels.get(site.train.clone()).unwrap());
    }
}

#[test]
fn mnist_and_pneumonia_load() {
    let Some(base) = shared_data() else { return };
    let mnist = load_for(&config("source = \"idx\"\npath = \"mnist\""), &base, &[1, 28, 28], 10).unwrap();
    assert_eq!((mnist.train.len(), mnist.test.len(), mnist.classes), (60_000, 10_000, 10));
    assert_eq!(mnist.train.labels.get(..5).unwrap(), [5, 0, 4, 1, 9]);
    // LeCun's training pixels have mean 0.1307 and standard deviation 0.3081.
    let count = mnist.train.features.len() as f64;
    let mean = mnist.train.features.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let square = mnist.train.features.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / count;
    assert!((mean - 0.1307).abs() < 1e-4 && ((square - mean * mean).sqrt() - 0.3081).abs() < 1e-4);

    let table = "source = \"npz\"\npath = \"pneumonia/pneumonia-imbalanced.npz\"";
    let scans = load_for(&config(table), &base, &[1, 28, 28], 2).unwrap();
    assert_eq!((scans.train.len(), scans.test.len(), scans.classes), (3882, 624, 2));
    let positives = scans.train.labels.iter().filter(|label| **label == 1).count();
    assert!((positives as f64 / 3882.0 - 0.9).abs() < 0.01);
}
