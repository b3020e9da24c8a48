//! The `[data]` table: the same keys in a simulator's scenario and in a node's own configuration.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tributary_common::document::Schema;
use tributary_common::ids::NodeName;
use tributary_common::limits::CLASSES;

use super::DataError;

/// The keys of a `[data]` table, for the document that holds one; those with forms of their own are left to
/// [`DataConfig`].
pub const SCHEMA: Schema = Schema {
    keys: &[
        "source",
        "path",
        "site",
        "classes",
        "public_test",
        "group",
        "mean",
        "standard_deviation",
        "held_out",
        "columns",
        "header",
        "delimiter",
        "label",
        "drop",
        "missing",
        "missing_rows",
        "drop_first",
        "examples",
        "test_examples",
        "seed",
        "noise",
        "alpha",
        "beta",
        "users",
        "iid",
    ],
    tables: &[
        ("declared_examples", None),
        ("label_rule", None),
        ("missing_value", None),
        ("one_hot", None),
        ("standardise", None),
        ("sites", None),
        ("split", None),
    ],
};

/// Which kind of file holds the examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A folder of IDX files named as MNIST names them, plain or gzip.
    Idx,
    /// One CSV file, or one per site.
    Csv,
    /// One NPZ file in MedMNIST's layout.
    Npz,
    /// Folders of image files: not available yet.
    Images,
    /// Digits drawn by this program: no file at all.
    Synthetic,
    /// Synthetic(α, β) of Li et al. 2020: users with data of their own, drawn by this program.
    #[serde(rename = "synthetic-federated")]
    SyntheticFederated,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Source::Idx => "idx",
            Source::Csv => "csv",
            Source::Npz => "npz",
            Source::Images => "images",
            Source::Synthetic => "synthetic",
            Source::SyntheticFederated => "synthetic-federated",
        }
    }
}

/// One constant for every channel of an image, or one per channel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number, or a list with one number per channel")]
pub enum PerChannel {
    /// The same constant for each channel.
    One(f64),
    /// The constants of channels 0, 1, ….
    Each(Vec<f64>),
}

/// How the cell of the label column becomes a class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a list of the label's values in class order, or { positive = \"nonzero\" }")]
pub enum LabelRule {
    /// Class k is the k-th value of the list; numbers compare as numbers (`1.0` is `1`).
    Classes(Vec<String>),
    /// Two classes.
    Binary(BinaryRule),
}

/// Class 1 if the rule holds, else class 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BinaryRule {
    /// When a row is of class 1.
    pub positive: Positive,
}

/// When a row of a two-class table is of class 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positive {
    /// When the label's number is not zero.
    Nonzero,
}

/// What to do with a row that lacks a value in a kept column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MissingRows {
    /// Leave the row out; the others keep their row numbers.
    Drop,
    /// Refuse the file.
    Error,
}

/// How many training examples nodes declare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a whole number, or a table of sites and their numbers: { north = 200 }")]
pub enum DeclaredExamples {
    /// This node; in a scenario each client.
    One(u64),
    /// In a scenario with a client per site: each site.
    BySite(BTreeMap<NodeName, u64>),
}

/// A value of a cell, written as a number or a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number, or the text of a category")]
pub enum CellValue {
    /// A number; of a one-hot column the category that equals it.
    Number(f64),
    /// A category of a one-hot column.
    Text(String),
}

impl CellValue {
    /// The value as a cell would hold it.
    pub(super) fn cell(&self) -> String {
        match self {
            CellValue::Number(number) => number.to_string(),
            CellValue::Text(text) => text.trim().to_owned(),
        }
    }
}

/// A setting that looks at more than one example: removing one example would then change what the others become, and
/// clipping would no longer bound what one person can do. A job with `[privacy] unit = "example"` does without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fitted {
    /// The setting, as the `[data]` table has it.
    pub setting: &'static str,
    /// What to write in its place.
    pub instead: &'static str,
}

impl std::fmt::Display for Fitted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { setting, instead } = self;
        write!(f, "[data] {setting} is fitted to the data: with [privacy] give {instead}")
    }
}

/// Columns that become one 0/1 feature per category.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "a list of columns, or a table of columns with their categories: { cp = [\"1\", \"2\"] }"
)]
pub enum OneHot {
    /// Categories are those found at any site, in increasing order. This looks at the data of all sites,
    /// so a node, which has one, declares them instead.
    Fitted(Vec<String>),
    /// Categories and their order, by column. Any other value has none of them: zeros.
    Declared(BTreeMap<String, Vec<String>>),
}

/// How features are brought to a common scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "true or false, or a table of columns with public constants: { age = [mean, standard_deviation] }"
)]
pub enum Standardise {
    /// `true`: every feature by the mean m and the unbiased standard deviation s of its own site's training
    /// rows, as (x - m) / (s + 1e-9).
    PerSite(bool),
    /// The named columns by the given m and s, as (x - m) / s; the others stay as they are.
    Constants(BTreeMap<String, [f64; 2]>),
}

/// How rows belong to sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a table of site names and their files, or { column = \"NAME\" }")]
pub enum Sites {
    /// One file holds all sites; the named column tells them apart.
    Column(SiteColumn),
    /// One file per site, relative to `path`.
    Files(BTreeMap<NodeName, PathBuf>),
}

/// The column whose value is the site's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteColumn {
    /// The column's name.
    pub column: String,
}

/// Which rows are held out for testing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "the name of a split file, or { test_fraction = 0.2 }, with id = \"COLUMN\" and key = \"TEXT\" if you like"
)]
pub enum SplitRule {
    /// A JSON file beside the data: `{"SITE": {"train": [rows], "test": [rows]}, …}`, or without sites
    /// `{"train": [rows], "test": [rows]}`. Row numbers start at 0 and count the rows of the raw file, the
    /// header excepted. A row in neither list is left out.
    File(PathBuf),
    /// A row is a test row where a BLAKE3 hash, keyed by `key`, falls below the fraction: the hash of its group,
    /// or of its cell in the column `id`, or else of its content. So neither the order of the rows nor any other row
    /// decides, and equal rows fall on the same side.
    Hashed(HashedSplit),
}

/// A split by a hash: see [`SplitRule::Hashed`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HashedSplit {
    /// Expected fraction of test rows, above 0 and below 1.
    pub test_fraction: f64,
    /// The column that tells rows apart, and is no feature; with `group` the group does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Another key gives another split; empty by default.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key: String,
}

/// Which half of an NPZ file is held out for testing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeldOut {
    /// `test_images` and `test_labels`.
    Test,
    /// `val_images` and `val_labels`, to choose settings by.
    Val,
}

/// The `[data]` table.
///
/// Keys that a source does not use are refused, so a forgotten one never passes silently.
///
/// ```
/// use tributary_client::data::DataConfig;
///
/// let config: DataConfig = toml::from_str(
///     r#"
///     source = "idx"
///     path = "mnist"
///     mean = 0.1307
///     standard_deviation = 0.3081
///     "#,
/// )?;
/// config.validate()?;
/// assert!(toml::from_str::<DataConfig>("source = \"idx\"\npth = \"mnist\"").is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Which kind of file holds the examples.
    pub source: Source,
    /// The file or folder, relative to the file that holds this table or to `--data DIR`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Read this site only: what a node's own configuration says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site: Option<NodeName>,
    /// Number of classes, 1 to 10,000; a label outside is an error. Absent: one more than the largest label,
    /// or what `label_rule` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<usize>,
    /// With differential privacy: the number of training examples, or with `group` of groups; rounded, public, declared
    /// once and not corrected when the data change. It scales the updates, and anybody may learn it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub declared_examples: Option<DeclaredExamples>,
    /// Whether the held-out examples are public, so that figures over them cost nothing with differential privacy;
    /// `false` by default.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub public_test: bool,
    /// What names the unit of privacy, such as the patient, whose examples then stay together: a column of a CSV
    /// table (any text; not a feature), or the arrays `train_NAME` and so on of an NPZ file (integers). Absent:
    /// every example is a unit of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,

    /// Images: subtracted from each value after its division by 255; 0 by default. A public constant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<PerChannel>,
    /// Images: divides each value after the subtraction; 1 by default. A public constant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standard_deviation: Option<PerChannel>,
    /// NPZ: which half is the test set; `test` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out: Option<HeldOut>,

    /// CSV: the columns' names, for files without a header line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// CSV: whether the first line names the columns; by default, if `columns` is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header: Option<bool>,
    /// CSV: the character between cells; `,` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delimiter: Option<char>,
    /// CSV: the label's column.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// CSV: how the label's cell becomes a class. Absent: the cell is the class, a whole number from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_rule: Option<LabelRule>,
    /// CSV: columns to leave out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drop: Vec<String>,
    /// CSV: what stands for a missing value, beside the empty cell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
    /// CSV: what happens to a row with a missing value in a kept column; `error` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing_rows: Option<MissingRows>,
    /// CSV: constants that stand in for missing values, by column, in the units of the file; rows that lack a value in
    /// another column follow `missing_rows`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub missing_value: BTreeMap<String, CellValue>,
    /// CSV: columns that become one 0/1 feature per category. Numeric columns come first, in the file's
    /// order; then the one-hot columns, in the file's order too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_hot: Option<OneHot>,
    /// CSV: whether the first category of each one-hot column has no feature of its own; `false` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop_first: Option<bool>,
    /// CSV: how features are brought to a common scale; not at all by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub standardise: Option<Standardise>,
    /// CSV: how rows belong to sites; absent, there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sites: Option<Sites>,
    /// CSV: which rows are test rows; none by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<SplitRule>,

    /// Synthetic: number of training images; 6,000 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub examples: Option<usize>,
    /// Synthetic: number of test images; 1,000 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test_examples: Option<usize>,
    /// Synthetic, both: which examples; 0 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Synthetic: standard deviation of the noise on each pixel, 0 to 1 on the scale black 0, white 1; 0.1
    /// by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise: Option<f64>,

    /// Synthetic federated: standard deviation of the users' mean weights, 0 to 100: how far their models differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Synthetic federated: standard deviation of the users' mean features, 0 to 100: how far their data differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// Synthetic federated: number of users, 1 to 10,000; 30 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub users: Option<usize>,
    /// Synthetic federated: whether all users draw from one distribution, labelled by one model, in place of
    /// `alpha` and `beta`; `false` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iid: Option<bool>,
}

impl DataConfig {
    /// The table with only its source set.
    pub fn new(source: Source) -> Self {
        Self {
            source,
            path: None,
            site: None,
            classes: None,
            declared_examples: None,
            public_test: false,
            group: None,
            mean: None,
            standard_deviation: None,
            held_out: None,
            columns: None,
            header: None,
            delimiter: None,
            label: None,
            label_rule: None,
            drop: Vec::new(),
            missing: None,
            missing_rows: None,
            missing_value: BTreeMap::new(),
            one_hot: None,
            drop_first: None,
            standardise: None,
            sites: None,
            split: None,
            examples: None,
            test_examples: None,
            seed: None,
            noise: None,
            alpha: None,
            beta: None,
            users: None,
            iid: None,
        }
    }

    /// Whether the examples belong to sites.
    pub fn has_sites(&self) -> bool {
        self.sites.is_some() || self.source == Source::SyntheticFederated
    }

    /// The number of examples that the node of `site` declares, or a node without sites.
    pub fn declared_examples_of(&self, site: Option<&NodeName>) -> Option<u64> {
        match self.declared_examples.as_ref()? {
            DeclaredExamples::One(examples) => Some(*examples),
            DeclaredExamples::BySite(sites) => sites.get(site?).copied(),
        }
    }

    /// The settings that are fitted to the data. Everything else is a constant, or looks at one example alone.
    pub fn fitted(&self) -> Vec<Fitted> {
        let read = matches!(self.source, Source::Idx | Source::Csv | Source::Npz | Source::Images);
        let settings = [
            (
                self.standardise == Some(Standardise::PerSite(true)),
                "standardise = true",
                "standardise = { COLUMN = [mean, standard_deviation] }, public constants",
            ),
            (
                matches!(self.one_hot, Some(OneHot::Fitted(_))),
                "one_hot = [COLUMN]",
                "one_hot = { COLUMN = [\"1\", \"2\"] }, with all categories",
            ),
            (
                matches!(self.split, Some(SplitRule::File(_))),
                "split = \"FILE\"",
                "split = { test_fraction = 0.2, id = \"COLUMN\" }, which looks at one row alone",
            ),
            (
                read && self.classes.is_none() && self.label_rule.is_none(),
                "the number of classes",
                "classes = 2, or as many as the job has",
            ),
        ];
        let fitted = settings.into_iter().filter(|(fitted, ..)| *fitted);
        fitted.map(|(_, setting, instead)| Fitted { setting, instead }).collect()
    }

    /// Checks everything that can be checked without opening a file.
    ///
    /// # Errors
    /// [`DataError::Config`] with the first key that is wrong.
    pub fn validate(&self) -> Result<(), DataError> {
        if self.source == Source::Images {
            return Err(config(
                "source",
                "\"images\" is not available yet: use idx, csv, npz, synthetic or synthetic-federated",
            ));
        }
        self.refuse_foreign_keys()?;
        if matches!(self.source, Source::Synthetic | Source::SyntheticFederated) {
            if self.path.is_some() {
                return Err(config("path", "a synthetic source reads no file: remove it"));
            }
        } else if self.path.is_none() {
            return Err(config("path", "missing: name the file or folder that holds the data"));
        }
        if self.classes.is_some_and(|classes| !(1..=CLASSES).contains(&classes)) {
            return Err(config("classes", format!("must be from 1 to {CLASSES}")));
        }
        self.validate_declared()?;
        for (key, constants) in [("mean", &self.mean), ("standard_deviation", &self.standard_deviation)] {
            let values = match constants {
                None => continue,
                Some(PerChannel::One(value)) => std::slice::from_ref(value),
                Some(PerChannel::Each(values)) => values,
            };
            if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
                return Err(config(key, "must be one finite number, or one per channel"));
            }
            if key == "standard_deviation" && values.iter().any(|value| *value <= 0.0) {
                return Err(config(key, "must be above 0"));
            }
        }
        if let Some(group @ ("" | "images" | "labels")) = self.group.as_deref() {
            return Err(config(
                "group",
                format!("\"{group}\" does not name groups: name what tells persons apart"),
            ));
        }
        match self.source {
            Source::Csv => self.validate_csv(),
            Source::Synthetic => self.validate_synthetic(),
            Source::SyntheticFederated => self.validate_synthetic_federated(),
            Source::Idx | Source::Npz | Source::Images => Ok(()),
        }
    }

    fn validate_declared(&self) -> Result<(), DataError> {
        let refuse = |problem: String| Err(config("declared_examples", problem));
        match &self.declared_examples {
            Some(DeclaredExamples::One(0)) => refuse("must be at least 1".into()),
            Some(DeclaredExamples::BySite(declared)) => {
                if let Some((site, _)) = declared.iter().find(|(_, examples)| **examples == 0) {
                    return refuse(format!("site \"{site}\": must be at least 1"));
                }
                if !self.has_sites() {
                    return refuse("there are no sites: write one number".into());
                }
                if let Some(site) = self.site.as_ref().filter(|site| !declared.contains_key(*site)) {
                    return refuse(format!("site \"{site}\" is missing"));
                }
                let Some(Sites::Files(files)) = &self.sites else { return Ok(()) };
                if let Some(site) = declared.keys().find(|site| !files.contains_key(site)) {
                    return refuse(format!("`sites` has no site \"{site}\""));
                }
                match files.keys().find(|site| !declared.contains_key(site)) {
                    Some(site) => refuse(format!("site \"{site}\" is missing")),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// The data's file or folder, seen from `base`.
    pub(super) fn location(&self, base: &Path) -> PathBuf {
        self.path.as_ref().map_or_else(|| base.to_path_buf(), |path| base.join(path))
    }

    fn refuse_foreign_keys(&self) -> Result<(), DataError> {
        let csv = self.source == Source::Csv;
        let synthetic = self.source == Source::Synthetic;
        let federated = self.source == Source::SyntheticFederated;
        let images = !csv && !federated;
        let keys = [
            ("mean", self.mean.is_some(), images),
            ("standard_deviation", self.standard_deviation.is_some(), images),
            ("held_out", self.held_out.is_some(), self.source == Source::Npz),
            ("group", self.group.is_some(), csv || self.source == Source::Npz),
            ("site", self.site.is_some(), csv),
            ("columns", self.columns.is_some(), csv),
            ("header", self.header.is_some(), csv),
            ("delimiter", self.delimiter.is_some(), csv),
            ("label", self.label.is_some(), csv),
            ("label_rule", self.label_rule.is_some(), csv),
            ("drop", !self.drop.is_empty(), csv),
            ("missing", self.missing.is_some(), csv),
            ("missing_rows", self.missing_rows.is_some(), csv),
            ("missing_value", !self.missing_value.is_empty(), csv),
            ("one_hot", self.one_hot.is_some(), csv),
            ("drop_first", self.drop_first.is_some(), csv),
            ("standardise", self.standardise.is_some(), csv),
            ("sites", self.sites.is_some(), csv),
            ("split", self.split.is_some(), csv),
            ("examples", self.examples.is_some(), synthetic),
            ("test_examples", self.test_examples.is_some(), synthetic),
            ("seed", self.seed.is_some(), synthetic || federated),
            ("noise", self.noise.is_some(), synthetic),
            ("alpha", self.alpha.is_some(), federated),
            ("beta", self.beta.is_some(), federated),
            ("users", self.users.is_some(), federated),
            ("iid", self.iid.is_some(), federated),
        ];
        match keys.iter().find(|(_, given, used)| *given && !*used) {
            Some((key, _, _)) => {
                Err(config(key, format!("source = \"{}\" does not use it: remove it", self.source.name())))
            }
            None => Ok(()),
        }
    }

    fn validate_csv(&self) -> Result<(), DataError> {
        if self.label.is_none() {
            return Err(config("label", "missing: name the column that holds the label"));
        }
        match (self.header, &self.columns) {
            (Some(true), Some(_)) => {
                return Err(config("columns", "the header line names the columns: give one or the other"));
            }
            (Some(false), None) => {
                return Err(config("columns", "missing: name the columns, since header = false"));
            }
            _ => {}
        }
        if self.delimiter.is_some_and(|d| !d.is_ascii() || matches!(d, '"' | '\n' | '\r')) {
            return Err(config("delimiter", "must be one ASCII character, neither a quote nor a line end"));
        }
        if let Some(LabelRule::Classes(values)) = &self.label_rule
            && (values.is_empty() || values.len() > CLASSES)
        {
            return Err(config("label_rule", format!("must list 1 to {CLASSES} values")));
        }
        let ruled = match &self.label_rule {
            Some(LabelRule::Classes(values)) => Some(values.len()),
            Some(LabelRule::Binary(_)) => Some(2),
            None => None,
        };
        if let (Some(classes), Some(ruled)) = (self.classes, ruled)
            && classes != ruled
        {
            return Err(config("classes", format!("says {classes}, but label_rule makes {ruled}")));
        }
        match (&self.site, &self.sites) {
            (Some(_), None) => {
                return Err(config("site", "there are no sites to choose from: give `sites` or remove it"));
            }
            (Some(site), Some(Sites::Files(files))) if !files.contains_key(site) => {
                return Err(config("site", format!("`sites` has no site \"{site}\"")));
            }
            (None, Some(Sites::Files(files))) if files.is_empty() => {
                return Err(config("sites", "must name at least one site"));
            }
            _ => {}
        }
        if self.site.is_some() && matches!(self.one_hot, Some(OneHot::Fitted(_))) {
            return Err(config(
                "one_hot",
                "one site cannot know the categories of all: declare them, as { cp = [\"1\", \"2\"] }",
            ));
        }
        if let Some(OneHot::Declared(columns)) = &self.one_hot
            && let Some((column, _)) = columns.iter().find(|(_, categories)| categories.is_empty())
        {
            return Err(config("one_hot", format!("column \"{column}\" has no categories")));
        }
        if let Some(Standardise::Constants(constants)) = &self.standardise {
            for (column, [mean, deviation]) in constants {
                if !mean.is_finite() || !deviation.is_finite() || *deviation <= 0.0 {
                    let problem =
                        format!("\"{column}\" needs [mean, standard_deviation], the latter above 0");
                    return Err(config("standardise", problem));
                }
            }
        }
        if let Some(SplitRule::Hashed(HashedSplit { test_fraction, id, .. })) = &self.split {
            if !(*test_fraction > 0.0 && *test_fraction < 1.0) {
                return Err(config("split", "test_fraction must be above 0 and below 1"));
            }
            if id.is_some() && self.group.is_some() {
                return Err(config("split", "`group` decides, so that a group stays together: remove id"));
            }
        }
        Ok(())
    }

    fn validate_synthetic(&self) -> Result<(), DataError> {
        const MOST: usize = 10_000_000;
        if self.examples.is_some_and(|n| !(1..=MOST).contains(&n)) {
            return Err(config("examples", format!("must be from 1 to {MOST}")));
        }
        if self.test_examples.is_some_and(|n| n > MOST) {
            return Err(config("test_examples", format!("must be at most {MOST}")));
        }
        if self.noise.is_some_and(|noise| !(0.0..=1.0).contains(&noise)) {
            return Err(config("noise", "must be from 0 to 1"));
        }
        if self.classes.is_some_and(|classes| classes != 10) {
            return Err(config("classes", "the synthetic digits have 10"));
        }
        Ok(())
    }

    fn validate_synthetic_federated(&self) -> Result<(), DataError> {
        const MOST: usize = 10_000;
        for (key, value) in [("alpha", self.alpha), ("beta", self.beta)] {
            match (value, self.iid == Some(true)) {
                (Some(_), true) => return Err(config(key, "iid users are all alike: remove it")),
                (None, false) => {
                    return Err(config(key, "missing: give alpha and beta, such as 1.0, or iid = true"));
                }
                (Some(value), false) if !(0.0..=100.0).contains(&value) => {
                    return Err(config(key, "must be from 0 to 100"));
                }
                _ => {}
            }
        }
        if self.users.is_some_and(|users| !(1..=MOST).contains(&users)) {
            return Err(config("users", format!("must be from 1 to {MOST}")));
        }
        if self.classes.is_some_and(|classes| classes != 10) {
            return Err(config("classes", "the synthetic users have 10"));
        }
        Ok(())
    }
}

/// Shorthand for [`DataError::Config`].
pub(super) fn config(key: &'static str, problem: impl Into<String>) -> DataError {
    DataError::Config { key, problem: problem.into() }
}
