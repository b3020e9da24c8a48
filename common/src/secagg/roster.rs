//! The roster: who takes part in a session, with which keys, in canonical bytes.

use super::bitmap::ClientSet;
use super::context::{ClientId, Hash, sha256};
use super::parameters::MAXIMUM_CLIENTS;
use crate::ledger::hex::Hex;
use crate::ledger::record::PublicKey;

/// Bytes of one entry: id, identity, share key, mask key, signature.
pub const ENTRY_BYTES: usize = 16 + 32 + 32 + 32 + 64;

/// One client's keys for one attempt, signed by its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The client.
    pub id: ClientId,
    /// Its long-term Ed25519 key.
    pub identity: PublicKey,
    /// X25519 key of the channel for shares (`C`).
    pub share_key: [u8; 32],
    /// X25519 key of the masks (`S`).
    pub mask_key: [u8; 32],
    /// Signature by `identity` over context, id and both keys.
    pub signature: [u8; 64],
}

impl Entry {
    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        into.extend(self.id.as_bytes());
        into.extend(self.identity.0.0);
        into.extend(self.share_key);
        into.extend(self.mask_key);
        into.extend(self.signature);
    }

    pub(crate) fn decode(bytes: &[u8; ENTRY_BYTES]) -> Option<Self> {
        let (id, rest) = bytes.split_first_chunk::<16>()?;
        let (identity, rest) = rest.split_first_chunk::<32>()?;
        let (share_key, rest) = rest.split_first_chunk::<32>()?;
        let (mask_key, rest) = rest.split_first_chunk::<32>()?;
        Some(Self {
            id: ClientId::from_bytes(*id),
            identity: PublicKey(Hex(*identity)),
            share_key: *share_key,
            mask_key: *mask_key,
            signature: rest.try_into().ok()?,
        })
    }
}

/// Why entries are not a roster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RosterError {
    /// Too long.
    #[error("the roster has more than {MAXIMUM_CLIENTS} clients")]
    TooMany,
    /// Not sorted by id, or an id twice.
    #[error("the roster is not sorted by client id, or has an id twice (at {0})")]
    Order(ClientId),
    /// An identity or a key twice.
    #[error("the roster has an identity or a key twice (at {0})")]
    Duplicate(ClientId),
}

/// The clients of a session, sorted by id; no id, identity or key is there twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roster {
    entries: Vec<Entry>,
}

impl Roster {
    /// A roster of entries that are sorted already.
    ///
    /// # Errors
    /// [`RosterError`] if they are not, if something is there twice, or if there are too many.
    pub fn new(entries: Vec<Entry>) -> Result<Self, RosterError> {
        if entries.len() > usize::from(MAXIMUM_CLIENTS) {
            return Err(RosterError::TooMany);
        }
        let mut keys = std::collections::BTreeSet::new();
        let mut last = None;
        for entry in &entries {
            if last.is_some_and(|last| last >= entry.id) {
                return Err(RosterError::Order(entry.id));
            }
            last = Some(entry.id);
            let new = [entry.identity.0.0, entry.share_key, entry.mask_key].map(|key| keys.insert(key));
            if new.contains(&false) {
                return Err(RosterError::Duplicate(entry.id));
            }
        }
        Ok(Self { entries })
    }

    /// The entries, sorted by id.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many clients; at most [`MAXIMUM_CLIENTS`].
    pub fn len(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Whether it has no clients.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry at `index`.
    pub fn get(&self, index: u16) -> Option<&Entry> {
        self.entries.get(usize::from(index))
    }

    /// Where the client of this id is.
    pub fn index_of(&self, id: &ClientId) -> Option<u16> {
        self.entries.binary_search_by(|entry| entry.id.cmp(id)).ok().map(|index| index as u16)
    }

    /// The ids of the members of a set, ascending.
    pub fn ids<'a>(&'a self, set: &'a ClientSet) -> impl Iterator<Item = ClientId> + 'a {
        set.iter().filter_map(|index| self.get(index)).map(|entry| entry.id)
    }

    /// `roster_root = H("fl-secagg/v1/roster" ‖ ctx ‖ u32 n ‖ entries)`.
    pub fn root(&self, context: &Hash) -> Hash {
        let mut bytes = Vec::with_capacity(self.entries.len() * ENTRY_BYTES);
        self.entries.iter().for_each(|entry| entry.encode(&mut bytes));
        sha256(&[b"fl-secagg/v1/roster", context, &u32::from(self.len()).to_le_bytes(), &bytes])
    }

    /// Who takes part, whatever their keys: hash of ids and identities. Equal for two attempts by the same clients.
    pub fn cohort(&self) -> Hash {
        let mut bytes = Vec::with_capacity(self.entries.len() * 48);
        for entry in &self.entries {
            bytes.extend(entry.id.as_bytes());
            bytes.extend(entry.identity.0.0);
        }
        sha256(&[b"fl-secagg/v1/cohort", &u32::from(self.len()).to_le_bytes(), &bytes])
    }
}
