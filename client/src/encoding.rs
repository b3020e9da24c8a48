//! From what training produced to the bytes that leave: compressed, rounded, noised and masked as the job says.

use tributary_common::exchange::{ClientValues, Coins, ExchangeError, Masked, Plain};
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::privacy::noise::{NoiseError, SecretRng};
use tributary_common::rng::{Purpose, Stream};
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

/// What decides how an update is rounded: without `[privacy]` a stream that anybody can repeat, so that masked and
/// unmasked runs, and runs before and after a crash, have the same bits; with it secret bits, for whoever knows the
/// coins can choose among them (corrections 5 and 11).
///
/// # Errors
/// [`NoiseError::Entropy`].
pub fn coins(job: &Job, round: u32, client: &NodeName) -> Result<Coins, NoiseError> {
    Ok(match &job.privacy {
        None => Coins::Public(Stream::new(job.seed, Purpose::Rounding, round, client.as_str())),
        Some(_) => Coins::Secret(SecretRng::new()?),
    })
}

/// Encodes an update that the coordinator sees.
///
/// # Errors
/// [`ExchangeError`].
pub fn plain(
    exchange: &Plain,
    update: &ClientUpdate,
    residual: Option<&[f32]>,
    coins: &mut Coins,
) -> Result<Encoded, ExchangeError> {
    let encoded = exchange.encode(&update.delta, residual, coins)?;
    Ok(Encoded { bytes: encoded.bytes, residual: encoded.residual })
}

/// Encodes and masks an update of which the coordinator sees the sum with others. `support` holds its coordinates, `None`
/// all.
///
/// # Errors
/// [`ExchangeError`].
pub fn masked(
    exchange: &Masked,
    round: u32,
    (update, residual): (&ClientUpdate, Option<&[f32]>),
    support: Option<&[u32]>,
    coins: &mut Coins,
    masks: &[MaskTerm],
) -> Result<Encoded, ExchangeError> {
    let ClientUpdate { delta, examples, loss } = update;
    let values = ClientValues { values: delta, examples: *examples, loss: *loss, residual };
    let mut encoded = exchange.encode(&values, round, support, coins)?;
    if encoded.cut > 0 {
        tracing::warn!(
            "{} values of the update were cut to [secure_aggregation] coordinate_limit; a larger one may be needed",
            encoded.cut
        );
    }
    encoded.integers.mask(masks);
    Ok(Encoded { bytes: encoded.integers.to_bytes(), residual: encoded.residual })
}
