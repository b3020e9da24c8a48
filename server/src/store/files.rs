//! Content-addressed files: a folder in which each file is named by the BLAKE3 digest of its bytes.
//!
//! A file appears whole or not at all: it is written under a temporary name, synced, renamed, and then the
//! folder is synced. Bytes pass through in parts, so that a model is never held twice.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tributary_common::digest::Digest;

use super::StoreError;

/// Bytes read at a time: a multiple of four, so that no `f32` is cut.
const PART_BYTES: u64 = 1 << 20;

/// Ends the name of a file that is still being written.
const TEMPORARY: &str = ".partial";

/// One folder of content-addressed files.
#[derive(Debug)]
pub(super) struct ContentFolder {
    path: PathBuf,
    /// What the files are, for errors.
    what: &'static str,
    /// Numbers temporary names: two threads may write the same content.
    temporaries: AtomicU64,
}

/// An error of the file system at `path`.
pub(super) fn io_error(path: &Path, error: &std::io::Error) -> StoreError {
    StoreError::Io { path: path.display().to_string(), what: error.to_string() }
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|error| io_error(path, &error))
}

/// Creates a folder and what leads to it, each new name durable in its parent.
pub(super) fn create_folder(path: &Path) -> Result<(), StoreError> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    create_folder(parent)?;
    match fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(io_error(path, &error)),
        _ => {}
    }
    sync_folder(parent)
}

impl ContentFolder {
    /// Opens `path`, creates it if needed, and removes what an interrupted write left behind.
    ///
    /// The caller holds the store's lock: nobody else writes here.
    pub(super) fn open(path: PathBuf, what: &'static str) -> Result<Self, StoreError> {
        create_folder(&path)?;
        let folder = Self { path, what, temporaries: AtomicU64::new(0) };
        for name in folder.names()? {
            if name.ends_with(TEMPORARY) {
                folder.remove_name(&name)?;
            }
        }
        Ok(folder)
    }

    /// Whether `path` holds at least one complete file.
    pub(super) fn holds_any(path: &Path) -> Result<bool, StoreError> {
        if !path.is_dir() {
            return Ok(false);
        }
        let entries = fs::read_dir(path).map_err(|error| io_error(path, &error))?;
        Ok(entries.flatten().any(|entry| entry.file_name().to_string_lossy().parse::<Digest>().is_ok()))
    }

    /// The file of `digest`.
    fn file(&self, digest: Digest) -> PathBuf {
        self.path.join(digest.to_string())
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        let failed = |error: std::io::Error| io_error(&self.path, &error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            // A name that is not UTF-8 is not one of ours.
            names.extend(entry.map_err(failed)?.file_name().into_string().ok());
        }
        Ok(names)
    }

    fn remove_name(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(io_error(&path, &error)),
            _ => Ok(()),
        }
    }

    /// Stores the bytes of `parts`, whose digest is `digest`, durable on return.
    ///
    /// A sound file that is there already stays; a damaged one is replaced.
    pub(super) fn put(&self, digest: Digest, parts: impl Iterator<Item = Vec<u8>>) -> Result<(), StoreError> {
        if self.read(digest, |_| {}).is_ok() {
            // Its name may come from a process that was killed before it synced the folder.
            return sync_folder(&self.path);
        }
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let temporary = self.path.join(format!("{digest}.{number}{TEMPORARY}"));
        let written = Self::write(&temporary, parts).and_then(|()| fs::rename(&temporary, self.file(digest)));
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            return Err(io_error(&temporary, &error));
        }
        sync_folder(&self.path)
    }

    fn write(path: &Path, parts: impl Iterator<Item = Vec<u8>>) -> std::io::Result<()> {
        let mut file = File::create_new(path)?;
        for part in parts {
            file.write_all(&part)?;
        }
        file.sync_all()
    }

    /// Length in bytes of the file of `digest`; `None` if there is none.
    pub(super) fn length(&self, digest: Digest) -> Result<Option<u64>, StoreError> {
        let path = self.file(digest);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => Ok(Some(metadata.len())),
            Ok(_) => Err(self.damaged(digest, "it is not a file")),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error(&path, &error)),
        }
    }

    /// Hands the bytes of `digest` to `take`, part after part, and checks them as they pass: what `take` got is
    /// good only if this returns `Ok`. Every part but the last is a whole number of `f32`.
    pub(super) fn read(&self, digest: Digest, mut take: impl FnMut(&[u8])) -> Result<(), StoreError> {
        if self.length(digest)?.is_none() {
            return Err(StoreError::Missing { what: self.what, name: digest.to_string() });
        }
        let path = self.file(digest);
        let failed = |error: std::io::Error| io_error(&path, &error);
        let file = File::open(&path).map_err(failed)?;
        let mut hasher = blake3::Hasher::new();
        let mut part = Vec::new();
        loop {
            part.clear();
            (&file).take(PART_BYTES).read_to_end(&mut part).map_err(failed)?;
            if part.is_empty() {
                break;
            }
            hasher.update(&part);
            take(&part);
        }
        let found = Digest::from(hasher.finalize());
        if found != digest {
            return Err(self.damaged(digest, &format!("its bytes have the digest {}", found.short())));
        }
        Ok(())
    }

    /// The error of a file whose content is wrong.
    pub(super) fn damaged(&self, digest: Digest, detail: &str) -> StoreError {
        let path = self.file(digest).display().to_string();
        StoreError::Damaged { what: self.what, path, detail: detail.to_owned() }
    }

    /// Deletes the file of `digest`, if there is one.
    pub(super) fn remove(&self, digest: Digest) -> Result<(), StoreError> {
        self.remove_name(&digest.to_string())
    }

    /// Deletes every complete file that is not in `named`. Returns how many.
    pub(super) fn retain(&self, named: &BTreeSet<Digest>) -> Result<usize, StoreError> {
        let mut removed = 0;
        for name in self.names()? {
            if name.parse().is_ok_and(|digest| !named.contains(&digest)) {
                self.remove_name(&name)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}
