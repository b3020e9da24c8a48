//! The coordinator's sum of one segment: masked updates are added as they are verified, masks are taken out at the end.

use std::num::NonZeroUsize;

use super::keys::{MaskKey, MaskTerm, Sign};
use super::mask::Backend;
use super::ring::{RingError, RingVector, Width};

/// A sum of updates modulo 2^b. It means nothing until all masks are taken out.
///
/// The plain path adds vectors that were never masked: the result is the same, bit for bit.
#[derive(Clone)]
pub struct MaskedSum {
    vector: RingVector,
    updates: u32,
}

impl MaskedSum {
    /// A sum of no updates.
    pub fn new(width: Width, coordinates: usize) -> Self {
        Self { vector: RingVector::zeros(width, coordinates), updates: 0 }
    }

    /// Adds an update as it travels. It cannot be taken out again: verify it first. Adds nothing if there is an error.
    ///
    /// # Errors
    /// [`RingError`] if it has another length, or bits behind its last coordinate.
    pub fn add_packed(&mut self, packed: &[u8]) -> Result<(), RingError> {
        self.vector.add_packed(packed)?;
        self.updates = self.updates.saturating_add(1);
        Ok(())
    }

    /// Adds an update.
    ///
    /// # Errors
    /// [`RingError`] if it has another width or length.
    pub fn add(&mut self, update: &RingVector) -> Result<(), RingError> {
        self.vector.add(update)?;
        self.updates = self.updates.saturating_add(1);
        Ok(())
    }

    /// Takes the masks of segment `segment` out, as `terms` say; terms of other segments are left alone.
    ///
    /// # Errors
    /// [`RingError::Stream`] if the vector is longer than a key stream.
    pub fn unmask(
        &mut self,
        terms: &[MaskTerm],
        segment: u8,
        threads: NonZeroUsize,
    ) -> Result<(), RingError> {
        self.vector.mask(of_segment(terms, segment), threads)
    }

    /// The same by a given back end, whose choice changes no bit.
    ///
    /// # Errors
    /// As [`MaskedSum::unmask`].
    pub fn unmask_by(
        &mut self,
        backend: Backend,
        terms: &[MaskTerm],
        segment: u8,
        threads: NonZeroUsize,
    ) -> Result<(), RingError> {
        self.vector.mask_by(backend, of_segment(terms, segment), threads)
    }

    /// Number of updates that were added.
    pub fn updates(&self) -> u32 {
        self.updates
    }

    /// How many coordinates are larger than `bound` in absolute value. Without noise no sum of n updates exceeds n·Q,
    /// so one means that a client lied about its range or a mask was wrong; with noise the bound has its tail added.
    pub fn exceeding(&self, bound: u64) -> usize {
        self.vector.signed().filter(|value| value.unsigned_abs() > bound).count()
    }

    /// The sum as a vector.
    pub fn vector(&self) -> &RingVector {
        &self.vector
    }

    /// The sum of each coordinate, from −2^(b−1) to 2^(b−1) − 1.
    pub fn signed(&self) -> impl Iterator<Item = i64> + '_ {
        self.vector.signed()
    }
}

/// The terms of one segment.
pub fn of_segment(terms: &[MaskTerm], segment: u8) -> impl Iterator<Item = (&MaskKey, Sign)> {
    terms.iter().filter(move |term| term.segment == segment).map(|term| (&term.key, term.sign))
}
