//! A sweep's folder: its manifest, which points are done, and that nobody else works in it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;
use tributary_common::job::JobError;

use super::grid::{Grid, Varied};
use crate::report::{self, Loaded};
use crate::scenario::{Scenario, ScenarioError};

/// The manifest's file.
const MANIFEST: &str = "sweep.json";
/// The form of the manifest.
const VERSION: u32 = 1;
/// Files that end a run's folder, beside those that [`report::load`] reads.
const LAST: [&str; 2] = ["model.safetensors", "report.html"];

/// Why a sweep's folder cannot be used. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum SweepFolderError {
    /// The operating system refused.
    #[error("{}: {what} ({cause})", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// What the operating system said.
        cause: io::Error,
    },
    /// Somebody else's folder.
    #[error("{}: is not empty and is not a sweep's folder: nothing was changed, give another --out", path.display())]
    NotASweep {
        /// The folder.
        path: PathBuf,
    },
    /// Another sweep's folder.
    #[error("{}: holds another sweep ({found}): nothing was changed, give another --out", path.display())]
    Another {
        /// The folder.
        path: PathBuf,
        /// What that sweep is, or how it differs.
        found: String,
    },
    /// Another process is at work in it.
    #[error("{}: another process runs this sweep now", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// The manifest is not one.
    #[error("{}: {problem}; remove the folder, or give another --out", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// What a sweep is: two sweeps are the same if their manifests are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    version: u32,
    /// The job's name.
    name: String,
    /// BLAKE3 of the points' digests, in their order.
    digest: Digest,
    /// What trains.
    trainer: String,
    varied: Vec<Varied>,
    seeds: Vec<u64>,
    points: Vec<ManifestPoint>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestPoint {
    /// The point's folder.
    name: String,
    /// [`resolved`]'s digest.
    digest: Digest,
}

/// BLAKE3 of a job and a scenario as a run's folder holds them.
fn digest_of(job_toml: &str, scenario_toml: &str) -> Digest {
    let mut bytes = Vec::from((job_toml.len() as u64).to_le_bytes());
    bytes.extend_from_slice(job_toml.as_bytes());
    bytes.extend_from_slice(scenario_toml.as_bytes());
    Digest::of(&bytes)
}

/// The digest of a scenario with every default and override written out.
pub(crate) fn resolved(scenario: &Scenario) -> Result<Digest, ScenarioError> {
    let job = |error: JobError| ScenarioError::Job { path: scenario.path.clone(), error };
    Ok(digest_of(&scenario.job.to_toml().map_err(job)?, &scenario.to_toml()?))
}

impl Manifest {
    /// Of a sweep over `grid`, whose points have these names and digests.
    pub(crate) fn new(name: &str, trainer: &str, grid: &Grid, points: &[(String, Digest)]) -> Self {
        let all: Vec<u8> = points.iter().flat_map(|(_, digest)| digest.0).collect();
        let point = |(name, digest): &(String, Digest)| ManifestPoint { name: name.clone(), digest: *digest };
        Self {
            version: VERSION,
            name: name.to_owned(),
            digest: Digest::of(&all),
            trainer: trainer.to_owned(),
            varied: grid.varied.clone(),
            seeds: grid.seeds.clone(),
            points: points.iter().map(point).collect(),
        }
    }

    /// How it differs from `other`, in words.
    fn difference(&self, other: &Self) -> String {
        let words = |of: &Self| {
            let mut words: Vec<String> =
                of.varied.iter().map(|one| format!("{}={}", one.key, one.values.join(","))).collect();
            if !of.seeds.is_empty() {
                let seeds: Vec<String> = of.seeds.iter().map(u64::to_string).collect();
                words.push(format!("seeds {}", seeds.join(",")));
            }
            words.join(", ")
        };
        if (&self.name, words(self)) != (&other.name, words(other)) {
            let mut found = format!("{} over {}", self.name, words(self));
            if found.chars().count() > 200 {
                found = found.chars().take(199).chain(['…']).collect();
            }
            return found;
        }
        if self.trainer != other.trainer {
            return format!("trained by {}", self.trainer);
        }
        "of the same points, with other settings or another version of this program".to_owned()
    }
}

/// A sweep's folder, locked for this process.
#[derive(Debug)]
pub(crate) struct SweepFolder {
    path: PathBuf,
    /// Locked as long as it is open.
    _lock: File,
}

impl SweepFolder {
    /// Opens the folder of the sweep that `manifest` describes: a new one, or the one that an earlier call left.
    pub(crate) fn open(path: &Path, manifest: &Manifest) -> Result<Self, SweepFolderError> {
        let file = path.join(MANIFEST);
        match fs::read(&file) {
            Ok(bytes) => {
                let found: Manifest = serde_json::from_slice(&bytes).map_err(|error| {
                    SweepFolderError::Damaged { path: file.clone(), problem: error.to_string() }
                })?;
                if found != *manifest {
                    let found = found.difference(manifest);
                    return Err(SweepFolderError::Another { path: path.to_path_buf(), found });
                }
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(path).map_err(io_error(path, "cannot be made"))?;
                for entry in fs::read_dir(path).map_err(io_error(path, "cannot be listed"))? {
                    let name = entry.map_err(io_error(path, "cannot be listed"))?.file_name();
                    // A manifest whose writing was interrupted.
                    if !name.to_string_lossy().starts_with(".sweep.json.") {
                        return Err(SweepFolderError::NotASweep { path: path.to_path_buf() });
                    }
                }
                let text = serde_json::to_vec_pretty(manifest).map_err(|error| {
                    SweepFolderError::Damaged { path: file.clone(), problem: error.to_string() }
                })?;
                write_whole(path, MANIFEST, &text)?;
            }
            Err(cause) => return Err(io_error(&file, "cannot be read")(cause)),
        }
        let lock = File::open(&file).map_err(io_error(&file, "cannot be read"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(SweepFolderError::Busy { path: path.to_path_buf() }),
            Err(TryLockError::Error(cause)) => return Err(io_error(&file, "cannot be locked")(cause)),
        }
        Ok(Self { path: path.to_path_buf(), _lock: lock })
    }

    /// Where the point `name` is, or will be.
    pub(crate) fn point(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The run of the point `name`, if it is whole, went to its end, and is that of the resolved scenario `digest`.
    pub(crate) fn done(&self, name: &str, digest: Digest) -> Option<Loaded> {
        let folder = self.point(name);
        let text = |name: &str| fs::read_to_string(folder.join(name)).ok();
        if digest_of(&text("job.toml")?, &text("scenario.toml")?) != digest {
            return None;
        }
        if !LAST.iter().all(|name| folder.join(name).is_file()) {
            return None;
        }
        let loaded = report::load(&folder).ok()?;
        (loaded.rows.len() == loaded.job.rounds as usize).then_some(loaded)
    }

    /// Removes what is left of the point `name`: a folder that is not [`SweepFolder::done`], and what an interrupted
    /// process was writing. The manifest says that these are the sweep's own.
    pub(crate) fn clear(&self, name: &str) -> Result<(), SweepFolderError> {
        let hidden = format!(".{name}.");
        for entry in fs::read_dir(&self.path).map_err(io_error(&self.path, "cannot be listed"))? {
            let entry = entry.map_err(io_error(&self.path, "cannot be listed"))?;
            let found = entry.file_name().to_string_lossy().into_owned();
            if found == name || found.starts_with(&hidden) {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(io_error(&path, "cannot be removed"))?;
            }
        }
        Ok(())
    }

    /// Writes one of the sweep's own files, whole or not at all.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, SweepFolderError> {
        write_whole(&self.path, name, bytes)
    }
}

fn io_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> SweepFolderError + use<> {
    let path = path.to_path_buf();
    move |cause| SweepFolderError::Io { path, what, cause }
}

fn write_whole(folder: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf, SweepFolderError> {
    let (path, new) = (folder.join(name), folder.join(format!(".{name}.new-{}", std::process::id())));
    fs::write(&new, bytes).map_err(io_error(&new, "cannot be written"))?;
    fs::rename(&new, &path).map_err(io_error(&path, "cannot be written"))?;
    Ok(path)
}
