//! The folder that a run leaves, written whole or not at all, and read again for comparisons.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;
use tributary_common::job::Job;
use tributary_common::model::{self, Layout};
use tributary_common::progress::Line;
use tributary_common::record::{RoundOutcome, RoundRecord, RunEvent};

/// Where runs go unless `--out` says otherwise, from the current folder.
const RUNS: &str = "runs";
/// Files by which a folder is known as a run's.
const MARKS: [&str; 3] = ["job.toml", "metrics.csv", "rounds.jsonl"];

/// The columns of `metrics.csv`: the fields of [`Row`].
const COLUMNS: [&str; 9] =
    ["round", "accuracy", "loss", "epsilon", "bytes_up", "bytes_down", "completed", "dropped", "seconds"];

/// Why a run's folder cannot be written or read. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The operating system refused.
    #[error("{}: {what} ({cause})", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// What the operating system said.
        cause: std::io::Error,
    },
    /// Somebody else's folder.
    #[error("{}: exists and is not a run's folder: nothing was changed, give another --out", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
    },
    /// A file in a run's folder is not what it should be.
    #[error("{}: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

fn io(path: &Path, what: &'static str) -> impl FnOnce(std::io::Error) -> FolderError + use<> {
    let path = path.to_path_buf();
    move |cause| FolderError::Io { path, what, cause }
}

/// One row of `metrics.csv`: a published round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The round, from 1.
    pub round: u32,
    /// Share of correct examples, 0 to 1; empty where nothing was evaluated.
    pub accuracy: Option<f64>,
    /// Mean loss; empty where nothing was evaluated.
    pub loss: Option<f64>,
    /// Privacy spent so far; empty without a privacy mechanism.
    pub epsilon: Option<f64>,
    /// Bytes of updates.
    pub bytes_up: u64,
    /// Bytes of models.
    pub bytes_down: u64,
    /// Clients in the sum.
    pub completed: u32,
    /// Clients that dropped out.
    pub dropped: u32,
    /// Wall time from the invitation to the published model.
    pub seconds: f64,
}

impl Row {
    /// The row of a round's line.
    pub fn of(line: &Line) -> Option<Self> {
        match *line {
            Line::Round {
                round,
                accuracy,
                loss,
                epsilon,
                bytes_up,
                bytes_down,
                completed,
                dropped,
                seconds,
                ..
            } => Some(Self {
                round,
                accuracy,
                loss,
                epsilon,
                bytes_up,
                bytes_down,
                completed,
                dropped,
                seconds,
            }),
            _ => None,
        }
    }
}

/// What a run's folder holds, besides the records that a [`RunWriter`] took.
#[derive(Debug, Clone)]
pub struct RunFolder<'a> {
    /// The job as resolved.
    pub job: &'a Job,
    /// The scenario as resolved.
    pub scenario_toml: &'a str,
    /// A row per published round.
    pub rows: &'a [Row],
    /// Layout of the model.
    pub layout: &'a Layout,
    /// The last published model, or the initial one.
    pub model: &'a [f32],
    /// The report, as HTML.
    pub report: &'a str,
    /// The export of the run's privacy ledger, with `[privacy]`.
    pub ledger: Option<&'a str>,
}

impl RunFolder<'_> {
    fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let mut files = vec![
            ("job.toml", self.job.to_toml().map_err(|error| text(&error))?.into_bytes()),
            ("scenario.toml", self.scenario_toml.as_bytes().to_vec()),
            ("metrics.csv", to_csv(self.rows).map_err(|error| text(&error))?),
            ("model.safetensors", model::export(self.layout, self.model).map_err(|error| text(&error))?),
            ("report.html", self.report.as_bytes().to_vec()),
        ];
        files.extend(self.ledger.map(|ledger| ("ledger.jsonl", ledger.as_bytes().to_vec())));
        Ok(files)
    }
}

fn to_csv(rows: &[Row]) -> Result<Vec<u8>, csv::Error> {
    // The header stands there also when no round was published.
    let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
    writer.write_record(COLUMNS)?;
    for row in rows {
        writer.serialize(row)?;
    }
    writer.into_inner().map_err(|error| error.into_error().into())
}

/// Where a run's folder will be: known, and known to be writable, before the run starts.
#[derive(Debug, Clone)]
pub enum Target {
    /// A folder that the user named. An earlier run's folder there is replaced.
    Named(PathBuf),
    /// `runs/<name>-<seed>-<n>`, with the first `n` that is free.
    Numbered {
        /// The folder of all runs.
        parent: PathBuf,
        /// The part before the number.
        stem: String,
    },
}

impl Target {
    /// Chooses the folder of a run of `job`, and makes the folder around it.
    ///
    /// # Errors
    /// [`FolderError::NotARun`] if `out` is something else than an empty folder or a run's; [`FolderError::Io`].
    pub fn choose(out: Option<&Path>, job: &Job) -> Result<Self, FolderError> {
        let (target, parent) = match out {
            Some(out) => {
                let named = std::path::absolute(out).map_err(io(out, "is not a folder's name"))?;
                if named.exists() && !is_replaceable(&named) {
                    return Err(FolderError::NotARun { path: out.to_path_buf() });
                }
                let parent = named.parent().map_or_else(|| named.clone(), Path::to_path_buf);
                (Self::Named(out.to_path_buf()), parent)
            }
            None => {
                let stem = format!("{}-{}", job.name.replace(' ', "-"), job.seed);
                let parent = PathBuf::from(RUNS);
                (Self::Numbered { parent: parent.clone(), stem }, parent)
            }
        };
        std::fs::create_dir_all(&parent).map_err(io(&parent, "cannot be made"))?;
        Ok(target)
    }

    /// Begins the folder under a temporary name beside its place.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn open(self) -> Result<RunWriter, FolderError> {
        let mut number = 0u32;
        let new = loop {
            let new = self.beside(&format!("new-{}-{number}", std::process::id()));
            match std::fs::create_dir(&new) {
                Ok(()) => break new,
                // Another run of this process, or a killed one.
                Err(cause) if cause.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(cause) => return Err(io(&new, "cannot be made")(cause)),
            }
        };
        let create = |name: &str| {
            let path = new.join(name);
            File::create(&path).map(BufWriter::new).map_err(io(&path, "cannot be written"))
        };
        let files = create("rounds.jsonl").and_then(|rounds| Ok((rounds, create("evaluations.jsonl")?)));
        match files {
            Ok((rounds, evaluations)) => {
                Ok(RunWriter { target: self, new, rounds, evaluations, failed: None })
            }
            Err(error) => {
                let _ = std::fs::remove_dir_all(&new);
                Err(error)
            }
        }
    }

    /// A hidden neighbour of the folder.
    fn beside(&self, what: &str) -> PathBuf {
        let (parent, name) = match self {
            Self::Named(path) => {
                (path.parent().unwrap_or(Path::new("")), path.file_name().unwrap_or_default())
            }
            Self::Numbered { parent, stem } => (parent.as_path(), stem.as_ref()),
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{what}"));
        parent.join(hidden)
    }

    /// Renames `new` to the folder's place; returns where it is.
    fn put_in_place(&self, new: &Path) -> Result<PathBuf, FolderError> {
        match self {
            Self::Named(path) => {
                let old = self.beside(&format!("old-{}", std::process::id()));
                put_in_place(new, path, &old).map(|()| path.clone())
            }
            Self::Numbered { parent, stem } => {
                let mut candidates = (1u32..).map(|number| parent.join(format!("{stem}-{number}")));
                loop {
                    let Some(path) = candidates.next() else { continue };
                    if path.exists() {
                        continue;
                    }
                    match std::fs::rename(new, &path) {
                        Ok(()) => return Ok(path),
                        // Another simulation was quicker.
                        Err(_) if path.exists() => {}
                        Err(cause) => return Err(FolderError::Io { path, what: "cannot be made", cause }),
                    }
                }
            }
        }
    }
}

/// A run's folder while the run goes on: records are appended as they are made, so that a long run keeps none in
/// memory. Dropped before [`RunWriter::close`], it leaves nothing.
#[derive(Debug)]
pub struct RunWriter {
    target: Target,
    new: PathBuf,
    rounds: BufWriter<File>,
    evaluations: BufWriter<File>,
    failed: Option<FolderError>,
}

impl RunWriter {
    /// Appends the record that an event brings, if it brings one. Whether all could be written so far; if not,
    /// [`RunWriter::close`] says why.
    pub fn take(&mut self, event: &RunEvent) -> bool {
        let (file, name, written) = match event {
            RunEvent::RoundEnded { record } => {
                let written = serde_json::to_writer(&mut self.rounds, record);
                (&mut self.rounds, "rounds.jsonl", written)
            }
            RunEvent::Evaluated { record } => {
                let written = serde_json::to_writer(&mut self.evaluations, record);
                (&mut self.evaluations, "evaluations.jsonl", written)
            }
            _ => return self.failed.is_none(),
        };
        let written = written.map_err(std::io::Error::from);
        let written = written.and_then(|()| file.write_all(b"\n")).and_then(|()| file.flush());
        if let Err(cause) = written
            && self.failed.is_none()
        {
            self.failed =
                Some(FolderError::Io { path: self.new.join(name), what: "cannot be written", cause });
        }
        self.failed.is_none()
    }

    /// Writes the rest and renames the folder into place; returns where it is.
    ///
    /// # Errors
    /// A [`FolderError`]; then nothing is left, and an earlier run's folder is as it was.
    pub fn close(mut self, run: &RunFolder<'_>) -> Result<PathBuf, FolderError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        write_files(&self.new, run)?;
        self.target.put_in_place(&self.new)
    }
}

impl Drop for RunWriter {
    fn drop(&mut self) {
        // After a rename there is nothing under this name.
        let _ = std::fs::remove_dir_all(&self.new);
    }
}

/// An empty folder, or an earlier run's.
fn is_replaceable(path: &Path) -> bool {
    let is_run = MARKS.iter().all(|mark| path.join(mark).is_file());
    is_run || std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

fn write_files(folder: &Path, run: &RunFolder<'_>) -> Result<(), FolderError> {
    let files =
        run.files().map_err(|problem| FolderError::Damaged { path: folder.to_path_buf(), problem })?;
    for (name, bytes) in files {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(io(&path, "cannot be written"))?;
    }
    Ok(())
}

fn put_in_place(new: &Path, path: &Path, old: &Path) -> Result<(), FolderError> {
    if path.exists() {
        // Again, for it may have changed while the run went on.
        if !is_replaceable(path) {
            return Err(FolderError::NotARun { path: path.to_path_buf() });
        }
        std::fs::rename(path, old).map_err(io(path, "cannot be replaced"))?;
    }
    if let Err(cause) = std::fs::rename(new, path) {
        let _ = std::fs::rename(old, path);
        return Err(FolderError::Io { path: path.to_path_buf(), what: "cannot be made", cause });
    }
    let _ = std::fs::remove_dir_all(old);
    Ok(())
}

/// A run's folder, read again.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The folder's name.
    pub name: String,
    /// The job.
    pub job: Job,
    /// A row per published round.
    pub rows: Vec<Row>,
    /// Digest of the last published model, if there is one.
    pub digest: Option<Digest>,
}

/// Reads a run's folder.
///
/// # Errors
/// A [`FolderError`] that names the file.
pub fn load(folder: &Path) -> Result<Loaded, FolderError> {
    let text = |name: &str| {
        let path = folder.join(name);
        let text =
            std::fs::read_to_string(&path).map_err(io(&path, "cannot be read; is this a run's folder?"))?;
        Ok::<_, FolderError>((path, text))
    };
    let damaged = |path: &Path, problem: String| FolderError::Damaged { path: path.to_path_buf(), problem };
    let (path, toml) = text("job.toml")?;
    let job = Job::parse(&toml).map_err(|error| damaged(&path, error.to_string()))?;
    let (path, csv) = text("metrics.csv")?;
    let rows: Result<Vec<Row>, csv::Error> = csv::Reader::from_reader(csv.as_bytes()).deserialize().collect();
    let rows = rows.map_err(|error| damaged(&path, error.to_string()))?;
    let (path, lines) = text("rounds.jsonl")?;
    let mut digest = None;
    for (index, line) in lines.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let record: RoundRecord = serde_json::from_str(line)
            .map_err(|error| damaged(&path, format!("line {}: {error}", index + 1)))?;
        if let RoundOutcome::Published { model } = record.outcome {
            digest = Some(model);
        }
    }
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_path_buf());
    let name = absolute
        .file_name()
        .map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into());
    Ok(Loaded { name, job, rows, digest })
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "name = 'my job'\nseed = 1\nrounds = 2\n\
        [model]\narchitecture = 'logistic'\ninputs = [2]\nclasses = 2\n\
        [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_epochs = 2\nbatch_size = 10\n\
        [cohort]\nsize = 2\n";

    fn write(target: &Target, report: &str) -> Result<PathBuf, FolderError> {
        let job = Job::parse(JOB).unwrap();
        let layout = job.layout().unwrap();
        let model = layout.initial(1);
        target.clone().open()?.close(&RunFolder {
            job: &job,
            scenario_toml: "",
            rows: &[],
            layout: &layout,
            model: &model,
            report,
            ledger: None,
        })
    }

    #[test]
    fn numbered_folders_never_replace_one_another() {
        let parent = tempfile::tempdir().unwrap();
        let target = Target::Numbered { parent: parent.path().to_path_buf(), stem: "my-job-1".into() };
        let (first, second) = (write(&target, "one").unwrap(), write(&target, "two").unwrap());
        assert_eq!(first, parent.path().join("my-job-1-1"));
        assert_eq!(second, parent.path().join("my-job-1-2"));
        assert_eq!(std::fs::read_to_string(second.join("report.html")).unwrap(), "two");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 2, "nothing is left beside");
    }

    #[test]
    fn a_runs_folder_is_replaced_whole_and_anything_else_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("run");
        let target = Target::Named(path.clone());
        write(&target, "one").unwrap();
        std::fs::write(path.join("extra"), "").unwrap();
        assert_eq!(write(&target, "two").unwrap(), path);
        assert!(!path.join("extra").exists());
        std::fs::remove_file(path.join("metrics.csv")).unwrap();
        assert!(matches!(write(&target, "three"), Err(FolderError::NotARun { .. })));
        assert_eq!(std::fs::read_to_string(path.join("report.html")).unwrap(), "two");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1, "nothing is left beside");
    }

    #[test]
    fn a_damaged_folder_is_named_by_its_file() {
        let parent = tempfile::tempdir().unwrap();
        let path = write(&Target::Named(parent.path().join("run")), "").unwrap();
        let loaded = load(&path).unwrap();
        assert_eq!((loaded.name.as_str(), loaded.rows.len(), loaded.digest), ("run", 0, None));
        let columns = COLUMNS.join(",");
        assert_eq!(std::fs::read_to_string(path.join("metrics.csv")).unwrap(), format!("{columns}\n"));
        for (file, text, words) in [
            ("rounds.jsonl", "{}\n", "rounds.jsonl: line 1"),
            ("metrics.csv", &format!("{columns}\n1,x,,1,1,1,1,1\n"), "metrics.csv: "),
            ("job.toml", "name = 1", "job.toml: "),
        ] {
            std::fs::write(path.join(file), text).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{error}");
            write(&Target::Named(path.clone()), "").unwrap();
        }
    }
}
