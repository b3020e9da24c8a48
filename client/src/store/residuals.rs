//! What updates left out (error feedback): one vector per run, which the next update starts from.
//!
//! Two slots, because only the coordinator can say whether an update counts. What a round's update left out is *pending*
//! beside its kept bytes; it becomes *current* when the round is published with the update in it, and is deleted
//! otherwise: the earlier one stays, and the round's own change is lost rather than sent twice.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use tributary_common::digest::Digest;
use tributary_common::ids::RunId;
use tributary_common::model::{from_bytes, to_bytes};

use super::{FolderError, at, files, remove, write_whole};
use crate::machine::RoundKey;

/// Each round in which a client was not, what it left out counts for less: it was meant for an older model.
const DECAY: f32 = 0.9;
/// After so many rounds it counts for nothing.
const LONGEST_GAP: u32 = 20;
/// Round and digest, before the values.
const HEADER_BYTES: usize = 4 + 32;

/// What a client left out in `settled` as it counts in a later `round`: `None` when it is too old.
pub fn aged(mut residual: Vec<f32>, settled: u32, round: u32) -> Option<Vec<f32>> {
    let gap = round.saturating_sub(settled).saturating_sub(1);
    if gap > LONGEST_GAP {
        return None;
    }
    if gap > 0 {
        let factor = DECAY.powi(i32::try_from(gap).unwrap_or(i32::MAX));
        residual.iter_mut().for_each(|value| *value *= factor);
    }
    Some(residual)
}

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

    fn path(&self, run: RunId, slot: &str) -> PathBuf {
        self.dir.join(format!("{run}.{slot}"))
    }

    /// What the update of a round starts from: `parameters` values, if there are any.
    ///
    /// # Errors
    /// [`FolderError::Io`]. What is damaged, or belongs to another model, counts as nothing.
    pub fn before(&self, key: RoundKey, parameters: usize) -> Result<Option<Vec<f32>>, FolderError> {
        let path = self.path(key.run, "current");
        let Some((settled, values)) = read(&path)? else { return Ok(None) };
        if values.len() != parameters {
            tracing::warn!("{}: is of another model; it is not used", path.display());
            return Ok(None);
        }
        Ok(aged(values, settled, key.round))
    }

    /// Keeps what the update of a round leaves out, until it is settled or dropped. On return it is flushed to the disk.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn keep(&self, key: RoundKey, residual: &[f32]) -> Result<(), FolderError> {
        let values = to_bytes(residual);
        write_whole(&self.path(key.run, "pending"), 0o600, |file| {
            file.write_all(&key.round.to_le_bytes())?;
            file.write_all(&Digest::of(&values).0)?;
            file.write_all(&values)
        })
    }

    /// The round was published with the update in it.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn settle(&self, key: RoundKey) -> Result<(), FolderError> {
        let pending = self.path(key.run, "pending");
        if round_of(&pending)? != Some(key.round) {
            return Ok(());
        }
        fs::rename(&pending, self.path(key.run, "current")).map_err(at(&pending))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(at(&self.dir))
    }

    /// The update of a round does not count.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn drop_pending(&self, key: RoundKey) -> Result<(), FolderError> {
        let pending = self.path(key.run, "pending");
        if round_of(&pending)? == Some(key.round) { remove(&pending) } else { Ok(()) }
    }

    /// Deletes what belongs to updates that are no longer there.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn keep_only(&self, kept: &[RoundKey]) -> Result<(), FolderError> {
        for path in files(&self.dir)?.iter().filter(|path| is_pending(path)) {
            let round = round_of(path)?;
            let wanted = |key: &&RoundKey| self.path(key.run, "pending") == *path && Some(key.round) == round;
            if kept.iter().find(wanted).is_none() {
                remove(path)?;
            }
        }
        Ok(())
    }

    /// Deletes what belongs to a run that is over.
    ///
    /// # Errors
    /// [`FolderError::Io`].
    pub fn forget(&self, run: RunId) -> Result<(), FolderError> {
        remove(&self.path(run, "pending"))?;
        remove(&self.path(run, "current"))
    }
}

fn is_pending(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "pending")
}

fn bytes(path: &Path) -> Result<Option<Vec<u8>>, FolderError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(at(path)(cause)),
    }
}

/// The round that stands in front; `None` of a file that is not there, or too short.
fn round_of(path: &Path) -> Result<Option<u32>, FolderError> {
    let mut round = [0; 4];
    match File::open(path).and_then(|mut file| file.read_exact(&mut round)) {
        Ok(()) => Ok(Some(u32::from_le_bytes(round))),
        Err(cause) if matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) => {
            Ok(None)
        }
        Err(cause) => Err(at(path)(cause)),
    }
}

fn read(path: &Path) -> Result<Option<(u32, Vec<f32>)>, FolderError> {
    let Some(bytes) = bytes(path)? else { return Ok(None) };
    let whole = || {
        let (header, values) = bytes.split_at_checked(HEADER_BYTES)?;
        let (round, digest) = header.split_first_chunk()?;
        if Digest::of(values).0 != digest {
            return None;
        }
        Some((u32::from_le_bytes(*round), from_bytes(values)?))
    };
    let found = whole();
    if found.is_none() {
        tracing::warn!("{}: what updates left out is damaged; it is not used", path.display());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Folder;

    fn key(round: u32) -> RoundKey {
        RoundKey { run: RunId(5), round }
    }

    #[test]
    fn only_an_update_that_counts_moves_what_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let residuals = folder.residuals();
        assert_eq!(residuals.before(key(1), 2).unwrap(), None);
        residuals.keep(key(1), &[1.0, 2.0]).unwrap();
        assert_eq!(residuals.before(key(2), 2).unwrap(), None, "nobody said that it counts");
        residuals.settle(key(1)).unwrap();
        assert_eq!(residuals.before(key(2), 2).unwrap(), Some(vec![1.0, 2.0]));
        // The next round's does not count.
        residuals.keep(key(2), &[9.0, 9.0]).unwrap();
        residuals.drop_pending(key(1)).unwrap();
        residuals.settle(key(1)).unwrap();
        residuals.drop_pending(key(2)).unwrap();
        residuals.settle(key(2)).unwrap();
        drop(folder);
        let folder = Folder::open(dir.path()).unwrap();
        let residuals = folder.residuals();
        assert_eq!(residuals.before(key(3), 2).unwrap(), Some(vec![0.9, 1.8]), "a round older");
        assert_eq!(residuals.before(key(23), 2).unwrap(), None, "too old");
        assert_eq!(residuals.before(key(2), 3).unwrap(), None, "of another model");
        residuals.forget(RunId(5)).unwrap();
        assert_eq!(residuals.before(key(2), 2).unwrap(), None);
    }

    #[test]
    fn a_crash_leaves_what_was_current_and_damage_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let residuals = folder.residuals();
        residuals.keep(key(1), &[1.0]).unwrap();
        residuals.settle(key(1)).unwrap();
        residuals.keep(key(2), &[2.0]).unwrap();
        residuals.keep_only(&[key(2), RoundKey { run: RunId(6), round: 2 }]).unwrap();
        residuals.settle(key(2)).unwrap();
        assert_eq!(residuals.before(key(3), 1).unwrap(), Some(vec![2.0]), "its update was kept");
        residuals.keep(key(3), &[3.0]).unwrap();
        residuals.keep_only(&[key(2)]).unwrap();
        residuals.settle(key(3)).unwrap();
        assert_eq!(residuals.before(key(3), 1).unwrap(), Some(vec![2.0]), "its update was not");
        let path = dir.path().join("residuals").join(format!("{}.current", RunId(5)));
        let mut damaged = fs::read(&path).unwrap();
        *damaged.last_mut().unwrap() ^= 1;
        fs::write(&path, damaged).unwrap();
        assert_eq!(residuals.before(key(3), 1).unwrap(), None);
        fs::write(&path, "xy").unwrap();
        assert_eq!(residuals.before(key(3), 1).unwrap(), None);
    }
}
