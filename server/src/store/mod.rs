//! What a coordinator must not lose: runs, rounds, nodes and tokens, and the models that they name.
//!
//! Two twins implement [`Store`]: [`SledStore`] on a disk, [`MemoryStore`] for simulation and tests. One
//! conformance suite runs against both. Every method that writes returns only when what it wrote would
//! survive a power cut.

mod database;
mod disk;
mod files;
mod memory;
mod sequence;
mod snapshot;

#[cfg(test)]
pub(crate) mod conformance;
#[cfg(test)]
mod damage;

pub use disk::{Moment, SledStore};
pub use memory::MemoryStore;
pub use snapshot::Snapshot;

use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::model::Parameters;
use tributary_common::record::{EvaluationRecord, RoundRecord, RunState};
use tributary_common::time::Time;

/// Why the store cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk or the file system refused.
    #[error("{path}: {what}")]
    Io {
        /// The file or folder.
        path: String,
        /// What the system said.
        what: String,
    },
    /// Stored bytes are not what was written.
    #[error("{what} in {path} is damaged: {detail}; restore the folder from a backup")]
    Damaged {
        /// What was read.
        what: &'static str,
        /// Where.
        path: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Another process has the store open.
    #[error("{path} is in use by another coordinator; stop it first")]
    InUse {
        /// The folder.
        path: String,
    },
    /// The store was written by another version.
    #[error("{path} has store format {found}; this version reads format {expected}")]
    Format {
        /// The folder.
        path: String,
        /// Its format.
        found: u32,
        /// The format of this version.
        expected: u32,
    },
    /// Something named is not there.
    #[error("{what} {name} does not exist")]
    Missing {
        /// What kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// Something to be created is there already.
    #[error("{what} {name} exists already")]
    Exists {
        /// What kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
}

fn missing_run(run: RunId) -> StoreError {
    StoreError::Missing { what: "run", name: run.to_string() }
}

fn missing_model(digest: Digest) -> StoreError {
    StoreError::Missing { what: "model", name: digest.to_string() }
}

/// Where a run stands: with the job, all that its next round depends on.
///
/// The cohort sampler's state is (`published`, `attempt`): its streams are named by them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunHead {
    /// Rounds published.
    pub published: u32,
    /// The next attempt at the round after them, from 1.
    pub attempt: u32,
    /// Digest of the last published model, or of the initial one.
    pub model: Digest,
    /// How the run stands.
    pub state: RunState,
    /// The clip norm that the next round begins with, where it adapts: it follows from what was noised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Under masks with top-k: the state of the next round's support.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub support: Option<Digest>,
}

impl RunHead {
    /// What must stay stored for the run to go on: its model, and its support's state if it has one.
    pub fn named(&self) -> impl Iterator<Item = Digest> + use<> {
        [self.model].into_iter().chain(self.support)
    }
}

/// A cohort that was drawn and is about to be invited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptRecord {
    /// The round, from 1.
    pub round: u32,
    /// The attempt at it, from 1.
    pub attempt: u32,
    /// When the cohort was drawn.
    pub started: Time,
    /// How many clients were eligible.
    pub eligible: u32,
    /// The cohort, sorted.
    pub cohort: Vec<NodeName>,
}

/// A run as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredRun {
    /// Its id.
    pub run: RunId,
    /// The job file as resolved.
    pub job_toml: String,
    /// When it was submitted.
    pub submitted: Time,
    /// Where it stands.
    pub head: RunHead,
    /// The attempt that was under way, if one was: journalled and neither published nor abandoned.
    pub open_attempt: Option<AttemptRecord>,
}

/// A node that enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub name: NodeName,
    /// Fingerprint of its Ed25519 public key (BLAKE3 of the 32 bytes): the identity behind all its certificates.
    pub identity: Digest,
    /// When it enrolled.
    pub enrolled: Time,
    /// When its newest certificate expires.
    pub expires: Time,
    /// When it was revoked, if it was. A revoked name may enrol again with a new token and key.
    pub revoked: Option<Time>,
}

/// A one-time token, by the digest of its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// BLAKE3 of the secret: the secret itself is not stored.
    pub secret_digest: Digest,
    /// The name that it enrols.
    pub node: NodeName,
    /// When it stops being valid.
    pub expires: Time,
}

/// A coordinator's durable state. Methods are synchronous; a driver calls them off its async threads.
pub trait Store: Send + Sync {
    /// Stores a model under the digest of its bytes, durable on return. The same model twice is stored once.
    fn put_model(&self, values: &[f32]) -> Result<Digest, StoreError>;

    /// Reads a model and checks its digest. Missing: [`StoreError::Missing`]; wrong bytes: [`StoreError::Damaged`].
    fn model(&self, digest: Digest) -> Result<Parameters, StoreError>;

    /// Stores the state of a support under the digest of its bytes, durable on return.
    fn put_state(&self, state: &[u8]) -> Result<Digest, StoreError>;

    /// Reads a state and checks its digest.
    fn state(&self, digest: Digest) -> Result<Vec<u8>, StoreError>;

    /// Deletes every model that no run names (initial model, last published model), and every state. Returns how many.
    fn collect_garbage(&self) -> Result<usize, StoreError>;

    /// Creates a run in state [`RunState::Queued`] with nothing published and attempt 1; its initial model must
    /// be stored. Existing id: [`StoreError::Exists`].
    fn create_run(
        &self,
        run: RunId,
        job_toml: &str,
        initial: Digest,
        submitted: Time,
    ) -> Result<(), StoreError>;

    /// All runs, in the order in which they were submitted (then by id).
    fn runs(&self) -> Result<Vec<StoredRun>, StoreError>;

    /// One run. Missing: [`StoreError::Missing`].
    fn run(&self, run: RunId) -> Result<StoredRun, StoreError>;

    /// Writes the cohort of an attempt before anybody is invited; a session kept of an earlier one is forgotten.
    fn journal_attempt(&self, run: RunId, attempt: &AttemptRecord) -> Result<(), StoreError>;

    /// Keeps where the secure-aggregation session of the open attempt stands, in place of what was kept of it before.
    fn journal_session(&self, run: RunId, session: &[u8]) -> Result<(), StoreError>;

    /// What was kept of the open attempt's session, if it has one.
    fn session(&self, run: RunId) -> Result<Option<Vec<u8>>, StoreError>;

    /// Ends an attempt, in one atomic write: appends `record`, replaces the head, clears the open attempt
    /// and its session. The head's model and support must be stored already.
    fn commit_round(&self, run: RunId, record: &RoundRecord, head: &RunHead) -> Result<(), StoreError>;

    /// Appends an evaluation; one of the same round replaces it.
    fn put_evaluation(&self, run: RunId, record: &EvaluationRecord) -> Result<(), StoreError>;

    /// Replaces the state in the run's head.
    fn set_state(&self, run: RunId, state: &RunState) -> Result<(), StoreError>;

    /// The records of all ended attempts, in order.
    fn rounds(&self, run: RunId) -> Result<Vec<RoundRecord>, StoreError>;

    /// The evaluations, by round.
    fn evaluations(&self, run: RunId) -> Result<Vec<EvaluationRecord>, StoreError>;

    /// Stores a token.
    fn put_token(&self, token: &TokenRecord) -> Result<(), StoreError>;

    /// Takes a token out, for good: of two callers with the same secret, one gets it. `None` if there is none.
    fn take_token(&self, secret_digest: Digest) -> Result<Option<TokenRecord>, StoreError>;

    /// Creates or replaces a node's record.
    fn put_node(&self, node: &NodeRecord) -> Result<(), StoreError>;

    /// One node's record.
    fn node(&self, name: &NodeName) -> Result<Option<NodeRecord>, StoreError>;

    /// Keeps the last head that a node showed of its privacy ledger, in its compact form, in place of the one before.
    fn put_ledger_head(&self, node: &NodeName, head: &[u8]) -> Result<(), StoreError>;

    /// The last head that a node showed.
    fn ledger_head(&self, node: &NodeName) -> Result<Option<Vec<u8>>, StoreError>;

    /// All nodes, by name.
    fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError>;
}
