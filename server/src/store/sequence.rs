//! The side file that tells which writes were acknowledged, and in which format the folder is.
//!
//! sled may come back without its newest writes and not say so. `store.jsonl` holds the number of the last
//! acknowledged write in two lines of 4096 bytes, written in turn: a write that is cut off spoils one line,
//! and the other still has the number before it. The file is also the store's lock.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;

use super::StoreError;
use super::files::{io_error, sync_folder};

/// The format of the whole folder. Any format keeps this file's lines as they are.
pub(super) const FORMAT: u32 = 1;

/// Its name in the store's folder.
pub(super) const SEQUENCE_FILE: &str = "store.jsonl";

/// Length of a line with its line feed: a page, so that two lines do not share a sector.
const LINE_BYTES: usize = 4096;

#[derive(Serialize, Deserialize)]
struct Line {
    format: u32,
    sequence: u64,
    check: String,
}

impl Line {
    fn new(format: u32, sequence: u64) -> Self {
        let check = Digest::of(format!("tributary store {format} {sequence}").as_bytes()).short();
        Self { format, sequence, check }
    }

    fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec(self)?;
        bytes.resize(LINE_BYTES - 1, b' ');
        bytes.push(b'\n');
        Ok(bytes)
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let line: Self = serde_json::from_slice(bytes).ok()?;
        (line.check == Self::new(line.format, line.sequence).check).then_some(line)
    }
}

/// The side file, open and locked until it is dropped.
#[derive(Debug)]
pub(super) struct SequenceFile {
    path: PathBuf,
    file: File,
}

impl SequenceFile {
    /// Opens and locks the side file of `folder`. Returns it with the number of the last acknowledged write,
    /// or with `None` when the file is new: then [`SequenceFile::create`] must follow.
    pub(super) fn open(folder: &Path) -> Result<(Self, Option<u64>), StoreError> {
        let path = folder.join(SEQUENCE_FILE);
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).create(true).truncate(false).open(&path);
        let file = opened.map_err(|error| io_error(&path, &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::InUse { path: folder.display().to_string() });
            }
            Err(TryLockError::Error(error)) => return Err(io_error(&path, &error)),
        }
        let mut bytes = Vec::new();
        let read = (&file).take(4 * LINE_BYTES as u64).read_to_end(&mut bytes);
        read.map_err(|error| io_error(&path, &error))?;
        let newest = bytes.chunks(LINE_BYTES).filter_map(Line::read).max_by_key(|line| line.sequence);
        let sequence = match newest {
            None if bytes.is_empty() => None,
            None => {
                let (path, detail) =
                    (path.display().to_string(), "neither of its lines can be read".to_owned());
                return Err(StoreError::Damaged { what: "the count of writes", path, detail });
            }
            Some(line) if line.format != FORMAT => {
                let path = folder.display().to_string();
                return Err(StoreError::Format { path, found: line.format, expected: FORMAT });
            }
            Some(line) => Some(line.sequence),
        };
        Ok((Self { path, file }, sequence))
    }

    /// Fills a new file, with nothing acknowledged, and makes its name durable.
    pub(super) fn create(&self, folder: &Path) -> Result<(), StoreError> {
        self.acknowledge(0)?;
        self.acknowledge_in(1, 0)?;
        sync_folder(folder)
    }

    /// Notes that write `sequence` is durable; the note is durable on return.
    pub(super) fn acknowledge(&self, sequence: u64) -> Result<(), StoreError> {
        self.acknowledge_in(sequence % 2, sequence)
    }

    /// From now on the disk is full.
    #[cfg(test)]
    pub(super) fn fill_the_disk(&mut self) {
        self.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
    }

    fn acknowledge_in(&self, line: u64, sequence: u64) -> Result<(), StoreError> {
        let write = || -> std::io::Result<()> {
            let bytes = Line::new(FORMAT, sequence).to_bytes()?;
            let mut file = &self.file;
            file.seek(SeekFrom::Start(line * LINE_BYTES as u64))?;
            file.write_all(&bytes)?;
            file.sync_data()
        };
        write().map_err(|error| io_error(&self.path, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reopened(folder: &Path) -> Result<Option<u64>, StoreError> {
        SequenceFile::open(folder).map(|(_, sequence)| sequence)
    }

    #[test]
    fn a_write_that_was_cut_off_leaves_the_number_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let (file, sequence) = SequenceFile::open(folder.path()).unwrap();
        assert_eq!(sequence, None);
        file.create(folder.path()).unwrap();
        (1..=7).for_each(|sequence| file.acknowledge(sequence).unwrap());
        assert!(matches!(reopened(folder.path()), Err(StoreError::InUse { .. })));
        drop(file);
        assert_eq!(reopened(folder.path()).unwrap(), Some(7));
        let path = folder.path().join(SEQUENCE_FILE);
        let good = std::fs::read(&path).unwrap();
        assert_eq!(good.len(), 2 * LINE_BYTES);
        let mut torn = good.clone();
        torn[LINE_BYTES + 20..LINE_BYTES + 30].fill(0);
        std::fs::write(&path, &torn).unwrap();
        assert_eq!(reopened(folder.path()).unwrap(), Some(6));
        torn[25] ^= 1;
        std::fs::write(&path, &torn).unwrap();
        assert!(matches!(reopened(folder.path()), Err(StoreError::Damaged { .. })));
    }

    #[test]
    fn another_format_is_told_from_damage() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = Line::new(FORMAT + 1, 3).to_bytes().unwrap();
        std::fs::write(folder.path().join(SEQUENCE_FILE), bytes).unwrap();
        let error = reopened(folder.path()).unwrap_err();
        assert!(matches!(error, StoreError::Format { found: 2, expected: 1, .. }), "{error}");
    }
}
