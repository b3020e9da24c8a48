//! The next support from what was published alone, and by lot alone.

use rand::Rng;

use super::{Support, SupportError, by_score_and_lot, check_length, drawn_by_lot};

/// What remains of a score on the support, the rest being the magnitude of the sum.
const MEMORY: f32 = 0.7;
/// What remains of a score off the support.
const FADING: f32 = 0.98;

/// The next support by the published sums alone: state at the coordinator, fit for differential privacy.
///
/// On the support a ← 0.7·a + 0.3·|sum|, off it a ← 0.98·a; the next support are the coordinates of highest a, and others
/// by lot. All of it follows from what was published, so it costs no privacy.
#[derive(Debug, Clone, PartialEq)]
pub struct Track {
    pub(super) exploration: f64,
    pub(super) scores: Vec<f32>,
    pub(super) support: Support,
}

impl Track {
    /// The first support: drawn by lot. `exploration`, 0 to 1, is the share that is drawn by lot in each round
    /// (0.25 to 0.4 serves).
    ///
    /// # Errors
    /// [`SupportError::Size`], [`SupportError::Exploration`].
    pub fn first<R: Rng + ?Sized>(
        parameters: usize,
        size: usize,
        exploration: f64,
        rng: &mut R,
    ) -> Result<Self, SupportError> {
        let support = drawn_by_lot(parameters, size, rng)?;
        Self::restored(exploration, vec![0.0; parameters], support)
    }

    pub(super) fn restored(
        exploration: f64,
        scores: Vec<f32>,
        support: Support,
    ) -> Result<Self, SupportError> {
        if !(0.0..=1.0).contains(&exploration) {
            return Err(SupportError::Exploration(exploration));
        }
        check_length("scores", support.parameters(), scores.len())?;
        Ok(Self { exploration, scores, support })
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
    pub fn advance<R: Rng + ?Sized>(&mut self, sum: &[f32], rng: &mut R) -> Result<(), SupportError> {
        check_length("values", self.support.indices().len(), sum.len())?;
        if let Some(at) = sum.iter().position(|value| !value.is_finite()) {
            return Err(SupportError::NotFinite(at));
        }
        let seen = self.support.gather(&self.scores)?;
        self.scores.iter_mut().for_each(|score| *score *= FADING);
        for ((index, old), sum) in self.support.indices().iter().zip(seen).zip(sum) {
            if let Some(score) = self.scores.get_mut(*index as usize) {
                *score = MEMORY * old + (1.0 - MEMORY) * sum.abs();
            }
        }
        self.support = by_score_and_lot(&self.scores, self.support.indices().len(), self.exploration, rng)?;
        Ok(())
    }
}

/// A new support by lot in each round: the baseline.
#[derive(Debug, Clone, PartialEq)]
pub struct SeededRandom {
    pub(super) support: Support,
}

impl SeededRandom {
    /// The first support.
    ///
    /// # Errors
    /// [`SupportError::Size`].
    pub fn first<R: Rng + ?Sized>(parameters: usize, size: usize, rng: &mut R) -> Result<Self, SupportError> {
        Ok(Self { support: drawn_by_lot(parameters, size, rng)? })
    }

    /// This round's support.
    pub fn support(&self) -> &Support {
        &self.support
    }

    /// Goes to the next round's support.
    ///
    /// # Errors
    /// None that a support which exists can cause.
    pub fn advance<R: Rng + ?Sized>(&mut self, rng: &mut R) -> Result<(), SupportError> {
        self.support = drawn_by_lot(self.support.parameters(), self.support.indices().len(), rng)?;
        Ok(())
    }
}
