//! Uploads under way: the good bytes of each, in memory while the budget lasts and in files beyond it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tributary_common::digest::Digest;
use tributary_common::record::UploadKey;
use tributary_proto::coordinator::Chunk;
use tributary_proto::{Upload, WireError, chunk_data};

use crate::driver::Attempt;
use crate::run::Payload;

/// Why a part of an upload is not taken; one line that may be sent to the node, but for [`StagingError::Io`].
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// The same attempt already has other bytes of this node.
    #[error("another update of this node for the same attempt is here already, with digest {0}")]
    AnotherUpdate(Digest),
    /// A chunk is damaged or out of place; what was good before stays.
    #[error(transparent)]
    Chunk(#[from] WireError),
    /// All bytes are here, and they are not what the header announced; they are thrown away.
    #[error("the update does not have its digest: send it again from the start")]
    Digest,
    /// A newer upload of the same update took over, or the attempt ended.
    #[error("a newer upload took the place of this one")]
    Replaced,
    /// The disk refused.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        error: io::Error,
    },
}

/// All uploads under way.
#[derive(Debug)]
pub struct Staging {
    folder: PathBuf,
    budget: Arc<Budget>,
    slots: Mutex<BTreeMap<UploadKey, Slot>>,
    owners: AtomicU64,
}

#[derive(Debug)]
struct Budget {
    bytes: u64,
    used: AtomicU64,
}

/// A part of the memory budget; it is given back when this is dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone)]
struct Slot {
    attempt: u32,
    digest: Digest,
    total_bytes: u64,
    content: Arc<Mutex<Content>>,
}

/// What is here of one upload.
#[derive(Debug)]
struct Content {
    /// The one writer that may add to it.
    owner: u64,
    received: u64,
    hasher: blake3::Hasher,
    bytes: Storage,
}

#[derive(Debug)]
enum Storage {
    Memory(Vec<u8>, Reservation),
    File(File, PathBuf),
    /// The whole was handed over.
    Gone,
}

/// The right to add to one upload.
#[derive(Debug, Clone)]
pub struct Writer {
    content: Arc<Mutex<Content>>,
    owner: u64,
    digest: Digest,
    total_bytes: u64,
}

/// A whole update with its digest checked.
#[derive(Debug)]
pub struct Staged {
    /// Its content.
    pub payload: Payload,
    /// Its part of the memory budget, to be kept as long as the content.
    pub reservation: Option<Reservation>,
}

impl Staging {
    /// Uses `folder`, which is emptied, and up to `memory_bytes` of memory for the content of all uploads together.
    pub fn open(folder: &Path, memory_bytes: u64) -> Result<Self, StagingError> {
        let failed = |error| StagingError::Io { path: folder.display().to_string(), error };
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        fs::create_dir_all(folder).map_err(failed)?;
        Ok(Self {
            folder: folder.to_owned(),
            budget: Arc::new(Budget { bytes: memory_bytes, used: AtomicU64::new(0) }),
            slots: Mutex::default(),
            owners: AtomicU64::new(0),
        })
    }

    /// Keeps every upload in memory and touches no disk: for a simulation, which has few at a time.
    pub fn in_memory() -> Self {
        let budget = Arc::new(Budget { bytes: u64::MAX, used: AtomicU64::new(0) });
        Self { folder: PathBuf::new(), budget, slots: Mutex::default(), owners: AtomicU64::new(0) }
    }

    /// How many good bytes of `upload` are here.
    pub fn received(&self, key: &UploadKey, upload: &Upload) -> Result<u64, StagingError> {
        let slot = {
            let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.get(key).filter(|slot| slot.attempt == upload.attempt).cloned()
        };
        let Some(slot) = slot else { return Ok(0) };
        if slot.digest != upload.digest {
            return Err(StagingError::AnotherUpdate(slot.digest));
        }
        let content = slot.content.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(content.received)
    }

    /// Begins or resumes an upload. A writer that an earlier, broken connection left behind loses its right.
    pub fn writer(&self, key: &UploadKey, upload: &Upload) -> Result<Writer, StagingError> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let known = slots.get(key).filter(|slot| slot.attempt == upload.attempt);
        let content = match known {
            Some(slot) if slot.digest != upload.digest || slot.total_bytes != upload.total_bytes => {
                return Err(StagingError::AnotherUpdate(slot.digest));
            }
            Some(slot) => slot.content.clone(),
            None => {
                let bytes = self.storage(key, upload.total_bytes)?;
                let content = Content { owner: 0, received: 0, hasher: blake3::Hasher::new(), bytes };
                let content = Arc::new(Mutex::new(content));
                let Upload { attempt, digest, total_bytes, .. } = *upload;
                slots.insert(key.clone(), Slot { attempt, digest, total_bytes, content: content.clone() });
                content
            }
        };
        drop(slots);
        let owner = self.owners.fetch_add(1, Ordering::Relaxed) + 1;
        content.lock().unwrap_or_else(PoisonError::into_inner).owner = owner;
        Ok(Writer { content, owner, digest: upload.digest, total_bytes: upload.total_bytes })
    }

    fn storage(&self, key: &UploadKey, total_bytes: u64) -> Result<Storage, StagingError> {
        let within = |used: u64| used.checked_add(total_bytes).filter(|sum| *sum <= self.budget.bytes);
        if let Ok(capacity) = usize::try_from(total_bytes)
            && self.budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
        {
            let reservation = Reservation { budget: self.budget.clone(), bytes: total_bytes };
            return Ok(Storage::Memory(Vec::with_capacity(capacity), reservation));
        }
        let path = self.folder.join(format!("{}-{}-{}", key.run, key.round, key.node));
        let failed = |error| StagingError::Io { path: path.display().to_string(), error };
        // The open file outlives its name: whatever happens, its space comes back when it is closed.
        let _ = fs::remove_file(&path);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(failed)?;
        fs::remove_file(&path).map_err(failed)?;
        Ok(Storage::File(file, path))
    }

    /// Forgets an upload that was handed over or thrown away, if `writer` is still the one that may.
    pub fn forget(&self, key: &UploadKey, writer: &Writer) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.get(key).is_some_and(|slot| Arc::ptr_eq(&slot.content, &writer.content)) {
            slots.remove(key);
        }
    }

    /// Drops everything that is not for `attempt`.
    pub fn keep_only(&self, attempt: Option<Attempt>) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|key, slot| {
            Some(Attempt { run: key.run, round: key.round, attempt: slot.attempt }) == attempt
        });
    }

    /// How many uploads are under way.
    pub fn len(&self) -> usize {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether no upload is under way.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Writer {
    /// How many good bytes are here.
    pub fn received(&self) -> u64 {
        self.content.lock().unwrap_or_else(PoisonError::into_inner).received
    }

    /// Whether all bytes are here.
    pub fn is_whole(&self) -> bool {
        self.received() == self.total_bytes
    }

    /// Checks a chunk and adds it. It hashes and may write to the disk: call it off the async threads.
    pub fn add(&self, chunk: Chunk) -> Result<u64, StagingError> {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        if content.owner != self.owner {
            return Err(StagingError::Replaced);
        }
        let at = content.received;
        let data = chunk_data(chunk, at, self.total_bytes)?;
        match &mut content.bytes {
            Storage::Memory(bytes, _) => bytes.extend_from_slice(&data),
            // At its place, so that what a failed write left behind is overwritten.
            Storage::File(file, path) => file
                .write_all_at(&data, at)
                .map_err(|error| StagingError::Io { path: path.display().to_string(), error })?,
            Storage::Gone => return Err(StagingError::Replaced),
        }
        content.hasher.update(&data);
        content.received = at + data.len() as u64;
        Ok(content.received)
    }

    /// Checks the whole's digest and takes it out. On [`StagingError::Digest`] nothing of it is left.
    pub fn finish(&self) -> Result<Staged, StagingError> {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        if content.owner != self.owner || content.received != self.total_bytes {
            return Err(StagingError::Replaced);
        }
        let bytes = std::mem::replace(&mut content.bytes, Storage::Gone);
        if Digest::from(content.hasher.finalize()) != self.digest {
            return Err(StagingError::Digest);
        }
        match bytes {
            Storage::Memory(bytes, reservation) => {
                Ok(Staged { payload: Payload::Bytes(bytes), reservation: Some(reservation) })
            }
            Storage::File(file, _) => Ok(Staged { payload: Payload::File(file), reservation: None }),
            Storage::Gone => Err(StagingError::Replaced),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};

    use tributary_common::ids::RunId;
    use tributary_proto::chunk;

    use super::*;

    const UPDATE: &[u8] = b"sixteen bytes...";

    fn key(node: &str) -> UploadKey {
        UploadKey { run: RunId(7), round: 2, node: node.parse().unwrap() }
    }

    fn upload(attempt: u32, content: &[u8]) -> Upload {
        let (digest, total_bytes) = (Digest::of(content), content.len() as u64);
        Upload { run: RunId(7), round: 2, attempt, digest, total_bytes, examples: 3 }
    }

    fn part(from: usize, to: usize) -> Chunk {
        chunk(from as u64, UPDATE[from..to].to_vec().into(), UPDATE.len() as u64)
    }

    fn content(staged: &mut Staged) -> Vec<u8> {
        match &mut staged.payload {
            Payload::Bytes(bytes) => bytes.clone(),
            Payload::File(file) => {
                let mut bytes = Vec::new();
                file.rewind().unwrap();
                file.read_to_end(&mut bytes).unwrap();
                bytes
            }
            Payload::Values(_) => unreachable!("staging holds bytes"),
        }
    }

    fn staging(memory_bytes: u64) -> (tempfile::TempDir, Staging) {
        let folder = tempfile::tempdir().unwrap();
        let staging = Staging::open(&folder.path().join("staging"), memory_bytes).unwrap();
        (folder, staging)
    }

    #[test]
    fn a_broken_upload_goes_on_where_it_broke() {
        for memory_bytes in [0, 100] {
            let (_folder, staging) = staging(memory_bytes);
            let (key, upload) = (key("a"), upload(1, UPDATE));
            assert_eq!(staging.received(&key, &upload).unwrap(), 0);
            let first = staging.writer(&key, &upload).unwrap();
            assert_eq!(first.add(part(0, 5)).unwrap(), 5);
            // A damaged chunk, and one out of place: what is there stays good.
            let mut damaged = part(5, 9);
            damaged.data = vec![0; 4].into();
            assert!(matches!(first.add(damaged), Err(StagingError::Chunk(_))));
            assert!(matches!(first.add(part(4, 9)), Err(StagingError::Chunk(_))));
            assert!(matches!(first.finish(), Err(StagingError::Replaced)), "it is not whole");
            assert_eq!(staging.received(&key, &upload).unwrap(), 5);

            let second = staging.writer(&key, &upload).unwrap();
            assert!(matches!(first.add(part(5, 9)), Err(StagingError::Replaced)));
            assert_eq!(second.add(part(5, 16)).unwrap(), 16);
            assert!(second.is_whole());
            let mut staged = second.finish().unwrap();
            assert_eq!(content(&mut staged), UPDATE);
            assert_eq!(staged.reservation.is_some(), memory_bytes > 0);
            assert!(matches!(second.finish(), Err(StagingError::Replaced)), "it is handed over once");
            staging.forget(&key, &second);
            assert!(staging.is_empty());
        }
    }

    #[test]
    fn beyond_the_budget_uploads_are_in_files_that_leave_nothing_behind() {
        let (folder, staging) = staging(20);
        let first = staging.writer(&key("a"), &upload(1, UPDATE)).unwrap();
        let second = staging.writer(&key("b"), &upload(1, UPDATE)).unwrap();
        for writer in [&first, &second] {
            writer.add(part(0, 16)).unwrap();
        }
        let (mut in_memory, mut in_file) = (first.finish().unwrap(), second.finish().unwrap());
        assert!(matches!(in_memory.payload, Payload::Bytes(_)));
        assert!(matches!(in_file.payload, Payload::File(_)));
        assert_eq!(content(&mut in_memory), content(&mut in_file));
        assert_eq!(fs::read_dir(folder.path().join("staging")).unwrap().count(), 0);
        // The budget comes back with what was in memory, not before.
        let third = staging.writer(&key("c"), &upload(1, UPDATE)).unwrap();
        third.add(part(0, 16)).unwrap();
        assert!(matches!(third.finish().unwrap().payload, Payload::File(_)));
        drop(in_memory);
        let fourth = staging.writer(&key("d"), &upload(1, UPDATE)).unwrap();
        fourth.add(part(0, 16)).unwrap();
        assert!(matches!(fourth.finish().unwrap().payload, Payload::Bytes(_)));
    }

    #[test]
    fn a_whole_with_another_digest_is_thrown_away() {
        let (_folder, staging) = staging(100);
        let key = key("a");
        let announced = Upload { digest: Digest::of(b"something else"), ..upload(1, UPDATE) };
        let writer = staging.writer(&key, &announced).unwrap();
        writer.add(part(0, 16)).unwrap();
        assert!(matches!(writer.finish(), Err(StagingError::Digest)));
        staging.forget(&key, &writer);
        assert_eq!(staging.received(&key, &announced).unwrap(), 0);
        let again = staging.writer(&key, &upload(1, UPDATE)).unwrap();
        again.add(part(0, 16)).unwrap();
        again.finish().unwrap();
    }

    #[test]
    fn one_attempt_has_one_update_of_a_node() {
        let (_folder, staging) = staging(100);
        let key = key("a");
        let (first, other) = (upload(1, UPDATE), upload(1, b"another update!!"));
        staging.writer(&key, &first).unwrap().add(part(0, 8)).unwrap();
        let refused = staging.writer(&key, &other).unwrap_err();
        assert!(matches!(refused, StagingError::AnotherUpdate(digest) if digest == first.digest));
        assert!(matches!(staging.received(&key, &other), Err(StagingError::AnotherUpdate(_))));
        // The next attempt starts anew.
        let next = Upload { attempt: 2, ..other };
        assert_eq!(staging.received(&key, &next).unwrap(), 0);
        assert_eq!(staging.writer(&key, &next).unwrap().received(), 0);
    }

    #[test]
    fn what_is_for_an_ended_attempt_is_dropped() {
        let (_folder, staging) = staging(16);
        let writer = staging.writer(&key("a"), &upload(1, UPDATE)).unwrap();
        let attempt = |attempt| Some(Attempt { run: RunId(7), round: 2, attempt });
        staging.keep_only(attempt(1));
        assert_eq!(staging.len(), 1);
        staging.keep_only(attempt(2));
        assert!(staging.is_empty());
        drop(writer);
        let next = staging.writer(&key("a"), &upload(2, UPDATE)).unwrap();
        next.add(part(0, 16)).unwrap();
        assert!(next.finish().unwrap().reservation.is_some(), "the memory was given back");
        staging.keep_only(None);
        assert!(staging.is_empty());
    }

    #[test]
    fn leftovers_of_a_crash_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("0000-1-a"), b"left").unwrap();
        Staging::open(folder.path(), 0).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
