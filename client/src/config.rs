//! A node's configuration: `node.toml`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;
use tributary_common::document::{self, DocumentError, Schema};
use tributary_common::model::to_bytes;

use crate::account::{self, AccountConfig};
use crate::data::{self, DataConfig, DataError, Dataset, DeclaredExamples, Split};
use crate::machine::{ExampleCounts, Profile, Role};
use crate::partition::{self, PartitionConfig, PartitionError, Population, Scheme};
use crate::policy::{self, Policy};
use crate::shard::Shard;

/// Longest configuration file, in bytes.
const FILE_BYTES: u64 = 1 << 20;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read ({cause})", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: std::io::Error,
    },
    /// The file is not understood, or a value is wrong.
    #[error("{}: {cause}", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: DocumentError,
    },
    /// The `[data]` table is wrong.
    #[error("{}: {cause}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: DataError,
    },
    /// The `[share]` table is wrong.
    #[error("{}: {}", path.display(), cause.to_string().replace("[partition]", "[share]").replace("[population]", "[share]"))]
    Share {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: PartitionError,
    },
}

/// The `[share]` table: one client's part of a data set, exactly as the simulator cuts it. For demonstrations
/// and tests, where all nodes read the same files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// As in a scenario's `[partition]`.
    pub scheme: Scheme,
    /// As in a scenario's `[partition]`.
    pub shards_per_client: Option<u32>,
    /// As in a scenario's `[partition]`.
    pub alpha: Option<f64>,
    /// As in a scenario's `[partition]`.
    pub power: Option<f64>,
    /// As in a scenario's `[partition]`.
    pub noise: Option<f64>,
    /// As in a scenario's `[partition]`.
    pub rotation_degrees: Option<f64>,
    /// As in a scenario's `[partition]`.
    pub intensity: Option<f64>,
    /// As in a scenario's `[partition]`, but needed unless the scheme draws nothing: write the job's seed.
    pub seed: Option<u64>,
    /// As in a scenario's `[population]`.
    pub clients: Option<u32>,
    /// As in a scenario's `[population]`.
    pub samples_per_client: Option<u32>,
    /// Which of the clients this node is, from 0.
    pub index: u32,
}

/// A node's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// The coordinator, such as `https://coordinator.example.org:7443`.
    pub server: String,
    /// The node's own folder, relative to the file; by default the file's folder.
    #[serde(default = "here")]
    pub dir: PathBuf,
    /// What the node is there for.
    #[serde(default)]
    pub role: Role,
    /// Longest time that a stop may take, to finish an upload.
    #[serde(default = "default_drain_seconds")]
    pub drain_seconds: u32,
    /// The node's data.
    pub data: DataConfig,
    /// One client's part of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
    /// What the node allows.
    #[serde(default)]
    pub policy: Policy,
    /// What its data may spend.
    #[serde(default)]
    pub account: AccountConfig,
}

fn here() -> PathBuf {
    ".".into()
}
fn default_drain_seconds() -> u32 {
    30
}

const SCHEMA: Schema = Schema {
    keys: &["server", "dir", "role", "drain_seconds"],
    tables: &[
        ("data", Some(&data::SCHEMA)),
        ("share", Some(&SHARE)),
        ("policy", Some(&policy::SCHEMA)),
        ("account", Some(&account::SCHEMA)),
    ],
};
const SHARE: Schema = Schema {
    keys: &[
        "scheme",
        "shards_per_client",
        "alpha",
        "power",
        "noise",
        "rotation_degrees",
        "intensity",
        "seed",
        "clients",
        "samples_per_client",
        "index",
    ],
    tables: &[],
};

/// A node's examples in memory.
#[derive(Debug, Clone)]
pub struct NodeData {
    /// Where they come from: one name for one file, however the configuration spells it.
    pub source: String,
    /// Shape of one example.
    pub example_shape: Vec<usize>,
    /// Classes of the whole data set.
    pub classes: usize,
    /// To train on.
    pub train: Shard,
    /// To evaluate on: the held-out set of an evaluator.
    pub test: Shard,
    /// How many training examples, or groups of them, the operator declares: the public number that stands in for
    /// the true one wherever there is differential privacy.
    pub declared_examples: Option<u64>,
}

impl NodeData {
    /// Whether all rows of a person are one unit of privacy.
    pub fn is_grouped(&self) -> bool {
        !self.train.examples.groups.is_empty() || !self.test.examples.groups.is_empty()
    }

    /// Digest of all examples, for the commitment in the node's own ledger.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key("tributary 2026 data set v1");
        for shard in [&self.train, &self.test] {
            let Split { features, labels, groups } = &*shard.examples;
            for part in features.chunks(1 << 14) {
                hasher.update(&to_bytes(part));
            }
            for label in labels {
                hasher.update(&label.to_le_bytes());
            }
            for group in groups {
                hasher.update(&group.to_le_bytes());
            }
            for index in shard.indices.iter() {
                hasher.update(&index.to_le_bytes());
            }
            hasher.update(&[0xff]);
        }
        hasher.finalize().into()
    }
}

impl NodeConfig {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// One line that names the file and the key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = crate::store::read_text(path, FILE_BYTES).map_err(|error| match error {
            crate::store::FolderError::Io { path, cause } => ConfigError::Io { path, cause },
            crate::store::FolderError::Locked(path) => {
                ConfigError::Io { path, cause: std::io::ErrorKind::ResourceBusy.into() }
            }
        })?;
        let in_file = |cause| ConfigError::Document { path: path.to_path_buf(), cause };
        let mut config = Self::parse(&text).map_err(in_file)?;
        config.data.validate().map_err(|cause| ConfigError::Data { path: path.to_path_buf(), cause })?;
        if let Some(share) = &config.share {
            share.check().map_err(|cause| ConfigError::Share { path: path.to_path_buf(), cause })?;
        }
        if config.dir != here() || !folder_of(path).as_os_str().is_empty() {
            let below = config.dir.strip_prefix(".").unwrap_or(&config.dir);
            config.dir = folder_of(path).join(below);
        }
        Ok(config)
    }

    fn parse(text: &str) -> Result<Self, DocumentError> {
        let table = document::parse(text)?;
        document::check_keys(&table, &SCHEMA)?;
        if !table.contains_key("data") {
            let message =
                "there is no [data] table: say which data this node has, as the comments in the file show";
            return Err(DocumentError::Value(message.into()));
        }
        let config: Self = document::read(table)?;
        let host = config.server.strip_prefix("https://");
        if host.is_none_or(|host| host.is_empty() || host.contains(['/', ' ', '@'])) {
            let message = format!("server = {:?}: write https://HOST:PORT", config.server);
            return Err(DocumentError::Value(message));
        }
        config.account.check().map_err(DocumentError::Value)?;
        config.policy.check_values().map_err(DocumentError::Value)?;
        if config.drain_seconds > 3600 {
            let message = format!("drain_seconds = {}: 0 to 3600 are possible", config.drain_seconds);
            return Err(DocumentError::Value(message));
        }
        if matches!(config.data.declared_examples, Some(DeclaredExamples::BySite(_)))
            && config.data.site.is_none()
            && config.share.as_ref().is_none_or(|share| share.scheme != Scheme::Natural)
        {
            let message =
                "[data] declared_examples: a node declares one number: write it, or give [data] site";
            return Err(DocumentError::Value(message.into()));
        }
        Ok(config)
    }

    /// Loads the node's data; paths in `[data]` are relative to the folder of the configuration file.
    ///
    /// # Errors
    /// One line that names the file and the record, or the key of `[share]`.
    pub fn load_data(&self, config_path: &Path) -> Result<NodeData, ConfigError> {
        let in_data = |cause| ConfigError::Data { path: config_path.to_path_buf(), cause };
        let dataset = data::load(&self.data, &folder_of(config_path)).map_err(in_data)?;
        let parts = self.share.as_ref().map(|share| share.of(&dataset)).transpose();
        let parts = parts.map_err(|cause| ConfigError::Share { path: config_path.to_path_buf(), cause })?;
        let site = parts.as_ref().map(|parts| &parts.name).or(self.data.site.as_ref());
        let declared_examples = self.data.declared_examples_of(site);
        let Dataset { example_shape, classes, train, test, .. } = dataset;
        let (mut train, mut test) = (Shard::whole(train), Shard::whole(test));
        if let Some(parts) = parts {
            (train.indices, train.shift) = (parts.train, parts.shift);
            train = train.as_seen();
            // Only sites have test examples of their own; every other share evaluates on all.
            if !parts.test.is_empty() {
                test.indices = parts.test;
            }
        }
        if let Some(declared) = declared_examples.filter(|declared| far_off(*declared, train.units())) {
            // For the operator's own eyes: nobody else learns how many there are.
            tracing::warn!(
                "[data] declared_examples = {declared}, but there are {}: updates are scaled by the declared number, \
                 so they come out too large or too small; if the number was a mistake, declare another rounded one between jobs",
                train.units()
            );
        }
        let path = self.data.path.as_ref().map(|path| folder_of(config_path).join(path));
        let source = match path {
            Some(path) => path.canonicalize().unwrap_or(path).display().to_string(),
            None => "generated".to_owned(),
        };
        Ok(NodeData { source, example_shape, classes, train, test, declared_examples })
    }

    /// What the node's machine knows of it.
    pub fn profile(&self, data: &NodeData) -> Profile {
        Profile {
            role: self.role,
            policy: self.policy.clone(),
            example_shape: data.example_shape.clone(),
            classes: data.classes,
            public_test: self.data.public_test,
            declared_examples: data.declared_examples,
            fitted: self.data.fitted().iter().map(ToString::to_string).collect(),
            grouped: data.is_grouped(),
            drain_seconds: self.drain_seconds,
        }
    }
}

impl NodeData {
    /// How many examples there are.
    pub fn counts(&self) -> ExampleCounts {
        ExampleCounts { train: self.train.len() as u64, test: self.test.len() as u64 }
    }
}

impl Share {
    fn tables(&self) -> (PartitionConfig, Population) {
        let Self {
            scheme, shards_per_client, alpha, power, noise, rotation_degrees, intensity, seed, ..
        } = *self;
        (
            PartitionConfig {
                scheme,
                shards_per_client,
                alpha,
                power,
                noise,
                rotation_degrees,
                intensity,
                seed,
            },
            Population { clients: self.clients, samples_per_client: self.samples_per_client },
        )
    }

    fn check(&self) -> Result<(), PartitionError> {
        let (partition, population) = self.tables();
        if self.seed.is_none() && self.scheme != Scheme::Natural {
            let message = "[share] seed is missing: write the job's seed, as the simulator would use it";
            return Err(PartitionError::Invalid(message.into()));
        }
        partition.validate(&population)
    }

    fn of(&self, dataset: &Dataset) -> Result<partition::Share, PartitionError> {
        let (partition, population) = self.tables();
        let mut shares = partition::partition(&partition, &population, self.seed.unwrap_or(0), dataset)?;
        let (index, clients) = (self.index as usize, shares.len());
        if index >= clients {
            let message = format!("[share] index = {index}: there are {clients} clients, counted from 0");
            return Err(PartitionError::Invalid(message));
        }
        Ok(shares.swap_remove(index))
    }
}

/// Whether a declared number is off by more than a factor of two.
fn far_off(declared: u64, units: usize) -> bool {
    let units = units as u64;
    declared > units.saturating_mul(2) || units > declared.saturating_mul(2)
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_path_buf()
}

/// The commented configuration that `join` writes.
pub fn default_toml(server: &str) -> String {
    format!(
        r#"# A Tributary node. Check it with `tributary-client preflight --config FILE`.

# The coordinator. The node dials out to it; nothing listens here.
server = {server:?}

# The node's own folder, with its private key; relative to this file.
dir = "."

# "trainer" trains on its data; "evaluator" only evaluates models on the test part of its data.
role = "trainer"

# Longest time that a stop may take, to finish an upload.
drain_seconds = 30

# The data: idx, csv, npz or synthetic (digits drawn by the program, for a first try). Paths are relative to
# this file. The node does not start until this table says which data it has.
# [data]
# source = "csv"
# path = "patients.csv"
# header = true
# label = "outcome"
# With differential privacy, the public, rounded number of training examples:
# declared_examples = 200

[policy]
# Counts below this are hidden from evaluation reports.
minimum_cell = 10
# Smallest quorum ([cohort] minimum) of a job that this node takes part in.
minimum_cohort = 1
# Most SGD steps that one round may ask for.
# maximum_local_steps = 10000
# The only architectures that may be trained.
# allowed_architectures = ["logistic", "small-cnn"]
# Only jobs whose updates are masked, so that the coordinator sees none but their sum; and how many other nodes that you
# know (`tributary-client peers pin`) must be in it.
# require_masks = true
# minimum_pinned_survivors = 2
"#
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn error(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        std::fs::write(&path, text).unwrap();
        let message = NodeConfig::load(&path).unwrap_err().to_string();
        assert!(message.starts_with(&path.display().to_string()) && !message.contains('\n'), "{message}");
        message
    }

    #[test]
    fn the_configuration_that_join_writes_needs_data_and_is_valid_with_them() {
        let written = default_toml("https://localhost:7443");
        // A hospital that forgot to name its data must not train on anything else.
        assert!(error(&written).contains("say which data this node has"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        let uncommented = ["[data]", "source = \"csv\"", "path =", "header =", "label ="]
            .iter()
            .fold(written, |text, line| text.replace(&format!("# {line}"), line));
        std::fs::write(&path, uncommented).unwrap();
        let config = NodeConfig::load(&path).unwrap();
        assert_eq!((config.role, config.drain_seconds), (Role::Trainer, 30));
        assert_eq!(config.policy, Policy::default());
        assert_eq!(config.dir, dir.path());
    }

    #[test]
    fn wrong_keys_and_values_are_named() {
        let with = |more: &str| format!("server = 'https://h:1'\n{more}\n[data]\nsource = 'synthetic'\n");
        assert!(error(&with("drain_second = 1")).contains("did you mean `drain_seconds`?"));
        assert!(error(&with("role = 'trainr'")).contains("unknown variant `trainr`"));
        assert!(error(&with("drain_seconds = 4000")).contains("drain_seconds = 4000"));
        assert!(error(&with("[policy]\nminimum_cel = 1")).contains("did you mean `policy.minimum_cell`?"));
        assert!(error(&with("[policy]\nallowed_architectures = ['cnn']")).contains("unknown variant `cnn`"));
        assert!(error(&with("[share]\nscheme = 'iid'\nclients = 2\nindex = 0")).contains("[share] seed"));
        assert!(
            error(&with("[share]\nscheme = 'shards'\nclients = 2\nindex = 0\nseed = 1")).contains("[share]")
        );
        assert!(
            error("server = 'http://h:1'\n[data]\nsource = 'synthetic'").contains("write https://HOST:PORT")
        );
        assert!(error("server = 'https://h:1'\n[data]\nsource = 'idx'").contains("[data] path: missing"));
        assert!(
            error("server = 'https://h:1'\n[data]\nsource = 'idx'\npth = 1")
                .contains("did you mean `data.path`?")
        );
        assert!(error("server = 'https://h:1'").contains("there is no [data] table"));
        assert!(error("server = ").contains("not TOML: line 1"));
    }

    #[test]
    fn a_node_declares_one_number_of_examples() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("table.csv"), "x,who,at,y\n1,a,n,0\n2,a,n,1\n3,b,n,0\n4,c,s,1\n")
            .unwrap();
        let path = dir.path().join("node.toml");
        let text = |keys: &str, more: &str| {
            format!(
                "server = 'https://h:1'\n[data]\nsource = 'csv'\npath = 'table.csv'\nlabel = 'y'\ndrop = ['who']\n\
                 sites = {{ column = 'at' }}\n{keys}\n{more}"
            )
        };
        let declared = |keys: &str, more: &str| {
            std::fs::write(&path, text(keys, more)).unwrap();
            NodeConfig::load(&path).unwrap().load_data(&path).unwrap().declared_examples
        };
        let by_site = "declared_examples = { n = 40, s = 2 }";
        assert_eq!(declared("", ""), None);
        assert_eq!(declared("declared_examples = 200", ""), Some(200));
        assert_eq!(declared(&format!("site = 's'\n{by_site}"), ""), Some(2));
        assert_eq!(declared(by_site, "[share]\nscheme = 'natural'\nindex = 0"), Some(40));
        assert!(error(&text(by_site, "")).contains("a node declares one number"));
        let iid = "[share]\nscheme = 'iid'\nclients = 2\nindex = 0\nseed = 1";
        assert!(error(&text(by_site, iid)).contains("a node declares one number"));
        assert!(error(&text("declared_examples = -1", "")).contains("a whole number, or a table of sites"));
        assert!(error(&text("declared_example = 1", "")).contains("did you mean `data.declared_examples`?"));

        // Three rows of two people: the declared number is of people where there are groups.
        assert!([2, 3, 6].iter().all(|declared| !far_off(*declared, 3)) && far_off(1, 3) && far_off(7, 3));
        let grouped = text("site = 'n'\ngroup = 'who'", "").replace("drop = ['who']\n", "");
        std::fs::write(&path, grouped).unwrap();
        let data = NodeConfig::load(&path).unwrap().load_data(&path).unwrap();
        assert_eq!((data.train.len(), data.train.units()), (3, 2));
    }

    #[test]
    fn a_share_is_the_simulators() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        let load = |index: u32| {
            let text = format!(
                "server = 'https://h:1'\n[data]\nsource = 'synthetic'\nexamples = 50\ntest_examples = 10\n\
                 [share]\nscheme = 'iid'\nclients = 5\nindex = {index}\nseed = 3\n"
            );
            std::fs::write(&path, text).unwrap();
            NodeConfig::load(&path).unwrap().load_data(&path)
        };
        let mut seen: Vec<u32> = Vec::new();
        for index in 0..5 {
            let data = load(index).unwrap();
            assert_eq!(data.counts(), ExampleCounts { train: 10, test: 10 });
            seen.extend(data.train.indices.iter());
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..50).collect::<Vec<u32>>());
        assert!(load(5).unwrap_err().to_string().contains("[share] index = 5: there are 5 clients"));
    }

    #[test]
    fn a_shifted_share_lies_in_memory_as_the_simulated_client_sees_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        let keys = "scheme = 'feature-shift'\nnoise = 0.2\nrotation_degrees = 20.0\nintensity = 0.1";
        let data = "source = 'synthetic'\nexamples = 50\ntest_examples = 10";
        let text = format!(
            "server = 'https://h:1'\n[data]\n{data}\n[share]\n{keys}\nclients = 5\nindex = 3\nseed = 3\n"
        );
        std::fs::write(&path, text).unwrap();
        let node = NodeConfig::load(&path).unwrap().load_data(&path).unwrap();
        let dataset = data::load(&toml::from_str(data).unwrap(), dir.path()).unwrap();
        let population = Population { clients: Some(5), samples_per_client: None };
        let partition = toml::from_str(keys).unwrap();
        let mut shares = partition::partition(&partition, &population, 3, &dataset).unwrap();
        let partition::Share { train, shift, .. } = shares.swap_remove(3);
        let simulated = Shard { examples: dataset.train.clone(), indices: train, shift }.as_seen();
        assert_eq!((&node.train.examples, &node.train.indices), (&simulated.examples, &simulated.indices));
        assert_ne!(node.train.as_seen().examples.features, dataset.train.features[..10 * 784]);
        assert!(Arc::ptr_eq(&node.train.as_seen().examples, &node.train.examples), "it is shifted once");
        assert_eq!(node.test.examples, dataset.test);
    }
}
