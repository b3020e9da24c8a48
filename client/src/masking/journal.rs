//! The node's journal of masked updates on the disk: what may be masked and which survivors may be confirmed, whatever
//! else was lost.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tributary_common::ledger::hex::Hex;
use tributary_common::secagg::bitmap::ClientSet;
use tributary_common::secagg::journal::{Upload, UploadJournal};

use crate::store::write_whole;

/// Its file, in the node's folder.
pub const JOURNAL_FILE: &str = "masked-uploads.json";

/// Why something may not be masked or confirmed, or could not be written down. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The rules forbid it.
    #[error(transparent)]
    Upload(#[from] tributary_common::secagg::journal::JournalError),
    /// Two sums over an update to the same model would differ by single clients.
    #[error(
        "{now} survivors of an update to model {model} are to be confirmed, but other ones ({before}) were confirmed for the \
         same model: the difference of the two sums would be few nodes' updates"
    )]
    Survivors {
        /// The model.
        model: String,
        /// How many were confirmed.
        before: u16,
        /// How many are to be.
        now: u16,
    },
    /// The disk.
    #[error("{}: {cause}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// Not the content of a journal: nothing is known of what was masked.
    #[error(
        "{}: is damaged ({problem}); restore the node's folder from its last state, or, if no round of a run that goes on was \
         masked here, delete the file", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// The survivors that were confirmed for a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Survivors {
    clients: u16,
    bitmap: Vec<u8>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    uploads: UploadJournal,
    survivors: BTreeMap<Hex<32>, Survivors>,
}

/// The journal. What it says is on the disk, flushed, before a call returns.
#[derive(Debug)]
pub struct MaskJournal {
    path: PathBuf,
    content: Content,
}

impl MaskJournal {
    /// The journal in the folder `dir`; an empty one if there is none.
    ///
    /// # Errors
    /// [`JournalError::Damaged`], [`JournalError::Disk`].
    pub fn open(dir: &Path) -> Result<Self, JournalError> {
        let path = dir.join(JOURNAL_FILE);
        let content = match fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json)
                .map_err(|error| JournalError::Damaged { path: path.clone(), problem: error.to_string() })?,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Content::default(),
            Err(cause) => return Err(JournalError::Disk { path, cause }),
        };
        Ok(Self { path, content })
    }

    /// The updates.
    pub fn uploads(&self) -> &UploadJournal {
        &self.content.uploads
    }

    /// Writes down that an update is about to be masked: to be called before there are masks.
    ///
    /// # Errors
    /// [`JournalError`]; then it must not be masked.
    pub fn record(&mut self, upload: Upload) -> Result<(), JournalError> {
        let mut content = self.content.clone();
        content.uploads.record(upload)?;
        self.write(content)
    }

    /// Writes down which survivors of an update to `model` are about to be confirmed: to be called before the signature
    /// leaves. The roster is the same whenever an update to the model was masked, and so is the order in the bitmap.
    ///
    /// # Errors
    /// [`JournalError`]; then they must not be confirmed.
    pub fn confirm(&mut self, model: Hex<32>, alive: &ClientSet) -> Result<(), JournalError> {
        let now = Survivors { clients: alive.clients(), bitmap: alive.as_bytes().to_vec() };
        match self.content.survivors.get(&model) {
            Some(before) if *before == now => Ok(()),
            Some(before) => {
                let before = ClientSet::from_bytes(before.clients, &before.bitmap).map_or(0, |set| set.len());
                Err(JournalError::Survivors { model: model.short(), before, now: alive.len() })
            }
            None => {
                let mut content = self.content.clone();
                content.survivors.insert(model, now);
                self.write(content)
            }
        }
    }

    fn write(&mut self, content: Content) -> Result<(), JournalError> {
        let disk = |cause| JournalError::Disk { path: self.path.clone(), cause };
        let json = serde_json::to_vec(&content).map_err(io::Error::from).map_err(disk)?;
        write_whole(&self.path, 0o600, |file| file.write_all(&json))
            .map_err(|error| disk(io::Error::other(error)))?;
        self.content = content;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tributary_common::secagg::context::SessionId;

    fn upload(round: u64, model: u8, cohort: u8) -> Upload {
        let session = SessionId::new(&[round as u8; 32], &[cohort; 32]);
        Upload { task: "a".into(), round, model: Hex([model; 32]), cohort: Hex([cohort; 32]), session }
    }

    #[test]
    fn what_was_masked_and_confirmed_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = MaskJournal::open(dir.path()).unwrap();
        journal.record(upload(1, 7, 1)).unwrap();
        let alive = ClientSet::of(4, [0, 1, 3]);
        journal.confirm(Hex([7; 32]), &alive).unwrap();
        drop(journal);
        let mut journal = MaskJournal::open(dir.path()).unwrap();
        assert!(journal.uploads().has(&upload(1, 7, 1)));
        assert!(journal.record(upload(1, 7, 1)).unwrap_err().to_string().contains("already masked"));
        assert!(journal.record(upload(2, 7, 2)).unwrap_err().to_string().contains("other participants"));
        journal.record(upload(2, 7, 1)).unwrap();
        journal.confirm(Hex([7; 32]), &alive).unwrap();
        let others = [ClientSet::of(4, [0, 1, 2, 3]), ClientSet::of(4, [0, 1, 2])];
        for other in others {
            let refused = journal.confirm(Hex([7; 32]), &other).unwrap_err().to_string();
            assert!(refused.contains("difference of the two sums"), "{refused}");
        }
        journal.confirm(Hex([8; 32]), &ClientSet::of(4, [0, 1, 2])).unwrap();
    }

    #[test]
    fn a_damaged_journal_is_no_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(JOURNAL_FILE), "{").unwrap();
        let refused = MaskJournal::open(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("masked-uploads.json: is damaged"), "{refused}");
    }

    #[test]
    fn nothing_counts_that_could_not_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("node");
        fs::create_dir(&inside).unwrap();
        let mut journal = MaskJournal::open(&inside).unwrap();
        fs::remove_dir(&inside).unwrap();
        assert!(matches!(journal.record(upload(1, 7, 1)), Err(JournalError::Disk { .. })));
        assert!(!journal.uploads().has(&upload(1, 7, 1)));
    }
}
