//! Who and what a session is about: client ids, the hash of everything that its parties agree on, the session's id.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::parameters::Rules;
use crate::ids::NodeName;
use crate::ledger::hex::Hex;

/// A SHA-256 hash, 32 bytes.
pub type Hash = [u8; 32];

/// AES-128-CTR for masks, ChaCha20-Poly1305 for shares: the only suite of this version.
pub const SUITE: u16 = 1;

/// SHA-256 of the parts, one after another.
pub(crate) fn sha256(parts: &[&[u8]]) -> Hash {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// A client of a session: 16 bytes that follow from the node's name. Their order is the order of a roster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClientId(Hex<16>);

impl ClientId {
    /// The id of the node of this name: the first 16 bytes of a domain-separated SHA-256.
    pub fn of(name: &NodeName) -> Self {
        let hash = sha256(&[b"fl-secagg/v1/client", name.as_str().as_bytes()]);
        let mut id = [0; 16];
        id.iter_mut().zip(hash).for_each(|(to, from)| *to = from);
        Self(Hex(id))
    }

    /// An id of given bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Hex(bytes))
    }

    /// Its 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0.0
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// All that the parties of one session must hold alike; each computes [`Agreement::context`] from what it actually
/// has. Masks of clients that disagree do not cancel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agreement {
    /// The task, for example a run's id.
    pub task: String,
    /// The round, from 1.
    pub round: u64,
    /// The attempt within the round, from 0.
    pub attempt: u32,
    /// Size of the cohort, level and assumptions.
    pub rules: Rules,
    /// Hash of the rest of the configuration: segments (name, length, bits, lane), clip, scale, rounding, noise,
    /// weights, deadlines.
    pub settings: Hex<32>,
    /// Hash of the bytes of the model that is trained on.
    pub model: Hex<32>,
    /// Hash of the coordinates that are sent.
    pub support: Hex<32>,
    /// Hash of the coordinator's identity.
    pub server: Hex<32>,
}

impl Agreement {
    /// The hash of everything agreed on (§4.1, `ctx`).
    pub fn context(&self) -> Hash {
        let config = sha256(&[b"fl-secagg/v1/config", &self.rules.encode(), &self.settings.0]);
        context_hash(
            self.task.as_bytes(),
            self.round,
            self.attempt,
            [&config, &self.model.0, &self.support.0, &self.server.0],
        )
    }
}

/// `ctx = H("fl-secagg/v1" ‖ u16 suite ‖ lp(task) ‖ u64 round ‖ u32 attempt ‖ config ‖ model ‖ support ‖ server)`.
pub(crate) fn context_hash(task: &[u8], round: u64, attempt: u32, hashes: [&Hash; 4]) -> Hash {
    let [config, model, support, server] = hashes;
    // A task's name is a run's id, far below 4 GiB.
    let length = (task.len() as u32).to_le_bytes();
    sha256(&[
        b"fl-secagg/v1",
        &SUITE.to_le_bytes(),
        &length,
        task,
        &round.to_le_bytes(),
        &attempt.to_le_bytes(),
        config,
        model,
        support,
        server,
    ])
}

/// The id of one attempt with one roster (§4.4, `T`): salt of every key, part of every signature.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SessionId(Hex<32>);

/// The first half of a [`SessionId`], by which messages name their session.
pub type SessionTag = [u8; 16];

impl SessionId {
    /// `T = H("fl-secagg/v1/session" ‖ ctx ‖ roster_root)`.
    pub fn new(context: &Hash, roster_root: &Hash) -> Self {
        Self(Hex(sha256(&[b"fl-secagg/v1/session", context, roster_root])))
    }

    /// Its 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0.0
    }

    /// The first 16 bytes.
    pub fn tag(&self) -> SessionTag {
        let mut tag = [0; 16];
        tag.iter_mut().zip(self.0.0).for_each(|(to, from)| *to = from);
        tag
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
