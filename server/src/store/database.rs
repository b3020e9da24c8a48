//! Small JSON values under text keys in sled, made durable and checked where sled does neither.
//!
//! sled 0.34 calls `sync_file_range` where it says `flush`, panics or silently loses its tail when its files
//! are damaged, and moves pages above 128 KiB into files that it neither syncs nor frees. Hence, here:
//!
//! - after every write sled's `db` file and its folder are synced, and then the number of the write is noted
//!   in the side file: sled coming back older than that is damage;
//! - every value carries a checksum bound to its key, and the entry `meta`, replaced in every write, the count
//!   and the sum of all checksums: a value that was changed, lost or brought back is damage, found on opening;
//! - every call of sled runs inside `catch_unwind`;
//! - a value above [`INLINE_BYTES`] lies in a content-addressed file of its own, which sled's entry names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;

use super::StoreError;
use super::files::{ContentFolder, io_error};
use super::sequence::SequenceFile;

/// The largest value inside sled, with its checksum. sled writes a leaf of up to twenty entries as one page,
/// and a page above 128 KiB as an unsynced file.
pub(super) const INLINE_BYTES: usize = 4096;

/// Bytes of a checksum: the head of a BLAKE3 digest.
const CHECK_BYTES: usize = 16;

/// The key of the entry that describes all others.
const META: &str = "meta";

/// sled's page cache. Ours is a database of kilobytes to some tens of megabytes.
const CACHE_BYTES: u64 = 32 << 20;

/// How long a sled that was just closed in this process may hold its lock.
const CLOSING_SECONDS: u64 = 5;

/// Where the payload of an entry lies.
const INLINE: u8 = 0;
const IN_A_FILE: u8 = 1;

/// Describes all other entries; replaced in every write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Meta {
    /// Number of the last write.
    sequence: u64,
    /// Number of entries, this one left out.
    entries: u64,
    /// Sum modulo 2^128 of their checksums.
    sum: u128,
}

impl Meta {
    fn add(&mut self, check: u128) {
        self.entries = self.entries.wrapping_add(1);
        self.sum = self.sum.wrapping_add(check);
    }

    fn subtract(&mut self, check: u128) {
        self.entries = self.entries.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(check);
    }
}

/// An entry whose checksum is right.
struct Entry {
    check: u128,
    payload: Payload,
}

enum Payload {
    Json(Vec<u8>),
    File(Digest),
}

/// What the next write starts from.
#[derive(Debug)]
struct State {
    meta: Meta,
    /// How many entries name each file of `large`.
    files: BTreeMap<Digest, usize>,
    /// A write failed half way: what is durable is not known until the store is opened again.
    failed: bool,
}

/// The database of one store's folder, locked against other processes.
#[derive(Debug)]
pub(super) struct Database {
    // In the order in which they must be closed: the lock goes last.
    sled: sled::Db,
    /// sled's own file and its folder, for syncing.
    file: File,
    folder: File,
    path: PathBuf,
    large: ContentFolder,
    state: Mutex<State>,
    sequence: SequenceFile,
}

/// The changes of one atomic write, and the state before them.
pub(super) struct Write<'a> {
    database: &'a Database,
    changes: BTreeMap<String, Option<Vec<u8>>>,
}

impl Write<'_> {
    /// The value of `key` before this write.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StoreError> {
        self.database.get(key)
    }

    /// Sets `key`.
    pub(super) fn put<T: Serialize>(&mut self, key: String, value: &T) -> Result<(), StoreError> {
        let json = serde_json::to_vec(value).map_err(|error| StoreError::Io {
            path: self.database.path.display().to_string(),
            what: format!("{key} cannot be written as JSON: {error}"),
        })?;
        self.changes.insert(key, Some(json));
        Ok(())
    }

    /// Sets `key` to a value whose JSON text is given, unless it is the database's own or the text is not JSON.
    pub(super) fn put_text(&mut self, key: String, json: String) -> Result<(), StoreError> {
        let checked = serde_json::from_str::<serde::de::IgnoredAny>(&json).map_err(|error| error.to_string());
        let checked = checked.and_then(|_| if key == META { Err("is reserved".to_owned()) } else { Ok(()) });
        checked.map_err(|error| damage(&self.database.path, format!("{key}: {error}")))?;
        self.changes.insert(key, Some(json.into_bytes()));
        Ok(())
    }

    /// Removes `key`.
    pub(super) fn remove(&mut self, key: String) {
        self.changes.insert(key, None);
    }
}

impl Database {
    /// Opens the database in `dir/store`, with large values in `dir/records`, and checks every entry; creates
    /// it where nothing was acknowledged yet.
    ///
    /// `sequence` and `acknowledged` are what [`SequenceFile::open`] gave, 0 for a new one.
    pub(super) fn open(dir: &Path, sequence: SequenceFile, acknowledged: u64) -> Result<Self, StoreError> {
        let path = dir.join("store");
        let damaged = |detail: String| damage(&path, detail);
        let db_path = path.join("db");
        if acknowledged > 0 && !db_path.is_file() {
            return Err(damaged(format!(
                "its file db is missing, and {acknowledged} writes were acknowledged"
            )));
        }
        let large = ContentFolder::open(dir.join("records"), "a record")?;
        super::files::create_folder(&path)?;
        let sled = open_sled(dir, &path)?;
        let opened = (|| {
            let (meta, files) = verify(&sled, &path, acknowledged)?;
            let file = File::open(&db_path).map_err(|error| io_error(&db_path, &error))?;
            let folder = File::open(&path).map_err(|error| io_error(&path, &error))?;
            Ok((meta, files, file, folder))
        })();
        let (meta, files, file, folder) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // Closing a damaged sled may panic too, and the first error is the one to tell.
                let _ = catch_unwind(AssertUnwindSafe(move || drop(sled)));
                return Err(error);
            }
        };
        let named: BTreeSet<Digest> = files.keys().copied().collect();
        for digest in &named {
            if large.length(*digest)?.is_none() {
                return Err(large.damaged(*digest, "the file is missing"));
            }
        }
        large.retain(&named)?;
        let state = Mutex::new(State { meta, files, failed: false });
        let database = Self { sled, file, folder, path, large, state, sequence };
        // What is seen from now on must not vanish: a write may be here that was not acknowledged.
        database.make_durable(meta.sequence)?;
        Ok(database)
    }

    /// The value of `key`.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StoreError> {
        match guarded(&self.path, || self.sled.get(key))? {
            Some(bytes) => self.resolve(key, bytes),
            None => Ok(None),
        }
    }

    /// The keys that begin with `prefix`, in order, with their values.
    pub(super) fn scan<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<(String, T)>, StoreError> {
        let mut found = Vec::new();
        let mut entries = self.sled.scan_prefix(prefix);
        while let Some((key, bytes)) = guarded(&self.path, || entries.next().transpose())? {
            let key = text(&self.path, &key)?;
            found.extend(self.resolve(key, bytes.clone())?.map(|value| (key.to_owned(), value)));
        }
        Ok(found)
    }

    /// All keys but the database's own, in order, each with the JSON text of its value: inside a write, of one moment.
    pub(super) fn texts(&self) -> Result<Vec<(String, String)>, StoreError> {
        let mut found = Vec::new();
        let mut entries = self.sled.iter();
        while let Some((key, bytes)) = guarded(&self.path, || entries.next().transpose())? {
            let key = text(&self.path, &key)?;
            if key == META {
                continue;
            }
            let json = self.json(key, bytes.clone())?;
            let json = json.map(String::from_utf8).transpose();
            let json = json.map_err(|error| damage(&self.path, format!("{key} is not text: {error}")))?;
            found.extend(json.map(|json| (key.to_owned(), json)));
        }
        Ok(found)
    }

    /// Reads the value out of an entry. `None` if the entry was removed while its file was looked for.
    fn resolve<T: DeserializeOwned>(&self, key: &str, bytes: sled::IVec) -> Result<Option<T>, StoreError> {
        let Some(json) = self.json(key, bytes)? else { return Ok(None) };
        let value = serde_json::from_slice(&json);
        value.map(Some).map_err(|error| damage(&self.path, format!("{key} cannot be read: {error}")))
    }

    /// The JSON of an entry's value. `None` if the entry was removed while its file was looked for.
    fn json(&self, key: &str, mut bytes: sled::IVec) -> Result<Option<Vec<u8>>, StoreError> {
        loop {
            let digest = match read_entry(&self.path, key, &bytes)?.payload {
                Payload::Json(json) => return Ok(Some(json)),
                Payload::File(digest) => digest,
            };
            let mut json = Vec::new();
            match self.large.read(digest, |part| json.extend_from_slice(part)) {
                Ok(()) => return Ok(Some(json)),
                Err(StoreError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
            // A file goes when its entry is replaced: perhaps just now.
            match guarded(&self.path, || self.sled.get(key))? {
                Some(same) if same == bytes => return Err(self.large.damaged(digest, "the file is missing")),
                Some(newer) => bytes = newer,
                None => return Ok(None),
            }
        }
    }

    /// Makes all changes of `fill` in one atomic write, durable on return. Writes are one at a time, so what
    /// `fill` reads holds until its changes are made; if it fails, nothing changes.
    pub(super) fn write<T>(
        &self,
        fill: impl FnOnce(&mut Write<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut state = self.lock();
        let mut write = Write { database: self, changes: BTreeMap::new() };
        let answer = fill(&mut write)?;
        if !write.changes.is_empty() {
            self.commit(&mut state, write.changes)?;
        }
        Ok(answer)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit(
        &self,
        state: &mut State,
        changes: BTreeMap<String, Option<Vec<u8>>>,
    ) -> Result<(), StoreError> {
        if state.failed {
            return Err(StoreError::Io {
                path: self.path.display().to_string(),
                what: "an earlier write failed; nothing more is written until the coordinator is restarted"
                    .into(),
            });
        }
        let (mut meta, mut files) = (state.meta, state.files.clone());
        let mut batch = sled::Batch::default();
        meta.sequence += 1;
        for (key, json) in changes {
            if let Some(old) = guarded(&self.path, || self.sled.get(&key))? {
                let old = read_entry(&self.path, &key, &old)?;
                meta.subtract(old.check);
                if let Payload::File(digest) = old.payload {
                    files.entry(digest).and_modify(|names| *names = names.saturating_sub(1));
                }
            }
            let Some(json) = json else {
                batch.remove(key.into_bytes());
                continue;
            };
            let (kind, payload) = if json.len() + CHECK_BYTES < INLINE_BYTES {
                (INLINE, json)
            } else {
                let digest = Digest::of(&json);
                self.large.put(digest, std::iter::once(json))?;
                *files.entry(digest).or_default() += 1;
                (IN_A_FILE, digest.0.to_vec())
            };
            let (check, bytes) = entry_bytes(&key, kind, &payload);
            meta.add(check);
            batch.insert(key.into_bytes(), bytes);
        }
        let meta_json = serde_json::to_vec(&meta).map_err(|error| damage(&self.path, error.to_string()))?;
        batch.insert(META, entry_bytes(META, INLINE, &meta_json).1);
        state.failed = true;
        guarded(&self.path, || self.sled.apply_batch(batch))?;
        self.make_durable(meta.sequence)?;
        let unnamed: Vec<Digest> =
            files.extract_if(.., |_, names| *names == 0).map(|(digest, _)| digest).collect();
        *state = State { meta, files, failed: false };
        for digest in unnamed {
            // The write is done; a file that stays goes at the next opening.
            let _ = self.large.remove(digest);
        }
        Ok(())
    }

    /// Puts what sled holds on the disk, and then the number of the last write.
    fn make_durable(&self, sequence: u64) -> Result<(), StoreError> {
        guarded(&self.path, || self.sled.flush())?;
        self.file.sync_data().map_err(|error| io_error(&self.path, &error))?;
        self.folder.sync_all().map_err(|error| io_error(&self.path, &error))?;
        self.sequence.acknowledge(sequence)
    }
}

/// Reads every entry and compares all of them with `meta`, and that with what was acknowledged.
fn verify(
    sled: &sled::Db,
    path: &Path,
    acknowledged: u64,
) -> Result<(Meta, BTreeMap<Digest, usize>), StoreError> {
    let mut meta = None;
    let mut found = Meta::default();
    let mut files = BTreeMap::new();
    let mut entries = sled.iter();
    while let Some((key, bytes)) = guarded(path, || entries.next().transpose())? {
        let key = text(path, &key)?;
        let entry = read_entry(path, key, &bytes)?;
        match entry.payload {
            Payload::Json(json) if key == META => {
                let read = serde_json::from_slice::<Meta>(&json);
                meta = Some(read.map_err(|error| damage(path, format!("{META} cannot be read: {error}")))?);
                continue;
            }
            Payload::Json(_) => {}
            Payload::File(digest) => *files.entry(digest).or_default() += 1,
        }
        found.add(entry.check);
    }
    let meta = meta.unwrap_or_default();
    if meta.sequence < acknowledged {
        let detail =
            format!("it ends with write {}, but write {acknowledged} was acknowledged", meta.sequence);
        return Err(damage(path, detail));
    }
    if (found.entries, found.sum) != (meta.entries, meta.sum) {
        let detail = format!("it holds {} entries; {} others were written", found.entries, meta.entries);
        return Err(damage(path, detail));
    }
    Ok((meta, files))
}

fn open_sled(dir: &Path, path: &Path) -> Result<sled::Db, StoreError> {
    // A flush is asked for where it is needed; none in the background.
    let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None);
    let begun = Instant::now();
    loop {
        let opened = guarded(path, || match config.open() {
            Err(sled::Error::Io(error)) if error.to_string().starts_with("could not acquire lock") => {
                Ok(None)
            }
            other => other.map(Some),
        })?;
        if let Some(sled) = opened {
            return Ok(sled);
        }
        // We hold the store's own lock: this is a sled whose threads are still closing it.
        if begun.elapsed() > Duration::from_secs(CLOSING_SECONDS) {
            return Err(StoreError::InUse { path: dir.display().to_string() });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Calls sled, which panics on damaged files.
fn guarded<T>(path: &Path, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StoreError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(error))) => Err(io_error(path, &error)),
        Ok(Err(error)) => Err(damage(path, error.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(damage(path, format!("sled panicked: {}", tributary_common::record::one_line(text))))
        }
    }
}

fn damage(path: &Path, detail: String) -> StoreError {
    StoreError::Damaged { what: "the database", path: path.display().to_string(), detail }
}

fn text<'a>(path: &Path, key: &'a [u8]) -> Result<&'a str, StoreError> {
    std::str::from_utf8(key).map_err(|_| damage(path, "a key is not text".to_owned()))
}

/// An entry's bytes, which are its checksum, its kind and its payload; and the checksum.
fn entry_bytes(key: &str, kind: u8, payload: &[u8]) -> (u128, Vec<u8>) {
    let mut hasher = blake3::Hasher::new_derive_key("tributary store 1 entry");
    hasher.update(&(key.len() as u64).to_le_bytes()).update(key.as_bytes()).update(&[kind]).update(payload);
    let mut check = [0; CHECK_BYTES];
    hasher.finalize_xof().fill(&mut check);
    (u128::from_le_bytes(check), [&check[..], &[kind], payload].concat())
}

fn read_entry(path: &Path, key: &str, bytes: &[u8]) -> Result<Entry, StoreError> {
    let wrong = || damage(path, format!("the checksum of {key} is wrong"));
    let (_, rest) = bytes.split_first_chunk::<CHECK_BYTES>().ok_or_else(wrong)?;
    let (kind, payload) = rest.split_first().ok_or_else(wrong)?;
    let (check, expected) = entry_bytes(key, *kind, payload);
    if bytes != expected {
        return Err(wrong());
    }
    let payload = match *kind {
        INLINE => Payload::Json(payload.to_vec()),
        IN_A_FILE => Payload::File(Digest::try_from(payload).map_err(|_| wrong())?),
        _ => return Err(wrong()),
    };
    Ok(Entry { check, payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> Database {
        let (sequence, acknowledged) = SequenceFile::open(dir).unwrap();
        if acknowledged.is_none() {
            sequence.create(dir).unwrap();
        }
        Database::open(dir, sequence, acknowledged.unwrap_or(0)).unwrap()
    }

    #[test]
    fn after_a_write_of_unknown_outcome_nothing_is_written_until_reopened() {
        let dir = tempfile::tempdir().unwrap();
        let put =
            |database: &Database, value: u32| database.write(|write| write.put("key".to_owned(), &value));
        let mut database = open(dir.path());
        put(&database, 1).unwrap();
        database.sequence.fill_the_disk();
        for value in [2, 3] {
            assert!(matches!(put(&database, value), Err(StoreError::Io { .. })));
        }
        drop(database);
        let database = open(dir.path());
        // Write 2 was made and not acknowledged: it may be there or not. Write 3 was not made.
        assert!(database.get::<u32>("key").unwrap().is_some_and(|value| value < 3));
        put(&database, 4).unwrap();
        assert_eq!(database.get::<u32>("key").unwrap(), Some(4));
    }

    #[test]
    fn an_entry_under_another_key_is_damage() {
        let (_, bytes) = entry_bytes("node/a", INLINE, b"1");
        assert!(read_entry(Path::new("x"), "node/a", &bytes).is_ok());
        for (key, bytes) in [("node/b", &bytes[..]), ("node/a", &bytes[..bytes.len() - 1]), ("node/a", &[])] {
            assert!(matches!(read_entry(Path::new("x"), key, bytes), Err(StoreError::Damaged { .. })));
        }
    }
}
