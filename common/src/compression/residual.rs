//! What a client did not send and may send later (error feedback): charged only when the update was accepted.
//!
//! Without differential privacy, or where the residual is of values that are noised already, or at client level with
//! the clip after it and no amplification by sampling: state that outlives a round would void any other guarantee.

use super::container::DecodeError;
use super::sealed::Kind;
use super::support::Support;
use crate::aggregate::norm;
use crate::digest::Digest;

/// What a residual is multiplied with for each round in between that its client did not take part in.
pub const DECAY: f64 = 0.9;
/// Rounds in between after which a residual is forgotten.
pub const FORGOTTEN_AFTER_ROUNDS: u32 = 20;
/// The largest norm of a residual, in clip norms.
pub const CAP_CLIP_NORMS: f64 = 2.0;

const KIND: Kind = Kind { what: "a residual journal", magic: *b"TRBR", version: 1 };
const HAS_KEPT: u8 = 1;
const HAS_PENDING: u8 = 2;

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
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
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
    /// The clip norm is no bound.
    #[error("a clip norm of {0} is not possible: a finite number above 0 is needed")]
    ClipNorm(f64),
    /// A coordinate is NaN or infinite.
    #[error("coordinate {0} of the residual is not finite; nothing was kept")]
    NotFinite(usize),
}

/// A client's residual in two slots: the one that was kept, and the one that waits for its round's end.
///
/// A node writes the pending one together with the encoded bytes before the first of these leaves, and settles it when
/// it hears how the round ended. An attempt that is given up and tried again with the same bytes is no end.
#[derive(Debug, Clone, PartialEq)]
pub struct ResidualJournal {
    parameters: usize,
    kept: Option<Slot>,
    pending: Option<(Digest, Slot)>,
}

#[derive(Debug, Clone, PartialEq)]
struct Slot {
    round: u32,
    lineage: Digest,
    values: Vec<f32>,
}

impl ResidualJournal {
    /// An empty journal for a model of `parameters` parameters.
    pub fn new(parameters: usize) -> Self {
        Self { parameters, kept: None, pending: None }
    }

    /// The round whose update waits for its end, and the digest of its payload.
    pub fn pending(&self) -> Option<(u32, Digest)> {
        self.pending.as_ref().map(|(payload, slot)| (slot.round, *payload))
    }

    /// Adds the kept residual to `delta`, the update of `round`: times 0.9 for each round in between, and not at all
    /// after more than 20 of them or if `lineage`, the digest of the model's layout, is another than it was. Changes
    /// nothing here; clip afterwards.
    ///
    /// Asking again for the round that is pending gives what it gave the first time.
    ///
    /// # Errors
    /// [`ResidualError::Unsettled`], [`ResidualError::Backwards`], [`ResidualError::WrongLength`].
    pub fn add_kept(&self, round: u32, lineage: Digest, delta: &mut [f32]) -> Result<(), ResidualError> {
        self.check(round, delta.len())?;
        let Some(slot) = self.kept.as_ref().filter(|slot| slot.lineage == lineage) else { return Ok(()) };
        let between = round.saturating_sub(slot.round).saturating_sub(1);
        if between > FORGOTTEN_AFTER_ROUNDS {
            return Ok(());
        }
        let share = DECAY.powi(between as i32);
        for (value, residual) in delta.iter_mut().zip(&slot.values) {
            *value += (f64::from(*residual) * share) as f32;
        }
        Ok(())
    }

    /// Writes down what `round` did not send, where `payload` is the digest of the encoded bytes. It counts only once
    /// [`ResidualJournal::settle`] says that the update was accepted; make it durable before the bytes leave.
    ///
    /// `clip_norm` caps its norm at 2 clip norms. The same round with the same payload again changes nothing: so an
    /// attempt that is tried again keeps its entry.
    ///
    /// # Errors
    /// [`ResidualError`]; the journal is then as before.
    pub fn write_pending(
        &mut self,
        round: u32,
        lineage: Digest,
        payload: Digest,
        residual: Vec<f32>,
        clip_norm: Option<f64>,
    ) -> Result<(), ResidualError> {
        self.check(round, residual.len())?;
        if let Some((_, first)) = self.pending() {
            return if first == payload { Ok(()) } else { Err(ResidualError::EncodedTwice(round)) };
        }
        if let Some(at) = residual.iter().position(|value| !value.is_finite()) {
            return Err(ResidualError::NotFinite(at));
        }
        let mut values = residual;
        if let Some(clip_norm) = clip_norm {
            if !(clip_norm.is_finite() && clip_norm > 0.0) {
                return Err(ResidualError::ClipNorm(clip_norm));
            }
            let (norm, cap) = (norm(&values), CAP_CLIP_NORMS * clip_norm);
            if norm > cap {
                values.iter_mut().for_each(|value| *value = (f64::from(*value) * (cap / norm)) as f32);
            }
        }
        self.pending = Some((payload, Slot { round, lineage, values }));
        Ok(())
    }

    /// Ends the wait for `round`: accepted promotes its residual, not accepted keeps the old one, and if nobody knows
    /// both are forgotten, since either could be in the model already.
    ///
    /// # Errors
    /// [`ResidualError::NothingPending`].
    pub fn settle(&mut self, round: u32, outcome: Outcome) -> Result<(), ResidualError> {
        let (_, slot) = self
            .pending
            .take_if(|(_, slot)| slot.round == round)
            .ok_or(ResidualError::NothingPending(round))?;
        match outcome {
            Outcome::Accepted => self.kept = Some(slot),
            Outcome::NotAccepted => {}
            Outcome::Unknown => self.kept = None,
        }
        Ok(())
    }

    /// The journal as bytes that end with their digest.
    pub fn to_bytes(&self) -> Vec<u8> {
        let kept = if self.kept.is_some() { HAS_KEPT } else { 0 };
        let pending = if self.pending.is_some() { HAS_PENDING } else { 0 };
        let mut bytes = KIND.open(kept | pending);
        bytes.extend((self.parameters as u64).to_le_bytes());
        let mut write = |slot: &Slot| {
            bytes.extend(slot.round.to_le_bytes());
            bytes.extend(slot.lineage.0);
            bytes.extend(slot.values.iter().flat_map(|value| value.to_le_bytes()));
        };
        if let Some(slot) = &self.kept {
            write(slot);
        }
        if let Some((payload, slot)) = &self.pending {
            write(slot);
            bytes.extend(payload.0);
        }
        Kind::seal(bytes)
    }

    /// The journal that a file holds, if it is whole and of a model of `parameters` parameters.
    ///
    /// # Errors
    /// [`DecodeError`]. A damaged journal is best replaced by a new one: a residual is a help, not a debt.
    pub fn from_bytes(bytes: &[u8], parameters: usize) -> Result<Self, DecodeError> {
        let (slots, mut contents) = KIND.unseal(bytes)?;
        let (found, expected) = (u64::from_le_bytes(contents.array()?), parameters as u64);
        if found != expected {
            return Err(DecodeError::Header { field: "parameters", found, expected });
        }
        if slots & !(HAS_KEPT | HAS_PENDING) != 0 {
            return Err(DecodeError::Damaged(KIND.what));
        }
        let mut read = |flag| -> Result<Option<Slot>, DecodeError> {
            if slots & flag == 0 {
                return Ok(None);
            }
            let round = u32::from_le_bytes(contents.array()?);
            let lineage = Digest(contents.array()?);
            Ok(Some(Slot { round, lineage, values: contents.floats(parameters)? }))
        };
        let (kept, pending) = (read(HAS_KEPT)?, read(HAS_PENDING)?);
        let pending = match pending {
            Some(slot) => Some((Digest(contents.array()?), slot)),
            None => None,
        };
        contents.end()?;
        Ok(Self { parameters, kept, pending })
    }

    /// Whether `round` may be worked on, with a vector of `length` coordinates.
    fn check(&self, round: u32, length: usize) -> Result<(), ResidualError> {
        if length != self.parameters {
            return Err(ResidualError::WrongLength { expected: self.parameters, found: length });
        }
        if let Some((pending, _)) = self.pending()
            && pending != round
        {
            return Err(ResidualError::Unsettled { pending, round });
        }
        match &self.kept {
            Some(slot) if slot.round >= round => Err(ResidualError::Backwards { round, kept: slot.round }),
            _ => Ok(()),
        }
    }
}

/// What the receiver does not get of `wanted`, coordinate by coordinate: the next residual of an update not masked.
pub fn unsent(wanted: &[f32], received: &[f32]) -> Vec<f32> {
    wanted.iter().zip(received).map(|(wanted, received)| wanted - received).collect()
}

/// What a masked round does not carry of `wanted`: all off the support, and on it the error of rounding and clipping,
/// where `carried` are the values that went into the sum, in the order of the support.
pub fn off_support(wanted: &[f32], support: &Support, carried: &[f32]) -> Vec<f32> {
    let mut residual = wanted.to_vec();
    for (index, carried) in support.indices().iter().zip(carried) {
        if let Some(value) = residual.get_mut(*index as usize) {
            *value -= carried;
        }
    }
    residual
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Digest = Digest([1; 32]);
    const FIRST: Digest = Digest([2; 32]);
    const SECOND: Digest = Digest([3; 32]);

    fn kept(round: u32, values: &[f32]) -> ResidualJournal {
        let mut journal = ResidualJournal::new(values.len());
        journal.write_pending(round, LAYOUT, FIRST, values.to_vec(), None).unwrap();
        journal.settle(round, Outcome::Accepted).unwrap();
        journal
    }

    fn added(journal: &ResidualJournal, round: u32, lineage: Digest) -> f32 {
        let mut delta = [1.0];
        journal.add_kept(round, lineage, &mut delta).unwrap();
        delta[0]
    }

    #[test]
    fn a_residual_counts_only_when_its_update_was_accepted() {
        let mut journal = kept(3, &[0.5]);
        assert_eq!(added(&journal, 4, LAYOUT), 1.5);
        journal.write_pending(4, LAYOUT, SECOND, vec![8.0], None).unwrap();
        // The same round again, before its end is known: nothing moved.
        assert_eq!(added(&journal, 4, LAYOUT), 1.5);
        let other = Err(ResidualError::Unsettled { pending: 4, round: 5 });
        assert_eq!(journal.add_kept(5, LAYOUT, &mut [0.0]), other);
        assert_eq!(journal.write_pending(5, LAYOUT, FIRST, vec![0.0], None), other);

        let ended = |outcome| {
            let mut journal = journal.clone();
            journal.settle(4, outcome).unwrap();
            assert_eq!(journal.pending(), None);
            added(&journal, 5, LAYOUT)
        };
        assert_eq!(ended(Outcome::Accepted), 9.0);
        assert_eq!(ended(Outcome::NotAccepted), 1.0 + 0.45);
        assert_eq!(ended(Outcome::Unknown), 1.0);
        assert_eq!(journal.settle(5, Outcome::Accepted), Err(ResidualError::NothingPending(5)));
        assert_eq!(journal.pending(), Some((4, SECOND)));
    }

    #[test]
    fn an_attempt_tried_again_sends_the_same_bytes_or_nothing() {
        let mut journal = ResidualJournal::new(1);
        journal.write_pending(4, LAYOUT, FIRST, vec![8.0], None).unwrap();
        let before = journal.clone();
        journal.write_pending(4, LAYOUT, FIRST, vec![9.0], None).unwrap();
        assert_eq!(
            journal.write_pending(4, LAYOUT, SECOND, vec![8.0], None),
            Err(ResidualError::EncodedTwice(4))
        );
        assert_eq!(journal, before);
    }

    #[test]
    fn a_residual_ages_and_belongs_to_one_layout() {
        let journal = kept(3, &[0.5]);
        assert_eq!(added(&journal, 6, LAYOUT), 1.0 + 0.5 * 0.81);
        assert!(added(&journal, 24, LAYOUT) > 1.0);
        assert_eq!(added(&journal, 25, LAYOUT), 1.0);
        assert_eq!(added(&journal, 4, SECOND), 1.0);
        assert_eq!(
            journal.add_kept(3, LAYOUT, &mut [0.0]),
            Err(ResidualError::Backwards { round: 3, kept: 3 })
        );
    }

    #[test]
    fn a_residual_is_capped_and_finite() {
        let mut journal = ResidualJournal::new(2);
        let mut write =
            |values: [f32; 2], clip| journal.write_pending(1, LAYOUT, FIRST, values.to_vec(), clip);
        assert_eq!(write([1.0, f32::NAN], None), Err(ResidualError::NotFinite(1)));
        assert_eq!(write([1.0, 1.0], Some(0.0)), Err(ResidualError::ClipNorm(0.0)));
        write([30.0, 40.0], Some(5.0)).unwrap();
        journal.settle(1, Outcome::Accepted).unwrap();
        let mut delta = [0.0; 2];
        journal.add_kept(2, LAYOUT, &mut delta).unwrap();
        assert_eq!(delta, [6.0, 8.0]);
        assert_eq!(
            journal.add_kept(2, LAYOUT, &mut [0.0]),
            Err(ResidualError::WrongLength { expected: 2, found: 1 })
        );
    }

    #[test]
    fn a_journal_comes_back_and_a_damaged_one_is_known() {
        let mut both = kept(3, &[0.5, -1.0]);
        both.write_pending(4, SECOND, SECOND, vec![8.0, 0.25], None).unwrap();
        for journal in [ResidualJournal::new(2), kept(3, &[0.5, -1.0]), both] {
            let bytes = journal.to_bytes();
            assert_eq!(ResidualJournal::from_bytes(&bytes, 2).unwrap(), journal);
            assert!(ResidualJournal::from_bytes(&bytes, 3).is_err());
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 4;
                assert!(ResidualJournal::from_bytes(&damaged, 2).is_err(), "byte {at}");
                assert!(ResidualJournal::from_bytes(&bytes[..at], 2).is_err(), "cut at {at}");
            }
        }
    }

    /// Nothing is lost: what was received and what is kept add up to what was wanted.
    #[test]
    fn what_is_not_sent_is_kept() {
        assert_eq!(unsent(&[1.0, 2.0, 3.0], &[0.0, 2.5, 0.0]), [1.0, -0.5, 3.0]);
        let support = Support::new(4, vec![1, 3]).unwrap();
        assert_eq!(off_support(&[1.0, 2.0, 3.0, 4.0], &support, &[2.5, 4.0]), [1.0, -0.5, 3.0, 0.0]);
    }
}
