//! How a client's update travels: what leaves a client, and what the coordinator makes of it.
//!
//! [`Plain`] updates are seen one by one, compressed if the job says so. [`Masked`] ones are integers modulo 2^b that are
//! only ever seen as a sum. Both ends, and the simulator, compute both from the job alone.

mod coins;
mod masked;
mod plain;
mod support;
mod terms;
#[cfg(test)]
mod tests;

pub use coins::Coins;
pub use masked::{ClientValues, Encoded, Integers, Masked, MaskedSum, Segment, Summation};
pub use plain::{Plain, PlainUpdate};
pub use support::RoundSupport;
pub use terms::{SessionOf, Terms};

use crate::compression::DecodeError;
use crate::compression::support::SupportError;
use crate::job::{Job, JobError};
use crate::secagg::ring::RingError;

/// How the updates of a job travel.
#[derive(Debug, Clone)]
pub enum Exchange {
    /// One by one.
    Plain(Plain),
    /// Under masks.
    Masked(Box<Masked>),
}

/// Why an update cannot be encoded, or read. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The job cannot be carried out.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The bytes are not those of an update.
    #[error("the update cannot be read: {0}")]
    Bytes(String),
    /// A vector has another length than the model.
    #[error("{found} values, but {expected} are expected")]
    Length {
        /// Values expected.
        expected: usize,
        /// Values found.
        found: usize,
    },
    /// The sum is not one that the clients can have sent.
    #[error(
        "the sum is out of its range: coordinate {index} is {value}, and {clients} clients reach ±{most} at most"
    )]
    Range {
        /// The coordinate.
        index: usize,
        /// Its sum.
        value: i64,
        /// Clients in the sum.
        clients: u32,
        /// Largest magnitude.
        most: u64,
    },
    /// Integers that do not fit, or values that are no numbers.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A support that does not fit.
    #[error(transparent)]
    Support(#[from] SupportError),
    /// There is no noise to be had.
    #[error("no noise, so no update: {0}")]
    Noise(String),
}

impl From<DecodeError> for ExchangeError {
    fn from(error: DecodeError) -> Self {
        ExchangeError::Bytes(error.to_string())
    }
}

impl Exchange {
    /// How the updates of `job` travel.
    ///
    /// # Errors
    /// [`ExchangeError::Job`], for sums that do not fit.
    pub fn of(job: &Job) -> Result<Self, ExchangeError> {
        Ok(match &job.secure_aggregation {
            None => Exchange::Plain(Plain::of(job)?),
            Some(_) => Exchange::Masked(Box::new(Masked::of(job)?)),
        })
    }

    /// Fewest and most bytes of an update.
    pub fn update_bytes(&self) -> (u64, u64) {
        match self {
            Exchange::Plain(plain) => plain.update_bytes(),
            Exchange::Masked(masked) => (masked.update_bytes(), masked.update_bytes()),
        }
    }

    /// The masked exchange, if it is one.
    pub fn masked(&self) -> Option<&Masked> {
        match self {
            Exchange::Plain(_) => None,
            Exchange::Masked(masked) => Some(masked),
        }
    }
}
