//! The chain of a ledger's records and the trees over it: what a head, a proof and the next record are made
//! from.

use std::collections::BTreeMap;

use super::head::{Head, View};
use super::hex::Hex;
use super::merkle;
use super::record::{Body, CoordinatorId, Hour, LedgerHash, LedgerId, LedgerRole, PublicKey, Record};
use crate::ids::NodeName;

/// Why a record does not continue a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// Another sequence number was due.
    #[error("record {found} stands where record {expected} is due")]
    Sequence {
        /// The number due.
        expected: u64,
        /// The record's.
        found: u64,
    },
    /// The record was written after another record than the one before it.
    #[error("record {0} does not continue the record before it: one of them was exchanged")]
    Previous(u64),
    /// The record is from before its predecessor.
    #[error("record {0} is from an earlier hour than the record before it")]
    Hour(u64),
    /// The log does not begin as a ledger does.
    #[error("record 0 does not open a ledger")]
    Opening,
    /// A ledger is opened once.
    #[error("record {0} opens a ledger within a ledger")]
    SecondOpening(u64),
}

/// How a ledger was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// The ledger.
    pub ledger: LedgerId,
    /// The key that signs its heads.
    pub public_key: PublicKey,
    /// Whose it is.
    pub role: LedgerRole,
    /// The owner's name.
    pub name: NodeName,
}

/// A log that began with its opening record. It keeps hashes, not records.
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    opening: Opening,
    last: (u64, LedgerHash, Hour),
    whole: Vec<LedgerHash>,
    views: BTreeMap<CoordinatorId, Vec<LedgerHash>>,
}

impl Log {
    /// The log of one record.
    ///
    /// # Errors
    /// [`ChainError`], if it opens no ledger.
    pub fn begin(first: &Record) -> Result<Self, ChainError> {
        let Body::LedgerOpened { ledger, public_key, role, name } = first.body() else {
            return Err(ChainError::Opening);
        };
        if first.sequence() != 0 {
            return Err(ChainError::Sequence { expected: 0, found: first.sequence() });
        }
        if first.previous() != Hex([0; 32]) {
            return Err(ChainError::Previous(0));
        }
        let opening = Opening { ledger: *ledger, public_key: *public_key, role: *role, name: name.clone() };
        let whole = vec![merkle::leaf(&first.hash().0)];
        Ok(Self { opening, last: first.link(), whole, views: BTreeMap::new() })
    }

    /// Appends the next record.
    ///
    /// # Errors
    /// [`ChainError`], and nothing is changed.
    pub fn push(&mut self, record: &Record) -> Result<(), ChainError> {
        let (sequence, hash, hour) = self.last;
        let (expected, found) = (sequence.saturating_add(1), record.sequence());
        if found != expected {
            return Err(ChainError::Sequence { expected, found });
        }
        if record.previous() != hash {
            return Err(ChainError::Previous(found));
        }
        if record.hour() < hour {
            return Err(ChainError::Hour(found));
        }
        if matches!(record.body(), Body::LedgerOpened { .. }) {
            return Err(ChainError::SecondOpening(found));
        }
        let leaf = merkle::leaf(&record.hash().0);
        if let Some(coordinator) = record.body().concerns() {
            let opening = self.whole.first().copied();
            let view = self.views.entry(coordinator).or_insert_with(|| opening.into_iter().collect());
            view.push(leaf);
        }
        self.whole.push(leaf);
        self.last = record.link();
        Ok(())
    }

    /// How the ledger was opened.
    pub fn opening(&self) -> &Opening {
        &self.opening
    }

    /// The number of records.
    pub fn size(&self) -> u64 {
        self.whole.len() as u64
    }

    /// What the next record needs of the last one.
    pub(crate) fn last(&self) -> (u64, LedgerHash, Hour) {
        self.last
    }

    /// The head over a view as it stands.
    pub fn head(&self, view: View) -> Head {
        let leaves = self.leaves(view);
        Head { ledger: self.opening.ledger, view, size: leaves.len() as u64, root: merkle::root(leaves) }
    }

    /// The root over a view when it had `size` records; `None` if it never had.
    pub fn root_at(&self, view: View, size: u64) -> Option<LedgerHash> {
        Some(merkle::root(self.leaves(view).get(..usize::try_from(size).ok()?)?))
    }

    /// The proof that a view's head continues the one over its first `earlier` records
    /// ([`merkle::consistency`]).
    pub fn consistency(&self, view: View, earlier: u64) -> Option<Vec<LedgerHash>> {
        merkle::consistency(self.leaves(view), usize::try_from(earlier).ok()?)
    }

    fn leaves(&self, view: View) -> &[LedgerHash] {
        match view {
            View::Whole => &self.whole,
            View::Coordinator(id) => match self.views.get(&id) {
                Some(leaves) => leaves,
                None => self.whole.get(..1).unwrap_or_default(),
            },
        }
    }
}
