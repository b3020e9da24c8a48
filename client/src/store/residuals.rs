//! What updates left out (error feedback), on the disk: one file per run, `residuals/RUN.residual`.
//!
//! The rules are those of [`ResidualJournal`]: what a round's update left out counts once the round is published with the
//! update in it. The file is the number of parameters (u64, little endian) and the journal's bytes.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use tributary_common::compression::residual::{Outcome, ResidualJournal};
use tributary_common::digest::Digest;
use tributary_common::ids::RunId;

use super::{FolderError, at, files, remove, write_whole};
use crate::machine::RoundKey;

const EXTENSION: &str = "residual";

/// The residuals in one folder.
#[derive(Debug)]
pub struct Residuals {
    dir: PathBuf,
}

impl Residuals {
    /// Those in the folder `dir`, which exists.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn path(&self, run: RunId) -> PathBuf {
        self.dir.join(format!("{run}.{EXTENSION}"))
    }

    /// Adds to `delta`, the update of a round, what earlier updates of the run left out, and returns the journal for
    /// [`Residuals::keep`]. `lineage` names the model's layout.
    ///
    /// # Errors
    /// [`FolderError::Io`]. What is damaged or does not fit counts as nothing: it is a help, not a debt.
    pub fn add(
        &self,
        key: RoundKey,
        lineage: Digest,
        delta: &mut [f32],
    ) -> Result<ResidualJournal, FolderError> {
        let none = || ResidualJournal::new(delta.len());
        let journal = match read(&self.path(key.run))? {
            Some((parameters, journal)) if parameters == delta.len() => journal,
            _ => none(),
        };
        match journal.add_kept(key.round, lineage, delta) {
            Ok(()) => Ok(journal),
            Err(error) => {
                tracing::warn!("what updates to run {} left out is not used: {error}", key.run);
                Ok(ResidualJournal::new(delta.len()))
            }
        }
    }

    /// Keeps a journal, with what the update of its round leaves out: flushed before a byte of the update leaves.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn keep(&self, run: RunId, parameters: usize, journal: &ResidualJournal) -> Result<(), FolderError> {
        write_whole(&self.path(run), 0o600, |file| {
            file.write_all(&(parameters as u64).to_le_bytes())?;
            file.write_all(&journal.to_bytes())
        })
    }

    /// Says what became of the update of a round, if it is waited for.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn settle(&self, key: RoundKey, outcome: Outcome) -> Result<(), FolderError> {
        let Some((parameters, mut journal)) = read(&self.path(key.run))? else { return Ok(()) };
        match journal.settle(key.round, outcome) {
            Ok(()) => self.keep(key.run, parameters, &journal),
            Err(_) => Ok(()), // nobody waits, or for another round
        }
    }

    /// After a start: what was to leave with updates that are not in the outbox never left.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn settle_all_but(&self, kept: &[RoundKey]) -> Result<(), FolderError> {
        for path in files(&self.dir)? {
            let Some((parameters, mut journal)) = read(&path)? else { continue };
            let Some((round, _)) = journal.pending() else { continue };
            let is_kept = |key: &RoundKey| key.round == round && self.path(key.run) == path;
            if !kept.iter().any(is_kept) && journal.settle(round, Outcome::NotAccepted).is_ok() {
                let run = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
                if let Some(run) = run {
                    self.keep(run, parameters, &journal)?;
                }
            }
        }
        Ok(())
    }

    /// Deletes what belongs to a run that is over.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn forget(&self, run: RunId) -> Result<(), FolderError> {
        remove(&self.path(run))
    }
}

/// A file's number of parameters and journal; `None` where it is not there or damaged.
fn read(path: &Path) -> Result<Option<(usize, ResidualJournal)>, FolderError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(at(path)(cause)),
    };
    let journal = bytes.split_first_chunk().and_then(|(parameters, journal)| {
        let parameters = usize::try_from(u64::from_le_bytes(*parameters)).ok()?;
        Some((parameters, ResidualJournal::from_bytes(journal, parameters).ok()?))
    });
    if journal.is_none() {
        tracing::warn!("{}: what updates left out is damaged; it is not used", path.display());
    }
    Ok(journal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Folder;

    fn key(round: u32) -> RoundKey {
        RoundKey { run: RunId(5), round }
    }

    fn lineage() -> Digest {
        Digest::of(b"layout")
    }

    /// What the update of a round starts from.
    fn before(residuals: &Residuals, round: u32) -> Vec<f32> {
        let mut delta = vec![0.0; 2];
        residuals.add(key(round), lineage(), &mut delta).unwrap();
        delta
    }

    /// Encodes an update of a round that leaves `left` out.
    fn leave_out(residuals: &Residuals, round: u32, left: [f32; 2]) {
        let mut journal = residuals.add(key(round), lineage(), &mut [0.0; 2]).unwrap();
        let payload = Digest::of(&round.to_le_bytes());
        journal.write_pending(round, lineage(), payload, left.to_vec(), None).unwrap();
        residuals.keep(RunId(5), 2, &journal).unwrap();
    }

    #[test]
    fn what_is_left_out_counts_from_run_to_run_only_if_the_update_did() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        leave_out(folder.residuals(), 1, [1.0, 2.0]);
        folder.residuals().settle(key(1), Outcome::Accepted).unwrap();
        assert_eq!(before(folder.residuals(), 2), [1.0, 2.0]);
        leave_out(folder.residuals(), 2, [9.0, 9.0]);
        folder.residuals().settle(key(1), Outcome::Accepted).unwrap();
        folder.residuals().settle(key(2), Outcome::NotAccepted).unwrap();
        folder.residuals().settle(key(2), Outcome::Accepted).unwrap();
        drop(folder);
        let folder = Folder::open(dir.path()).unwrap();
        assert_eq!(before(folder.residuals(), 3), [0.9, 1.8], "meant for an older model");
        assert_eq!(before(folder.residuals(), 30), [0.0, 0.0]);
        let mut other = vec![0.0; 3];
        folder.residuals().add(key(3), lineage(), &mut other).unwrap();
        assert_eq!(other, [0.0; 3], "of another model");
        folder.residuals().forget(RunId(5)).unwrap();
        assert_eq!(before(folder.residuals(), 2), [0.0, 0.0]);
    }

    #[test]
    fn after_a_crash_only_updates_that_were_kept_are_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let residuals = folder.residuals();
        leave_out(residuals, 1, [1.0, 1.0]);
        residuals.settle_all_but(&[key(1), RoundKey { run: RunId(6), round: 1 }]).unwrap();
        residuals.settle(key(1), Outcome::Accepted).unwrap();
        leave_out(residuals, 2, [2.0, 2.0]);
        residuals.settle_all_but(&[key(1)]).unwrap();
        residuals.settle(key(2), Outcome::Accepted).unwrap();
        assert_eq!(before(residuals, 2), [1.0, 1.0]);
        leave_out(residuals, 2, [2.0, 2.0]);
        residuals.settle(key(2), Outcome::Unknown).unwrap();
        assert_eq!(before(residuals, 3), [0.0, 0.0], "either could be in the model");
        let path = dir.path().join("residuals").join(format!("{}.{EXTENSION}", RunId(5)));
        for damaged in ["", "xy", "0123456789"] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(before(residuals, 3), [0.0, 0.0]);
        }
    }
}
