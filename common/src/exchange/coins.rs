//! Where the coins of rounding come from: a named stream where nothing is private, secret bits where something is.

use std::convert::Infallible;

use rand::TryRng;

use super::ExchangeError;
use crate::ids::NodeName;
use crate::job::Job;
use crate::privacy::noise::SecretRng;
use crate::rng::{Purpose, Stream};
use crate::secagg::mask::KeyStream;

/// The coins of one client's update.
#[derive(Debug)]
pub enum Coins {
    /// A named stream: a masked sum is then the unmasked one to the last bit, and a run can be repeated.
    Public(Stream),
    /// Secret bits of the operating system's, for noise too.
    Secret(SecretRng),
}

impl Coins {
    /// The coins of `client`'s update in `round` of `job`: secret with `[privacy]`.
    ///
    /// # Errors
    /// [`ExchangeError::Noise`] if the operating system has no random bytes.
    pub fn of(job: &Job, round: u32, client: &NodeName) -> Result<Self, ExchangeError> {
        match &job.privacy {
            None => Ok(Coins::Public(Stream::new(job.seed, Purpose::Rounding, round, client.as_str()))),
            Some(_) => {
                SecretRng::new().map(Coins::Secret).map_err(|error| ExchangeError::Noise(error.to_string()))
            }
        }
    }

    /// A key stream of these coins.
    pub(super) fn key_stream(&mut self) -> KeyStream {
        KeyStream::from_rng(self)
    }

    /// The secret bits, which noise needs.
    pub(super) fn secret(&mut self) -> Result<&mut SecretRng, ExchangeError> {
        match self {
            Coins::Public(_) => {
                Err(ExchangeError::Noise("the coins of noised updates must be secret".into()))
            }
            Coins::Secret(rng) => Ok(rng),
        }
    }
}

impl TryRng for Coins {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        match self {
            Coins::Public(stream) => stream.try_next_u32(),
            Coins::Secret(rng) => rng.try_next_u32(),
        }
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        match self {
            Coins::Public(stream) => stream.try_next_u64(),
            Coins::Secret(rng) => rng.try_next_u64(),
        }
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        match self {
            Coins::Public(stream) => stream.try_fill_bytes(bytes),
            Coins::Secret(rng) => rng.try_fill_bytes(bytes),
        }
    }
}
