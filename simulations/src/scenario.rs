//! The scenario file: a job, and what a real federation brings by itself: data, a population, policies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use toml::{Table, Value};
use tributary_client::data::{self, DataConfig, DataError, Dataset, DeclaredExamples};
use tributary_client::partition::{self, PartitionConfig, PartitionError, Population, Scheme, Share};
use tributary_client::policy::{self, Policy};
use tributary_common::document::{self, DocumentError, Schema};
use tributary_common::ids::NodeName;
use tributary_common::job::{self, Job, JobError, Privacy, PrivacyUnit};

use crate::attacks::{self, AttacksConfig};
use crate::devices::{self, Devices, DevicesConfig, DevicesError, Trace};
use crate::faults::{self, FaultsConfig};

/// Largest scenario file that is read.
const FILE_BYTES: u64 = 256 * 1024;

/// The keys of a scenario file.
pub const SCHEMA: Schema = Schema {
    keys: &[],
    tables: &[
        ("job", None),
        ("population", Some(&partition::POPULATION_SCHEMA)),
        ("data", Some(&data::SCHEMA)),
        ("partition", Some(&partition::SCHEMA)),
        ("policy", Some(&policy::SCHEMA)),
        ("devices", Some(&devices::SCHEMA)),
        ("faults", Some(&faults::SCHEMA)),
        ("attacks", Some(&attacks::SCHEMA)),
    ],
};

/// Why a scenario is refused. Each displays as one line that names the file.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// A file cannot be read.
    #[error("{}: cannot be read ({cause}){hint}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: std::io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// The file is not understood.
    #[error("{}: {error}", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: DocumentError,
    },
    /// The job is refused.
    #[error("{}: {error}", path.display())]
    Job {
        /// The file that holds the job.
        path: PathBuf,
        /// What is wrong.
        error: JobError,
    },
    /// A job where a scenario is needed.
    #[error(
        "{}: this is a job, and names no data: write a scenario file with job = {:?} and a [data] table, and run that",
        path.display(),
        path.file_name().unwrap_or_default()
    )]
    PlainJob {
        /// The file.
        path: PathBuf,
    },
    /// Something else about the scenario is wrong.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// An override from the command line is wrong.
    #[error("--set {assignment}: {error}")]
    Override {
        /// The override.
        assignment: String,
        /// What is wrong.
        error: DocumentError,
    },
    /// The data cannot be loaded, or do not fit.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The data cannot be shared so.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// The devices' trace cannot be read, or does not fit the population.
    #[error(transparent)]
    Devices(#[from] DevicesError),
}

/// What the command line changes in a scenario.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `key=value` pairs: keys of the job's tables reach the job, keys of the scenario's own the scenario.
    pub set: Vec<String>,
    /// The folder that `[data] path` is relative to.
    pub data: Option<PathBuf>,
    /// The run's seed.
    pub seed: Option<u64>,
}

/// A checked scenario.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// The job.
    pub job: Job,
    /// Who there is.
    pub population: Population,
    /// What there is to learn from.
    pub data: DataConfig,
    /// How the population shares it.
    pub partition: PartitionConfig,
    /// How fast the clients are, and when they are there.
    pub devices: DevicesConfig,
    /// What goes wrong.
    pub faults: FaultsConfig,
    /// Who is hostile, and how.
    pub attacks: Option<AttacksConfig>,
    /// What every client allows; `minimum_cell` is 0 unless the scenario says otherwise.
    pub policy: Policy,
    /// The folder that `data.path` is relative to.
    pub base: PathBuf,
    /// The scenario's file, for messages.
    pub path: PathBuf,
}

/// A scenario's data and who has which part of them.
#[derive(Debug)]
pub struct Federation {
    /// The data.
    pub dataset: Dataset,
    /// The clients, by name.
    pub shares: Vec<Share>,
    /// Their devices.
    pub devices: Devices,
}

impl Scenario {
    /// Reads and checks the scenario in `path`, with `overrides` applied.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn read(path: &Path, overrides: &Overrides) -> Result<Self, ScenarioError> {
        let document = |error| ScenarioError::Document { path: path.to_path_buf(), error };
        let invalid = |problem: String| ScenarioError::Invalid { path: path.to_path_buf(), problem };
        let mut table = document::parse(&read_text(path, ": name a scenario file")?).map_err(document)?;
        if table.keys().any(|key| is_jobs(key)) {
            return Err(ScenarioError::PlainJob { path: path.to_path_buf() });
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let (job_path, mut job_table) = match table.remove("job") {
            Some(Value::Table(inline)) => (path.to_path_buf(), inline),
            Some(Value::String(name)) => {
                let job_path = folder.join(name);
                let text = read_text(&job_path, ": `job` names a file beside the scenario")?;
                let table = document::parse(&text);
                let table =
                    table.map_err(|error| ScenarioError::Document { path: job_path.clone(), error })?;
                (job_path, table)
            }
            Some(_) => return Err(invalid("`job` must be a file's name, or a table: write [job]".into())),
            None => {
                return Err(invalid("`job` is missing: name the job's file, or write it under [job]".into()));
            }
        };
        apply(&overrides.set, &mut table, &mut job_table)?;
        if let Some(seed) = overrides.seed {
            let seed =
                i64::try_from(seed).map_err(|_| invalid(format!("--seed {seed}: at most {}", i64::MAX)))?;
            job_table.insert("seed".into(), Value::Integer(seed));
        }
        let job = Job::from_table(job_table).map_err(|error| ScenarioError::Job { path: job_path, error })?;

        document::check_keys(&table, &SCHEMA).map_err(document)?;
        let data = table.remove("data").ok_or_else(|| {
            invalid("[data] is missing: say what to learn from, such as source = \"synthetic\"".into())
        })?;
        let data: DataConfig = read_table("data", data).map_err(document)?;
        let at_path = |error: String| ScenarioError::Invalid { path: path.to_path_buf(), problem: error };
        data.validate().map_err(|error| at_path(error.to_string()))?;
        let population: Population = match table.remove("population") {
            Some(value) => read_table("population", value).map_err(document)?,
            None => Population::default(),
        };
        let partition = match table.remove("partition") {
            Some(value) => read_table("partition", value).map_err(document)?,
            None if data.has_sites() => PartitionConfig::new(Scheme::Natural),
            None => PartitionConfig::new(Scheme::Iid),
        };
        partition.validate(&population).map_err(|error| at_path(error.to_string()))?;
        let by_site = matches!(data.declared_examples, Some(DeclaredExamples::BySite(_)));
        if by_site && partition.scheme != Scheme::Natural {
            let problem = "[data] declared_examples: only the clients of partition \"natural\" are sites: write one \
                           number, which every client declares";
            return Err(invalid(problem.into()));
        }
        let mut devices: DevicesConfig = match table.remove("devices") {
            Some(value) => read_table("devices", value).map_err(document)?,
            None => DevicesConfig::default(),
        };
        devices.validate().map_err(|error| at_path(error.to_string()))?;
        devices.trace = devices.trace.map(|trace| folder.join(trace));
        let faults: FaultsConfig = match table.remove("faults") {
            Some(value) => read_table("faults", value).map_err(document)?,
            None => FaultsConfig::default(),
        };
        faults.validate(&job).map_err(|error| at_path(error.to_string()))?;
        let attacks: Option<AttacksConfig> = match table.remove("attacks") {
            Some(value) => Some(read_table("attacks", value).map_err(document)?),
            None => None,
        };
        attacks.as_ref().map_or(Ok(()), AttacksConfig::validate).map_err(at_path)?;
        let mut policy = match table.remove("policy") {
            Some(Value::Table(policy)) => policy,
            _ => Table::new(),
        };
        policy.entry("minimum_cell").or_insert(Value::Integer(0));
        policy.entry("trust_coordinator_noise").or_insert(Value::Boolean(true));
        let policy = document::read(policy).map_err(document)?;
        let base = overrides.data.clone().unwrap_or_else(|| folder.to_path_buf());
        let path = path.to_path_buf();
        Ok(Self { job, population, data, partition, devices, faults, attacks, policy, base, path })
    }

    /// Loads the data and shares them among the clients.
    ///
    /// # Errors
    /// Data that cannot be read, do not fit the job or cannot be shared so; a population that cannot run the job.
    pub fn federation(&self) -> Result<Federation, ScenarioError> {
        self.share(self.load()?)
    }

    /// Loads the data, for [`Scenario::share`].
    ///
    /// # Errors
    /// Data that cannot be read or do not fit the job.
    pub fn load(&self) -> Result<Dataset, ScenarioError> {
        let model = &self.job.model;
        Ok(data::load_for(&self.data, &self.base, &model.inputs, model.classes)?)
    }

    /// Shares loaded data among the clients.
    ///
    /// # Errors
    /// Data that cannot be shared so; a population that cannot run the job.
    pub fn share(&self, dataset: Dataset) -> Result<Federation, ScenarioError> {
        let invalid = |problem: String| ScenarioError::Invalid { path: self.path.clone(), problem };
        let mut shares = partition::partition(&self.partition, &self.population, self.job.seed, &dataset)?;
        shares.sort_by(|a, b| a.name.cmp(&b.name));
        let (clients, least) = (shares.len(), self.job.cohort.minimum);
        if clients < least as usize {
            return Err(invalid(format!(
                "there are {clients} clients, but [cohort] minimum = {least}: raise [population] clients or lower it"
            )));
        }
        if let Some(share) = shares.iter().find(|share| share.train.is_empty()) {
            return Err(invalid(format!("client {} has no training examples", share.name)));
        }
        self.check_privacy().map_err(invalid)?;
        if self.data.declared_examples.is_some()
            && let Some(share) =
                shares.iter().find(|share| self.data.declared_examples_of(Some(&share.name)).is_none())
        {
            return Err(invalid(format!("[data] declared_examples: site \"{}\" is missing", share.name)));
        }
        if self.job.evaluation.federated && shares.iter().all(|share| share.test.is_empty()) {
            return Err(invalid(
                "[evaluation] federated = true, but no client has test examples of its own: use partition \
                 \"natural\" with data that have sites and a split, or set it to false"
                    .into(),
            ));
        }
        let trace = self.devices.trace.as_deref().map(Trace::read).transpose()?;
        if let Some(trace) = &trace {
            trace.check(&shares.iter().map(|share| &share.name).collect::<Vec<&NodeName>>())?;
        }
        let devices = Devices::new(self.job.seed, self.devices.clone(), trace.map(Arc::new));
        Ok(Federation { dataset, shares, devices })
    }

    /// Refuses data with which a job that protects examples could not keep its promise.
    fn check_privacy(&self) -> Result<(), String> {
        let protects = |privacy: &Privacy| privacy.unit == PrivacyUnit::Example;
        if !self.job.privacy.as_ref().is_some_and(protects) {
            return Ok(());
        }
        if let Some(fitted) = self.data.fitted().first() {
            return Err(fitted.to_string());
        }
        if self.data.declared_examples.is_none() {
            return Err("with [privacy] [data] must give declared_examples, a rounded number that every client declares".into());
        }
        if self.population.samples_per_client.is_some() && self.data.group.is_none() {
            return Err(
                "[population] samples_per_client may deal a client one row twice: with [privacy] leave it out".into()
            );
        }
        Ok(())
    }

    /// The scenario as resolved, for a run's folder: it names the job as `job.toml` beside it and its data by an
    /// absolute path.
    ///
    /// # Errors
    /// [`ScenarioError::Invalid`] if a value cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String, ScenarioError> {
        #[derive(Serialize)]
        struct Resolved<'a> {
            job: &'a str,
            population: &'a Population,
            partition: &'a PartitionConfig,
            policy: &'a Policy,
            #[serde(skip_serializing_if = "Option::is_none")]
            devices: Option<DevicesConfig>,
            #[serde(skip_serializing_if = "Option::is_none")]
            faults: Option<&'a FaultsConfig>,
            #[serde(skip_serializing_if = "Option::is_none")]
            attacks: Option<&'a AttacksConfig>,
            data: &'a DataConfig,
        }
        let mut data = self.data.clone();
        data.path = data.path.map(|path| {
            let path = self.base.join(path);
            std::path::absolute(&path).unwrap_or(path)
        });
        let mut devices = self.devices.clone();
        devices.trace = devices.trace.map(|path| std::path::absolute(&path).unwrap_or(path));
        let resolved = Resolved {
            job: "job.toml",
            population: &self.population,
            partition: &self.partition,
            policy: &self.policy,
            devices: Some(devices).filter(|devices| *devices != DevicesConfig::default()),
            faults: Some(&self.faults).filter(|faults| **faults != FaultsConfig::default()),
            attacks: self.attacks.as_ref(),
            data: &data,
        };
        toml::to_string(&resolved)
            .map_err(|error| ScenarioError::Invalid { path: self.path.clone(), problem: error.to_string() })
    }
}

fn read_text(path: &Path, hint: &'static str) -> Result<String, ScenarioError> {
    let io = |cause| ScenarioError::Io { path: path.to_path_buf(), cause, hint };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > FILE_BYTES {
        let problem =
            format!("{bytes} bytes are too many for a scenario or a job: at most {FILE_BYTES} are read");
        return Err(ScenarioError::Invalid { path: path.to_path_buf(), problem });
    }
    std::fs::read_to_string(path).map_err(io)
}

fn read_table<T: serde::de::DeserializeOwned>(name: &str, value: Value) -> Result<T, DocumentError> {
    match value {
        Value::Table(table) => document::read(table).map_err(|error| match error {
            DocumentError::Value(problem) => DocumentError::Value(format!("[{name}] {problem}")),
            other => other,
        }),
        _ => Err(DocumentError::Value(format!("`{name}` must be a table: write [{name}]"))),
    }
}

/// Whether a top-level key is one of a job file.
fn is_jobs(key: &str) -> bool {
    job::SCHEMA.keys.contains(&key) || job::SCHEMA.tables.iter().any(|(table, _)| *table == key)
}

/// Applies `--set`: `train.learning_rate=…`, `seed=…` and `job.seed=…` to the job, the rest to the scenario.
fn apply(assignments: &[String], scenario: &mut Table, job: &mut Table) -> Result<(), ScenarioError> {
    for assignment in assignments {
        let wrong = |error| ScenarioError::Override { assignment: assignment.clone(), error };
        let (path, _) = assignment.split_once('=').unwrap_or((assignment, ""));
        let first = path.trim().split('.').next().unwrap_or_default();
        if let Some(of_job) = assignment.trim_start().strip_prefix("job.") {
            document::set(job, of_job).map_err(wrong)?;
        } else if is_jobs(first) {
            document::set(job, assignment).map_err(wrong)?;
        } else {
            document::set(scenario, assignment).map_err(wrong)?;
            let mut all: Vec<_> =
                job::SCHEMA.tables.iter().chain(SCHEMA.tables).map(|(name, _)| *name).collect();
            all.extend(job::SCHEMA.keys);
            if !all.contains(&first) {
                let nearest = document::nearest(first, all.into_iter()).map(str::to_owned);
                return Err(wrong(DocumentError::UnknownKey { key: first.to_owned(), nearest }));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "name = 'j'\nseed = 1\nrounds = 2\n\
        [model]\narchitecture = 'logistic'\ninputs = [1, 28, 28]\nclasses = 10\n\
        [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_epochs = 1\nbatch_size = 10\n\
        [cohort]\nsize = 4\nminimum = 3\n";
    const SCENARIO: &str = "job = 'job.toml'\n[population]\nclients = 5\n\
        [data]\nsource = 'synthetic'\nexamples = 100\ntest_examples = 20\n\
        [partition]\nscheme = 'iid'\n";

    fn read(scenario: &str, set: &[&str]) -> Result<Scenario, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("job.toml"), JOB).unwrap();
        let path = folder.path().join("scenario.toml");
        std::fs::write(&path, scenario).unwrap();
        let set = set.iter().map(|assignment| (*assignment).to_owned()).collect();
        Scenario::read(&path, &Overrides { set, ..Overrides::default() }).map_err(|error| error.to_string())
    }

    #[test]
    fn overrides_find_the_job_or_the_scenario_by_their_first_key() {
        let set =
            ["train.learning_rate=0.5", "seed=9", "job.rounds=7", "population.clients=6", "data.seed=3"];
        let scenario = read(SCENARIO, &set).unwrap();
        assert_eq!((scenario.job.train.learning_rate, scenario.job.seed, scenario.job.rounds), (0.5, 9, 7));
        assert_eq!((scenario.population.clients, scenario.data.seed), (Some(6), Some(3)));
        assert_eq!(scenario.policy.minimum_cell, 0);
        let stricter =
            read(SCENARIO, &["policy.minimum_cell=10", "partition.scheme=dirichlet", "partition.alpha=1.0"]);
        assert_eq!(stricter.unwrap().policy.minimum_cell, 10);
    }

    #[test]
    fn an_inline_job_is_the_same_job_and_a_resolved_scenario_reads_back() {
        let rest = SCENARIO.trim_start_matches("job = 'job.toml'\n");
        let inline = format!(
            "{rest}[job]\n{}",
            JOB.replace("[model]", "[job.model]")
                .replace("[train]", "[job.train]")
                .replace("[cohort]", "[job.cohort]")
        );
        let (apart, inline) = (read(SCENARIO, &[]).unwrap(), read(&inline, &[]).unwrap());
        assert_eq!(apart.job, inline.job);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("job.toml"), apart.job.to_toml().unwrap()).unwrap();
        let path = folder.path().join("scenario.toml");
        std::fs::write(&path, apart.to_toml().unwrap()).unwrap();
        let again = Scenario::read(&path, &Overrides::default()).unwrap();
        assert_eq!(
            (again.job, again.population, again.partition),
            (apart.job, apart.population, apart.partition)
        );
        assert_eq!((again.policy, again.data), (apart.policy, apart.data));
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (scenario, set, words) in [
            (JOB, vec![], "this is a job, and names no data"),
            ("", vec![], "`job` is missing"),
            ("job = 3", vec![], "`job` must be a file's name"),
            ("job = 'jbo.toml'", vec![], "`job` names a file beside the scenario"),
            ("job = 'job.toml'", vec![], "[data] is missing"),
            (SCENARIO, vec!["partition.schema=iid"], "did you mean `partition.scheme`?"),
            (SCENARIO, vec!["population.client=7"], "did you mean `population.clients`?"),
            (SCENARIO, vec!["data.exmples=7"], "did you mean `data.examples`?"),
            (SCENARIO, vec!["policy.minimum_cel=7"], "did you mean `policy.minimum_cell`?"),
            (SCENARIO, vec!["trian.momentum=0.5"], "did you mean `train`?"),
            (SCENARIO, vec!["train.momentun=0.5"], "did you mean `train.momentum`?"),
            (SCENARIO, vec!["train"], "is not `key=value`"),
            (SCENARIO, vec!["faults.dropout_probability=1.1"], "[faults] dropout_probability = 1.1"),
            (SCENARIO, vec!["partition.scheme=quantity"], "quantity needs power"),
            (SCENARIO, vec!["partition.scheme=idd"], "[partition] unknown variant"),
            (SCENARIO, vec!["population.clients=0"], "clients = 0"),
            (SCENARIO, vec!["population.clients=-1"], "[population]"),
            (SCENARIO, vec!["data.source=idx"], "[data]"),
            (SCENARIO, vec!["data.declared_examples=0"], "[data] declared_examples: must be at least 1"),
            (SCENARIO, vec!["data.declared_examples.a=10"], "there are no sites: write one number"),
            (SCENARIO, vec!["data.public_test=1"], "[data] invalid type"),
            (SCENARIO, vec!["data.publc_test=true"], "did you mean `data.public_test`?"),
            (SCENARIO, vec!["data.group=patient"], "source = \"synthetic\" does not use it"),
            (SCENARIO, vec!["privacy.unit=example"], "missing field `mechanism` in `privacy`"),
        ] {
            let error = read(scenario, &set).unwrap_err();
            assert!(error.contains(words) && !error.contains('\n'), "{set:?}: {error}");
        }
    }

    #[test]
    fn every_client_declares_the_number_or_each_site_its_own() {
        let one = read(SCENARIO, &["data.declared_examples=20", "data.public_test=true"]).unwrap();
        assert!(one.data.public_test);
        let share = one.federation().unwrap().shares.swap_remove(3);
        assert_eq!(one.data.declared_examples_of(Some(&share.name)), Some(20));
        let sited = "job = 'job.toml'\n[data]\nsource = 'synthetic-federated'\nusers = 3\niid = true\n\
                     declared_examples = { f_00000 = 50, f_00001 = 60 }\n";
        let fits = ["model.inputs=[60]", "partition.scheme=natural"];
        let refused = read(sited, &fits).unwrap().federation().unwrap_err().to_string();
        assert!(refused.contains("declared_examples: site \"f_00002\" is missing"), "{refused}");
        let all = read(sited, &["model.inputs=[60]", "data.declared_examples.f_00002=70"]).unwrap();
        assert_eq!(all.data.declared_examples_of(Some(&"f_00002".parse().unwrap())), Some(70));
        all.federation().unwrap();
        let refused = read(sited, &["partition.scheme=iid", "population.clients=3"]).unwrap_err();
        assert!(refused.contains("only the clients of partition \"natural\" are sites"), "{refused}");
    }

    // correction 1, correction 3
    #[test]
    fn the_private_heart_disease_scenario_is_made_of_public_constants() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jobs/heart-disease-private.toml");
        let read = |data| Scenario::read(&path, &Overrides { data, ..Overrides::default() }).unwrap();
        let scenario = read(None);
        assert_eq!(scenario.data.fitted(), []);
        assert!(scenario.data.public_test && scenario.job.privacy.is_some());
        let Some(folder) = std::env::var_os("TRIBUTARY_DATA").map(PathBuf::from) else {
            eprintln!("skipped: TRIBUTARY_DATA is not set (a folder with heart-disease/)");
            return;
        };
        let scenario = read(Some(folder));
        let federation = scenario.federation().unwrap();
        let sizes = federation.shares.iter().map(|share| {
            let declared = scenario.data.declared_examples_of(Some(&share.name)).unwrap();
            assert!((0.8..1.25).contains(&(declared as f64 / share.train.len() as f64)), "{}", share.name);
            share.train.len() + share.test.len()
        });
        assert_eq!(sizes.collect::<Vec<_>>(), [303, 294, 123, 200]);
    }

    #[test]
    fn a_population_that_cannot_run_the_job_is_refused() {
        let refused = |set: &[&str]| read(SCENARIO, set).unwrap().federation().unwrap_err().to_string();
        assert!(refused(&["population.clients=2"]).contains("there are 2 clients, but [cohort] minimum = 3"));
        assert!(refused(&["evaluation.federated=true"]).contains("no client has test examples"));
        assert!(refused(&["population.clients=101"]).contains("101 clients need"));
        assert!(refused(&["model.classes=9"]).contains("set classes = 10"));
        let federation = read(SCENARIO, &[]).unwrap().federation().unwrap();
        assert_eq!((federation.shares.len(), federation.dataset.train.len()), (5, 100));
    }
}
