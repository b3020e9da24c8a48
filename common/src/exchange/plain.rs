//! An update that is not masked: the coordinator sees it, whole or reduced as the job says.

use super::{Coins, ExchangeError};
use crate::compression::residual::unsent;
use crate::compression::{Scheme, ValueCodec};
use crate::job::{CompressionScheme, Job, JobError};
use crate::model::from_bytes;

/// How a job's unmasked updates travel.
#[derive(Debug, Clone)]
pub struct Plain {
    scheme: Scheme,
    parameters: usize,
    keeps_residual: bool,
}

/// An encoded update.
#[derive(Debug)]
pub struct PlainUpdate {
    /// What is sent.
    pub bytes: Vec<u8>,
    /// What it leaves out; `None` where nothing is kept.
    pub residual: Option<Vec<f32>>,
}

impl Plain {
    /// How the updates of `job` travel.
    ///
    /// # Errors
    /// [`ExchangeError::Job`].
    pub fn of(job: &Job) -> Result<Self, ExchangeError> {
        let parameters = job.layout()?.parameters();
        let scheme = match &job.compression {
            None => Scheme::Dense,
            Some(compression) => match compression.scheme {
                CompressionScheme::TopK => Scheme::TopK {
                    density: compression.density.unwrap_or(1.0),
                    values: match compression.value_bits {
                        Some(32) => ValueCodec::F32,
                        Some(16) => ValueCodec::Bf16,
                        Some(1) => ValueCodec::Sign,
                        _ => ValueCodec::Int8,
                    },
                },
                CompressionScheme::Int8 => Scheme::Int8,
                CompressionScheme::Qsgd => {
                    // At most 127, or the job was refused.
                    Scheme::Qsgd { levels: compression.levels.unwrap_or(7).min(127) as u16 }
                }
            },
        };
        scheme.check(parameters).map_err(|error| JobError::Invalid(format!("[compression] {error}")))?;
        Ok(Self { scheme, parameters, keeps_residual: job.has_error_feedback() })
    }

    /// Whether an update is sent as it is: `f32`, little endian.
    pub fn is_dense(&self) -> bool {
        self.scheme == Scheme::Dense
    }

    /// Fewest and most bytes of an update.
    pub fn update_bytes(&self) -> (u64, u64) {
        if self.is_dense() {
            // As it is, in no container.
            let bytes = self.parameters as u64 * 4;
            return (bytes, bytes);
        }
        match self.scheme.exact_bytes(self.parameters) {
            Some(bytes) => (bytes as u64, bytes as u64),
            None => (0, self.scheme.most_bytes(self.parameters) as u64),
        }
    }

    /// Encodes an update; what earlier ones left out is added to it already.
    ///
    /// # Errors
    /// [`ExchangeError::Bytes`] for a value that the coordinator would refuse.
    pub fn encode(&self, update: &[f32], coins: &mut Coins) -> Result<PlainUpdate, ExchangeError> {
        let encoded =
            self.scheme.encode(update, coins).map_err(|error| ExchangeError::Bytes(error.to_string()))?;
        let residual = self.keeps_residual.then(|| unsent(update, &encoded.received));
        Ok(PlainUpdate { bytes: encoded.bytes, residual })
    }

    /// The values of an update.
    ///
    /// # Errors
    /// [`ExchangeError::Bytes`], whatever the bytes are.
    pub fn decode(&self, bytes: &[u8]) -> Result<Vec<f32>, ExchangeError> {
        if self.is_dense() {
            let values = from_bytes(bytes).filter(|values| values.len() == self.parameters);
            return values.ok_or_else(|| {
                ExchangeError::Bytes(format!("{} bytes for {} values", bytes.len(), self.parameters))
            });
        }
        Ok(self.scheme.decode(bytes, self.parameters)?)
    }
}
