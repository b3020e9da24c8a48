//! What a node trains on: readers for IDX, CSV and NPZ files, two generated data sets, and their checks.
//!
//! Every reader ends in the same [`Dataset`]: one resident buffer of `f32` for training and one for testing,
//! with the rows of each site side by side, so a simulated population shares it by lists of indices. Files
//! are taken for hostile: a header's promise is checked against the file before memory is reserved, gzip
//! and zip members are read to the declared size and one byte more, and each refusal is one line that names
//! the file and the record.
//!
//! ```
//! use tributary_client::data::{self, DataConfig};
//!
//! let config: DataConfig = toml::from_str("source = \"synthetic\"\nexamples = 200\ntest_examples = 50")?;
//! let dataset = data::load(&config, std::path::Path::new("."))?;
//! assert_eq!((dataset.example_shape.as_slice(), dataset.classes), ([1, 28, 28].as_slice(), 10));
//! assert_eq!(dataset.train.features.len(), 200 * 784);
//! dataset.check(&[1, 28, 28], 10)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod csv;
pub mod fetch;
mod idx;
mod images;
mod npz;
mod synthetic;
mod synthetic_federated;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;

pub use config::{
    BinaryRule, CellValue, DataConfig, DeclaredExamples, Fitted, HashedSplit, HeldOut, LabelRule,
    MissingRows, OneHot, PerChannel, Positive, SCHEMA, SiteColumn, Sites, Source, SplitRule, Standardise,
};

/// Most values (examples × values per example) of one half of a data set: 16 GiB of `f32`.
pub const VALUES: usize = 1 << 32;
/// Most examples of one half of a data set.
pub const EXAMPLES: usize = 1 << 31;
/// Most bytes of one CSV or split file.
pub const TEXT_FILE_BYTES: u64 = 4 << 30;

/// Why data cannot be loaded. Each displays as one line: what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A key of the `[data]` table is wrong.
    #[error("[data] {key}: {problem}")]
    Config {
        /// The key.
        key: &'static str,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A file cannot be opened or read.
    #[error("{}: cannot be read ({cause}): check [data] path, or give --data DIR", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// A file as a whole is wrong.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// One record of a file is wrong.
    #[error("{}, {record}: {problem}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Which record: a line (from 1), or an image, label or row (from 0).
        record: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// Good data, but not for this job.
    #[error("the data do not fit the job: {0}")]
    Misfit(String),
}

/// Training or test examples.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Split {
    /// Row-major, examples × values per example; all finite.
    pub features: Vec<f32>,
    /// One class per example, from 0.
    pub labels: Vec<i64>,
    /// The unit of privacy of each example, such as a patient: dense ids in the order of first appearance. Empty
    /// without `[data] group`: every example is a unit of its own.
    pub groups: Vec<u32>,
}

impl Split {
    /// Number of examples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no example.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Number of units of privacy: groups, or without groups examples.
    pub fn units(&self) -> usize {
        if self.groups.is_empty() {
            return self.len();
        }
        self.groups.iter().max().map_or(0, |last| *last as usize + 1)
    }
}

/// Dense ids of groups, in the order of their first appearance.
#[derive(Debug)]
pub(crate) struct Groups<K>(BTreeMap<K, u32>);

impl<K> Default for Groups<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord> Groups<K> {
    /// The id of the group that `key` names.
    pub(crate) fn id(&mut self, key: K) -> u32 {
        // There are no more groups than examples, whose number fits.
        let next = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        *self.0.entry(key).or_insert(next)
    }
}

/// One hospital, one device, one owner of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// The site's name: in a simulation also the client's.
    pub name: NodeName,
    /// The site's rows in [`Dataset::train`].
    pub train: Range<usize>,
    /// The site's rows in [`Dataset::test`].
    pub test: Range<usize>,
}

/// A loaded data set; a clone shares its memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Shape of one example: `[features]` for tables, `[channels, height, width]` for images.
    pub example_shape: Vec<usize>,
    /// Number of classes; every label is below it.
    pub classes: usize,
    /// Examples to train on; at least one.
    pub train: Arc<Split>,
    /// Examples held out; may be empty.
    pub test: Arc<Split>,
    /// The sites, by name, if the data have any; their ranges cover both halves.
    pub sites: Option<Vec<Site>>,
}

impl Dataset {
    /// BLAKE3 over shapes, sites, features, labels and groups: equal digests mean equal training.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key("tributary 2026 data set digest v1");
        let number = |hasher: &mut blake3::Hasher, n: usize| {
            hasher.update(&(n as u64).to_le_bytes());
        };
        number(&mut hasher, self.example_shape.len());
        for size in &self.example_shape {
            number(&mut hasher, *size);
        }
        number(&mut hasher, self.classes);
        number(&mut hasher, self.sites.as_ref().map_or(0, |sites| sites.len() + 1));
        for site in self.sites.iter().flatten() {
            number(&mut hasher, site.name.as_str().len());
            hasher.update(site.name.as_str().as_bytes());
            for end in [site.train.start, site.train.end, site.test.start, site.test.end] {
                number(&mut hasher, end);
            }
        }
        for split in [&self.train, &self.test] {
            number(&mut hasher, split.len());
            let mut bytes = Vec::with_capacity(4 * 16_384);
            for block in split.features.chunks(16_384) {
                bytes.clear();
                bytes.extend(block.iter().flat_map(|value| value.to_le_bytes()));
                hasher.update(&bytes);
            }
            for block in split.labels.chunks(8_192) {
                bytes.clear();
                bytes.extend(block.iter().flat_map(|label| label.to_le_bytes()));
                hasher.update(&bytes);
            }
            // Nothing is added without groups, so that the digests of such data stay what they were.
            for block in split.groups.chunks(16_384) {
                bytes.clear();
                bytes.extend(block.iter().flat_map(|group| group.to_le_bytes()));
                hasher.update(&bytes);
            }
        }
        hasher.finalize().into()
    }

    /// Checks that a model with `inputs` and `classes` can train on these data.
    ///
    /// The shapes agree if they are equal, or if the model takes one flat vector with as many values.
    ///
    /// # Errors
    /// [`DataError::Misfit`].
    pub fn check(&self, inputs: &[usize], classes: usize) -> Result<(), DataError> {
        let values: usize = self.example_shape.iter().product();
        if inputs != self.example_shape && inputs != [values] {
            return Err(DataError::Misfit(format!(
                "one example has shape {:?}, the job's [model] inputs = {inputs:?}: set inputs = {:?}",
                self.example_shape, self.example_shape
            )));
        }
        if self.classes > classes {
            return Err(DataError::Misfit(format!(
                "they have {} classes, the job's [model] classes = {classes}: set classes = {}",
                self.classes, self.classes
            )));
        }
        Ok(())
    }
}

/// Loads the data that `config` describes, with paths relative to `base`.
///
/// # Errors
/// A [`DataError`] for the first thing that is wrong.
pub fn load(config: &DataConfig, base: &Path) -> Result<Dataset, DataError> {
    config.validate()?;
    let location = config.location(base);
    match config.source {
        Source::Idx => idx::load(config, &location),
        Source::Csv => csv::load(config, &location),
        Source::Npz => npz::load(config, &location),
        Source::Synthetic => synthetic::load(config),
        Source::SyntheticFederated => synthetic_federated::load(config),
        Source::Images => Err(config::config("source", "\"images\" is not available yet")),
    }
}

/// Loads data for a model with `inputs` and `classes`.
///
/// As [`load`] and [`Dataset::check`], but a label that the model cannot tell is named with its file and
/// record.
///
/// # Errors
/// As [`load`] and [`Dataset::check`].
pub fn load_for(
    config: &DataConfig,
    base: &Path,
    inputs: &[usize],
    classes: usize,
) -> Result<Dataset, DataError> {
    let mut config = config.clone();
    // Where the table declares its classes, or a rule makes them, `check` compares the two numbers.
    let drawn = matches!(config.source, Source::Synthetic | Source::SyntheticFederated);
    if config.classes.is_none() && config.label_rule.is_none() && !drawn {
        config.classes = Some(classes);
    }
    let dataset = load(&config, base)?;
    dataset.check(inputs, classes)?;
    Ok(dataset)
}

/// Opens a regular file and tells its length in bytes.
fn open(path: &Path) -> Result<(File, u64), DataError> {
    let io = |cause| DataError::Io { path: path.to_path_buf(), cause };
    // Before opening: a pipe or a device would block or never end.
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(file(path, "is not a regular file"));
    }
    Ok((File::open(path).map_err(io)?, metadata.len()))
}

/// Reads exactly `expected` bytes and then the end.
///
/// Memory grows with what is read, never with what was promised.
fn read_exactly(path: &Path, what: &str, expected: u64, reader: impl Read) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    reader
        .take(expected.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|cause| damaged(path, what, &cause))?;
    let found = bytes.len() as u64;
    if found < expected {
        return Err(file(
            path,
            format!(
                "{what} is truncated: its header promises {expected} bytes of data, {found} follow; fetch it again"
            ),
        ));
    }
    if found > expected {
        return Err(file(
            path,
            format!(
                "{what} is too long: bytes follow the {expected} that its header promises; fetch it again"
            ),
        ));
    }
    Ok(bytes)
}

/// A compressed stream that breaks off or fails its check.
fn damaged(path: &Path, what: &str, cause: &io::Error) -> DataError {
    let problem = if cause.kind() == io::ErrorKind::UnexpectedEof {
        format!("{what} is truncated; fetch it again")
    } else {
        format!("{what} is damaged ({cause}); fetch it again")
    };
    file(path, problem)
}

/// The number of classes: as declared, or as many as the labels need.
fn classes(declared: Option<usize>, halves: [&Split; 2]) -> usize {
    let largest = halves.iter().flat_map(|split| &split.labels).max().copied().unwrap_or(0);
    declared.unwrap_or_else(|| usize::try_from(largest).unwrap_or(0) + 1)
}

/// Shorthand for [`DataError::File`].
fn file(path: &Path, problem: impl Into<String>) -> DataError {
    DataError::File { path: path.to_path_buf(), problem: problem.into() }
}

/// Shorthand for [`DataError::Record`].
fn record(path: &Path, record: impl Into<String>, problem: impl Into<String>) -> DataError {
    DataError::Record { path: path.to_path_buf(), record: record.into(), problem: problem.into() }
}

#[cfg(test)]
mod tests;
