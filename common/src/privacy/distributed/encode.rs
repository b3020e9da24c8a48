//! What a client does to its vector before it is masked, and what is done to the unmasked sum.

use super::Plan;
use crate::privacy::noise::{NoiseError, SecretRng};

/// Why a vector cannot be encoded or a sum decoded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// The vector has another length than was planned.
    #[error("a vector of {found} coordinates was given where the plan has {planned}")]
    Length {
        /// Of the vector.
        found: usize,
        /// Planned.
        planned: usize,
    },
    /// The noise cannot be drawn.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// No rounding stayed within the sensitivity.
    #[error("no rounding of the vector stays within the planned sensitivity: the plan is not sound")]
    Rounding,
}

/// A client's `vector` as integers with its share of noise, [`Plan::padded`] of them, to be reduced modulo 2ᵇ and masked.
///
/// Clips (client level), rotates by the signs of the public `seed`, scales, cuts to the box, rounds, adds a share. A
/// vector with a value that is no number counts as zero and is not told apart: only its noise is sent.
///
/// # Errors
/// [`EncodeError`].
pub fn encode<T: Copy + Into<f64>>(
    vector: &[T],
    plan: &Plan,
    seed: &[u8; 32],
    rng: &mut SecretRng,
) -> Result<Vec<i64>, EncodeError> {
    let _ = (vector, plan, seed, rng);
    unimplemented!()
}

/// The sum of the clients' vectors, noise included, from the `sum` of their integers, lifted from the ring to ±2ᵇ⁻¹.
///
/// # Errors
/// [`EncodeError::Length`].
pub fn decode(sum: &[i64], plan: &Plan, seed: &[u8; 32]) -> Result<Vec<f64>, EncodeError> {
    let _ = (sum, plan, seed);
    unimplemented!()
}
