//! stand-in until compression is there
use super::ExchangeError;
use super::masked::Coins;
use crate::job::Job;

/// How unmasked updates travel.
#[derive(Debug, Clone)]
pub struct Plain {
    parameters: usize,
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
    pub fn of(job: &Job) -> Result<Self, ExchangeError> {
        Ok(Self { parameters: job.layout()?.parameters() })
    }
    /// Whether an update is sent as it is: `f32`, little endian.
    pub fn is_dense(&self) -> bool {
        true
    }
    /// Fewest and most bytes of an update.
    pub fn update_bytes(&self) -> (u64, u64) {
        let bytes = self.parameters as u64 * 4;
        (bytes, bytes)
    }
    /// Encodes an update.
    pub fn encode(
        &self,
        delta: &[f32],
        residual: Option<&[f32]>,
        coins: &mut Coins,
    ) -> Result<PlainUpdate, ExchangeError> {
        let _ = (residual, coins);
        Ok(PlainUpdate { bytes: crate::model::to_bytes(delta), residual: None })
    }
    /// The values of an update.
    pub fn decode(&self, bytes: &[u8]) -> Result<Vec<f32>, ExchangeError> {
        crate::model::from_bytes(bytes).ok_or_else(|| ExchangeError::Bytes("not whole".into()))
    }
}
