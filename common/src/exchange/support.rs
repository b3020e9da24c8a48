//! The coordinates that all masked updates of a round share, as the job's rule chooses them.

use std::sync::Arc;

use super::ExchangeError;
use super::masked::Summation;
use crate::compression::support::{Ballot, DelayedVote, SeededRandom, Support, SupportState, Track};
use crate::digest::Digest;
use crate::job::{Job, SupportRule};
use crate::rng::{Purpose, Stream};

/// Share of the support that `track` draws at random, where the job does not say.
const TRACK_EXPLORATION: f64 = 0.25;

/// One round's support: at the coordinator with the state that the next one follows from, at a client without.
#[derive(Debug, Clone)]
pub struct RoundSupport {
    support: Support,
    ballot: Option<Ballot>,
    encoded: Arc<[u8]>,
    state: Option<SupportState>,
}

impl RoundSupport {
    /// The first round's; `None` where all coordinates are sent.
    ///
    /// # Errors
    /// [`ExchangeError`] for a density that leaves no support.
    pub fn first(job: &Job) -> Result<Option<Self>, ExchangeError> {
        let Some(rule) = job.support_rule() else { return Ok(None) };
        let (parameters, size) = (job.layout()?.parameters(), job.masked_coordinates()?);
        let mut lot = lot(job, 1);
        let exploration = job.compression.as_ref().and_then(|compression| compression.exploration);
        let state = match rule {
            SupportRule::DelayedVote => {
                SupportState::DelayedVote(DelayedVote::first(parameters, size, &mut lot)?)
            }
            SupportRule::Track => {
                let exploration = exploration.unwrap_or(TRACK_EXPLORATION);
                SupportState::Track(Track::first(parameters, size, exploration, &mut lot)?)
            }
            SupportRule::Random => {
                SupportState::SeededRandom(SeededRandom::first(parameters, size, &mut lot)?)
            }
        };
        Ok(Some(Self::of(state)))
    }

    /// The one whose state was stored.
    ///
    /// # Errors
    /// [`ExchangeError::Bytes`] for a damaged state, or one of another model.
    pub fn stored(job: &Job, state: &[u8]) -> Result<Self, ExchangeError> {
        Ok(Self::of(SupportState::from_bytes(state, job.layout()?.parameters())?))
    }

    /// The one that the coordinator sent, at a client of a job that has supports.
    ///
    /// # Errors
    /// [`ExchangeError::Bytes`] for anything but a support of the job's size.
    pub fn received(job: &Job, bytes: &[u8]) -> Result<Self, ExchangeError> {
        let (parameters, size) = (job.layout()?.parameters(), job.masked_coordinates()?);
        let support = Support::from_bytes(bytes, parameters, size)?;
        let votes = job.support_rule() == Some(SupportRule::DelayedVote);
        let ballot = votes.then(|| Ballot::new(parameters, size)).transpose()?;
        Ok(Self { support, ballot, encoded: bytes.into(), state: None })
    }

    fn of(state: SupportState) -> Self {
        let support = state.support().clone();
        let ballot = match &state {
            SupportState::DelayedVote(state) => Some(state.ballot()),
            SupportState::Track(_) | SupportState::SeededRandom(_) => None,
        };
        let encoded = support.to_bytes().into();
        Self { support, ballot, encoded, state: Some(state) }
    }

    /// The coordinates.
    pub fn support(&self) -> &Support {
        &self.support
    }

    pub(super) fn ballot(&self) -> Option<&Ballot> {
        self.ballot.as_ref()
    }

    /// As it is sent to clients.
    pub fn encoded(&self) -> Arc<[u8]> {
        self.encoded.clone()
    }

    /// Digest of what is sent: every client of a session must have the same.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encoded)
    }

    /// What is to be stored with the model: the supports after this one follow from it.
    pub fn state(&self) -> Vec<u8> {
        self.state.as_ref().map_or_else(Vec::new, SupportState::to_bytes)
    }

    /// The support after `round`, whose updates `opened` sums.
    ///
    /// # Errors
    /// [`ExchangeError`] if the sum is not one over this support.
    pub fn next(&self, job: &Job, round: u32, opened: &Summation) -> Result<Self, ExchangeError> {
        let mut lot = lot(job, round.saturating_add(1));
        let mut state = self
            .state
            .clone()
            .ok_or_else(|| ExchangeError::Bytes("a client knows no next support".into()))?;
        match &mut state {
            SupportState::DelayedVote(state) => {
                state.advance(&opened.votes, &vote_seed(job.seed, round), &mut lot)?;
            }
            SupportState::Track(state) => {
                let sums: Vec<f32> = opened.values.iter().map(|value| *value as f32).collect();
                state.advance(&sums, &mut lot)?;
            }
            SupportState::SeededRandom(state) => state.advance(&mut lot)?,
        }
        Ok(Self::of(state))
    }
}

fn lot(job: &Job, round: u32) -> Stream {
    Stream::new(job.seed, Purpose::Support, round, "")
}

/// How clients vote, and bits of a cell of the sum, where they do.
pub(super) fn ballot(job: &Job) -> Result<Option<(Ballot, u32)>, ExchangeError> {
    if job.support_rule() != Some(SupportRule::DelayedVote) {
        return Ok(None);
    }
    let ballot = Ballot::new(job.layout()?.parameters(), job.masked_coordinates()?)?;
    // A width has at least two bits.
    Ok(Some((ballot, Ballot::cell_bits(job.invited()).max(2))))
}

/// The public seed of a round's votes.
pub(super) fn vote_seed(seed: u64, round: u32) -> [u8; 32] {
    let mut bytes = b"tributary votes v1".to_vec();
    bytes.extend(seed.to_le_bytes());
    bytes.extend(round.to_le_bytes());
    Digest::of(&bytes).0
}
