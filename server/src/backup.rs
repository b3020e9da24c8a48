//! Backups of a coordinator: all that it keeps, of one moment, in one file; and a new folder made of one.
//!
//! The file is a ZIP archive: it is read from its end, so a file that was cut off is none. `manifest.json` comes first and
//! has the length and the BLAKE3 digest of every other file. The store is in it as its entries, not as its own files, so
//! that a copy of a running one is whole. Left out is what must not come back: tokens, and sessions of masked rounds.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::Job;
use tributary_common::record::RunState;
use tributary_common::time::Time;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::config::ServerConfig;
use crate::store::{SledStore, Store as _, StoreError};

/// The format of the archive.
const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
/// The configuration file, in the archive and in a restored folder.
const CONFIG: &str = "server.toml";
/// The store's entries: a line for each.
const ENTRIES: &str = "entries.jsonl";
const AUTHORITY: &str = "authority";
const AUTHORITY_FILES: [&str; 3] = ["authority.key", "authority.pem", "server.pem"];
const LEDGERS: &str = "ledgers";
/// A ledger's files, in the order in which they are read: what is acknowledged is then in the ledger too.
const LEDGER_FILES: [&str; 3] = ["secret", "acknowledged", "jsonl"];
const MODELS: &str = "models";
/// The folder of everything durable, in a restored folder.
const DATA: &str = "data";
/// Longest manifest that is read, in bytes: of some hundred thousand files.
const MANIFEST_BYTES: u64 = 64 << 20;
/// Bytes read at a time: a multiple of four, as the store wants them.
const PART_BYTES: u64 = 1 << 20;

/// Why there is no backup, or none was put back; one line.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk or the file system refused.
    #[error("{path}: {what}")]
    Io {
        /// The file or folder.
        path: String,
        /// What the system said.
        what: String,
    },
    /// Not a backup, or not as it was written.
    #[error("{path} is no sound backup: {what}; nothing was restored from it, take another one")]
    Damaged {
        /// The backup.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// A later version made it.
    #[error(
        "{path} is a backup of format {found}; this version reads format {FORMAT}: restore it with the version that made it"
    )]
    Format {
        /// The backup.
        path: String,
        /// Its format.
        found: u32,
    },
    /// Something is where the backup or the restored folder should go.
    #[error("{path} {what}")]
    Occupied {
        /// The file or folder.
        path: String,
        /// Why it cannot be used.
        what: &'static str,
    },
}

fn io_error(path: &Path, error: &std::io::Error) -> BackupError {
    BackupError::Io { path: path.display().to_string(), what: error.to_string() }
}

/// What an archive holds beside its manifest.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    /// The version of the coordinator.
    version: String,
    made: Time,
    files: Vec<Listed>,
}

/// A file in an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Listed {
    name: String,
    bytes: u64,
    digest: Digest,
}

impl Listed {
    fn of(name: &str, bytes: &[u8]) -> Self {
        Self { name: name.to_owned(), bytes: bytes.len() as u64, digest: Digest::of(bytes) }
    }

    /// The model that it is.
    fn model(&self) -> Option<Digest> {
        let digest = self.name.strip_prefix(MODELS)?.strip_prefix('/')?.parse().ok()?;
        (digest == self.digest).then_some(digest)
    }

    /// Where it goes in a restored folder's data, if it is a file of its own there. Other names than these are refused.
    fn place(&self) -> Option<PathBuf> {
        let (folder, file) = self.name.split_once('/')?;
        let good = match folder {
            AUTHORITY => AUTHORITY_FILES.contains(&file),
            LEDGERS => file.split_once('.').is_some_and(|(run, kind)| {
                run.parse::<RunId>().is_ok_and(|id| id.to_string() == run) && LEDGER_FILES.contains(&kind)
            }),
            _ => false,
        };
        good.then(|| Path::new(folder).join(file))
    }
}

/// One line of [`ENTRIES`].
#[derive(Serialize, Deserialize)]
struct EntryLine {
    key: String,
    /// The value as JSON text, so that it comes back to the last digit.
    json: String,
}

/// Writes a backup of `store`, of what lies beside it in `data_dir`, and of the text of the configuration file.
///
/// The store may be in use: its writes wait while its entries and the ledgers are read, and no longer. As after a crash,
/// a run's ledger may be one record ahead of the store.
///
/// # Errors
/// [`BackupError`]; then what was written is no backup, and [`check`] says so.
pub fn write(
    store: &SledStore,
    data_dir: &Path,
    config_toml: &str,
    now: Time,
    mut out: impl Write,
) -> Result<(), BackupError> {
    let (snapshot, ledgers) = store.snapshot(|| read_ledgers(&data_dir.join(LEDGERS)))?;
    let mut small: BTreeMap<String, Vec<u8>> = ledgers?;
    for file in AUTHORITY_FILES {
        let path = data_dir.join(AUTHORITY).join(file);
        let bytes = fs::read(&path).map_err(|error| io_error(&path, &error))?;
        small.insert(format!("{AUTHORITY}/{file}"), bytes);
    }
    small.insert(CONFIG.to_owned(), config_toml.as_bytes().to_vec());
    let writing = |error: &dyn std::fmt::Display| BackupError::Io {
        path: "the backup".to_owned(),
        what: error.to_string(),
    };
    let mut lines = Vec::new();
    for (key, json) in snapshot.entries() {
        let line = EntryLine { key: key.clone(), json: json.clone() };
        serde_json::to_writer(&mut lines, &line).map_err(|error| writing(&error))?;
        lines.push(b'\n');
    }
    small.insert(ENTRIES.to_owned(), lines);
    let models = snapshot.models()?;
    let mut files: Vec<Listed> = small.iter().map(|(name, bytes)| Listed::of(name, bytes)).collect();
    files.extend(models.iter().map(|(digest, bytes)| Listed {
        name: format!("{MODELS}/{digest}"),
        bytes: *bytes,
        digest: *digest,
    }));
    let manifest =
        Manifest { format: FORMAT, version: env!("CARGO_PKG_VERSION").to_owned(), made: now, files };
    let manifest = serde_json::to_vec_pretty(&manifest).map_err(|error| writing(&error))?;

    let mut archive = ZipWriter::new_stream(&mut out);
    // Models do not get smaller; and what is stored as it is can be read without this program.
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let options = options.large_file(true).unix_permissions(0o600);
    for (name, bytes) in
        std::iter::once((MANIFEST, &manifest)).chain(small.iter().map(|(n, b)| (n.as_str(), b)))
    {
        archive.start_file(name, options).map_err(|error| writing(&error))?;
        archive.write_all(bytes).map_err(|error| writing(&error))?;
    }
    for (digest, _) in models {
        archive.start_file(format!("{MODELS}/{digest}"), options).map_err(|error| writing(&error))?;
        let mut written = Ok(());
        snapshot.read(digest, |part| {
            if written.is_ok() {
                written = archive.write_all(part);
            }
        })?;
        written.map_err(|error| writing(&error))?;
    }
    archive.finish().map_err(|error| writing(&error))?;
    out.flush().map_err(|error| writing(&error))
}

fn read_ledgers(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, BackupError> {
    let mut files = BTreeMap::new();
    let listed = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(files),
        listed => listed.map_err(|error| io_error(folder, &error))?,
    };
    for entry in listed {
        let entry = entry.map_err(|error| io_error(folder, &error))?;
        let name = entry.file_name();
        let run = name
            .to_str()
            .and_then(|name| name.strip_suffix(".jsonl"))
            .filter(|run| run.parse::<RunId>().is_ok());
        let Some(run) = run else { continue };
        for kind in LEDGER_FILES {
            let path = folder.join(format!("{run}.{kind}"));
            match fs::read(&path) {
                Ok(bytes) => files.insert(format!("{LEDGERS}/{run}.{kind}"), bytes),
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(io_error(&path, &error)),
            };
        }
    }
    Ok(files)
}

/// Makes the file `out` of a backup that `fill` writes: for its owner alone, and under another name until it is durable
/// and was read back.
///
/// # Errors
/// [`BackupError`], or what `fill` says; then there is no file `out`.
pub async fn create<E: From<BackupError>>(
    out: &Path,
    fill: impl AsyncFnOnce(&mut File) -> Result<(), E>,
) -> Result<u64, E> {
    if out.symlink_metadata().is_ok() {
        let what = "exists already; give the backup another name";
        return Err(BackupError::Occupied { path: out.display().to_string(), what }.into());
    }
    let mut part = out.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let failed = |error: std::io::Error| E::from(io_error(&part, &error));
    match fs::remove_file(&part) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {} // of a backup that was cut off
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part).map_err(failed)?;
    let made = async {
        fill(&mut file).await?;
        file.sync_all().map_err(failed)?;
        check(&part)?;
        fs::rename(&part, out).map_err(failed)?;
        let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync(folder)?;
        file.metadata().map(|metadata| metadata.len()).map_err(failed)
    };
    let made = made.await;
    if made.is_err() {
        let _ = fs::remove_file(&part);
    }
    made
}

fn sync(path: &Path) -> Result<(), BackupError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| io_error(path, &error))
}

/// An archive whose every file is as its manifest says.
struct Sound {
    archive: ZipArchive<File>,
    manifest: Manifest,
    /// The configuration's text.
    config_toml: String,
    entries: Vec<(String, String)>,
}

/// Reads the backup at `path` and compares every file in it with its digest.
///
/// # Errors
/// [`BackupError::Damaged`], [`BackupError::Format`], [`BackupError::Io`].
pub fn check(path: &Path) -> Result<(), BackupError> {
    sound(path).map(|_| ())
}

fn sound(path: &Path) -> Result<Sound, BackupError> {
    let damaged = |what: String| BackupError::Damaged { path: path.display().to_string(), what };
    let file = File::open(path).map_err(|error| io_error(path, &error))?;
    let mut archive = ZipArchive::new(file).map_err(|error| damaged(error.to_string()))?;
    let mut bytes = Vec::new();
    let read = archive.by_name(MANIFEST).map_err(|error| error.to_string());
    let read =
        read.and_then(|file| file.take(MANIFEST_BYTES).read_to_end(&mut bytes).map_err(|e| e.to_string()));
    read.map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let unreadable = |error: serde_json::Error| damaged(format!("{MANIFEST}: {error}"));
    let Version { format } = serde_json::from_slice(&bytes).map_err(unreadable)?;
    if format != FORMAT {
        return Err(BackupError::Format { path: path.display().to_string(), found: format });
    }
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(unreadable)?;
    if archive.len() != manifest.files.len() + 1 {
        let (found, listed) = (archive.len(), manifest.files.len());
        return Err(damaged(format!("it has {found} files; {listed} and the manifest were written")));
    }
    let mut text = BTreeMap::new();
    for listed in &manifest.files {
        let name = listed.name.as_str();
        let in_memory = [CONFIG, ENTRIES].contains(&name);
        if !in_memory && listed.place().is_none() && listed.model().is_none() {
            return Err(damaged(format!("{name:?} is no name of a file in a backup")));
        }
        let mut kept = Vec::new();
        let mut hasher = blake3::Hasher::new();
        let read = read_parts(&mut archive, name, |part| {
            hasher.update(part);
            if in_memory {
                kept.extend_from_slice(part);
            }
        });
        let bytes = read.map_err(|error| damaged(format!("{name}: {error}")))?;
        if (bytes, Digest::from(hasher.finalize())) != (listed.bytes, listed.digest) {
            return Err(damaged(format!("{name} has not the digest that it was written with")));
        }
        if in_memory {
            let kept = String::from_utf8(kept).map_err(|error| damaged(format!("{name}: {error}")))?;
            text.insert(name.to_owned(), kept);
        }
    }
    let mut take = |name: &str| text.remove(name).ok_or_else(|| damaged(format!("{name} is missing")));
    let config_toml = take(CONFIG)?;
    let lines = take(ENTRIES)?;
    let entries = lines.lines().map(|line| {
        let line: EntryLine = serde_json::from_str(line)?;
        Ok((line.key, line.json))
    });
    let entries = entries.collect::<Result<_, _>>();
    let entries = entries.map_err(|error: serde_json::Error| damaged(format!("{ENTRIES}: {error}")))?;
    Ok(Sound { archive, manifest, config_toml, entries })
}

/// Hands a file of an archive to `take`, part after part. Returns how many bytes it has.
fn read_parts(
    archive: &mut ZipArchive<File>,
    name: &str,
    mut take: impl FnMut(&[u8]),
) -> Result<u64, String> {
    let mut file = archive.by_name(name).map_err(|error| error.to_string())?;
    let (mut part, mut bytes) = (Vec::new(), 0);
    loop {
        part.clear();
        file.by_ref().take(PART_BYTES).read_to_end(&mut part).map_err(|error| error.to_string())?;
        if part.is_empty() {
            return Ok(bytes);
        }
        bytes += part.len() as u64;
        take(&part);
    }
}

/// What a restored folder is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Its configuration file.
    pub config: PathBuf,
    /// When the backup was made.
    pub made: Time,
    /// Nodes that may connect: of those enrolled then, the ones that were not revoked then.
    pub nodes: Vec<NodeName>,
    /// Runs that go on from where they were then.
    pub going_on: Vec<RunId>,
    /// Runs that were stopped, because rounds of theirs must not be done twice.
    pub stopped: Vec<RunId>,
}

/// Makes the folder `dir` of the backup at `from`, which is checked before anything is written. The folder appears whole
/// or not at all.
///
/// A run that is masked or private does not go on: rounds of it may have been published after the backup, and done again
/// they would give a second sum over the same updates, or be paid for once and released twice.
///
/// # Errors
/// [`BackupError`]; then `dir` is as it was.
pub fn restore(from: &Path, dir: &Path) -> Result<Restored, BackupError> {
    let mut sound = sound(from)?;
    let dir = std::path::absolute(dir).map_err(|error| io_error(dir, &error))?;
    let occupied = |path: &Path, what| BackupError::Occupied { path: path.display().to_string(), what };
    match fs::read_dir(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(io_error(&dir, &error)),
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(occupied(&dir, "is not empty; restore into a new folder"));
            }
        }
    }
    let config_toml = config_for(&dir, &sound.config_toml).map_err(|what| BackupError::Damaged {
        path: from.display().to_string(),
        what: format!("its {CONFIG} cannot be used in {}: {what}", dir.display()),
    })?;
    let mut building = dir.as_os_str().to_owned();
    building.push(".restoring");
    let building = PathBuf::from(building);
    match DirBuilder::new().mode(0o700).create(&building) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return Err(occupied(&building, "is left from a restore that was cut off; delete it"));
        }
        made => made.map_err(|error| io_error(&building, &error))?,
    }
    let restored = fill(&mut sound, from, &building, &config_toml).and_then(|restored| {
        fs::rename(&building, &dir).map_err(|error| io_error(&dir, &error))?;
        sync(dir.parent().unwrap_or(Path::new("/")))?;
        Ok(Restored { config: dir.join(CONFIG), ..restored })
    });
    if restored.is_err() {
        let _ = fs::remove_dir_all(&building);
    }
    restored
}

/// The configuration for a restored folder: the same, with its data in the folder.
fn config_for(dir: &Path, text: &str) -> Result<String, String> {
    let data = dir.join(DATA);
    // Where the folder's own path made the old place too long, the new one may do.
    if ServerConfig::parse(text, dir).is_ok_and(|config| config.data_dir == data) {
        return Ok(text.to_owned());
    }
    let is_data_dir = |line: &str| line.split_once('=').is_some_and(|(key, _)| key.trim() == "data_dir");
    let mut changed = String::new();
    for line in text.lines() {
        changed.push_str(if is_data_dir(line) { "data_dir = \"data\"" } else { line });
        changed.push('\n');
    }
    let config = ServerConfig::parse(&changed, dir)?;
    if config.data_dir == data {
        Ok(changed)
    } else {
        Err("`data_dir` is written in an unusual way".to_owned())
    }
}

/// Fills the folder `building`.
fn fill(sound: &mut Sound, from: &Path, building: &Path, config_toml: &str) -> Result<Restored, BackupError> {
    let damaged = |what: String| BackupError::Damaged { path: from.display().to_string(), what };
    let data = building.join(DATA);
    let mut folders = vec![data.clone(), data.join(AUTHORITY), data.join(LEDGERS)];
    for folder in &folders {
        DirBuilder::new().mode(0o700).create(folder).map_err(|error| io_error(folder, &error))?;
    }
    let store = SledStore::open(&data.join("store"))?;
    let Sound { archive, manifest, entries, .. } = sound;
    for listed in &manifest.files {
        let unread = |error: String| damaged(format!("{}: {error}", listed.name));
        let mut failed = None;
        if let Some(digest) = listed.model() {
            let mut file = archive.by_name(&listed.name).map_err(|error| unread(error.to_string()))?;
            let parts = std::iter::from_fn(|| {
                let mut part = Vec::new();
                match file.by_ref().take(PART_BYTES).read_to_end(&mut part) {
                    Ok(0) => None,
                    Ok(_) => Some(part),
                    Err(error) => {
                        failed = Some(error.to_string());
                        None
                    }
                }
            });
            store.put_content(digest, parts)?;
        } else if let Some(place) = listed.place() {
            let mut bytes = Vec::new();
            failed = read_parts(archive, &listed.name, |part| bytes.extend_from_slice(part)).err();
            write_file(&data.join(place), &bytes)?;
        }
        if let Some(error) = failed {
            return Err(unread(error));
        }
    }
    store.put_entries(entries)?;
    let (mut going_on, mut stopped) = (Vec::new(), Vec::new());
    for run in store.runs()?.into_iter().filter(|run| !run.head.state.is_over()) {
        // A job that cannot be read here may be anything.
        let plain = Job::parse(&run.job_toml)
            .is_ok_and(|job| job.privacy.is_none() && job.secure_aggregation.is_none());
        if plain {
            going_on.push(run.run);
        } else {
            store.set_state(run.run, &RunState::Stopped)?;
            stopped.push(run.run);
        }
    }
    let nodes =
        store.nodes()?.into_iter().filter(|node| node.revoked.is_none()).map(|node| node.name).collect();
    drop(store);
    // The configuration last, as `init` does.
    write_file(&building.join(CONFIG), config_toml.as_bytes())?;
    folders.push(building.to_owned());
    folders.iter().try_for_each(|folder| sync(folder))?;
    Ok(Restored { config: PathBuf::new(), made: manifest.made, nodes, going_on, stopped })
}

/// Writes a file for its owner alone, durable on return.
fn write_file(path: &Path, bytes: &[u8]) -> Result<(), BackupError> {
    let written =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
    written.map_err(|error| io_error(path, &error))
}

#[cfg(test)]
mod tests;
