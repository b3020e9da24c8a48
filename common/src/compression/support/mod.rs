//! The coordinates that every client of a masked round sends, so that sums line up.
//!
//! Three rules choose the next round's: [`DelayedVote`] by the clients' votes (without differential privacy),
//! [`Track`] by the published sums alone, [`SeededRandom`] by lot, as a baseline.

use rand::Rng;

use super::container::DecodeError;
use crate::digest::Digest;

/// A support that is none.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SupportError {
    /// Indices are not ascending, or one is beyond the model.
    #[error("a support must ascend within the model's {parameters} parameters; entry {at} does not")]
    Indices {
        /// The entry, from 0.
        at: usize,
        /// Parameters of the model.
        parameters: usize,
    },
    /// The size is none that a model of that many parameters can have.
    #[error("a support of {size} coordinates of {parameters} is not possible")]
    Size {
        /// Coordinates asked for.
        size: usize,
        /// Parameters of the model.
        parameters: usize,
    },
    /// The share of explored coordinates is none.
    #[error("exploring a share of {0} is not possible; 0 to 1 is")]
    Exploration(f64),
    /// A sum has another length than it should.
    #[error("{found} {what}, but this round's support has {expected}")]
    WrongLength {
        /// What was counted.
        what: &'static str,
        /// How many there should be.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// A sum is not finite.
    #[error("entry {0} of the published sum is not finite")]
    NotFinite(usize),
}

/// A sorted set of coordinates of a flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Support {
    parameters: usize,
    indices: Vec<u32>,
}

impl Support {
    /// The support of `indices`, ascending and below `parameters`.
    ///
    /// # Errors
    /// [`SupportError`].
    pub fn new(_parameters: usize, _indices: Vec<u32>) -> Result<Self, SupportError> {
        unimplemented!()
    }

    /// Parameters of the model.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// The coordinates, ascending.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// BLAKE3 of [`Support::to_bytes`]: what a masked session is bound to.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.to_bytes())
    }

    /// The support as Rice-coded positions in a container: what clients are sent. One support has one encoding.
    pub fn to_bytes(&self) -> Vec<u8> {
        unimplemented!()
    }

    /// The support of `size` coordinates of a model of `parameters` parameters that `bytes` hold. Safe on any bytes.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn from_bytes(_bytes: &[u8], _parameters: usize, _size: usize) -> Result<Self, DecodeError> {
        unimplemented!()
    }

    /// The values of `vector` on the support, in its order.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`] if `vector` is not as long as the model.
    pub fn gather(&self, _vector: &[f32]) -> Result<Vec<f32>, SupportError> {
        unimplemented!()
    }

    /// The flat vector that has `values` on the support and zeros elsewhere.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`] if there are not as many values as coordinates.
    pub fn scatter(&self, _values: &[f32]) -> Result<Vec<f32>, SupportError> {
        unimplemented!()
    }
}

/// How votes are counted: a count-min sketch of two rows, whose cells are summed under the mask.
///
/// Cells: 2K in all, 4K where K is at most 1 % of the parameters. A client's cell holds at most [`Ballot::CELL_CAP`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ballot {
    parameters: usize,
    size: usize,
}

impl Ballot {
    /// The most that one client may put into a cell.
    pub const CELL_CAP: u32 = 3;

    /// The ballot for a support of `size` coordinates of `parameters`.
    ///
    /// # Errors
    /// [`SupportError::Size`].
    pub fn new(_parameters: usize, _size: usize) -> Result<Self, SupportError> {
        unimplemented!()
    }

    /// How many cells a client sends.
    pub fn cells(&self) -> usize {
        unimplemented!()
    }

    /// Bits of a cell of a sum over `clients` clients: ⌈log₂(3·clients + 1)⌉.
    pub fn cell_bits(_clients: u32) -> u32 {
        unimplemented!()
    }

    /// A client's votes: the cells of the `size` largest magnitudes of `update`, each 0 to 3.
    ///
    /// `seed` is public and new for each round, such as the session's context digest.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`], [`SupportError::NotFinite`].
    pub fn cast(&self, _update: &[f32], _seed: &[u8; 32]) -> Result<Vec<u32>, SupportError> {
        unimplemented!()
    }

    /// What each coordinate's votes are at most, from the sum of all clients' cells: the smaller of its two cells.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`].
    pub fn count(&self, _sums: &[u32], _seed: &[u8; 32]) -> Result<Vec<u32>, SupportError> {
        unimplemented!()
    }
}

/// The next support by last round's votes: state at the coordinator. Not for differential privacy.
#[derive(Debug, Clone, PartialEq)]
pub struct DelayedVote {
    ballot: Ballot,
    support: Support,
}

impl DelayedVote {
    /// The share of a support that is drawn by lot.
    pub const EXPLORATION: f64 = 0.05;

    /// The first support: drawn by lot.
    ///
    /// # Errors
    /// [`SupportError::Size`].
    pub fn first<R: Rng + ?Sized>(
        _parameters: usize,
        _size: usize,
        _rng: &mut R,
    ) -> Result<Self, SupportError> {
        unimplemented!()
    }

    /// This round's support.
    pub fn support(&self) -> &Support {
        &self.support
    }

    /// How this round's clients vote.
    pub fn ballot(&self) -> Ballot {
        self.ballot
    }

    /// Goes to the next round's support, given the sum of the clients' cells and the seed that they were cast with.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`]; the state is then as before.
    pub fn advance<R: Rng + ?Sized>(
        &mut self,
        _sums: &[u32],
        _seed: &[u8; 32],
        _rng: &mut R,
    ) -> Result<(), SupportError> {
        unimplemented!()
    }
}

/// The next support by the published sums alone: state at the coordinator, fit for differential privacy.
#[derive(Debug, Clone, PartialEq)]
pub struct Track {
    support: Support,
}

impl Track {
    /// The first support: drawn by lot. `exploration`, 0 to 1, is the share that is drawn by lot in each round
    /// (0.25 to 0.4 serves).
    ///
    /// # Errors
    /// [`SupportError::Size`], [`SupportError::Exploration`].
    pub fn first<R: Rng + ?Sized>(
        _parameters: usize,
        _size: usize,
        _exploration: f64,
        _rng: &mut R,
    ) -> Result<Self, SupportError> {
        unimplemented!()
    }

    /// This round's support.
    pub fn support(&self) -> &Support {
        &self.support
    }

    /// Goes to the next round's support, given what was published of this round: one value for each coordinate of
    /// the support, in its order.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`], [`SupportError::NotFinite`]; the state is then as before.
    pub fn advance<R: Rng + ?Sized>(&mut self, _sum: &[f32], _rng: &mut R) -> Result<(), SupportError> {
        unimplemented!()
    }
}

/// A new support by lot in each round: the baseline.
#[derive(Debug, Clone, PartialEq)]
pub struct SeededRandom {
    support: Support,
}

impl SeededRandom {
    /// The first support.
    ///
    /// # Errors
    /// [`SupportError::Size`].
    pub fn first<R: Rng + ?Sized>(
        _parameters: usize,
        _size: usize,
        _rng: &mut R,
    ) -> Result<Self, SupportError> {
        unimplemented!()
    }

    /// This round's support.
    pub fn support(&self) -> &Support {
        &self.support
    }

    /// Goes to the next round's support.
    pub fn advance<R: Rng + ?Sized>(&mut self, _rng: &mut R) {
        unimplemented!()
    }
}

/// Whichever rule a job asks for: what the coordinator keeps beside the model.
#[derive(Debug, Clone, PartialEq)]
pub enum SupportState {
    /// By votes.
    DelayedVote(DelayedVote),
    /// By published sums.
    Track(Track),
    /// By lot.
    SeededRandom(SeededRandom),
}

impl SupportState {
    /// This round's support.
    pub fn support(&self) -> &Support {
        match self {
            Self::DelayedVote(state) => state.support(),
            Self::Track(state) => state.support(),
            Self::SeededRandom(state) => state.support(),
        }
    }

    /// The state as bytes that end with their digest.
    pub fn to_bytes(&self) -> Vec<u8> {
        unimplemented!()
    }

    /// The state that `bytes` hold, if they are whole and of a model of `parameters` parameters.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn from_bytes(_bytes: &[u8], _parameters: usize) -> Result<Self, DecodeError> {
        unimplemented!()
    }
}
