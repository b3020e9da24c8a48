//! A node's journal of masked uploads: what may be masked, so that no update is summed with two survivor sets.
//!
//! The node writes it to disk, durably, after [`UploadJournal::record`] and before the first byte of the upload
//! leaves. Keys are never written, so a node that starts again finds the entry, has no keys and stays silent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::context::SessionId;
use crate::ledger::hex::Hex;

/// One masked upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upload {
    /// The task.
    pub task: String,
    /// The round.
    pub round: u64,
    /// Hash of the model that was trained on.
    pub model: Hex<32>,
    /// Who took part ([`super::roster::Roster::cohort`]).
    pub cohort: Hex<32>,
    /// The session.
    pub session: SessionId,
}

/// All masked uploads of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UploadJournal {
    /// The last upload of each task.
    tasks: BTreeMap<String, Upload>,
    /// The roster with which an update to each model was masked.
    models: BTreeMap<Hex<32>, Hex<32>>,
}

/// Why an upload may not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Not a later round than the last.
    #[error(
        "round {round} of task {task}: an update of round {last} was already masked; a round is masked once"
    )]
    Round {
        /// The task.
        task: String,
        /// The round that is asked for.
        round: u64,
        /// The last round that was masked.
        last: u64,
    },
    /// The same model with other participants.
    #[error(
        "an update to model {model} was already masked with other participants: the difference of two sums would be one node's update"
    )]
    Model {
        /// The model.
        model: Hex<32>,
    },
    /// Masks are asked for before the upload was recorded.
    #[error("the upload is not in the journal: record it, durably, before its masks are made")]
    Missing,
}

impl UploadJournal {
    /// Whether a session of this task, round and model may start; the roster is not known yet.
    ///
    /// # Errors
    /// [`JournalError::Round`] if the round, or a later one, was masked.
    pub fn may_start(&self, task: &str, round: u64) -> Result<(), JournalError> {
        match self.tasks.get(task) {
            Some(upload) if upload.round >= round => {
                Err(JournalError::Round { task: task.to_owned(), round, last: upload.round })
            }
            _ => Ok(()),
        }
    }

    /// Whether this upload may be recorded.
    ///
    /// # Errors
    /// [`JournalError`] if its round was masked, or its model with other participants.
    pub fn may_record(&self, upload: &Upload) -> Result<(), JournalError> {
        self.may_start(&upload.task, upload.round)?;
        match self.models.get(&upload.model) {
            Some(cohort) if *cohort != upload.cohort => Err(JournalError::Model { model: upload.model }),
            _ => Ok(()),
        }
    }

    /// Records an upload that is about to be made. The caller makes the journal durable before anything is sent.
    ///
    /// # Errors
    /// [`JournalError`] if it may not be made; the journal is as before.
    pub fn record(&mut self, upload: Upload) -> Result<(), JournalError> {
        self.may_record(&upload)?;
        self.models.insert(upload.model, upload.cohort);
        self.tasks.insert(upload.task.clone(), upload);
        Ok(())
    }

    /// Whether exactly this upload was recorded last for its task.
    pub fn has(&self, upload: &Upload) -> bool {
        self.tasks.get(&upload.task) == Some(upload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upload(task: &str, round: u64, model: u8, cohort: u8) -> Upload {
        let session = SessionId::new(&[round as u8; 32], &[cohort; 32]);
        Upload { task: task.into(), round, model: Hex([model; 32]), cohort: Hex([cohort; 32]), session }
    }

    #[test]
    fn a_round_is_masked_once_and_rounds_only_go_up() {
        let mut journal = UploadJournal::default();
        journal.record(upload("a", 3, 1, 1)).unwrap();
        assert!(journal.has(&upload("a", 3, 1, 1)) && !journal.has(&upload("a", 3, 1, 2)));
        for round in [1, 3] {
            assert!(matches!(journal.may_start("a", round), Err(JournalError::Round { last: 3, .. })));
            assert!(journal.record(upload("a", round, 9, 1)).is_err());
        }
        journal.may_start("a", 4).unwrap();
        journal.may_start("b", 1).unwrap();
    }

    #[test]
    fn a_model_is_answered_with_one_cohort_whatever_the_task() {
        let mut journal = UploadJournal::default();
        journal.record(upload("a", 1, 7, 1)).unwrap();
        let before = journal.clone();
        assert_eq!(journal.record(upload("b", 1, 7, 2)), Err(JournalError::Model { model: Hex([7; 32]) }));
        assert_eq!(journal, before, "a refusal leaves no trace");
        journal.record(upload("b", 1, 7, 1)).unwrap();
        journal.record(upload("b", 2, 8, 2)).unwrap();
        // It is the same after it was on disk.
        let text = serde_json::to_string(&journal).unwrap();
        assert_eq!(serde_json::from_str::<UploadJournal>(&text).unwrap(), journal);
    }
}
