//! Votes for the next support: a count-min sketch whose cells are summed under the mask, and the rule that follows it.

use rand::Rng;

use super::{Support, SupportError, by_score_and_lot, check_length, check_size, drawn_by_lot};
use crate::compression::select;

/// Rows of the sketch.
const ROWS: usize = 2;
/// What remains of a score, the rest being the new votes.
const MEMORY: f32 = 0.5;

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
    pub fn new(parameters: usize, size: usize) -> Result<Self, SupportError> {
        check_size(parameters, size)?;
        Ok(Self { parameters, size })
    }

    /// How many cells a client sends.
    pub fn cells(&self) -> usize {
        self.row_cells() * ROWS
    }

    fn row_cells(&self) -> usize {
        let few = self.size.saturating_mul(100) <= self.parameters;
        if few { self.size * 2 } else { self.size }
    }

    /// Bits of a cell of a sum over `clients` clients: ⌈log₂(3·clients + 1)⌉.
    pub fn cell_bits(clients: u32) -> u32 {
        u64::BITS - (u64::from(clients) * u64::from(Self::CELL_CAP)).leading_zeros()
    }

    /// A client's votes: the cells of the `size` largest magnitudes of `update`, each 0 to 3.
    ///
    /// `seed` is public and new for each round, such as the session's context digest.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`], [`SupportError::NotFinite`].
    pub fn cast(&self, update: &[f32], seed: &[u8; 32]) -> Result<Vec<u32>, SupportError> {
        check_length("coordinates", self.parameters, update.len())?;
        let chosen =
            select::top_k(update, self.size).map_err(|error| SupportError::NotFinite(error.index))?;
        let places = Places::new(seed, self.row_cells());
        let mut cells = vec![0u32; self.cells()];
        for index in chosen {
            for place in places.of(index) {
                if let Some(cell) = cells.get_mut(place) {
                    *cell = (*cell + 1).min(Self::CELL_CAP);
                }
            }
        }
        Ok(cells)
    }

    /// What each coordinate's votes are at most, from the sum of all clients' cells: the smaller of its two cells.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`].
    pub fn count(&self, sums: &[u32], seed: &[u8; 32]) -> Result<Vec<u32>, SupportError> {
        check_length("cells", self.cells(), sums.len())?;
        let places = Places::new(seed, self.row_cells());
        let cell = |place: usize| sums.get(place).copied().unwrap_or(0);
        let count = |index| places.of(index).into_iter().map(cell).fold(u32::MAX, u32::min);
        Ok((0..self.parameters as u32).map(count).collect())
    }
}

/// Where a coordinate's cells are.
struct Places {
    keys: [u64; ROWS],
    row_cells: u64,
}

impl Places {
    fn new(seed: &[u8; 32], row_cells: usize) -> Self {
        let key = blake3::derive_key("tributary 2026 vote cells v1", seed);
        let (words, _) = key.as_chunks::<8>();
        let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
        Self { keys: std::array::from_fn(|_| words.next().unwrap_or(0)), row_cells: row_cells as u64 }
    }

    /// One cell in each row: SplitMix64's finalizer (Steele et al. 2014) of the row's key plus the coordinate times the
    /// golden ratio; its high half, multiplied into the row.
    #[inline]
    fn of(&self, index: u32) -> [usize; ROWS] {
        let mut row_start = 0;
        self.keys.map(|key| {
            let mut z = key.wrapping_add(u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            let place = row_start + ((z >> 32) * self.row_cells >> 32) as usize;
            row_start += self.row_cells as usize;
            place
        })
    }
}

/// The next support by last round's votes: state at the coordinator. Not for differential privacy.
///
/// a ← a/2 + votes/2; the next support are the coordinates of highest a and, for one in twenty, others by lot.
#[derive(Debug, Clone, PartialEq)]
pub struct DelayedVote {
    ballot: Ballot,
    pub(super) scores: Vec<f32>,
    pub(super) support: Support,
}

impl DelayedVote {
    /// The share of a support that is drawn by lot.
    pub const EXPLORATION: f64 = 0.05;

    /// The first support: drawn by lot.
    ///
    /// # Errors
    /// [`SupportError::Size`].
    pub fn first<R: Rng + ?Sized>(parameters: usize, size: usize, rng: &mut R) -> Result<Self, SupportError> {
        let support = drawn_by_lot(parameters, size, rng)?;
        Self::restored(vec![0.0; parameters], support)
    }

    pub(super) fn restored(scores: Vec<f32>, support: Support) -> Result<Self, SupportError> {
        let ballot = Ballot::new(support.parameters(), support.indices().len())?;
        check_length("scores", support.parameters(), scores.len())?;
        Ok(Self { ballot, scores, support })
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
        sums: &[u32],
        seed: &[u8; 32],
        rng: &mut R,
    ) -> Result<(), SupportError> {
        let votes = self.ballot.count(sums, seed)?;
        for (score, votes) in self.scores.iter_mut().zip(votes) {
            *score = MEMORY * *score + (1.0 - MEMORY) * votes as f32;
        }
        self.support = by_score_and_lot(&self.scores, self.ballot.size, Self::EXPLORATION, rng)?;
        Ok(())
    }
}
