//! A node's own folder: key and certificate, models on their way in, updates on their way out.
//!
//! ```text
//! DIR/key.pem  certificate.pem  authority.pem  node.toml  lock
//! DIR/incoming/DIGEST.part          a model, as far as it came; deleted at the next start
//! DIR/outbox/RUN-ROUND.{update,json}  an update until its round is over; survives a restart
//! DIR/outbox/RUN-ROUND.metrics        a run's last noised metrics
//! DIR/residuals/RUN.residual         what updates left out: see `residuals`
//! DIR/ledger.jsonl …                the privacy ledger: see `account`
//! DIR/peers.json  masked-uploads.json …  other nodes and what was masked: see `masking`
//! ```
//!
//! Files appear whole or not at all: written beside their place, flushed, and renamed.

mod residuals;

pub use residuals::Residuals;

use std::borrow::Cow;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;
use tributary_common::model::to_bytes;
use tributary_common::record::Metrics;
use tributary_common::time::Time;

use crate::machine::{Kept, RoundKey};

/// Values of an update that are encoded and written at a time.
const BLOCK_VALUES: usize = 1 << 16;
/// Ending of the files of noised metrics.
const METRICS: &str = "metrics";

/// Why a node's folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// A file or folder cannot be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// Another process holds the lock.
    #[error("{}: another tributary-client runs on this folder; stop it first, or give this node its own folder", .0.display())]
    Locked(PathBuf),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> FolderError {
    let path = path.to_path_buf();
    move |cause| FolderError::Io { path, cause }
}

/// A folder that this process alone uses.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    residuals: Residuals,
    /// Held for as long as the process uses the folder.
    _lock: File,
}

/// What an update is, beside its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// The model that it changes.
    pub model: Digest,
    /// Its weight, in training examples.
    pub examples: u64,
    /// Whether it was made under `[privacy]`.
    pub private: bool,
    /// Whether its bytes are masked.
    pub masked: bool,
}

/// What is known of an update in the outbox.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    key: RoundKey,
    #[serde(flatten)]
    kept: Kept,
}

impl Folder {
    /// Opens or makes the folder, locks it, and deletes what a crash left half done.
    ///
    /// # Errors
    /// [`FolderError::Locked`] while another process uses it.
    pub fn open(dir: &Path) -> Result<Self, FolderError> {
        let (incoming, outbox, residuals) = (dir.join("incoming"), dir.join("outbox"), dir.join("residuals"));
        for folder in [dir, &incoming, &outbox, &residuals] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at(folder))?;
        }
        let path = dir.join("lock");
        let lock =
            OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FolderError::Locked(dir.to_path_buf())),
            Err(TryLockError::Error(cause)) => return Err(FolderError::Io { path, cause }),
        }
        for path in files(dir)?.into_iter().chain(files(&outbox)?).chain(files(&residuals)?) {
            if path.extension().is_some_and(|extension| extension == "tmp") {
                remove(&path)?;
            }
        }
        let folder = Self { dir: dir.to_path_buf(), residuals: Residuals::new(residuals), _lock: lock };
        for path in files(&incoming)? {
            remove(&path)?;
        }
        Ok(folder)
    }

    /// What updates left out.
    pub fn residuals(&self) -> &Residuals {
        &self.residuals
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file called `name` in this folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where the part of a model that has arrived lies.
    pub fn part_path(&self, model: Digest) -> PathBuf {
        self.dir.join("incoming").join(format!("{model}.part"))
    }

    /// Where a kept update lies.
    pub fn update_path(&self, key: RoundKey) -> PathBuf {
        self.entry_path(key, "update")
    }

    fn entry_path(&self, key: RoundKey, extension: &str) -> PathBuf {
        self.dir.join("outbox").join(format!("{}-{}.{extension}", key.run, key.round))
    }

    /// Keeps an update that is sent as it is, `f32`, little endian; on return it is flushed to the disk.
    ///
    /// # Errors
    /// [`FolderError::Io`], such as a full disk; then nothing is kept.
    pub fn keep_values(
        &self,
        key: RoundKey,
        facts: Facts,
        delta: &[f32],
        now: Time,
    ) -> Result<Kept, FolderError> {
        // Never a second copy of the whole: models may be large.
        let blocks = delta.chunks(BLOCK_VALUES).map(|block| Cow::Owned(to_bytes(block)));
        self.keep_blocks(key, facts, blocks, now)
    }

    /// Keeps an encoded update; on return it is flushed to the disk. Its digest is BLAKE3.
    ///
    /// # Errors
    /// [`FolderError::Io`], such as a full disk; then nothing is kept.
    pub fn keep_bytes(
        &self,
        key: RoundKey,
        facts: Facts,
        bytes: &[u8],
        now: Time,
    ) -> Result<Kept, FolderError> {
        self.keep_blocks(key, facts, std::iter::once(Cow::Borrowed(bytes)), now)
    }

    fn keep_blocks<'a>(
        &self,
        key: RoundKey,
        Facts { model, examples, private, masked }: Facts,
        blocks: impl Iterator<Item = Cow<'a, [u8]>>,
        now: Time,
    ) -> Result<Kept, FolderError> {
        let (mut hasher, mut length) = (blake3::Hasher::new(), 0);
        write_whole(&self.update_path(key), 0o600, |file| {
            for block in blocks {
                hasher.update(&block);
                length += block.len() as u64;
                file.write_all(&block)?;
            }
            Ok(())
        })?;
        let digest = Some(hasher.finalize().into());
        let kept = Kept { model, digest, bytes: length, examples, private, masked, stored: now };
        let path = self.entry_path(key, "json");
        let json = serde_json::to_vec(&Entry { key, kept }).map_err(io::Error::from).map_err(at(&path))?;
        write_whole(&path, 0o600, |file| file.write_all(&json))?;
        Ok(kept)
    }

    /// Keeps noised metrics: they are told again, never made again. Earlier ones of the same run are deleted.
    ///
    /// # Errors
    /// [`FolderError::Io`]; then they must not be told.
    pub fn keep_metrics(&self, key: RoundKey, metrics: &Metrics) -> Result<(), FolderError> {
        let path = self.entry_path(key, METRICS);
        write_whole(&path, 0o600, |file| file.write_all(&metrics.to_json()))?;
        let run = format!("{}-", key.run);
        for other in files(&self.dir.join("outbox"))? {
            let name = other.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if other != path && name.starts_with(&run) && is_metrics(&other) {
                remove(&other)?;
            }
        }
        Ok(())
    }

    /// The metrics that were kept for a round.
    ///
    /// # Errors
    /// [`FolderError::Io`], for damaged ones too.
    pub fn metrics(&self, key: RoundKey) -> Result<Option<Metrics>, FolderError> {
        let path = self.entry_path(key, METRICS);
        match fs::read(&path) {
            Ok(json) => {
                let metrics = serde_json::from_slice(&json).map_err(io::Error::from).map_err(at(&path))?;
                Ok(Some(metrics))
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(at(&path)(cause)),
        }
    }

    /// Deletes a kept update, if it is there.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn forget(&self, key: RoundKey) -> Result<(), FolderError> {
        remove(&self.entry_path(key, "json"))?;
        remove(&self.update_path(key))
    }

    /// The updates kept from before, by round. One that is incomplete or damaged is deleted and logged.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn outbox(&self) -> Result<Vec<(RoundKey, Kept)>, FolderError> {
        let mut entries = Vec::new();
        let mut known = Vec::new();
        let paths = files(&self.dir.join("outbox"))?;
        for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        {
            let entry = fs::read(path).ok().and_then(|json| serde_json::from_slice::<Entry>(&json).ok());
            match entry {
                Some(Entry { key, kept })
                    if *path == self.entry_path(key, "json") && self.is_whole(key, &kept) =>
                {
                    known.extend([path.clone(), self.update_path(key)]);
                    entries.push((key, kept));
                }
                _ => tracing::warn!("{}: the kept update is damaged; it is deleted", path.display()),
            }
        }
        for path in paths.iter().filter(|path| !known.contains(path) && !is_metrics(path)) {
            remove(path)?;
        }
        entries.sort_by_key(|(key, _)| *key);
        Ok(entries)
    }

    fn is_whole(&self, key: RoundKey, kept: &Kept) -> bool {
        let Ok(mut file) = File::open(self.update_path(key)) else { return false };
        if file.metadata().map(|metadata| metadata.len()).ok() != Some(kept.bytes) {
            return false;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&mut file).is_ok() && kept.digest == Some(hasher.finalize().into())
    }
}

fn is_metrics(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == METRICS)
}

/// Puts a file in its place whole: written beside it with `mode`, flushed, renamed, and the folder flushed.
pub(crate) fn write_whole(
    path: &Path,
    mode: u32,
    content: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), FolderError> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let write = || {
        // A leftover of another mode would keep its mode.
        match fs::remove_file(&temporary) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        content(&mut file)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            Some(parent) => File::open(parent)?.sync_all(),
            None => File::open(".")?.sync_all(),
        }
    };
    write().map_err(|cause| {
        let _ = fs::remove_file(&temporary); // as far as it came: the error above says more
        FolderError::Io { path: path.to_path_buf(), cause }
    })
}

/// Reads a small text file of at most `most` bytes.
pub(crate) fn read_text(path: &Path, most: u64) -> Result<String, FolderError> {
    let mut text = String::new();
    let file = File::open(path).map_err(at(path))?;
    file.take(most).read_to_string(&mut text).map_err(at(path))?;
    Ok(text)
}

fn remove(path: &Path) -> Result<(), FolderError> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(at(path)(cause)),
        _ => Ok(()),
    }
}

/// The regular files of a folder, sorted.
fn files(dir: &Path) -> Result<Vec<PathBuf>, FolderError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        let entry = entry.map_err(at(dir))?;
        if entry.file_type().map_err(at(dir))?.is_file() {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tributary_common::ids::RunId;

    fn key(round: u32) -> RoundKey {
        RoundKey { run: RunId(0xabc), round }
    }

    fn facts(model: Digest) -> Facts {
        Facts { model, examples: 7, private: false, masked: false }
    }

    #[test]
    fn kept_updates_survive_and_leftovers_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let model = Digest::of(b"model");
        let delta: Vec<f32> = (0..100_000).map(|i| i as f32 * 0.5).collect();
        let folder = Folder::open(dir.path()).unwrap();
        let kept: Vec<_> = (1..=4)
            .map(|round| (key(round), folder.keep_values(key(round), facts(model), &delta, Time(9)).unwrap()))
            .collect();
        assert_eq!(kept[0].1.digest, Some(tributary_common::model::digest(&delta)));
        assert_eq!(fs::read(folder.update_path(key(1))).unwrap(), to_bytes(&delta));
        let whole = folder.keep_bytes(key(1), facts(model), &to_bytes(&delta), Time(9)).unwrap();
        assert_eq!(whole, kept[0].1, "however it is written");
        folder.forget(key(2)).unwrap();
        folder.forget(key(2)).unwrap();
        drop(folder);
        // A crash between the two files, in the middle of one, damage, and strange files.
        let outbox = dir.path().join("outbox");
        fs::remove_file(outbox.join("0000000000000abc-3.json")).unwrap();
        fs::write(outbox.join("0000000000000abc-5.update.tmp"), "half").unwrap();
        fs::write(outbox.join("0000000000000abc-6.json"), "{").unwrap();
        let mut damaged = to_bytes(&delta);
        damaged[5] ^= 1;
        fs::write(outbox.join("0000000000000abc-4.update"), damaged).unwrap();
        fs::write(dir.path().join("incoming").join("x.part"), "half").unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        assert_eq!(folder.outbox().unwrap(), kept[..1]);
        let left: Vec<_> = files(&outbox).unwrap();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(files(&dir.path().join("incoming")).unwrap().is_empty());
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = Folder::open(dir.path()).unwrap();
        let error = Folder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("another tributary-client runs"), "{error}");
        drop(first);
        Folder::open(dir.path()).unwrap();
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_whole(&path, 0o600, |file| file.write_all(b"old")).unwrap();
        let broken = write_whole(&path, 0o600, |file| {
            file.write_all(b"new")?;
            Err(io::Error::other("disk full"))
        });
        assert!(broken.unwrap_err().to_string().contains("disk full"));
        assert_eq!(read_text(&path, 10).unwrap(), "old");
        assert_eq!(files(dir.path()).unwrap().len(), 1);
    }
}
