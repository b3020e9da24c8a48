//! A model as a flat vector: its layout, first parameters, bytes, digest and `.safetensors` form.

mod architecture;
mod layout;
mod network;
mod safetensors;
mod sequential;

pub use architecture::{Architecture, ArchitectureError};
pub use layout::{Layout, Tensor};
pub use network::{Layer, Network};
pub use safetensors::{ImportError, export, import};
pub use sequential::LayerSpec;
pub(crate) use sequential::check as check_layers;

use std::sync::Arc;

use crate::digest::Digest;

/// The parameters of one model, shared without copying: the tensors of its [`Layout`], one after another.
pub type Parameters = Arc<Vec<f32>>;

/// The bytes of a flat vector on a wire or a disk: `f32`, little endian, in the order of the layout.
pub fn to_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * 4);
    for value in values {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Reads [`to_bytes`] back; `None` unless the length is a multiple of four.
pub fn from_bytes(bytes: &[u8]) -> Option<Vec<f32>> {
    let (words, rest) = bytes.as_chunks::<4>();
    rest.is_empty().then(|| words.iter().map(|word| f32::from_le_bytes(*word)).collect())
}

/// The digest of a model or an update: BLAKE3 of [`to_bytes`].
pub fn digest(values: &[f32]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for part in values.chunks(4096) {
        hasher.update(&to_bytes(part));
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_back_to_the_same_bits() {
        let values: Vec<f32> =
            (0..10_000).map(|i| (i as f32 - 5000.0) * 1.1e-3).chain([f32::NAN, -0.0]).collect();
        let bytes = to_bytes(&values);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&from_bytes(&bytes).unwrap()), bits(&values));
        assert_eq!(digest(&values), Digest::of(&bytes));
        assert!(from_bytes(&bytes[1..]).is_none());
    }
}
