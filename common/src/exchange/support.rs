//! stand-in until compression::support is there
use super::ExchangeError;
use super::masked::Summation;
use crate::digest::Digest;
use crate::job::{Job, JobError};
use std::sync::Arc;

pub(super) struct Votes {
    pub(super) cells: usize,
    pub(super) width: u32,
    pub(super) votes: usize,
}

pub(super) fn votes(job: &Job) -> Result<Option<Votes>, ExchangeError> {
    let _ = job;
    Ok(None)
}
pub(super) fn ballot(_whole: &[f32], _votes: usize, cells: usize, _seed: u64, _round: u32) -> Vec<i64> {
    vec![0; cells]
}

/// The coordinates of one round's masked updates.
#[derive(Debug, Clone)]
pub struct RoundSupport {
    indices: Arc<[u32]>,
    encoded: Arc<[u8]>,
}

impl RoundSupport {
    /// The first round's; `None` where all coordinates are sent.
    pub fn first(job: &Job) -> Result<Option<Self>, ExchangeError> {
        if job.support_rule().is_some() {
            return Err(JobError::Invalid("not yet".into()).into());
        }
        Ok(None)
    }
    /// That of `round`, from the scores that the round before left.
    pub fn after(job: &Job, _round: u32, _scores: Vec<f32>) -> Result<Option<Self>, ExchangeError> {
        Self::first(job)
    }
    /// As it was sent.
    pub fn decode(_job: &Job, _bytes: &[u8]) -> Result<Arc<[u32]>, ExchangeError> {
        Err(JobError::Invalid("not yet".into()).into())
    }
    /// Ascending.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }
    /// For the wire.
    pub fn encoded(&self) -> Arc<[u8]> {
        self.encoded.clone()
    }
    /// Of the encoded form.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encoded)
    }
    /// What the next supports follow from.
    pub fn scores(&self) -> Option<&[f32]> {
        None
    }
    /// The next round's.
    pub fn next(&self, _job: &Job, _round: u32, _opened: &Summation) -> Result<Self, ExchangeError> {
        Ok(self.clone())
    }
}
