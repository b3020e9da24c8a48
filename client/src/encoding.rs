//! From what training produced to the bytes that leave: compressed, rounded, noised and masked as the job says.

use tributary_common::exchange::{ClientValues, Coins, Exchange, ExchangeError, RoundSupport};
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::secagg::keys::MaskTerm;
use zeroize::Zeroize as _;

use crate::trainer::ClientUpdate;

/// What training produced, wiped from memory when it is dropped: with noise in shares it has none yet.
pub struct Produced(ClientUpdate);

impl Produced {
    /// Takes charge of an update.
    pub fn new(update: ClientUpdate) -> Self {
        Self(update)
    }

    /// The update.
    pub fn update(&self) -> &ClientUpdate {
        &self.0
    }

    /// The update, to add what earlier ones left out.
    pub fn update_mut(&mut self) -> &mut ClientUpdate {
        &mut self.0
    }
}

impl Drop for Produced {
    fn drop(&mut self) {
        self.0.delta.zeroize();
    }
}

/// Bytes to send, and what they leave out.
pub struct Encoded {
    /// What is sent.
    pub bytes: Vec<u8>,
    /// All parameters; `None` where nothing is kept.
    pub residual: Option<Vec<f32>>,
}

/// Encodes the update of `client` for `round`, to which what earlier ones left out is added already. `masks` are those of
/// this update, and `None` where the job has none.
///
/// # Errors
/// [`ExchangeError`]; [`ExchangeError::Bytes`] if there are masks and the job has none, or the other way round.
pub fn encode(
    job: &Job,
    round: u32,
    client: &NodeName,
    update: &ClientUpdate,
    support: Option<&RoundSupport>,
    masks: Option<&[MaskTerm]>,
) -> Result<Encoded, ExchangeError> {
    let mut coins = Coins::of(job, round, client)?;
    let ClientUpdate { delta, examples, loss } = update;
    match (Exchange::of(job)?, masks) {
        (Exchange::Plain(plain), None) => {
            let encoded = plain.encode(delta, &mut coins)?;
            Ok(Encoded { bytes: encoded.bytes, residual: encoded.residual })
        }
        (Exchange::Masked(masked), Some(masks)) => {
            let values = ClientValues { values: delta, examples: *examples, loss: *loss };
            let mut encoded = masked.encode(&values, round, support, &mut coins)?;
            if encoded.cut > 0 {
                tracing::warn!(
                    "{} values of the update were cut to [secure_aggregation] coordinate_limit; a larger one may be needed",
                    encoded.cut
                );
            }
            encoded.integers.mask(masks)?;
            Ok(Encoded { bytes: encoded.integers.to_bytes()?, residual: encoded.residual })
        }
        _ => Err(ExchangeError::Bytes("an update is masked if its job says so, and not otherwise".into())),
    }
}
