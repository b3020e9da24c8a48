//! The coordinates that every client of a masked round sends, so that sums line up.
//!
//! Three rules choose the next round's: [`DelayedVote`] by the clients' votes (without differential privacy),
//! [`Track`] by the published sums alone, [`SeededRandom`] by lot, as a baseline. Only the coordinator chooses; a client
//! is told the support and checks its digest. Lots come from a named stream, so that a run can be repeated.

mod track;
mod vote;

pub use self::track::{SeededRandom, Track};
pub use self::vote::{Ballot, DelayedVote};

use rand::Rng;

use super::container::{Container, DecodeError, SPARSE_PARAMETERS};
use super::sealed::Kind;
use super::select;
use super::values::Plane;
use crate::digest::Digest;

const KIND: Kind = Kind { what: "a support's state", magic: *b"TRBS", version: 1 };

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
    pub fn new(parameters: usize, indices: Vec<u32>) -> Result<Self, SupportError> {
        check_size(parameters, indices.len())?;
        let mut next = 0;
        for (at, index) in indices.iter().enumerate() {
            if (*index as usize) < next || *index as usize >= parameters {
                return Err(SupportError::Indices { at, parameters });
            }
            next = *index as usize + 1;
        }
        Ok(Self { parameters, indices })
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
        let container = container(self.parameters, self.indices.len());
        let mut bytes = container.header().to_vec();
        container.plan().encode(&self.indices, &mut bytes);
        bytes
    }

    /// The support of `size` coordinates of a model of `parameters` parameters that `bytes` hold. Safe on any bytes.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn from_bytes(bytes: &[u8], parameters: usize, size: usize) -> Result<Self, DecodeError> {
        check_size(parameters, size).map_err(DecodeError::Support)?;
        let container = container(parameters, size);
        let indices = container.plan().decode(container.after_header(bytes)?)?;
        Ok(Self { parameters, indices })
    }

    /// The values of `vector` on the support, in its order.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`] if `vector` is not as long as the model.
    pub fn gather(&self, vector: &[f32]) -> Result<Vec<f32>, SupportError> {
        check_length("coordinates", self.parameters, vector.len())?;
        Ok(self.indices.iter().filter_map(|index| vector.get(*index as usize).copied()).collect())
    }

    /// The flat vector that has `values` on the support and zeros elsewhere.
    ///
    /// # Errors
    /// [`SupportError::WrongLength`] if there are not as many values as coordinates.
    pub fn scatter(&self, values: &[f32]) -> Result<Vec<f32>, SupportError> {
        check_length("values", self.indices.len(), values.len())?;
        let mut vector = vec![0.0; self.parameters];
        for (index, value) in self.indices.iter().zip(values) {
            if let Some(place) = vector.get_mut(*index as usize) {
                *place = *value;
            }
        }
        Ok(vector)
    }
}

fn container(parameters: usize, count: usize) -> Container {
    Container { sparse: true, plane: Plane::Nothing, parameters, count }
}

fn check_size(parameters: usize, size: usize) -> Result<(), SupportError> {
    let possible = size <= parameters && parameters <= SPARSE_PARAMETERS;
    if possible { Ok(()) } else { Err(SupportError::Size { size, parameters }) }
}

fn check_length(what: &'static str, expected: usize, found: usize) -> Result<(), SupportError> {
    if found == expected { Ok(()) } else { Err(SupportError::WrongLength { what, expected, found }) }
}

/// `size` coordinates of `parameters`, every set of them as likely as any other.
fn drawn_by_lot<R: Rng + ?Sized>(
    parameters: usize,
    size: usize,
    rng: &mut R,
) -> Result<Support, SupportError> {
    check_size(parameters, size)?;
    Ok(Support { parameters, indices: lots(parameters, size, rng) })
}

/// `count` different numbers below `below`, ascending; `count` is at most `below`.
fn lots<R: Rng + ?Sized>(below: usize, count: usize, rng: &mut R) -> Vec<u32> {
    let mut lots: Vec<u32> =
        rand::seq::index::sample(rng, below, count).iter().map(|lot| lot as u32).collect();
    lots.sort_unstable();
    lots
}

/// The coordinates of highest score, ties to the lowest index, and a share of others drawn by lot.
fn by_score_and_lot<R: Rng + ?Sized>(
    scores: &[f32],
    size: usize,
    exploration: f64,
    rng: &mut R,
) -> Result<Support, SupportError> {
    check_size(scores.len(), size)?;
    let mut explored = ((size as f64 * exploration).round() as usize).min(size);
    if exploration > 0.0 && size >= 2 {
        // A small support explores as well, or it could never change.
        explored = explored.max(1);
    }
    let best =
        select::top_k(scores, size - explored).map_err(|error| SupportError::NotFinite(error.index))?;
    let mut indices = Vec::with_capacity(size);
    // A lot is a rank among the coordinates that are not among the best; both ascend.
    let mut passed = best.iter().copied().peekable();
    let mut skipped = 0;
    for lot in lots(scores.len() - best.len(), explored, rng) {
        while let Some(index) = passed.next_if(|index| *index <= lot + skipped) {
            indices.push(index);
            skipped += 1;
        }
        indices.push(lot + skipped);
    }
    indices.extend(passed);
    Ok(Support { parameters: scores.len(), indices })
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
        let none = Vec::new();
        let (rule, exploration, scores) = match self {
            Self::DelayedVote(state) => (0, 0.0, &state.scores),
            Self::Track(state) => (1, state.exploration, &state.scores),
            Self::SeededRandom(_) => (2, 0.0, &none),
        };
        let support = self.support();
        let mut bytes = KIND.open(rule);
        bytes.extend((support.parameters as u64).to_le_bytes());
        bytes.extend((support.indices.len() as u64).to_le_bytes());
        bytes.extend(f64::to_le_bytes(exploration));
        bytes.extend(scores.iter().flat_map(|score| score.to_le_bytes()));
        bytes.extend(support.to_bytes());
        Kind::seal(bytes)
    }

    /// The state that `bytes` hold, if they are whole and of a model of `parameters` parameters.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn from_bytes(bytes: &[u8], parameters: usize) -> Result<Self, DecodeError> {
        let (rule, mut contents) = KIND.unseal(bytes)?;
        let (found, expected) = (u64::from_le_bytes(contents.array()?), parameters as u64);
        if found != expected {
            return Err(DecodeError::Header { field: "parameters", found, expected });
        }
        let size = usize::try_from(u64::from_le_bytes(contents.array()?)).unwrap_or(usize::MAX);
        let exploration = f64::from_le_bytes(contents.array()?);
        let scores = if rule == 2 { Vec::new() } else { contents.floats(parameters)? };
        let support = Support::from_bytes(contents.remainder(), parameters, size)?;
        Ok(match rule {
            0 => Self::DelayedVote(DelayedVote::restored(scores, support).map_err(DecodeError::Support)?),
            1 => Self::Track(Track::restored(exploration, scores, support).map_err(DecodeError::Support)?),
            2 => Self::SeededRandom(SeededRandom { support }),
            other => return Err(DecodeError::Header { field: "rule", found: other.into(), expected: 2 }),
        })
    }
}

#[cfg(test)]
mod tests;
