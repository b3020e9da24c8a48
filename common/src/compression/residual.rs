//! What a client did not send and may send later (error feedback): charged only when the update was accepted.

use super::container::DecodeError;
use super::support::Support;
use crate::digest::Digest;

/// What a residual loses with each round that its client did not take part in.
pub const DECAY: f64 = 0.9;
/// Rounds in between after which a residual is forgotten.
pub const FORGOTTEN_AFTER_ROUNDS: u32 = 20;
/// The largest norm of a residual, in clip norms.
pub const CAP_CLIP_NORMS: f64 = 2.0;

/// What became of an encoded update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The round was committed with this update in it.
    Accepted,
    /// The round was abandoned for good, or committed without this update.
    NotAccepted,
    /// The node was away when the round ended, and nobody can tell it any more.
    Unknown,
}

/// Why a residual is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResidualError {
    /// An update is still waiting for the end of its round.
    #[error("the residual of round {pending} waits for that round's end; settle it before round {round}")]
    Unsettled {
        /// The round that waits.
        pending: u32,
        /// The round asked for.
        round: u32,
    },
    /// A round that is encoded once must not be encoded a second time.
    #[error("round {0} was encoded before with other bytes; send those again")]
    EncodedTwice(u32),
    /// Nothing waits for the end of that round.
    #[error("no residual waits for the end of round {0}")]
    NothingPending(u32),
    /// Rounds only go forward.
    #[error("round {round} is not after round {kept}, whose residual was kept")]
    Backwards {
        /// The round asked for.
        round: u32,
        /// The round whose residual is kept.
        kept: u32,
    },
    /// The vector has another length than the model.
    #[error("a residual of {found} coordinates, but the model has {expected} parameters")]
    WrongLength {
        /// Parameters of the model.
        expected: usize,
        /// Coordinates given.
        found: usize,
    },
    /// A coordinate is NaN or infinite.
    #[error("coordinate {0} of the residual is not finite; nothing was kept")]
    NotFinite(usize),
}

/// A client's residual in two slots: the one that was kept, and the one that waits for its round's end.
#[derive(Debug, Clone, PartialEq)]
pub struct ResidualJournal {
    parameters: usize,
}

impl ResidualJournal {
    /// An empty journal for a model of `parameters` parameters whose layout has digest `lineage`.
    pub fn new(_parameters: usize, _lineage: Digest) -> Self {
        unimplemented!()
    }

    /// The round whose update waits for its end, and the digest of its payload.
    pub fn pending(&self) -> Option<(u32, Digest)> {
        unimplemented!()
    }

    /// Adds the kept residual to `delta`, the update of `round`: times 0.9 for each round in between, and not at all
    /// after 20 of them or if `lineage` is another model's. Changes nothing here; clip afterwards.
    ///
    /// Asking again for the round that is pending gives what it gave the first time.
    ///
    /// # Errors
    /// [`ResidualError::Unsettled`], [`ResidualError::Backwards`], [`ResidualError::WrongLength`].
    pub fn add_kept(&self, _round: u32, _lineage: Digest, _delta: &mut [f32]) -> Result<(), ResidualError> {
        unimplemented!()
    }

    /// Writes down what `round` did not send, where `payload` is the digest of the encoded bytes. It counts only once
    /// [`ResidualJournal::settle`] says that the update was accepted; make it durable before the bytes leave.
    ///
    /// `clip_norm` caps its norm at 2 clip norms. The same round with the same payload again changes nothing: so an
    /// attempt that is tried again keeps its entry.
    ///
    /// # Errors
    /// [`ResidualError`].
    pub fn write_pending(
        &mut self,
        _round: u32,
        _lineage: Digest,
        _payload: Digest,
        _residual: Vec<f32>,
        _clip_norm: Option<f64>,
    ) -> Result<(), ResidualError> {
        unimplemented!()
    }

    /// Ends the wait for `round`: accepted promotes its residual, not accepted keeps the old one, and if nobody knows
    /// both are forgotten, since either could be in the model already.
    ///
    /// # Errors
    /// [`ResidualError::NothingPending`].
    pub fn settle(&mut self, _round: u32, _outcome: Outcome) -> Result<(), ResidualError> {
        unimplemented!()
    }

    /// The journal as bytes that end with their digest.
    pub fn to_bytes(&self) -> Vec<u8> {
        unimplemented!()
    }

    /// The journal that a file holds, if it is whole and of a model of `parameters` parameters.
    ///
    /// # Errors
    /// [`DecodeError`]. A damaged journal is best replaced by a new one: a residual is a help, not a debt.
    pub fn from_bytes(_bytes: &[u8], _parameters: usize) -> Result<Self, DecodeError> {
        unimplemented!()
    }
}

/// What the receiver does not get of `wanted`, coordinate by coordinate: the next residual of an update not masked.
pub fn unsent(_wanted: &[f32], _received: &[f32]) -> Vec<f32> {
    unimplemented!()
}

/// What a masked round does not carry of `wanted`: all off the support, and on it the error of rounding and clipping,
/// where `carried` are the values that went into the sum, in the order of the support.
pub fn off_support(_wanted: &[f32], _support: &Support, _carried: &[f32]) -> Vec<f32> {
    unimplemented!()
}
