//! What the parties of a masked round agree on: the numbers from which both ends compute a session's context.

use sha2::{Digest as _, Sha256};

use super::ExchangeError;
use crate::digest::Digest;
use crate::ids::RunId;
use crate::job::{Job, JobError, Level};
use crate::ledger::hex::Hex;
use crate::secagg::context::Agreement;
use crate::secagg::parameters::{Rules, ThreatLevel};

/// What stays the same in all sessions of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    task: String,
    rules: Rules,
    settings: Hex<32>,
}

/// One attempt, as the parties of its session name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionOf {
    /// The round, from 1.
    pub round: u32,
    /// The attempt at it, from 1.
    pub attempt: u32,
    /// The model that is trained on.
    pub model: Digest,
    /// The round's support, if updates have one.
    pub support: Option<Digest>,
    /// Who the coordinator is: SHA-256 of its certificate authority.
    pub server: [u8; 32],
}

impl Terms {
    /// The terms of run `run` of `job`.
    ///
    /// # Errors
    /// [`ExchangeError::Job`] if the job asks for no masks, or cannot be written down.
    pub fn of(job: &Job, run: RunId) -> Result<Self, ExchangeError> {
        let none = || JobError::Invalid("the job has no [secure_aggregation]".into());
        let masks = job.secure_aggregation.as_ref().ok_or_else(none)?;
        let invited = job.invited();
        let millionths = |share: f64| (share * 1e6).round() as u32;
        // A checked job keeps both numbers within `limits::MASKED_COHORT_MEMBERS`.
        let small = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        let rules = Rules {
            level: match masks.level {
                Level::Semi => ThreatLevel::Semi,
                Level::Strict => ThreatLevel::Strict,
            },
            corrupt_per_million: millionths(masks.corrupt),
            dropout_per_million: millionths(masks.maximum_dropout(invited)),
            minimum_survivors: small(job.cohort.minimum),
            maximum_clients: small(invited),
        };
        // The whole job as resolved: lengths, widths, clip, scale, noise and weights follow from it.
        let settings = Hex(Sha256::digest(job.to_toml()?.as_bytes()).into());
        Ok(Self { task: run.to_string(), rules, settings })
    }

    /// Cohort, level and assumptions.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// What the parties of one session agree on.
    pub fn agreement(&self, of: &SessionOf) -> Agreement {
        Agreement {
            task: self.task.clone(),
            round: u64::from(of.round),
            attempt: of.attempt,
            rules: self.rules,
            settings: self.settings,
            model: Hex(of.model.0),
            support: Hex(of.support.map_or([0; 32], |digest| digest.0)),
            server: Hex(of.server),
        }
    }
}
